"""The parent of WORKER_PROCESSES > 1: starts the children, passes signals on, adds up their scrapes.

Children are fresh programs, never forks of a running loop. Each serves its health on a Unix socket, whose
path it finds in QRIS_EXPIRE_METRICS_SOCKET; the one TCP port belongs to the parent. The parent itself touches
neither broker nor gateway.
What the scrapes add up to is `core.scrapes`.
"""

import contextlib
import http.client
import json
import math
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import structlog

from worker import signals
from worker.core.catalogue import FAMILY
from worker.core.scrapes import PlaceCounts, merge, of_family
from worker.shells.http import Health, HealthServer, ListenError
from worker.surroundings import ends_with_us

SOCKET_VARIABLE: Final = "QRIS_EXPIRE_METRICS_SOCKET"
NAME_VARIABLE: Final = "QRIS_EXPIRE_PROCESS"
"""What a child calls itself in its log lines."""

DRAINED: Final = 0
FORCED: Final = 1
REFUSALS: Final = (2, 3)
"""Exit codes of a child whose settings or credentials are wrong: starting it again would not help."""

MARGIN_SECONDS: Final = 5.0
"""Beyond the children's own deadline, for closing: only a child that hangs is killed."""
FIRST_BACKOFF_SECONDS: Final = 1.0
LONGEST_BACKOFF_SECONDS: Final = 30.0
"""A child that crashes at once must not make the parent use up the processor, or flood broker and log."""
STEADY_SECONDS: Final = 60.0
"""A child that ran for so long crashes for a new reason: its backoff starts over."""
FETCH_SECONDS: Final = 2.0
"""A child that hangs must not cost the scrape of the others (Prometheus gives up after 10 s)."""

PLACES: Final = (None, "/dev/shm")  # noqa: S108  # mkdtemp makes a directory that only we can read
"""Where the sockets of the children may be: TMPDIR and the usual places, else memory: a container may have no other."""

log = structlog.get_logger()


# -- what happens to a child


def backoff(previous: float, lived_seconds: float) -> float:
    """Seconds until a dead child is started again; `previous` is its last backoff, 0 for none."""
    if lived_seconds >= STEADY_SECONDS or previous == 0:
        return FIRST_BACKOFF_SECONDS
    return min(previous * 2, LONGEST_BACKOFF_SECONDS)


