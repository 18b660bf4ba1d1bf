"""What an operator's tool says to a fleet, and hears: a short conversation, while members work on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pika
from pika.exceptions import ChannelClosed

from worker.core.fleet.messages import (
    Card,
    FleetMessage,
    Letter,
    OperatorOrders,
    Ordered,
    Who,
    decode_letter,
    encode_letter,
    encode_orders,
    newest,
)
from worker.core.topology import Names, fleet_topology
from worker.shells.amqp.errors import MISSING
from worker.shells.amqp.session import BrokerError, apply, broker_error, session

if TYPE_CHECKING:
    from worker.settings import AmqpSettings

TOOL: Final = "tool"
ANSWERS: Final = 1.0
"""Seconds in which members answer; one that stands still does not."""
LOOKS: Final = 20
LOOK_AGAIN: Final = 0.05
"""The orders' one message is out of its queue for a moment whenever somebody looks at it: so many looks, so far
apart."""


class FleetTool:
    """One conversation; see `fleet_tool`. Raises `BrokerError`."""

    def __init__(self, channel: Any, names: Names) -> None:
        self._channel = channel
        self._names = names

    def cards(self) -> list[Card]:
        """What the members say about themselves; the names of their leaders in ``leader``."""
        inbox = self._channel.queue_declare("", exclusive=True).method.queue
        self._say(Who(), reply_to=inbox)
        cards: list[Card] = []
        deadline = time.monotonic() + ANSWERS
        while time.monotonic() < deadline:
            method, _, body = self._channel.basic_get(inbox, auto_ack=True)
            if method is None:
                if cards and len(cards) >= sum({card.client: card.members for card in cards}.values()):
                    break
                self._channel.connection.sleep(0.02)
                continue
            letter = decode_letter(body)
            if letter is not None and isinstance(letter.message, Card):
                cards.append(letter.message)
        self._channel.queue_delete(inbox)
        return sorted(cards, key=lambda card: (card.client, card.host, card.process))

    def orders(self) -> OperatorOrders:
        """What operators want now, by what rests at the broker."""
        for look in range(LOOKS):
            held = []
            while (found := self._channel.basic_get(self._names.orders))[0] is not None:
                held.append((found[0].delivery_tag, found[2]))
            if held:
                index, orders = newest([body for _, body in held])
                # First the newest is back, then those that it replaced go.
                self._channel.basic_nack(held.pop(index)[0], requeue=True)
                for tag, _ in held:
                    self._channel.basic_ack(tag)
                return orders or OperatorOrders()
            if look < LOOKS - 1:
                self._channel.connection.sleep(LOOK_AGAIN)
        return OperatorOrders()

    def order(self, orders: OperatorOrders, left: Mapping[str, float]) -> None:
        """Lays it down at the broker, where it survives everybody, and tells all; ``left``: seconds left of pauses that
        end by themselves."""
        resting = pika.BasicProperties(content_type="application/json", delivery_mode=2)
        self._channel.basic_publish("", self._names.orders, encode_orders(orders), resting, mandatory=True)
        self._say(Ordered(orders, dict(left)))

    def probe(self) -> None:
        """Tells the fleet to test the gateway now."""
        self._say(Ordered(probe=True))

    def _say(self, message: FleetMessage, reply_to: str | None = None) -> None:
        properties = pika.BasicProperties(delivery_mode=1, reply_to=reply_to)
        self._channel.basic_publish(self._names.fleet, "", encode_letter(Letter(TOOL, "", message)), properties)


@contextmanager
def fleet_tool(amqp: AmqpSettings) -> Iterator[FleetTool]:
    """A conversation with the fleet of ``AMQP_PREFIX``. Raises `BrokerError`."""
    names = Names(amqp.prefix)
    with session(amqp, "fleet tool") as connection:
        if amqp.declare:
            apply(connection, fleet_topology(amqp.prefix, amqp.queue_type))
        channel = connection.channel()
        channel.confirm_delivery()
        try:
            yield FleetTool(channel, names)
        except ChannelClosed as closed:
            if closed.reply_code == MISSING:
                raise BrokerError(
                    f"there is no fleet under {amqp.prefix}: {closed.reply_text}; declare the topology "
                    "(see `qris-expire topology`), or correct AMQP_PREFIX"
                ) from closed
            raise broker_error(closed) from closed
