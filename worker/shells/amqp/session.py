"""Short conversations with the broker: connect, declare, verify. For tools and for the start of a worker.

pika's blocking connection serves here, where nothing runs beside it; the worker's own links do not use it.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectionWorkflowFailed, AMQPConnectorException
from pika.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelClosed,
    ConnectionBlockedTimeout,
    ConnectionClosedByBroker,
    NackError,
    NoFreeChannels,
    UnroutableError,
)

from worker import __version__
from worker.core.delivery import Message
from worker.core.topology import Names, Topology
from worker.shells.amqp import codec
from worker.shells.amqp.errors import MISMATCH, MISSING, NO_PLAIN, limit, reason, refusal, remedy
from worker.shells.amqp.steps import Step, declarations, lookups

if TYPE_CHECKING:
    from worker.settings import AmqpSettings

HEARTBEAT: Final = 20
"""Seconds; a dead peer is noticed within 25 (`worker.shells.amqp.link.SILENCE`)."""

CONNECT_TIMEOUT: Final = 5
"""Seconds for a TCP connection: a node that is gone must not hold back the next one of the list."""

HANDSHAKE_TIMEOUT: Final = 10
"""Seconds for TCP, TLS and AMQP together: something that accepts and stays silent is no broker."""

BLOCKED_TIMEOUT: Final = 15
"""Seconds that a tool waits for a broker that blocks its publishers."""

CONNECT_ERRORS: Final = (AMQPError, AMQPConnectorException, AMQPConnectionWorkflowFailed, OSError, ValueError)
"""All that pika 1.4 raises while it connects: a failed handshake is no AMQPError there, a peer that resets at once
is a ValueError."""

C = TypeVar("C")

_MISMATCH = re.compile(r"inequivalent arg '([^']+)' for .*: received (.+) but current is (.+)")


class BrokerError(Exception):
    """The broker did not do what was asked. The text is one line: what happened, what to do."""


class BrokerRefused(BrokerError):
    """It is there, and refuses our login, virtual host or permissions."""


class BrokerUnreachable(BrokerError):
    """No broker answers."""


class TopologyMismatch(BrokerError):
    """Exchanges or queues exist with other properties. ``problems`` has a line for each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def parameters(amqp: AmqpSettings, role: str = "tool") -> list[pika.URLParameters]:
    """How to connect to each URL, in their order. ``role`` is shown in the broker's list of connections.

    Options in a URL win over ours. Raises `BrokerError` for TLS files that cannot be used.
    """
    return [_parameters(amqp, url, role) for url in amqp.urls()]


def address(params: pika.URLParameters) -> str:
    """``host:port``, which may be shown."""
    return f"{params.host}:{params.port}"


def connect(amqp: AmqpSettings, role: str = "tool") -> pika.BlockingConnection:
    """A connection to the first URL that answers. Raises `BrokerRefused` or `BrokerUnreachable`.

    While the broker blocks its publishers, the connection ends after `BLOCKED_TIMEOUT`.
    """
    return connect_by(pika.BlockingConnection, amqp, role)


def connect_by(dial: Callable[[pika.URLParameters], C], amqp: AmqpSettings, role: str) -> C:
    """`connect` with another kind of connection; ``dial`` returns an open one or raises what pika raises."""
    codec.tolerate()
    refusals: list[BrokerRefused] = []
    full: list[str] = []
    silent: list[str] = []
    for params in parameters(amqp, role):
        if params.blocked_connection_timeout is None:
            params.blocked_connection_timeout = BLOCKED_TIMEOUT
        try:
            return dial(params)
        except CONNECT_ERRORS as error:
            refusal, said = _refusal(params, error), limit(error)
            if refusal is not None:
                refusals.append(refusal)
            elif said is not None:
                full.append(f"{address(params)} ({said})")
            else:
                silent.append(f"{address(params)} ({reason(error)})")
    if refusals:
        raise refusals[0]
    if full:
        raise BrokerUnreachable(
            f"the broker takes no more connections at {', '.join(full)}; end others, or raise that limit"
        )
    raise BrokerUnreachable(f"no broker answers at {', '.join(silent)}; start it, or correct AMQP_URL")


