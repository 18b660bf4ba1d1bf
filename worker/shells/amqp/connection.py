"""pika's connection with a short way for the frames that make up all traffic: deliveries, publications, confirms.

This is the one file that reaches into private parts of pika (the codec, which replaces two public functions, is
`worker.shells.amqp.codec`). The short way is for the versions in `KNOWN` only; with any other, and for every other
frame, everything goes pika's own way, which costs a fifth more for each command. Tests compare the two.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Final

import pika
from pika import spec
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.data import encode_table
from pika.exceptions import NoFreeChannels, ShortStringTooLong, StreamLostError
from pika.frame import Method, decode_frame

from worker.core.delivery import Message
from worker.shells.fibers import Loop

KNOWN: Final = ("1.4.4",)
"""The versions of pika whose private parts are as they are used here."""

Confirmed = Callable[[int, bool, bool], None]
"""``confirmed(number, multiple, ack)``: up to this publication, or this one alone; taken or not."""

_READ_BYTES: Final = 64 * 1024
_HEAD: Final = struct.Struct(">BHI")  # of a frame: kind, channel, bytes of the payload
_METHOD: Final = struct.Struct(">I")  # class and method
_SIZE: Final = struct.Struct(">4xQ")  # of the body, in a content header
_TAG: Final = struct.Struct(">QB")  # delivery tag; redelivered, or multiple
_ACK: Final = struct.Struct(">BHIIQBB")  # a whole frame: kind, channel, size, method, delivery tag, multiple, end
_CONTENT: Final = struct.Struct(">BHIHxxQH")  # of a content header: kind, channel, size, class, body's bytes, flags
_END: Final = spec.FRAME_END
_LAST: Final = bytes([_END])
_PROPERTIES: Final = 12  # where they begin in a content header
_LONGEST_TEXT: Final = 255  # bytes of a text property
_EMPTY_TABLE: Final = bytes(4)
_INCOMPLETE: Final = 0
_NOT_OURS: Final = -1


class _Loop(IOLoop):  # type: ignore[misc]
    """Does not wait for anything in its next turn, when told so: pika has only its way for other threads, which sends
    itself a byte through a pair of sockets."""

    _hurried = False

    def hurry(self) -> None:
        """The next `poll` only looks."""
        if pika.__version__ in KNOWN:
            self._hurried = True
        else:
            self.add_callback_threadsafe(_nothing)

    def _get_remaining_interval(self) -> float | None:
        if self._hurried:
            self._hurried = False
            return 0.0
        seconds: float | None = super()._get_remaining_interval()
        return seconds


def new_loop() -> Loop:
    """pika's loop, for connections and fibers to share."""
    loop: Loop = _Loop()
    return loop


def still_deliver(channel: Any, consumer_tag: str) -> None:
    """Deliveries that are on their way to a consumer that was just cancelled shall reach it. pika 1.4 would reject
    them: each a redelivery that counts up to the delivery limit, and a gap that acks cannot be joined over."""
    channel._cancelled.discard(consumer_tag)


class Services(SelectorIOServicesAdapter):  # type: ignore[misc]
    """Reports a peer that has reset the connection by the time it is looked at; pika 1.4 lets the `ValueError` end the
    loop, and with it the process, at a load balancer without a broker behind it."""

    def create_streaming_connection(
        self, protocol_factory: Callable[[], Any], sock: Any, on_done: Callable[[Any], None], *more: Any, **named: Any
    ) -> Any:
        """See pika. What it returns can be cancelled."""
        try:
            return super().create_streaming_connection(protocol_factory, sock, on_done, *more, **named)
        except ValueError:
            gone = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            return self.call_later(0, partial(on_done, gone))


