"""`qris-expire sweep`: a file of bills to the sweep lane, and what became of them."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from worker import signals
from worker.cli import INTERRUPTED, INVALID, Trouble, report, through_broker
from worker.cli.batches import (
    STATE_DIR_HELP,
    broker_of,
    check_batch_id,
    existing,
    gateway_of,
    print_needs,
    print_tally,
    state_directory,
)
from worker.cli.command_line import Argument, Option
from worker.cli.intake import Input, batch, check_any, take_in
from worker.cli.screen import note, tell
from worker.core import jakarta
from worker.core.needs import SUSPICIOUS_PERCENT
from worker.core.pace import WINDOW
from worker.core.words import plural

if TYPE_CHECKING:
    from worker.core.sweep import Home, Tally
    from worker.settings import AmqpSettings, Settings
    from worker.shells.journal import Journal

SHOWN: Final = 3  # commands that --dry-run prints


@dataclass(frozen=True, slots=True)
class _Wish:
    """The command line."""

    file: str | None
    batch_id: str | None
    merchant_id: str | None
    wait: bool
    follow: str | None
    report: Path | None
    window: int | None
    stop: str | None
    resume: bool
    force: bool
    delimiter: str | None
    accept_as_is: bool
    skip_invalid: bool
    allow_empty: bool
    dry_run: bool
    direct: bool
    republish: bool
    retry_unresolved: bool
    allow_rejected: bool
    allow_not_found: float | None
    state_dir: Path | None


def sweep(
    file: Annotated[
        str | None, Argument(help="CSV or .xlsx with a header, or JSON lines; - for standard input.")
    ] = None,
    batch_id: Annotated[
        str | None, Option(help="Names the batch; else made from the input's content and the date.")
    ] = None,
    merchant_id: Annotated[
        str | None, Option(help="Merchant of the rows that have none; else GATEWAY_MERCHANT_ID, if it is set here.")
    ] = None,
    wait: Annotated[bool, Option("--wait", help="Follow the outcomes until every bill has one.")] = False,
    follow: Annotated[
        str | None, Option(metavar="BATCH", help="Instead of FILE: continue a batch that was interrupted.")
    ] = None,
    window: Annotated[
        int | None,
        Option(metavar="N", help=f"With --wait, the most bills without an outcome at any time [{WINDOW:,}]."),
    ] = None,
    stop: Annotated[
        str | None,
        Option(
            metavar="BATCH",
            help="Instead of FILE: publish nothing more of a batch that is followed, wherever its process runs.",
        ),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue a batch that was stopped.")] = False,
    report: Annotated[
        Path | None,
        Option(
            metavar="OUT.csv", help="At the end, write a line for each row of the input to this file (.csv or .xlsx)."
        ),
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace the file that --report names, if it exists.")] = False,
    delimiter: Annotated[
        str | None, Option(metavar="CHARACTER", help="Of the report's columns; else that of the input.")
    ] = None,
    accept_as_is: Annotated[
        bool,
        Option("--accept-as-is", help="Send bills and merchants also where a spreadsheet seems to have changed them."),
    ] = False,
    skip_invalid: Annotated[bool, Option("--skip-invalid", help="Go on without the rows that cannot be used.")] = False,
    allow_empty: Annotated[
        bool, Option("--allow-empty", help="Exit with 0 also when the input has a header and no bills.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only check the input, and show what would be sent.")] = False,
    direct: Annotated[
        bool, Option("--direct", help="Without a broker and a worker: straight from here to the gateway.")
    ] = False,
    republish: Annotated[
        bool, Option("--republish", help="Publish again, under the same ids, what has no outcome.")
    ] = False,
    retry_unresolved: Annotated[
        bool,
        Option("--retry-unresolved", help="Send the bills again that stayed unresolved, as after a long outage."),
    ] = False,
    allow_rejected: Annotated[
        bool,
        Option("--allow-rejected", help="Exit with 0 also when the gateway refused bills for good, as paid ones."),
    ] = False,
    allow_not_found: Annotated[
        float | None,
        Option(
            metavar="PERCENT",
            help="With --allow-rejected, the most bills that the gateway may not know "
            f"[{SUSPICIOUS_PERCENT:g}]; more look like changed numbers.",
        ),
    ] = None,
    state_dir: Annotated[Path | None, Option(metavar="DIR", help=STATE_DIR_HELP)] = None,
) -> int:
    """Sends a file of bills to the sweep lane; with --wait, follows their outcomes until every bill has one.

    Columns: billnumber (or billNumber), merchantId, and if wanted reference and notAfter, in any order, case and
    delimiter; other columns are only kept for the report. A bill that is in the input twice is sent once. If any
    row is invalid, nothing is sent, unless --skip-invalid is given. Bills of different merchants are sent in turns.

    With --wait, bills are published as outcomes come, so that sweeps that run at the same time share the workers.
    Without it, all are published at once. With --direct the bills go straight to the gateway, without a broker.

    A sweep can be interrupted anywhere and called again: its journal knows what was sent to which broker, and the same
    batch always gives the same bill the same id.

    Exit code 0: published; with --wait or --direct, all expired. 1: some not. 2: bad input, also one without bills, or
    bad settings. 130: ctrl-C.

    Examples:

        qris-expire sweep bills.csv --dry-run
        qris-expire sweep bills.csv --wait --report out.csv
        qris-expire sweep --follow 20261122-0a1b2c3d4e5f --wait
    """
    wish = _Wish(
        file=file,
        batch_id=batch_id,
        merchant_id=merchant_id,
        wait=wait,
        follow=follow,
        report=report,
        window=window,
        stop=stop,
        resume=resume,
        force=force,
        delimiter=delimiter,
        accept_as_is=accept_as_is,
        skip_invalid=skip_invalid,
        allow_empty=allow_empty,
        dry_run=dry_run,
        direct=direct,
        republish=republish,
        retry_unresolved=retry_unresolved,
        allow_rejected=allow_rejected,
        allow_not_found=allow_not_found,
        state_dir=state_dir,
    )
    return _run(wish)


def _run(wish: _Wish) -> int:
    _check(wish)
    settings = _settings(wish)
    amqp = settings.amqp if wish.direct else settings
    _silence()
    with _told():
        if wish.stop is not None:
            return through_broker.stop(wish.stop, amqp, state_directory(amqp.prefix, wish.state_dir))
        if wish.dry_run:
            return _dry_run(wish, amqp.prefix, settings)
        directory = state_directory(amqp.prefix, wish.state_dir)
        with _journal(wish, directory, settings) as journal:
            if wish.report is not None:
                report.check_existing(wish.report, journal, force=wish.force)
            try:
                return _direct(wish, settings, journal) if wish.direct else _publish(wish, amqp, journal)
            except KeyboardInterrupt:
                return _interrupted(wish, journal)


def _check(wish: _Wish) -> None:
    from worker.core.command import IDENTIFIER_RULE, is_identifier

    if [wish.file, wish.follow, wish.stop].count(None) != 2:
        raise Trouble("give a FILE (or - for standard input), --follow BATCH or --stop BATCH", code=INVALID)
    if wish.window is not None and (wish.window < 1 or wish.direct or not (wish.wait or wish.follow)):
        raise Trouble("--window takes a number from 1, and goes with --wait; leave it out otherwise", code=INVALID)
    if wish.follow is not None and (
        wish.dry_run or wish.batch_id or wish.merchant_id or wish.skip_invalid or wish.allow_empty
    ):
        raise Trouble("--follow continues a batch as it is; leave out the options about its input", code=INVALID)
    if wish.allow_not_found is not None and not 0 <= wish.allow_not_found <= 100:
        raise Trouble("--allow-not-found takes a percentage from 0 to 100", code=INVALID)
    if wish.direct and wish.republish:
        raise Trouble("--direct publishes nothing; leave out --republish", code=INVALID)
    if wish.merchant_id is not None and not is_identifier(wish.merchant_id):
        raise Trouble(f"--merchant-id must be {IDENTIFIER_RULE}", code=INVALID)
    if wish.delimiter is not None and (len(wish.delimiter) != 1 or wish.delimiter in '"\r\n'):
        raise Trouble("--delimiter must be one character that is no quote and no line break", code=INVALID)
    if wish.report is not None:
        report.check_place(wish.report, wish.file)


def _settings(wish: _Wish) -> Any:
    """`Settings` for the gateway, or only the broker's."""
    from worker.settings import AmqpSettings, load

    return load() if wish.direct else load(AmqpSettings)