@contextmanager
def session(amqp: AmqpSettings, role: str = "tool") -> Iterator[pika.BlockingConnection]:
    """`connect`, closed at the end, with pika's errors translated."""
    connection = connect(amqp, role)
    try:
        yield connection
    except (AMQPError, OSError) as error:
        raise broker_error(error) from error
    finally:
        with suppress(AMQPError):
            connection.close()


class NotPublished(Exception):
    """The broker did not take a message. The text is one line: why, what to do."""


def publish_command(channel: Any, names: Names, command: Message) -> None:
    """Publishes a command on a channel with confirms, and returns when the broker has it. Raises `NotPublished`."""
    lane, properties = command.routing_key, pika.BasicProperties(**command.properties)
    try:
        channel.basic_publish(command.exchange, lane, command.body, properties, mandatory=True)
    except UnroutableError:
        why = f"no queue is bound to {names.commands} for {lane}; run `qris-expire topology --apply`"
        raise NotPublished(why) from None
    except NackError:
        raise NotPublished(f"{names.queue(lane)} does not take the command now; try again later") from None


def depth(connection: pika.BlockingConnection, queue: str) -> int | None:
    """How many messages wait in the queue; None when there is no such queue, or we may not look."""
    try:
        return int(connection.channel().queue_declare(queue, passive=True).method.message_count)
    except ChannelClosed:
        return None


def apply(connection: pika.BlockingConnection, topology: Topology) -> None:
    """Declares everything; what exists stays. Raises `TopologyMismatch` with all that exists otherwise."""
    mismatches: list[str] = []
    for step in declarations(topology):
        try:
            _perform(connection, step)
        except ChannelClosed as closed:
            if closed.reply_code == MISSING and mismatches:
                continue  # a binding to what could not be declared
            if closed.reply_code != MISMATCH:
                raise broker_error(closed, step.subject) from closed
            mismatches.append(_mismatch(step.subject, closed.reply_text))
    if mismatches:
        raise TopologyMismatch(mismatches)


def verify(connection: pika.BlockingConnection, topology: Topology) -> list[str]:
    """What is missing, one line each; changes nothing.

    A passive declaration says whether a name exists, not its arguments and not its bindings: an empty list says
    nothing about those.
    """
    missing: list[str] = []
    for step in lookups(topology):
        try:
            _perform(connection, step)
        except ChannelClosed as closed:
            if closed.reply_code != MISSING:
                raise broker_error(closed, step.subject) from closed
            said = closed.reply_text
            why = f": {said}" if "home node" in said else ""
            missing.append(f"{step.subject} is missing{why}{remedy(MISSING, said)}")
    return missing


def differing(connection: pika.BlockingConnection, topology: Topology) -> list[str]:
    """What exists with other properties than it should have, one line each; changes nothing.

    To declare what exists is how AMQP compares it. What is missing is left so; where the user may not declare, nothing
    is known.
    """
    mismatches: list[str] = []
    for look, step in zip(lookups(topology), declarations(topology), strict=False):  # bindings come last
        try:
            _perform(connection, look)
            _perform(connection, step)
        except ChannelClosed as closed:
            if closed.reply_code == MISMATCH:
                mismatches.append(_mismatch(step.subject, closed.reply_text))
    return mismatches


def broker_error(error: Exception, subject: str = "") -> BrokerError:
    """A foreign error of an open connection, as ours."""
    about = f" {subject}" if subject else ""
    match error:
        case ChannelClosed(reply_code=403):
            to = f" to {subject}" if subject else ""
            return BrokerRefused(f"the broker refuses access{to}; give the user permission for it ({_said(error)})")
        case ChannelClosed(reply_code=404):
            cure = remedy(MISSING, error.reply_text).removeprefix("; ")
            return BrokerError(f"the broker lacks something; {cure} ({_said(error)})")
        case ConnectionClosedByBroker() if limit(error) is not None:
            return BrokerUnreachable(f"the broker takes no more channels; raise that limit ({_said(error)})")
        case NoFreeChannels():
            return BrokerError("the broker allows too few channels to a connection; raise its channel_max")
        case ChannelClosed() | ConnectionClosedByBroker():
            return BrokerError(f"the broker refused{about or ' the request'}; see what it says: {_said(error)}")
        case ConnectionBlockedTimeout():
            return BrokerUnreachable("the broker blocks publishers (memory or disk alarm); free some, then try again")
    return BrokerUnreachable(f"the connection to the broker was lost ({reason(error)}); try again")


