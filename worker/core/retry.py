"""When to call again: attempts within a round, then delayed rounds in the broker. Every rule of retrying is here."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

from worker.core.outcome import Reason
from worker.core.verdict import Kind, Verdict

MAX_RETRY_AFTER: Final = 600.0  # a gateway that asks for a day must not hold every sender for a day


@dataclass(frozen=True, slots=True)
class Again:
    """Another call follows in this round, after ``pause`` seconds."""

    pause: float


@dataclass(frozen=True, slots=True)
class Later:
    """The round is over; the command waits ``seconds`` in the broker, then comes round ``round``."""

    seconds: int
    round: int


@dataclass(frozen=True, slots=True)
class Over:
    """No call follows: ``reason`` says why the command is unresolved."""

    reason: Reason


Decision = Again | Later | Over


@dataclass(slots=True)
class Round:
    """The attempts of one round. ``started`` (monotonic seconds) moves forward by what was spent on waiting for a slot,
    a token or the end of a hold: such waits are no part of the budget.

    ``outages`` is the lane's count of outages (`Breakers.outages`) when its breaker interrupted this round.
    """

    started: float
    calls: int = 0
    failures: int = 0  # answers that were followed by a backoff
    instant: bool = True  # the one immediate resend (token, external id) is still allowed
    interrupted: float | None = None
    outages: int | None = None

    def waited(self, seconds: float) -> None:
        """So much time passed that is no part of the budget."""
        self.started += seconds

    def interrupt(self, now: float, outages: int | None) -> None:
        """A hold begins."""
        self.interrupted, self.outages = now, outages

    def resume(self, now: float) -> None:
        """The hold is over."""
        if self.interrupted is not None:
            self.started += now - self.interrupted
            self.interrupted = None


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

    def decide(
        self,
        verdict: Verdict,
        attempts: Round,
        *,
        round_: int,
        now: float,
        left: float | None,
        rng: random.Random,
    ) -> Decision:
        """What follows a verdict that is not final. ``round_``: 0 is the first. ``now``: monotonic seconds. ``left``:
        seconds until no call may start any more, None without such a time.

        The first resend after a token or external-id answer is immediate, later ones back off. A verdict that says "not
        now" ends the round, and so does a pause that would end too late: a delay may be shorter.
        """
        too_late = False
        if verdict.kind is not Kind.LATER and attempts.calls < self.max_attempts:
            pause = self._pause(verdict, attempts, rng)
            if now + pause - attempts.started <= self.budget:
                if left is None or pause <= left:
                    return Again(pause)
                too_late = True
        if round_ >= len(self.delays):
            return Over(Reason.DEADLINE_PASSED if too_late else _exhausted(verdict))
        seconds = self.delay(round_, left)
        return Over(Reason.DEADLINE_PASSED) if seconds is None else Later(seconds, round_ + 1)

    def delay(self, round_: int, left: float | None) -> int | None:
        """The delay after round ``round_``; when it does not end in time, the longest of all that does; None when none
        does."""
        delay = self.delays[round_]
        if left is None or delay <= left:
            return delay
        return max((each for each in self.delays if each <= left), default=None)

    def backoff(self, failures: int, rng: random.Random) -> float:
        """Seconds before the next call after ``failures`` backed-off answers (1 or more): full jitter under the
        ceiling, at the ceiling too, so that senders that failed together do not return together."""
        return rng.uniform(0.0, min(self.maximum, self.initial * 2.0 ** min(failures - 1, 30)))

    def _pause(self, verdict: Verdict, attempts: Round, rng: random.Random) -> float:
        if attempts.instant and (verdict.kind is Kind.TOKEN or verdict.kind is Kind.ID_CLASH):
            attempts.instant = False
            return 0.0
        attempts.failures += 1
        return self.backoff(attempts.failures, rng)


def _exhausted(verdict: Verdict) -> Reason:
    systemic = verdict.kind is Kind.SYSTEMIC or verdict.kind is Kind.TOKEN
    return Reason.CREDENTIALS if systemic else Reason.RETRIES_EXHAUSTED


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds asked for by a ``Retry-After`` header (seconds or an HTTP date, RFC 9110 10.2.3), clamped to 0…600;
    None if none can be read. ``now`` is seconds since the epoch."""
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