class Connection(pika.SelectConnection):  # type: ignore[misc]  # pika 1.4 ships no types
    """Reads and writes in few system calls, and gives deliveries and confirms straight to who waits for them.

    pika 1.4 hands each frame to the socket by itself, and asks the loop each time whether the socket can be written to:
    nine system calls for a publish. It reads 4 KiB at a time, until nothing is left. It makes an object of each frame
    and looks up its receivers by name.
    """

    _held: list[bytes] | None = None
    _socket: Any = None
    _frame_buffer: bytes
    complaint = ""
    """Why we ended it, when the broker left us no other way."""

    def __init__(self, parameters: Any, *, custom_ioloop: IOLoop, **options: Any) -> None:
        self._short = pika.__version__ in KNOWN
        self._confirms: dict[int, Confirmed] = {}
        super().__init__(parameters, custom_ioloop=Services(custom_ioloop), **options)

    def abort(self, reason: str) -> None:
        """Ends it without the broker's help; its close callback follows. pika has a private method for that only."""
        self._terminate_stream(StreamLostError(reason))

    def channel(self, channel_number: int | None = None, on_open_callback: Any = None) -> Any:
        """Opens a channel; ends the connection, with a complaint, where the broker allows no further one. None on one
        that is being closed: the answer for which somebody wants a channel may come after we have begun to close it."""
        if not self.is_open:
            return None
        try:
            return super().channel(channel_number, on_open_callback)
        except NoFreeChannels:
            most = self.params.channel_max
            self.complaint = f"the broker allows only {most} channels to a connection; raise its channel_max"
            self.close(200, self.complaint)
            return None

    def confirm(self, channel: Any, confirmed: Confirmed, selected: Callable[[Any], None]) -> None:
        """Asks for publisher confirms on this channel; ``selected`` is called when the broker agrees."""

        def told(frame: Any) -> None:
            method = frame.method
            confirmed(method.delivery_tag, method.multiple, isinstance(method, spec.Basic.Ack))

        self._confirms[channel.channel_number] = confirmed
        channel.confirm_delivery(told, callback=selected)

    def publish(self, channel: Any, message: Message) -> None:
        """Sends a message as mandatory. Raises what pika raises for properties that AMQP has no form for, before a byte
        is sent."""
        exchange, routing_key, body, properties = message
        if not (self._short and body and channel.is_open and len(body) <= self._body_max_length):
            channel.basic_publish(exchange, routing_key, body, pika.BasicProperties(**properties), mandatory=True)
            return
        number = channel.channel_number
        self._output_marshaled_frames(
            (
                _publish_method(number, exchange, routing_key),
                _content_header(number, len(body), properties),
                _HEAD.pack(spec.FRAME_BODY, number, len(body)) + body + _LAST,
            )
        )

    def acknowledge(self, channel: Any, number: int, multiple: bool) -> None:
        """Acks this delivery, or all up to it."""
        if self._short and channel.is_open:
            ack = _ACK.pack(spec.FRAME_METHOD, channel.channel_number, 13, spec.Basic.Ack.INDEX, number, multiple, _END)
            self._output_marshaled_frames((ack,))
        else:
            channel.basic_ack(number, multiple)

    @contextmanager
    def corked(self) -> Iterator[None]:
        """Holds frames back until the end of the block."""
        self._held = []
        try:
            yield
        finally:
            frames, self._held = self._held, None
            if frames and self.is_open:
                self._output_marshaled_frames(frames)

    # -- what pika calls ----------------------------------------------------------------------------------------------

    def _proto_connection_made(self, transport: Any) -> None:
        """The connection stands. TLS stays with pika: it may have to read before it can write."""
        super()._proto_connection_made(transport)
        if self._short and self.params.ssl_options is None:
            self._socket = transport._sock
            transport._nbio.set_reader(self._socket.fileno(), self._readable)

    def _terminate_stream(self, error: Exception | None) -> None:
        self._socket = None  # nothing goes out any more
        super()._terminate_stream(error)

    def _readable(self) -> None:
        """Reads once: if more is there, the loop says so again."""
        transport = self._transport
        try:
            data = self._socket.recv(_READ_BYTES)
            if data:
                self._on_data_available(data)
                return
        except BlockingIOError:
            return
        except Exception as error:  # noqa: BLE001  # as pika does: of the socket, or of what was read
            self._socket = None
            transport._initiate_abort(error)
            return
        transport._on_socket_readable()  # the end: pika knows what to do

    def _output_marshaled_frames(self, marshaled_frames: Sequence[bytes]) -> None:
        if self._held is not None:
            self._held.extend(marshaled_frames)
            return
        data = b"".join(marshaled_frames)
        self.bytes_sent += len(data)
        self.frames_sent += len(marshaled_frames)
        self._adapter_emit_data(data)

    def _adapter_emit_data(self, data: bytes) -> None:
        """Sends at once what the socket takes. Only the rest waits for the loop to say that it takes more."""
        if self._socket is not None and not self._transport.get_write_buffer_size():
            data = data[self._sent(data) :]
        if data:
            super()._adapter_emit_data(data)

    def _sent(self, data: bytes) -> int:
        """How many bytes the socket took. If it never will take any again, pika is told so when it tries."""
        try:
            return int(self._socket.send(data))
        except OSError:
            return 0

    def _on_data_available(self, data_in: bytes) -> None:
        if not (self._short and self.is_open):
            super()._on_data_available(data_in)
            return
        data, at = self._frame_buffer + data_in, 0
        while end := self._take(data, at):
            at = end
        self._frame_buffer = data[at:]
        self.bytes_received += at  # the heartbeat's proof of life

    # -- frames -------------------------------------------------------------------------------------------------------

    def _take(self, data: bytes, at: int) -> int:
        """Deals with the frame, or the whole delivery, that begins at ``at``; where it ends, or `_INCOMPLETE`."""
        kind, number, end = _frame(data, at)
        if end == _INCOMPLETE:
            return _INCOMPLETE
        if kind == spec.FRAME_METHOD and data[end - 1] == _END:
            (method,) = _METHOD.unpack_from(data, at + spec.FRAME_HEADER_SIZE)
            if method == spec.Basic.Deliver.INDEX:
                after = self._deliver(number, data, at + spec.FRAME_HEADER_SIZE + _METHOD.size, end)
                if after != _NOT_OURS:
                    return after
            elif method == spec.Basic.Ack.INDEX and number in self._confirms:
                tag, multiple = _TAG.unpack_from(data, at + spec.FRAME_HEADER_SIZE + _METHOD.size)
                self.frames_received += 1
                self._confirms[number](tag, bool(multiple & 1), True)
                return end
        _, frame = decode_frame(data[at:end])
        self._process_frame(frame)
        return end

    def _deliver(self, number: int, data: bytes, arguments: int, header: int) -> int:
        """Gives a delivery to its consumer: its method's arguments begin at ``arguments``, its content header at
        ``header``. Where it ends; `_NOT_OURS` when it does not consist of three whole frames in a row."""
        channel = self._channels.get(number)
        tag_at = arguments + 1 + data[arguments]
        consumer_tag = data[arguments + 1 : tag_at].decode()
        if channel is None or consumer_tag not in channel._consumers or consumer_tag in channel._cancelled:
            return _NOT_OURS
        kind, of, head = _frame(data, header)
        if head == _INCOMPLETE:
            return _INCOMPLETE
        (size,) = _SIZE.unpack_from(data, header + spec.FRAME_HEADER_SIZE)
        ours = kind == spec.FRAME_HEADER and of == number and data[head - 1] == _END
        body, end = b"", head
        if ours and size:
            kind, of, end = _frame(data, head)
            if end == _INCOMPLETE:
                return _INCOMPLETE
            body = data[head + spec.FRAME_HEADER_SIZE : end - 1]
            ours = kind == spec.FRAME_BODY and of == number and len(body) == size and data[end - 1] == _END
        if not ours:
            return _NOT_OURS
        delivery_tag, redelivered = _TAG.unpack_from(data, tag_at)
        properties = pika.BasicProperties()
        properties.decode(data[header + spec.FRAME_HEADER_SIZE + _PROPERTIES : head - 1])
        self.frames_received += 3 if size else 2
        method = spec.Basic.Deliver(consumer_tag, delivery_tag, bool(redelivered & 1))
        channel._consumers[consumer_tag](channel, method, properties, body)
        return end


