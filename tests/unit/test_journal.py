"""The journal of a batch: what it keeps, what it refuses, and what a process that crashes leaves in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.builders import NOON
from tests.unit.test_sweep import BATCH, told
from worker.cli.report import replacing
from worker.core.delivery import Progress
from worker.core.outcome import Reason
from worker.core.report import REPORT_COLUMNS, BatchReport, harmless, kept_as_text
from worker.core.rows import JSON_FORM, BadRow, Form, Row
from worker.core.sweep import Bill
from worker.shells.journal import Journal, JournalError, Load
from worker.shells.journals import clean, journals, lock, prune

Make = Callable[..., Journal]
FORM = Form(("billnumber", "merchantId"), {"bill": 0, "merchant": 1})


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A batch of bills "1", "2", … of merchant M."""
    opened: list[Journal] = []

    def made(size: int = 3, *, form: Form = FORM, extra: Sequence[Row | BadRow] = ()) -> Journal:
        load = Load(tmp_path)
        rows = [Row(number + 1, str(number), "M", None, None, (str(number), "M")) for number in range(1, size + 1)]
        load.fill([*rows, *extra])
        path = tmp_path / f"{BATCH.id}.db"
        load.keep(path, batch=BATCH.id, source="f.csv", digest="d", form=form, now=NOON)
        opened.append(Journal(path))
        return opened[-1]

    yield made
    for journal in opened:
        journal.close()


def reopened(journal: Journal) -> Journal:
    return Journal(journal.path, read_only=True)


def test_bill_that_comes_again_is_counted_not_kept(make: Make) -> None:
    """A bill twice goes once, as it came first; the same bill of another merchant is another bill."""

    extra = [Row(9, "1", "M", "later", None), Row(10, "1", "M", None, None), Row(11, "1", "N", None, None)]
    bad = [BadRow(line, "bad") for line in range(12, 16)]

    journal = make(2, extra=[*extra, *bad])

    assert {bill[1:5] for bill in journal.unsent(0, 10)} == {
        ("1", "M", None, None), ("2", "M", None, None), ("1", "N", None, None)
    }  # fmt: skip
    tally = journal.tally()
    assert (tally.bills, tally.duplicates, tally.invalid, tally.rows) == (3, 2, 4, 9)
    assert journal.facts.batch.size == 3


def test_progress_survives_the_process(make: Make) -> None:
    """What was noted is there for the next one, watermark and inbox and outcomes."""

    journal = make(3)
    journal.has_inbox()
    journal.published(2)
    journal.record([told(bill="3")])
    journal.close()

    after = reopened(journal)

    assert (after.facts.published, after.facts.inbox, after.facts.direct) == (2, True, False)
    tally = after.tally()
    assert (tally.waiting, tally.unsent, tally.told) == (2, 0, {("expired", "success"): 1})
    assert after.unsent(2, 10) == []
    after.close()


def test_outcomes_change_the_sum_once(make: Make) -> None:
    """A duplicate changes nothing, a better one takes the place of the first, a stranger's is none of ours."""

    journal = make(2)
    foreign = told(bill="1")._replace(command_id="somebody-else")

    first = journal.record([told(Reason.RETRIES_EXHAUSTED, bill="1"), told(bill="1", merchant="N"), foreign])
    again = journal.record([told(Reason.RETRIES_EXHAUSTED, bill="1")])
    better = journal.record([told(Reason.SUCCESS, bill="1"), told(Reason.CREDENTIALS, NOON + 9, bill="1")])

    assert first.changes == {("unresolved", "retries_exhausted"): 1}
    assert again.changes == {}
    assert better.changes == {("unresolved", "retries_exhausted"): -1, ("expired", "success"): 1}
    assert journal.tally().told == {("expired", "success"): 1}


def test_merchants_take_turns(make: Make) -> None:
    """The few bills of one do not wait behind the many of another, wherever they stand in the input."""

    extra = [Row(20 + number, f"n{number}", "N", None, None) for number in range(2)]
    extra += [Row(30, "o", "O", None, None)]

    journal = make(4, extra=extra)

    sent = [(bill.number, bill.bill) for bill in journal.unsent(0, 10)]
    assert sent == list(enumerate(["1", "n0", "o", "2", "n1", "3", "4"], 1))


def report(journal: Journal) -> list[dict[str, object]]:
    lines = BatchReport(journal.facts)
    return [dict(zip(lines.header(), lines.line(row), strict=True)) for row in journal.rows()]


