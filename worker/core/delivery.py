"""What the broker hands over, what travels with it, and the messages that settle it.

An outcome, a delayed retry, a return and a dead letter are the same act: publish these messages, and when the broker
has confirmed them all, ack that delivery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, Protocol, TypeGuard

from worker.core import jakarta, trace
from worker.core.command import command_id
from worker.core.outcome import OUTCOME_TYPE, Outcome, encode_outcome
from worker.core.topology import Names
from worker.core.trace import TRACEPARENT, Trace

MAX_EXTERNAL_IDS: Final = 20
MAX_HEADER_BYTES: Final = 64 * 1024
"""Room for foreign headers in what we publish: a content header must fit one frame (128 KiB), ours included."""
MAX_PROPERTY_BYTES: Final = 255
"""The longest text property of AMQP. Publishing a longer one fails, and would fail again at every redelivery."""

MAX_BATCH_ID: Final = 256  # it is in every log line and outcome of the batch

ROUND: Final = "qris-round"
ATTEMPTS: Final = "qris-attempts"
EXTERNAL_IDS: Final = "qris-external-ids"
EFFECT_UNKNOWN: Final = "qris-effect-unknown"
RECEIVED_AT: Final = "qris-received-at"
COPY_ID: Final = "qris-hop"
"""Each copy that we publish has its own, so that a redelivery of one is not taken for another."""
STAMPED: Final = "timestamp_in_ms"
"""Set by RabbitMQ's `message_interceptors.incoming.set_header_timestamp` (rabbitmq.com/docs/message-interceptors)."""
LAST_CODE: Final = "qris-last-code"
CALLS: Final = "qris-calls"
TRACE: Final = "qris-trace"
"""The span of the round before, for the next one to link to."""
PROGRESS_HEADERS: Final = (ROUND, CALLS, ATTEMPTS, EXTERNAL_IDS, EFFECT_UNKNOWN, RECEIVED_AT, COPY_ID, LAST_CODE, TRACE)
MAX_COUNT: Final = 1_000_000
"""The highest round, call or attempt count that is believed: producers can write our headers, too."""
MAX_AGE: Final = 30 * 86_400.0
"""Seconds. A `qris-received-at` that is older is not believed."""

BATCH_ID: Final = "batch-id"
CARRIED_HEADERS: Final = (BATCH_ID, TRACEPARENT)
BROKER_HEADERS: Final = ("x-death", "x-delivery-count", "x-acquired-count", "x-first-death-", "x-last-death-")
"""How the names of the headers begin that RabbitMQ writes itself, up to 4.3; a copy of ours does not carry them."""


class Properties(Protocol):
    """The properties of a delivered message, as the AMQP library gives them."""

    content_type: Any
    content_encoding: Any
    headers: Any
    priority: Any
    correlation_id: Any
    reply_to: Any
    message_id: Any
    timestamp: Any
    type: Any
    app_id: Any


@dataclass(slots=True)
class Progress:
    """What earlier rounds of a command leave to later ones, through headers of our own. ``calls``: those that the
    command made in the round that goes on now, before it went back to the end of its lane."""

    round: int = 0
    attempts: int = 0
    external_ids: list[str] = field(default_factory=list)
    effect_unknown: bool = False
    received_at: float = 0.0
    last_code: str | None = None
    calls: int = 0
    trace: Trace | None = None

    def sent(self, external_id: str) -> None:
        """One more expire call goes out."""
        self.attempts += 1
        self.external_ids.append(external_id)
        del self.external_ids[:-MAX_EXTERNAL_IDS]

    def unsent(self) -> None:
        """The call that was reported last did not go out."""
        self.attempts -= 1
        self.external_ids.pop()


class Message(NamedTuple):
    """What is to be published: persistent, mandatory, confirmed. ``properties`` are AMQP's basic properties."""

    exchange: str
    routing_key: str
    body: bytes
    properties: Mapping[str, Any]


