"""Breaker and throttle: when senders are held, and for how long."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.fakes import Ceiling
from worker.core.breaker import Breakers, State, Throttle
from worker.core.lanes import LANES
from worker.core.verdict import Kind

GOOD = (Kind.DONE, Kind.REFUSED)
BAD = (Kind.TRANSIENT, Kind.SYSTEMIC)
NEITHER = (Kind.THROTTLED, Kind.TOKEN, Kind.ID_CLASH, Kind.LATER)


A, B = LANES


def breakers() -> Breakers:
    """Breakers of three failures; the cooldown is 15 s, at most 100."""
    return Breakers(3, 15.0, 100.0)


def opened(now: float = 100.0) -> Breakers:
    """The breaker of lane A opened now."""
    made = breakers()
    for _ in range(3):
        made.record(A, Kind.TRANSIENT, now)
    return made


def probe(made: Breakers, kind: Kind, now: float) -> None:
    """One probe goes out and comes back at once."""
    assert made.probes_due(A, now)
    made.probing(A)
    made.record(A, kind, now, probe=True)
    made.probe_lost(A, now)  # a judged probe is not lost: this changes nothing


def test_kinds_are_sorted() -> None:
    """Every kind is good, bad or neither."""

    assert set(Kind) == {*GOOD, *BAD, *NEITHER}


@pytest.mark.parametrize("kind", BAD)
def test_opens_at_the_threshold(kind: Kind) -> None:
    """So many consecutive transient or systemic answers of a lane open its breaker, not one less, and no other's."""

    made, states = breakers(), []
    for _ in range(3):
        made.record(A, kind, 100.0)
        states.append(made.state(A))

    assert states == [State.CLOSED, State.CLOSED, State.OPEN]
    assert made.state(B) is State.CLOSED
    assert made.worst is State.OPEN


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", GOOD)
def test_good_answers_reset_every_count(kind: Kind, lane: str) -> None:
    """A done or refused answer in any lane shows the gateway working."""

    made = breakers()
    for each in (Kind.TRANSIENT, Kind.TRANSIENT):
        made.record(A, each, 100.0)
    made.record(lane, kind, 100.0)
    for each in (Kind.TRANSIENT, Kind.TRANSIENT):
        made.record(A, each, 100.0)

    assert made.state(A) is State.CLOSED


def test_the_token_service_counts_for_every_lane() -> None:
    """Without a token no lane can call."""

    made = breakers()
    for _ in range(3):
        made.record(None, Kind.SYSTEMIC, 100.0)

    assert [made.state(lane) for lane in LANES] == [State.OPEN, State.OPEN]


@pytest.mark.parametrize("kind", NEITHER)
def test_neither_counts_nor_resets(kind: Kind) -> None:
    """Throttled, token, id and not-now answers neither count nor reset the count."""

    made = breakers()
    for each in (Kind.TRANSIENT, kind, Kind.TRANSIENT, kind):
        made.record(A, each, 100.0)
    before = made.state(A)
    made.record(A, Kind.SYSTEMIC, 100.0)
    assert (before, made.state(A)) == (State.CLOSED, State.OPEN)


def test_three_probes_after_each_cooldown() -> None:
    """Up to three probes go out after the cooldown, together or one after the other, and then no more."""

    made = opened()

    assert made.probes_due(A, 114.9) == 0
    assert made.probes_due(A, 115.0) == 3
    made.probing(A, 2)
    assert made.state(A) is State.HALF_OPEN
    assert made.probes_due(A, 116.0) == 1
    made.probing(A)
    assert made.probes_due(A, 1_000.0) == 0
    assert made.probes_due(B, 1_000.0) == 0


def test_probes_of_one_turn_double_the_cooldown_once() -> None:
    """The next cooldown begins when the last probe is back, and is twice as long however many failed."""

    made = opened()
    made.probing(A, 3)
    for now in (116.0, 117.0, 118.0):
        assert made.state(A) is State.HALF_OPEN
        made.record(A, Kind.TRANSIENT, now, probe=True)

    assert made.state(A) is State.OPEN
    assert (made.cooldown(A), made.probe_at(A)) == (30.0, 148.0)


