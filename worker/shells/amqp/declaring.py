"""Declares the topology on a fresh connection, or verifies that it is there, one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from worker.core.topology import Binding, Exchange, Queue, Topology
from worker.shells.amqp.errors import remedy

Done = Callable[[Any], None]
Step = tuple[str, Callable[[Any, Done], None]]


class Declaring:
    """One run on a channel of its own, which the broker closes at the first thing that does not fit (a 404 or 406
    closes a channel). ``on_done(None)``, or ``on_done(what is wrong)``; exactly one call unless the connection dies.
    """

    def __init__(
        self,
        connection: Any,
        topology: Topology,
        *,
        declare: bool,
        on_done: Callable[[str | None], None],
        guard: Callable[..., Callable[..., None]],
    ) -> None:
        self._steps = _declarations(topology) if declare else _verifications(topology)
        self._on_done = on_done
        self._guard = guard
        self._doing = ""
        self._finished = False
        connection.channel(on_open_callback=guard(self._opened))

    def _opened(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._guard(self._closed))
        self._next(None)

    def _next(self, _ok: Any) -> None:
        if not self._channel.is_open:
            return  # the connection is being closed, and this answer was on its way
        step = next(self._steps, None)
        if step is None:
            self._finished = True
            self._channel.close()
            self._on_done(None)
            return
        self._doing, act = step
        act(self._channel, self._guard(self._next))

    def _closed(self, _channel: Any, reason: Any) -> None:
        if not self._finished:
            self._finished = True
            said, code = getattr(reason, "reply_text", reason), getattr(reason, "reply_code", None)
            self._on_done(f"{self._doing}: {said}{remedy(code)}")


def _declarations(topology: Topology) -> Iterator[Step]:
    for exchange in topology.exchanges:
        yield f"exchange {exchange.name}", partial(_exchange, exchange)
    for queue in topology.queues:
        yield f"queue {queue.name}", partial(_queue, queue)
    for binding in topology.bindings:
        yield f"binding {binding.exchange} → {binding.queue}", partial(_binding, binding)


def _verifications(topology: Topology) -> Iterator[Step]:
    """Bindings cannot be looked at: AMQP has no passive form of them."""
    for exchange in topology.exchanges:
        yield f"exchange {exchange.name}", partial(_existing_exchange, exchange)
    for queue in topology.queues:
        yield f"queue {queue.name}", partial(_existing_queue, queue)


def _exchange(it: Exchange, channel: Any, done: Done) -> None:
    channel.exchange_declare(it.name, it.type, durable=True, arguments=dict(it.arguments), callback=done)


def _queue(it: Queue, channel: Any, done: Done) -> None:
    channel.queue_declare(it.name, durable=True, arguments=dict(it.arguments), callback=done)


def _binding(it: Binding, channel: Any, done: Done) -> None:
    channel.queue_bind(it.queue, it.exchange, it.routing_key, callback=done)


def _existing_exchange(it: Exchange, channel: Any, done: Done) -> None:
    channel.exchange_declare(it.name, passive=True, callback=done)


def _existing_queue(it: Queue, channel: Any, done: Done) -> None:
    channel.queue_declare(it.name, passive=True, callback=done)
