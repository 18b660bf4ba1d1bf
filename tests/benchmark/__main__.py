"""Measure this worker, and beside it others that do exactly the same job with the same guarantees.

Each consumes persistent commands from a quorum queue, signs them, sends them over kept connections to a gateway that
checks the signature, publishes a persistent, mandatory outcome, waits for its confirm, and acks only then. Without a
scenario: all contenders with a gateway of 0 ms. Needs a RabbitMQ: the one at AMQP_URL, else localhost's, else the
installed binaries; it uses objects of its own and deletes them.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from tests.benchmark import machine, pace, packages, profile, scenarios
from tests.benchmark.contenders import CONTENDERS, BenchmarkError, Contender, here
from tests.benchmark.scenarios import Plan
from tests.benchmark.tables import Table
from tests.brokers import PrivateBroker
from worker.sandbox.broker import BrokerUnavailable, LoginResult, try_login

LOCAL: Final = "amqp://guest:guest@127.0.0.1:5672/%2F"

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when it could measure, 1 when not."""
    asked = _parser().parse_args(arguments)
    # A plain end of the process would leave workers, a gateway and queues behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tempfile.TemporaryDirectory(prefix="qris-expire-benchmark-") as directory, _broker() as url:
            for scenario in _scenarios(asked, _plan(asked, url, Path(directory))):
                table = scenario()
                print(f"\n{table.markdown() if asked.markdown else table.text()}\n", flush=True)
    except (BenchmarkError, BrokerUnavailable, packages.PackagesMissing, AssertionError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--contenders", type=_contenders, help=f"some of {','.join(CONTENDERS)}; without: all that can run here")
    add("--rounds", type=int, default=3, help="how often each is measured, interleaved (3)")
    add("--commands", type=int, help="commands of each run, instead of about six seconds' worth")
    add("--scale", type=float, default=1.0, help="multiplies the number of commands of every scenario (1.0)")
    add("--concurrency", type=int, help="WORKER_CONCURRENCY, instead of what suits the scenario")
    add("--patience", type=float, default=30, help="seconds to wait in all for a quiet machine (30)")
    add("--markdown", action="store_true", help="tables as they stand in the README")
    group = parser.add_argument_group("scenarios, instead of the comparison").add_argument
    group("--comparison", action="store_true", help="the comparison, too")
    group("--latency", type=_list_of(float), metavar="MS,…", help="a slow gateway, for instance 0,50,200")
    group("--processes", type=_list_of(int), metavar="N,…", help="WORKER_PROCESSES, for instance 1,2")
    group("--cancellations", action="store_true", help="cancellations behind a sweep of 20,000")
    group("--memory", action="store_true", help="after 10,000 and 200,000 commands")
    group("--start", action="store_true", help="run to first outcome; --help")
    group("--growth", action="store_true", help="cost of a command with 1,000 and 50,000 queued behind it")
    group("--full", action="store_true", help="--growth with 500,000, too")
    group("--pace", type=_list_of(float), metavar="N,…", help="a steady load of so many commands a second, as 100,800")
    group("--profile", action="store_true", help="where a command's CPU time goes, by component")
    return parser


def _plan(asked: argparse.Namespace, url: str, directory: Path) -> Plan:
    contenders, missing = (asked.contenders, []) if asked.contenders else here(CONTENDERS.values())
    return Plan(
        url=url,
        directory=directory,
        contenders=contenders,
        missing=missing,
        rounds=asked.rounds,
        scale=asked.scale,
        commands=asked.commands,
        concurrency=asked.concurrency,
        patience=machine.Patience(asked.patience),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


def _scenarios(asked: argparse.Namespace, plan: Plan) -> Iterator[Callable[[], Table]]:
    wanted = {
        "latency": asked.latency and partial(scenarios.latency, plan, asked.latency),
        "processes": asked.processes and partial(scenarios.processes, plan, asked.processes),
        "cancellations": asked.cancellations and partial(scenarios.cancellations, plan),
        "memory": asked.memory and partial(scenarios.memory, plan),
        "start": asked.start and partial(scenarios.start, plan),
        "growth": (asked.growth or asked.full) and partial(scenarios.growth, plan, full=asked.full),
        "pace": asked.pace and partial(pace.pace, plan, asked.pace),
        "profile": asked.profile and partial(profile.profile, plan),
    }
    if asked.comparison or not any(wanted.values()):
        yield partial(scenarios.comparison, plan)
    yield from (scenario for scenario in wanted.values() if scenario)


def _contenders(text: str) -> list[Contender]:
    try:
        return [CONTENDERS[name] for name in text.split(",")]
    except KeyError as unknown:
        raise argparse.ArgumentTypeError(f"there is no {unknown}; there are {', '.join(CONTENDERS)}") from None


def _list_of(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    def numbers(text: str) -> list[T]:
        return [kind(word) for word in text.split(",")]

    return numbers


@contextmanager
def _broker() -> Iterator[str]:
    """The one that is here, else a private node, gone at the end."""
    url = (os.environ.get("AMQP_URL") or LOCAL).partition(",")[0]
    if try_login(url, 10) is LoginResult.READY:
        yield url
        return
    with PrivateBroker() as broker:
        yield broker.url


if __name__ == "__main__":
    sys.exit(main())
