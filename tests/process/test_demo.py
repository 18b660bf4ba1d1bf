"""The first thing that a stranger runs."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tests.rabbit import Rabbit
from worker import __version__
from worker.sandbox.broker import free_port

ROOT = Path(__file__).parents[2]


def test_the_demo_adds_up_and_leaves_nothing(amqp_url: str, tmp_path: Path) -> None:
    """From a checkout that is not installed, it ends by itself with an outcome for each command, and saves all."""

    saved = tmp_path / "messages.jsonl"
    # The interpreter below this environment's, and its packages by path: an editable install is not seen that way.
    environment = {"PATH": os.environ["PATH"], "AMQP_URL": amqp_url, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    done = subprocess.run(
        [Path(sys.base_prefix) / "bin" / "python3", "-m", "worker", "demo", "--commands", "60", "--save", saved],
        cwd=ROOT,
        env={**environment, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "60 commands, 60 outcomes" in done.stdout
    assert "metrics at http" in done.stdout  # no line is broken where nobody reads by columns
    assert list(tmp_path.iterdir()) == [saved]
    messages = [json.loads(line) for line in saved.read_text().splitlines()]
    assert Counter(message["kind"] for message in messages) == {"command": 60, "outcome": 60, "dead letter": 4}
    ids = {
        kind: {m["properties"]["message_id"] for m in messages if m["kind"] == kind}
        for kind in ("command", "dead letter")
    }
    assert ids["dead letter"] < ids["command"]
    with Rabbit(amqp_url) as rabbit:
        prefix = next(word for word in done.stdout.split() if word.startswith("demo.")).rstrip(",")
        assert not rabbit.has_queue(f"{prefix}.sweep")


def outside(tmp_path: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The demo of the installed package, in a directory that is no checkout."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "worker", "demo", *arguments],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), **environ},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_without_a_broker_it_shows_the_engine(tmp_path: Path) -> None:
    """`--direct` needs neither broker nor root: a table that adds up, a line of the report, nothing left behind."""
    done = outside(tmp_path, "--direct", "--commands", "60")

    assert done.returncode == 0, done.stderr
    assert "60 bills, 60 outcomes, 5" in done.stdout
    assert "no broker answers at 127.0.0.1:" in done.stderr  # though one runs here: its fleet is none of the demo's
    (gateway,) = (line for line in done.stdout.splitlines() if "expire calls:" in line)
    total = int(re.findall(r"(\d+) expire calls", gateway)[0])
    assert sum(map(int, re.findall(r"×(\d+)", gateway))) == total
    assert list(tmp_path.iterdir()) == []


def test_without_any_broker_it_goes_direct_by_itself(tmp_path: Path) -> None:
    """Nobody set AMQP_URL, none answers, and there are no binaries: the demo says so, and still shows something."""
    no_binaries = {"RABBITMQ_HOME": "/nowhere", "PATH": str(tmp_path / "bin")}
    script = (
        "import sys; from worker.sandbox import broker, demo; from worker.sandbox.broker import LoginResult\n"
        "demo.try_login = lambda *_: LoginResult.NOT_THERE; demo.find_server = lambda: None\n"
        "from worker.cli import main; sys.exit(main(['demo', '--commands', '20']))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), **no_binaries},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("broker     none")
    assert "20 bills, 20 outcomes" in done.stdout


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_a_broker_that_was_named_must_answer(tmp_path: Path, where: str) -> None:
    """An explicit AMQP_URL is an order: the demo neither looks for another broker nor starts one."""
    url = f"amqp://guest:secret@127.0.0.1:{free_port()}/"
    if where == ".env":
        (tmp_path / ".env").write_text(f"AMQP_URL={url}\n")

    done = outside(tmp_path, **({"AMQP_URL": url} if where == "environment" else {}))

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qris-expire: AMQP_URL: no broker answers at 127.0.0.1:")
    assert "secret" not in done.stderr


def test_wrong_settings_of_the_broker_are_told(tmp_path: Path) -> None:
    """The demo reads the settings of the broker as every command does."""
    done = outside(tmp_path, AMQP_URL="http://nonsense")

    assert done.returncode == 2
    assert done.stderr.startswith("qris-expire: AMQP_URL: must begin with amqp")


def test_an_installed_wheel_shows_itself(tmp_path: Path) -> None:
    """The wheel alone, without a checkout: its version, its types, and a demo that works."""
    built, installed, elsewhere = tmp_path / "built", tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", built], cwd=ROOT, check=True, timeout=120
    )
    (wheel,) = built.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert wheel.name.startswith(f"qris_expire_worker-{__version__}-py3-none-any")
    assert "worker/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"worker", f"qris_expire_worker-{__version__}.dist-info"}
    packages = [sysconfig.get_paths()["purelib"], str(installed)]
    # Below this environment, whose editable install would be found first.
    done = subprocess.run(
        [Path(sys.base_prefix) / "bin" / "python3", "-P", "-m", "worker", "demo", "--direct", "--commands", "30"],
        cwd=elsewhere,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(reversed(packages))},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "30 bills, 30 outcomes" in done.stdout
    assert list(elsewhere.iterdir()) == []
