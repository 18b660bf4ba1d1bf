"""When to send again: attempts within a round, then delayed rounds in the broker."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

from worker.core.verdict import Kind, Verdict

MAX_RETRY_AFTER: Final = 600.0  # a gateway that asks for a day must not hold every sender for a day


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits of one round (calls, exponential backoff with full jitter, total seconds) and the delayed rounds.

    ``max_attempts`` keeps one bad bill from hammering the gateway; ``budget`` keeps it from holding a sender;
    ``delays`` (seconds, whole) let it wait in the broker instead, one round after each.
    """

    max_attempts: int = 4
    initial: float = 0.5
    maximum: float = 8.0
    budget: float = 20.0
    delays: tuple[int, ...] = (30, 300, 1800)

    def backoff(self, failures: int, rng: random.Random) -> float:
        """Seconds before the next call after ``failures`` backed-off answers (1 or more): full jitter under the
        ceiling, at the ceiling too, so that senders that failed together do not return together."""
        return rng.uniform(0.0, min(self.maximum, self.initial * 2.0 ** min(failures - 1, 30)))

    def next_delay(self, round_: int, at_least: float = 0.0) -> tuple[int, int] | None:
        """(delay in seconds, number of the round that follows it), or None when the rounds are used up.

        Round 0 is the first. ``at_least`` (a throttled answer's wait) skips delays that are too short, but never the
        last one left.
        """
        for index in range(round_, len(self.delays)):
            if self.delays[index] >= at_least or index == len(self.delays) - 1:
                return self.delays[index], index + 1
        return None


@dataclass(slots=True)
class Round:
    """The attempts of one round. ``started`` (monotonic) moves forward by what was spent on holds: they cost no
    budget."""

    started: float
    interrupted: float | None = None
    calls: int = 0
    failures: int = 0  # answers that were, or will be, followed by a backoff
    instant: bool = True  # the one immediate resend (token, external id) is still to be had

    def interrupt(self, now: float) -> None:
        """A hold begins."""
        self.interrupted = now

    def resume(self, now: float) -> None:
        """The hold is over."""
        if self.interrupted is not None:
            self.started += now - self.interrupted
            self.interrupted = None

    def pause(self, verdict: Verdict, policy: RetryPolicy, rng: random.Random) -> float:
        """Seconds to wait before the next call, and the bookkeeping of this answer.

        The first resend after a token or external-id answer is immediate; after a throttled answer the wait is the
        hold's, for every sender, not this command's.
        """
        if self.instant and (verdict.kind is Kind.TOKEN or verdict.kind is Kind.ID_CLASH):
            self.instant = False
            return 0.0
        if verdict.kind is Kind.THROTTLED:
            return 0.0
        self.failures += 1
        return policy.backoff(self.failures, rng)

    def over(self, pause: float, now: float, policy: RetryPolicy) -> bool:
        """Whether no further call fits: the count is used up, or the pause would end after the budget."""
        return self.calls >= policy.max_attempts or now + pause - self.started > policy.budget


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds asked for by a ``Retry-After`` header (seconds or an HTTP date, RFC 9110 10.2.3), clamped to 0…600;
    None when there is none that can be read. ``now`` is seconds since the epoch."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER)
    try:
        moment = parsedate_to_datetime(text)
        # HTTP's oldest date format names no zone: it is GMT, whatever TZ says.
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)
