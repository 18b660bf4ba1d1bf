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
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import pika
from pika.adapters.select_connection import IOLoop
from pika.exceptions import AMQPError, ChannelClosed

from worker.app.dead_letters import Held, Stop, Told
from worker.core import jakarta
from worker.core.dead_letter import Parcel
from worker.core.delivery import Message
from worker.core.lanes import LANES
from worker.core.settlement import Acks, Confirms
from worker.shells import operator
from worker.shells.amqp import codec
from worker.shells.amqp.connection import Connection
from worker.shells.amqp.session import BrokerError, BrokerUnreachable, broker_error, connect_by

if TYPE_CHECKING:
    from worker.settings import AmqpSettings

MAX_PREFETCH: Final = 65_535  # AMQP counts it in 16 bits
ANSWER_SECONDS: Final = 30.0  # for one answer of the broker; a confirm of a lost quorum never comes
SILENCE_SECONDS: Final = 60.0
"""Without a delivery: a quorum queue reads all that it gives a consumer before it gives the first."""
RETURN_SECONDS: Final = 15.0  # for what was given back to be there again; a classic queue takes seconds
ACK_SECONDS: Final = 0.1
HOLDER_SECONDS: Final = 1.5  # for the holder of the lock to say who it is
CLOSE_SECONDS: Final = 3.0
SLICE: Final = 0.2

FRAME_ROOM: Final = 512  # of a frame, for what is not properties
LOCKED: Final = 405


class Busy(BrokerError):
    """Somebody else holds the dead letters."""


class Interrupted(KeyboardInterrupt):
    """Asked to stop, and it can be done at once: the broker takes back what we hold."""


class _Sent:
    """One message on its way, and the number of the dead letter that it came from."""

    __slots__ = ("message", "number")

    def __init__(self, message: Message, number: int) -> None:
        self.message = message
        self.number = number


