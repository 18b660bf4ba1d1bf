"""The commands of ``qris-expire``, one file each, imported when called; what is heavy is imported inside."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any, Final

from worker import __version__
from worker.cli import command_line
from worker.cli.command_line import (
    CommandGroup,
    Documents,
    Function,
    Shown,
    UsageError,
    paragraphs,
    rows,
    summary,
    unknown,
)
from worker.cli.screen import note

PROGRAM: Final = "qris-expire"

COMMANDS: Final = {
    "demo": ("AMQP_",),
    "simulator": (),
    "publish": ("AMQP_",),
    "sweep": ("AMQP_", "GATEWAY_MERCHANT_ID"),
    "status": ("AMQP_",),
    "dead": ("AMQP_",),
    "contract": ("AMQP_PREFIX",),
    "check": ("AMQP_", "GATEWAY_", "RETRY_"),
    "sign": ("GATEWAY_",),
    "topology": ("AMQP_", "RETRY_DELAYS_SECONDS"),
    "fleet": ("AMQP_",),
    "run": ("AMQP_", "GATEWAY_", "RETRY_", "BREAKER_", "WORKER_", "METRICS_", "LOG_"),
}
"""Every command, in the order of the help, and what the names of the settings that it reads begin with."""

DIRECT: Final = ("GATEWAY_", "RETRY_", "BREAKER_", "WORKER_CONCURRENCY", "WORKER_DRAIN_SECONDS")
"""What ``sweep --direct`` reads beside AMQP_PREFIX: without it nobody who runs a sweep needs the gateway's."""

HELP: Final = """
Expires QRIS bills at a SNAP payment gateway, driven by RabbitMQ.

New here? `demo` shows the product on this machine, and `simulator` plays the gateway. Developers publish one command
with `publish`, and read the schemas of the messages with `contract`. Finance operators send files of bills with
`sweep`, and see where they stand with `status`. SREs prepare the broker with `topology`, verify everything with
`check` (and `sign`, where the gateway refuses a signature), start the worker with `run`, see and pause all workers
with `fleet`, and handle dead letters with `dead`.
"""

INVALID: Final = 2
"""Exit code: settings or input that the worker cannot take."""

INTERRUPTED: Final = 130
"""Exit code after ctrl-C, as shells have it."""


class Trouble(Exception):
    """An expected failure: lines for people on standard error, without a traceback, and the exit code."""

    def __init__(self, *lines: str, code: int = 1) -> None:
        self.lines = lines
        self.code = code
        super().__init__("\n".join(lines))


def command(name: str) -> Function | CommandGroup:
    """What the command does; its module is imported now."""
    found: Function | CommandGroup = getattr(import_module(f"worker.cli.{name}"), name)
    return found


def read(words: Sequence[str]) -> partial[Any]:
    """What a command line asks for, without the options of all commands. Raises `UsageError` and `Shown`."""
    name = words[0] if words else ""
    if name in ("", "-h", "--help"):
        raise Shown(_help())
    if name not in COMMANDS:
        raise UsageError(unknown(name, tuple(COMMANDS)), PROGRAM)
    return command_line.read(f"{PROGRAM} {name}", command(name), words[1:], lambda: _documents(name))


def _help() -> str:
    listed = [(name, summary(command(name))) for name in COMMANDS]
    options = [
        ("--version", "Show the version and end."),
        ("--debug", "Show the traceback of an unexpected error."),
        ("-h, --help", "Show this text and end."),
    ]
    return "\n\n".join(
        [
            f"Usage: {PROGRAM} [OPTIONS] COMMAND …",
            paragraphs(HELP),
            f"Commands (each has its own --help):\n{rows(listed)}",
            f"Options:\n{rows(options)}",
        ]
    )


def _documents(name: str) -> Documents:
    """The settings that a command reads: their names, and what they mean."""
    parts = {"Settings": COMMANDS[name], **({"With --direct also": DIRECT} if name == "sweep" else {})}
    settings = {title: _settings(prefixes) for title, prefixes in parts.items() if prefixes}
    if not settings:
        return Documents()
    brief = "; ".join(
        f"{title.lower() if count else title}: {', '.join(variable for variable, _ in listed)}"
        for count, (title, listed) in enumerate(settings.items())
    )
    whole = "\n\n".join(f"{title}:\n{rows(listed)}" for title, listed in settings.items())
    return Documents(
        paragraphs(f"{brief}. They come from the environment or a .env file; --help-settings explains them."),
        f"{paragraphs('Settings come from the environment, or from a file .env in the current directory.')}\n\n{whole}",
    )


def main(arguments: Sequence[str]) -> int:
    """Runs one command; the exit code. Whatever goes wrong is told in one line on standard error."""
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # what it says of a broker's refusal, we say in a line
    words = list(arguments)
    debug = words[:1] == ["--debug"]
    try:
        if words == ["--version"]:
            raise Shown(f"{PROGRAM} {__version__}")
        code = read(words[debug:])()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except Shown as shown:
        return _show(str(shown))
    except UsageError as error:
        _tell(f"{error}. Try `{error.path} --help`.")
        return INVALID
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _nobody_reads()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the same, told by rich
            return _nobody_reads()
        raise
    except Exception as error:  # noqa: BLE001  # the last door: a person reads one line, not a traceback
        return _failed(error, debug=debug)


def _show(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        return _nobody_reads()
    return 0


def _nobody_reads() -> int:
    """``… | head``: nobody reads our output any more, which is not an error."""
    sys.stdout = None  # or the interpreter complains when it flushes at exit
    return 0


def _tell(*lines: str) -> None:
    for line in lines:
        note(line)


def _failed(error: Exception, *, debug: bool) -> int:
    """Tells what went wrong; the exit code."""
    from worker.shells.logs import redact

    trouble = expected(error)
    if trouble is not None:
        _tell(*trouble.lines)
        return trouble.code
    text = redact(" ".join(str(error).split()))
    if debug or os.environ.get("LOG_LEVEL", "").lower() == "debug":
        # Without local variables: they hold settings.
        _tell(redact("".join(traceback.format_exception(error)).rstrip()))
    _tell(f"unexpected: {type(error).__name__}: {text}; `qris-expire --debug …` shows where")
    return 1


def expected(error: Exception) -> Trouble | None:
    """The trouble that an error is, also one of the layers below whose text is for people; None for any other."""
    if isinstance(error, Trouble):
        return error
    from worker.core.rows import InputError
    from worker.settings import SettingsError

    if isinstance(error, SettingsError):
        return Trouble(*error.problems, code=INVALID)
    from worker.shells.amqp.session import BrokerError, TopologyMismatch
    from worker.shells.credentials import CredentialsError
    from worker.shells.http import ListenError
    from worker.shells.journal import JournalError

    if isinstance(error, InputError | CredentialsError | ListenError):
        return Trouble(str(error), code=INVALID)
    if isinstance(error, TopologyMismatch):
        return Trouble(*error.problems)
    return Trouble(str(error)) if isinstance(error, BrokerError | JournalError) else None


def _settings(prefixes: Sequence[str]) -> list[tuple[str, str]]:
    from worker.settings import reference

    return [
        (variable, f"{meaning} [{default}]".replace("`", "").removesuffix(" []"))
        for variable, default, meaning in reference()
        if variable.startswith(tuple(prefixes))
    ]
