"""The publisher against a real broker: what counts as confirmed, and what a refused publication does to the others."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pika
import pytest

from tests.brokers import PrivateBroker
from tests.conftest import running
from tests.rabbit import Rabbit, new_prefix
from worker.core.delivery import Message
from worker.shells.amqp import publisher as publishing
from worker.shells.amqp.connection import new_loop
from worker.shells.amqp.link import Link
from worker.shells.amqp.publisher import Publication, Publisher
from worker.shells.fibers import Fibers


class Unwatched:
    """Nobody counts."""

    def confirm_took(self, seconds: float) -> None:
        """One more."""

    def unconfirmed(self, count: int) -> None:
        """So many."""


def bare(callback: Callable[..., None]) -> Callable[..., None]:
    """A guard that lets everything through."""
    return callback


class Publishing:
    """A publisher on its own connection and loop, and what became of its publications."""

    def __init__(self, url: str, exchange: str) -> None:
        self.exchange = exchange
        self.confirmed: list[str] = []
        self.connections = 0
        self.unwanted: set[str] = set()
        """What is not to be sent again."""
        self.fibers = Fibers(new_loop())
        self.publisher: Publisher[str] = Publisher(
            self.fibers.loop,
            Unwatched(),
            on_confirmed=lambda publication: self.confirmed.append(publication.settles),
            on_again=lambda publication: publication.settles in self.unwanted,
            guard=bare,
        )
        self.link = Link(
            "publish",
            self.fibers.loop,
            lambda: [pika.URLParameters(url)],
            on_up=self._up,
            on_down=lambda _: self.publisher.down(),
            on_refused=lambda *_: None,
            on_blocked=lambda _: None,
            guard=bare,
            rng=random.Random(),
        )

    def _up(self, connection: Any) -> None:
        self.connections += 1
        self.publisher.open(connection, self.link, lambda: None)

    def turn_until(self, fact: Callable[[], object], what: str) -> None:
        """Turns the loop until it is so; at most 20 s."""

        deadline = time.monotonic() + 20
        while not fact():
            assert time.monotonic() < deadline, f"not within 20 s: {what}"
            self.fibers.turn()

    def tick(self) -> None:
        """As the engine does, now and then."""
        self.publisher.tick(time.monotonic())
        self.fibers.loop.call_later(0.05, self.tick)

    def publish(self, text: str, key: str = "k", properties: Mapping[str, Any] | None = None, size: int = 0) -> None:
        """One message, whose id and (padded) body are `text`."""
        body = text.encode().ljust(size, b" ")
        message = Message(self.exchange, key, body, {"message_id": text, **(properties or {})})
        self.publisher.publish(Publication(message, text))


@contextmanager
def started(url: str, exchange: str) -> Iterator[Publishing]:
    """A publisher that is connected; closed at the end."""
    it = Publishing(url, exchange)
    it.fibers.start()
    it.tick()
    it.link.connect()
    it.turn_until(lambda: it.publisher.ready, "it is ready")
    yield it
    it.link.close()
    it.turn_until(lambda: it.link.closed, "it is closed")
    it.fibers.close()


@contextmanager
def declared(broker: PrivateBroker) -> Iterator[tuple[Rabbit, str]]:
    """An exchange of the type topic with a queue behind it, both of this name."""
    name = new_prefix()
    with Rabbit(broker.url) as operator:
        operator.channel.exchange_declare(name, "topic", durable=True)
        operator.declare_queue(name, "classic")
        operator.bind(name, name, "#")
        yield operator, name
        operator.delete_queue(name)
        operator.delete_exchange(name)


@pytest.fixture(scope="module")
def narrow() -> Iterator[PrivateBroker]:
    """A broker that takes no frame beyond 8 KiB and no body beyond 64 KiB."""
    with running(PrivateBroker(config={"frame_max": "8192", "max_message_size": "65536"})) as broker:
        yield broker


def good(count: int) -> list[str]:
    return [f"good-{number}" for number in range(count)]


def test_a_link_that_is_closed_while_it_reconnects(private_broker: PrivateBroker) -> None:
    """The end of its connection comes after the link was closed for good, and is no error."""
    with declared(private_broker) as (_, exchange), started(private_broker.url, exchange) as it:
        it.link.reconnect("the broker is silent")
        it.link.close()
        assert not it.link.closed
        it.turn_until(lambda: it.link.closed, "the connection has ended")

        assert it.connections == 1


def test_a_return_is_of_the_message_that_it_brings_back(private_broker: PrivateBroker) -> None:
    """Of two with one id and address the first was routed, and is not confirmed yet, when the second comes back."""
    private_broker.start()
    name = new_prefix()
    with Rabbit(private_broker.url) as operator:
        operator.channel.exchange_declare(name, "direct")
        queues = (f"{name}.silent", f"{name}.seen")
        for queue in queues:
            operator.declare_queue(queue, "classic")
            operator.bind(queue, name, "k")
        silent = f'rabbit_misc:r(<<"/">>, queue, <<"{name}.silent">>)'
        process = f"begin {{ok, Queue}} = rabbit_amqqueue:lookup({silent}), amqqueue:get_pid(Queue) end"
        private_broker.ctl("eval", f"sys:suspend({process}).")
        with started(private_broker.url, name) as it:
            it.publish("routed", properties={"message_id": "same"})
            it.turn_until(lambda: operator.depth(f"{name}.seen") == 1, "the first one is routed")
            for queue in queues:
                operator.channel.queue_unbind(queue, name, "k")
            it.publish("returned", properties={"message_id": "same"})
            it.turn_until(lambda: it.publisher.trouble or it.confirmed, "the second one is back")
            private_broker.ctl("eval", f"sys:resume({process}).")
            it.turn_until(lambda: it.publisher.ready, "it is connected")
        for queue in queues:
            operator.delete_queue(queue)
        operator.delete_exchange(name)

    assert "returned" not in it.confirmed


@pytest.mark.parametrize("bad", [1, 40])
def test_a_topic_that_may_not_be_written(
    private_broker: PrivateBroker, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    """Publications whose routing key a topic permission refuses are set aside and named, and the others are confirmed;
    with the permission they are taken."""
    private_broker.start()
    monkeypatch.setattr(publishing, "ASIDE_FIRST", 0.3)
    refused = [f"bad-{number}" for number in range(bad)]
    with declared(private_broker) as (_, name):
        try:
            private_broker.ctl("set_topic_permissions", "guest", name, "^good$", ".*")
            with started(private_broker.url, name) as it:
                for number, text in enumerate(good(100)):
                    it.publish(text, "good")
                    if number < bad:
                        it.publish(refused[number], "bad")
                it.turn_until(lambda: len(it.confirmed) == 100, "the good ones are confirmed")
                assert sorted(it.confirmed) == sorted(good(100))
                it.turn_until(lambda: it.publisher.set_aside, "the bad ones are set aside")
                assert f"to {name} bad" in it.publisher.set_aside
                assert "403 ACCESS_REFUSED" in it.publisher.set_aside
                private_broker.ctl("clear_topic_permissions", "guest")
                it.turn_until(lambda: len(it.confirmed) == 100 + bad, "the bad ones are confirmed")
                assert (it.publisher.set_aside, it.publisher.idle) == ("", True)
                assert it.connections == 1, "a channel that was closed costs no connection"
        finally:
            private_broker.ctl("clear_topic_permissions", "guest")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"size": 70_000}, "406 PRECONDITION_FAILED - message size 70000"),
        ({"properties": {"headers": {"long": "x" * 9000}}}, "501 FRAME_ERROR"),
        ({"properties": {"correlation_id": "x" * 300}}, "it cannot be written as AMQP"),
        ({"properties": {"headers": {"what": object()}}}, "it cannot be written as AMQP"),
        ({"properties": {"user_id": "somebody-else"}}, "406 PRECONDITION_FAILED - user_id property"),
        ({"properties": {"headers": {"CC": "not a list"}}}, "406 PRECONDITION_FAILED"),
    ],
    ids=["body", "header", "long property", "no AMQP type", "user id", "CC"],
)
def test_one_that_the_broker_refuses_to_take(narrow: PrivateBroker, bad: dict[str, Any], reason: str) -> None:
    """A publication that closes the channel or the connection is set aside with the broker's reason, and all others are
    confirmed, those that were on their way beside it and those that come later."""
    with declared(narrow) as (_, name), started(narrow.url, name) as it:
        for text in good(10):
            it.publish(text)
        it.publish("bad", **bad)
        for text in good(20)[10:]:
            it.publish(text)
        it.turn_until(lambda: len(it.confirmed) == 20, "the good ones are confirmed")
        it.turn_until(lambda: it.publisher.set_aside, "the bad one is set aside")
        it.publish("late")
        it.turn_until(lambda: "late" in it.confirmed, "another one is confirmed")

        assert sorted(it.confirmed) == sorted([*good(20), "late"])
        assert f"message 'bad' to {name} k" in it.publisher.set_aside
        assert reason in it.publisher.set_aside
        assert len(it.publisher) == 1


def test_what_is_not_to_be_sent_again(narrow: PrivateBroker) -> None:
    """What was on its way when the channel was closed is sent again, one by one, but for what nobody wants any more."""
    with declared(narrow) as (operator, name), started(narrow.url, name) as it:
        it.unwanted = {"good-1", "good-3"}
        it.publish("bad", size=70_000)
        for text in good(5):
            it.publish(text)
        it.turn_until(lambda: it.publisher.set_aside, "the bad one is set aside")
        it.turn_until(lambda: it.publisher.idle, "all others are confirmed or dropped")

        assert it.confirmed == ["good-0", "good-2", "good-4"]
        assert operator.depth(name) == 3


def test_connections_that_an_operator_closes(private_broker: PrivateBroker) -> None:
    """A connection that is closed again and again for no fault of a publication sets none aside."""
    private_broker.start()
    with declared(private_broker) as (_, name), started(private_broker.url, name) as it:
        silent = f'rabbit_misc:r(<<"/">>, queue, <<"{name}">>)'
        process = f"begin {{ok, Queue}} = rabbit_amqqueue:lookup({silent}), amqqueue:get_pid(Queue) end"
        private_broker.ctl("eval", f"sys:suspend({process}).")
        it.publish("unconfirmed")
        for _again in range(3):
            before = it.connections
            close = f'[rabbit_networking:close_connection(Pid, "by an operator") || Pid <- {_BUT_THE_OLDEST}].'
            private_broker.ctl("eval", close)
            it.turn_until(partial(_is_connected_again, it, before), "it is connected again")
        private_broker.ctl("eval", f"sys:resume({process}).")
        it.turn_until(lambda: it.confirmed, "it is confirmed")

        assert it.publisher.set_aside == ""


def _is_connected_again(it: Publishing, before: int) -> bool:
    return it.connections > before and it.publisher.ready


_BUT_THE_OLDEST = "tl(lists:sort(rabbit_networking:connections()))"
"""The operator's own connection of the test came first."""
