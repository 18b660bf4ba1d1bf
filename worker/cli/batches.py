"""What `sweep` and `status` share: where the journals are, and the table that adds up."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.cli import INVALID, Trouble

if TYPE_CHECKING:
    from worker.core.sweep import Tally
    from worker.shells.journal import Journal

STATE_DIR_HELP = "Where batches keep their journals; else $XDG_STATE_HOME/qris-expire/<prefix>."


def state_directory(prefix: str, given: Path | None) -> Path:
    """One directory per prefix: a batch's id is unique there."""
    if given is not None:
        return given
    base = os.environ.get("XDG_STATE_HOME") or ""
    if not Path(base).is_absolute():  # the XDG specification: a relative path is to be ignored
        try:
            base = str(Path.home() / ".local" / "state")
        except RuntimeError:
            raise Trouble("no home directory to keep the journal in; give --state-dir", code=INVALID) from None
    return Path(base) / "qris-expire" / prefix


def journal_path(directory: Path, batch: str) -> Path:
    """Where the batch's journal is, or will be."""
    from worker.core.sweep import is_batch_id
    from worker.shells.journal import SUFFIX

    if not is_batch_id(batch):
        raise Trouble(
            f"{batch!r} is no batch id; give 1 to 64 letters, digits, '.', '_', '-', not beginning with a sign",
            code=INVALID,
        )
    return directory / f"{batch}{SUFFIX}"


def open_journal(directory: Path, batch: str, *, read_only: bool = False) -> Journal:
    """The journal of a batch that must exist."""
    from worker.shells.journal import Journal, JournalError

    path = journal_path(directory, batch)
    if not path.exists():
        raise Trouble(f"no batch {batch} in {directory}; `qris-expire status` lists them", code=INVALID)
    try:
        return Journal(path, read_only=read_only)
    except JournalError as error:
        raise Trouble(str(error)) from None


def print_tally(title: str, tally: Tally) -> None:
    """Rows by status and reason; the last line is the input."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("status")
    table.add_column("reason")
    table.add_column("rows", justify="right")
    for status, reason, count in tally.lines():
        table.add_row(status, reason, f"{count:,}")
    table.add_section()
    table.add_row("total", "rows of the input", f"{tally.rows:,}")
    output().print(table)


def output() -> Any:
    """Standard output; a pipe has no width, and lines that are searched must not be folded."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 200
    return console
