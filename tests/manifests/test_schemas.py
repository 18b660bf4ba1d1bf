"""Every manifest fits its schema, strictly; a kind that has none is an error."""

import json
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from kubernetes_validate import SchemaNotFoundError, ValidationError

from tests.manifests.conftest import RENDERED
from tests.manifests.rendering import DELETE, EXAMPLE_SECRETS, SHARED_SCHEMAS, Manifest, Manifests, read

OLDEST, NEWEST = "1.31.0", "1.37.0"
"""podFailurePolicy is stable from 1.31 on; 1.37 is what the schemas know."""

CUSTOM = ("keda.sh", "monitoring.coreos.com", "rabbitmq.com")
"""Groups whose schemas lie beside the checkout, if at all."""


def check(manifest: Manifest, version: str) -> None:
    """Raises what is wrong."""
    group, _, api = manifest["apiVersion"].rpartition("/")
    if group not in CUSTOM:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    path = SHARED_SCHEMAS / group / f"{manifest['kind'].lower()}_{api}.json"
    if not path.exists():
        raise SchemaNotFoundError(manifest["kind"], version, manifest["apiVersion"])
    # The schemas themselves are not looked at: some of their patterns are Go's, which Python does not know.
    for error in jsonschema.Draft202012Validator(json.loads(path.read_text())).iter_errors(manifest):
        raise error


def check_all(manifests: Manifests, version: str, *, custom: bool) -> None:
    """Those of Kubernetes' own, or the others."""
    for manifest in manifests.documents:
        if is_custom(manifest) == custom:
            check(manifest, version)


def needs_schemas_of_custom_resources() -> None:
    if not SHARED_SCHEMAS.exists():
        pytest.skip(f"CUSTOM RESOURCES NOT VALIDATED: there is no {SHARED_SCHEMAS}")


def is_custom(manifest: Manifest) -> bool:
    return str(manifest["apiVersion"]).partition("/")[0] in CUSTOM


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("name", RENDERED)
def test_core_kinds_fit(name: str, version: str, rendered: dict[str, Manifests]) -> None:
    """All that is Kubernetes' own fits the oldest and the newest version."""

    check_all(rendered[name], version, custom=False)


@pytest.mark.parametrize("name", RENDERED)
def test_custom_kinds_fit(name: str, rendered: dict[str, Manifests]) -> None:
    """What KEDA, Prometheus and the RabbitMQ operators read fits their schemas."""

    needs_schemas_of_custom_resources()
    check_all(rendered[name], NEWEST, custom=True)


def test_example_secrets_fit() -> None:
    """The Secrets that are applied by hand are Secrets."""

    for manifest in read(EXAMPLE_SECRETS.read_text()):
        check(manifest, NEWEST)


@pytest.mark.parametrize(
    ("what", "path", "value"),
    [
        ("Deployment/qris-expire", "spec/template/spec/containers/0/imagePullPolcy", "Always"),
        ("Deployment/qris-expire", "spec/template/spec/containers/0/ports/0/containerPort", "metrics"),
        ("Deployment/qris-expire", "spec/selector", DELETE),
        ("CronJob/qris-expire-sweep", "spec/jobTemplate/spec/podFailurePolicy/rules/0/action", 1),
        ("CronJob/qris-expire-sweep", "spec/timezone", "Asia/Jakarta"),
        ("PodDisruptionBudget/qris-expire", "apiVersion", "policy/v1beta1"),
        ("PodDisruptionBudget/qris-expire", "kind", "PodDisruptionBudgt"),
    ],
)
def test_core_schemas_object(what: str, path: str, value: Any, production: Manifests) -> None:
    """A misspelt or missing field, a wrong type, a version that was removed or a kind that is unknown is an error."""

    changed = production.with_(what, path, value)

    with pytest.raises((ValidationError, SchemaNotFoundError)):
        check_all(changed, NEWEST, custom=False)


@pytest.mark.parametrize(
    ("name", "what", "path", "value"),
    [
        ("production", "ScaledObject/qris-expire", "spec/pollingIntervall", 15),
        ("production", "ScaledObject/qris-expire", "spec/triggers/0/metadata", DELETE),
        ("production", "PodMonitor/qris-expire", "spec/podMetricsEndpoints/0/filterRunning", "true"),
        ("production", "PodMonitor/qris-expire", "kind", "PodMonitr"),
        ("production", "AlertmanagerConfig/qris-expire", "spec/inhibitRules/0/targetMatch/0/matchTyp", "="),
        ("production", "AlertmanagerConfig/qris-expire", "spec/receivers/0/name", DELETE),
        ("broker", "Queue/qris.expire.sweep", "spec/deletionPolicy", "keep"),
        ("broker", "RabbitmqCluster/qris-rabbitmq", "spec/tls/secret", "x"),
    ],
)
def test_custom_schemas_object(name: str, what: str, path: str, value: Any, rendered: dict[str, Manifests]) -> None:
    """The same of custom resources."""

    needs_schemas_of_custom_resources()
    changed = rendered[name].with_(what, path, value)

    with pytest.raises((jsonschema.ValidationError, SchemaNotFoundError)):
        check_all(changed, NEWEST, custom=True)
