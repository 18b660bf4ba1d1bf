"""Whether a broker is fit for us: its version, and what its policies do to our queues.

A policy is set at the broker by an operator and changes queues that exist, whoever declared them. Some keys remove
messages or whole queues, and AMQP shows neither the policy nor what it removes. Which keys do what:
rabbitmq.com/docs/policies, /docs/ttl, /docs/maxlength and /docs/quorum-queues.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from worker.core.topology import Queue, QueueType

FIT: Final = ((4, 2, 7), (4, 3, 5))
"""The first fit release of each series that has one; later series are fit. At-least-once dead lettering, which brings
delayed commands back to their lane, was repaired in 4.2.7, 4.3.1 and 4.3.3."""

HIDDEN_SECONDS: Final = 10.0
"""The longest that commands held by consumers on a dead node may stay hidden from the others."""
HIDES_SINCE: Final = (4, 3)
"""From this version on, a quorum queue waits 60 s before it takes back what consumers on an unreachable node hold,
unless `consumer-disconnected-timeout` says otherwise."""
HIDES: Final = "consumer-disconnected-timeout"


def version_problem(version: str) -> str | None:
    """Why one should not build on this release of RabbitMQ, and what to do; None when it is fit or unknown."""
    found = _numbers(version)
    if found is None or found[:2] > FIT[-1][:2] or any(found[:2] == fit[:2] and found >= fit for fit in FIT):
        return None
    fit = " or ".join(".".join(map(str, release)) for release in FIT)
    if found < (4, 0):
        return f"RabbitMQ {version} is out of support; go to {fit}, or later"
    return f"RabbitMQ {version} may lose or keep delayed commands when a node fails; go to {fit}, or later"


def policy_problems(queue: Queue, policy: Mapping[str, Any]) -> Iterator[str]:
    """What the policy in force on ``queue`` removes that should stay, a line for each key.

    ``policy`` is its definition. Where the queue has an argument for the same thing, the smaller of both counts.
    """
    own = queue.arguments
    if "expires" in policy:
        yield f"expires={policy['expires']} deletes a queue with its messages when no consumer was there for so many ms"
    ttl, kept = policy.get("message-ttl"), own.get("x-message-ttl")
    if isinstance(ttl, int) and kept is None:
        yield f"message-ttl={ttl} removes messages that have waited for so many ms"
    elif isinstance(ttl, int) and isinstance(kept, int) and ttl < kept:
        yield f"message-ttl={ttl} ends the wait of delayed commands before their {kept} ms"
    for key in ("max-length", "max-length-bytes"):
        if key in policy:
            yield f"{key}={policy[key]} removes or refuses messages when the queue is full"
    limit, ours = policy.get("delivery-limit"), own.get("x-delivery-limit")
    if isinstance(limit, int) and isinstance(ours, int) and 0 <= limit < ours:
        yield f"delivery-limit={limit} removes messages after so many deliveries instead of {ours}"


def hides_commands(version: str, queue_type: QueueType, policy: Mapping[str, Any] | None) -> str | None:
    """Advice on what happens to a lane when a broker node fails; ``policy`` is None where it cannot be seen."""
    found = _numbers(version)
    if found is None or found < HIDES_SINCE or queue_type != "quorum":
        return None
    held = None if policy is None else policy.get(HIDES)
    if isinstance(held, int) and held <= HIDDEN_SECONDS * 1000:
        return None
    unless = "" if policy is not None else " unless a policy says otherwise, which cannot be seen from here"
    return (
        f"when a node dies, commands that its consumers held stay hidden for 60 s{unless}; "
        f"set a policy with {HIDES}: 5000 on the lanes"
    )


def _numbers(version: str) -> tuple[int, ...] | None:
    """(4, 3, 6) of "4.3.6"; None of anything else."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else None
