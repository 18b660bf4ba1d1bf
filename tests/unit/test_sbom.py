"""What a build consists of, as `.ci/sbom` tells it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this environment."""
    directory = tmp_path_factory.mktemp("sbom")
    command = [sys.executable, str(ROOT / ".ci" / "sbom"), str(directory), sysconfig.get_path("purelib")]
    subprocess.run(command, check=True, timeout=60)
    return directory


def bill(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "sbom.cdx.json").read_text()))


def test_every_pinned_requirement_is_in_it(told: Path) -> None:
    """The bill of materials has each package of requirements.txt and the product, each with a licence."""

    found = bill(told)
    names = {each["name"] for each in found["components"]}
    pinned = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert pinned <= names
    assert found["metadata"]["component"]["name"] == "qris-expire-worker"
    lines = (told / "licences.txt").read_text().splitlines()
    licences = {line.split(" ")[0]: line.partition(": ")[2] for line in lines}
    assert {name for name in pinned if licences[name] in ("", "UNKNOWN")} == set()


def test_the_bill_is_whole(told: Path) -> None:
    """It is CycloneDX 1.6, its references are unique, and every dependency is one of its components."""

    found = bill(told)
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    references = [each["bom-ref"] for each in found["components"]] + [found["metadata"]["component"]["bom-ref"]]
    assert len(set(references)) == len(references)
    assert {each["ref"] for each in found["dependencies"]} == set(references)
    assert {one for each in found["dependencies"] for one in each["dependsOn"]} <= set(references)


def test_the_same_packages_give_the_same_bytes(told: Path, tmp_path: Path) -> None:
    """Nothing of the time or the machine is in it."""

    command = [sys.executable, str(ROOT / ".ci" / "sbom"), str(tmp_path), sysconfig.get_path("purelib")]
    subprocess.run(command, check=True, timeout=60)
    for name in ("sbom.cdx.json", "licences.txt"):
        assert (tmp_path / name).read_bytes() == (told / name).read_bytes()
    assert str(ROOT) not in (told / "sbom.cdx.json").read_text()
