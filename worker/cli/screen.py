"""What commands show: tables on standard output, notes and progress on standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH: Final = 200
"""A pipe has no width, and lines that people search in must not be folded."""


def output() -> Console:
    """Standard output, for tables."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def note(text: str) -> None:
    """A line beside what is printed, on standard error."""
    print(f"qris-expire: {text}", file=sys.stderr, flush=True)
