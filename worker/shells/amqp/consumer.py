"""Takes deliveries from the lanes: a channel per lane with its own prefetch, acks joined, tags good on one channel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pika
import structlog

from worker.core.settlement import Acks, Tag
from worker.shells.amqp.connection import still_deliver
from worker.shells.amqp.errors import LOCKED, MISSING
from worker.shells.amqp.link import Guard, Link

log = structlog.get_logger()

OnDelivery = Callable[[str, int, Any, Any, Any, bytes], None]
"""``on_delivery(lane, number, channel, method, properties, body)``: ``number`` is that of `Tag.channel`; the rest is
what pika tells."""


SHARED_EVERY: Final = 1.0  # seconds between two looks whether others consume a paused lane
WAITING_EVERY: Final = 5.0  # seconds between two looks at how many commands wait in a lane
SINGLE_SECONDS: Final = 1.0
"""How long a paused lane is consumed for single commands where basic.get is refused: that has no answer for "empty"."""


class _Lane:
    """One lane's channel. ``number`` is its generation, unique in the process."""

    def __init__(self, lane: str, queue: str, number: int, channel: Any) -> None:
        self.lane = lane
        self.queue = queue
        self.number = number
        self.channel = channel
        self.acks = Acks()
        self.consumer_tag: str | None = None
        self.consuming = False
        self.shared = False  # others consume the queue while we do not
        self.asked_at = 0.0
        self.asking = False
        self.fetching: _Fetch | None = None
        self.cancelled = False  # by the broker


@dataclass(slots=True)
class _Fetch:
    """A request for single commands of a paused lane. ``tag``: of the consumer that brings them, if one does."""

    left: int
    done: Callable[[], None]
    tag: str | None = None


