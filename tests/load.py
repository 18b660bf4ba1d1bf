"""A worker under a steady load, watched: what the fault tests break, and what must be true of it afterwards."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pika.exceptions
from pika.adapters.utils.connection_workflow import AMQPConnectionWorkflowFailed, AMQPConnectorException

from tests.altered import altered
from tests.ledger import Ledger, take_stock
from tests.proxy import FaultProxy
from tests.rabbit import Rabbit, address, by_way_of, delete_topology, new_prefix
from tests.waiting import wait_until
from tests.worker_process import Outcome, Producer, Published, Scrape, WorkerProcess, command_body
from worker.core.lanes import LANES
from worker.core.topology import Names
from worker.sandbox.simulator import Script, Simulator

PER_SECOND = 15.0
"""Commands of one lane: enough that something is always in hand, little enough that a busy machine keeps up."""

STAY_SECONDS = 60.0
"""The most a load waits for the broker to take the command in its hand."""

CALLS_KEPT = 100_000

LOST = (pika.exceptions.AMQPError, AMQPConnectorException, AMQPConnectionWorkflowFailed, OSError, ValueError)
"""All that pika raises while it connects: a failed handshake is no AMQPError there, a reset at once a ValueError."""


class Load(threading.Thread):
    """One producer of one lane: each command is published until it is confirmed, whatever happens to the broker.

    `urls` are the nodes of a cluster; when one is lost, the next is tried. A confirm is waited for without end, see
    `hang_up`.
    """

    def __init__(
        self, urls: Sequence[str], producer: Producer, lane: str, name: str, per_second: float = PER_SECOND
    ) -> None:
        super().__init__(name=f"load-{lane}", daemon=True)
        self._ways = [FaultProxy(*address(url)) for url in urls]
        self._urls = cycle(by_way_of(way.port, url) for way, url in zip(self._ways, urls, strict=True))
        self._names = Names(producer.names.prefix)
        self._published = producer.published
        self._lane = lane
        self._name = name
        self._pause = 1 / per_second
        self._stopping = threading.Event()
        self.failure: BaseException | None = None
        self.bills: list[str] = []
        """Those that the broker has confirmed."""

    def hang_up(self) -> None:
        """Connect again and publish once more what has no confirm: after a lost quorum, it may never come."""
        for way in self._ways:
            way.reset_all()

    def abandon(self) -> None:
        """Stop without waiting or complaining: the test is over."""
        self._stopping.set()

    def stop(self) -> None:
        """The command in hand is published still."""
        self._stopping.set()
        self.join(STAY_SECONDS + 5)
        self.check()
        assert not self.is_alive(), "the load hangs"

    def check(self) -> None:
        """Raises what ended it."""
        if self.failure is not None:
            raise self.failure

    def run(self) -> None:
        rabbit: Rabbit | None = None
        try:
            while not self._stopping.wait(self._pause):
                rabbit = self._publish(f"{self._name}-{len(self.bills)}", rabbit)
        except BaseException as error:  # noqa: BLE001  # raised by `stop`
            self.failure = error
        finally:
            if rabbit is not None:
                rabbit.close()
            for way in self._ways:
                way.stop()

    def _publish(self, bill: str, rabbit: Rabbit | None) -> Rabbit:
        body, identity = command_body(bill), f"id-{bill}"
        deadline = time.monotonic() + STAY_SECONDS
        while True:
            try:
                rabbit = rabbit or Rabbit(next(self._urls))
                rabbit.publish(self._names.commands, self._lane, body, message_id=identity)
            except LOST as error:
                if time.monotonic() > deadline:
                    raise
                # After a nack, too: such a channel may be nacked for as long as a node is away, and a new one is not.
                if not isinstance(error, pika.exceptions.UnroutableError):
                    with suppress(Exception):
                        if rabbit is not None:
                            rabbit.close()
                    rabbit = None
                # Not stopping: what may be with the broker already must be in the books.
                threading.Event().wait(0.05)
            else:
                self.bills.append(bill)
                self._published.append(Published(identity, self._lane, body))
                return rabbit


class Sighting(NamedTuple):
    """What /readyz said, from then until the next sighting."""

    at: float
    status: int
    components: dict[str, str]


class Lookout(threading.Thread):
    """Looks at /readyz all the time and notes each change."""

    def __init__(self, worker: WorkerProcess) -> None:
        super().__init__(name="lookout", daemon=True)
        self._worker = worker
        self._stopping = threading.Event()
        self.sightings: list[Sighting] = []

    def stop(self) -> None:
        self._stopping.set()
        self.join(15)

    def run(self) -> None:
        while not self._stopping.wait(0.03):
            status, body = self._worker.get("/readyz")
            components = _components(body) if status else {}
            last = self.sightings[-1] if self.sightings else None
            if last is None or (last.status, last.components) != (status, components):
                self.sightings.append(Sighting(time.monotonic(), status, components))

    @property
    def ready(self) -> bool:
        """What it said last."""
        return bool(self.sightings) and self.sightings[-1].status == 200

    def unready(self, component: str = "", text: str = "", since: float = 0.0) -> bool:
        """Whether it said 503 at any time, with `text` about `component` (any)."""
        return any(
            seen.status == 503
            and seen.at >= since
            and (not component or text in seen.components.get(component, ""))
            and (not component or seen.components.get(component) != "ok")
            for seen in list(self.sightings)
        )

    def flaps(self) -> int:
        """How often it went from 200 to 503."""
        seen = [sighting.status for sighting in self.sightings]
        return sum((one, other) == (200, 503) for one, other in pairwise(seen))


def _components(body: str) -> dict[str, str]:
    return {name: str(state) for name, state in json.loads(body)["components"].items()}


@dataclass
class Scene:
    """A worker that is ready and has work in both lanes; `network` lies between it and its broker."""

    urls: Sequence[str]
    worker: WorkerProcess
    producer: Producer
    gateway: Simulator
    network: FaultProxy
    lookout: Lookout
    loads: dict[str, Load] = field(default_factory=dict)
    _started: int = 0
    began: float = 0.0
    _line: int = 0
    _called: int = 0

    @property
    def names(self) -> Names:
        return self.producer.names

    def begin(self) -> None:
        """What was said and done so far belongs to another test."""
        self.began = time.monotonic()
        self._line = len(self.worker.events())
        self._called = len(self.gateway.report(bills=False).calls)

    # -- load

    def load(self, *lanes: str, per_second: float = PER_SECOND) -> None:
        """Start a load in these lanes, and wait until each shows at the gateway."""
        for lane in lanes:
            self._started += 1
            bills = f"{lane[0]}{self._started}"
            load = self.loads[lane] = Load(self.urls, self.producer, lane, bills, per_second)
            load.start()
        for lane in lanes:
            self.more_calls(lane)

    def more_calls(self, lane: str | None = None, timeout: float = 30) -> None:
        """Wait until commands published from now on were called for."""

        def called() -> bool:
            for load, _ in marks:
                load.check()
            calls = self.gateway.report().calls_by_bill
            return all(any(bill in calls for bill in load.bills[mark:]) for load, mark in marks)

        marks = [(load, len(load.bills)) for name, load in self.loads.items() if lane in (None, name)]
        self.worker.wait_for(called, timeout, f"new commands of {lane or 'each lane'} reach the gateway")

    def repair(self) -> None:
        """Whatever a test left broken between worker and broker, and its load."""
        self.network.accept()
        self.network.resume()
        self.network.latency(0)
        for load in self.loads.values():
            load.abandon()
        self.loads.clear()

    def unload(self, *lanes: str) -> None:
        """Stop the load of these lanes (all)."""
        for lane in lanes or tuple(self.loads):
            self.loads.pop(lane).stop()

    # -- what the worker says

    def wait_unready(self, component: str = "", text: str = "", timeout: float = 30) -> None:
        """Until /readyz has said 503 since the test began, with `text` about `component`."""
        self.worker.wait_for(
            lambda: self.lookout.unready(component, text, self.began),
            timeout,
            f"/readyz says 503 ({component}: {text})",
        )

    def wait_ready(self, timeout: float = 30) -> None:
        """Until /readyz says 200 now."""
        self.worker.wait_for(lambda: self.lookout.ready, timeout, "/readyz says 200 again")

    def wait_metric(self, fact: Callable[[Scrape], bool], timeout: float = 30) -> None:
        """Until this is true of a scrape."""
        self.worker.wait_for(lambda: fact(self.worker.metrics()), timeout, "the metrics say so")

    def lines(self, *events: str) -> list[dict[str, Any]]:
        """The log lines of these events since the test began."""
        return [line for line in self.worker.events()[self._line :] if line["event"] in events]

    def wait_said(self, event: str, text: str, timeout: float = 30) -> dict[str, Any]:
        """Until a log line of this event holds `text`; that line."""

        def said() -> dict[str, Any] | None:
            return next((line for line in self.lines(event) if text in " ".join(map(str, line.values()))), None)

        line: dict[str, Any] = self.worker.wait_for(said, timeout, f"a line {event!r} with {text!r}")
        return line

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """What happens inside costs the worker a connection; it gets no new one before /readyz was seen to say so."""
        self.network.refuse()
        try:
            yield
            self.wait_unready()
            self.wait_said("broker.waiting", "")
        finally:
            self.network.accept()
        self.wait_ready()

    # -- the end

    def settle(self, *, timeout: float = 60, no_duplicates: bool = False) -> Ledger:
        """Stop the load, wait for all outcomes and for readiness, and check the books: every command published has an
        outcome, and the worker is the process that it was."""
        self.unload()
        with suppress(Exception):
            self.producer.rabbit.close()
        self.producer.rabbit = Rabbit(self.urls[0])
        self.producer.listen()
        self.gather(timeout)
        self.wait_ready()
        assert self.worker.running
        assert len(self.worker.events("worker.starting")) == 1
        # Settled, too: what it holds unacked would come again.
        self.worker.wait_for(lambda: not self.unsettled(), 30, "nothing is unsettled")
        return take_stock(self.producer).check(all_ended=True, no_duplicates=no_duplicates)

    def gather(self, timeout: float) -> None:
        """Until every command has an outcome, in the inbox or among those that nobody was bound to."""
        producer, queues = self.producer, (self.producer.inbox, self.names.unrouted)

        def all_there() -> bool:
            for queue in queues:
                for message in producer.rabbit.consume(queue, producer.rabbit.depth(queue), 30):
                    producer.outcomes.append(Outcome(message, json.loads(message.body)))
            return not self.missing()

        self.worker.wait_for(all_there, timeout, "every command has an outcome")

    def missing(self) -> set[str]:
        """Commands without an outcome yet."""
        return {sent.id for sent in self.producer.published} - {got.command_id for got in self.producer.outcomes}

    def unsettled(self) -> float:
        """Commands in senders' hands and publications without their confirm."""
        metrics = self.worker.metrics()
        return metrics("in_flight") + metrics("publishes_unconfirmed")

    def calls(self) -> int:
        """Expire calls so far, finished ones included."""
        return self.gateway.report(bills=False).expire_calls

    def longest_silence(self) -> float:
        """Seconds of the longest pause between two calls at the gateway since the test began."""
        times = [call.at for call in self.gateway.report(bills=False).calls[max(0, self._called - 1) :]]
        return max((later - one for one, later in pairwise(times)), default=0.0)