def _silence() -> None:
    """What the parts log for operators of a worker is shown here beside the bars, or not at all."""
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))


@contextmanager
def _told() -> Iterator[None]:
    """The errors that are expected, as people read them."""
    from worker.core.rows import InputError
    from worker.shells.journal import JournalError

    try:
        yield
    except JournalError as error:
        raise Trouble(str(error)) from None
    except InputError as error:  # its name and line are put before it where they are known
        raise Trouble(str(error), code=INVALID) from None


# -- the input ------------------------------------------------------------------------------------------------------


@contextmanager
def _journal(wish: _Wish, directory: Path, settings: Any) -> Iterator[Journal]:
    """The batch's journal, ours alone."""
    from worker.shells.journal import Journal, lock

    def home() -> Home:
        return gateway_of(settings.gateway) if wish.direct else broker_of(settings)

    if wish.follow is None:
        with batch(_input(wish, settings), directory, home) as journal:
            yield journal
        return
    path = existing(directory, wish.follow, home())
    with lock(path), closing(Journal(path)) as journal:
        yield journal


def _input(wish: _Wish, settings: Any) -> Input:
    assert wish.file is not None
    merchant = wish.merchant_id or (settings.gateway.merchant_id if wish.direct else _default_merchant())
    return Input(
        wish.file, merchant or "", wish.batch_id, wish.skip_invalid, wish.accept_as_is, may_be_empty=wish.allow_empty
    )


