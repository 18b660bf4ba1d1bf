"""Publishes and follows in bulk, for tools: the worker's own publisher fed through a bounded window, and one consumer.

Everything runs on one loop in the caller's thread, the `Sweep`'s methods included.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from pika.adapters.select_connection import IOLoop
from pika.exceptions import ChannelClosed, UnroutableError
from pika.spec import BasicProperties

from worker.app.sweep import AT_ONCE, Sweep
from worker.core.delivery import BATCH_ID, text
from worker.core.lanes import SWEEP
from worker.core.sweep import STOP, follower_name
from worker.core.topology import Names, Topology
from worker.shells.amqp import codec
from worker.shells.amqp.declaring import prepare
from worker.shells.amqp.errors import LOCKED, MISMATCH
from worker.shells.amqp.link import Link, Parameters
from worker.shells.amqp.publisher import Publication, Publisher
from worker.shells.amqp.session import BrokerError

WINDOW: Final = 4000
"""Publications without their confirm: enough to keep broker and network busy while a slow disk confirms thousands at a
time, a few megabytes for both sides, and the most that a crash publishes again."""
REFILL: Final = 3000  # few and large writes, yet never an idle broker
PREFETCH: Final = 1000
TICK: Final = 0.1
LOOK_SECONDS: Final = 0.25  # between two looks at the lane
CLOSE_SECONDS: Final = 3.0
_CURRENT: Final = re.compile(r"current is (?:the value )?'([^']+)'")
STOP_SECONDS: Final = 10.0  # for a follower to answer, behind the outcomes that wait before the order
ORDERED_AT: Final = "ordered-at"  # milliseconds since the epoch: a later resumption makes the order void
MAX_WHO: Final = 200
WHO_SECONDS: Final = 2.0  # for a follower to say who it is
GONE_SECONDS: Final = 5.0  # without a delivery, of those that were there a moment ago


class Followed(BrokerError):
    """Another process follows the batch."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where to publish and what to follow. ``declare``: as AMQP_DECLARE. ``inbox``: the queue to follow, which is ours
    to declare in any case, and its batch; None to follow nothing. Those who ask who follows are told ``who``."""

    names: Names
    topology: Topology
    declare: bool
    inbox: Topology | None = None
    batch: str = ""
    who: str = ""


class Bulk:
    """One sweep. `run` blocks until it says that it is done."""

    def __init__(
        self, route: Route, parameters: Parameters, sweep: Sweep, *, publishing: bool, rng: random.Random
    ) -> None:
        self._route = route
        self._sweep = sweep
        self._loop = IOLoop()
        self._failure: BaseException | None = None
        self._closing_at: float | None = None
        self._channel: Any = None
        self._pending: list[bytes] = []
        self._last_tag = 0
        self._came = 0  # outcomes since the last hand-over
        self._look_at = 0.0
        self._looking: Any = None  # the channel by which the lane is looked at
        self._held = False  # once, so that a later refusal is most likely our own doing
        self._publisher: Publisher[int] = Publisher(
            self._loop,
            _Unwatched(),
            on_confirmed=lambda publication: sweep.confirmed(publication.settles),
            after_confirms=self._refill,
            guard=self._guard,
        )
        self._links: list[Link] = []
        if publishing:
            self._add_link("publish", parameters, rng, self._publish_up, self._publish_down)
        if route.inbox is not None:
            self._add_link("consume", parameters, rng, partial(self._consume_up, route.inbox), self._consume_down)

    def run(self) -> None:
        """Raises what the sweep raises."""
        codec.tolerate()
        for link in self._links:
            link.connect()
        self._tick()
        self._loop.start()
        self._loop.close()
        if self._failure is not None:
            raise self._failure

    def _add_link(
        self,
        name: str,
        parameters: Parameters,
        rng: random.Random,
        on_up: Callable[[Link, Any], None],
        on_down: Callable[[], None],
    ) -> None:
        link = Link(
            name,
            self._loop,
            parameters,
            on_up=lambda connection: on_up(link, connection),
            on_down=lambda _: on_down(),
            on_refused=lambda *_: None,  # reported before we start; a later one is waited for like any trouble
            on_blocked=lambda _: self._feed(),
            guard=self._guard,
            rng=rng,
        )
        self._links.append(link)

    def _guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            try:
                callback(*args)
            except BaseException as error:  # noqa: BLE001  # pika would swallow it; `run` raises it
                self._failure = self._failure or error
                self._loop.stop()

        return guarded

    def _tick(self) -> None:
        self._guard(self._look)()
        self._loop.call_later(TICK, self._tick)

    def _look(self) -> None:
        now = time.monotonic()
        if self._closing_at is not None:
            if now > self._closing_at or all(link.closed for link in self._links):
                self._loop.stop()
            return
        self._publisher.tick(now)
        self._hand_over()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._look_at_lane()
        self._feed()
        if not self._sweep.look(self._trouble()):
            self._closing_at = now + CLOSE_SECONDS
            for link in self._links:
                link.close()

    def _trouble(self) -> str:
        for link in self._links:
            if link.blocked:
                return "the broker blocks publishers (memory or disk alarm)"
            if link.trouble and not link.up:
                return f"the broker is away: {link.trouble}"
        return self._publisher.trouble or self._publisher.set_aside

    # -- publishing -------------------------------------------------------------------------------------------------

    def _publish_up(self, link: Link, connection: Any) -> None:
        def declared() -> None:
            self._publisher.open(connection, link, self._feed)
            if self._route.inbox is not None:
                connection.channel(on_open_callback=self._guard(self._looks_by))

        route = self._route
        prepare(connection, link, route.topology, declare=route.declare, guard=self._guard, then=declared)

    def _looks_by(self, channel: Any) -> None:
        def closed(_channel: Any, _reason: Any) -> None:
            if channel is self._looking:  # the publisher reports a lane that is gone; what is known of it stays
                self._looking = None

        self._looking = channel
        channel.add_on_close_callback(self._guard(closed))

    def _look_at_lane(self) -> None:
        channel, self._looking = self._looking, None
        if channel is None or not channel.is_open:
            return

        def looked(answer: Any) -> None:
            self._looking = channel
            self._sweep.lane(answer.method.message_count, answer.method.consumer_count)
            self._feed()

        channel.queue_declare(self._route.names.queue(SWEEP), passive=True, callback=self._guard(looked))

    def _publish_down(self) -> None:
        self._looking = None
        self._publisher.down()

    def _refill(self) -> None:
        if len(self._publisher) <= REFILL:
            self._feed()

    def _feed(self) -> None:
        publications = list[Publication[int]]()
        if self._publisher.ready:
            while len(self._publisher) + len(publications) < WINDOW and (following := self._sweep.next()) is not None:
                number, message = following
                publications.append(Publication(message, number))
        self._publisher.publish(*publications)

    # -- following --------------------------------------------------------------------------------------------------

    def _consume_up(self, inbox: Topology, link: Link, connection: Any) -> None:
        def alone() -> None:
            self._held = True
            self._listen(connection)
            queue = inbox.queues[0].name
            prepare(
                connection,
                link,
                inbox,
                declare=True,
                guard=self._guard,
                then=lambda: self._consume(connection, link, queue),
            )

        self._hold(connection, link, alone)

    def _hold(self, connection: Any, link: Link, then: Callable[[], None]) -> None:
        """Two that follow one batch would get a part of the outcomes each, and both wait for ever for the rest."""
        queue = follower_name(self._route.names, self._route.batch)

        def ended(_channel: Any, why: BaseException) -> None:
            if not (isinstance(why, ChannelClosed) and why.reply_code == LOCKED):
                link.reconnect(f"channel of {queue} closed: {why}")
            elif self._held:  # most likely by our lost connection, until the broker notices that it is lost
                link.reconnect("another connection follows the batch, or the one that was lost is still open")
            else:
                raise Followed(_followed(self._route.batch, ""))

        def asked(channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
            if properties.reply_to:
                channel.basic_publish("", properties.reply_to, self._route.who.encode())

        def opened(channel: Any) -> None:
            channel.add_on_close_callback(self._guard(ended))
            channel.queue_declare(queue, exclusive=True)  # without an answer: what is refused closes the channel
            channel.basic_consume(queue, self._guard(asked), auto_ack=True, callback=self._guard(lambda _: then()))

        connection.channel(on_open_callback=self._guard(opened))

    def _listen(self, connection: Any) -> None:
        """To the fleet, for what people should know of a pause. An older worker has no fleet: then nothing comes."""

        def heard(_channel: Any, _method: Any, _properties: Any, body: bytes) -> None:
            self._sweep.fleet(body)

        def opened(channel: Any) -> None:
            channel.queue_declare("", exclusive=True, arguments={"x-max-length": 10})
            channel.queue_bind("", self._route.names.fleet)  # "": the queue that the channel has declared last
            channel.basic_consume("", self._guard(heard), auto_ack=True)

        connection.channel(on_open_callback=self._guard(opened))

    def _consume(self, connection: Any, link: Link, queue: str) -> None:
        def opened(channel: Any) -> None:
            self._channel = channel
            channel.add_on_close_callback(self._guard(closed))
            channel.add_on_cancel_callback(
                self._guard(lambda _: link.reconnect(f"the broker cancelled the consumer of {queue}"))
            )
            channel.basic_qos(prefetch_count=PREFETCH)
            channel.basic_consume(queue, self._guard(self._delivered), callback=self._guard(lambda _: link.works()))

        def closed(channel: Any, reason: Any) -> None:
            if channel is self._channel and link.up:
                link.reconnect(f"following channel closed: {reason}")

        connection.channel(on_open_callback=self._guard(opened))

    def _delivered(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        if channel is not self._channel:
            return
        self._last_tag = method.delivery_tag
        if properties.type == STOP:
            self._stopped_by(channel, properties, body)
            return
        self._came += 1
        headers = properties.headers or {}
        if BATCH_ID in headers and text(headers[BATCH_ID]) == self._route.batch:
            self._pending.append(body)
        if len(self._pending) >= AT_ONCE:
            self._hand_over()
            self._feed()

    def _stopped_by(self, channel: Any, properties: Any, body: bytes) -> None:
        self._hand_over()
        ordered = (properties.headers or {}).get(ORDERED_AT)
        epoch = ordered / 1000 if isinstance(ordered, int) else 0.0
        answer = self._sweep.cut(body.decode(errors="replace")[:MAX_WHO], epoch)
        if properties.reply_to:
            channel.basic_publish("", properties.reply_to, answer.encode())

    def _hand_over(self) -> None:
        """Kept first, acked then; the outcomes of other batches are acked along."""
        if not self._last_tag:
            return
        bodies, self._pending = self._pending, []
        came, self._came = self._came, 0
        if came:
            self._sweep.outcomes(bodies, came)
        tag, self._last_tag = self._last_tag, 0
        if self._channel is not None and self._channel.is_open:
            self._channel.basic_ack(tag, multiple=True)

    def _consume_down(self) -> None:
        self._channel = None
        self._pending, self._last_tag, self._came = [], 0, 0  # the broker has them again


def check_free(connection: Any, follower: str, batch: str) -> None:
    """Raises `Followed`, with who it is, when another process follows the batch; else pika's errors."""
    channel = connection.channel()
    try:
        channel.queue_declare(follower, exclusive=True)
    except ChannelClosed as closed:
        if closed.reply_code != LOCKED:
            raise
        who = _ask(connection.channel(), follower, "who?", WHO_SECONDS)[:MAX_WHO]
        raise Followed(_followed(batch, who)) from None
    channel.queue_delete(follower)
    channel.close()


