"""One run of one contender: so many commands queued, then it is started and watched until all have an outcome."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from tests.benchmark import machine
from tests.benchmark.contenders import BenchmarkError, Contender, Process
from tests.benchmark.gateway import Gateway, serving
from tests.benchmark.publisher import published, publishing
from tests.benchmark.site import SILENCE, Site
from worker.core.lanes import SWEEP
from worker.sandbox.broker import free_port

LOOK: Final = 0.05  # seconds between two looks at the inbox: a fraction of a per cent of a run
PACED: Final = 100  # commands whose latency is measured, one at a time
PER_SECOND: Final = 40.0
WARM: Final = 10  # the first of them open connections, and do not count


class Mark(NamedTuple):
    """What was done at a moment: outcomes, and CPU seconds of the contender, `system` being part of them."""

    at: float
    done: int
    cpu: float
    system: float = 0.0


class Latency(NamedTuple):
    """Seconds from publish to outcome."""

    p50: float
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        """Of at least two samples."""
        cuts = statistics.quantiles(seconds, n=20, method="inclusive")
        return cls(cuts[9], cuts[18])


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run is to be. `latency` is the gateway's, in seconds; `share` the sweep's of the senders."""

    contender: Contender
    commands: int
    latency: float = 0.0
    concurrency: int | None = None
    processes: int = 1
    # Only the sweep lane is loaded, so it may hold all senders.
    share: str = "1"
    paced: int = PACED
    limit: int = 0  # calls per second of all processes; 0 for none
    per_second: float = 0.0  # commands of a steady load; 0 for a backlog

    @property
    def senders(self) -> int:
        """Requests in flight of each process, at most."""
        return self.concurrency or self.contender.concurrency

    def settings(self) -> dict[str, str]:
        """All else is at its default: validation, metrics, log, breaker and deduplication are on."""
        return {
            "WORKER_CONCURRENCY": str(self.senders),
            "WORKER_SWEEP_SHARE": self.share,
            "WORKER_PROCESSES": str(self.processes),
            "GATEWAY_MAX_REQUESTS_PER_SECOND": str(self.limit),
        }


class Steady(NamedTuple):
    """Of each command of a steady load, in seconds: from publish to outcome, and how late it was published."""

    took: list[float]
    late: list[float]


class Run(NamedTuple):
    """What came of one. Rate and CPU lie between 10 % and 90 % of the outcomes.

    Shares of the machine: `others` used it before the run, `busy` was all of it during the run, `stolen` by its host.
    """

    setup: Setup
    rate: float
    """Outcomes per second."""
    cpu: float
    """Milliseconds of user and system time for each command."""
    system: float
    """What of these was in the system."""
    cores: float
    """Cores that the contender used on average."""
    peak: float
    """MiB resident, at the highest."""
    latency: Latency | None
    """Under a steady load of its own commands, else of others afterwards, at `PER_SECOND`."""
    late: float
    """Seconds by which the publisher of a steady load was behind its schedule (95 % of the commands: at most)."""
    missing: int
    duplicates: int
    others: float
    busy: float
    stolen: float


@contextmanager
def scene(url: str, directory: Path, latency: float) -> Iterator[tuple[Site, Gateway]]:
    """Broker objects and gateway for one run."""
    with ExitStack() as stack:
        site = stack.enter_context(Site(url))
        yield site, stack.enter_context(serving(latency, directory))


def contending(setup: Setup, site: Site, gateway: Gateway, directory: Path, **settings: str) -> Process:
    """The contender, not started yet; further settings win."""
    environment = {
        **gateway.settings,
        **setup.settings(),
        "AMQP_URL": site.url,
        "AMQP_PREFIX": site.prefix,
        "METRICS_HOST": "127.0.0.1",
        "METRICS_PORT": str(free_port()),
        "LOG_FORMAT": "json",
        **settings,
    }
    return Process(setup.contender.name, setup.contender.argv(), environment, directory)


