"""The package: one version, and types for those who import it."""

import re
from importlib.resources import files

import pytest

from tests.readme import ROOT
from worker import __version__

PLACES = [
    ("Dockerfile", r"^ARG VERSION=(.*)$"),
    ("Dockerfile", r"--tag qris-expire-worker:(\S+)"),
    ("k8s/overlays/production/kustomization.yaml", r"name: qris-expire-worker\n(?:.*\n)*?    newTag: (.*)$"),
]


@pytest.mark.parametrize(("file", "pattern"), PLACES)
def test_the_version_is_the_package_s(file: str, pattern: str) -> None:
    """What cannot read the version from the package names the same one."""

    found = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)

    assert found[:1] == [__version__]


def test_the_version_is_written_in_no_other_place() -> None:
    """The project's file takes the version from the package."""

    project = (ROOT / "pyproject.toml").read_text()

    assert 'dynamic = ["version"]' in project
    assert 'path = "worker/__init__.py"' in project
    assert not re.search(r"^version = ", project, re.MULTILINE)


def test_the_package_is_typed() -> None:
    """The marker that tells type checkers to read our annotations is in the package."""

    assert (files("worker") / "py.typed").is_file()