def order_stop(connection: Any, inbox: str, who: str, now: float) -> str | None:
    """Ends the publishing of a batch that is followed from anywhere. What its process answers, empty if none answered
    (the next one that follows the batch will find the message); None if nobody follows the batch at this broker."""
    channel = connection.channel()
    channel.confirm_delivery()
    headers = {ORDERED_AT: round(now * 1000)}
    try:
        return _ask(channel, inbox, who, STOP_SECONDS, type=STOP, delivery_mode=2, headers=headers)
    except UnroutableError:
        return None


def _ask(channel: Any, queue: str, question: str, seconds: float, **properties: Any) -> str:
    """What who consumes from the queue answers on a channel that serves for nothing else; empty if nobody does."""
    answers = channel.queue_declare("", exclusive=True).method.queue
    asked = BasicProperties(reply_to=answers, **properties)
    channel.basic_publish("", queue, question.encode(), asked, mandatory=True)
    _, _, body = next(channel.consume(answers, auto_ack=True, inactivity_timeout=seconds), (None, None, None))
    channel.cancel()
    return (body or b"").decode(errors="replace")


def _followed(batch: str, who: str) -> str:
    return (
        f"batch {batch} is followed by {who or 'another process'} already, and each outcome goes to one of two; "
        "let that one end, or stop it there"
    )


