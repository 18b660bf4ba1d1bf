"""The README says what the code does."""

from pathlib import Path

from worker.core.outcome import DEAD_LETTERED, REASONS
from worker.settings import reference

README = (Path(__file__).parents[2] / "README.md").read_text()


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
