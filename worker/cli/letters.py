"""Dead letters as people read them, the result of a redrive, and the line that says who moved or deleted them."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from worker.cli import INTERRUPTED, INVALID, Trouble
from worker.cli.screen import note, output, plain_table
from worker.core import jakarta
from worker.core.dead_letter import (
    AGES,
    BROKER_REASONS,
    UNKNOWN,
    Census,
    DeadLetter,
    Filter,
    as_json,
    escaped,
    export_json,
    plain,
    pretty,
)
from worker.core.outcome import DEAD_LETTERED, REASONS
from worker.core.words import plural
from worker.settings import AmqpSettings
from worker.shells import operator

if TYPE_CHECKING:
    from worker.app.dead_letters import HeldLetter, RedrivePlan, RedriveReport

KNOWN_REASONS: Final = frozenset(
    {str(reason) for status in DEAD_LETTERED for reason in REASONS[status]} | {*BROKER_REASONS, UNKNOWN}
)
"""Every reason that the worker or the broker gives a dead letter."""

BILL: Final = 8
REASON: Final = max(map(len, KNOWN_REASONS))
"""Columns that a bill and a reason have even where message ids are long."""
WIDE: Final = 130  # columns of a terminal from which on rows are shown whole


def tell_redrive(report: RedriveReport, plan: RedrivePlan) -> int:
    """The result of a redrive; the exit code, or `Trouble` if the rest stays."""
    from worker.app.dead_letters import RedriveEnd

    print(f"redrove {report.redriven:,} of {plural(report.there, 'dead letter')} ({report.matching:,} match)")
    outcomes = ", ".join(f"{count:,} {status} ({reason})" for (status, reason), count in report.outcomes.most_common())
    if outcomes:
        so_far = " so far" if report.unanswered else ""
        print(f"outcomes{so_far}: {outcomes}")
    if report.without_lane:
        note(
            f"{report.without_lane:,} match and stay: their lane is not known, or they cannot be published as they are"
        )
    match report.ended:
        case RedriveEnd.DONE:
            return 0
        case RedriveEnd.STOPPED:
            raise Trouble("stopped; nothing is lost, the same command continues with the rest", code=INTERRUPTED)
        case RedriveEnd.CANARY:
            raise Trouble(
                f"the canary was bad ({outcomes}); the rest stays, see `dead list` and the gateway, then try again"
            )
        case RedriveEnd.FAILURES:
            raise Trouble(
                f"stopped: {report.failures:,} of {report.answered:,} outcomes are not `expired`, "
                f"{plan.stop_at_failures:g} % are allowed; the rest stays, see what they say, then try again"
            )
        case RedriveEnd.SILENT:
            raise Trouble(
                f"no outcome within {plan.patience:g} s, {report.unanswered:,} redriven commands wait for theirs; "
                "the rest stays, see whether a worker runs and the gateway answers, or give a longer --timeout"
            )
        case RedriveEnd.REFUSED:
            raise Trouble(f"{report.why}; the rest stays")


def print_rehearsal(report: RedriveReport, census: Census) -> None:
    """What a redrive would send."""
    print(f"would redrive {census.total.count:,} of {plural(report.there, 'dead letter')} ({report.matching:,} match)")
    for reason, lane, kind in census.lines():
        print(f"{kind.count:>9,}  {escaped(reason)} to {lane}")
    if report.without_lane:
        note(f"{report.without_lane:,} match and would stay: their lane is not known")


def listing(amqp: AmqpSettings, total: int, census: Census, rows: list[DeadLetter]) -> dict[str, Any]:
    """`dead list` as data."""
    names = [*(f"under {name}" for name, _ in AGES), "older"]
    return {
        "queue": amqp.names.dead,
        "total": total,
        "matching": census.total.count,
        "counts": [
            {"reason": reason, "lane": lane, "count": kind.count, "ages": dict(zip(names, kind.ages, strict=True))}
            for reason, lane, kind in census.lines()
        ],
        "letters": [as_json(letter) for letter in rows],
    }


def check_reasons(chosen: Filter, matching: int) -> None:
    """A reason that no dead letter can have is a mistake, and nothing was done. Raises `Trouble`."""
    wrong = sorted(chosen.reasons - KNOWN_REASONS)
    if wrong and not matching:
        raise Trouble(
            f"no dead letter has the reason {', '.join(wrong)}; the reasons are {', '.join(sorted(KNOWN_REASONS))}",
            code=INVALID,
        )


def hint(chosen: Filter, census: Census, there: Census) -> None:
    """Which reasons there are, when none of them was the one asked for."""
    if chosen.reasons and there.total.count and not census.total.count:
        found = ", ".join(sorted({escaped(reason) for reason, _, _ in there.lines()})[:10])
        note(f"none matches; the reasons that are there: {found}")


def print_list(amqp: AmqpSettings, total: int, census: Census, rows: list[DeadLetter]) -> None:
    """Counts, then the first rows."""
    console = output()
    count = census.total.count
    some = f"{count:,} of " if count != total else ""
    console.print(f"{some}{plural(total, 'dead letter')} in {amqp.names.dead}", markup=False, soft_wrap=True)
    if not count:
        return
    console.print(_counts(census))
    if rows:
        console.print(_rows(rows, census.now, wide=console.width >= WIDE))
        if len(rows) < count:
            note(f"the first {len(rows):,} of {count:,} are shown; --limit shows more")


def _counts(census: Census) -> Any:
    table = plain_table()
    for name in ("reason", "lane"):
        table.add_column(name, overflow="fold")
    ages = (f"<{name.replace(' ', '').replace('day', 'd').replace('ds', 'd')}" for name, _ in AGES)
    for name in ("all", *ages, "older"):
        table.add_column(name, justify="right", no_wrap=True)
    for reason, lane, kind in census.lines():
        table.add_row(_cell(reason), lane, f"{kind.count:,}", *(f"{n:,}" if n else "" for n in kind.ages))
    if len(census.kinds) > 1:
        table.add_section()
        total = census.total
        table.add_row("total", "", f"{total.count:,}", *(f"{n:,}" if n else "" for n in total.ages))
    return table


def _rows(letters: list[DeadLetter], now: float, *, wide: bool) -> Any:
    table = plain_table()
    longest = max((len(letter.reason) for letter in letters), default=0)
    table.add_column("message id", overflow="fold")
    table.add_column("bill", overflow="fold", min_width=BILL)
    table.add_column("reason", overflow="fold", no_wrap=wide, min_width=min(longest, REASON))
    table.add_column("age", justify="right", no_wrap=True)
    if wide:
        table.add_column("lane", no_wrap=True)
        table.add_column("calls", justify="right")
        table.add_column("code")
        table.add_column("batch", overflow="fold")
        table.add_column("detail", overflow="ellipsis", no_wrap=True, ratio=1)
        table.expand = True  # the detail takes what is left
    for letter in letters:
        cells = [
            _cell(letter.command_id),
            _cell(letter.billnumber or "-"),
            _cell(letter.reason),
            _age(letter.parked_at, now),
            letter.lane or "-",
            "-" if letter.attempts is None else str(letter.attempts),
            _cell(letter.response_code or "-"),
            _cell(letter.batch_id or "-"),
            _cell(letter.detail),
        ]
        table.add_row(*cells[: len(table.columns)])
    return table


def _cell(value: str) -> Any:
    """Foreign text: neither markup nor control characters mean anything."""
    from rich.text import Text

    return Text(escaped(value))


def _age(moment: float | None, now: float) -> str:
    if moment is None:
        return "?"
    seconds = now - moment
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return "now"


def print_letter(letter: DeadLetter, held: HeldLetter, which: str) -> None:
    """All that is known of one, and its body."""
    parcel, parked = held.parcel, letter.parked_at
    facts: list[tuple[str, object]] = [
        ("message id", f"{letter.command_id}{f'  ({which})' if which else ''}"),
        ("reason", letter.reason),
        ("detail", letter.detail or None),
        ("parked", None if parked is None else f"{jakarta.iso(parked)} ({_age(parked, time.time())})"),
        ("lane", letter.lane or "not known: it cannot be redriven"),
        ("calls", letter.attempts if letter.attempts is not None else "not known"),
        ("last answer", letter.response_code or None),
        ("bill", letter.billnumber),
        ("batch", letter.batch_id),
    ]
    for name, value in facts:
        if value is not None:
            print(f"{name:<13}{escaped(str(value))}")
    whole = export_json(letter, parcel)
    for title in ("properties", "headers"):
        print(f"{title}")
        for name, value in whole[title].items():
            said = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
            print(f"  {escaped(str(name))}: {escaped(said)}")
    print(f"body         {len(parcel.body):,} bytes")
    print(pretty(parcel.body))
    print()


@contextmanager
def audit(event: str, chosen: Filter, facts: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """One line on standard error when it ends, however it ends: who, what, how much, from when to when."""
    from worker.shells.logs import begun, json_line

    began = time.time()
    failure = ""
    try:
        yield
    except BaseException as error:
        failure = " ".join(str(error).split()) or type(error).__name__
        raise
    finally:
        line: dict[str, Any] = {
            **begun("error" if failure else "info", event),
            "user": operator.user(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "began": jakarta.iso(began),
            "ended": jakarta.iso(time.time()),
            "filters": chosen.as_json(),
            **facts(),
        }
        if failure:
            line |= {"result": "failed", "error": failure}
        print(json_line(line).decode(), file=sys.stderr, flush=True)


def redrive_facts(report: RedriveReport, plan: RedrivePlan) -> dict[str, Any]:
    """What was asked for and what came of it."""
    settings = {
        "limit": plan.limit,
        "rate": plan.rate or None,
        "canary": plan.canary or None,
        "stopAtFailures": plan.stop_at_failures,
    }
    return {
        **{name: value for name, value in settings.items() if value is not None},
        "there": report.there,
        "seen": report.seen,
        "matching": report.matching,
        "redriven": report.redriven,
        "noWayBack": report.without_lane,
        "outcomes": {f"{status}/{reason}": count for (status, reason), count in sorted(report.outcomes.items())},
        "result": report.ended.value,
    }