def test_report_has_a_line_for_each_row_of_the_input(make: Make) -> None:
    """In its order: bills with and without an outcome, duplicates with the line that stands for them, invalid rows with
    the reason; so it adds up to the sums on the screen."""

    extra = [
        Row(5, "2", "M", "again", None, ("2", "M")),
        BadRow(6, "is no bill", ("-", "M")),
        Row(7, "4", "M", None, None),
    ]
    journal = make(3, extra=extra)
    journal.published(2)
    journal.record([told(Reason.PAID, bill="1")])

    lines = report(journal)

    assert [(line["line"], line["billnumber"], line["status"], line["reason"]) for line in lines] == [
        (2, "1", "rejected", "paid"),
        (3, "2", "waiting", None),
        (4, "3", "unsent", None),
        (5, "2", "skipped", "duplicate"),
        (6, "-", "skipped", "invalid"),
        (7, "4", "unsent", None),
    ]
    assert lines[0]["commandId"] == told(bill="1").command_id
    assert lines[0]["effectUnknown"] == "false"
    assert "line 3, which stands for it" in str(lines[3]["detail"])
    assert lines[4]["detail"] == "is no bill"
    assert len(lines) == journal.tally().rows


def test_report_keeps_the_columns_of_the_input(make: Make) -> None:
    """As they came and in their order, then ours; a column of the input with one of our names gets another name."""

    form = Form(("Toko", "Bill Number", "status", "merchantId"), {"bill": 1, "merchant": 3})
    extra = [
        Row(2, "1", "M9", None, None, ("Jaya", " 1 ", "unpaid", "")),
        Row(3, "2", "M9", None, None, ("Baru",)),
        BadRow(4, "has 5 fields", ("a", "b", "c", "d", "e")),
    ]
    journal = make(0, form=form, extra=extra)

    lines = report(journal)

    assert list(lines[0]) == [
        "Toko",
        "Bill Number",
        "status (input)",
        "merchantId",
        *(column for column in REPORT_COLUMNS if column != "merchantId"),
    ]
    kept = [[line[name] for name in ("Toko", "Bill Number", "status (input)", "merchantId")] for line in lines]
    assert kept == [["Jaya", " 1 ", "unpaid", "M9"], ["Baru", "", "", "M9"], ["a", "b", "c", "d,e"]]
    assert [line["billnumber"] for line in lines] == ["1", "2", None]
    assert [line["status"] for line in lines] == ["unsent", "unsent", "skipped"]


def test_report_of_json_lines_has_the_lines(make: Make) -> None:
    """Each one in a column of its own."""

    journal = make(0, form=JSON_FORM, extra=[Row(1, "1", "M", None, None, ('{"billnumber": "1", "more": 2}',))])

    (line,) = report(journal)

    assert (line["input"], line["billnumber"]) == ('{"billnumber": "1", "more": 2}', "1")


@pytest.mark.parametrize("text", ["=1+1", "+62812", "-5", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1"])
def test_no_cell_of_a_report_is_a_formula(text: str) -> None:
    """Text comes from a gateway, or from whoever wrote the input."""

    assert harmless(text) == f"'{text}"
    assert kept_as_text(text) == f"'{text}"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("0010092081", '="0010092081"'),
        ("20261122210000123", '="20261122210000123"'),
        ("1E+08", '="1E+08"'),
        ("22/11/2026", '="22/11/2026"'),
        ("10092081", "10092081"),
        ("0", "0"),
        ("M1", "M1"),
        ("false", "false"),
        ("Toko Jaya", "Toko Jaya"),
        ('a"b', 'a"b'),
        ('="007"', '="007"'),
        (7, 7),
        (None, None),
    ],
)
def test_digits_that_a_spreadsheet_would_change_are_kept_as_text(text: object, cell: object) -> None:
    """Leading zeros, long numbers, what looks like a date; other cells stay as they are."""

    assert kept_as_text(text) == cell


def test_republishing_leaves_out_what_has_an_outcome(make: Make) -> None:
    """The others go again, and again under the same numbers."""

    journal = make(3)
    journal.published(3)
    journal.record([told(bill="2")])

    journal.publish_again()

    assert [bill.number for bill in journal.unsent(0, 10)] == [1, 3]


