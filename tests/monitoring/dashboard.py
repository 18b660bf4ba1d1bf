"""The dashboard, from code: Grafana's JSON in `k8s/base/dashboard.json`.

Rows from the first question to the last: is it well, what waits, what came of it, the gateway, what is done about
failures, the broker, what people must deal with, how full it is, and a sweep in progress.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.monitoring.rules import PREFIX, ROOT, RUNBOOKS

MANIFEST: Final = ROOT / "k8s" / "base" / "dashboard.json"
OBJECTIVE: Final = 0.99

_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH: Final = 24
_JOB: Final = 'namespace=~"$namespace", job=~"$job", pod=~"$pod"'
_LANES: Final = 'queue=~"$prefix.(cancellation|sweep)"'
_RED, _AMBER, _GREEN, _PLAIN = "red", "orange", "green", "text"

Query = tuple[str, str]
"""PromQL and the legend of its series."""
Steps = tuple[tuple[float | None, str], ...]
"""From which value on which colour; the first has None."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `width` of 24 columns; `states` name the values of a state."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    width: int = 8
    kind: str = "timeseries"
    steps: Steps = ((None, _PLAIN),)
    states: Sequence[str] = ()
    stacked: bool = False
    stepped: bool = False
    minimum: float | None = 0.0

    @property
    def height(self) -> int:
        """In Grafana's units of 30 pixels."""
        return 4 if self.kind == "stat" else 8


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and its panels, which fill lines of 24 columns."""

    title: str
    panels: Sequence[Panel]


def _of(name: str, more: str = "") -> str:
    """The worker's metric, of the chosen jobs."""
    return f"qris_expire_{name}{{{_JOB}{', ' if more else ''}{more}}}"


def _rate(name: str, more: str = "") -> str:
    return f"rate({_of(name, more)}[$__rate_interval])"


def _queue(name: str, selector: str) -> str:
    """RabbitMQ's metric of queues of the chosen namespace."""
    return f'rabbitmq_detailed_queue_{name}{{namespace=~"$namespace", {selector}}}'


def _messages(pattern: str) -> str:
    """In queues with such a name, in consumers' hands or not."""
    return _queue("messages", f'queue=~"{pattern}"')


def _quantile(q: float, name: str, by: str = "", more: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) ({_rate(name + '_bucket', more)}))"


def _stat(title: str, description: str, unit: str, query: str, steps: Steps, *states: str, width: int = 3) -> Panel:
    return Panel(title, description, unit, [(query, title)], width, "stat", steps, states)


_IN_TIME: Final = 'lane="cancellation", le="1.0"'
_CANCELLATION: Final = 'lane="cancellation"'
_SWEEP: Final = 'lane="sweep"'
_SWEEP_EXPIRED: Final = 'lane="sweep", status="expired"'
_UNRESOLVED: Final = 'status="unresolved"'
_NOT_EXPIRED: Final = 'status!="expired"'
_EXPIRE: Final = 'operation="expire"'
_TOKEN: Final = 'operation="token"'
_LEFT: Final = f"sum({_messages('$prefix.sweep')}) + sum({_messages('$prefix.sweep.retry.+')})"
_CALLS: Final = f"sum({_rate('gateway_requests_total', _EXPIRE)})"
_THROTTLED: Final = 'reason="throttled"'
_OPERATOR: Final = 'reason="operator"'
_TIME_TO_EMPTY: Final = (
    f"sum by (lane) (max by (namespace, lane) ({_of('commands_waiting')}))"
    f" / (sum by (lane) ({_rate('outcomes_total')}) > 0)"
)
_SINCE_OLDEST: Final = (
    f"time() - min by (lane) ({_of('oldest_command_timestamp_seconds')} > 0)"
    f" or max by (lane) ({_of('oldest_command_timestamp_seconds')} * 0)"
)
_LATE: Final = (
    f"1 - sum({_rate('command_age_seconds_bucket', _IN_TIME)})"
    f" / sum({_rate('command_age_seconds_count', _CANCELLATION)})"
)
_TAKES: Final = (
    f"sum by (response_code) ({_rate('gateway_request_seconds_total', _EXPIRE)})"
    f" / (sum by (response_code) ({_rate('gateway_requests_total', _EXPIRE)}) > 0)"
)

