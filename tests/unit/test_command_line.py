"""Command lines: what a signature makes of words, and what is said about words that it does not take."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from worker import cli
from worker.cli.command_line import Argument, CommandGroup, Documents, Option, Shown, UsageError, read

COLOURS = ("red", "dark-blue")


@dataclass(frozen=True)
class Way:
    """Options that belong together."""

    dry_run: Annotated[bool, Option(help="Only say so.")] = False
    only: Annotated[list[str] | None, Option(choices=COLOURS, help="May be repeated.")] = None


def paint(
    wall: Annotated[str, Argument(help="Which wall.")],
    colour: Annotated[str, Argument(choices=COLOURS, help="Its colour.")] = "red",
    coats: Annotated[int, Option(help="How often.", min=1, max=9)] = 2,
    share: Annotated[float | None, Option(help="Of the wall.", min=0)] = None,
    report: Annotated[Path | None, Option("--report", "-r", help="Where to write.", metavar="OUT.csv")] = None,
    way: Way = Way(),
) -> None:
    """Paints a wall: all of it. Dries by itself.

    Example:

        paint north --coats 3
    """


tools = CommandGroup("Looks after the tools. Finds them, too.")


@tools.command("list")
def list_(limit: Annotated[int, Option(help="At most so many.", min=0)] = 20) -> None:
    """Lists them; the newest first."""


def parsed(*words: str) -> dict[str, Any]:
    return dict(read("paint", paint, words, lambda: Documents("Settings: A_B.", "A_B  What it is.")).keywords)


def said(command: Any, *words: str) -> str:
    with pytest.raises((UsageError, Shown)) as caught:
        read("x", command, words, lambda: Documents("Settings: A_B.", "A_B  What it is."))
    return str(caught.value)


def test_what_is_left_out_has_its_default() -> None:
    """Only what has no default must be given."""

    assert parsed("north") == {
        "wall": "north",
        "colour": "red",
        "coats": 2,
        "share": None,
        "report": None,
        "way": Way(),
    }


def test_everything_can_be_given_in_any_order() -> None:
    """Options before, between and after the arguments; `=` or a blank; values of their types."""
    words = ["--coats=3", "north", "--only", "red", "dark-blue", "--share", "0.5", "-r", "o.csv", "--only=dark-blue"]

    found = parsed(*words, "--dry-run")

    assert found == {
        "wall": "north",
        "colour": "dark-blue",
        "coats": 3,
        "share": 0.5,
        "report": Path("o.csv"),
        "way": Way(dry_run=True, only=["red", "dark-blue"]),
    }


@pytest.mark.parametrize("word", ["-", "-5", "--", "--wall"])
def test_a_word_that_begins_with_a_sign(word: str) -> None:
    """`-` and a negative number are words; after `--` everything is."""

    assert parsed(*([word] if word in ("-", "-5") else ["--", word]))["wall"] == word


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "WALL is missing"),
        (["north", "green"], "COLOUR must be one of red, dark-blue"),
        (["north", "--coats", "0"], "--coats must be a whole number from 1 to 9"),
        (["north", "--coats", "1.5"], "--coats must be a whole number from 1 to 9"),
        (["north", "--share", "-1"], "--share must be a number of at least 0"),
        (["north", "--share", "nan"], "--share must be a number of at least 0"),
        (["north", "--share", "inf"], "--share must be a number of at least 0"),
        (["north", "--coats"], "--coats needs a value"),
        (["north", "--dry-run=true"], "--dry-run takes no value"),
        (["north", "--dry-run", "red", "x"], "not known here: x"),
        (["north", "--dry"], "not known here: --dry"),
        (["north", "--only", "x"], "--only must be one of red, dark-blue"),
        (["north", "--report"], "--report/-r needs a value"),
    ],
)
def test_what_is_refused(words: list[str], sentence: str) -> None:
    """The sentence names the word that is wrong, and what is right."""

    assert said(paint, *words) == sentence


def test_commands_of_a_group() -> None:
    """The word after a group's name is its command; a wrong one is reported with the nearest."""
    call = read("tools", tools, ["list", "--limit", "3"], Documents)

    assert (call.func, call.keywords) == (list_, {"limit": 3})
    assert said(tools, "lits") == "no such command: lits; did you mean list?"
    assert said(tools) == "a command is missing: list"


def test_a_group_can_do_something_alone() -> None:
    """Without a command of its own, a group does what it does alone, with options."""
    group = CommandGroup("Does.", alone=list_, commands={"paint": paint})

    assert read("g", group, [], Documents).keywords == {"limit": 20}
    assert read("g", group, ["--limit", "1"], Documents).keywords == {"limit": 1}


def test_help_explains_every_word() -> None:
    """Usage, text with its examples as they are, arguments, options with bounds and defaults, names of settings."""
    text = said(paint, "north", "--help")

    assert text.startswith(
        "Usage: x [OPTIONS] WALL [COLOUR]\n\nPaints a wall: all of it. Dries by itself.\n\nExample:\n"
    )
    assert "\n    paint north --coats 3\n" in text
    assert "  --coats N                   How often. [from 1 to 9; default 2]\n" in text
    assert "  --dry-run                   Only say so.\n" in text
    assert "  --report, -r OUT.csv        Where to write.\n" in text
    assert text.endswith("Settings: A_B.")
    assert said(paint, "--help-settings") == "A_B  What it is."
    assert "list                        Lists them" in said(tools, "--help")


def paths() -> list[str]:
    """Every command of ours, and every command of a group."""
    found = []
    for name in cli.COMMANDS:
        command = cli.command(name)
        found += [f"{name} {each}" for each in command.commands] if isinstance(command, CommandGroup) else [name]
    return found


@pytest.mark.parametrize("path", paths())
def test_every_command_has_an_example_that_works(path: str) -> None:
    """The help of a command has command lines of it, which can be read."""
    with pytest.raises(Shown) as shown:
        cli.read([*path.split(), "--help"])

    examples = re.findall(rf"^    qris-expire ({path}\b.*)$", str(shown.value), re.MULTILINE)
    assert examples
    for each in examples:
        assert callable(cli.read(shlex.split(each)))


def test_help_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of prose is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", "60")

    assert max(map(len, said(paint, "--help").splitlines())) <= 60