def _frame(data: bytes, at: int) -> tuple[int, int, int]:
    """Kind, channel and end of the frame that begins at ``at``; the end is `_INCOMPLETE` while it is not all there."""
    if len(data) < at + spec.FRAME_HEADER_SIZE:
        return 0, 0, _INCOMPLETE
    kind, number, size = _HEAD.unpack_from(data, at)
    end = at + spec.FRAME_HEADER_SIZE + size + spec.FRAME_END_SIZE
    return kind, number, end if end <= len(data) else _INCOMPLETE


def _text(pieces: list[bytes], value: str | bytes) -> int:
    assert isinstance(value, (str, bytes)), "a property that is text in AMQP"
    data = value.encode() if isinstance(value, str) else value
    if len(data) > _LONGEST_TEXT:
        raise ShortStringTooLong(data)
    pieces.append(bytes((len(data),)) + data)
    return 1 + len(data)


def _table(pieces: list[bytes], value: dict[str, Any]) -> int:
    if not value:
        pieces.append(_EMPTY_TABLE)
        return len(_EMPTY_TABLE)
    return int(encode_table(pieces, value))


def _octet(pieces: list[bytes], value: int) -> int:
    pieces.append(struct.pack("B", value))
    return 1


def _moment(pieces: list[bytes], value: int) -> int:
    pieces.append(struct.pack(">Q", value))
    return 8


