"""The image, built from this checkout and run as the manifests run it: nobody, read-only, without capabilities."""

import json
import re
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.image.containers import (
    CONFINED,
    UID,
    Container,
    build,
    config_of,
    run,
    size_of,
    succeeds,
)
from tests.ledger import check_books, take_stock
from tests.waiting import wait_until
from tests.worker_process import ROOT, Producer
from worker import __version__
from worker.sandbox.simulator import Script, Simulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OWN_MEGABYTES = 80
"""What we may add to the base image: a package more than the worker needs would show."""

SIGTERM_CAUGHT = 1 << (signal.SIGTERM - 1)


def catches_sigterm(process: Mapping[str, str]) -> bool:
    """Not while it is still the runtime, which makes the container and catches everything itself."""
    ours = process.get("Name") == "qris-expire"
    return ours and bool(int(process["SigCgt"], 16) & SIGTERM_CAUGHT)


def inside(image: str, script: str) -> str:
    return run(
        *("podman", "run", "--rm", "--network", "none", *CONFINED, "--tmpfs", "/tmp", "--entrypoint", "/bin/sh"),
        *(image, "-c", script),
    )


def test_what_it_says_of_itself(image: str) -> None:
    """A numeric user, the worker itself as process 1, labels from the build's arguments."""

    config = config_of(image)["config"]

    assert config["User"] == f"{UID}:{UID}"
    assert (config["Entrypoint"], config["Cmd"]) == (["/opt/venv/bin/qris-expire"], ["run"])
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert (labels["version"], labels["revision"], labels["licenses"]) == (__version__, "abc123", "MIT")
    assert labels["source"] == "https://git.example/qris-expire"


def test_it_is_small(image: str, base: str) -> None:
    """All of ours, dependencies and compiled files included, is less than 80 MB above the base image."""

    ours, whole = (size_of(image) - size_of(base)) / 1e6, size_of(image) / 1e6
    print(f"{ours:.0f} MB above the base image, {whole:.0f} MB in all")
    assert ours < OWN_MEGABYTES


def test_nothing_in_it_installs(image: str) -> None:
    """Neither Python has pip, and nobody can write but below its state directory and /tmp."""

    said = inside(
        image,
        "for python in /opt/venv/bin/python /usr/local/bin/python; do $python -m pip --version; "
        "$python -m ensurepip --version; done 2>&1; touch /opt/venv/x /var/lib/qris-expire/x /tmp/x 2>&1; ls /tmp",
    )

    assert said.count("No module named pip") == said.count("No module named ensurepip") == 2
    assert said.count("Read-only file system") == 2
    assert said.splitlines()[-1] == "x"


def test_no_file_of_the_checkout_slips_in(image: str) -> None:
    """Of the checkout it holds the package, its data and its modules, compiled, and nothing else."""

    package = inside(image, "cd /opt/venv/lib/python3*/site-packages && find worker -type f").splitlines()
    elsewhere = inside(
        image, "ls -A /opt /var/lib/qris-expire; test ! -e /src && test ! -e /project && test ! -e /wheels"
    )

    ours = {path for path in (ROOT / "worker").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path for path in package if not path.endswith(".pyc")} == {str(path.relative_to(ROOT)) for path in ours}
    assert sum(path.endswith(".pyc") for path in package) == sum(path.suffix == ".py" for path in ours)
    assert elsewhere.split() == ["/opt:", "venv", "/var/lib/qris-expire:"]


def test_its_bill_of_materials(image: str) -> None:
    """Its labels name the bill of materials and the licences, which list what is installed in it, with its versions."""

    labels = config_of(image)["config"]["Labels"]
    listed = inside(image, f"cat {labels['qris-expire.sbom']}")
    licences = inside(image, f"cat {labels['qris-expire.licences']}").splitlines()
    names = "import importlib.metadata as m; [print(each.name, each.version) for each in m.distributions()]"
    installed = inside(image, f"/opt/venv/bin/python -c '{names}'")

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    bill = json.loads(listed)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["version"] == __version__
    found = {(each["name"], each["version"]) for each in [*bill["components"], bill["metadata"]["component"]]}
    assert found == {(canonical(name), version) for name, version in map(str.split, installed.splitlines())}
    assert {line.partition(":")[0] for line in licences} == {f"{name} {version}" for name, version in found}
    assert not any(line.endswith("UNKNOWN") for line in licences)


def test_commands_run_in_it(image: str) -> None:
    """`podman run IMAGE COMMAND` is `qris-expire COMMAND`."""

    assert (
        run("podman", "run", "--rm", "--network", "none", *CONFINED, image, "--version")
        == f"qris-expire {__version__}\n"
    )


def test_building_twice_gives_the_same_layers(image: str, base: str) -> None:
    """A second build from nothing has the same layers, byte for byte."""

    again = "localhost/qris-expire-worker:again"
    build(again, base)
    layers = config_of(again)["rootfs"]["diff_ids"]
    succeeds("podman", "rmi", "--force", again)

    assert layers == config_of(image)["rootfs"]["diff_ids"]


def test_podman_stop_under_load_loses_nothing(image: str, amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Stopped with every sender busy it exits 0 in time; another container does the rest, and no bill twice."""

    bills = [f"b-{number}" for number in range(1500)]
    with (
        Simulator(Script(latency=0.02)) as gateway,
        Container(image, (), amqp_url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="16") as worker,
    ):
        worker.wait_ready()
        kernel = worker.status()
        assert kernel["Uid"].split() == kernel["Gid"].split() == [str(UID)] * 4
        assert int(kernel["CapEff"], 16) == int(kernel["CapBnd"], 16) == 0
        assert kernel["NoNewPrivs"] == "1"
        assert kernel["NSpid"].split()[-1] == "1"
        with Producer(amqp_url, prefix) as producer:
            producer.publish_many(bills, sweep_every=1, of=2)
            producer.collect(len(bills) // 3, 60)
            assert worker.stop() < 15
            assert take_stock(producer).check(no_duplicates=True).waiting, "all was done before the signal came"
            worker.start()
            producer.collect_all(60)
            worker.stop()
            check_books(producer, all_ended=True, no_duplicates=True)
        assert gateway.report().calls_by_bill == dict.fromkeys(bills, 1)


def test_a_sigterm_during_the_imports_counts(image: str, amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Told to stop while it still imports (a twentieth of a processor makes that long), it exits 0 and took nothing."""

    with (
        Simulator() as gateway,
        Container(image, ("--cpus", "0.05"), amqp_url, prefix, gateway, tmp_path) as worker,
    ):
        wait_until(lambda: catches_sigterm(worker.status()), 60, "its handler is there")
        run("podman", "kill", "--signal", "TERM", worker.name)
        assert worker.wait(120) == 0
        assert worker.events() == []