def test_cooldown_doubles_to_the_maximum() -> None:
    """Each turn of failed probes doubles the cooldown, up to the maximum."""

    made, now, cooldowns = opened(), 100.0, []
    for _ in range(5):
        now = made.probe_at(A)
        probe(made, Kind.TRANSIENT, now)
        cooldowns.append(made.probe_at(A) - now)

    assert cooldowns == [30, 60, 100, 100, 100]


@pytest.mark.parametrize("kind", GOOD)
def test_good_probe_closes(kind: Kind) -> None:
    """A good probe ends the outage; the next one begins with the first cooldown."""

    made = opened()
    probe(made, Kind.TRANSIENT, 115.0)
    probe(made, kind, 145.0)
    assert made.state(A) is State.CLOSED
    assert made.outages(A) == 1

    for _ in range(3):
        made.record(A, Kind.TRANSIENT, 200.0)
    assert made.probe_at(A) == 215.0


@pytest.mark.parametrize("kind", NEITHER)
def test_probe_that_proves_nothing(kind: Kind) -> None:
    """After a probe with a throttled, token, id or not-now answer comes one cooldown more, which does not grow."""

    made = opened()
    probe(made, kind, 115.0)

    assert made.state(A) is State.OPEN
    assert made.probe_at(A) == 130.0


@pytest.mark.parametrize("kind", [*BAD, *NEITHER])
def test_late_answers_change_nothing(kind: Kind) -> None:
    """Answers to calls from before do not lengthen the cooldown, nor end a probe."""

    made = opened()
    made.record(A, kind, 110.0)
    assert made.probes_due(A, 115.0) == 3
    made.probing(A)
    made.record(A, kind, 116.0)
    assert made.state(A) is State.HALF_OPEN


def test_a_success_elsewhere_is_no_end_of_an_outage() -> None:
    """A lane whose own calls never failed shows that the gateway worked all the time: what failed meanwhile failed on
    its own account. A lane that had failed as well shows that the outage is over."""

    made = opened()
    made.record(B, Kind.DONE, 101.0)
    assert (made.state(A), made.outages(A)) == (State.CLOSED, 0)

    made = opened()
    made.record(B, Kind.TRANSIENT, 101.0)
    made.record(B, Kind.DONE, 102.0)
    assert (made.state(A), made.outages(A)) == (State.CLOSED, 1)


def test_late_good_answer_closes() -> None:
    """A late good answer to a call from before closes it as a probe's does."""

    made = opened()
    made.record(A, Kind.DONE, 101.0)

    assert made.state(A) is State.CLOSED


def test_lost_probe() -> None:
    """A probe that ended without a call makes room for another at once; a judged one does not."""

    made = opened()
    made.probing(A)
    made.probe_lost(A, 120.0)
    assert made.probes_due(A, 120.0) == 3

    probe(made, Kind.TRANSIENT, 120.0)
    assert made.probes_due(A, 149.9) == 0


def test_probe_at_once() -> None:
    """A person may have the lanes probed before the cooldown is over."""

    made = opened()
    made.probe_now(101.0)

    assert made.probes_due(A, 101.0) == 3
    assert made.probes_due(B, 101.0) == 0


def test_first_cooldown_is_bounded() -> None:
    """A first cooldown above the maximum is the maximum."""

    made = Breakers(1, 50.0, 20.0)
    made.record(A, Kind.SYSTEMIC, 0.0)

    assert made.probe_at(A) == 20.0


