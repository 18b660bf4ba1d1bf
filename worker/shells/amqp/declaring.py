"""Declares the topology on a fresh connection, or verifies that it is there, one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pika.exceptions import ChannelClosedByClient

from worker.core.topology import Topology
from worker.shells.amqp.errors import remedy
from worker.shells.amqp.link import Guard, Link
from worker.shells.amqp.steps import declarations, lookups


def prepare(
    connection: Any, link: Link, topology: Topology, *, declare: bool, guard: Guard, then: Callable[[], None]
) -> None:
    """What each link does first with a new connection, since something may have been deleted while it was away. Where
    anything does not fit, the link tries again with another connection, and says why."""

    def done(wrong: str | None) -> None:
        if wrong is None:
            then()
        else:
            link.reconnect(f"topology: {wrong} (see `qris-expire topology`)")

    Declaring(connection, topology, declare=declare, on_done=done, guard=guard)


class Declaring:
    """One run on a channel of its own, which the broker closes at the first thing that does not fit (a 404 or 406
    closes a channel). ``on_done(None)``, or ``on_done(what is wrong)`` with the broker's reply code in `code`; exactly
    one call unless the connection is lost.
    """

    def __init__(
        self,
        connection: Any,
        topology: Topology,
        *,
        declare: bool,
        on_done: Callable[[str | None], None],
        guard: Guard,
    ) -> None:
        self.code: int | None = None
        self._steps = declarations(topology) if declare else lookups(topology)
        self._on_done = on_done
        self._guard = guard
        self._connection = connection
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
            self._channel.close()  # `_closed` follows: the broker may allow so few channels that we need this one
            return
        self._doing = step.subject
        getattr(self._channel, step.method)(**step.arguments, callback=self._guard(self._next))

    def _all_done(self) -> None:
        if self._connection.is_open:
            self._on_done(None)

    def _closed(self, _channel: Any, reason: Any) -> None:
        if self._finished and isinstance(reason, ChannelClosedByClient):
            # In the next turn, since pika frees the channel's number after this callback.
            self._connection.ioloop.call_later(0, self._guard(self._all_done))
        elif not self._finished:
            self._finished = True
            said, self.code = getattr(reason, "reply_text", reason), getattr(reason, "reply_code", None)
            self._on_done(f"{self._doing}: {said}{remedy(self.code, str(said))}")
