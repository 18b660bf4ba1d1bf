"""`qris-expire topology`: what must exist at the broker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

from worker.cli import INVALID, Trouble
from worker.cli.command_line import Option
from worker.core.topology import Topology, definitions
from worker.core.topology import topology as plan
from worker.settings import AmqpSettings, RetrySettings, load


def topology(
    apply: Annotated[bool, Option(help="Declare it; what exists already stays.")] = False,
    as_definitions: Annotated[
        bool, Option("--definitions", help="Print it as RabbitMQ definitions (JSON), to import.")
    ] = False,
) -> None:
    """Prints, declares or exports what must exist at the broker.

    Only --apply speaks to the broker. Applying twice changes nothing;
    queues that exist with other arguments are named and left alone.

    Examples:

        qris-expire topology
        qris-expire topology --apply
    """
    if apply and as_definitions:
        raise Trouble("--apply and --definitions exclude each other; give one", code=INVALID)
    amqp, retry = load(AmqpSettings, RetrySettings)
    wanted = plan(amqp.prefix, amqp.queue_type, retry.delays_seconds)
    if apply:
        _apply(amqp, wanted)
    elif as_definitions:
        print(_definitions(amqp, wanted))
    else:
        _print(wanted)


def _apply(amqp: AmqpSettings, wanted: Topology) -> None:
    from worker.shells.amqp.session import apply, session

    with session(amqp, "topology") as connection:
        apply(connection, wanted)
    print(
        f"declared {len(wanted.exchanges)} exchanges, {len(wanted.queues)} queues and "
        f"{len(wanted.bindings)} bindings under {amqp.prefix}"
    )


def _definitions(amqp: AmqpSettings, wanted: Topology) -> str:
    from worker.shells.amqp.session import parameters

    return json.dumps(definitions(wanted, str(parameters(amqp)[0].virtual_host)), indent=2)


def _print(wanted: Topology) -> None:
    """Lines instead of a table: names and arguments are copied, and a narrow terminal would cut them."""
    for exchange in wanted.exchanges:
        _print_one(f"exchange  {exchange.name}  {exchange.type}", exchange.arguments)
    bound = {binding.queue: f"{binding.exchange} {binding.routing_key}".strip() for binding in wanted.bindings}
    for queue in wanted.queues:
        arguments = dict(queue.arguments)
        _print_one(f"queue     {queue.name}  {arguments.pop('x-queue-type')}", arguments)
        if queue.name in bound:
            print(f"          bound to {bound[queue.name]}")


def _print_one(line: str, arguments: Mapping[str, object]) -> None:
    print(line)
    for name, value in arguments.items():
        print(f"          {name}={value}")
