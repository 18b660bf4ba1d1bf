"""Which metrics exist, and which ones a query asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

from worker.core.catalogue import FAMILY
from worker.shells.metrics import Metrics

FOREIGN: Final = frozenset(
    {
        "rabbitmq_detailed_queue_messages",
        "rabbitmq_detailed_queue_messages_ready",
        "rabbitmq_detailed_queue_messages_unacked",
        "rabbitmq_detailed_queue_consumers",
        "kube_cronjob_created",
        "kube_cronjob_status_last_schedule_time",
        "kube_cronjob_status_last_successful_time",
        "kube_deployment_spec_replicas",
        "kube_job_created",
        "kube_job_status_failed",
        "kube_job_status_succeeded",
        "kube_pod_container_status_restarts_total",
        "qris_expire_sweep_exit_code",
        "qris_expire_sweep_last_end_timestamp_seconds",
        "qris_expire_sweep_last_start_timestamp_seconds",
        "qris_expire_sweep_last_success_timestamp_seconds",
        "up",
        "ALERTS",
    }
)
"""RabbitMQ's /metrics/detailed with the two families that we ask for, kube-state-metrics', what the systemd unit of the
sweep writes (a test of the unit compares), and Prometheus' own."""


def exported() -> dict[str, dict[str, set[str]]]:
    """The worker's metrics: name → label → its values."""
    text = Metrics("1").render().decode()
    found: dict[str, dict[str, set[str]]] = {metric.full_name: {} for metric in FAMILY}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def selectors(expr: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Each (metric name, [(label, operator, value)]) that a query asks for."""
    for node in _nodes(promql_parser.parse(expr)):
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name or "", [(m.name, _OPERATORS[str(m.op)], m.value) for m in node.matchers.matchers]


_OPERATORS: Final = {"MatchOp.Equal": "=", "MatchOp.NotEqual": "!=", "MatchOp.Re": "=~", "MatchOp.NotRe": "!~"}


def counters(expr: str) -> Iterator[tuple[str, str | None, str]]:
    """Each counter in a query, the function that it is in, and that function's range as Grafana has it."""
    for found in re.finditer(r"(?:(\w+)\()?(\w+(?:_total|_bucket|_count|_sum))(?:{[^}]*})?(?:\[([^]]+)\])?", expr):
        yield found[2], found[1], found[3] or ""


def grouped(expr: str) -> set[str]:
    """The labels by which a query groups or joins."""
    return {label.strip() for by in re.findall(r"(?:by|on) \(([^)]+)\)", expr) for label in by.split(",")}


def wrong(expr: str, known: dict[str, dict[str, set[str]]]) -> Iterator[str]:
    """What a query asks for that nobody exports: names, labels, and values of closed sets."""
    for name, matchers in selectors(expr):
        if name in FOREIGN or name.startswith("job:"):
            continue
        if name not in known:
            yield f"nobody exports {name}"
            continue
        for label, operator, value in matchers:
            if label in ("namespace", "job", "pod"):
                continue
            values = known[name].get(label)
            if values is None:
                yield f"{name} has no label {label}"
            elif not any(_matches(operator, value, each) for each in values):
                yield f"{name} never has {label}{operator}{value}"


def _matches(operator: str, wanted: str, value: str) -> bool:
    found = bool(re.fullmatch(wanted, value)) if "~" in operator else wanted == value
    return found != operator.startswith("!")


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in _children(node):
        yield from _nodes(child)


def _children(node: Any) -> list[Any]:
    found = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector", "param")]
    return [child for child in [*found, *(getattr(node, "args", None) or [])] if child is not None]
