"""A cluster that is only as much as `kubectl` needs to be asked: the rendered manifests behind a Kubernetes API.

Pods, Jobs and ReplicaSets are made from the templates, as their controllers would. Nothing runs: `exec` and
`port-forward`, which want a connection into a pod, are asked of `kubectl get`, so that their target must be there.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.manifests.rendering import Manifest, Manifests, kubectl, pod_template

JOB: Final = "qris-expire-sweep-29401025"
NODE: Final = "node-1"


class Resource(NamedTuple):
    """What the API serves under this name."""

    group: str
    version: str
    plural: str
    kind: str
    short: tuple[str, ...] = ()


RESOURCES: Final = (
    Resource("", "v1", "pods", "Pod", ("po",)),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "configmaps", "ConfigMap", ("cm",)),
    Resource("", "v1", "events", "Event", ("ev",)),
    Resource("", "v1", "services", "Service", ("svc",)),
    Resource("apps", "v1", "deployments", "Deployment", ("deploy",)),
    Resource("apps", "v1", "replicasets", "ReplicaSet", ("rs",)),
    Resource("batch", "v1", "cronjobs", "CronJob", ("cj",)),
    Resource("batch", "v1", "jobs", "Job"),
    Resource("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", ("hpa",)),
    Resource("keda.sh", "v1alpha1", "scaledobjects", "ScaledObject", ("so",)),
)


class Cluster:
    """The objects, by namespace; `calls` are the requests that changed something."""

    def __init__(self, manifests: list[Manifests]) -> None:
        self.objects: list[Manifest] = []
        self.calls: list[tuple[str, str]] = []
        self.made: list[bytes] = []
        """What was posted, in whatever form."""
        for each in manifests:
            for manifest in [*copy.deepcopy(each.documents), *copy.deepcopy(each.secrets)]:
                manifest["metadata"].setdefault("uid", f"{manifest['kind']}-{manifest['metadata']['name']}")
                self.objects.append(manifest)
                self._controlled(manifest)
        self._add("v1", "Pod", "qris-rabbitmq", "qris-rabbitmq-server-0", {"app.kubernetes.io/name": "qris-rabbitmq"})
        self._add("autoscaling/v2", "HorizontalPodAutoscaler", "qris-expire", "keda-hpa-qris-expire", {})

    def _controlled(self, manifest: Manifest) -> None:
        """What its controller would make of it."""
        name, namespace = manifest["metadata"]["name"], manifest["metadata"].get("namespace", "")
        match manifest["kind"]:
            case "Deployment":
                manifest["spec"].setdefault("replicas", 1)
                template = pod_template(manifest)
                for revision in (1, 2):
                    self._add(
                        "apps/v1", "ReplicaSet", namespace, f"{name}-{revision}", template["metadata"]["labels"],
                        spec={"template": template, "replicas": revision - 1},
                        annotations={"deployment.kubernetes.io/revision": str(revision)}, owner=manifest,
                    )  # fmt: skip
                self._pod(namespace, f"{name}-2-abcde", template["metadata"]["labels"], template["spec"])
            case "CronJob":
                template, labels = pod_template(manifest), manifest["spec"]["jobTemplate"]["metadata"]["labels"]
                own = {"batch.kubernetes.io/job-name": JOB}
                self._add("batch/v1", "Job", namespace, JOB, labels, spec={"selector": {"matchLabels": own}})
                self._pod(namespace, f"{JOB}-fghij", {**template["metadata"]["labels"], **own}, template["spec"])

    def _pod(self, namespace: str, name: str, labels: dict[str, str], spec: Manifest) -> None:
        self._add("v1", "Pod", namespace, name, labels, spec={**spec, "nodeName": NODE})

    def _add(
        self,
        version: str,
        kind: str,
        namespace: str,
        name: str,
        labels: dict[str, str],
        *,
        spec: Manifest | None = None,
        annotations: dict[str, str] | None = None,
        owner: Manifest | None = None,
    ) -> None:
        metadata: Manifest = {"name": name, "namespace": namespace, "labels": labels, "uid": f"{kind}-{name}"}
        metadata["annotations"] = annotations or {}
        if owner is not None:
            about = {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"], "controller": True}
            metadata["ownerReferences"] = [{"apiVersion": owner["apiVersion"], "kind": owner["kind"], **about}]
        containers = {"containers": [{"name": "only", "image": "x"}]}
        self.objects.append(
            {
                "apiVersion": version,
                "kind": kind,
                "metadata": metadata,
                "spec": spec or containers,
                "status": {"phase": "Running"},
            }
        )

    # -- the API

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        """Status, and a document or a log's text."""
        parts = path.strip("/").split("/")
        if found := self._discovery(parts):
            return 200, found
        group, version, rest = ("", parts[1], parts[2:]) if parts[0] == "api" else (parts[1], parts[2], parts[3:])
        if rest[:1] != ["namespaces"] or len(rest) < 3:
            return 404, _status(404, f"no {path}")
        namespace, plural, name, *sub = [*rest[1:3], *rest[3:], *[""] * (4 - len(rest))]
        resource = next((r for r in RESOURCES if (r.group, r.version, r.plural) == (group, version, plural)), None)
        if resource is None:
            return 404, _status(404, f"no {plural}")
        objects = [o for o in self.objects if o["kind"] == resource.kind and o["metadata"]["namespace"] == namespace]
        if not name:
            if method == "POST":
                self.calls.append((method, path))
                self.made.append(body)
                return 201, {"apiVersion": _api(resource), "kind": resource.kind, "metadata": {"name": "made"}}
            kept = [o for o in objects if _selected(o, query)]
            return 200, {"apiVersion": _api(resource), "kind": f"{resource.kind}List", "metadata": {}, "items": kept}
        found_one = next((o for o in objects if o["metadata"]["name"] == name), None)
        if found_one is None:
            return 404, _status(404, f'{plural} "{name}" not found')
        return self._one(method, path, found_one, sub[0] if sub else "", body)

    def _one(self, method: str, path: str, found: Manifest, sub: str, body: bytes) -> tuple[int, Any]:
        if method != "GET":
            self.calls.append((method, path))
        if sub == "log":
            return 200, "one line\n"
        if sub == "scale":
            replicas = {"replicas": found["spec"].get("replicas", 1)}
            return 200, {
                "apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": found["metadata"],
                "spec": replicas, "status": replicas,
            }  # fmt: skip
        if method == "DELETE":
            self.objects.remove(found)
        return 200, found

    def _discovery(self, parts: list[str]) -> Manifest | None:
        groups = sorted({(r.group, r.version) for r in RESOURCES if r.group})
        match parts:
            case ["version"]:
                return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
            case ["api"]:
                return {"kind": "APIVersions", "versions": ["v1"]}
            case ["apis"]:
                versions = [
                    {"name": group, "versions": [each], "preferredVersion": each}
                    for group, version in groups
                    for each in [{"groupVersion": f"{group}/{version}", "version": version}]
                ]
                return {"kind": "APIGroupList", "apiVersion": "v1", "groups": versions}
            case ["api", version]:
                return _resources("", version)
            case ["apis", group, version]:
                return _resources(group, version)
        return None


