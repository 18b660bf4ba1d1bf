"""The journal of one batch: a SQLite file that knows every bill, how far it is published and what became of it.

Written by one process at a time (a lock file beside it says which), read by any. What is committed survives a power
cut, so an outcome is acked, and a bill is never sent under a second id, on the strength of it.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from worker.core.delivery import Progress
from worker.core.needs import RETRIED
from worker.core.outcome import DEAD_LETTERED, REASONS, Reason, Status
from worker.core.rows import BadRow, Form, Row
from worker.core.sweep import (
    Batch,
    Bill,
    Facts,
    Home,
    Job,
    Recorded,
    Tally,
    Told,
    batch_command_id,
    supersedes,
)

PRIVATE: Final = 0o600
"""Journals, locks and reports name bills and merchants: they are their owner's alone."""
SUFFIX: Final = ".db"
LOCK: Final = ".lock"
LOADING: Final = ".loading-"
_BESIDE: Final = ("-wal", "-shm", "-journal")
"""Files that SQLite keeps beside a database, and applies to any database with that name."""

MOVE_AWAY: Final = "move it away together with the files beside it whose names begin with its name"

_FORMAT: Final = 2
_CACHE_KIB: Final = 16_384  # the index of a million bills is larger; what falls out is in the system's cache
_BUSY_SECONDS: Final = 10.0

_TABLES: Final = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE rows (
    line INTEGER PRIMARY KEY,
    bill TEXT,
    merchant TEXT,
    reference TEXT,
    not_after TEXT,
    why TEXT,
    turn INTEGER,
    cells TEXT NOT NULL
);
CREATE TABLE bills (
    number INTEGER PRIMARY KEY,
    line INTEGER NOT NULL,
    bill TEXT NOT NULL,
    merchant TEXT NOT NULL,
    again INTEGER NOT NULL DEFAULT 0,
    begun INTEGER NOT NULL DEFAULT 0,
    due REAL,
    progress TEXT,
    status TEXT,
    reason TEXT,
    response_code TEXT,
    response_message TEXT,
    detail TEXT,
    attempts INTEGER,
    effect_unknown INTEGER,
    external_ids TEXT,
    completed_at TEXT,
    UNIQUE (bill, merchant)
);
CREATE INDEX due ON bills (due) WHERE due IS NOT NULL;
"""
"""``rows`` is the input, ``bills`` what is sent, numbered in the order of sending. ``why`` a row is invalid is NULL for
the others; ``turn`` counts the rows of its merchant."""

_INSERT: Final = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_ARRANGE: Final = """
INSERT OR IGNORE INTO bills (line, bill, merchant)
SELECT line, bill, merchant FROM rows WHERE why IS NULL ORDER BY {order}
"""
_BILL: Final = """
SELECT number, bills.bill, bills.merchant, rows.reference, rows.not_after, again, coalesce(effect_unknown, 0)
"""
_ROW: Final = "CROSS JOIN rows ON rows.line = bills.line"
_UNSENT: Final = f"{_BILL} FROM bills {_ROW} WHERE number > ? AND status IS NULL ORDER BY number LIMIT ?"
_NEXT: Final = f"""
{_BILL}, begun, progress FROM bills {_ROW}
WHERE number > ? AND status IS NULL AND due IS NULL ORDER BY number LIMIT ?
"""
_DUE: Final = f"{_BILL}, begun, progress FROM bills {_ROW} WHERE due <= ? ORDER BY due LIMIT ?"
_EXAMPLES: Final = """
SELECT line, bill, merchant, coalesce(response_code || ' ', '') || coalesce(response_message, detail, '') AS said
FROM bills WHERE reason IN (SELECT value FROM json_each(?)) ORDER BY line LIMIT ?
"""
_UNRESOLVED: Final = """
SELECT number, effect_unknown FROM bills
WHERE status = ? AND reason IN (SELECT value FROM json_each(?)) ORDER BY number
"""
_AGAIN: Final = """
UPDATE bills SET number = ?, again = again + 1, begun = 0, due = NULL, progress = ?, status = NULL, reason = NULL,
    response_code = NULL, response_message = NULL, detail = NULL, attempts = NULL, external_ids = NULL
WHERE number = ?
"""
"""``effect_unknown`` and ``completed_at`` stay: what is known of the earlier calls."""

_REPORT: Final = """
SELECT rows.line, rows.bill, rows.merchant, rows.reference, rows.why, rows.cells, bills.line AS first, number, status,
    reason, response_code, response_message, detail, attempts, effect_unknown, external_ids, completed_at
