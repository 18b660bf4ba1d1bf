"""Names and arguments of everything at the broker: other programs rely on them."""

from __future__ import annotations

import json

import pytest

from worker.core.topology import (
    LOOKED_AT_LIMIT,
    Binding,
    Exchange,
    Names,
    QueueType,
    Topology,
    definitions,
    topology,
)

DEAD_LETTERED = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}


def arguments(of: Topology) -> dict[str, dict[str, str | int]]:
    return {queue.name: dict(queue.arguments) for queue in of.queues}


def test_names_are_the_contract_s() -> None:
    """Every name is the prefix and a fixed rest."""

    names = Names("p")

    assert (names.commands, names.outcomes, names.unrouted, names.dead) == (
        "p.commands",
        "p.outcomes",
        "p.outcomes.unrouted",
        "p.dead",
    )
    assert (names.queue("sweep"), names.retry("sweep", 30)) == ("p.sweep", "p.sweep.retry.30")


def test_exchanges() -> None:
    """Commands are routed directly, outcomes by topic with an alternate, dead letters to all who listen."""

    assert {exchange.name for exchange in topology("p", "quorum", ()).exchanges} == {
        "p.commands",
        "p.outcomes",
        "p.outcomes.unrouted",
        "p.dead",
        "p.fleet",
    }
    made = {exchange.name: exchange for exchange in topology("p", "quorum", ()).exchanges}
    assert made["p.commands"] == Exchange("p.commands", "direct")
    assert made["p.outcomes"] == Exchange("p.outcomes", "topic", {"alternate-exchange": "p.outcomes.unrouted"})
    assert made["p.outcomes.unrouted"].type == made["p.dead"].type == made["p.fleet"].type == "fanout"


def test_bindings() -> None:
    """Each lane is bound by its name; what nobody asked for and what is dead have a queue."""

    assert set(topology("p", "quorum", (30,)).bindings) == {
        Binding("p.commands", "p.cancellation", "cancellation"),
        Binding("p.commands", "p.sweep", "sweep"),
        Binding("p.outcomes.unrouted", "p.outcomes.unrouted"),
        Binding("p.dead", "p.dead"),
    }


def test_quorum_queues() -> None:
    """Quorum lanes dead-letter a command after 50 deliveries and lose nothing on the way."""

    made = arguments(topology("p", "quorum", (30, 300)))

    assert set(made) == {
        "p.cancellation",
        "p.cancellation.retry.30",
        "p.cancellation.retry.300",
        "p.sweep",
        "p.sweep.retry.30",
        "p.sweep.retry.300",
        "p.outcomes.unrouted",
        "p.dead",
        "p.fleet.orders",
    }
    assert made["p.fleet.orders"] == {"x-queue-type": "quorum", "x-delivery-limit": LOOKED_AT_LIMIT}
    assert made["p.sweep"] == {
        "x-queue-type": "quorum",
        "x-delivery-limit": 50,
        "x-dead-letter-exchange": "p.dead",
        **DEAD_LETTERED,
    }
    assert made["p.sweep.retry.300"] == {
        "x-queue-type": "quorum",
        "x-message-ttl": 300_000,
        "x-dead-letter-exchange": "p.commands",
        "x-dead-letter-routing-key": "sweep",
        **DEAD_LETTERED,
    }
    assert made["p.dead"] == made["p.outcomes.unrouted"]
    assert made["p.dead"] == {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}


def test_classic_queues_have_only_what_classic_knows() -> None:
    """No delivery limit and no dead-letter strategy on classic queues."""

    made = arguments(topology("p", "classic", (30,)))

    assert made["p.sweep"] == {"x-queue-type": "classic", "x-dead-letter-exchange": "p.dead"}
    assert made["p.sweep.retry.30"] == {
        "x-queue-type": "classic",
        "x-message-ttl": 30_000,
        "x-dead-letter-exchange": "p.commands",
        "x-dead-letter-routing-key": "sweep",
    }
    assert made["p.dead"] == {"x-queue-type": "classic"}


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
def test_nothing_refers_to_what_does_not_exist(queue_type: QueueType) -> None:
    """Every exchange and queue that is referred to is declared, and before the bindings."""

    made = topology("p", queue_type, (1, 2))
    exchanges = {exchange.name for exchange in made.exchanges}

    assert {binding.exchange for binding in made.bindings} <= exchanges
    assert {binding.queue for binding in made.bindings} <= {queue.name for queue in made.queues}
    letters = {queue.arguments.get("x-dead-letter-exchange") for queue in made.queues} - {None}
    assert letters <= exchanges


def test_definitions_say_the_same() -> None:
    """The export has the form of definitions.json, everything durable and in the virtual host."""

    made = topology("p", "quorum", (30,))

    exported = json.loads(json.dumps(definitions(made, "/payments")))

    assert set(exported) == {"exchanges", "queues", "bindings"}
    assert all(each["vhost"] == "/payments" for part in exported.values() for each in part)
    assert all(each["durable"] for each in exported["exchanges"] + exported["queues"])
    assert {each["name"]: each["arguments"] for each in exported["queues"]} == arguments(made)
    assert {(each["source"], each["destination"], each["routing_key"]) for each in exported["bindings"]} == {
        (binding.exchange, binding.queue, binding.routing_key) for binding in made.bindings
    }
