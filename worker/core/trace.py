"""The trace that a command belongs to, as its producer wrote it (W3C Trace Context: w3.org/TR/trace-context)."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

TRACEPARENT: Final = "traceparent"

_FORM: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?\Z")


class Trace(NamedTuple):
    """What a `traceparent` says. ``sampled``: whether its producer records this trace."""

    trace_id: str
    span_id: str
    sampled: bool

    def traceparent(self) -> str:
        """The header that says it."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def read(value: object) -> Trace | None:
    """The trace of a header; None without a header, and for one that is not as the standard has it."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    found = _FORM.match(value) if isinstance(value, str) else None
    return Trace(found[1], found[2], bool(int(found[3], 16) & 1)) if found else None
