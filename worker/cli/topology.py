"""`qris-expire topology`: what must exist at the broker."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from worker.cli import INVALID, Trouble
from worker.cli.command_line import Option
from worker.cli.screen import output
from worker.core.topology import Topology, definitions
from worker.core.topology import topology as plan

if TYPE_CHECKING:
    from worker.settings import AmqpSettings


def topology(
    apply: Annotated[bool, Option("--apply", help="Declare it; what exists already stays.")] = False,
    as_definitions: Annotated[
        bool, Option("--definitions", help="Print it as RabbitMQ definitions (JSON), to import.")
    ] = False,
) -> None:
    """What must exist at the broker: prints it, declares it, or exports it.

    Prints a table unless told otherwise; only --apply speaks to the broker. Applying twice changes nothing;
    queues that exist with other arguments are named and left alone.

    Examples:

        qris-expire topology
        qris-expire topology --apply
    """
    if apply and as_definitions:
        raise Trouble("--apply and --definitions exclude each other; give one", code=INVALID)
    amqp, wanted = _settings()
    if apply:
        _apply(amqp, wanted)
    elif as_definitions:
        print(json.dumps(definitions(wanted, _vhost(amqp)), indent=2))
    else:
        _print(amqp, wanted)


def _settings() -> tuple[AmqpSettings, Topology]:
    from worker.settings import AmqpSettings, RetrySettings, load

    amqp, retry = load(AmqpSettings, RetrySettings)
    return amqp, plan(amqp.prefix, amqp.queue_type, retry.delays_seconds)


def _vhost(amqp: AmqpSettings) -> str:
    from worker.shells.amqp.session import BrokerError, parameters

    try:
        return str(parameters(amqp)[0].virtual_host)
    except BrokerError as error:
        raise Trouble(str(error)) from None


def _apply(amqp: AmqpSettings, wanted: Topology) -> None:
    from worker.shells.amqp.session import BrokerError, TopologyMismatch, apply, session

    try:
        with session(amqp, "topology") as connection:
            apply(connection, wanted)
    except TopologyMismatch as mismatch:
        raise Trouble(*mismatch.problems) from None
    except BrokerError as error:
        raise Trouble(str(error)) from None
    print(
        f"declared {len(wanted.exchanges)} exchanges, {len(wanted.queues)} queues and "
        f"{len(wanted.bindings)} bindings under {amqp.prefix}"
    )


def _print(amqp: AmqpSettings, wanted: Topology) -> None:
    from rich.table import Table

    table = Table(
        "exchange or queue",
        "what",
        "bound to",
        "arguments",
        title=f"topology of {amqp.prefix}",
        title_justify="left",
    )
    table.columns[0].no_wrap = True  # names are copied from here
    for column in table.columns[1:]:
        column.overflow = "fold"  # an argument that is cut says nothing
    for exchange in wanted.exchanges:
        table.add_row(exchange.name, exchange.type, "", _arguments(exchange.arguments))
    table.add_section()
    bound = {binding.queue: f"{binding.exchange} {binding.routing_key}".strip() for binding in wanted.bindings}
    for queue in wanted.queues:
        arguments = dict(queue.arguments)
        kind = f"{arguments.pop('x-queue-type')} queue"
        table.add_row(queue.name, kind, bound.get(queue.name, ""), _arguments(arguments))
    output().print(table)


def _arguments(arguments: object) -> str:
    return "\n".join(f"{name}={value}" for name, value in dict(arguments).items())  # type: ignore[call-overload]