class Outages(RuleBasedStateMachine):
    """Any sequence of answers, late ones and probes of two lanes against what the contract says about them."""

    def __init__(self) -> None:
        super().__init__()
        self.breakers = breakers()
        self.now = 0.0
        self.bad = dict.fromkeys(LANES, 0)
        self.out = dict.fromkeys(LANES, 0)

    def worked(self) -> None:
        self.bad = dict.fromkeys(LANES, 0)
        self.out = dict.fromkeys(LANES, 0)

    @rule(seconds=st.floats(0, 120))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(lane=st.sampled_from([*LANES, None]), kind=st.sampled_from(Kind))
    def answer(self, lane: str | None, kind: Kind) -> None:
        if kind in GOOD:
            self.worked()
        for each in LANES:
            if lane in (each, None) and self.breakers.state(each) is State.CLOSED:
                self.bad[each] += kind in BAD
        self.breakers.record(lane, kind, self.now)

    @rule(lane=st.sampled_from(LANES))
    def send_probe(self, lane: str) -> None:
        if self.breakers.probes_due(lane, self.now):
            self.breakers.probing(lane)
            self.out[lane] += 1

    @rule(lane=st.sampled_from(LANES), kind=st.sampled_from(Kind), lost=st.booleans())
    def probe_answer(self, lane: str, kind: Kind, lost: bool) -> None:
        if not self.out[lane]:
            return
        self.out[lane] -= 1
        if lost:
            self.breakers.probe_lost(lane, self.now)
            return
        if kind in GOOD:
            self.worked()
        self.breakers.record(lane, kind, self.now, probe=True)
        if kind not in GOOD and not self.out[lane]:
            assert self.breakers.probe_at(lane) >= self.now + 15

    @invariant()
    def open_exactly_after_the_threshold(self) -> None:
        assert all((self.breakers.state(lane) is State.CLOSED) == (self.bad[lane] < 3) for lane in LANES)

    @invariant()
    def at_most_three_probes(self) -> None:
        assert all(count <= 3 for count in self.out.values())
        assert all((self.breakers.state(lane) is State.HALF_OPEN) == (self.out[lane] > 0) for lane in LANES)

    @invariant()
    def cooldown_is_bounded(self) -> None:
        assert all(
            self.breakers.state(lane) is State.CLOSED or 15 <= self.breakers.cooldown(lane) <= 100 for lane in LANES
        )


TestOutages = Outages.TestCase
TestOutages.settings = settings(max_examples=40, stateful_step_count=40)


def test_throttle_holds_for_retry_after() -> None:
    """A throttled answer with a Retry-After holds for exactly that long."""

    throttle = Throttle(0.5, 8.0)

    assert throttle.record(30.0, 100.0, Ceiling()) == 30.0
    assert throttle.holding(129.9)
    assert not throttle.holding(130.0)


def test_throttle_backs_off() -> None:
    """Without one the hold doubles while the answers stay throttled, up to the maximum, and a good answer ends that."""

    throttle, now, holds = Throttle(0.5, 8.0), 100.0, []
    for _ in range(6):
        holds.append(throttle.record(None, now, Ceiling()))
        now = throttle.until
    assert holds == [1, 2, 4, 8, 8, 8]

    throttle.good()
    assert throttle.record(None, now, Ceiling()) == 1


@given(st.integers(), st.integers(1, 2_000))
def test_throttle_jitter(seed: int, strikes: int) -> None:
    """Half of the backoff is jitter: it always is a wait, and never above the maximum."""

    throttle = Throttle(0.5, 8.0, strikes=strikes - 1)
    hold = throttle.record(None, 100.0, random.Random(seed))

    assert 0.5 <= hold <= 8


def test_answers_that_were_out_are_one_strike() -> None:
    """Many throttled answers to calls that were out already do not add up."""

    throttle = Throttle(0.5, 8.0)
    for _ in range(32):
        throttle.record(None, 100.0, Ceiling())

    assert throttle.until == 101.0


@given(st.lists(st.tuples(st.none() | st.floats(0, 600), st.floats(0, 50)), min_size=1, max_size=20), st.integers())
def test_a_hold_never_shrinks(answers: list[tuple[float | None, float]], seed: int) -> None:
    """A shorter wait asked for later does not cut a longer one short."""

    throttle, now, rng = Throttle(0.5, 8.0), 0.0, random.Random(seed)
    for wait, pause in answers:
        before = throttle.until
        hold = throttle.record(wait, now, rng)
        assert throttle.until == max(before, now + hold)
        now += pause
