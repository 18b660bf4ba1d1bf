"""Who takes part, and one of them as a process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.benchmark import packages

ROOT: Final = Path(__file__).parents[2]
STOP_SECONDS: Final = 15.0  # then it is killed: what it does at its end is no part of the comparison


class BenchmarkError(Exception):
    """The benchmark could not measure: one line, what happened, what to do."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do the job.

    `concurrency` is what suits it best at 0 ms. `pace` is roughly what one process of it does in a second there: it
    sizes the runs, so that all take about as long.
    """

    name: str
    title: str
    argv: Callable[[], list[str]]
    """Its command line, which may install or build it first. Raises `PackagesMissing` where it cannot run."""
    concurrency: int
    pace: int

    @property
    def ours(self) -> bool:
        """Whether it is this project."""
        return self.name == "worker"


def _peer(module: str) -> Callable[[], list[str]]:
    """The peers' own packages may be in another virtual environment."""
    return lambda: [str(packages.python()), "-m", f"tests.benchmark.peers.{module}"]


WORKER: Final = Contender("worker", "this worker", lambda: [sys.executable, "-m", "worker", "run"], 32, 2600)
TUTORIAL: Final = Contender(
    "tutorial", "tutorial worker: pika blocking, requests, prefetch 1", _peer("tutorial"), 1, 120
)
ASYNCHRONOUS: Final = Contender(
    "asynchronous", "aiormq, aiohttp, uvloop, tuned by hand", _peer("asynchronous"), 64, 1500
)
NODE: Final = Contender("node", "Node.js: amqplib, undici, tuned by hand", packages.node, 64, 4000)
GO: Final = Contender("go", "Go: amqp091-go, fasthttp, tuned by hand", packages.golang, 64, 6000)
CONTENDERS: Final = {one.name: one for one in (WORKER, TUTORIAL, ASYNCHRONOUS, NODE, GO)}


def here(contenders: Iterable[Contender]) -> tuple[list[Contender], list[str]]:
    """Those that can run on this machine, and for each of the others a line that says why it cannot."""
    able, missing = [], []
    for one in contenders:
        try:
            one.argv()
        except packages.PackagesMissing as why:
            missing.append(f"Not here: “{one.title}”: {why}.")
        else:
            able.append(one)
    return able, missing


class Process:
    """A command line as a process group of its own, its output in files; leaving it ends it, whatever it is doing."""

    def __init__(self, name: str, argv: list[str], environment: Mapping[str, str], directory: Path) -> None:
        self._name, self._argv, self._directory = name, argv, directory
        # Nothing of the shell that runs us: a WORKER_ setting left there would be measured, too.
        self._environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
        self._log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._argv,
                env=self._environment,
                cwd=self._directory,  # away from a .env that is not ours
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the process, or of the parent of its family."""
        assert self._process is not None
        return self._process.pid

    def check(self, *, may_end: bool = False) -> None:
        """BenchmarkError with its last line when it has ended by itself; `may_end`: when it has failed."""
        assert self._process is not None
        if (code := self._process.poll()) is not None and not (may_end and code == 0):
            raise BenchmarkError(f"{self._name} ended with {code}: {self.last_words()}")

    def finish(self, seconds: float) -> str:
        """Its output, once it has ended by itself; BenchmarkError if it does not, or not well."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(seconds) == 0:
                return self.output()
        raise BenchmarkError(f"{self._name} did not end well within {seconds:g} s: {self.last_words()}")

    def output(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace")

    def last_words(self) -> str:
        """Its last line."""
        return (self.output().strip().splitlines() or ["it said nothing"])[-1][:300]

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for whatever is left of its group after a while."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