def test_unresolved_bills_are_sent_again_behind_the_others(make: Make) -> None:
    """Under their ids, as doubtful as they were; what is final, or whose deadline has passed, is not sent again."""

    journal = make(4)
    journal.published(4)
    unresolved = told(Reason.RETRIES_EXHAUSTED, bill="2")._replace(effect_unknown=True)
    journal.record([told(bill="1"), unresolved, told(Reason.DEADLINE_PASSED, bill="3"), told(Reason.PAID, bill="4")])

    assert journal.retry() == 1

    assert journal.unsent(4, 10) == [Bill(5, "2", "M", None, None, 1, True)]
    assert journal.tally().unsent == 1
    assert [(job.begun, job.progress.effect_unknown) for job in journal.take(0, 9)] == [(False, True)]
    assert report(journal)[1]["status"] == "unsent"
    journal.record([unresolved])  # a copy of an earlier outcome
    assert journal.tally().answered == 3
    journal.record([told(Reason.RETRIES_EXHAUSTED, NOON + 9, bill="2")])
    assert journal.tally().answered == 4


def test_bills_that_need_people_are_named(make: Make) -> None:
    """With line, merchant and what the gateway said, the first ones in the order of the input."""

    journal = make(3)
    journal.record([told(Reason.PAID, bill="2"), told(Reason.PAID, bill="1"), told(bill="3")])

    assert [(line, bill, merchant) for line, bill, merchant, _ in journal.examples({Reason.PAID}, 10)] == [
        (2, "1", "M"), (3, "2", "M")
    ]  # fmt: skip
    assert len(journal.examples({Reason.PAID}, 1)) == 1


# --- without a broker


def test_taken_bill_is_begun_before_anybody_sends_it(make: Make) -> None:
    """A process that crashes leaves it as maybe sent; the next one takes it again and knows that."""

    journal = make(3)
    assert [(job.bill.bill, job.begun) for job in journal.take(0, 2)] == [("1", False), ("2", False)]
    journal.close()

    after = Journal(journal.path)

    assert [(job.bill.bill, job.begun) for job in after.take(0, 9)] == [("1", True), ("2", True), ("3", False)]
    after.close()


def test_bill_that_was_never_sent_is_as_new(make: Make) -> None:
    """Put back without an attempt it is not maybe sent; with one it keeps what is known of it."""

    journal = make(2)
    journal.take(0, 2)
    known = Progress(1, 3, ["77"], True, NOON, "5009300", calls=2)

    journal.put_back([(1, Progress(), None), (2, known, None)])

    first, second = journal.take(0, 2)
    assert (first.begun, first.progress) == (False, Progress())
    assert (second.begun, second.progress) == (False, known)


def test_doubt_survives_being_put_back(make: Make) -> None:
    """One that may have been sent by a dead process stays in doubt, even if this one never sent it."""

    journal = make(1)
    journal.take(0, 1)
    journal.put_back([(1, Progress(effect_unknown=True), None)])

    (job,) = journal.take(0, 1)

    assert job.progress.effect_unknown


def test_delayed_bill_comes_when_it_is_due(make: Make) -> None:
    """Not before, and not by the way of those that were never sent."""

    journal = make(2)
    journal.take(0, 1)
    journal.put_back([(1, Progress(1, 4), NOON + 30)])

    assert journal.next_due() == NOON + 30
    assert [job.bill.bill for job in journal.take(0, 9)] == ["2"]
    assert journal.take_due(NOON + 29, 9) == []
    assert [job.progress.round for job in journal.take_due(NOON + 30, 9)] == [1]
    assert journal.next_due() is None


def test_bill_that_the_broker_has_is_in_doubt_without_it(make: Make) -> None:
    """What was published before the broker went may have been sent by a worker."""

    journal = make(3)
    journal.published(1)

    journal.direct(maybe_published=2)

    assert [job.begun for job in journal.take(0, 9)] == [True, True, False]


# --- files


def test_second_process_is_told_who_has_the_batch(make: Make) -> None:
    """Two at once would publish side by side; the lock goes with its holder, however it ends."""

    path = make(1).path
    script = (
        f"from pathlib import Path; from worker.shells import journals\nwith journals.lock(Path({str(path)!r})): pass"
    )

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)

    with lock(path):
        refused = other()

    assert f"is in use by process {os.getpid()}" in refused.stderr
    assert other().returncode == 0


def test_load_that_is_not_kept_leaves_nothing(tmp_path: Path) -> None:
    """Nobody finds half a batch; what a killed process left goes a day later."""

    load = Load(tmp_path)
    load.fill([Row(2, "1", "M", None, None)])
    assert journals(tmp_path) == []
    load.discard()
    assert list(tmp_path.iterdir()) == []

    old, new = tmp_path / ".loading-1.db", tmp_path / ".loading-2.db"
    old.touch()
    new.touch()
    os.utime(old, (1.0, 1.0))
    clean(tmp_path)

    assert list(tmp_path.iterdir()) == [new]


