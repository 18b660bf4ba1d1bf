"""Publishes with confirms, pipelined on one channel; a publication is given up by nobody but its confirm."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import pika
import structlog
from pika.adapters.select_connection import IOLoop

from worker.core.delivery import Message
from worker.core.settlement import Confirms
from worker.shells.amqp.link import Guard, Link

CONFIRM_SECONDS: Final = 30.0
"""A confirm that does not come for this long (a lost quorum gives no answer at all) bounces the connection to the
next host, and everything unconfirmed is published again."""
REOPEN_AFTER: Final = 0.25  # seconds between a nack and the new channel
RETRY_FIRST: Final = 1.0
RETRY_LONGEST: Final = 30.0

log = structlog.get_logger()

S = TypeVar("S")


class Watch(Protocol):
    """What the publisher tells."""

    def confirmed(self, seconds: float) -> None: ...
    def unconfirmed(self, count: int) -> None: ...


@dataclass(slots=True, eq=False)
class Publication(Generic[S]):
    """One message on its way, and what its confirm settles, of which only the owner of the publisher knows more."""

    message: Message
    settles: S
    published_at: float = 0.0
    tries: int = 0


class Publisher(Generic[S]):
    """All methods belong to the loop's thread."""

    def __init__(
        self,
        loop: IOLoop,
        watch: Watch,
        *,
        on_confirmed: Callable[[Publication[S]], None],
        after_confirms: Callable[[], None] = lambda: None,
        guard: Guard,
    ) -> None:
        self._loop = loop
        self._watch = watch
        self._on_confirmed = on_confirmed
        self._after_confirms = after_confirms
        self._guard = guard
        self._link: Link | None = None
        self._connection: Any = None
        self._channel: Any = None
        self._on_ready: Callable[[], None] = lambda: None
        self._confirms: Confirms[Publication[S]] = Confirms()
        self._backlog: deque[Publication[S]] = deque()
        self._delayed = 0
        self._blocked_at = 0.0
        self._refused: set[Publication[S]] = set()
        self.trouble = ""
        """What keeps the broker from taking messages, though the channel is open."""

    @property
    def ready(self) -> bool:
        """Whether what is published now goes out now."""
        if self._channel is None or self._link is None:
            return False
        return bool(self._channel.is_open) and not self._link.blocked  # not while the connection is being closed

    @property
    def idle(self) -> bool:
        """Whether everything is confirmed."""
        return not (self._confirms or self._backlog or self._delayed)

    def __len__(self) -> int:
        """Publications without their confirm, sent or not."""
        return len(self._confirms) + len(self._backlog) + self._delayed

    def open(self, connection: Any, link: Link, on_ready: Callable[[], None]) -> None:
        """Opens the confirm channel on a new connection, then sends what waits."""
        self._link = link
        self._connection = connection
        self._on_ready = on_ready

        def opened(channel: Any) -> None:
            if not channel.is_open:
                return
            channel.add_on_close_callback(self._guard(self._closed))
            channel.add_on_return_callback(self._guard(self._returned))
            channel.confirm_delivery(
                self._guard(lambda frame: self._settled(channel, frame)),
                callback=self._guard(lambda _: selected(channel)),
            )

        def selected(channel: Any) -> None:
            if connection is not self._connection:
                return
            self._channel = channel
            on_ready()
            self.flush()

        connection.channel(on_open_callback=self._guard(opened))

    def down(self) -> None:
        """The connection is gone."""
        self._channel = self._connection = None
        self._take_back()

    def publish(self, publication: Publication[S]) -> None:
        """Sends now, or as soon as it can be sent."""
        self._backlog.append(publication)
        self.flush()

    def flush(self) -> None:
        """Sends what waits."""
        while self._backlog and self.ready:
            self._send(self._backlog.popleft())

    def tick(self, now: float) -> None:
        """Counts what is unconfirmed, and notices confirms that do not come."""
        self._watch.unconfirmed(len(self))
        oldest = next(iter(self._confirms), None)
        if oldest is None or self._link is None:
            return
        if self._link.blocked:
            self._blocked_at = now  # what it owes from before may take its time once it reads again
        elif now - max(oldest.published_at, self._blocked_at) > CONFIRM_SECONDS:
            self.trouble = f"no confirm for {CONFIRM_SECONDS:.0f} s"
            self._link.bounce(self.trouble)

    def _send(self, publication: Publication[S]) -> None:
        message = publication.message
        publication.published_at = time.monotonic()
        self._confirms.published(publication)
        self._channel.basic_publish(
            message.exchange,
            message.routing_key,
            message.body,
            pika.BasicProperties(**message.properties),
            mandatory=True,
        )

    def _settled(self, channel: Any, frame: Any) -> None:
        if channel is not self._channel:
            return  # a channel given up: its numbers mean nothing on the new one
        method = frame.method
        confirmed, again = self._confirms.settle(
            method.delivery_tag, multiple=method.multiple, ack=isinstance(method, pika.spec.Basic.Ack)
        )
        if confirmed:
            self._refused.difference_update(confirmed)
            if not self._refused:
                self.trouble = ""
            if self._link is not None:
                self._link.proven()
        now = time.monotonic()
        for publication in confirmed:
            self._watch.confirmed(now - publication.published_at)
            self._on_confirmed(publication)
        self._after_confirms()
        for publication in again:
            self._later(publication)
        if again and not isinstance(method, pika.spec.Basic.Ack):
            self._reopen()
        elif again and self._link is not None:
            # Unroutable: a queue or binding is gone. A new connection declares it again, or says what is missing.
            self._link.bounce(self.trouble)
        self._watch.unconfirmed(len(self))

    def _returned(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """A return names no sequence number: it is the first pending message with the same address, id and body. (The
        id alone would take an earlier one that was routed for it, and its confirm for this one's.)"""
        if channel is not self._channel:
            return
        for publication in self._confirms:
            message = publication.message
            if (message.exchange, message.routing_key, message.properties.get("message_id"), message.body) == (
                method.exchange,
                method.routing_key,
                properties.message_id,
                body,
            ) and not self._confirms.is_returned(publication):
                self._confirms.returned(publication)
                return

    def _later(self, publication: Publication[S]) -> None:
        """Refused (nack) or unroutable: it is tried again until it is taken, since nobody else has it."""
        publication.tries += 1
        self._refused.add(publication)
        message = publication.message
        wait = min(RETRY_LONGEST, RETRY_FIRST * 2.0 ** min(publication.tries - 1, 10))
        self.trouble = f"the broker does not take messages for {message.exchange or message.routing_key!r}"
        log.error(
            "publish.refused",
            exchange=message.exchange,
            routing_key=message.routing_key,
            tries=publication.tries,
            retry_in=wait,
        )
        self._delayed += 1
        self._loop.call_later(wait, self._guard(lambda: self._again(publication)))

    def _reopen(self) -> None:
        """A channel that was nacked once may be nacked for as long as a dead node stays dead (measured: a quorum
        queue's leader killed just before the channel's first publish), where a new channel is confirmed at once."""
        channel, connection, self._channel = self._channel, self._connection, None
        self._take_back()
        if channel is not None and channel.is_open:
            channel.close()

        def again() -> None:
            if connection is self._connection and self._channel is None and connection.is_open and self._link:
                self.open(connection, self._link, self._on_ready)

        self._loop.call_later(REOPEN_AFTER, self._guard(again))

    def _take_back(self) -> None:
        """Whether the broker took what it has not confirmed is unknown, so it is published again, in its order."""
        self._backlog.extendleft(reversed(self._confirms.lost()))
        self._watch.unconfirmed(len(self))

    def _again(self, publication: Publication[S]) -> None:
        self._delayed -= 1
        self.publish(publication)

    def _closed(self, channel: Any, reason: Any) -> None:
        if channel is not self._channel or self._link is None:
            return  # one that we gave up ourselves
        self._channel = None
        if self._link.up:
            self._link.bounce(f"publishing channel closed: {getattr(reason, 'reply_text', reason)}")
