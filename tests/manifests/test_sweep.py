"""What an operator of the sweep finds: Jobs by their label, exports that work as they stand, links that lead on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.manifests.rendering import K8S, Manifests, job_spec, pod_template, render

COMPONENTS = ("export-postgres", "export-s3")


def overlay(directory: Path, component: str) -> Manifests:
    """Production with a component, as somebody does it: its line is no longer a comment."""
    shutil.copytree(K8S, directory / "k8s")
    path = directory / "k8s" / "overlays" / "production" / "kustomization.yaml"
    written = path.read_text()
    used = written.replace(f"#   - ../../components/{component}", f"components:\n  - ../../components/{component}")
    assert used != written
    path.write_text(used)
    return render(path.parent)


def export(manifests: Manifests) -> dict[str, Any]:
    """The container that writes the unpaid bills."""
    containers = pod_template(manifests.one("CronJob", "qris-expire-sweep"))["spec"]["initContainers"]
    return next(each for each in containers if each["name"] == "export")


def run(container: Mapping[str, Any], programs: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """The container's command, with these programs before the machine's own."""
    secret = programs / "secret"
    command = [part.replace("/etc/qris-expire/export", str(secret)) for part in container["command"]]
    environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
    return subprocess.run(
        [*command, str(target)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A `psql` and an `aws` that write what they are told to, and fail when there is a file `fail` beside them."""
    directory = tmp_path / "programs"
    (directory / "secret").mkdir(parents=True)
    for name, text in (("database-url", "postgresql://x"), ("source", "s3://bucket/unpaid")):
        (directory / "secret" / name).write_text(text)
    body = 'printf "billnumber,merchantId,reference\\n10092081,M1,ORD-77\\n" > "$file"\n'
    failing = f'echo "$*" >> {directory}/asked; test ! -e {directory}/fail || {{ echo half > "$file"; exit 1; }}\n'
    for name, finds in (
        ("psql", 'for each; do case "$each" in --output=*) file="${each#--output=}";; esac; done\n'),
        ("aws", 'for each; do file="$each"; done\n'),
    ):
        (directory / name).write_text(f"#!/bin/sh\n{finds}{failing}{body}")
        (directory / name).chmod(0o755)
    return directory


def test_jobs_are_found_by_their_component(production: Manifests) -> None:
    """`get jobs -l app.kubernetes.io/component=sweep` finds the sweeps, and the same selector their pods."""

    cron = production.one("CronJob", "qris-expire-sweep")
    for labels in (cron["spec"]["jobTemplate"]["metadata"]["labels"], pod_template(cron)["metadata"]["labels"]):
        assert labels["app.kubernetes.io/component"] == "sweep"


def test_a_pod_on_demand_reads_what_sweeps_leave(production: Manifests) -> None:
    """The reader mounts the claim of the sweeps, in the same place, and runs only when somebody scales it."""

    reader = production.one("Deployment", "qris-expire-sweep-reader")
    cron = pod_template(production.one("CronJob", "qris-expire-sweep"))["spec"]
    spec = pod_template(reader)["spec"]
    assert reader["spec"]["replicas"] == 0

    def claims(pod: dict[str, Any]) -> set[tuple[str, str]]:
        volumes = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["volumes"]
            if "persistentVolumeClaim" in volume
        }
        return {
            (volumes[mount["name"]], mount["mountPath"])
            for mount in pod["containers"][0]["volumeMounts"]
            if mount["name"] in volumes
        }

    assert claims(spec) == claims(cron) != set()


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_export_writes_a_file_whole_or_not_at_all(component: str, programs: Path, tmp_path: Path) -> None:
    """The worked example writes what `sweep` reads, leaves a file that is there, and leaves nothing when it fails."""

    container = export(overlay(tmp_path, component))
    target = tmp_path / "sweep-29.csv"
    (programs / "fail").touch()
    assert run(container, programs, target).returncode != 0
    assert not target.exists()
    (programs / "fail").unlink()
    done = run(container, programs, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert target.read_text() == "billnumber,merchantId,reference\n10092081,M1,ORD-77\n"
    target.write_text("billnumber\n1\n")
    assert run(container, programs, target).returncode == 0
    assert target.read_text() == "billnumber\n1\n"


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_export_keeps_the_rest_of_the_job(component: str, tmp_path: Path, production: Manifests) -> None:
    """Only image, command and environment of the export change."""

    changed = overlay(tmp_path, component)
    found, before = export(changed), export(production)
    for name in ("args", "volumeMounts", "securityContext", "resources"):
        assert found[name] == before[name]
    assert job_spec(changed.one("CronJob", "qris-expire-sweep"))["activeDeadlineSeconds"] == 10800


def test_alerts_lead_where_one_file_says(production: Manifests) -> None:
    """Each alert's links begin with the addresses of links.env, and end with its own section and namespace."""

    text = (K8S / "overlays" / "production" / "links.env").read_text()
    links = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    (manifest,) = production.of("PrometheusRule")
    alerts = [rule for group in manifest["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(alerts) > 30
    for rule in alerts:
        notes = rule["annotations"]
        assert notes["runbook_url"] == f"{links['RUNBOOK']}#{rule['alert'].lower()}"
        assert notes["dashboard_url"].startswith(f"{links['DASHBOARD']}?var-namespace=")
