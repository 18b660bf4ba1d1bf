"""Which brokers are fit, and which policies remove what should stay."""

from __future__ import annotations

from typing import Any

import pytest

from worker.core.fitness import hides_commands, policy_problems, version_problem
from worker.core.topology import Queue, topology

QUEUES = {queue.name: queue for queue in topology("p", "quorum", (30,)).queues}


@pytest.mark.parametrize("version", ["4.2.7", "4.2.12", "4.3.5", "4.3.6", "4.4.0", "5.0.0", "", "next", "4.3"])
def test_fit_versions(version: str) -> None:
    """A fit release, a later series, and what nobody can read are no reason for a warning."""

    assert version_problem(version) is None


@pytest.mark.parametrize("version", ["3.10.8", "3.13.7", "4.0.5", "4.1.9", "4.2.6", "4.3.0", "4.3.4", "4.3.4-rc.1"])
def test_unfit_versions(version: str) -> None:
    """Every other release is named, with those to go to."""

    said = version_problem(version)

    assert said is not None
    assert said.startswith(f"RabbitMQ {version} ")
    assert said.endswith("go to 4.2.7 or 4.3.5, or later")


@pytest.mark.parametrize(
    ("queue", "policy", "words"),
    [
        ("p.sweep", {"expires": 60_000}, "expires=60000 deletes a queue with its messages"),
        ("p.dead", {"message-ttl": 86_400_000}, "message-ttl=86400000 removes messages"),
        (
            "p.sweep.retry.30",
            {"message-ttl": 1000},
            "message-ttl=1000 ends the wait of delayed commands before their 30",
        ),
        ("p.dead", {"max-length": 10}, "max-length=10 removes or refuses"),
        ("p.outcomes.unrouted", {"max-length-bytes": 10}, "max-length-bytes=10 removes or refuses"),
        ("p.dead", {"delivery-limit": 20}, "delivery-limit=20 removes messages after so many deliveries"),
        ("p.sweep", {"delivery-limit": 20}, "instead of 50"),
    ],
)
def test_policies_that_remove(queue: str, policy: dict[str, Any], words: str) -> None:
    """Each key that takes messages away is named with its value."""

    (said,) = policy_problems(QUEUES[queue], policy)

    assert words in said


@pytest.mark.parametrize(
    ("queue", "policy"),
    [
        ("p.sweep", {}),
        ("p.sweep", {"consumer-disconnected-timeout": 5000, "queue-leader-locator": "balanced"}),
        ("p.sweep.retry.30", {"message-ttl": 30_000}),
        ("p.sweep.retry.30", {"message-ttl": 90_000}),
        ("p.sweep", {"delivery-limit": 50}),
        ("p.sweep", {"delivery-limit": -1}),
        ("p.sweep", {"dead-letter-exchange": "elsewhere"}),
    ],
)
def test_policies_that_do_no_harm(queue: str, policy: dict[str, Any]) -> None:
    """A key without effect on messages, and one that our own argument is stricter than, are not named."""

    assert list(policy_problems(QUEUES[queue], policy)) == []


def test_several_keys() -> None:
    """A blanket policy is reported with all that it does."""

    blanket = {"expires": 1, "message-ttl": 2, "max-length": 3}

    assert len(list(policy_problems(Queue("any", {}), blanket))) == 3


@pytest.mark.parametrize(
    ("version", "kind", "policy", "words"),
    [
        ("4.3.6", "quorum", {}, "hidden for 60 s; set a policy with consumer-disconnected-timeout: 5000"),
        ("4.3.6", "quorum", {"consumer-disconnected-timeout": 60_000}, "hidden for 60 s; set"),
        ("4.3.6", "quorum", None, "unless a policy says otherwise, which cannot be seen from here"),
        ("4.3.6", "quorum", {"consumer-disconnected-timeout": 5000}, None),
        ("4.3.6", "classic", {}, None),
        ("4.2.7", "quorum", {}, None),
        ("3.10.8", "quorum", None, None),
    ],
)
def test_hidden_commands(version: str, kind: Any, policy: dict[str, Any] | None, words: str | None) -> None:
    """Only where a dead node hides commands for a minute is there advice against it."""

    said = hides_commands(version, kind, policy)

    assert (said is None) == (words is None)
    assert words is None or words in str(said)
