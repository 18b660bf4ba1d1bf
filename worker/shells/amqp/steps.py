"""What declares a topology, or looks whether it is there: method calls in order, for either kind of connection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from worker.core.topology import Topology


class Step(NamedTuple):
    """One method call on a channel, and the object it is about."""

    subject: str
    method: str
    arguments: dict[str, Any]


def declarations(topology: Topology) -> Iterator[Step]:
    """Everything; what exists as it should stays."""
    for exchange in topology.exchanges:
        properties = {"exchange_type": exchange.type, "durable": True, "arguments": dict(exchange.arguments)}
        yield Step(f"exchange {exchange.name}", "exchange_declare", {"exchange": exchange.name, **properties})
    for queue in topology.queues:
        properties = {"durable": True, "arguments": dict(queue.arguments)}
        yield Step(f"queue {queue.name}", "queue_declare", {"queue": queue.name, **properties})
    for binding in topology.bindings:
        ends = {"exchange": binding.exchange, "queue": binding.queue, "routing_key": binding.routing_key}
        yield Step(f"binding {binding.exchange} → {binding.queue}", "queue_bind", ends)


def lookups(topology: Topology) -> Iterator[Step]:
    """Exchanges and queues, passively. Bindings cannot be looked at: AMQP has no passive form of them."""
    for exchange in topology.exchanges:
        yield Step(f"exchange {exchange.name}", "exchange_declare", {"exchange": exchange.name, "passive": True})
    for queue in topology.queues:
        yield Step(f"queue {queue.name}", "queue_declare", {"queue": queue.name, "passive": True})
