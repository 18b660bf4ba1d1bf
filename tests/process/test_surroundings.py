"""What a process is started with and gets sent: signals, descriptors, closed streams, core dumps, directories."""

from __future__ import annotations

import os
import pty
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ledger import check_books
from tests.readme import ROOT
from tests.worker_process import Producer, WorkerProcess
from worker.processes import private_directory
from worker.sandbox.simulator import Script, Simulator
from worker.shells.http import ListenError

SIGNALS = """
import os, sys
from worker import signals
signals.install(**{options})
print("ready", flush=True)
while not signals.received():
    signals.sleep(30)
    print(signals.received(), signals.hangups(), flush=True)
print(signals.names(), flush=True)
"""


def started(script: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def listening() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes = []

    def start(options: str = "", **more: Any) -> subprocess.Popen[str]:
        process = started(SIGNALS.replace("{options}", f"dict({options})"), **more)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
def test_signals_that_ask_to_stop(listening: Callable[..., subprocess.Popen[str]], number: signal.Signals) -> None:
    """Every command ends in order on these, SIGHUP included: its terminal is gone."""
    process = listening(stdin=subprocess.DEVNULL)

    process.send_signal(number)

    assert process.communicate(timeout=30)[0].splitlines()[-1] == f"['{number.name}']"
    assert process.returncode == 0


def test_hangup_of_a_worker_without_a_terminal_asks_to_reread(
    listening: Callable[..., subprocess.Popen[str]],
) -> None:
    """`systemctl reload` sends SIGHUP: it is counted, and it stops nothing."""
    process = listening("worker=True", stdin=subprocess.DEVNULL)
    assert process.stdout is not None

    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "0 1\n"

    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0].splitlines()[-1] == "['SIGTERM']"


def test_hangup_of_a_worker_on_a_terminal_drains_it(listening: Callable[..., subprocess.Popen[str]]) -> None:
    """Who closes the terminal in which they started a worker means it."""
    ours, theirs = pty.openpty()
    try:
        process = listening("worker=True", stdin=theirs)

        process.send_signal(signal.SIGHUP)

        assert process.communicate(timeout=30)[0].splitlines()[-1] == "['SIGHUP']"
    finally:
        os.close(ours)
        os.close(theirs)


def test_hangup_that_nohup_ignores_stays_ignored(listening: Callable[..., subprocess.Popen[str]]) -> None:
    """`nohup qris-expire …` goes on when its terminal is closed."""
    process = listening(stdin=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))

    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)

    assert process.communicate(timeout=30)[0].splitlines()[-1] == "['SIGTERM']"


def test_sigusr1_shows_where_a_worker_is(listening: Callable[..., subprocess.Popen[str]]) -> None:
    """The stacks of all threads go to standard error, and the worker goes on; SIGUSR2 means nothing."""
    process = listening("worker=True", stdin=subprocess.DEVNULL)
    assert process.stderr is not None

    process.send_signal(signal.SIGUSR1)
    assert "most recent call first" in process.stderr.readline()
    process.send_signal(signal.SIGUSR2)
    process.send_signal(signal.SIGTERM)

    assert process.communicate(timeout=30)[0].splitlines()[-1] == "['SIGTERM']"


def run(*arguments: str, before: Callable[[], None] | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "worker", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LOG_FORMAT": "json", **environ},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        close_fds=False,
        preexec_fn=before,
    )


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_streams_harm_nothing(closed: tuple[int, ...]) -> None:
    """With `<&-`, `>&-` or `2>&-` the command ends as it does otherwise."""

    def close() -> None:
        for number in closed:
            os.close(number)

    done = run("run", before=close, AMQP_URL="nonsense")

    assert done.returncode == 2
    assert ("GATEWAY_BASE_URL: is not set" in done.stderr) == (2 not in closed)
    assert "Traceback" not in done.stderr


LIMITS = """
import os, resource, select
inherited = [os.open("/dev/null", os.O_RDONLY) for _ in range({inherited})]
from worker import signals, surroundings
print(*surroundings.raise_descriptors(), flush=True)
signals.install()
assert max(signals._pipe) > {inherited}
os.kill(os.getpid(), 15)
assert signals.wait(30) == 1
"""


def test_more_descriptors_than_select_can_take() -> None:
    """With 1,500 inherited descriptors signals still arrive: nothing of ours uses select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 2000, "this test needs a hard limit of 2,000 open files"

    process = started(
        LIMITS.replace("{inherited}", "1500"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1800, hard)),
    )
    said, error = process.communicate(timeout=60)

    assert process.returncode == 0, error
    assert int(said.split()[0]) > 1800


def test_no_module_of_ours_calls_select() -> None:
    """select() fails for descriptors above 1,023."""
    users = [
        str(path) for path in (ROOT / "worker").rglob("*.py") if "select.select(" in path.read_text(encoding="utf-8")
    ]

    assert users == []


def test_a_process_that_is_made_private_leaves_no_core() -> None:
    """Memory holds secrets: neither a core file nor another process of the same user gets it."""
    script = (
        "import ctypes, os, resource; from worker import surroundings; surroundings.keep_memory_private();"
        "print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )

    said, error = started(script).communicate(timeout=60)

    assert said == "(0, 0) 0\n", error


def test_no_writable_directory_for_the_sockets_of_processes(tmp_path: Path) -> None:
    """The next place is tried; where none is left, a line says what to do."""

    assert private_directory(["/proc/nowhere", str(tmp_path)]).parent == tmp_path
    with pytest.raises(ListenError, match="set TMPDIR to one that is"):
        private_directory(["/proc/nowhere", "/proc"])


def test_waiting_ends_when_the_time_is_over() -> None:
    """`signals.sleep` returns without a signal, too."""
    said, error = started(
        "from worker import signals; signals.install(); signals.sleep(0.05); print(signals.wait(0.05))"
    ).communicate(timeout=60)

    assert (said, error) == ("0\n", "")


class Starving(WorkerProcess):
    """A worker that may open few files, and cannot raise that."""

    def command(self) -> list[str]:
        return ["bash", "-c", 'ulimit -n 36 && exec "$0" "$@"', *super().command()]


def test_a_worker_without_descriptors_loses_no_attempt(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """64 senders, and files for a few: each of 200 commands is called once and expired; the health port answers."""
    with (
        Simulator(Script(latency=0.1)) as gateway,
        Starving(amqp_url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="64") as worker,
    ):
        worker.wait_ready()
        with Producer(amqp_url, prefix) as producer:
            producer.publish_many([f"b-{number}" for number in range(200)])
            worker.wait_for(lambda: worker.events("connection.no_descriptor"), 60, "descriptors to run out")
            assert worker.get("/livez")[0] == 200
            producer.collect_all(120)
            worker.stop()
            books = check_books(producer, all_ended=True, no_duplicates=True)
    ends = {(str(each.fields["status"]), int(each.fields["attempts"])) for each in books.outcomes}
    assert ends == {("expired", 1)}
