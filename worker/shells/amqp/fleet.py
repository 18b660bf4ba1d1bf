"""The fleet's wire: a connection of its own, on which a member hears and speaks, and on which its leadership hangs.

Its own, because acks and outcomes of the other two may be held up for a while, and a leader must not be. What is said
is transient; an exclusive queue for each member ends with its connection.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import pika
from pika.exceptions import ChannelClosed

from worker import __version__
from worker.app.fleet import Fleet
from worker.core import jakarta
from worker.core.fleet.messages import Card, Letter, OperatorOrders, Who, decode_letter, encode_letter, newest
from worker.core.topology import Names, Topology
from worker.shells.amqp.declaring import prepare
from worker.shells.amqp.errors import LOCKED
from worker.shells.amqp.link import Link, Parameters
from worker.shells.fibers import Fibers
from worker.shells.metrics import Metrics

INBOX: Final = 1_000
"""Messages that may wait for a member that stands still; the oldest are dropped, and the next beat tells everything."""
LOOK_AGAIN: Final = 0.05  # seconds until the next look for orders that somebody else is looking at
LOOKS: Final = 5
TICK: Final = 1.0
SICK: Final = "our calls fail while those of others succeed: look at the way from here to the gateway"


class FleetLink:
    """The `Wire` of a `Fleet` over the broker. All methods belong to the loop's thread, but `start` and what only
    reads."""

    def __init__(
        self,
        fleet: Fleet,
        names: Names,
        topology: Topology,
        parameters: Parameters,
        *,
        declare: bool,
        fibers: Fibers,
        rng: random.Random,
        metrics: Metrics,
    ) -> None:
        self._fleet = fleet
        self._names = names
        self._topology = topology
        self._declare = declare
        self._fibers = fibers
        self._metrics = metrics
        self._connection: Any = None
        self._channel: Any = None
        self._joined = False
        self._errands: deque[Callable[[Any], None]] = deque()  # the first one is under way
        self._name, self._names_used = fleet.me, 1
        self._link = Link(
            "fleet",
            fibers.loop,
            parameters,
            on_up=self._up,
            on_down=self._down,
            on_refused=lambda *_: None,
            on_blocked=lambda _: None,
            guard=self._guard,
            rng=rng,
        )
        fleet.wire = self

    # -- from any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connects, and comes back whenever it is thrown out."""
        self._fibers.soon(self._start)

    def close(self) -> None:
        """Leaves the fleet for good. On the loop's thread."""
        self._fleet.leave()
        self._link.close()

    @property
    def closed(self) -> bool:
        """Whether the connection is closed for good."""
        return self._link.closed

    @property
    def trouble(self) -> str:
        """Why the fleet cannot be reached; empty when it can."""
        if self._link.blocked:
            return "blocked by the broker (memory or disk alarm)"
        return "" if self._joined else self._link.trouble or "joining"

    def status(self) -> dict[str, str]:
        """Components of the fleet as people and probes read them: "ok", what is told beside it, or what is wrong.
        Without a limit a process works without the fleet as well."""
        card = self._fleet.card()
        trouble = self.trouble
        if not self._fleet.ready:
            fleet = trouble or "joining"
        elif trouble:
            fleet = f"no permits without it: {trouble}" if card.limit else f"ok, but we are not in it: {trouble}"
        else:
            fleet = "ok"
        return {"fleet": fleet, "sick": SICK if card.sick else "ok", "operator": _paused(card)}

    # -- the wire -----------------------------------------------------------------------------------------------------

    def say(self, to: str | None, letter: Letter) -> None:
        """What cannot be said now is not said later: it would be old."""
        if not self._joined or self._link.blocked or not self._channel.is_open:
            return
        exchange, key = (self._names.fleet, "") if to is None else ("", self._names.member(to))
        self._publish(exchange, key, letter, mandatory=to is not None)

    def acquire_term(self, term: int) -> None:
        """On a channel of its own, which the broker closes when somebody else has the queue."""
        connection, queue = self._connection, self._names.leader(self._fleet.member.client, term)
        told: list[bool] = []

        def answer(took: bool) -> None:
            if not told and connection is self._connection:
                told.append(took)
                (self._fleet.took if took else self._fleet.taken)(term)

        def opened(channel: Any) -> None:
            def declared(_: Any) -> None:
                answer(True)
                channel.close()

            channel.add_on_close_callback(self._guard(lambda *_: answer(False)))
            callback = self._guard(declared, channel)
            channel.queue_declare(queue, exclusive=True, auto_delete=False, callback=callback)

        self._errand(opened)

    def release_term(self, term: int) -> None:
        if self._joined and self._channel.is_open:
            self._channel.queue_delete(self._names.leader(self._fleet.member.client, term), callback=lambda _: None)

    def read_orders(self) -> None:
        """Of all messages there, the newest goes back to the queue, and those that it replaced go; whoever
        comes meanwhile finds none, and looks again."""
        connection, looks = self._connection, iter(range(LOOKS - 1))
        held: list[tuple[int, bytes]] = []

        def told(orders: OperatorOrders | None) -> None:
            if connection is self._connection:
                self._fleet.rested(orders)

        def closed(_channel: Any, reason: Any) -> None:
            if isinstance(reason, ChannelClosed):  # there is no such queue, so nobody has ordered anything
                told(None)

        def opened(channel: Any) -> None:
            def get() -> None:
                channel.basic_get(self._names.orders, callback=self._guard(found, channel))

            def found(_: Any, method: Any, _properties: Any, body: bytes) -> None:
                held.append((method.delivery_tag, body))
                get()

            def empty(_: Any) -> None:
                if held:
                    index, orders = newest([body for _, body in held])
                    channel.basic_nack(held.pop(index)[0], requeue=True)
                    for tag, _ in held:
                        channel.basic_ack(tag)
                    channel.close()
                    told(orders)
                elif next(looks, None) is None:
                    channel.close()  # `closed` follows
                else:
                    self._fibers.loop.call_later(LOOK_AGAIN, self._guard(get, channel))

            channel.add_callback(self._guard(empty, channel), [pika.spec.Basic.GetEmpty], one_shot=False)
            channel.add_on_close_callback(self._guard(closed))
            get()

        self._errand(opened)

    # -- the connection -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._fleet.start()
        self._link.connect()
        self._tick()

    def _tick(self) -> None:
        self._fibers.loop.call_later(TICK, self._guard(self._tick))
        self._link.expect(self._joined, time.monotonic())
        card = self._fleet.card()
        self._metrics.fleet_members(card.members)
        self._metrics.fleet_leader(card.leader == self._fleet.me)
        self._metrics.rate_limit(card.limit)
        self._metrics.member_sick(card.sick)
        self._metrics.paused("sick", card.sick)
        self._metrics.paused("operator", any(self._fleet.paused(lane) for lane in card.orders.pauses))

    def _up(self, connection: Any) -> None:
        self._connection = connection
        prepare(
            connection,
            self._link,
            self._topology,
            declare=self._declare,
            guard=self._guard,
            then=lambda: self._open(self._opened),
        )

    def _open(self, then: Callable[[Any], None]) -> None:
        """Opens a channel, if there is a connection."""
        if self._connection is not None:
            self._connection.channel(on_open_callback=self._guard(lambda channel: self._guard(then, channel)(channel)))

    def _errand(self, work: Callable[[Any], None]) -> None:
        """Does this on a channel of its own, which it has to close. One errand follows the other, since a broker may
        allow no more than two channels to a connection."""
        if self._connection is not None:
            self._errands.append(work)
            if len(self._errands) == 1:
                self._open(self._begin_errand)

    def _begin_errand(self, channel: Any) -> None:
        over = partial(self._end_errand, channel.connection)
        # One turn later, since pika forgets a channel only after it has told that it is closed.
        channel.add_on_close_callback(self._guard(lambda *_: self._fibers.soon(over)))
        self._errands[0](channel)

    def _end_errand(self, connection: Any) -> None:
        if connection is self._connection:
            self._errands.popleft()
            if self._errands:
                self._open(self._begin_errand)

    def _opened(self, channel: Any) -> None:
        inbox = self._names.member(self._fleet.member.me)
        channel.add_on_close_callback(self._guard(self._closed))
        channel.add_on_return_callback(self._guard(self._returned))

        def consumes(_: Any) -> None:
            self._channel, self._joined = channel, True
            self._link.works()
            self._fleet.joined()

        # Without an answer to each: what the broker refuses closes the channel.
        channel.queue_declare(inbox, exclusive=True, arguments={"x-max-length": INBOX, "x-queue-type": "classic"})
        channel.queue_bind(inbox, self._names.fleet)
        came, on = self._guard(self._came), self._guard(consumes, channel)
        channel.basic_consume(inbox, came, auto_ack=True, exclusive=True, callback=on)

    def _down(self, _reason: str) -> None:
        self._connection = self._channel = None
        self._errands.clear()
        if self._joined:
            self._joined = False
            self._fleet.lost()

    def _closed(self, channel: Any, reason: Any) -> None:
        if channel is self._channel or self._channel is None:
            if getattr(reason, "reply_code", None) == LOCKED:
                # Since 4.3 the queue of a lost connection stays as long as the node of that connection is down.
                self._names_used += 1
                self._fleet.member.rename(f"{self._name}.{self._names_used}")
            self._link.reconnect(f"the fleet's channel was closed: {getattr(reason, 'reply_text', reason)}")

    def _came(self, _channel: Any, _method: Any, properties: Any, body: bytes) -> None:
        letter = decode_letter(body)
        if letter is None:
            return
        if isinstance(letter.message, Who):
            if properties.reply_to and self._channel is not None and self._channel.is_open:
                member = self._fleet.member
                host, process = socket.gethostname(), os.getpid()
                card = replace(self._fleet.card(), host=host, process=process, version=__version__)
                answer = Letter(member.me, member.client, card)
                self._publish("", str(properties.reply_to), answer, mandatory=False)
            return
        self._fleet.received(letter)

    def _returned(self, _channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        self._fleet.undelivered(str(method.routing_key).removeprefix(self._names.member("")))

    def _publish(self, exchange: str, key: str, letter: Letter, *, mandatory: bool) -> None:
        properties = pika.BasicProperties(content_type="application/json", delivery_mode=1)
        self._channel.basic_publish(exchange, key, encode_letter(letter), properties, mandatory=mandatory)

    def _guard(self, callback: Callable[..., None], channel: Any = None) -> Callable[..., None]:
        """pika would take an exception for a lost connection; out of the loop's turn it ends the process, loudly. What
        comes when its ``channel`` is closed, or being closed, was on its way, and means nothing any more."""

        def guarded(*args: Any) -> None:
            try:
                if channel is None or channel.is_open:
                    callback(*args)
            except Exception as error:  # noqa: BLE001  # raised again where it is heard
                self._fibers.soon(partial(_raise, error))

        return guarded


def _paused(card: Card) -> str:
    """What an operator wants, for people: who, when and why."""
    said = []
    for lane, pause in sorted(card.orders.pauses.items()):
        since = jakarta.iso(pause.since, milliseconds=False)
        why = f" ({pause.reason})" if pause.reason else ""
        left = f", for {card.pauses[lane]:.0f} s more" if lane in card.pauses else ""
        said.append(f"{lane} paused by {pause.by} since {since}{why}{left}")
    return f"ok, {'; '.join(said)}" if said else "ok"


def _raise(error: Exception) -> None:
    raise error
