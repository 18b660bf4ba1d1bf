"""The compose file fits the image, the commands and the settings of this version."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests.rendering import K8S
from worker.cli import read
from worker.settings import load

COMPOSE = K8S / "compose"
DOCUMENT = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]
DOCKERFILE = (K8S.parent / "Dockerfile").read_text()


def environment() -> dict[str, str]:
    """The worker's settings."""
    return dict(re.findall(r"^(\w+)=(.*)$", (COMPOSE / "worker.env").read_text(), re.MULTILINE))


def test_services_need_what_is_there() -> None:
    """Each dependency is a service with a health check, and each named volume is declared."""

    for service in SERVICES.values():
        for name, need in service.get("depends_on", {}).items():
            assert need == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[name]
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= set(DOCUMENT["volumes"])


def test_our_services_are_built_from_this_checkout() -> None:
    """Both of ours have the image that the Dockerfile beside `worker/` makes, and a command that exists."""
    ours = {name: service for name, service in SERVICES.items() if "build" in service}

    assert set(ours) == {"gateway", "worker"}
    for service in ours.values():
        assert (COMPOSE / service["build"] / "Dockerfile").resolve() == K8S.parent / "Dockerfile"
        assert callable(read(service.get("command", ["run"])))


def test_settings_are_enough(tmp_path: Path) -> None:
    """The settings load as `run` loads them: none is unknown, wrong or missing."""
    key = tmp_path / "simulator-key.pem"
    key.touch()
    settings = load(environ={**environment(), "GATEWAY_PRIVATE_KEY_FILE": str(key)}, env_file=None)

    assert settings.gateway.merchant_id == "121000001"


@pytest.mark.parametrize(("setting", "service"), [("AMQP_URL", "rabbitmq"), ("GATEWAY_BASE_URL", "gateway")])
def test_addresses_are_services(setting: str, service: str) -> None:
    """Broker and gateway are addressed by the names of their services."""

    assert re.search(rf"(//|@){service}:\d+", environment()[setting])
    assert service in SERVICES


def test_the_worker_shares_the_simulator_s_key() -> None:
    """The simulator makes its key in a volume that the image's user owns; the worker reads the key from there."""
    home = re.search(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)
    assert home is not None

    assert SERVICES["gateway"]["volumes"] == [f"gateway:{home[1]}"]
    assert SERVICES["worker"]["volumes"] == ["gateway:/run/simulator:ro"]
    assert environment()["GATEWAY_PRIVATE_KEY_FILE"] == "/run/simulator/simulator-key.pem"


def test_the_worker_has_time_to_drain() -> None:
    """The time before it is killed is that of its drain and ten seconds more."""
    env = environment()

    assert SERVICES["worker"]["stop_grace_period"] == f"{int(env['WORKER_DRAIN_SECONDS']) + 10}s"


def test_the_page_s_commands_are_for_it() -> None:
    """Commands for the compose file, in its head and in the manual, name the file and services that it has."""
    manual = (K8S.parent / "worker" / "manual" / "operations.md").read_text()
    lines = re.findall(r"docker compose .*", manual + (COMPOSE / "compose.yaml").read_text())
    assert len(lines) == 3

    for line in lines:
        words = shlex.split(line)
        assert words[2:4] == ["-f", "k8s/compose/compose.yaml"]
        assert words[4] == "up" or (words[4] == "exec" and words[5] in SERVICES)
