"""Every command of the README and of the pages beside it, run as it is written; the tour has a test of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest

from tests.brokers import PrivateBroker
from tests.rabbit import Rabbit
from tests.readme import PAGES, ROOT, RUNBOOK
from tests.waiting import wait_until
from worker.core.topology import Names, topology
from worker.sandbox.broker import free_port
from worker.sandbox.simulator import Script, Simulator

SECONDS = 120.0
COLUMNS = 80
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TOUR = "first-hour.md"


def indented(page: Path) -> list[str]:
    """What a page shows indented: commands without their comments, and what they print."""
    text = re.sub(r"^```.*?^```$", "", page.read_text().replace("\\\n", ""), flags=re.MULTILINE | re.DOTALL)
    return [re.split(r" +#", line)[0].strip() for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE)]


LINES = [line for page in PAGES if page != RUNBOOK and page.name != TOUR for line in indented(page)]

OURS = list(dict.fromkeys(line for line in LINES if line.startswith("qris-expire ")))
FIRST = "sweep unpaid.csv --wait --report unpaid.out.csv"
BROKEN = {"code": "5009300", "message": "General Error", "repeat": True}
ENDS_WITH_1 = ("--wait --report", "--follow BATCH --re")
"""Commands after which a bill is unresolved or rejected, and whose exit code says so."""


class Operator:
    """Somebody who types the commands of the pages, with a worker and a gateway that fails for one bill."""

    def __init__(self, directory: Path, gateway: Simulator, settings: dict[str, str]) -> None:
        self.directory = directory
        self.gateway = gateway
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(directory),
            "TERM": "xterm",
            **settings,
        }

    def __call__(self, command: str) -> tuple[int, str]:
        """One command on a terminal of 80 columns: its exit code, and what is on the screen."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, COLUMNS))
        process = subprocess.Popen(
            shlex.split(command),
            env=self.environment,
            cwd=self.directory,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        with os.fdopen(ours, "rb", buffering=0) as terminal:
            shown = b"".join(iter(lambda: read(terminal), b""))
        return process.wait(SECONDS), ESCAPES.sub("", shown.decode()).replace("\r", "")

    def meant(self, command: str) -> str:
        """The command with what its words in capitals stand for here."""
        words = {"BILL": lambda: "10092081", "BATCH": self._batch, "MESSAGE-ID": self._letter}
        for word, value in words.items():
            if re.search(rf" {word}\b", command):
                command = re.sub(rf" {word}\b", f" {value()}", command)
        return command

    def _batch(self) -> str:
        return self("qris-expire status")[1].split()[0]

    def _letter(self) -> str:
        return str(json.loads(self("qris-expire dead list --json")[1])["letters"][0]["messageId"])


def read(terminal: FileIO) -> bytes:
    """What a program has shown; nothing when no program has the terminal any more."""
    try:
        return terminal.read(65_536) or b""
    except OSError:
        return b""


@pytest.fixture
def operator(amqp_url: str, prefix: str, tmp_path: Path) -> Iterator[Operator]:
    """The worker runs, and is drained in the end."""
    metrics = str(free_port())
    (tmp_path / "unpaid.csv").write_text("billnumber\nB-1\nB-2\nB-2\nB-3\n")
    with Simulator(Script.parse({"bills": {"B-3": [BROKEN]}})) as gateway, Rabbit(amqp_url) as rabbit:
        settings = {
            **gateway.environment(tmp_path / "key.pem"),
            "AMQP_URL": amqp_url,
            "AMQP_PREFIX": prefix,
            "GATEWAY_MERCHANT_ID": "M1",
            "RETRY_INITIAL_SECONDS": "0.02",
            "RETRY_MAX_SECONDS": "0.1",
            "RETRY_DELAYS_SECONDS": "none",
            "METRICS_PORT": metrics,
        }
        at_desk = Operator(tmp_path, gateway, settings)
        with (tmp_path / "run.txt").open("wb") as log:
            process = subprocess.Popen(
                ["qris-expire", "run"], env=at_desk.environment, cwd=tmp_path, stdout=log, stderr=log
            )
        try:
            wait_until(lambda: "worker.ready" in (tmp_path / "run.txt").read_text(), 60, "the worker is ready")
            rabbit.publish(Names(prefix).commands, "cancellation", b"no JSON")
            yield at_desk
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            for queue in rabbit_queues(at_desk):
                rabbit.delete_queue(queue)


def rabbit_queues(operator: Operator) -> list[str]:
    """The inboxes of the batches, which are not part of the topology."""
    names, stems = Names(operator.environment["AMQP_PREFIX"]), operator.directory.rglob("*.db")
    return [f"{names.outcomes}.batch.{path.stem.partition('@')[0]}" for path in stems]


def test_commands_of_the_pages_run(operator: Operator) -> None:
    """In the pages' order, a sweep first; each ends with the code that it should, none with a stack trace, and nothing
    is wider than the terminal, so no word is cut."""
    assert operator(f"qris-expire {FIRST}")[0] == 1
    wrong, wide = {}, {}
    for command in OURS:
        if command == "qris-expire run":
            continue  # the worker that runs meanwhile
        if "--direct" in command:  # another day's export
            (operator.directory / "unpaid.out.csv").unlink()
            (operator.directory / "unpaid.csv").write_text("billnumber\nB-4\nB-5\n")
        if "redrive --batch" in command:  # an operator does that when the gateway works again
            operator.gateway.replace(Script())
        code, shown = operator(operator.meant(command))
        assert "Traceback" not in shown, command
        if code != any(part in command for part in ENDS_WITH_1):
            wrong[command] = (code, shown)
        if "redrive" in command and "--dry-run" not in command:
            (audited,) = re.findall(r'^(\{.*"event":"dead.redrive".*)$', shown, re.MULTILINE)
            assert json.loads(audited)["result"] == "done"
        if not command.startswith("qris-expire sign") and too_wide(shown):
            wide[command] = too_wide(shown)

    assert wrong == {}
    assert wide == {}
    assert len(OURS) > 25


def too_wide(shown: str) -> list[str]:
    """Lines that the terminal breaks; not JSON, which is copied, nor bars, which are drawn one over the other."""
    return [line for line in shown.split("\n") if len(line) > COLUMNS and not set("{━") & set(line)]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("rabbitmqctl ")])