class Consumer:
    """All methods belong to the loop's thread. ``prefetch`` per lane bounds what a crash redelivers."""

    def __init__(
        self,
        queues: Mapping[str, str],
        prefetch: Mapping[str, int],
        *,
        on_delivery: OnDelivery,
        on_channel_lost: Callable[[int], None],
        guard: Guard,
    ) -> None:
        self._queues = queues
        self._prefetch = prefetch
        self._on_delivery = on_delivery
        self._on_channel_lost = on_channel_lost
        self._guard = guard
        self._numbers = itertools.count(1)
        self._link: Link | None = None
        self._lanes: dict[str, _Lane] = {}
        self._by_number: dict[int, _Lane] = {}
        self._paused: frozenset[str] = frozenset()
        self.to_flush = False
        """Whether there are acks to send."""
        self._without_get: set[str] = set()  # lanes whose queue refuses basic.get
        self.acks = dict.fromkeys(queues, 0)
        """Deliveries acked so far, by lane."""
        self.waiting = dict.fromkeys(queues, 0)
        """Commands that wait in each lane's queue, as the broker said some seconds ago."""

    @property
    def up(self) -> bool:
        """Whether every lane has its channel."""
        return len(self._lanes) == len(self._queues) and all(lane.channel.is_open for lane in self._lanes.values())

    @property
    def ready(self) -> bool:
        """Whether every lane is being consumed, or could be if it were not paused. A channel alone is not enough: a
        queue that has lost its quorum does not answer when it is to be consumed."""
        return self.up and all(lane.consuming or lane.lane in self._paused for lane in self._lanes.values())

    @property
    def shared(self) -> list[str]:
        """Paused lanes that others consume."""
        return [lane.lane for lane in self._lanes.values() if lane.shared]

    def open(self, connection: Any, link: Link) -> None:
        """Opens the lanes' channels on a new connection and, unless paused, consumes."""
        self._link = link
        for name, queue in self._queues.items():
            connection.channel(on_open_callback=self._guard(lambda ch, n=name, q=queue: self._opened(n, q, ch)))

    def down(self) -> None:
        """The connection is gone, and with it every tag."""
        lost, self._lanes, self._by_number = list(self._lanes.values()), {}, {}
        for lane in lost:
            self._on_channel_lost(lane.number)
            self._fetched(lane)

    def pause(self, lanes: frozenset[str]) -> None:
        """Takes nothing new from these lanes, and consumes the others; what was delivered stays ours."""
        if lanes == self._paused:
            return
        self._paused = lanes
        for lane in self._lanes.values():
            if not lane.channel.is_open:
                continue
            if lane.lane in lanes:
                self._cancel(lane)
            elif lane.consumer_tag is None:
                lane.shared = False
                self._fetched(lane)
                self._consume(lane)

    def tick(self, now: float) -> None:
        """Looks how many commands wait, and whether others consume what we do not."""
        for lane in self._lanes.values():
            every = SHARED_EVERY if lane.lane in self._paused else WAITING_EVERY
            if lane.channel.is_open and not lane.asking and now - lane.asked_at > every:
                lane.asked_at, lane.asking = now, True
                lane.channel.queue_declare(
                    lane.queue, passive=True, callback=self._guard(lambda frame, each=lane: self._told(each, frame))
                )

    def fetch(self, lane: str, count: int, done: Callable[[], None]) -> None:
        """Takes up to ``count`` single commands of a paused lane; ``done`` is called when there are no more."""
        found = self._lanes.get(lane)
        if found is None or not found.channel.is_open or found.fetching is not None:
            done()
            return
        fetch = found.fetching = _Fetch(count, done)
        if lane in self._without_get:
            self._consume_single(found, fetch)
        else:
            self._get(found)

    def settle(self, tag: Tag) -> None:
        """The delivery may be acked at the next `flush`; nothing when its channel is gone."""
        lane = self._by_number.get(tag.channel)
        if lane is not None:
            lane.acks.settle(tag.number)
            self.acks[lane.lane] += 1
            self.to_flush = True

    def reject(self, tag: Tag) -> None:
        """Back to the queue as a failed delivery: every version of RabbitMQ counts it up to the delivery limit. (Since
        4.3 `basic.nack` does not count.)"""
        self._back(tag, lambda channel: channel.basic_reject(tag.number, requeue=True))

    def park(self, tag: Tag) -> None:
        """To the dead letters, by the broker itself. Only for lanes that have a dead-letter exchange: without one, the
        broker drops it."""
        self._back(tag, lambda channel: channel.basic_reject(tag.number, requeue=False))

    def give_back(self, tag: Tag) -> None:
        """Back to the queue unharmed: RabbitMQ does not count `basic.nack` since 4.3."""
        self._back(tag, lambda channel: channel.basic_nack(tag.number, requeue=True))

    def flush(self) -> None:
        """Sends the acks."""
        self.to_flush = False
        for lane in self._lanes.values():
            if lane.channel.is_open:
                for number, multiple in lane.acks.flush():
                    lane.channel.connection.acknowledge(lane.channel, number, multiple)

    def _opened(self, name: str, queue: str, channel: Any) -> None:
        if not channel.is_open:
            return  # the connection is being closed, and this answer was on its way
        lane = _Lane(name, queue, next(self._numbers), channel)
        channel.add_on_close_callback(self._guard(lambda _, reason: self._closed(lane, reason)))
        channel.add_on_cancel_callback(self._guard(lambda _: self._cancelled(lane)))
        channel.add_callback(self._guard(lambda _: self._fetched(lane)), [pika.spec.Basic.GetEmpty], one_shot=False)
        channel.basic_qos(prefetch_count=self._prefetch[name], callback=self._guard(lambda _: self._limited(lane)))

    def _limited(self, lane: _Lane) -> None:
        self._lanes[lane.lane] = lane
        self._by_number[lane.number] = lane
        if lane.lane not in self._paused and lane.channel.is_open:
            self._consume(lane)

    def _consume(self, lane: _Lane) -> None:
        def began(_: Any) -> None:
            lane.consuming = lane.consumer_tag == tag
            if self._link is not None:
                self._link.works()

        delivered = partial(self._on_delivery, lane.lane, lane.number)
        tag = lane.consumer_tag = self._begin(lane, self._prefetch[lane.lane], delivered, began)

    def _begin(self, lane: _Lane, prefetch: int, delivered: Callable[..., None], began: Callable[[Any], None]) -> str:
        """A consumer with a prefetch of its own; returns its tag."""
        lane.channel.basic_qos(prefetch_count=prefetch)
        return str(lane.channel.basic_consume(lane.queue, self._guard(delivered), callback=self._guard(began)))

    def _cancel(self, lane: _Lane) -> None:
        tag, lane.consumer_tag = lane.consumer_tag, None
        lane.consuming = False
        if tag is not None:
            self._end(lane, tag)

    def _end(self, lane: _Lane, tag: str) -> None:
        if lane.channel.is_open:
            lane.channel.basic_cancel(tag, callback=self._guard(lambda _: None))
            still_deliver(lane.channel, tag)

    def _consume_single(self, lane: _Lane, fetch: _Fetch) -> None:
        """Like `_get`, by a consumer whose prefetch is what is wanted, ended when that came or after a while."""

        def end() -> None:
            if lane.fetching is fetch:
                self._fetched(lane)

        def delivered(*told: Any) -> None:
            self._on_delivery(lane.lane, lane.number, *told)
            fetch.left -= 1
            if fetch.left <= 0:
                end()

        fetch.tag = self._begin(lane, fetch.left, delivered, lambda _: None)
        if self._link is not None:
            self._link.later(SINGLE_SECONDS, end)

    def _told(self, lane: _Lane, frame: Any) -> None:
        lane.asking = False
        self.waiting[lane.lane] = frame.method.message_count
        lane.shared = lane.lane in self._paused and frame.method.consumer_count > 0

    def _back(self, tag: Tag, send: Callable[[Any], None]) -> None:
        lane = self._by_number.get(tag.channel)
        if lane is not None and lane.channel.is_open:
            lane.acks.skip(tag.number)
            send(lane.channel)

    def _get(self, lane: _Lane) -> None:
        def got(*told: Any) -> None:
            self._on_delivery(lane.lane, lane.number, *told)
            if lane.fetching is not None:
                lane.fetching.left -= 1
                self._get(lane)

        if lane.fetching is None:
            return
        if lane.fetching.left <= 0 or not lane.channel.is_open:
            self._fetched(lane)
        else:
            lane.channel.basic_get(lane.queue, self._guard(got))

    def _fetched(self, lane: _Lane) -> None:
        fetch, lane.fetching = lane.fetching, None
        if fetch is not None:
            if fetch.tag is not None:
                self._end(lane, fetch.tag)
            fetch.done()

    def _cancelled(self, lane: _Lane) -> None:
        # The queue was deleted, or the broker took the consumer away. pika never answers such a cancel, and some
        # brokers keep the consumer suspended until its channel goes: only a new connection is certain to work.
        lane.consumer_tag = None
        lane.consuming = False
        lane.cancelled = True
        # RabbitMQ does not say which of the two it was; where the queue is gone, it answers by closing the channel.
        lane.channel.queue_declare(lane.queue, passive=True, callback=self._guard(lambda _: self._timed_out(lane, "")))

    def _timed_out(self, lane: _Lane, said: str) -> None:
        """The broker has taken back all that this consumer held, because it held a command for too long: with a
        basic.cancel since 4.3, by closing the channel before."""
        log.error(
            "consumer.timeout",
            lane=lane.lane,
            queue=lane.queue,
            reason=said or "the broker cancelled the consumer of a queue that exists: a command was held for too long",
            action="raise the broker's consumer_timeout (30 minutes by default), or find what held the command",
        )
        if self._link is not None:
            self._link.reconnect(
                f"consumer timeout of {lane.queue}: the broker has taken back what it held for too long"
            )

    def _closed(self, lane: _Lane, reason: Any) -> None:
        if self._link is None or not self._link.up:
            return
        code, said = getattr(reason, "reply_code", None), str(getattr(reason, "reply_text", reason))
        if code == LOCKED and lane.fetching is not None:
            self._without_get.add(lane.lane)
        if lane.cancelled and code == MISSING:
            self._link.reconnect(f"the broker cancelled the consumer of {lane.queue}, which is gone: {said}")
        elif "delivery acknowledgement" in said and "timed out" in said:
            self._timed_out(lane, said)
        else:
            self._link.reconnect(f"channel of {lane.queue} closed: {said}")
