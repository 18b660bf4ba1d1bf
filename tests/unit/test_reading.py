"""What a scrape says, and what changed between two."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.reading import Change, Histogram, Reading, Sample
from worker.core.words import duration, folded, plural, quantile, rate, share
from worker.shells.metrics import samples


def reading(at: float, **values: float) -> Reading:
    """Samples of one metric, labelled by `lane`."""
    return Reading(at, [Sample("commands_total", {"lane": lane}, value) for lane, value in values.items()])


def histogram(at: float, *totals: float) -> Reading:
    """The cumulative buckets 1, 10 and infinity of one metric."""
    return Reading(
        at,
        [
            Sample("age_bucket", {"le": bound}, total)
            for bound, total in zip(("1.0", "10.0", "+Inf"), totals, strict=True)
        ],
    )


def test_values_are_sums_of_what_matches() -> None:
    """A value is the sum over the labels that are not asked for; an unknown one is 0."""

    now = reading(0, cancellation=3, sweep=4)
    assert now.value("commands_total") == 7
    assert now.value("commands_total", lane="sweep") == 4
    assert now.value("commands_total", lane="other") == now.value("unheard_of") == 0
    assert now.by("lane", "commands_total") == {"cancellation": 3, "sweep": 4}
    assert now.knows("commands_total")
    assert not now.knows("unheard_of")


def test_a_change_is_the_gain() -> None:
    """Counters that grew give their gain and its rate; one that went back was started again, so all of it is new."""

    change = Change(reading(10, cancellation=3, sweep=9), reading(20, cancellation=23, sweep=4))
    assert change.by("lane", "commands_total") == {"cancellation": 20, "sweep": 4}
    assert change.rate("commands_total", lane="cancellation") == 2.0


def test_quantiles_are_those_of_promql() -> None:
    """Between two bounds the estimate is linear, beyond the last finite one infinite, without observations none."""

    now = histogram(0, 10, 20, 20).histogram("age")
    assert now.quantile(0.25) == pytest.approx(0.5)
    assert now.quantile(0.75) == pytest.approx(5.5)
    assert histogram(0, 0, 0, 5).histogram("age").quantile(0.5) == math.inf
    assert histogram(0, 0, 0, 0).histogram("age").quantile(0.5) is None
    assert Histogram().quantile(0.5) is None


def test_quantiles_of_what_came_lately() -> None:
    """A change's histogram holds only what came in between, or everything after a new start."""

    before = histogram(0, 100, 100, 100)
    assert Change(before, histogram(9, 100, 110, 110)).histogram("age").quantile(0.5) == pytest.approx(5.5)
    assert Change(before, histogram(9, 4, 4, 4)).histogram("age").count == 4


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3), st.floats(0.01, 1))
def test_a_quantile_lies_in_a_bucket_that_holds_something(gains: list[int], part: float) -> None:
    """Whatever the buckets hold, the estimate lies within one that is not empty."""

    totals = [float(sum(gains[: place + 1])) for place in range(3)]
    value = histogram(0, *totals).histogram("age").quantile(part)
    bounds = [(0.0, 1.0), (1.0, 10.0), (10.0, math.inf)]
    held = [bound for bound, gain in zip(bounds, gains, strict=True) if gain]
    assert (value is None) == (not held)
    assert value is None or any(low <= value <= high for low, high in held)


def test_a_scrape_is_read_without_the_prefix_and_without_others() -> None:
    """Only the product's own series count, whatever else a scrape holds."""

    text = b'# TYPE qris_expire_in_flight gauge\nqris_expire_in_flight{lane="sweep"} 2.0\n# TYPE other gauge\nother 1\n'
    assert list(samples(text)) == [Sample("in_flight", {"lane": "sweep"}, 2.0)]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "–"),
        (-1, "0 ms"),
        (0.034, "34 ms"),
        (0.0996, "0.1 s"),
        (0.34, "0.3 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (14_700, "4 h 5 min"),
        (183_600, "2 d 3 h"),
        (math.inf, "very long"),
    ],
)
def test_durations_in_words(seconds: float | None, words: str) -> None:
    """Two units at most, and none that says less than it could."""

    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("per_second", "words"),
    [
        (None, "–"),
        (0, "0/s"),
        (1234.5, "1,234/s"),
        (412.3, "412/s"),
        (4.25, "4.2/s"),
        (0.05, "0.05/s"),
        (0.001, "< 0.01/s"),
    ],
)
def test_rates_in_words(per_second: float | None, words: str) -> None:
    """As many digits as a person reads."""

    assert rate(per_second) == words


def test_other_words() -> None:
    """Shares, plurals, and a quantile beyond the last bound."""

    assert [share(1, 8), share(1, 80), share(0, 5)] == ["12 %", "1.2 %", "0 %"]
    assert [plural(1, "command"), plural(2000, "command"), plural(2, "process")] == [
        "1 command",
        "2,000 commands",
        "2 processes",
    ]
    assert [quantile(math.inf, 30), quantile(0.2, 30)] == ["over 30 s", "0.2 s"]


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_sentence_is_broken_between_words(width: int) -> None:
    """No word is cut or lost, no line is too wide, and a command stays in one piece."""
    sentence = "to send the rest: `qris-expire sweep --follow b`; the others wait, and nothing is lost"

    lines = folded(sentence, width, 4).split("\n")

    assert " ".join(" ".join(lines).split()) == sentence
    assert all(len(line) <= width or "`" in line for line in lines)
    assert all(line.startswith("    ") for line in lines[1:])
    assert any("`qris-expire sweep --follow b`" in line for line in lines)


def test_a_sentence_that_fits_stays_as_it_is() -> None:
    """Its blanks, too: they may be columns."""

    assert folded("  broker   ok       good", 80) == "  broker   ok       good"
