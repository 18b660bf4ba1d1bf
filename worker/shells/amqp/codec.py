"""Makes pika take every header that RabbitMQ lets a producer send, and write it again as it was.

pika 1.4 raises on a timestamp beyond the year 9999 and on tables some hundred levels deep, and the connection is lost
with it. The message comes back on the next connection and ends that one too, and after as many tries as the delivery
limit allows, it and its innocent neighbours in the prefetch window are dead letters. It also turns floats into whole
numbers, and fails on those beyond 64 bits when they are to be published again: that would end the process.
"""

from __future__ import annotations

import struct
import threading
from typing import Any, Final

import pika.data

DEEPEST: Final = 32
"""Tables and lists in each other that are still read: each level costs Python three frames of a thousand."""

_decode_value = pika.data.decode_value
_encode_value = pika.data.encode_value
_level = threading.local()


class Raw(bytes):
    """A field value that is passed on unread, as it came: its kind, then its bytes."""


def tolerate() -> None:
    """Installs the tolerant codec, once for the process: pika has no hook for it."""
    pika.data.decode_value = _decode
    pika.data.encode_value = _encode


def _decode(encoded: bytes, offset: int) -> tuple[Any, int]:
    match encoded[offset : offset + 1]:
        case b"d":
            return struct.unpack_from(">d", encoded, offset + 1)[0], offset + 9
        case b"f":
            return struct.unpack_from(">f", encoded, offset + 1)[0], offset + 5
        case b"T":
            try:
                value, after = _decode_value(encoded, offset)
            except (ValueError, OverflowError, OSError):
                return Raw(encoded[offset : offset + 9]), offset + 9
            return value, after
        case b"A" | b"F":
            return _descend(encoded, offset)
    value, after = _decode_value(encoded, offset)
    return value, after


def _descend(encoded: bytes, offset: int) -> tuple[Any, int]:
    above = getattr(_level, "now", 0)
    if above == DEEPEST:
        after = offset + 5 + struct.unpack_from(">I", encoded, offset + 1)[0]
        return Raw(encoded[offset:after]), after
    _level.now = above + 1
    try:
        value, after = _decode_value(encoded, offset)
    finally:
        _level.now = above
    return value, after


def _encode(pieces: list[bytes], value: Any) -> int:
    if isinstance(value, Raw):
        pieces.append(value)
        return len(value)
    if isinstance(value, float):
        pieces.append(struct.pack(">cd", b"d", value))
        return 9
    return int(_encode_value(pieces, value))
