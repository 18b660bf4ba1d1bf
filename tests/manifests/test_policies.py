"""Every kustomization keeps every policy, and every policy is seen to object."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.manifests import policies
from tests.manifests.conftest import RENDERED
from tests.manifests.policies import POLICIES, Policy
from tests.manifests.rendering import DELETE, Manifests

DEPLOYMENT, SCALED, CRON = "Deployment/qris-expire", "ScaledObject/qris-expire", "CronJob/qris-expire-sweep"
SETTINGS = "ConfigMap/qris-expire"
POD = "spec/template/spec"
WORKER = f"{POD}/containers/0"
JOB = "spec/jobTemplate/spec"
SWEEP = f"{JOB}/template/spec/containers/0"
TOPOLOGY = "Job/qris-expire-topology"

BREAKS: dict[Policy, list[tuple[str, str, Any]]] = {
    policies.names_are_dns_names: [
        (DEPLOYMENT, f"{WORKER}/name", "X_bad"),
        (DEPLOYMENT, f"{WORKER}/ports/0/name", "much-too-long-a-name"),
        (CRON, "metadata/name", "qris-expire-sweep-" + "x" * 40),
    ],
    policies.selectors_select: [
        (DEPLOYMENT, "spec/selector/matchLabels", {"a": "b"}),
        ("PodDisruptionBudget/qris-expire", "spec/selector/matchLabels", {"a": "b"}),
        ("PodMonitor/qris-expire", "spec/selector/matchLabels", {"a": "b"}),
        ("NetworkPolicy/qris-expire-gateway", "spec/podSelector/matchLabels", {"a": "b"}),
        (DEPLOYMENT, f"{POD}/topologySpreadConstraints/0/labelSelector/matchLabels", {}),
        ("dev:Service/rabbitmq", "spec/selector", {"app.kubernetes.io/name": "rabbit"}),
    ],
    policies.ports_exist: [
        (DEPLOYMENT, f"{WORKER}/ports/0/containerPort", 99999),
        (DEPLOYMENT, f"{WORKER}/livenessProbe/httpGet/port", "http"),
        ("PodMonitor/qris-expire", "spec/podMetricsEndpoints/0/port", "http"),
        ("NetworkPolicy/qris-expire-metrics", "spec/ingress/0/ports/0/port", "http"),
        ("NetworkPolicy/qris-expire-gateway", "spec/egress/0/ports/0/port", 65536),
        ("dev:Service/rabbitmq", "spec/ports/0/targetPort", "ampq"),
        ("dev:Service/rabbitmq", "spec/ports/0/port", 0),
        (SETTINGS, "data/METRICS_PORT", "9109"),
    ],
    policies.probes_ask_what_is_served: [
        (DEPLOYMENT, f"{WORKER}/livenessProbe/httpGet/path", "/readyz"),
        (DEPLOYMENT, f"{WORKER}/readinessProbe", DELETE),
        (DEPLOYMENT, f"{WORKER}/livenessProbe/periodSeconds", 5),
    ],
    policies.resources_are_bounded: [
        (DEPLOYMENT, f"{WORKER}/resources/requests/memory", "1Gi"),
        (DEPLOYMENT, f"{WORKER}/resources/limits/memory", "a lot"),
        (CRON, f"{SWEEP}/resources/limits", {}),
        (DEPLOYMENT, f"{POD}/volumes/2/emptyDir", {}),
    ],
    policies.pods_are_restricted: [
        (DEPLOYMENT, f"{POD}/securityContext/runAsNonRoot", False),
        (DEPLOYMENT, f"{POD}/securityContext/seccompProfile", {}),
        (DEPLOYMENT, f"{WORKER}/securityContext/readOnlyRootFilesystem", False),
        (DEPLOYMENT, f"{WORKER}/securityContext/capabilities", {}),
        (CRON, f"{SWEEP}/securityContext/allowPrivilegeEscalation", True),
        (DEPLOYMENT, f"{POD}/hostNetwork", True),
        (DEPLOYMENT, f"{POD}/volumes/2", {"name": "tmp", "hostPath": {"path": "/"}}),
        ("Namespace/qris-expire", "metadata/labels", {}),
        (f"dev:{DEPLOYMENT}", f"{POD}/initContainers/0/securityContext", {}),
    ],
    policies.pods_get_no_more_than_they_need: [
        (DEPLOYMENT, f"{POD}/automountServiceAccountToken", True),
        (DEPLOYMENT, f"{POD}/enableServiceLinks", DELETE),
        (DEPLOYMENT, f"{WORKER}/envFrom/1", {"secretRef": {"name": "x"}}),
        (DEPLOYMENT, f"{WORKER}/volumeMounts/0/subPath", "amqp-url"),
        ("ServiceAccount/qris-expire", "automountServiceAccountToken", DELETE),
    ],
    policies.images_are_pinned: [
        (DEPLOYMENT, f"{WORKER}/image", "registry.example:5000/qris-expire-worker"),
        (DEPLOYMENT, f"{WORKER}/image", "qris-expire-worker:latest"),
    ],
    policies.references_exist: [
        (DEPLOYMENT, f"{POD}/volumes/0/secret/secretName", "qris-expire-brokre"),
        (DEPLOYMENT, f"{WORKER}/envFrom/0/configMapRef/name", "qris-expire"),
        (DEPLOYMENT, f"{POD}/serviceAccountName", "default"),
        (CRON, f"{JOB}/template/spec/volumes/0/persistentVolumeClaim/claimName", "x"),
        (DEPLOYMENT, f"{WORKER}/volumeMounts/0/name", "brokre"),
        ("TriggerAuthentication/qris-expire", "spec/secretTargetRef/0/key", "user"),
        ("broker:User/qris-expire-worker", "spec/importCredentialsSecret/name", "x"),
    ],
    policies.arguments_are_the_command_line_s: [
        (DEPLOYMENT, f"{WORKER}/args", ["run", "--fast"]),
        (DEPLOYMENT, f"{WORKER}/args", ["rnu"]),
        (CRON, f"{SWEEP}/args/2", "--batch=$(JOB_NAME)"),
        (f"topology-job:{TOPOLOGY}", f"{WORKER}/args/1", "--aply"),
    ],
    policies.secret_settings_are_mounted: [
        (SETTINGS, "data/AMQP_URL_FILE", "/etc/qris-expire/broker/url"),
        (DEPLOYMENT, f"{WORKER}/volumeMounts/1/mountPath", "/etc/gateway"),
        (CRON, f"{SWEEP}/volumeMounts/2/mountPath", "/etc/broker"),
    ],
    policies.drain_fits: [
        (SETTINGS, "data/WORKER_DRAIN_SECONDS", "25"),
        (SETTINGS, "data/GATEWAY_READ_TIMEOUT_SECONDS", "60"),
        (DEPLOYMENT, f"{POD}/terminationGracePeriodSeconds", DELETE),
    ],
    policies.replicas_have_one_master: [
        (DEPLOYMENT, "spec/replicas", 3),
        (SCALED, "spec/scaleTargetRef/name", "qris-expire-worker"),
        (f"dev:{DEPLOYMENT}", "spec/replicas", DELETE),
    ],
    policies.scaling_counts_the_lanes: [
        (SCALED, "spec/triggers/0/metadata/queueName", "qris.expire.cancel"),
        (SCALED, "spec/triggers/0/metadata/protocol", "amqp"),
        (SCALED, "spec/triggers/1/metadata/excludeUnacknowledged", "true"),
        (SCALED, "spec/triggers/0/metadata/vhostName", "payments"),
        (SCALED, "spec/triggers/0/authenticationRef/name", "x"),
        (SETTINGS, "data/AMQP_PREFIX", "other"),
    ],
    policies.scaling_respects_prefetch_and_partner: [
        (SCALED, "spec/triggers/0/metadata/value", "64"),
        (SCALED, "spec/minReplicaCount", 0),
        (SETTINGS, "data/GATEWAY_MAX_REQUESTS_PER_SECOND", "0"),
        (SETTINGS, "data/GATEWAY_MAX_REQUESTS_PER_SECOND", "101"),
        (SETTINGS, "data/WORKER_PROCESSES", "8"),
    ],
    policies.jobs_end: [
        (CRON, f"{JOB}/template/spec/restartPolicy", "Always"),
        (CRON, f"{JOB}/activeDeadlineSeconds", DELETE),
        (f"topology-job:{TOPOLOGY}", "spec/ttlSecondsAfterFinished", DELETE),
    ],
    policies.jobs_know_our_exit_codes: [
        (CRON, f"{JOB}/podFailurePolicy/rules/1/onExitCodes/values", [3]),
        (CRON, f"{JOB}/podFailurePolicy/rules/1/onExitCodes/containerName", "x"),
        (CRON, f"{JOB}/podFailurePolicy/rules/0/onPodConditions/0/status", DELETE),
    ],
    policies.sweeps_come_once_a_day: [
        (CRON, "spec/schedule", "99 99 * * *"),
        (CRON, "spec/schedule", "5 0 * *"),
        (CRON, "spec/timeZone", "Asia/Jakata"),
        (CRON, "spec/concurrencyPolicy", "Allow"),
        (CRON, "spec/startingDeadlineSeconds", DELETE),
    ],
    policies.sweeps_keep_their_journal: [
        (CRON, f"{SWEEP}/args/2", "--batch-id=today"),
        (CRON, f"{SWEEP}/args/1", "/tmp/$(JOB_NAME).csv"),
        (CRON, f"{JOB}/template/spec/volumes/0", {"name": "state", "emptyDir": {}}),
        (CRON, f"{SWEEP}/volumeMounts/0/mountPath", "/data"),
        (CRON, f"{SWEEP}/env", []),
    ],
    policies.network_is_closed: [
        ("NetworkPolicy/default-deny", "spec/policyTypes", ["Ingress"]),
        ("NetworkPolicy/qris-expire-gateway", "spec/egress/0/to/0/ipBlock/except/2", "10.9.0.0/16"),
        ("NetworkPolicy/qris-expire-gateway", "spec/egress/0/to", []),
        ("NetworkPolicy/qris-expire-metrics", "spec/ingress/0/from", []),
    ],
    policies.network_lets_the_worker_work: [
        ("NetworkPolicy/qris-expire-broker", "spec/egress/0/ports/0/port", 5672),
        (SETTINGS, "data/GATEWAY_BASE_URL", "https://gateway.example:8443/v1.0"),
    ],
    policies.deleting_resources_loses_nothing: [
        ("broker:Queue/qris.expire.sweep", "spec/deletionPolicy", DELETE),
        ("broker:Binding/qris.expire.sweep", "spec/rabbitmqClusterReference/name", "x"),
        ("broker:Permission/qris-expire-worker", "spec/userReference/name", "x"),
    ],
    policies.delays_have_their_queue: [
        (SETTINGS, "data/RETRY_DELAYS_SECONDS", "30,300,3600"),
    ],
}
"""What to change (of production, unless another is named), where, and to what: the policy must object to each."""

CASES = [(policy, *case) for policy, cases in BREAKS.items() for case in cases]


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_manifests_keep(policy: Policy, name: str, rendered: dict[str, Manifests]) -> None:
    """No complaints."""

    assert list(policy(rendered[name])) == []


@pytest.mark.parametrize(("policy", "what", "path", "value"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_policies_object(policy: Policy, what: str, path: str, value: Any, rendered: dict[str, Manifests]) -> None:
    """One thing changed, and the policy complains."""

    name, _, what = what.rpartition(":")

    assert list(policy(rendered[name or "production"].with_(what, path, value)))


def test_every_policy_was_seen_to_object() -> None:
    """There is no policy that nothing can break; that of the example's secrets has a test of its own."""

    assert {*BREAKS, policies.example_holds_no_secret} == set(POLICIES)


def test_a_filled_in_example_is_noticed(production: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real password in the example, or a Secret among production's manifests, is objected to."""

    filled: Callable[[str], Any] = lambda _text: [{"metadata": {"name": "x"}, "stringData": {"password": "hunter2"}}]  # noqa: E731
    monkeypatch.setattr(policies, "read", filled)

    assert list(policies.example_holds_no_secret(production))