def _parameters(amqp: AmqpSettings, url: str, role: str) -> pika.URLParameters:
    try:
        params = pika.URLParameters(url)
    except (ValueError, TypeError, OSError):
        raise BrokerError("AMQP_URL has options that cannot be used; correct what follows the '?'") from None
    given = params._all_url_query_values or {}
    for name, value in _defaults(role).items():
        if name not in given:
            setattr(params, name, value)
    if params.ssl_options is not None:
        params.ssl_options = pika.SSLOptions(tls_context(amqp), params.host)
    return params


def _defaults(role: str) -> dict[str, Any]:
    return {
        "heartbeat": HEARTBEAT,
        "blocked_connection_timeout": None,
        "connection_attempts": 1,
        "socket_timeout": CONNECT_TIMEOUT,
        "stack_timeout": HANDSHAKE_TIMEOUT,
        "client_properties": {
            "connection_name": f"qris-expire {role} {socket.gethostname()}/{os.getpid()}",
            "product": "qris-expire-worker",
            "version": __version__,
        },
    }


def tls_context(amqp: AmqpSettings) -> ssl.SSLContext:
    """What is trusted, and our certificate. Raises `BrokerError` for files that cannot be used."""
    try:
        context = ssl.create_default_context(cafile=amqp.ca_file)
    except (ssl.SSLError, OSError):
        raise BrokerError("AMQP_CA_FILE holds no CA certificates; give a PEM file with at least one") from None
    context.hostname_checks_common_name = False  # see `worker.shells.transport.trust`
    if amqp.cert_file is not None:
        try:
            # A passphrase would be asked for on the terminal, where nobody is: refuse such a key instead.
            context.load_cert_chain(amqp.cert_file, amqp.key_file, password="")
        except (ssl.SSLError, OSError):
            raise BrokerError(
                "AMQP_CERT_FILE and AMQP_KEY_FILE are no certificate and its unencrypted key; correct them"
            ) from None
    return context


def _refusal(params: pika.URLParameters, error: Exception) -> BrokerRefused | None:
    match refusal(error):
        case 530:
            return BrokerRefused(
                f"the broker at {address(params)} refuses {params.credentials.username!r} the virtual host "
                f"{params.virtual_host!r}; create it and give permission, or correct AMQP_URL"
            )
        case 403 if isinstance(error, AuthenticationError):
            return BrokerRefused(f"the broker at {address(params)} takes no login by user and password; {NO_PLAIN}")
        case 403:
            return BrokerRefused(
                f"the broker at {address(params)} refuses the login of {params.credentials.username!r}; "
                "correct user and password in AMQP_URL"
            )
    return None


def _said(error: Any) -> str:
    return f"{error.reply_code} {error.reply_text}"


def _perform(connection: pika.BlockingConnection, step: Step) -> None:
    """On a channel of its own: a refusal closes it."""
    channel = connection.channel()
    getattr(channel, step.method)(**step.arguments)
    channel.close()


def _mismatch(subject: str, said: str) -> str:
    found = _MISMATCH.search(said)
    if found is None:
        return f"{subject} cannot be declared: {said}{remedy(None, said)}"
    argument, wanted, current = found.groups()
    return (
        f"{subject} exists with {argument} {_value(current)} instead of {_value(wanted)}; "
        "match AMQP_QUEUE_TYPE to it, or delete it once it is empty and declare again"
    )


def _value(text: str) -> str:
    """``the value '50' of type 'signedint'`` → ``50``."""
    quoted = re.search(r"'([^']*)'", text)
    return quoted.group(1) if quoted else text
