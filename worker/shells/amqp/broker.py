"""Both connections of one process to the broker, and the topology behind them.

Two connections, because a memory alarm stops the broker from reading one that publishes, acks included. All of it
belongs to the loop's thread, but what only reads.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import structlog

from worker.core.lanes import LANES
from worker.core.topology import Names, Topology
from worker.shells.amqp import codec
from worker.shells.amqp.consumer import Consumer
from worker.shells.amqp.declaring import Declaring, prepare
from worker.shells.amqp.errors import MISSING
from worker.shells.amqp.link import Link, Parameters
from worker.shells.amqp.publisher import Publication, Publisher, PublisherWatch
from worker.shells.fibers import Loop

LOOK_EVERY: Final = 10.0
"""Seconds between two looks whether the topology is still there: a policy or an operator may delete a retry queue."""

log = structlog.get_logger()

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is consumed and published, and whether it is ours to declare. ``prefetch``: by lane."""

    names: Names
    topology: Topology
    declare: bool
    prefetch: dict[str, int]


class Owner(Protocol[S]):
    """Whoever settles what comes: the engine. All of it is called on the loop's thread."""

    def guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        """A callback whose exceptions end the loop: pika would swallow them."""

    def delivered(self, lane: str, channel: int, _: Any, method: Any, properties: Any, body: bytes) -> None: ...
    def confirmed(self, publication: Publication[S]) -> None: ...
    def not_taken(self, publication: Publication[S], why: str) -> bool: ...
    def not_again(self, publication: Publication[S]) -> bool: ...
    def channel_lost(self, channel: int) -> None: ...
    def disconnected(self) -> None: ...
    def changed(self) -> None: ...


class BrokerWatch(PublisherWatch, Protocol):
    """What is measured here."""

    def paused(self, reason: str, on: bool) -> None: ...
    def broker_connected(self, up: bool) -> None: ...
    def broker_reconnected(self) -> None: ...


class Broker(Generic[S]):
    """A connection to consume, and one to publish. Each declares the topology first: it may come back alone after a
    queue or an exchange was deleted. What a publication settles, `S`, only the owner knows."""

    def __init__(
        self, owner: Owner[S], plan: Plan, parameters: Parameters, *, loop: Loop, watch: BrokerWatch, rng: random.Random
    ) -> None:
        self._owner = owner
        self._plan = plan
        self._watch = watch
        self.publisher: Publisher[S] = Publisher(
            loop,
            watch,
            on_confirmed=owner.confirmed,
            on_refused=owner.not_taken,
            on_again=owner.not_again,
            guard=owner.guard,
        )
        self.consumer = Consumer(
            {lane: plan.names.queue(lane) for lane in LANES},
            plan.prefetch,
            on_delivery=owner.delivered,
            on_channel_lost=owner.channel_lost,
            guard=owner.guard,
        )

        def link(name: str, on_up: Callable[[Any], None], on_down: Callable[[str], None]) -> Link:
            return Link(
                name,
                loop,
                parameters,
                on_up=on_up,
                on_down=on_down,
                on_refused=self._refused,
                on_blocked=lambda _: self.publisher.flush(),
                guard=owner.guard,
                rng=rng,
            )

        self._publish_link = link("publish", self._publish_up, self._publish_down)
        self._consume_link = link("consume", self._consume_up, self._consume_down)
        self._look_at = 0.0
        self._looking: object = None
        self._vanished = ""
        """What was missing at the last look."""
        self._connected_once = False
        self._connected = False
        self._lost = False
        self.refused: tuple[str, str] | None = None
        """Why the broker refused our login before it ever took it, and what to do."""

    def connect(self) -> None:
        """Begins; from then on lost connections come back by themselves."""
        codec.tolerate()
        self._publish_link.connect()
        self._consume_link.connect()

    def close(self) -> None:
        """Closes both for good."""
        self._consume_link.close()
        self._publish_link.close()

    @property
    def closed(self) -> bool:
        """Whether both are closed for good."""
        return self._publish_link.closed and self._consume_link.closed

    def tick(self, now: float) -> None:
        """To be called some times a second, at this monotonic second: notices what does not come."""
        self.publisher.tick(now)
        self._publish_link.expect(self.publisher.ready, now)
        self._consume_link.expect(self.consumer.ready, now)
        self.consumer.tick(now)
        if now >= self._look_at and self.publisher.ready and self._looking is None:
            self._look_at = now + LOOK_EVERY
            self._look()

    def tell(self) -> None:
        """Reports the state of the connections."""
        self._watch.paused("broker_blocked", self._publish_link.blocked)
        connected = self.publisher.ready and self.consumer.ready
        if connected and not self._connected:
            if self._connected_once and self._lost:  # else a pause is over: the broker answers the consumers again
                self._watch.broker_reconnected()
            if self._lost or not self._connected_once:
                log.info("broker.connected", again=self._connected_once)
            self._lost = False
            self._connected_once = True
            self.refused = None  # by another host of the list, or before somebody repaired it
        self._connected = connected
        self._watch.broker_connected(connected)

    def status(self) -> dict[str, str]:
        """Consumer and publisher as people and probes read them: "ok" or what is wrong. From any thread."""
        publisher = (
            self.publisher.trouble
            or self._vanished
            or ("" if self.publisher.ready else self._publish_link.trouble or "opening")
        )
        if self._publish_link.blocked:
            publisher = "blocked by the broker (memory or disk alarm)"
        refused = self.publisher.set_aside
        if refused and not publisher:
            publisher = refused if self.publisher.stuck else f"ok, but {refused}"
        consumer = "" if self.consumer.ready else self._consume_link.trouble or "opening"
        return {"consumer": consumer or "ok", "publisher": publisher or "ok"}

    # -- connections --------------------------------------------------------------------------------------------------

    def _publish_up(self, connection: Any) -> None:
        link = self._publish_link
        self._prepare(connection, link, lambda: self.publisher.open(connection, link, self._owner.changed))

    def _consume_up(self, connection: Any) -> None:
        link = self._consume_link
        self._prepare(connection, link, lambda: self.consumer.open(connection, link))

    def _publish_down(self, _reason: str) -> None:
        self.publisher.down()
        self._looking = None
        self._vanished = ""
        self._lost = True
        self._owner.disconnected()

    def _consume_down(self, _reason: str) -> None:
        self.consumer.down()
        self._lost = True
        self._owner.disconnected()

    def _refused(self, reason: str, action: str) -> None:
        if not self._connected_once:
            self.refused = reason, action

    # -- the topology -------------------------------------------------------------------------------------------------

    def _declare(self, connection: Any, on_done: Callable[[str | None], None], *, declare: bool) -> Declaring:
        return Declaring(connection, self._plan.topology, declare=declare, on_done=on_done, guard=self._owner.guard)

    def _prepare(self, connection: Any, link: Link, then: Callable[[], None]) -> None:
        plan = self._plan
        prepare(connection, link, plan.topology, declare=plan.declare, guard=self._owner.guard, then=then)

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
                    log.error("topology.vanished", reason=wrong)
                self._vanished = wrong
                if self._plan.declare:
                    self._declare(self._publish_link.connection, declared, declare=True)

        def declared(wrong: str | None) -> None:
            if wrong is None:
                self._look_at = 0.0  # and `status` says that all is there

        look = self._declare(self._publish_link.connection, done, declare=False)
