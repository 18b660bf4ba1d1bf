"""A lock among tools, held by the broker: free when its holder's connection ends, however it ends."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import pika
from pika.exceptions import ChannelClosed

from worker.app.dead_letters import Stop
from worker.core import jakarta
from worker.shells import operator
from worker.shells.amqp.conversation import SLICE, Conversation, Interrupted
from worker.shells.amqp.errors import LOCKED
from worker.shells.amqp.session import BrokerError, BrokerUnreachable, broker_error

HOLDER_SECONDS: Final = 1.5  # for the holder of the lock to say who it is


class Busy(BrokerError):
    """Somebody else holds the dead letters."""


class BrokerLock:
    """An exclusive queue, which the broker gives to one connection; its holder answers there who it is.

    ``alone``: those who find it taken do not wait, since it may take hours.
    """

    def __init__(self, talk: Conversation, name: str, what: str, *, stop: Stop, alone: bool) -> None:
        self._talk = talk
        self._name = name
        self._stop = stop
        self._card: dict[str, Any] = {
            "what": what,
            "alone": alone,
            "who": operator.who(),
            "process": os.getpid(),
            "since": jakarta.iso(time.time(), milliseconds=False),
            "progress": "",
        }

    def take(self, patience: float) -> None:
        """Waits so many seconds for it. Raises `Busy`, `Interrupted`."""
        deadline = time.monotonic() + patience
        while not self._taken():
            holder = self._holder()
            if holder.get("alone") or time.monotonic() > deadline:
                raise Busy(_busy(holder, self._name))
            if self._stop():
                raise Interrupted
            self._talk.pause(SLICE)

    def say(self, progress: str) -> None:
        """What those who wait are shown."""
        self._card["progress"] = progress

    def _taken(self) -> bool:
        talk = self._talk
        channel = talk.channel()
        try:
            talk.ask(channel, "queue_declare", queue=self._name, exclusive=True)
        except ChannelClosed as closed:
            if closed.reply_code == LOCKED:
                return False
            raise broker_error(closed, f"queue {self._name}") from closed
        asked = talk.guard(self._asked)
        talk.ask(channel, "basic_consume", queue=self._name, on_message_callback=asked, auto_ack=True)
        return True

    def _asked(self, channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
        """Somebody wants to know who holds it."""
        if properties.reply_to:
            channel.basic_publish("", properties.reply_to, json.dumps(self._card).encode())

    def _holder(self) -> Mapping[str, Any]:
        """What its holder says about itself; empty when it does not answer."""
        talk, answers = self._talk, list[bytes]()
        channel = talk.channel()
        inbox = talk.ask(channel, "queue_declare", queue="", exclusive=True).method.queue

        def answered(_channel: Any, _method: Any, _properties: Any, body: bytes) -> None:
            answers.append(body)
            talk.wake()

        talk.ask(channel, "basic_consume", queue=inbox, on_message_callback=talk.guard(answered), auto_ack=True)
        channel.basic_publish("", self._name, b"who?", pika.BasicProperties(reply_to=inbox))
        with suppress(BrokerUnreachable):
            talk.until(lambda: bool(answers), "say who", HOLDER_SECONDS)
        channel.close()
        try:
            card = json.loads(answers[0]) if answers else {}
        except ValueError:
            return {}
        return card if isinstance(card, dict) else {}


def _busy(card: Mapping[str, Any], lock: str) -> str:
    if not card:
        return f"somebody holds the dead letters and does not say who; see at the broker who has the queue {lock}"
    progress = f", {card['progress']}" if card.get("progress") else ""
    return (
        f"`dead {card.get('what')}` of {card.get('who')} (process {card.get('process')}, "
        f"since {card.get('since')}{progress}) "
        "holds the dead letters; wait until it ends, or stop it there"
    )
