"""The page's figures as HTML: tables that a screen reader, a phone and a person at night can read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from worker.core import jakarta
from worker.core.catalogue import NO_ANSWER
from worker.core.condition import Condition, Level, Situation, kind_of
from worker.core.outcome import STATUS_OF, Reason
from worker.core.reading import Change, Histogram
from worker.core.words import NO_VALUE, duration, number, plural, quantile, rate, share

WORDS: Final = {
    Level.WELL: ("✓", "Well"),
    Level.CAUTION: ("!", "Look"),
    Level.WAITING: ("…", "Waiting"),
    Level.TROUBLE: ("✕", "Trouble"),
}
"""Sign and word beside each colour: a colour alone says nothing to one person in twelve."""

PAUSES: Final = {
    "breaker": "the gateway is failing",
    "throttled": "the gateway answers too many requests",
    "broker_blocked": "the broker is short of memory or disk",
    "draining": "the worker is draining",
    "operator": "an operator has paused the fleet",
    "sick": "this process fails while others succeed",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A value; `bad` marks it, `text` sets it as words, not as a number."""

    content: str
    bad: bool = False
    text: bool = False

    def html(self) -> str:
        classes = " ".join(name for name, on in (("bad", self.bad), ("text", self.text)) if on)
        return f'<td class="{classes}">{escape(self.content)}</td>' if classes else f"<td>{escape(self.content)}</td>"


TableRow = tuple[str, Sequence[Cell | str]]
"""What it is, then its values."""


def table(caption: str, columns: Sequence[str], rows: Iterable[TableRow]) -> str:
    """A table whose first column names the row; `columns` are the headings, the first one's included, or none."""
    # An empty heading would be read aloud as one.
    head = "".join(f'<th scope="col">{escape(column)}</th>' if column else "<td></td>" for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join((cell if isinstance(cell, Cell) else Cell(cell)).html() for cell in cells)
        + "</tr>\n"
        for name, cells in rows
    )
    return (
        "<table>\n"
        + (f"<caption>{escape(caption)}</caption>\n" if caption else "")
        + (f"<thead><tr>{head}</tr></thead>\n" if head else "")
        + f"<tbody>\n{body}</tbody>\n</table>\n"
    )


def page_title(condition: Condition) -> str:
    """What a tab shows: the sign first, since tabs are narrow."""
    sign, word = WORDS[condition.level]
    return f"{sign} {word} · qris-expire-worker"


def main_element(situation: Situation, condition: Condition) -> str:
    """All that changes."""
    cards = "".join(
        card(situation) for card in (_lanes, _fleet, _outcomes, _gateway, _holds, _dead_letters, _processes)
    )
    return _unbroken(
        f'<main data-at="{situation.now.at * 1000:.0f}" data-key="{escape(condition.key)}">\n'
        f'{_headline(situation, condition)}<div class="cards">\n{cards}</div>\n{_footer()}</main>'
    )


def _unbroken(html: str) -> str:
    """A line ends neither between a number and its unit, nor inside a name but at its underscores."""
    return _UNDERSCORE.sub("_<wbr>", _UNIT.sub("&nbsp;", html))


_UNIT: Final = re.compile(r"(?<=\d) (?=(?:ms|s|min|h|d)\b|%)")
_UNDERSCORE: Final = re.compile(r"_(?=[^<>]*<)")


def _headline(situation: Situation, condition: Condition) -> str:
    sign, word = WORDS[condition.level]
    action = f"<p>{'To do: ' if condition.level else ''}{_code(condition.action)}</p>\n" if condition.action else ""
    others = "".join(f"<li>{escape(other.text)} {_code(other.action)}</li>\n" for other in condition.others)
    at = jakarta.iso(situation.now.at, milliseconds=False)
    return (
        f'<section class="headline {condition.level.name.lower()}">\n'
        f'<p class="word"><span aria-hidden="true">{sign}</span> {word}</p>\n'
        f"<h2>{escape(condition.text)}</h2>\n{action}"
        + (f"<ul>\n{others}</ul>\n" if others else "")
        + f'<p class="when">As of <time datetime="{at}">{at[11:19]} (+07:00)</time>.</p>\n</section>\n'
    )


def _code(action: str) -> str:
    """Commands stand out, so that they can be found and copied."""
    html = escape(action)
    for command in COMMANDS:
        html = html.replace(command, f"<code>{command}</code>")
    return html


COMMANDS: Final = (
    "qris-expire check",
    "qris-expire dead list",
    "qris-expire dead redrive",
    "qris-expire fleet limit",
    "qris-expire fleet resume",
    "rabbitmq-diagnostics alarms",
    "rabbitmq-queues quorum_status QUEUE",
)


def _card(title: str, *parts: str) -> str:
    return f'<section class="card">\n<h2>{escape(title)}</h2>\n{"".join(parts)}</section>\n'