FROM rows LEFT JOIN bills ON bills.bill = rows.bill AND bills.merchant = rows.merchant ORDER BY rows.line
"""
_TELL: Final = """
UPDATE bills SET status = ?, reason = ?, response_code = ?, response_message = ?, detail = ?, attempts = ?,
    effect_unknown = ?, external_ids = ?, completed_at = ?, due = NULL, progress = NULL WHERE number = ?
"""

_PROGRESS: Final = attrgetter(
    "round", "attempts", "external_ids", "effect_unknown", "received_at", "last_code", "calls"
)
"""What is kept of a bill's progress, in the order of `Progress`."""

_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class JournalError(Exception):
    """It cannot be used. The text is one line: what happened, what to do."""


class Journal:
    """One batch's file, for one thread."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Opens it; see `Load` for making one. Raises `JournalError`."""
        self.path = path
        with translated(path):
            mode = "ro" if read_only else "rw"
            self._db = _connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)
        try:
            with translated(path):
                if not read_only:
                    self._db.execute("PRAGMA journal_mode = WAL")
                self.facts = self._facts()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Everything is on disk already."""
        with suppress(sqlite3.Error):
            self._db.close()

    # -- publishing -------------------------------------------------------------------------------------------------

    def unsent(self, after: int, limit: int) -> list[Bill]:
        """The next bills behind number ``after`` that have no outcome."""
        return [Bill(*row) for row in self._query(_UNSENT, (after, limit))]

    def published(self, through: int) -> None:
        """Every bill up to this number is with the broker."""
        self._state(published=through)

    def sent_to(self, home: Home) -> None:
        """What is sent from now on is sent there: before the first bill is, so that it counts as sent nowhere else."""
        if home.id is not None and not (self.facts.gateway if home.direct else self.facts.broker):
            self._state(**({"gateway": home.id} if home.direct else {"broker": home.id, "place": home.place}))

    def stop(self, who: str) -> None:
        """Nothing more of it is to be published, until somebody resumes it."""
        self._state(stopped=who)

    def resume(self, now: float) -> None:
        """It may be published on; who stopped it before (``now``: seconds since the epoch) does so no more."""
        self._state(stopped="", resumed_at=now)

    def has_inbox(self) -> None:
        """The batch's own queue exists: before the first publish, so that no outcome goes elsewhere."""
        self._state(inbox=True)

    def publish_again(self) -> None:
        """Bills without an outcome are published again, under their ids."""
        self._state(published=0)

    def retry(self) -> int:
        """Unresolved bills are to be sent again, behind all others and as doubtful as they were; their number."""
        with self._transaction():
            found = self._db.execute(_UNRESOLVED, (Status.UNRESOLVED, json.dumps(sorted(RETRIED)))).fetchall()
            last = self._db.execute("SELECT max(number) FROM bills").fetchone()[0]
            kept = [_kept(Progress(effect_unknown=bool(row["effect_unknown"]))) for row in found]
            self._db.executemany(
                _AGAIN, [(last + place, kept[place - 1], row["number"]) for place, row in enumerate(found, 1)]
            )
        return len(found)

    # -- outcomes ---------------------------------------------------------------------------------------------------

    def record(self, outcomes: Sequence[Told]) -> Recorded:
        """Keeps outcomes that say more than is known; the rest (duplicates, commands of others) changes nothing."""
        recorded = Recorded()
        with self._transaction():
            for told in outcomes:
                row = self._row_of(told)
                if row is None:
                    continue
                status, reason, earlier = row["status"], row["reason"], row["completed_at"]
                if status is not None:
                    if not supersedes(told, status, reason, earlier):
                        continue
                    recorded.change(status, reason, -1)
                elif earlier is not None and told.status == Status.UNRESOLVED and told.completed_at <= earlier:
                    continue  # a copy of an earlier outcome: the bill was sent again
                else:
                    recorded.numbers.append(row["number"])
                recorded.change(told.status, told.reason, 1)
                self._db.execute(_TELL, (*told[2:], row["number"]))
        return recorded

    def examples(self, reasons: Iterable[Reason], limit: int) -> list[tuple[int, str, str, str]]:
        """The first bills (-1: all) with one of these reasons: line, bill, merchant, and what the gateway said."""
        found = self._query(_EXAMPLES, (json.dumps(sorted(reasons)), limit))
        return [(row["line"], row["bill"], row["merchant"], row["said"]) for row in found]

    def dead_lettered(self) -> Iterator[tuple[str, tuple[int, str, str, str]]]:
        """Bills whose commands the worker parked: command id, then line, bill, merchant, and what the gateway said."""
        reasons = [reason for status in DEAD_LETTERED for reason in REASONS[status]]
        for line, bill, merchant, said in self.examples(reasons, -1):
            yield batch_command_id(self.facts.batch.id, bill, merchant), (line, bill, merchant, said)

    def tally(self) -> Tally:
        """The sum."""
        facts = self.facts = self._facts()
        query = """
            SELECT status, reason, number <= ? OR begun OR due IS NOT NULL, count(*) FROM bills GROUP BY 1, 2, 3
        """
        tally = Tally(invalid=facts.invalid, duplicates=facts.duplicates)
        for status, reason, sent, count in self._query(query, (facts.published,)):
            if status is not None:
                tally.told[status, reason] = tally.told.get((status, reason), 0) + count
            elif sent:
                tally.waiting += count
            else:
                tally.unsent += count
        return tally

    def files(self) -> list[Path]:
        """The journal and the files beside it."""
        beside = [self.path.with_name(self.path.name + suffix) for suffix in _BESIDE]
        return [self.path, *beside, self.path.with_suffix(LOCK)]

    def has_written(self, report: Path) -> None:
        """This report is ours, as long as it stays as it is."""
        self._state(report=_mark(report))

    def wrote(self, report: Path) -> bool:
        """Whether it is the report that this batch wrote last, unchanged."""
        found = self._query("SELECT value FROM facts WHERE name = 'report'")
        return bool(found) and found[0]["value"] == _mark(report)

    def rows(self) -> Iterator[sqlite3.Row]:
        """Every row of the input with all that is known of its bill, in the order of the input."""
        with translated(self.path):
            yield from self._db.execute(_REPORT)

    # -- without a broker -------------------------------------------------------------------------------------------

    def direct(self, maybe_published: int) -> None:
        """The batch is sent without a broker, from now on. What the broker has or may have, up to the number
        ``maybe_published``, may have been sent already."""
        with self._transaction():
            _put(self._db, {"direct": True})
            if self.facts.published:
                self._db.execute("UPDATE bills SET begun = 1 WHERE status IS NULL AND number <= ?", (maybe_published,))
        self.facts = self._facts()

    def take(self, after: int, limit: int) -> list[Job]:
        """The next bills to send, marked as begun before anybody sends them."""
        return self._take(_NEXT, (after, limit))

    def take_due(self, now: float, limit: int) -> list[Job]:
        """The bills whose delayed round has come (``now``: seconds since the epoch), marked as begun."""
        return self._take(_DUE, (now, limit))

    def next_due(self) -> float | None:
        """When the next delayed round begins."""
        found: float | None = self._query("SELECT min(due) FROM bills WHERE due IS NOT NULL")[0][0]
        return found

    def put_back(self, jobs: Iterable[tuple[int, Progress, float | None]]) -> None:
        """Bills (number, progress, due) that were not finished: what is known of their calls, and when to go on."""
        with self._transaction():
            self._db.executemany(
                "UPDATE bills SET begun = 0, progress = ?, due = ? WHERE number = ? AND status IS NULL",
                [(_kept(progress), due, number) for number, progress, due in jobs],
            )

    def _take(self, query: str, arguments: tuple[float, int]) -> list[Job]:
        with self._transaction():
            found = self._db.execute(query, arguments).fetchall()
            self._db.executemany(
                "UPDATE bills SET begun = 1, due = NULL WHERE number = ?", [(row["number"],) for row in found]
            )
        return [
            Job(Bill(*row[:7]), bool(row["begun"]), Progress(*json.loads(row["progress"] or "[]"))) for row in found
        ]

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _row_of(self, told: Told) -> sqlite3.Row | None:
        """By the bill, then by the id: a bill of several merchants has several rows."""
        query = "SELECT number, merchant, status, reason, completed_at FROM bills WHERE bill = ?"
        row: sqlite3.Row
        for row in self._db.execute(query, (told.bill,)):
            if batch_command_id(self.facts.batch.id, told.bill, row["merchant"]) == told.command_id:
                return row
        return None

    def _state(self, **values: object) -> None:
        with self._transaction():
            _put(self._db, values)
        self.facts = self._facts()

    def _facts(self) -> Facts:
        values: dict[str, Any] = dict(map(tuple, self._query("SELECT name, value FROM facts")))
        if values.get("format") != _FORMAT:
            raise JournalError(
                f"{self.path}: the journal of another version, which cannot be read; finish the batch with the version "
                f"that wrote it, or {MOVE_AWAY} and sweep the file again: under the same --batch-id its bills keep "
                "their ids"
            )
        values["batch"] = Batch(values["batch"], values["size"])
        values["form"] = Form(*json.loads(values["form"]))
        return Facts(**{name: values[name] for name in Facts._fields if name in values})

    def _query(self, query: str, arguments: Sequence[object] = ()) -> list[sqlite3.Row]:
        with translated(self.path):
            return self._db.execute(query, arguments).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with translated(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()


# -- making one ----------------------------------------------------------------------------------------


class Load:
    """A batch in the making: under a name that nobody finds, until `keep` gives it its own."""

    def __init__(self, directory: Path) -> None:
        self._turns: dict[str, int] = {}
        self._path = directory / f"{LOADING}{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        with translated(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, PRIVATE))
            self._db = _connect(str(self._path))
            # Nothing of it counts before it is kept, and then it is flushed as a whole.
            self._db.execute("PRAGMA journal_mode = OFF")
            self._db.execute("PRAGMA synchronous = OFF")
            self._db.executescript(_TABLES)

    def fill(self, rows: Iterable[Row | BadRow]) -> None:
        """All of them, in constant memory but for a counter for each merchant; then makes bills of them.

        A merchant's first bill goes beside the first of all others, then the second ones: a merchant with few bills
        need not wait for one with many. A bill (of one merchant) that comes again is in once.
        """
        with translated(self._path):
            self._db.execute("BEGIN")
            self._db.executemany(_INSERT, map(self._kept, rows))
            self._db.execute(_ARRANGE.format(order="turn, line" if len(self._turns) > 1 else "line"))
            self._db.commit()

    def _kept(self, row: Row | BadRow) -> tuple[object, ...]:
        cells = _encode(row.cells)
        if isinstance(row, BadRow):
            return (row.line, None, None, None, None, row.reason, None, cells)
        self._turns[row.merchant] = turn = self._turns.get(row.merchant, 0) + 1
        return (row.line, row.bill, row.merchant, row.reference, row.not_after, None, turn, cells)

    def counts(self) -> tuple[int, int, int]:
        """(bills, duplicates, invalid rows)"""
        with translated(self._path):
            rows, invalid = self._db.execute("SELECT count(*), count(why) FROM rows").fetchone()
            bills = self._db.execute("SELECT count(*) FROM bills").fetchone()[0]
        return int(bills), int(rows - invalid - bills), int(invalid)

    def first(self, limit: int) -> list[Bill]:
        """The first bills."""
        with translated(self._path):
            return [Bill(*row) for row in self._db.execute(_UNSENT, (0, limit))]

    def keep(self, path: Path, *, batch: str, source: str, digest: str, form: Form, now: float) -> None:
        """Under its own name; the file appears whole or not at all."""
        bills, duplicates, invalid = self.counts()
        with translated(path):
            values: dict[str, object] = {
                "format": _FORMAT,
                "batch": batch,
                "size": bills,
                "source": source,
                "digest": digest,
                "form": json.dumps(form),
                "created_at": now,
                "invalid": invalid,
                "duplicates": duplicates,
                "published": 0,
            }
            self._db.execute("BEGIN")
            _put(self._db, values)
            self._db.commit()
            self._db.close()
            _flush(self._path)
            _set_aside(path)
            self._path.replace(path)
            _flush(path.parent)

    def discard(self) -> None:
        """Removes it, unless it was kept."""
        with suppress(sqlite3.Error):
            self._db.close()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def _connect(database: str, *, uri: bool = False) -> sqlite3.Connection:
    db = sqlite3.connect(database, uri=uri, isolation_level=None, timeout=_BUSY_SECONDS)
    db.row_factory = sqlite3.Row
    try:
        db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        db.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error:
        db.close()  # since 3.13 Python warns of one that nobody closes
        raise
    return db


def _set_aside(path: Path) -> None:
    """Keeps what a journal that was moved away left behind from being applied to the new one. It is kept for whoever
    needs the moved journal: its latest changes are in there."""
    for suffix in _BESIDE:
        left = path.with_name(path.name + suffix)
        if left.exists():
            left.replace(path.with_name(f"{path.name}{suffix}.{secrets.token_hex(4)}.old"))
    _flush(path.parent)


def _put(db: sqlite3.Connection, values: dict[str, object]) -> None:
    db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", values.items())


def _kept(progress: Progress) -> str | None:
    if not (progress.attempts or progress.effect_unknown):
        return None
    return json.dumps(_PROGRESS(progress))


def _mark(report: Path) -> str | None:
    """What tells a file from another one there, and from itself once it was changed."""
    try:
        status = report.lstat()
    except OSError:
        return None
    return json.dumps([str(report.absolute()), status.st_ino, status.st_size, status.st_mtime_ns])


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Makes a `JournalError` of what the database or the system says about ``path``."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        said = getattr(error, "strerror", None) or error
        raise JournalError(f"{path}: {said}; {_remedy(error)}") from None


def _remedy(error: sqlite3.Error | OSError) -> str:
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return "give a directory as --state-dir"
    if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return f"it is no journal any more: {MOVE_AWAY}, or give --state-dir"
    return "see whether its disk is full or read-only, or give --state-dir"
