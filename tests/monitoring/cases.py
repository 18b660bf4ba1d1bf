"""For every alert a case in which it fires and one in which it keeps silent, as `promtool test rules` runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tests.monitoring.rules import SOURCE, alerts

JOB: Final = "shop/qris-expire"
WORKER: Final = {"namespace": "shop", "job": JOB}
ONE: Final = {**WORKER, "instance": "10.0.0.1:9108"}
OTHER: Final = {**WORKER, "instance": "10.0.0.2:9108"}
BROKER: Final = {"namespace": "rabbitmq", "job": "rabbitmq/detailed", "vhost": "/"}
CRONJOB: Final = {"namespace": "shop", "cronjob": "qris-expire-sweep"}

Labels = dict[str, str]


@dataclass(frozen=True, slots=True)
class Case:
    """Series from minute 0 on, in promtool's notation, and whether the alert fires `at`.

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


def ages(in_time: str, all_: str) -> dict[str, str]:
    """Cancellations that ended within a second, and all that ended."""
    lane = {"lane": "cancellation"}
    return {
        worker("command_age_seconds_bucket", ONE, **lane, le="1.0"): in_time,
        worker("command_age_seconds_count", ONE, **lane): all_,
    }


def outcomes(values: str, status: str = "expired", reason: str = "success", labels: Labels = ONE) -> dict[str, str]:
    """Outcomes of the cancellation lane."""
    return {worker("outcomes_total", labels, lane="cancellation", status=status, reason=reason): values}


def cronjob(what: str, values: str) -> dict[str, str]:
    """What kube-state-metrics says about the sweep; values are minutes since 0 in seconds."""
    return {series(f"kube_cronjob_status_{what}_time", CRONJOB): values}


