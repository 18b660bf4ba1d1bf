"""A seeded run of faults: commands flow while workers, broker and gateway are killed; then the sums are checked."""

import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pika
import pika.exceptions

from tests.brokers import PrivateBroker
from tests.ledger import Ledger, take_stock
from tests.proxy import FaultProxy
from tests.rabbit import Rabbit, address, by_way_of
from tests.worker_process import Producer, Published, WorkerProcess, command_body
from worker.core.topology import Names, topology
from worker.sandbox.simulator import Script, Simulator

DELAYS = (1, 2, 4, 8)
WORKERS = 4
CONCURRENCY = 16
SETTINGS = {
    "WORKER_CONCURRENCY": str(CONCURRENCY),
    "RETRY_DELAYS_SECONDS": ",".join(map(str, DELAYS)),
    "RETRY_INITIAL_SECONDS": "0.05",
    "RETRY_MAX_SECONDS": "0.5",
    "BREAKER_COOLDOWN_SECONDS": "0.5",
    "BREAKER_MAX_COOLDOWN_SECONDS": "2",
    "GATEWAY_READ_TIMEOUT_SECONDS": "2",
    "LOG_LEVEL": "warning",
}
GATEWAY = {"latency": 0.005, "already": "4049301"}
"""A bill that has expired is not found any more: whoever calls for a command that is another worker's by now, or called
for it before and forgot, is told an untruth that must not be passed on."""
FAULTS = {
    **GATEWAY,
    "rates": [
        {"share": 0.05, "fault": {"code": "5009300", "message": "General Error"}},
        {"share": 0.02, "fault": {"code": "4019301", "message": "Access Token Invalid"}},
        {"share": 0.02, "fault": {"code": "4099300", "message": "Cannot use same X-EXTERNAL-ID in same day"}},
        {"share": 0.01, "fault": {"reset": "after"}},
    ],
}
PUBLISHING = 60.0
"""Seconds over which the commands are published, if the broker lets them."""

LONGEST = 600.0
"""Seconds for all of it; a run that takes longer has found something."""


@dataclass
class Story:
    """What a run came to."""

    seed: int
    ledger: Ledger
    events: Counter[str]
    uncounted: int
    """Bills with more calls than `attempts` says: calls that a killed worker made and did not report."""
    seconds: float
    statuses: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        """The books, for people."""
        happened = ", ".join(f"{name} ×{number}" for name, number in sorted(self.events.items()))
        return (
            f"seed {self.seed}: {self.seconds:.0f} s, {self.events.total()} events ({happened})\n"
            f"{self.ledger.table()}\n"
            f"bills with a call that their outcome does not count: {self.uncounted}"
        )


def run(seed: int, commands: int, say: Callable[[str], None] = print) -> Story:
    """One run with four workers, one of them behind a network that is cut now and then. Raises AssertionError when the
    sums are not right, or a command is told that its bill does not exist: each of them exists until we expire it.
    """
    rng = random.Random(seed)
    began = time.monotonic()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qris-expire-chaos-")))
        broker = stack.enter_context(PrivateBroker())
        simulator = stack.enter_context(Simulator(Script.parse(FAULTS)))
        prefix = f"chaos.{seed}"
        with Rabbit(broker.url) as rabbit:
            rabbit.declare(topology(prefix, "quorum", DELAYS))
        network = stack.enter_context(FaultProxy(*address(broker.url)))
        urls = [by_way_of(network.port, broker.url), *[broker.url] * (WORKERS - 1)]
        workers = [stack.enter_context(WorkerProcess(url, prefix, simulator, directory, **SETTINGS)) for url in urls]
        producer = Producer(broker.url, prefix)
        feed = stack.enter_context(_feeding(broker.url, prefix, commands))
        freezer = Freezer()
        events = _torment(rng, broker, simulator, workers, network, freezer, feed, say)
        freezer.thaw(at_once=True)
        _settle(broker, simulator, workers)
        _await_outcomes(producer, feed, workers)
        for worker in workers:
            worker.stop()
        producer.published = list(feed.sent)
        ledger = take_stock(producer, DELAYS)
        calls = simulator.report().calls_by_bill
        seen = Counter(str(outcome.fields["status"]) for outcome in ledger.outcomes)
        attempts: dict[str, int] = {}
        for outcome in ledger.outcomes:
            attempts[outcome.fields["billnumber"]] = max(
                attempts.get(outcome.fields["billnumber"], 0), outcome.fields["attempts"]
            )
        uncounted = sum(number > attempts.get(bill, 0) for bill, number in calls.items())
        story = Story(seed, ledger, events, uncounted, time.monotonic() - began, seen)
        producer.rabbit.close()
    ledger.check(all_ended=True)
    honest = ("success", "not_found_after_unknown_effect")
    untrue = {outcome.command_id for outcome in ledger.outcomes if outcome.fields["reason"] not in honest} - feed.again
    assert not untrue, f"commands of bills that exist were told something else: {sorted(untrue)[:5]}"
    return story


