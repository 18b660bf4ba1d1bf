"""`qris-expire publish`: one command, and its outcome if wanted."""

from __future__ import annotations

import json
import sys
import time
import uuid
from typing import Annotated, Any

from worker.cli import INVALID, Trouble
from worker.cli.command_line import Argument, Option
from worker.core.command import IDENTIFIER_RULE, Invalid, parse
from worker.core.delivery import Message
from worker.core.lanes import CANCELLATION, LANES
from worker.core.topology import Names
from worker.settings import AmqpSettings, load


def publish(
    bill: Annotated[str, Argument(help=f"The bill number: {IDENTIFIER_RULE}.")],
    merchant_id: Annotated[
        str | None, Option(help="The merchant of the bill; else the worker uses its GATEWAY_MERCHANT_ID.")
    ] = None,
    reference: Annotated[
        str | None, Option(help="Your own reference, at most 128 characters; the outcome repeats it.")
    ] = None,
    lane: Annotated[
        str, Option(choices=LANES, help="The lane: cancellation is for real time, sweep for bulk.")
    ] = CANCELLATION,
    not_after: Annotated[
        str | None,
        Option(help="No call starts after this time, for example 2026-11-22T23:59:59+07:00.", metavar="RFC3339"),
    ] = None,
    wait: Annotated[bool, Option(help="Wait for the outcome, and print it.")] = False,
    timeout: Annotated[float, Option(help="The longest wait for the outcome, in seconds.", min=0.1, max=86_400)] = 60,
) -> int:
    """Publishes one command, which asks the worker to expire a bill.

    It ends when the broker has confirmed the command. With --wait it prints the outcome as JSON.

    Exit code 0: published; with --wait: expired. 1: not expired, or no outcome came in time. 2: input or settings are
    wrong.

    Examples:

        qris-expire publish 10092081 --merchant-id 121000001
        qris-expire publish 10092081 --merchant-id 121000001 --reference ORD-77 --wait
    """
    from worker.shells.amqp.session import BrokerError, session

    body = _body(bill, merchant_id, reference, not_after)
    amqp = load(AmqpSettings)
    names = amqp.names
    command_id = str(uuid.uuid4())
    ended = "nothing was published: {error}"
    try:
        with session(amqp, "publish") as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            inbox = _inbox(channel, names, lane) if wait else ""
            ended = (
                f"it is not known whether the command {command_id} is published: the connection ended before the "
                "broker confirmed it: {error}; if it is, its outcome has this commandId"
            )
            _publish(channel, names, lane, command_id, body)
            ended = (
                f"the command {command_id} is published and stays so; only the wait for its outcome ended: {{error}}"
            )
            if not wait:
                print(f"published {command_id} to {names.queue(lane)}")
                return 0
            outcome = _await(channel, inbox, command_id, timeout)
    except BrokerError as error:
        raise Trouble(ended.format(error=error)) from None
    if outcome is None:
        raise Trouble(
            f"no outcome within {timeout:g} s: the command {command_id} is published and stays so; "
            f"see whether a worker runs on {names.queue(lane)}"
        )
    _print(outcome)
    return 0 if outcome.get("status") == "expired" else 1


def _body(bill: str, merchant_id: str | None, reference: str | None, not_after: str | None) -> bytes:
    fields = {
        "billnumber": bill,
        "additionalInfo": {"merchantId": merchant_id} if merchant_id is not None else None,
        "reference": reference,
        "notAfter": not_after,
    }
    text = json.dumps({name: value for name, value in fields.items() if value is not None}, separators=(",", ":"))
    body = text.encode()
    # The worker's own rule decides. Whether it has a merchant where none is given cannot be seen from here.
    command = parse(body, default_merchant="unknown")
    if isinstance(command, Invalid):
        raise Trouble(f"{command.detail}; nothing was published", code=INVALID)
    return body


def _inbox(channel: Any, names: Names, lane: str) -> str:
    """A queue of ours for the lane's outcomes; bound before the command goes out, or it may come too late."""
    queue = str(channel.queue_declare("", exclusive=True, auto_delete=True).method.queue)
    channel.queue_bind(queue, names.outcomes, f"{lane}.*")
    return queue


def _publish(channel: Any, names: Names, lane: str, command_id: str, body: bytes) -> None:
    from worker.shells.amqp.session import NotPublished, publish_command

    properties = {
        "content_type": "application/json",
        "delivery_mode": 2,
        "message_id": command_id,
        "timestamp": int(time.time()),
    }
    try:
        publish_command(channel, names, Message(names.commands, lane, body, properties))
    except NotPublished as error:
        raise Trouble(str(error)) from None


def _await(channel: Any, inbox: str, command_id: str, timeout: float) -> dict[str, Any] | None:
    deadline = time.monotonic() + timeout
    # A short turn, since outcomes of others also end one and must not prolong the whole.
    for method, _, body in channel.consume(inbox, auto_ack=True, exclusive=True, inactivity_timeout=0.2):
        if method is not None:
            outcome = _outcome(body)
            if outcome.get("commandId") == command_id:
                return outcome
        if time.monotonic() >= deadline:
            return None
    return None


def _outcome(body: bytes) -> dict[str, Any]:
    """What the body says; nothing if it is no outcome: anybody may publish to the exchange."""
    try:
        outcome = json.loads(body)
    except ValueError:
        return {}
    return outcome if isinstance(outcome, dict) else {}


def _print(outcome: dict[str, Any]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print_json(data=outcome)
    else:
        print(json.dumps(outcome, ensure_ascii=False, separators=(",", ":")))
