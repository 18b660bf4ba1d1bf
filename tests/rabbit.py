"""A small blocking AMQP client for the tests: what producers and readers of outcomes would do."""

import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit, urlunsplit

import pika
import pika.exceptions

from worker.core.topology import Names, Topology, topology

DELAYS_IN_TESTS = (1, 2, 3, 5, 30, 300, 1800)
"""The retry delays, in seconds, that the `prefix` fixture cleans up after; others are the test's own job."""


class Message(NamedTuple):
    """One message taken from a queue."""

    properties: Any
    body: bytes
    exchange: str
    key: str
    redelivered: bool


class Rabbit:
    """One connection, one channel in confirm mode, for one thread.

    Without heartbeats: a test may be busy with something else for longer than the broker would wait.
    """

    def __init__(self, url: str) -> None:
        parameters = pika.URLParameters(url)
        parameters.heartbeat = 0
        parameters.blocked_connection_timeout = 30
        self._connection = pika.BlockingConnection(parameters)
        self.channel = self._confirming_channel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Also when the broker has gone already."""
        with suppress(pika.exceptions.AMQPError):
            self._connection.close()

    def publish(self, exchange: str, key: str, body: bytes, **properties: Any) -> None:
        """Persistent and mandatory; returns when confirmed, else raises UnroutableError or NackError."""
        made = pika.BasicProperties(**{"delivery_mode": 2, **properties})
        self.channel.basic_publish(exchange, key, body, made, mandatory=True)

    def publish_many(self, exchange: str, messages: Iterable[tuple[str, bytes, dict[str, Any]]]) -> None:
        """Many (routing key, body, properties), persistent; returns when all are confirmed, within a minute.

        Far faster than one confirm after the other. pika's blocking channel has no such mode of its own.
        """
        channel = self._connection.channel()
        unconfirmed: set[int] = set()

        def settled(frame: Any) -> None:
            tag, method = frame.method.delivery_tag, frame.method
            assert method.NAME == "Basic.Ack", f"the broker refused message {tag}"
            unconfirmed.difference_update(range(min(unconfirmed), tag + 1) if method.multiple else (tag,))

        channel._impl.confirm_delivery(settled)
        for number, (key, body, properties) in enumerate(messages, start=1):
            unconfirmed.add(number)
            channel.basic_publish(exchange, key, body, pika.BasicProperties(delivery_mode=2, **properties))
        deadline = time.monotonic() + 60
        while unconfirmed:
            assert time.monotonic() < deadline, f"{len(unconfirmed)} unconfirmed, from {min(unconfirmed)} on"
            self._connection.process_data_events(time_limit=1)
        channel.close()

    def take(self, queue: str, count: int, timeout: float) -> list[Message]:
        """Take and ack the next `count` messages; an AssertionError if fewer come in `timeout` seconds."""
        taken: list[Message] = []
        deadline = time.monotonic() + timeout
        while len(taken) < count:
            method, properties, body = self.channel.basic_get(queue, auto_ack=True)
            if method is not None:
                taken.append(Message(properties, body, method.exchange, method.routing_key, method.redelivered))
            elif time.monotonic() > deadline:
                raise AssertionError(f"{queue}: {len(taken)} of {count} messages within {timeout:g} s")
            else:
                self._connection.sleep(0.01)
        return taken

    def get_all(self, queue: str, count: int, timeout: float) -> list[tuple[Any, bytes]]:
        """Like `take`, as pairs of properties and body."""
        return [(message.properties, message.body) for message in self.take(queue, count, timeout)]

    def consume(self, queue: str, count: int, timeout: float) -> list[Message]:
        """Like `take`, by a consumer: several times faster for many messages."""
        taken: list[Message] = []
        deadline = time.monotonic() + timeout
        channel = self._connection.channel()
        channel.basic_qos(prefetch_count=min(count, 500) or 1)
        try:
            while len(taken) < count:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"{queue}: {len(taken)} of {count} messages within {timeout:g} s")
                method, properties, body = next(channel.consume(queue, inactivity_timeout=left))
                if method is not None:
                    taken.append(Message(properties, body, method.exchange, method.routing_key, method.redelivered))
                    # What came beyond `count` goes back unacked, to the place where it was.
                    channel.basic_ack(method.delivery_tag)
        finally:
            channel.cancel()
            channel.close()
        return taken

    def look(self, queue: str) -> list[Message]:
        """All messages that are ready, and they stay: an empty list also when there is no such queue."""
        if not self.has_queue(queue):
            return []
        seen: list[Message] = []
        channel = self._connection.channel()
        while True:
            method, properties, body = channel.basic_get(queue)
            if method is None:
                channel.close()
                return seen
            seen.append(Message(properties, body, method.exchange, method.routing_key, method.redelivered))

    def plain_channel(self) -> Any:
        """A channel without confirms: publishes return at once."""
        return self._connection.channel()

    def depth(self, queue: str) -> int:
        """Messages ready for a consumer; those in a consumer's hands do not count."""
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)

    def has_queue(self, queue: str) -> bool:
        return self._exists(lambda channel: channel.queue_declare(queue, passive=True))

    def has_exchange(self, exchange: str) -> bool:
        return self._exists(lambda channel: channel.exchange_declare(exchange, passive=True))

    def temporary_queue(self, exchange: str = "", key: str = "#") -> str:
        """A queue that ends with this connection, bound to `exchange` unless that is the default one."""
        queue = str(self.channel.queue_declare("", exclusive=True).method.queue)
        if exchange:
            self.channel.queue_bind(queue, exchange, key)
        return queue

    def declare_queue(self, queue: str, kind: str = "quorum", **arguments: Any) -> None:
        """A durable queue; `max_length=5` becomes the x-argument `x-max-length`."""
        x_arguments = {f"x-{name.replace('_', '-')}": value for name, value in arguments.items()}
        self.channel.queue_declare(queue, durable=True, arguments={"x-queue-type": kind, **x_arguments})

    def declare(self, wanted: Topology) -> None:
        """What somebody else than the worker would declare."""
        for exchange in wanted.exchanges:
            self.channel.exchange_declare(
                exchange.name, exchange.type, durable=True, arguments=dict(exchange.arguments)
            )
        for queue in wanted.queues:
            self.channel.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))
        for binding in wanted.bindings:
            self.channel.queue_bind(binding.queue, binding.exchange, binding.routing_key)

    def bind(self, queue: str, exchange: str, key: str) -> None:
        self.channel.queue_bind(queue, exchange, key)

    def purge(self, queue: str) -> None:
        self.channel.queue_purge(queue)

    def delete_queue(self, queue: str) -> None:
        """Nothing happens if it does not exist."""
        self.channel.queue_delete(queue)

    def delete_exchange(self, exchange: str) -> None:
        """Nothing happens if it does not exist."""
        self.channel.exchange_delete(exchange)

    def _confirming_channel(self) -> Any:
        channel = self._connection.channel()
        channel.confirm_delivery()
        return channel

    def _exists(self, ask: Any) -> bool:
        # The broker closes the channel that asks for something missing, so ask on one of its own.
        channel = self._connection.channel()
        try:
            ask(channel)
        except pika.exceptions.ChannelClosedByBroker as closed:
            if closed.reply_code != 404:
                raise
            return False
        channel.close()
        return True


def address(url: str) -> tuple[str, int]:
    """Host and port of an AMQP URL, to put a proxy in front of it."""
    parameters = pika.URLParameters(url)
    return parameters.host, parameters.port


def by_way_of(port: int, url: str) -> str:
    """The same URL, through something that listens on `port` of loopback."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{port}"))


def new_prefix() -> str:
    """An `AMQP_PREFIX` that no other test has."""
    return f"t.{secrets.token_hex(4)}"


def delete_topology(url: str, prefix: str, delays: Iterable[int] = DELAYS_IN_TESTS) -> None:
    """Delete every queue and exchange that the worker makes under `prefix`; missing ones are fine."""
    made = topology(prefix, "quorum", delays)
    with Rabbit(url) as rabbit:
        for queue in made.queues:
            rabbit.delete_queue(queue.name)
        for exchange in (*(each.name for each in made.exchanges), Names(prefix).identity):
            rabbit.delete_exchange(exchange)
