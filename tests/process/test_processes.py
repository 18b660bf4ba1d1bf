"""The parent of several processes: what it does with signals and deaths, and what it serves.

The children are a small program written by the fixture, driven by a mode for each place in the family.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.scrapes import values
from tests.waiting import wait_until
from worker import processes
from worker.processes import backoff
from worker.sandbox.broker import free_port


@pytest.mark.parametrize(
    ("previous", "lived", "seconds"),
    [(0, 0, 1), (1, 0, 2), (2, 59, 4), (16, 0, 30), (30, 0, 30), (30, 60, 1)],
)
def test_backoff_doubles_and_starts_over(previous: float, lived: float, seconds: float) -> None:
    """From 1 s, doubling to 30 s; a child that lived for a minute starts over."""

    assert backoff(previous, lived) == seconds


# -- a family of fakes

CHILD = """
    import json, os, signal, sys, threading
    from pathlib import Path
    from worker.shells.http import Health, HealthServer
    from worker.shells.metrics import Metrics

    directory, modes = Path(sys.argv[1]), json.loads(sys.argv[2])
    path = Path(os.environ["QRIS_EXPIRE_METRICS_SOCKET"])
    number = path.stem
    mode = modes[number]
    assert os.environ["WORKER_PROCESSES"] == "1"
    starts = directory / f"{number}.starts"
    first = not starts.exists()

    def note(name, text):
        with open(directory / f"{number}.{name}", "a") as file:
            file.write(f"{text}\\n")

    def refuses():
        return mode.startswith("refuse") or (mode == "work-then-refuse" and not first)

    if not refuses() and mode != "deaf":
        stop = threading.Event()
        told = []

        def on_signal(signum, frame):
            told.append(signum)
            note("signals", signum)
            if mode == "work" or mode == "work-then-refuse":
                stop.set()
            elif mode == "slow" and len(told) == 2:
                os._exit(1)

        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
        metrics = Metrics("1")
        for _ in range(5):
            metrics.received("sweep")
        metrics.in_hand = {"cancellation": 0, "sweep": 1}.__getitem__
        metrics.broker_connected(True)

        class Source:
            def metrics(self):
                return metrics.render()

            def live(self):
                return Health(True, {"loop": "turns"})

            def ready(self):
                return Health(mode != "unready", {"consumer": mode})

        server = HealthServer.unix(path, Source())
        server.start()
    note("starts", os.getpid())
    if refuses():
        sys.exit(int(mode[-1]) if mode[-1].isdigit() else 3)
    if mode == "deaf":
        threading.Event().wait(60)
    stop.wait(60)
    server.stop()
"""

PARENT = """
    import json, os, sys
    from worker import processes

    given = json.loads(sys.argv[1])
    processes.MARGIN_SECONDS = 0.5
    processes.FIRST_BACKOFF_SECONDS = given["backoff"]
    processes.FETCH_SECONDS = given["fetch"]
    sys.exit(
        processes.supervise(
            given["command"],
            processes=given["processes"],
            host="127.0.0.1",
            port=given["port"],
            drain_seconds=given["drain"],
            environment=dict(os.environ),
        )
    )