def _resources(group: str, version: str) -> Manifest:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    return {
        "kind": "APIResourceList",
        "groupVersion": f"{group}/{version}".strip("/"),
        "resources": [
            {
                "name": each.plural, "singularName": each.kind.lower(), "namespaced": True, "kind": each.kind,
                "verbs": verbs, "shortNames": list(each.short),
            }
            for each in RESOURCES
            if (each.group, each.version) == (group, version)
        ],
    }  # fmt: skip


def _api(resource: Resource) -> str:
    return f"{resource.group}/{resource.version}".strip("/")


def _selected(manifest: Manifest, query: dict[str, list[str]]) -> bool:
    labels: dict[str, str] = manifest["metadata"].get("labels", {})
    wanted = dict(each.split("=", 1) for each in query.get("labelSelector", [""])[0].split(",") if "=" in each)
    return wanted.items() <= labels.items()


def _status(code: int, message: str) -> Manifest:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": "NotFound",
        "code": code,
        "message": message,
    }


@contextmanager
def serving(cluster: Cluster, directory: Path) -> Iterator[dict[str, str]]:
    """The environment in which `kubectl` asks this cluster; its exit codes are lines of `codes` in the directory."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, found = cluster.answer(self.command, asked.path, parse_qs(asked.query), body)
            text = found if isinstance(found, str) else json.dumps(found)
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(found, str) else "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": url}}], "users": [],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": ""}}],
        }  # fmt: skip
        (directory / "config").write_text(yaml.safe_dump(config))
        wrapper = directory / "kubectl"
        wrapper.write_text(_WRAPPER.format(kubectl=kubectl(), codes=directory / "codes"))
        wrapper.chmod(0o755)
        try:
            yield {
                "PATH": f"{directory}:{os.environ['PATH']}",
                "HOME": str(directory),
                "KUBECONFIG": str(directory / "config"),
            }
        finally:
            server.shutdown()


_WRAPPER: Final = """\
#!/bin/sh
# exec and port-forward want a connection into a pod: here their target must be there.
all="$*"
set -- "$@"
case "$all" in
*' exec '* | *' port-forward '*)
    namespace="$2" target="$4"
    case "$target" in */*) ;; *) target="pod/$target" ;; esac
    {kubectl} -n "$namespace" get "$target"
    ;;
*) {kubectl} "$@" ;;
esac
code=$?
echo "$code" >> {codes}
exit "$code"
"""


def run(command: str, environment: dict[str, str], directory: Path) -> tuple[list[int], str]:
    """A line of the runbook in a shell: the exit codes of `kubectl` in it, and all that it said."""
    done = subprocess.run(
        ["sh", "-c", command], env=environment, cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    codes = [int(line) for line in (directory / "codes").read_text().split()]
    return codes, done.stdout + done.stderr