@dataclass(slots=True, eq=False)
class Delivery:
    """One hand-over by the broker, as it came. ``arrived``: monotonic seconds; ``published_at``: seconds since the
    epoch, None when nobody dated it; ``progress``: what its headers say of earlier rounds; ``batch_id``: the sweep that
    it belongs to."""

    lane: str
    body: bytes
    properties: Properties
    redelivered: bool
    arrived: float
    command_id: str
    copy_id: str
    progress: Progress
    published_at: float | None
    headers: Mapping[str, Any]
    batch_id: str | None
    trace: Trace | None = None

    @property
    def trace_id(self) -> str | None:
        """What finds the command's lines in the log, from its producer's traces."""
        return self.trace.trace_id if self.trace is not None else None

    @property
    def key(self) -> str:
        """Names the physical message: the same for every redelivery, another for each copy that we publish. The body
        counts, since a producer that gives all its commands one id must not lose those that come back together."""
        return f"{self.lane}\n{self.command_id}\n{self.copy_id}\n{hash(self.body)}"

    @property
    def since(self) -> float:
        """From when its age counts: its publication, or its first delivery when nobody dated it."""
        return self.progress.received_at if self.published_at is None else self.published_at


def receive(
    lane: str, body: bytes, properties: Properties, *, redelivered: bool, epoch: float, monotonic: float
) -> Delivery:
    """A delivery from what the broker sent; never raises, whatever a producer put into the properties."""
    headers = properties.headers if isinstance(properties.headers, dict) else {}
    # A message that came back may have been called for by a process that died before it could say so.
    progress = _progress(headers, epoch) if headers else Progress(received_at=epoch)
    progress.effect_unknown = progress.effect_unknown or redelivered
    return Delivery(
        lane=lane,
        body=body,
        properties=properties,
        redelivered=redelivered,
        arrived=monotonic,
        command_id=_identity(properties.message_id, body),
        copy_id=text(headers[COPY_ID]) if COPY_ID in headers else "",
        progress=progress,
        published_at=_published(properties.timestamp, headers.get(STAMPED), progress.received_at),
        headers=headers,
        batch_id=text(headers[BATCH_ID])[:MAX_BATCH_ID] if headers.get(BATCH_ID) is not None else None,
        trace=trace.read(headers[TRACEPARENT]) if TRACEPARENT in headers else None,
    )


def outcome_message(exchange: str, delivery: Delivery, outcome: Outcome) -> Message:
    """The outcome as the contract publishes it, to the exchange of the outcomes."""
    # The message id itself, not the command's: that one is text, and may be longer than a property can be.
    correlation = delivery.properties.correlation_id or delivery.properties.message_id or outcome.command_id
    return Message(
        exchange,
        f"{outcome.lane}.{outcome.status}",
        encode_outcome(outcome),
        {
            "content_type": "application/json",
            "delivery_mode": 2,
            "type": OUTCOME_TYPE,
            "message_id": outcome.outcome_id,
            "correlation_id": correlation,
            "timestamp": int(outcome.completed_at),
            "headers": _carried(delivery.headers),
        },
    )


def dead_letter(names: Names, delivery: Delivery, outcome: Outcome) -> Message:
    """The command for people to look at: its own bytes and properties, and why it is here."""
    ours = {
        "dead-reason": str(outcome.reason),
        "dead-detail": outcome.detail or outcome.response_message or "",
        "dead-at": jakarta.iso(outcome.completed_at),
        "dead-lane": delivery.lane,
        "attempts": outcome.attempts,
        "last-response-code": outcome.response_code or "",
    }
    return Message(names.dead, delivery.lane, delivery.body, _kept(delivery, ours, outcome.command_id))


def delayed(names: Names, delivery: Delivery, seconds: int, round_: int, copy_id: str) -> Message:
    """The command for its next round, into the queue whose TTL is ``seconds`` (by the default exchange)."""
    ours = _progress_headers(replace(delivery.progress, round=round_, calls=0), copy_id)
    return Message("", names.retry(delivery.lane, seconds), delivery.body, _kept(delivery, ours, delivery.command_id))


def returned(names: Names, delivery: Delivery, copy_id: str) -> Message:
    """The command goes to the end of its lane, unchanged: a fresh message, so no redelivery is counted against it."""
    ours = _progress_headers(delivery.progress, copy_id)
    return Message(names.commands, delivery.lane, delivery.body, _kept(delivery, ours, delivery.command_id))


