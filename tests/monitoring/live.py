"""The real thing for a minute: RabbitMQ, workers, the simulated gateway with faults, and a Prometheus that looks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from tests.brokers import PrivateBroker
from tests.monitoring import dashboard, rules
from tests.monitoring.programs import Prometheus, prometheus
from tests.rabbit import Rabbit
from tests.waiting import wait_until
from tests.worker_process import Producer, WorkerProcess, command_body
from worker.core.topology import Names, topology
from worker.sandbox.broker import LOOPBACK
from worker.sandbox.simulator import Script, Simulator

DELAYS: Final = (1, 3)
SETTINGS: Final = {
    "WORKER_CONCURRENCY": "8",
    "RETRY_DELAYS_SECONDS": ",".join(map(str, DELAYS)),
    "RETRY_INITIAL_SECONDS": "0.05",
    "RETRY_MAX_SECONDS": "0.3",
    "BREAKER_COOLDOWN_SECONDS": "1",
    "BREAKER_MAX_COOLDOWN_SECONDS": "2",
    "GATEWAY_READ_TIMEOUT_SECONDS": "2",
    # So that the sweep takes half a minute.
    "GATEWAY_MAX_REQUESTS_PER_SECOND": "75",  # of all three processes together
    "LOG_LEVEL": "warning",
}
FAULTS: Final[dict[str, Any]] = {
    "latency": 0.04,
    "kill_token_every": 300,
    "patterns": [
        {"match": "^paid", "faults": [{"code": "4049314", "repeat": True}]},
        {"match": "^lost", "faults": [{"code": "4049301", "message": "QR not Found", "repeat": True}]},
        {"match": "^hopeless", "faults": [{"code": "5009300", "repeat": True}]},
    ],
    "rates": [
        {"share": 0.03, "fault": {"latency": 0.6}},
        {"share": 0.05, "fault": {"code": "5009300", "message": "General Error"}},
        {"share": 0.01, "fault": {"code": "4099300", "message": "Cannot use same X-EXTERNAL-ID in same day"}},
        {"share": 0.01, "fault": {"reset": "after"}},
    ],
}
CANCELLATIONS: Final = 1_200
PER_SECOND: Final = 20.0
BILLS: Final = 1_500
"""What is swept meanwhile."""

Series = list[dict[str, Any]]


@dataclass
class Recording:
    """What Prometheus saw, from `start` to `end` (unix time), and what it answers to each query of the dashboard."""

    start: float
    end: float
    answers: dict[str, Series] = field(default_factory=dict)
    scrape: str = ""
    faulty_rules: list[str] = field(default_factory=list)


def scrape_config(workers: dict[str, int], broker: int | None = None) -> dict[str, Any]:
    """The example's configuration for these ports, ten times as fast: job → port of its endpoint."""
    config: dict[str, Any] = yaml.safe_load((rules.SOURCE.parent / "prometheus.yaml").read_text())
    _, rabbitmq = config["scrape_configs"]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"}
    config["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [f"{LOOPBACK}:{port}"]}]} for job, port in workers.items()
    ]
    if broker is not None:
        rabbitmq["static_configs"][0]["targets"] = [f"{LOOPBACK}:{broker}"]
        config["scrape_configs"].append(rabbitmq)
    config.pop("alerting")
    return config


def load_with_faults(directory: Path) -> Recording:
    """Cancellations all along, a sweep, an outage of the gateway, throttling, lost connections; about 80 s."""
    plugins = ["rabbitmq_prometheus"]
    prefix = "live"
    with (
        PrivateBroker(plugins=plugins, config={"collect_statistics_interval": "1000"}) as broker,
        Simulator(Script.parse(FAULTS)) as gateway,
    ):
        with Rabbit(broker.url) as rabbit:
            rabbit.declare(topology(prefix, "quorum", DELAYS))
        with (
            WorkerProcess(broker.url, prefix, gateway, directory, **SETTINGS) as one,
            WorkerProcess(broker.url, prefix, gateway, directory, **SETTINGS, WORKER_PROCESSES="2") as family,
            Producer(broker.url, prefix),
        ):
            one.wait_ready()
            family.wait_ready()
            config = scrape_config({"one": one.port, "family": family.port}, broker.http_port("rabbitmq_prometheus"))
            rules_file = directory / "rules.yaml"
            rules_file.write_text(rules.SOURCE.read_text().replace(f'"{rules.PREFIX}.', f'"{prefix}.'))
            with prometheus(directory, {**config, "rule_files": [str(rules_file)]}) as watching:
                targets = len(config["scrape_configs"])
                wait_until(lambda: list(watching.targets().values()) == ["up"] * targets, 30, "all are scraped")
                start = time.time()
                _story(broker, gateway, prefix)
                # For some scrapes: the last step of a range lies up to a second before its end.
                left = f'sum(max_over_time(rabbitmq_detailed_queue_messages{{queue=~"{prefix}.sweep.*"}}[3s]))'
                wait_until(lambda: watching.value(left) == 0, 120, "the sweep is over")
                recording = Recording(start, time.time(), scrape=family.get("/metrics")[1])
                ask(watching, recording, prefix)
                return recording


