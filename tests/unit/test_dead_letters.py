"""What people do with dead letters, against a queue in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.builders import NOON, Properties, body
from worker.app import dead_letters
from worker.app.dead_letters import (
    MOST_HELD,
    HeldLetter,
    OutcomeSummary,
    Redrive,
    RedriveEnd,
    RedrivePlan,
    RedriveReport,
    TooMany,
    look,
    purge,
    rehearse,
)
from worker.core.dead_letter import DeadLetter, Filter, Parcel
from worker.core.delivery import Message
from worker.core.topology import Names

NAMES = Names("p")


class Clock:
    """Moves when somebody waits."""

    now = 0.0

    def epoch(self) -> float:
        return NOON + self.now

    def monotonic(self) -> float:
        return self.now


class FakeParked:
    """A queue; what is held returns to its place. ``answer`` gives each command's outcome, or None."""

    def __init__(self, *ids: str, reason: str = "credentials", answer: str | None = None) -> None:
        self.queue = [(name, reason) for name in ids]
        self.held: dict[int, tuple[str, str]] = {}
        self.lane: list[str] = []
        self.sent_at: list[float] = []
        self.moved = 0
        self.refused = ""
        self.refuse_after: int | None = None
        self.unencodable: set[str] = set()
        self.clock = Clock()
        self.answer = answer
        self.following: list[str] | None = None
        self.passes = 0
        self._outcomes: deque[OutcomeSummary] = deque()

    def count(self) -> int:
        return len(self.queue)

    def hold(self, count: int, each: Callable[[HeldLetter], None]) -> None:
        assert not self.held, "held twice"
        self.passes += 1
        self.held = dict(enumerate(self.queue[:count]))
        del self.queue[:count]
        for number, (name, reason) in list(self.held.items()):
            headers = {"dead-reason": reason, "dead-lane": "sweep", "attempts": 4}
            each(HeldLetter(number, Parcel("sweep", Properties(message_id=name, headers=headers), body())))

    def remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            del self.held[number]

    def publish(self, message: Message, number: int) -> bool:
        name = str(message.properties["message_id"])
        if name in self.unencodable:
            return False
        if self.refuse_after is not None and len(self.lane) >= self.refuse_after:
            self.refused = "no queue is bound"
            return True
        self.lane.append(name)
        self.sent_at.append(self.clock.now)
        del self.held[number]
        self.moved += 1
        if self.following is not None and self.answer is not None:
            self._outcomes.append(OutcomeSummary(name, self.answer, "success" if self.answer == "expired" else "paid"))
        return True

    def settle(self, most: int) -> None:
        """Everything is."""

    def give_back(self) -> None:
        self.queue = [self.held[number] for number in sorted(self.held)] + self.queue
        self.held = {}

    def follow(self, lanes: Iterable[str]) -> None:
        self.following = list(lanes)

    def outcomes(self) -> list[OutcomeSummary]:
        told = list(self._outcomes)
        self._outcomes.clear()
        return told

    def turn(self, seconds: float) -> None:
        self.clock.now += seconds

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.queue]


def redrive(parked: FakeParked, stop: Callable[[], int] = lambda: 0, **order: Any) -> RedriveReport:
    """A whole redrive."""
    run = Redrive(
        parked, NAMES, RedrivePlan(**order), clock=parked.clock, copy_id=lambda: "h", stop=stop, show=lambda *_: None
    )
    return run.run()


def ids(count: int) -> list[str]:
    return [f"m{number:04d}" for number in range(count)]


def test_all() -> None:
    """Everything goes back to its lane, in its order, and nothing stays."""
    parked = FakeParked(*ids(10))
    report = redrive(parked)

    assert (parked.lane, parked.names) == (ids(10), [])
    assert (report.there, report.seen, report.matching, report.redriven, report.ended) == (
        10,
        10,
        10,
        10,
        RedriveEnd.DONE,
    )