ROWS: Final = (
    Row(
        "At a glance",
        [
            _stat(
                "Cancellations within 1 s",
                "Over the time range; the objective is 99 %. Below it: look at ages and at the gateway's latency.",
                "percentunit",
                f"sum(increase({_of('command_age_seconds_bucket', _IN_TIME)}[$__range]))"
                f" / sum(increase({_of('command_age_seconds_count', _CANCELLATION)}[$__range]))",
                ((None, _RED), (0.95, _AMBER), (OBJECTIVE, _GREEN)),
            ),
            _stat(
                "Outcomes per second",
                "Commands that end. Zero while commands wait: nothing moves.",
                "ops",
                f"sum({_rate('outcomes_total')})",
                ((None, _PLAIN),),
            ),
            _stat(
                "Commands waiting",
                "Ready in both lanes, in no worker's hands. A sweep waits here by nature; cancellations should not.",
                "short",
                f"sum(max by (namespace, lane) ({_of('commands_waiting')}))",
                ((None, _PLAIN),),
            ),
            _stat(
                "Oldest cancellation",
                "Since when the oldest cancellation in hand has been waiting. An alert fires at two minutes.",
                "s",
                f"time() - min({_of('oldest_command_timestamp_seconds', _CANCELLATION)} > 0) or vector(0)",
                ((None, _GREEN), (10, _AMBER), (120, _RED)),
            ),
            _stat(
                "Breaker",
                "Open: the gateway fails for every command of a lane; none is lost, all wait. The worse of both lanes.",
                "none",
                f"max({_of('breaker_state')})",
                ((None, _GREEN), (1, _AMBER), (2, _RED)),
                "closed",
                "half-open",
                "open",
            ),
            _stat(
                "Consumption",
                "Paused: nothing is taken from the queues, for whatever reason. The worst of all processes.",
                "none",
                f"max({_of('consumption_paused')})",
                ((None, _GREEN), (1, _RED)),
                "runs",
                "paused",
            ),
            _stat(
                "Dead letters",
                "Parked for people: qris-expire dead list.",
                "short",
                f"sum({_messages('$prefix.dead')})",
                ((None, _GREEN), (1, _AMBER)),
            ),
            _stat(
                "Unresolved",
                "Share of the outcomes, over the chosen time range, that the worker gave up. An alert fires at 5 %.",
                "percentunit",
                f"sum(increase({_of('outcomes_total', _UNRESOLVED)}[$__range]))"
                f" / sum(increase({_of('outcomes_total')}[$__range]))",
                ((None, _GREEN), (0.01, _AMBER), (0.05, _RED)),
            ),
        ],
    ),
    Row(
        "Lanes and ages",
        [
            Panel(
                "Commands waiting",
                "Ready in the queue of each lane, as the broker says. Rises steadily: more come than end.",
                "short",
                [(f"sum by (queue) ({_queue('messages_ready', _LANES)})", "{{queue}}")],
            ),
            Panel(
                "Time to empty",
                "Commands waiting over the rate of outcomes. Alerts at 1 min for cancellations, 3 h for the sweep. "
                "Needs no timestamp. Nothing is drawn while no command ends.",
                "s",
                [(_TIME_TO_EMPTY, "{{lane}}")],
            ),
            Panel(
                "Commands in, outcomes out",
                "First deliveries and ends, a second. Apart for long: commands wait in delayed rounds or in hand.",
                "ops",
                [
                    (f"sum by (lane) ({_rate('commands_total')})", "{{lane}} in"),
                    (f"sum by (lane) ({_rate('outcomes_total')})", "{{lane}} out"),
                ],
            ),
            Panel(
                "Commands without a timestamp",
                "A second. Their age counts from the first delivery and does not show the time in the queue: ask the "
                "producer.",
                "ops",
                [(f"sum by (lane) ({_rate('commands_undated_total')})", "{{lane}}")],
            ),
            Panel(
                "Waiting for a delayed round",
                "In the retry queues: what the gateway did not settle in one round waits here for its next.",
                "short",
                [
                    (
                        f"sum by (queue) ({_messages('$prefix.+retry.+')})",
                        "{{queue}}",
                    )
                ],
            ),
            Panel(
                "Age at the outcome: cancellations",
                "From publication to outcome: what the producer waits. The objective: 99 % within 1 s.",
                "s",
                [
                    (_quantile(0.5, "command_age_seconds", more=_CANCELLATION), "half within"),
                    (_quantile(0.95, "command_age_seconds", more=_CANCELLATION), "95 % within"),
                    (_quantile(0.99, "command_age_seconds", more=_CANCELLATION), "99 % within"),
                ],
                steps=((None, _PLAIN), (1, _RED)),
            ),
            Panel(
                "Age at the outcome: sweep",
                "From publication to outcome. A sweep is published at once, so its last bill is as old as the sweep.",
                "s",
                [
                    (_quantile(0.5, "command_age_seconds", more=_SWEEP), "half within"),
                    (_quantile(0.99, "command_age_seconds", more=_SWEEP), "99 % within"),
                ],
            ),
            Panel(
                "Oldest command in hand",
                "Since its publication; not in delayed rounds. A sweep is published at once: its ramp is no fault.",
                "s",
                [
                    (_SINCE_OLDEST, "{{lane}}"),
                ],
                width=16,
            ),
        ],
    ),
    Row(
        "The fleet",
        [
            Panel(
                "Calls per second of the allowed",
                "Share of the fleet's rate limit that is used. Near 100 % with a backlog: the limit bounds the work, "
                "and more workers do not help. Nothing is drawn without a limit.",
                "percentunit",
                [(f"{_CALLS} / (max({_of('rate_limit')}) > 0)", "used")],
                steps=((None, _PLAIN), (1, _AMBER)),
            ),
            Panel(
                "Calls per second and the limit",
                "Expire calls of all members, and what they may make together; 0 stands for no limit.",
                "ops",
                [(_CALLS, "calls"), (f"max({_of('rate_limit')})", "allowed")],
            ),
            Panel(
                "Wait for the rate limit",
                "How long a sender waits for its permit. Grows: the limit bounds the work.",
                "s",
                [
                    (_quantile(0.5, "rate_wait_seconds"), "half within"),
                    (_quantile(0.99, "rate_wait_seconds"), "99 % within"),
                ],
            ),
            Panel(
                "Members",
                "Processes of the fleet as they see each other, and leaders: one. Sick: fails while others succeed.",
                "short",
                [
                    (f"max({_of('fleet_members')})", "members"),
                    (f"sum({_of('fleet_leader')})", "leaders"),
                    (f"sum({_of('member_sick')})", "sick"),
                ],
                stepped=True,
            ),
            Panel(
                "Throttled answers",
                'Share of the expire calls that the gateway answers with "too many requests". 5 %: ticket, 50 %: page.',
                "percentunit",
                [(f"sum({_rate('retries_total', _THROTTLED)}) / ({_CALLS} > 0)", "throttled")],
                steps=((None, _PLAIN), (0.05, _AMBER), (0.5, _RED)),
            ),
            Panel(
                "Paused by an operator",
                "Processes that pause because an operator said so: qris-expire fleet tells who and why.",
                "short",
                [(f"sum({_of('consumption_paused', _OPERATOR)})", "processes")],
                stepped=True,
            ),
        ],
    ),
    Row(
        "By pod",
        [
            Panel(
                "Outcomes by pod",
                "Where work is done, there are outcomes. One pod without any: look at it.",
                "ops",
                [(f"sum by (pod, instance) ({_rate('outcomes_total')})", "{{pod}} {{instance}}")],
                width=6,
                stacked=True,
            ),
            Panel(
                "Not connected or sick, by pod",
                "1: the pod has no broker. 2: it fails at the gateway while others succeed.",
                "short",
                [
                    (
                        (
                            f"sum by (pod, instance) (1 - {_of('broker_connected')})"
                            f" + 2 * sum by (pod, instance) ({_of('member_sick')})"
                        ),
                        "{{pod}} {{instance}}",
                    )
                ],
                width=6,
                stepped=True,
            ),
            Panel(
                "Up for, by pod",
                "Since the process began. Falls to zero again and again: a crash loop.",
                "s",
                [(f"time() - min by (pod, instance) ({_of('start_timestamp_seconds')} > 0)", "{{pod}} {{instance}}")],
                width=6,
            ),
            Panel(
                "Failed calls by pod",
                "Attempts that had to be made again, a second. One pod far above the others: its way out.",
                "ops",
                [(f"sum by (pod, instance) ({_rate('retries_total')})", "{{pod}} {{instance}}")],
                width=6,
            ),
        ],
    ),
    Row(
        "Outcomes by reason",
        [
            Panel(
                "Outcomes by status",
                "expired: done. rejected: the gateway's final answer. unresolved and invalid: in the dead letters.",
                "ops",
                [(f"sum by (status) ({_rate('outcomes_total')})", "{{status}}")],
                stacked=True,
            ),
            Panel(
                "Outcomes that did not expire, by reason",
                "The README's table says what each reason means.",
                "ops",
                [
                    (
                        f"sum by (status, reason) ({_rate('outcomes_total', _NOT_EXPIRED)}) > 0",
                        "{{status}}: {{reason}}",
                    )
                ],
                stacked=True,
            ),
            Panel(
                "Share of cancellations later than 1 s",
                "The budget is 1 %. At 14.4 times that over an hour, or 6 times over six hours, an alert pages.",
                "percentunit",
                [
                    (_LATE, "late"),
                ],
                steps=((None, _PLAIN), (0.01, _RED)),
            ),
        ],
    ),
    Row(
        "Gateway",
        [
            Panel(
                "Latency of an expire call",
                "From sending to the whole answer, or to giving up. Near GATEWAY_READ_TIMEOUT_SECONDS: effects become "
                "unknown.",
                "s",
                [
                    (_quantile(0.5, "gateway_request_duration_seconds", more=_EXPIRE), "half within"),
                    (_quantile(0.95, "gateway_request_duration_seconds", more=_EXPIRE), "95 % within"),
                    (_quantile(0.99, "gateway_request_duration_seconds", more=_EXPIRE), "99 % within"),
                ],
                width=6,
            ),
            Panel(
                "Latency by response code",
                "What an expire call that is answered with this code takes on average. none: what it takes until there "
                "is no answer.",
                "s",
                [(_TAKES, "{{response_code}}")],
                width=6,
            ),
            Panel(
                "Answers by response code",
                "20093xx: done. 40193xx: signature or token. 4299300: throttled. 5xx and none: the gateway, or the way "
                "to it. other: a code that is not listed.",
                "ops",
                [
                    (
                        f"sum by (response_code) ({_rate('gateway_requests_total', _EXPIRE)}) > 0",
                        "{{response_code}}",
                    )
                ],
                width=6,
                stacked=True,
            ),
            Panel(
                "Token service: answers in the time range",
                "By response code. It is asked once for each token.",
                "short",
                [
                    (
                        f"sum by (response_code) (increase({_of('gateway_requests_total', _TOKEN)}[$__range])) > 0",
                        "{{response_code}}",
                    ),
                ],
                width=6,
            ),
        ],
    ),
    Row(
        "Retries, breaker, token",
        [
            Panel(
                "Calls sent again, by reason",
                "transient: the gateway or the way to it. systemic: credentials or set-up. token: tokens die early. "
                "id_clash: external ids repeat. throttled: see the row The fleet.",
                "ops",
                [(f"sum by (reason) ({_rate('retries_total')})", "{{reason}}")],
                stacked=True,
            ),
            Panel(
                "Delayed rounds begun",
                "Commands that a whole round of attempts did not settle: they wait in the broker for the next.",
                "ops",
                [(f"sum by (lane) ({_rate('delayed_retries_total')})", "{{lane}}")],
            ),
            Panel(
                "Breaker",
                "0 closed, 1 half-open (a probe is out), 2 open, for each lane of the fleet.",
                "none",
                [(f"max by (lane) ({_of('breaker_state')})", "{{lane}}")],
                stepped=True,
                states=("closed", "half-open", "open"),
            ),
            Panel(
                "Processes that pause, by reason",
                "breaker and throttled end by themselves; broker_blocked: the broker is short of memory or disk; "
                "operator: somebody paused the fleet.",
                "short",
                [(f"sum by (reason) ({_of('consumption_paused')})", "{{reason}}")],
                stepped=True,
            ),
            Panel(
                "Token: time left",
                "Of the token that ends first. It is renewed before its end; below zero: renewing fails (or the worker "
                "has nothing to do).",
                "s",
                [(f"min({_of('token_expiry_timestamp_seconds')} > 0) - time()", "left")],
                width=4,
                minimum=None,
                steps=((None, _RED), (0, _PLAIN)),
            ),
            Panel(
                "Token requests",
                "By result, in the time range. refused: client id, key or its registration; error: out of reach.",
                "short",
                [(f"sum by (result) (increase({_of('token_refreshes_total')}[$__range]))", "{{result}}")],
                width=4,
            ),
            Panel(
                "Clock",
                "Our clock against the gateway's, the worst of all. Beyond 30 s either way signatures may be refused.",
                "s",
                [
                    (f"max({_of('clock_skew_seconds')})", "most ahead"),
                    (f"min({_of('clock_skew_seconds')})", "most behind"),
                ],
                minimum=None,
            ),
        ],
    ),
    Row(
        "Confirms and broker",
        [
            Panel(
                "Publish to confirm",
                "An outcome's way to the broker's disks; the command stays unacked as long. Rises: disks or quorum.",
                "s",
                [
                    (_quantile(0.5, "publish_confirm_seconds"), "half within"),
                    (_quantile(0.99, "publish_confirm_seconds"), "99 % within"),
                ],
            ),
            Panel(
                "Publishes unconfirmed",
                "Does not fall: the broker takes messages and stores none.",
                "short",
                [(f"sum({_of('publishes_unconfirmed')})", "unconfirmed")],
            ),
            Panel(
                "Acks and outcomes",
                "Every ack follows an outcome, a delayed round or a way back. Apart without a pause: a fault.",
                "ops",
                [
                    (f"sum({_rate('acks_total')})", "acks"),
                    (f"sum({_rate('outcomes_total')}) + sum({_rate('delayed_retries_total')})", "outcomes and delayed"),
                ],
            ),
            Panel(
                "Workers without the broker",
                "Scraped, and one of their two connections is down. For long: check AMQP_URL and the broker.",
                "short",
                [(f"count({_of('broker_connected')}) - sum({_of('broker_connected')})", "disconnected")],
                stepped=True,
            ),
            Panel(
                "Reconnects",
                "Connections made again, in the time range. Many: network, broker restarts, a starved process.",
                "short",
                [(f"sum(increase({_of('broker_reconnects_total')}[$__range]))", "reconnects")],
            ),
            Panel(
                "Consumers of the lanes",
                "One a process. 0 with commands waiting: nobody takes them.",
                "short",
                [(f"sum by (queue) ({_queue('consumers', _LANES)})", "{{queue}}")],
                stepped=True,
            ),
        ],
    ),
    Row(
        "Dead letters",
        [
            Panel(
                "Parked, by reason",
                "In the time range, by the workers. The broker's own (50 deliveries) are in no count of theirs.",
                "short",
                [
                    (
                        f"sum by (reason) (increase({_of('dead_letters_total')}[$__range])) > 0",
                        "{{reason}}",
                    )
                ],
                width=12,
                stacked=True,
            ),
            Panel(
                "Waiting for people",
                "dead: qris-expire dead list. outcomes.unrouted: outcomes that nobody's queue is bound for.",
                "short",
                [
                    (
                        f"sum by (queue) ({_messages('$prefix.(dead|outcomes.unrouted)')})",
                        "{{queue}}",
                    )
                ],
                width=12,
            ),
        ],
    ),
    Row(
        "Saturation",
        [
            Panel(
                "Senders in use",
                "Share of WORKER_CONCURRENCY that is in flight. At 100 % with a backlog: add concurrency or processes, "
                "but never while the gateway fails or throttles, or at the rate limit (row The fleet).",
                "percentunit",
                [
                    (f"sum by (lane) ({_of('in_flight')}) / on () group_left sum({_of('senders')})", "{{lane}}"),
                ],
                stacked=True,
            ),
            Panel(
                "Delivery to ack",
                "99 % within; backoff and confirm included. Longer than the gateway's latency: retries.",
                "s",
                [(_quantile(0.99, "command_duration_seconds", "lane"), "{{lane}}")],
            ),
            Panel(
                "Unacked at the broker",
                "In workers' hands: at most twice WORKER_CONCURRENCY for each process and lane.",
                "short",
                [(f"sum by (queue) ({_queue('messages_unacked', _LANES)})", "{{queue}}")],
            ),
            Panel(
                "Worker processes",
                "One for each endpoint, or as many as run under it (WORKER_PROCESSES), and how many of those were "
                "started again in the time range.",
                "short",
                [
                    (f"sum({_of('processes_running')} or on (job, instance) {_of('build_info')})", "processes"),
                    (f"sum(increase({_of('process_restarts_total')}[$__range]))", "started again"),
                ],
                width=12,
                stepped=True,
            ),
            Panel(
                "Versions",
                "Workers of each version. Two of them for long: a rollout is stuck.",
                "short",
                [(f"count by (version) ({_of('build_info')})", "{{version}}")],
                width=12,
                stepped=True,
            ),
        ],
    ),
    Row(
        "A sweep in progress",
        [
            _stat(
                "Bills left",
                "In the sweep's queue, in hand, and waiting for delayed rounds.",
                "short",
                _LEFT,
                ((None, _PLAIN),),
                width=4,
            ),
            _stat(
                "Bills a second",
                "Outcomes of the sweep lane.",
                "ops",
                f"sum({_rate('outcomes_total', _SWEEP)})",
                ((None, _PLAIN),),
                width=4,
            ),
            _stat(
                "Time left",
                "Bills left at the present rate; longer if delayed rounds wait. Nothing while the sweep stands still.",
                "s",
                f"({_LEFT}) / (sum({_rate('outcomes_total', _SWEEP)}) > 0)",
                ((None, _PLAIN),),
                width=4,
            ),
            _stat(
                "Ended",
                "About so many outcomes of the sweep lane in the chosen time range; exactly: qris-expire status.",
                "short",
                f"sum(increase({_of('outcomes_total', _SWEEP)}[$__range]))",
                ((None, _PLAIN),),
                width=4,
            ),
            _stat(
                "Expired of these",
                "Share of the sweep's outcomes in the time range; the rest is in `qris-expire status BATCH`.",
                "percentunit",
                f"sum(increase({_of('outcomes_total', _SWEEP_EXPIRED)}[$__range]))"
                f" / sum(increase({_of('outcomes_total', _SWEEP)}[$__range]))",
                ((None, _RED), (0.9, _AMBER), (0.99, _GREEN)),
                width=4,
            ),
            _stat(
                "Cancellations meanwhile",
                "99 % within: a sweep must not make them wait.",
                "s",
                _quantile(0.99, "command_age_seconds", more=_CANCELLATION),
                ((None, _GREEN), (1, _AMBER), (10, _RED)),
                width=4,
            ),
            Panel(
                "Bills left",
                "It should fall like a straight line. Flat: look at the breaker, at pauses and at consumers.",
                "short",
                [
                    (f"sum({_messages('$prefix.sweep')})", "in the lane"),
                    (
                        f"sum({_messages('$prefix.sweep.retry.+')})",
                        "in delayed rounds",
                    ),
                ],
                width=12,
                stacked=True,
            ),
            Panel(
                "The sweep's outcomes",
                "A second, by status and reason.",
                "ops",
                [(f"sum by (status, reason) ({_rate('outcomes_total', _SWEEP)}) > 0", "{{status}}: {{reason}}")],
                width=12,
                stacked=True,
            ),
        ],
    ),
)