_PROPERTY: Final[dict[str, tuple[int, Callable[[list[bytes], Any], int]]]] = {
    "content_type": (1 << 15, _text),
    "content_encoding": (1 << 14, _text),
    "headers": (1 << 13, _table),
    "delivery_mode": (1 << 12, _octet),
    "priority": (1 << 11, _octet),
    "correlation_id": (1 << 10, _text),
    "reply_to": (1 << 9, _text),
    "expiration": (1 << 8, _text),
    "message_id": (1 << 7, _text),
    "timestamp": (1 << 6, _moment),
    "type": (1 << 5, _text),
    "user_id": (1 << 4, _text),
    "app_id": (1 << 3, _text),
    "cluster_id": (1 << 2, _text),
}
"""All properties in the order in which a content header has them: the flag, and how the value is written."""


def _content_header(number: int, body: int, properties: Mapping[str, Any]) -> bytes:
    """The frame before a body of so many bytes. Raises what pika raises for values that AMQP has no form for."""
    flags, in_order = _shape(tuple(properties))
    size, pieces = 0, list[bytes]()
    for name, encode in in_order:
        size += encode(pieces, properties[name])
    head = _CONTENT.pack(spec.FRAME_HEADER, number, 14 + size, spec.Basic.INDEX, body, flags)
    return b"".join((head, *pieces, _LAST))


def _nothing() -> None:
    """The loop turns."""


@lru_cache(maxsize=64)  # messages of a kind have the same properties
def _shape(names: Sequence[str]) -> tuple[int, Sequence[tuple[str, Callable[[list[bytes], Any], int]]]]:
    """The flags of a content header with these properties, and how each is written, in the order of the header."""
    found = [(name, flag, encode) for name, (flag, encode) in _PROPERTY.items() if name in names]
    return sum(flag for _, flag, _ in found), [(name, encode) for name, _, encode in found]


@lru_cache(maxsize=64)  # a worker publishes to a handful of addresses
def _publish_method(number: int, exchange: str, routing_key: str) -> bytes:
    publish = spec.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=True)
    frame: bytes = Method(number, publish).marshal()
    return frame
