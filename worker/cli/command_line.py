"""Command lines: declared by the signatures of functions, read by argparse, explained by the functions' docstrings.

A command is a function. Each parameter is `Annotated` with an `Option` or an `Argument`, and what has a default may be
left out. Options that belong together are the fields of a dataclass, which is one parameter then. A `CommandGroup` is a
command that has commands of its own.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, NoReturn, Union, get_args, get_origin, get_type_hints

Function = Callable[..., Any]

WIDEST: Final = 100  # columns; longer lines are hard to read
COLUMN: Final = 30  # where the explanation of an option begins

KINDS: Final = {int: "a whole number", float: "a number"}


class UsageError(Exception):
    """The command line cannot be read: one sentence, and the command whose help says how it can."""

    def __init__(self, sentence: str, path: str) -> None:
        super().__init__(sentence)
        self.path = path


class Shown(Exception):
    """Help was asked for; the text is to be printed."""


class Option:
    """A named value, or with ``bool`` a switch. Without ``names`` it is called like its parameter.

    ``choices``: the words that it may be, if there are only these. ``min`` and ``max`` bound a number, both included.
    """

    def __init__(
        self,
        *names: str,
        help: str,
        metavar: str | None = None,
        choices: Sequence[str] = (),
        min: float = -math.inf,
        max: float = math.inf,
    ) -> None:
        self.names, self.help, self.metavar, self.choices = names, help, metavar, choices
        self.min, self.max = min, max

    def bounds(self) -> str:
        """The bounds of a number in words; empty where there are none."""
        if math.isinf(self.max):
            return "" if math.isinf(self.min) else f" of at least {self.min:g}"
        return f" from {self.min:g} to {self.max:g}"


class Argument(Option):
    """A word of the command line without a name."""


@dataclass(slots=True)
class CommandGroup:
    """A command with commands of its own; ``alone`` is what it does without one of them."""

    help: str
    alone: Function | None = None
    commands: dict[str, Function] = field(default_factory=dict)

    def command(self, name: str | None = None) -> Callable[[Function], Function]:
        """Adds the decorated function, under its own name unless another one is given."""

        def add(function: Function) -> Function:
            self.commands[name or function.__name__.rstrip("_").replace("_", "-")] = function
            return function

        return add


@dataclass(frozen=True, slots=True)
class Documents:
    """The texts of a command's settings: ``brief`` ends its help, ``whole`` is what ``--help-settings`` prints."""

    brief: str = ""
    whole: str = ""


def read(
    path: str, command: Function | CommandGroup, words: Sequence[str], documents: Callable[[], Documents]
) -> partial[Any]:
    """The call that ``words`` ask for. Raises `UsageError`, and `Shown` where help is asked for."""
    while isinstance(command, CommandGroup):
        word = words[0] if words else ""
        if word in command.commands:
            path, command, words = f"{path} {word}", command.commands[word], words[1:]
        elif word in ("-h", "--help"):
            raise Shown(_group_help(path, command, documents()))
        elif word == "--help-settings":
            raise Shown(documents().whole)
        elif command.alone is not None:
            command = command.alone
        else:
            raise UsageError(unknown(word, command.commands), path)
    return _read(path, command, words, documents)


def unknown(word: str, commands: Sequence[str] | Mapping[str, Any]) -> str:
    """What to say about a word that is not a command."""
    if not word or word.startswith("-"):
        return f"a command is missing: {', '.join(commands)}"
    nearest = difflib.get_close_matches(word, list(commands), n=1)
    return f"no such command: {word}" + (f"; did you mean {nearest[0]}?" if nearest else "")


# -- the parameters -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One parameter of a command. ``kind`` is the type of one value; ``several``: it may be given again and again."""

    name: str
    declared: Option
    kind: Any
    several: bool
    default: Any
    required: bool

    @property
    def named(self) -> bool:
        return not isinstance(self.declared, Argument)

    @property
    def switch(self) -> bool:
        return self.kind is bool

    @property
    def flags(self) -> tuple[str, ...]:
        return self.declared.names or (f"--{self.name.replace('_', '-')}",)

    @property
    def metavar(self) -> str:
        if self.declared.metavar:
            return self.declared.metavar
        if not self.named:
            return self.name.upper().replace("_", "-")
        return "|".join(self.declared.choices) or {int: "N", float: "NUMBER", Path: "FILE"}.get(self.kind, "TEXT")

    def value(self, text: str) -> Any:
        """Raises `argparse.ArgumentTypeError` with a text for people."""
        choices = self.declared.choices
        if choices and text not in choices:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(choices)}")
        if self.kind not in KINDS:
            return self.kind(text)
        try:
            number = self.kind(text)
            fits = self.declared.min <= number <= self.declared.max and math.isfinite(number)
        except ValueError:
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"must be {KINDS[self.kind]}{self.declared.bounds()}")
        return number


def _declared(function: Function) -> Iterator[tuple[str, Any, Any]]:
    """Name, hint and default of each parameter; the default is `inspect.Parameter.empty` where it must be given."""
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        yield name, hints[name], parameter.default


def _several_options(annotated: Any) -> bool:
    return is_dataclass(annotated)


def _parameters(function: Function) -> Iterator[_Parameter]:
    for name, annotated, default in _declared(function):
        if _several_options(annotated):
            yield from _parameters(annotated)
            continue
        hint, declared = get_args(annotated)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kind = next(each for each in kinds if each is not NoneType)
        several = get_origin(kind) is list
        required = default is inspect.Parameter.empty
        one = get_args(kind)[0] if several else kind
        yield _Parameter(name, declared, one, several, None if required else default, required)


