"""The broker's management API, for the one thing that AMQP does not show: the policies in force on our queues."""

from __future__ import annotations

import base64
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import structlog

from worker.core.fitness import policy_problems
from worker.core.topology import Topology
from worker.core.urls import is_tls
from worker.shells.amqp.session import BrokerError, parameters, tls_context

if TYPE_CHECKING:
    from worker.settings import AmqpSettings

PLAIN_PORT: Final = 15_672
TLS_PORT: Final = 15_671
SECONDS: Final = 3.0
"""For each step of a request: a port behind a firewall must not keep a start waiting."""

log = structlog.get_logger()

STATISTICS_SECONDS: Final = 10.0
"""The longest wait for a queue's policy: the API knows it with the queue's first statistics, each 5 s by default."""

Policies = Mapping[str, Mapping[str, Any]]
"""Queue → the definition in force: that of its policy and of its operator policy."""


class NotVisible(Exception):
    """The policies cannot be seen. One line: why, and what to do."""


class _Place(NamedTuple):
    """Where the API may be, and as whom we ask."""

    tls: bool
    host: str
    port: int
    user: str
    password: str

    def connection(self, context: ssl.SSLContext | None) -> HTTPConnection:
        if self.tls:
            return HTTPSConnection(self.host, self.port, timeout=SECONDS, context=context)
        return HTTPConnection(self.host, self.port, timeout=SECONDS)


def policies(amqp: AmqpSettings, topology: Topology) -> Policies:
    """The policies in force on those of our queues that exist. Raises `NotVisible`."""
    why = "no address"
    for place in _places(amqp):
        try:
            return _ask(amqp, place, topology)
        except NotVisible as reason:
            why = f"{place.host}:{place.port}: {reason}"
    raise NotVisible(f"policies cannot be seen ({why}); give AMQP_MANAGEMENT_URL, with a user tagged management")


def warn(amqp: AmqpSettings, topology: Topology) -> None:
    """Logs what the policies in force remove that should stay; may take some seconds, and raises nothing."""
    try:
        wrong = problems(policies(amqp, topology), topology)
    except NotVisible as reason:
        log.info("broker.policies_unseen", reason=str(reason))
        return
    for problem in wrong:
        log.error("broker.policy", reason=problem)


def problems(found: Policies, topology: Topology) -> list[str]:
    """What these policies remove that should stay, a line each with all queues that it is true of."""
    queues: dict[str, list[str]] = {}
    for queue in topology.queues:
        for problem in policy_problems(queue, found.get(queue.name, {})):
            queues.setdefault(problem, []).append(queue.name)
    return [
        f"the policy in force on {', '.join(names)}: {problem}; give these queues another policy, of a higher priority"
        for problem, names in queues.items()
    ]


def _places(amqp: AmqpSettings) -> Iterator[_Place]:
    """The one that was set, else the usual ports of the broker's nodes, with the login for AMQP."""
    if amqp.management_url is not None:
        url = urlsplit(amqp.management_url.get_secret_value())
        tls = url.scheme == "https"
        port = url.port or (TLS_PORT if tls else PLAIN_PORT)
        yield _Place(tls, url.hostname or "", port, unquote(url.username or ""), unquote(url.password or ""))
        return
    for url_text, params in zip(amqp.urls(), parameters(amqp), strict=True):
        tls = is_tls(url_text)
        login = params.credentials
        yield _Place(tls, params.host, TLS_PORT if tls else PLAIN_PORT, login.username, login.password)


def _ask(amqp: AmqpSettings, place: _Place, topology: Topology) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    try:
        vhost = quote(str(parameters(amqp)[0].virtual_host), safe="")
        with closing(place.connection(tls_context(amqp) if place.tls else None)) as connection:
            deadline = time.monotonic() + STATISTICS_SECONDS
            unknown = {queue.name: f"/api/queues/{vhost}/{quote(queue.name, safe='')}" for queue in topology.queues}
            while unknown:
                for name, path in list(unknown.items()):
                    queue = _queue(connection, place, path)
                    if queue is None or "effective_policy_definition" in queue:
                        del unknown[name]
                    if queue is not None:
                        found[name] = queue.get("effective_policy_definition") or {}  # it writes [] for none
                if unknown and time.monotonic() > deadline:
                    raise NotVisible(f"it has no statistics of {next(iter(unknown))} yet")
                time.sleep(0.5 if unknown else 0)
    except BrokerError as error:
        raise NotVisible(str(error)) from None
    except (OSError, HTTPException) as error:
        raise NotVisible(getattr(error, "strerror", None) or type(error).__name__) from None
    return found


def _queue(connection: HTTPConnection, place: _Place, path: str) -> Mapping[str, Any] | None:
    """What the API says of one queue; None when there is no such queue."""
    login = base64.b64encode(f"{place.user}:{place.password}".encode()).decode()
    connection.request("GET", path, headers={"Authorization": f"Basic {login}", "Accept": "application/json"})
    answer = connection.getresponse()
    body = answer.read()
    if answer.status == 404:
        return None
    if answer.status != 200:
        raise NotVisible(f"it answers {answer.status} to the user {place.user!r}")
    try:
        queue = json.loads(body)
    except ValueError:
        queue = None
    if not isinstance(queue, dict):
        raise NotVisible("what answers is not RabbitMQ's management API")
    return queue
