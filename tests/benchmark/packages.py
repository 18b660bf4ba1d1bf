"""The peers' packages: here already, or in a virtual environment of the benchmark's own, made when it is needed."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path
from typing import Final

REQUIREMENTS: Final = Path(__file__).parents[2] / "requirements-benchmark.txt"
NEEDED: Final = ("aiohttp", "aiormq", "uvloop")


class PackagesMissing(Exception):
    """The peers cannot run here. One line: why, and what to do."""


@cache
def python() -> Path:
    """An interpreter, of the same version as ours, that has the peers' packages. Raises `PackagesMissing`."""
    if all(importlib.util.find_spec(name) for name in NEEDED):
        return Path(sys.executable)
    home = _home()
    interpreter = home / "bin" / "python"
    if not (home / "installed").exists():
        _install(home, interpreter)
        (home / "installed").touch()
    return interpreter


def _home() -> Path:
    """One for each content of the pinned packages and version of Python, so that an update makes a new one."""
    cache_directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    pins = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    return cache_directory / "qris-expire" / f"benchmark-{pins}-{sys.version_info[0]}.{sys.version_info[1]}"


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
