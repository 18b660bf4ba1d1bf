"""`qris-expire fleet`: the processes that are one client of the gateway, and what operators want of them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Final

from worker.cli import INVALID, Trouble
from worker.cli.command_line import Argument, CommandGroup, Option
from worker.cli.screen import output, plain_table, tell
from worker.core import jakarta
from worker.core.lanes import LANES
from worker.core.words import duration, plural
from worker.settings import AmqpSettings, load
from worker.shells import operator

if TYPE_CHECKING:
    from worker.core.fleet.messages import Card, Limit, OperatorOrders, Pause
    from worker.shells.amqp.fleet_tool import FleetTool

ACTS_WITHIN: Final = 2.0  # seconds in which every member obeys
UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
LONGEST: Final = 366 * 86_400.0
STATES: Final = ("closed", "half-open", "open")


def show(
    as_json: Annotated[bool, Option("--json", help="Print what each member says, one JSON object per line.")] = False,
) -> int:
    """Shows the fleet: its members and leader, the rate used and allowed, holds, breakers, and what operators want.

    Changes nothing. Exit code 0: members answered. 1: nobody answered.
    """
    with _tool() as tool:
        cards = tool.cards()
    if as_json:
        for card in cards:
            print(json.dumps(asdict(card)))
    else:
        _show(cards)
    return 0 if cards else 1


fleet = CommandGroup(
    "Shows the processes that are one client of the gateway; pauses them, and bounds their rate.", show
)

ReasonOption = Annotated[str, Option("--reason", help="Why; everybody who looks at the fleet sees it.", metavar="TEXT")]
LanesOption = Annotated[list[str] | None, Option(choices=LANES, help="Only this lane; both without it.")]


@fleet.command()
def pause(
    lane: LanesOption = None,
    for_: Annotated[
        str | None, Option("--for", help="End it after so long, as 90s, 30m, 1h or 2d.", metavar="TIME")
    ] = None,
    reason: ReasonOption = "",
) -> int:
    """Pauses the fleet, or one lane of it, until `fleet resume` or for a time.

    Commands wait in their queues; calls that are out are finished. It holds for processes that start later, and after a
    restart of workers and broker. Readiness stays good, so that a rollout goes on.

    Example:

        qris-expire fleet pause --lane sweep --for 1h --reason 'the bank asked for it'
    """
    seconds = None if for_ is None else _seconds(for_)
    by, since = operator.who(), time.time()
    return _order(lambda orders: orders.paused(lane or LANES, by, reason, since, seconds))


@fleet.command()
def resume(lane: LanesOption = None) -> int:
    """Ends a pause.

    Example:

        qris-expire fleet resume
    """
    return _order(lambda orders: orders.resumed(lane or LANES))


@fleet.command()
def limit(
    calls: Annotated[str, Argument(help="Calls in any second over the whole fleet, or default: the workers' own.")],
    reason: ReasonOption = "",
) -> int:
    """Bounds the calls of the whole fleet, in place of GATEWAY_MAX_REQUESTS_PER_SECOND of its members.

    It holds for processes that start later, and after a restart of workers and broker, until `fleet limit default`.

    Examples:

        qris-expire fleet limit 50 --reason 'month end'
        qris-expire fleet limit default
    """
    if calls == "default":
        return _order(lambda orders: replace(orders, limit=None))
    try:
        rate = float(calls)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 100_000:
        raise Trouble(
            f"limit: {calls!r} is neither default nor a number of calls per second above 0 and up to 100000; "
            "`fleet pause` stops all calls",
            code=INVALID,
        )
    by, since = operator.who(), time.time()
    return _order(lambda orders: orders.limited(rate, by, reason, since))


@fleet.command()
def probe() -> int:
    """Makes the fleet test the gateway at once, instead of after the breakers' cooldown.

    Example:

        qris-expire fleet probe
    """
    with _tool() as tool:
        tool.probe()
    tell("the fleet probes the gateway; `qris-expire fleet` shows what the breakers say then")
    return 0


# -- carrying it out --------------------------------------------------------------------------------------------------


def _tool() -> AbstractContextManager[FleetTool]:
    from worker.shells.amqp.fleet_tool import fleet_tool

    return fleet_tool(load(AmqpSettings))


def _order(change: Callable[[OperatorOrders], OperatorOrders]) -> int:
    """Changes what operators want, and waits until all that answer obey."""

    with _tool() as tool:
        cards = tool.cards()
        # What rests at the broker counts; a member may know of something later that could not be laid down.
        before = max([tool.orders(), *(card.orders for card in cards)], key=lambda orders: orders.revision)
        now = time.time()
        pauses = {lane: each for lane, each in before.pauses.items() if each.left(now) != 0}
        orders = replace(change(replace(before, pauses=pauses)), revision=before.revision + 1)
        tool.order(orders, orders.left(now))
        deadline = time.monotonic() + ACTS_WITHIN
        while any(card.orders.revision < orders.revision for card in cards) and time.monotonic() < deadline:
            cards = tool.cards()
    late = [_name(card) for card in cards if card.orders.revision < orders.revision]
    for line in _in_words(orders) or ["nothing is paused, and the workers' own limit holds"]:
        tell(line, indent=2)
    if not cards:
        tell("no worker answered; those that start later obey")
    elif late:
        raise Trouble(f"{', '.join(late)} did not obey within {ACTS_WITHIN:g} s; look at it there")
    else:
        print(f"{plural(len(cards), 'process')} obeyed")
    return 0


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= LONGEST:
        raise Trouble(f"--for: {text!r} is no time such as 90s, 30m, 1h or 2d (at most 366d)", code=INVALID)
    return seconds


# -- showing it -------------------------------------------------------------------------------------------------------


def _show(cards: Sequence[Card]) -> None:
    if not cards:
        tell("no worker answered within a second; see whether one runs with this AMQP_URL and AMQP_PREFIX")
        return
    for client in dict.fromkeys(card.client for card in cards):
        _show_one([card for card in cards if card.client == client])


def _show_one(cards: Sequence[Card]) -> None:
    leader = next((card for card in cards if card.role == "leads"), None)
    best = leader or cards[0]
    tell(f"{plural(best.members, 'member')}, {'led by ' + _name(leader) if leader else 'without a leader for now'}")
    print(f"rate: {best.used:.1f} calls/s used" + (f" of {best.limit:g} allowed" if best.limit else ", no limit"))
    for lane, told in sorted(best.breakers.items()):
        state = STATES[told.state] if 0 <= told.state < len(STATES) else str(told.state)
        more = f", next probes in {duration(told.left)}" if told.state == STATES.index("open") else ""
        print(f"breaker of {lane}: {state}{more}")
    if best.hold:
        print(f"throttled: no call for {duration(best.hold)} more")
    for line in _in_words(best.orders):
        tell(line, indent=2)
    table = plain_table()
    for name in ("member", "version", "role", "state", "own limit", "calls", "waiting for a permit"):
        table.add_column(
            name, overflow="fold", no_wrap=name == "version", justify="right" if name == "calls" else "left"
        )
    for card in cards:
        table.add_row(
            _name(card),
            card.version,
            card.role,
            "sick" if card.sick else "ok",
            f"{card.own_limit:g}/s" if card.own_limit else "none",
            f"{card.calls:,}",
            ", ".join(f"{count} {lane}" for lane, count in sorted(card.waiting.items()) if count) or "-",
        )
    output().print(table)


def _name(card: Card) -> str:
    return f"{card.host} process {card.process}"


def _in_words(orders: OperatorOrders) -> list[str]:
    """What operators want: who, when and why."""
    now, lines = time.time(), []
    for lane, wanted in sorted(orders.pauses.items()):
        left = wanted.left(now)
        if left != 0:
            until = "until resumed" if left is None else f"for {duration(left)} more"
            lines.append(f"{lane} is paused {until}, {_by(wanted)}")
    if orders.limit is not None:
        lines.append(f"limit of {orders.limit.rate:g} calls/s, {_by(orders.limit)}")
    return lines


def _by(order: Pause | Limit) -> str:
    since = jakarta.iso(order.since, milliseconds=False)
    return f"by {order.by} since {since}{f': {order.reason}' if order.reason else ''}"
