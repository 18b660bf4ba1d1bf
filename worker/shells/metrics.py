"""The catalogue of metrics, one class; the door to prometheus_client.

Every set of label values is closed and exists from the start at zero, so that a first failure is a step
from 0 to 1 and not a series that appears at 1 (which `increase()` does not see). Children are kept in
dicts: `.labels()` costs four times what the increment itself costs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families

from worker.core.reading import Sample

PREFIX: Final = "qris_expire_"

OPERATIONS: Final = ("expire", "token")
RETRIES: Final = ("transient", "systemic", "token", "id_clash", "throttled")
PAUSES: Final = ("breaker", "throttled", "broker_blocked", "draining")
REFRESHES: Final = ("ok", "refused", "error")
DEAD_LETTERED: Final = ("unresolved", "invalid")
"""The statuses whose commands are also parked for people."""

OTHER: Final = "other"
NONE: Final = "none"
# What service 93 (expire), 91 (its sibling, whose success code the sample shows) and 73 (token) are known to
# answer. A gateway that answers with the wrong service's code is worth seeing under that code, so both
# operations have them all.
RESPONSE_CODES: Final = (
    "2009300", "2009100", "2029300",
    "4009300", "4009301", "4009302",
    "4019300", "4019301", "4019303",
    "4039300", "4039304", "4039319",
    "4049300", "4049301", "4049304", "4049308", "4049314", "4049319",
    "4099300", "4299300",
    "5009300", "5049300",
    "2007300", "4007300", "4017300", "4297300", "5007300",
)  # fmt: skip

# Upper bounds in seconds, at most 15 with +Inf: each bucket is a series per lane. 0.5 and 1.0 are boundaries,
# since an objective between two boundaries can only be guessed at.
DURATION_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
AGE_BUCKETS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
REQUEST_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0)
CONFIRM_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0)


def samples(scrape: bytes) -> Iterator[Sample]:
    """The product's own samples of a scrape in text format 0.0.4, of one process or of several added up."""
    for family in text_string_to_metric_families(scrape.decode()):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                yield Sample(sample.name.removeprefix(PREFIX), sample.labels, sample.value)


