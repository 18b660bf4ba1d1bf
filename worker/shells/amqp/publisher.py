"""Publishes with confirms, pipelined on one channel; nothing but its confirm ends the wait of a publication.

RabbitMQ refuses some publications by closing the channel or the connection (a size limit, a topic permission, a header
that does not fit a frame), and does not say which one it meant. So whatever was unconfirmed at that moment is a
suspect, and suspects are sent one at a time. One that is refused alone is set aside, and the others go on.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar

import structlog
from pika.adapters.select_connection import IOLoop
from pika.exceptions import AMQPError, ChannelClosedByBroker, ConnectionClosedByBroker

from worker.core.delivery import Message, text
from worker.core.settlement import Confirms
from worker.shells.amqp.errors import MISSING
from worker.shells.amqp.errors import reason as reason_of
from worker.shells.amqp.link import Guard, Link

CONFIRM_SECONDS: Final = 30.0
"""If a confirm does not come for this long (a lost quorum gives no answer at all), the connection is closed and opened
at the next host, and everything unconfirmed is published again."""
REOPEN_AFTER: Final = 0.25  # seconds between a nack and the new channel
RETRY_FIRST: Final = 1.0
RETRY_LONGEST: Final = 30.0
REFUSALS: Final = 2
"""So often the broker must close the connection on a publication that is alone before that one is set aside: it may
have had another reason the first time. The same for an exchange that is missing, which the next connection declares
again. Any other close of the channel can only mean the publication."""
LOSSES: Final = 5
"""The same for connections that are lost without a word of the broker: each of these may well be the network's."""
ASIDE_FIRST: Final = 10.0
ASIDE_LONGEST: Final = 60.0
"""Seconds from one try of what is set aside to the next, doubling: each refusal costs a channel. One is tried at a
time, and when that is taken, all are."""
FORCED: Final = 320
"""The reply code with which an operator or a broker that stops closes a connection: no publication is meant."""

UNWRITABLE: Final = (AMQPError, AssertionError, struct.error, TypeError, ValueError, OverflowError)
"""What pika 1.4 raises for properties that AMQP has no form for."""

log = structlog.get_logger()

S = TypeVar("S")


class PublisherWatch(Protocol):
    """What the publisher reports."""

    def confirm_took(self, seconds: float) -> None: ...
    def unconfirmed(self, count: int) -> None: ...


@dataclass(slots=True, eq=False)
class Publication(Generic[S]):
    """One message on its way, and what its confirm settles, of which only the owner of the publisher knows more."""

    message: Message
    settles: S
    published_at: float = 0.0
    tries: int = 0
    refusals: int = 0  # while it was alone on its way
    losses: int = 0  # while it was on its way