def test_log_of_a_journal_that_was_moved_away_is_not_applied_to_the_next(make: Make, tmp_path: Path) -> None:
    """A killed process leaves its latest changes in a file beside the journal, and SQLite would apply them to any."""

    script = (
        "import os; from pathlib import Path; from worker.shells.journal import Journal; "
        f"journal = Journal(Path({str(make(3).path)!r})); journal.published(3); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    path = tmp_path / f"{BATCH.id}.db"
    log = path.with_name(f"{path.name}-wal").read_bytes()
    assert log
    path.replace(tmp_path / "moved.db")

    assert make(5).tally().unsent == 5

    kept = [each for each in tmp_path.glob(f"{path.name}-wal.*.old") if each.read_bytes() == log]
    assert len(kept) == 1


def test_files_are_their_owners_alone(make: Make, tmp_path: Path) -> None:
    """Journal, lock and report can be read by nobody else, whatever the umask."""

    before = os.umask(0)
    try:
        journal = make(1)
        journal.published(1)
        with lock(journal.path), replacing(tmp_path / "out.csv") as file:
            file.write("x")
    finally:
        os.umask(before)

    files = list(tmp_path.iterdir())
    assert {each.name for each in files} >= {"b-1.db", "b-1.db-wal", "b-1.lock", "out.csv"}
    assert {each.stat().st_mode & 0o777 for each in files} == {0o600}


def test_links_are_not_followed(make: Make, tmp_path: Path) -> None:
    """A link in the place of a lock or a report does not lead elsewhere what is written."""

    path, precious = make(1).path, tmp_path / "precious"
    precious.write_text("kept")
    path.with_suffix(".lock").symlink_to(precious)
    (tmp_path / "out.csv").symlink_to(precious)

    with pytest.raises(JournalError, match="lock"), lock(path):
        pass
    with replacing(tmp_path / "out.csv") as file:
        file.write("report")

    assert precious.read_text() == "kept"
    assert (tmp_path / "out.csv").read_text() == "report"


@pytest.mark.parametrize("content", [b"", b"not a database at all, whatever its name says" * 100])
def test_file_that_is_no_journal_is_named(tmp_path: Path, content: bytes) -> None:
    """One line with the path."""

    path = tmp_path / "b.db"
    path.write_bytes(content)

    with pytest.raises(JournalError, match=str(path)):
        Journal(path)


def test_report_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Whoever breaks off leaves the old one, and no rest."""

    path = tmp_path / "out.csv"
    path.write_text("old")
    with suppress(KeyboardInterrupt), replacing(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]

    with replacing(path) as file:
        file.write("new")
    assert path.read_text() == "new"


def test_reader_may_look_while_it_is_written(make: Make) -> None:
    """`status` neither waits nor disturbs."""

    journal = make(3)
    reader = reopened(journal)

    journal.record([told(bill="1")])

    assert reader.tally().answered == 1
    reader.close()


def done(journal: Journal) -> None:
    """Every bill of a batch of three has its outcome."""
    journal.published(3)
    journal.record([told(bill=str(number)) for number in (1, 2, 3)])


def published(journal: Journal) -> None:
    """Nobody waits for its outcomes."""
    journal.published(3)


def followed(journal: Journal) -> None:
    """Somebody does, and one is there."""
    journal.has_inbox()
    journal.published(3)
    journal.record([told(bill="1")])


@pytest.mark.parametrize(
    ("state", "days", "goes"),
    [
        (done, 31, True),
        (done, 29, False),
        (published, 31, True),
        (followed, 31, False),
        (lambda _: None, 31, False),
    ],
    ids=["done", "done lately", "published", "followed", "unsent"],
)
def test_prune(make: Make, state: Callable[[Journal], None], days: int, goes: bool) -> None:
    """Only what is finished and old enough goes, with all its files."""

    journal = make(3)
    state(journal)
    journal.close()
    with lock(journal.path):
        pass
    os.utime(journal.path, (NOON, NOON))

    gone = list(prune(journal.path.parent, 30, NOON + days * 86_400))

    assert gone == ([BATCH.id] if goes else [])
    assert (list(journal.path.parent.iterdir()) == []) is goes


def test_prune_leaves_what_is_in_use(make: Make) -> None:
    """A batch that a process holds stays, however old."""

    journal = make(3)
    done(journal)
    journal.close()
    os.utime(journal.path, (NOON, NOON))

    with lock(journal.path):
        assert list(prune(journal.path.parent, 1, NOON + 10 * 86_400)) == []

    assert journal.path.exists()
