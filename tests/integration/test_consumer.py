"""The consumer on a real broker: what it acks after a pause."""

import random
from collections.abc import Callable
from typing import Any

import pika
import pytest
from pika.adapters.select_connection import IOLoop

from tests.rabbit import Rabbit, new_prefix
from worker.core.settlement import Tag
from worker.sandbox.broker import PrivateBroker
from worker.shells.amqp.consumer import Consumer
from worker.shells.amqp.link import Link

pytestmark = pytest.mark.timeout(60)

MESSAGES = 500


class Session:
    """A consumer of one queue on a loop of its own, which pauses at the first delivery and goes on a little later."""

    def __init__(self, url: str, queue: str) -> None:
        self.loop = IOLoop()
        self.seen: set[bytes] = set()
        self.deliveries = 0
        self.remembered = {0}
        self.failure: Exception | None = None
        self.consumer = Consumer(
            {"lane": queue}, {"lane": MESSAGES}, on_delivery=self.take, on_channel_lost=lambda _: None, guard=self.guard
        )
        self.link = Link(
            "consume",
            self.loop,
            lambda: [pika.URLParameters(url)],
            on_up=lambda connection: self.consumer.open(connection, self.link),
            on_down=lambda _: self.consumer.down(),
            on_refused=lambda _: None,
            on_blocked=lambda _: None,
            guard=self.guard,
            rng=random.Random(),
        )

    def run(self) -> None:
        self.link.connect()
        self.loop.call_later(30, self.loop.stop)
        self.loop.start()
        self.link.close()
        self.loop.call_later(0.5, self.loop.stop)
        self.loop.start()
        self.loop.close()
        if self.failure is not None:
            raise self.failure

    def take(self, _lane: str, tag: Tag, _redelivered: bool, _properties: Any, body: bytes) -> None:
        self.deliveries += 1
        self.seen.add(body)
        self.consumer.settle(tag)
        if self.deliveries == 1:
            self.consumer.pause()
            self.loop.call_later(0.2, self.guard(self.consumer.resume))
        if len(self.seen) == MESSAGES:
            self.consumer.flush()
            (lane,) = self.consumer._lanes.values()
            self.remembered = lane.acks._sent
            self.loop.stop()

    def guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            try:
                callback(*args)
            except Exception as error:  # noqa: BLE001  # raised by `run`
                self.failure = error
                self.loop.stop()

        return guarded


def test_after_a_pause_acks_are_joined_again(private_broker: PrivateBroker) -> None:
    """Deliveries that pika gave back because they came after our cancel leave no gap that acks are remembered for."""

    private_broker.start()
    queue = f"{new_prefix()}.lane"
    with Rabbit(private_broker.url) as rabbit:
        rabbit.declare_queue(queue)
        channel = rabbit.plain_channel()
        for number in range(MESSAGES):
            channel.basic_publish("", queue, b"%d" % number)
        rabbit.depth(queue)
        session = Session(private_broker.url, queue)
        session.run()
        assert len(session.seen) == MESSAGES
        assert session.remembered == set()
        rabbit.delete_queue(queue)
