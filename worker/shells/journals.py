"""The directory of the journals: which batches there are, who works on one of them, and the end of the old ones."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from worker.core.sweep import Home, belongs, unfinished
from worker.shells.journal import LOADING, LOCK, PRIVATE, SUFFIX, Journal, JournalError, translated

ABANDONED: Final = 86_400.0
"""Seconds after which a load that never became a batch is what a killed process left behind."""


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """One process per batch. Raises `JournalError` when another has it; the system releases it when its holder ends.

    A file of its own: SQLite has locks of its own on the journal.
    """
    name = path.with_suffix(LOCK)
    while True:
        with translated(name):
            number = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE)
        with os.fdopen(number, "r+", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = file.read(20).strip() or "?"
                raise JournalError(
                    f"batch {path.stem} is in use by process {holder}; let it end, or stop it with ctrl-C"
                ) from None
            if os.fstat(number).st_nlink:  # one that was deleted between opening and locking locks nothing
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                yield
                return


def journals(directory: Path) -> list[Path]:
    """The batches of a directory, the latest first."""
    with translated(directory):
        if not os.path.lexists(directory):
            return []
        # A glob would take a directory that cannot be read for an empty one.
        found = [path for path in directory.iterdir() if path.suffix == SUFFIX and not path.name.startswith(".")]
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def journals_of(directory: Path, batch: str) -> list[Path]:
    """A batch's journals, one for each home that it was sent to."""
    with translated(directory):
        return sorted(path for path in journals(directory) if path.stem.partition("@")[0] == batch)


def find(directory: Path, batch: str, home: Home) -> Path | None:
    """The batch's journal for this home, if there is one. Raises `JournalError`, also when it cannot be told which."""
    found = []
    for path in journals_of(directory, batch):
        with closing(Journal(path, read_only=True)) as journal:
            facts = journal.facts
            if belongs(facts, home):
                found.append((path, facts.place or facts.gateway or "nowhere yet"))
    if len(found) < 2:
        return found[0][0] if found else None
    places = ", ".join(place for _, place in found)
    raise JournalError(
        f"batch {batch} was sent to several places ({places}), and {home.place} does not tell which is meant; "
        "try again when the broker answers, or give another --batch-id"
    )


def path_for(directory: Path, batch: str, home: Home) -> Path:
    """Where a new journal of the batch goes: beside those of its other homes."""
    first = directory / f"{batch}{SUFFIX}"
    if not first.exists():
        return first
    return directory / f"{batch}@{hashlib.sha256(str(home.id).encode()).hexdigest()[:8]}{SUFFIX}"


def prune(directory: Path, days: float, now: float) -> Iterator[str]:
    """Removes the batches that are finished and that nothing has changed for so long (``now``: seconds since the
    epoch); yields their ids. What somebody works on, or cannot be read, stays."""
    for path in journals(directory):
        if now - path.stat().st_mtime < days * 86_400:
            continue
        with suppress(JournalError), lock(path), translated(path):
            with closing(Journal(path, read_only=True)) as journal:
                if unfinished(journal.facts, journal.tally()):
                    continue
                files, batch = journal.files(), journal.facts.batch.id
            for each in files:
                each.unlink(missing_ok=True)
            yield batch


def clean(directory: Path) -> None:
    """Removes what killed processes left while they loaded."""
    with suppress(OSError):
        for path in directory.glob(f"{LOADING}*"):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)