class ParkedLetters:
    """The `Parked` of the use cases; a context manager that holds the lock. ``what``: the command, for those who wait.

    ``alone``: those who find us do not wait, since it may take hours. ``stop`` says how often people asked to stop.
    """

    def __init__(
        self, amqp: AmqpSettings, what: str, *, stop: Stop, alone: bool = False, patience: float = 30.0
    ) -> None:
        self._amqp = amqp
        self._names = amqp.names
        self._lock_name = f"{amqp.names.dead}.lock"
        self._stop = stop
        self._patience = patience
        self._loop = IOLoop()
        self._card: dict[str, Any] = {
            "what": what,
            "alone": alone,
            "who": f"{operator.user()}@{socket.gethostname()}",
            "process": os.getpid(),
            "since": jakarta.iso(time.time(), milliseconds=False),
            "progress": "",
        }
        self._lost: BaseException | None = None
        self._failure: BaseException | None = None
        self._ends: dict[int, BaseException] = {}  # why channels ended, by number
        self._desk: Any = None  # for questions, and for the lock
        self._reading: Any = None
        self._publishing: Any = None
        self._acks = Acks()
        self._confirms: Confirms[_Sent] = Confirms()
        self._each: Callable[[Held], None] = lambda _: None
        self._coming = 0
        self._held = 0
        self._told: deque[Told] = deque()
        self._moved = 0
        self.refused = ""

    def __enter__(self) -> Self:
        codec.tolerate()
        self._connection = connect_by(self._dial, self._amqp, f"dead {self._card['what']}")
        try:
            self._desk = self._channel()
            self.count()  # says what to do where there is no such queue
            self._take_lock()
            self._await_returns()
        except BaseException:
            self._hang_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._coming:
            self._break_off()
        else:
            self._hang_up()

    # -- the port

    def count(self) -> int:
        """See `Parked`."""
        return int(self._state().message_count)

    def hold(self, count: int, each: Callable[[Held], None]) -> None:
        """See `Parked`."""
        channel = self._reading = self._reader()
        self._each, self._coming = each, count
        parts = [min(MAX_PREFETCH, count - start) for start in range(0, count, MAX_PREFETCH)]
        tags = [f"part-{number:02d}" for number in range(len(parts))]
        # Without waiting in between: killed between two parts, the queue would put the first behind the second.
        with self._connection.corked():
            for tag, part in zip(tags, parts, strict=True):
                channel.basic_qos(prefetch_count=part)
                channel.basic_consume(self._names.dead, self._guard(self._delivered), consumer_tag=tag)
        self._await_deliveries()
        # Before the first ack, which would let it have more than there was when we began.
        for tag in tags:
            self._ask(channel, "basic_cancel", consumer_tag=tag)

    def remove(self, numbers: Iterable[int]) -> None:
        """See `Parked`."""
        for number in numbers:
            self._acks.settle(number)
            self._held -= 1
        self._flush_acks()
        self._sync()

    def publish(self, message: Message, number: int) -> bool:
        """See `Parked`."""
        channel = self._publishing = self._publishing or self._publisher()
        properties = pika.BasicProperties(**message.properties)
        if not self._fits(properties):
            return False
        self._confirms.published(_Sent(message, number))
        channel.basic_publish(message.exchange, message.routing_key, message.body, properties, mandatory=True)
        return True

    def settle(self, most: int) -> None:
        """See `Parked`."""
        if len(self._confirms) > most:
            self._until(lambda: len(self._confirms) <= most, "confirm what was published")
        self._flush_acks()
        if not most and self._reading is not None:
            self._sync()

    @property
    def moved(self) -> int:
        """See `Parked`."""
        return self._moved

    def give_back(self) -> None:
        """See `Parked`."""
        channel, self._reading = self._reading, None
        if channel is None:
            return
        self._flush_acks()
        # A channel may keep acks for the queue back for a moment, and then they would die with it (seen on connections
        # that were closed at once): what they were for would be here and there.
        self._until_then(ACK_SECONDS)
        channel.close()
        self._until(lambda: channel.is_closed, "close a channel")
        self._acks = Acks()
        expected, self._held = self._held, 0
        deadline = time.monotonic() + RETURN_SECONDS
        # They come back a moment after the channel is closed: whoever looks next must find them.
        while self.count() < expected and time.monotonic() < deadline:
            self.turn(SLICE / 4)

    def follow(self, lanes: Iterable[str]) -> None:
        """See `Parked`. No lanes means all."""
        channel = self._channel()
        inbox = self._ask(channel, "queue_declare", queue="", exclusive=True).method.queue
        for lane in lanes or LANES:
            self._ask(channel, "queue_bind", queue=inbox, exchange=self._names.outcomes, routing_key=f"{lane}.*")
        self._ask(channel, "basic_consume", queue=inbox, on_message_callback=self._guard(self._heard), auto_ack=True)

    def outcomes(self) -> list[Told]:
        """See `Parked`."""
        told = list(self._told)
        self._told.clear()
        return told

    def turn(self, seconds: float) -> None:
        """See `Parked`."""
        self._flush_acks()
        self._check()
        timer = self._loop.call_later(min(seconds, SLICE), self._loop.stop)
        self._loop.start()
        self._loop.remove_timeout(timer)
        self._flush_acks()
        self._check()
        if self._stop() > 1:
            raise Interrupted

    def say(self, progress: str) -> None:
        """What those are told who find the dead letters held."""
        self._card["progress"] = progress

    # -- the lock

    def _take_lock(self) -> None:
        deadline = time.monotonic() + self._patience
        while not self._locked():
            holder = self._holder()
            if holder.get("alone") or time.monotonic() > deadline:
                raise Busy(_busy(holder, self._lock_name))
            if self._stop():
                raise Interrupted
            self._until_then(SLICE)

    def _await_returns(self) -> None:
        """What a killed holder held returns a moment after its lock is free; a consumer that stays is none of us."""
        deadline = time.monotonic() + RETURN_SECONDS
        before = -1
        while (state := self._state()).consumer_count or state.message_count != before:
            if time.monotonic() > deadline:
                if not state.consumer_count:
                    return  # the worker parks more and more
                raise Busy(f"somebody consumes from {self._names.dead}; only these commands should, stop it first")
            before = state.message_count
            self._until_then(SLICE / 2)

    def _state(self) -> Any:
        return self._ask(self._desk, "queue_declare", queue=self._names.dead, passive=True).method

    def _locked(self) -> bool:
        """An exclusive queue: the broker gives it to one connection, and takes it away when that ends, however."""
        channel = self._channel()
        try:
            self._ask(channel, "queue_declare", queue=self._lock_name, exclusive=True)
        except ChannelClosed as closed:
            if closed.reply_code == LOCKED:
                return False
            raise broker_error(closed, f"queue {self._lock_name}") from closed
        self._ask(
            channel, "basic_consume", queue=self._lock_name, on_message_callback=self._guard(self._asked), auto_ack=True
        )
        return True

    def _asked(self, channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
        """Somebody wants to know who holds the lock."""
        if properties.reply_to:
            channel.basic_publish("", properties.reply_to, json.dumps(self._card).encode())

    def _holder(self) -> Mapping[str, Any]:
        """What the holder of the lock says about itself; empty when it does not answer."""
        answers: list[bytes] = []
        channel = self._channel()
        inbox = self._ask(channel, "queue_declare", queue="", exclusive=True).method.queue

        def answered(_channel: Any, _method: Any, _properties: Any, body: bytes) -> None:
            answers.append(body)
            self._loop.stop()

        self._ask(channel, "basic_consume", queue=inbox, on_message_callback=self._guard(answered), auto_ack=True)
        channel.basic_publish("", self._lock_name, b"who?", pika.BasicProperties(reply_to=inbox))
        with suppress(BrokerUnreachable):
            self._until(lambda: bool(answers), "say who", HOLDER_SECONDS)
        channel.close()
        try:
            card = json.loads(answers[0]) if answers else {}
        except ValueError:
            return {}
        return card if isinstance(card, dict) else {}

    # -- events; all callbacks only take notes, and wake whoever waits

    def _guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            try:
                callback(*args)
            except BaseException as error:  # noqa: BLE001  # pika would drop the connection for it; `turn` raises it
                self._failure = self._failure or error
                self._loop.stop()

        return guarded

    def _delivered(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._coming -= 1
        self._held += 1
        if not self._coming:
            self._loop.stop()
        self._each(Held(method.delivery_tag, Parcel(method.routing_key, properties, body)))

    def _heard(self, _channel: Any, _method: Any, _properties: Any, body: bytes) -> None:
        try:
            outcome = json.loads(body)
            self._told.append(Told(str(outcome["commandId"]), str(outcome["status"]), str(outcome["reason"])))
        except (ValueError, LookupError, TypeError):
            return  # no outcome: anybody may publish to the exchange

    def _settled(self, frame: Any) -> None:
        method = frame.method
        ack = isinstance(method, pika.spec.Basic.Ack)
        done, failed = self._confirms.settle(method.delivery_tag, multiple=method.multiple, ack=ack)
        for sent in done:
            self._acks.settle(sent.number)
        self._moved += len(done)
        self._held -= len(done)
        if failed and not self.refused:
            lane = failed[0].message.routing_key
            self.refused = (
                f"{self._names.queue(lane)} does not take messages now; see whether it is full, then try again"
                if not ack
                else f"no queue is bound to {self._names.commands} for {lane}; run `qris-expire topology --apply`"
            )
        self._loop.stop()

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

    def _dial(self, params: Any) -> Connection:
        answers: list[Any] = []

        def ended(_connection: Any, reason: BaseException) -> None:
            self._lost = reason
            self._loop.stop()

        def told(answer: Any) -> None:
            answers.append(answer)
            self._loop.stop()

        self._lost = None
        connection = Connection(
            params,
            custom_ioloop=self._loop,
            on_open_callback=told,
            on_open_error_callback=lambda _, error: told(error),
            on_close_callback=ended,
        )
        while not answers:
            self._loop.start()
            if self._stop():
                raise Interrupted
        if isinstance(answers[0], BaseException):
            raise answers[0]
        return connection

    def _channel(self) -> Any:
        opened: list[Any] = []

        def on_open(channel: Any) -> None:
            opened.append(channel)
            self._loop.stop()

        self._connection.channel(on_open_callback=on_open)
        self._until(lambda: bool(opened), "open a channel")
        channel = opened[0]
        self._ends.pop(channel.channel_number, None)
        channel.add_on_close_callback(self._guard(self._channel_ended))
        return channel

    def _channel_ended(self, channel: Any, reason: BaseException) -> None:
        self._ends[channel.channel_number] = reason
        if channel in (self._reading, self._publishing):
            self._failure = self._failure or reason
        self._loop.stop()

    def _reader(self) -> Any:
        channel = self._channel()
        channel.add_on_cancel_callback(self._guard(self._cancelled))
        return channel

    def _cancelled(self, _frame: Any) -> None:
        raise BrokerError(f"{self._names.dead} was deleted, or its node is gone; look at the broker, then try again")

    def _publisher(self) -> Any:
        channel = self._channel()
        channel.add_on_return_callback(self._guard(self._returned))
        self._ask(channel, "confirm_delivery", ack_nack_callback=self._guard(self._settled))
        return channel

    def _fits(self, properties: Any) -> bool:
        """Whether it can be put on the wire: some headers can be read and not written."""
        try:
            size = sum(len(piece) for piece in properties.encode())
        except Exception:  # noqa: BLE001  # pika raises whatever its encoder meets
            return False
        return size + FRAME_ROOM < int(self._connection.params.frame_max)

    def _flush_acks(self) -> None:
        channel = self._reading
        if channel is not None and channel.is_open:
            with self._connection.corked():
                for number, multiple in self._acks.flush():
                    channel.basic_ack(number, multiple=multiple)

    def _sync(self) -> None:
        """Answered in order: what was sent before on this channel is done."""
        self._ask(self._reading, "queue_declare", queue=self._names.dead, passive=True)

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

    def _ask(self, channel: Any, method: str, **arguments: Any) -> Any:
        """One method and its answer. Raises pika's `ChannelClosed` for the lock, else ours."""
        answers: list[Any] = []
        number = channel.channel_number

        def answered(frame: Any) -> None:
            answers.append(frame)
            self._loop.stop()

        getattr(channel, method)(callback=answered, **arguments)
        self._until(lambda: bool(answers) or number in self._ends, f"answer ({method.replace('_', '.')})")
        if answers:
            return answers[0]
        reason = self._ends[number]
        if isinstance(reason, ChannelClosed) and reason.reply_code == LOCKED:
            raise reason
        raise broker_error(reason if isinstance(reason, Exception) else Exception(reason))

    def _until(self, fact: Callable[[], bool], what: str, seconds: float = ANSWER_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not fact():
            if time.monotonic() > deadline:
                raise BrokerUnreachable(f"the broker did not {what} within {seconds:g} s; look at it, then try again")
            self.turn(SLICE)

    def _until_then(self, seconds: float) -> None:
        """Waits, whatever happens meanwhile."""
        then = time.monotonic() + seconds
        while time.monotonic() < then:
            self.turn(then - time.monotonic())

    def _check(self) -> None:
        failure = self._failure or self._lost
        if failure is None:
            return
        if isinstance(failure, (AMQPError, OSError)):
            raise broker_error(failure) from failure
        raise failure

    def _hang_up(self) -> None:
        """Channel first, so that nothing overtakes its acks; errors no longer matter."""
        deadline = time.monotonic() + CLOSE_SECONDS
        with suppress(AMQPError):
            if self._reading is not None and self._reading.is_open:
                self._reading.close()
                self._spin(lambda: self._reading.is_closed, deadline)
            self._connection.close()
        self._spin(lambda: self._connection.is_closed, deadline)
        if self._connection.is_closed:
            self._loop.close()

    def _break_off(self) -> None:
        """Without a goodbye, which would mix up the order of what is on its way."""
        if self._connection.is_open:
            self._connection._terminate_stream(AMQPError("broken off"))  # pika has no public way
            self._spin(lambda: False, time.monotonic() + CLOSE_SECONDS)
        self._loop.close()

    def _spin(self, fact: Callable[[], bool], deadline: float) -> None:
        while not fact() and self._lost is None and time.monotonic() < deadline:
            timer = self._loop.call_later(SLICE / 4, self._loop.stop)
            self._loop.start()
            self._loop.remove_timeout(timer)


def _busy(card: Mapping[str, Any], lock: str) -> str:
    if not card:
        return f"somebody holds the dead letters and does not say who; see at the broker who has the queue {lock}"
    progress = f", {card['progress']}" if card.get("progress") else ""
    return (
        f"`dead {card.get('what')}` of {card.get('who')} (process {card.get('process')}, "
        f"since {card.get('since')}{progress}) "
        "holds the dead letters; wait until it ends, or stop it there"
    )
