"""The manifests and the worker's own code agree: settings, topology, metrics, files."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from tests.manifests.policies import broker_url
from tests.manifests.rendering import K8S, Manifests, pod_template
from worker import __version__
from worker.core.fitness import hides_commands, policy_problems, version_problem
from worker.core.topology import Binding, Exchange, Queue, Topology, topology
from worker.sandbox.simulator import own_key, private_pem
from worker.settings import AmqpSettings, RetrySettings, Settings, SettingsError, load
from worker.shells.metrics import Metrics


def settings_in(manifests: Manifests, directory: Path, **changed: str) -> Settings:
    """What the worker loads in its pod, whose mounted files are made in `directory`."""
    environ = {**manifests.settings(), **changed}
    files = {name: Path(value) for name, value in environ.items() if name.endswith("_FILE") and value}
    for name, path in files.items():
        there = directory / path.relative_to("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(_content(manifests, name))
        environ[name] = str(there)
    return load(environ=environ, env_file=None)


def _content(manifests: Manifests, name: str) -> str:
    if name == "AMQP_URL_FILE":
        return broker_url(manifests)
    return private_pem(own_key()).decode() if name == "GATEWAY_PRIVATE_KEY_FILE" else "of the partner\n"


@pytest.mark.parametrize("name", ["production", "dev", "topology-job"])
def test_settings_load(name: str, rendered: dict[str, Manifests], tmp_path: Path) -> None:
    """The worker takes every setting of the ConfigMap, with the files that the Secrets mount."""

    settings = settings_in(rendered[name], tmp_path)

    assert settings.amqp.declare is (name == "dev")
    assert settings.amqp.urls() == [broker_url(rendered[name])]


def test_a_misspelt_setting_is_noticed(production: Manifests, tmp_path: Path) -> None:
    """A key of the ConfigMap that the worker does not know ends in an error that names it."""

    with pytest.raises(SettingsError, match="WORKER_CONCURENCY: unknown setting"):
        settings_in(production, tmp_path, WORKER_CONCURENCY="64")


def declared(manifests: Manifests) -> Topology:
    """What the topology operator would declare."""

    def arguments(spec: Mapping[str, Mapping[str, str | int]]) -> dict[str, str | int]:
        return dict(spec.get("arguments", {}))

    specs = [(each["kind"], each["spec"]) for each in manifests.of("Exchange", "Queue", "Binding")]
    assert all(it["vhost"] == "/" for _, it in specs)
    assert all(it["durable"] and not it["autoDelete"] for kind, it in specs if kind != "Binding")
    return Topology(
        tuple(Exchange(it["name"], it["type"], arguments(it)) for kind, it in specs if kind == "Exchange"),
        tuple(
            Queue(it["name"], {"x-queue-type": it["type"], **arguments(it)}) for kind, it in specs if kind == "Queue"
        ),
        tuple(
            Binding(it["source"], it["destination"], it.get("routingKey", ""))
            for kind, it in specs
            if kind == "Binding"
        ),
    )


def by_name(it: Topology) -> list[object]:
    return sorted([*it.exchanges, *it.queues, *it.bindings], key=repr)


def test_topology_is_the_worker_s(rendered: dict[str, Manifests], tmp_path: Path) -> None:
    """The broker's resources are exactly what `qris-expire topology` declares with production's settings."""

    settings = settings_in(rendered["production"], tmp_path)
    amqp, retry = settings.amqp, settings.retry

    wanted = topology(amqp.prefix, amqp.queue_type, retry.delays_seconds)

    assert by_name(declared(rendered["broker"])) == by_name(wanted)


@pytest.mark.parametrize(
    ("what", "path", "value"),
    [
        ("Queue/qris.expire.sweep", "spec/arguments/x-delivery-limit", 20),
        ("Queue/qris.expire.sweep.retry.30", "spec/arguments/x-message-ttl", 30),
        ("Queue/qris.expire.dead", "spec/type", "classic"),
        ("Exchange/qris.expire.outcomes", "spec/arguments", {}),
        ("Binding/qris.expire.sweep", "spec/routingKey", "cancellation"),
    ],
)
def test_another_topology_is_noticed(
    what: str, path: str, value: object, rendered: dict[str, Manifests], tmp_path: Path
) -> None:
    """One argument that is not the worker's, and they are no longer equal."""

    settings = settings_in(rendered["production"], tmp_path)

    wanted = topology(settings.amqp.prefix, settings.amqp.queue_type, settings.retry.delays_seconds)

    assert by_name(declared(rendered["broker"].with_(what, path, value))) != by_name(wanted)


