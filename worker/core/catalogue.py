"""The catalogue of metrics: what exists, what it means, what to do when it moves. Everything else follows from it.

To add a metric, add its entry to `CATALOGUE`: the registry, the sums over several processes and the checks of alerts
and dashboard read it from here. Only the method that sets it is written elsewhere, in `shells.metrics`.

Every set of label values is closed and exists from the start at zero, so that a first failure is a step from 0 to 1 and
not a series that appears at 1 (which `increase()` does not see).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import product
from typing import Final

from worker.core.lanes import LANES
from worker.core.outcome import DEAD_LETTERED, REASONS
from worker.core.verdict import KNOWN

PREFIX: Final = "qris_expire_"

MergeRule = Callable[[float, float], float]


def soonest(one: float, other: float) -> float:
    """The smaller one; 0 means none."""
    return min(one or math.inf, other or math.inf) if one or other else 0.0


class MetricType(StrEnum):
    """As Prometheus has them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `text` says what it is and what to do when it moves.

    `labels` has the values of each label; `only` are the series where not every combination exists. `buckets` are the
    upper bounds of a histogram. `merge` makes one value of two processes' values; only gauges have a rule, counters and
    histograms are summed. `lasts` is for a gauge that stays true when its process is gone.
    """

    kind: MetricType
    name: str
    text: str
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    only: Sequence[tuple[str, ...]] = ()
    buckets: Sequence[float] = ()
    merge: MergeRule = operator.add
    lasts: bool = False

    @property
    def full_name(self) -> str:
        """The name with the product's prefix, as it is exported."""
        return PREFIX + self.name

    @property
    def series(self) -> Sequence[tuple[str, ...]]:
        """All values of the labels, in their order."""
        return self.only or tuple(product(*self.labels.values()))


counter: Final = partial(Metric, MetricType.COUNTER)
gauge: Final = partial(Metric, MetricType.GAUGE)
histogram: Final = partial(Metric, MetricType.HISTOGRAM)

OPERATIONS: Final = ("expire", "token")
RETRIES: Final = ("transient", "systemic", "token", "id_clash", "throttled")
PAUSES: Final = ("breaker", "throttled", "broker_blocked", "draining", "operator", "sick")
REFRESHES: Final = ("ok", "refused", "error")
CERTIFICATES: Final = ("gateway_client", "gateway_ca", "amqp_client", "amqp_ca")
"""GATEWAY_CERT_FILE, GATEWAY_CA_FILE, AMQP_CERT_FILE, AMQP_CA_FILE."""

OTHER: Final = "other"
NO_ANSWER: Final = "none"
"""The response code of calls without an answer, or with one that has no code."""
# A gateway that answers with the wrong service's code is worth seeing under that code: both operations have them all.
RESPONSE_CODES: Final = tuple(sorted(KNOWN, key=lambda code: (code[3:5] == "73", code)))

# Upper bounds in seconds, at most 15 with +Inf: each bucket is a series per lane. 0.5 and 1.0 are boundaries,
# since an objective between two boundaries can only be guessed at.
DURATION_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
AGE_BUCKETS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
REQUEST_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0)
CONFIRM_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0)
RATE_WAIT_BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_BY_LANE: Final = {"lane": LANES}
_BY_ANSWER: Final = {"operation": OPERATIONS, "response_code": (*RESPONSE_CODES, OTHER, NO_ANSWER)}
_REASONS: Final = tuple((str(status), str(reason)) for status, reasons in REASONS.items() for reason in reasons)