def flow(acks: str, told: str, delayed: str, paused: str) -> dict[str, str]:
    """Acks of one worker, and what it told before them; the other one is healthy."""
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
        ages("0+49x30", "0+50x30"),
        "10h",
        WORKER,
        "2% of the cancellations of the last 3 days took longer than 1 s",
        "30m",
    ),
    Case(
        "QrisExpireObjectiveBurnsSlowly",
        "for half an hour",
        ages("0+49x30", "0+50x30"),
        "30m",
        step="30m",
    ),
    Case(
        "QrisExpireObjectiveBurnsSlowly",
        "it was so for two days, and is within the objective now",
        ages("0+196x120 23719+199x23", "0+200x144"),
        "72h",
        step="30m",
    ),
    Case(
        "QrisExpireObjectiveBurnsSlowly",
        "a bad morning after two good days",
        ages("0+200x132 26590+190x11", "0+200x144"),
        "72h",
        step="30m",
    ),
    Case(
        "QrisExpireWorkerAbsent",
        "nothing is scraped",
        {series("up", WORKER): "0x20"},
        "6m",
        {},
        "No worker is being scraped",
    ),
    Case("QrisExpireWorkerAbsent", "one is scraped", {worker("build_info", ONE, version="1"): "1x20"}, "10m"),
    Case("QrisExpireWorkerAbsent", "a restart", {worker("build_info", ONE, version="1"): "1x5 stale _x9"}, "9m"),
    Case(
        "QrisExpireQueuesUnwatched",
        "only the aggregated metrics are scraped",
        {series("rabbitmq_queue_messages", BROKER): "5x30"},
        "20m",
        {"queue": "qris.expire.cancellation"},
        "RabbitMQ's metrics of the lanes are not being scraped",
    ),
    Case(
        "QrisExpireQueuesUnwatched",
        "a restart of the broker",
        {queue("messages", "cancellation"): "0x5 stale _x30"},
        "15m",
    ),
    Case(
        "QrisExpireQueuesUnwatched",
        "the lane is seen",
        {queue("messages", "cancellation"): "0x30"},
        "20m",
    ),
    Case(
        "QrisExpireQueueWithoutConsumer",
        "commands wait and nobody consumes",
        {queue("messages_ready", "sweep"): "7x20", queue("consumers", "sweep"): "0x20"},
        "6m",
        {**BROKER, "queue": "qris.expire.sweep"},
        "7 commands wait in qris.expire.sweep and nobody consumes it",
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
        "10.0.0.1:9108 acks 1 commands a second and none has an outcome",
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
        "QrisExpireConsumptionPaused",
        "the broker has blocked for a quarter of an hour",
        {worker("consumption_paused", ONE, reason="broker_blocked"): "1x20"},
        "15m",
        {**WORKER, "reason": "broker_blocked"},
        "A worker has paused for 10 minutes: broker_blocked",
    ),
    Case(
        "QrisExpireConsumptionPaused",
        "throttled now and then; the breaker has its own alert, and a drain ends by itself",
        {
            worker("consumption_paused", ONE, reason="throttled"): "1x5 0 1x5 0 1x8",
            worker("consumption_paused", ONE, reason="breaker"): "1x20",
            worker("consumption_paused", ONE, reason="draining"): "1x20",
        },
        "15m",
    ),
    Case(
        "QrisExpireUnresolved",
        "every tenth command is given up",
        {**outcomes("0x40 9+9x20"), **outcomes("0x40 1+1x20", "unresolved", "retries_exhausted")},
        "60m",
        WORKER,
        "10% of the outcomes of the last half hour are unresolved",
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
        "while somebody binds a queue anew",
        {queue("messages", "outcomes.unrouted"): "0x5 9x10 0x10"},
        "12m",
    ),
    Case(
        "QrisExpireBreakerOpen",
        "open, and half-open at each probe; the other worker's is closed",
        {worker("breaker_state", ONE): "0x5 2 1 2 2 1 2 2 2", worker("breaker_state", OTHER): "0x20"},
        "10m",
        WORKER,
        "The gateway has failed for every command for 3 minutes",
    ),
    Case("QrisExpireBreakerOpen", "open for a moment", {worker("breaker_state", ONE): "0x5 2 2 0x10"}, "7m"),
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
        WORKER,
        "A worker's clock is 1m 30s away from the gateway's",
    ),
    Case("QrisExpireClockSkew", "twenty seconds ahead", {worker("clock_skew_seconds", ONE): "20x20"}, "15m"),
    Case("QrisExpireClockSkew", "one odd answer", {worker("clock_skew_seconds", ONE): "0x5 90x5 0x9"}, "9m"),
    Case(
        "QrisExpireBrokerDisconnected",
        "one of two workers has no connection",
        {worker("broker_connected", ONE): "1x5 0x20", worker("broker_connected", OTHER): "1x25"},
        "15m",
        WORKER,
        "A worker has been without its broker for 5 minutes",
    ),
    Case(
        "QrisExpireBrokerDisconnected",
        "a reconnect within two minutes",
        {worker("broker_connected", ONE): "1x5 0 0 1x20"},
        "7m",
    ),
    Case(
        "QrisExpirePublishesUnconfirmed",
        "one worker's outcomes are out and no confirm comes",
        {
            worker("publishes_unconfirmed", ONE): "0x5 12x20",
            worker("publish_confirm_seconds_count", ONE): "0+60x5 300x20",
            worker("publishes_unconfirmed", OTHER): "3x25",
            worker("publish_confirm_seconds_count", OTHER): "0+60x25",
        },
        "12m",
        WORKER,
        "12 outcomes are published and the broker confirms none",
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
        "160m",
        CRONJOB,
        "The sweep qris-expire-sweep was due 2h 30m 0s ago and has not succeeded",
    ),
    Case(
        "QrisExpireSweepLate",
        "it has never succeeded, which has no series",
        cronjob("last_schedule", "600x200"),
        "160m",
        CRONJOB,
        "The sweep qris-expire-sweep was due 2h 30m 0s ago and has not succeeded",
    ),
    Case(
        "QrisExpireSweepLate",
        "it took twenty minutes",
        {**cronjob("last_schedule", "600x200"), **cronjob("last_successful", "-86400x30 1800x200")},
        "160m",
    ),
    Case(
        "QrisExpireSweepLate",
        "it has run for half an hour",
        {**cronjob("last_schedule", "600x200"), **cronjob("last_successful", "-86400x200")},
        "40m",
    ),
    Case(
        "QrisExpireSweepNotStarted",
        "suspended since the day before",
        cronjob("last_schedule", "600x60"),
        "27h",
        CRONJOB,
        "The sweep qris-expire-sweep started 1d 2h 50m 0s ago for the last time",
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


def promtool_files(alert: str | None = None) -> dict[str, dict[str, Any]]:
    """All cases, or one alert's, as files for `promtool test rules`: one for each step, which holds for a whole file.

    promtool compares every annotation of an alert; those that hold no template are taken from the source.
    """
    cases = [case for case in CASES if alert in (None, case.alert)]
    return {
        step: {
            "rule_files": [str(SOURCE)],
            "evaluation_interval": step,
            "tests": [_test(case) for case in cases if case.step == step],
        }
        for step in sorted({case.step for case in cases})
    }


def _test(case: Case) -> dict[str, Any]:
    alert = next(alert for alert in alerts() if alert.name == case.alert)
    fires = []
    if case.fires is not None:
        annotations = {**alert.annotations, "summary": case.summary}
        fires = [{"exp_labels": {**case.fires, "severity": alert.severity}, "exp_annotations": annotations}]
    return {
        "name": f"{case.alert}: {case.why}",
        "interval": case.step,
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"alertname": case.alert, "eval_time": case.at, "exp_alerts": fires}],
    }
