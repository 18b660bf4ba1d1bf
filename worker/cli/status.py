"""`qris-expire status`: how far a sweep is."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Final

from worker.cli import INTERRUPTED, INVALID, Trouble
from worker.cli.batches import (
    STATE_DIR_HELP,
    broker_of,
    check_batch_id,
    no_batch,
    print_bills,
    print_needs,
    print_tally,
    state_directory,
)
from worker.cli.command_line import Argument, Option
from worker.cli.screen import tell
from worker.core import jakarta
from worker.core.lanes import SWEEP
from worker.core.sweep import belongs, inbox_name
from worker.core.words import plural
from worker.settings import AmqpSettings, load
from worker.shells.journal import Journal, JournalError
from worker.shells.journals import journals, journals_of, prune

PATIENCE: Final = 5.0
"""Seconds to wait for others who look at the dead letters."""


def status(
    batch: Annotated[str | None, Argument(help="The batch; all of them are listed without one.")] = None,
    prune: Annotated[
        int | None, Option(metavar="DAYS", min=1, help="Delete the journals of finished batches older than this first.")
    ] = None,
    state_dir: Annotated[Path | None, Option(metavar="DIR", help=STATE_DIR_HELP)] = None,
) -> int:
    """Shows how far a sweep is: its rows by status and reason, from its journal, and what waits at the broker.

    Changes nothing without --prune, and may be called while the sweep runs. Outcomes that nobody has taken in yet wait
    in the batch's inbox: `sweep --follow` takes them. If bills of a batch are unresolved, it looks for their dead
    letters as `dead list` does.

    Exit code 0: shown, whatever it is. 2: there is no such batch.

    Examples:

        qris-expire status
        qris-expire status 20261122-0a1b2c3d4e5f --state-dir /var/lib/sweeps
    """
    amqp = load(AmqpSettings)
    directory = state_directory(amqp.prefix, state_dir)
    if prune is not None:
        _prune(directory, prune)
    if batch is None:
        _list(directory)
    else:
        _show(amqp, directory, batch)
    return 0


def _prune(directory: Path, days: int) -> None:
    gone = list(prune(directory, days, time.time()))
    print(f"deleted {plural(len(gone), 'journal')} of finished batches, not changed for {plural(days, 'day')}")


def _list(directory: Path) -> None:
    paths = journals(directory)
    for path in paths:
        try:
            print("\n".join(_lines(path)))
        except JournalError as error:
            tell(f"{path.stem}  {error}", indent=2)
    if not paths:
        print(f"no batches in {directory}")


def _lines(path: Path) -> list[str]:
    """A batch, in lines that need no table: nothing of it is cut, however narrow the terminal."""
    with closing(Journal(path, read_only=True)) as journal:
        facts, tally = journal.facts, journal.tally()
    begun = jakarta.iso(facts.created_at, milliseconds=False)[:16].replace("T", " ")
    parts = {
        "rows": tally.rows,
        "skipped": tally.invalid + tally.duplicates,
        "unsent": tally.unsent,
        "waiting": tally.waiting,
        "expired": tally.expired,
        "not expired": tally.answered - tally.expired,
    }
    told = ", ".join(f"{count:,} {what}" for what, count in parts.items() if count or what in ("rows", "expired"))
    lines = [f"{facts.batch.id}  {begun}  {facts.source}", f"  {told}"]
    return [*lines, f"  stopped by {facts.stopped}"] if facts.stopped else lines


def _show(amqp: AmqpSettings, directory: Path, batch: str) -> None:
    check_batch_id(batch)
    paths = journals_of(directory, batch)
    if not paths:
        raise Trouble(no_batch(directory, batch), code=INVALID)
    for path in paths:
        _show_one(path)
    depths, dead = _depths(amqp, batch)
    if dead is not None:
        for path in paths:
            _show_letters(amqp, path, dead)
    _fact("broker", depths)


def _show_one(path: Path) -> None:
    with closing(Journal(path, read_only=True)) as journal:
        facts, tally = journal.facts, journal.tally()
        batch = facts.batch.id
        print_tally(f"sweep {batch}", tally)
        way = " --direct" if facts.direct else ""
        print_needs(journal, tally, f"qris-expire sweep --follow {batch}{way} --retry-unresolved")
    _fact("input", f"{facts.source}, begun {jakarta.iso(facts.created_at, milliseconds=False)}")
    _fact("sent to", f"{'; '.join(filter(None, (facts.place, facts.gateway))) or 'nowhere yet'}")
    again = f"`qris-expire sweep --follow {batch}"
    if tally.answered == tally.bills:
        state = "every bill has its outcome"
    elif tally.unsent and facts.stopped:
        state = f"stopped by {facts.stopped}; {tally.unsent:,} bills are not sent; to send them: {again} --resume`"
    elif tally.unsent:
        state = f"{tally.unsent:,} bills are not sent; to send them: {again}{way}`"
    elif facts.inbox or facts.direct:
        state = f"{tally.waiting:,} bills wait for an outcome; to continue: {again}{way}`"
    else:
        state = "published; nobody follows its outcomes"
    _fact("state", state)


def _fact(name: str, text: str) -> None:
    tell(f"{name:<9}{text}", indent=9)


def _show_letters(amqp: AmqpSettings, path: Path, there: int) -> None:
    """Which unresolved bills have no dead letter any more. ``there``: dead letters, of all batches."""
    from worker.app.dead_letters import MOST_HELD
    from worker.shells.amqp.session import BrokerError

    with closing(Journal(path, read_only=True)) as journal:
        facts, parked = journal.facts, dict(journal.dead_lettered())
    if facts.direct or not parked or not belongs(facts, broker_of(amqp)):
        return
    batch, dead = facts.batch.id, amqp.names.dead
    if there > MOST_HELD:
        _fact(
            "letters", f"not looked at, because there are {there:,}; `qris-expire dead list --batch {batch} --limit N`"
        )
        return
    try:
        found = _letters(amqp, batch) if there else frozenset[str]()
    except BrokerError as error:
        _fact("letters", f"unknown: {error}")
        return
    without = [row for command, row in parked.items() if command not in found]
    bills = plural(len(parked), "unresolved bill")
    verb = "has" if len(parked) == 1 else "have"
    _fact("letters", f"{len(parked) - len(without):,} of {bills} {verb} a dead letter in {dead}")
    if without:
        have, were = ("has", "it was") if len(without) == 1 else ("have", "they were")
        _fact(
            "",
            f"{plural(len(without), 'bill')} {have} none: {were} purged, or redriven without an outcome that "
            f"is taken in (`qris-expire sweep --follow {batch}` takes it in):",
        )
        print_bills(without)


def _letters(amqp: AmqpSettings, batch: str) -> frozenset[str]:
    """The ids of the batch's commands that lie in the dead letters. Raises `BrokerError`."""
    from worker import signals
    from worker.app.dead_letters import HeldLetter, look
    from worker.core.dead_letter import read_dead_letter
    from worker.shells.amqp.parked import Interrupted, ParkedLetters

    found: set[str] = set()

    def each(held: HeldLetter) -> None:
        letter = read_dead_letter(amqp.names, held.parcel)
        if letter.batch_id == batch:
            found.add(letter.command_id)

    signals.install()
    try:
        with ParkedLetters(amqp, "status", stop=signals.received, patience=PATIENCE) as parked:
            look(parked, each, show=lambda *_: None)
    except Interrupted:
        raise Trouble("stopped; nothing was changed", code=INTERRUPTED) from None
    return frozenset(found)


def _depths(amqp: AmqpSettings, batch: str) -> tuple[str, int | None]:
    """What waits in the queues that matter, in one line, or why that is unknown; and the number of dead letters, None
    where the broker does not tell."""
    from worker.shells.amqp.session import BrokerError, depth, session

    names = amqp.names
    queues = {
        names.queue(SWEEP): "command",
        names.dead: "dead letter",
        inbox_name(names, batch): "outcome",
    }
    depths: dict[str, int] = {}
    try:
        with session(amqp, "status") as connection:
            for queue in queues:
                found = depth(connection, queue)
                if found is not None:
                    depths[queue] = found
    except BrokerError as error:
        return str(error), None
    shown = [f"{plural(count, queues[queue])} in {queue}" for queue, count in depths.items()]
    said = f"{'; '.join(shown)} (of all batches)" if shown else f"none of the queues of {amqp.prefix} exist"
    return said, depths.get(names.dead)
