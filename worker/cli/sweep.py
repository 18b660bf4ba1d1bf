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
from typing import Annotated, Any, Final

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
from worker.core.command import IDENTIFIER_RULE, is_identifier
from worker.core.needs import SUSPICIOUS_PERCENT, UNKNOWN_BILL, count, settled, suspicious
from worker.core.pace import WINDOW
from worker.core.sweep import Home, Tally, batch_command_id, batch_id, command_body
from worker.core.topology import Names
from worker.core.words import plural, share
from worker.settings import AmqpSettings, DefaultMerchant, Settings, load
from worker.shells.journal import Journal
from worker.shells.journals import lock

SHOWN: Final = 3  # commands that --dry-run prints


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    file: Annotated[str | None, Argument(help="CSV or .xlsx with a header, or JSON lines; - for standard input.")] = (
        None
    )
    batch_id: Annotated[
        str | None, Option(help="Names the batch; else made from the input's content and the date.")
    ] = None
    merchant_id: Annotated[
        str | None, Option(help="Merchant of the rows that have none; else GATEWAY_MERCHANT_ID, if it is set here.")
    ] = None
    wait: Annotated[bool, Option(help="Follow the outcomes until every bill has one.")] = False
    follow: Annotated[
        str | None, Option(metavar="BATCH", help="Instead of FILE: continue a batch that was interrupted.")
    ] = None
    window: Annotated[
        int | None,
        Option(metavar="N", help=f"With --wait, the most bills without an outcome at any time [{WINDOW:,}]."),
    ] = None
    stop: Annotated[
        str | None,
        Option(
            metavar="BATCH",
            help="Instead of FILE: publish nothing more of a batch that is followed, wherever its process runs.",
        ),
    ] = None
    resume: Annotated[bool, Option(help="Continue a batch that was stopped.")] = False
    report: Annotated[
        Path | None,
        Option(
            metavar="OUT.csv", help="At the end, write a line for each row of the input to this file (.csv or .xlsx)."
        ),
    ] = None
    force: Annotated[bool, Option(help="Replace the file that --report names, if it exists.")] = False
    delimiter: Annotated[
        str | None, Option(metavar="CHARACTER", help="Of the report's columns; else that of the input.")
    ] = None
    accept_as_is: Annotated[
        bool, Option(help="Send bills and merchants also where a spreadsheet seems to have changed them.")
    ] = False
    skip_invalid: Annotated[bool, Option(help="Go on without the rows that cannot be used.")] = False
    allow_empty: Annotated[bool, Option(help="Exit with 0 also when the input has a header and no bills.")] = False
    dry_run: Annotated[bool, Option(help="Only check the input, and show what would be sent.")] = False
    direct: Annotated[bool, Option(help="Without a broker and a worker: straight from here to the gateway.")] = False
    republish: Annotated[bool, Option(help="Publish again, under the same ids, what has no outcome.")] = False
    retry_unresolved: Annotated[
        bool, Option(help="Send the bills again that stayed unresolved, as after a long outage.")
    ] = False
    allow_rejected: Annotated[
        bool, Option(help="Exit with 0 also when the gateway refused bills for good, as paid ones.")
    ] = False
    allow_not_found: Annotated[
        float | None,
        Option(
            metavar="PERCENT",
            help="With --allow-rejected, the most bills that the gateway may not know "
            f"[{SUSPICIOUS_PERCENT:g}]; more look like changed numbers.",
        ),
    ] = None
    state_dir: Annotated[Path | None, Option(metavar="DIR", help=STATE_DIR_HELP)] = None


def sweep(options: Options) -> int:
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
    _check(options)
    settings: Any = load() if options.direct else load(AmqpSettings)
    amqp = settings.amqp if options.direct else settings
    _silence()
    if options.stop is not None:
        return through_broker.stop(options.stop, amqp, state_directory(amqp.prefix, options.state_dir))
    if options.dry_run:
        return _dry_run(options, amqp.prefix, settings)
    directory = state_directory(amqp.prefix, options.state_dir)
    with _journal(options, directory, settings) as journal:
        if options.report is not None:
            report.check_existing(options.report, journal, force=options.force)
        try:
            return _direct(options, settings, journal) if options.direct else _publish(options, amqp, journal)
        except KeyboardInterrupt:
            return _interrupted(options, journal)