def run(url: str, directory: Path, setup: Setup, patience: machine.Patience) -> Run:
    """One run, from empty queues to empty queues."""
    with scene(url, directory, setup.latency) as (site, gateway):
        load(site, setup)
        others = patience.wait()
        steady = Steady([], [])
        with contending(setup, site, gateway, directory) as process:
            before = machine.Times.now()
            marks = list(under_way(site, process, setup, directory, steady))
            busy, stolen = before.shares(machine.Times.now())
            peak = machine.resident(process.pid, peak=True)
            took = _paced(site, process, setup.paced) if setup.paced else steady.took
        missing, duplicates = site.books()
        gateway.check()
    first, last = middle(marks, setup.commands)
    done, seconds, cpu = last.done - first.done, last.at - first.at, last.cpu - first.cpu
    return Run(
        setup=setup,
        rate=done / seconds,
        cpu=cpu * 1000 / done,
        system=(last.system - first.system) * 1000 / done,
        cores=cpu / seconds,
        peak=peak,
        latency=Latency.of(took) if took else None,
        late=Latency.of(steady.late).p95 if steady.late else 0.0,
        missing=missing,
        duplicates=duplicates,
        others=others,
        busy=busy,
        stolen=stolen,
    )


def load(site: Site, setup: Setup) -> None:
    """What is queued before the contender starts."""
    if not setup.per_second:
        site.load(setup.commands)


def under_way(site: Site, process: Process, setup: Setup, directory: Path, steady: Steady) -> Iterator[Mark]:
    """Marks of one run; after the last one, `steady` has what a steady load adds to them."""
    if not setup.per_second:
        yield from watch(site.outcomes, process, setup.commands)
        return
    site.pace(SWEEP, WARM, PER_SECOND, process.check)
    commands = site.commands(setup.commands)
    with (
        site.answers(SWEEP) as answers,
        publishing(site, SWEEP, commands, setup.per_second, directory) as publisher,
    ):

        def wait(seconds: float) -> None:
            publisher.check(may_end=True)
            answers.wait(seconds)

        yield from watch(answers.number, process, setup.commands, wait)
        moments = published(publisher)
    for turn, ((id, _), moment) in enumerate(zip(commands, moments, strict=True)):
        steady.took.append(answers.came[id] - moment)
        steady.late.append(moment - moments[0] - turn / setup.per_second)


def watch(
    outcomes: Callable[[], int], process: Process, until: int, wait: Callable[[float], None] = time.sleep
) -> Iterator[Mark]:
    """Marks until so many outcomes are there. BenchmarkError when it ends, or when nothing comes any more."""
    heard, last = time.monotonic(), 0
    while True:
        mark = Mark(time.monotonic(), outcomes(), *machine.cpu_seconds(process.pid))
        yield mark
        if mark.done >= until:
            return
        if mark.done > last:
            heard, last = mark.at, mark.done
        process.check()
        if mark.at - heard > SILENCE:
            raise BenchmarkError(f"no outcome for {SILENCE:g} s after {last} of {until}: {process.last_words()}")
        wait(LOOK)


def middle(marks: Sequence[Mark], commands: int) -> tuple[Mark, Mark]:
    """The marks between which as much is in flight at both ends: start and end bias neither rate nor CPU.

    A run that is too short for that counts whole, from the last mark before its first outcome.
    """
    inside = [mark for mark in marks if 0.1 * commands <= mark.done <= 0.9 * commands]
    if len(inside) >= 3 and inside[-1].done > inside[0].done:
        return inside[0], inside[-1]
    return [mark for mark in marks if not mark.done][-1], marks[-1]


def within(
    marks: Iterable[Mark], commands: int, begin: Callable[[], object], end: Callable[[], object]
) -> tuple[Mark, Mark]:
    """Goes through a run, calls `begin` at 10 % of its outcomes and `end` at 90 %, and returns these two marks."""
    first = last = None
    for mark in marks:
        if first is None and mark.done >= 0.1 * commands:
            first = mark
            begin()
        elif first is not None and last is None and mark.done >= 0.9 * commands:
            last = mark
            end()
    if first is None or last is None:
        raise BenchmarkError(f"{commands} commands are over before they can be watched; ask for more")
    return first, last


def _paced(site: Site, process: Process, number: int) -> list[float]:
    """At a low rate, in a phase of its own: how long one command takes when nobody is in its way."""
    site.drain()
    site.pace(SWEEP, WARM, PER_SECOND, process.check)
    return site.pace(SWEEP, number, PER_SECOND, process.check)
