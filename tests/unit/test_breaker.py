"""Breaker, throttle and pacer: when senders are held, and for how long."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.fakes import Ceiling
from worker.core.breaker import Breaker, Pacer, State, Throttle
from worker.core.verdict import Kind

GOOD = (Kind.DONE, Kind.REFUSED)
BAD = (Kind.TRANSIENT, Kind.SYSTEMIC)
NEITHER = (Kind.THROTTLED, Kind.TOKEN, Kind.ID_CLASH)


def opened(now: float = 100.0) -> Breaker:
    """A breaker of three failures that opened now; its cooldown is 15 s, at most 100."""
    breaker = Breaker(3, 15.0, 100.0)
    for _ in range(3):
        breaker.record(Kind.TRANSIENT, now)
    return breaker


def probe(breaker: Breaker, kind: Kind, now: float) -> None:
    """One probe goes out and comes back at once."""
    assert breaker.probe_due(now)
    breaker.probing()
    breaker.record(kind, now, probe=True)


def test_kinds_are_sorted() -> None:
    """Every kind is good, bad or neither."""

    assert set(Kind) == {*GOOD, *BAD, *NEITHER}


@pytest.mark.parametrize("kind", BAD)
def test_opens_at_the_threshold(kind: Kind) -> None:
    """So many consecutive transient or systemic answers open it, and not one less."""

    breaker = Breaker(3, 15.0, 100.0)
    states = []
    for _ in range(3):
        breaker.record(kind, 100.0)
        states.append(breaker.state)

    assert states == [State.CLOSED, State.CLOSED, State.OPEN]


@pytest.mark.parametrize("kind", GOOD)
def test_good_answers_reset_the_count(kind: Kind) -> None:
    """A done or refused answer shows the gateway working."""

    breaker = Breaker(3, 15.0, 100.0)
    for each in (Kind.TRANSIENT, Kind.TRANSIENT, kind, Kind.TRANSIENT, Kind.TRANSIENT):
        breaker.record(each, 100.0)

    assert breaker.state is State.CLOSED


@pytest.mark.parametrize("kind", NEITHER)
def test_neither_counts_nor_resets(kind: Kind) -> None:
    """Throttled, token and id answers neither count nor reset the count."""

    breaker = Breaker(3, 15.0, 100.0)
    for each in (Kind.TRANSIENT, kind, Kind.TRANSIENT, kind):
        breaker.record(each, 100.0)
    before = breaker.state
    breaker.record(Kind.SYSTEMIC, 100.0)
    assert (before, breaker.state) == (State.CLOSED, State.OPEN)


def test_first_probe() -> None:
    """The first probe goes out after the cooldown, and only one."""

    breaker = opened()

    assert not breaker.probe_due(114.9)
    assert breaker.probe_due(115.0)
    breaker.probing()
    assert breaker.state is State.HALF_OPEN
    assert not breaker.probe_due(1_000.0)


def test_cooldown_doubles_to_the_maximum() -> None:
    """Each failed probe doubles the cooldown, up to the maximum."""

    breaker, now, cooldowns = opened(), 100.0, []
    for _ in range(5):
        now = breaker.probe_at
        probe(breaker, Kind.TRANSIENT, now)
        cooldowns.append(breaker.probe_at - now)

    assert cooldowns == [30, 60, 100, 100, 100]


@pytest.mark.parametrize("kind", GOOD)
def test_good_probe_closes(kind: Kind) -> None:
    """A good probe closes it; the next outage begins with the first cooldown."""

    breaker = opened()
    probe(breaker, Kind.TRANSIENT, 115.0)
    probe(breaker, kind, 145.0)
    assert breaker.state is State.CLOSED

    for _ in range(3):
        breaker.record(Kind.TRANSIENT, 200.0)
    assert breaker.probe_at == 215.0


@pytest.mark.parametrize("kind", NEITHER)
def test_probe_that_proves_nothing(kind: Kind) -> None:
    """A probe with a throttled, token or id answer waits one cooldown more, which does not grow."""

    breaker = opened()
    probe(breaker, kind, 115.0)

    assert breaker.state is State.OPEN
    assert breaker.probe_at == 130.0


@pytest.mark.parametrize("kind", [*BAD, *NEITHER])
def test_late_answers_change_nothing(kind: Kind) -> None:
    """Answers to calls from before do not lengthen the cooldown, nor end a probe."""

    breaker = opened()
    breaker.record(kind, 110.0)
    assert breaker.probe_due(115.0)
    breaker.probing()
    breaker.record(kind, 116.0)
    assert breaker.state is State.HALF_OPEN


def test_late_good_answer_closes() -> None:
    """A late good answer to a call from before closes it as a probe's does."""

    breaker = opened()
    breaker.record(Kind.DONE, 101.0)

    assert breaker.state is State.CLOSED


