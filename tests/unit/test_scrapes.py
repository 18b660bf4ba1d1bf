"""What the scrapes of several processes add up to."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families

from tests.scrapes import values
from worker.core.scrapes import PlaceCounts, lasting, merge, openmetrics
from worker.shells.metrics import Metrics


@cache
def real_scrape(commands: int = 0, *, age: float = 0.25, now: float = 0.0) -> str:
    metrics = Metrics("1")
    for _ in range(commands):
        metrics.received("sweep")
        metrics.outcome("sweep", "expired", "success", age, now)
    return metrics.render().decode()


def gauge(name: str, value: float) -> str:
    return f"# HELP qris_expire_{name} A.\n# TYPE qris_expire_{name} gauge\nqris_expire_{name} {value!r}\n"


def counter(value: float) -> str:
    return f"# HELP n_total N.\n# TYPE n_total counter\nn_total {value!r}\n"


def test_one_scrape_stays_as_it_is() -> None:
    """Merging a single scrape changes no line of it."""

    text = real_scrape(3, now=1_800_000_000.25)
    assert values(merge([text])) == values(text)
    assert [line for line in merge([text]).splitlines() if line.startswith("#")] == [
        line for line in text.splitlines() if line.startswith("#")
    ]


def test_nothing_merges_to_nothing() -> None:
    """No scrape, or empty ones, give an empty text."""

    assert merge([]) == merge(["", ""]) == ""


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_counters_and_histograms_are_summed(commands: list[int]) -> None:
    """Counters, buckets, counts and sums of all scrapes add up, and the result parses."""

    merged = values(merge([real_scrape(number) for number in commands]))
    assert merged["qris_expire_commands_total,lane=sweep"] == sum(commands)
    assert merged["qris_expire_command_age_seconds_bucket,lane=sweep,le=+Inf"] == sum(commands)
    assert merged["qris_expire_command_age_seconds_count,lane=sweep"] == sum(commands)
    assert merged["qris_expire_command_age_seconds_sum,lane=sweep"] == 0.25 * sum(commands)
    assert merged["qris_expire_build_info,version=1"] == 1


@pytest.mark.parametrize(
    ("name", "numbers", "merged"),
    [
        ("in_flight", [3, 4], 7),
        ("publishes_unconfirmed", [1, 2], 3),
        ("senders", [32, 32], 64),
        ("oldest_command_timestamp_seconds", [0, 90, 80], 80),
        ("breaker_state", [0, 2, 1], 2),
        ("consumption_paused", [0, 1, 0], 1),
        ("last_outcome_timestamp_seconds", [5, 9, 0], 9),
        ("clock_skew_seconds", [1.5, -40, 3], -40),
        ("broker_connected", [1, 0, 1], 0),
        ("held_until_timestamp_seconds", [0, 90, 80], 80),
        ("start_timestamp_seconds", [90, 70], 70),
        ("token_expiry_timestamp_seconds", [0, 90, 80], 80),
        ("token_expiry_timestamp_seconds", [0, 0], 0),
        ("build_info", [1, 1], 1),
        ("fleet_members", [4, 3], 4),
        ("rate_limit", [50, 0], 50),
        ("fleet_leader", [0, 1], 1),
        ("member_sick", [1, 1], 2),
        ("certificate_expiry_timestamp_seconds", [0, 90, 80], 80),
        ("unheard_of", [1, 1], 2),
    ],
)
def test_each_gauge_has_its_rule(name: str, numbers: list[float], merged: float) -> None:
    """Gauges merge by the table; one that is not in it is summed."""

    assert values(merge([gauge(name, number) for number in numbers])) == {f"qris_expire_{name}": merged}


def families_of(text: str) -> list[Metric]:
    return list(openmetrics_families(text))  # type: ignore[no-untyped-call]


def test_openmetrics_says_the_same() -> None:
    """The scrape in OpenMetrics has the same samples, as OpenMetrics' own parser reads it."""

    text = real_scrape(3, now=1_800_000_000.25)
    families = families_of(openmetrics(text))
    found = {
        sample.name + "".join(f",{name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    assert found == values(text)
    assert {family.type for family in families} == {"counter", "gauge", "histogram"}
    quoted = openmetrics('# HELP a_total So "much".\n# TYPE a_total counter\na_total 1.0\n')
    assert [family.documentation for family in families_of(quoted)] == ['So "much".']


@pytest.mark.parametrize("number", ["+Inf", "-Inf", "NaN", "1e-05", "1e+16", "5"])
def test_numbers_survive(number: str) -> None:
    """Every form of a number is read and written back as the same number."""

    text = merge([f"# HELP n N.\n# TYPE n gauge\nn {number}\n"])
    assert repr(values(text)["n"]) == repr(float(number))


def test_label_values_may_hold_anything() -> None:
    """Blanks, braces, quotes and line separators inside a label's value do not confuse the sums."""

    text = '# HELP n_total N.\n# TYPE n_total counter\nn_total{a="} 1 \\" # x\u2028\\n"} 2.0\n'
    assert merge([text, text]) == text.replace("2.0", "4.0")


def test_a_series_of_one_scrape_only_counts_as_it_is() -> None:
    """Scrapes of different versions merge too."""

    one = '# HELP n_total N.\n# TYPE n_total counter\nn_total{a="1"} 1.0\n'
    other = one.replace('"1"', '"2"') + gauge("in_flight", 1)
    assert values(merge([one, other])) == {"n_total,a=1": 1, "n_total,a=2": 1, "qris_expire_in_flight": 1}


def test_what_lasts() -> None:
    """Of a dead process remain counters, histograms and the time of its last outcome."""

    kept = values(lasting(real_scrape(2, now=7.0)))
    assert kept["qris_expire_commands_total,lane=sweep"] == 2
    assert kept["qris_expire_last_outcome_timestamp_seconds"] == 7
    assert "qris_expire_in_flight,lane=sweep" not in kept
    assert "qris_expire_build_info,version=1" not in kept


Event = tuple[int, float | None]
"""A place in the family, and what its counter grows by; None: its process ends."""


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.none() | st.floats(0, 1e6)),
        max_size=30,
    )
)
def test_sums_never_go_back(events: list[Event]) -> None:
    """Whatever is counted and whichever process ends, no scrape shows less than the one before, not by a rounding."""

    tallies = [PlaceCounts() for _ in range(3)]
    counts = [0.0] * 3
    before = 0.0
    for place, growth in events:
        if growth is None:
            tallies[place].died()
            counts[place] = 0.0
        else:
            counts[place] += growth
        scrape = merge([tally.total(counter(count)) for tally, count in zip(tallies, counts, strict=True)])
        now = values(scrape)["n_total"]
        assert now >= before
        before = now


def test_a_silent_process_keeps_its_counters_but_not_its_gauges() -> None:
    """A process that gives no answer counts with its last one, without what only held at that time."""

    tally = PlaceCounts()
    tally.total(counter(5.0) + gauge("in_flight", 3.0))
    assert values(tally.total(None)) == {"n_total": 5}
    tally.died()
    assert values(tally.total(None)) == {"n_total": 5}
    assert values(tally.total(counter(2.0) + gauge("in_flight", 1.0))) == {
        "n_total": 7,
        "qris_expire_in_flight": 1,
    }


def test_four_scrapes_merge_fast() -> None:
    """Merging the scrapes of four processes takes less than 50 ms of processor time."""

    text = Metrics("1").render().decode()

    def seconds() -> float:
        start = time.thread_time()
        merge([text] * 4)
        return time.thread_time() - start

    assert min(seconds() for _ in range(5)) < 0.05
