"""For every alert a case in which it fires and one in which it keeps silent, as `promtool test rules` runs them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from tests.monitoring.rules import alerts, read

JOB: Final = "shop/qris-expire"
WORKER: Final = {"namespace": "shop", "job": JOB}
ONE: Final = {**WORKER, "pod": "qris-expire-1", "instance": "10.0.0.1:9108"}
OTHER: Final = {**WORKER, "pod": "qris-expire-2", "instance": "10.0.0.2:9108"}
FIVE: Final = tuple(
    {**WORKER, "pod": f"qris-expire-{number}", "instance": f"10.0.0.{number}:9108"} for number in range(1, 6)
)
STAGING: Final = {
    "namespace": "staging", "job": "staging/qris-expire", "pod": "qris-expire-9", "instance": "10.0.9.1:9108",
}  # fmt: skip
BROKER: Final = {"namespace": "shop", "job": "rabbitmq/detailed", "vhost": "/"}
CRONJOB: Final = {"namespace": "shop", "cronjob": "qris-expire-sweep"}

Labels = dict[str, str]


@dataclass(frozen=True, slots=True)
class Case:
    """Series from minute 0 on, in promtool's notation, and whether the alert fires `at`; `also` for another lane.

    `fires` are the labels of the firing alert besides its name and severity; None: it is silent. `summary` is the
    text that people get. The series have a sample every `step`, and so often the rules are evaluated: a case of days
    need not take a sample a minute.
    """

    alert: str
    why: str
    series: dict[str, str]
    at: str
    fires: Labels | None = None
    summary: str = ""
    step: str = "1m"
    also: tuple[Labels, str] | None = None


def series(name: str, labels: Labels, **more: str) -> str:
    """A series as Prometheus writes it."""
    inner = ", ".join(f'{key}="{value}"' for key, value in {**labels, **more}.items())
    return f"{name}{{{inner}}}"


def worker(name: str, labels: Labels = ONE, **more: str) -> str:
    """One of the worker's series."""
    return series(f"qris_expire_{name}", labels, **more)


def queue(name: str, queue: str) -> str:
    """One of RabbitMQ's detailed series."""
    return series(f"rabbitmq_detailed_queue_{name}", BROKER, queue=f"qris.expire.{queue}")


def ages(in_time: str, all_: str, *, worked: str | None = None) -> dict[str, str]:
    """Cancellations that ended within a second of their timestamp, and all that ended; `worked` within a second of
    their delivery: as many, since the time is spent in the worker's hands."""
    lane = {"lane": "cancellation"}
    return {
        worker("command_age_seconds_bucket", ONE, **lane, le="1.0"): in_time,
        worker("command_age_seconds_count", ONE, **lane): all_,
        worker("command_duration_seconds_bucket", ONE, **lane, le="1.0"): worked or in_time,
        worker("command_duration_seconds_count", ONE, **lane): all_,
    }


def waiting(values: str, lane: str = "cancellation", labels: Labels = ONE) -> dict[str, str]:
    """Commands that wait in a lane, as the broker reports them to the workers."""
    return {worker("commands_waiting", labels, lane=lane): values}


def ended(values: str, lane: str = "cancellation") -> dict[str, str]:
    """Commands that ended, all of them expired."""
    return {worker("outcomes_total", ONE, lane=lane, status="expired", reason="success"): values}


def there(*workers: Labels, values: str = "1x60") -> dict[str, str]:
    """These workers are scraped."""
    return {worker("build_info", labels, version="1"): values for labels in workers}


def calls(values: str, throttled: str) -> dict[str, str]:
    """Expire calls, and those of them that the gateway answered with "too many requests"."""
    return {
        worker("gateway_requests_total", ONE, operation="expire", response_code="2009300"): values,
        worker("retries_total", ONE, reason="throttled"): throttled,
    }


def breaker(values: str, lane: str = "cancellation") -> dict[str, str]:
    """The fleet's breaker of a lane, which all members report."""
    return {worker("breaker_state", labels, lane=lane): values for labels in (ONE, OTHER)}


def outcomes(values: str, status: str = "expired", reason: str = "success", labels: Labels = ONE) -> dict[str, str]:
    """Outcomes of the cancellation lane."""
    return {worker("outcomes_total", labels, lane="cancellation", status=status, reason=reason): values}


def cronjob(what: str, values: str) -> dict[str, str]:
    """What kube-state-metrics says about the sweep; values are minutes since 0 in seconds."""
    return {series(f"kube_cronjob_status_{what}_time", CRONJOB): values}


def flow(acks: str, told: str, delayed: str, paused: str) -> dict[str, str]:
    """Acks of one worker, and what it published before them; the other one is healthy."""
    return {
        worker("acks_total", ONE, lane="sweep"): acks,
        worker("delayed_retries_total", ONE, lane="sweep"): delayed,
        worker("consumption_paused", ONE, reason="breaker"): paused,
        **outcomes(told),
        worker("acks_total", OTHER, lane="sweep"): "0+60x60",
        worker("delayed_retries_total", OTHER, lane="sweep"): "0x60",
        worker("consumption_paused", OTHER, reason="breaker"): "0x60",
        **outcomes("0+60x60", labels=OTHER),
    }


def wanted(values: str) -> dict[str, str]:
    """So many replicas does the Deployment ask for, as kube-state-metrics reports."""
    return {series("kube_deployment_spec_replicas", {"namespace": "shop", "deployment": "qris-expire"}): values}


JOB_OF_THE_SWEEP: Final = {"namespace": "shop", "job_name": "qris-expire-sweep-29401025"}
HOST: Final = {"instance": "sweeper:9100"}


def job(what: str, values: str) -> dict[str, str]:
    """What kube-state-metrics says about one Job of the sweep."""
    return {series(f"kube_job_{what}", JOB_OF_THE_SWEEP): values}


def unit(what: str) -> str:
    """What the systemd unit of the sweep writes for the node exporter."""
    return series(f"qris_expire_sweep_{what}", HOST)


POD: Final = {"namespace": "shop", "pod": "qris-expire-1", "container": "worker"}

NOBODY_CONSUMES: Final = {queue("messages_ready", "sweep"): "7x20", queue("consumers", "sweep"): "0x20"}
"""Commands of the sweep wait, and nobody takes them."""

UNCONFIRMED: Final = {
    worker("publishes_unconfirmed", ONE): "0x5 12x30",
    worker("publish_confirm_seconds_count", ONE): "0+60x5 300x30",
    worker("publishes_unconfirmed", OTHER): "3x35",
    worker("publish_confirm_seconds_count", OTHER): "0+60x35",
}
"""One of two workers gets no confirms."""

REPEATED: Final = {
    worker("delayed_retries_total", ONE, lane="cancellation"): "0+20x144",
    worker("outcomes_total", ONE, lane="cancellation", status="expired", reason="success"): "0+200x144",
}
"""Every tenth cancellation begins a delayed round, for days."""