def _check(options: Options) -> None:
    if [options.file, options.follow, options.stop].count(None) != 2:
        raise Trouble("give a FILE (or - for standard input), --follow BATCH or --stop BATCH", code=INVALID)
    if options.window is not None and (options.window < 1 or options.direct or not (options.wait or options.follow)):
        raise Trouble("--window takes a number from 1, and goes with --wait; leave it out otherwise", code=INVALID)
    if options.follow is not None and (
        options.dry_run or options.batch_id or options.merchant_id or options.skip_invalid or options.allow_empty
    ):
        raise Trouble("--follow continues a batch as it is; leave out the options about its input", code=INVALID)
    if options.allow_not_found is not None and not 0 <= options.allow_not_found <= 100:
        raise Trouble("--allow-not-found takes a percentage from 0 to 100", code=INVALID)
    if options.direct and options.republish:
        raise Trouble("--direct publishes nothing; leave out --republish", code=INVALID)
    if options.merchant_id is not None and not is_identifier(options.merchant_id):
        raise Trouble(f"--merchant-id must be {IDENTIFIER_RULE}", code=INVALID)
    if options.delimiter is not None and (len(options.delimiter) != 1 or options.delimiter in '"\r\n'):
        raise Trouble("--delimiter must be one character that is no quote and no line break", code=INVALID)
    if options.report is not None:
        report.check_place(options.report, options.file)


def _silence() -> None:
    """What the parts log for operators of a worker is shown here beside the bars, or not at all."""
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))


# -- the input ------------------------------------------------------------------------------------------------------


@contextmanager
def _journal(options: Options, directory: Path, settings: Any) -> Iterator[Journal]:
    """The batch's journal, ours alone."""

    def home() -> Home:
        return gateway_of(settings.gateway) if options.direct else broker_of(settings)

    if options.follow is None:
        with batch(_input(options, settings), directory, home) as journal:
            yield journal
        return
    path = existing(directory, options.follow, home())
    with lock(path), closing(Journal(path)) as journal:
        yield journal


def _input(options: Options, settings: Any) -> Input:
    assert options.file is not None
    # Through the broker, GATEWAY_MERCHANT_ID of our own environment: the worker's cannot be seen from here.
    merchant = options.merchant_id or (settings.gateway.merchant_id if options.direct else load(DefaultMerchant).id)
    return Input(
        options.file,
        merchant or "",
        options.batch_id,
        options.skip_invalid,
        options.accept_as_is,
        may_be_empty=options.allow_empty,
    )


def _dry_run(options: Options, prefix: str, settings: Any) -> int:
    with tempfile.TemporaryDirectory(prefix="qris-expire-") as scratch:
        given = _input(options, settings)
        intake = take_in(replace(given, skip_invalid=given.skip_invalid or options.report is not None), Path(scratch))
        bills, duplicates, invalid = intake.load.counts()
        first = intake.load.first(SHOWN)
        batch = options.batch_id or batch_id(intake.digest, time.time())
        check_batch_id(batch)
        path = Path(scratch) / "dry-run.db"
        intake.keep(path, batch)
        if options.report is not None:
            with closing(Journal(path)) as journal:
                report.check_existing(options.report, journal, force=options.force)
                report.write(journal, options.report, options.delimiter)
        check_any(given, bills, invalid)
    counts = _rows_in_words(bills, duplicates, invalid)
    where = "straight to the gateway" if options.direct else f"to {Names(prefix).queue('sweep')}"
    print(f"{intake.source}: {plural(bills + duplicates + invalid, 'row')}: {counts}")
    print(f"would go {where} as batch {batch}:")
    for bill in first:
        print(f"{batch_command_id(batch, bill.bill, bill.merchant)} {command_body(bill).decode()}")
    if bills > len(first):
        print(f"… and {bills - len(first):,} more")
    return INVALID if invalid and not options.skip_invalid else 0


def _rows_in_words(bills: int, duplicates: int, invalid: int) -> str:
    return f"{plural(bills, 'bill')}, {plural(duplicates, 'duplicate')}, {invalid:,} invalid"


# -- through the broker ---------------------------------------------------------------------------------------------


