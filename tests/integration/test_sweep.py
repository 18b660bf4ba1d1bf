"""`qris-expire sweep` and `status`: real processes, broker, worker and simulated gateway; interrupted in every way."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from tests.brokers import PrivateBroker
from tests.builders import outcome
from tests.proxy import FaultProxy
from tests.rabbit import Rabbit, address, by_way_of, delete_topology
from tests.waiting import wait_until
from tests.worker_process import WorkerProcess
from worker.cli import main
from worker.core.outcome import Reason, encode_outcome
from worker.core.sweep import inbox_name
from worker.core.topology import Names, topology
from worker.sandbox.simulator import Script, Simulator

ROOT = Path(__file__).parents[2]
NOBODY = "amqp://127.0.0.1:1"
PAID = {"code": "4049314", "message": "Paid Bill", "repeat": True}
NOT_FOUND = {"code": "4049301", "message": "QR not Found", "repeat": True}
BROKEN = {"code": "5009300", "message": "General Error", "repeat": True}

Call = Callable[..., tuple[int, list[str]]]


class Desk:
    """Where somebody sits and calls `qris-expire`: a directory, an environment, the broker beside it."""

    def __init__(self, directory: Path, url: str, prefix: str) -> None:
        self.directory = directory
        self.names = Names(prefix)
        self.url = url
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "100",
            "XDG_STATE_HOME": str(directory / "state"),
            "AMQP_URL": url,
            "AMQP_PREFIX": prefix,
        }

    def __call__(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Calls it and waits for its end."""
        return self.fed(None, *arguments, **environ)

    def fed(self, input: bytes | None, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """The same, with something on its standard input."""
        done = subprocess.run(
            [sys.executable, "-m", "worker", *arguments],
            env={**self.environment, **environ},
            cwd=self.directory,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=60,
            check=False,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    @contextmanager
    def calling(self, *arguments: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
        """Calls it and goes on; it is killed if it still runs in the end."""
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", *arguments],
            env={**self.environment, **environ},
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def file(self, bills: int, name: str = "bills.csv", first: int = 1) -> str:
        """A CSV of so many bills, its own name returned."""
        lines = [f"{number:08d},M1" for number in range(first, first + bills)]
        (self.directory / name).write_text("\n".join(["billnumber,merchantId", *lines, ""]))
        return name

    def fact(self, batch: str, query: str) -> Any:
        """What the journal says, while it is written; None before there is one."""
        path = self.directory / "state" / "qris-expire" / self.names.prefix / f"{batch}.db"
        if not path.exists():
            return None
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as journal:
            return journal.execute(query).fetchone()[0]

    def published(self, batch: str) -> int:
        return int(self.fact(batch, "SELECT value FROM facts WHERE name = 'published'") or 0)

    def answered(self, batch: str) -> int:
        return int(self.fact(batch, "SELECT count(*) FROM bills WHERE status IS NOT NULL") or 0)

    def report(self, name: str = "out.csv") -> list[dict[str, str]]:
        with (self.directory / name).open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def desk(tmp_path: Path, amqp_url: str, prefix: str) -> Desk:
    """A desk with a broker."""
    return Desk(tmp_path, amqp_url, prefix)


@pytest.fixture
def at_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, list[str]]]]:
    """Calls it in this process, where nothing gets as far as a broker: exit code and lines of standard error."""
    import structlog

    before = structlog.get_config()
    for name, value in {**desk.environment, "AMQP_URL": NOBODY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(desk.directory)
    yield lambda *arguments: (main(["sweep", *arguments]), capsys.readouterr().err.splitlines())
    structlog.configure(**before)


@pytest.fixture
def rabbit(amqp_url: str, prefix: str) -> Iterator[Rabbit]:
    """The broker, looked at from outside; batches' own queues are deleted in the end."""
    with Rabbit(amqp_url) as connection:
        yield connection
        for batch in ("b", "c"):
            connection.delete_queue(inbox_name(Names(prefix), batch))


@pytest.fixture
def declared(rabbit: Rabbit, prefix: str) -> Rabbit:
    """The same, with the topology in place."""
    rabbit.declare(topology(prefix, "quorum", ()))
    return rabbit


def rows_of(printed: str) -> dict[str, int]:
    """The table's numbers by status and reason, and the total."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    return {f"{status} {reason}": int(count.replace(",", "")) for status, reason, count in cells}


# --- input


def test_one_bad_row_and_nothing_is_published(desk: Desk, declared: Rabbit) -> None:
    """Each bad row is named with file and line; the exit code is 2, and the lane stays empty."""

    (desk.directory / "bills.csv").write_text("billnumber,notAfter\n1,\n2 2,\n3,tomorrow\n4,\n")

    done = desk("sweep", "bills.csv", "--merchant-id", "M")

    assert (done.returncode, done.stdout) == (2, "")
    first, second, last = done.stderr.splitlines()
    assert first.startswith("bills.csv:3: billnumber must be")
    assert second.startswith("bills.csv:4: notAfter: ")
    assert last.startswith("qris-expire: bills.csv: 2 of 4 rows cannot be used, so nothing was sent")
    assert declared.depth(desk.names.queue("sweep")) == 0


def test_published_commands_are_those_of_the_file(desk: Desk, rabbit: Rabbit) -> None:
    """With --skip-invalid the rest goes: each bill once, persistent, under the batch's id. No worker need have run."""

    text = "\ufeffbillNumber;Reference\r\n007;r1\r\n8 8;r2\r\n009;\r\n007;r3\r\n"
    (desk.directory / "bills.csv").write_bytes(text.encode())

    done = desk("sweep", "bills.csv", "--batch-id", "b", "--merchant-id", "M7", "--skip-invalid")

    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"published 2 bills to {desk.names.queue('sweep')} as batch b (4 rows: 2 bills, 1 duplicate, 1 invalid)\n"
    )
    sent = rabbit.take(desk.names.queue("sweep"), 2, timeout=30)
    assert [json.loads(message.body) for message in sent] == [
        {"billnumber": "007", "additionalInfo": {"merchantId": "M7"}, "reference": "r1"},
        {"billnumber": "009", "additionalInfo": {"merchantId": "M7"}},
    ]
    assert {message.properties.delivery_mode for message in sent} == {2}
    headers = [{name: each.properties.headers[name] for name in ("batch-id", "batch-size")} for each in sent]
    assert headers == [{"batch-id": "b", "batch-size": 2}] * 2
    assert all(abs(message.properties.timestamp - time.time()) < 60 for message in sent)


def test_same_batch_gives_the_same_ids(desk: Desk, rabbit: Rabbit) -> None:
    """Called again it publishes nothing; on a machine that knows nothing it publishes the same ids again."""

    name, lane = desk.file(5), desk.names.queue("sweep")

    assert desk("sweep", name, "--batch-id", "b").returncode == 0
    again = desk("sweep", name, "--batch-id", "b")
    assert (again.returncode, "published already" in again.stdout) == (0, True)
    assert rabbit.depth(lane) == 5
    elsewhere = desk("sweep", name, "--batch-id", "b", XDG_STATE_HOME=str(desk.directory / "other"))
    assert elsewhere.returncode == 0

    ids = Counter(message.properties.message_id for message in rabbit.take(lane, 10, timeout=30))
    assert set(ids.values()) == {2}


def test_unfinished_batch_is_gone_on_with_after_midnight(desk: Desk) -> None:
    """The default id is content and day, whatever the file is called; what broke off yesterday keeps its own."""

    name = desk.file(3)
    shown = desk("sweep", name, "--dry-run").stdout.splitlines()[1]
    today = shown.split("batch ")[1].rstrip(":")
    yesterday = f"20200101-{today.partition('-')[2]}"
    assert desk("sweep", name, "--batch-id", yesterday, AMQP_URL=NOBODY).returncode == 1

    assert f"as batch {yesterday} " in desk("sweep", name).stdout
    assert f"as batch {today} " in desk("sweep", desk.file(3, "copy.csv")).stdout


