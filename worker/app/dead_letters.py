"""What people do with dead letters: look, bring back, delete. Every step can be cut off without a loss.

All of it works on what was there when it began, and takes all of that in hand first: only so does the rest keep its
order (see the broker's side). Bodies are not kept here, but the broker reads all that we hold; so from `MOST_HELD` on
people must say how many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from worker.core.dead_letter import DeadLetter, Filter, Parcel, read_dead_letter, redriven
from worker.core.delivery import Message
from worker.core.outcome import Status
from worker.core.ports import Clock
from worker.core.topology import Names

KEPT: Final = 20_000
"""The most commands brought back in one pass over the queue: the most whose bodies are in memory at a time."""
KEPT_BYTES: Final = 32 * 1024 * 1024
"""The most of their bodies; what goes beyond is left to the next pass."""
WINDOW: Final = 500
"""Commands on their way without a confirm; a crash leaves at most so many in both queues."""
MOST_HELD: Final = 20_000
"""The most dead letters held at a time unless people say otherwise: the broker reads all that we hold into its memory,
some 7 KB each with small bodies, and at its memory alarm it stops every publisher."""
HOLD_SECONDS: Final = 600.0
"""Held so long, everything is given back and taken again: the broker takes messages away after 30 minutes."""
AHEAD: Final = 200
"""Commands on their way without an outcome while failures are watched: what can go wrong before it is noticed."""
SAMPLE: Final = 20
"""Outcomes before a percentage means anything."""
SHOW_EVERY: Final = 1000
LATENESS: Final = 0.1
SLICE: Final = 0.2  # seconds between two looks at the clock and at the signals


@dataclass(frozen=True, slots=True)
class HeldLetter:
    """A message in our hands: acked by its number, or given back."""

    number: int
    parcel: Parcel


@dataclass(frozen=True, slots=True)
class OutcomeSummary:
    """What an outcome says."""

    command_id: str
    status: str
    reason: str


class Parked(Protocol):
    """The queue of the dead letters, which nobody else reads meanwhile. One thread; raises the broker's errors."""

    def count(self) -> int:
        """How many lie there and are not held."""

    def hold(self, count: int, each: Callable[[HeldLetter], None]) -> None:
        """Takes the first ``count``, which are there, in hand, in order. Once, then they are to be given back."""

    def remove(self, numbers: Iterable[int]) -> None:
        """Deletes what is held; returns when the broker has done it."""

    def publish(self, message: Message, number: int) -> bool:
        """Publishes, and deletes the held message when the broker has confirmed. False: it cannot be encoded."""

    def settle(self, most: int) -> None:
        """Waits until no more than ``most`` of what was published are neither confirmed and deleted, nor refused."""

    @property
    def moved(self) -> int:
        """How many were published, confirmed and deleted."""

    @property
    def refused(self) -> str:
        """Why the broker does not take what is published; empty while it does."""

    def give_back(self) -> None:
        """Everything held returns to where it was."""

    def follow(self, lanes: Iterable[str]) -> None:
        """From now on, `outcomes` has the outcomes of these lanes."""

    def outcomes(self) -> list[OutcomeSummary]:
        """Those that came since the last call."""

    def turn(self, seconds: float) -> None:
        """Lets the conversation go on for at most so long."""


Stop = Callable[[], int]
"""How often people asked to stop."""

Show = Callable[[int, int, int], None]
"""Progress: so many of those that were there are looked at, so many of those that are wanted are done."""


class TooMany(Exception):
    """So many dead letters exist that a command holds all of them only if it is asked to."""

    def __init__(self, there: int) -> None:
        super().__init__(there)
        self.there = there


# -- looking --------------------------------------------------------------------------------------------------------


def look(
    parked: Parked, each: Callable[[HeldLetter], None], *, show: Show, limit: int | None = None
) -> tuple[int, int]:
    """Shows every dead letter to ``each``, in their order; they stay. How many there are, and were looked at.

    Beyond `MOST_HELD`, only the first ``limit``. Raises `TooMany` where there is no limit then.
    """
    there = parked.count()
    looked_at = _hold(parked, there, limit, each, show)
    parked.give_back()
    return there, looked_at


def _check_limit(there: int, limit: int | None) -> None:
    if there > MOST_HELD and limit is None:
        raise TooMany(there)


def _hold(parked: Parked, there: int, limit: int | None, each: Callable[[HeldLetter], None], show: Show) -> int:
    _check_limit(there, limit)
    count = there if limit is None or there <= MOST_HELD else min(there, limit)
    seen = 0

    def one(held: HeldLetter) -> None:
        nonlocal seen
        each(held)
        seen += 1
        if seen % SHOW_EVERY == 0:
            show(seen, 0, 0)

    if count:
        parked.hold(count, one)
    return count


