"""`qris-expire demo`: everything on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.cli import Trouble


def demo(
    commands: Annotated[int, typer.Option(help="How many commands to send.", min=20, max=5000)] = 360,
) -> int:
    """Shows the whole product on this machine, in under a minute.

    Uses the RabbitMQ at AMQP_URL (or on localhost) if one answers, else starts a private node from installed binaries,
    else installs them. Then: the simulated gateway with faults on one call in ten, one worker, a sweep with
    cancellations beside it, a table that adds up, and a clean stop. Nothing is left running, no queue stays behind.

    Exit code 0: every command got its outcome.
    """
    from rich.console import Console

    from worker.sandbox import broker
    from worker.sandbox import demo as show

    try:
        show.run(commands, Console())
    except (show.DemoError, broker.BrokerUnavailable) as error:
        raise Trouble(str(error)) from None
    return 0
