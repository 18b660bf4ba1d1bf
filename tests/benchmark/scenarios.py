"""What is measured: each scenario makes runs, interleaved, and returns a table of medians and ratios."""

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

from tests.benchmark import machine
from tests.benchmark.contenders import ASYNCHRONOUS, ROOT, WORKER, Contender
from tests.benchmark.measure import (
    LOOK,
    PER_SECOND,
    WARM,
    Latency,
    Mark,
    Run,
    Setup,
    contending,
    middle,
    run,
    scene,
    watch,
)
from tests.benchmark.tables import Table
from worker.core.lanes import CANCELLATION

SECONDS: Final = 6  # what a run at 0 ms takes, roughly
FITTING: Final = 3200  # commands per second that the concurrency must carry when the gateway is slow
TURNS: Final = 60
"""What each sender does at least in a run with a slow gateway: opening 256 connections takes as long as some turns."""
DEFAULT_CONCURRENCY: Final = 32
WAITING: Final = 0.02
WAITING_SENDERS: Final = 16
"""A gateway (seconds) and a concurrency whose processes wait more than they work: 800 commands a second each."""
LIMIT: Final = 400
"""Calls a second that all processes of a fleet together may make: half of what one of them can do then."""
DEFAULT_SHARE: Final = "0.75"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asked for."""

    url: str
    directory: Path
    contenders: Sequence[Contender]
    missing: Sequence[str]
    """Of each contender that cannot run here: why."""
    rounds: int
    scale: float
    commands: int | None
    concurrency: int | None
    patience: machine.Patience
    say: Callable[[str], None]

    def size(self, commands: float) -> int:
        """So many commands, at the scale asked for."""
        return max(1, int(commands * self.scale))

    def setup(self, contender: Contender, latency: float = 0.0, processes: int = 1) -> Setup:
        """One contender at a gateway latency (seconds), with the concurrency that fits."""
        own = self.concurrency if contender.ours else None
        senders = own or fitting(contender, latency)
        pace = min(contender.pace * processes, senders * processes / latency if latency else contender.pace * processes)
        commands = self.commands or self.size(max(pace * SECONDS, TURNS * senders if latency else 0))
        return Setup(contender, commands, latency, senders, processes)

    def run(self, setup: Setup, turn: int) -> Run:
        """One run, as text."""
        done = run(self.url, self.directory, setup, self.patience)
        self.say(
            f"round {turn}: {setup.contender.name:12} {done.rate:7.0f}/s  {done.cpu:6.3f} ms CPU  {done.peak:4.0f} MiB"
            f"  others {done.others:.0%}, stolen {done.stolen:.0%}, load {machine.load_average():.1f}"
        )
        return done

    def rounds_of(self, setups: Sequence[Setup]) -> list[list[Run]]:
        """The runs of each setup. Interleaved, and each round in the other order, so that a slow minute hits all."""
        for setup in setups:
            setup.contender.argv()  # now, since it may install the peers' packages
        runs: list[list[Run]] = [[] for _ in setups]
        for turn in range(1, self.rounds + 1):
            order = list(enumerate(setups))
            for place, setup in order if turn % 2 else reversed(order):
                runs[place].append(self.run(setup, turn))
        return runs


def fitting(contender: Contender, latency: float) -> int:
    """Enough requests in flight to hide the gateway's latency; one stays one."""
    return contender.concurrency if contender.concurrency == 1 else max(contender.concurrency, int(FITTING * latency))


# -- scenarios ------------------------------------------------------------------------------------------------------