class Metrics:
    """All that is measured, in a registry of its own; every method is thread-safe and costs microseconds.

    `reasons` maps every status to its own reasons. A label value that is in no closed set is a `KeyError`:
    nothing that comes from a message can become a label. The one exception is a response code, which the
    gateway chooses: an unknown one counts as "other", an empty one as "none".
    """

    def __init__(
        self,
        lanes: Sequence[str] = ("cancellation", "sweep"),
        *,
        reasons: Mapping[str, Sequence[str]],
        version: str,
        registry: CollectorRegistry | None = None,
    ) -> None:
        # Process-wide, but nothing else here uses the library: a _created series for every child would double
        # the scrape for a date that nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry if registry is not None else CollectorRegistry()
        self._commands_and_outcomes(lanes, reasons)
        self._gateway()
        self._broker()
        self._gauge(
            "build_info",
            "Always 1; the version is the label. Two versions for long: a rollout is stuck.",
            ("version",),
        ).labels(version).set(1)
        self._started = self._gauge(
            "start_timestamp_seconds",
            "Unix time at which the process began; of several, the earliest. Moves unexpectedly: see the log.",
        )

    def _commands_and_outcomes(self, lanes: Sequence[str], reasons: Mapping[str, Sequence[str]]) -> None:
        self._received = self._counters(
            "commands_total",
            "Commands taken from the broker, each once, without its delayed rounds. "
            "Flat while the queue is not: look at consumption_paused and broker_connected.",
            ("lane",),
            lanes,
        )
        outcomes = self._counter(
            "outcomes_total",
            "Commands that ended, by status and reason; counted when the broker has confirmed the outcome. "
            "unresolved or invalid moves: qris-expire dead list.",
            ("lane", "status", "reason"),
        )
        self._outcomes = {
            (lane, status, reason): outcomes.labels(lane, status, reason)
            for lane in lanes
            for status, own in reasons.items()
            for reason in own
        }
        in_flight = self._gauge(
            "in_flight",
            "Commands in a sender's hands. At WORKER_CONCURRENCY for long with a backlog: the gateway is slow "
            "(gateway_request_duration_seconds) or more concurrency is needed.",
            ("lane",),
        )
        self._in_flight = {lane: in_flight.labels(lane) for lane in lanes}
        self._acks = self._counters(
            "acks_total",
            "Deliveries acked. Each should have an outcome, a delayed round or a way back to its queue before it: "
            "acks without outcomes or delayed rounds, while nothing is paused, are a fault of the worker.",
            ("lane",),
            lanes,
        )
        oldest = self._gauge(
            "oldest_command_timestamp_seconds",
            "Unix time at which the oldest command that is in hand was published, 0 with none. Long ago: commands "
            "queue, or one is stuck; commands in a delayed round are not in hand.",
            ("lane",),
        )
        self._oldest = {lane: oldest.labels(lane) for lane in lanes}
        self._senders = self._gauge(
            "senders",
            "Requests that may be in flight (WORKER_CONCURRENCY): what in_flight is to be compared with.",
        )
        duration = self._histogram(
            "command_duration_seconds",
            "From a command's delivery to its ack, backoff and confirm included. "
            "Rises: look at gateway_request_duration_seconds, retries_total and publish_confirm_seconds.",
            ("lane",),
            DURATION_BUCKETS,
        )
        self._duration = {lane: duration.labels(lane) for lane in lanes}
        age = self._histogram(
            "command_age_seconds",
            "From a command's publication to its outcome: what the producer waits. "
            "Rises while command_duration_seconds does not: commands queue, add processes or concurrency.",
            ("lane",),
            AGE_BUCKETS,
        )
        self._age = {lane: age.labels(lane) for lane in lanes}
        self._last_outcome = self._gauge(
            "last_outcome_timestamp_seconds",
            "Unix time of the last outcome, 0 before the first. Stands still while commands wait: nothing ends.",
        )
        self._retries = self._counters(
            "retries_total",
            "Attempts sent again within a round, by what made them necessary. transient: the gateway or the "
            "way to it; systemic: our credentials or set-up (qris-expire check); token: tokens die early; "
            "id_clash: external ids repeat; throttled: lower GATEWAY_MAX_REQUESTS_PER_SECOND.",
            ("reason",),
            RETRIES,
        )
        self._delayed = self._counters(
            "delayed_retries_total",
            "Rounds put off in the broker (RETRY_DELAYS_SECONDS) since attempts in process did not help. "
            "Rises: the gateway fails for longer than RETRY_BUDGET_SECONDS.",
            ("lane",),
            lanes,
        )
        self._dead = self._counters(
            "dead_letters_total",
            "Messages parked for people, by reason. Any increase needs one: qris-expire dead list, then redrive "
            "or purge.",
            ("reason",),
            [reason for status in DEAD_LETTERED for reason in reasons.get(status, ())],
        )

    def _gateway(self) -> None:
        requests = self._counter(
            "gateway_requests_total",
            "Requests that ended, by the gateway's responseCode: other is a code not listed, none an answer "
            "without a code or no answer. none rises: look at the network and at what stands before the "
            "gateway; 4019300: check secret, key and clock.",
            ("operation", "response_code"),
        )
        self._requests = {
            (operation, code): requests.labels(operation, code)
            for operation in OPERATIONS
            for code in (*RESPONSE_CODES, OTHER, NONE)
        }
        seconds = self._counter(
            "gateway_request_seconds_total",
            "Seconds that these requests took, by responseCode; over gateway_requests_total: how long an answer of "
            "this code takes. A failure that takes long costs more than one that comes at once: ask the provider why.",
            ("operation", "response_code"),
        )
        self._request_seconds = {pair: seconds.labels(*pair) for pair in self._requests}
        duration = self._histogram(
            "gateway_request_duration_seconds",
            "One request to the gateway, from sending to the whole answer or to giving up. "
            "Near GATEWAY_READ_TIMEOUT_SECONDS: effects become unknown, ask the provider.",
            ("operation",),
            REQUEST_BUCKETS,
        )
        self._request_duration = {operation: duration.labels(operation) for operation in OPERATIONS}
        self._refreshes = self._counters(
            "token_refreshes_total",
            "Tokens asked for, by result. refused: client id, key or key registration is wrong "
            "(qris-expire check); error: the token service is out of reach.",
            ("result",),
            REFRESHES,
        )
        self._token_expiry = self._gauge(
            "token_expiry_timestamp_seconds",
            "Unix time at which the token in use ends, 0 without one. In the past: refreshing fails, "
            "look at token_refreshes_total.",
        )
        self._breaker = self._gauge(
            "breaker_state",
            "0 closed, 1 half-open, 2 open. Open: the gateway fails for every command, none is lost; "
            "look at retries_total for why.",
        )
        self._held_until = self._gauge(
            "held_until_timestamp_seconds",
            "Unix time at which the gateway is called again while breaker or throttle hold all calls: the next probe, "
            "or the end of Retry-After. 0 while nothing holds.",
        )
        self._clock_skew = self._gauge(
            "clock_skew_seconds",
            "Our clock against the gateway's Date header. Beyond 30 either way: signatures may be refused, "
            "mend the host's time service.",
        )

    def _broker(self) -> None:
        paused = self._gauge(
            "consumption_paused",
            "1 while nothing is taken from the queues for this reason. breaker and throttled end by themselves "
            "when the gateway recovers; broker_blocked: the broker is short of memory or disk.",
            ("reason",),
        )
        self._paused = {reason: paused.labels(reason) for reason in PAUSES}
        self._connected = self._gauge(
            "broker_connected",
            "1 while both connections to the broker stand. 0 for long: check AMQP_URL and the broker.",
        )
        self._reconnects = self._counter(
            "broker_reconnects_total",
            "Connections to the broker made again after a loss. Rises steadily: network, broker restarts, or a "
            "blocked process that misses heartbeats.",
        )
        self._confirm = self._histogram(
            "publish_confirm_seconds",
            "From publishing an outcome or dead letter to the broker's confirm; its command is held as long. "
            "Rises: the broker's disks or its quorum are slow.",
            (),
            CONFIRM_BUCKETS,
        )
        self._unconfirmed = self._gauge(
            "publishes_unconfirmed",
            "Messages published and not yet confirmed. Does not fall: the broker takes them but stores none, "
            "look at its alarms.",
        )

    def started(self, timestamp: float) -> None:
        """The process began at this unix time."""
        self._started.set(timestamp)

    # -- what happens to a command

    def received(self, lane: str) -> None:
        """A command came from the broker for the first time."""
        self._received[lane].inc()

    def in_hand(self, lane: str, delta: int) -> None:
        """A sender took a command (+1) or gave it away (-1)."""
        self._in_flight[lane].inc(delta)

    def acked(self, lane: str, deliveries: int) -> None:
        """So many more deliveries were acked."""
        self._acks[lane].inc(deliveries)

    def oldest(self, lane: str, published_at: float | None) -> None:
        """The oldest command in hand was published at this unix time; None when there is none that is dated."""
        self._oldest[lane].set(published_at or 0.0)

    def senders(self, number: int) -> None:
        """So many requests may be in flight."""
        self._senders.set(number)

    def settled(self, lane: str, seconds: float) -> None:
        """A command was acked `seconds` after its delivery."""
        self._duration[lane].observe(seconds)

    def outcome(self, lane: str, status: str, reason: str, age_seconds: float | None, now: float) -> None:
        """A command ended at unix time `now`; its age in seconds, None when nobody dated it.

        A producer's clock may be ahead of ours: a negative age counts as none at all (0), since it would
        take the histogram's sum backwards.
        """
        self._outcomes[lane, status, reason].inc()
        if age_seconds is not None:
            self._age[lane].observe(max(age_seconds, 0.0))
        self._last_outcome.set(now)

    def retry(self, reason: str) -> None:
        """An attempt is about to be sent again, for one of `RETRIES`."""
        self._retries[reason].inc()

    def delayed_retry(self, lane: str) -> None:
        """A command went to wait in the broker for its next round."""
        self._delayed[lane].inc()

    def dead_letter(self, reason: str) -> None:
        """A message was parked, for a reason of `DEAD_LETTERED`."""
        self._dead[reason].inc()

    # -- the gateway

    def request(self, operation: str, response_code: str, seconds: float) -> None:
        """A request of `OPERATIONS` ended; `response_code` is "" when there was none."""
        pair = operation, response_code or NONE
        if pair not in self._requests:
            pair = operation, OTHER
        self._requests[pair].inc()
        self._request_seconds[pair].inc(seconds)
        self._request_duration[operation].observe(seconds)

    def token_refresh(self, result: str) -> None:
        """The token service was asked, with a result of `REFRESHES`."""
        self._refreshes[result].inc()

    def token_expiry(self, timestamp: float) -> None:
        """The token in use ends at this unix time."""
        self._token_expiry.set(timestamp)

    def breaker(self, state: int) -> None:
        """The breaker is closed (0), half-open (1) or open (2)."""
        self._breaker.set(state)

    def held_until(self, timestamp: float | None) -> None:
        """No call goes out before this unix time; None when nothing holds."""
        self._held_until.set(timestamp or 0.0)

    def clock_skew(self, seconds: float) -> None:
        """The latest difference between our clock and the gateway's."""
        self._clock_skew.set(seconds)

    # -- the broker

    def paused(self, reason: str, is_paused: bool) -> None:
        """Consumption pauses or goes on, for one of `PAUSES`."""
        self._paused[reason].set(is_paused)

    def broker_connected(self, is_connected: bool) -> None:
        """The connections to the broker stand, or do not."""
        self._connected.set(is_connected)

    def broker_reconnected(self) -> None:
        """A connection that was lost stands again."""
        self._reconnects.inc()

    def confirmed(self, seconds: float) -> None:
        """The broker confirmed a message `seconds` after it was published."""
        self._confirm.observe(seconds)

    def unconfirmed(self, number: int) -> None:
        """So many messages wait for their confirm."""
        self._unconfirmed.set(number)

    def render(self) -> bytes:
        """The scrape, in Prometheus text format 0.0.4."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(PREFIX + name, text, tuple(labels), registry=self._registry)

    def _counters(self, name: str, text: str, labels: Iterable[str], values: Iterable[str]) -> dict[str, Counter]:
        counter = self._counter(name, text, labels)
        return {value: counter.labels(value) for value in values}

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(PREFIX + name, text, tuple(labels), registry=self._registry)

    def _histogram(self, name: str, text: str, labels: Iterable[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, tuple(labels), registry=self._registry, buckets=buckets)