def _default_merchant() -> str | None:
    """GATEWAY_MERCHANT_ID of our own environment; the worker's cannot be seen from here."""
    from worker.settings import DefaultMerchant, load

    return load(DefaultMerchant).id


def _dry_run(wish: _Wish, prefix: str, settings: Any) -> int:
    from worker.core.sweep import batch_id, command_body, command_id
    from worker.core.topology import Names
    from worker.shells.journal import Journal

    with tempfile.TemporaryDirectory(prefix="qris-expire-") as scratch:
        given = _input(wish, settings)
        intake = take_in(replace(given, skip_invalid=given.skip_invalid or wish.report is not None), Path(scratch))
        bills, duplicates, invalid = intake.load.counts()
        first = intake.load.first(SHOWN)
        batch = wish.batch_id or batch_id(intake.digest, time.time())
        check_batch_id(batch)
        path = Path(scratch) / "dry-run.db"
        intake.load.keep(
            path, batch=batch, source=intake.source, digest=intake.digest, form=intake.form, now=time.time()
        )
        if wish.report is not None:
            with closing(Journal(path)) as journal:
                report.check_existing(wish.report, journal, force=wish.force)
                report.write(journal, wish.report, wish.delimiter)
        check_any(given, bills, invalid)
    counts = _rows_in_words(bills, duplicates, invalid)
    where = "straight to the gateway" if wish.direct else f"to {Names(prefix).queue('sweep')}"
    print(f"{intake.source}: {plural(bills + duplicates + invalid, 'row')}: {counts}")
    print(f"would go {where} as batch {batch}:")
    for bill in first:
        print(f"{command_id(batch, bill.bill, bill.merchant)} {command_body(bill).decode()}")
    if bills > len(first):
        print(f"… and {bills - len(first):,} more")
    return INVALID if invalid and not wish.skip_invalid else 0