def comparison(plan: Plan) -> Table:
    """All contenders, 0 ms gateway."""
    runs = plan.rounds_of([plan.setup(contender) for contender in plan.contenders])
    reference = next((some for some in runs if some[0].setup.contender is ASYNCHRONOUS), runs[0])
    rows = [
        [
            some[0].setup.contender.title,
            str(some[0].setup.senders),
            f"{median(one.rate for one in some):,.0f}",
            f"{ratio(some, reference, lambda one: one.rate):.2f}",
            f"{median(one.cpu for one in some):.2f}",
            f"{ratio(some, reference, lambda one: one.cpu):.2f}",
            f"{_spread(one.cpu for one in some):.0%}",
            *latencies([one.latency for one in some if one.latency]),
            f"{median(one.peak for one in some):.0f}",
            f"{sum(one.missing for one in some)}, {sum(one.duplicates for one in some)}",
        ]
        for some in runs
    ]
    return Table(
        f"Commands through each worker; gateway 0 ms, one process, medians of {plan.rounds}",
        (
            "worker",
            "in flight",
            "per s",
            "ratio",
            "CPU ms",
            "ratio",
            "spread",
            "p50 ms",
            "p95 ms",
            "MiB",
            "lost, twice",
        ),
        rows,
        (
            f"Ratios are to “{reference[0].setup.contender.title}” in the same round.",
            "CPU is the worker's, user and system, for each command; spread is between its rounds.",
            f"p50 and p95 from publish to outcome, at {PER_SECOND:g} commands per second; MiB at the highest.",
            circumstances([one for some in runs for one in some]),
            *plan.missing,
        ),
    )


def latency(plan: Plan, milliseconds: Sequence[float]) -> Table:
    """What a slow gateway costs: rate against what concurrency and CPU allow, CPU against that at 0 ms."""
    slow = sorted({0.0, *milliseconds})
    contenders = [one for one in plan.contenders if one.concurrency > 1]
    setups = [replace(plan.setup(one, ms / 1000), paced=0) for one in contenders for ms in slow]
    runs = plan.rounds_of(setups)
    rows = []
    for some in runs:
        setup = some[0].setup
        fast = runs[setups.index(next(one for one in setups if one.contender is setup.contender))]
        rate = median(one.rate for one in some)
        ceiling = median(one.rate for one in fast)
        limit = min(setup.senders / setup.latency, ceiling) if setup.latency else ceiling
        rows.append(
            [
                setup.contender.title,
                f"{setup.latency * 1000:g}",
                str(setup.senders),
                f"{rate:,.0f}",
                f"{limit:,.0f}",
                f"{rate / limit:.2f}",
                f"{median(one.cpu for one in some):.2f}",
                f"{ratio(some, fast, lambda one: one.cpu):.2f}",
                f"{median(one.peak for one in some):.0f}",
                f"{sum(one.missing for one in some)}, {sum(one.duplicates for one in some)}",
            ]
        )
    return Table(
        f"A slow gateway; one process, medians of {plan.rounds}",
        ("worker", "gateway ms", "in flight", "per s", "limit", "ratio", "CPU ms", "to 0 ms", "MiB", "lost, twice"),
        rows,
        (
            "The limit is what is in flight divided by the gateway's time, and at most the rate at 0 ms.",
            circumstances([one for some in runs for one in some]),
        ),
    )


def processes(plan: Plan, numbers: Sequence[int]) -> Table:
    """One worker as several processes: where the processor is the limit, where the gateway's time is, and where the
    gateway's rate limit is."""
    setups = [replace(plan.setup(WORKER, 0.0, number), paced=0) for number in sorted(numbers)]
    setups += [
        replace(one, latency=WAITING, concurrency=WAITING_SENDERS, commands=plan.size(6_000 * one.processes))
        for one in setups
    ]
    setups += [replace(one, commands=plan.size(SECONDS * LIMIT), limit=LIMIT) for one in setups[len(numbers) :]]
    runs = plan.rounds_of(setups)
    rows = [
        [
            f"{some[0].setup.latency * 1000:g}",
            f"{some[0].setup.limit or 'none'}",
            str(some[0].setup.senders),
            str(some[0].setup.processes),
            f"{median(one.rate for one in some):,.0f}",
            f"{ratio(some, runs[place // len(numbers) * len(numbers)], lambda one: one.rate):.2f}",
            f"{median(one.cpu for one in some):.2f}",
            f"{median(one.cores for one in some):.2f}",
            f"{median(one.busy for one in some):.0%}",
            f"{median(one.peak for one in some):.0f}",
        ]
        for place, some in enumerate(runs)
    ]
    return Table(
        f"WORKER_PROCESSES, medians of {plan.rounds}",
        (
            "gateway ms",
            "limit",
            "in flight of each",
            "processes",
            "per s",
            "ratio",
            "CPU ms",
            "cores used",
            "machine busy",
            "MiB of all",
        ),
        rows,
        (
            "Broker and gateway share the cores: with the machine busy, more processes cannot give more.",
            circumstances([one for some in runs for one in some]),
        ),
    )


