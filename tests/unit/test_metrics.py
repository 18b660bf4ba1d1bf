"""The catalogue of metrics: names, labels and what is there before anything happened."""

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from worker.core import catalogue
from worker.core.catalogue import CATALOGUE, FAMILY
from worker.core.lanes import LANES
from worker.core.outcome import DEAD_LETTERED, REASONS
from worker.shells.metrics import Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3")


def scrape(metrics: Metrics) -> list[Metric]:
    return list(text_string_to_metric_families(metrics.render().decode()))


def series(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name.removeprefix("qris_expire_"), frozenset(sample.labels.items())): sample.value
        for family in scrape(metrics)
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return series(metrics)[name, frozenset(labels.items())]


def every_call(metrics: Metrics) -> None:
    for lane in LANES:
        metrics.received(lane)
        metrics.undated(lane)
        metrics.waiting(lane, 7)
        metrics.settled(lane, 0.2)
        metrics.acked(lane, 2)
        metrics.oldest(lane, 1_800_000_000.0)
        metrics.delayed_retry(lane)
        metrics.breaker(lane, 2)
        for status, reasons in REASONS.items():
            for reason in reasons:
                metrics.outcome(lane, status, reason, 1.5, 1_800_000_000.0)
    for cause in catalogue.RETRIES:
        metrics.retry(cause)
    for status in DEAD_LETTERED:
        for reason in REASONS[status]:
            metrics.dead_letter(reason)
    for operation in catalogue.OPERATIONS:
        for code in (*catalogue.RESPONSE_CODES, "", "10092081"):
            metrics.request(operation, code, 0.1)
    for result in catalogue.REFRESHES:
        metrics.token_refresh(result)
    for pause in catalogue.PAUSES:
        metrics.paused(pause, True)
    for certificate in catalogue.CERTIFICATES:
        metrics.certificate(certificate, 1_900_000_000.0)
    metrics.in_hand = lambda _lane: 3
    metrics.senders(32)
    metrics.token_expiry(1_800_000_900.0)
    metrics.broker_connected(True)
    metrics.broker_reconnected()
    metrics.confirm_took(0.01)
    metrics.unconfirmed(3)
    metrics.clock_skew(-4.5)
    metrics.held_until(1_800_000_012.0)
    metrics.started(1_800_000_000.0)
    metrics.fleet_members(4)
    metrics.fleet_leader(True)
    metrics.member_sick(True)
    metrics.rate_limit(50.0)
    metrics.rate_waited(0.1)


def test_the_scrape_holds_what_the_catalogue_names(metrics: Metrics) -> None:
    """Names, types, labels and sentences of the scrape are the catalogue's, in its order, and there is nothing else."""

    found = [
        (
            family.name + "_total" * (family.type == "counter"),
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
            family.documentation,
        )
        for family in scrape(metrics)
    ]
    assert found == [(each.full_name, each.kind, set(each.labels), each.text) for each in CATALOGUE]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("outcomes_total", {"lane", "status", "reason"}),
        ("commands_undated_total", {"lane"}),
        ("breaker_state", {"lane"}),
        ("consumption_paused", {"reason"}),
        ("gateway_requests_total", {"operation", "response_code"}),
        ("certificate_expiry_timestamp_seconds", {"certificate"}),
        ("fleet_members", set()),
        ("rate_limit", set()),
    ],
)
def test_what_others_rely_on_keeps_its_name(name: str, labels: set[str]) -> None:
    """Dashboards and alerts of others know these names and labels."""

    assert set(catalogue.BY_NAME[f"qris_expire_{name}"].labels) == labels


def test_everything_starts_at_zero(metrics: Metrics) -> None:
    """Before anything happened every series but build_info is zero."""

    nonzero = {name for (name, _), number in series(metrics).items() if number}
    assert nonzero == {"build_info"}
    assert value(metrics, "build_info", version="1.2.3") == 1


def test_no_series_appears_later(metrics: Metrics) -> None:
    """Every known label value exists from the start: using them all adds no series."""

    before = set(series(metrics))
    every_call(metrics)
    after = series(metrics)
    assert set(after) == before
    untouched = {
        name for (name, labels), number in after.items() if not number and not dict(labels).keys() & {"le", "status"}
    }
    assert untouched == set()


def test_a_status_has_only_its_own_reasons(metrics: Metrics) -> None:
    """outcomes_total holds the pairs of the contract's table, once per lane."""

    pairs = [
        (dict(labels)["status"], dict(labels)["reason"]) for name, labels in series(metrics) if name == "outcomes_total"
    ]
    assert sorted(pairs) == sorted(
        2 * [(str(status), str(reason)) for status, own in REASONS.items() for reason in own]
    )


def test_dead_letters_have_the_reasons_of_dead_lettered_statuses(metrics: Metrics) -> None:
    """dead_letters_total knows the reasons of unresolved and invalid, and no others."""

    reasons = {dict(labels)["reason"] for name, labels in series(metrics) if name == "dead_letters_total"}
    assert reasons == {str(reason) for status in DEAD_LETTERED for reason in REASONS[status]}


def test_an_unknown_response_code_is_other_and_an_absent_one_none(metrics: Metrics) -> None:
    """What the gateway says freely never becomes a label."""

    metrics.request("expire", "2009300", 0.1)
    metrics.request("expire", "10092081", 0.1)
    metrics.request("expire", "", 0.1)
    requests = "gateway_requests_total"
    assert value(metrics, requests, operation="expire", response_code="2009300") == 1
    assert value(metrics, requests, operation="expire", response_code="other") == 1
    assert value(metrics, requests, operation="expire", response_code="none") == 1
    assert value(metrics, "gateway_request_duration_seconds_count", operation="expire") == 3


