"""A parked message as people need it: why, when, where, after how many attempts; and the message that brings it back.

Two kinds lie in the queue: those that the worker parked, with ``dead-*`` headers, and those that the broker moved there
itself (delivery limit), whose history is in ``x-death``. Anything else is foreign: it is shown, and stays.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from worker.core import jakarta
from worker.core.command import MAX_DETAIL, parse, parse_rfc3339
from worker.core.delivery import (
    ATTEMPTS,
    BROKER_HEADERS,
    COPY_ID,
    LAST_CODE,
    PROGRESS_HEADERS,
    STAMPED,
    Message,
    Properties,
    receive,
    text,
)
from worker.core.lanes import LANES
from worker.core.topology import Names

OUR_HEADERS: Final = ("dead-reason", "dead-detail", "dead-at", "dead-lane", "attempts", "last-response-code")
"""What the worker adds when it parks a command."""

BROKER_REASONS: Final = ("rejected", "expired", "maxlen", "delivery_limit")
"""Why RabbitMQ itself dead-letters a message (rabbitmq.com/docs/dlx)."""

UNKNOWN: Final = "unknown"
"""The reason of a message that says none."""

MAX_REASON: Final = 64  # longer than any of ours; a foreign header must not fill a table
MAX_KINDS: Final = 200  # reasons counted apart; a flood of foreign ones must not fill the memory

AGES: Final = (("1 h", 3600.0), ("1 day", 86_400.0), ("7 days", 7 * 86_400.0))
"""Dead letters are counted by age up to these seconds, and beyond."""

_NOT_CARRIED: Final = (*OUR_HEADERS, *PROGRESS_HEADERS, STAMPED, "CC", "BCC")
_CARRIED: Final = (
    "content_type",
    "content_encoding",
    "priority",
    "correlation_id",
    "reply_to",
    "message_id",
    "timestamp",
    "type",
    "app_id",
)
_SHOWN: Final = (*_CARRIED, "delivery_mode", "expiration", "user_id", "cluster_id")


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message as it is in the queue."""

    routing_key: str
    properties: Properties
    body: bytes


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What is known about it. ``lane`` None: no way back is known. ``parked_at`` is seconds since the epoch."""

    command_id: str
    lane: str | None
    reason: str
    parked_at: float | None
    attempts: int | None
    detail: str
    response_code: str
    batch_id: str | None
    billnumber: str | None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead letters are meant; an empty part means all. ``before``: parked before it, seconds since the epoch."""

    reasons: frozenset[str] = frozenset()
    lanes: frozenset[str] = frozenset()
    before: float | None = None
    batches: frozenset[str] = frozenset()
    bills: frozenset[str] = frozenset()

    def matches(self, letter: DeadLetter) -> bool:
        """One whose time is not known was never parked *before* anything."""
        return (
            (not self.reasons or letter.reason in self.reasons)
            and (not self.lanes or letter.lane in self.lanes)
            and (self.before is None or (letter.parked_at is not None and letter.parked_at < self.before))
            and (not self.batches or letter.batch_id in self.batches)
            and (not self.bills or letter.billnumber in self.bills)
        )

    def as_json(self) -> dict[str, Any]:
        """Only the parts that are set."""
        parts: dict[str, Any] = {
            "reason": sorted(self.reasons),
            "lane": sorted(self.lanes),
            "before": None if self.before is None else jakarta.iso(self.before),
            "batch": sorted(self.batches),
            "bill": sorted(self.bills),
        }
        return {name: value for name, value in parts.items() if value}


def read_dead_letter(names: Names, parcel: Parcel) -> DeadLetter:
    """What the headers, the broker's record and the body say; never raises, whatever the message is."""
    arrived = receive("", parcel.body, parcel.properties, redelivered=False, epoch=0.0, monotonic=0.0)
    headers = arrived.headers
    deaths = headers.get("x-death")
    deaths = [death for death in deaths if isinstance(death, Mapping)] if isinstance(deaths, list) else []
    # The latest death (the broker writes it first) in one of our lanes. The worker takes x-death off what it parks, so
    # there is one only where the broker moved the message.
    death = next((death for death in deaths if _queue_lane(names, death)), None)
    ours = death is None and "dead-reason" in headers
    if ours:
        reason, lane = text(headers["dead-reason"]), text(headers.get("dead-lane", ""))
        when = _rfc3339(headers.get("dead-at"))
    else:
        latest: Mapping[str, Any] = death or next(iter(deaths), {})
        reason = text(latest.get("reason", UNKNOWN))
        lane = _queue_lane(names, death) if death else parcel.routing_key
        when = _moment(death.get("time")) if death else None
    return DeadLetter(
        command_id=arrived.command_id,
        lane=lane if lane in LANES else None,
        reason=_short(reason, MAX_REASON) or UNKNOWN,
        parked_at=when,
        attempts=_number(headers.get("attempts" if ours else ATTEMPTS)),
        detail=_short(text(headers.get("dead-detail", "")), MAX_DETAIL) if ours else _story(death),
        response_code=_short(text(headers.get("last-response-code" if ours else LAST_CODE) or ""), 16),
        batch_id=arrived.batch_id,
        billnumber=parse(parcel.body, default_merchant="any").billnumber,  # only the bill matters here
    )


