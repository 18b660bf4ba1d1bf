"""Tables for people and for the README."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under a title, and what must be said with them."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    also: Sequence["Table"] = ()
    """Others, made of the same runs."""

    def text(self) -> str:
        """For a terminal: the first column to the left, the others to the right."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = [
            "  ".join(_fit(cell, widths, place) for place, cell in enumerate(row)) for row in (self.head, *self.rows)
        ]
        rule = "  ".join("-" * width for width in widths)
        said = [self.title, "", lines[0], rule, *lines[1:], *(f"  {note}" for note in self.notes)]
        return "\n".join([*said, *(f"\n{other.text()}" for other in self.also)])

    def markdown(self) -> str:
        """As it stands in the README."""
        rule = ["---", *["---:"] * (len(self.head) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (self.head, rule, *self.rows)]
        said = [*lines, "", " ".join([f"{self.title}.", *self.notes])]
        return "\n".join([*said, *(f"\n{other.markdown()}" for other in self.also)])


def _fit(cell: str, widths: Sequence[int], place: int) -> str:
    return cell.rjust(widths[place]) if place else cell.ljust(widths[place])
