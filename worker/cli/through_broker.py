"""`sweep` through the broker: what must exist there, publishing and following, and the end of it from anywhere."""

from __future__ import annotations

import os
import random
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker import signals
from worker.cli import Trouble
from worker.cli.batches import check_batch_id, home_at
from worker.cli.meter import Meter
from worker.cli.screen import note, tell
from worker.core import jakarta
from worker.core.sweep import Tally, belongs, follower_name, inbox, inbox_name, read_outcome
from worker.core.topology import Topology, topology
from worker.settings import AmqpSettings
from worker.shells.clock import SystemClock
from worker.shells.journal import Journal
from worker.shells.journals import find, lock

if TYPE_CHECKING:
    from worker.app.sweep import Ended


def send(amqp: AmqpSettings, journal: Journal, *, follow: bool, window: int) -> Ended:
    """Publishes what is not published, and with ``follow`` keeps the outcomes until every bill has one.

    Raises `Trouble`; before anything is begun also `BrokerError`, `Followed` and `TopologyMismatch`.
    """
    from worker.app.sweep import Sweep
    from worker.shells.amqp.bulk import Bulk, Route
    from worker.shells.amqp.session import parameters, session

    before, batch, names = journal.tally(), journal.facts.batch.id, amqp.names
    own = inbox(names, batch, amqp.queue_type) if follow else None
    with session(amqp, "sweep") as connection:
        home = home_at(connection, amqp)
        if not belongs(journal.facts, home):  # the broker did not answer at first, and then it was another one
            raise Trouble(f"batch {batch} was sent to {journal.facts.place}, not to {home.place}; call this again")
        journal.sent_to(home)  # what is sent from here on counts as sent there
        wanted = _prepare(connection, amqp, journal, own, before)
    hosts = parameters(amqp, "sweep")
    signals.install()
    with Meter(f"sweep {batch}", publish=bool(before.unsent), follow=follow) as meter:
        errand = Sweep(
            journal, names, follow=follow, stop=signals.received, screen=meter, clock=SystemClock(), window=window
        )
        route = Route(names, wanted, amqp.declare, own, batch, _who())
        Bulk(route, lambda: hosts, errand, publishing=bool(before.unsent), rng=random.Random()).run()
    assert errand.ended is not None
    return errand.ended


def take_late(amqp: AmqpSettings, journal: Journal) -> None:
    """Every bill has an outcome; some may have got a better one since, by a redrive."""
    from worker.shells.amqp.bulk import check_free, take
    from worker.shells.amqp.session import BrokerError, session

    if not journal.facts.inbox or not journal.tally().unresolved:
        return
    try:
        with session(amqp, "sweep") as connection:
            batch = journal.facts.batch.id
            check_free(connection, follower_name(amqp.names, batch), batch)
            for bodies in take(connection, inbox_name(amqp.names, batch), batch):
                journal.record([told for told in map(read_outcome, bodies) if told is not None])
    except BrokerError as error:
        note(f"later outcomes could not be looked for: {error}")


def close_inbox(amqp: AmqpSettings, batch: str, tally: Tally) -> None:
    """Deletes it when it has no more to tell; one whose bills may be redriven stays, for as long as queues of its kind
    do."""
    from worker.shells.amqp.session import BrokerError, session

    if tally.unresolved or tally.unsent:
        return
    with suppress(BrokerError), session(amqp, "sweep") as connection:
        connection.channel().queue_delete(inbox_name(amqp.names, batch))


def stop(batch: str, amqp: AmqpSettings, directory: Path) -> int:
    """Ends the publishing of a batch, from anywhere."""
    from worker.shells.amqp.bulk import order_stop
    from worker.shells.amqp.session import session

    check_batch_id(batch)
    who, now = _who(), time.time()
    with session(amqp, "sweep") as connection:
        home = home_at(connection, amqp)
        said = order_stop(connection, inbox_name(amqp.names, batch), who, now)
    if said:
        tell(f"batch {batch}: nothing more is published; {said}")
        return 0
    path = find(directory, batch, home)
    if path is not None:
        with lock(path), closing(Journal(path)) as journal:
            journal.stop(who)
            unsent = journal.tally().unsent
        tell(f"batch {batch}: no process has it now; {unsent:,} bills are unsent, and stay so until --resume")
        return 0
    if said is None:
        raise Trouble(f"nobody follows batch {batch} at {home.place}, so nothing of it is being published there")
    tell(f"batch {batch}: no process answered; the next one that follows it will publish nothing more")
    return 0


def _prepare(connection: Any, amqp: AmqpSettings, journal: Journal, own: Any, tally: Tally) -> Any:
    """What must exist before the first publish: lane, exchanges, and the inbox, or outcomes would go elsewhere."""
    from worker.shells.amqp.bulk import check_free
    from worker.shells.amqp.session import apply, verify

    wanted = topology(amqp.prefix, amqp.queue_type, ())
    if amqp.declare:
        apply(connection, wanted)
    elif missing := verify(connection, wanted):
        raise Trouble(*missing)
    if own is not None:
        batch = journal.facts.batch.id
        check_free(connection, follower_name(amqp.names, batch), batch)
        lost = bool(verify(connection, Topology((), own.queues, ())))
        if lost and tally.waiting:
            raise Trouble(_lost(journal, tally))
        apply(connection, own)
        journal.has_inbox()
    return wanted


def _who() -> str:
    """Who we are, for those who find that the batch is followed."""
    from worker.shells import operator

    since = jakarta.iso(time.time(), milliseconds=False)
    return f"{operator.who()} (process {os.getpid()}, since {since})"


def _lost(journal: Journal, tally: Tally) -> str:
    batch = journal.facts.batch.id
    why = (
        "its inbox is gone (unused for days, or deleted)" if journal.facts.inbox else "it was published without --wait"
    )
    return (
        f"batch {batch}: {why}, so outcomes of the {tally.waiting:,} bills without one may have gone elsewhere; "
        f"`qris-expire sweep --follow {batch} --republish` publishes those again, under the same ids, and follows them"
    )
