"""Makes pika's decoder take every header that RabbitMQ lets a producer send.

pika 1.4 raises on a double that is no whole number's relative (NaN, infinity) and on a timestamp beyond the year 9999,
and the connection is lost with it. The message comes back on the next connection and kills that one too, and after as
many tries as the delivery limit allows, it and its innocent neighbours in the prefetch window are dead letters.
"""

from __future__ import annotations

from typing import Any

import pika.data

_decode_value = pika.data.decode_value


def tolerate() -> None:
    """Installs the tolerant decoder, once for the process: pika has no hook for it. A value that cannot be decoded
    becomes its raw bytes; all such kinds (double, float, timestamp) have a fixed width."""
    pika.data.decode_value = _tolerant


def _tolerant(encoded: bytes, offset: int) -> tuple[Any, int]:
    try:
        value, after = _decode_value(encoded, offset)
    except (ValueError, OverflowError, OSError):
        width = {b"f": 4, b"d": 8, b"T": 8}.get(encoded[offset : offset + 1])
        if width is None:
            raise
        return encoded[offset + 1 : offset + 1 + width], offset + 1 + width
    return value, after
