"""The broker side of one process: one loop in one thread, one connection to consume and one to publish.

Two connections, because a memory alarm stops the broker from reading one that publishes, acks included. Everything
here runs on the loop's thread, which is the senders' too, but `begin`, `drain`, `halt` and what only reads.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, assert_never

import structlog

from worker.app.dispatch import Dispatcher
from worker.core.breaker import State
from worker.core.delivery import COPY_ID, Delivery, receive
from worker.core.lanes import LANES
from worker.core.ports import Clock
from worker.core.settlement import (
    Crashed,
    Delay,
    Desk,
    Disposition,
    GiveBack,
    Hold,
    Report,
    Settled,
    Tag,
    Take,
    TakenBack,
    Task,
)
from worker.core.topology import Names, Topology
from worker.shells.amqp import codec
from worker.shells.amqp.consumer import Consumer
from worker.shells.amqp.declaring import Declaring
from worker.shells.amqp.errors import MISSING
from worker.shells.amqp.fleet import FleetLink
from worker.shells.amqp.link import Link, Parameters
from worker.shells.amqp.publisher import Publication, Publisher, named
from worker.shells.fibers import Fibers
from worker.shells.logs import gathered
from worker.shells.telemetry import tell_fate
from worker.shells.tracing import Tracing

TICK: Final = 0.1
TELL_EVERY: Final = 1.0  # seconds between two looks at all that is in hand; no scrape is more frequent
LINGER: Final = 0.002
"""Seconds that a result waits for others while senders are busy, so that outcomes, confirms, acks and new deliveries
travel in company. Measured at 1,280 commands a second: a quarter less CPU here, a third less in the broker; without a
slow gateway, and for a lone cancellation, it changes nothing."""
CLOSE_SECONDS: Final = 3.0
PARK_AFTER: Final = 2
PARK_BEYOND: Final = 8
"""A command whose outcome or next round the broker refuses so often, or beside so many others, is parked: it holds a
place of the prefetch window, and a window full of them would stop the lane."""
LOOK_EVERY: Final = 10.0
"""Seconds between two looks whether the topology is still there: a policy or an operator may delete a retry queue."""
REJECT_AFTER: Final = 1.0  # a command that crashes senders must not do so as fast as the broker redelivers it


class Watch(Protocol):
    """What the engine reports (metrics)."""

    def received(self, lane: str) -> None: ...
    def undated(self, lane: str) -> None: ...
    def waiting(self, lane: str, commands: int) -> None: ...
    def acked(self, lane: str, deliveries: int) -> None: ...
    def oldest(self, lane: str, published_at: float | None) -> None: ...
    def settled(self, lane: str, seconds: float) -> None: ...
    def outcome(self, lane: str, status: str, reason: str, age_seconds: float, now: float) -> None: ...
    def delayed_retry(self, lane: str) -> None: ...
    def dead_letter(self, reason: str) -> None: ...
    def breaker(self, lane: str, state: int) -> None: ...
    def paused(self, reason: str, on: bool) -> None: ...
    def held_until(self, timestamp: float | None) -> None: ...
    def broker_connected(self, up: bool) -> None: ...
    def broker_reconnected(self) -> None: ...
    def confirmed(self, seconds: float) -> None: ...
    def unconfirmed(self, n: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What the engine needs to know."""

    names: Names
    topology: Topology
    declare: bool
    prefetch: dict[str, int]


