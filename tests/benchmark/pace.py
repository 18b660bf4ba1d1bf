"""Partial load: what a command costs when commands come at a steady rate, against the cost under full load.

A worker that saves system calls because much is ready at once saves them under full load only.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain
from math import inf
from statistics import median
from typing import Final, NamedTuple

from tests.benchmark import calls
from tests.benchmark.contenders import ASYNCHRONOUS, WORKER, BenchmarkError, Contender
from tests.benchmark.measure import Run, Setup, Steady, contending, load, scene, under_way, within
from tests.benchmark.scenarios import Plan, circumstances, latencies, ratio
from tests.benchmark.tables import Table

SECONDS: Final = 20  # of a steady load: at 100 a second, the grain of the CPU's clock is then 3 % of what is measured
BEHIND: Final = 0.1  # seconds from publish to outcome (p50): more, and commands have queued up
DEAREST: Final = 4  # system calls that are named


class Counted(NamedTuple):
    """System calls of one run, for each command."""

    setup: Setup
    whole: float
    named: Sequence[tuple[str, float]]
    """Most first."""
    rate: float
    """Outcomes per second meanwhile: what counts may slow the contender down."""


def pace(plan: Plan, rates: Sequence[float]) -> Table:
    """The worker beside the best peer in Python, at each rate and under full load."""
    contenders = [one for one in (WORKER, ASYNCHRONOUS) if one in plan.contenders]
    if not contenders:
        raise BenchmarkError(f"--pace measures {WORKER.name} and {ASYNCHRONOUS.name}; name one of them")
    setups = [setup for rate in sorted(set(rates)) for setup in _neighbours(plan, contenders, rate)]
    runs = plan.rounds_of(setups)
    tool = calls.tool(plan.directory)
    once = {(contenders.index(setup.contender), setup.per_second or inf): setup for setup in setups}
    counted: list[Counted] = []
    if tool is not None:
        with suppress(calls.NotAllowed):
            counted += [_counted(plan, tool, once[place]) for place in sorted(once)]
    costs, found = cost_table(runs, counted), calls_table(counted, tool.name if tool and counted else None)
    notes = (*costs.notes, circumstances([run for some in runs for run in some]), *plan.missing)
    return replace(costs, notes=notes, also=(found,))


def _neighbours(plan: Plan, contenders: Sequence[Contender], rate: float) -> list[Setup]:
    """Under the load and under full load, next to each other for each contender, and the loads next to each other."""
    full = [replace(plan.setup(one), paced=0) for one in contenders]
    commands = plan.commands or plan.size(rate * SECONDS)
    loaded = [replace(one, per_second=rate, commands=commands) for one in full]
    return [*full[:1], *loaded, *full[1:]]


def _counted(plan: Plan, tool: calls.Tool, setup: Setup) -> Counted:
    with scene(plan.url, plan.directory, setup.latency) as (site, gateway), ExitStack() as stack:
        load(site, setup)
        process = stack.enter_context(contending(setup, site, gateway, plan.directory))
        counting = calls.Counting(tool, process.pid, plan.directory)
        first, last = within(
            under_way(site, process, setup, plan.directory, Steady([], [])),
            setup.commands,
            lambda: stack.enter_context(counting),
            counting.end,
        )
        found = counting.calls()
        gateway.check()
    rate = (last.done - first.done) / (last.at - first.at)
    plan.say(f"{tool.name}: {setup.contender.name:12} {rate:7.0f}/s  {found.whole:,} calls in {found.seconds:.1f} s")
    return per_command(setup, found, rate)


# -- pure -----------------------------------------------------------------------------------------------------------


def per_command(setup: Setup, found: calls.Calls, rate: float) -> Counted:
    """Calls of a while, over the commands that are done in such a while."""
    commands = found.seconds * rate
    named = sorted(((name, count / commands) for name, count in found.named.items()), key=lambda one: -one[1])
    return Counted(setup, found.whole / commands, named, rate)


def cost_table(runs: Sequence[Sequence[Run]], counted: Sequence[Counted]) -> Table:
    """Of all rounds of the setups of `_neighbours`, and of the system calls that were counted."""
    contenders = list({some[0].setup.contender.name: some[0].setup.contender for some in runs}.values())
    rates = list(dict.fromkeys(some[0].setup.per_second for some in runs if some[0].setup.per_second))
    reference = contenders[-1]
    calls_of = {(one.setup.contender, one.setup.per_second): f"{one.whole:.1f}" for one in counted}
    rows = []
    for one in contenders:
        for rate, beside in zip(rates, _of(runs, one, 0.0), strict=True):
            (some,), (others,) = _of(runs, one, rate), _of(runs, reference, rate)
            rows.append(
                [one.title, f"{rate:g}", *_cells(some, beside, others), calls_of.get((one, rate), "not counted")]
            )
        full, others = list(chain(*_of(runs, one, 0.0))), list(chain(*_of(runs, reference, 0.0)))
        rows.append([one.title, "full", *_cells(full, full, others), calls_of.get((one, 0.0), "not counted")])
    return Table(
        f"Partial load; gateway 0 ms, one process, medians of {len(runs[0])}",
        (
            *("worker", "load per s", "per s", "CPU ms", "user", "system", "to full", "ratio"),
            *("p50 ms", "p95 ms", "late ms", "lost, twice", "system calls"),
        ),
        rows,
        (
            *_not_kept(runs),
            "Commands come one by one and evenly; “full” is a backlog.",
            "CPU ms, user and system are for each command, with what the worker does all the time (timers, fleet).",
            "“To full” compares with the neighbouring run under full load of the same worker,",
            f"“ratio” with the CPU of “{reference.title}” under the same load in the same round.",
            "p50 and p95 from publish to outcome; late is the p95 of the publisher's delay behind its schedule.",
            "User and system apart are estimates by the system's tick; their sum is exact to 10 ms of a run.",
            "System calls are for each command, from a run of their own.",
        ),
    )


def calls_table(counted: Sequence[Counted], tool: str | None) -> Table:
    """Which system calls they are."""
    return Table(
        f"System calls for each command, by {tool}" if tool else calls.NOT_COUNTED,
        ("worker", "load per s", "per s", "all", "of these"),
        [
            [
                one.setup.contender.title,
                f"{one.setup.per_second:g}" if one.setup.per_second else "full",
                f"{one.rate:,.0f}",
                f"{one.whole:.1f}",
                ", ".join(f"{name} {count:.1f}" for name, count in _dearest(one)),
            ]
            for one in counted
        ],
        ("One run each; “per s” is its rate while it was counted: below its load, it was a backlog.",) if tool else (),
    )


def _dearest(counted: Counted) -> list[tuple[str, float]]:
    named = list(counted.named[:DEAREST])
    return [*named, ("others", max(counted.whole - sum(count for _, count in named), 0.0))]


def _not_kept(runs: Sequence[Sequence[Run]]) -> list[str]:
    """A load that was more than the contender could do here was a backlog, and is no partial load."""
    return [
        f"NOT A PARTIAL LOAD: {some[0].setup.contender.name} at {some[0].setup.per_second:g} per s fell behind."
        for some in runs
        if some[0].setup.per_second and median(one.latency.p50 for one in some if one.latency) > BEHIND
    ]


def _of(runs: Sequence[Sequence[Run]], contender: Contender, rate: float) -> list[Sequence[Run]]:
    return [some for some in runs if (some[0].setup.contender, some[0].setup.per_second) == (contender, rate)]


def _cells(some: Sequence[Run], beside: Sequence[Run], others: Sequence[Run]) -> list[str]:
    return [
        f"{median(one.rate for one in some):,.0f}",
        f"{median(one.cpu for one in some):.3f}",
        f"{median(one.cpu - one.system for one in some):.3f}",
        f"{median(one.system for one in some):.3f}",
        f"{ratio(some, beside, lambda one: one.cpu):.2f}",
        f"{ratio(some, others, lambda one: one.cpu):.2f}",
        *latencies([one.latency for one in some if one.latency]),
        f"{median(one.late for one in some) * 1000:.1f}" if some[0].setup.per_second else "",
        f"{sum(one.missing for one in some)}, {sum(one.duplicates for one in some)}",
    ]
