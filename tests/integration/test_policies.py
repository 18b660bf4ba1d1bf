"""Policies on our queues that remove messages are found, where the management API can be asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.brokers import PrivateBroker
from tests.conftest import running
from tests.rabbit import new_prefix
from tests.waiting import wait_until
from tests.worker_process import WorkerProcess
from worker.core.topology import topology
from worker.sandbox.simulator import Simulator
from worker.settings import AmqpSettings, Secret
from worker.shells.amqp.management import NotVisible, policies, problems
from worker.shells.amqp.session import apply, session

MANAGEMENT = "rabbitmq_management"


@pytest.fixture(scope="module", params=["3.10", "4.3"])
def managed(request: pytest.FixtureRequest) -> Iterator[PrivateBroker]:
    """A broker with the management API; "watcher" may ask it and do nothing else, "worker" may not ask it."""
    # Statistics come each half a second, instead of each five.
    quick = {"collect_statistics_interval": "500"}
    with running(PrivateBroker(plugins=[MANAGEMENT], config=quick, version=request.param)) as broker:
        for user in ("watcher", "worker"):
            broker.ctl("add_user", user, "p@ss")
        broker.ctl("set_user_tags", "watcher", "management")
        broker.ctl("set_permissions", "watcher", "^$", "^$", "^$")
        yield broker


@pytest.fixture
def policy(managed: PrivateBroker) -> Iterator[Callable[..., None]]:
    """Sets a policy on queues (an operator's, where ``kind`` is `operator_policy`); all are cleared afterwards."""
    names: list[tuple[str, str]] = []

    def put(name: str, pattern: str, definition: str, *more: str, kind: str = "policy") -> None:
        managed.ctl(f"set_{kind}", name, pattern, definition, "--apply-to", "queues", *more)
        names.append((kind, name))

    yield put
    for kind, name in names:
        managed.ctl(f"clear_{kind}", name)


def settings(broker: PrivateBroker, prefix: str, user: str = "watcher") -> AmqpSettings:
    api = f"http://{user}:p%40ss@127.0.0.1:{broker.http_port(MANAGEMENT)}"
    return AmqpSettings(url=Secret(broker.url), prefix=prefix, management_url=Secret(api))


def test_policies_that_remove_messages(managed: PrivateBroker, policy: Callable[..., None]) -> None:
    """A blanket policy and an operator's policy are found on every queue that they change; without them nothing is."""
    prefix = new_prefix()
    amqp = settings(managed, prefix)
    wanted = topology(prefix, "quorum", (30,))

    def told() -> list[str]:
        return problems(policies(amqp, wanted), wanted)

    assert policies(amqp, wanted) == {}
    with session(amqp) as connection:
        apply(connection, wanted)
    assert policies(amqp, wanted) == {queue.name: {} for queue in wanted.queues}
    assert problems(policies(amqp, wanted), wanted) == []

    policy("blanket", ".*", '{"expires": 86400000}')
    policy("guard", r"\.dead$", '{"message-ttl": 60000}', kind="operator_policy")
    wait_until(
        lambda: len(told()) == 2 and told()[0].count(prefix) == len(wanted.queues), 90, "the statistics have them all"
    )
    expires, ttl = told()

    assert "expires=86400000 deletes a queue" in expires
    assert all(queue.name in expires for queue in wanted.queues)
    assert f"the policy in force on {prefix}.dead: message-ttl=60000" in ttl

    # One policy is in force at a time: a harmless one of a higher priority takes the queues out of the other.
    policy("own", f"^{re.escape(prefix)}", '{"overflow": "reject-publish"}', "--priority", "100")
    wait_until(lambda: not any("expires" in problem for problem in told()), 90, "the statistics have it")


def test_a_worker_says_what_a_policy_removes(
    managed: PrivateBroker, policy: Callable[..., None], tmp_path: Path
) -> None:
    """A worker that starts under a policy that removes messages says so, with the queues, and whether its broker is
    fit."""
    prefix = new_prefix()
    amqp = settings(managed, prefix)
    with session(amqp) as connection:
        apply(connection, topology(prefix, "quorum", (1, 2)))
    policy(prefix, f"^{re.escape(prefix)}", '{"expires": 3600000}', "--priority", "100")
    wanted = topology(prefix, "quorum", (1, 2))

    def told_of_all() -> bool:
        told = problems(policies(amqp, wanted), wanted)
        return len(told) == 1 and "expires=3600000" in told[0] and told[0].count(prefix) == len(wanted.queues)

    wait_until(told_of_all, 90, "the statistics have it")
    assert amqp.management_url is not None
    api = amqp.management_url.get_secret_value()
    with (
        Simulator() as gateway,
        WorkerProcess(managed.url, prefix, gateway, tmp_path, AMQP_MANAGEMENT_URL=api) as worker,
    ):
        (line, *_) = worker.wait_for(lambda: worker.events("broker.policy"), 60, "the policy is told")
        assert f"{prefix}.sweep.retry.1" in line["reason"]
        assert "expires=3600000" in line["reason"]
        worker.wait_ready()
        worker.stop()
        old = managed.ctl("version").startswith("3.")
        assert [line["reason"].split(" is ")[1] for line in worker.events("broker.unfit")] == [
            "out of support; go to 4.2.7 or 4.3.5, or later"
        ] * old
        assert "p%40ss" not in worker.log() + worker.errors()


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ("worker", "it answers 401 to the user 'worker'"),
        ("nobody", "it answers 401 to the user 'nobody'"),
    ],
)
def test_a_user_that_may_not_look(managed: PrivateBroker, user: str, words: str) -> None:
    """Whoever may not ask the API is told who may."""
    amqp = settings(managed, new_prefix(), user)

    with pytest.raises(NotVisible) as said:
        policies(amqp, topology(amqp.prefix, "quorum", ()))

    assert words in str(said.value)
    assert "give AMQP_MANAGEMENT_URL, with a user tagged management" in str(said.value)
    assert "p@ss" not in str(said.value)


def test_no_management(amqp_url: str) -> None:
    """Without the API at its usual port the policies cannot be seen, which is said in one line."""
    amqp = AmqpSettings(url=Secret(amqp_url.replace("guest:guest", "guest:hunter2")), prefix=new_prefix())

    with pytest.raises(NotVisible, match=r"^policies cannot be seen \(127\.0\.0\.1:15672: .*\); give") as said:
        policies(amqp, topology(amqp.prefix, "quorum", ()))

    assert "hunter2" not in str(said.value)
