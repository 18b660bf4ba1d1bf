"""The publisher against a real broker: what counts as confirmed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pika

from tests.brokers import PrivateBroker
from tests.rabbit import Rabbit, new_prefix
from tests.waiting import wait_until
from worker.core.delivery import Message
from worker.shells.amqp.connection import new_loop
from worker.shells.amqp.link import Link
from worker.shells.amqp.publisher import Publication, Publisher
from worker.shells.fibers import Fibers


class Unwatched:
    """Nobody counts."""

    def confirmed(self, seconds: float) -> None:
        """One more."""

    def unconfirmed(self, count: int) -> None:
        """So many."""


def bare(callback: Callable[..., None]) -> Callable[..., None]:
    """A guard that lets everything through."""
    return callback


def test_a_return_is_of_the_message_that_it_brings_back(private_broker: PrivateBroker) -> None:
    """Of two with one id and address the first was routed, and is not confirmed yet, when the second comes back."""
    private_broker.start()
    name, confirmed = new_prefix(), list[str]()
    fibers = Fibers(new_loop())
    publisher: Publisher[str] = Publisher(
        fibers.loop,
        Unwatched(),
        on_confirmed=lambda publication: confirmed.append(publication.settles),
        guard=bare,
    )

    def up(connection: Any) -> None:
        publisher.open(connection, link, lambda: None)

    link = Link(
        "publish",
        fibers.loop,
        lambda: [pika.URLParameters(private_broker.url)],
        on_up=up,
        on_down=lambda _: publisher.down(),
        on_refused=lambda _: None,
        on_blocked=lambda _: None,
        guard=bare,
        rng=random.Random(),
    )

    def turn_until(fact: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            fibers.turn()
            return fact()

        wait_until(look, 20, what)

    def publish(text: str) -> None:
        message = Message(name, "k", text.encode(), {"message_id": "same"})
        publisher.publish(Publication(message, text))

    with Rabbit(private_broker.url) as operator:
        operator.channel.exchange_declare(name, "direct")
        queues = (f"{name}.silent", f"{name}.seen")
        for queue in queues:
            operator.declare_queue(queue, "classic")
            operator.bind(queue, name, "k")
        silent = f'rabbit_misc:r(<<"/">>, queue, <<"{name}.silent">>)'
        process = f"begin {{ok, Queue}} = rabbit_amqqueue:lookup({silent}), amqqueue:get_pid(Queue) end"
        private_broker.ctl("eval", f"sys:suspend({process}).")
        fibers.start()
        link.connect()
        turn_until(lambda: publisher.ready, "it is ready")
        publish("routed")
        turn_until(lambda: operator.depth(f"{name}.seen") == 1, "the first one is routed")
        for queue in queues:
            operator.channel.queue_unbind(queue, name, "k")
        publish("returned")
        turn_until(lambda: bool(publisher.trouble or confirmed), "the second one is back")
        private_broker.ctl("eval", f"sys:resume({process}).")
        turn_until(lambda: publisher.ready, "it is connected")
        link.close()
        turn_until(lambda: link.closed, "it is closed")
        fibers.close()
        for queue in queues:
            operator.delete_queue(queue)
        operator.delete_exchange(name)

    assert "returned" not in confirmed