def test_batch_is_not_mixed_with_other_input(desk: Desk, declared: Rabbit) -> None:
    """An id that stands for other bills is refused; nothing is published."""

    assert desk("sweep", desk.file(2), "--batch-id", "b").returncode == 0

    done = desk("sweep", desk.file(3, "other.csv"), "--batch-id", "b")

    assert (done.returncode, "begun with other input (bills.csv" in done.stderr) == (2, True)
    assert declared.depth(desk.names.queue("sweep")) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "bills.csv: is empty"),
        (b"1\n2\n", "bills.csv:1: has no column billnumber"),
        ("billnumber\n1\n".encode("utf-16"), "bills.csv:1: is UTF-16; save it as UTF-8"),
        ("billnumber\n1\n".encode("utf-32"), "bills.csv:1: is UTF-32; save it as UTF-8"),
        ("billnumber\n1\n".encode("utf-16-le"), "bills.csv:1: has NUL bytes: it is UTF-16"),
        (
            b"billnumber,name\n1,Caf\xe9\n",
            "bills.csv:2: is not UTF-8 text: byte 0xE9, 'é' in Windows-1252 (as in '1,Café')",
        ),
        (
            gzip.compress(b"billnumber\n1\n", mtime=0),
            "bills.csv: is compressed with gzip; unpack it: gzip -dc bills.csv | ",
        ),
        (bz2.compress(b"billnumber\n1\n"), "bills.csv: is compressed with bzip2"),
        (lzma.compress(b"billnumber\n1\n"), "bills.csv: is compressed with xz"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "bills.csv: is an Excel workbook of the old form (.xls)"),
        (b"PK\x03\x04\n", "bills.csv: is a damaged zip archive"),
        (b"<html><table>\n", "bills.csv: is HTML or XML"),
        (b"%PDF-1.7\n", "bills.csv: is a PDF document"),
    ],
)
def test_file_of_another_kind_is_one_clear_line(desk: Desk, at_once: Call, content: bytes, said: str) -> None:
    """Exit code 2, without a broker; no journal stays behind."""

    (desk.directory / "bills.csv").write_bytes(content)

    code, lines = at_once("bills.csv", "--skip-invalid")

    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"qris-expire: {said}")
    assert list((desk.directory / "state").rglob("*.db")) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["missing.csv"],
        ["bills.csv", "--follow", "b"],
        ["--follow", "b", "--dry-run"],
        ["--follow", "nobody-knows"],
        ["bills.csv", "--batch-id", "a/b"],
        ["bills.csv", "--merchant-id", "a b"],
        ["bills.csv", "--direct", "--republish"],
        ["bills.csv", "--report", "no/where.csv"],
        ["bills.csv", "--report", "."],
        ["bills.csv", "--report", "b.db"],
        ["bills.csv", "--delimiter", ";;"],
        ["bills.csv", "--window", "5"],
        ["bills.csv", "--wait", "--window", "0"],
        ["bills.csv", "--stop", "b"],
    ],
)
def test_wrong_call_is_one_line(desk: Desk, at_once: Call, arguments: list[str]) -> None:
    """Exit code 2, before anything is published."""

    desk.file(1)

    code, lines = at_once(*arguments)

    assert (code, len(lines)) == (2, 1), lines


@pytest.mark.parametrize("how", ["the same name", "another spelling", "a link", "a hard link"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_report_never_replaces_the_input(desk: Desk, at_once: Call, how: str, force: list[str]) -> None:
    """Under whatever name it is given, and with --force as well: exit code 2, and the input is as it was."""

    bills = desk.directory / desk.file(2)
    content, other = bills.read_bytes(), desk.directory / "other.csv"
    if how == "a link":
        other.symlink_to(bills)
    elif how == "a hard link":
        other.hardlink_to(bills)
    name = {"the same name": "bills.csv", "another spelling": f"../{desk.directory.name}/bills.csv"}.get(
        how, "other.csv"
    )

    code, lines = at_once("bills.csv", "--report", name, *force)

    assert (code, "is the input itself" in lines[0]) == (2, True), lines
    assert bills.read_bytes() == content


def test_report_never_replaces_the_input_that_is_piped_in(desk: Desk) -> None:
    """`sweep - < bills.csv` reads a file all the same."""

    bills = desk.directory / desk.file(2)
    content = bills.read_bytes()
    with bills.open("rb") as stdin:
        done = subprocess.run(
            [sys.executable, "-m", "worker", "sweep", "-", "--report", "bills.csv", "--force"],
            env={**desk.environment, "AMQP_URL": NOBODY},
            cwd=desk.directory,
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert (done.returncode, "is the input itself" in done.stderr) == (2, True)
    assert bills.read_bytes() == content


def test_report_replaces_only_what_it_wrote_itself(desk: Desk, declared: Rabbit) -> None:
    """A file of somebody else, or a report that somebody has worked on, is left as it is without --force."""

    name, out = desk.file(2), desk.directory / "out.csv"
    call = ("sweep", name, "--batch-id", "b", "--report", "out.csv")
    out.write_text("somebody's own")

    refused = desk(*call)
    assert (refused.returncode, out.read_text()) == (2, "somebody's own")
    assert "out.csv exists already; name another file, or replace it with --force" in refused.stderr
    assert declared.depth(desk.names.queue("sweep")) == 0

    assert desk(*call, "--force").returncode == 0
    assert len(desk.report()) == 2
    assert desk(*call).returncode == 0
    out.write_text(out.read_text() + "a note\n")
    assert desk(*call).returncode == 2
    assert "a note" in out.read_text()


def test_report_never_replaces_the_journal(desk: Desk) -> None:
    """Not with --force either."""

    desk("sweep", desk.file(2), "--batch-id", "b", AMQP_URL=NOBODY)
    (journal,) = (desk.directory / "state").rglob("b.db")

    done = desk("sweep", "--follow", "b", "--report", str(journal), "--force", AMQP_URL=NOBODY)

    assert (done.returncode, "has the name of a journal" in done.stderr) == (2, True)
    assert desk.published("b") == 0


def test_dry_run_shows_what_would_go(desk: Desk) -> None:
    """Summary and first commands; it needs no broker and leaves nothing."""

    done = desk("sweep", desk.file(5), "--dry-run", "--batch-id", "b", AMQP_URL=NOBODY)

    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines)) == (0, "", 6)
    assert lines[0] == "bills.csv: 5 rows: 5 bills, 0 duplicates, 0 invalid"
    assert lines[2].endswith('{"billnumber":"00000001","additionalInfo":{"merchantId":"M1"}}')
    assert lines[-1] == "… and 2 more"
    assert not (desk.directory / "state").exists()


def test_dry_run_writes_down_what_is_invalid(desk: Desk) -> None:
    """A report of a dry run has every row, with why one cannot be sent; the odd ones of a column are reported."""

    rows = [f"{number:010d},M1" for number in range(10)] + ["92081,M1", "10.092.081,M1", "0000000001,M1"]
    (desk.directory / "bills.csv").write_text("\n".join(["billnumber,merchantId", *rows, ""]))

    done = desk("sweep", "bills.csv", "--dry-run", "--report", "out.csv", AMQP_URL=NOBODY)

    assert done.returncode == 2
    assert "1 value of billnumber has fewer than 10 digits" in done.stderr
    report = desk.report()
    assert Counter((line["status"], line["reason"]) for line in report) == {
        ("unsent", ""): 11,
        ("skipped", "duplicate"): 1,
        ("skipped", "invalid"): 1,
    }
    assert "'10.092.081' has the separators of thousands" in report[11]["detail"]
    assert not (desk.directory / "state").exists()


def test_report_has_the_form_of_the_input(desk: Desk) -> None:
    """Delimiter, byte-order mark and columns; where a spreadsheet wrote the input, one can open the report."""

    text = "\ufeffNo;Bill Number;Merchant Id;Toko\r\n1;0010092081;121000001;Jaya\r\n2;10092082;121000001;=1+1\r\n"
    (desk.directory / "bills.csv").write_bytes(text.encode())

    done = desk("sweep", "bills.csv", "--dry-run", "--report", "out.csv")
    piped = desk("sweep", "bills.csv", "--dry-run", "--report", "tab.csv", "--delimiter", "\t")

    assert (done.returncode, piped.returncode) == (0, 0), done.stderr
    header, first, second = (desk.directory / "out.csv").read_bytes().decode().splitlines()
    assert header.startswith(
        "\ufeffNo;Bill Number;Merchant Id;Toko;line;billnumber;merchantId;reference;commandId;status;"
    )
    assert first.startswith('1;"=""0010092081""";121000001;Jaya;2;"=""0010092081""";121000001;')
    assert second.startswith("2;10092082;121000001;'=1+1;3;10092082;")
    assert (desk.directory / "tab.csv").read_text(encoding="utf-8-sig").startswith("No\tBill Number\t")


def test_workbook_goes_in_and_comes_out(desk: Desk, declared: Rabbit) -> None:
    """As people in Excel have it: bills keep their zeros in what is sent and in the report."""

    book = openpyxl.Workbook()
    book.active.append(["No", "Bill Number", "Merchant Id"])
    book.active.append([1, "0010092081", 121000001])
    book.active.append([2, "10.092.082", 121000001])
    book.save(desk.directory / "bills.xlsx")

    done = desk("sweep", "bills.xlsx", "--batch-id", "b", "--skip-invalid", "--report", "out.xlsx")

    assert done.returncode == 0, done.stderr
    assert "bills.xlsx:3: billnumber '10.092.082'" in done.stderr
    (sent,) = declared.take(desk.names.queue("sweep"), 1, timeout=30)
    assert json.loads(sent.body) == {"billnumber": "0010092081", "additionalInfo": {"merchantId": "121000001"}}
    rows = list(openpyxl.load_workbook(desk.directory / "out.xlsx")["report"].iter_rows(values_only=True))
    assert rows[0][:5] == ("No", "Bill Number", "Merchant Id", "line", "billnumber")
    assert [row[:5] for row in rows[1:]] == [
        ("1", "0010092081", "121000001", 2, "0010092081"),
        ("2", "10.092.082", "121000001", 3, None),
    ]
    assert (desk.directory / "out.xlsx").stat().st_mode & 0o777 == 0o600
    piped = desk.fed((desk.directory / "bills.xlsx").read_bytes(), "sweep", "-", "--dry-run", "--skip-invalid")
    assert "0010092081" in piped.stdout, piped.stderr


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("", (), "is empty: not even a header"),
        ("\n\n", (), "is empty: not even a header"),
        ("", ("--allow-empty",), "is empty: not even a header"),
        ("billnumber\n", (), "has a header and no bills; nothing was sent"),
        ("billnumber\n\n,\n", (), "has a header and no bills; nothing was sent"),
        ("billnumber\n1 1\n2 2\n", ("--skip-invalid",), "2 rows, and none can be used; nothing was sent"),
        ("billnumber\n1 1\n", ("--skip-invalid", "--allow-empty"), "1 row, and none can be used; nothing was sent"),
    ],
)
@pytest.mark.parametrize("how", ["--wait", "--dry-run"])
def test_input_without_bills_is_bad_input(
    desk: Desk, at_once: Call, content: str, options: tuple[str, ...], said: str, how: str
) -> None:
    """It looks like an export that failed: exit code 2, and a line that says what is missing."""

    (desk.directory / "bills.csv").write_text(content)

    code, errors = at_once("bills.csv", how, *options)

    assert code == 2
    assert errors[-1].startswith("qris-expire: bills.csv: ")
    assert said in errors[-1]


