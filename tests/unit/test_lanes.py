"""Who goes next: cancellations first, the sweep within its share, neither starved."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.builders import Waiting
from worker.core.lanes import CANCELLATION, LANES, SWEEP, SWEEP_TURN, Lanes, sweep_cap


def filled(concurrency: int, share: float, cancellations: int, sweep: int) -> Lanes[Waiting]:
    """Lanes with so many commands waiting."""
    lanes: Lanes[Waiting] = Lanes(concurrency, share)
    for lane, count in ((CANCELLATION, cancellations), (SWEEP, sweep)):
        for number in range(count):
            lanes.put(Waiting(lane, number))
    return lanes


def taken(lanes: Lanes[Waiting]) -> list[Waiting]:
    """All that may go now."""
    return list(iter(lanes.take, None))


@pytest.mark.parametrize(
    ("concurrency", "share", "cap"),
    [
        (32, 0.75, 24),
        (10, 0.75, 7),
        (1, 0.75, 1),
        (4, 0.1, 1),
        (4, 0.0, 1),
        (4, 1.0, 4),
        (100, 0.29, 29),
        (100, 0.57, 57),
        (1000, 0.001, 1),
    ],
)
def test_share_is_rounded_down(concurrency: int, share: float, cap: int) -> None:
    """The sweep's most is its share rounded down, as people calculate it, yet one."""

    assert sweep_cap(concurrency, share) == cap


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 60), st.integers(0, 60))
def test_share_is_kept(concurrency: int, share: float, cancellations: int, sweep: int) -> None:
    """However much waits, the sweep never holds more than its share, and nobody idles who may work."""

    lanes = filled(concurrency, share, cancellations, sweep)

    count = Counter(item.lane for item in taken(lanes))

    assert count[SWEEP] <= sweep_cap(concurrency, share)
    assert count.total() <= concurrency
    if count.total() < concurrency:
        assert count[CANCELLATION] == cancellations
        assert count[SWEEP] == min(sweep, sweep_cap(concurrency, share))


def test_cancellations_first() -> None:
    """While both wait, a free sender takes a cancellation."""

    lanes = filled(4, 0.75, 3, 9)

    assert [item.lane for item in taken(lanes)] == [CANCELLATION] * 3 + [SWEEP]


def test_cancellations_use_all_senders() -> None:
    """The sweep's share is a most, not a reservation."""

    assert len(taken(filled(8, 0.75, 20, 0))) == 8


def test_cancellation_finds_a_sender() -> None:
    """A sweep that fills its share leaves senders for a cancellation that comes now."""

    lanes = filled(4, 0.75, 0, 99)
    assert len(taken(lanes)) == 3

    lanes.put(Waiting(CANCELLATION))
    assert taken(lanes) == [Waiting(CANCELLATION)]


@given(st.integers(1, 12), st.floats(0, 1))
def test_nobody_starves(concurrency: int, share: float) -> None:
    """Under a flood of cancellations every eighth turn is the sweep's; the others are theirs."""

    lanes, turns = filled(concurrency, share, 0, 50), []
    for number in range(SWEEP_TURN * 10):
        lanes.put(Waiting(CANCELLATION, number))
        lanes.put(Waiting(CANCELLATION, -number))
        item = lanes.take()
        assert item is not None
        turns.append(item.lane)
        lanes.done(item)

    assert Counter(turns) == {CANCELLATION: 70, SWEEP: 10}


def test_order_within_a_lane() -> None:
    """A lane is first come, first served; what a sender gave back goes first again."""

    lanes = filled(1, 1.0, 3, 0)
    first = lanes.take()
    assert first is not None
    lanes.done(first)
    lanes.put_back(first)

    order = []
    while (item := lanes.take()) is not None:
        order.append(item.number)
        lanes.done(item)

    assert order == [0, 1, 2]