# -- the producer: publishes until the broker has confirmed all, whatever happens to the broker ----------------------


@dataclass
class Feed:
    """How far the producer is."""

    total: int
    sent: deque[Published] = field(default_factory=deque)
    again: set[str] = field(default_factory=set)
    """Ids of commands that may be there twice: published again, because the broker died before it confirmed them."""
    failure: BaseException | None = None

    @property
    def done(self) -> bool:
        return len(self.sent) >= self.total


@contextmanager
def _feeding(url: str, prefix: str, commands: int) -> Iterator[Feed]:
    feed, stop = Feed(commands), threading.Event()
    thread = threading.Thread(target=_feed, args=(url, prefix, feed, stop), daemon=True)
    thread.start()
    try:
        yield feed
    finally:
        stop.set()
        thread.join(30)


def _feed(url: str, prefix: str, feed: Feed, stop: threading.Event) -> None:
    """Confirmed one by one; what was not confirmed when the broker died goes again under the same id."""
    names = Names(prefix)
    number, began = 0, time.monotonic()
    while number < feed.total and not stop.is_set():
        try:
            with Rabbit(url) as rabbit:
                while number < feed.total and not stop.is_set():
                    bill = f"B{number:06d}"
                    lane = "cancellation" if number % 5 == 0 else "sweep"
                    body = command_body(bill)
                    rabbit.publish(names.commands, lane, body, message_id=f"id-{bill}")
                    feed.sent.append(Published(f"id-{bill}", lane, body))
                    number += 1
                    # Spread over the torment: a backlog published in the first seconds would see one of them only.
                    stop.wait(max(0.0, began + number * PUBLISHING / feed.total - time.monotonic()))
        except (pika.exceptions.AMQPError, OSError):
            feed.again.add(f"id-B{number:06d}")
            stop.wait(0.2)
        except BaseException as error:  # noqa: BLE001  # reported by the main thread
            feed.failure = error
            return


# -- the torment ------------------------------------------------------------------------------------------------------