@pytest.mark.usefixtures("declared")
def test_day_without_bills_may_be_no_error(desk: Desk) -> None:
    """With --allow-empty: exit code 0, the table's total is 0, and a report takes the place of yesterday's."""

    (desk.directory / "bills.csv").write_text("billnumber,merchantId,name\n")
    (desk.directory / "out.csv").write_text("yesterday\n")

    done = desk("sweep", "bills.csv", "--wait", "--allow-empty", "--batch-id", "b", "--report", "out.csv", "--force")
    again = desk("sweep", "bills.csv", "--allow-empty", "--batch-id", "b")
    rehearsed = desk("sweep", "bills.csv", "--allow-empty", "--dry-run")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nothing was sent: the input has no bills\n")
    assert rows_of(done.stdout) == {"total rows of the input": 0}
    assert (desk.directory / "out.csv").read_text().startswith("billnumber,merchantId,name,line,")
    assert (again.returncode, again.stdout) == (0, "nothing was sent: the input has no bills (0 rows)\n")
    assert (rehearsed.returncode, rehearsed.stdout.splitlines()[0]) == (
        0,
        "bills.csv: 0 rows: 0 bills, 0 duplicates, 0 invalid",
    )


def test_broker_that_is_away_costs_nothing(desk: Desk) -> None:
    """Exit code 1, and a line that says how to go on."""

    done = desk("sweep", desk.file(2), "--batch-id", "b", "--wait", AMQP_URL=NOBODY)

    assert done.returncode == 1
    assert "no broker answers" in done.stderr
    assert "to continue: qris-expire sweep --follow b --wait; or send it without a broker: --direct" in done.stderr


def test_topology_of_somebody_else_is_not_touched(desk: Desk, rabbit: Rabbit) -> None:
    """With AMQP_DECLARE=false what is missing is named, and nothing is declared."""

    done = desk("sweep", desk.file(2), AMQP_DECLARE="false")

    assert done.returncode == 1
    assert f"queue {desk.names.queue('sweep')} is missing" in done.stderr
    assert not rabbit.has_exchange(desk.names.commands)


# --- homes of a batch


@pytest.fixture
def elsewhere(private_broker: PrivateBroker, prefix: str) -> Iterator[str]:
    """Another broker."""
    yield private_broker.url
    delete_topology(private_broker.url, prefix)


def test_input_is_sent_already_only_at_its_broker(desk: Desk, rabbit: Rabbit, elsewhere: str) -> None:
    """The same file, batch and prefix at another broker: all of it goes there, and each broker's batch goes on."""

    lane, call = desk.names.queue("sweep"), ("sweep", desk.file(5), "--batch-id", "b")
    assert desk(*call).returncode == 0

    there = desk(*call, AMQP_URL=elsewhere)

    assert (there.returncode, "published 5 bills" in there.stdout) == (0, True), there.stderr
    with Rabbit(elsewhere) as other:
        assert (rabbit.depth(lane), other.depth(lane)) == (5, 5)
        for url in (desk.url, elsewhere):
            assert "nothing was sent" in desk(*call, AMQP_URL=url).stdout
        assert (rabbit.depth(lane), other.depth(lane)) == (5, 5)
    shown = desk("status", "b", AMQP_URL=NOBODY).stdout
    assert [f"sent to  {address(url)[0]}:{address(url)[1]}" in shown for url in (desk.url, elsewhere)] == [True, True]


def test_input_is_sent_already_only_in_its_virtual_host(desk: Desk, private_broker: PrivateBroker) -> None:
    """Two virtual hosts of one broker are two homes, and so are two prefixes."""

    private_broker.ctl("add_vhost", "other")
    private_broker.ctl("set_permissions", "-p", "other", "guest", ".*", ".*", ".*")
    other = private_broker.url.removesuffix("%2F") + "other"
    call = ("sweep", desk.file(5), "--batch-id", "b", "--state-dir", "state")

    try:
        for environ in (
            {"AMQP_URL": private_broker.url},
            {"AMQP_URL": other},
            {"AMQP_PREFIX": f"{desk.names.prefix}2"},
        ):
            first, second = desk(*call, **environ), desk(*call, **environ)
            assert "published 5 bills" in first.stdout, first.stderr
            assert "nothing was sent" in second.stdout, second.stderr
    finally:
        private_broker.ctl("delete_vhost", "other")
        delete_topology(private_broker.url, desk.names.prefix)
        delete_topology(desk.url, f"{desk.names.prefix}2")


