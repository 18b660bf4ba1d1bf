"""The pods of the dev overlay, run here as their manifests say, but for ports and the broker's address."""

import base64
import http.client
from pathlib import Path

import pytest

from tests.image.kubelet import Kubelet
from tests.manifests.rendering import K8S, Manifests, render
from tests.waiting import wait_until
from worker.sandbox.broker import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEPLOYMENT, SETTINGS, SECRET = "Deployment/qris-expire", "ConfigMap/qris-expire", "Secret/qris-expire-broker"
GATEWAY = "spec/template/spec/initContainers/0"


def here(amqp_url: str, prefix: str, metrics: int) -> Manifests:
    """The dev overlay on this machine: free ports, the tests' broker, a prefix of its own."""
    dev, gateway = render(K8S / "overlays" / "dev"), free_port()
    probe = dev.one("Deployment", "qris-expire")["spec"]["template"]["spec"]["initContainers"][0]["startupProbe"]
    command = [part.replace("8093", str(gateway)) for part in probe["exec"]["command"]]
    return (
        dev.with_(DEPLOYMENT, f"{GATEWAY}/args/1", f"--port={gateway}")
        .with_(DEPLOYMENT, f"{GATEWAY}/startupProbe/exec/command", command)
        .with_(SETTINGS, "data/GATEWAY_BASE_URL", f"http://127.0.0.1:{gateway}/v1.0")
        .with_(SETTINGS, "data/METRICS_PORT", str(metrics))
        .with_(SETTINGS, "data/AMQP_PREFIX", prefix)
        .with_(SECRET, "data/amqp-url", base64.b64encode(amqp_url.encode()).decode())
    )


def status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def test_the_dev_overlay_works(image: str, amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Worker and simulated gateway come up by their probes, a sweep expires its thousand bills, all end with 0."""

    metrics = free_port()
    dev = here(amqp_url, prefix, metrics)
    pods = {pod.owner: pod for pod in dev.pods()}
    for name in ("worker", "sweep"):
        (tmp_path / name).mkdir()
    with (
        Kubelet(dev, pods["Deployment/qris-expire"], image, tmp_path / "worker", f"worker-{metrics}") as worker,
        Kubelet(dev, pods["CronJob/qris-expire-sweep"], image, tmp_path / "sweep", f"sweep-{metrics}") as sweep,
    ):
        worker.start()
        wait_until(lambda: status(metrics, "/readyz") == 200, 60, "ready")
        assert status(metrics, "/livez") == 200
        sweep.start()
        assert sweep.wait("sweep", 120) == 0, sweep.log("sweep")
        report = (sweep.volume("state") / f"sweep-{metrics}.report.csv").read_text().splitlines()
        assert len(report) == 1 + 1000
        assert sum(",expired," in line for line in report) == 1000
        assert worker.stop("worker") == 0, worker.log("worker")
        assert worker.stop("gateway") == 0
