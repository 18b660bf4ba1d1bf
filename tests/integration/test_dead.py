"""Dead letters at a real broker: looking keeps their order, moving loses none, one at a time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.builders import body
from tests.rabbit import Rabbit
from tests.waiting import wait_until
from tests.worker_process import working
from worker import signals
from worker.app.dead_letters import HeldLetter, Redrive, RedriveEnd, RedrivePlan, look
from worker.cli import main
from worker.core import jakarta
from worker.core.dead_letter import Filter
from worker.core.delivery import BROKER_HEADERS
from worker.core.topology import Names, QueueType, topology
from worker.sandbox.simulator import Fault, Pattern, Script, Simulator
from worker.settings import AmqpSettings, Secret
from worker.shells.amqp import lock
from worker.shells.amqp.parked import Busy, Interrupted, ParkedLetters

ROOT = Path(__file__).parents[2]
BOTH: Sequence[QueueType] = ("quorum", "classic")


class Desk:
    """One prefix: its queue of dead letters, and the commands of the operator."""

    def __init__(self, url: str, prefix: str, directory: Path, kind: QueueType = "quorum") -> None:
        self.url = url
        self.names = Names(prefix)
        self.kind = kind
        self.directory = directory
        self.amqp = AmqpSettings(url=Secret(url), prefix=prefix, queue_type=kind)
        with Rabbit(url) as rabbit:
            rabbit.declare(topology(prefix, kind, (1, 2)))

    def park(self, ids: Iterable[str], reason: str | Callable[[str], str] = "credentials", lane: str = "sweep") -> None:
        """Dead letters as the worker parks them; all are there when it returns."""
        parked = list(ids)
        with Rabbit(self.url) as rabbit:
            # Confirms show it: the depth does not while a consumer is being given the messages.
            for start in range(0, len(parked), 5000):
                some = parked[start : start + 5000]
                rabbit.publish_many(self.names.dead, (self._letter(name, reason, lane) for name in some))

    def _letter(self, name: str, reason: str | Callable[[str], str], lane: str) -> tuple[str, bytes, dict[str, Any]]:
        headers = {
            "batch-id": "B-1",
            "dead-reason": reason if isinstance(reason, str) else reason(name),
            "dead-detail": "Unauthorized",
            "dead-at": jakarta.iso(time.time() - 100),
            "dead-lane": lane,
            "attempts": 4,
            "last-response-code": "4017300",
        }
        return lane, body(billnumber=f"bill-{name}"), {"message_id": name, "headers": headers}

    def depth(self, queue: str | None = None) -> int:
        with Rabbit(self.url) as rabbit:
            return rabbit.depth(queue or self.names.dead)

    def ids(self) -> list[str]:
        """What lies there, in its order, seen as the commands see it."""
        seen: list[str] = []
        with self.hold() as parked:
            look(
                parked,
                lambda held: seen.append(str(held.parcel.properties.message_id)),
                show=lambda *_: None,
                limit=1_000_000,
            )
        return seen

    def hold(self, what: str = "test", **options: Any) -> ParkedLetters:
        return ParkedLetters(self.amqp, what, **{"stop": lambda: 0, **options})

    def drained(self, queue: str) -> list[Any]:
        """Takes all there is."""
        with Rabbit(self.url) as rabbit:
            return rabbit.consume(queue, rabbit.depth(queue), 60)

    def environment(self) -> dict[str, str]:
        return {
            "AMQP_URL": self.url,
            "AMQP_PREFIX": self.names.prefix,
            "AMQP_QUEUE_TYPE": self.kind,
            "COLUMNS": "80",
            "TERM": "xterm",
        }

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """The command, in a process of its own."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(
            [sys.executable, "-m", "worker", "dead", *arguments],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **self.environment()},
            cwd=self.directory,
            text=True,
            **{**pipes, **options},
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command in this process, which takes a tenth of the time; it must not touch our signals."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment()),
            mock.patch.object(signals, "install"),
            contextlib.chdir(self.directory),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = main(["dead", *arguments])
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture
def desk(amqp_url: str, prefix: str, tmp_path: Path) -> Desk:
    """A topology of this test's own."""
    return Desk(amqp_url, prefix, tmp_path)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a loaded machine, who holds the dead letters may take longer to say so."""
    monkeypatch.setattr(lock, "HOLDER_SECONDS", 30.0)


@pytest.fixture(params=BOTH)
def either(request: pytest.FixtureRequest, amqp_url: str, prefix: str, tmp_path: Path) -> Desk:
    """The same, of quorum and of classic queues."""
    return Desk(amqp_url, prefix, tmp_path, request.param)


def names(count: int, start: int = 0) -> list[str]:
    return [f"m{number:06d}" for number in range(start, start + count)]


def audit(errors: str, event: str = "dead.redrive") -> dict[str, Any]:
    """The one line that a run leaves."""
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    (found,) = [line for line in lines if line["event"] == event]
    return dict(found)


def redrive(desk: Desk, parked: ParkedLetters, stop: Callable[[], int] = lambda: 0, **order: Any) -> Redrive:
    run = Redrive(
        parked, desk.names, RedrivePlan(**order), clock=_Clock(), copy_id=lambda: "h", stop=stop, show=lambda *_: None
    )
    run.run()
    return run


class _Clock:
    def epoch(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


# -- looking


def test_looking_keeps_the_order(either: Desk) -> None:
    """However often people look, everything stays in its place."""
    either.park(names(500))

    assert [either.ids() for _ in range(3)] == [names(500)] * 3
    assert [message.properties.message_id for message in either.drained(either.names.dead)] == names(500)


def test_looking_while_more_are_parked(either: Desk) -> None:
    """What the worker parks during a look comes behind what was there."""
    either.park(names(500))
    seen: list[str] = []

    def each(held: HeldLetter) -> None:
        if not seen:
            either.park(names(50, start=500))
        seen.append(str(held.parcel.properties.message_id))

    with either.hold() as parked:
        look(parked, each, show=lambda *_: None)

    assert seen == names(500)
    assert either.ids() == names(550)


@pytest.mark.parametrize("looked_at_before", [False, True])
def test_a_look_that_is_killed_keeps_the_order(desk: Desk, looked_at_before: bool) -> None:
    """SIGKILL in the middle of the deliveries: all are back at once, in order."""
    desk.park(names(3000))
    if looked_at_before:
        desk.ids()
    pid = os.fork()
    if not pid:
        seen = 0

        def each(_: HeldLetter) -> None:
            nonlocal seen
            seen += 1
            if seen == 700:
                os.kill(os.getpid(), signal.SIGKILL)

        with desk.hold() as parked:
            look(parked, each, show=lambda *_: None)
        os._exit(1)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    assert desk.ids() == names(3000)


def test_a_look_that_is_interrupted_keeps_the_order(either: Desk) -> None:
    """Ctrl-C in the middle of the deliveries hangs up, and all stay in order."""
    either.park(names(3000))
    either.ids()
    seen: list[HeldLetter] = []

    def each(held: HeldLetter) -> None:
        seen.append(held)
        if len(seen) == 700:
            raise Interrupted

    with pytest.raises(Interrupted), either.hold() as parked:
        look(parked, each, show=lambda *_: None)

    assert either.ids() == names(3000)


def test_two_do_not_look_at_once(desk: Desk) -> None:
    """A second one waits for a look, and does not wait for a redrive: it says who has them."""
    desk.park(names(3))
    with desk.hold("list") as first:
        thread = threading.Thread(target=_turn_until, args=(first, done := threading.Event()))
        thread.start()
        try:
            with (
                pytest.raises(Busy, match=rf"`dead list` of .* \(process {os.getpid()}, since"),
                desk.hold(patience=0.5),
            ):
                pass
        finally:
            done.set()
            thread.join()

    assert desk.ids() == names(3)


def _turn_until(parked: ParkedLetters, done: threading.Event) -> None:
    while not done.is_set():
        parked.turn(0.05)


def test_no_queue(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Without a topology, it says what to do, in one line."""
    desk = Desk(amqp_url, prefix, tmp_path)
    with Rabbit(amqp_url) as rabbit:
        rabbit.delete_queue(desk.names.dead)
    done = desk.run("list")

    assert (done.returncode, done.stdout) == (1, "")
    assert "topology --apply" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- the commands that look