def _rows_in_words(bills: int, duplicates: int, invalid: int) -> str:
    return f"{plural(bills, 'bill')}, {plural(duplicates, 'duplicate')}, {invalid:,} invalid"


# -- through the broker ---------------------------------------------------------------------------------------------


def _publish(wish: _Wish, amqp: AmqpSettings, journal: Journal) -> int:
    """Publishes what is not published, and follows if that is wanted."""
    from worker.app.sweep import Ended
    from worker.shells.amqp.session import BrokerError

    if wish.follow is not None:
        _check_way(journal, again=wish.retry_unresolved)
    if wish.republish:
        journal.publish_again()
    if wish.resume:
        journal.resume(time.time())
    if wish.retry_unresolved:
        _retry(journal)
    before, facts = journal.tally(), journal.facts
    follow = wish.wait or (wish.follow is not None and (facts.inbox or facts.direct or wish.republish))
    if follow and not before.unsent:
        tell(_nothing_sent(journal, before))
    if before.unsent or (follow and before.waiting):
        try:
            ended = through_broker.send(amqp, journal, follow=follow, window=wish.window or WINDOW)
        except BrokerError as error:
            raise Trouble(str(error), *_afterwards(wish, journal, "; or send it without a broker: --direct")) from None
        if ended is Ended.STOPPED:
            return _interrupted(wish, journal)
    elif follow:
        through_broker.take_late(amqp, journal)
    after = journal.tally()
    if wish.report is not None:
        report.write(journal, wish.report, wish.delimiter)
    if not follow:
        _say_published(amqp, journal, before, after)
        return 0
    through_broker.close_inbox(amqp, facts.batch.id, after)
    code = _conclude(wish, journal, after)
    if after.unsent and journal.facts.stopped:
        note(
            f"batch {facts.batch.id} was stopped by {journal.facts.stopped}; {after.unsent:,} bills are not sent; "
            f"to send them: `qris-expire sweep --follow {facts.batch.id} --resume`"
        )
    return code


def _check_way(journal: Journal, *, again: bool) -> None:
    """That a batch which is sent straight to the gateway is not continued through the broker by mistake.

    ``again``: its unresolved bills are to be sent again. Raises `Trouble`.
    """
    facts, tally = journal.facts, journal.tally()
    if facts.direct and not facts.inbox and (tally.unsent or tally.waiting or (again and tally.unresolved)):
        raise Trouble(
            f"batch {facts.batch.id} is sent without a broker; to continue it: "
            f"`qris-expire sweep --follow {facts.batch.id} --direct{' --retry-unresolved' if again else ''}`",
            code=INVALID,
        )


def _say_published(amqp: AmqpSettings, journal: Journal, before: Tally, after: Tally) -> None:
    facts, lane = journal.facts, amqp.names.queue("sweep")
    batch, fresh = facts.batch.id, before.unsent - after.unsent
    if facts.stopped:
        said = f"batch {batch} was stopped by {facts.stopped}; published {plural(fresh, 'bill')}; --resume continues it"
    elif fresh:
        said = f"published {plural(fresh, 'bill')} to {lane} as batch {batch}"
    else:
        said = _nothing_sent(journal, after)
    counts = f": {_rows_in_words(after.bills, after.duplicates, after.invalid)}" if after.rows else ""
    tell(f"{said} ({plural(after.rows, 'row')}{counts})")


# -- without a broker -----------------------------------------------------------------------------------------------


def _direct(wish: _Wish, settings: Settings, journal: Journal) -> int:
    """The same engine, from the journal to the gateway."""
    from worker.app.sweep import Ended
    from worker.cli.direct import GatewayRefuses, send

    if wish.retry_unresolved:
        _retry(journal)
    before = journal.tally()
    if before.answered == before.bills:
        tell(_nothing_sent(journal, before))
    else:
        journal.sent_to(gateway_of(settings.gateway))
        try:
            ended = send(journal, settings)
        except GatewayRefuses as refusal:
            raise Trouble(f"{refusal}; see `qris-expire check`", *_afterwards(wish, journal)) from None
        if ended is not Ended.DONE:
            return _interrupted(wish, journal)
    if wish.report is not None:
        report.write(journal, wish.report, wish.delimiter)
    return _conclude(wish, journal, journal.tally())


