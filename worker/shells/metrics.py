"""What is measured, as setters over the catalogue (`core.catalogue`); the door to prometheus_client.

Children are kept in dicts: `.labels()` costs four times what the increment itself costs.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families

from worker.core.catalogue import CATALOGUE, NONE, OTHER, PREFIX, Kind, Metric
from worker.core.reading import Sample

Values = tuple[str, ...]
T = TypeVar("T", Counter, Gauge, Histogram)


def samples(scrape: bytes) -> Iterator[Sample]:
    """The product's own samples of a scrape in text format 0.0.4, of one process or of several added up."""
    for family in text_string_to_metric_families(scrape.decode()):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                yield Sample(sample.name.removeprefix(PREFIX), sample.labels, sample.value)


class Metrics:
    """All that is measured, in a registry of its own; every method is thread-safe and costs microseconds.

    A label value that is in no closed set is a `KeyError`: nothing that comes from a message can become a label. The
    one exception is a response code, which the gateway chooses: an unknown one counts as "other", an empty one as
    "none".
    """

    def __init__(self, version: str) -> None:
        # Process-wide, but nothing else here uses the library: a _created series for every child would double
        # the scrape for a date that nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._counter: dict[str, dict[Values, Counter]] = {}
        self._gauge: dict[str, dict[Values, Gauge]] = {}
        self._histogram: dict[str, dict[Values, Histogram]] = {}
        for metric in CATALOGUE:
            self._declare(metric, [(version,)] if metric.name == "build_info" else metric.series)
        self._gauge["build_info"][version,].set(1)

    def _declare(self, metric: Metric, series: Sequence[Values]) -> None:
        name, text, labels = metric.full_name, metric.text, metric.labels
        match metric.kind:
            case Kind.COUNTER:
                self._counter[metric.name] = _children(Counter(name, text, labels, registry=self._registry), series)
            case Kind.GAUGE:
                self._gauge[metric.name] = _children(Gauge(name, text, labels, registry=self._registry), series)
            case Kind.HISTOGRAM:
                histogram = Histogram(name, text, labels, registry=self._registry, buckets=metric.buckets)
                self._histogram[metric.name] = _children(histogram, series)

    def started(self, timestamp: float) -> None:
        """The process began at this unix time."""
        self._gauge["start_timestamp_seconds"][()].set(timestamp)

    # -- what happens to a command

    def received(self, lane: str) -> None:
        """A command came from the broker for the first time."""
        self._counter["commands_total"][lane,].inc()

    def undated(self, lane: str) -> None:
        """That command had no timestamp of its producer."""
        self._counter["commands_undated_total"][lane,].inc()

    def waiting(self, lane: str, commands: int) -> None:
        """The broker says that so many commands wait in the lane's queue."""
        self._gauge["commands_waiting"][lane,].set(commands)

    def in_hand(self, lane: str, delta: int) -> None:
        """A sender took a command (+1) or gave it away (-1)."""
        self._gauge["in_flight"][lane,].inc(delta)

    def acked(self, lane: str, deliveries: int) -> None:
        """So many more deliveries were acked."""
        self._counter["acks_total"][lane,].inc(deliveries)

    def oldest(self, lane: str, published_at: float | None) -> None:
        """The oldest command in hand was published at this unix time; None when there is none."""
        self._gauge["oldest_command_timestamp_seconds"][lane,].set(published_at or 0.0)

    def senders(self, number: int) -> None:
        """So many requests may be in flight."""
        self._gauge["senders"][()].set(number)

    def settled(self, lane: str, seconds: float) -> None:
        """A command was acked `seconds` after its delivery."""
        self._histogram["command_duration_seconds"][lane,].observe(seconds)

    def outcome(self, lane: str, status: str, reason: str, age_seconds: float, now: float) -> None:
        """A command ended at unix time `now`; its age in seconds.

        A producer's clock may be ahead of ours: a negative age counts as none at all (0), since it would
        take the histogram's sum backwards.
        """
        self._counter["outcomes_total"][lane, status, reason].inc()
        self._histogram["command_age_seconds"][lane,].observe(max(age_seconds, 0.0))
        self._gauge["last_outcome_timestamp_seconds"][()].set(now)

    def retry(self, reason: str) -> None:
        """An attempt must be made again, for one of the catalogue's `RETRIES`."""
        self._counter["retries_total"][reason,].inc()

    def delayed_retry(self, lane: str) -> None:
        """A command went to wait in the broker for its next round."""
        self._counter["delayed_retries_total"][lane,].inc()

    def dead_letter(self, reason: str) -> None:
        """A message was parked, for a reason of a dead-lettered status."""
        self._counter["dead_letters_total"][reason,].inc()

    # -- the gateway

    def request(self, operation: str, response_code: str, seconds: float) -> None:
        """A request of the catalogue's `OPERATIONS` ended; `response_code` is "" when there was none."""
        requests = self._counter["gateway_requests_total"]
        pair = operation, response_code or NONE
        if pair not in requests:
            pair = operation, OTHER
        requests[pair].inc()
        self._counter["gateway_request_seconds_total"][pair].inc(seconds)
        self._histogram["gateway_request_duration_seconds"][operation,].observe(seconds)

    def token_refresh(self, result: str) -> None:
        """The token service was asked, with a result of the catalogue's `REFRESHES`."""
        self._counter["token_refreshes_total"][result,].inc()

    def token_expiry(self, timestamp: float) -> None:
        """The token in use ends at this unix time."""
        self._gauge["token_expiry_timestamp_seconds"][()].set(timestamp)

    def breaker(self, lane: str, state: int) -> None:
        """The lane's breaker is closed (0), half-open (1) or open (2)."""
        self._gauge["breaker_state"][lane,].set(state)

    def held_until(self, timestamp: float | None) -> None:
        """No call goes out before this unix time; None when nothing holds."""
        self._gauge["held_until_timestamp_seconds"][()].set(timestamp or 0.0)

    def clock_skew(self, seconds: float) -> None:
        """The latest difference between our clock and the gateway's."""
        self._gauge["clock_skew_seconds"][()].set(seconds)

    def certificate(self, certificate: str, timestamp: float | None) -> None:
        """This one of the catalogue's `CERTIFICATES` ends at this unix time; None when none is set."""
        self._gauge["certificate_expiry_timestamp_seconds"][certificate,].set(timestamp or 0.0)

    # -- the fleet

    def fleet_members(self, number: int) -> None:
        """This process sees so many members, itself included."""
        self._gauge["fleet_members"][()].set(number)

    def fleet_leader(self, is_leader: bool) -> None:
        """This process hands out permits and tokens, or does not."""
        self._gauge["fleet_leader"][()].set(is_leader)

    def member_sick(self, is_sick: bool) -> None:
        """This process fails at the gateway while others succeed, or does not."""
        self._gauge["member_sick"][()].set(is_sick)

    def rate_limit(self, per_second: float) -> None:
        """The fleet may make so many expire calls a second; 0 for no limit."""
        self._gauge["rate_limit"][()].set(per_second)

    def rate_waited(self, seconds: float) -> None:
        """A sender waited so long for its permit under the rate limit."""
        self._histogram["rate_wait_seconds"][()].observe(seconds)

    # -- the broker

    def paused(self, reason: str, is_paused: bool) -> None:
        """Consumption pauses or goes on, for one of the catalogue's `PAUSES`."""
        self._gauge["consumption_paused"][reason,].set(is_paused)

    def broker_connected(self, is_connected: bool) -> None:
        """Whether the connections to the broker are open."""
        self._gauge["broker_connected"][()].set(is_connected)

    def broker_reconnected(self) -> None:
        """A connection that was lost is open again."""
        self._counter["broker_reconnects_total"][()].inc()

    def confirmed(self, seconds: float) -> None:
        """The broker confirmed a message `seconds` after it was published."""
        self._histogram["publish_confirm_seconds"][()].observe(seconds)

    def unconfirmed(self, number: int) -> None:
        """So many messages wait for their confirm."""
        self._gauge["publishes_unconfirmed"][()].set(number)

    def render(self) -> bytes:
        """The scrape, in Prometheus text format 0.0.4."""
        return generate_latest(self._registry)


def _children(parent: T, series: Sequence[Values]) -> dict[Values, T]:
    """Each child by its label values."""
    return {values: parent.labels(*values) if values else parent for values in series}