"""


def eventually(fact: Callable[[], Any]) -> Any:
    return wait_until(fact, 30, "it comes true")


def is_alive(pid: int) -> bool:
    try:
        # A zombie is dead, though its number is still taken until somebody asks.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Family:
    directory: Path
    port: int
    processes: int
    parent: subprocess.Popen[str]

    def ask(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except ConnectionError:
            return 0, ""
        finally:
            connection.close()

    def scrape(self) -> dict[str, float]:
        return values(self.ask("/metrics")[1])

    def lines(self, place: int, name: str) -> list[int]:
        path = self.directory / f"{place}.{name}"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def pids(self) -> list[int]:
        return [pid for place in range(self.processes) for pid in self.lines(place, "starts")]

    def started(self, times: int = 1) -> None:
        eventually(lambda: all(len(self.lines(place, "starts")) >= times for place in range(self.processes)))

    def tell(self, signum: int) -> None:
        self.parent.send_signal(signum)

    def end(self) -> int:
        return self.parent.wait(30)

    def leave_nothing(self) -> None:
        self.parent.kill()
        self.parent.wait()
        assert self.parent.stdout is not None
        self.parent.stdout.close()
        eventually(lambda: not any(map(is_alive, self.pids())))

    def log(self) -> str:
        assert self.parent.stdout is not None
        return re.sub(r"\x1b\[[0-9;]*m", "", self.parent.stdout.read())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Family]]:
    child, parent = tmp_path / "child.py", tmp_path / "parent.py"
    child.write_text(textwrap.dedent(CHILD))
    parent.write_text(textwrap.dedent(PARENT))
    sockets = tmp_path / "t"
    sockets.mkdir()
    families: list[Family] = []

    # A child may take its time to answer, but for the test in which it never does.
    def start(
        *modes: str, drain: float = 10, backoff: float = 0.1, fetch: float = 30, port: int | None = None
    ) -> Family:
        numbered: Mapping[str, str] = {str(place): mode for place, mode in enumerate(modes)}
        number = port or free_port()
        given = {
            "command": [sys.executable, str(child), str(tmp_path), json.dumps(numbered)],
            "processes": len(modes),
            "port": number,
            "drain": drain,
            "backoff": backoff,
            "fetch": fetch,
        }
        process = subprocess.Popen(
            [sys.executable, str(parent), json.dumps(given)],
            env={
                **os.environ,
                "TMPDIR": str(sockets),
                "PYTHONPATH": str(Path(processes.__file__).parents[1]),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        families.append(Family(tmp_path, number, len(modes), process))
        return families[-1]

    yield start
    for family in families:
        family.leave_nothing()


def test_one_scrape_adds_up_all(start: Callable[..., Family]) -> None:
    """The one port shows sums over the children, and how many there are."""

    family = start("work", "work")
    eventually(lambda: family.scrape().get("qris_expire_commands_total,lane=sweep") == 10)
    scrape = family.scrape()
    assert scrape["qris_expire_in_flight,lane=sweep"] == 2
    assert scrape["qris_expire_broker_connected"] == 1
    assert scrape["qris_expire_processes_running"] == 2
    assert scrape["qris_expire_process_restarts_total"] == 0


def test_health_lists_every_child(start: Callable[..., Family]) -> None:
    """A child that is not ready makes the family not ready, and is named; alive it still is."""

    family = start("work", "unready")
    eventually(lambda: family.ask("/livez")[0] == 200)
    code, body = family.ask("/readyz")
    assert code == 503
    assert json.loads(body) == {
        "status": "unavailable",
        "components": {
            "process-0": {"status": "ok", "components": {"consumer": "work"}},
            "process-1": {"status": "unavailable", "components": {"consumer": "unready"}},
        },
    }


def test_all_ready_is_ready(start: Callable[..., Family]) -> None:
    """The family is ready when every child is."""

    family = start("work", "work")
    eventually(lambda: family.ask("/readyz")[0] == 200)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_all(start: Callable[..., Family], signum: int) -> None:
    """One signal reaches every child once, as SIGTERM; when all have drained the exit code is 0."""

    family = start("work", "work")
    family.started()
    family.tell(signum)
    assert family.end() == 0
    assert [family.lines(place, "signals") for place in (0, 1)] == 2 * [[signal.SIGTERM]]
    assert list((family.directory / "t").iterdir()) == []


def test_a_draining_family_is_alive_but_not_ready(start: Callable[..., Family]) -> None:
    """While one child still drains and the other is done: /livez 200, /readyz 503, and it can be scraped."""

    family = start("work", "slow")
    eventually(lambda: family.ask("/readyz")[0] == 200)
    family.tell(signal.SIGTERM)
    eventually(lambda: not is_alive(family.lines(0, "starts")[0]))
    eventually(lambda: family.ask("/livez")[0] == 200)
    assert family.ask("/readyz")[0] == 503
    assert family.scrape()["qris_expire_commands_total,lane=sweep"] >= 5


def test_a_second_signal_is_passed_on(start: Callable[..., Family]) -> None:
    """A second signal reaches the children too; they stop at once and the exit code is 1."""

    family = start("slow", "work")
    family.started()
    family.tell(signal.SIGTERM)
    eventually(lambda: family.lines(0, "signals"))
    family.tell(signal.SIGTERM)
    assert family.end() == 1
    assert family.lines(0, "signals") == [signal.SIGTERM, signal.SIGTERM]


def test_a_child_that_hangs_is_killed(start: Callable[..., Family]) -> None:
    """Beyond drain time and margin a child is killed; the exit code is 1."""

    family = start("hang", "work", drain=3)
    family.started()
    family.tell(signal.SIGTERM)
    assert family.end() == 1
    assert not any(is_alive(pid) for pid in family.pids())
    assert family.log().count("process_killed") == 1


def test_a_child_without_handlers_yet_counts_as_drained(start: Callable[..., Family]) -> None:
    """SIGTERM while a child still starts ends it with that signal: it held nothing, so the exit code is 0."""

    family = start("deaf", "work")
    family.started()
    family.tell(signal.SIGTERM)
    assert family.end() == 0


@pytest.mark.parametrize("code", [2, 3])
def test_a_refusal_at_start_ends_all(start: Callable[..., Family], code: int) -> None:
    """A child that says 2 or 3 at its first start stops the others, and the parent says the same."""

    family = start("work", f"refuse{code}")
    assert family.end() == code
    assert not any(is_alive(pid) for pid in family.pids())
    assert len(family.lines(1, "starts")) == 1


def test_a_dead_child_is_started_again(start: Callable[..., Family]) -> None:
    """Killed, a child comes back; the other goes on, no sum decreases, and one line says so."""

    family = start("work", "work")
    name = "qris_expire_commands_total,lane=sweep"
    eventually(lambda: family.scrape().get(name) == 10)
    one, other = family.pids()
    os.kill(one, signal.SIGKILL)
    seen = [10.0]

    def has_grown() -> bool:
        seen.append(family.scrape()[name])
        return seen[-1] == 15

    eventually(has_grown)
    assert seen == sorted(seen)
    assert family.scrape()["qris_expire_process_restarts_total"] == 1
    assert family.lines(1, "starts") == [other]
    assert is_alive(other)
    eventually(lambda: family.ask("/readyz")[0] == 200)
    family.tell(signal.SIGTERM)
    assert family.end() == 0
    (line,) = [line for line in family.log().splitlines() if "process_died" in line]
    assert "process-0" in line
    assert "SIGKILL" in line


def test_a_restarted_child_that_is_refused_does_not_end_the_others(start: Callable[..., Family]) -> None:
    """3 from a child that was started again is one more death: the other works on."""

    family = start("work-then-refuse", "work")
    family.started()
    os.kill(family.pids()[0], signal.SIGKILL)
    eventually(lambda: len(family.lines(0, "starts")) >= 3)
    assert is_alive(family.lines(1, "starts")[0])
    family.tell(signal.SIGTERM)
    assert family.end() == 0


def test_a_signal_during_backoff_starts_nobody(start: Callable[..., Family]) -> None:
    """A child that waits to be started again is not started any more; the exit code is 0."""

    family = start("work", "work", backoff=30)
    eventually(lambda: family.ask("/readyz")[0] == 200)
    os.kill(family.pids()[0], signal.SIGKILL)
    eventually(lambda: family.scrape()["qris_expire_processes_running"] == 1)
    assert family.ask("/livez")[0] == 503
    family.tell(signal.SIGTERM)
    assert family.end() == 0
    assert len(family.lines(0, "starts")) == 1


def test_a_child_that_gives_no_answer_delays_no_scrape(start: Callable[..., Family]) -> None:
    """With one child stopped, the scrape still comes, no sum goes back, and the family is not alive."""

    family = start("work", "work", fetch=2)
    name = "qris_expire_commands_total,lane=sweep"
    eventually(lambda: family.scrape().get(name) == 10)
    pid = family.pids()[0]
    os.kill(pid, signal.SIGSTOP)
    assert family.scrape()[name] == 10
    eventually(lambda: family.scrape().get("qris_expire_in_flight,lane=sweep") == 1)
    code, body = family.ask("/livez")
    assert code == 503
    assert json.loads(body)["components"]["process-0"]["components"] == {"detail": "no answer"}
    os.kill(pid, signal.SIGCONT)


def test_no_orphans(start: Callable[..., Family]) -> None:
    """After kill -9 of the parent no child is left, not even one that ignores signals."""

    family = start("work", "hang")
    family.started()
    family.tell(signal.SIGKILL)
    family.end()
    eventually(lambda: not any(is_alive(pid) for pid in family.pids()))


def test_a_taken_port_starts_nobody(start: Callable[..., Family]) -> None:
    """When the port is taken, the error says so and no child was started."""

    with socket.create_server(("127.0.0.1", 0)) as holder:
        family = start("work", "work", port=holder.getsockname()[1])
        assert family.end() != 0
    assert "METRICS_PORT" in family.log()
    assert family.pids() == []
