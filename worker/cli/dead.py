"""`qris-expire dead`: look at dead letters, bring them back, keep a copy, delete them."""

from __future__ import annotations

import json
import select
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Final, Self

from worker import signals
from worker.cli import INTERRUPTED, INVALID, Trouble
from worker.cli.command_line import Argument, CommandGroup, Option
from worker.cli.letters import (
    audit,
    check_reasons,
    hint,
    listing,
    print_letter,
    print_list,
    print_rehearsal,
    redrive_facts,
    tell_redrive,
)
from worker.cli.screen import DRAW_EVERY, Display, bars, note
from worker.core.command import parse_rfc3339
from worker.core.dead_letter import (
    Census,
    DeadLetter,
    Filter,
    export_json,
    read_dead_letter,
)
from worker.core.lanes import LANES
from worker.core.pace import Speed
from worker.settings import AmqpSettings, load
from worker.shells.clock import SystemClock

if TYPE_CHECKING:
    from worker.app.dead_letters import HeldLetter
    from worker.shells.amqp.parked import ParkedLetters

MAX_SHOWN_BODIES: Final = 64 * 1024 * 1024
ROWS: Final = 20
SLOWEST: Final = 0.01  # per second: what is held must be given back now and then


dead = CommandGroup(
    "Lists, shows, redrives, exports and deletes dead letters. Looking removes nothing and keeps their order."
)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters; without any option all of them."""

    reason: Annotated[list[str] | None, Option(help="Only dead letters with this reason; may be repeated.")] = None
    lane: Annotated[
        list[str] | None, Option(choices=LANES, help="Only dead letters of this lane; may be repeated.")
    ] = None
    before: Annotated[
        str | None,
        Option(metavar="RFC3339", help="Only those parked before this time, for example 2026-11-22T21:00:00+07:00."),
    ] = None
    batch: Annotated[list[str] | None, Option(help="Only dead letters of this batch; may be repeated.")] = None
    bill: Annotated[list[str] | None, Option(help="Only dead letters of this bill; may be repeated.")] = None

    def filter(self) -> Filter:
        """The same as a rule. Raises `Trouble`."""
        try:
            moment = None if self.before is None else parse_rfc3339(self.before)
        except ValueError as error:
            raise Trouble(f"--before: {error}", code=INVALID) from None
        return Filter(
            frozenset(self.reason or ()),
            frozenset(self.lane or ()),
            moment,
            frozenset(self.batch or ()),
            frozenset(self.bill or ()),
        )


LimitOption = Annotated[
    int | None, Option("--limit", help="Above 20,000 dead letters: look at the first N only.", min=1, metavar="N")
]


@dead.command("list")
def list_(
    options: Selection = Selection(),
    limit: Annotated[
        int | None,
        Option(
            help=f"Rows to show, else {ROWS}; counts are of all. Above 20,000 dead letters: look at the first N only.",
            min=0,
        ),
    ] = None,
    as_data: Annotated[bool, Option("--json", help="Print one JSON object with counts and rows.")] = False,
) -> int:
    """Counts dead letters by reason, lane and age, and shows the first ones, in the order of the queue.

    Exit code 0: shown. 1: the broker failed, or another command holds the dead letters. 2: input or settings are wrong.

    Examples:

        qris-expire dead list
        qris-expire dead list --reason retries_exhausted --limit 100
    """
    amqp, chosen = _begin(options)
    census, there = Census(time.time()), Census(time.time())
    rows: list[DeadLetter] = []

    def each(held: HeldLetter) -> None:
        letter = read_dead_letter(amqp.names, held.parcel)
        there.add(letter)
        if chosen.matches(letter):
            census.add(letter)
            if len(rows) < (ROWS if limit is None else limit):
                rows.append(letter)

    total = _look(amqp, "list", each, limit)
    if as_data:
        print(json.dumps(listing(amqp, total, census, rows), indent=2))
    else:
        print_list(amqp, total, census, rows)
    hint(chosen, census, there)
    check_reasons(chosen, census.total.count)
    return 0


@dead.command()
def show(
    message_id: Annotated[str, Argument(metavar="MESSAGE-ID", help="As `dead list` shows it.")],
    limit: LimitOption = None,
    as_data: Annotated[bool, Option("--json", help="Print JSON lines as `dead export` writes them.")] = False,
) -> int:
    """Shows one dead letter: its reason, time, attempts, properties and body. Several with the same id are all shown.

    Exit code 0: shown. 1: there is none, or the broker failed. 2: settings are wrong.

    Example:

        qris-expire dead show cancel-ORD-77-10092081
    """
    amqp, _ = _begin()
    found: list[tuple[DeadLetter, HeldLetter]] = []
    size = left_out = 0

    def each(held: HeldLetter) -> None:
        nonlocal size, left_out
        letter = read_dead_letter(amqp.names, held.parcel)
        if letter.command_id == message_id:
            size += len(held.parcel.body)
            if found and size > MAX_SHOWN_BODIES:
                left_out += 1
            else:
                found.append((letter, held))

    total = _look(amqp, "show", each, limit)
    if not found:
        raise Trouble(f"no dead letter of {total:,} has the id {message_id}; `qris-expire dead list` shows them")
    for number, (letter, held) in enumerate(found, 1):
        if as_data:
            print(json.dumps(export_json(letter, held.parcel)))
        else:
            print_letter(letter, held, f"{number} of {len(found)} with this id" if len(found) > 1 else "")
    if left_out:
        note(f"{left_out:,} more have this id; `qris-expire dead export` has them all")
    return 0


@dead.command()
def redrive(
    options: Selection = Selection(),
    limit: Annotated[
        int | None, Option(help="Redrive at most N. Above 20,000 dead letters it is required.", min=1)
    ] = None,
    rate: Annotated[float, Option(help="Redrive at most so many per second; 0 for no limit.", min=0, max=100_000)] = 0,
    canary: Annotated[
        int, Option(help="Redrive N first, and the rest only if the bills of all N expire.", min=0, max=10_000)
    ] = 0,
    stop_at_failures: Annotated[
        float | None,
        Option(
            help="Watch the outcomes, and stop when this percentage of them is not expired.",
            min=0,
            max=100,
            metavar="PERCENT",
        ),
    ] = None,
    timeout: Annotated[
        float, Option(help="A watched redrive stops after so many seconds without any outcome.", min=1, max=900)
    ] = 120,
    dry_run: Annotated[bool, Option(help="Only show what would be redriven.")] = False,
) -> int:
    """Moves dead letters back to their lane, where they start afresh: attempts and delayed rounds count from zero.

    It takes only what was there when it began. Each command is published, confirmed, and only then removed from the
    dead letters, so you may interrupt it at any time and run it again. Only one redrive runs at a time.

    Exit code 0: done. 1: stopped because of bad outcomes, or the broker failed. 2: input or settings are wrong. 130:
    ctrl-C.

    Examples:

        qris-expire dead redrive --dry-run --reason credentials
        qris-expire dead redrive --reason credentials --canary 5 --rate 20 --stop-at-failures 10
    """
    from worker.app.dead_letters import Redrive, RedrivePlan, rehearse

    amqp, chosen = _begin(options)
    if 0 < rate < SLOWEST:
        raise Trouble(f"--rate: at least {SLOWEST:g} per second, or 0 for no limit", code=INVALID)
    plan = RedrivePlan(chosen, limit, rate, canary, stop_at_failures, timeout)
    census = Census(time.time())
    if dry_run:
        with _parked(amqp, "redrive --dry-run") as parked, _Progress(parked, "looking") as progress:
            report = rehearse(parked, amqp.names, plan, show=progress.show, each=census.add)
        print_rehearsal(report, census)
        check_reasons(chosen, report.matching)
        return 0
    with _parked(amqp, "redrive", alone=True) as parked:
        progress = _Progress(parked, "redriving")
        run = Redrive(
            parked,
            amqp.names,
            plan,
            clock=SystemClock(),
            copy_id=lambda: uuid.uuid4().hex,
            stop=signals.received,
            show=progress.show,
            each=census.add,
        )
        # The line of the audit comes when the picture has gone, which would break it.
        with audit("dead.redrive", chosen, lambda: redrive_facts(run.report, plan)), progress:
            run.run()
    code = tell_redrive(run.report, plan)
    check_reasons(chosen, run.report.matching)
    return code


@dead.command()
def export(
    output: Annotated[
        Path | None, Option(help="Write this file, which appears when it is complete; else standard output.")
    ] = None,
    options: Selection = Selection(),
    limit: LimitOption = None,
) -> int:
    """Writes dead letters as JSON lines: everything that `dead show` shows, the body as text or base64. They stay.

    Exit code 0: written. 1: the broker failed, or the file could not be written. 2: input or settings are wrong.

    Example:

        qris-expire dead export --output dead.jsonl
    """
    amqp, chosen = _begin(options)
    written = 0
    with _sink(output) as sink:

        def each(held: HeldLetter) -> None:
            nonlocal written
            letter = read_dead_letter(amqp.names, held.parcel)
            if chosen.matches(letter):
                sink.write(json.dumps(export_json(letter, held.parcel), separators=(",", ":")) + "\n")
                written += 1

        total = _look(amqp, "export", each, limit)
        check_reasons(chosen, written)
    note(f"{written:,} of {total:,} dead letters written{f' to {output}' if output else ''}")
    return 0


@dead.command()
def purge(
    options: Selection = Selection(),
    limit: LimitOption = None,
    yes: Annotated[bool, Option("--yes", "-y", help="Delete without asking.")] = False,
) -> int:
    """Deletes dead letters for good; on a terminal it asks first. It takes only what was there when it began.

    Exit code 0: deleted. 1: you said no, or the broker failed. 2: input or settings are wrong. 130: ctrl-C.

    Example:

        qris-expire dead purge --reason malformed_json --before 2026-11-01T00:00:00+07:00
    """
    from worker.app import dead_letters

    amqp, chosen = _begin(options)
    if not yes and not sys.stdin.isatty():
        raise Trouble("deleting is for good and nobody can be asked here; give --yes", code=INVALID)
    matching = removed = 0
    with _parked(amqp, "purge", alone=True) as parked:
        progress = _Progress(parked, "looking")

        def sure(count: int) -> bool:
            progress.pause()
            return yes or _ask(f"Delete {count:,} of {parked_there:,} dead letters for good? [y/N] ", parked)

        parked_there = parked.count()
        with audit("dead.purge", chosen, lambda: {"matching": matching, "removed": removed}), progress:
            total, matching, removed = dead_letters.purge(
                parked,
                lambda held: chosen.matches(read_dead_letter(amqp.names, held.parcel)),
                sure,
                stop=signals.received,
                show=progress.show,
                limit=limit,
            )
    if removed < matching and signals.received():
        raise Trouble("stopped; nothing was deleted", code=INTERRUPTED)
    if removed < matching:
        raise Trouble(f"nothing was deleted; {matching:,} dead letters match")
    check_reasons(chosen, matching)
    print(f"deleted {removed:,} of {total:,} dead letters")
    return 0


# -- beginnings -----------------------------------------------------------------------------------------------------


def _begin(options: Selection = Selection()) -> tuple[AmqpSettings, Filter]:
    chosen = options.filter()
    amqp = load(AmqpSettings)
    signals.install()
    return amqp, chosen


@contextmanager
def _parked(amqp: AmqpSettings, what: str, *, alone: bool = False) -> Iterator[ParkedLetters]:
    from worker.app.dead_letters import TooMany
    from worker.shells.amqp.parked import Interrupted, ParkedLetters

    try:
        with ParkedLetters(amqp, what, stop=signals.received, alone=alone) as parked:
            yield parked
    except Interrupted:
        raise Trouble("stopped; nothing is lost, what was not moved is where it was", code=INTERRUPTED) from None
    except TooMany as error:
        raise Trouble(
            f"there are {error.there:,} dead letters: to hold all of them could fill the memory of the broker, which "
            "then blocks every publisher; give --limit N to take the first N (about 7 KB of its memory each)"
        ) from None


def _look(amqp: AmqpSettings, what: str, each: Callable[[HeldLetter], None], limit: int | None) -> int:
    """Shows every dead letter to ``each``; how many there are."""
    from worker.app.dead_letters import look

    with _parked(amqp, what) as parked, _Progress(parked, "looking") as progress:
        there, looked_at = look(parked, each, show=progress.show, limit=limit)
    if looked_at < there:
        note(
            f"only the first {looked_at:,} of {there:,} dead letters were looked at; the others may come before them "
            "from now on"
        )
    return there


def _ask(question: str, parked: ParkedLetters) -> bool:
    """Asks on the terminal while the conversation with the broker goes on: it must not die of our silence."""
    print(question, end="", file=sys.stderr, flush=True)
    answered = select.poll()
    answered.register(sys.stdin, select.POLLIN)
    while not answered.poll(0):
        if signals.received():
            print(file=sys.stderr)
            return False
        parked.turn(0.1)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def _sink(output: Path | None) -> Iterator[IO[str]]:
    """Where lines are gathered first: a slow reader of our output must not keep the dead letters held."""
    from worker.cli.report import replacing

    if output is not None:
        with replacing(output) as file:
            yield file
        return
    with tempfile.TemporaryFile("w+", encoding="utf-8") as gathered:
        yield gathered
        gathered.seek(0)
        shutil.copyfileobj(gathered, sys.stdout)
        sys.stdout.flush()


# -- progress -------------------------------------------------------------------------------------------------------


class _Progress(Display):
    """How far a command is; those who wait for the dead letters are told, too."""

    def __init__(self, parked: ParkedLetters, verb: str) -> None:
        super().__init__()
        self._parked = parked
        self._verb = verb
        self._speed = Speed()
        self._marked_at = 0.0
        self._there = 0

    def __enter__(self) -> Self:
        self._there = self._parked.count()
        return super().__enter__()

    def show(self, seen: int, done: int, wanted: int) -> None:
        """See `Show`."""
        completed, total, text = seen, self._there, f"{seen:,} of {self._there:,} looked at"
        if wanted:
            if done >= wanted or time.monotonic() - self._marked_at >= DRAW_EVERY:
                self._marked_at = time.monotonic()
                self._speed.mark(self._marked_at, done, wanted)
            completed, total = done, wanted
            text = f"{done:,} of {wanted:,} redriven, {self._speed.per_second:,.0f}/s"
        self._parked.say(text)
        self.draw(lambda: bars([(self._verb, completed, total, (text,))]), lambda: f"qris-expire: {text}")