def cancellations(plan: Plan) -> Table:
    """Cancellations behind a sweep, at the default concurrency, against an idle worker of the same round."""
    sweep, samples, per_second = plan.size(20_000), plan.size(250), 20.0
    setup = Setup(WORKER, sweep, 0.02, plan.concurrency or DEFAULT_CONCURRENCY, share=DEFAULT_SHARE)
    idle: list[Latency] = []
    behind: list[Latency] = []
    left: list[int] = []
    for turn in range(1, plan.rounds + 1):
        with scene(plan.url, plan.directory, setup.latency) as (site, gateway):
            plan.patience.wait()
            with contending(setup, site, gateway, plan.directory) as process:
                site.pace(CANCELLATION, WARM, per_second, process.check)
                idle.append(Latency.of(site.pace(CANCELLATION, max(2, samples // 2), per_second, process.check)))
            site.load(sweep)
            with contending(setup, site, gateway, plan.directory) as process:
                # The sweep has begun: what follows is published behind it.
                _reach(watch(site.outcomes, process, min(200, sweep)))
                site.pace(CANCELLATION, WARM, per_second, process.check)
                behind.append(Latency.of(site.pace(CANCELLATION, max(2, samples), per_second, process.check)))
                left.append(site.queued())
        plan.say(f"round {turn}: idle {_ms(idle[-1])}, behind the sweep {_ms(behind[-1])}, {left[-1]:,} still queued")
    rows = [
        ["an idle worker", *latencies(idle), "1.00", "1.00"],
        [
            f"behind a sweep of {sweep:,}",
            *latencies(behind),
            f"{median(b.p50 / a.p50 for a, b in zip(idle, behind, strict=True)):.2f}",
            f"{median(b.p95 / a.p95 for a, b in zip(idle, behind, strict=True)):.2f}",
        ],
    ]
    return Table(
        f"Cancellations, publish to outcome; gateway 20 ms, {per_second:g} per second, {setup.senders} in flight, "
        f"medians of {plan.rounds}",
        ("cancellations of", "p50 ms", "p95 ms", "p50 ratio", "p95 ratio"),
        rows,
        (
            f"When the last one was answered, {min(left):,} or more sweep commands were still queued.",
            circumstances(),
        ),
    )


def memory(plan: Plan) -> Table:
    """Resident memory of one process at the defaults, in the course of one sweep."""
    steps = [plan.size(commands) for commands in (10_000, 50_000, 100_000, 200_000)]
    setup = Setup(WORKER, steps[-1], 0.0, plan.concurrency or DEFAULT_CONCURRENCY, share=DEFAULT_SHARE)
    with scene(plan.url, plan.directory, setup.latency) as (site, gateway):
        site.load(setup.commands)
        with contending(setup, site, gateway, plan.directory) as process:
            sizes = []
            for commands in steps:
                _reach(watch(site.outcomes, process, commands))
                sizes.append(machine.resident(process.pid))
                plan.say(f"{commands:,} commands: {sizes[-1]:.1f} MiB")
            peak = machine.resident(process.pid, peak=True)
        missing, duplicates = site.books()
    rows = [
        [f"{commands:,}", f"{size:.1f}", f"{size - sizes[0]:+.1f}"] for commands, size in zip(steps, sizes, strict=True)
    ]
    return Table(
        f"Resident memory of one process, {setup.senders} in flight",
        ("after commands", "MiB", "growth"),
        rows,
        (f"At the highest {peak:.1f} MiB. {missing} lost, {duplicates} twice.",),
    )


def start(plan: Plan) -> Table:
    """From the command line to the first outcome, and to the end of `--help`."""
    times = max(3, plan.rounds)
    firsts, helps = [], []
    setup = Setup(WORKER, 1, 0.0, plan.concurrency or DEFAULT_CONCURRENCY, share=DEFAULT_SHARE)
    with scene(plan.url, plan.directory, setup.latency) as (site, gateway):
        for done in range(times):
            site.load(1)
            plan.patience.wait()
            began = time.monotonic()
            with contending(setup, site, gateway, plan.directory) as process:
                while site.outcomes() <= done:
                    process.check()
                    time.sleep(LOOK / 10)
                firsts.append(time.monotonic() - began)
            began = time.monotonic()
            subprocess.run([sys.executable, "-m", "worker", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            helps.append(time.monotonic() - began)
    rows = [
        ["run, to the first outcome", f"{median(firsts):.2f}", f"{min(firsts):.2f}", f"{max(firsts):.2f}"],
        ["--help", f"{median(helps):.2f}", f"{min(helps):.2f}", f"{max(helps):.2f}"],
    ]
    notes = (
        "The first ack leaves with the outcome's confirm, a millisecond before or after it is seen.",
        circumstances(),
    )
    return Table(f"Start, {times} times", ("what", "median s", "least", "most"), rows, notes)


def growth(plan: Plan, *, full: bool) -> Table:
    """What a command costs while so many others are queued behind it."""
    measured = plan.size(WORKER.pace * SECONDS)
    backlogs = [plan.size(backlog) for backlog in (1_000, 50_000, *((500_000,) if full else ()))]
    setup = Setup(WORKER, measured, 0.0, plan.concurrency, paced=0)
    marks: list[list[tuple[Mark, Mark]]] = [[] for _ in backlogs]
    for turn in range(1, plan.rounds + 1):
        for place, backlog in enumerate(backlogs):
            with scene(plan.url, plan.directory, setup.latency) as (site, gateway):
                site.load(measured + backlog)
                plan.patience.wait()
                with contending(setup, site, gateway, plan.directory) as process:
                    marks[place].append(middle(list(watch(site.outcomes, process, measured)), measured))
            plan.say(f"round {turn}: {backlog:,} behind: {_cost(*marks[place][-1]):.3f} ms CPU")
    costs = [[_cost(*pair) for pair in some] for some in marks]
    rows = [
        [
            f"{backlog:,}",
            f"{median((b.done - a.done) / (b.at - a.at) for a, b in marks[place]):,.0f}",
            f"{median(costs[place]):.2f}",
            f"{median(here / first for first, here in zip(costs[0], costs[place], strict=True)):.2f}",
        ]
        for place, backlog in enumerate(backlogs)
    ]
    return Table(
        f"Cost of a command with so many behind it; {measured:,} commands measured, medians of {plan.rounds}",
        ("backlog", "per s", "CPU ms", "ratio"),
        rows,
        (circumstances(),),
    )


# -- parts ----------------------------------------------------------------------------------------------------------


def _reach(marks: Iterable[Mark]) -> None:
    for _ in marks:
        pass


def _cost(first: Mark, last: Mark) -> float:
    """Milliseconds of CPU for each command."""
    return (last.cpu - first.cpu) * 1000 / (last.done - first.done)


def ratio(some: Sequence[Run], others: Sequence[Run], what: Callable[[Run], float]) -> float:
    """The median of the ratios within each round: what slowed a round slowed both."""
    return median(what(one) / what(other) for one, other in zip(some, others, strict=True))


def _spread(values: Iterable[float]) -> float:
    """From the least to the most, as a share of the median."""
    whole = list(values)
    return (max(whole) - min(whole)) / median(whole)


def latencies(some: Sequence[Latency]) -> tuple[str, str]:
    """The medians of p50 and p95 in milliseconds, as texts; empty ones where nothing was measured."""
    if not some:
        return "", ""
    return f"{median(one.p50 for one in some) * 1000:.1f}", f"{median(one.p95 for one in some) * 1000:.1f}"


def _ms(latency: Latency) -> str:
    return f"p50 {latency.p50 * 1000:.0f} ms, p95 {latency.p95 * 1000:.0f} ms"


def circumstances(runs: Sequence[Run] = ()) -> str:
    """What a reader must know to believe the figures."""
    said = [
        f"{machine.CORES} cores",
        f"Python {platform.python_version()}",
        f"load average {machine.load_average():.1f}",
    ]
    if runs:
        stolen = median(one.stolen for one in runs)
        others = median(one.others for one in runs)
        said += [f"others used {others:.0%} of the machine before a run", f"its host stole {stolen:.1%}"]
    return f"Here: {', '.join(said)}. Broker, gateway, publisher and all else on the machine share the cores."