def test_policy_of_the_page_is_accepted(line: str, fresh: PrivateBroker) -> None:
    """The command sets a policy that every quorum queue has; on older brokers with what the page says of them."""
    older = {"{": '{"queue-leader-locator": "balanced"}', "quorum_queues": "queues"}
    page = (ROOT / "worker" / "manual" / "operations.md").read_text()
    assert all(f"`{word}`" in page for word in (older["{"], f"--apply-to {older['quorum_queues']}"))
    with Rabbit(fresh.url) as rabbit:
        rabbit.declare(topology("qris.expire", "quorum", (30,)))
    _, *arguments = shlex.split(line)
    if not fresh.ctl("version").startswith("4.3"):
        arguments = [older.get("{" if word.startswith("{") else word, word) for word in arguments]

    fresh.ctl(*arguments)

    def without() -> list[str]:
        rows = [line.split("\t") for line in fresh.ctl("list_queues", "name", "type", "policy").splitlines()[1:]]
        return [name for name, kind, policy in rows if kind.endswith("quorum") and policy != "qris-expire"]

    wait_until(lambda: not without(), 30, "every quorum queue has it")


def test_systemd_is_installed_as_the_page_says(tmp_path: Path) -> None:
    """The commands that copy files, below another root: every file that a unit names is where the unit looks."""
    root = re.compile(r"(?<= )/(?=etc|usr|opt)")
    (tmp_path / "usr/local/sbin").mkdir(parents=True)
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    copies = [line.partition(" && systemctl")[0] for line in LINES if re.match(r"(install|cp) ", line)]
    for line in copies:
        subprocess.run(root.sub(f"{tmp_path}/", line), shell=True, cwd=ROOT, timeout=SECONDS, check=True)

    installed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"usr/local/sbin/qris-expire", "etc/qris-expire/qris-expire.env"} < installed
    units = "".join(path.read_text() for path in (tmp_path / "etc/systemd/system").iterdir())
    named = set(re.findall(r"^(?:Exec\w+|EnvironmentFile)=[+-]?/(\S+)", units, re.MULTILINE))
    yours, ours = {"usr/local/bin/unpaid-bills"}, {"opt/qris-expire/bin/qris-expire"}
    assert named - installed == yours | ours


DEVELOPMENT = [line for line in LINES if re.match(r"\.ci/|\.venv/", line)]
SHORTENED = {
    ".ci/demo": ".ci/demo --direct --commands 20",
    ".ci/quick": ".ci/quick --collect-only tests/unit/test_words.py",
    ".venv/bin/python -m tests.chaos": ".venv/bin/python -m tests.chaos --help",
    ".venv/bin/python -m tests.benchmark": ".venv/bin/python -m tests.benchmark --help",
    ".venv/bin/python -m tests.trace": ".venv/bin/python -m tests.trace",
    ".venv/bin/python -m tests.readme": ".venv/bin/python -m tests.readme",
    ".venv/bin/python -m tests.monitoring generate": ".venv/bin/python -m tests.monitoring generate",
}
"""Commands for developers, as they are run here: what takes minutes has tests of its own."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this one, whose virtual environment is the one that runs the tests."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path / "checkout"
    for name in filter(None, listed.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
        target.chmod((ROOT / name).stat().st_mode)
    (copy / ".venv/bin").mkdir(parents=True)
    for program in ("python", "ruff"):
        link = copy / ".venv/bin" / program
        link.write_text(f'#!/bin/sh\nexec {Path(sys.executable).parent / program} "$@"\n')
        link.chmod(0o755)
    (copy / ".venv/installed-requirements.txt").write_bytes((ROOT / "requirements.txt").read_bytes())
    return copy


@pytest.mark.parametrize("command", [line for line in DEVELOPMENT if not line.startswith((".ci/test", ".ci/run"))])
def test_commands_for_developers_run(command: str, checkout: Path, amqp_url: str) -> None:
    """Each one ends with 0. (`.ci/test` and `.ci/run` are what runs these tests.)"""
    done = subprocess.run(
        shlex.split(SHORTENED[command]),
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "HOME": str(checkout), "AMQP_URL": amqp_url, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_no_other_commands_are_shown() -> None:
    """What is indented is one of the commands above, a setting, a sum, a picture, or what a program prints."""
    known = ("qris-expire ", "rabbitmqctl ", "install ", "cp ", ".ci/", ".venv/")
    prose = ("the worker drained", "grace period of")
    others = [line for line in LINES if re.match(r"[a-z]\S* \S", line) and not line.startswith((*known, *prose))]
    not_run_here = {
        "docker compose -f k8s/compose/compose.yaml up --build",  # tests/manifests/test_compose.py; the page says so
        "docker compose -f k8s/compose/compose.yaml exec worker qris-expire publish 10092081 --wait",
        "python3 -m venv /opt/qris-expire",  # as .ci/setup does
        "systemctl enable --now qris-expire",  # tests/manifests/test_systemd.py verifies the units
        "systemctl enable --now qris-expire-sweep.timer",
    }

    assert set(others) == not_run_here