def test_limit() -> None:
    """No more of a lane go out than its limit, and none at zero, whoever finishes; the other lane goes on."""

    lanes = filled(4, 1.0, 9, 9)
    lanes.limit = {CANCELLATION: 0, SWEEP: 2}
    assert lanes.takable() == 2
    assert [item.lane for item in taken(lanes)] == [SWEEP, SWEEP]
    assert lanes.takable() == 0
    lanes.limit = {CANCELLATION: 4, SWEEP: 0}
    assert [item.lane for item in taken(lanes)] == [CANCELLATION, CANCELLATION]


def test_one_particular_command() -> None:
    """A probe is taken whatever the limit, once, and counts as in hand."""

    lanes = filled(4, 0.25, 0, 3)
    lanes.limit[SWEEP] = 0
    wanted = Waiting(SWEEP, 1)

    assert lanes.take_this(wanted)
    assert not lanes.take_this(wanted)
    assert lanes.in_hand() == 1
    assert [item.number for item in lanes.waiting(SWEEP)] == [0, 2]


def test_remove() -> None:
    """A command that is dropped waits no more; one that is not there cannot be."""

    lanes = filled(4, 0.75, 1, 1)

    assert lanes.remove(Waiting(CANCELLATION, 0))
    assert not lanes.remove(Waiting(CANCELLATION, 0))
    assert [*lanes.waiting(CANCELLATION), *lanes.waiting(SWEEP)] == [Waiting(SWEEP, 0)]
    assert lanes.in_hand() == 0


class Traffic(RuleBasedStateMachine):
    """Any traffic: nothing is lost, nothing goes twice, the limits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes: Lanes[Waiting] = Lanes(4, 0.5)
        self.waiting: list[Waiting] = []
        self.out: list[Waiting] = []
        self.probes = 0
        self.number = 0

    def room(self, lane: str, in_hand: Counter[str]) -> bool:
        return in_hand[lane] < self.lanes.limit[lane] and (lane == CANCELLATION or in_hand[SWEEP] < 2)

    @rule(lane=st.sampled_from(LANES))
    def put(self, lane: str) -> None:
        self.number += 1
        item = Waiting(lane, self.number)
        self.lanes.put(item)
        self.waiting.append(item)

    @rule()
    def take(self) -> None:
        before = Counter(item.lane for item in self.out)
        item = self.lanes.take()
        if item is None:
            may = [w for w in self.waiting if self.room(w.lane, before)]
            assert before.total() >= 4 or not may
            return
        assert before.total() < 4
        assert self.room(item.lane, before)
        assert item == next(w for w in self.waiting if w.lane == item.lane)
        self.waiting.remove(item)
        self.out.append(item)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), back=st.booleans())
    def done(self, data: st.DataObject, back: bool) -> None:
        item = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.lanes.done(item)
        if back:
            self.lanes.put_back(item)
            self.waiting.insert(0, item)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), probe=st.booleans())
    def pick(self, data: st.DataObject, probe: bool) -> None:
        item = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        assert self.lanes.take_this(item) if probe else self.lanes.remove(item)
        if probe:
            self.out.append(item)

    @rule(lane=st.sampled_from(LANES), limit=st.integers(0, 4))
    def limit(self, lane: str, limit: int) -> None:
        self.lanes.limit[lane] = limit

    @invariant()
    def what_is_said_to_be_takable_is(self) -> None:
        before = Counter(item.lane for item in self.out)
        rooms = {CANCELLATION: self.lanes.limit[CANCELLATION], SWEEP: min(2, self.lanes.limit[SWEEP])}
        may = sum(
            max(0, min(room - before[lane], sum(item.lane == lane for item in self.waiting)))
            for lane, room in rooms.items()
        )
        assert self.lanes.takable() == max(0, min(4 - before.total(), may))

    @invariant()
    def nothing_is_lost(self) -> None:
        for lane in LANES:
            assert list(self.lanes.waiting(lane)) == [item for item in self.waiting if item.lane == lane]
        assert self.lanes.in_hand() == len(self.out)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=40, stateful_step_count=40)
