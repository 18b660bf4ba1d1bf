"""The whole chain, once: worker, Prometheus, Alertmanager, a webhook, and a gateway that goes away and comes back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.monitoring import rules
from tests.monitoring.live import scrape_config
from tests.monitoring.programs import Server, alertmanager, prometheus
from tests.waiting import wait_until
from tests.worker_process import working
from worker.sandbox.broker import LOOPBACK
from worker.sandbox.simulator import Simulator

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tools")]

ALERT: Final = "QrisExpireBreakerOpen"
PATIENCE: Final = "3s"
"""In place of each alert's own `for`: the chain is what is tested here, the times are promtool's to test."""
COMMANDS: Final = 60
EVALUATION: Final = 1.0
"""Seconds between two evaluations, and of Alertmanager's waits, in the hurried configurations."""


class Sink:
    """A webhook, and what came in: (receiver, time, alert)."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.told: list[tuple[str, float, dict[str, Any]]] = []

    def of(self, alert: str, status: str) -> Callable[[], tuple[str, float, dict[str, Any]] | None]:
        """The first notification of this alert with this status, once it has come."""

        def look() -> tuple[str, float, dict[str, Any]] | None:
            wanted = (t for t in self.told if t[2]["labels"]["alertname"] == alert and t[2]["status"] == status)
            return next(wanted, None)

        return look


@contextmanager
def webhook() -> Iterator[Sink]:
    """A server that takes down what it is told."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sink.told += [(self.path, time.monotonic(), alert) for alert in body["alerts"]]
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as server:
        sink = Sink(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield sink
        finally:
            server.shutdown()
            thread.join()


def hurried_rules(path: Path) -> Path:
    """The rules themselves; only `for` is short."""
    groups = rules.read()
    for group in groups:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = PATIENCE
    path.write_text(yaml.safe_dump({"groups": groups}))
    return path


def hurried_alertmanager(port: int) -> dict[str, Any]:
    """The example's configuration; only its waits are short, and its receivers ours."""
    config: dict[str, Any] = yaml.safe_load((rules.SOURCE.parent / "alertmanager.yaml").read_text())
    config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": f"http://{LOOPBACK}:{port}/{receiver['name']}"}]
    return config


def states(manager: Server) -> dict[str, str]:
    """What Alertmanager does with each alert that it has: active, or suppressed."""
    return {each["labels"]["alertname"]: each["status"]["state"] for each in manager.get("/api/v2/alerts") or ()}


def test_gateway_down_and_up_again(
    amqp_url: str, prefix: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The gateway goes: the pager is told, of the cause alone. It comes back: the pager is told, and of nothing else
    while the backlog drains; nothing is lost."""

    settings = {"BREAKER_FAILURES": "5", "BREAKER_COOLDOWN_SECONDS": "1", "BREAKER_MAX_COOLDOWN_SECONDS": "2"}
    with (
        webhook() as sink,
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer),
        alertmanager(tmp_path, hurried_alertmanager(sink.port)) as manager,
    ):
        config = scrape_config({"qris-expire": worker.port})
        config["rule_files"] = [str(hurried_rules(tmp_path / "rules.yaml"))]
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [f"{LOOPBACK}:{manager.port}"]}]}]}
        with prometheus(tmp_path, config) as watching:
            wait_until(lambda: list(watching.targets().values()) == ["up"], 30, "the worker is scraped")
            producer.publish_many([f"before-{number}" for number in range(COMMANDS)])
            producer.collect_all(30)

            gateway.stop()
            went = time.monotonic()
            producer.publish_many([f"during-{number}" for number in range(6)], sweep_every=0)
            open_ = {"lane": "cancellation"}
            wait_until(lambda: worker.metrics()("breaker_state", **open_) > 0, 30, "the breaker is open")
            opened = time.monotonic() - went
            receiver, at, alert = wait_until(sink.of(ALERT, "firing"), 60, "the pager is told") or ("", 0.0, {})
            fired = at - went
            assert receiver == "/pager"
            assert alert["annotations"]["runbook_url"].endswith(f"#{ALERT.lower()}")
            assert alert["labels"]["job"] == "qris-expire"
            assert worker.metrics()("consumption_paused", reason="breaker") == 1

            producer.publish("old-1", timestamp=int(time.time()) - 300)
            wait_until(lambda: watching.value("count(job:qris_expire_known_outage:present)") == 1, 60, "it is known")

            gateway.start()
            came = time.monotonic()
            producer.collect_all(60)
            ended = time.monotonic() - came
            _, at, _ = wait_until(sink.of(ALERT, "resolved"), 60, "the pager is told that it is over") or ("", 0.0, {})
            resolved = at - came
            wait_until(lambda: states(manager).get("QrisExpireRecovering"), 60, "the recovery is shown")
            time.sleep(2 * EVALUATION)  # another evaluation and another group's wait: nothing more may come of it
            told = [(alert["labels"]["alertname"], at) for receiver, at, alert in sink.told if receiver == "/pager"]
            assert {name for name, at in told if at > went} == {ALERT}

    assert {str(outcome.fields["status"]) for outcome in producer.outcomes} == {"expired"}
    times = f"breaker open {opened:.1f} s, paged {fired:.1f} s after the gateway went; "
    times += f"all outcomes {ended:.1f} s, resolved {resolved:.1f} s after it came back"
    record_property("times", times)
    print(times)
