"""`qris-expire status`: how far a sweep is."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from worker.cli import INVALID, Trouble
from worker.cli.batches import STATE_DIR_HELP, check_batch_id, no_batch, print_needs, print_tally, state_directory
from worker.cli.command_line import Argument, Option
from worker.core.words import plural

if TYPE_CHECKING:
    from worker.settings import AmqpSettings


def status(
    batch: Annotated[str | None, Argument(help="The batch; all of them are listed without one.")] = None,
    prune: Annotated[
        int | None,
        Option(metavar="DAYS", min=1, help="Delete the journals of finished batches older than this first."),
    ] = None,
    state_dir: Annotated[Path | None, Option(metavar="DIR", help=STATE_DIR_HELP)] = None,
) -> int:
    """Shows how far a sweep is: its rows by status and reason, from its journal, and what waits at the broker.

    Changes nothing without --prune, and may be called while the sweep runs. Outcomes that nobody has taken in yet wait
    in the batch's inbox: `sweep --follow` takes them.

    Exit code 0: shown, whatever it is. 2: there is no such batch.

    Examples:

        qris-expire status
        qris-expire status 20261122-0a1b2c3d4e5f --state-dir /var/lib/sweeps
    """
    from worker.settings import AmqpSettings, load

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
    from worker.shells.journal import JournalError, prune

    try:
        gone = list(prune(directory, days, time.time()))
    except JournalError as error:
        raise Trouble(str(error)) from None
    print(f"deleted {len(gone):,} journals of finished batches, untouched for {days} days")


def _list(directory: Path) -> None:
    from worker.shells.journal import JournalError, journals

    try:
        paths = journals(directory)
    except JournalError as error:
        raise Trouble(str(error)) from None
    for path in paths:
        try:
            print("\n".join(_lines(path)))
        except JournalError as error:
            print(f"{path.stem}  {error}")
    if not paths:
        print(f"no batches in {directory}")


def _lines(path: Path) -> list[str]:
    """A batch, in lines that need no table: nothing of it is cut, however narrow the terminal."""
    from worker.core import jakarta
    from worker.shells.journal import Journal

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
    from worker.shells.journal import JournalError, journals_of

    check_batch_id(batch)
    try:
        paths = journals_of(directory, batch)
        if not paths:
            raise Trouble(no_batch(directory, batch), code=INVALID)
        for path in paths:
            _show_one(path)
    except JournalError as error:
        raise Trouble(str(error)) from None
    print(f"broker   {_depths(amqp, batch)}")


def _show_one(path: Path) -> None:
    from worker.core import jakarta
    from worker.shells.journal import Journal

    with closing(Journal(path, read_only=True)) as journal:
        facts, tally = journal.facts, journal.tally()
        batch = facts.batch.id
        print_tally(f"sweep {batch}", tally)
        way = " --direct" if facts.direct else ""
        print_needs(journal, tally, f"qris-expire sweep --follow {batch}{way} --retry-unresolved")
    print(f"input    {facts.source}, begun {jakarta.iso(facts.created_at, milliseconds=False)}")
    print(f"sent to  {'; '.join(filter(None, (facts.place, facts.gateway))) or 'nowhere yet'}")
    if tally.answered == tally.bills:
        print("state    every bill has its outcome")
    elif tally.unsent and facts.stopped:
        print(
            f"state    stopped by {facts.stopped}; {tally.unsent:,} bills are not sent; to send them: "
            f"`qris-expire sweep --follow {batch} --resume`"
        )
    elif tally.unsent:
        print(f"state    {tally.unsent:,} bills are not sent; go on with `qris-expire sweep --follow {batch}`")
    elif facts.inbox or facts.direct:
        how = " --direct" if facts.direct else ""
        print(
            f"state    {tally.waiting:,} bills wait for an outcome; `qris-expire sweep --follow {batch}{how}` goes on"
        )
    else:
        print("state    published; nobody follows its outcomes")


def _depths(amqp: AmqpSettings, batch: str) -> str:
    """What waits in the queues that matter, in one line; or why that is unknown."""
    from pika.exceptions import ChannelClosed

    from worker.core.lanes import SWEEP
    from worker.core.sweep import inbox_name
    from worker.shells.amqp.session import BrokerError, session

    names, shown = amqp.names, []
    queues = {
        names.queue(SWEEP): "command",
        names.dead: "dead letter",
        inbox_name(names, batch): "outcome",
    }
    try:
        with session(amqp, "status") as connection:
            for queue, what in queues.items():
                try:
                    answer = connection.channel().queue_declare(queue, passive=True)
                    shown.append(f"{plural(answer.method.message_count, what)} in {queue}")
                except ChannelClosed:
                    continue
    except BrokerError as error:
        return str(error)
    return f"{'; '.join(shown)} (of all batches)" if shown else f"none of the queues of {amqp.prefix} exist"