def test_broker_is_known_by_whatever_address_it_is_reached(desk: Desk, rabbit: Rabbit) -> None:
    """Another port, as of a load balancer, or another name of the host does not make another broker of it."""

    call = ("sweep", desk.file(5), "--batch-id", "b")
    assert desk(*call).returncode == 0

    with FaultProxy(*address(desk.url)) as proxy:
        for url in (by_way_of(proxy.port, desk.url), desk.url.replace("127.0.0.1", "localhost")):
            again = desk(*call, AMQP_URL=url)
            assert (again.returncode, "nothing was sent" in again.stdout) == (0, True), again.stderr

    assert rabbit.depth(desk.names.queue("sweep")) == 5


@pytest.mark.usefixtures("declared")
def test_batch_that_was_sent_elsewhere_is_not_followed_here(desk: Desk, elsewhere: str) -> None:
    """It is told where it was sent, and what to correct."""

    assert desk("sweep", desk.file(5), "--batch-id", "b").returncode == 0

    done = desk("sweep", "--follow", "b", "--republish", AMQP_URL=elsewhere)

    assert done.returncode == 2
    assert f"batch b was not sent to {address(elsewhere)[0]}:{address(elsewhere)[1]}" in done.stderr
    assert "correct AMQP_URL and AMQP_PREFIX" in done.stderr


def test_gateway_is_a_home_too(desk: Desk) -> None:
    """What was sent directly to one gateway was not sent to another."""

    call = ("sweep", desk.file(3), "--batch-id", "b", "--direct")
    with Simulator() as staging, Simulator() as production:
        for gateway in (staging, production):
            done = desk(*call, AMQP_URL=NOBODY, **direct(desk, gateway))
            assert done.returncode == 0, done.stderr
            assert gateway.report().bills_expired == 3


def test_journal_of_the_old_form_is_named(desk: Desk, declared: Rabbit) -> None:
    """It does not know its broker: nothing is sent on its strength, and a line says what to do."""

    name = desk.file(3)
    desk("sweep", name, "--batch-id", "b", AMQP_URL=NOBODY)
    (path,) = (desk.directory / "state").rglob("b.db")
    with sqlite3.connect(path) as journal:
        journal.execute("UPDATE facts SET value = 1 WHERE name = 'format'")

    for call in (("sweep", name, "--batch-id", "b"), ("sweep", "--follow", "b"), ("status", "b")):
        done = desk(*call)
        assert (done.returncode, "the journal of another version" in done.stderr) == (1, True)
        assert "together with the files beside it" in done.stderr
    assert declared.depth(desk.names.queue("sweep")) == 0


# --- with a worker


@pytest.mark.usefixtures("rabbit")
def test_paid_bills_may_be_no_failure(desk: Desk) -> None:
    """A bill that was paid makes the exit code 1, or 0 with --allow-rejected: there is no work in it for people."""

    with Simulator(Script.parse({"bills": {"00000002": [PAID]}})) as gateway, worker(desk, gateway):
        done = desk("sweep", desk.file(3), "--batch-id", "b", "--wait")
        again = desk("sweep", "--follow", "b", "--allow-rejected")

    assert done.returncode == 1, done.stderr
    assert again.returncode == 0, again.stderr
    assert rows_of(again.stdout)["rejected paid"] == 1


def test_followed_sweep_adds_up(desk: Desk, rabbit: Rabbit) -> None:
    """Every row of the input is in the table, every bill in the report; dead letters that are redriven count then."""

    bills = {"00000002": [PAID], "00000003": [BROKEN]}
    name = desk.file(40)
    with (desk.directory / name).open("a") as file:
        file.write("00000001,M1\n0 0,M1\n")
    call = ("--batch-id", "b", "--report", "out.csv")

    with Simulator(Script.parse({"bills": bills})) as gateway, worker(desk, gateway):
        done = desk("sweep", name, "--wait", "--skip-invalid", *call)

    assert done.returncode == 1, done.stderr
    assert rows_of(done.stdout) == {
        "expired success": 38,
        "rejected paid": 1,
        "unresolved retries_exhausted": 1,
        "skipped duplicate rows, sent once": 1,
        "skipped invalid rows": 1,
        "total rows of the input": 42,
    }
    assert "bills.csv:43: billnumber must be" in done.stderr
    report = desk.report()
    assert [line["billnumber"] for line in report] == [*(f"{number:08d}" for number in range(1, 41)), "00000001", "0 0"]
    assert Counter(line["status"] for line in report) == {"expired": 38, "rejected": 1, "unresolved": 1, "skipped": 2}
    assert "line 2, which stands for it" in report[40]["detail"]
    assert "'0 0' has a blank" in report[41]["detail"]

    redriven = outcome(Reason.SUCCESS, command_id=report[2]["commandId"], billnumber="00000003", batch_id="b")
    rabbit.publish(desk.names.outcomes, "sweep.expired", encode_outcome(redriven), headers={"batch-id": "b"})
    late = outcome(Reason.RETRIES_EXHAUSTED, command_id=report[4]["commandId"], billnumber="00000005", batch_id="b")
    rabbit.publish(desk.names.outcomes, "sweep.unresolved", encode_outcome(late), headers={"batch-id": "b"})
    again = desk("sweep", "--follow", "b", "--report", "out.csv")

    assert again.returncode == 1, again.stderr
    assert rows_of(again.stdout)["expired success"] == 39
    assert Counter(line["status"] for line in desk.report()) == {"expired": 39, "rejected": 1, "skipped": 2}
    assert not rabbit.has_queue(inbox_name(desk.names, "b"))


def test_sweep_that_dies_twice_loses_nothing_and_sends_nothing_under_two_ids(desk: Desk, rabbit: Rabbit) -> None:
    """Killed while it publishes, stopped by ctrl-C while it waits: each time it goes on where it was."""

    bills = 3000
    name, call = desk.file(bills), ("--wait", "--batch-id", "b", "--report", "out.csv")
    tap = listen(desk, rabbit)

    with FaultProxy(*address(desk.url)) as proxy:
        # Of a tenth or so confirms come back; how much of the rest it has published it cannot know.
        proxy.stall_towards_client_after(100_000)
        with desk.calling("sweep", name, *call, AMQP_URL=by_way_of(proxy.port, desk.url)):
            wait_until(lambda: rabbit.depth(tap) > 0, 30, "publishing")
            wait_until(lambda: proxy.live == 2, 30, "following")
        assert desk.published("b") < bills
    with desk.calling("sweep", name, *call) as process:
        wait_until(lambda: desk.published("b") == bills, 30, "all are published")
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "qris-expire: to continue: qris-expire sweep --follow b --report out.csv\n" in said
    seen = rabbit.consume(tap, rabbit.depth(tap), 30)
    ids = {(json.loads(message.body)["billnumber"], message.properties.message_id) for message in seen}
    assert len(ids) == bills
    rabbit.purge(desk.names.queue("sweep"))
    tell(desk, rabbit, [min(ids), *sorted(ids)])

    done = desk("sweep", "--follow", "b", "--report", "out.csv")

    assert done.returncode == 0, done.stderr
    assert rows_of(done.stdout) == {"expired success": bills, "total rows of the input": bills}
    assert {(line["billnumber"], line["commandId"]) for line in desk.report()} == ids