class _Child:
    """One place in the family: the process that holds it now, if any, and what it counted."""

    def __init__(self, number: int, command: Sequence[str], environment: Mapping[str, str], path: Path) -> None:
        self.name = f"process-{number}"
        self.path = path
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.start_at: float | None = 0.0  # monotonic; None while it runs or must not run again
        self._backoff = 0.0
        self._started = 0.0
        self._counts = PlaceCounts()
        self._lock = threading.Lock()
        self._command = ends_with_us(command)
        own = {"WORKER_PROCESSES": "1", SOCKET_VARIABLE: str(path), NAME_VARIABLE: self.name}
        self._environment = {**environment, **own}

    def start(self, now: float) -> None:
        self.starts += 1
        self._started = now
        self.start_at = None
        try:
            # A group of its own: ctrl-C on a terminal reaches only the parent, which passes it on once.
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, process_group=0
            )
        except OSError as error:  # no memory, no process left: may pass, and the others go on
            self.restart_later(now, why=str(error))
        else:
            log.info("process_started", child=self.name, pid=self.process.pid, start=self.starts)

    def exited(self) -> int | None:
        """Its exit code if it just ended (negative: by that signal), once."""
        code = self.process.poll() if self.process else None
        if code is not None:
            with self._lock:
                self.process = None
                self._counts.died()
        return code

    def restart_later(self, now: float, *, why: str) -> None:
        self._backoff = backoff(self._backoff, now - self._started)
        self.start_at = now + self._backoff
        log.error("process_died", child=self.name, why=why, restart_in_seconds=self._backoff)

    def send(self, signum: int) -> None:
        if self.process:
            self.process.send_signal(signum)

    def scrape(self) -> str:
        # Read before asking: an answer is only its own if the same process still holds the place afterwards.
        holder = self.process
        reply = self._ask("/metrics") if holder else None
        with self._lock:
            own = reply is not None and reply[0] == http.HTTPStatus.OK and holder is self.process
            return self._counts.total(reply[1].decode() if reply and own else None)

    def health(self, path: str) -> Health:
        if not self.process:
            return Health(False, {"detail": "not running"})
        reply = self._ask(path)
        if reply is None:
            return Health(False, {"detail": "no answer"})
        try:
            document = json.loads(reply[1])
            return Health(reply[0] == http.HTTPStatus.OK, dict(document["components"]))
        except (ValueError, TypeError, KeyError):
            return Health(False, {"detail": f"HTTP {reply[0]}"})

    def _ask(self, path: str) -> tuple[int, bytes] | None:
        connection = _UnixConnection(self.path, FETCH_SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            log.debug("process_silent", child=self.name, path=path, error=repr(error))
            return None
        finally:
            connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _why(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


# -- the family


class _Family:
    """All children together: what the endpoint shows, and what signals and deaths do to them."""

    def __init__(self, children: Sequence[_Child], pool: ThreadPoolExecutor, drain_seconds: float) -> None:
        self._children = children
        self._pool = pool
        self._drain_seconds = drain_seconds
        self._scraping = threading.Lock()
        self._restarts = 0
        self._stops = 0  # how often the children were asked to stop
        self._passed_on = 0  # how many of the signals that ask to stop were passed on
        self._kill_at: float | None = None  # monotonic, once they are told to stop
        self._refusal: int | None = None
        self._forced = False

    # HealthSource of the endpoint, in its threads.

    def metrics(self) -> bytes:
        # One scrape at a time: an older answer must not overwrite a newer one and take counters back.
        with self._scraping:
            scrapes = list(self._pool.map(_Child.scrape, self._children))
        own = of_family(zip(FAMILY, (len(self._running), self._restarts), strict=True))
        return merge([*scrapes, own]).encode()

    def live(self) -> Health:
        """Whether every child is; one that has drained already is not missed."""
        stopping = self._stops > 0
        return self._ask([child for child in self._children if child.process or not stopping], "/livez")

    def ready(self) -> Health:
        """Whether every child is; none counts as ready once they are told to stop."""
        health = self._ask(self._children, "/readyz")
        return Health(health.ok and not self._stops, health.components)

    def _ask(self, children: Sequence[_Child], path: str) -> Health:
        answers = list(self._pool.map(lambda child: child.health(path), children))
        return Health(
            all(answer.ok for answer in answers),
            {
                child.name: {"status": "ok" if answer.ok else "unavailable", "components": answer.components}
                for child, answer in zip(children, answers, strict=True)
            },
        )

    # The main thread's.

    def run(self) -> int:
        """Until all have stopped: the exit code."""
        hangups = 0
        while True:
            now = time.monotonic()
            self._reap(now)
            if self._stops:
                if not self._running:
                    if self._refusal is not None:
                        return self._refusal
                    return FORCED if self._forced else DRAINED
                self._kill_overdue(now)
            else:
                self._start_due(now)
            signals.sleep(0 if signals.received() > self._passed_on else self._seconds_to_next(now))
            for name in signals.names()[self._passed_on :]:
                self._passed_on += 1
                self._stop(time.monotonic(), why=name)
            if signals.hangups() > hangups:
                hangups = signals.hangups()
                for child in self._running:
                    child.send(signal.SIGHUP)

    def kill(self) -> None:
        """Leaves no child behind, whatever went wrong."""
        for child in self._running:
            child.send(signal.SIGKILL)
        for child in self._running:
            if child.process:
                child.process.wait()

    @property
    def _running(self) -> list[_Child]:
        return [child for child in self._children if child.process]

    def _reap(self, now: float) -> None:
        for child in self._running:
            code = child.exited()
            if code is None:
                continue
            # A refusal is about settings and credentials that all share; but a child that was started again
            # must not end the others while they work.
            if code in REFUSALS and (child.starts == 1 or not self._running):
                log.error("process_refused", child=child.name, exit_code=code)
                self._refusal = self._refusal or code
                if not self._stops:
                    self._stop(now, why="refusal")
            elif self._stops:
                self._stopped(child, code)
            else:
                child.restart_later(now, why=_why(code))

    def _stopped(self, child: _Child, code: int) -> None:
        # One SIGTERM kills only a child that has no handlers yet, so it held nothing.
        drained = code == DRAINED or (code == -signal.SIGTERM and self._stops == 1)
        self._forced = self._forced or not drained
        log.info("process_stopped", child=child.name, why=_why(code), drained=drained)

    def _start_due(self, now: float) -> None:
        for child in self._children:
            if child.start_at is not None and child.start_at <= now:
                self._restarts += child.starts > 0
                child.start(now)

    def _stop(self, now: float, *, why: str) -> None:
        """The first time: drain. Each further time: the children, told again, stop at once."""
        self._stops += 1
        seconds = MARGIN_SECONDS + (self._drain_seconds if self._stops == 1 else 0)
        self._kill_at = min(now + seconds, self._kill_at or math.inf)
        log.info("processes_stopping", why=why, times=self._stops, running=len(self._running))
        for child in self._running:
            child.send(signal.SIGTERM)

    def _kill_overdue(self, now: float) -> None:
        if self._kill_at is None or now < self._kill_at:
            return
        self._kill_at = math.inf
        self._forced = True
        for child in self._running:
            log.error("process_killed", child=child.name, why="did not stop in time")
            child.send(signal.SIGKILL)

    def _seconds_to_next(self, now: float) -> float:
        times = [now + 1.0]  # a look around even if a signal got lost
        if self._kill_at is not None:
            times.append(self._kill_at)
        elif self._stops == 0:
            times += [child.start_at for child in self._children if child.start_at is not None]
        return max(min(times) - now, 0.0)


def private_directory(places: Iterable[str | None] = PLACES) -> Path:
    """A new directory for the sockets of the children, only ours to read, in the first of ``places`` where one can be
    made; None means TMPDIR and the usual places. Raises `ListenError`."""
    for place in places:
        with contextlib.suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="qris-expire-", dir=place))
    raise ListenError(
        None,
        "no directory is writable for the sockets of WORKER_PROCESSES; set TMPDIR to one that is, or mount one at /tmp",
    )