def ask(watching: Prometheus, recording: Recording, prefix: str) -> None:
    """Put every query of the dashboard, as Grafana would, and look at the rules' health."""
    seconds = recording.end - recording.start
    for panel in dashboard.panels():
        for expr, _ in panel.queries:
            values = {
                "$__rate_interval": "8s",
                "$__range": f"{seconds:.0f}s",
                "$namespace": ".*",
                "$job": ".*",
                "$pod": ".*",
            }
            values |= {"$prefix": prefix}
            asked = expr
            for name, value in values.items():
                asked = asked.replace(name, value)
            recording.answers[expr] = watching.range(asked, recording.start, recording.end)
    for group in watching.get("/api/v1/rules")["data"]["groups"]:
        recording.faulty_rules += [f"{r['name']}: {r.get('lastError')}" for r in group["rules"] if r["health"] != "ok"]


def _story(broker: PrivateBroker, gateway: Simulator, prefix: str) -> None:
    with _cancelling(broker.url, prefix) as sent:
        wait_until(lambda: len(sent) >= 100, 30, "cancellations flow")
        _sweep(broker.url, prefix)
        wait_until(lambda: len(sent) >= 500, 60, "the sweep is under way")
        gateway.stop()
        wait_until(lambda: len(sent) >= 640, 60, "the gateway is away for seven seconds")
        gateway.start()
        wait_until(lambda: len(sent) >= 850, 60, "it has recovered")
        gateway.replace(Script.parse({"rates": [{"share": 0.5, "fault": {"code": "4299300", "retry_after": "1"}}]}))
        wait_until(lambda: len(sent) >= 920, 60, "it throttles for a while")
        gateway.replace(Script.parse(FAULTS))
        broker.ctl("close_all_connections", "rehearsal")
        wait_until(lambda: len(sent) >= CANCELLATIONS, 60, "all cancellations are published")


@contextmanager
def _cancelling(url: str, prefix: str) -> Iterator[list[str]]:
    sent: list[str] = []
    stop = threading.Event()
    thread = threading.Thread(target=_cancel, args=(url, prefix, sent, stop), daemon=True)
    thread.start()
    try:
        yield sent
    finally:
        stop.set()
        thread.join(10)


def _cancel(url: str, prefix: str, sent: list[str], stop: threading.Event) -> None:
    """At an even rate, whatever happens to the connection; some of them go wrong in each way there is."""
    names, began = Names(prefix), time.monotonic()
    rabbit = Rabbit(url)
    while len(sent) < CANCELLATIONS and not stop.is_set():
        number = len(sent)
        kind = next(
            (kind for every, kind in ((25, "paid"), (40, "lost"), (60, "hopeless")) if number % every == 3), "b"
        )
        body = b"no JSON" if number % 90 == 5 else command_body(f"{kind}{number}")
        stamp = {"timestamp": int(time.time()), "headers": {"timestamp_in_ms": int(time.time() * 1000)}}
        try:
            rabbit.publish(names.commands, "cancellation", body, message_id=f"c{number}", **stamp)
            sent.append(kind)
        except Exception:  # noqa: BLE001  # it is closed on purpose; the test looks at the workers
            rabbit = Rabbit(url)
        stop.wait(max(0.0, began + len(sent) / PER_SECOND - time.monotonic()))
    rabbit.close()


def _sweep(url: str, prefix: str) -> None:
    now = int(time.time())
    bills = [f"s{number}" if number % 50 else f"paid{number}" for number in range(BILLS)]
    with Rabbit(url) as rabbit:
        rabbit.publish_many(
            Names(prefix).commands,
            (("sweep", command_body(bill), {"message_id": bill, "timestamp": now}) for bill in bills),
        )
