"""Every exchange, queue and binding the worker relies on, as values. The names are public interface."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from worker.core.lanes import LANES

QueueType = Literal["quorum", "classic"]
Arguments = Mapping[str, str | int]

LANE_DELIVERY_LIMIT: Final = 50
"""A command that kills its process leaves the lane after so many tries, or it kills one after another."""

LOOKED_AT_LIMIT: Final = 1_000_000
"""RabbitMQ 4 drops a message after 20 returns by default, and looking at parked messages returns them."""


@dataclass(frozen=True, slots=True)
class Names:
    """The names under one prefix (``AMQP_PREFIX``)."""

    prefix: str

    @property
    def commands(self) -> str:
        """Direct exchange; the routing key is the lane."""
        return f"{self.prefix}.commands"

    @property
    def outcomes(self) -> str:
        """Topic exchange; the routing key is ``<lane>.<status>``."""
        return f"{self.prefix}.outcomes"

    @property
    def unrouted(self) -> str:
        """Alternate exchange of the outcomes, and the queue behind it: outcomes that nobody asked for."""
        return f"{self.prefix}.outcomes.unrouted"

    @property
    def dead(self) -> str:
        """Exchange and queue of the dead letters."""
        return f"{self.prefix}.dead"

    @property
    def identity(self) -> str:
        """Exchange of the sweeps that nothing is published to: its argument tells this broker from every other."""
        return f"{self.prefix}.identity"

    @property
    def fleet(self) -> str:
        """Fanout exchange by which the processes of the fleet speak to each other."""
        return f"{self.prefix}.fleet"

    @property
    def orders(self) -> str:
        """The queue where an operator's pause or limit rests: one message, the latest."""
        return f"{self.prefix}.fleet.orders"

    def member(self, name: str) -> str:
        """The exclusive queue of one process on the fleet's exchange."""
        return f"{self.prefix}.fleet.member.{name}"

    def leader(self, client: str, term: int) -> str:
        """The exclusive queue that makes its owner the leader of a fleet for a term."""
        return f"{self.prefix}.fleet.leader.{client}.{term}"

    def queue(self, lane: str) -> str:
        """The queue of a lane."""
        return f"{self.prefix}.{lane}"

    def retry(self, lane: str, seconds: int) -> str:
        """The queue where a command of the lane waits for a delayed round."""
        return f"{self.prefix}.{lane}.retry.{seconds}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable exchange."""

    name: str
    type: Literal["direct", "fanout", "topic"]
    arguments: Arguments = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue. Its arguments cannot change while it exists."""

    name: str
    arguments: Arguments


@dataclass(frozen=True, slots=True)
class Binding:
    """From an exchange to a queue."""

    exchange: str
    queue: str
    routing_key: str = ""


@dataclass(frozen=True, slots=True)
class Topology:
    """All of it, in the order in which it must be declared: exchanges, queues, bindings."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]


def topology(prefix: str, queue_type: QueueType, delays: Iterable[int]) -> Topology:
    """What must exist under ``prefix``; one retry queue per lane for each of ``delays``, in whole seconds, once."""
    names, fleet, delays = Names(prefix), fleet_topology(prefix, queue_type), tuple(dict.fromkeys(delays))
    exchanges = (
        Exchange(names.dead, "fanout"),
        Exchange(names.unrouted, "fanout"),
        Exchange(names.outcomes, "topic", {"alternate-exchange": names.unrouted}),
        Exchange(names.commands, "direct"),
        *fleet.exchanges,
    )
    parked = _limited(queue_type, LOOKED_AT_LIMIT)
    waiting = {**_limited(queue_type, LANE_DELIVERY_LIMIT), **_dead_lettering(queue_type, names.dead)}
    queues = [Queue(names.dead, parked), Queue(names.unrouted, parked), *fleet.queues]
    for lane in LANES:
        queues.append(Queue(names.queue(lane), waiting))
        queues += [Queue(names.retry(lane, seconds), _retry(queue_type, names, lane, seconds)) for seconds in delays]
    bindings = (
        Binding(names.dead, names.dead),
        Binding(names.unrouted, names.unrouted),
        *(Binding(names.commands, names.queue(lane), lane) for lane in LANES),
    )
    return Topology(exchanges, tuple(queues), bindings)


def fleet_topology(prefix: str, queue_type: QueueType) -> Topology:
    """The part of it that the fleet's connection needs."""
    names = Names(prefix)
    # Without a length of one: after a look at the old message a quorum queue of that length would drop the new one.
    orders = Queue(names.orders, _limited(queue_type, LOOKED_AT_LIMIT))
    return Topology((Exchange(names.fleet, "fanout"),), (orders,), ())


def definitions(topology: Topology, vhost: str) -> dict[str, list[dict[str, Any]]]:
    """The same in the form of RabbitMQ's ``definitions.json``: exchanges, queues and bindings, no users."""
    kept = {"durable": True, "auto_delete": False}
    return {
        "exchanges": [
            {"name": each.name, "vhost": vhost, "type": each.type, **kept, "internal": False}
            | {"arguments": dict(each.arguments)}
            for each in topology.exchanges
        ],
        "queues": [
            {"name": each.name, "vhost": vhost, **kept, "arguments": dict(each.arguments)} for each in topology.queues
        ],
        "bindings": [
            {"source": each.exchange, "vhost": vhost, "destination": each.queue, "destination_type": "queue"}
            | {"routing_key": each.routing_key, "arguments": {}}
            for each in topology.bindings
        ],
    }


def _limited(queue_type: QueueType, deliveries: int) -> dict[str, str | int]:
    limit = {} if queue_type == "classic" else {"x-delivery-limit": deliveries}
    return {"x-queue-type": queue_type, **limit}


def _retry(queue_type: QueueType, names: Names, lane: str, seconds: int) -> Arguments:
    # The time to live belongs to the queue: one per message would wait behind a longer one ahead of it.
    return {
        "x-queue-type": queue_type,
        "x-message-ttl": seconds * 1000,
        **_dead_lettering(queue_type, names.commands),
        "x-dead-letter-routing-key": lane,
    }


def _dead_lettering(queue_type: QueueType, exchange: str) -> dict[str, str | int]:
    if queue_type == "classic":  # knows only at-most-once
        return {"x-dead-letter-exchange": exchange}
    # At-least-once holds the message until the next queue has it; it demands reject-publish.
    return {
        "x-dead-letter-exchange": exchange,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