def _lanes(situation: Situation) -> str:
    now, change = situation.now, situation.change
    lanes = list(now.by("lane", "commands_total"))

    def counts(name: str) -> list[Cell | str]:
        return [number(now.value(name, lane=lane)) for lane in lanes]

    def times(name: str, share: float) -> list[Cell | str]:
        return [_quantile(change, name, share, lane=lane) for lane in lanes]

    rows: list[TableRow] = [
        ("outcomes per second", [_rate(change, "outcomes_total", lane=lane) for lane in lanes]),
        ("waiting in the queue", counts("commands_waiting")),
        ("in flight", counts("in_flight")),
    ]
    if now.knows("oldest_command_timestamp_seconds"):
        rows.append(("oldest in hand", [_oldest(situation, lane) for lane in lanes]))
    rows += [
        ("age, p50", times("command_age_seconds", 0.5)),
        ("age, p95", times("command_age_seconds", 0.95)),
        ("duration, p50", times("command_duration_seconds", 0.5)),
        ("duration, p95", times("command_duration_seconds", 0.95)),
        ("received", counts("commands_total")),
        ("without a timestamp", counts("commands_undated_total")),
        ("outcomes", counts("outcomes_total")),
        ("delayed rounds", counts("delayed_retries_total")),
    ]
    senders = now.value("senders")
    note = f"Of {plural(senders, 'sender')} in all." if senders else ""
    return _card(
        "Lanes",
        table(f"Times {_lately(change)}, counts since the start. {note}".strip(), ["", *lanes], rows),
        _note(
            "Waiting: as the broker said some seconds ago. Age: from publication to outcome, without a timestamp from "
            "the first delivery. Duration: from delivery to ack."
        ),
    )


def _fleet(situation: Situation) -> str:
    now, change = situation.now, situation.change
    limit, sick = now.value("rate_limit"), now.value("member_sick")
    calls = situation.members * change.rate("gateway_requests_total", operation="expire") if change else None
    throttled = situation.throttled if change and change.value("gateway_requests_total", operation="expire") else None
    paused = bool(now.value("consumption_paused", reason="operator"))
    several = len(situation.processes) > 1
    rows: list[TableRow] = [
        ("members", [number(now.value("fleet_members"))]),
        ("leader", ["here" if now.value("fleet_leader") else "another member"]),
        ("rate limit", [f"{limit:g}/s" if limit else "none"]),
        ("calls per second of the fleet", [rate(calls)]),
        ("wait for the limit, p95", [_quantile(change, "rate_wait_seconds", 0.95)]),
        ("throttled answers", [Cell(NO_VALUE if throttled is None else share(throttled, 1), bad=bool(throttled))]),
        ("paused by an operator", [Cell("yes" if paused else "no", bad=paused)]),
        (
            "sick here" if several else "sick",
            [Cell(number(sick) if several else "yes" if sick else "no", bad=bool(sick))],
        ),
    ]
    return _card(
        "The fleet",
        table("", [], rows),
        _note("Calls of the fleet: those of this page times its members. Exactly: <code>qris-expire fleet</code>"),
    )


def _oldest(situation: Situation, lane: str) -> str:
    at = situation.now.value("oldest_command_timestamp_seconds", lane=lane)
    return duration(max(situation.now.at - at, 0.0)) if at else NO_VALUE


def _outcomes(situation: Situation) -> str:
    last = situation.now.value("last_outcome_timestamp_seconds")
    said = f"The last one {duration(max(situation.now.at - last, 0.0))} ago." if last else "None yet."
    rows = [(f"{_status(reason)}: {reason}", cells) for reason, cells in _by_reason(situation, "outcomes_total")]
    return _card("Outcomes by reason", table(said, _since(situation), rows) if rows else _note(said))


def _status(reason: str) -> str:
    try:
        return str(STATUS_OF[Reason(reason)])
    except ValueError:
        return "other"


def _gateway(situation: Situation) -> str:
    now, change = situation.now, situation.change
    operations = list(now.by("operation", "gateway_request_duration_seconds_count"))
    name = "gateway_request_duration_seconds"
    speed: list[TableRow] = [
        ("calls per second", [_rate(change, f"{name}_count", operation=operation) for operation in operations]),
        *(
            (words, [_quantile(change, name, share, operation=operation) for operation in operations])
            for words, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
        ),
    ]
    return _card(
        "Gateway",
        table(f"Calls {_lately(change)}", ["", *operations], speed),
        _answers(situation),
        _retries(situation),
    )


def _answers(situation: Situation) -> str:
    rows, name = list[TableRow](), "gateway_requests_total"
    for operation in situation.now.by("operation", name):
        gains = situation.change.by("response_code", name, operation=operation) if situation.change else None
        for code, total in situation.now.by("response_code", name, operation=operation).items():
            if total:
                kind, lately = kind_of(code), NO_VALUE if gains is None else number(gains[code])
                bad = kind is not None and kind.bad and bool(gains and gains[code])
                label = "no code" if code == NO_ANSWER else code
                means = Cell(kind.label.replace("_", " ") if kind else NO_VALUE, text=True)
                rows.append((f"{operation} {label}", [means, Cell(lately, bad=bad), number(total)]))
    if not rows:
        return _note("No answers yet.")
    first, *others = _since(situation)
    return table("Answers by response code", [first, "means", *others], rows)


