"""The runbook's commands of `kubectl`, each run against an API that has what these manifests make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.manifests.cluster import JOB, NODE, Cluster, run, serving
from tests.manifests.rendering import K8S, Manifests

TEXTS = [(K8S / name).read_text() for name in ("RUNBOOK.md", "README.md")]
COMMANDS = sorted(
    {
        found.strip()
        for text in TEXTS
        for found in re.findall(r"^    (kubectl .+)$|`(kubectl [^`]+)`", text, re.MULTILINE)
        for found in found
        if found and " apply " not in found and " wait " not in found and "rollout status" not in found
        and "-dev " not in found and found not in ("kubectl logs", "kubectl apply -k", "kubectl delete -k")
        and not found.startswith("kubectl logs …")
    }
)  # fmt: skip
"""All but what needs more of a cluster: `apply` (its manifests are rendered and checked elsewhere) and what waits."""

PLACEHOLDERS = {"JOB": JOB, "POD": "qris-expire-2-abcde", "NODE": NODE}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_find_what_they_name(command: str, rendered: dict[str, Manifests], tmp_path: Path) -> None:
    """Namespace, kind, name, selector and options of the command are such that kubectl does it."""

    for placeholder, value in PLACEHOLDERS.items():
        command = re.sub(rf"\b{placeholder}\b", value, command)
    cluster = Cluster([rendered["production"], rendered["broker"]])
    with serving(cluster, tmp_path) as environment:
        codes, said = run(command, environment, tmp_path)
    assert codes, said
    assert set(codes) == {0}, said
    assert "No resources found" not in said or "get events" in command


@pytest.mark.parametrize(
    "command",
    [
        "kubectl -n qris-expire logs deploy/qris-expir",
        "kubectl -n qris-expire exec deploy/qris-expire-sweep -- ls",
        "kubectl -n qris-expire edit configmap",
        "kubectl -n qris-expire get jobs -l app.kubernetes.io/component=sweeps",
        "kubectl -n qris-rabbit exec qris-rabbitmq-server-0 -- rabbitmqctl list_queues",
    ],
)
def test_wrong_commands_are_noticed(command: str, rendered: dict[str, Manifests], tmp_path: Path) -> None:
    """A name, a namespace, an argument or a label that is wrong is seen."""

    with serving(Cluster([rendered["production"], rendered["broker"]]), tmp_path) as environment:
        codes, said = run(f"EDITOR=false {command}", environment, tmp_path)
    assert set(codes) != {0} or "No resources found" in said


def test_a_sweep_is_started_again_under_its_name(rendered: dict[str, Manifests], tmp_path: Path) -> None:
    """Deleting the Job and making it from the CronJob again keeps its name, which is the name of the batch."""

    cluster = Cluster([rendered["production"]])
    with serving(cluster, tmp_path) as environment:
        run(f"kubectl -n qris-expire delete job {JOB}", environment, tmp_path)
        codes, said = run(
            f"kubectl -n qris-expire create job {JOB} --from=cronjob/qris-expire-sweep", environment, tmp_path
        )
    assert codes == [0, 0], said
    jobs = "/apis/batch/v1/namespaces/qris-expire/jobs"
    assert cluster.calls == [("DELETE", f"{jobs}/{JOB}"), ("POST", jobs)]
    (made,) = cluster.made
    assert JOB.encode() in made