class Engine:
    """Deliveries in, acks out. An ack is sent for one reason only: everything that settles it is confirmed.

    It makes its consumer, publisher and links itself and is not handed them: whatever they notice is a call of a method
    here, so neither could be made before the other, and nobody else has a use for them.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Parameters,
        *,
        fibers: Fibers,
        dispatcher: Dispatcher,
        watch: Watch,
        clock: Clock,
        rng: random.Random,
        tracing: Tracing,
        fleet: FleetLink,
    ) -> None:
        self._plan = plan
        self._tracing = tracing
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._watch = watch
        self._clock = clock
        self._log = structlog.get_logger().bind()  # bound once: the lazy proxy would bind at every line
        self._fibers = fibers
        self._loop = fibers.loop
        self._stopped = False
        self._desk = Desk(plan.names, lambda: uuid.uuid4().hex)
        self._results: deque[tuple[Task, Disposition]] = deque()
        self._attention = True
        self._publisher: Publisher[tuple[Task, Disposition]] = Publisher(
            self._loop,
            watch,
            on_confirmed=self._confirmed,
            on_refused=self._not_taken,
            guard=self._guard,
        )
        self._consumer = Consumer(
            {lane: plan.names.queue(lane) for lane in LANES},
            plan.prefetch,
            on_delivery=self._delivered,
            on_channel_lost=self._desk.channel_lost,
            guard=self._guard,
        )

        def link(name: str, on_up: Callable[[Any], None], on_down: Callable[[str], None]) -> Link:
            return Link(
                name,
                self._loop,
                parameters,
                on_up=on_up,
                on_down=on_down,
                on_refused=self._refused,
                on_blocked=lambda _: self._publisher.flush(),
                guard=self._guard,
                rng=rng,
            )

        self._publish_link = link("publish", self._publish_up, self._publish_down)
        self._consume_link = link("consume", self._consume_up, self._consume_down)
        self._thread = threading.Thread(target=self._run, name="broker", daemon=True)
        self._write_log: Callable[[], None] = _nothing
        self._ticked = time.monotonic()
        self._tell_at = 0.0
        self._look_at = 0.0
        self._looking: object = None
        self._vanished = ""
        """What was missing at the last look."""
        self._settle_at = 0.0
        self._acks_told = dict.fromkeys(LANES, 0)
        self._begun = False
        self._probes: dict[str, float | None] = dict.fromkeys(LANES)
        """When the next probe of a lane whose breaker is not closed goes out, as the log was told."""
        self._connected_once = False
        self._connected = False
        self._lost = False
        self._closed_at: float | None = None
        self.refused: tuple[str, str] | None = None
        """Why the broker refused our login before it ever took it, and what to do."""
        self.failure: BaseException | None = None
        """Set when the loop's thread ended by an exception: the process must end too."""

    # -- from any thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connects. Nothing is handed to senders before `begin`."""
        codec.tolerate()
        self._thread.start()

    def begin(self) -> None:
        """Senders may start."""
        self._begun = True
        self._dispatcher.begin()
        self._attend()

    def finish(self, task: Task, disposition: Disposition) -> None:
        """A sender, on the loop's thread, is done with a command."""
        if not self._results:
            self._settle_at = time.monotonic() + LINGER
            self._loop.call_later(LINGER, _nothing)
        self._results.append((task, disposition))

    def _attend(self) -> None:
        """Makes the loop look at what has changed; from any thread."""
        self._attention = True
        self._fibers.soon(_nothing)

    def drain(self) -> None:
        """Takes nothing new, finishes what senders hold, settles, closes; then the thread ends."""
        self._dispatcher.drain()
        self._attend()

    def halt(self) -> None:
        """Ends the loop now; what is unacked goes back to its queue."""
        self._stop()

    def join(self, timeout: float) -> bool:
        """Whether the thread ended within ``timeout`` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def running(self) -> bool:
        """Whether the loop's thread lives."""
        return self._thread.is_alive()

    @property
    def silent_for(self) -> float:
        """Seconds since the loop last turned."""
        return time.monotonic() - self._ticked

    def status(self) -> dict[str, object]:
        """Each component as people and probes read it: "ok" or what is wrong."""
        holds = self._dispatcher.holds()
        publisher = (
            self._publisher.trouble
            or self._vanished
            or ("" if self._publisher.ready else self._publish_link.trouble or "opening")
        )
        if self._publish_link.blocked:
            publisher = "blocked by the broker (memory or disk alarm)"
        refused = self._publisher.set_aside
        if refused and not publisher:
            publisher = refused if self._publisher.stuck else f"ok, but {refused}"
        consumer = "" if self._consumer.ready else self._consume_link.trouble or "opening"
        return {
            "consumer": consumer or "ok",
            "publisher": publisher or "ok",
            "breaker": _breakers(holds.breakers),
            "throttle": "throttled" if holds.throttled else "ok",
            "drain": "draining" if self._dispatcher.draining else "ok",
            "start": "ok" if self._begun else "starting",
        }

    def in_hand(self) -> int:
        """Commands in senders' hands."""
        return self._dispatcher.in_hand()

    def unsettled(self) -> int:
        """Commands that wait for their settlement."""
        return len(self._desk)

    # -- the loop's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._fibers.start()
            self._publish_link.connect()
            self._consume_link.connect()
            self._tick()
            with gathered() as self._write_log:
                while not self._stopped:
                    self._fibers.turn()
                    self._end_turn()
            self._fibers.close()
        except BaseException as error:  # noqa: BLE001  # without this the process would stay and do nothing
            self._fail(error)

    def _guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            try:
                callback(*args)
            except Exception as error:  # noqa: BLE001  # pika would swallow it or lose the thread
                self._fail(error)

        return guarded

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            self._log.error("broker.loop_failed", exc_info=error)
        self._stop()

    def _stop(self) -> None:
        self._stopped = True
        self._fibers.soon(_nothing)

    def _end_turn(self) -> None:
        """What was brought leaves together: outcomes in one write, acks in few frames."""
        if self._results and (time.monotonic() >= self._settle_at or not self._dispatcher.in_hand()):
            self._take_results()
        if self._attention:
            self._attention = False
            self._regulate()
        if self._consumer.to_flush and not self._dispatcher.settling:  # in a drain, after consumption has ended
            self._consumer.flush()

    def _tick(self) -> None:
        self._loop.call_later(TICK, self._guard(self._tick))
        now = time.monotonic()
        self._ticked = now
        self._write_log()
        self._attention = True
        self._publisher.tick(now)
        self._publish_link.expect(self._publisher.ready, now)
        self._consume_link.expect(self._consumer.ready, now)
        self._consumer.tick(now)
        if now >= self._look_at and self._publisher.ready and self._looking is None:
            self._look_at = now + LOOK_EVERY
            self._look()
        if now >= self._tell_at:
            self._tell_at = now + TELL_EVERY
            self._tell_lanes()
        if self._dispatcher.draining:
            self._drain()

    def _tell_lanes(self) -> None:
        """What costs too much to report with every delivery."""
        for lane, acks in self._consumer.acks.items():
            self._watch.acked(lane, acks - self._acks_told[lane])
            self._acks_told[lane] = acks
            self._watch.oldest(lane, self._desk.oldest(lane))
            self._watch.waiting(lane, self._consumer.waiting[lane])

    # -- links ------------------------------------------------------------------------------------------------------

    def _publish_up(self, connection: Any) -> None:
        self._prepare(
            connection, self._publish_link, lambda: self._publisher.open(connection, self._publish_link, self._changed)
        )

    def _consume_up(self, connection: Any) -> None:
        self._prepare(connection, self._consume_link, lambda: self._consumer.open(connection, self._consume_link))

    def _prepare(self, connection: Any, link: Link, then: Callable[[], None]) -> None:
        """Both links declare the topology: each may come back alone after a queue or exchange was deleted."""

        def done(wrong: str | None) -> None:
            if wrong is None:
                then()
            else:
                link.reconnect(f"topology: {wrong} (see `qris-expire topology`)")

        Declaring(connection, self._plan.topology, declare=self._plan.declare, on_done=done, guard=self._guard)

    def _look(self) -> None:
        """Notices what vanished while we are connected, and declares it again where that is ours to do."""
        self._looking = looking = object()

        def done(wrong: str | None) -> None:
            if self._looking is not looking:
                return  # of a connection that is gone
            self._looking = None
            if wrong is None:
                self._vanished = ""
            elif look.code == MISSING:
                if wrong != self._vanished:
                    self._log.error("topology.vanished", reason=wrong)
                self._vanished = wrong
                if self._plan.declare:
                    self._declare_again()

        look = Declaring(
            self._publish_link.connection,
            self._plan.topology,
            declare=False,
            on_done=done,
            guard=self._guard,
        )

    def _declare_again(self) -> None:
        def done(wrong: str | None) -> None:
            self._look_at = 0.0 if wrong is None else self._look_at  # and `status` says that all is there

        connection = self._publish_link.connection
        Declaring(connection, self._plan.topology, declare=True, on_done=done, guard=self._guard)

    def _publish_down(self, _reason: str) -> None:
        self._publisher.down()
        self._withdraw()
        self._looking = None
        self._vanished = ""
        self._lost = True
        self._changed()

    def _consume_down(self, _reason: str) -> None:
        self._consumer.down()
        self._withdraw()
        self._lost = True
        self._changed()

    def _withdraw(self) -> None:
        """Copies of commands that the broker has taken back: it gives them to somebody, who would not know of another
        one in a queue. Outcomes are published all the same, since they say what happened."""
        for publication in self._publisher.withdraw(_copy_of_an_orphan):
            task, _ = publication.settles
            self._desk.settle(task, TakenBack())
            self._left(task.delivery, TakenBack())

    def _changed(self) -> None:
        self._attention = True

    def _refused(self, reason: str, action: str) -> None:
        if not self._connected_once:
            self.refused = reason, action

    # -- deliveries and results -------------------------------------------------------------------------------------

    def _delivered(self, lane: str, channel: int, _: Any, method: Any, properties: Any, body: bytes) -> None:
        tag, redelivered = Tag(channel, method.delivery_tag), method.redelivered
        delivery = receive(
            lane,
            body,
            properties,
            redelivered=redelivered,
            epoch=self._clock.epoch(),
            monotonic=self._clock.monotonic(),
        )
        arrival = self._desk.deliver(delivery, tag)
        match arrival.take:
            case Take.WORK:
                assert arrival.task is not None
                if delivery.trace is not None:
                    self._tracing.begin(delivery)
                if not redelivered and COPY_ID not in delivery.headers:
                    self._watch.received(lane)
                    if delivery.published_at is None:
                        self._watch.undated(lane)
                if arrival.known is not None:
                    self.finish(arrival.task, arrival.known)
                else:
                    self._dispatcher.offer(arrival.task)
            case Take.JOINED:
                self._log.info("delivery.joined", **_named(delivery))
            case Take.SETTLED:
                self._log.info(
                    "delivery.settled_before", command_id=delivery.command_id, trace_id=delivery.trace_id, lane=lane
                )
                self._consumer.settle(tag)
            case _:
                assert_never(arrival.take)

    def _take_results(self) -> None:
        publications = list[Publication[tuple[Task, Disposition]]]()
        while self._results:
            task, disposition = self._results.popleft()
            if isinstance(disposition, GiveBack) and (self._dispatcher.settling or not self._publisher.ready):
                self._give_back(task)
            else:
                publications += self._settle(task, disposition)
        self._publisher.publish(*publications)

    def _settle(self, task: Task, disposition: Disposition) -> list[Publication[tuple[Task, Disposition]]]:
        """Carries out what the desk says, but for what it wants published."""
        orders = self._desk.settle(task, disposition)
        if orders.taken_back:
            self._left(task.delivery, TakenBack())
        if orders.again:
            self._dispatcher.offer(task)
        for tag in orders.reject:
            self._loop.call_later(REJECT_AFTER, self._guard(lambda tag=tag: self._consumer.reject(tag)))
        return [Publication(message, (task, disposition)) for message in orders.publish]

    def _give_back(self, task: Task) -> None:
        """To the end of its lane, as a copy that carries what is known of its calls: no delivery is counted against it,
        and no call is suspected that was never made. Without a way to publish it stays here; in a drain, it goes back
        to its place in the queue. While we still consume in a drain, it waits: its copy would come to us."""
        if self._dispatcher.settling:
            self._dispatcher.offer(task)
        elif self._publisher.ready:
            self._publisher.publish(*self._settle(task, GiveBack()))
        elif self._dispatcher.draining:
            for tag in self._desk.abandon(task):
                self._consumer.give_back(tag)
            self._left(task.delivery, GiveBack())
        else:
            self._dispatcher.offer(task)

    def _confirmed(self, publication: Publication[tuple[Task, Disposition]]) -> None:
        message, delivery = publication.message, publication.settles[0].delivery
        if delivery.trace is not None:
            took = time.monotonic() - publication.published_at
            message_id = message.properties["message_id"]
            self._tracing.published(delivery, message.exchange, message.routing_key, message_id, took)
        settled = self._desk.confirmed(*publication.settles)
        if settled is not None:
            for tag in settled.tags:
                self._consumer.settle(tag)
            self._count(settled)

    def _not_taken(self, publication: Publication[tuple[Task, Disposition]], why: str) -> bool:
        """The broker closes the channel on a message that settles a command. The command waits, since the reason may
        pass, or the broker parks it: for that it needs no message from us. Only a topology of our own is known to park
        what is rejected."""
        task, _ = publication.settles
        waits = publication.tries < PARK_AFTER and self._publisher.refused < PARK_BEYOND
        if waits or not self._plan.declare:
            return False
        for tag in self._desk.park(task):
            self._consumer.park(tag)
        self._log.error(
            "command.parked",
            **_named(task.delivery),
            reason=f"the broker refuses {named(publication.message)}: {why}",
            action="remove that reason, then redrive it: qris-expire dead redrive",
        )
        return True

    def _left(self, delivery: Delivery, disposition: Disposition, seconds: float | None = None) -> None:
        """The command has left this process."""
        tell_fate(self._log, delivery, disposition, seconds)
        if delivery.trace is not None:
            self._tracing.end(delivery, disposition)

    def _count(self, settled: Settled) -> None:
        delivery, lane = settled.task.delivery, settled.task.lane
        seconds = self._clock.monotonic() - delivery.arrived
        self._watch.settled(lane, seconds)
        self._left(delivery, settled.disposition, seconds)
        match settled.disposition:
            case Report(outcome):
                now = self._clock.epoch()
                self._watch.outcome(lane, outcome.status, outcome.reason, now - delivery.since, now)
                if outcome.dead_lettered:
                    self._watch.dead_letter(outcome.reason)
            case Delay():
                self._watch.delayed_retry(lane)
            case GiveBack() | Hold() | TakenBack() | Crashed():
                pass
            case _:
                assert_never(settled.disposition)

    # -- holding and draining ----------------------------------------------------------------------------------------

    def _regulate(self) -> None:
        """Does what the dispatcher wants, and reports the state."""
        self._tell()
        wishes = self._dispatcher.look(ready=self._publisher.ready, shared=self._consumer.shared)
        self._consumer.pause(wishes.paused)
        for lane, count in wishes.fetch.items():
            self._consumer.fetch(lane, count, lambda each=lane: self._dispatcher.fetched(each))  # type: ignore[misc]
        for task in wishes.give_back:
            self._give_back(task)

    def _tell(self) -> None:
        watch, holds = self._watch, self._dispatcher.holds()
        for lane, state in holds.breakers.items():
            watch.breaker(lane, int(state))
        watch.paused("breaker", holds.breaker is not State.CLOSED)
        watch.paused("throttled", holds.throttled)
        watch.paused("broker_blocked", self._publish_link.blocked)
        watch.paused("draining", self._dispatcher.draining)
        held_for = None if holds.until is None else holds.until - self._clock.monotonic()
        watch.held_until(None if held_for is None else self._clock.epoch() + max(0.0, held_for))
        connected = self._publisher.ready and self._consumer.ready
        if connected and not self._connected:
            if self._connected_once and self._lost:  # else a pause is over: the broker answers the consumers again
                watch.broker_reconnected()
            if self._lost or not self._connected_once:
                self._log.info("broker.connected", again=self._connected_once)
            self._lost = False
            self._connected_once = True
            self.refused = None  # by another host of the list, or before somebody repaired it
        self._connected = connected
        watch.broker_connected(connected)
        for lane, state in holds.breakers.items():
            before, self._probes[lane] = self._probes[lane], holds.probes.get(lane, self._probes[lane])
            if state is State.CLOSED:
                self._probes[lane] = None
                if before is not None:
                    self._log.warning("breaker.closed", lane=lane)
            elif self._probes[lane] != before:
                event = "breaker.opened" if before is None else "breaker.probe_failed"
                self._log.warning(event, lane=lane, next_probe_in=holds.cooldowns[lane])

    def _drain(self) -> None:
        if self._closed_at is not None:
            closed = self._publish_link.closed and self._consume_link.closed and self._fleet.closed
            # Everything is confirmed and every ack written: a broker that does not answer the close is not waited for.
            if closed or time.monotonic() - self._closed_at > CLOSE_SECONDS:
                self._stop()
            return
        held = self._dispatcher.in_hand() or self._dispatcher.waiting() or self._results
        if self._dispatcher.settling or held or not self._publisher.idle:
            return
        self._closed_at = time.monotonic()
        self._consumer.flush()
        self._consume_link.close()
        self._publish_link.close()
        self._fleet.close()


def _named(delivery: Delivery) -> dict[str, str | None]:
    """What finds a command in the log."""
    return {"command_id": delivery.command_id, "trace_id": delivery.trace_id, "lane": delivery.lane}


def _copy_of_an_orphan(publication: Publication[tuple[Task, Disposition]]) -> bool:
    task, disposition = publication.settles
    return task.orphaned and isinstance(disposition, (Delay, GiveBack))


def _nothing() -> None:
    """The loop turns."""


def _breakers(states: Mapping[str, State]) -> str:
    """ "ok", or which lanes are not closed."""
    broken = {lane: state for lane, state in states.items() if state is not State.CLOSED}
    return ", ".join(f"{lane} {state.name.lower().replace('_', '-')}" for lane, state in broken.items()) or "ok"
