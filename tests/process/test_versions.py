"""Where RabbitMQ's versions differ: a worker on each of them. The oldest ones are looked at with --slow only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.altered import altered
from tests.brokers import VERSIONS, PrivateBroker
from tests.conftest import running
from tests.rabbit import Message, Rabbit, delete_topology, new_prefix
from tests.waiting import wait_until
from tests.worker_process import Producer, WorkerProcess, working
from worker.core.lanes import CANCELLATION, LANES, SWEEP
from worker.core.topology import LANE_DELIVERY_LIMIT, Names, topology
from worker.sandbox.simulator import Fault, Pattern, Script, Simulator

DRAINS = 8

CRASHES = """
import worker.app.expire as e
import worker.shells.amqp.engine as engine
engine.REJECT_AFTER = 0.01
parse = e.parse
def crash(body, *more):
    if b"poison" in body:
        raise RuntimeError("a sender crashes")
    return parse(body, *more)
e.parse = crash
"""


def _param(version: str) -> Any:
    return version if version == VERSIONS[-1] else pytest.param(version, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[_param(version) for version in VERSIONS])
def broker(request: pytest.FixtureRequest) -> Iterator[PrivateBroker]:
    """A private node of each version."""
    with running(PrivateBroker(version=request.param)) as broker:
        yield broker


@pytest.fixture
def prefix(broker: PrivateBroker) -> Iterator[str]:
    """Of this test's own on that node."""
    unique = new_prefix()
    yield unique
    delete_topology(broker.url, unique)


def taken(rabbit: Rabbit, queue: str) -> list[Message]:
    """All that the queue has."""
    return rabbit.consume(queue, rabbit.depth(queue), 30)


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_a_command_that_crashes_its_sender(broker: PrivateBroker, prefix: str, tmp_path: Path, kind: str) -> None:
    """It is parked by the broker after at most one crash more than the delivery limit, and the others are not harmed. A
    classic queue counts nothing: there, a command that comes back again and again harms nobody either."""
    ours = altered(tmp_path, CRASHES) | {"AMQP_QUEUE_TYPE": kind}
    with Simulator() as gateway, WorkerProcess(broker.url, prefix, gateway, tmp_path, **ours) as worker:
        worker.wait_ready()
        with Producer(broker.url, prefix) as producer:
            poison = producer.publish("poison")
            good = [producer.publish(f"good-{number}") for number in range(20)]
            if kind == "quorum":
                wait_until(lambda: producer.rabbit.depth(producer.names.dead), 60, "it is parked")
            for sent in good:
                assert producer.of(sent).fields["status"] == "expired"
            wait_until(lambda: len(worker.events("sender.crashed")) > 1, 30, "it comes back")
            worker.stop()
            crashes = len(worker.events("sender.crashed"))
            if kind == "quorum":
                (letter,) = producer.rabbit.look(producer.names.dead)
                assert letter.properties.message_id == poison.id
                assert letter.properties.headers["x-death"][0]["reason"] == "delivery_limit"
                assert crashes <= LANE_DELIVERY_LIMIT + 1
            else:
                assert producer.rabbit.depth(producer.names.queue(CANCELLATION)) == 1
            print(f"RabbitMQ {broker.ctl('version').strip()}, {kind}: {crashes} crashes")


def test_drains_count_no_delivery(broker: PrivateBroker, prefix: str, tmp_path: Path) -> None:
    """Rollout after rollout, what a worker held and did not call for comes back without a delivery counted against it
    and without a sign that somebody may have called for it."""
    slow = Script(latency=2.0)
    with (
        Simulator(slow) as gateway,
        WorkerProcess(broker.url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="2") as worker,
    ):
        worker.wait_ready()
        with Producer(broker.url, prefix) as producer:
            worker.stop()
            producer.publish_many([f"b-{number}" for number in range(30)], sweep_every=1, of=2)
            for drain in range(DRAINS):
                worker.start().wait_ready()
                worker.wait_for(lambda: worker.metrics()("in_flight") == 2, 30, f"it works, {drain}")
                worker.stop()
            left = [message for lane in LANES for message in taken(producer.rabbit, producer.names.queue(lane))]
            assert len(left) >= 30 - 3 * DRAINS
            assert {(message.properties.headers or {}).get("x-delivery-count", 0) for message in left} == {0}
            # The next worker must not take any of them for one that was called for.
            assert not any(message.redelivered for message in left)
            print(f"RabbitMQ {broker.ctl('version').strip()}: {DRAINS} drains, {len(left)} commands, none counted")