def test_list_and_show(desk: Desk) -> None:
    """Counts and rows of ours, of the broker's own and of foreign ones; each can be shown."""
    desk.park(["a-1", "a-2"], "retries_exhausted")
    with Rabbit(desk.url) as rabbit:
        rabbit.publish(desk.names.dead, "nowhere", b"\xff\x1b[31m", headers={"x-death": "hm", "NaN": [None]})
        rabbit.publish(desk.names.commands, "sweep", body(), message_id="b-1", headers={"batch-id": "B-2"})
        with Rabbit(desk.url) as crashing:
            _exceed_the_delivery_limit(crashing, desk.names.queue("sweep"))
        wait_until(lambda: rabbit.depth(desk.names.dead) == 4, 30, "moved by the broker")

    listed = desk.run("list", "--json")
    assert (listed.returncode, listed.stderr) == (0, "")
    data = json.loads(listed.stdout)
    assert {(kind["reason"], kind["lane"]): kind["count"] for kind in data["counts"]} == {
        ("retries_exhausted", "sweep"): 2,
        ("delivery_limit", "sweep"): 1,
        ("unknown", "unknown"): 1,
    }
    assert [letter["messageId"] for letter in data["letters"]][::3] == ["a-1", "b-1"]

    table = desk.run("list").stdout
    for piece in ("4 dead letters in", "retries_exhausted", "delivery_limit", "a-2", "b-1", "unknown", "total"):
        assert piece in table

    shown = desk.run("show", "b-1").stdout
    for piece in (
        "reason       delivery_limit",
        "moved here by the broker from",
        "bill         10092081",
        "batch        B-2",
    ):
        assert piece in shown
    assert '"billnumber": "10092081"' in shown

    foreign = desk.run("show", data["letters"][2]["messageId"])
    assert (foreign.returncode, foreign.stdout.isprintable(), "in base64" in foreign.stdout) == (0, False, True)
    assert "\x1b" not in foreign.stdout


