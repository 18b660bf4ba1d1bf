"""Where a command's CPU time goes, by component and by function: stacks of one process under full load (`sampler`).

Each sample counts for one component: that of the innermost function whose file `COMPONENTS` knows. So what a file does
by a function of the standard library (JSON, hashes) or by a helper that many use counts for that file.
"""

import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Final, NamedTuple

from tests.benchmark.contenders import ROOT, WORKER
from tests.benchmark.measure import contending, scene, watch, within
from tests.benchmark.scenarios import Plan, circumstances
from tests.benchmark.tables import Table
from tests.waiting import wait_until

COMPONENTS: Final[Mapping[str, Sequence[str]]] = {
    "HTTP over the socket": (
        *("worker/shells/transport.py", "worker/shells/gateway.py"),
        *("requests/", "urllib3/", "socket.py", "ssl.py", "http/"),
    ),
    "HTTP: reading the answer": ("worker/core/answer.py",),
    "use case, retries": ("worker/app/expire.py", "worker/core/retry.py", "tenacity/"),
    "signing, tokens": (
        *("worker/core/request.py", "worker/core/signing.py", "worker/core/scheme.py"),
        *("worker/shells/credentials.py", "worker/app/tokens.py", "worker/app/shared_tokens.py", "cryptography/"),
    ),
    "command, verdict, outcome": (
        *("worker/core/command.py", "worker/core/delivery.py", "worker/core/verdict.py", "worker/core/outcome.py"),
        *("worker/core/reading.py", "worker/core/masking.py"),
    ),
    "AMQP connection, codec": (
        *("worker/shells/amqp/connection.py", "worker/shells/amqp/codec.py", "worker/shells/amqp/link.py"),
        "pika/",
    ),
    "engine, publisher, consumer, settlement": (
        *("worker/shells/amqp/engine.py", "worker/shells/amqp/publisher.py", "worker/shells/amqp/consumer.py"),
        *("worker/shells/amqp/broker.py", "worker/core/settlement.py"),
    ),
    "lanes, limits, fleet": (
        *("worker/app/dispatch.py", "worker/core/lanes.py", "worker/core/breaker.py"),
        *("worker/app/fleet.py", "worker/core/fleet/", "worker/shells/amqp/fleet.py"),
    ),
    "fibers and loop": ("worker/shells/fibers.py", "worker/shells/pool.py", "pika/adapters/select_connection.py"),
    "log lines": ("worker/shells/logs.py", "worker/shells/telemetry.py", "structlog/"),
    "metrics": ("worker/shells/metrics.py", "prometheus_client/"),
    "tracing": ("worker/shells/tracing.py", "worker/core/trace.py", "opentelemetry/"),
}
"""Beginnings of file names, as `short` makes them; of several the longest wins."""

REST: Final = "the rest"
OTHERS: Final = "other threads"
DEAREST: Final = 20
LONGER: Final = 3  # times as many commands as in other runs: one in 4 ms of CPU is a sample
GENERATED: Final = ("", "generated methods of named tuples and dataclasses")
SECONDS: Final = 30.0  # until the sampler has written

Function = tuple[str, str]
"""File, as `short` names it, and qualified name."""


class Sample(NamedTuple):
    """What the sampler found: stacks, the innermost function first, and how often it saw each."""

    loop: float
    """The share of the process's CPU time that the loop's thread had."""
    stacks: Sequence[tuple[Sequence[Function], int]]


def profile(plan: Plan) -> Table:
    """The worker under full load, with its sampler."""
    to = plan.directory / "samples.json"
    sampled = replace(WORKER, argv=lambda: [sys.executable, "-m", "tests.benchmark.sampler", str(to)])
    plain = replace(plan.setup(WORKER), paced=0)
    setup = replace(plain, contender=sampled, commands=plan.commands or LONGER * plain.commands)
    samples: list[Sample] = []
    costs: list[float] = []
    unsampled: list[float] = []
    for turn in range(1, plan.rounds + 1):
        unsampled.append(plan.run(plain, turn).cpu)
        to.unlink(missing_ok=True)
        with scene(plan.url, plan.directory, setup.latency) as (site, gateway):
            site.load(setup.commands)
            plan.patience.wait()
            with contending(setup, site, gateway, plan.directory) as process:

                def toggle(pid: int = process.pid) -> None:
                    os.kill(pid, signal.SIGUSR2)

                first, last = within(watch(site.outcomes, process, setup.commands), setup.commands, toggle, toggle)
                wait_until(to.exists, SECONDS, "the sampler has written")
            gateway.check()
        samples.append(parse(to.read_text()))
        costs.append((last.cpu - first.cpu) * 1000 / (last.done - first.done))
        plan.say(f"round {turn}: {_number(samples[-1]):,} samples, {costs[-1]:.3f} ms CPU")
    sample, cost = merged(samples), median(costs) * 1000
    components = component_table(sample, cost, plan.rounds)
    without = f"Without the sampler it was {median(unsampled) * 1000:.0f} µs, in the neighbouring runs."
    return replace(
        components, notes=(*components.notes, without, circumstances()), also=(function_table(sample, cost),)
    )


