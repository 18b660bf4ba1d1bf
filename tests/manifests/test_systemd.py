"""The systemd units: accepted by systemd, hardened, and of one mind with the worker."""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.manifests.rendering import K8S
from tests.monitoring.metrics import FOREIGN
from tests.scrapes import values
from tests.worker_process import Producer, WorkerProcess
from worker.cli import read
from worker.processes import MARGIN_SECONDS
from worker.sandbox.simulator import Simulator, own_key, private_pem
from worker.service import DRAINED, FORCED, MISCONFIGURED, REFUSED
from worker.settings import load

UNITS = K8S / "systemd"
SERVICES = ("qris-expire.service", "qris-expire-sweep.service")
MOST_EXPOSED = 15
"""Of 100, by `systemd-analyze security`; without hardening it says 96."""

PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1


def unit(name: str) -> dict[str, list[str]]:
    """Settings of all sections: name → values, in order."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^([A-Z]\w+)=(.*)$", (UNITS / name).read_text(), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def analyze(directory: Path, *arguments: str, change: tuple[str, str] = ("", "")) -> subprocess.CompletedProcess[str]:
    """`systemd-analyze` on the units as they would be installed: here the programs are not where they will be."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("UNITS NOT VERIFIED: no systemd-analyze here; install systemd")
    for path in UNITS.glob("qris-expire*.[st]*"):
        text = re.sub(
            r"(?<=^Exec)(Start|StartPre|StopPost)=(?:\+)?\S+", r"\1=/bin/true", path.read_text(), flags=re.MULTILINE
        )
        (directory / path.name).write_text(text.replace(*change) if change[0] else text)
    return subprocess.run([tool, *arguments], cwd=directory, capture_output=True, text=True, timeout=60, check=False)


def verify(directory: Path, change: tuple[str, str] = ("", "")) -> str:
    """What systemd says of the units; nothing if it is content."""
    units = (*SERVICES, "qris-expire-sweep.timer")
    done = analyze(directory, "verify", "--man=no", *(f"./{name}" for name in units), change=change)
    return done.stdout + done.stderr


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say, and has of a misspelt setting, value or time."""

    assert verify(tmp_path) == ""
    assert "Restartt" in verify(tmp_path, ("Restart=", "Restartt="))
    assert "exce" in verify(tmp_path, ("Type=exec", "Type=exce"))
    assert "Jakata" in verify(tmp_path, ("Asia/Jakarta", "Asia/Jakata"))


def sweep_metrics(directory: Path, event: str, **result: str) -> dict[str, float]:
    """What the node exporter finds after the sweep's unit has written this."""
    environment = {"PATH": os.environ["PATH"], "TEXTFILE_DIRECTORY": str(directory), **result}
    subprocess.run([UNITS / "qris-expire-sweep-metrics", event], env=environment, timeout=60, check=True)
    return values((directory / "qris-expire-sweep.prom").read_text())


def test_the_sweep_tells_its_times(tmp_path: Path) -> None:
    """Start, end, last success and exit code are there for the node exporter; a failure keeps the last success."""

    told = "qris_expire_sweep_"
    began = int(time.time())
    started = sweep_metrics(tmp_path, "start")
    assert set(started) == {f"{told}last_start_timestamp_seconds"}
    well = sweep_metrics(tmp_path, "end", SERVICE_RESULT="success", EXIT_STATUS="0")
    assert well[f"{told}exit_code"] == 0
    assert well[f"{told}last_success_timestamp_seconds"] == well[f"{told}last_end_timestamp_seconds"] >= began
    assert set(well) <= FOREIGN
    sweep_metrics(tmp_path, "start")
    failed = sweep_metrics(tmp_path, "end", SERVICE_RESULT="exit-code", EXIT_STATUS="2")
    assert failed[f"{told}exit_code"] == 2
    assert failed[f"{told}last_success_timestamp_seconds"] == well[f"{told}last_success_timestamp_seconds"]
    killed = sweep_metrics(tmp_path, "end", SERVICE_RESULT="timeout", EXIT_STATUS="TERM")
    assert killed[f"{told}exit_code"] == 255


def test_the_unit_of_the_sweep_tells_its_times() -> None:
    """The unit calls what tells them, before anything else and whatever becomes of the sweep."""

    sweep = unit("qris-expire-sweep.service")
    assert sweep["ExecStartPre"][0] == "+/usr/local/libexec/qris-expire-sweep-metrics start"
    assert sweep["ExecStopPost"] == ["+/usr/local/libexec/qris-expire-sweep-metrics end"]


@pytest.mark.parametrize("name", SERVICES)
def test_units_are_hardened(name: str, tmp_path: Path) -> None:
    """`systemd-analyze security` calls the exposure small, and would not without the empty capability set."""

    ask = ("security", "--offline=yes", f"--threshold={MOST_EXPOSED}", f"./{name}")

    assert analyze(tmp_path, *ask).returncode == 0
    assert analyze(tmp_path, *ask, change=("CapabilityBoundingSet=\n", "")).returncode == 1