class Freezer:
    """Workers that are stopped (SIGSTOP) until a moment that was drawn for each."""

    def __init__(self) -> None:
        self._until: dict[WorkerProcess, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def holds(self, worker: WorkerProcess) -> bool:
        return worker in self._until

    def freeze(self, worker: WorkerProcess, seconds: float) -> None:
        os.killpg(worker.pid, signal.SIGSTOP)
        self._until[worker] = time.monotonic() + seconds

    def thaw(self, *, at_once: bool = False) -> None:
        """Lets those go whose time has come, or all."""
        for worker, until in list(self._until.items()):
            if at_once or time.monotonic() > until:
                os.killpg(worker.pid, signal.SIGCONT)
                del self._until[worker]


def _torment(
    rng: random.Random,
    broker: PrivateBroker,
    simulator: Simulator,
    workers: list[WorkerProcess],
    network: FaultProxy,
    freezer: Freezer,
    feed: Feed,
    say: Callable[[str], None],
) -> Counter[str]:
    """Something bad every one to four seconds until all commands are published."""

    def awake() -> WorkerProcess:
        return rng.choice([worker for worker in workers if not freezer.holds(worker)])

    def kill_worker() -> None:
        worker = awake()
        worker.kill9()
        worker.start()

    def freeze_worker() -> None:
        """For longer than its calls may take, and at times for longer than the broker believes in it."""
        if len(freezer) < WORKERS - 2:
            freezer.freeze(awake(), rng.choice([5, 10, 20, 40, 70]))

    def cut_network() -> None:
        """One worker's way to the broker carries nothing for a while; then its connections are reset."""
        network.stall()
        time.sleep(rng.uniform(0.5, 6))
        network.reset_all()
        network.resume()

    def restart_worker() -> None:
        worker = awake()
        worker.sigterm()
        assert worker.wait(40) in (0, 1), worker.last_words()
        worker.start()

    def kill_broker() -> None:
        broker.kill()
        broker.start()

    def restart_broker() -> None:
        broker.restart()

    def close_connections() -> None:
        broker.ctl("close_all_connections", "chaos")

    def gateway_down() -> None:
        _for_a_while(simulator, {"down": True}, rng.uniform(0.5, 3))

    def gateway_broken() -> None:
        page = {"html": 403}
        error = {"code": "5009300", "message": "General Error"}
        _for_a_while(simulator, {"rates": [{"share": 1, "fault": rng.choice([page, error])}]}, rng.uniform(0.5, 2))

    def gateway_throttles() -> None:
        throttled = {"code": "4299300", "retry_after": "1"}
        _for_a_while(simulator, {"rates": [{"share": 0.5, "fault": throttled}]}, rng.uniform(0.5, 2))

    misfortunes: list[tuple[int, Callable[[], None]]] = [
        (5, kill_worker),
        (3, restart_worker),
        (2, kill_broker),
        (1, restart_broker),
        (2, close_connections),
        (3, gateway_down),
        (2, gateway_broken),
        (2, gateway_throttles),
        (3, freeze_worker),
        (3, cut_network),
    ]
    weights = [weight for weight, _ in misfortunes]
    events: Counter[str] = Counter()
    # Each kind once, in a seeded order, then by chance: a short run must not be a lucky one.
    plan = [act for _, act in rng.sample(misfortunes, len(misfortunes))]
    deadline = time.monotonic() + LONGEST
    while not feed.done or plan:
        assert feed.failure is None, f"the producer failed: {feed.failure!r}"
        assert time.monotonic() < deadline, f"only {len(feed.sent)} of {feed.total} published in {LONGEST:.0f} s"
        time.sleep(rng.uniform(1, 4))
        freezer.thaw()
        act = plan.pop() if plan else rng.choices([act for _, act in misfortunes], weights)[0]
        say(f"  {len(feed.sent):>6} published: {act.__name__}")
        act()
        events[act.__name__] += 1
        for worker in workers:
            if freezer.holds(worker):
                continue
            assert worker.running, f"a worker ended by itself, with {worker.exit_code}\n{worker.last_words()}"
    return events


def _for_a_while(simulator: Simulator, script: dict[str, Any], seconds: float) -> None:
    simulator.replace(Script.parse({**GATEWAY, **script}))
    time.sleep(seconds)
    simulator.replace(Script.parse(FAULTS))


def _settle(broker: PrivateBroker, simulator: Simulator, workers: list[WorkerProcess]) -> None:
    """Peace: everything runs."""
    simulator.replace(Script.parse(FAULTS))
    broker.start()
    for worker in workers:
        if not worker.running:
            worker.start()


def _await_outcomes(producer: Producer, feed: Feed, workers: list[WorkerProcess]) -> None:
    """Until every published command has an outcome."""
    deadline = time.monotonic() + LONGEST
    ended: set[str] = set()
    while len(ended) < feed.total:
        assert time.monotonic() < deadline, f"{feed.total - len(ended)} commands without an outcome\n" + "\n".join(
            w.last_words() for w in workers
        )
        try:
            for outcome in producer.collect(min(max(producer.rabbit.depth(producer.inbox), 1), 1000), 15):
                ended.add(outcome.command_id)
        except (pika.exceptions.AMQPError, OSError):
            with suppress(pika.exceptions.AMQPError, OSError):
                producer.reconnect()