# -- pure -----------------------------------------------------------------------------------------------------------


def parse(text: str) -> Sample:
    """What the sampler has written."""
    found = json.loads(text)
    return Sample(
        found["loop"],
        [(tuple(_function(*each) for each in stack), count) for stack, count in found["stacks"]],
    )


def _function(file: str, name: str) -> Function:
    return GENERATED if file == "<string>" else (short(file), name)


def merged(samples: Sequence[Sample]) -> Sample:
    """Several as one."""
    return Sample(median(one.loop for one in samples), [stack for one in samples for stack in one.stacks])


def short(file: str) -> str:
    """A file's name from its package on, whether it is ours, a library's or the standard library's."""
    return re.sub(r"^.*/(?:site-packages|dist-packages|python\d\.\d+)/", "", file.removeprefix(f"{ROOT}/"))


def component(stack: Iterable[Function]) -> str:
    """Of the innermost function whose file is known."""
    for file, _ in stack:
        known = [
            (len(start), name) for name, starts in COMPONENTS.items() for start in starts if file.startswith(start)
        ]
        if known:
            return max(known)[1]
    return REST


def hundred(shares: Sequence[float]) -> list[str]:
    """Shares of 1 as per cent with one digit, which add up to those of their sum: the largest remainders go up."""
    tenths = [share * 1000 for share in shares]
    whole = [int(one) for one in tenths]
    missing = round(sum(tenths)) - sum(whole)
    by_remainder = sorted(range(len(shares)), key=lambda place: whole[place] - tenths[place])
    for place in by_remainder[:missing]:
        whole[place] += 1
    return [f"{one / 10:.1f}" for one in whole]


def component_table(sample: Sample, cost: float, rounds: int) -> Table:
    """`cost`: microseconds of CPU for each command."""
    number = _number(sample)
    own: Counter[str] = Counter(dict.fromkeys((*COMPONENTS, REST), 0))
    in_libraries: Counter[str] = Counter()
    for stack, count in sample.stacks:
        name = component(stack)
        own[name] += count
        in_libraries[name] += 0 if stack[0][0].startswith("worker/") else count
    shares = {name: sample.loop * count / number for name, count in own.most_common()} | {OTHERS: 1 - sample.loop}
    rows = [
        [name, percent, f"{share * cost:.1f}", f"{in_libraries[name] * sample.loop / number:.1%}"[:-1]]
        for (name, share), percent in zip(shares.items(), hundred(list(shares.values())), strict=True)
    ]
    return Table(
        f"Where a command's CPU time goes; gateway 0 ms, a backlog, one process, {number:,} samples of {rounds} runs",
        ("component", "%", "µs", "% in libraries"),
        [*rows, ["all", "100.0", f"{cost:.1f}", f"{in_libraries.total() * sample.loop / number:.1%}"[:-1]]],
        (
            "Time in a system call or in C counts for the function that makes the call.",
            "“In libraries” is the part of it in functions that are not ours.",
            f"µs: the share of the {cost:.0f} µs that a command took in these runs, user and system.",
            f"A share of 5 % is exact to ±{200 * (0.05 * 0.95 / number) ** 0.5:.1f} (two standard deviations).",
        ),
    )


def function_table(sample: Sample, cost: float) -> Table:
    """Those with the most time of their own; `cost` as above."""
    number = _number(sample)
    own: Counter[Function] = Counter()
    with_callees: Counter[Function] = Counter()
    for stack, count in sample.stacks:
        own[stack[0]] += count
        for function in set(stack):
            with_callees[function] += count
    rows = [
        [
            f"{function[0].removeprefix('worker/')} {function[1]}".strip(),
            f"{sample.loop * count / number:.1%}"[:-1],
            f"{sample.loop * count / number * cost:.1f}",
            f"{sample.loop * with_callees[function] / number:.1%}"[:-1],
        ]
        for function, count in own.most_common(DEAREST)
    ]
    return Table(
        f"The {DEAREST} functions with the most time of their own",
        ("function", "% own", "µs own", "% with what it calls"),
        rows,
        ("What it calls ends where a fiber begins or waits.",),
    )


def _number(sample: Sample) -> int:
    return sum(count for _, count in sample.stacks)
