"""Backoff, budget, delayed rounds, deadlines and Retry-After."""

from __future__ import annotations

import random
from dataclasses import replace
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import builders
from tests.builders import NOON, policy, verdict
from tests.fakes import Ceiling
from worker.core.outcome import Reason
from worker.core.retry import MAX_RETRY_AFTER, Again, Decision, Later, Over, RetryPolicy, Round, retry_after
from worker.core.verdict import Kind

SECONDS = st.floats(0.001, 1_000)
POLICIES = st.builds(
    RetryPolicy,
    st.integers(1, 10),
    SECONDS,
    SECONDS,
    SECONDS,
)
DELAYS = st.lists(st.integers(1, 10_000), max_size=5).map(tuple)


@given(POLICIES, st.integers(1, 5_000), st.integers())
def test_backoff_bounds(limits: RetryPolicy, failures: int, seed: int) -> None:
    """A backoff is never negative and never above its ceiling, however many failures there were."""

    assert (
        0
        <= limits.backoff(failures, random.Random(seed))
        <= min(limits.maximum, limits.initial * 2.0 ** min(failures - 1, 900))
    )


def test_backoff_doubles_to_the_ceiling() -> None:
    """The ceilings are initial, twice, four times, … and the maximum."""

    ceilings = [policy().backoff(failures, Ceiling()) for failures in range(1, 8)]

    assert ceilings == [0.5, 1, 2, 4, 8, 8, 8]


def test_jitter_at_the_ceiling() -> None:
    """Senders that failed together do not return together, not even at the ceiling."""

    rng = random.Random(1)
    drawn = [policy().backoff(20, rng) for _ in range(200)]

    assert len(set(drawn)) == 200
    assert min(drawn) < 1
    assert max(drawn) > 7


def decide(
    kind: Kind = Kind.TRANSIENT,
    *,
    attempts: Round | None = None,
    round_: int = 0,
    now: float = 0.0,
    left: float | None = None,
    limits: RetryPolicy | None = None,
    rng: random.Random | None = None,
) -> Decision:
    """What follows an answer of this kind, at once after the round began unless said."""
    return (limits or policy()).decide(
        verdict(kind), attempts or Round(0.0, calls=1), round_=round_, now=now, left=left, rng=rng or Ceiling()
    )


def used_up(calls: int = 4) -> Round:
    """A round whose calls are used up."""
    return Round(0.0, calls=calls)


# -- within a round


def test_backoff_of_a_round() -> None:
    """Each answer is followed by a longer backoff."""

    attempts, limits = Round(0.0), policy(max_attempts=9)

    assert [decide(attempts=attempts, limits=limits) for _ in range(4)] == [Again(0.5), Again(1), Again(2), Again(4)]


def test_first_resend_is_immediate() -> None:
    """The first resend after a token or external-id answer is immediate; later ones back off."""

    for kind in (Kind.TOKEN, Kind.ID_CLASH):
        attempts = Round(0.0, calls=1)
        assert [decide(kind, attempts=attempts) for _ in range(3)] == [Again(0), Again(0.5), Again(1)]


def test_one_immediate_resend_for_both() -> None:
    """A token answer uses up the immediate resend of an id clash too."""

    attempts = Round(0.0, calls=1)

    assert decide(Kind.TOKEN, attempts=attempts) == Again(0)
    assert decide(Kind.ID_CLASH, attempts=attempts) == Again(0.5)


def test_not_now_ends_the_round() -> None:
    """After "not at this time" no call follows in this round, however many are left."""

    assert [decide(Kind.LATER, round_=round_) for round_ in range(4)] == [
        Later(30, 1), Later(300, 2), Later(1800, 3), Over(Reason.RETRIES_EXHAUSTED)
    ]  # fmt: skip


def test_over_by_count() -> None:
    """A round is over when its calls are used up."""

    assert decide(attempts=Round(0.0, calls=3)) == Again(0.5)
    assert decide(attempts=Round(0.0, calls=4)) == Later(30, 1)
    assert decide(attempts=Round(0.0, calls=1_000_000)) == Later(30, 1)


