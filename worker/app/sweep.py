"""A batch through the broker: publish what is not published, follow the outcomes until every bill has one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, Protocol

from worker.core.delivery import Message
from worker.core.ports import Clock
from worker.core.sweep import (
    Bill,
    Facts,
    Recorded,
    Standing,
    Tally,
    Told,
    Watermark,
    command_message,
    read_outcome,
)
from worker.core.topology import Names

CHUNK: Final = 1000  # bills read from the journal at once
SAVE_EVERY: Final = 0.5  # seconds between two notes of how far it is published; what lies between is published again
CONFIRM_SECONDS: Final = 3.0  # the longest wait, once told to stop, for the confirms of what is on its way
QUIET_SECONDS: Final = 20.0
"""Seconds without any outcome after which people are asked whether a worker runs."""


class Ended(Enum):
    """How it ended."""

    DONE = "done"
    STOPPED = "stopped"


class Screen(Protocol):
    """Shows people how far it is. Called ten times a second."""

    def show(self, standing: Standing, trouble: str) -> None:
        """``trouble`` is what keeps it from going on, empty for nothing."""


class Journal(Protocol):
    """What must survive. Each method returns when its change is on disk."""

    facts: Facts

    def unsent(self, after: int, limit: int) -> list[Bill]:
        """The next bills behind number ``after`` that have no outcome."""

    def published(self, through: int) -> None:
        """Every bill up to this number is with the broker."""

    def record(self, outcomes: Sequence[Told]) -> Recorded:
        """Keeps what tells more than is known."""

    def tally(self) -> Tally:
        """The sum."""


class Sweep:
    """The errand of one batch, for a loop that publishes and consumes: it is asked what to do, and told what was done.

    ``stop`` says whether people want it to end.
    """

    def __init__(
        self, journal: Journal, names: Names, *, follow: bool, stop: Callable[[], int], screen: Screen, clock: Clock
    ) -> None:
        facts, tally = journal.facts, journal.tally()
        self._journal = journal
        self._names = names
        self._batch = facts.batch
        self._follow = follow
        self._stop = stop
        self._screen = screen
        self._clock = clock
        self._watermark = Watermark(facts.published)
        self._saved = self._read = facts.published
        self._ahead: deque[Bill] = deque()
        self._exhausted = not tally.unsent
        self._standing = Standing(tally.bills, tally.sent, dict(tally.told))
        self._save_at = self._heard_at = clock.monotonic()
        self._give_up_at: float | None = None
        self.ended: Ended | None = None

    def next(self) -> tuple[int, Message] | None:
        """The next bill's command; None when all are on their way, or when no more are wanted."""
        if self._exhausted or self._stop():
            return None
        if not self._ahead:
            self._ahead.extend(self._journal.unsent(self._read, CHUNK))
            self._exhausted = not self._ahead
            if self._exhausted:
                return None
        bill = self._ahead.popleft()
        self._read = bill.number
        self._watermark.published(bill.number)
        return bill.number, command_message(self._names, self._batch, bill, self._clock.epoch())

    def confirmed(self, number: int) -> None:
        """The broker has that bill's command."""
        self._watermark.confirmed(number)
        self._standing.sent = min(self._standing.sent + 1, self._standing.bills)

    def outcomes(self, bodies: Sequence[bytes]) -> None:
        """Keeps what they say; safe when it returns."""
        told = [each for each in map(read_outcome, bodies) if each is not None]
        self._standing.add(self._journal.record(told))
        self._heard_at = self._clock.monotonic()

    def look(self, trouble: str) -> bool:
        """Saves, shows, and says whether to go on."""
        now = self._clock.monotonic()
        if now >= self._save_at:
            self._save()
            self._save_at = now + SAVE_EVERY
        self._screen.show(self._standing, trouble or self._silence(now))
        self.ended = self._ending(now)
        if self.ended is None:
            return True
        self._save()
        return False

    def _ending(self, now: float) -> Ended | None:
        all_sent = self._exhausted and not self._watermark
        if all_sent and not (self._follow and self._standing.answered < self._standing.bills):
            return Ended.DONE
        if not self._stop():
            return None
        self._give_up_at = self._give_up_at or now + CONFIRM_SECONDS
        if self._watermark and now < self._give_up_at and self._stop() < 2:
            return None
        return Ended.STOPPED

    def _save(self) -> None:
        if self._watermark.through > self._saved:
            self._saved = self._watermark.through
            self._journal.published(self._saved)

    def _silence(self, now: float) -> str:
        quiet = self._follow and self._exhausted and now - self._heard_at > QUIET_SECONDS
        return f"no outcome for {now - self._heard_at:.0f} s; does a worker run?" if quiet else ""