def test_lost_probe() -> None:
    """A probe that ended without a call makes room for another at once; a judged one does not."""

    breaker = opened()
    breaker.probing()
    breaker.probe_lost(120.0)
    assert breaker.probe_due(120.0)

    probe(breaker, Kind.TRANSIENT, 120.0)
    breaker.probe_lost(120.0)
    assert not breaker.probe_due(149.9)


def test_first_cooldown_is_bounded() -> None:
    """A first cooldown above the maximum is the maximum."""

    breaker = Breaker(1, 50.0, 20.0)
    breaker.record(Kind.SYSTEMIC, 0.0)

    assert breaker.probe_at == 20.0


class Outages(RuleBasedStateMachine):
    """Any sequence of answers, late ones and probes against what the contract says about them."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(3, 15.0, 100.0)
        self.now = 0.0
        self.bad = 0
        self.out = False

    @rule(seconds=st.floats(0, 120))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(kind=st.sampled_from(Kind))
    def answer(self, kind: Kind) -> None:
        if kind in GOOD:
            self.bad, self.out = 0, False
        elif self.breaker.state is State.CLOSED:
            self.bad += kind in BAD
        self.breaker.record(kind, self.now)

    @precondition(lambda self: self.breaker.probe_due(self.now))
    @rule()
    def send_probe(self) -> None:
        self.breaker.probing()
        self.out = True

    @precondition(lambda self: self.out)
    @rule(kind=st.sampled_from(Kind))
    def probe_answer(self, kind: Kind) -> None:
        self.out = False
        if kind in GOOD:
            self.bad = 0
        self.breaker.record(kind, self.now, probe=True)
        self.breaker.probe_lost(self.now)
        if kind not in GOOD:
            assert self.breaker.probe_at >= self.now + 15

    @invariant()
    def open_exactly_after_the_threshold(self) -> None:
        assert (self.breaker.state is State.CLOSED) == (self.bad < 3)

    @invariant()
    def one_probe_at_a_time(self) -> None:
        assert (self.breaker.state is State.HALF_OPEN) == self.out

    @invariant()
    def cooldown_is_bounded(self) -> None:
        assert self.breaker.state is State.CLOSED or 15 <= self.breaker.cooldown <= 100


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


@given(
    st.floats(0.1, 500),
    st.lists(st.floats(0, 1), min_size=2, max_size=60),
    st.floats(0, 1e6),
)
def test_pacer_has_no_bursts(rate: float, pauses: list[float], start: float) -> None:
    """Calls are at least 1/rate apart, so no window of a second holds more than the rate; none waits for nothing."""

    pacer, now, slots = Pacer(rate), start, []
    for pause in pauses:
        wait = pacer.reserve(now)
        assert wait >= 0
        slots.append(now + wait)
        now += pause
    # A float's grain at this time; the machine's own jitter is far coarser.
    grain = 1e-6
    assert all(later - earlier >= 1 / rate - grain for earlier, later in pairwise(slots))
    for first in slots:
        assert sum(first <= slot < first + 1 - grain * len(slots) for slot in slots) <= max(1, -(-rate // 1))


def test_pacer_is_prompt() -> None:
    """The first call goes at once, and so does one that comes late enough."""

    pacer = Pacer(4.0)

    assert [pacer.reserve(now) for now in (10.0, 10.0, 10.1, 12.0)] == [0, 0.25, pytest.approx(0.4), 0]


def test_no_rate_no_pace() -> None:
    """A rate of zero is no limit."""

    pacer = Pacer(0.0)

    assert [pacer.reserve(1.0) for _ in range(100)] == [0.0] * 100