def test_a_scrape_fits_the_sample_limit(production: Manifests) -> None:
    """All series of a worker, which exist from the start, are less than half of what the PodMonitor takes."""

    series = [line for line in Metrics(__version__).render().decode().splitlines() if not line.startswith("#")]

    assert 100 < len(series) < production.one("PodMonitor", "qris-expire")["spec"]["sampleLimit"] / 2


def test_every_file_is_used() -> None:
    """No manifest lies beside a kustomization that does not list it."""

    for kustomization in K8S.rglob("kustomization.yaml"):
        written = yaml.safe_load(kustomization.read_text())
        generated = [*written.get("configMapGenerator", []), *written.get("secretGenerator", [])]
        listed = {
            *written.get("resources", []),
            *(patch["path"] for patch in written.get("patches", []) if "path" in patch),
            *(path for each in generated for path in [*each.get("envs", []), *each.get("files", [])]),
        }
        there = {path.name for path in kustomization.parent.iterdir() if path.is_file()} - {kustomization.name}
        assert there <= listed, f"{kustomization.parent.name}: {there - listed} is not listed"


def test_the_prefix_is_one(rendered: dict[str, Manifests]) -> None:
    """The permissions cover exactly the prefix of the settings."""

    prefix = AmqpSettings.declared()["prefix"].default

    (worker,) = (
        each for each in rendered["broker"].of("Permission") if each["metadata"]["name"] == "qris-expire-worker"
    )
    assert rendered["production"].settings()["AMQP_PREFIX"] == prefix
    assert all(prefix.replace(".", r"\.") + r"\." in pattern for pattern in worker["spec"]["permissions"].values())


def test_the_broker_is_pinned_and_fit(rendered: dict[str, Manifests]) -> None:
    """The broker's image names a release of RabbitMQ that is fit, and the policy is one that removes nothing."""

    (cluster,) = rendered["broker"].of("RabbitmqCluster")
    (policy,) = rendered["broker"].of("Policy")
    version = cluster["spec"]["image"].rpartition(":")[2]

    assert re.match(r"\d+\.\d+\.\d+", version)
    assert version_problem(version) is None
    for queue in topology(AmqpSettings.declared()["prefix"].default, "quorum", (30,)).queues:
        assert list(policy_problems(queue, policy["spec"]["definition"])) == []
        if queue.arguments["x-queue-type"] == "quorum":
            assert re.match(policy["spec"]["pattern"], queue.name)
    assert hides_commands(version, "quorum", policy["spec"]["definition"]) is None


def test_the_image_is_the_image_s_user(production: Manifests) -> None:
    """Pods run as the user that the Dockerfile names, with the port that it exposes."""

    dockerfile = (K8S.parent / "Dockerfile").read_text()

    for kind in ("Deployment", "CronJob"):
        for manifest in production.of(kind):
            context = pod_template(manifest)["spec"]["securityContext"]
            assert f"\nUSER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile
    assert f"\nEXPOSE {production.settings()['METRICS_PORT']}\n" in dockerfile


def test_retry_delays_are_the_default(production: Manifests) -> None:
    """The manifests' delays are the code's, whose queues the example topology has."""

    written = production.settings()["RETRY_DELAYS_SECONDS"]

    assert tuple(map(int, written.split(","))) == RetrySettings.declared()["delays_seconds"].default


def test_queues_have_the_workers_namespace(rendered: dict[str, Manifests], tmp_path: Path) -> None:
    """RabbitMQ's metrics of the worker's queues get the namespace of the worker, and those of other queues do not."""

    (monitor,) = rendered["broker"].of("PodMonitor")
    (rule,) = (rule for each in monitor["spec"]["podMetricsEndpoints"] for rule in each.get("metricRelabelings", []))
    settings = settings_in(rendered["production"], tmp_path)

    def matches(queue: str) -> bool:
        return re.fullmatch(rule["regex"], f"/;{queue}") is not None

    assert (rule["sourceLabels"], rule["targetLabel"]) == (["vhost", "queue"], "namespace")
    assert rule["replacement"] == rendered["production"].one("Deployment", "qris-expire")["metadata"]["namespace"]
    assert all(matches(queue.name) for queue in topology(settings.amqp.prefix, "quorum", (30,)).queues)
    assert not matches("orders.outcomes")
