"""Limits of the broker: what it refuses because of one is waited for, in its own words, and is no wrong password."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.brokers import PrivateBroker, PrivateCluster
from tests.conftest import running
from tests.rabbit import new_prefix
from tests.worker_process import WorkerProcess
from worker.core.topology import Names, QueueType, topology
from worker.sandbox.simulator import Simulator
from worker.settings import AmqpSettings, Secret
from worker.shells.amqp.session import (
    BrokerRefused,
    BrokerUnreachable,
    TopologyMismatch,
    apply,
    connect,
    session,
    verify,
)

LIMITS = {
    "virtual host": (
        ("set_vhost_limits", "-p", "/", '{"max-connections": 0}'),
        ("clear_vhost_limits", "-p", "/"),
        "connection limit (0) is reached",
    ),
    "user": (
        ("set_user_limits", "guest", '{"max-connections": 0}'),
        ("clear_user_limits", "guest", "all"),
        "user connection limit (0) is reached",
    ),
    "channels of a user": (
        ("set_user_limits", "guest", '{"max-channels": 1}'),
        ("clear_user_limits", "guest", "all"),
        "maximum allowed user limit of",
    ),
}


@contextmanager
def limited(broker: PrivateBroker, case: str) -> Iterator[str]:
    """The limit, lifted at the end; the broker's words for it."""
    limit, lift, words = LIMITS[case]
    broker.ctl(*limit)
    try:
        yield words
    finally:
        broker.ctl(*lift)


def settings(broker: PrivateBroker, kind: QueueType = "quorum") -> AmqpSettings:
    return AmqpSettings(url=Secret(broker.url), prefix=new_prefix(), queue_type=kind)


@pytest.mark.parametrize("case", LIMITS)
def test_a_limit_at_start_is_waited_for(private_broker: PrivateBroker, tmp_path: Path, case: str) -> None:
    """A worker that meets the limit says so in the broker's words, and works when the limit is lifted."""
    private_broker.start()
    with ExitStack() as while_limited, Simulator() as gateway:
        words = while_limited.enter_context(limited(private_broker, case))
        with WorkerProcess(private_broker.url, new_prefix(), gateway, tmp_path) as worker:
            (said, *_) = worker.wait_for(lambda: worker.events("broker.waiting"), 30, "it waits")
            assert words in said["reason"]
            assert "takes no more" in said["reason"]
            while_limited.close()
            worker.wait_ready()
            worker.stop()


def test_a_limit_of_connections_is_no_refusal(private_broker: PrivateBroker) -> None:
    """A tool says in the broker's words that there is no room, and not to correct its password; a virtual host that
    is called "limit" and does not exist is a refusal."""
    private_broker.start()
    with limited(private_broker, "user") as words, pytest.raises(BrokerUnreachable) as full:
        connect(settings(private_broker))
    nowhere = AmqpSettings(url=Secret(private_broker.url.replace("%2F", "limit")))
    with pytest.raises(BrokerRefused, match="the virtual host 'limit'"):
        connect(nowhere)

    assert words in str(full.value)
    assert "takes no more connections" in str(full.value)


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_a_limit_of_queues(private_broker: PrivateBroker, kind: QueueType) -> None:
    """Where no further queue may be declared, each is named with the limit, and no error advises to declare them."""
    private_broker.start()
    amqp = settings(private_broker, kind)
    wanted = topology(amqp.prefix, amqp.queue_type, (30,))
    private_broker.ctl("set_vhost_limits", "-p", "/", '{"max-queues": 0}')
    try:
        with session(amqp) as connection, pytest.raises(TopologyMismatch) as mismatch:
            apply(connection, wanted)
    finally:
        private_broker.ctl("clear_vhost_limits", "-p", "/")

    assert len(mismatch.value.problems) == len(wanted.queues)
    for problem in mismatch.value.problems:
        assert "queue limit in vhost '/' (0) is reached; raise that limit at the broker" in problem
        assert "topology --apply" not in problem


@pytest.mark.parametrize(("most", "works"), [("1", False), ("2", True)])
def test_few_channels(tmp_path: Path, most: str, works: bool) -> None:
    """With two channels to a connection the worker works; with one it waits, and names what must be raised."""
    with (
        running(PrivateBroker(config={"channel_max": most})) as broker,
        Simulator() as gateway,
        WorkerProcess(broker.url, new_prefix(), gateway, tmp_path) as worker,
    ):
        if works:
            worker.wait_ready()
            assert worker.events("broker.waiting") == []
        else:
            (said, *_) = worker.wait_for(lambda: worker.events("broker.waiting"), 30, "it waits")
            assert "allows only 1 channels to a connection; raise its channel_max" in said["reason"]
        worker.stop()


def test_a_broker_without_passwords(tmp_path: Path) -> None:
    """Where the broker offers no login by password, that is what the error says, and no advice to correct one."""
    with running(PrivateBroker(config={"auth_mechanisms.1": "EXTERNAL"})) as broker, Simulator() as gateway:
        with pytest.raises(BrokerRefused, match=r"takes no login by user and password; let it offer PLAIN"):
            connect(settings(broker))
        with WorkerProcess(broker.url, new_prefix(), gateway, tmp_path) as worker:
            assert worker.wait(60) == 3
            assert "takes no login by user and password" in worker.errors()
            assert "let it offer PLAIN to this user" in worker.errors()
            assert "correct AMQP_URL" not in worker.errors()


def test_a_classic_queue_whose_node_is_down(cluster: PrivateCluster) -> None:
    """Its node is to be started again, and no error advises to declare the queue."""
    prefix = new_prefix()
    first, second = (AmqpSettings(url=Secret(url), prefix=prefix, queue_type="classic") for url in cluster.urls[:2])
    wanted = topology(prefix, "classic", (30,))
    with session(first) as connection:
        apply(connection, wanted)
    cluster.nodes[0].kill()
    with session(second) as connection:
        missing = verify(connection, wanted)

    assert any(f"queue {Names(prefix).dead} is missing" in line for line in missing)
    assert all("start that node again" in line and "topology --apply" not in line for line in missing)