def identity(connection: Any, names: Names, place: str) -> str:
    """What tells this broker, virtual host and prefix from every other, whatever address leads there.

    The first sweep makes an exchange with a random argument. An exchange cannot be declared again with another
    argument, and the broker's refusal quotes the one that it has. Where the user may not declare it, ``place``, the
    address, must do. Raises pika's errors.
    """
    mine = f"{names.identity}.{uuid.uuid4().hex}"
    channel = connection.channel()
    try:
        channel.exchange_declare(names.identity, "fanout", durable=True, arguments={"alternate-exchange": mine})
    except ChannelClosed as closed:
        found = _CURRENT.search(closed.reply_text) if closed.reply_code == MISMATCH else None
        return found[1] if found else place
    channel.close()
    return mine


def take(connection: Any, queue: str, batch: str) -> Iterator[list[bytes]]:
    """What a batch's inbox holds now, in pieces; each is acked when the next is asked for. Raises pika's errors."""
    channel = connection.channel()
    left = int(channel.queue_declare(queue, passive=True).method.message_count)
    channel.basic_qos(prefetch_count=PREFETCH)
    bodies: list[bytes] = []
    for method, properties, body in channel.consume(queue, inactivity_timeout=GONE_SECONDS) if left else ():
        if method is None:
            break  # somebody else took them
        left -= 1
        if text((properties.headers or {}).get(BATCH_ID, "")) == batch:
            bodies.append(body)
        if method.delivery_tag % AT_ONCE == 0 or not left:
            yield bodies
            channel.basic_ack(method.delivery_tag, multiple=True)
            bodies = []
        if not left:
            break
    channel.close()


class _Unwatched:
    """A `PublisherWatch`, for nobody."""

    def confirm_took(self, seconds: float) -> None: ...
    def unconfirmed(self, count: int) -> None: ...
