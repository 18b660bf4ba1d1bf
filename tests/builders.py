"""Values for the tests: each builder gives a valid one, and takes what the test is about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from worker.core.command import Command
from worker.core.delivery import Delivery, Progress, receive
from worker.core.outcome import STATUS_OF, Outcome, Reason, outcome_id
from worker.core.ports import TokenUnavailable
from worker.core.request import Partner
from worker.core.retry import RetryPolicy
from worker.core.settlement import Entry
from worker.core.verdict import Kind, NoReply, Reply, Verdict

NOON = 1_795_323_600.0
"""2026-11-22T12:00:00+07:00."""
BILL = "10092081"
MERCHANT = "121xxxx"


@dataclass(slots=True)
class Properties:
    """A message's properties as the AMQP library gives them, all absent unless said."""

    content_type: Any = None
    content_encoding: Any = None
    headers: Any = None
    priority: Any = None
    correlation_id: Any = None
    reply_to: Any = None
    message_id: Any = None
    timestamp: Any = None
    type: Any = None
    app_id: Any = None
    user_id: Any = None
    expiration: Any = None


def fields(**changed: Any) -> dict[str, Any]:
    """A command's JSON fields; a field set to ... is left out."""
    whole = {"billnumber": BILL, "additionalInfo": {"merchantId": MERCHANT}, **changed}
    return {name: value for name, value in whole.items() if value is not ...}


def body(**changed: Any) -> bytes:
    """A command's body, see `fields`."""
    return json.dumps(fields(**changed)).encode()


def command(billnumber: str = BILL, merchant_id: str = MERCHANT, **changed: Any) -> Command:
    """A command."""
    return Command(billnumber, merchant_id, **changed)


def delivery(
    payload: bytes | None = None,
    *,
    lane: str = "cancellation",
    redelivered: bool = False,
    epoch: float = NOON,
    monotonic: float = 1_000.0,
    message_id: Any = "m-1",
    headers: Mapping[str, Any] | None = None,
    **properties: Any,
) -> Delivery:
    """A delivery as `receive` makes it; the rest are properties."""
    return receive(
        lane,
        body() if payload is None else payload,
        Properties(message_id=message_id, headers=headers, **properties),
        redelivered=redelivered,
        epoch=epoch,
        monotonic=monotonic,
    )


def progress(**changed: Any) -> Progress:
    """What earlier rounds left."""
    return Progress(**{"received_at": NOON, **changed})


def outcome(reason: Reason = Reason.SUCCESS, **changed: Any) -> Outcome:
    """An outcome, of a command with the body of `body`."""
    whole: dict[str, Any] = {
        "command_id": "m-1",
        "lane": "cancellation",
        "billnumber": BILL,
        "merchant_id": MERCHANT,
        "reference": "ORD-77",
        "batch_id": None,
        "reason": reason,
        "response_code": "2009300",
        "response_message": "Successful",
        "detail": None,
        "attempts": 1,
        "external_ids": ("1" * 36,),
        "effect_unknown": False,
        "received_at": NOON,
        "completed_at": NOON + 1.5,
    }
    whole |= changed
    whole.setdefault("outcome_id", outcome_id(whole["command_id"], whole["lane"], body(), STATUS_OF[reason]))
    return Outcome(**whole)


def reply(
    code: object = "2009300",
    message: object = "",
    *,
    status: int | None = None,
    retry_after: str | None = None,
    challenge: str | None = None,
) -> Reply:
    """The gateway's answer; its HTTP status is the code's own unless said."""
    said = int(str(code)[:3]) if status is None else status
    text = json.dumps({"responseCode": code, "responseMessage": message})
    return Reply(said, text.encode(), retry_after, challenge)


def no_reply(*, sent: bool = True) -> NoReply:
    """No answer came."""
    return NoReply(sent, "read timed out" if sent else "connection refused")


SUCCESS = reply("2009300", "Successful")
NOT_FOUND = reply("4049301", "QR not Found")
BROKEN = reply("5009300", "General Error")
BAD_SIGNATURE = reply("4019300", "Unauthorized. Invalid Signature")
STALE_TOKEN = reply("4019301", "Invalid Token (B2B)")
ID_CLASH = reply("4099300", "Cannot use same X-EXTERNAL-ID in same day")


def throttled(retry_after: str | None = None) -> Reply:
    """A throttled answer."""
    return reply("4299300", "Too Many Requests", retry_after=retry_after)


def verdict(kind: Kind = Kind.TRANSIENT, *, retry_after: str | None = None, code: str | None = None) -> Verdict:
    """A judgement of one kind."""
    reasons = {Kind.DONE: Reason.SUCCESS, Kind.REFUSED: Reason.REFUSED}
    return Verdict(kind, reasons.get(kind), False, code, kind.label, retry_after=retry_after)


def no_token(kind: Kind = Kind.SYSTEMIC, *, shared: bool = False) -> TokenUnavailable:
    """What the token store raises."""
    return TokenUnavailable(verdict(kind, code="4017300"), shared=shared)


def policy(**changed: Any) -> RetryPolicy:
    """The default limits."""
    return RetryPolicy(**changed)


def partner(**changed: Any) -> Partner:
    """A partner."""
    return Partner(**{"client_id": "client-1", "channel_id": "95051", **changed})


def orphan() -> Entry:
    """The ledger's entry of a command that the broker has taken back."""
    return Entry("orphan")


@dataclass(frozen=True, slots=True)
class Waiting:
    """The least that the lanes carry."""

    lane: str
    number: int = field(default=0)
