"""What is measured, as setters over the catalogue (`core.catalogue`); the door to prometheus_client.

The library writes the scrape. The numbers are kept here: its own counters take a lock for every increment, and its
histograms look at every bucket, which together costs more than the use case.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import Metric as Family
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

from worker.core.catalogue import CATALOGUE, NO_ANSWER, OTHER, PREFIX, Metric, MetricType
from worker.core.reading import Sample

Values = tuple[str, ...]


def samples(scrape: bytes) -> Iterator[Sample]:
    """The product's own samples of a scrape in text format 0.0.4, of one process or of several added up."""
    for family in text_string_to_metric_families(scrape.decode()):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                yield Sample(sample.name.removeprefix(PREFIX), sample.labels, sample.value)


class _Number:
    """A counter or a gauge with its label values."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class _Histogram:
    """A histogram with its label values: how many observations fell between two bounds, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, metric: Metric) -> None:
        self.bounds = tuple(metric.buckets)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts it in the first bucket whose upper bound it does not exceed."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """All that is measured. Counters and histograms belong to the loop's thread; gauges may be set, and the scrape be
    made, in any.

    A label value that is in no closed set is a `KeyError`: nothing that comes from a message can become a label. The
    one exception is a response code, which the gateway chooses: an unknown one counts as "other", an empty one as
    "none".
    """

    def __init__(self, version: str) -> None:
        self._number: dict[str, dict[Values, _Number]] = {}
        self._histogram: dict[str, dict[Values, _Histogram]] = {}
        for metric in CATALOGUE:
            if metric.kind is MetricType.HISTOGRAM:
                self._histogram[metric.name] = {values: _Histogram(metric) for values in metric.series}
            else:
                series = [(version,)] if metric.name == "build_info" else metric.series
                self._number[metric.name] = {values: _Number() for values in series}
        self.in_hand: Callable[[str], int] = lambda _lane: 0
        """Commands of a lane in senders' hands: asked at each scrape."""
        self._number["build_info"][version,].value = 1

    def collect(self) -> Iterator[Family]:
        """What prometheus_client asks of a registry: each metric of the catalogue with its numbers of now."""
        for (lane,), number in self._number["in_flight"].items():
            number.value = self.in_hand(lane)
        for metric in CATALOGUE:
            name, text, labels = metric.full_name, metric.text, tuple(metric.labels)
            match metric.kind:
                case MetricType.COUNTER:
                    counter = CounterMetricFamily(name, text, labels=labels)
                    for values, number in self._number[metric.name].items():
                        counter.add_metric(values, number.value)
                    yield counter
                case MetricType.GAUGE:
                    gauge = GaugeMetricFamily(name, text, labels=labels)
                    for values, number in self._number[metric.name].items():
                        gauge.add_metric(values, number.value)
                    yield gauge
                case MetricType.HISTOGRAM:
                    histogram = HistogramMetricFamily(name, text, labels=labels)
                    for values, each in self._histogram[metric.name].items():
                        bounds = map(floatToGoString, (*each.bounds, float("inf")))
                        histogram.add_metric(values, list(zip(bounds, accumulate(each.counts), strict=True)), each.sum)
                    yield histogram

    def started(self, timestamp: float) -> None:
        """The process began at this unix time."""
        self._number["start_timestamp_seconds"][()].value = timestamp

    # -- what happens to a command

    def received(self, lane: str) -> None:
        """A command came from the broker for the first time."""
        self._number["commands_total"][lane,].value += 1

    def undated(self, lane: str) -> None:
        """That command had no timestamp of its producer."""
        self._number["commands_undated_total"][lane,].value += 1

    def waiting(self, lane: str, commands: int) -> None:
        """The broker says that so many commands wait in the lane's queue."""
        self._number["commands_waiting"][lane,].value = commands

    def acked(self, lane: str, deliveries: int) -> None:
        """So many more deliveries were acked."""
        self._number["acks_total"][lane,].value += deliveries

    def oldest(self, lane: str, published_at: float | None) -> None:
        """The oldest command in hand was published at this unix time; None when there is none."""
        self._number["oldest_command_timestamp_seconds"][lane,].value = published_at or 0.0

    def senders(self, number: int) -> None:
        """So many requests may be in flight."""
        self._number["senders"][()].value = number

    def settled(self, lane: str, seconds: float) -> None:
        """A command was acked `seconds` after its delivery."""
        self._histogram["command_duration_seconds"][lane,].observe(seconds)

    def outcome(self, lane: str, status: str, reason: str, age_seconds: float, now: float) -> None:
        """A command ended at unix time `now`; its age in seconds.

        A producer's clock may be ahead of ours: a negative age counts as none at all (0), since it would
        take the histogram's sum backwards.
        """
        self._number["outcomes_total"][lane, status, reason].value += 1
        self._histogram["command_age_seconds"][lane,].observe(max(age_seconds, 0.0))
        self._number["last_outcome_timestamp_seconds"][()].value = now

    def retry(self, reason: str) -> None:
        """An attempt must be made again, for one of the catalogue's `RETRIES`."""
        self._number["retries_total"][reason,].value += 1

    def delayed_retry(self, lane: str) -> None:
        """A command went to wait in the broker for its next round."""
        self._number["delayed_retries_total"][lane,].value += 1

    def dead_letter(self, reason: str) -> None:
        """A message was parked, for a reason of a dead-lettered status."""
        self._number["dead_letters_total"][reason,].value += 1

    # -- the gateway

    def request(self, operation: str, response_code: str, seconds: float) -> None:
        """A request of the catalogue's `OPERATIONS` ended; `response_code` is "" when there was none."""
        requests = self._number["gateway_requests_total"]
        pair = operation, response_code or NO_ANSWER
        if pair not in requests:
            pair = operation, OTHER
        requests[pair].value += 1
        self._number["gateway_request_seconds_total"][pair].value += seconds
        self._histogram["gateway_request_duration_seconds"][operation,].observe(seconds)

    def token_refresh(self, result: str) -> None:
        """The token service was asked, with a result of the catalogue's `REFRESHES`."""
        self._number["token_refreshes_total"][result,].value += 1

    def token_expiry(self, timestamp: float) -> None:
        """The token in use ends at this unix time."""
        self._number["token_expiry_timestamp_seconds"][()].value = timestamp

    def breaker(self, lane: str, state: int) -> None:
        """The lane's breaker is closed (0), half-open (1) or open (2)."""
        self._number["breaker_state"][lane,].value = state

    def held_until(self, timestamp: float | None) -> None:
        """No call goes out before this unix time; None when nothing holds."""
        self._number["held_until_timestamp_seconds"][()].value = timestamp or 0.0

    def clock_skew(self, seconds: float) -> None:
        """The latest difference between our clock and the gateway's."""
        self._number["clock_skew_seconds"][()].value = seconds

    def certificate(self, certificate: str, timestamp: float | None) -> None:
        """This one of the catalogue's `CERTIFICATES` ends at this unix time; None when none is set."""
        self._number["certificate_expiry_timestamp_seconds"][certificate,].value = timestamp or 0.0

    # -- the fleet

    def fleet_members(self, number: int) -> None:
        """This process sees so many members, itself included."""
        self._number["fleet_members"][()].value = number

    def fleet_leader(self, is_leader: bool) -> None:
        """This process hands out permits and tokens, or does not."""
        self._number["fleet_leader"][()].value = is_leader

    def member_sick(self, is_sick: bool) -> None:
        """This process fails at the gateway while others succeed, or does not."""
        self._number["member_sick"][()].value = is_sick

    def rate_limit(self, per_second: float) -> None:
        """The fleet may make so many expire calls a second; 0 for no limit."""
        self._number["rate_limit"][()].value = per_second

    def rate_waited(self, seconds: float) -> None:
        """A sender waited so long for its permit under the rate limit."""
        self._histogram["rate_wait_seconds"][()].observe(seconds)

    # -- the broker

    def paused(self, reason: str, is_paused: bool) -> None:
        """Consumption pauses or goes on, for one of the catalogue's `PAUSES`."""
        self._number["consumption_paused"][reason,].value = is_paused

    def broker_connected(self, is_connected: bool) -> None:
        """Whether the connections to the broker are open."""
        self._number["broker_connected"][()].value = is_connected

    def broker_reconnected(self) -> None:
        """A connection that was lost is open again."""
        self._number["broker_reconnects_total"][()].value += 1

    def confirm_took(self, seconds: float) -> None:
        """The broker confirmed a message `seconds` after it was published."""
        self._histogram["publish_confirm_seconds"][()].observe(seconds)

    def unconfirmed(self, number: int) -> None:
        """So many messages wait for their confirm."""
        self._number["publishes_unconfirmed"][()].value = number

    def render(self) -> bytes:
        """The scrape, in Prometheus text format 0.0.4."""
        return generate_latest(self)
