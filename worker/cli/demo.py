"""`qris-expire demo`: everything on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TextIO

from worker.cli import Trouble
from worker.cli.command_line import Option


def demo(
    commands: Annotated[int, Option(help="How many commands to send.", min=20, max=5000)] = 360,
    save: Annotated[
        Path | None, Option(metavar="FILE", help="Save every message as it was on the wire, as JSON lines.")
    ] = None,
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
        with _opened(save) as file:
            for message in show.run(commands, Console(soft_wrap=True)):
                file.write(f"{message.line()}\n")
    except (show.DemoError, broker.BrokerUnavailable) as error:
        raise Trouble(str(error)) from None
    except OSError as error:
        if save is None:
            raise
        raise Trouble(f"{save}: cannot be written ({error.strerror}); give another --save") from None
    return 0


def _opened(path: Path | None) -> TextIO:
    """Before the demo begins: ten seconds are too long to learn that the file cannot be written."""
    return (path or Path(os.devnull)).open("w", encoding="utf-8")