def purge(
    parked: Parked,
    wanted: Callable[[HeldLetter], bool],
    sure: Callable[[int], bool],
    *,
    stop: Stop,
    show: Show,
    limit: int | None = None,
) -> tuple[int, int, int]:
    """Deletes those that are ``wanted`` if people are ``sure`` of their number. How many are there, match, are deleted.

    All are held while people think: what is deleted is what was counted. ``limit`` as for `look`.
    """
    numbers: list[int] = []

    def each(held: HeldLetter) -> None:
        if wanted(held):
            numbers.append(held.number)

    there = parked.count()
    _hold(parked, there, limit, each, show)
    removed = 0
    if numbers and not stop() and sure(len(numbers)) and not stop():
        parked.remove(numbers)
        removed = len(numbers)
    parked.give_back()
    return there, len(numbers), removed


# -- bringing back --------------------------------------------------------------------------------------------------


class RedriveEnd(Enum):
    """How a redrive ended."""

    DONE = "done"
    STOPPED = "stopped"
    CANARY = "canary was bad"
    FAILURES = "too many failures"
    SILENT = "no outcomes"
    REFUSED = "refused by the broker"


@dataclass(frozen=True, slots=True)
class RedrivePlan:
    """What is to be brought back, and how carefully. ``rate`` is per second, 0 for no limit; ``stop_at_failures`` is a
    percentage; ``patience`` is seconds without an outcome."""

    filter: Filter = field(default_factory=Filter)
    limit: int | None = None
    rate: float = 0.0
    canary: int = 0
    stop_at_failures: float | None = None
    patience: float = 120.0


@dataclass(slots=True)
class RedriveReport:
    """What a redrive did. ``without_lane``: they match, but no lane is known or they cannot be published; they stay."""

    there: int = 0
    seen: int = 0
    matching: int = 0
    without_lane: int = 0
    redriven: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    unanswered: int = 0
    ended: RedriveEnd = RedriveEnd.DONE
    why: str = ""

    @property
    def answered(self) -> int:
        """Outcomes that came."""
        return self.outcomes.total()

    @property
    def failures(self) -> int:
        """Outcomes that are not what people want: anything but an expired bill."""
        return sum(count for (status, _), count in self.outcomes.items() if status != Status.EXPIRED)


