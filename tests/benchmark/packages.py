"""The peers' packages: here already, or in a virtual environment of the benchmark's own, made when it is needed."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

REQUIREMENTS: Final = Path(__file__).parents[2] / "requirements-benchmark.txt"
NEEDED: Final = ("aiohttp", "aiormq", "uvloop")
PEERS: Final = Path(__file__).parent / "peers"
NODE_PACKAGES: Final = ("amqplib@2.3.1", "undici@6.29.0")
GO_PACKAGES: Final = "golang-go golang-github-rabbitmq-amqp091-go-dev golang-github-valyala-fasthttp-dev"
"""Debian's. It puts the sources where `DEBIAN_GO` says, so that nothing has to be fetched."""
DEBIAN_GO: Final = "/usr/share/gocode"


class PackagesMissing(Exception):
    """The peers cannot run here. One line: why, and what to do."""


@cache
def python() -> Path:
    """An interpreter, of the same version as ours, that has the peers' packages. Raises `PackagesMissing`."""
    if all(importlib.util.find_spec(name) for name in NEEDED):
        return Path(sys.executable)
    home = _home(REQUIREMENTS.read_bytes(), f"{sys.version_info[0]}.{sys.version_info[1]}")
    interpreter = home / "bin" / "python"
    if not (home / "installed").exists():
        _install(home, interpreter)
        (home / "installed").touch()
    return interpreter


@cache
def golang() -> list[str]:
    """The command line of the peer in Go, built where it is needed. Raises `PackagesMissing`."""
    source = PEERS / "golang.go"
    home = _home(source.read_bytes(), "go")
    if not (home / "peer").exists():
        environment = {"GO111MODULE": "off", "GOPATH": os.environ.get("GOPATH", DEBIAN_GO)}
        _make(home, ["go", "build", "-o", str(home / "peer"), str(source)], f"apt install {GO_PACKAGES}", environment)
    return [str(home / "peer")]


@cache
def node() -> list[str]:
    """The command line of the peer for Node.js, its packages installed where they are needed. Raises
    `PackagesMissing`."""
    source = PEERS / "node.mjs"
    home = _home(source.read_bytes() + repr(NODE_PACKAGES).encode(), "node")
    if not (home / "installed").exists():
        install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home), *NODE_PACKAGES]
        _make(home, install, "install Node.js 20 or later, with npm", {})
        shutil.copy(source, home)
        (home / "installed").touch()
    return ["node", str(home / source.name)]


def _make(home: Path, command: list[str], cure: str, environment: Mapping[str, str]) -> None:
    print(f"once: {' '.join(command)} …", file=sys.stderr, flush=True)
    home.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    except FileNotFoundError:
        raise PackagesMissing(f"there is no {command[0]}; {cure}") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PackagesMissing(f"{command[0]} failed ({said[:200]}); {cure}") from None


def _home(content: bytes, name: str) -> Path:
    """One for each content, so that an update makes a new one."""
    cache_directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_directory / "qris-expire" / f"benchmark-{hashlib.sha256(content).hexdigest()[:12]}-{name}"


def _install(home: Path, interpreter: Path) -> None:
    print(f"the peers' packages are installed once, into {home} …", file=sys.stderr, flush=True)
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r"]
    try:
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([interpreter, *pip, REQUIREMENTS], check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PackagesMissing(
            f"the peers' packages could not be installed ({error}); run `{sys.executable} {' '.join(pip)} "
            f"{REQUIREMENTS.name}`, or leave the peers out: --contenders worker"
        ) from None