CATALOGUE: Final = (
    # -- commands and outcomes
    counter(
        "commands_total",
        "Commands taken from the broker, each once, without its delayed rounds. "
        "Flat while the queue is not empty: look at consumption_paused and broker_connected.",
        _BY_LANE,
    ),
    counter(
        "commands_undated_total",
        "Commands without a timestamp of their producer; their age counts from the first delivery, so it does not show "
        "how long they waited in the queue. Moves: ask the producer to set the property timestamp.",
        _BY_LANE,
    ),
    gauge(
        "commands_waiting",
        "Commands that wait in the lane's queue, in no worker's hands, as the broker told this process some seconds "
        "ago. Rises steadily: more come than end; over the rate of outcomes_total it is the time to empty.",
        _BY_LANE,
        merge=max,
    ),
    counter(
        "outcomes_total",
        "Commands that ended, by status and reason; counted when the broker has confirmed the outcome. "
        "unresolved or invalid moves: run qris-expire dead list.",
        {"lane": LANES, "status": tuple(map(str, REASONS)), "reason": tuple(reason for _, reason in _REASONS)},
        only=tuple((lane, *ended) for lane in LANES for ended in _REASONS),
    ),
    gauge(
        "in_flight",
        "Commands in a sender's hands. At WORKER_CONCURRENCY for long with a backlog: the gateway is slow "
        "(gateway_request_duration_seconds) or more concurrency is needed.",
        _BY_LANE,
    ),
    counter(
        "acks_total",
        "Deliveries acked. Each should have an outcome, a delayed round or a way back to its queue before it: "
        "acks without outcomes or delayed rounds, while nothing is paused, are a fault of the worker.",
        _BY_LANE,
    ),
    gauge(
        "oldest_command_timestamp_seconds",
        "Unix time at which the oldest command that is in hand was published, 0 with none. Long ago: commands "
        "queue, or one is stuck; commands in a delayed round are not in hand.",
        _BY_LANE,
        merge=soonest,
    ),
    gauge(
        "senders",
        "Requests that may be in flight (WORKER_CONCURRENCY): what in_flight is to be compared with.",
    ),
    histogram(
        "command_duration_seconds",
        "From a command's delivery to its ack, backoff and confirm included. "
        "Rises: look at gateway_request_duration_seconds, rate_wait_seconds, retries_total, publish_confirm_seconds.",
        _BY_LANE,
        buckets=DURATION_BUCKETS,
    ),
    histogram(
        "command_age_seconds",
        "From a command's publication to its outcome: what the producer waits. Rises while command_duration_seconds "
        "does not: commands wait in the queue (see the broker), or the producer's clock is behind.",
        _BY_LANE,
        buckets=AGE_BUCKETS,
    ),
    gauge(
        "last_outcome_timestamp_seconds",
        "Unix time of the last outcome, 0 before the first. Stands still while commands wait: nothing ends.",
        merge=max,
        lasts=True,
    ),
    counter(
        "retries_total",
        "Attempts that must be made again, by what made them necessary. transient: the gateway or the "
        "way to it; systemic: our credentials or set-up (qris-expire check); token: tokens die early; "
        "id_clash: external ids repeat; throttled: lower the limit (GATEWAY_MAX_REQUESTS_PER_SECOND, fleet limit).",
        {"reason": RETRIES},
    ),
    counter(
        "delayed_retries_total",
        "Rounds put off in the broker (RETRY_DELAYS_SECONDS) since attempts in process did not help. "
        "Rises: the gateway fails for longer than RETRY_BUDGET_SECONDS.",
        _BY_LANE,
    ),
    counter(
        "dead_letters_total",
        "Messages parked for people, by reason. Any increase needs one: qris-expire dead list, then redrive or purge.",
        {"reason": tuple(reason for status, reason in _REASONS if status in DEAD_LETTERED)},
    ),
    # -- the gateway
    counter(
        "gateway_requests_total",
        "Requests that ended, by the gateway's responseCode: other is a code not listed, none an answer "
        "without a code or no answer. none rises: look at the network and at what stands before the "
        "gateway; 4019300: check secret, key and clock.",
        _BY_ANSWER,
    ),
    counter(
        "gateway_request_seconds_total",
        "Seconds that these requests took, by responseCode; over gateway_requests_total: how long an answer of "
        "this code takes. A failure that takes long costs more than one that comes at once: ask the provider why.",
        _BY_ANSWER,
    ),
    histogram(
        "gateway_request_duration_seconds",
        "One request to the gateway, from sending to the whole answer or to giving up. "
        "Near GATEWAY_READ_TIMEOUT_SECONDS: effects become unknown, ask the provider.",
        {"operation": OPERATIONS},
        buckets=REQUEST_BUCKETS,
    ),
    counter(
        "token_refreshes_total",
        "Tokens asked for, by result. refused: client id, key or key registration is wrong "
        "(qris-expire check); error: the token service is out of reach.",
        {"result": REFRESHES},
    ),
    gauge(
        "token_expiry_timestamp_seconds",
        "Unix time at which the token in use ends, 0 without one. In the past: refreshing fails, "
        "look at token_refreshes_total.",
        merge=soonest,
    ),
    gauge(
        "breaker_state",
        "0 closed, 1 half-open, 2 open. Open: the gateway fails for every command of the lane, none is lost; "
        "look at retries_total for why.",
        _BY_LANE,
        merge=max,
    ),
    gauge(
        "held_until_timestamp_seconds",
        "Unix time at which the gateway is called again while breaker or throttle hold all calls: the next probe, "
        "or the end of Retry-After. 0 while nothing holds.",
        merge=soonest,
    ),
    gauge(
        "clock_skew_seconds",
        "Our clock against the gateway's Date header. Beyond 30 either way: signatures may be refused, "
        "correct the host's time service.",
        merge=partial(max, key=abs),
    ),
    gauge(
        "certificate_expiry_timestamp_seconds",
        "Unix time at which a configured certificate ends, of a bundle the first to end; 0 with none set. Within two "
        "weeks: replace the file (GATEWAY_CERT_FILE, GATEWAY_CA_FILE, AMQP_CERT_FILE, AMQP_CA_FILE).",
        {"certificate": CERTIFICATES},
        merge=soonest,
    ),
    # -- the fleet
    gauge(
        "fleet_members",
        "Processes of this fleet that this process sees, itself included. Fewer than you run: some do not "
        "reach the broker or have another prefix or client id; run qris-expire fleet.",
        merge=max,
    ),
    gauge(
        "fleet_leader",
        "1 in the process that hands out permits and tokens. The sum over the fleet is 1; 0 or 2 for some minutes: "
        "the processes do not reach each other through the broker, run qris-expire fleet.",
    ),
    gauge(
        "member_sick",
        "1 while this process fails at the gateway and others succeed. It takes no commands and tests itself; "
        "look at its way out: DNS, egress rules, node.",
    ),
    gauge(
        "rate_limit",
        "Expire calls a second that the whole fleet may make; 0 for no limit. Unexpected: an operator set it "
        "(qris-expire fleet), or processes have different settings and the smallest applies.",
        merge=max,
    ),
    histogram(
        "rate_wait_seconds",
        "How long a sender waited for its permit under the rate limit. Rises: the limit is what bounds the throughput; "
        "agree on a higher one with the provider, more workers do not help.",
        buckets=RATE_WAIT_BUCKETS,
    ),
    # -- the broker
    gauge(
        "consumption_paused",
        "1 while nothing is taken from the queues for this reason. breaker and throttled end by themselves "
        "when the gateway recovers; broker_blocked: the broker is short of memory or disk; operator: qris-expire fleet "
        "tells who, and fleet resume ends it; sick: see member_sick.",
        {"reason": PAUSES},
        merge=max,
    ),
    gauge(
        "broker_connected",
        "1 while both connections to the broker stand. 0 for long: check AMQP_URL and the broker.",
        merge=min,
    ),
    counter(
        "broker_reconnects_total",
        "Connections to the broker made again after a loss. Rises steadily: network, broker restarts, or a "
        "blocked process that misses heartbeats.",
    ),
    histogram(
        "publish_confirm_seconds",
        "From publishing an outcome or dead letter to the broker's confirm; its command is held as long. "
        "Rises: the broker's disks or its quorum are slow.",
        buckets=CONFIRM_BUCKETS,
    ),
    gauge(
        "publishes_unconfirmed",
        "Messages published and not yet confirmed. Does not fall: the broker takes them but stores none, "
        "look at its alarms.",
    ),
    # -- the process
    gauge(
        "build_info",
        "Always 1; the version is the label. Two versions for long: a rollout is stuck.",
        {"version": ()},
        merge=max,
    ),
    gauge(
        "start_timestamp_seconds",
        "Unix time at which the process began; of several, the earliest. Moves unexpectedly: see the log.",
        merge=soonest,
    ),
)

FAMILY: Final = (
    gauge(
        "processes_running",
        "Worker processes under this parent. Below WORKER_PROCESSES for long: see the log.",
    ),
    counter(
        "process_restarts_total",
        "Worker processes started again after an unexpected end. Moves: see the log for why.",
    ),
)
"""What only the parent of WORKER_PROCESSES exports."""

BY_NAME: Final[Mapping[str, Metric]] = {metric.full_name: metric for metric in (*CATALOGUE, *FAMILY)}
"""By the name with its prefix."""