def _publish(options: Options, amqp: AmqpSettings, journal: Journal) -> int:
    """Publishes what is not published, and follows if that is wanted."""
    from worker.app.sweep import Ended
    from worker.shells.amqp.bulk import Followed
    from worker.shells.amqp.session import BrokerError, TopologyMismatch

    if options.follow is not None:
        _check_way(journal, again=options.retry_unresolved)
    if options.republish:
        journal.publish_again()
    if options.resume:
        journal.resume(time.time())
    if options.retry_unresolved:
        _retry(journal)
    before, facts = journal.tally(), journal.facts
    follow = options.wait or (options.follow is not None and (facts.inbox or facts.direct or options.republish))
    if follow and not before.unsent:
        tell(_nothing_sent(journal, before))
    if before.unsent or (follow and before.waiting):
        try:
            ended = through_broker.send(amqp, journal, follow=follow, window=options.window or WINDOW)
        except (Followed, TopologyMismatch):  # which the same command would meet again
            raise
        except BrokerError as error:
            raise Trouble(
                str(error), *_afterwards(options, journal, "; or send it without a broker: --direct")
            ) from None
        if ended is Ended.STOPPED:
            return _interrupted(options, journal)
    elif follow:
        through_broker.take_late(amqp, journal)
    after = journal.tally()
    if options.report is not None:
        report.write(journal, options.report, options.delimiter)
    if not follow:
        _say_published(amqp, journal, before, after)
        return 0
    through_broker.close_inbox(amqp, facts.batch.id, after)
    code = _conclude(options, journal, after)
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


def _direct(options: Options, settings: Settings, journal: Journal) -> int:
    """The same engine, from the journal to the gateway."""
    from worker.app.sweep import Ended
    from worker.cli.direct import GatewayRefuses, send

    if options.retry_unresolved:
        _retry(journal)
    before = journal.tally()
    if before.answered == before.bills:
        tell(_nothing_sent(journal, before))
    else:
        journal.sent_to(gateway_of(settings.gateway))
        try:
            ended = send(journal, settings)
        except GatewayRefuses as refusal:
            raise Trouble(f"{refusal}; see `qris-expire check`", *_afterwards(options, journal)) from None
        if ended is not Ended.DONE:
            return _interrupted(options, journal)
    if options.report is not None:
        report.write(journal, options.report, options.delimiter)
    return _conclude(options, journal, journal.tally())


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


def _conclude(options: Options, journal: Journal, tally: Tally) -> int:
    batch = journal.facts.batch.id
    print_tally(f"sweep {batch}", tally)
    again = shlex.join(["qris-expire", "sweep", "--follow", batch, *_same_way(options), "--retry-unresolved"])
    print_needs(journal, tally, again)
    percent = SUSPICIOUS_PERCENT if options.allow_not_found is None else options.allow_not_found
    if suspicious(tally, percent):
        unknown = count(tally, UNKNOWN_BILL)
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
    return 0 if settled(tally, rejected=options.allow_rejected, percent=percent) else 1


def _interrupted(options: Options, journal: Journal) -> int:
    for line in _afterwards(options, journal):
        print(f"qris-expire: {line}", file=sys.stderr)
    return 143 if signals.names()[:1] == ["SIGTERM"] else INTERRUPTED


def _same_way(options: Options) -> list[str]:
    """Options without which a batch would not be found, or go another way."""
    way = ["--direct"] if options.direct else []
    return [*way, "--state-dir", str(options.state_dir)] if options.state_dir is not None else way


def _afterwards(options: Options, journal: Journal, or_else: str = "") -> list[str]:
    """How far it is, and how to continue."""
    tally, batch = journal.tally(), journal.facts.batch.id
    again = ["qris-expire", "sweep", "--follow", batch]
    again += ["--wait"] if options.wait and not journal.facts.inbox else []
    again += _same_way(options)
    again += ["--window", str(options.window)] if options.window is not None else []
    again += ["--allow-rejected"] if options.allow_rejected else []
    again += ["--report", str(options.report)] if options.report is not None else []
    again += ["--force"] if options.force else []
    again += ["--delimiter", options.delimiter] if options.delimiter is not None else []
    again += ["--allow-not-found", f"{options.allow_not_found:g}"] if options.allow_not_found is not None else []
    sent = f"{tally.sent:,} of {tally.bills:,} bills are {'begun' if options.direct else 'published'}"
    return [
        f"{sent}, {tally.answered:,} have an outcome; nothing is lost",
        f"to continue: {shlex.join(again)}{or_else}",
    ]
