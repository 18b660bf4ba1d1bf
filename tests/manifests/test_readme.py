"""The sums of k8s/README.md are right, and are the manifests'."""

import re

import pytest

from tests.manifests.rendering import K8S, Manifests, job_spec, pod_template

README = (K8S / "README.md").read_text()
SUM = re.compile(r"([0-9.() ×/+-]*[0-9)] [×/+-] [0-9.() ×/+-]*[0-9)]) = ([0-9]+)")
ROWS = dict(re.findall(r"^\| `?([\w ]+?)`?(?: `\w+`)? \| ([^|]+) \|", README.partition("## Sums")[2], re.MULTILINE))
TRIGGERS = dict(re.findall(r"^\| trigger `(\w+)` \| (\d+) \|", README, re.MULTILINE))


@pytest.mark.parametrize(("terms", "total"), SUM.findall(README))
def test_sums_add_up(terms: str, total: str) -> None:
    """What stands before a `=` is what stands behind it."""

    assert eval(terms.replace("×", "*"), {"__builtins__": {}}) == int(total)


def test_settings_are_the_manifests(production: Manifests) -> None:
    """Every setting of the table has the value of the ConfigMap."""

    settings = {name: value for name, value in ROWS.items() if name.isupper()}

    assert len(settings) == 4
    assert settings.items() <= production.settings().items()


def test_scaling_is_the_manifests(production: Manifests) -> None:
    """Replicas and triggers of the table are the ScaledObject's."""

    spec = production.one("ScaledObject", "qris-expire")["spec"]

    assert (int(ROWS["minReplicaCount"]), int(ROWS["maxReplicaCount"])) == (
        spec["minReplicaCount"],
        spec["maxReplicaCount"],
    )
    assert {trigger["name"]: trigger["metadata"]["value"] for trigger in spec["triggers"]} == TRIGGERS


def test_times_are_the_manifests(production: Manifests) -> None:
    """Deadlines of the table are the pods' and the Job's."""

    pod = pod_template(production.one("Deployment", "qris-expire"))["spec"]
    job = job_spec(production.one("CronJob", "qris-expire-sweep"))

    assert int(ROWS["terminationGracePeriodSeconds"]) == pod["terminationGracePeriodSeconds"]
    assert int(ROWS["activeDeadlineSeconds"]) == job["activeDeadlineSeconds"]


def test_every_path_exists() -> None:
    """Files and directories that the README names are there."""

    named = re.findall(r"k8s/[\w./-]+\w", README) + [
        f"k8s/{path}" for path in re.findall(r"^    (\S+)/ ", README, re.MULTILINE)
    ]

    assert len(named) > 10
    assert [path for path in named if not (K8S.parent / path).exists()] == []
