"""buildah and podman: what builds the image here, and a worker that runs in it."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tests.worker_process import ROOT, WorkerProcess
from worker.sandbox.simulator import Simulator

SHARED: Final = ROOT.parent / "shared" / "image"
"""Beside the checkout, if at all: a stand-in for the base image, and settings for odd machines."""

BASE: Final = os.environ.get("PYTHON_IMAGE", "docker.io/library/python:3.11-slim")
COMPLETED: Final = "localhost/qris-expire-python:completed"
CXX: Final = "libstdc++.so.6"
OFFLINE: Final = ("--isolation", "chroot", "--pull-never", "--no-cache", "--timestamp", "0")
UID: Final = 10001
CONFINED: Final = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "256m")
"""As the manifests confine it."""

STOP_SECONDS: Final = 40
"""What `podman stop` gives it before it kills; no drain of these tests takes half as long."""


class Unavailable(Exception):
    """The image cannot be built here; the text says why, and what to do."""


def find_tools() -> None:
    """buildah and podman, installed where we may. Raises `Unavailable`."""
    missing = [tool for tool in ("buildah", "podman", "runc") if shutil.which(tool) is None]
    if missing and may_install():
        packages = ("buildah", "podman", "runc", "conmon", "uidmap", "mmdebstrap")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        waiting = ("-o", "DPkg::Lock::Timeout=120")
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", "-q", *waiting, *arguments], env=environment, capture_output=True, check=False)
        missing = [tool for tool in missing if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} not here; install buildah, podman and runc")


def may_install() -> bool:
    """Whether `find_tools` may install them: as root, where there is apt."""
    return shutil.which("apt-get") is not None and os.geteuid() == 0


def find_base() -> str:
    """The base image: already here, else the stand-in from beside the checkout, else pulled. Raises `Unavailable`."""
    stand_in = SHARED / "base-image.sh"
    if succeeds("buildah", "inspect", "--type", "image", BASE):
        pass
    elif stand_in.exists():
        run("bash", str(stand_in), BASE)
    elif not succeeds("podman", "pull", "--quiet", BASE, timeout=300):
        raise Unavailable(f"no base image {BASE} here, and it cannot be pulled; set PYTHON_IMAGE to one that is here")
    return BASE if _has_cxx(BASE) else _completed()


def _has_cxx(image: str) -> bool:
    load = f"import ctypes; ctypes.CDLL('{CXX}')"
    return succeeds("podman", "run", "--rm", "--network", "none", "--entrypoint", "python3", image, "-c", load)


def _completed() -> str:
    """The stand-in with the C++ library of this machine: every Debian image has one, since apt wants it."""
    found = re.search(rf"{re.escape(CXX)} \(libc6,x86-64\) => (\S+)", run("/sbin/ldconfig", "-p"))
    if found is None:
        raise Unavailable(f"neither the base image {BASE} nor this machine has {CXX}; install libstdc++6")
    with tempfile.TemporaryDirectory() as context:
        shutil.copy(found[1], Path(context) / CXX)
        dockerfile = f"FROM {BASE}\nCOPY {CXX} /usr/local/lib/\nRUN /sbin/ldconfig\n"
        (Path(context) / "Dockerfile").write_text(dockerfile)
        run("buildah", "bud", *OFFLINE, "--tag", COMPLETED, context)
    return COMPLETED


def build(tag: str, base: str, *arguments: str) -> None:
    """This checkout, from nothing: buildah 1.28 takes labels with other build arguments from its cache."""
    run("buildah", "bud", *OFFLINE, "--build-arg", f"PYTHON_IMAGE={base}", *arguments, "--tag", tag, str(ROOT))


def config_of(image: str) -> dict[str, Any]:
    """The image as the OCI specification describes it: `config`, `rootfs`, `history`."""
    return dict(json.loads(run("buildah", "inspect", "--type", "image", image))["OCIv1"])


def size_of(image: str) -> int:
    """Bytes of all layers, uncompressed."""
    return int(run("podman", "image", "inspect", "--format", "{{.Size}}", image))


def run(*command: str, timeout: float = 600) -> str:
    """Its standard output; an AssertionError with its last words if it fails."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, (
        f"{' '.join(command[:3])}: exit {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}"
    )
    return done.stdout


def succeeds(*command: str, timeout: float = 60) -> bool:
    return subprocess.run(command, env=environment(), capture_output=True, timeout=timeout, check=False).returncode == 0


def environment() -> dict[str, str]:
    """Ours, with the settings for podman that lie beside the checkout, if there are any."""
    settings = SHARED / "containers.conf"
    return {**os.environ, **({"CONTAINERS_CONF": str(settings)} if settings.exists() else {})}


class Container(WorkerProcess):
    """The worker in its image, confined, on this machine's network; the process is podman, attached to it."""

    def __init__(
        self,
        image: str,
        limits: Sequence[str],
        url: str,
        prefix: str,
        gateway: Simulator,
        directory: Path,
        **settings: str | None,
    ) -> None:
        super().__init__(url, prefix, gateway, directory, **settings)
        self._image = image
        self._limits = limits
        self.name = f"qris-expire-test-{self.port}"

    def command(self) -> list[str]:
        key = self._directory / "gateway-key.pem"
        inside = {**super().environment(), "PATH": None, "PYTHONPATH": None}
        if key.exists():  # as a mounted Secret, it belongs to who runs
            os.chown(key, UID, UID)
        variables = [f"--env={name}={value}" for name, value in inside.items() if value is not None]
        mount = f"--volume={key}:{key}:ro"
        return [
            *("podman", "run", "--rm", "--name", self.name, "--network", "host", *CONFINED, *self._limits),
            *(mount, *variables, self._image),
        ]

    def environment(self) -> dict[str, str]:
        """Podman's own; the worker's is on its command line."""
        return environment()

    def stop(self, timeout: float = STOP_SECONDS) -> float:
        """`podman stop`, and exit 0; how many seconds that took."""
        began = time.monotonic()
        run("podman", "stop", "--time", str(int(timeout)), self.name)
        code = self.wait()
        assert code == 0, f"exit {code}\n{self.last_words()}"
        return time.monotonic() - began

    def kill9(self) -> None:
        succeeds("podman", "rm", "--force", "--time", "0", self.name)
        super().kill9()

    @property
    def process_1(self) -> int | None:
        """Its process 1, as this machine numbers it; None while there is none."""
        done = subprocess.run(
            ["podman", "inspect", "--format", "{{.State.Pid}}", self.name],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        return int(done.stdout) or None if done.returncode == 0 else None

    def status(self) -> Mapping[str, str]:
        """What the kernel says of its process 1; empty while there is none."""
        with suppress(OSError):
            lines = Path(f"/proc/{self.process_1}/status").read_text().splitlines()
            return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return {}
