"""What commands show: tables on standard output, notes and progress on standard error."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Self, TextIO

from worker.core.words import folded

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

PIPE_WIDTH: Final = 200
"""A pipe has no width, and lines that people search in must not be folded."""
LINE_EVERY: Final = 5.0  # seconds between two lines of progress where there is no terminal
DRAW_EVERY: Final = 0.2  # seconds between two pictures on a terminal


def output() -> Console:
    """Standard output, for tables."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def plain_table() -> Any:
    """A table without lines between its columns, which takes few of the terminal's."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def tell(text: str, *, indent: int = 0, file: TextIO | None = None) -> None:
    """A sentence on standard output (or ``file``): on a terminal broken between words, elsewhere one line, where people
    search in it. ``indent``: columns before all lines but the first."""
    file = file or sys.stdout
    if file.isatty():
        text = folded(text, shutil.get_terminal_size().columns, indent)
    print(text, file=file, flush=file is sys.stderr)


def note(text: str) -> None:
    """A sentence beside what is printed, on standard error."""
    tell(f"qris-expire: {text}", file=sys.stderr)


class Display:
    """Progress on standard error: a picture on a terminal, which is drawn anew now and then; elsewhere a line."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self._shown_at = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.terminal:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def pause(self) -> None:
        """Takes the picture away for good."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, text: str) -> None:
        """A line that stays, above the picture."""
        if self._live is not None:
            width = self._live.console.width
            self._live.console.print(folded(text, width), soft_wrap=True, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def draw(self, picture: Callable[[], Any], sentence: Callable[[], str]) -> None:
        """How far it is: as a ``picture`` for rich, or as a ``sentence``. To be called often; it shows seldom."""
        now = time.monotonic()
        if now - self._shown_at < (DRAW_EVERY if self.terminal else LINE_EVERY):
            return
        self._shown_at = now
        if self._live is not None:
            self._live.update(picture(), refresh=True)
        elif not self.terminal:
            self.line(sentence())


def bars(rows: Iterable[tuple[str, int, int, Sequence[str]]]) -> Any:
    """A picture with a bar for each row: its name, so many done, of so many, and texts behind it."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for name, done, total, texts in rows:
        while len(grid.columns) < 2 + len(texts):
            grid.add_column(justify="right", no_wrap=True)
        grid.add_row(name, ProgressBar(total=max(total, 1), completed=done), *texts)
    return grid
