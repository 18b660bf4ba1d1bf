"""The file that `sweep --report` writes: where it may be written, and what it contains."""

from __future__ import annotations

import csv
import itertools
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worker.cli import INVALID, Trouble
from worker.core.report import BatchReport, harmless, kept_as_text
from worker.shells import workbook
from worker.shells.journal import LOCK, PRIVATE, SUFFIX, Journal


def check_place(report: Path, source: str | None) -> None:
    """That a report can be written there, and that it is not the input. ``source``: a path, ``-`` or None.

    Raises `Trouble`.
    """
    if not report.absolute().parent.is_dir():
        raise Trouble(f"the directory {report.parent} does not exist; correct --report", code=INVALID)
    if report.is_dir() or report.name in ("", ".", ".."):
        raise Trouble(f"--report {report} is a directory; name a file", code=INVALID)
    if report.suffix in (SUFFIX, LOCK):
        raise Trouble(f"--report {report} has the name of a journal; name a .csv or .xlsx file", code=INVALID)
    if _is_workbook(report) and not workbook.available():
        raise Trouble(
            f"--report {report} would be an Excel workbook; install what writes them, "
            "`pip install 'qris-expire-worker[xlsx]'`, or name a .csv",
            code=INVALID,
        )
    if source is not None and _same_file(source, report):
        raise Trouble(f"--report {report} is the input itself, and would replace it; name another file", code=INVALID)


def check_existing(report: Path, journal: Journal, *, force: bool) -> None:
    """That no file is replaced but a report that this batch wrote and nobody changed since, or one that ``force``
    gives up. The journal and its files are never replaced. Raises `Trouble`."""
    if _is_workbook(report) and journal.tally().rows >= workbook.MOST_ROWS:
        raise Trouble(
            f"--report {report}: a sheet has no more than {workbook.MOST_ROWS:,} rows; name a .csv", code=INVALID
        )
    if not os.path.lexists(report):
        return
    if any(_same(report, each) for each in journal.files()):
        raise Trouble(f"--report {report} is the journal of this batch; name another file", code=INVALID)
    if not force and not journal.wrote(report):
        raise Trouble(f"--report {report} exists already; name another file, or replace it with --force", code=INVALID)


def write(journal: Journal, report: Path, delimiter: str | None = None) -> None:
    """One line for each row of the input, from the journal, in the form of the input; the file appears whole."""
    form, lines = journal.facts.form, BatchReport(journal.facts)
    if _is_workbook(report):
        with replacing(report, binary=True) as file:
            workbook.write(file, itertools.chain([lines.header()], (lines.line(row) for row in journal.rows())))
        journal.has_written(report)
        return
    cell = kept_as_text if form.spreadsheet else harmless
    with replacing(report) as file:
        if form.mark:
            file.write("\ufeff")
        writer = csv.writer(file, delimiter=delimiter or form.delimiter)
        writer.writerow(map(harmless, lines.header()))
        writer.writerows(map(cell, lines.line(row)) for row in journal.rows())
    journal.has_written(report)


@contextmanager
def replacing(path: Path, *, binary: bool = False) -> Iterator[Any]:
    """A file (of text in UTF-8, unless ``binary``) that takes ``path``'s place when all is written: whoever reads it
    never sees half of it. Raises `Trouble`."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE)
        text: dict[str, Any] = {} if binary else {"encoding": "utf-8", "newline": ""}
        with os.fdopen(number, "wb" if binary else "w", **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise Trouble(f"{path} cannot be written ({error.strerror}); make room, or name another place") from None
    finally:
        partial.unlink(missing_ok=True)


def _is_workbook(report: Path) -> bool:
    return report.suffix.lower() == workbook.SUFFIX


def _same_file(source: str, report: Path) -> bool:
    if source != "-":
        return _same(Path(source), report)
    try:
        return os.path.samestat(os.fstat(sys.stdin.fileno()), report.stat())
    except (OSError, ValueError):  # no such report yet, or no standard input
        return False


def _same(one: Path, other: Path) -> bool:
    """The same file, by whatever name: links of both kinds, and the spellings that a file system takes for one."""
    try:
        return os.path.samestat(one.stat(), other.stat())
    except OSError:
        return one.absolute() == other.absolute()
