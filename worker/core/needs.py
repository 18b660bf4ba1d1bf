"""What people must do about the bills of a batch that did not expire."""

from __future__ import annotations

from typing import Final, NamedTuple

from worker.core.outcome import Reason, Status
from worker.core.sweep import Tally


class Need(NamedTuple):
    """Bills that need the same of people. ``retry``: to send them again may help."""

    title: str
    what: str
    reasons: frozenset[Reason]
    retry: bool = False


NEEDS: Final = (
    Need(
        "already paid (refund)",
        "the customer paid before the QR code was expired; refund the payment if the order is cancelled",
        frozenset({Reason.PAID}),
    ),
    Need(
        "not found (check the number)",
        "the gateway does not know such a bill of such a merchant, so the QR code that was meant can still be paid; "
        "compare bill and merchant with the order, and sweep the corrected ones",
        frozenset({Reason.NOT_FOUND, Reason.INVALID_MERCHANT, Reason.INVALID_FIELD, Reason.BAD_REQUEST}),
    ),
    Need(
        "refused (call the gateway's support)",
        "the gateway refuses them for good, so their QR codes can still be paid",
        frozenset({Reason.MERCHANT_BLACKLISTED, Reason.REFUSED}),
    ),
    Need(
        "deadline passed (expire by hand)",
        "their notAfter passed before the gateway could be asked; see whether their QR codes must still be expired",
        frozenset({Reason.DEADLINE_PASSED}),
    ),
    Need(
        "unresolved (call the gateway's support if they stay so)",
        "it is unknown whether their QR codes can still be paid",
        frozenset({Reason.RETRIES_EXHAUSTED, Reason.NOT_FOUND_AFTER_UNKNOWN_EFFECT, Reason.CREDENTIALS}),
        retry=True,
    ),
    Need(
        "invalid (tell the operator of the worker)",
        "the worker could not read the command that this sweep sent",
        frozenset({Reason.MALFORMED_JSON, Reason.INVALID_COMMAND, Reason.TOO_LARGE}),
    ),
)
UNKNOWN_BILL: Final = NEEDS[1].reasons
"""Answers by which the gateway says that it does not know what it was asked for."""

RETRIED: Final = next(need.reasons for need in NEEDS if need.retry)
"""What `--retry-unresolved` sends again: the deadline of the others stays passed."""

SUSPICIOUS_PERCENT: Final = 5.0
"""A share of unknown bills beyond what typing errors make: a wrong column, or numbers that a spreadsheet changed."""


def count(tally: Tally, reasons: frozenset[Reason]) -> int:
    """Bills with one of these reasons."""
    return sum(number for (_, reason), number in tally.told.items() if reason in reasons)


def suspicious(tally: Tally, percent: float) -> bool:
    """Whether the gateway does not know more than ``percent`` of the bills that have an outcome."""
    return count(tally, UNKNOWN_BILL) > tally.answered * percent / 100


def settled(tally: Tally, *, rejected: bool, percent: float) -> bool:
    """Whether nobody has to do anything: all expired or, if ``rejected`` ones do not matter, all answered for good and
    no more than ``percent`` of them unknown."""
    if rejected and not suspicious(tally, percent):
        return tally.ended(Status.EXPIRED, Status.REJECTED) == tally.bills
    return tally.expired == tally.bills