def test_over_by_budget() -> None:
    """A round is over when the pause would end after its budget."""

    assert decide(attempts=Round(100.0, calls=1), now=119.5) == Again(0.5)
    assert decide(attempts=Round(100.0, calls=1), now=119.501) == Later(30, 1)


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), max_size=6))
def test_waits_cost_no_budget(spans: list[tuple[float, float, float]]) -> None:
    """Time spent on holds, and on waiting for a slot or a token, does not count; time spent on work does."""

    now, worked, attempts = 50.0, 0.0, Round(50.0, calls=1)
    for work, hold, slot in spans:
        now, worked = now + work, worked + work
        attempts.interrupt(now, None)
        now += hold
        attempts.resume(now)
        attempts.resume(now + 1)  # a second time changes nothing
        now += slot
        attempts.waited(slot)
    limits = policy(budget=worked + 0.501)
    assert decide(attempts=attempts, now=now, limits=limits) == Again(0.5)
    attempts.failures = 0
    assert decide(attempts=attempts, now=now + 0.002, limits=limits) == Later(30, 1)


# -- delayed rounds


@given(DELAYS)
def test_rounds_end(delays: tuple[int, ...]) -> None:
    """Every delay of the list is used once, in its order, and after the last people must look."""

    limits, used, round_ = policy(delays=delays), [], 0
    while isinstance(decision := decide(attempts=used_up(), round_=round_, limits=limits), Later):
        assert decision.round == round_ + 1
        round_ = decision.round
        used.append(decision.seconds)

    assert tuple(used) == delays
    assert decision == Over(Reason.RETRIES_EXHAUSTED)


@pytest.mark.parametrize("round_", [3, 4, 9, 1_000_000])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Kind.TRANSIENT, Reason.RETRIES_EXHAUSTED),
        (Kind.ID_CLASH, Reason.RETRIES_EXHAUSTED),
        (Kind.LATER, Reason.RETRIES_EXHAUSTED),
        (Kind.SYSTEMIC, Reason.CREDENTIALS),
        (Kind.TOKEN, Reason.CREDENTIALS),
    ],
)
def test_reason_after_the_last_round(kind: Kind, reason: Reason, round_: int) -> None:
    """Systemic or token answers to the end mean credentials, anything else exhausted retries; also after a round that
    does not exist."""

    assert decide(kind, attempts=used_up(), round_=round_) == Over(reason)


# -- deadlines


@pytest.mark.parametrize(
    ("delays", "round_", "left", "expected"),
    [
        ((30, 300, 1800), 0, 30.0, Later(30, 1)),
        ((30, 300, 1800), 0, 29.999, Over(Reason.DEADLINE_PASSED)),
        ((30, 300, 1800), 1, 300.0, Later(300, 2)),
        ((30, 300, 1800), 1, 299.0, Later(30, 2)),
        ((30, 300, 1800), 2, 1799.0, Later(300, 3)),
        ((30, 300, 1800), 2, 77.0, Later(30, 3)),
        ((30, 300, 1800), 2, 29.0, Over(Reason.DEADLINE_PASSED)),
        ((300, 30, 60), 0, 100.0, Later(60, 1)),
        ((60, 60, 60), 2, 60.0, Later(60, 3)),
        ((30,), 0, -1.0, Over(Reason.DEADLINE_PASSED)),
        ((), 0, 10.0, Over(Reason.RETRIES_EXHAUSTED)),
        ((30, 300, 1800), 3, 10.0, Over(Reason.RETRIES_EXHAUSTED)),
    ],
)
def test_delay_before_a_deadline(delays: tuple[int, ...], round_: int, left: float, expected: Later | Over) -> None:
    """A delay that does not end in time gives way to the longest that does, one that was used before included."""

    assert decide(attempts=used_up(), round_=round_, left=left, limits=policy(delays=delays)) == expected


