"""Every kustomization, rendered once."""

import shutil
from pathlib import Path

import pytest

from tests.manifests.rendering import K8S, Manifests, render

RENDERED = ("production", "dev", "broker", "topology-job")
"""Names in `rendered`."""


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifests]:
    """By name; topology-job is production with that component."""
    return {
        "production": render(K8S / "overlays" / "production"),
        "dev": render(K8S / "overlays" / "dev"),
        "broker": render(K8S / "broker"),
        "topology-job": render(_with_topology_job(tmp_path_factory.mktemp("k8s"))),
    }


@pytest.fixture
def production(rendered: dict[str, Manifests]) -> Manifests:
    return rendered["production"]


def _with_topology_job(directory: Path) -> Path:
    """As somebody does it: the two lines are no longer comments."""
    shutil.copytree(K8S, directory / "k8s")
    overlay = directory / "k8s" / "overlays" / "production"
    written = (overlay / "kustomization.yaml").read_text()
    used = written.replace("# components:\n#   - ", "components:\n  - ")
    assert used != written
    (overlay / "kustomization.yaml").write_text(used)
    return overlay
