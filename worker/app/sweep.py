"""A batch through the broker: publish what is not published, follow the outcomes until every bill has one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, Protocol

from worker.core.delivery import Message
from worker.core.fleet.messages import Beat, decode_letter
from worker.core.lanes import SWEEP
from worker.core.pace import WINDOW, Pace
from worker.core.ports import Clock
from worker.core.sweep import Bill, Facts, Recorded, Tally, Told, Watermark, command_message, read_outcome
from worker.core.topology import Names
from worker.core.words import plural

AT_ONCE: Final = 500  # outcomes that are kept in one transaction; the rest waits
CHUNK: Final = 1000  # bills read from the journal at once
SAVE_EVERY: Final = 0.2  # seconds between two records of how much is published; a crash repeats the rest
LAST_CONFIRMS_SECONDS: Final = 3.0  # the longest wait, once told to stop, for the confirms of what is on its way
QUIET_SECONDS: Final = 20.0
"""Seconds without any outcome after which people are asked whether a worker runs."""


BEATS_SECONDS: Final = 5.0  # what the leader told last is true for so long


def failing(left: float) -> str:
    """The breaker is open; ``left``: seconds until the next probe."""
    return f"paused: the gateway is failing, {f'next probe in {left:.0f} s' if left >= 1 else 'it is being probed'}"


def why_paused(beat: Beat, lane: str) -> str:
    """Why the fleet makes no calls for the lane, in a sentence for people; empty if it does."""
    wanted = beat.orders.pauses.get(lane)
    if wanted is not None and beat.pauses.get(lane, 1.0) > 0:
        return (
            f"paused by {wanted.by}{f' ({wanted.reason})' if wanted.reason else ''}: `qris-expire fleet resume` ends it"
        )
    breaker = beat.breakers.get(lane)
    if breaker is not None and breaker.state:
        return failing(breaker.left)
    if beat.hold > 0:
        return f"paused: the gateway asks for fewer calls, for {beat.hold:.0f} s more"
    return ""


class Ended(Enum):
    """How it ended."""

    DONE = "done"
    STOPPED = "stopped"
    CUT = "cut"  # somebody stopped the batch: what was published has its outcomes, the rest is unsent


class Screen(Protocol):
    """Shows people how far it is. Called ten times a second."""

    def show(self, tally: Tally, trouble: str) -> None:
        """``trouble`` is what keeps it from going on, empty for nothing."""


class SweepJournal(Protocol):
    """What must survive (see `worker.shells.journal`). Each method returns when its change is on disk."""

    facts: Facts

    def unsent(self, after: int, limit: int) -> list[Bill]: ...
    def published(self, through: int) -> None: ...
    def record(self, outcomes: Sequence[Told]) -> Recorded: ...
    def tally(self) -> Tally: ...
    def stop(self, who: str) -> None: ...


class Sweep:
    """The work of one batch, for a loop that publishes and consumes: it says what to do, and hears what was done.

    A batch that is followed never has more than ``window`` bills without an outcome. ``stop`` says whether people want
    it to end.
    """

    def __init__(
        self,
        journal: SweepJournal,
        names: Names,
        *,
        follow: bool,
        stop: Callable[[], int],
        screen: Screen,
        clock: Clock,
        window: int = WINDOW,
    ) -> None:
        facts = journal.facts
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
        self._tally = journal.tally()
        self._exhausted = not self._tally.unsent
        self._save_at = self._heard_at = clock.monotonic()
        self._window = window
        self._pace = Pace(window, self._heard_at)
        self._lane: tuple[int, int] | None = None
        self._fleet: Beat | None = None
        self._fleet_at = 0.0
        self._unanswered = self._tally.waiting
        self._answered = facts.published  # the highest number that has an outcome, as far as this process knows
        self._give_up_at: float | None = None
        self.ended: Ended | None = None

    def next(self) -> tuple[int, Message] | None:
        """The next bill's command, and the number by which `confirmed` names it; None when all are on their way, or
        when no more are wanted now."""
        if self._exhausted or self._stop() or self._journal.facts.stopped or not self._room():
            return None
        if not self._ahead:
            self._ahead.extend(self._journal.unsent(self._read, CHUNK))
            self._exhausted = not self._ahead
            if self._exhausted:
                return None
        bill = self._ahead.popleft()
        self._read = bill.number
        self._unanswered += 1
        self._watermark.published(bill.number)
        return bill.number, command_message(self._names, self._batch, bill, self._clock.epoch())

    def confirmed(self, number: int) -> None:
        """The broker has that bill's command."""
        self._watermark.confirmed(number)
        self._tally.add_sent()

    def outcomes(self, bodies: Sequence[bytes], lane: int = 0) -> None:
        """Keeps what they say; safe when it returns. ``lane``: how many came in all, with those of other batches."""
        self._pace.heard(lane)
        if not bodies:
            return
        told = [each for each in map(read_outcome, bodies) if each is not None]
        recorded = self._journal.record(told)
        self._tally.add(recorded)
        for number in recorded.numbers:
            if number <= self._read:  # else an earlier process published it, and could not note that any more
                self._unanswered = max(0, self._unanswered - 1)
                self._answered = max(self._answered, number)
        self._heard_at = self._clock.monotonic()

    def lane(self, ready: int, consumers: int) -> None:
        """The lane as it is now, a few times a second: messages that wait in it, of all batches, and its consumers."""
        self._lane = (ready, consumers)
        self._pace.seen(self._clock.monotonic(), self._read - self._answered, ready, consumers)

    def fleet(self, body: bytes) -> None:
        """What the fleet's leader tells its members, several times a second."""
        letter = decode_letter(body)
        if letter is not None and isinstance(letter.message, Beat):
            self._fleet, self._fleet_at = letter.message, self._clock.monotonic()

    def cut(self, who: str, epoch: float) -> str:
        """Somebody stops the batch: nothing more of it is published. Returns how far the batch is, for people."""
        if epoch >= self._journal.facts.resumed_at:
            self._journal.stop(who)
        return (
            f"{self._tally.sent:,} of {self._tally.bills:,} bills are published, "
            f"{self._unanswered:,} of them have no outcome yet"
        )

    def _room(self) -> bool:
        if not self._follow:
            return True
        ahead = self._read - self._answered
        return self._unanswered < self._window and ahead < self._pace.allowed(self._clock.monotonic())

    def look(self, trouble: str) -> bool:
        """Ten times a second: saves, shows, and says whether to go on. ``trouble``: what keeps the broker from working
        for us, if anything does."""
        now = self._clock.monotonic()
        if now >= self._save_at:
            self._save()
            self._save_at = now + SAVE_EVERY
        self._screen.show(self._tally, trouble or self._silence(now))
        self.ended = self._ending(now)
        if self.ended is None:
            return True
        self._save()
        return False

    def _ending(self, now: float) -> Ended | None:
        if not self._watermark:
            if self._exhausted and not (self._follow and self._tally.answered < self._tally.bills):
                return Ended.DONE
            if self._journal.facts.stopped and not (self._follow and self._unanswered):
                return Ended.CUT
        if not self._stop():
            return None
        self._give_up_at = self._give_up_at or now + LAST_CONFIRMS_SECONDS
        if self._watermark and now < self._give_up_at and self._stop() < 2:
            return None
        return Ended.STOPPED

    def _save(self) -> None:
        if self._watermark.through > self._saved:
            self._saved = self._watermark.through
            self._journal.published(self._saved)

    def _silence(self, now: float) -> str:
        if self._journal.facts.stopped:
            return f"stopped by {self._journal.facts.stopped}; {self._unanswered:,} bills wait for their outcome"
        if self._fleet is not None and now - self._fleet_at < BEATS_SECONDS:
            paused = why_paused(self._fleet, SWEEP)
            if paused:
                return paused
        if not (self._follow and self._unanswered and now - self._heard_at > QUIET_SECONDS):
            return ""
        quiet, queue = f"no outcome for {now - self._heard_at:.0f} s", self._names.queue(SWEEP)
        match self._lane:
            case None:
                return f"{quiet}; does a worker run?"
            case (_, 0):
                return f"{quiet}: no worker consumes {queue}; none runs, or all are paused"
            case (ready, consumers):
                return f"{quiet}: {plural(ready, 'command')} in {queue}, {plural(consumers, 'consumer')}"
