"""The broker's users, made on a real broker as the manifests describe them, can do what they must and nothing else."""

import base64
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.brokers import PrivateBroker
from tests.conftest import running
from tests.manifests.rendering import Manifests
from tests.manifests.test_worker import declared
from tests.rabbit import Rabbit
from tests.waiting import wait_until
from tests.worker_process import ROOT, Producer, WorkerProcess
from worker.sandbox.simulator import Script, Simulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PASSWORD = "a-password"
PREFIX = "qris.expire"
BROKEN = {"code": "5009300", "message": "General Error", "repeat": True}


class Api:
    """RabbitMQ's management API, as one user."""

    def __init__(self, port: int, user: str, password: str) -> None:
        self._port = port
        self._headers = {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON; an empty answer is None."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, f"/api{path}", content, {**self._headers, "Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
            return answer.status, json.loads(said) if said else None
        finally:
            connection.close()


@pytest.fixture(scope="module")
def broker(rendered: dict[str, Manifests]) -> Iterator[PrivateBroker]:
    """With the users, permissions and topology of the manifests."""
    manifests = rendered["broker"]
    with running(PrivateBroker(plugins=["rabbitmq_management"])) as broker:
        admin = Api(broker.http_port("rabbitmq_management"), "guest", "guest")
        for user in manifests.of("User"):
            tags = ",".join(user["spec"].get("tags", []))
            made, _ = admin("PUT", f"/users/{user['metadata']['name']}", {"password": PASSWORD, "tags": tags})
            assert made == 201
        for permission in manifests.of("Permission"):
            it = permission["spec"]
            path = f"/permissions/{quote(it['vhost'], safe='')}/{it['userReference']['name']}"
            assert admin("PUT", path, it["permissions"])[0] == 201
        with Rabbit(broker.url) as rabbit:
            rabbit.declare(declared(manifests))
        yield broker


def worker_url(broker: PrivateBroker) -> str:
    return broker.url.replace("guest:guest", f"qris-expire-worker:{PASSWORD}")


@pytest.fixture
def settings(rendered: dict[str, Manifests]) -> dict[str, str]:
    """Production's retries and topology."""
    return {name: rendered["production"].settings()[name] for name in ("AMQP_DECLARE", "RETRY_DELAYS_SECONDS")}


def test_the_worker_s_user_is_enough(broker: PrivateBroker, settings: dict[str, str], tmp_path: Path) -> None:
    """It works, delays, follows a sweep and looks at dead letters, on a topology that it did not declare."""

    (tmp_path / "bills.csv").write_text("billnumber,merchantId\nb-1,M1\nb-2,M1\n")
    with (
        Simulator(Script.parse({"bills": {"b-broken": [BROKEN]}})) as gateway,
        WorkerProcess(worker_url(broker), PREFIX, gateway, tmp_path, **settings) as worker,
        Producer(broker.url, PREFIX) as producer,
    ):
        worker.wait_ready()
        assert producer.of(producer.publish("b-0")).fields["status"] == "expired"
        assert producer.of(producer.publish_body(b"no JSON")).fields["status"] == "invalid"
        producer.publish("b-broken")
        wait_until(lambda: producer.depths()[f"{PREFIX}.cancellation.retry.30"] == 1, 20, "its delayed round")

        sweep = command(worker, "sweep", "bills.csv", "--wait", "--state-dir", "state")
        dead = command(worker, "dead", "list", "--json")
        worker.stop()

    assert "expired │ success │ 2" in " ".join(sweep.split())
    assert "malformed_json" in dead


def command(worker: WorkerProcess, *arguments: str) -> str:
    """Another command with the worker's environment; what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "worker", *arguments],
        env={**worker.environment(), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        cwd=worker._directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_worker_s_user_has_its_limits(broker: PrivateBroker) -> None:
    """It can neither make a queue of another name nor look at the management API."""

    api = Api(broker.http_port("rabbitmq_management"), "qris-expire-worker", PASSWORD)

    with Rabbit(worker_url(broker)) as rabbit, pytest.raises(Exception, match="ACCESS_REFUSED"):
        rabbit.declare_queue("orders")
    assert api("GET", "/queues/%2F/qris.expire.sweep")[0] == 401


def test_a_producer_s_and_a_consumer_s_users(broker: PrivateBroker) -> None:
    """A producer publishes commands and reads nothing; a consumer reads outcomes from queues of its own, no more."""

    def url(name: str) -> str:
        return broker.url.replace("guest:guest", f"{name}:{PASSWORD}")

    with Rabbit(url("qris-expire-producer")) as producer:
        producer.publish("qris.expire.commands", "sweep", b"{}")
    with Rabbit(url("qris-expire-consumer")) as consumer, Rabbit(broker.url) as admin:
        consumer.declare_queue("orders.outcomes")
        consumer.bind("orders.outcomes", "qris.expire.outcomes", "#")
        admin.publish("qris.expire.outcomes", "sweep.expired", b"{}")
        assert consumer.take("orders.outcomes", 1, 10)[0].body == b"{}"
        admin.delete_queue("orders.outcomes")
        admin.purge("qris.expire.sweep")
    refused: dict[str, list[Callable[[Rabbit], object]]] = {
        "qris-expire-producer": [
            lambda it: it.publish("qris.expire.outcomes", "sweep.expired", b"{}"),
            lambda it: it.take("qris.expire.sweep", 1, 1),
            lambda it: it.declare_queue("mine"),
        ],
        "qris-expire-consumer": [
            lambda it: it.publish("qris.expire.commands", "sweep", b"{}"),
            lambda it: it.take("qris.expire.dead", 1, 1),
            lambda it: it.declare_queue("qris.expire.mine"),
        ],
    }
    for user, attempts in refused.items():
        for attempt in attempts:
            with Rabbit(url(user)) as rabbit, pytest.raises(Exception, match="ACCESS_REFUSED"):
                attempt(rabbit)


def test_keda_sees_commands_in_hand_and_touches_nothing(broker: PrivateBroker) -> None:
    """The scaler's user is told ready and unacked commands together; it may neither purge nor delete."""

    api = Api(broker.http_port("rabbitmq_management"), "qris-expire-scaler", PASSWORD)
    path = "/queues/%2F/qris.expire.sweep"
    with Rabbit(broker.url) as rabbit:
        rabbit.publish("qris.expire.commands", "sweep", b"{}")
        held = rabbit.plain_channel()
        wait_until(lambda: held.basic_get("qris.expire.sweep")[0], 10, "the command is in hand")

        assert rabbit.depth("qris.expire.sweep") == 0
        wait_until(lambda: api("GET", path)[1].get("messages") == 1, 20, "the API counts it")
        assert api("DELETE", f"{path}/contents")[0] == api("DELETE", path)[0] == 401
        held.close()
        rabbit.purge("qris.expire.sweep")