def test_seconds_are_told_by_response_code(metrics: Metrics) -> None:
    """How long the answers of a code take, those of unknown codes under "other"."""

    for code, seconds in (("2009300", 0.5), ("2009300", 0.25), ("5009300", 4.0), ("10092081", 2.0)):
        metrics.request("expire", code, seconds)
    took = {
        code: value(metrics, "gateway_request_seconds_total", operation="expire", response_code=code)
        for code in ("2009300", "5009300", "other", "none")
    }
    assert took == {"2009300": 0.75, "5009300": 4.0, "other": 2.0, "none": 0.0}


@pytest.mark.parametrize(
    "call",
    [
        lambda metrics, bill: metrics.received(bill),
        lambda metrics, bill: metrics.settled(bill, 1.0),
        lambda metrics, bill: metrics.acked(bill, 1),
        lambda metrics, bill: metrics.oldest(bill, 1.0),
        lambda metrics, bill: metrics.outcome("sweep", "expired", bill, 1.0, 1.0),
        lambda metrics, bill: metrics.outcome("sweep", bill, "success", 1.0, 1.0),
        lambda metrics, bill: metrics.request(bill, "2009300", 1.0),
        lambda metrics, bill: metrics.retry(bill),
        lambda metrics, bill: metrics.delayed_retry(bill),
        lambda metrics, bill: metrics.dead_letter(bill),
        lambda metrics, bill: metrics.token_refresh(bill),
        lambda metrics, bill: metrics.paused(bill, True),
        lambda metrics, bill: metrics.undated(bill),
        lambda metrics, bill: metrics.waiting(bill, 1),
        lambda metrics, bill: metrics.breaker(bill, 1),
        lambda metrics, bill: metrics.certificate(bill, 1.0),
    ],
)
def test_a_bill_cannot_become_a_label(metrics: Metrics, call) -> None:  # type: ignore[no-untyped-def]
    """Whatever takes a label value refuses one that is not in its closed set."""

    with pytest.raises(KeyError):
        call(metrics, "10092081")
    assert b"10092081" not in metrics.render()


def test_no_created_series(metrics: Metrics) -> None:
    """The scrape carries no _created series, even after use."""

    metrics.received("sweep")
    assert b"_created" not in metrics.render()


def test_buckets_fit_the_scrape(metrics: Metrics) -> None:
    """A histogram has at most 15 buckets per child, and one second is a boundary."""

    for family in scrape(metrics):
        if family.type == "histogram":
            bounds = {sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")}
            assert len(bounds) <= 15
            assert {"0.5", "1.0", "+Inf"} <= bounds


def test_an_outcome_dates_itself(metrics: Metrics) -> None:
    """An outcome sets the time of the last one, and its age is observed."""

    metrics.outcome("sweep", "expired", "success", 2.0, 1_800_000_000.0)
    metrics.outcome("sweep", "expired", "success", 7.0, 1_800_000_001.5)
    assert value(metrics, "last_outcome_timestamp_seconds") == 1_800_000_001.5
    assert value(metrics, "command_age_seconds_count", lane="sweep") == 2
    assert value(metrics, "command_age_seconds_sum", lane="sweep") == 9.0
    assert value(metrics, "outcomes_total", lane="sweep", status="expired", reason="success") == 2


def test_a_producers_clock_that_is_ahead_does_not_take_the_sum_back(metrics: Metrics) -> None:
    """A negative age counts as zero."""

    metrics.outcome("sweep", "expired", "success", -3.0, 1.0)
    assert value(metrics, "command_age_seconds_sum", lane="sweep") == 0
    assert value(metrics, "command_age_seconds_count", lane="sweep") == 1


@pytest.mark.parametrize("metric", [*CATALOGUE, *FAMILY], ids=lambda metric: metric.name)
def test_every_metric_says_what_it_is_and_what_to_do(metric: catalogue.Metric) -> None:
    """Each text is whole sentences on one line."""

    assert len(metric.text) > 40
    assert metric.text.endswith(".")
    assert "\n" not in metric.text


def test_two_instances_do_not_meet() -> None:
    """Each instance has a registry of its own."""

    one, other = (Metrics("1") for _ in range(2))
    one.received("sweep")
    assert value(other, "commands_total", lane="sweep") == 0


def test_what_is_in_hand_is_asked_at_each_scrape(metrics: Metrics) -> None:
    """The number in flight is that of the moment of the scrape."""

    hands = {"sweep": 2, "cancellation": 0}
    metrics.in_hand = hands.__getitem__
    assert value(metrics, "in_flight", lane="sweep") == 2
    hands["sweep"] = 1
    assert value(metrics, "in_flight", lane="sweep") == 1


def test_an_observation_counts_in_every_bucket_that_holds_it(metrics: Metrics) -> None:
    """Buckets are cumulative, and a bound belongs to the bucket that it closes."""

    for seconds in (0.005, 0.0051, 1_000.0):
        metrics.settled("sweep", seconds)
    counts = {
        bound: value(metrics, "command_duration_seconds_bucket", lane="sweep", le=bound)
        for bound in ("0.005", "0.01", "120.0", "+Inf")
    }
    assert counts == {"0.005": 1, "0.01": 2, "120.0": 2, "+Inf": 3}
