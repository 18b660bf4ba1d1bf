"""The short way through pika's connection: it tells its receivers exactly what pika's own way tells them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pika import spec
from pika.exceptions import ChannelWrongStateError, InvalidFrameError
from pika.frame import Body, Header, Heartbeat, Method

from worker.core.delivery import Message
from worker.shells.amqp.connection import KNOWN, Connection, new_loop, still_deliver
from worker.shells.amqp.publisher import UNWRITABLE

LARGEST = 2_000
"""Bytes of a body in one frame here, so that large ones are small."""

CONSUMER, OTHER = "ctag1.ours", "ctag1.other"


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        """See pika."""
        self.written += data

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0


class Peer:
    """A connection with one channel that consumes and publishes, and what it was told."""

    def __init__(self, *, short: bool) -> None:
        self.told: list[object] = []
        self.wire = Wire()
        self.connection = Connection(
            pika.ConnectionParameters(), custom_ioloop=new_loop(), internal_connection_workflow=False
        )
        self.connection._short = short
        self.connection._body_max_length = LARGEST
        self.connection._transport = self.wire
        self.connection._set_connection_state(self.connection.CONNECTION_OPEN)
        self.connection.server_capabilities = {"publisher_confirms": True, "basic.nack": True}
        self.channel = self.connection.channel(1)
        self.feed(Method(1, spec.Channel.OpenOk()).marshal())
        self.channel.basic_consume("lane", self._delivered, consumer_tag=CONSUMER)
        self.feed(Method(1, spec.Basic.ConsumeOk(CONSUMER)).marshal())
        self.connection.confirm(
            self.channel, lambda *about: self.told.append(("confirm", *about)), lambda _: self.told.append("selected")
        )
        self.feed(Method(1, spec.Confirm.SelectOk()).marshal())

    def feed(self, data: bytes, *cuts: int) -> None:
        """It comes from the broker, in pieces that end at ``cuts``."""
        edges = [0, *sorted(cuts), len(data)]
        for start, end in pairwise(edges):
            self.connection._on_data_available(data[start:end])

    def _delivered(self, _: Any, method: Any, properties: Any, body: bytes) -> None:
        self.told.append((method.consumer_tag, method.delivery_tag, method.redelivered, vars(properties), body))


@contextmanager
def both() -> Iterator[tuple[Peer, Peer]]:
    """One that goes the short way, and one that goes pika's."""
    peers = Peer(short=True), Peer(short=False)
    try:
        yield peers
    finally:
        for peer in peers:
            peer.connection.ioloop.close()


def delivery(consumer: str, number: int, redelivered: bool, properties: Any, body: bytes) -> bytes:
    """The frames of one delivery, as RabbitMQ sends them."""
    deliver = spec.Basic.Deliver(consumer, number, redelivered, "commands", "sweep")
    bodies = [Body(1, body[at : at + LARGEST]).marshal() for at in range(0, len(body), LARGEST)]
    return b"".join([Method(1, deliver).marshal(), Header(1, len(body), properties).marshal(), *bodies])


TEXTS = st.text(max_size=20)
PROPERTIES = st.builds(
    pika.BasicProperties,
    content_type=st.none() | TEXTS,
    headers=st.none() | st.dictionaries(TEXTS, TEXTS | st.integers(-9, 2**40) | st.booleans(), max_size=3),
    timestamp=st.none() | st.integers(0, 2**40),
    **dict.fromkeys(("delivery_mode", "priority"), st.none() | st.integers(0, 255)),
    **dict.fromkeys(
        ("content_encoding", "correlation_id", "reply_to", "expiration", "message_id"),
        st.none() | TEXTS | st.binary(max_size=20),
    ),
    **dict.fromkeys(("type", "user_id", "app_id", "cluster_id"), st.none() | TEXTS),
)
BODIES = st.binary(max_size=40) | st.sampled_from([b"x" * LARGEST, b"x" * (LARGEST + 1), b"x" * (3 * LARGEST)])
NUMBERS = st.integers(1, 2**40)
ARRIVALS = (
    st.builds(delivery, st.sampled_from([CONSUMER, OTHER]), NUMBERS, st.booleans(), PROPERTIES, BODIES)
    | st.builds(lambda number, multiple: Method(1, spec.Basic.Ack(number, multiple)).marshal(), NUMBERS, st.booleans())
    | st.builds(lambda number, multiple: Method(1, spec.Basic.Nack(number, multiple)).marshal(), NUMBERS, st.booleans())
    | st.builds(lambda: Heartbeat().marshal())
)


def test_pika_is_one_whose_private_parts_are_known() -> None:
    """Else every frame goes pika's own way, which costs more: look at its changes, then add the version."""
    assert pika.__version__ in KNOWN


