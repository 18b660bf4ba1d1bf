"""Prometheus and Alertmanager from the installed binaries: found, installed where we may, run on ports of their own."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import yaml

from tests.waiting import one_at_a_time, wait_until
from worker.sandbox.broker import LOOPBACK, free_port

PROGRAMS: Final = ("promtool", "prometheus", "prometheus-alertmanager", "amtool")
INSTALL: Final = "apt-get install -y --no-install-recommends prometheus prometheus-alertmanager"

READY_SECONDS: Final = 30.0
"""The most a server may take to be ready; half a second is usual."""


class Unavailable(Exception):
    """The programs are not here and cannot be installed. One line: what to do."""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def may_install() -> bool:
    """Whether `install` has a chance: as root, where there is apt."""
    return shutil.which("apt-get") is not None and os.geteuid() == 0


def install() -> None:
    """Install them with apt, where we may; raises `Unavailable` with the command to run elsewhere."""
    if not may_install():
        raise Unavailable(f"Prometheus is not installed here; run as root: {INSTALL}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    waiting = ["-o", "DPkg::Lock::Timeout=120"]
    said = ""
    with one_at_a_time("apt"):
        if not missing():  # somebody else has installed them meanwhile
            return
        for arguments in (["update"], INSTALL.split()[1:]):
            done = subprocess.run(
                ["apt-get", *waiting, *arguments], env=environment, capture_output=True, text=True, check=False
            )
            said = (done.stderr.strip().splitlines() or [said])[-1]
    if missing():
        raise Unavailable(f"apt could not install {', '.join(missing())} ({said}); try: {INSTALL}")


def run(*command: str | Path) -> str:
    """What a command says; an AssertionError with all of it if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


class Server:
    """One that is running: its port, and what it answers."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, **query: str) -> Any:
        """The JSON of an answer; None when there is none."""
        status, text = self.ask(path, **query)
        return json.loads(text) if status == http.HTTPStatus.OK else None

    def ask(self, path: str, **query: str) -> tuple[int, str]:
        """Status and body of an answer; (0, why) without one."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=30)
        try:
            connection.request("GET", path + (f"?{urlencode(query)}" if query else ""))
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError as error:
            return 0, str(error)
        finally:
            connection.close()


class Prometheus(Server):
    """Its HTTP API."""

    def range(self, expr: str, start: float, end: float, step: float = 1.0) -> list[dict[str, Any]]:
        """The series of a query over a time range; an AssertionError with what it says when it fails."""
        status, text = self.ask(
            "/api/v1/query_range", query=expr, start=f"{start:.3f}", end=f"{end:.3f}", step=f"{step:g}"
        )
        answer = json.loads(text) if status else {}
        assert status == http.HTTPStatus.OK, f"{expr}: {status} {answer.get('error', text)}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def value(self, expr: str) -> float | None:
        """The value of a query's only series now; None without any."""
        result = self.get("/api/v1/query", query=expr)["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    def targets(self) -> dict[str, str]:
        """The health of each scraped address."""
        active = (self.get("/api/v1/targets") or {"data": {"activeTargets": []}})["data"]["activeTargets"]
        return {target["scrapeUrl"]: target["health"] for target in active}


@contextmanager
def prometheus(directory: Path, config: Mapping[str, Any]) -> Iterator[Prometheus]:
    """A Prometheus with this configuration, in this directory."""
    file = _written(directory / "prometheus.yaml", config)
    run("promtool", "check", "config", file)
    with _running(
        directory,
        "/-/ready",
        lambda port: [
            "prometheus",
            f"--config.file={file}",
            f"--storage.tsdb.path={directory / 'tsdb'}",
            f"--web.listen-address={LOOPBACK}:{port}",
        ],
    ) as port:
        yield Prometheus(port)


@contextmanager
def alertmanager(directory: Path, config: Mapping[str, Any]) -> Iterator[Server]:
    """An Alertmanager with this configuration, in this directory, without a cluster."""
    file = _written(directory / "alertmanager.yaml", config)
    with _running(
        directory,
        "/-/ready",
        lambda port: [
            "prometheus-alertmanager",
            f"--config.file={file}",
            f"--storage.path={directory / 'alertmanager'}",
            f"--web.listen-address={LOOPBACK}:{port}",
            "--cluster.listen-address=",
        ],
    ) as port:
        yield Server(port)


def _written(path: Path, config: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return path


@contextmanager
def _running(directory: Path, ready: str, command: Callable[[int], Sequence[str]]) -> Iterator[int]:
    port = free_port()
    log = directory / f"{command(port)[0]}.log"
    # A test run that is killed takes its servers with it.
    with log.open("wb") as said:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command(port)],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:

        def up() -> bool:
            assert process.poll() is None, f"it ended with {process.returncode}\n{log.read_text()[-2000:]}"
            return Server(port).ask(ready)[0] == http.HTTPStatus.OK

        wait_until(up, READY_SECONDS, f"{command(port)[0]} is ready")
        yield port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