def test_exit_codes_that_need_people_are_not_retried() -> None:
    """Restarted after everything but a drain, wrong settings and refused credentials."""

    worker = unit("qris-expire.service")

    assert worker["Restart"] == ["on-failure"]
    assert sorted(map(int, worker["RestartPreventExitStatus"][0].split())) == [MISCONFIGURED, REFUSED]
    assert {DRAINED, FORCED}.isdisjoint({MISCONFIGURED, REFUSED})


def test_a_drain_fits_the_stop(tmp_path: Path) -> None:
    """systemd kills after the drain and the parent's margin, and the longest call fits the drain."""

    settings = load(environ=environment(tmp_path), env_file=None)

    stop, drain = float(unit("qris-expire.service")["TimeoutStopSec"][0]), settings.worker.drain_seconds
    assert stop > drain + MARGIN_SECONDS
    assert drain >= settings.gateway.connect_timeout_seconds + settings.gateway.read_timeout_seconds + 5


def environment(credentials: Path) -> dict[str, str]:
    """What the worker would find in its environment, credentials in this directory."""
    worker = unit("qris-expire.service")
    lines = [*(UNITS / "qris-expire.env").read_text().splitlines(), *worker["Environment"]]
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    content = {"amqp-url": "amqps://user:secret@host/%2F", "private-key.pem": private_pem(own_key()).decode()}
    for loaded in worker["LoadCredential"]:
        name = loaded.partition(":")[0]
        (credentials / name).write_text(content.get(name, "secret"))
    found = {name: value.replace("%d", str(credentials)).replace("%S", "/var/lib") for name, _, value in pairs}
    assert all(not value.startswith("%") for value in found.values())
    return found


def test_settings_load(tmp_path: Path) -> None:
    """The worker takes the example's environment, and every secret comes as a credential."""

    found = environment(tmp_path)
    settings = load(environ=found, env_file=None)

    assert settings.amqp.urls() == ["amqps://user:secret@host/%2F"]
    secrets = {loaded.partition(":")[0] for loaded in unit("qris-expire.service")["LoadCredential"]}
    assert {Path(value).name for name, value in found.items() if name.endswith("_FILE")} == secrets


def test_people_get_the_worker_s_settings(tmp_path: Path) -> None:
    """The command for people finds the example's environment and every secret that the unit loads, and passes on."""
    text, installed = (UNITS / "qris-expire").read_text(), "/opt/qris-expire/bin/qris-expire"
    given = dict(re.findall(r"^([A-Z_]+)=/etc/qris-expire/(.+)$", text, re.MULTILINE))
    loaded = dict(line.split("=%d/") for line in unit("qris-expire.service")["Environment"] if "=%d/" in line)
    assert given == loaded
    assert unit("qris-expire.service")["ExecStart"] == [f"{installed} run"]

    environment(tmp_path)
    shutil.copy(UNITS / "qris-expire.env", tmp_path)
    script = tmp_path / "qris-expire"
    script.write_text(text.replace("/etc/qris-expire", str(tmp_path)).replace(installed, f"{sys.executable} -m worker"))
    ours = {"PATH": os.environ["PATH"], "PYTHONPATH": str(K8S.parent)}
    command = ["sh", str(script), "sign", "B-1", "--merchant-id", "M-1"]
    done = subprocess.run(command, env=ours, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, "B-1" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_command_lines_parse(name: str) -> None:
    """The real command line takes what the unit calls."""

    lines = [shlex.split(line) for key in ("ExecStart", "ExecStartPre") for line in unit(name).get(key, [])]
    ours = [arguments for program, *arguments in lines if program.endswith("/qris-expire")]

    assert [arguments[0] for arguments in ours] == {"run": ["run"], "sweep": ["sweep", "status"]}[ours[0][0]]
    assert all(callable(read(arguments)) for arguments in ours)


def test_both_services_are_confined_alike() -> None:
    """What hardens the worker hardens the sweep."""

    def hardening(name: str) -> list[str]:
        text = (UNITS / name).read_text()
        rest = text[text.index("DynamicUser=") :].partition("\n[Install]")[0]
        return [line for line in rest.splitlines() if line and not line.startswith("#")]

    assert hardening(SERVICES[0]) == hardening(SERVICES[1])


class _Strict(WorkerProcess):
    """A worker that never gets memory that is writable and executable, as MemoryDenyWriteExecute= has it."""

    def command(self) -> list[str]:
        strict = (
            "import ctypes, os, sys\n"
            f"assert ctypes.CDLL(None).prctl({PR_SET_MDWE}, {PR_MDWE_REFUSE_EXEC_GAIN}, 0, 0, 0) == 0\n"
            "os.execv(sys.executable, [sys.executable, '-m', 'worker', 'run'])"
        )
        return [sys.executable, "-c", strict]


def test_the_worker_lives_without_executable_memory(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """No library of ours makes code at run time: with MemoryDenyWriteExecute= it works."""

    if ctypes.CDLL(None).prctl(PR_SET_MDWE + 1, 0, 0, 0, 0) < 0:
        pytest.skip("NOT TRIED: this kernel cannot deny writable and executable memory (Linux 6.3 can)")
    with Simulator() as gateway, _Strict(amqp_url, prefix, gateway, tmp_path) as worker:
        worker.wait_ready()
        with Producer(amqp_url, prefix) as producer:
            assert producer.of(producer.publish("b-0")).fields["status"] == "expired"
        worker.stop()