def test_pause_before_a_deadline() -> None:
    """A pause that ends in time is made; instead of a longer one the shortest delay may still fit."""

    assert decide(left=0.5) == Again(0.5)
    assert decide(left=0.4) == Over(Reason.DEADLINE_PASSED)
    assert decide(left=0.4, round_=3) == Over(Reason.DEADLINE_PASSED)
    slow = policy(initial=8.0, delays=(1, 30))
    assert decide(left=7.0, limits=slow) == Later(1, 1)
    assert decide(left=7.0, limits=slow, round_=1) == Later(1, 2)
    assert decide(left=0.9, limits=slow) == Over(Reason.DEADLINE_PASSED)


@given(
    st.sampled_from([kind for kind in Kind if not kind.final and kind is not Kind.THROTTLED]),
    POLICIES,
    DELAYS,
    st.builds(Round, st.floats(0, 2_000), st.integers(1, 12), st.integers(0, 9), st.booleans()),
    st.integers(0, 6),
    st.floats(0, 4_000),
    st.none() | st.floats(-10, 12_000),
    st.integers(),
)
def test_no_decision_breaks_a_limit(
    kind: Kind,
    limits: RetryPolicy,
    delays: tuple[int, ...],
    attempts: Round,
    round_: int,
    passed: float,
    left: float | None,
    seed: int,
) -> None:
    """No call follows beyond the calls, the budget or the deadline, no delay ends after it, and "deadline passed" is
    said only when none would end in time."""

    limits = replace(limits, delays=delays)
    now = attempts.started + passed

    decision = decide(
        kind, attempts=attempts, round_=round_, now=now, left=left, limits=limits, rng=random.Random(seed)
    )

    fitting = [each for each in delays if left is None or each <= left]
    match decision:
        case Again(pause):
            assert kind is not Kind.LATER
            assert attempts.calls < limits.max_attempts
            assert pause >= 0
            assert now + pause - attempts.started <= limits.budget
            assert left is None or pause <= left
        case Later(seconds, following):
            assert following == round_ + 1 <= len(delays)
            assert seconds == (delays[round_] if delays[round_] in fitting else max(fitting))
        case Over(Reason.DEADLINE_PASSED):
            assert left is not None
            assert round_ >= len(delays) or not fitting
        case Over():
            assert round_ >= len(delays)


# -- Retry-After


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("0", 0),
        ("7", 7),
        (" 7 ", 7),
        ("007", 7),
        ("600", 600),
        ("601", 600),
        ("9" * 5_000, 600),
        ("٣", None),
        ("²", None),
        ("Sun, 99 Nov 2026 05:00:00 GMT", None),
        ("Sun, 22 Nov 99999999 05:00:00 GMT", None),
    ],
)
def test_retry_after_seconds(value: str | None, seconds: float | None) -> None:
    """Retry-After in seconds is clamped to ten minutes; what cannot be read is none."""

    assert retry_after(value, NOON) == seconds


@given(st.integers(-100_000, 100_000))
def test_retry_after_date(ahead: int) -> None:
    """Retry-After as a date is the time until then, clamped to 0 to 600 seconds."""

    assert retry_after(formatdate(NOON + ahead, usegmt=True), NOON) == min(max(ahead, 0), MAX_RETRY_AFTER)


@pytest.mark.parametrize(
    "value",
    ["Sun, 22 Nov 2026 05:01:00 GMT", "Sunday, 22-Nov-26 05:01:00 GMT", "Sun Nov 22 05:01:00 2026"],
    ids=["imf", "rfc850", "asctime"],
)
def test_retry_after_dates_of_http(value: str, zone: str) -> None:
    """All three date formats of HTTP are read as GMT, in any zone of the machine."""

    assert retry_after(value, NOON) == 60, zone


@given(st.text(max_size=40) | st.text("0123456789:,- GMTSunNov", max_size=40), st.floats(0, 4e9))
def test_any_retry_after(value: str, now: float) -> None:
    """Whatever stands in the header, it is none or within ten minutes."""

    seconds = retry_after(value, now)

    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER


def test_defaults_are_the_contract_s() -> None:
    """The default limits are the documented ones."""

    assert builders.policy() == RetryPolicy(4, 0.5, 8, 20, (30, 300, 1800))