def test_a_single_active_consumer(broker: PrivateBroker, prefix: str, tmp_path: Path) -> None:
    """Lanes that let one consumer at a time have commands, which refuse single ones: after an outage the worker probes
    with what it consumes, the breaker closes, and all commands expire."""
    made = topology(prefix, "quorum", (1, 2))
    names = Names(prefix)
    with Rabbit(broker.url) as operator:
        operator.declare(made)
        for lane in LANES:
            operator.delete_queue(names.queue(lane))
            operator.declare_queue(names.queue(lane), "quorum", single_active_consumer=True, delivery_limit=50)
            operator.bind(names.queue(lane), names.commands, lane)
    settings = {
        "AMQP_DECLARE": "false",
        "BREAKER_FAILURES": "3",
        "BREAKER_COOLDOWN_SECONDS": "0.5",
        "BREAKER_MAX_COOLDOWN_SECONDS": "1",
        **altered(tmp_path, "import worker.app.dispatch as d; d.PAUSE_AFTER = 0.0; d.LONGEST_WAIT = 1.0"),
    }
    broken = Script(patterns=(Pattern("", (Fault(code="5009300", repeat=True),)),))
    with (
        Simulator(broken) as gateway,
        working(broker.url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="4", **settings) as (worker, producer),
    ):
        producer.publish_many([f"b-{number}" for number in range(60)], sweep_every=1, of=1)
        worker.wait_for(lambda: worker.events("breaker.opened"), 30, "the breaker opens")
        worker.wait_for(lambda: worker.metrics()("in_flight", lane=SWEEP) == 0, 30, "nothing is in hand")
        wait_until(lambda: producer.rabbit.depth(names.queue(SWEEP)) >= 50, 30, "what was held is back in its queue")
        gateway.replace(Script())
        producer.collect_all(60)
        worker.stop()
        assert sorted(outcome.command_id for outcome in producer.outcomes) == sorted(x.id for x in producer.published)
        assert {outcome.fields["status"] for outcome in producer.outcomes} == {"expired"}


def test_outcomes_that_may_not_be_published(broker: PrivateBroker, prefix: str, tmp_path: Path) -> None:
    """A topic permission that refuses one status: all other outcomes are published; the refused ones wait, named and
    with a worker that is ready, or are parked where they are many. With the permission they are published."""
    script = Script(patterns=(Pattern("^paid", (Fault(code="4049314", message="Paid", repeat=True),)),))
    with (
        Simulator(script) as gateway,
        working(broker.url, prefix, gateway, tmp_path) as (worker, producer),
    ):
        names = producer.names
        try:
            broker.ctl("set_topic_permissions", "guest", names.outcomes, r"^\w+\.expired$", ".*")
            refused = [producer.publish(f"paid-{number}") for number in range(20)]
            good = [producer.publish(f"good-{number}", "sweep") for number in range(200)]
            for sent in good:
                assert producer.of(sent).fields["status"] == "expired"
            wait_until(lambda: producer.rabbit.depth(names.dead) >= 8, 30, "the many are parked")
            worker.wait_for(
                lambda: "ok, but the broker refuses message" in worker.components().get("publisher", ""), 30, "named"
            )
            status, told = worker.get("/readyz")
            assert status == 200
            assert f"to {names.outcomes} cancellation.rejected" in json.loads(told)["components"]["publisher"]
            assert worker.events("publish.set_aside")
            parked = {line["command_id"] for line in worker.events("command.parked")}
            letters = {letter.properties.message_id for letter in producer.rabbit.look(names.dead)}
            assert parked == letters < {sent.id for sent in refused}
        finally:
            broker.ctl("clear_topic_permissions", "guest")
        for sent in refused:
            if sent.id not in parked:
                assert producer.of(sent).fields["reason"] == "paid"
        worker.stop()


def test_a_retry_queue_that_vanishes(broker: PrivateBroker, prefix: str, tmp_path: Path) -> None:
    """A queue that is deleted while nothing is published to it is noticed, and declared again."""
    ours = altered(tmp_path, "import worker.shells.amqp.broker as b; b.LOOK_EVERY = 0.5")
    with Simulator() as gateway, working(broker.url, prefix, gateway, tmp_path, **ours) as (worker, producer):
        queue = producer.names.retry(SWEEP, 2)
        producer.rabbit.delete_queue(queue)
        (line, *_) = worker.wait_for(lambda: worker.events("topology.vanished"), 30, "it is noticed")
        assert queue in line["reason"]
        wait_until(lambda: producer.rabbit.has_queue(queue), 30, "it is there again")
        worker.wait_ready()
        assert not worker.events("broker.reconnect"), "nobody had to connect again"
        worker.stop()