def test_broken_connections_are_none_of_the_users_business(desk: Desk, declared: Rabbit) -> None:
    """The connection is reset again and again while it publishes and follows: it goes on by itself, to the end."""

    bills = 3000
    name = desk.file(bills)
    tap = listen(desk, declared)

    with FaultProxy(*address(desk.url)) as proxy:
        call = ("--wait", "--batch-id", "b", "--report", "out.csv")
        with desk.calling("sweep", name, *call, AMQP_URL=by_way_of(proxy.port, desk.url)) as process:
            wait_until(lambda: declared.depth(tap) > 0, 30, "publishing")
            proxy.reset_all()
            wait_until(lambda: desk.published("b") == bills, 30, "all are published")
            seen = declared.consume(tap, declared.depth(tap), 30)
            ids = {(json.loads(message.body)["billnumber"], message.properties.message_id) for message in seen}
            tell(desk, declared, sorted(ids)[: bills // 2])
            wait_until(lambda: desk.answered("b") >= bills // 2, 30, "half of the outcomes")
            proxy.reset_all()
            tell(desk, declared, sorted(ids)[bills // 2 :])
            said = process.communicate(timeout=30)
        assert process.returncode == 0, said

    assert len(ids) == len(desk.report()) == bills


@pytest.mark.slow
def test_full_queue_slows_it_down_and_loses_nothing(desk: Desk, rabbit: Rabbit) -> None:
    """A lane that refuses more than it can hold is published to as it empties: each nack is tried again."""

    names, bills = desk.names, 60
    rabbit.declare(topology(names.prefix, "classic", ()))
    rabbit.delete_queue(names.queue("sweep"))
    rabbit.declare_queue(names.queue("sweep"), "classic", max_length=20, overflow="reject-publish")
    rabbit.bind(names.queue("sweep"), names.commands, "sweep")

    taken: set[str] = set()
    with desk.calling("sweep", desk.file(bills), "--batch-id", "b", AMQP_DECLARE="false") as process:
        deadline = time.monotonic() + 40
        while len(taken) < bills and time.monotonic() < deadline:
            waiting = rabbit.depth(names.queue("sweep"))
            assert waiting <= 20
            taken |= {message.properties.message_id for message in rabbit.take(names.queue("sweep"), waiting, 30)}
        _, said = process.communicate(timeout=30)

    assert (process.returncode, len(taken)) == (0, bills), said


@pytest.mark.usefixtures("rabbit")
def test_outcomes_that_went_elsewhere_are_asked_for_again(desk: Desk) -> None:
    """A batch published without --wait cannot be followed; --republish sends it again under the same ids."""

    name = desk.file(3)
    assert desk("sweep", name, "--batch-id", "b").returncode == 0

    refused = desk("sweep", name, "--batch-id", "b", "--wait")
    assert (refused.returncode, "--republish" in refused.stderr) == (1, True)

    with Simulator() as gateway, worker(desk, gateway):
        done = desk("sweep", "--follow", "b", "--republish")

    assert done.returncode == 0, done.stderr
    assert rows_of(done.stdout)["expired success"] == 3


@pytest.mark.usefixtures("rabbit")
def test_end_says_what_people_must_do(desk: Desk) -> None:
    """Each kind of bill that needs somebody, with the first ones by line; nothing is cut at 80 columns."""

    bills = {f"{number:08d}": [NOT_FOUND] for number in range(3, 15)} | {"00000002": [PAID], "00000020": [BROKEN]}
    with Simulator(Script.parse({"bills": bills})) as gateway, worker(desk, gateway):
        done = desk("sweep", desk.file(20), "--batch-id", "b", "--wait", COLUMNS="80")
        shown = desk("status", "b", COLUMNS="80")

    assert done.returncode == 1
    for text in (done.stdout, shown.stdout):
        assert "already paid (refund): 1 bill;" in text
        assert "  line 3: 00000002 of M1: 4049314 Paid Bill" in text
        assert "not found (check the number): 12 bills;" in text
        assert "  line 4: 00000003 of M1:" in text
        assert "  … and 2 more" in text
        assert "unresolved (call the gateway's support if they stay so): 1 bill;" in text
        assert "qris-expire sweep --follow b --retry-unresolved" in text
        assert "…" not in text.partition("already paid")[0]
    assert "the gateway does not know 12 of 20 bills (60 %, more than 5 %)" in done.stderr


@pytest.mark.usefixtures("rabbit")
def test_many_unknown_bills_are_a_failure_even_where_rejected_ones_are_none(desk: Desk) -> None:
    """Unless a bound is given: numbers that a spreadsheet changed end like this, and their codes stay payable."""

    with Simulator(Script.parse({"bills": {"00000003": [NOT_FOUND]}})) as gateway, worker(desk, gateway):
        done = desk("sweep", desk.file(4), "--batch-id", "b", "--wait", "--allow-rejected")
        bound = desk("sweep", "--follow", "b", "--allow-rejected", "--allow-not-found", "25")
        tight = desk("sweep", "--follow", "b", "--allow-rejected", "--allow-not-found", "24")

    assert (done.returncode, bound.returncode, tight.returncode) == (1, 0, 1), done.stderr
    assert "--allow-not-found PERCENT" in done.stderr


@pytest.mark.usefixtures("rabbit")
def test_finished_batch_says_first_that_nothing_was_sent(desk: Desk) -> None:
    """The table alone looks as that of a fresh one."""

    with Simulator() as gateway, worker(desk, gateway):
        fresh = desk("sweep", desk.file(4), "--batch-id", "b", "--wait")
        again = desk("sweep", desk.file(4), "--batch-id", "b", "--wait")

    assert not fresh.stdout.startswith("nothing was sent")
    assert again.stdout.startswith("nothing was sent: batch b, begun ")
    assert rows_of(fresh.stdout) == rows_of(again.stdout)


@pytest.mark.usefixtures("rabbit")
def test_unresolved_bills_are_sent_again_when_asked_for(desk: Desk) -> None:
    """Under the same batch and ids, after the outage; those with a final answer are not."""

    script = Script.parse({"bills": {"00000002": [BROKEN], "00000003": [PAID]}})
    with Simulator(script) as gateway, worker(desk, gateway):
        done = desk("sweep", desk.file(4), "--batch-id", "b", "--wait", "--report", "out.csv")
        before = desk.report()
        assert (done.returncode, before[1]["status"]) == (1, "unresolved"), done.stderr
        gateway.replace(Script())
        calls = gateway.report().expire_calls
        again = desk(
            "sweep",
            "--follow",
            "b",
            "--retry-unresolved",
            "--allow-rejected",
            "--report",
            "out.csv",
            "--allow-not-found",
            "0",
        )
        assert gateway.report().expire_calls == calls + 1

    assert again.returncode == 0, again.stderr
    assert "1 bill of batch b stayed unresolved and will be sent again" in again.stdout
    assert rows_of(again.stdout) == {"expired success": 3, "rejected paid": 1, "total rows of the input": 4}
    assert [line["commandId"] for line in desk.report()] == [line["commandId"] for line in before]


@pytest.mark.usefixtures("rabbit")
def test_second_sweep_of_a_batch_waits_for_nobody(desk: Desk) -> None:
    """While one process has the batch another is refused, but may look."""

    name = desk.file(3)
    with desk.calling("sweep", name, "--batch-id", "b", "--wait") as process:
        wait_until(lambda: desk.published("b") == 3, 30, "publishing")

        second = desk("sweep", name, "--batch-id", "b", "--wait")
        looked = desk("status", "b")

        assert (second.returncode, f"process {process.pid}" in second.stderr) == (1, True)
        assert (looked.returncode, "3 bills wait for an outcome" in looked.stdout) == (0, True)
        assert f"3 commands in {desk.names.queue('sweep')}" in looked.stdout


def test_batch_is_followed_by_one_host(desk: Desk, declared: Rabbit) -> None:
    """A second one, with a journal of its own, is told who follows it; the first one gets every outcome."""

    name, elsewhere = desk.file(20), str(desk.directory / "other")
    tap = listen(desk, declared)
    with desk.calling("sweep", name, "--batch-id", "b", "--wait") as process:
        wait_until(lambda: desk.published("b") == 20, 30, "publishing")

        second = desk("sweep", name, "--batch-id", "b", "--wait", XDG_STATE_HOME=elsewhere)

        assert second.returncode == 1
        assert f"(process {process.pid}, since " in second.stderr
        assert "let that one end, or stop it there" in second.stderr
        seen = declared.consume(tap, 20, 30)
        tell(desk, declared, [(json.loads(each.body)["billnumber"], each.properties.message_id) for each in seen])
        said = process.communicate(timeout=30)
    assert process.returncode == 0, said


@pytest.mark.usefixtures("declared")
def test_follower_that_loses_its_connection_follows_on(desk: Desk) -> None:
    """The broker may take its old connection for open a while longer; nobody else has the batch."""

    with (
        FaultProxy(*address(desk.url)) as proxy,
        Simulator() as gateway,
        desk.calling(
            "sweep", desk.file(20), "--batch-id", "b", "--wait", AMQP_URL=by_way_of(proxy.port, desk.url)
        ) as it,
    ):
        wait_until(lambda: desk.published("b") == 20, 30, "publishing")
        proxy.reset_all()
        with worker(desk, gateway):
            said = it.communicate(timeout=60)
        assert it.returncode == 0, said


@pytest.mark.usefixtures("rabbit")
def test_pause_of_the_fleet_is_told_to_who_waits(desk: Desk) -> None:
    """The progress line says that the gateway fails and when it is tried next, then who paused the lane and why."""

    said = b""
    settings = {"BREAKER_FAILURES": "3", "BREAKER_COOLDOWN_SECONDS": "50"}
    broken = Script.parse({"patterns": [{"match": ".", "faults": [BROKEN]}]})
    with (
        Simulator(broken) as gateway,
        worker(desk, gateway, **settings),  # it may never be ready: its breaker opens at the first bills
        desk.calling("sweep", desk.file(30), "--wait", "--batch-id", "b") as process,
    ):
        assert process.stderr is not None
        lines = process.stderr.fileno()
        os.set_blocking(lines, False)

        def told(what: bytes) -> bool:
            nonlocal said
            with suppress(BlockingIOError):
                said += os.read(lines, 65536)
            return what in said

        wait_until(lambda: told(b"paused: the gateway is failing, next probe in "), 90, "the breaker")
        assert desk("fleet", "pause", "--lane", "sweep", "--reason", "maintenance").returncode == 0
        wait_until(lambda: told(b"(maintenance): `qris-expire fleet resume` ends it"), 60, "the operator's pause")


def test_window_bounds_what_is_at_the_broker(desk: Desk, declared: Rabbit) -> None:
    """Without a worker it publishes as many as the window has; killed and followed on, no more; then all are done."""

    lane, call = desk.names.queue("sweep"), ("--wait", "--window", "40", "--batch-id", "b")
    most = 0

    def unanswered() -> int:
        nonlocal most
        most = max(most, desk.published("b") - desk.answered("b"), declared.depth(lane))
        return most

    with desk.calling("sweep", desk.file(400), *call) as process:
        wait_until(lambda: desk.published("b") == 40, 30, "the window is full")
        assert declared.depth(lane) == 40
        process.kill()
    with (
        Simulator() as gateway,
        worker(desk, gateway),
        desk.calling("sweep", "--follow", "b", "--window", "40") as process,
    ):
        wait_until(lambda: (unanswered(), process.poll() is not None)[1], 60, "the end")
        assert process.returncode == 0
        assert gateway.report().bills_expired == 400
    assert most <= 40


@pytest.mark.usefixtures("rabbit")
def test_sweep_survives_a_restart_of_the_broker(tmp_path: Path, fresh: PrivateBroker, prefix: str) -> None:
    """Feeding goes on where it was; nothing is lost, and no bill is sent under two ids."""

    desk = Desk(tmp_path, fresh.url, prefix)
    with (
        Simulator(Script.parse({"latency": 0.01})) as gateway,
        worker(desk, gateway),
        desk.calling("sweep", desk.file(1500), "--wait", "--batch-id", "b", "--window", "100") as process,
    ):
        wait_until(lambda: desk.answered("b") > 100, 60, "some outcomes")
        fresh.restart()
        out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert rows_of(out) == {"expired success": 1500, "total rows of the input": 1500}


def test_sweep_is_stopped_from_anywhere(desk: Desk, declared: Rabbit) -> None:
    """From another host, too: nothing more is published, what was is followed to its end, and it can be resumed."""

    elsewhere = {"XDG_STATE_HOME": str(desk.directory / "other")}
    with Simulator(Script.parse({"latency": 0.05})) as gateway, worker(desk, gateway):
        with desk.calling(
            "sweep", desk.file(5000), "--wait", "--batch-id", "b", "--window", "100", "--report", "out.csv"
        ) as process:
            wait_until(lambda: desk.answered("b") > 0, 30, "outcomes")
            stopped = desk("sweep", "--stop", "b", **elsewhere)
            assert (stopped.returncode, "of 5,000 bills are published" in stopped.stdout) == (0, True), stopped.stderr
            said = process.communicate(timeout=30)[1]
        assert process.returncode == 1
        assert "batch b was stopped by " in said
        assert "qris-expire sweep --follow b --resume" in said
        published = desk.published("b")
        assert published < 5000
        assert desk.answered("b") == published
        states = Counter(line["status"] for line in desk.report())
        assert states == {"expired": published, "unsent": 5000 - published}

        again = desk("sweep", "--follow", "b")
        assert (again.returncode, "was stopped by" in again.stderr, desk.published("b")) == (1, True, published)
        gateway.replace(Script())
        done = desk("sweep", "--follow", "b", "--resume")
    assert done.returncode == 0, done.stderr
    assert declared.depth(desk.names.queue("sweep")) == 0


@pytest.mark.usefixtures("declared")
def test_stop_reaches_a_sweep_whose_process_died(desk: Desk) -> None:
    """The order waits in the inbox; whoever follows the batch next publishes no more. A stranger's batch is named."""

    elsewhere = {"XDG_STATE_HOME": str(desk.directory / "other")}
    with desk.calling("sweep", desk.file(400), "--wait", "--batch-id", "b", "--window", "40") as process:
        wait_until(lambda: desk.published("b") == 40, 30, "the window is full")
        process.kill()

    stopped = desk("sweep", "--stop", "b", **elsewhere)
    nobody = desk("sweep", "--stop", "c")

    assert (stopped.returncode, "the next one that follows it will publish nothing more" in stopped.stdout) == (0, True)
    assert (nobody.returncode, "nobody follows batch c" in nobody.stderr) == (1, True)
    with Simulator() as gateway, worker(desk, gateway):
        done = desk("sweep", "--follow", "b", "--window", "40")
    assert (done.returncode, "was stopped by" in done.stderr) == (1, True), done.stderr
    assert desk.published("b") <= 80


def test_standard_input_is_gone_on_with_from_the_journal(desk: Desk, rabbit: Rabbit) -> None:
    """What came through a pipe is read once; the rest of the work needs only the batch's name."""

    lines = b"".join(b'{"billnumber": "%d", "merchantId": "M"}\n' % number for number in range(5))
    first = desk.fed(lines, "sweep", "-", "--batch-id", "b", AMQP_URL=NOBODY)
    assert first.returncode == 1

    done = desk("sweep", "--follow", "b")

    assert (done.returncode, "published 5 bills" in done.stdout) == (0, True), done.stderr
    assert rabbit.depth(desk.names.queue("sweep")) == 5


def test_status_lists_the_batches(desk: Desk) -> None:
    """Without a batch all of them; without a broker what the journal knows."""

    assert "no batches" in desk("status", AMQP_URL=NOBODY).stdout
    desk("sweep", desk.file(3), "--batch-id", "b", AMQP_URL=NOBODY)

    listed, shown = desk("status", AMQP_URL=NOBODY), desk("status", "b", AMQP_URL=NOBODY)

    assert "b " in listed.stdout
    assert (listed.returncode, shown.returncode) == (0, 0)
    assert rows_of(shown.stdout) == {"unsent not published yet": 3, "total rows of the input": 3}
    assert "no broker answers" in shown.stdout
    assert desk("status", "c", AMQP_URL=NOBODY).returncode == 2


def test_directory_that_cannot_be_read_is_not_taken_for_an_empty_one(desk: Desk) -> None:
    """A line with the path, and exit code 1."""

    loop = desk.directory / "loop"
    loop.symlink_to(loop)

    done = desk("status", "--state-dir", "loop", AMQP_URL=NOBODY)

    assert (done.returncode, done.stdout) == (1, "")
    assert "loop: " in done.stderr


def test_status_shows_skipped_rows(desk: Desk) -> None:
    """In the list as well; and nothing is cut at 80 columns, however long the batch's name and the file's."""

    name = "unpaid-bills-of-all-merchants-in-november.csv"
    (desk.directory / name).write_text("billnumber,merchantId\n1,M\n1,M\n1 1,M\n")
    batch = "end-of-day-2026-11-22-all-merchants-second-try"
    desk("sweep", name, "--batch-id", batch, "--skip-invalid", AMQP_URL=NOBODY)

    listed = desk("status", AMQP_URL=NOBODY, COLUMNS="80").stdout

    assert batch in listed
    assert name in listed
    assert "3 rows, 2 skipped, 1 unsent, 0 expired" in listed


@pytest.mark.usefixtures("rabbit")
def test_status_says_which_unresolved_bills_have_no_dead_letter(desk: Desk, rabbit: Rabbit) -> None:
    """A purged dead letter is not counted, whoever purged it; its bill is named, for it is still unresolved."""

    script = Script.parse({"bills": {bill: [BROKEN] for bill in ("00000002", "00000003")}})
    with Simulator(script) as gateway, worker(desk, gateway):
        assert desk("sweep", desk.file(3), "--batch-id", "b", "--wait").returncode == 1
    both = desk("status", "b")
    assert desk("dead", "purge", "--bill", "00000003", "--yes").returncode == 0
    one = desk("status", "b")
    rabbit.purge(desk.names.dead)
    none = desk("status", "b")

    assert f"letters  2 of 2 unresolved bills have a dead letter in {desk.names.dead}\n" in both.stdout
    assert "no dead letter" not in both.stdout
    assert f"letters  1 of 2 unresolved bills have a dead letter in {desk.names.dead}\n" in one.stdout
    assert "1 bill has none: it was purged, or redriven" in one.stdout
    assert one.stdout.count("  line 4: 00000003 of M1: 5009300 General Error\n") == 2
    assert f"letters  0 of 2 unresolved bills have a dead letter in {desk.names.dead}\n" in none.stdout
    assert "2 bills have none: they were purged, or redriven" in none.stdout


def test_status_without_the_dead_letters_says_why(desk: Desk, declared: Rabbit, elsewhere: str) -> None:
    """While a redrive holds them, where no broker answers, and at another broker, the rest is shown all the same."""

    script = Script.parse({"bills": {"00000002": [BROKEN]}})
    with Simulator(script) as gateway, worker(desk, gateway):
        assert desk("sweep", desk.file(3), "--batch-id", "b", "--wait").returncode == 1
    lock = declared.channel.queue_declare(f"{desk.names.dead}.lock", exclusive=True).method.queue
    busy = desk("status", "b")
    declared.delete_queue(lock)
    away = desk("status", "b", AMQP_URL=NOBODY)
    with Rabbit(elsewhere) as other:
        other.declare(topology(desk.names.prefix, "quorum", ()))
    there = desk("status", "b", AMQP_URL=elsewhere)

    assert (busy.returncode, away.returncode, there.returncode) == (0, 0, 0), busy.stderr + away.stderr + there.stderr
    assert "letters  " not in there.stdout
    assert "letters  unknown: somebody holds the dead letters" in busy.stdout
    assert "letters  " not in away.stdout
    assert "no broker answers" in away.stdout


def test_status_prunes(desk: Desk) -> None:
    """What can still be gone on with stays, and the rest is listed as ever."""

    desk("sweep", desk.file(3), "--batch-id", "b", AMQP_URL=NOBODY)

    pruned = desk("status", "--prune", "1", AMQP_URL=NOBODY)

    assert pruned.returncode == 0
    assert pruned.stdout.startswith("deleted 0 journals of finished batches, not changed for 1 day\n")
    assert "b " in pruned.stdout


# --- without a broker


@pytest.fixture
def away(tmp_path: Path) -> Desk:
    """A desk whose broker is away."""
    return Desk(tmp_path, NOBODY, "p")


def direct(desk: Desk, gateway: Simulator, **settings: str) -> dict[str, str]:
    """The settings of a sweep that calls the gateway itself."""
    calm = {"RETRY_INITIAL_SECONDS": "0.02", "RETRY_MAX_SECONDS": "0.1", "RETRY_DELAYS_SECONDS": "1"}
    return {**gateway.environment(desk.directory / "key.pem"), **calm, "WORKER_CONCURRENCY": "4", **settings}


def test_direct_sweep_needs_no_broker(away: Desk) -> None:
    """Same engine, same table, same report; a bill that fails waits for its delayed round in the process."""

    twice = [{"code": "5009300"}, {"code": "5009300"}]
    bills = {"00000002": [PAID], "00000003": [*twice, *twice], "00000004": [BROKEN]}
    with Simulator(Script.parse({"bills": bills})) as gateway:
        done = away("sweep", away.file(50), "--direct", "--report", "out.csv", **direct(away, gateway))
        seen = gateway.report()

    assert done.returncode == 1, done.stderr
    assert rows_of(done.stdout) == {
        "expired success": 48,
        "rejected paid": 1,
        "unresolved retries_exhausted": 1,
        "total rows of the input": 50,
    }
    assert (seen.bills_expired, seen.duplicates) == (48, 0)
    attempts = {line["billnumber"]: int(line["attempts"]) for line in away.report()}
    assert (attempts["00000001"], attempts["00000003"], attempts["00000004"]) == (1, 5, 8)


def test_direct_sweep_says_why_it_is_not_in_the_fleet(desk: Desk, declared: Rabbit) -> None:
    """Its progress names what is wrong with the fleet's queue at the broker."""

    orders = f"{desk.names.prefix}.fleet.orders"
    declared.delete_queue(orders)
    declared.declare_queue(orders, "classic", max_length=7)
    with (
        Simulator() as gateway,
        desk.calling("sweep", desk.file(3), "--direct", "--batch-id", "b", **direct(desk, gateway)) as process,
    ):
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if "not in the fleet of the workers: " in said:
                break

    assert f"topology: queue {orders}: PRECONDITION_FAILED" in said


def test_direct_batch_is_followed_as_it_is_sent(away: Desk) -> None:
    """Without --direct an unfinished one is refused, with the command that continues it; of a finished one the table is
    shown, and its unresolved bill is no success."""

    with Simulator(Script.parse({"bills": {"00000002": [BROKEN]}})) as gateway:
        done = away("sweep", away.file(3), "--direct", "--batch-id", "b", **direct(away, gateway))
        shown = away("sweep", "--follow", "b")
        again = away("sweep", "--follow", "b", "--retry-unresolved")
    with (
        Simulator(Script(down=True)) as gateway,
        away.calling(
            "sweep", away.file(3, "c.csv", 10), "--direct", "--batch-id", "c", **direct(away, gateway)
        ) as process,
    ):
        wait_until(lambda: gateway.report().turned_away, 60, "a first call")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    unfinished, status = away("sweep", "--follow", "c"), away("status", "c")

    assert (done.returncode, shown.returncode) == (1, 1), shown.stderr
    assert shown.stdout.startswith("nothing was sent: batch b, ")
    assert rows_of(shown.stdout) == rows_of(done.stdout)
    assert (again.returncode, unfinished.returncode) == (2, 2)
    assert "`qris-expire sweep --follow b --direct --retry-unresolved`" in again.stderr
    assert "`qris-expire sweep --follow c --direct`" in unfinished.stderr
    assert "`qris-expire sweep --follow c --direct`" in status.stdout


def test_direct_sweep_sends_unresolved_bills_again_when_asked_for(away: Desk) -> None:
    """The way that the end of it names."""

    call = ("--direct", "--retry-unresolved")
    with Simulator(Script.parse({"bills": {"00000002": [BROKEN]}})) as gateway:
        settings = direct(away, gateway, RETRY_DELAYS_SECONDS="none")
        done = away("sweep", away.file(3), "--direct", "--batch-id", "b", **settings)
        assert (done.returncode, "sweep --follow b --direct --retry-unresolved" in done.stdout) == (1, True), (
            done.stderr
        )
        gateway.replace(Script())
        again = away("sweep", "--follow", "b", *call, **settings)

    assert again.returncode == 0, again.stderr
    assert rows_of(again.stdout) == {"expired success": 3, "total rows of the input": 3}


@pytest.mark.parametrize(
    ("bad", "good", "concurrency", "cooldown"),
    [(10, 20, "2", "0.3"), pytest.param(40, 300, "8", "1", marks=pytest.mark.slow)],
)
def test_direct_sweep_reaches_the_good_bills_behind_the_bad(
    away: Desk, bad: int, good: int, concurrency: str, cooldown: str
) -> None:
    """Bills that always fail, more than it has in hand, ahead of good ones: all good ones are expired."""

    name = away.file(bad + good)
    patient = {"BREAKER_COOLDOWN_SECONDS": cooldown, "BREAKER_MAX_COOLDOWN_SECONDS": cooldown}
    broken = {f"{number:08d}": [{"code": "5009300", "repeat": True}] for number in range(1, bad + 1)}
    with Simulator(Script.parse({"bills": broken})) as gateway:
        settings = direct(away, gateway) | patient | {"WORKER_CONCURRENCY": concurrency}
        with away.calling("sweep", name, "--direct", "--batch-id", "b", **settings) as process:
            wait_until(lambda: gateway.report().bills_expired == good, 120, "every good bill is expired")
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)

    assert process.returncode == 130


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_direct_sweep_goes_on_where_it_was(away: Desk, how: signal.Signals) -> None:
    """Ctrl-C finishes the calls on their way; after a kill those in between are sent again, and known as in doubt."""

    call = ("sweep", away.file(120), "--direct", "--batch-id", "b", "--report", "out.csv")
    # The last ones take so long that it cannot come to its end before the signal does.
    slow = {f"{number:08d}": [{"latency": 5}] for number in range(80, 121)}
    with Simulator(Script.parse({"latency": 0.05, "bills": slow})) as gateway:
        settings = direct(away, gateway)
        with away.calling(*call, **settings) as process:
            wait_until(lambda: away.answered("b") >= 20, 30, "some are done")
            process.send_signal(how)
            said = process.communicate(timeout=30)[1]
        wait_until(lambda: gateway.report().in_flight == 0, 30, "no call is under way")
        gateway.replace(Script())
        before = away.answered("b")
        in_doubt = away.fact("b", "SELECT count(*) FROM bills WHERE status IS NULL AND begun")
        called = gateway.report().expire_calls
        done = away(*call, **settings)
        again = gateway.report().expire_calls - called

    assert process.returncode == (130 if how is signal.SIGINT else -how)
    assert 20 <= before < 120
    assert done.returncode == 0, done.stderr
    assert again == 120 - before
    report = away.report()
    assert Counter(line["status"] for line in report) == {"expired": 120}
    assert sum(line["effectUnknown"] == "true" for line in report) == in_doubt
    if how is signal.SIGINT:
        assert (called, in_doubt) == (before, 0)
        assert "to continue: qris-expire sweep --follow b --direct --report out.csv" in said
    else:
        assert in_doubt > 0


def test_direct_sweep_sits_an_outage_out(away: Desk) -> None:
    """While the gateway fails single bills test it; none of them is given up, and the rest waits."""

    settings = {"BREAKER_FAILURES": "3", "BREAKER_COOLDOWN_SECONDS": "0.2", "RETRY_DELAYS_SECONDS": "none"}
    with Simulator(Script.parse({"down": True})) as gateway:
        gateway.replace(Script.parse({"patterns": [{"match": ".", "faults": [BROKEN]}]}))
        call = ("sweep", away.file(30), "--direct", "--batch-id", "b")
        with away.calling(*call, **direct(away, gateway, **settings)) as process:
            wait_until(lambda: gateway.report().expire_calls >= 6, 30, "probes")
            assert away.answered("b") == 0
            gateway.replace(Script())
            out, said = process.communicate(timeout=30)

    assert process.returncode == 0, said
    assert rows_of(out)["expired success"] == 30


def test_direct_sweep_sits_short_holds_out(away: Desk) -> None:
    """Throttles that are over before the batch's thread looks: senders go on all the same."""

    brief = {"RETRY_INITIAL_SECONDS": "0.0001", "RETRY_MAX_SECONDS": "0.0001"}
    script = Script.parse({"patterns": [{"match": ".", "faults": [{"code": "4299300"}]}]})
    with Simulator(script) as gateway:
        done = away("sweep", away.file(30), "--direct", "--batch-id", "b", **direct(away, gateway, **brief))

    assert done.returncode == 0, done.stderr


def test_direct_sweep_tells_what_is_wrong_with_the_credentials(away: Desk) -> None:
    """Before any bill is touched: exit code 1, one line on why, one on how to go on."""

    with Simulator() as gateway:
        settings = direct(away, gateway)
        settings["GATEWAY_CLIENT_ID"] = "somebody-else"
        done = away("sweep", away.file(3), "--direct", "--batch-id", "b", **settings)

    assert (done.returncode, away.answered("b")) == (1, 0)
    assert "the gateway refuses us" in done.stderr


@pytest.mark.parametrize("how", [(), ("--direct",), ("--dry-run",)])
def test_row_without_a_merchant_is_invalid(away: Desk, how: tuple[str, ...]) -> None:
    """The worker would make a dead letter of it: it is reported before anything is sent, with what gives a merchant."""

    (away.directory / "bills.csv").write_text("billnumber\n1\n")
    with Simulator() as gateway:
        settings = direct(away, gateway)
        bare = away("sweep", "bills.csv", *how, **settings)
        given = away("sweep", "bills.csv", "--dry-run", *how[:1], "--merchant-id", "M7", **settings)
        default = away("sweep", "bills.csv", "--dry-run", *how[:1], **{**settings, "GATEWAY_MERCHANT_ID": "M8"})

    assert (bare.returncode, "bills.csv:2: merchantId is missing" in bare.stderr) == (2, True)
    assert "--merchant-id" in bare.stderr
    assert (given.returncode, '"merchantId":"M7"' in given.stdout) == (0, True), given.stderr
    assert (default.returncode, '"merchantId":"M8"' in default.stdout) == (0, True), default.stderr


# --- helpers


def worker(desk: Desk, gateway: Simulator, **more: str) -> WorkerProcess:
    """A worker beside the desk; commands wait for it if it takes its time."""
    settings = {"RETRY_DELAYS_SECONDS": "none", "RETRY_MAX_ATTEMPTS": "2", **more}
    return WorkerProcess(desk.url, desk.names.prefix, gateway, desk.directory, **settings)


def listen(desk: Desk, rabbit: Rabbit) -> str:
    """A queue that gets a copy of every command; it ends with the connection."""
    rabbit.declare(topology(desk.names.prefix, "quorum", ()))
    return rabbit.temporary_queue(desk.names.commands, "sweep")


def tell(desk: Desk, rabbit: Rabbit, commands: list[tuple[str, str]]) -> None:
    """What a worker would: these bills are expired."""
    import pika

    channel = rabbit.plain_channel()
    for bill, command in commands:
        body = encode_outcome(outcome(Reason.SUCCESS, command_id=command, billnumber=bill, batch_id="b"))
        properties = pika.BasicProperties(delivery_mode=2, headers={"batch-id": "b"})
        channel.basic_publish(desk.names.outcomes, "sweep.expired", body, properties)
    channel.queue_declare(desk.names.queue("sweep"), passive=True)
    channel.close()
