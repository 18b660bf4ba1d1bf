"""`qris-expire demo`: everything on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from worker.cli import INVALID, Trouble
from worker.cli.command_line import Option
from worker.settings import AmqpSettings, load


def demo(
    commands: Annotated[int, Option(help="How many commands to send.", min=20, max=5000)] = 360,
    direct: Annotated[
        bool, Option(help="Without a broker: sweep a file of bills straight to the simulated gateway.")
    ] = False,
    save: Annotated[
        Path | None, Option(metavar="FILE", help="Save every message as it was on the wire, as JSON lines.")
    ] = None,
) -> int:
    """Shows the product on this machine, in under a minute.

    Starts a simulated gateway that fails one call in ten, and one worker; sends a sweep with cancellations beside it;
    shows what became of each command, and ends. It leaves no process, queue or file behind, and installs nothing.

    The broker: if AMQP_URL is set, the one there, which must answer. Otherwise the RabbitMQ of this machine if one
    answers, or a private node started from installed binaries. If there is none, the demo runs as with --direct.

    Exit code 0: every command got its outcome. 1: not. 2: settings are wrong.

    Examples:

        qris-expire demo
        qris-expire demo --direct --commands 1000
    """
    from rich.console import Console

    from worker.sandbox import broker, direct_demo
    from worker.sandbox import demo as show

    console = Console(soft_wrap=True)
    if direct and save is not None:
        raise Trouble("--direct sends no messages that could be saved; leave out --save", code=INVALID)
    try:
        if direct:
            direct_demo.run(commands, console)
            return 0
        # Before the demo begins: ten seconds are too long to learn that the file cannot be written.
        with (save or Path(os.devnull)).open("w", encoding="utf-8") as file:
            for message in show.run(commands, _given(), console):
                file.write(f"{message.line()}\n")
    except show.NoBroker:
        if save is not None:
            raise Trouble("there is no broker; start RabbitMQ, or set AMQP_URL, or leave out --save") from None
        return demo(commands, direct=True)
    except (show.DemoError, broker.BrokerUnavailable) as error:
        raise Trouble(str(error)) from None
    except OSError as error:
        if save is None:
            raise
        raise Trouble(f"{save}: cannot be written ({error.strerror}); give another --save") from None
    return 0


def _given() -> AmqpSettings | None:
    """The broker that somebody chose: a setting is an order, and the demo looks for no other broker then."""
    amqp = load(AmqpSettings)
    named = any(os.environ.get(name) for name in ("AMQP_URL", "AMQP_URL_FILE"))
    return amqp if named or amqp.url != AmqpSettings.declared()["url"].default else None