@contextmanager
def under_load(
    url: str,
    directory: Path,
    *,
    script: Script | None = None,
    lanes: tuple[str, ...] = LANES,
    worker_url: Callable[[str], str] = lambda url: url,
    per_second: float = PER_SECOND,
    urls: Sequence[str] = (),
    **settings: str | None,
) -> Iterator[Scene]:
    """A worker on a prefix of its own, through a `FaultProxy`; `worker_url` changes its AMQP_URL.

    `urls` of all nodes if `url` belongs to a cluster: then the inbox is replicated, and nothing goes through the proxy.
    """
    prefix = new_prefix()
    with ExitStack() as stack:
        network = stack.enter_context(FaultProxy(*address(url)))
        gateway = stack.enter_context(Simulator(script or Script(latency=0.01), keep_calls=CALLS_KEPT))
        stack.callback(_forget, url, prefix)
        through = worker_url(",".join(urls) or by_way_of(network.port, url))
        worker = stack.enter_context(WorkerProcess(through, prefix, gateway, directory, **settings))
        worker.wait_ready()
        producer = stack.enter_context(Producer(url, prefix))
        if urls:
            producer.rabbit.delete_queue(producer.inbox)
            producer.rabbit.declare_queue(producer.inbox, "quorum")
            producer.listen()
        lookout = Lookout(worker)
        scene = Scene(urls or [url], worker, producer, gateway, network, lookout)
        stack.callback(_stop_all, scene)
        lookout.start()
        wait_until(lambda: lookout.ready, 30, "the lookout sees it ready")
        scene.begin()
        scene.load(*lanes, per_second=per_second)
        yield scene
        # Exit 0 says again that it was the same process all the time, and that nothing of it hangs.
        worker.stop()


def confirm_seconds(directory: Path, seconds: float) -> str:
    """The PYTHONPATH of a process that waits so long for a confirm. On purpose there is no setting for that."""
    return altered(directory, f"import worker.shells.amqp.publisher as p; p.CONFIRM_SECONDS = {seconds}")["PYTHONPATH"]


def _stop_all(scene: Scene) -> None:
    """Whatever the test left running."""
    for load in scene.loads.values():
        load.abandon()
    scene.lookout.stop()


def _forget(url: str, prefix: str) -> None:
    with suppress(pika.exceptions.AMQPError, OSError):
        delete_topology(url, prefix)