# -- the end --------------------------------------------------------------------------------------------------------


def _retry(journal: Journal) -> None:
    """Unresolved bills are to be sent again, under their ids."""
    retried = journal.retry()
    tell(f"{plural(retried, 'bill')} of batch {journal.facts.batch.id} stayed unresolved and will be sent again")


def _nothing_sent(journal: Journal, tally: Tally) -> str:
    """What leads where a batch was called for again that has nothing to send."""
    if not tally.bills:
        return "nothing was sent: the input has no bills"
    batch, begun = journal.facts.batch.id, jakarta.iso(journal.facts.created_at, milliseconds=False)
    state = "is finished" if tally.answered == tally.bills else "is published already"
    return f"nothing was sent: batch {batch}, begun {begun}, {state}; another --batch-id sends the input again"


def _conclude(wish: _Wish, journal: Journal, tally: Tally) -> int:
    from worker.core.needs import UNKNOWN, count, settled, suspicious
    from worker.core.words import share

    batch = journal.facts.batch.id
    print_tally(f"sweep {batch}", tally)
    again = shlex.join(["qris-expire", "sweep", "--follow", batch, *_same_way(wish), "--retry-unresolved"])
    print_needs(journal, tally, again)
    percent = SUSPICIOUS_PERCENT if wish.allow_not_found is None else wish.allow_not_found
    if suspicious(tally, percent):
        unknown = count(tally, UNKNOWN)
        note(
            f"the gateway does not know {unknown:,} of {tally.answered:,} bills ({share(unknown, tally.answered)}, "
            f"more than {percent:g} %): a wrong column, or numbers that a spreadsheet changed, look like this, and "
            "their QR codes can still be paid; if it is right so, say --allow-rejected --allow-not-found PERCENT"
        )
    if tally.unresolved and journal.facts.inbox:
        note(
            f"dead letters of unresolved bills: `qris-expire dead list --batch {batch}`; after a redrive, "
            f"`qris-expire sweep --follow {batch}` takes in their outcomes"
        )
    return 0 if settled(tally, rejected=wish.allow_rejected, percent=percent) else 1


def _interrupted(wish: _Wish, journal: Journal) -> int:
    for line in _afterwards(wish, journal):
        print(f"qris-expire: {line}", file=sys.stderr)
    return 143 if signals.names()[:1] == ["SIGTERM"] else INTERRUPTED


def _same_way(wish: _Wish) -> list[str]:
    """Options without which a batch would not be found, or go another way."""
    way = ["--direct"] if wish.direct else []
    return [*way, "--state-dir", str(wish.state_dir)] if wish.state_dir is not None else way


def _afterwards(wish: _Wish, journal: Journal, or_else: str = "") -> list[str]:
    """How far it is, and how to continue."""
    tally, batch = journal.tally(), journal.facts.batch.id
    again = ["qris-expire", "sweep", "--follow", batch]
    again += ["--wait"] if wish.wait and not journal.facts.inbox else []
    again += _same_way(wish)
    again += ["--window", str(wish.window)] if wish.window is not None else []
    again += ["--allow-rejected"] if wish.allow_rejected else []
    again += ["--report", str(wish.report)] if wish.report is not None else []
    again += ["--force"] if wish.force else []
    again += ["--delimiter", wish.delimiter] if wish.delimiter is not None else []
    again += ["--allow-not-found", f"{wish.allow_not_found:g}"] if wish.allow_not_found is not None else []
    sent = f"{tally.sent:,} of {tally.bills:,} bills are {'begun' if wish.direct else 'published'}"
    return [
        f"{sent}, {tally.answered:,} have an outcome; nothing is lost",
        f"to continue: {shlex.join(again)}{or_else}",
    ]