def _retries(situation: Situation) -> str:
    rows = _by_reason(situation, "retries_total")
    return table("Calls sent again, by cause", _since(situation), rows) if rows else ""


def _holds(situation: Situation) -> str:
    now = situation.now
    breakers = {lane: ("closed", "half-open", "open")[int(at)] for lane, at in now.by("lane", "breaker_state").items()}
    pauses = [PAUSES.get(reason, reason) for reason, on in now.by("reason", "consumption_paused").items() if on]
    connected = bool(now.value("broker_connected"))
    expiry = now.value("token_expiry_timestamp_seconds")
    left = expiry - now.at
    skew = now.value("clock_skew_seconds")
    refreshes = now.by("result", "token_refreshes_total")
    token = "none" if not expiry else f"good for {duration(left)}" if left > 0 else f"ended {duration(-left)} ago"
    rows: list[TableRow] = [
        *((f"breaker, {lane}", [Cell(state, bad=state != "closed")]) for lane, state in breakers.items()),
        ("consumption", [Cell(f"paused: {', '.join(pauses)}" if pauses else "goes on", bad=bool(pauses))]),
        ("broker", [Cell("connected" if connected else "not connected", bad=not connected)]),
        ("reconnects", [number(now.value("broker_reconnects_total"))]),
        ("unconfirmed publishes", [number(now.value("publishes_unconfirmed"))]),
        ("confirms, p95", [_quantile(situation.change, "publish_confirm_seconds", 0.95)]),
        ("access token", [Cell(token, bad=bool(expiry) and left <= 0)]),
        ("tokens received", [", ".join(f"{number(n)} {result}" for result, n in refreshes.items() if n) or "0"]),
        ("clock skew", [f"{skew:+.1f} s" if abs(skew) >= 0.05 else "none"]),
    ]
    return _card("Breakers, broker, token", table("", [], rows))


def _dead_letters(situation: Situation) -> str:
    rows = _by_reason(situation, "dead_letters_total", bad=True)
    if not rows:
        return _card("Dead letters", _note("None since the start."))
    which = _note(_code("Which are still there: qris-expire dead list"))
    return _card("Dead letters", table("Parked for people", _since(situation), rows), which)


def _by_reason(situation: Situation, name: str, *, bad: bool = False) -> list[TableRow]:
    """What was counted of each reason lately (marked if it is ``bad``) and since the start; only what there was."""
    gains = situation.change.by("reason", name) if situation.change else {}
    return [
        (
            reason,
            [
                Cell(number(gains[reason]) if reason in gains else NO_VALUE, bad=bad and bool(gains.get(reason))),
                number(total),
            ],
        )
        for reason, total in situation.now.by("reason", name).items()
        if total
    ]


def _processes(situation: Situation) -> str:
    now = situation.now
    versions = [version for version, on in now.by("version", "build_info").items() if on]
    rows: list[TableRow] = [
        ("version", [", ".join(versions) or NO_VALUE]),
        ("up for", [duration(situation.age) if now.value("start_timestamp_seconds") else NO_VALUE]),
    ]
    if now.knows("processes_running"):
        running, wanted = now.value("processes_running"), len(situation.processes)
        rows += [
            ("processes", [Cell(f"{number(running)} of {wanted}", bad=running < wanted)]),
            ("started again", [number(now.value("process_restarts_total"))]),
            *((process.name, [_state(process.components)]) for process in situation.processes),
        ]
    return _card("Process" if len(situation.processes) == 1 else "Processes", table("", [], rows))


def _state(components: Mapping[str, str]) -> Cell:
    wrong = [f"{name}: {state}" for name, state in components.items() if state != "ok"]
    return Cell("; ".join(wrong) or "ok", bad=bool(wrong), text=bool(wrong))


def _footer() -> str:
    links = "".join(f'<a href="{path}">{path}</a>\n' for path in ("metrics", "readyz", "livez"))
    return (
        "<footer>\n<p>Counts begin at the start of the process. This page shows neither bills nor merchants.</p>\n"
        f'<nav aria-label="Also here">\n{links}</nav>\n</footer>\n'
    )


def _lately(change: Change | None) -> str:
    return f"last {duration(change.seconds)}" if change else "lately"


def _since(situation: Situation) -> list[str]:
    """The headings of counts."""
    return ["", _lately(situation.change), "since the start"]


def _note(html: str) -> str:
    return f'<p class="none">{html}</p>\n'


def _rate(change: Change | None, name: str, **labels: str) -> str:
    return rate(change.rate(name, **labels) if change else None)


def _quantile(change: Change | None, name: str, share: float, **labels: str) -> str:
    histogram = change.histogram(name, **labels) if change else Histogram()
    bounds = [bound for bound, _ in histogram.buckets]
    return quantile(histogram.quantile(share), bounds[-2] if len(bounds) > 1 else 0.0)
