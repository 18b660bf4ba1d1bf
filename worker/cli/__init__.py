"""The commands of ``qris-expire``, one file each, imported when called; what is heavy is imported inside."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from worker import __version__

COMMANDS: Final = {
    "demo": (),
    "simulator": (),
    "publish": ("AMQP_",),
    "sweep": ("AMQP_",),
    "status": ("AMQP_",),
    "dead": ("AMQP_",),
    "contract": ("AMQP_PREFIX",),
    "check": ("AMQP_", "GATEWAY_", "RETRY_"),
    "sign": ("GATEWAY_",),
    "topology": ("AMQP_", "RETRY_DELAYS_SECONDS"),
    "run": ("AMQP_", "GATEWAY_", "RETRY_", "BREAKER_", "WORKER_", "METRICS_", "LOG_"),
}
"""Every command, in the order of the help, and what the names of the settings that it reads begin with."""

DIRECT: Final = ("GATEWAY_", "RETRY_", "BREAKER_", "WORKER_CONCURRENCY", "WORKER_DRAIN_SECONDS")
"""What ``sweep --direct`` reads beside AMQP_PREFIX: without it nobody who runs a sweep needs the gateway's."""

HELP: Final = """
Expires QRIS bills at a SNAP payment gateway, driven by RabbitMQ. New here? demo shows everything on this
machine, and simulator plays the gateway. Producers of commands try one with publish, and send whole files with
sweep; status tells where those stand; contract has the messages' schemas. Operators prepare the
broker with topology, look at everything with check (sign shows what is signed, where a gateway refuses it), and
start the worker with run; dead shows and moves what it had to park.
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


def _add_settings(ctx: Any, formatter: Any) -> None:
    """Typer prints its part of a help itself; what the formatter holds comes after it."""
    command = ctx.command_path.split()[1]  # of a group's command, the group
    prefixes = COMMANDS.get(command, ())
    if prefixes:
        with formatter.section("Settings (environment, or a .env file)"):
            formatter.write_dl(_settings(prefixes))
    if command == "sweep":
        with formatter.section("With --direct also"):
            formatter.write_dl(_settings(DIRECT))


class _Command(TyperCommand):
    """A command whose help ends with its settings."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _add_settings(ctx, formatter)


class _Group(TyperGroup):
    """The same of a command with commands of its own."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _add_settings(ctx, formatter)


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        found = getattr(import_module(f"worker.cli.{cmd_name}"), cmd_name)
        if isinstance(found, typer.Typer):
            return _group(cmd_name, found)
        alone = typer.Typer(add_completion=False)
        help_text = _reflowed(found.__doc__ or "")
        alone.command(cmd_name, cls=_Command, help=help_text, context_settings=_CONTEXT)(found)
        return typer.main.get_command(alone)


def _group(name: str, commands: typer.Typer) -> Any:
    """A command that has commands of its own, each with its help as the others'."""
    for command in commands.registered_commands:
        command.cls = _Command
        command.help = _reflowed((command.callback and command.callback.__doc__) or "")
        command.context_settings = _CONTEXT
    commands.info.name = name
    commands.info.cls = _Group
    commands.info.context_settings = _CONTEXT
    return typer.main.get_group(commands)


_CONTEXT: Final = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(cls=_Commands, add_completion=False, context_settings=_CONTEXT)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qris-expire {__version__}")
        raise typer.Exit


def _reflowed(docstring: str) -> str:
    """Its paragraphs, each on one line: the terminal's width decides where they break."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring.strip()))


@app.callback(help=_reflowed(HELP))
def _all(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and end."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an unexpected error."),
) -> None:
    """Options of all commands."""


def main(arguments: Sequence[str]) -> int:
    """Runs one command; the exit code. Whatever goes wrong is told in one line on standard error."""
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # what it says of a broker's refusal, we say in a line
    try:
        code = typer.main.get_command(app).main(
            list(arguments) or ["--help"], prog_name="qris-expire", standalone_mode=False
        )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except Trouble as trouble:
        _tell(*trouble.lines)
        return trouble.code
    except typer.TyperException as error:  # usage
        _tell(_usage(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # `… | head`: nobody reads any more, which is no error of ours
        sys.stdout = None  # or the interpreter complains when it flushes at exit
        return 0
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the same, told by rich
            return 0
        raise
    except Exception as error:  # noqa: BLE001  # the last door: a person reads one line, not a traceback
        return _failed(error, arguments)


def _tell(*lines: str) -> None:
    for line in lines:
        print(f"qris-expire: {line}", file=sys.stderr)


_PLAINER: Final = (
    ("Value error, ", ""),
    (": Input should be", ": must be"),
    (", unable to parse string as an integer", ""),
    (", unable to parse string as a number", ""),
)
"""Words of the library that checks options → ours."""


def _usage(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "qris-expire"
    said = " ".join(error.format_message().split())
    for library, ours in _PLAINER:
        said = said.replace(library, ours)
    return f"{said.rstrip('.')}. Try `{path} --help`."


def _failed(error: Exception, arguments: Sequence[str]) -> int:
    """Tells what is wrong with the settings, or that something unexpected happened; the exit code."""
    import os

    from worker.settings import SettingsError
    from worker.shells.logs import redact

    if isinstance(error, SettingsError):
        _tell(*error.problems)
        return INVALID
    text = redact(" ".join(str(error).split()))
    if "--debug" in arguments or os.environ.get("LOG_LEVEL", "").lower() == "debug":
        # Without local variables: they hold settings.
        _tell(redact("".join(traceback.format_exception(error)).rstrip()))
    _tell(f"unexpected: {type(error).__name__}: {text}; `qris-expire --debug …` shows where")
    return 1


def _settings(prefixes: Sequence[str]) -> list[tuple[str, str]]:
    from worker.settings import reference

    return [
        (variable, f"{meaning} [{default}]".replace("`", "").removesuffix(" []"))
        for variable, default, meaning in reference()
        if variable.startswith(tuple(prefixes))
    ]
