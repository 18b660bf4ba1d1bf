"""The Dockerfile, as far as one sees it without building it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worker_process import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("hadolint")
    found = str(tool) if tool.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("NOT LINTED: no hadolint here; install requirements-dev.txt on Linux")
    return subprocess.run([found, "-"], input=text, capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    """The linter accepts the Dockerfile, and refuses one that runs as root or puts a shell before the worker."""

    assert hadolint(DOCKERFILE).stdout == ""
    assert "DL3002" in hadolint(DOCKERFILE.replace("USER 10001:10001", "USER root")).stdout
    assert "DL3025" in hadolint(DOCKERFILE.replace('CMD ["run"]', "CMD run")).stdout


def test_every_install_is_pinned_by_hash() -> None:
    """Each pip install demands hashes, but the one of our own wheel, which may not look anywhere."""

    installs = re.findall(r"pip .*?\binstall\b[^\n]*", DOCKERFILE)

    assert len(installs) == 3
    assert all("--require-hashes" in install or "--no-index" in install for install in installs)


def test_version_is_ours() -> None:
    """The label of a build without arguments says the version of the package."""

    from worker import __version__

    assert f"ARG VERSION={__version__}\n" in DOCKERFILE


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-build.txt"])
def test_requirements_agree(name: str) -> None:
    """One version of a package in all files of pins: what is tested is what is shipped."""

    def pins(file: str) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)==([^ ]+)", (ROOT / file).read_text(), re.MULTILINE))

    ours, tested = pins(name), pins("requirements-dev.txt")

    assert ours
    assert {package: tested.get(package, version) for package, version in ours.items()} == ours