OUTAGE: Final = {
    # Ten minutes of work, fifty of an outage; then the backlog of 15,000 drains for 25 minutes.
    **there(ONE, values="1x130"),
    **breaker("0x10 2x49 0x70"),
    **waiting("0x10 0+300x50 15000-600x24 0x50"),
    **ended("0+300x10 3000x49 3000+900x24 25500+300x50"),
    **ages("0+300x10 3000x49 3000x24 3300+300x50", "0+300x10 3000x49 3000+900x24 25500+300x50"),
    worker("oldest_command_timestamp_seconds", ONE, lane="cancellation"): "0+60x10 600x49 600+180x24 5400+60x50",
}
"""An outage that pages, and what follows from it."""

SWEEP_OUTAGE: Final = {
    # From minute 10 to 60 every command of the sweep fails. Cancellations are slow from minute 20 on, by themselves.
    **there(ONE, values="1x130"),
    **breaker("0x130"),
    **breaker("0x10 2x49 0x70", "sweep"),
    **waiting("300000x60 300000-4800x60", "sweep"),
    **ended("0+4800x10 48000x49 48000+4800x70", "sweep"),
    **waiting("0x20 0+300x109"),
    **ended("0+300x130"),
    **ages("0+300x20 6000x109", "0+300x130"),
    worker("oldest_command_timestamp_seconds", ONE, lane="cancellation"): "0+60x20 1200x109",
}
"""The gateway fails for the sweep alone, and cancellations have trouble of their own."""

CLOCK: Final = {
    **there(ONE, values="1x130"),
    **ages("0x130", "0+60x130", worked="0+60x130"),
    **waiting("0x130"),
    **ended("0+60x130"),
    worker("oldest_command_timestamp_seconds", ONE, lane="cancellation"): "-3600+60x130",
}
"""A producer's clock is behind; the queue is empty, the worker quick."""