class Redrive:
    """One redrive. ``copy_id`` makes a new copy id for each message that is brought back. ``each`` sees every match."""

    def __init__(
        self,
        parked: Parked,
        names: Names,
        plan: RedrivePlan,
        *,
        clock: Clock,
        copy_id: Callable[[], str],
        stop: Stop,
        show: Show,
        each: Callable[[DeadLetter], None] = lambda _: None,
    ) -> None:
        self._parked = parked
        self._names = names
        self._plan = plan
        self._clock = clock
        self._copy_id = copy_id
        self._stop = stop
        self._show = show
        self._each = each
        self._watching = plan.canary > 0 or plan.stop_at_failures is not None
        self._first_pass = True
        self._sent = 0
        self._left_out = False  # a match stays behind that is to be taken in another pass
        self._waiting: Counter[str] = Counter()  # commands without an outcome
        self._free_at = 0.0
        self.report = RedriveReport()

    def run(self) -> RedriveReport:
        """Raises the broker's errors; `report` then says how far it came."""
        plan, report = self._plan, self.report
        report.there = self._parked.count()
        _check_limit(report.there, plan.limit)
        goal = report.there if plan.limit is None else min(plan.limit, report.there)
        if self._watching:
            self._parked.follow(sorted(plan.filter.lanes))
        if plan.canary:
            self._bring_back(min(plan.canary, goal))
            self._await_canary()
            self._watching = plan.stop_at_failures is not None
        complete = self._bring_back(goal)
        self._listen()
        report.unanswered = self._waiting.total()
        if not complete and report.ended is RedriveEnd.DONE:
            report.ended = RedriveEnd.STOPPED
        return report

    @property
    def _going(self) -> bool:
        return self.report.ended is RedriveEnd.DONE and not self._stop()

    def _bring_back(self, goal: int) -> bool:
        """Passes over the queue until so many are sent, or all that match. False: it was stopped before."""
        exhausted = False
        while self._going and self._sent < goal and not exhausted:
            exhausted = self._pass(goal)
        return exhausted or self._sent >= goal

    def _pass(self, goal: int) -> bool:
        """Takes all in hand, sends what it keeps of it, gives the rest back. Whether all was dealt with."""
        chosen: list[tuple[HeldLetter, DeadLetter]] = []
        size = 0
        self._left_out = False

        def sort(held: HeldLetter) -> None:
            nonlocal size
            letter = self._sort(held)
            if letter is None or len(chosen) >= goal - self._sent:
                return
            size += len(held.parcel.body)
            if len(chosen) < KEPT and (size <= KEPT_BYTES or not chosen):
                chosen.append((held, letter))
            else:
                self._left_out = True

        # Beyond MOST_HELD only the first are taken in hand: of those, as many as the limit says are sent.
        sent, left = self._sent, min(self.report.there - self._parked.moved, max(MOST_HELD, self._plan.limit or 0))
        if left:
            self._parked.hold(left, sort)
            self._first_pass = False
            try:
                self._send(chosen)
            finally:
                self.report.redriven = self._parked.moved
            self._parked.give_back()
        return not self._left_out or self._sent == sent  # what cannot be sent now cannot be sent in the next pass

    def _sort(self, held: HeldLetter) -> DeadLetter | None:
        """The letter if it is to be brought back. Each is counted once, however many passes see it."""
        letter = read_dead_letter(self._names, held.parcel)
        matches = self._plan.filter.matches(letter)
        if self._first_pass:
            self.report.seen += 1
            if self.report.seen % SHOW_EVERY == 0:
                self._show(self.report.seen, 0, 0)
            if matches:
                self.report.matching += 1
                self.report.without_lane += letter.lane is None
                self._each(letter)
        return letter if matches and letter.lane is not None else None

    def _send(self, chosen: list[tuple[HeldLetter, DeadLetter]]) -> None:
        """When it returns, what was sent is at its lane and nowhere else."""
        give_back_at = self._clock.monotonic() + HOLD_SECONDS
        for held, letter in chosen:
            if not self._may_go() or self._clock.monotonic() > give_back_at:
                self._left_out = True
                break
            again = redriven(self._names, letter, held.parcel, self._copy_id(), self._clock.epoch())
            if not self._parked.publish(again, held.number):
                self.report.without_lane += 1
                continue
            self._sent += 1
            if self._watching:
                self._waiting[letter.command_id] += 1
        self._settle(0)

    # -- how carefully

    def _may_go(self) -> bool:
        """Waits for the rate, and for outcomes if they are watched. False: no more."""
        self._settle(WINDOW)
        if self._plan.rate:
            self._pace()
        if self._plan.stop_at_failures is not None and self._watching:
            self._watch()
        return self._going

    def _pace(self) -> None:
        while self._going and (wait := self._free_at - self._clock.monotonic()) > 0:
            self._parked.turn(min(SLICE, wait))
            self._show_progress()
        # A turn of the loop may come a little late; what that costs is made up for, and no more.
        self._free_at = max(self._free_at, self._clock.monotonic() - LATENESS) + 1 / self._plan.rate

    def _watch(self) -> None:
        self._listen()
        if len(self._waiting) >= AHEAD:
            self._await(AHEAD - 1)
        report, most = self.report, self._plan.stop_at_failures
        if most is not None and report.answered >= SAMPLE and 0 < report.failures >= report.answered * most / 100:
            report.ended = RedriveEnd.FAILURES

    def _await_canary(self) -> None:
        """Good means expired. A percentage of failures that is allowed to all is allowed to the canary."""
        self._await(0)
        report = self.report
        allowed = report.answered * (self._plan.stop_at_failures or 0) / 100
        if report.failures > allowed and report.ended in (RedriveEnd.DONE, RedriveEnd.SILENT):
            report.ended = RedriveEnd.CANARY

    def _await(self, most: int) -> None:
        """Until no more than ``most`` commands are without an outcome."""
        deadline = self._clock.monotonic() + self._plan.patience
        while self._going and len(self._waiting) > most:
            self._parked.turn(SLICE)
            self._show_progress()
            if self._listen():
                deadline = self._clock.monotonic() + self._plan.patience
            elif self._clock.monotonic() > deadline:
                self.report.ended = RedriveEnd.SILENT

    def _listen(self) -> bool:
        """Counts the outcomes of our commands that have come."""
        heard = False
        for told in self._parked.outcomes() if self._watching or self._waiting else ():
            if told.command_id in self._waiting:
                heard = True
                self.report.outcomes[told.status, told.reason] += 1
                self._waiting[told.command_id] -= 1
                if not self._waiting[told.command_id]:
                    del self._waiting[told.command_id]
        return heard

    def _show_progress(self) -> None:
        report = self.report
        wanted = report.matching - report.without_lane
        self._show(report.seen, self._parked.moved, min(wanted, self._plan.limit or wanted))

    def _settle(self, most: int) -> None:
        self._parked.settle(most)
        if self._parked.refused and self.report.ended is RedriveEnd.DONE:
            self.report.ended, self.report.why = RedriveEnd.REFUSED, self._parked.refused
        self._show_progress()


def rehearse(
    parked: Parked, names: Names, plan: RedrivePlan, *, show: Show, each: Callable[[DeadLetter], None]
) -> RedriveReport:
    """What a redrive would do; nothing is sent. ``each`` sees what would be brought back."""
    report = RedriveReport()

    def sort(held: HeldLetter) -> None:
        letter = read_dead_letter(names, held.parcel)
        if plan.filter.matches(letter):
            report.matching += 1
            if letter.lane is None:
                report.without_lane += 1
            elif plan.limit is None or report.matching - report.without_lane <= plan.limit:
                each(letter)

    report.there, report.seen = look(parked, sort, show=show, limit=plan.limit and max(plan.limit, MOST_HELD))
    return report