class Publisher(Generic[S]):
    """All methods belong to the loop's thread.

    ``on_refused(publication, why)`` is asked about one that the broker refuses by closing the channel: True takes it
    over, with False it is set aside and tried again after a while. ``on_again`` is asked about one that was sent before
    and would be sent again: True drops it.
    """

    def __init__(
        self,
        loop: IOLoop,
        watch: PublisherWatch,
        *,
        on_confirmed: Callable[[Publication[S]], None],
        on_refused: Callable[[Publication[S], str], bool] = lambda _publication, _reason: False,
        on_again: Callable[[Publication[S]], bool] = lambda _publication: False,
        after_confirms: Callable[[], None] | None = None,
        guard: Guard,
    ) -> None:
        self._loop = loop
        self._watch = watch
        self._on_confirmed = on_confirmed
        self._on_refused = on_refused
        self._on_again = on_again
        self._after_confirms = after_confirms
        self._guard = guard
        self._link: Link | None = None
        self._works = False  # the link was told so
        self._connection: Any = None
        self._channel: Any = None
        self._on_ready: Callable[[], None] = lambda: None
        self._confirms: Confirms[Publication[S]] = Confirms()
        self._backlog: deque[Publication[S]] = deque()
        self._suspects: deque[Publication[S]] = deque()
        self._alone: Publication[S] | None = None
        self._aside: dict[Publication[S], str] = {}
        self._aside_wait = ASIDE_FIRST
        self._aside_at = 0.0
        self._refused_last = False
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
        """Whether all that the broker takes is confirmed."""
        return len(self) == len(self._aside)

    @property
    def refused(self) -> int:
        """Publications set aside."""
        return len(self._aside)

    @property
    def stuck(self) -> bool:
        """Whether the broker refused the latest publication, so that it is unknown whether it takes any."""
        return self._refused_last and bool(self._aside)

    @property
    def set_aside(self) -> str:
        """What the broker refuses to take, for people; empty when there is nothing."""
        if not self._aside:
            return ""
        publication, reason = next(iter(self._aside.items()))
        others = f" and {len(self._aside) - 1} more" if len(self._aside) > 1 else ""
        return f"the broker refuses {named(publication.message)}{others} ({reason}); it is tried again"

    def __len__(self) -> int:
        """Publications without their confirm, sent or not."""
        return len(self._confirms) + len(self._suspects) + len(self._backlog) + len(self._aside) + self._delayed

    def open(self, connection: Any, link: Link, on_ready: Callable[[], None]) -> None:
        """Opens the confirm channel on a new connection, then sends what waits."""
        self._link = link
        self._works = False
        self._connection = connection
        self._on_ready = on_ready

        def opened(channel: Any) -> None:
            if not channel.is_open:
                return
            channel.add_on_close_callback(self._guard(self._closed))
            channel.add_on_return_callback(self._guard(self._returned))
            connection.confirm(
                channel,
                self._guard(partial(self._settled, channel)),
                self._guard(lambda _: selected(channel)),
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
        self._lost(None)

    def publish(self, *publications: Publication[S]) -> None:
        """Sends these now and together, or as soon as they can be sent."""
        self._backlog.extend(publications)
        self.flush()

    def flush(self) -> None:
        """Sends what waits: a suspect only while nothing else is on its way, and nothing beside it."""
        while self._suspects and not self._confirms and self._alone is None and self.ready:
            self._alone = self._suspects.popleft()
            self._send(self._alone)
        if self._backlog and not self._suspects and self._alone is None and self.ready:
            with self._connection.corked():
                while self._backlog:
                    self._send(self._backlog.popleft())

    def withdraw(self, unwanted: Callable[[Publication[S]], bool]) -> list[Publication[S]]:
        """Takes back those that wait to be sent, for the first time or again, and need not be any more."""
        found = [each for each in (*self._suspects, *self._backlog, *self._aside) if unwanted(each)]
        for each in found:
            self._aside.pop(each, None)
        if found:
            self._suspects = deque(each for each in self._suspects if each not in found)
            self._backlog = deque(each for each in self._backlog if each not in found)
        return found

    def tick(self, now: float) -> None:
        """Counts what is unconfirmed, and notices confirms that do not come."""
        self._watch.unconfirmed(len(self))
        if self._aside and now >= self._aside_at and self.ready and not self._suspects and self._alone is None:
            publication = next(iter(self._aside))
            del self._aside[publication]
            self._suspects.append(publication)
            self.flush()
        oldest = next(iter(self._confirms), None)
        if oldest is None or self._link is None:
            return
        if self._link.blocked:
            self._blocked_at = now  # what it owes from before may take its time once it reads again
        elif now - max(oldest.published_at, self._blocked_at) > CONFIRM_SECONDS:
            self.trouble = f"no confirm for {CONFIRM_SECONDS:.0f} s"
            self._link.reconnect(self.trouble)

    def _send(self, publication: Publication[S]) -> None:
        if publication.published_at and self._on_again(publication):
            self._alone = None
            return
        publication.published_at = time.monotonic()
        try:
            self._connection.publish(self._channel, publication.message)
        except UNWRITABLE as error:  # before a byte of it was sent
            self._alone = None
            publication.refusals += 1
            self._refuse(publication, f"it cannot be written as AMQP: {reason_of(error)}")
            return
        self._confirms.published(publication)

    def _settled(self, channel: Any, number: int, multiple: bool, ack: bool) -> None:
        if channel is not self._channel:
            return  # a channel given up: its numbers mean nothing on the new one
        confirmed, again = self._confirms.settle(number, multiple=multiple, ack=ack)
        if self._alone is not None and not self._confirms:
            self._alone = None
        if confirmed:
            self._refused_last = False
            if self._aside and any(publication.refusals for publication in confirmed):
                self._suspects.extend(self._aside)  # whatever made the broker refuse them may be over
                self._aside.clear()
            if self.trouble:
                self._refused.difference_update(confirmed)
                self.trouble = self.trouble if self._refused else ""
            if not self._works and self._link is not None:
                self._works = True
                self._link.works()
        now = time.monotonic()
        for publication in confirmed:
            self._watch.confirm_took(now - publication.published_at)
            self._on_confirmed(publication)
        if self._after_confirms is not None:
            self._after_confirms()
        for publication in again:
            self._later(publication)
        if again and not ack:
            self._reopen()
        elif again and self._link is not None:
            # Unroutable: a queue or binding is gone. A new connection declares it again, or says what is missing.
            self._link.reconnect(self.trouble)
        if self._suspects or self._backlog:
            self.flush()

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
        channel, self._channel, self._alone = self._channel, None, None
        self._backlog.extendleft(reversed(self._confirms.lost()))
        if channel is not None and channel.is_open:
            channel.close()
        self._open_again(REOPEN_AFTER)

    def _open_again(self, wait: float) -> None:
        """Another channel on the same connection."""
        connection = self._connection

        def again() -> None:
            if connection is self._connection and self._channel is None and connection.is_open and self._link:
                self.open(connection, self._link, self._on_ready)

        self._loop.call_later(wait, self._guard(again))

    def _lost(self, reason: object) -> None:
        """The channel is gone: whether the broker took what it has not confirmed is unknown, so that is published
        again, in its order. ``reason`` is pika's, None when the channel was gone before."""
        pending, self._alone = self._confirms.lost(), None
        refusal = _refusal(reason)
        enough = 1 if isinstance(reason, ChannelClosedByBroker) and reason.reply_code != MISSING else REFUSALS
        suspects, innocent = list[Publication[S]](), list[Publication[S]]()
        for publication in pending:
            publication.losses += 1
            alone = len(pending) == 1
            publication.refusals += alone and refusal is not None
            if alone and (publication.refusals >= enough or publication.losses >= LOSSES):
                self._refuse(publication, refusal or "the connection is lost whenever it is sent")
            elif refusal is not None or publication.losses > 1:
                suspects.append(publication)
            else:
                innocent.append(publication)
        self._suspects.extendleft(reversed(suspects))
        self._backlog.extendleft(reversed(innocent))
        self._watch.unconfirmed(len(self))

    def _refuse(self, publication: Publication[S], why: str) -> None:
        """The broker does not take this one, so it must not keep the others."""
        self._refused_last = True
        if self._on_refused(publication, why):
            return
        publication.tries += 1
        # The wait grows with the tries of what was set aside before, not with the number of those that are.
        self._aside_wait = ASIDE_FIRST if publication.tries == 1 else min(ASIDE_LONGEST, self._aside_wait * 2)
        self._aside_at = time.monotonic() + self._aside_wait
        self._aside[publication] = why
        log.error("publish.set_aside", message=named(publication.message), reason=why, tries=publication.tries)

    def _again(self, publication: Publication[S]) -> None:
        self._delayed -= 1
        self.publish(publication)

    def _closed(self, channel: Any, reason: Any) -> None:
        if channel is not self._channel or self._link is None:
            return  # one that we gave up ourselves
        self._channel = None
        self._lost(reason)
        if not self._link.up:
            return
        if isinstance(reason, ChannelClosedByBroker) and reason.reply_code != MISSING:
            self._open_again(0)
        else:  # a new connection declares what is missing, or says so
            self._link.reconnect(f"publishing channel closed: {getattr(reason, 'reply_text', reason)}")


def _refusal(reason: object) -> str | None:
    """The broker's words when it closed the channel or connection because of something that we sent; else None."""
    if isinstance(reason, ChannelClosedByBroker) or (
        isinstance(reason, ConnectionClosedByBroker) and reason.reply_code != FORCED
    ):
        return f"{reason.reply_code} {reason.reply_text}"
    return None


def named(message: Message) -> str:
    """A message as people find it."""
    to = f"{message.exchange} {message.routing_key}" if message.exchange else message.routing_key
    return f"message {text(message.properties.get('message_id', ''))[:64]!r} to {to}"