def _values(function: Function, given: Mapping[str, Any]) -> dict[str, Any]:
    """What to call the function with: a dataclass is made of its fields."""
    return {
        name: annotated(**_values(annotated, given)) if _several_options(annotated) else given[name]
        for name, annotated, _ in _declared(function)
    }


# -- reading --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        for theirs, ours in _PLAINER:
            message = re.sub(theirs, ours, message)
        raise UsageError(message, self.prog)


_PLAINER: Final = (
    (r"^argument ([^:]+): ", r"\1 "),
    (r"^the following arguments are required: (.*)", r"\1 is missing"),
    (r"expected one argument", r"needs a value"),
    (r"ignored explicit argument .*", r"takes no value"),
)
"""What argparse says → what we say."""


def _read(path: str, function: Function, words: Sequence[str], documents: Callable[[], Documents]) -> partial[Any]:
    parameters = list(_parameters(function))
    end = words.index("--") if "--" in words else len(words)
    before, after = words[:end], words[end + 1 :]
    if {"-h", "--help"} & set(before):
        raise Shown(_help(path, function, parameters, documents()))
    if "--help-settings" in before:
        raise Shown(documents().whole or "This command reads no settings.")
    parser = _Parser(prog=path, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for each in parameters:
        if each.named:
            kind: dict[str, Any] = {"action": "store_true"}
            if not each.switch:
                kind = {"action": "append" if each.several else "store", "type": each.value}
            parser.add_argument(*each.flags, dest=each.name, required=each.required, **kind)
    options, rest = parser.parse_known_args(list(before))
    unknown_options = [word for word in rest if re.match(r"-[^0-9.]", word)]
    if unknown_options:
        parser.error(f"not known here: {' '.join(unknown_options)}")
    given = vars(options) | _arguments(parser, parameters, [*rest, *after])
    return partial(function, **_values(function, {each.name: each.default for each in parameters} | given))


def _arguments(parser: _Parser, parameters: Sequence[_Parameter], words: Sequence[str]) -> dict[str, Any]:
    """The words without a name, in order. Not argparse's work: it gives up if options come between them."""
    arguments = [each for each in parameters if not each.named]
    if len(words) > len(arguments):
        parser.error(f"not known here: {' '.join(words[len(arguments) :])}")
    missing = [each.metavar for each in arguments[len(words) :] if each.required]
    if missing:
        parser.error(f"{', '.join(missing)} is missing")
    given = {}
    for each, word in zip(arguments, words, strict=False):
        try:
            given[each.name] = each.value(word)
        except argparse.ArgumentTypeError as error:
            parser.error(f"{each.metavar} {error}")
    return given


# -- help -----------------------------------------------------------------------------------------------------------


def _help(path: str, function: Function, parameters: Sequence[_Parameter], documents: Documents) -> str:
    arguments = [each for each in parameters if not each.named]
    options = [each for each in parameters if each.named]
    words = [each.metavar if each.required else f"[{each.metavar}]" for each in arguments]
    parts = [" ".join(["Usage:", path, "[OPTIONS]", *words]), paragraphs(function.__doc__ or "")]
    if arguments:
        parts.append("Arguments:\n" + rows((each.metavar, _explained(each)) for each in arguments))
    listed = [(_option(each), _explained(each)) for each in options]
    listed.append(("-h, --help", "Show this text and end."))
    if documents.whole:
        listed.append(("--help-settings", "Explain the settings of this command and end."))
    parts.append("Options:\n" + rows(listed))
    return "\n\n".join([*parts, *filter(None, [documents.brief])])


def _group_help(path: str, group: CommandGroup, documents: Documents) -> str:
    usage = f"Usage: {path} {'COMMAND' if group.alone is None else '[COMMAND]'} …"
    listed = [(name, summary(function)) for name, function in group.commands.items()]
    parts = [usage, paragraphs(group.help), "Commands (each has its own --help):\n" + rows(listed)]
    return "\n\n".join([*parts, *filter(None, [documents.brief])])


def _option(parameter: _Parameter) -> str:
    flags = ", ".join(parameter.flags)
    return flags if parameter.switch else f"{flags} {parameter.metavar}"


def _explained(parameter: _Parameter) -> str:
    notes = []
    if bounds := parameter.declared.bounds():
        notes.append(bounds.removeprefix(" of").strip())
    if not parameter.switch and parameter.default not in (None, ""):
        notes.append(f"default {parameter.default}")
    return f"{parameter.declared.help} [{'; '.join(notes)}]" if notes else parameter.declared.help


def summary(command: Function | CommandGroup) -> str:
    """The first sentence of a command's help."""
    text = command.help if isinstance(command, CommandGroup) else command.__doc__ or ""
    first = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.:;])\s", first)[0].rstrip(".:;")


def paragraphs(docstring: str) -> str:
    """A docstring, each paragraph filled to the width; what is indented stays as it is."""
    parts = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return "\n\n".join(
        part if part.startswith(" ") else textwrap.fill(part, width(), break_on_hyphens=False) for part in parts
    )


def rows(pairs: Any) -> str:
    """Names on the left, what they mean on the right."""
    lines = []
    for name, meaning in pairs:
        wrapped = textwrap.wrap(meaning, max(width() - COLUMN, 24), break_on_hyphens=False) or [""]
        if len(name) > COLUMN - 4:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name:<{COLUMN - 2}}{wrapped.pop(0)}".rstrip())
        lines += [" " * COLUMN + line for line in wrapped]
    return "\n".join(lines)


def width() -> int:
    """Columns that help may fill."""
    return max(min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST), 40)