def _exceed_the_delivery_limit(rabbit: Rabbit, queue: str) -> None:
    """A command that is returned as often as the lane allows."""
    while True:
        method, _, _ = rabbit.channel.basic_get(queue)
        if method is None:
            return
        rabbit.channel.basic_reject(method.delivery_tag, requeue=True)


def test_a_narrow_terminal_loses_no_column(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns a long message id is broken, so that reason and age stay whole; nothing is cut."""
    name = "cancellation-of-the-order-service-of-merchant-121000001-2026-11-27-000000001"
    desk.park([name], "not_found_after_unknown_effect")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    done = desk.run("list")

    lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
    (row,) = (number for number, line in enumerate(lines) if line.lstrip().startswith("cancellation-of-the"))
    assert lines[row].split()[2:] == ["not_found_after_unknown_effect", "2m"]
    assert "".join(line.split()[0] for line in lines[row : row + 3] if line.strip()) == name
    assert max(map(len, lines)) <= 80


def test_several_with_one_id(desk: Desk) -> None:
    """All of them are shown; an id that is not there is an error."""
    desk.park(["a", "b", "a"])
    both = desk.run("show", "a", "--json")
    none = desk.run("show", "c")

    assert [json.loads(line)["messageId"] for line in both.stdout.splitlines()] == ["a", "a"]
    assert (none.returncode, none.stdout) == (1, "")
    assert none.stderr == "qris-expire: no dead letter of 3 has the id c; `qris-expire dead list` shows them\n"


def test_filters(desk: Desk) -> None:
    """Each filter of the command line reaches the letters."""
    desk.park(["a", "b"], lambda name: {"a": "credentials", "b": "malformed_json"}[name])
    desk.park(["c"], lane="cancellation")
    chosen = {
        ("--reason", "credentials", "--reason", "malformed_json", "--lane", "sweep"): "ab",
        ("--before", jakarta.iso(time.time() - 3600)): "",
        ("--batch", "B-1", "--bill", "bill-b"): "b",
    }
    for options, expected in chosen.items():
        lines = desk.run("export", *options).stdout.splitlines()
        assert "".join(json.loads(line)["messageId"] for line in lines) == expected

    assert "reasons that are there: credentials, malformed_json" in desk.run("list", "--reason", "typo").stderr


def test_export_to_a_file(desk: Desk) -> None:
    """A line each, the body as it came, and they stay; a file that cannot be written is named."""
    desk.park(names(3))
    done = desk.run("export", "--output", "dead.jsonl")
    lines = [json.loads(line) for line in (desk.directory / "dead.jsonl").read_text().splitlines()]

    assert (done.returncode, done.stdout) == (0, "")
    assert [line["messageId"] for line in lines] == names(3)
    assert [line["body"] for line in lines] == [body(billnumber=f"bill-{name}").decode() for name in names(3)]
    assert [path.name for path in desk.directory.iterdir()] == ["dead.jsonl"]
    assert desk.ids() == names(3)

    nowhere = desk.run("export", "--output", "no/such/file")
    assert nowhere.returncode == 1
    assert nowhere.stderr.startswith("qris-expire: no/such/file cannot be written (No such file or directory)")


@pytest.mark.parametrize(
    "arguments",
    [
        ["redrive", "--before", "yesterday"],
        ["redrive", "--rate", "0.001"],
        ["purge"],
        ["list", "--lane", "fast"],
        ["frobnicate"],
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str]) -> None:
    """Exit code 2 and one line, before the broker is asked for anything."""
    desk = object.__new__(Desk)
    desk.url, desk.names, desk.kind, desk.directory = "amqp://127.0.0.1:1", Names("p"), "quorum", tmp_path
    done = desk.run(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command", [["list"], ["redrive"], ["redrive", "--dry-run"], ["purge", "--yes"], ["export", "--output", "out"]]
)
def test_a_misspelt_reason_is_a_mistake(desk: Desk, command: list[str]) -> None:
    """A reason that no dead letter can have ends with 2 and the reasons that there are; nothing is done."""
    desk.park(names(3))

    done = desk.run(*command, "--reason", "retries_exausted")

    assert done.returncode == 2
    assert "no dead letter has the reason retries_exausted; the reasons are credentials, " in done.stderr
    assert (desk.depth(), (desk.directory / "out").exists()) == (3, False)


def test_a_reason_that_is_not_there_is_no_mistake(desk: Desk) -> None:
    """A script that redrives what there is of a reason ends well where there is none."""
    desk.park(names(3))

    assert desk.run("redrive", "--reason", "delivery_limit").returncode == 0


# -- bringing back


def test_redrive(either: Desk) -> None:
    """What matches is at its lane with a fresh start, the rest stays in its order, one audit line says so."""
    either.park(names(40), lambda name: "credentials" if int(name[1:]) % 4 else "malformed_json")
    either.ids()
    dry = either.run("redrive", "--reason", "credentials", "--limit", "20", "--dry-run")
    assert (dry.returncode, dry.stdout.splitlines()[0]) == (0, "would redrive 20 of 40 dead letters (30 match)")
    assert either.depth() == 40

    done = either.run("redrive", "--reason", "credentials", "--limit", "20")
    wanted = [name for name in names(40) if int(name[1:]) % 4][:20]
    assert (done.returncode, done.stdout) == (0, "redrove 20 of 40 dead letters (30 match)\n")
    line = audit(done.stderr)
    assert (line["redriven"], line["filters"], line["limit"], line["result"]) == (
        20,
        {"reason": ["credentials"]},
        20,
        "done",
    )
    assert {"user", "host", "process", "began", "ended"} < set(line)

    messages = either.drained(either.names.queue("sweep"))
    assert [message.properties.message_id for message in messages] == wanted
    for message in messages:
        ours = {name for name in message.properties.headers if not name.startswith(BROKER_HEADERS)}
        assert ours == {"batch-id", "qris-hop"}
        # A copy of the header would say how often the dead letter was taken, by this look among others.
        assert message.properties.headers.get("x-acquired-count", 0) <= 1
    assert {message.properties.delivery_mode for message in messages} == {2}
    assert either.ids() == [name for name in names(40) if name not in wanted]


def test_redrive_takes_only_what_was_there(desk: Desk) -> None:
    """What fails again and is parked again is not taken a second time by the same run."""
    desk.park(names(300))
    with desk.hold() as parked:
        stop = _park_more(desk)
        run = redrive(desk, parked, stop=stop)

    assert run.report.redriven == 300
    assert desk.depth() >= 10
    assert set(desk.ids()).isdisjoint(names(300))


def _park_more(desk: Desk) -> Callable[[], int]:
    parked = iter(names(10, start=900_000))

    def stop() -> int:
        name = next(parked, None)
        if name:
            desk.park([name])
        return 0

    return stop


def test_unroutable(desk: Desk) -> None:
    """Without a lane to go to, everything stays, and it says what to do."""
    desk.park(names(600))
    with Rabbit(desk.url) as rabbit:
        rabbit.channel.queue_unbind(desk.names.queue("sweep"), desk.names.commands, "sweep")
    done = desk.run("redrive")

    assert (done.returncode, audit(done.stderr)["redriven"]) == (1, 0)
    assert done.stderr.splitlines()[-1].endswith("run `qris-expire topology --apply`; the rest stays")
    assert desk.ids() == names(600)


def test_redrive_interrupted(desk: Desk) -> None:
    """Ctrl-C ends it with 130, at once, with every command in exactly one place; the same command goes on."""
    desk.park(names(300))
    process = desk.start("redrive", "--rate", "10")  # so that it takes half a minute, which it does not get
    wait_until(lambda: desk.depth(desk.names.queue("sweep")) >= 5, 30, "some redriven")
    second = desk.run("redrive")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)

    assert (second.returncode, second.stdout) == (1, "")
    assert f"(process {process.pid}, since " in second.stderr
    assert "of 300 redriven" in second.stderr
    moved = desk.depth(desk.names.queue("sweep"))
    assert (process.returncode, audit(err)["redriven"], audit(err)["result"]) == (130, moved, "stopped")
    assert desk.ids() == names(300)[moved:]
    assert desk.run("redrive").returncode == 0
    assert [message.properties.message_id for message in desk.drained(desk.names.queue("sweep"))] == names(300)


def test_canary_with_a_worker(desk: Desk, tmp_path: Path) -> None:
    """A worker expires the canary, so the rest follows; when the gateway refuses the canary, the rest stays."""
    desk.park(names(12))
    with (
        Simulator(Script(patterns=(Pattern("^bill-x", (Fault(code="4049301", repeat=True),)),))) as gateway,
        working(desk.url, desk.names.prefix, gateway, tmp_path, RETRY_DELAYS_SECONDS="1,2") as (_, producer),
    ):
        good = desk.run("redrive", "--canary", "2", "--timeout", "60")
        outcomes = producer.collect(12, 30)
        desk.park(["x1", "x2", "x3"])
        bad = desk.run("redrive", "--canary", "1", "--timeout", "60")

    assert (good.returncode, {outcome.fields["status"] for outcome in outcomes}) == (0, {"expired"})
    assert sorted(outcome.command_id for outcome in outcomes) == names(12)
    assert bad.returncode == 1
    assert "the canary was bad" in bad.stderr
    assert (audit(bad.stderr)["result"], audit(bad.stderr)["redriven"]) == ("canary was bad", 1)
    assert desk.ids() == ["x2", "x3"]


def test_stop_at_failures(desk: Desk) -> None:
    """Outcomes are followed; too many that are not `expired` stop it."""
    desk.park(names(400))
    with desk.hold() as parked, _answering(desk, "unresolved"):
        run = redrive(desk, parked, stop_at_failures=50, patience=20.0, filter=Filter(lanes=frozenset({"sweep"})))

    assert run.report.ended is RedriveEnd.FAILURES
    assert run.report.redriven < 400
    assert desk.ids() == names(400)[run.report.redriven :]


class _answering:  # noqa: N801
    """Somebody who ends every command of the sweep lane with this status."""

    def __init__(self, desk: Desk, status: str) -> None:
        self._desk, self._status = desk, status
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._answer)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _answer(self) -> None:
        names = self._desk.names
        with Rabbit(self._desk.url) as rabbit:
            channel = rabbit.plain_channel()
            for method, properties, _ in channel.consume(names.queue("sweep"), auto_ack=True, inactivity_timeout=0.05):
                if method is not None:
                    outcome = {"commandId": properties.message_id, "status": self._status, "reason": "credentials"}
                    channel.basic_publish(names.outcomes, f"sweep.{self._status}", json.dumps(outcome).encode())
                if self._done.is_set():
                    return


# -- deleting


def test_purge(either: Desk) -> None:
    """With --yes, what matches is deleted and the rest stays."""
    either.park(names(20), lambda name: "credentials" if int(name[1:]) % 2 else "malformed_json")
    done = either.run("purge", "--reason", "malformed_json", "--yes")

    assert (done.returncode, done.stdout) == (0, "deleted 10 of 20 dead letters\n")
    assert (audit(done.stderr, "dead.purge")["removed"], either.ids()) == (10, names(20)[1::2])


@pytest.mark.parametrize(("answer", "code", "left"), [(b"y\n", 0, 0), (b"n\n", 1, 3), (b"\x03", 130, 3)])
def test_purge_asks(desk: Desk, answer: bytes, code: int, left: int) -> None:
    """On a terminal it asks; anything but yes deletes nothing."""
    desk.park(names(3))
    ours, theirs = pty.openpty()
    process = desk.start("purge", stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=_take_terminal)
    os.close(theirs)
    said = b""
    deadline = time.monotonic() + 30
    while b"[y/N]" not in said and time.monotonic() < deadline:
        said += os.read(ours, 4096) if select.select([ours], [], [], 1)[0] else b""
    assert b"Delete 3 of 3 dead letters for good?" in said
    os.write(ours, answer)

    assert process.wait(30) == code
    os.close(ours)
    assert desk.depth() == left


def _take_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


# -- many


def _peak_kib(pid: int) -> int:
    """Most memory resident so far. Not `ru_maxrss`: that one remembers the process from before its exec, this one."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) if found else 0


@pytest.fixture
def many(amqp_url: str, prefix: str, tmp_path: Path) -> Desk:
    """100,000 dead letters: two consumers' worth."""
    desk = Desk(amqp_url, prefix, tmp_path)
    desk.park(names(100_000))
    return desk


@pytest.mark.slow
def test_looking_at_100_000(many: Desk) -> None:
    """Only on request, and then in 100 MB of ours; a look that is killed between, and the next one, keep the order."""
    for kill_after in (1.0, 3.0):
        process = many.start("list", "--limit", "100000")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(kill_after)
        process.kill()
        process.communicate()
    began = time.monotonic()
    process = many.start("list", "--limit", "100000", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks = [0]

    def ended() -> bool:
        peaks.append(_peak_kib(process.pid))
        return process.poll() is not None

    wait_until(ended, 60, "all are looked at")
    peak = max(peaks)

    assert process.returncode == 0
    assert time.monotonic() - began < 60
    assert 0 < peak < 100_000
    assert many.ids() == names(100_000)


@pytest.mark.slow
def test_redrive_of_10_000_killed(desk: Desk) -> None:
    """Killed half-way and run again: none is lost, and no more are doubled than were on their way."""
    desk.park(names(10_000))
    process = desk.start("redrive")
    with Rabbit(desk.url) as rabbit:
        wait_until(lambda: rabbit.depth(desk.names.queue("sweep")) >= 4000, 60, "half-way")
    process.kill()
    process.communicate()
    left = desk.ids()
    assert left == names(10_000)[-len(left) :]
    assert 0 < len(left) < 10_000

    assert desk.run("redrive").returncode == 0
    counts = Counter(message.properties.message_id for message in desk.drained(desk.names.queue("sweep")))
    assert sorted(counts) == names(10_000)
    assert sum(counts.values()) - 10_000 <= 501
    assert desk.depth() == 0


def test_nobody_reads_to_the_end(desk: Desk) -> None:
    """`dead export | head` is no failure."""
    desk.park(names(2000))
    process = desk.start("export")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None

    assert (process.wait(30), process.stderr.read()) == (0, "")
    process.stderr.close()