def redriven(names: Names, letter: DeadLetter, parcel: Parcel, copy_id: str, now: float) -> Message:
    """The command back to its lane with a fresh start: no attempts, rounds or external ids, nothing of its death. It is
    dated ``now`` (seconds since the epoch): its age counts from the redrive.

    ``copy_id`` must be new. Without it, a worker that still remembers having settled the parked message would take a
    redelivery of this one for that, and ack it unseen. Raises `ValueError` where no lane is known.
    """
    if letter.lane is None:
        raise ValueError("no lane is known")
    headers = parcel.properties.headers if isinstance(parcel.properties.headers, Mapping) else {}
    kept = {
        name: value
        for name, value in headers.items()
        if str(name) not in _NOT_CARRIED and not str(name).startswith(BROKER_HEADERS)
    }
    properties = {name: getattr(parcel.properties, name, None) for name in _CARRIED}
    properties["message_id"] = properties["message_id"] or letter.command_id
    properties["timestamp"] = int(now)
    carried = {name: value for name, value in properties.items() if value is not None}
    return Message(
        names.commands, letter.lane, parcel.body, {**carried, "delivery_mode": 2, "headers": {**kept, COPY_ID: copy_id}}
    )


# -- counting -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class AgeCounts:
    """How many dead letters there are, and how old they are. ``ages`` counts them by `AGES` and beyond; of unknown age
    are the rest."""

    count: int = 0
    ages: list[int] = field(default_factory=lambda: [0] * (len(AGES) + 1))
    oldest: float | None = None

    def add(self, parked_at: float | None, now: float) -> None:
        """One more."""
        self.count += 1
        if parked_at is None:
            return
        age = now - parked_at
        self.ages[next((i for i, (_, most) in enumerate(AGES) if age < most), len(AGES))] += 1
        self.oldest = parked_at if self.oldest is None else min(self.oldest, parked_at)


@dataclass(slots=True)
class Census:
    """Counts by reason and lane, in bounded memory."""

    now: float
    kinds: dict[tuple[str, str], AgeCounts] = field(default_factory=dict)
    total: AgeCounts = field(default_factory=AgeCounts)

    def add(self, letter: DeadLetter) -> None:
        """One more."""
        key = (letter.reason, letter.lane or UNKNOWN)
        if key not in self.kinds and len(self.kinds) >= MAX_KINDS:
            key = ("other", UNKNOWN)
        self.kinds.setdefault(key, AgeCounts()).add(letter.parked_at, self.now)
        self.total.add(letter.parked_at, self.now)

    def lines(self) -> list[tuple[str, str, AgeCounts]]:
        """The largest first."""
        ordered = sorted(self.kinds.items(), key=lambda item: (-item[1].count, item[0]))
        return [(reason, lane, kind) for (reason, lane), kind in ordered]


# -- as data --------------------------------------------------------------------------------------------------------


def as_json(letter: DeadLetter) -> dict[str, Any]:
    """One row of a listing."""
    return {
        "messageId": letter.command_id,
        "billnumber": letter.billnumber,
        "reason": letter.reason,
        "lane": letter.lane,
        "deadAt": None if letter.parked_at is None else jakarta.iso(letter.parked_at),
        "attempts": letter.attempts,
        "responseCode": letter.response_code or None,
        "detail": letter.detail or None,
        "batchId": letter.batch_id,
    }


def export_json(letter: DeadLetter, parcel: Parcel) -> dict[str, Any]:
    """All of it: the row, the properties and headers, and the body as text, or as base64 where it is no UTF-8."""
    properties = {name: getattr(parcel.properties, name, None) for name in _SHOWN}
    headers = parcel.properties.headers if isinstance(parcel.properties.headers, Mapping) else {}
    whole = {
        **as_json(letter),
        "routingKey": parcel.routing_key,
        "properties": {name: plain(value) for name, value in properties.items() if value is not None},
        "headers": plain(headers),
    }
    try:
        return {**whole, "body": parcel.body.decode()}
    except UnicodeDecodeError:
        return {**whole, "bodyBase64": base64.b64encode(parcel.body).decode()}


def plain(value: object) -> Any:
    """A header's value as JSON can hold it."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {text(name): plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    return text(value)


def escaped(value: str) -> str:
    """Safe on a terminal: what a producer sent must not move the cursor or hide a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in value)


def pretty(body: bytes) -> str:
    """The body for people: JSON indented, other text as it is, and bytes as base64."""
    try:
        decoded = body.decode()
    except UnicodeDecodeError:
        return f"{len(body)} bytes that are no text, in base64: {base64.b64encode(body).decode()}"
    with suppress(ValueError, RecursionError):
        decoded = json.dumps(json.loads(decoded, object_pairs_hook=_once), indent=2, ensure_ascii=False)
    return "\n".join(escaped(line) for line in decoded.split("\n"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Duplicate keys may be the very reason why it is here: such a body is shown as it came."""
    if any(count > 1 for count in Counter(name for name, _ in pairs).values()):
        raise ValueError
    return dict(pairs)


# -- reading, whatever the message is --------------------------------------------------------------------------------


def _queue_lane(names: Names, death: Mapping[str, Any]) -> str:
    queue = text(death.get("queue", ""))
    return next((lane for lane in LANES if names.queue(lane) == queue), "")


def _story(death: Mapping[str, Any] | None) -> str:
    if death is None:
        return ""
    count = _number(death.get("count")) or 1
    times = "" if count == 1 else f", {count} times"
    return _short(f"moved here by the broker from {text(death.get('queue', UNKNOWN))}{times}", MAX_DETAIL)


def _rfc3339(value: object) -> float | None:
    try:
        return parse_rfc3339(text(value))
    except ValueError:
        return None


def _moment(value: object) -> float | None:
    try:
        return value.timestamp() if isinstance(value, datetime) else None
    except (ValueError, OverflowError, OSError):
        return None


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def _short(value: str, most: int) -> str:
    return value if len(value) <= most else value[: most - 1] + "…"
