"""The README says what the code does."""

import re
import textwrap
from pathlib import Path

import pytest

from worker.core.outcome import DEAD_LETTERED, REASONS
from worker.settings import reference

README = (Path(__file__).parents[2] / "README.md").read_text()
SNIPPETS = Path(__file__).parents[1] / "snippets"
SHOWN = re.compile(r"<!-- snippet: (\S+) -->\n```\w+\n(.*?)\n```\n", re.DOTALL)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def _rows(heading: str) -> dict[str, list[str]]:
    table = README.split(heading, 1)[1].split("\n\n", 1)[0]
    return {_cells(line)[0].strip("`"): _cells(line)[1:] for line in table.splitlines() if line.startswith("| `")}


def test_settings_table_is_the_declaration() -> None:
    """Every setting stands in the README with its default and its meaning, and no other does."""
    rows = _rows("| variable | default | meaning |")

    assert {name: [cells[0].strip("`"), cells[-1]] for name, cells in rows.items()} == {
        name: [default.strip("`"), meaning] for name, default, meaning in reference()
    }


def test_outcome_table_is_the_enum() -> None:
    """Every status stands in the README with its reasons, and whether it is dead-lettered."""
    rows = _rows("| status | reasons | dead-lettered |")

    assert {status: cells[0].replace("`", "").split(", ") for status, cells in rows.items()} == {
        str(status): [str(reason) for reason in reasons] for status, reasons in REASONS.items()
    }
    assert {status for status, cells in rows.items() if cells[1].startswith("yes")} == {str(s) for s in DEAD_LETTERED}


def snippet(name: str) -> str:
    """What the README shows of a file: the part between its lines `snippet` and `end`, else all of it."""
    text = (SNIPPETS / name).read_text()
    part = re.search(r"^ *// snippet\n(.*?)\n *// end$", text, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(part[1] if part else text).strip()


def names() -> list[str]:
    """The files that are run against the broker."""
    return sorted(file.name for file in SNIPPETS.iterdir() if file.is_file())


@pytest.mark.parametrize("name", names())
def test_a_snippet_is_short(name: str) -> None:
    """What a newcomer has to read for one language is 20 lines at most, none wider than a page."""
    lines = snippet(name).splitlines()

    assert len(lines) <= 20
    assert max(map(len, lines)) <= 120


def test_snippets_are_the_files_that_were_run() -> None:
    """All programs in the README are those of tests/snippets, none is missing; or it has none at all."""
    shown = dict(SHOWN.findall(README))

    assert README.count("<!-- snippet:") == len(shown)
    assert shown in ({}, {name: snippet(name) for name in names()})