def supervise(
    command: Sequence[str],
    *,
    processes: int,
    host: str,
    port: int,
    drain_seconds: float,
    environment: Mapping[str, str],
) -> int:
    """Runs `processes` children of `command` until they are told to stop; returns the exit code.

    `environment` is the children's whole environment, but for what each gets beside it. The first signal that asks to
    stop drains all, each further one is passed on as well, and so is SIGHUP. A child that ends unexpectedly is logged
    and started again with backoff, while the others go on.

    0: all drained. 1: some child was forced, or hung beyond `drain_seconds` and `MARGIN_SECONDS` and was
    killed. 2 or 3: a child said so at its first start, and the others were stopped.

    Only in the main thread: it takes the signals, and the kernel ends the children with the thread that
    started them. A service manager must signal the parent alone (systemd: `KillMode=mixed`), else every child
    gets each signal twice. Raises `ListenError`, before any child starts, when the port is not to be had.
    """
    with contextlib.ExitStack() as stack:
        signals.install(worker=True)
        signals.wake_on_child()
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        children = [_Child(number, command, environment, directory / f"{number}.sock") for number in range(processes)]
        # A scrape and both probes at the same time, without waiting for each other.
        pool = ThreadPoolExecutor(max_workers=3 * processes, thread_name_prefix="fetch")
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        family = _Family(children, pool, drain_seconds)
        server = HealthServer(host, port, family)
        server.start()
        stack.callback(server.stop)
        stack.callback(family.kill)
        return family.run()
