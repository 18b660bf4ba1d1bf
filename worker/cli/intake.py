"""A sweep's input on its way to a journal: rows that are checked and counted, and the batch that they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from worker.cli import INVALID, Trouble
from worker.cli.batches import check_batch_id
from worker.cli.meter import Meter
from worker.cli.screen import note
from worker.core.rows import BadRow, Form, InputError, Row, RowRules
from worker.core.sweep import Home, batch_id, belongs, unfinished
from worker.core.words import plural
from worker.shells.journal import Journal, Load
from worker.shells.journals import clean, find, journals, lock, path_for
from worker.shells.source import Source
from worker.shells.workbook import opened

BAD_ROWS_SHOWN: Final = 50  # on a terminal, where more would only push the first ones out of sight
RESUMED_SECONDS: Final = 86_400.0
"""An unfinished batch of the same input is continued for a day, whatever the date in its id: a sweep that breaks off
at midnight must not publish its bills under two ids."""


@dataclass(frozen=True, slots=True)
class Input:
    """What is to be read. ``file``: a path, or ``-``. ``merchant_id``: of the rows that have none. ``batch_id``: what
    people named the batch. ``as_is``: what looks mangled is meant so. ``may_be_empty``: no bills are no mistake."""

    file: str
    merchant_id: str
    batch_id: str | None
    skip_invalid: bool
    as_is: bool
    may_be_empty: bool

    @property
    def name(self) -> str:
        """As people know it."""
        return "stdin" if self.file == "-" else self.file


class Intake(NamedTuple):
    """The input, checked, in a journal that has no name yet."""

    load: Load
    source: str
    digest: str
    form: Form

    def keep(self, path: Path, name: str) -> None:
        """Makes it the journal of the batch of this name."""
        self.load.keep(path, batch=name, source=self.source, digest=self.digest, form=self.form, now=time.time())


@contextmanager
def batch(given: Input, directory: Path, find_home: Callable[[], Home]) -> Iterator[Journal]:
    """The journal of the batch that the input is at its home, ours alone. ``find_home`` is asked when the input is
    read, which may take minutes. Raises `Trouble`, `JournalError`."""
    if given.batch_id is not None:
        check_batch_id(given.batch_id)
    intake = take_in(given, directory)
    try:
        bills, _, invalid = intake.load.counts()
        check_any(given, bills, invalid)
        home = find_home()
        name, path = _path_of(given, directory, intake.digest, home)
        with lock(path):
            if find(directory, name, home) != (path if path.exists() else None):
                raise Trouble(f"batch {name} was begun by another process at this moment; call this again")
            if not _known(path, intake.digest):
                intake.keep(path, name)
            with closing(Journal(path)) as journal:
                yield journal
    finally:
        intake.load.discard()


def check_any(given: Input, bills: int, invalid: int) -> None:
    """That there are bills: an input without them looks like an export that failed. Raises `Trouble`."""
    if invalid and not bills:
        raise Trouble(f"{given.name}: {plural(invalid, 'row')}, and none can be used; nothing was sent", code=INVALID)
    if not bills and not given.may_be_empty:
        raise Trouble(
            f"{given.name}: has a header and no bills; nothing was sent; see what should have written them, or give "
            "--allow-empty if there are days without bills",
            code=INVALID,
        )


def take_in(given: Input, directory: Path) -> Intake:
    """Reads all of it; the caller owes its load a `discard`. Raises `Trouble` for what cannot be used."""

    name = given.name
    clean(directory)
    with ExitStack() as failed:
        load = Load(directory)
        failed.callback(load.discard)
        try:
            with opened(given.file) as source, Meter(name) as meter:
                reading = _Reading(given, source, meter)
                load.fill(reading.rows())
        except InputError as error:
            where = f"{name}:{error.line}" if error.line is not None else name
            raise Trouble(f"{where}: {error.reason}; nothing was sent", code=INVALID) from None
        except KeyboardInterrupt:
            note(f"stopped while reading {name}; nothing was sent")
            raise
        for remark in reading.read.remarks():
            note(f"{name}: {remark}")
        if reading.invalid and not given.skip_invalid:
            raise Trouble(
                f"{name}: {reading.invalid:,} of {reading.count:,} rows cannot be used, so nothing was sent; "
                "correct them, or send the rest with --skip-invalid (--dry-run --report FILE writes them down)",
                code=INVALID,
            )
        failed.pop_all()
    digest = source.digest(given.merchant_id, *(["as it is"] if given.as_is else []))
    return Intake(load, source.name, digest, reading.read.form)


class _Reading:
    """All rows go on; bad ones are reported."""

    def __init__(self, given: Input, source: Source, meter: Meter) -> None:
        self._source = source
        self._meter = meter
        self.count = 0
        self.invalid = 0
        self.read = source.reading(RowRules(given.merchant_id, as_is=given.as_is))

    def rows(self) -> Iterator[Row | BadRow]:
        source = self._source
        for row in self.read:
            self.count += 1
            if isinstance(row, BadRow):
                self._tell(row)
            yield row
            if self.count % 1000 == 0:
                self._meter.reading(self.count, source.bytes_read, source.size)

    def _tell(self, row: BadRow) -> None:
        self.invalid += 1
        if self.invalid <= BAD_ROWS_SHOWN or not sys.stderr.isatty():
            self._meter.line(f"{self._source.name}:{row.line}: {row.reason}")
        elif self.invalid == BAD_ROWS_SHOWN + 1:
            self._meter.line("… and more; redirect standard error to a file to see them all")


def _path_of(given: Input, directory: Path, digest: str, home: Home) -> tuple[str, Path]:
    """The batch that was asked for; else one of this input that was begun lately and broke off; else a new one."""
    name = given.batch_id or _broken_off(directory, digest, home) or batch_id(digest, time.time())
    return name, find(directory, name, home) or path_for(directory, name, home)


def _broken_off(directory: Path, digest: str, home: Home) -> str | None:
    for path in journals(directory):
        if time.time() - path.stat().st_mtime > RESUMED_SECONDS:
            break
        if not path.stem.partition("@")[0].endswith(f"-{digest[:12]}"):
            continue
        with closing(Journal(path, read_only=True)) as journal:
            if belongs(journal.facts, home) and unfinished(journal.facts, journal.tally()):
                return journal.facts.batch.id
    return None


def _known(path: Path, digest: str) -> bool:
    """Whether this batch was begun with this very input. Raises `Trouble` if it was begun with another."""
    if not path.exists():
        return False
    with closing(Journal(path, read_only=True)) as journal:
        facts = journal.facts
    if facts.digest != digest:
        raise Trouble(
            f"batch {facts.batch.id} was begun with other input ({facts.source}, or another --merchant-id); "
            f"give another --batch-id, or continue it: --follow {facts.batch.id}",
            code=INVALID,
        )
    return True