CASES: Final = (
    Case(
        "QrisExpireObjectiveBurnsFast",
        "four fifths of the cancellations are late, for twenty minutes",
        ages("0+60x60 3612+12x19", "0+60x80"),
        "80m",
        WORKER,
        "26.67% of the cancellations of the last hour took longer than 1 s",
    ),
    Case(
        "QrisExpireObjectiveBurnsFast",
        "one cancellation a minute, and twenty late ones in a row: few, and enough",
        ages("0+1x60 60x20", "0+1x80"),
        "80m",
        WORKER,
        "33.33% of the cancellations of the last hour took longer than 1 s",
    ),
    Case(
        "QrisExpireObjectiveBurnsFast",
        "every fifth is late, for an hour",
        ages("0+48x80", "0+60x80"),
        "80m",
        WORKER,
        "20% of the cancellations of the last hour took longer than 1 s",
    ),
    Case(
        "QrisExpireObjectiveBurnsFast",
        "four fifths are late, for eight minutes: a tenth of the hour",
        ages("0+60x60 3612+12x7", "0+60x68"),
        "68m",
    ),
    Case(
        "QrisExpireObjectiveBurnsFast",
        "it was bad for twenty minutes, and is better now",
        ages("0+60x60 3612+12x19 3894+54x9", "0+60x90"),
        "90m",
    ),
    Case(
        "QrisExpireObjectiveBurnsFast",
        "six slow commands in a quiet night, and no others",
        ages("0x80", "0x60 1 2 3 4 5 6x15"),
        "66m",
    ),
    Case(
        "QrisExpireObjectiveBurns",
        "every tenth cancellation has been late for six hours",
        ages("0+18x80", "0+20x80"),
        "380m",
        WORKER,
        "10% of the cancellations of the last 6 hours took longer than 1 s",
        "5m",
    ),
    Case(
        "QrisExpireObjectiveBurns",
        "it began twenty minutes ago",
        ages("0+60x72 4350+30x3", "0+60x80"),
        "380m",
        step="5m",
    ),
    Case(
        "QrisExpireObjectiveBurns",
        "it was bad for hours, and is better now",
        ages("0+500x70 35960+960x9", "0+1000x80"),
        "380m",
        step="5m",
    ),
    Case(
        "QrisExpireObjectiveBurns",
        "six commands an hour, all of them late",
        ages("0x90", " ".join(f"{n}x1" for n in range(45))),
        "380m",
        step="5m",
    ),
    Case(
        "QrisExpireObjectiveBurnsSlowly",
        "one of fifty has been late for ten hours",
        ages("0+49x150", "0+50x150"),
        "10h",
        WORKER,
        "2% of the cancellations of the last 3 days took longer than 1 s",
        "5m",
    ),
    Case(
        "QrisExpireObjectiveBurnsSlowly",
        "for half an hour",
        ages("0+49x30", "0+50x30"),
        "30m",
        step="5m",
    ),
    Case("QrisExpireObjectiveBurnsSlowly", "the backlog of an outage is gone", OUTAGE, "125m"),
    Case(
        "QrisExpireObjectiveBurnsSlowly",
        "it was so for two days, and is within the objective now",
        {**ages("0+196x120 23719+199x23", "0+200x144"), **REPEATED},
        "72h",
        step="30m",
    ),
    Case(
        "QrisExpireObjectiveBurnsSlowly",
        "a bad morning after two good days",
        {**ages("0+200x132 26590+190x11", "0+200x144"), **REPEATED},
        "72h",
        step="30m",
    ),
    Case(
        "QrisExpireWorkerAbsent",
        "nothing is scraped",
        {series("up", ONE): "0x20"},
        "6m",
        {"namespace": "shop"},
        "No worker is being scraped in shop",
    ),
    Case(
        "QrisExpireWorkerAbsent",
        "nothing is known of any worker",
        {series("up", BROKER): "1x20"},
        "6m",
        {},
        "No worker is being scraped in ",
    ),
    Case(
        "QrisExpireWorkerAbsent",
        "production is gone, staging runs in the same Prometheus",
        {**there(STAGING), **there(ONE, values="1x5 stale _x60")},
        "12m",
        {"namespace": "shop"},
        "No worker is being scraped in shop",
    ),
    Case(
        "QrisExpireWorkerAbsent",
        "the Deployment wants workers and none was ever scraped; staging runs",
        {**there(STAGING), **wanted("5x20")},
        "6m",
        {"namespace": "shop"},
        "No worker is being scraped in shop",
    ),
    Case("QrisExpireWorkerAbsent", "one is scraped", {**there(ONE), series("up", ONE): "1x20"}, "10m"),
    Case("QrisExpireWorkerAbsent", "a restart", there(ONE, values="1x5 stale _x9"), "9m"),
    Case("QrisExpireWorkerAbsent", "scaled to none on purpose", {**there(STAGING), **wanted("0x20")}, "10m"),
    Case(
        "QrisExpireWorkersMissing",
        "four of five pods are down",
        {**there(ONE), **wanted("5x20")},
        "6m",
        {"namespace": "shop"},
        "Only 20% of the workers in shop are being scraped",
    ),
    Case(
        "QrisExpireWorkersMissing",
        "without Kubernetes: two of three do not answer",
        {**{series("up", each): "0x20" for each in FIVE[:2]}, series("up", FIVE[2]): "1x20", **there(FIVE[2])},
        "6m",
        {"namespace": "shop"},
        "Only 33.33% of the workers in shop are being scraped",
    ),
    Case("QrisExpireWorkersMissing", "one of five is being replaced", {**there(*FIVE[:4]), **wanted("5x20")}, "15m"),
    Case("QrisExpireWorkersMissing", "two of five start", {**there(*FIVE[:2]), **wanted("2x5 5x4")}, "9m"),
    Case(
        "QrisExpireWorkerRestarts",
        "a crash loop: the process began three times in half an hour",
        {worker("start_timestamp_seconds", ONE): "0x5 300x5 600x5 900x30"},
        "25m",
        ONE,
        "qris-expire-1 10.0.0.1:9108 was started again about 3 times in half an hour",
    ),
    Case(
        "QrisExpireWorkerRestarts",
        "a child of WORKER_PROCESSES is started again each minute",
        {worker("process_restarts_total", ONE): "0+1x60"},
        "40m",
        ONE,
        "qris-expire-1 10.0.0.1:9108 was started again about 30 times in half an hour",
    ),
    Case(
        "QrisExpireWorkerRestarts",
        "a child of WORKER_PROCESSES is started again every six minutes",
        {worker("process_restarts_total", ONE): "0+1x20"},
        "60m",
        ONE,
        "qris-expire-1 10.0.0.1:9108 was started again about 5 times in half an hour",
        step="6m",
    ),
    Case(
        "QrisExpireWorkerRestarts",
        "a pod that dies before it is scraped",
        {series("kube_pod_container_status_restarts_total", POD): "0x10 1x5 2x5 3x30"},
        "25m",
        POD,
        "qris-expire-1  was started again about 3 times in half an hour",
    ),
    Case(
        "QrisExpireWorkerRestarts",
        "a rollout and one more restart",
        {
            worker("start_timestamp_seconds", ONE): "0x5 300x5 600x50",
            worker("process_restarts_total", ONE): "0x10 1x50",
            series("kube_pod_container_status_restarts_total", POD): "0x10 1x50",
        },
        "25m",
    ),
    Case(
        "QrisExpireBacklog",
        "undated cancellations, 8 a second in and 5 out, 20 minutes later",
        {**waiting("0+180x30"), **ended("0+300x30")},
        "20m",
        {**WORKER, "lane": "cancellation"},
        "The lane cancellation needs 12m 0s to empty at its present rate",
    ),
    Case(
        "QrisExpireBacklog",
        "500 cancellations wait at 5 a second, for a quarter of an hour",
        {**waiting("500x30"), **ended("0+300x30")},
        "20m",
        {**WORKER, "lane": "cancellation"},
        "The lane cancellation needs 1m 40s to empty at its present rate",
    ),
    Case("QrisExpireBacklog", "150 at 5 a second", {**waiting("150x30"), **ended("0+300x30")}, "20m"),
    Case(
        "QrisExpireBacklog",
        "90,000 of the sweep wait at 5 a second",
        {**waiting("90000x30", "sweep"), **ended("0+300x30", "sweep")},
        "20m",
        {**WORKER, "lane": "sweep"},
        "The lane sweep needs 5h 0m 0s to empty at its present rate",
    ),
    Case("QrisExpireBacklog", "36,000", {**waiting("36000x30", "sweep"), **ended("0+300x30", "sweep")}, "20m"),
    Case(
        "QrisExpireBacklog",
        "300,000 of the sweep and 5,000 cancellations, growing for hours",
        {
            **waiting("5000+100x100"),
            **ended("0+3000x100"),
            **waiting("300000+500x100", "sweep"),
            **ended("0+3000x100", "sweep"),
        },
        "480m",
        {**WORKER, "lane": "cancellation"},
        "The lane cancellation needs 24m 20s to empty at its present rate",
        also=({**WORKER, "lane": "sweep"}, "The lane sweep needs 9h 40m 0s to empty at its present rate"),
        step="5m",
    ),
    Case(
        "QrisExpireBacklog",
        "cancellations wait and none ends",
        {**waiting("0x5 7x30"), **ended("100x40")},
        "20m",
        {**WORKER, "lane": "cancellation"},
        "The lane cancellation needs 7d 0h 0m 0s to empty at its present rate",
    ),
    Case(
        "QrisExpireBacklog",
        "a healthy sweep of 300,000, 80 a second",
        {**waiting("300000-4800x62 0x20", "sweep"), **ended("0+4800x62 302400x20", "sweep"), **waiting("0x80")},
        "60m",
    ),
    Case("QrisExpireBacklog", "a burst of two minutes", {**waiting("0x10 9000 4000 0x10"), **ended("0+600x30")}, "12m"),
    Case(
        "QrisExpireBacklog",
        "an outage that somebody was paged for, and its backlog, which drains for 25 minutes",
        OUTAGE,
        "75m",
    ),
    Case("QrisExpireBacklog", "the same, at the moment of recovery", OUTAGE, "61m"),
    Case(
        "QrisExpireBacklog",
        "after the outage the backlog becomes longer",
        {**OUTAGE, **waiting("0x10 0+600x110")},
        "90m",
        {**WORKER, "lane": "cancellation"},
        "The lane cancellation needs 1h 11m 49s to empty at its present rate",
    ),
    Case(
        "QrisExpireBacklog",
        "the sweep's breaker is open, which somebody was paged for; cancellations wait, too",
        SWEEP_OUTAGE,
        "40m",
        {**WORKER, "lane": "cancellation"},
        "The lane cancellation needs 19m 0s to empty at its present rate",
    ),
    Case(
        "QrisExpireBacklog",
        "the sweep's breaker has closed, and its backlog drains",
        {**SWEEP_OUTAGE, **waiting("0x130")},
        "63m",
    ),
    Case(
        "QrisExpireBacklog",
        "an operator has paused the fleet",
        {
            **waiting("0+60x60"),
            **ended("0+60x5 300x60"),
            worker("consumption_paused", ONE, reason="operator"): "0x5 1x60",
        },
        "40m",
    ),
    Case(
        "QrisExpireBacklog",
        "an operator has paused the sweep alone, and cancellations queue",
        {
            **waiting("0+600x60"),
            **ended("0+60x60"),
            worker("consumption_paused", ONE, reason="operator"): "0x5 1x60",
        },
        "40m",
        {**WORKER, "lane": "cancellation"},
        "The lane cancellation needs 6h 40m 0s to empty at its present rate",
    ),
    Case(
        "QrisExpireQueueGrows",
        "3 a second more come than go, for half an hour",
        {queue("messages_ready", "cancellation"): "0+180x60"},
        "40m",
        {**BROKER, "queue": "qris.expire.cancellation", "lane": "cancellation"},
        "4500 commands and more have waited in qris.expire.cancellation for 15 minutes, and they become more",
    ),
    Case(
        "QrisExpireQueueGrows",
        "10 a minute more come than go",
        {queue("messages_ready", "cancellation"): "0+10x60"},
        "42m",
        {**BROKER, "queue": "qris.expire.cancellation", "lane": "cancellation"},
        "270 commands and more have waited in qris.expire.cancellation for 15 minutes, and they become more",
    ),
    Case("QrisExpireQueueGrows", "60 and more", {queue("messages_ready", "cancellation"): "40+1x60"}, "40m"),
    Case("QrisExpireQueueGrows", "for ten minutes", {queue("messages_ready", "cancellation"): "0x5 200+50x30"}, "30m"),
    Case("QrisExpireQueueGrows", "it drains", {queue("messages_ready", "cancellation"): "9000-100x60"}, "40m"),
    Case(
        "QrisExpireQueueGrows",
        "a few that come and go",
        {queue("messages_ready", "cancellation"): "0 3 9 0 5 9x40"},
        "40m",
    ),
    Case(
        "QrisExpireQueueGrows",
        "a burst",
        {queue("messages_ready", "cancellation"): "0x5 0+900x12 10800-900x12 0x40"},
        "22m",
    ),
    Case(
        "QrisExpireCommandsUndated",
        "a producer that dates nothing",
        {
            worker("commands_undated_total", ONE, lane="cancellation"): "0+60x120",
            worker("commands_total", ONE, lane="cancellation"): "0+240x120",
        },
        "100m",
        {**WORKER, "lane": "cancellation"},
        "25% of the commands of the lane cancellation have no timestamp",
    ),
    Case(
        "QrisExpireCommandsUndated",
        "one of fifty",
        {
            worker("commands_undated_total", ONE, lane="cancellation"): "0+2x120",
            worker("commands_total", ONE, lane="cancellation"): "0+100x120",
        },
        "100m",
        {**WORKER, "lane": "cancellation"},
        "2% of the commands of the lane cancellation have no timestamp",
    ),
    Case(
        "QrisExpireCommandsUndated",
        "one of two hundred",
        {
            worker("commands_undated_total", ONE, lane="cancellation"): "0+1x120",
            worker("commands_total", ONE, lane="cancellation"): "0+200x120",
        },
        "100m",
    ),
    Case(
        "QrisExpireCommandsUndated",
        "twenty an hour, and no others",
        {
            worker("commands_undated_total", ONE, lane="cancellation"): "0+1x60",
            worker("commands_total", ONE, lane="cancellation"): "0+1x60",
        },
        "150m",
        {**WORKER, "lane": "cancellation"},
        "100% of the commands of the lane cancellation have no timestamp",
        step="3m",
    ),
    Case(
        "QrisExpireCommandsUndated",
        "five an hour",
        {
            worker("commands_undated_total", ONE, lane="cancellation"): "0+1x60",
            worker("commands_total", ONE, lane="cancellation"): "0+1x60",
        },
        "240m",
        step="12m",
    ),
    Case(
        "QrisExpireCommandsUndated",
        "one by hand among many",
        {
            worker("commands_undated_total", ONE, lane="cancellation"): "0x20 20x100",
            worker("commands_total", ONE, lane="cancellation"): "0+240x120",
        },
        "50m",
    ),
    Case(
        "QrisExpireCommandsUndated",
        "three of three, on a quiet day",
        {
            worker("commands_undated_total", ONE, lane="cancellation"): "0x20 3x100",
            worker("commands_total", ONE, lane="cancellation"): "0x20 3x100",
        },
        "60m",
    ),
    Case(
        "QrisExpireCommandsUndated",
        "it began twenty minutes ago",
        {
            worker("commands_undated_total", ONE, lane="cancellation"): "0x60 0+60x60",
            worker("commands_total", ONE, lane="cancellation"): "0+240x120",
        },
        "80m",
    ),
    Case(
        "QrisExpireRecovering",
        "an outage is over, its backlog drains",
        OUTAGE,
        "75m",
        WORKER,
        "An outage is over and its backlog drains",
    ),
    Case("QrisExpireRecovering", "the outage lasts", OUTAGE, "50m"),
    Case("QrisExpireRecovering", "the sweep's breaker has closed: no cancellation waited for it", SWEEP_OUTAGE, "62m"),
    Case(
        "QrisExpireRecovering",
        "the backlog of cancellations drains, while the sweep's breaker is still open",
        {**OUTAGE, **breaker("0x10 2x110", "sweep")},
        "75m",
        WORKER,
        "An outage is over and its backlog drains",
    ),
    Case("QrisExpireRecovering", "the backlog is gone", OUTAGE, "115m"),
    Case("QrisExpireObjectiveBurnsFast", "the backlog of an outage drains", OUTAGE, "70m"),
    Case("QrisExpireObjectiveBurnsFast", "the backlog is gone for five minutes", OUTAGE, "95m"),
    Case(
        "QrisExpireObjectiveBurnsFast",
        "cancellations are late while the sweep's breaker is open",
        SWEEP_OUTAGE,
        "55m",
        WORKER,
        "63.64% of the cancellations of the last hour took longer than 1 s",
    ),
    Case("QrisExpireObjectiveBurns", "the backlog of an outage drains", OUTAGE, "75m"),
    Case("QrisExpireObjectiveBurns", "the backlog is gone for ten minutes", OUTAGE, "100m"),
    Case("QrisExpireCommandOld", "the backlog of an outage drains", OUTAGE, "75m"),
    Case(
        "QrisExpireCommandOld",
        "cancellations wait while the sweep's breaker is open",
        SWEEP_OUTAGE,
        "40m",
        WORKER,
        "A cancellation that is in hand was published 20m 0s ago",
    ),
    Case(
        "QrisExpireObjectiveBurnsFast",
        "every command is late by its timestamp, 3 s, and nowhere else",
        CLOCK,
        "80m",
    ),
    Case("QrisExpireObjectiveBurns", "the same", CLOCK, "80m"),
    Case("QrisExpireObjectiveBurnsSlowly", "the same", CLOCK, "100m"),
    Case("QrisExpireCommandOld", "a producer's clock is an hour behind", CLOCK, "80m"),
    Case(
        "QrisExpireProducerClock",
        "every command is late by its timestamp, 3 s, and nowhere else",
        CLOCK,
        "80m",
        WORKER,
        "100% of the cancellations are late by their timestamp alone: a producer's clock is behind",
    ),
    Case("QrisExpireProducerClock", "they wait in the queue", {**CLOCK, **waiting("600x120")}, "80m"),
    Case("QrisExpireProducerClock", "they are slow in the worker's hands", ages("0x120", "0+60x120"), "80m"),
    Case(
        "QrisExpireProducerClock",
        "every tenth comes from a delayed round",
        {**CLOCK, worker("delayed_retries_total", ONE, lane="cancellation"): "0+6x120"},
        "80m",
    ),
    Case("QrisExpireProducerClock", "the backlog of an outage drains", OUTAGE, "75m"),
    Case(
        "QrisExpireProducerClock",
        "one producer of four",
        ages("0+45x120", "0+60x120", worked="0+60x120"),
        "80m",
    ),
    Case("QrisExpireProducerClock", "for ten minutes", ages("0+60x60 3600x11", "0+60x71", worked="0+60x71"), "71m"),
    Case(
        "QrisExpireThrottled",
        "the gateway answers 429, ten minutes of Retry-After each: one call in ten minutes",
        {
            **calls("100x60", "0 0 " + " ".join(f"{n}x9" for n in range(1, 6))),
            worker("gateway_requests_total", ONE, operation="expire", response_code="4299300"): "0 0 "
            + " ".join(f"{n}x9" for n in range(1, 6)),
        },
        "50m",
        WORKER,
        'The gateway answers 100% of the calls with "too many requests"',
    ),
    Case(
        "QrisExpireThrottled",
        "three of five answers, for half an hour; the gauge flickers",
        {**calls("0+100x60", "0+60x60"), worker("consumption_paused", ONE, reason="throttled"): "0 1 0 1 1 0x60"},
        "40m",
        WORKER,
        'The gateway answers 60% of the calls with "too many requests"',
    ),
    Case("QrisExpireThrottled", "three of ten", calls("0+100x60", "0+30x60"), "40m"),
    Case("QrisExpireThrottled", "since a quarter of an hour", calls("0+100x60", "0x30 0+100x30"), "44m"),
    Case(
        "QrisExpireThrottledOften",
        "every tenth answer, for an hour",
        calls("0+100x90", "0+10x90"),
        "80m",
        WORKER,
        'The gateway answers 10% of the calls with "too many requests"',
    ),
    Case("QrisExpireThrottledOften", "three of a hundred", calls("0+100x90", "0+3x90"), "80m"),
    Case("QrisExpireThrottledOften", "for a quarter of an hour", calls("0+100x90", "0x40 0+10x15 150x60"), "60m"),
    Case(
        "QrisExpireMemberSick",
        "one of five has no way out",
        {worker("member_sick", each): "1x20" if each == ONE else "0x20" for each in FIVE},
        "10m",
        ONE,
        "qris-expire-1 10.0.0.1:9108 fails at the gateway while others succeed",
    ),
    Case("QrisExpireMemberSick", "for two minutes", {worker("member_sick", ONE): "0x5 1 1 0x20"}, "7m"),
    Case(
        "QrisExpirePausedByOperator",
        "paused for half an hour, told by two workers",
        {worker("consumption_paused", each, reason="operator"): "0x5 1x40" for each in FIVE[:2]},
        "30m",
        WORKER,
        "An operator has paused the fleet for 15 minutes",
    ),
    Case(
        "QrisExpirePausedByOperator",
        "for ten minutes",
        {worker("consumption_paused", ONE, reason="operator"): "0x5 1x10 0x20"},
        "16m",
    ),
    Case(
        "QrisExpirePauseForgotten",
        "paused for two hours, and cancellations wait",
        {
            worker("consumption_paused", ONE, reason="operator"): "1x120",
            **waiting("0+60x120"),
            **ended("0x120"),
        },
        "100m",
        WORKER,
        "An operator has paused the fleet for an hour, and cancellations wait",
    ),
    Case(
        "QrisExpirePauseForgotten",
        "for half an hour",
        {worker("consumption_paused", ONE, reason="operator"): "0x80 1x40", **waiting("0+60x120"), **ended("0x120")},
        "110m",
    ),
    Case(
        "QrisExpirePauseForgotten",
        "only the sweep is paused: cancellations end",
        {
            worker("consumption_paused", ONE, reason="operator"): "1x120",
            **waiting("3x120"),
            **ended("0+60x120"),
        },
        "100m",
    ),
    Case(
        "QrisExpirePauseForgotten",
        "nothing waits",
        {worker("consumption_paused", ONE, reason="operator"): "1x120", **waiting("0x120"), **ended("0x120")},
        "100m",
    ),
    Case(
        "QrisExpireCertificateEnds",
        "ten days left, for hours",
        {
            worker("certificate_expiry_timestamp_seconds", ONE, certificate="gateway_client"): "864000x200",
            worker("certificate_expiry_timestamp_seconds", ONE, certificate="amqp_ca"): "0x200",
        },
        "120m",
        {**WORKER, "certificate": "gateway_client"},
        "The certificate gateway_client ends in 9d 22h 0m 0s",
    ),
    Case(
        "QrisExpireCertificateEnds",
        "a month left; one that is not set",
        {
            worker("certificate_expiry_timestamp_seconds", ONE, certificate="gateway_client"): "2592000x200",
            worker("certificate_expiry_timestamp_seconds", ONE, certificate="amqp_ca"): "0x200",
        },
        "120m",
    ),
    Case(
        "QrisExpireCertificateEnds",
        "replaced within half an hour",
        {worker("certificate_expiry_timestamp_seconds", ONE, certificate="amqp_ca"): "864000x30 9640000x90"},
        "30m",
    ),
    Case(
        "QrisExpireQueuesUnwatched",
        "only the aggregated metrics are scraped",
        {**there(ONE, OTHER), series("rabbitmq_queue_messages", BROKER): "5x30"},
        "20m",
        {"namespace": "shop"},
        "The queues of the workers in shop are not being scraped",
    ),
    Case(
        "QrisExpireQueuesUnwatched",
        "production's queues are seen, staging's are not",
        {**there(ONE, STAGING), queue("messages", "cancellation"): "0x30"},
        "20m",
        {"namespace": "staging"},
        "The queues of the workers in staging are not being scraped",
    ),
    Case(
        "QrisExpireQueuesUnwatched",
        "a restart of the broker",
        {**there(ONE), queue("messages", "cancellation"): "0x5 stale _x30"},
        "15m",
    ),
    Case(
        "QrisExpireQueuesUnwatched",
        "the lane is seen",
        {**there(ONE), queue("messages", "cancellation"): "0x30"},
        "20m",
    ),
    Case(
        "QrisExpireQueueWithoutConsumer",
        "commands wait and nobody consumes",
        NOBODY_CONSUMES,
        "6m",
        {**BROKER, "queue": "qris.expire.sweep", "lane": "sweep"},
        "7 commands wait in qris.expire.sweep and nobody consumes it",
    ),
    Case(
        "QrisExpireQueueWithoutConsumer",
        "the other lane's breaker is open, one of two workers is blocked, and staging is paused",
        {
            **NOBODY_CONSUMES,
            **breaker("2x20"),
            worker("consumption_paused", ONE, reason="broker_blocked"): "1x20",
            worker("consumption_paused", OTHER, reason="broker_blocked"): "0x20",
            worker("consumption_paused", STAGING, reason="operator"): "1x20",
        },
        "6m",
        {**BROKER, "queue": "qris.expire.sweep", "lane": "sweep"},
        "7 commands wait in qris.expire.sweep and nobody consumes it",
    ),
    Case(
        "QrisExpireQueueWithoutConsumer", "its breaker is open", {**NOBODY_CONSUMES, **breaker("2x20", "sweep")}, "15m"
    ),
    Case(
        "QrisExpireQueueWithoutConsumer",
        "an operator has paused the fleet",
        {**NOBODY_CONSUMES, worker("consumption_paused", ONE, reason="operator"): "1x20"},
        "15m",
    ),
    Case(
        "QrisExpireQueueWithoutConsumer",
        "an empty lane without a consumer, one with both, and dead letters, which nobody is to consume",
        {
            queue("messages_ready", "sweep"): "0x20",
            queue("consumers", "sweep"): "0x20",
            queue("messages_ready", "cancellation"): "7x20",
            queue("consumers", "cancellation"): "2x20",
            queue("messages_ready", "dead"): "7x20",
            queue("consumers", "dead"): "0x20",
        },
        "15m",
    ),
    Case(
        "QrisExpireQueueWithoutConsumer",
        "a rollout: for three minutes",
        {queue("messages_ready", "sweep"): "7x20", queue("consumers", "sweep"): "1x5 0x20"},
        "9m",
    ),
    Case(
        "QrisExpireCommandOld",
        "the oldest cancellation in hand has been the same for five minutes",
        {worker("oldest_command_timestamp_seconds", ONE, lane="cancellation"): "60x20"},
        "6m",
        WORKER,
        "A cancellation that is in hand was published 5m 0s ago",
    ),
    Case(
        "QrisExpireCommandOld",
        "for three minutes",
        {worker("oldest_command_timestamp_seconds", ONE, lane="cancellation"): "60x20"},
        "4m",
    ),
    Case(
        "QrisExpireCommandOld",
        "a minute in hand at most, and a second worker without any; sweeps may be old",
        {
            worker("oldest_command_timestamp_seconds", ONE, lane="cancellation"): "-60+60x20",
            worker("oldest_command_timestamp_seconds", OTHER, lane="cancellation"): "0x20",
            worker("oldest_command_timestamp_seconds", ONE, lane="sweep"): "60x20",
        },
        "15m",
    ),
    Case(
        "QrisExpireAcksWithoutOutcomes",
        "one of two workers acks and tells nothing",
        flow(acks="0+60x60", told="500x60", delayed="0x60", paused="0x60"),
        "30m",
        ONE,
        "qris-expire-1 10.0.0.1:9108 acks 1 commands a second and none has an outcome",
    ),
    Case(
        "QrisExpireAcksWithoutOutcomes",
        "the worker tells what it acks",
        flow(acks="0+60x60", told="0+60x60", delayed="0x60", paused="0x60"),
        "30m",
    ),
    Case(
        "QrisExpireAcksWithoutOutcomes",
        "every command goes into a delayed round",
        flow(acks="0+60x60", told="5x60", delayed="0+60x60", paused="0x60"),
        "30m",
    ),
    Case(
        "QrisExpireAcksWithoutOutcomes",
        "an outage: commands are given back to their queue, which acks them",
        flow(acks="0+1x60", told="5x60", delayed="0x60", paused="1x60"),
        "30m",
    ),
    Case(
        "QrisExpireAcksWithoutOutcomes",
        "the last outcome was thirteen minutes ago",
        flow(acks="0+60x60", told="0+60x20 1200x40", delayed="0x60", paused="0x60"),
        "33m",
    ),
    Case(
        "QrisExpireBrokerBlocked",
        "the broker has blocked all workers for a quarter of an hour",
        {worker("consumption_paused", each, reason="broker_blocked"): "1x20" for each in (ONE, OTHER)},
        "15m",
        WORKER,
        "The broker has taken no messages from the workers for 10 minutes",
    ),
    Case(
        "QrisExpireBrokerBlocked",
        "one of five is blocked",
        {
            worker("consumption_paused", each, reason="broker_blocked"): "1x20" if each == ONE else "0x20"
            for each in FIVE
        },
        "15m",
    ),
    Case(
        "QrisExpireBrokerBlocked",
        "for five minutes; other reasons have their own alerts",
        {
            worker("consumption_paused", ONE, reason="broker_blocked"): "0x5 1x5 0x10",
            worker("consumption_paused", ONE, reason="breaker"): "1x20",
            worker("consumption_paused", ONE, reason="draining"): "1x20",
        },
        "10m",
    ),
    Case(
        "QrisExpireUnresolved",
        "every tenth command is given up",
        {**outcomes("0x40 9+9x20"), **outcomes("0x40 1+1x20", "unresolved", "retries_exhausted")},
        "60m",
        {**WORKER, "lane": "cancellation"},
        "10% of the outcomes of the lane cancellation in the last half hour are unresolved",
    ),
    Case(
        "QrisExpireUnresolved",
        "all cancellations are given up during a sweep that goes well",
        {**outcomes("0x40 1+1x20", "unresolved", "retries_exhausted"), **ended("0+4800x60", "sweep")},
        "60m",
        {**WORKER, "lane": "cancellation"},
        "100% of the outcomes of the lane cancellation in the last half hour are unresolved",
    ),
    Case(
        "QrisExpireUnresolved",
        "three of a hundred are",
        {**outcomes("0+97x60"), **outcomes("0+3x60", "unresolved", "retries_exhausted")},
        "45m",
    ),
    Case(
        "QrisExpireUnresolved",
        "five of ten are, in a quiet night",
        {**outcomes("0x40 5x20"), **outcomes("0x40 5x20", "unresolved", "retries_exhausted")},
        "50m",
    ),
    Case(
        "QrisExpireUnresolved",
        "a handful of a moment",
        {**outcomes("0x40 20x20"), **outcomes("0x40 20x20", "unresolved", "retries_exhausted")},
        "43m",
    ),
    Case(
        "QrisExpireDeadLetters",
        "commands are parked for one reason, none for another",
        {
            worker("dead_letters_total", ONE, reason="credentials"): "0x30 3x10",
            worker("dead_letters_total", ONE, reason="too_large"): "0x40",
        },
        "35m",
        {**WORKER, "reason": "credentials"},
        "About 3 new dead letters in half an hour: credentials",
    ),
    Case(
        "QrisExpireDeadLetters",
        "the last one was an hour ago",
        {worker("dead_letters_total", ONE, reason="credentials"): "0x10 3x90"},
        "90m",
    ),
    Case(
        "QrisExpireDeadLettersLeft",
        "two have lain there since the morning",
        {queue("messages", "dead"): "2x300"},
        "250m",
        {**BROKER, "queue": "qris.expire.dead"},
        "2 dead letters have waited for 4 hours",
    ),
    Case(
        "QrisExpireDeadLettersLeft",
        "somebody deals with them within two hours",
        {queue("messages", "dead"): "0x10 9x120 0x200"},
        "120m",
    ),
    Case(
        "QrisExpireOutcomesUnrouted",
        "outcomes without a binding",
        {queue("messages", "outcomes.unrouted"): "0+1x30"},
        "20m",
        {**BROKER, "queue": "qris.expire.outcomes.unrouted"},
        "20 outcomes had no queue to go to",
    ),
    Case("QrisExpireOutcomesUnrouted", "none", {queue("messages", "outcomes.unrouted"): "0x30"}, "20m"),
    Case(
        "QrisExpireOutcomesUnrouted",
        "while somebody binds a queue again",
        {queue("messages", "outcomes.unrouted"): "0x5 9x10 0x10"},
        "12m",
    ),
    Case(
        "QrisExpireBreakerOpen",
        "open, and half-open at each probe",
        breaker("0x5 2 1 2 2 1 2 2 2"),
        "10m",
        {**WORKER, "lane": "cancellation"},
        "The gateway has failed for every command of the lane cancellation for minutes",
    ),
    Case(
        "QrisExpireBreakerOpen",
        "only the sweep has commands, and none succeeds for a quarter of an hour",
        {**breaker("0x30"), **breaker("0x5 2 1 2 2 1 2 2 2x30", "sweep")},
        "20m",
        {**WORKER, "lane": "sweep"},
        "The gateway has failed for every command of the lane sweep for minutes",
    ),
    Case("QrisExpireBreakerOpen", "the sweep's, for six minutes", breaker("0x5 2x6 0x20", "sweep"), "12m"),
    Case("QrisExpireBreakerOpen", "open for a moment", breaker("0x5 2 2 0x10"), "7m"),
    Case(
        "QrisExpireTokenRefreshFailing",
        "every request for a token is refused",
        {
            worker("token_refreshes_total", ONE, result="ok"): "5x40",
            worker("token_refreshes_total", ONE, result="refused"): "0x10 1x3 2x3 3x3 4x3 5x3 6x3",
        },
        "27m",
        WORKER,
        "No access token for 10 minutes",
    ),
    Case(
        "QrisExpireTokenRefreshFailing",
        "one did not get through",
        {
            worker("token_refreshes_total", ONE, result="ok"): "5x40",
            worker("token_refreshes_total", ONE, result="error"): "0x10 1x30",
        },
        "18m",
    ),
    Case(
        "QrisExpireTokenRefreshFailing",
        "a minute's trouble",
        {
            worker("token_refreshes_total", ONE, result="ok"): "5x40",
            worker("token_refreshes_total", ONE, result="error"): "0x10 2x30",
        },
        "12m",
    ),
    Case(
        "QrisExpireTokenRefreshFailing",
        "some fail, and some do not",
        {
            worker("token_refreshes_total", ONE, result="ok"): "0+1x40",
            worker("token_refreshes_total", ONE, result="error"): "0+1x40",
        },
        "30m",
    ),
    Case(
        "QrisExpireClockSkew",
        "ninety seconds behind",
        {worker("clock_skew_seconds", ONE): "-90x20", worker("clock_skew_seconds", OTHER): "2x20"},
        "15m",
        ONE,
        "The clock of qris-expire-1 10.0.0.1:9108 is 1m 30s away from the gateway's",
    ),
    Case("QrisExpireClockSkew", "twenty seconds ahead", {worker("clock_skew_seconds", ONE): "20x20"}, "15m"),
    Case("QrisExpireClockSkew", "one odd answer", {worker("clock_skew_seconds", ONE): "0x5 90x5 0x9"}, "9m"),
    Case(
        "QrisExpireBrokerDisconnected",
        "three of five workers have no connection",
        {worker("broker_connected", each): "1x5 0x20" if each in FIVE[:3] else "1x25" for each in FIVE},
        "15m",
        WORKER,
        "Only 40% of the workers have been connected to their broker for 5 minutes",
    ),
    Case(
        "QrisExpireBrokerDisconnected",
        "one of five has no connection",
        {worker("broker_connected", each): "1x5 0x20" if each == ONE else "1x25" for each in FIVE},
        "15m",
    ),
    Case(
        "QrisExpireWorkerDisconnected",
        "one of five has no connection",
        {worker("broker_connected", each): "1x5 0x30" if each == ONE else "1x35" for each in FIVE},
        "25m",
        ONE,
        "qris-expire-1 10.0.0.1:9108 has been without its broker for 10 minutes",
    ),
    Case("QrisExpireWorkerDisconnected", "for six minutes", {worker("broker_connected", ONE): "1x5 0x6 1x20"}, "12m"),
    Case(
        "QrisExpireBrokerDisconnected",
        "a reconnect within two minutes",
        {worker("broker_connected", ONE): "1x5 0 0 1x20"},
        "7m",
    ),
    Case(
        "QrisExpirePublishesUnconfirmed",
        "outcomes of both workers are out and no confirm comes",
        {
            worker("publishes_unconfirmed", ONE): "0x5 12x20",
            worker("publish_confirm_seconds_count", ONE): "0+60x5 300x20",
            worker("publishes_unconfirmed", OTHER): "0x5 1x20",
            worker("publish_confirm_seconds_count", OTHER): "0+60x5 300x20",
        },
        "12m",
        WORKER,
        "13 outcomes are published and the broker confirms none, to any worker",
    ),
    Case("QrisExpirePublishesUnconfirmed", "one worker's outcomes wait, the other's do not", UNCONFIRMED, "25m"),
    Case(
        "QrisExpireWorkerUnconfirmed",
        "one worker's outcomes wait, the other's do not",
        UNCONFIRMED,
        "25m",
        ONE,
        "12 outcomes of qris-expire-1 10.0.0.1:9108 have waited for their confirm for 10 minutes",
    ),
    Case("QrisExpireWorkerUnconfirmed", "for ten minutes", UNCONFIRMED, "16m"),
    Case(
        "QrisExpireWorkerUnconfirmed",
        "for eight minutes",
        {
            worker("publishes_unconfirmed", ONE): "0x5 12x8 0x20",
            worker("publish_confirm_seconds_count", ONE): "0+60x5 300x8 300+60x20",
        },
        "14m",
    ),
    Case(
        "QrisExpirePublishesUnconfirmed",
        "none for two minutes",
        {
            worker("publishes_unconfirmed", ONE): "0x5 12x20",
            worker("publish_confirm_seconds_count", ONE): "0+60x5 300x20",
        },
        "8m",
    ),
    Case(
        "QrisExpirePublishesUnconfirmed",
        "always some on their way, and they arrive",
        {
            worker("publishes_unconfirmed", ONE): "12x25",
            worker("publish_confirm_seconds_count", ONE): "0+60x25",
        },
        "12m",
    ),
    Case(
        "QrisExpireSweepLate",
        "scheduled two and a half hours ago, last succeeded the day before",
        {**cronjob("last_schedule", "0x5 600x200"), **cronjob("last_successful", "-86400x200")},
        "161m",
        CRONJOB,
        "The sweep qris-expire-sweep was due 2h 31m 0s ago and has not succeeded",
    ),
    Case(
        "QrisExpireSweepLate",
        "it has never succeeded, which has no series",
        cronjob("last_schedule", "600x200"),
        "161m",
        CRONJOB,
        "The sweep qris-expire-sweep was due 2h 31m 0s ago and has not succeeded",
    ),
    Case(
        "QrisExpireSweepLate",
        "it took twenty minutes",
        {**cronjob("last_schedule", "600x200"), **cronjob("last_successful", "-86400x30 1800x200")},
        "170m",
    ),
    Case(
        "QrisExpireSweepLate",
        "it has run for half an hour",
        {**cronjob("last_schedule", "600x200"), **cronjob("last_successful", "-86400x200")},
        "40m",
    ),
    Case(
        "QrisExpireSweepLate",
        "a sweep of 300,000 takes 65 minutes",
        {**cronjob("last_schedule", "600x200"), **cronjob("last_successful", "-86400x75 4500x125")},
        "72m",
    ),
    Case(
        "QrisExpireSweepFailed",
        "its export ended with an error, ten minutes ago",
        {**job("status_failed", "0x5 1x60"), **job("created", "0x60"), **job("status_succeeded", "0x60")},
        "15m",
        JOB_OF_THE_SWEEP,
        "A pod of the sweep qris-expire-sweep-29401025 has failed",
    ),
    Case(
        "QrisExpireSweepFailed",
        "ten hours after its start",
        {**job("status_failed", "0x5 1x60"), **job("created", "-36000x60"), **job("status_succeeded", "0x60")},
        "15m",
        JOB_OF_THE_SWEEP,
        "A pod of the sweep qris-expire-sweep-29401025 has failed",
    ),
    Case(
        "QrisExpireSweepFailed",
        "a pod failed, and the next one has done it",
        {**job("status_failed", "0x5 1x60"), **job("created", "0x60"), **job("status_succeeded", "0x7 1x60")},
        "15m",
    ),
    Case(
        "QrisExpireSweepFailed",
        "it failed two minutes ago",
        {**job("status_failed", "0x5 1x60"), **job("created", "0x60"), **job("status_succeeded", "0x60")},
        "7m",
    ),
    Case(
        "QrisExpireSweepFailed",
        "a Job of the day before that is kept",
        {**job("status_failed", "1x60"), **job("created", "-90000x60"), **job("status_succeeded", "0x60")},
        "15m",
    ),
    Case(
        "QrisExpireSweepMissing",
        "somebody deleted the CronJob",
        {series("kube_cronjob_created", CRONJOB): "0x20 stale _x30"},
        "40m",
        CRONJOB,
        "The CronJob qris-expire-sweep was there in the last three days and is gone",
    ),
    Case("QrisExpireSweepMissing", "it is there", {series("kube_cronjob_created", CRONJOB): "0x60"}, "50m"),
    Case(
        "QrisExpireSweepMissing",
        "it was applied again",
        {series("kube_cronjob_created", CRONJOB): "0x20 stale _x8 1800x30"},
        "28m",
    ),
    Case(
        "QrisExpireSweepUnitFailed",
        "under systemd it ended with exit code 2",
        {unit("exit_code"): "0x5 2x30", unit("last_success_timestamp_seconds"): "0x35"},
        "15m",
        HOST,
        "The sweep of sweeper:9100 has failed, has not ended, or has not run",
    ),
    Case(
        "QrisExpireSweepUnitFailed",
        "under systemd its timer is off: no success for 26 hours",
        {unit("exit_code"): "0x60", unit("last_success_timestamp_seconds"): "0x60"},
        "28h",
        HOST,
        "The sweep of sweeper:9100 has failed, has not ended, or has not run",
        "30m",
    ),
    Case(
        "QrisExpireSweepUnitFailed",
        "under systemd it has run for three hours",
        {
            unit("exit_code"): "0x200",
            unit("last_success_timestamp_seconds"): "-40000x200",
            unit("last_start_timestamp_seconds"): "-43600x5 300x195",
            unit("last_end_timestamp_seconds"): "-40000x200",
        },
        "190m",
        HOST,
        "The sweep of sweeper:9100 has failed, has not ended, or has not run",
    ),
    Case(
        "QrisExpireSweepUnitFailed",
        "under systemd it has run for an hour and a half",
        {
            unit("exit_code"): "0x200",
            unit("last_success_timestamp_seconds"): "-40000x200",
            unit("last_start_timestamp_seconds"): "-43600x5 300x195",
            unit("last_end_timestamp_seconds"): "-40000x200",
        },
        "95m",
    ),
    Case(
        "QrisExpireSweepUnitFailed",
        "under systemd it runs every night, for an hour",
        {
            unit("exit_code"): "0x200",
            unit("last_success_timestamp_seconds"): "-82800x64 3900x140",
            unit("last_start_timestamp_seconds"): "-86400x5 300x195",
            unit("last_end_timestamp_seconds"): "-82800x64 3900x140",
        },
        "190m",
    ),
    Case(
        "QrisExpireSweepUnitFailed",
        "a failure that was repaired within three minutes",
        {unit("exit_code"): "0x5 1x3 0x30", unit("last_success_timestamp_seconds"): "0x35"},
        "9m",
    ),
    Case(
        "QrisExpireSweepNotStarted",
        "made a day and more ago, and never scheduled",
        {series("kube_cronjob_created", CRONJOB): "600x60"},
        "27h",
        CRONJOB,
        "The sweep qris-expire-sweep has not started for 1d 2h 50m 0s",
        "30m",
    ),
    Case(
        "QrisExpireSweepNotStarted",
        "made this morning",
        {series("kube_cronjob_created", CRONJOB): "600x60"},
        "9h",
        step="30m",
    ),
    Case(
        "QrisExpireSweepNotStarted",
        "suspended since the day before",
        cronjob("last_schedule", "600x60"),
        "27h",
        CRONJOB,
        "The sweep qris-expire-sweep has not started for 1d 2h 50m 0s",
        "30m",
    ),
    Case(
        "QrisExpireSweepNotStarted",
        "it starts every day",
        cronjob("last_schedule", "600x48 87000x10"),
        "24h",
        step="30m",
    ),
)


