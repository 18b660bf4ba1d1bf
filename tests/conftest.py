"""Brokers for the tests, prefixes that clean up after themselves, and what runs only on request."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

from tests.brokers import PrivateBroker, PrivateCluster
from tests.rabbit import delete_topology, new_prefix
from worker.sandbox.broker import BrokerUnavailable, LoginResult, try_login

DEFAULT_AMQP_URL = "amqp://guest:guest@127.0.0.1:5672/%2F"

ON_REQUEST = {
    "slow": "takes half a minute or more; runs with --slow",
    "chaos": "breaks things at random for minutes; runs with --chaos",
}

ON_EACH_BROKER = {
    "integration": {"broker", "dead", "hostile_input", "limits", "publisher", "sweep", "worker"},
    "process": {"broker_faults", "run"},
}
"""Files of tests that depend on what the broker does: `.ci/test --broker 4.3 -m each_broker` runs them on another."""

# A deadline or a slow draw measures the machine, and ours is shared.
_UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", _UNHURRIED, max_examples=100, derandomize=False)
settings.register_profile("local", _UNHURRIED)


def in_ci() -> bool:
    """Where nothing may be skipped."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


settings.load_profile("ci" if in_ci() else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker, why in ON_REQUEST.items():
        parser.addoption(f"--{marker}", action="store_true", help=f"also run tests marked {marker}: {why}")


def pytest_configure(config: pytest.Config) -> None:
    # Processes that tests start inherit it: under nohup they would ignore the signal that some tests send.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for marker, why in ON_REQUEST.items():
        config.addinivalue_line("markers", f"{marker}: {why}")
    config.addinivalue_line("markers", "each_broker: depends on what the broker does")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in ON_EACH_BROKER.get(item.path.parent.name, ()):
            item.add_marker("each_broker")
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    unwanted = [marker for marker in ON_REQUEST if not config.getoption(f"--{marker}")]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in unwanted)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """The collector of garbage leaves alone what stays until the end, and looks less often: it took a seventh of the
    unit tests' time. What tests leave behind it still finds, at the latest when pytest ends."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


Broker = TypeVar("Broker", PrivateBroker, PrivateCluster)


@contextmanager
def running(broker: Broker) -> Iterator[Broker]:
    """Start it and stop it; a missing broker skips locally and fails in CI."""
    try:
        try:
            broker.start()
        except BrokerUnavailable as reason:
            give_up = pytest.fail if in_ci() else pytest.skip
            give_up(f"no broker: {reason}")
        yield broker
    finally:
        broker.close()


@pytest.fixture(scope="session")
def amqp_url() -> Iterator[str]:
    """A broker that tests share: AMQP_URL or the machine's own, else one started for this session.

    Whoever chooses an installation by RABBITMQ_HOME means that one, not the broker that the machine happens to run.
    """
    url = (os.environ.get("AMQP_URL") or DEFAULT_AMQP_URL).partition(",")[0]
    chosen = "RABBITMQ_HOME" in os.environ and "AMQP_URL" not in os.environ
    if not chosen and try_login(url, timeout=10) is LoginResult.READY:
        yield url
        return
    with running(PrivateBroker()) as broker:
        yield broker.url


@pytest.fixture
def prefix(amqp_url: str) -> Iterator[str]:
    """An AMQP_PREFIX of this test's own; the worker's topology under it is deleted afterwards."""
    unique = new_prefix()
    yield unique
    delete_topology(amqp_url, unique)


@pytest.fixture(scope="session")
def private_broker() -> Iterator[PrivateBroker]:
    """A broker that tests may stop, kill and restart; ask for `fresh` unless its state does not matter."""
    with running(PrivateBroker()) as broker:
        yield broker


@pytest.fixture(scope="session")
def _used() -> list[PrivateBroker]:
    return []


@pytest.fixture
def fresh(private_broker: PrivateBroker, _used: list[PrivateBroker]) -> PrivateBroker:
    """The private broker, running and empty, whatever the last test did to it."""
    private_broker.start()
    # Its first user finds it empty anyway, and a test run that needs it once does not pay for a reset.
    if private_broker in _used:
        private_broker.reset()
    _used.append(private_broker)
    return private_broker


@pytest.fixture(scope="session", params=["3.10", "4.3"])
def _session_cluster(request: pytest.FixtureRequest) -> Iterator[PrivateCluster]:
    with running(PrivateCluster(version=request.param)) as cluster:
        yield cluster


@pytest.fixture
def cluster(_session_cluster: PrivateCluster) -> PrivateCluster:
    """Three nodes, all running: of the oldest RabbitMQ, then of the newest. A test that asks for it is slow, and uses a
    prefix of its own."""
    _session_cluster.start()
    return _session_cluster