def test_the_rest_stays() -> None:
    """What does not match, and what the limit leaves, lies where it was."""
    parked = FakeParked(*ids(6))
    parked.queue[1] = parked.queue[1][0], "malformed_json"
    report = redrive(parked, filter=Filter(reasons=frozenset({"credentials"})), limit=3)

    assert parked.lane == ["m0000", "m0002", "m0003"]
    assert parked.names == ["m0001", "m0004", "m0005"]
    assert (report.matching, report.redriven) == (5, 3)


def test_only_what_was_there() -> None:
    """What is parked meanwhile is not taken."""
    parked = FakeParked(*ids(3))
    taken = parked.publish

    def publish(message: Message, number: int) -> bool:
        parked.queue.append(("late", "credentials"))
        return taken(message, number)

    parked.publish = publish  # type: ignore[method-assign]
    redrive(parked)

    assert parked.lane == ids(3)
    assert parked.names == ["late"] * 3


def test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than memory should hold is taken in several passes, in order, and counted once."""
    monkeypatch.setattr(dead_letters, "KEPT", 4)
    parked = FakeParked(*ids(10))
    report = redrive(parked)

    assert (parked.lane, parked.passes) == (ids(10), 3)
    assert (report.seen, report.matching, report.redriven) == (10, 10, 10)


def test_rate() -> None:
    """Commands go out evenly spaced."""
    parked = FakeParked(*ids(5))
    redrive(parked, rate=2.0)

    assert parked.sent_at == pytest.approx([0, 0.5, 1.0, 1.5, 2.0])


def test_slow_redrive_gives_back_now_and_then() -> None:
    """The broker takes away what is held for half an hour, so nothing is."""
    parked = FakeParked(*ids(5))
    redrive(parked, rate=1 / 400)

    assert parked.lane == ids(5)
    assert parked.passes > 1


def test_canary_good() -> None:
    """The rest follows once the first have expired."""
    parked = FakeParked(*ids(10), answer="expired")
    report = redrive(parked, canary=2)

    assert (parked.lane, report.redriven, report.ended) == (ids(10), 10, RedriveEnd.DONE)
    assert report.outcomes == {("expired", "success"): 2}


def test_canary_bad() -> None:
    """The rest stays when one of the first did not expire."""
    parked = FakeParked(*ids(10), answer="rejected")
    report = redrive(parked, canary=2)

    assert (parked.lane, parked.names) == (ids(2), ids(10)[2:])
    assert report.ended is RedriveEnd.CANARY


def test_canary_silent() -> None:
    """Without an outcome in time, the rest stays."""
    parked = FakeParked(*ids(10))
    report = redrive(parked, canary=2, patience=30.0)

    assert (len(parked.lane), report.ended, report.unanswered) == (2, RedriveEnd.SILENT, 2)
    assert parked.clock.now == pytest.approx(30, abs=1)


def test_stop_at_failures() -> None:
    """Once the sample is large enough, too many failures stop it."""
    parked = FakeParked(*ids(1000), answer="unresolved")
    report = redrive(parked, stop_at_failures=10)

    assert report.ended is RedriveEnd.FAILURES
    assert dead_letters.SAMPLE <= len(parked.lane) <= dead_letters.SAMPLE + 1
    assert parked.names == ids(1000)[len(parked.lane) :]


def test_failures_within_the_bounds() -> None:
    """No failure, no stop."""
    parked = FakeParked(*ids(1000), answer="expired")

    assert redrive(parked, stop_at_failures=0).ended is RedriveEnd.DONE


def test_not_too_far_ahead_of_the_outcomes() -> None:
    """While failures are watched, no more than so many are on their way, or they could all fail."""
    parked = FakeParked(*ids(1000))
    report = redrive(parked, stop_at_failures=10, patience=30.0)

    assert (len(parked.lane), report.ended) == (dead_letters.AHEAD, RedriveEnd.SILENT)


def test_refused() -> None:
    """What the broker does not take stays, and nothing more is sent."""
    parked = FakeParked(*ids(10))
    parked.refuse_after = 3
    report = redrive(parked)

    assert (parked.lane, parked.names) == (ids(3), ids(10)[3:])
    assert (report.ended, report.why, report.redriven) == (RedriveEnd.REFUSED, "no queue is bound", 3)


def test_cannot_be_published() -> None:
    """One that cannot be put on the wire stays, and the others go."""
    parked = FakeParked(*ids(5))
    parked.unencodable = {"m0000", "m0002"}
    report = redrive(parked)

    assert (parked.lane, parked.names) == (["m0001", "m0003", "m0004"], ["m0000", "m0002"])
    assert (report.without_lane, report.ended) == (2, RedriveEnd.DONE)


@pytest.mark.parametrize("after", range(6))
def test_stopped(after: int) -> None:
    """Asked to stop, at whatever point, it leaves each command in exactly one place."""
    parked = FakeParked(*ids(5))
    report = redrive(parked, stop=lambda: int(len(parked.lane) >= after))

    assert parked.lane + parked.names == ids(5)
    assert report.redriven == after
    assert (report.ended is RedriveEnd.DONE) is (after == 5)


def test_rehearsal() -> None:
    """It says what would go, and sends nothing."""
    parked = FakeParked(*ids(5))
    seen: list[DeadLetter] = []
    report = rehearse(parked, NAMES, RedrivePlan(limit=2), show=lambda *_: None, each=seen.append)

    assert ([letter.command_id for letter in seen], report.matching) == (ids(2), 5)
    assert (parked.lane, parked.names) == ([], ids(5))


def test_look() -> None:
    """Each is shown once, and all stay."""
    parked = FakeParked(*ids(5))
    seen: list[Any] = []

    assert look(parked, lambda held: seen.append(held.parcel.properties.message_id), show=lambda *_: None) == (5, 5)
    assert (seen, parked.names) == (ids(5), ids(5))


def test_too_many_are_not_held_unasked() -> None:
    """Beyond the bound nothing is taken in hand, whatever is to be done, until people say how many."""
    parked = FakeParked(*ids(MOST_HELD + 1))
    show: Any = lambda *_: None  # noqa: E731

    for attempt in (
        lambda: look(parked, show, show=show),
        lambda: purge(parked, lambda _: True, lambda _: True, stop=lambda: 0, show=show),
        lambda: redrive(parked),
        lambda: rehearse(parked, NAMES, RedrivePlan(), show=show, each=show),
    ):
        with pytest.raises(TooMany):
            attempt()
    assert (parked.passes, parked.lane) == (0, [])


def test_with_a_limit_the_first_are_taken() -> None:
    """Beyond the bound, no more than the limit is looked at or deleted, and no more than the bound for a redrive."""
    parked = FakeParked(*ids(MOST_HELD + 10))
    seen: list[Any] = []
    show: Any = lambda *_: None  # noqa: E731

    assert look(parked, lambda held: seen.append(held.parcel.properties.message_id), show=show, limit=3) == (
        MOST_HELD + 10,
        3,
    )
    assert seen == ids(3)
    purged = purge(parked, lambda _: True, lambda _: True, stop=lambda: 0, show=show, limit=2)
    assert purged == (MOST_HELD + 10, 2, 2)
    report = redrive(parked, limit=5)
    assert (report.there, report.seen, report.redriven) == (MOST_HELD + 8, MOST_HELD, 5)
    assert parked.lane == ids(7)[2:]


@pytest.mark.parametrize("sure", [True, False])
def test_purge(sure: bool) -> None:
    """Deletes those that were counted, if people are sure."""
    parked = FakeParked(*ids(5))
    asked: list[int] = []

    def ask(count: int) -> bool:
        asked.append(count)
        return sure

    def wanted(held: HeldLetter) -> bool:
        return str(held.parcel.properties.message_id) != "m0002"

    assert purge(parked, wanted, ask, stop=lambda: 0, show=lambda *_: None) == (5, 4, 4 if sure else 0)
    assert (asked, parked.names) == ([4], ["m0002"] if sure else ids(5))
