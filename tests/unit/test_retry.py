"""Backoff, budget, delayed rounds and Retry-After."""

from __future__ import annotations

import random
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import builders
from tests.builders import NOON, policy, verdict
from tests.fakes import Ceiling
from worker.core.retry import MAX_RETRY_AFTER, RetryPolicy, Round, retry_after
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


@given(DELAYS, st.floats(0, 10_000))
def test_rounds_end(delays: tuple[int, ...], at_least: float) -> None:
    """Every delayed round leads to a later one, and after the last there is none."""

    limits, round_, rounds = policy(delays=delays), 0, 0
    while (following := limits.next_delay(round_, at_least)) is not None:
        seconds, later = following
        assert seconds == delays[later - 1]
        assert seconds >= at_least or later == len(delays)
        assert later > round_
        round_, rounds = later, rounds + 1
    assert rounds <= len(delays)
    assert round_ == (len(delays) if delays else 0)


def test_fitting_delay() -> None:
    """A wait that the gateway asked for skips the delays that are too short, but never the last."""

    limits = policy()

    assert [limits.next_delay(round_) for round_ in range(4)] == [(30, 1), (300, 2), (1800, 3), None]
    assert limits.next_delay(0, 31) == (300, 2)
    assert limits.next_delay(0, 300) == (300, 2)
    assert limits.next_delay(1, 9_999) == (1800, 3)
    assert limits.next_delay(9) is None


def test_first_resend_is_immediate() -> None:
    """The first resend after a token or external-id answer is immediate; later ones back off."""

    for kind in (Kind.TOKEN, Kind.ID_CLASH):
        round_ = Round(0.0)
        assert [round_.pause(verdict(kind), policy(), Ceiling()) for _ in range(3)] == [0, 0.5, 1]


def test_one_immediate_resend_for_both() -> None:
    """A token answer uses up the immediate resend of an id clash too."""

    round_ = Round(0.0)

    assert round_.pause(verdict(Kind.TOKEN), policy(), Ceiling()) == 0
    assert round_.pause(verdict(Kind.ID_CLASH), policy(), Ceiling()) == 0.5


def test_throttled_answers_do_not_back_off() -> None:
    """After a throttled answer the wait is every sender's, and the backoff does not grow."""

    round_ = Round(0.0)

    assert round_.pause(verdict(Kind.THROTTLED), policy(), Ceiling()) == 0
    assert round_.pause(verdict(Kind.TRANSIENT), policy(), Ceiling()) == 0.5


def test_over_by_count() -> None:
    """A round is over when its calls are used up."""

    round_ = Round(0.0, calls=3)
    assert not round_.over(0, 0, policy())
    round_.calls = 4
    assert round_.over(0, 0, policy())


def test_over_by_budget() -> None:
    """A round is over when the pause would end after its budget."""

    round_ = Round(100.0)

    assert not round_.over(5, 115, policy())
    assert round_.over(5.001, 115, policy())


@given(st.lists(st.tuples(SECONDS, SECONDS), max_size=6))
def test_holds_cost_no_budget(spans: list[tuple[float, float]]) -> None:
    """Time spent on holds does not count; time spent on work does."""

    now, worked, round_ = 50.0, 0.0, Round(50.0)
    for work, hold in spans:
        now, worked = now + work, worked + work
        round_.interrupt(now)
        now += hold
        round_.resume(now)
        round_.resume(now + 1)  # a second time changes nothing
    limits = policy(budget=worked + 0.001)
    assert not round_.over(0, now, limits)
    assert round_.over(0.002, now, limits)


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