@pytest.mark.parametrize("version", [pika.__version__, "1.9.9"])
def test_a_loop_in_a_hurry_does_not_wait(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Whatever its timers say; also with a pika whose private parts are not known."""
    monkeypatch.setattr(pika, "__version__", version)
    loop: Any = new_loop()
    loop.activate_poller()
    loop.call_later(30, lambda: None)

    loop.hurry()
    began = time.monotonic()
    loop.poll()

    assert time.monotonic() - began < 20
    loop.close()


@given(st.lists(ARRIVALS, max_size=6), st.lists(st.integers(0, 30_000), max_size=6))
def test_what_arrives(arrivals: Sequence[bytes], cuts: Sequence[int]) -> None:
    """Deliveries of every size, confirms and all else, in whatever pieces they come."""
    data = b"".join(arrivals)
    with both() as (short, usual):
        for peer in (short, usual):
            peer.feed(data, *(cut % (len(data) + 1) for cut in cuts))

        assert short.told == usual.told
        assert short.connection.bytes_received == usual.connection.bytes_received
        assert short.connection.frames_received == usual.connection.frames_received


@given(TEXTS, TEXTS, PROPERTIES, BODIES)
def test_what_is_published(exchange: str, routing_key: str, properties: Any, body: bytes) -> None:
    """The same bytes."""
    given = {name: value for name, value in vars(properties).items() if value is not None}
    with both() as (short, usual):
        for peer in (short, usual):
            peer.connection.publish(peer.channel, Message(exchange, routing_key, body, given))

        assert short.wire.written == usual.wire.written
        assert short.connection.bytes_sent == usual.connection.bytes_sent


@pytest.mark.parametrize(
    "properties", [{"message_id": "x" * 256}, {"timestamp": -1}, {"type": 5}, {"headers": {"id": 1j}}], ids=str
)
def test_properties_that_amqp_has_no_form_for(properties: dict[str, Any]) -> None:
    """Raise one of the same errors, and nothing is sent."""
    with both() as peers:
        for peer in peers:
            before = peer.wire.written
            with pytest.raises(UNWRITABLE):
                peer.connection.publish(peer.channel, Message("", "lane", b"body", properties))

            assert peer.wire.written == before


@given(NUMBERS, st.booleans())
def test_what_is_acknowledged(number: int, multiple: bool) -> None:
    """The same bytes."""
    with both() as (short, usual):
        for peer in (short, usual):
            peer.connection.acknowledge(peer.channel, number, multiple)

        assert short.wire.written == usual.wire.written
        assert (short.connection.bytes_sent, short.connection.frames_sent) == (
            usual.connection.bytes_sent,
            usual.connection.frames_sent,
        )


def test_frames_of_another_channel_between_those_of_a_delivery() -> None:
    """AMQP allows that."""
    frames = delivery(CONSUMER, 1, False, pika.BasicProperties(message_id="m"), b"body")
    head = len(Method(1, spec.Basic.Deliver(CONSUMER, 1, False, "commands", "sweep")).marshal())
    between = Heartbeat().marshal()
    with both() as (short, usual):
        for peer in (short, usual):
            peer.feed(frames[:head] + between + frames[head:])

        assert short.told == usual.told
        assert len(short.told) == 2, "selected, delivered"


@pytest.mark.parametrize("place", [7, 60, -1])
def test_a_frame_that_does_not_end_as_it_should(place: int) -> None:
    """Is no frame: nothing after it can be understood, so the connection ends."""
    frames = bytearray(delivery(CONSUMER, 1, False, pika.BasicProperties(), b"body" * 9))
    ends = [index for index, byte in enumerate(frames) if byte == spec.FRAME_END]
    frames[min(ends, key=lambda end: abs(end - place % len(frames)))] = 0
    with both() as (short, usual):
        for peer in (short, usual):
            with pytest.raises(InvalidFrameError):
                peer.feed(bytes(frames))

        assert short.told == usual.told == ["selected"]


def test_a_channel_of_a_connection_that_is_being_closed() -> None:
    """Is not opened, and nothing is raised: whoever wants it may not know yet that the connection ends."""
    with both() as (short, usual):
        for peer in (short, usual):
            peer.connection._set_connection_state(peer.connection.CONNECTION_CLOSING)
            before = peer.wire.written

            assert peer.connection.channel(on_open_callback=peer.told.append) is None
            assert peer.wire.written == before


def test_a_publication_on_a_channel_that_is_closed() -> None:
    """Is refused, and nothing is sent."""
    with both() as (short, _):
        short.feed(Method(1, spec.Channel.Close(404, "not found", 0, 0)).marshal())
        before = short.wire.written
        with pytest.raises(ChannelWrongStateError):
            short.connection.publish(short.channel, Message("", "lane", b"body", {}))

        assert short.wire.written == before


def test_a_delivery_that_was_on_its_way_when_its_consumer_was_cancelled() -> None:
    """Reaches the consumer, whichever way it takes; without the mark's removal pika would reject it."""
    with both() as (short, usual):
        for peer in (short, usual):
            peer.channel.basic_cancel(CONSUMER, callback=lambda _: None)
            still_deliver(peer.channel, CONSUMER)
            written = peer.wire.written
            peer.feed(delivery(CONSUMER, 1, False, pika.BasicProperties(), b"body"))
            assert peer.wire.written == written, "nothing is rejected"

        assert short.told == usual.told
        assert len(short.told) == 2, "selected, delivered"


def test_what_is_sent_while_it_is_corked() -> None:
    """Leaves in one piece at the end of the block."""
    pieces: list[bytes] = []
    with both() as (short, _):
        short.wire.write = pieces.append  # type: ignore[assignment,method-assign]
        with short.connection.corked():
            for number in range(3):
                short.connection.publish(short.channel, Message("", "lane", b"%d" % number, {}))
            assert pieces == []

        assert len(pieces) == 1
