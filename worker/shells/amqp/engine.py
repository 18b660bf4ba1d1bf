"""What comes from the broker is worked on and settled: the loop of one process, in a thread of its own.

Everything here runs on that thread, which is the senders' too, but `begin`, `drain`, `halt` and what only reads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
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
from worker.shells.amqp.broker import Broker
from worker.shells.amqp.fleet import FleetLink
from worker.shells.amqp.publisher import Publication, named
from worker.shells.fibers import Fibers
from worker.shells.logs import gathered
from worker.shells.telemetry import tell_fate
from worker.shells.tracing import Tracing

TICK: Final = 0.1
TELL_EVERY: Final = 1.0  # seconds between two looks at all that is in hand; no scrape is more frequent
CLOSE_SECONDS: Final = 3.0
PARK_AFTER: Final = 2
PARK_BEYOND: Final = 8
"""A command whose outcome or next round the broker refuses so often, or beside so many others, is parked: it holds a
place of the prefetch window, and a window full of them would stop the lane."""
REJECT_AFTER: Final = 1.0  # a command that crashes senders must not do so as fast as the broker redelivers it


Order = tuple[Task, Disposition]
"""A command, and what became of it."""


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


class Engine:
    """Deliveries in, acks out. An ack is sent for one reason only: everything that settles it is confirmed.

    ``connect`` makes the broker, and is given the engine, whose methods the broker calls. ``parks``: the broker moves
    what is rejected to the dead letters, which only a topology of our own is known to do.
    """

    def __init__(
        self,
        connect: Callable[[Engine], Broker[Order]],
        desk: Desk,
        dispatcher: Dispatcher,
        *,
        fibers: Fibers,
        watch: Watch,
        clock: Clock,
        tracing: Tracing,
        fleet: FleetLink,
        parks: bool,
    ) -> None:
        self._broker = connect(self)
        self._publisher = self._broker.publisher
        self._consumer = self._broker.consumer
        self._desk = desk
        self._dispatcher = dispatcher
        self._fibers = fibers
        self._watch = watch
        self._clock = clock
        self._tracing = tracing
        self._fleet = fleet
        self._parks: Final = parks
        self._log = structlog.get_logger().bind()  # bound once: the lazy proxy would bind at every line
        self._thread = threading.Thread(target=self._run, name="broker", daemon=True)
        self._begun = False
        self._stopped = False
        self._attention = True
        self._results: deque[Order] = deque()
        self._rejects: deque[tuple[float, Tag]] = deque()
        """What has crashed its sender, and when it is rejected."""
        self._ticked = time.monotonic()
        self._tell_at = 0.0
        self._write_log: Callable[[], None] = _nothing
        self._acks_told = dict.fromkeys(LANES, 0)
        self._probes: dict[str, float | None] = dict.fromkeys(LANES)
        """When the next probe of a lane whose breaker is not closed goes out, as the log was told."""
        self._closed_at: float | None = None
        self.failure: BaseException | None = None
        """Set when the loop's thread ended by an exception: the process must end too."""

    # -- from any thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connects. Nothing is handed to senders before `begin`."""
        self._thread.start()

    def begin(self) -> None:
        """Senders may start."""
        self._begun = True
        self._dispatcher.begin()
        self._attend()

    def finish(self, task: Task, disposition: Disposition) -> None:
        """A sender, on the loop's thread, is done with a command."""
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
        return {
            **self._broker.status(),
            "breaker": _breakers(holds.breakers),
            "throttle": "throttled" if holds.throttled else "ok",
            "drain": "draining" if self._dispatcher.draining else "ok",
            "start": "ok" if self._begun else "starting",
        }

    @property
    def refused(self) -> tuple[str, str] | None:
        """Why the broker refused our login before it ever took it, and what to do."""
        return self._broker.refused

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
            self._broker.connect()
            self._tick()
            with gathered() as self._write_log:
                while not self._stopped:
                    self._fibers.turn()
                    self._end_turn()
            self._fibers.close()
        except BaseException as error:  # noqa: BLE001  # without this the process would stay and do nothing
            self._fail(error)

    def guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        """See `Owner`."""

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
        if self._results:
            self._take_results()
        if self._attention:
            self._attention = False
            self._regulate()
        if self._consumer.to_flush and not self._dispatcher.settling:  # in a drain, after consumption has ended
            self._consumer.flush()

    def _tick(self) -> None:
        self._fibers.loop.call_later(TICK, self.guard(self._tick))
        now = time.monotonic()
        self._ticked = now
        self._write_log()
        self._attention = True
        self._broker.tick(now)
        self._reject()
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

    # -- deliveries and results -------------------------------------------------------------------------------------

    def channel_lost(self, channel: int) -> None:
        """The broker has taken back what this channel held."""
        self._desk.channel_lost(channel)

    def disconnected(self) -> None:
        """A connection is gone. Copies of commands that the broker has taken back are not published any more: it gives
        the commands to somebody, who would not know of another one in a queue. Outcomes are published all the same,
        since they say what happened."""
        for publication in self._publisher.withdraw(_copy_of_an_orphan):
            self._drop(publication)
        self.changed()

    def not_again(self, publication: Publication[Order]) -> bool:
        """Whether a message that was sent before is not to be sent again, for the same reason."""
        unwanted = _copy_of_an_orphan(publication)
        if unwanted:
            self._drop(publication)
        return unwanted

    def _drop(self, publication: Publication[Order]) -> None:
        task, _ = publication.settles
        self._desk.settle(task, TakenBack())
        self._left(task.delivery, TakenBack())

    def changed(self) -> None:
        """The state of the broker is another."""
        self._attention = True

    def delivered(self, lane: str, channel: int, _: Any, method: Any, properties: Any, body: bytes) -> None:
        """The broker hands over a message."""
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
        publications = list[Publication[Order]]()
        while self._results:
            task, disposition = self._results.popleft()
            if isinstance(disposition, GiveBack) and (self._dispatcher.settling or not self._publisher.ready):
                self._give_back(task)
            else:
                publications += self._settle(task, disposition)
        self._publisher.publish(*publications)

    def _settle(self, task: Task, disposition: Disposition) -> list[Publication[Order]]:
        """Carries out what the desk says, but for what it wants published."""
        orders = self._desk.settle(task, disposition)
        if orders.taken_back:
            self._left(task.delivery, TakenBack())
        if orders.again:
            self._dispatcher.offer(task)
        self._rejects.extend((self._clock.monotonic() + REJECT_AFTER, tag) for tag in orders.reject)
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

    def confirmed(self, publication: Publication[Order]) -> None:
        """The broker has a message."""
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

    def not_taken(self, publication: Publication[Order], why: str) -> bool:
        """The broker closes the channel on a message that settles a command. The command waits, since the reason may
        pass, or the broker parks it: for that it needs no message from us."""
        task, _ = publication.settles
        waits = publication.tries < PARK_AFTER and self._publisher.refused < PARK_BEYOND
        if waits or not self._parks:
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

    def _reject(self) -> None:
        """What has crashed its sender goes back as a failed delivery: after a while, or when we consume no more."""
        leaving = self._dispatcher.draining and not self._dispatcher.settling
        while self._rejects and (leaving or self._clock.monotonic() >= self._rejects[0][0]):
            self._consumer.reject(self._rejects.popleft()[1])

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
        watch.paused("draining", self._dispatcher.draining)
        held_for = None if holds.until is None else holds.until - self._clock.monotonic()
        watch.held_until(None if held_for is None else self._clock.epoch() + max(0.0, held_for))
        self._broker.tell()
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
            closed = self._broker.closed and self._fleet.closed
            # Everything is confirmed and every ack written: a broker that does not answer the close is not waited for.
            if closed or time.monotonic() - self._closed_at > CLOSE_SECONDS:
                self._stop()
            return
        held = self._dispatcher.in_hand() or self._dispatcher.waiting() or self._results
        if self._dispatcher.settling or held or not self._publisher.idle:
            return
        self._closed_at = time.monotonic()
        self._consumer.flush()
        self._broker.close()
        self._fleet.close()


def _named(delivery: Delivery) -> dict[str, str | None]:
    """What finds a command in the log."""
    return {"command_id": delivery.command_id, "trace_id": delivery.trace_id, "lane": delivery.lane}


def _copy_of_an_orphan(publication: Publication[Order]) -> bool:
    task, disposition = publication.settles
    return task.orphaned and isinstance(disposition, (Delay, GiveBack))


def _nothing() -> None:
    """The loop turns."""


def _breakers(states: Mapping[str, State]) -> str:
    """ "ok", or which lanes are not closed."""
    broken = {lane: state for lane, state in states.items() if state is not State.CLOSED}
    return ", ".join(f"{lane} {state.name.lower().replace('_', '-')}" for lane, state in broken.items()) or "ok"
