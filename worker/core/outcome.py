"""What happened to a command, and how it is published: status, reason, the outcome's JSON."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple

from worker.core import jakarta
from worker.core.command import name_uuid
from worker.core.compact import compact

OUTCOME_TYPE: Final = "qris.expire.outcome.v1"
_OUTCOME_NAMESPACE = uuid.UUID("0c4f3f6e-0f3a-5d2b-8c39-0d0a3a5f1d11").bytes


class Status(StrEnum):
    """The four ends of a command."""

    EXPIRED = "expired"
    REJECTED = "rejected"
    UNRESOLVED = "unresolved"
    INVALID = "invalid"


class Reason(StrEnum):
    """Why it ended so. Each belongs to exactly one status."""

    SUCCESS = "success"
    ALREADY_EXPIRED = "already_expired"
    INVALID_FIELD = "invalid_field"
    BAD_REQUEST = "bad_request"
    NOT_FOUND = "not_found"
    INVALID_MERCHANT = "invalid_merchant"
    MERCHANT_BLACKLISTED = "merchant_blacklisted"
    PAID = "paid"
    REFUSED = "refused"
    RETRIES_EXHAUSTED = "retries_exhausted"
    DEADLINE_PASSED = "deadline_passed"
    NOT_FOUND_AFTER_UNKNOWN_EFFECT = "not_found_after_unknown_effect"
    CREDENTIALS = "credentials"
    MALFORMED_JSON = "malformed_json"
    INVALID_COMMAND = "invalid_command"
    TOO_LARGE = "too_large"


REASONS: Final[Mapping[Status, tuple[Reason, ...]]] = {
    Status.EXPIRED: (Reason.SUCCESS, Reason.ALREADY_EXPIRED),
    Status.REJECTED: (
        Reason.INVALID_FIELD,
        Reason.BAD_REQUEST,
        Reason.NOT_FOUND,
        Reason.INVALID_MERCHANT,
        Reason.MERCHANT_BLACKLISTED,
        Reason.PAID,
        Reason.REFUSED,
    ),
    Status.UNRESOLVED: (
        Reason.RETRIES_EXHAUSTED,
        Reason.DEADLINE_PASSED,
        Reason.NOT_FOUND_AFTER_UNKNOWN_EFFECT,
        Reason.CREDENTIALS,
    ),
    Status.INVALID: (Reason.MALFORMED_JSON, Reason.INVALID_COMMAND, Reason.TOO_LARGE),
}
STATUS_OF: Final[Mapping[Reason, Status]] = {
    reason: status for status, reasons in REASONS.items() for reason in reasons
}
DEAD_LETTERED: Final = frozenset({Status.UNRESOLVED, Status.INVALID})


class Outcome(NamedTuple):
    """One command's end. ``outcome_id`` comes from `outcome_id`; times are seconds since the epoch; ``external_ids``
    are at most the latest 20."""

    outcome_id: str
    command_id: str
    lane: str
    billnumber: str | None
    merchant_id: str | None
    reference: str | None
    batch_id: str | None
    reason: Reason
    response_code: str | None
    response_message: str | None
    detail: str | None
    attempts: int
    external_ids: tuple[str, ...]
    effect_unknown: bool
    received_at: float
    completed_at: float

    @property
    def status(self) -> Status:
        """Derived, never set by hand."""
        return STATUS_OF[self.reason]

    @property
    def dead_lettered(self) -> bool:
        """Whether people must look at the command."""
        return STATUS_OF[self.reason] in DEAD_LETTERED


def outcome_id(command_id: str, lane: str, body: bytes, status: Status) -> str:
    """The same UUID (version 5 of RFC 9562) for every redelivery of the same command with the same status, in any
    process: consumers dedupe by it. The body is part of the command: one id under two bills is two commands."""
    # The length keeps an id that contains newlines apart from a body that begins with them.
    name = f"{status}\n{lane}\n{len(command_id)}\n{command_id}\n".encode("utf-8", "surrogatepass")
    return name_uuid(_OUTCOME_NAMESPACE, name + body)


def encode_outcome(outcome: Outcome) -> bytes:
    """The outcome's JSON, the contract's field names, ASCII only."""
    reason = outcome.reason
    return compact(
        {
            "outcomeId": outcome.outcome_id,
            "commandId": outcome.command_id,
            "lane": outcome.lane,
            "billnumber": outcome.billnumber,
            "merchantId": outcome.merchant_id,
            "reference": outcome.reference,
            "batchId": outcome.batch_id,
            "status": STATUS_OF[reason],
            "reason": reason,
            "responseCode": outcome.response_code,
            "responseMessage": outcome.response_message,
            "detail": outcome.detail,
            "attempts": outcome.attempts,
            "externalIds": outcome.external_ids,
            "effectUnknown": outcome.effect_unknown,
            "receivedAt": jakarta.iso(outcome.received_at),
            "completedAt": jakarta.iso(outcome.completed_at),
        }
    )