def panels() -> Iterator[Panel]:
    """All panels, in order."""
    for row in ROWS:
        yield from row.panels


def dashboard(prefix: str = PREFIX, runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """Grafana's model of it."""
    return {
        "uid": "qris-expire-worker",
        "title": "QRIS expire worker",
        "description": "Commands to expire QRIS codes: what waits, what came of them, and what keeps them.",
        "tags": ["qris-expire", "rabbitmq"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "schemaVersion": 39,
        "version": 1,
        "annotations": {"list": [_annotation(*each) for each in ANNOTATIONS]},
        "links": [
            {
                "title": "Runbook",
                "type": "link",
                "icon": "doc",
                "url": runbooks,
                "tooltip": "What to do, a section for each alert",
                "asDropdown": False,
                "includeVars": False,
                "keepTime": False,
                "tags": [],
                "targetBlank": True,
            }
        ],
        "templating": {"list": _variables(prefix)},
        "panels": list(_placed()),
    }


def text(prefix: str = PREFIX, runbooks: str = RUNBOOKS) -> str:
    """The file."""
    return json.dumps(dashboard(prefix, runbooks), indent=1, ensure_ascii=False) + "\n"


def write(path: Path = MANIFEST, prefix: str = PREFIX, runbooks: str = RUNBOOKS) -> None:
    """Makes the file again."""
    path.write_text(text(prefix, runbooks))


ANNOTATIONS: Final = (
    (
        "Breaker opened",
        _RED,
        (
            f"max by (namespace, lane) ({_of('breaker_state')}) > 1"
            f" unless max by (namespace, lane) ({_of('breaker_state')} offset 1m) > 1"
        ),
        "{{namespace}} {{lane}}",
    ),
    (
        "Leader changed",
        "blue",
        f"{_of('fleet_leader')} > 0 unless {_of('fleet_leader')} offset 1m > 0",
        "{{namespace}} {{pod}} {{instance}} leads now",
    ),
    (
        "Rollout",
        "purple",
        (
            f"count by (namespace, version) ({_of('build_info')})"
            f" unless count by (namespace, version) ({_of('build_info')} offset 5m)"
        ),
        "{{namespace}} version {{version}}",
    ),
)
"""Name, colour, query (a mark where it has a value), text."""


def _annotation(name: str, colour: str, expr: str, title: str) -> dict[str, Any]:
    return {
        "name": name,
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": colour,
        "expr": expr,
        "step": "1m",
        "titleFormat": name,
        "textFormat": title,
    }


def _variables(prefix: str) -> list[dict[str, Any]]:
    return [
        {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"},
        _of_workers("namespace", "Namespace", "qris_expire_build_info"),
        _of_workers("job", "Workers", 'qris_expire_build_info{namespace=~"$namespace"}'),
        _of_workers("pod", "Pod", 'qris_expire_build_info{namespace=~"$namespace", job=~"$job"}'),
        {
            "type": "textbox",
            "name": "prefix",
            "label": "AMQP_PREFIX",
            "query": prefix,
            "current": {"text": prefix, "value": prefix},
        },
    ]


def _of_workers(name: str, label: str, of: str) -> dict[str, Any]:
    """A choice among the values of a label; "All" fits also where nobody has the label, as without Kubernetes."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": _SOURCE,
        "query": f"label_values({of}, {name})",
        "definition": f"label_values({of}, {name})",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _placed() -> Iterator[dict[str, Any]]:
    number, y = 1, 0
    for row in ROWS:
        yield {
            "type": "row",
            "id": number,
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1},
            "panels": [],
        }
        number, y = number + 1, y + 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > _WIDTH or (height and panel.height != height):
                x, y = 0, y + height
            height = panel.height
            yield {"id": number, "gridPos": {"x": x, "y": y, "w": panel.width, "h": height}, **_panel(panel)}
            number, x = number + 1, x + panel.width
        y += height


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "expr": expr,
                "legendFormat": legend,
                **({"instant": True} if panel.kind == "stat" else {"range": True}),
            }
            for number, (expr, legend) in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _STAT if panel.kind == "stat" else _TIMESERIES,
    }


_STAT: Final = {
    "colorMode": "value",
    "graphMode": "none",
    "textMode": "value",
    "justifyMode": "auto",
    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
}
_TIMESERIES: Final = {
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
    "tooltip": {"mode": "multi", "sort": "desc"},
}


def _defaults(panel: Panel) -> dict[str, Any]:
    steps = [{"value": value, "color": colour} for value, colour in panel.steps]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
        "mappings": [],
    }
    if panel.minimum is not None:
        defaults["min"] = panel.minimum
    if panel.states:
        named = {str(number): {"text": name, "index": number} for number, name in enumerate(panel.states)}
        defaults["mappings"] = [{"type": "value", "options": named}]
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "lineInterpolation": "stepAfter" if panel.stepped else "linear",
            "fillOpacity": 30 if panel.stacked else 5,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if len(panel.steps) > 1 else "off"},
            "showPoints": "never",
        }
    return defaults
