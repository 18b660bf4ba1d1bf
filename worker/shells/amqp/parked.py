"""The queue of the dead letters, for tools: held by one process at a time, all of it at once, given back in order.

A queue is read from its head, and what is read and not wanted must return to its place. How was measured on RabbitMQ
3.10 with quorum queues (classic ones always restore the order):

- Messages that return go behind those that returned before, and all of these go before the rest. So whoever takes only
  the first of a queue that was looked at before puts them behind the others. Everything is taken in hand, always.
- A consumer gets as much as its prefetch allows in one step of the queue, and what it held returns in order, wherever
  the deliveries are at that moment, when its connection breaks: a process may be killed at any time.
- But when a *channel is closed* with deliveries on their way, those return in any order. So a consumer has exactly as
  much prefetch as there is to come, and the channel is closed when all of it came; who stops before, just hangs up.
- A channel's consumers return what they held in the order of their tags, up to 32 consumers, and in none beyond.
- Messages taken with basic.get return in any order: each get is a consumer of its own to the queue.
- Closing the connection without the channel can overtake acks: the channel is closed first.
- Two that look at the same time reorder what they give back: so there is a lock, for lookers too.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Self

import pika

from worker.app.dead_letters import HeldLetter, OutcomeSummary, Stop
from worker.core.dead_letter import Parcel
from worker.core.delivery import Message
from worker.core.lanes import LANES
from worker.core.settlement import Acks, Confirms
from worker.shells.amqp.conversation import SLICE, Conversation, Interrupted
from worker.shells.amqp.lock import BrokerLock, Busy
from worker.shells.amqp.publisher import Publication
from worker.shells.amqp.session import BrokerError, BrokerUnreachable

if TYPE_CHECKING:
    from worker.settings import AmqpSettings

__all__ = ["Busy", "Interrupted", "ParkedLetters"]

MAX_PREFETCH: Final = 65_535  # AMQP counts it in 16 bits
SILENCE_SECONDS: Final = 60.0
"""Without a delivery: a quorum queue reads all that it gives a consumer before it gives the first."""
RETURN_SECONDS: Final = 15.0  # for what was given back to be there again; a classic queue takes seconds
ACK_SECONDS: Final = 0.1
FRAME_ROOM: Final = 512  # of a frame, for what is not properties


class ParkedLetters:
    """The `Parked` of the use cases; a context manager that holds the lock. ``what``: the command, for those who wait.

    ``alone``: those who find us do not wait, since it may take hours. ``stop`` says how often people asked to stop.
    """

    def __init__(
        self, amqp: AmqpSettings, what: str, *, stop: Stop, alone: bool = False, patience: float = 30.0
    ) -> None:
        self._names = amqp.names
        self._stop = stop
        self._patience = patience
        self._talk = Conversation(amqp, f"dead {what}", stop=stop, each_turn=self._flush_acks)
        self._lock = BrokerLock(self._talk, f"{amqp.names.dead}.lock", what, stop=stop, alone=alone)
        self._desk: Any = None  # for questions
        self._reading: Any = None
        self._publishing: Any = None
        self._acks = Acks()
        self._confirms: Confirms[Publication[int]] = Confirms()  # each settles the dead letter of that number
        self._each: Callable[[HeldLetter], None] = lambda _: None
        self._coming = 0
        self._held = 0
        self._told: deque[OutcomeSummary] = deque()
        self.moved = 0
        self.refused = ""

    def __enter__(self) -> Self:
        self._talk.connect()
        try:
            self._desk = self._talk.channel()
            self.count()  # says what to do where there is no such queue
            self._lock.take(self._patience)
            self._await_returns()
        except BaseException:
            self._talk.hang_up()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._coming:
            self._talk.break_off()
        else:
            self._talk.hang_up(self._reading)

    # -- the port

    def count(self) -> int:
        return int(self._state().message_count)

    def hold(self, count: int, each: Callable[[HeldLetter], None]) -> None:
        channel = self._reading = self._talk.channel(on_end=self._ended)
        channel.add_on_cancel_callback(self._talk.guard(self._cancelled))
        self._each, self._coming = each, count
        parts = [min(MAX_PREFETCH, count - start) for start in range(0, count, MAX_PREFETCH)]
        tags = [f"part-{number:02d}" for number in range(len(parts))]
        # Without waiting in between: killed between two parts, the queue would put the first behind the second.
        with self._talk.corked():
            for tag, part in zip(tags, parts, strict=True):
                channel.basic_qos(prefetch_count=part)
                channel.basic_consume(self._names.dead, self._talk.guard(self._delivered), consumer_tag=tag)
        self._await_deliveries()
        # Before the first ack, which would let it have more than there was when we began.
        for tag in tags:
            self._talk.ask(channel, "basic_cancel", consumer_tag=tag)

    def remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._acks.settle(number)
            self._held -= 1
        self._flush_acks()
        self._sync()

    def publish(self, message: Message, number: int) -> bool:
        channel = self._publishing = self._publishing or self._publisher()
        properties = pika.BasicProperties(**message.properties)
        if not self._fits(properties):
            return False
        self._confirms.published(Publication(message, number))
        channel.basic_publish(message.exchange, message.routing_key, message.body, properties, mandatory=True)
        return True

    def settle(self, most: int) -> None:
        if len(self._confirms) > most:
            self._talk.until(lambda: len(self._confirms) <= most, "confirm what was published")
        self._flush_acks()
        if not most and self._reading is not None:
            self._sync()

    def give_back(self) -> None:
        channel, self._reading = self._reading, None
        if channel is None:
            return
        self._flush_acks()
        # A channel may keep acks for the queue back for a moment, and then they are lost with it (seen on connections
        # that were closed at once): the messages would be in both places.
        self._talk.pause(ACK_SECONDS)
        channel.close()
        self._talk.until(lambda: channel.is_closed, "close a channel")
        self._acks = Acks()
        expected, self._held = self._held, 0
        deadline = time.monotonic() + RETURN_SECONDS
        # They come back a moment after the channel is closed: whoever looks next must find them.
        while self.count() < expected and time.monotonic() < deadline:
            self.turn(SLICE / 4)

    def follow(self, lanes: Iterable[str]) -> None:
        """No lanes means all."""
        channel = self._talk.channel()
        inbox = self._talk.ask(channel, "queue_declare", queue="", exclusive=True).method.queue
        for lane in lanes or LANES:
            self._talk.ask(channel, "queue_bind", queue=inbox, exchange=self._names.outcomes, routing_key=f"{lane}.*")
        heard = self._talk.guard(self._heard)
        self._talk.ask(channel, "basic_consume", queue=inbox, on_message_callback=heard, auto_ack=True)

    def outcomes(self) -> list[OutcomeSummary]:
        told = list(self._told)
        self._told.clear()
        return told

    def turn(self, seconds: float) -> None:
        self._talk.turn(seconds)

    def say(self, progress: str) -> None:
        """What those who find the dead letters held are shown."""
        self._lock.say(progress)

    # -- waits

    def _await_returns(self) -> None:
        """What a killed holder held returns a moment after its lock is free; one that stays is another program."""
        deadline = time.monotonic() + RETURN_SECONDS
        before = -1
        while (state := self._state()).consumer_count or state.message_count != before:
            if time.monotonic() > deadline:
                if not state.consumer_count:
                    return  # the worker parks more and more
                raise Busy(f"somebody consumes from {self._names.dead}; only these commands should, stop it first")
            before = state.message_count
            self._talk.pause(SLICE / 2)

    def _state(self) -> Any:
        return self._talk.ask(self._desk, "queue_declare", queue=self._names.dead, passive=True).method

    def _await_deliveries(self) -> None:
        last, heard_at = self._coming, time.monotonic()
        while self._coming:
            self.turn(SLICE)
            if self._stop():
                raise Interrupted
            now = time.monotonic()
            if self._coming < last:
                last, heard_at = self._coming, now
            elif now - heard_at > SILENCE_SECONDS:
                raise BrokerUnreachable(
                    f"{self._coming:,} of the messages in {self._names.dead} do not come; "
                    "see whether somebody else consumes from it, then try again"
                )

    def _sync(self) -> None:
        """Answered in order: what was sent before on this channel is done."""
        self._talk.ask(self._reading, "queue_declare", queue=self._names.dead, passive=True)

    # -- events: all callbacks only take notes, and wake whoever waits

    def _delivered(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._coming -= 1
        self._held += 1
        if not self._coming:
            self._talk.wake()
        self._each(HeldLetter(method.delivery_tag, Parcel(method.routing_key, properties, body)))

    def _heard(self, _channel: Any, _method: Any, _properties: Any, body: bytes) -> None:
        try:
            outcome = json.loads(body)
            self._told.append(OutcomeSummary(str(outcome["commandId"]), str(outcome["status"]), str(outcome["reason"])))
        except (ValueError, LookupError, TypeError):
            return  # no outcome: anybody may publish to the exchange

    def _settled(self, frame: Any) -> None:
        method = frame.method
        ack = isinstance(method, pika.spec.Basic.Ack)
        done, failed = self._confirms.settle(method.delivery_tag, multiple=method.multiple, ack=ack)
        for sent in done:
            self._acks.settle(sent.settles)
        self.moved += len(done)
        self._held -= len(done)
        if failed and not self.refused:
            lane = failed[0].message.routing_key
            self.refused = (
                f"{self._names.queue(lane)} does not take messages now; see whether it is full, then try again"
                if not ack
                else f"no queue is bound to {self._names.commands} for {lane}; run `qris-expire topology --apply`"
            )
        self._talk.wake()

    def _returned(self, _channel: Any, method: Any, properties: Any, _body: bytes) -> None:
        """A return names no sequence number: it is the first pending message of the same address and id."""
        for sent in self._confirms:
            message = sent.message
            if (message.routing_key, message.properties.get("message_id")) == (
                method.routing_key,
                properties.message_id,
            ) and not self._confirms.is_returned(sent):
                self._confirms.returned(sent)
                return

    # -- channels

    def _ended(self, channel: Any, reason: BaseException) -> None:
        if channel in (self._reading, self._publishing):
            self._talk.fail(reason)

    def _cancelled(self, _frame: Any) -> None:
        raise BrokerError(f"{self._names.dead} was deleted, or its node is gone; look at the broker, then try again")

    def _publisher(self) -> Any:
        channel = self._talk.channel(on_end=self._ended)
        channel.add_on_return_callback(self._talk.guard(self._returned))
        self._talk.ask(channel, "confirm_delivery", ack_nack_callback=self._talk.guard(self._settled))
        return channel

    def _fits(self, properties: Any) -> bool:
        """Whether it can be put on the wire: some headers can be read and not written."""
        try:
            size = sum(len(piece) for piece in properties.encode())
        except Exception:  # noqa: BLE001  # pika raises whatever its encoder meets
            return False
        return size + FRAME_ROOM < self._talk.largest_frame

    def _flush_acks(self) -> None:
        channel = self._reading
        if channel is not None and channel.is_open:
            with self._talk.corked():
                for number, multiple in self._acks.flush():
                    channel.basic_ack(number, multiple=multiple)