def write(directory: Path, alert: str, groups: list[dict[str, Any]] | None = None) -> list[Path]:
    """One alert's cases as files for `promtool test rules`: one for each step, which holds for a whole file.

    promtool evaluates every rule of a file at every step, so the file of rules holds the alert and what it may be made
    of: the recording rules and the alerts that they ask for, from `groups` (the source's). promtool compares every
    annotation of an alert; those that hold no template are taken from the source.
    """
    groups = groups if groups is not None else read()
    asked = "".join(rule["expr"] for group in groups for rule in group["rules"] if "ALERTS" in rule["expr"])
    causes = {f"QrisExpire{name}" for names in re.findall(r"QrisExpire\(([^)]+)\)", asked) for name in names.split("|")}
    wanted = [
        {**group, "rules": [rule for rule in group["rules"] if rule.get("alert", alert) in {alert, *causes}]}
        for group in groups
    ]
    rules = directory / f"{alert}.rules.yaml"
    rules.write_text(yaml.safe_dump({"groups": wanted}, width=1000, sort_keys=False))
    cases = [case for case in CASES if case.alert == alert]
    paths = []
    for step in sorted({case.step for case in cases}):
        tests = [_test(case) for case in cases if case.step == step]
        content = {"rule_files": [rules.name], "evaluation_interval": step, "tests": tests}
        paths.append(directory / f"{alert}-{step}.yaml")
        paths[-1].write_text(yaml.safe_dump(content, sort_keys=False, width=1000))
    return paths


def _test(case: Case) -> dict[str, Any]:
    alert = next(alert for alert in alerts() if alert.name == case.alert)
    fires = []
    for labels, summary in filter(None, [(case.fires, case.summary), case.also]):
        if labels is None:
            continue
        # The one template in the other annotations: the link chooses the namespace on the dashboard.
        link = alert.annotations["dashboard_url"].replace("{{ $labels.namespace }}", labels.get("namespace", ""))
        annotations = {**alert.annotations, "summary": summary, "dashboard_url": link}
        fires.append({"exp_labels": {**labels, "severity": alert.severity}, "exp_annotations": annotations})
    return {
        "name": f"{case.alert}: {case.why}",
        "interval": case.step,
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"alertname": case.alert, "eval_time": case.at, "exp_alerts": fires}],
    }