def text(value: object) -> str:
    """A header or property as text: the AMQP library leaves what is no UTF-8 as bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if isinstance(value, str) else str(value)


def _kept(delivery: Delivery, ours: Mapping[str, Any], message_id: str) -> dict[str, Any]:
    """Body's properties but user_id (would close the channel), expiration (would make it vanish), CC and BCC (would
    send it elsewhere) and what the broker itself wrote; ours win."""
    headers = {
        name: value
        for name, value in delivery.headers.items()
        if name not in PROGRESS_HEADERS and name not in ("CC", "BCC") and not str(name).startswith(BROKER_HEADERS)
    }
    if _size(headers) > MAX_HEADER_BYTES:
        headers = _carried(headers)
    properties = delivery.properties
    kept = {
        "content_type": properties.content_type,
        "content_encoding": properties.content_encoding,
        "priority": properties.priority,
        "correlation_id": properties.correlation_id,
        "reply_to": properties.reply_to,
        "timestamp": properties.timestamp,
        "type": properties.type,
        "app_id": properties.app_id,
        "message_id": properties.message_id or message_id,
    }
    kept = {name: value for name, value in kept.items() if value is not None}
    return {**kept, "delivery_mode": 2, "headers": {**headers, **ours}}


def _carried(headers: Mapping[str, Any]) -> dict[str, Any]:
    """What outcomes carry on. One that fills a frame is left behind: with ours beside it, it would overflow ours."""
    if not headers:
        return {}
    found = {name: headers[name] for name in CARRIED_HEADERS if name in headers}
    return {name: value for name, value in found.items() if _size(value) <= MAX_HEADER_BYTES // 4}


def _progress_headers(progress: Progress, copy_id: str) -> dict[str, Any]:
    traced = {TRACE: progress.trace.traceparent()} if progress.trace is not None else {}
    return {
        ROUND: progress.round,
        CALLS: progress.calls,
        ATTEMPTS: progress.attempts,
        EXTERNAL_IDS: ",".join(progress.external_ids),
        EFFECT_UNKNOWN: progress.effect_unknown,
        RECEIVED_AT: round(progress.received_at * 1000),
        COPY_ID: copy_id,
        LAST_CODE: progress.last_code or "",
        **traced,
    }


def _progress(headers: Mapping[str, Any], epoch: float) -> Progress:
    ids = text(headers.get(EXTERNAL_IDS, "")).split(",")
    received = _whole(headers.get(RECEIVED_AT), most=2**53) / 1000
    return Progress(
        round=_whole(headers.get(ROUND)),
        calls=_whole(headers.get(CALLS)),
        attempts=_whole(headers.get(ATTEMPTS)),
        external_ids=[i for i in ids if i.isascii() and i.isdigit() and len(i) <= 36][-MAX_EXTERNAL_IDS:],
        effect_unknown=headers.get(EFFECT_UNKNOWN) is True,
        received_at=received if epoch - MAX_AGE <= received <= epoch else epoch,
        last_code=text(headers.get(LAST_CODE) or "")[:7] or None,
        trace=trace.read(headers[TRACE]) if TRACE in headers else None,
    )


def _identity(message_id: object, body: bytes) -> str:
    """The command's id. One that is no UTF-8 grows when it is written as text, and has to fit a property itself."""
    if isinstance(message_id, str) and message_id:
        return message_id
    if isinstance(message_id, bytes) and len(text(message_id)) > MAX_PROPERTY_BYTES:
        return command_id(None, message_id)
    return command_id(text(message_id) if message_id else None, body)


def _whole(value: object, most: int = MAX_COUNT) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most else 0


def _published(timestamp: object, stamped: object, received_at: float) -> float | None:
    """When it was published, in seconds since the epoch; never later than when we first received it.

    AMQP timestamps are whole seconds, rounded down: taken as they are, half a second is added to every age, and an
    objective of one second counts half of the punctual commands as late. So one is read as the end of its second.
    Milliseconds are exact: as some producers send them, or in the header that RabbitMQ sets if it is told to.
    """
    value = stamped if stamped is not None and _is_number(stamped) else timestamp
    if value is None or not _is_number(value):
        return None
    exact = value > 10**11
    return min(value / 1000 if exact else value + 1.0, received_at)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _size(value: object) -> int:
    """An upper estimate of a header value's bytes in an AMQP table."""
    if isinstance(value, Mapping):
        return sum(_size(name) + _size(item) + 8 for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return sum(_size(item) + 8 for item in value)
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    return len(value) if isinstance(value, bytes) else 16
