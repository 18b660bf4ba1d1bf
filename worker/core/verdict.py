"""The judgement of one attempt: one table of data, read top to bottom, the first row that matches wins."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from worker.core.outcome import Reason

MAX_MESSAGE: Final = 200  # the gateway's text travels in outcomes, logs and headers


class Kind(Enum):
    """What the worker does about an answer.

    ``final``: the command is finished, and the gateway works for us (it resets the breaker's count).
    ``bad``: the breaker counts it.
    """

    DONE = ("done", True, False)
    REFUSED = ("refused", True, False)
    TOKEN = ("token", False, False)
    ID_CLASH = ("id_clash", False, False)
    THROTTLED = ("throttled", False, False)
    LATER = ("later", False, False)
    TRANSIENT = ("transient", False, True)
    SYSTEMIC = ("systemic", False, True)

    def __init__(self, label: str, final: bool, bad: bool) -> None:
        # Plain attributes: a set of members would hash one at every look, which costs more than the look.
        self.label = label
        self.final = final
        self.bad = bad


class Reply(NamedTuple):
    """The gateway answered: HTTP status, body (bounded by the shell), and the one header that matters."""

    status: int
    body: bytes
    retry_after: str | None = None


class NoReply(NamedTuple):
    """It did not. ``sent`` says whether it may have seen the request; ``error`` is for people."""

    sent: bool
    error: str


class Verdict(NamedTuple):
    """The judgement. ``reason`` is set for final kinds only; ``note`` is worth a log line when not empty."""

    kind: Kind
    reason: Reason | None
    effect_unknown: bool
    code: str | None
    message: str
    note: str = ""
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: patterns over ``responseCode`` and ``responseMessage`` → what it means.

    ``codes``, ``phrases`` and ``means`` are the row in words, for people.
    """

    code: re.Pattern[str]
    message: re.Pattern[str]
    kind: Kind
    reason: Reason | None
    effect_unknown: bool
    codes: tuple[str, ...]
    phrases: tuple[str, ...]
    means: str


def _rule(
    codes: str, kind: Kind, reason: Reason | None = None, *, means: str, says: str = "", effect_unknown: bool = False
) -> Rule:
    """``codes``: separated by blanks, x for any digit, * for anything. ``says``: words of the message; | is or."""
    numbers, phrases = tuple(codes.split()), tuple(filter(None, says.split("|")))
    code = re.compile("|".join(numbers).replace("x", ".").replace("*", ".*"))
    message = re.compile("|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in phrases), re.IGNORECASE)
    return Rule(code, message, kind, reason, effect_unknown, numbers, phrases, means)


# It also needs HTTP 2xx.
SUCCESS: Final = _rule("2009300 2009100", Kind.DONE, Reason.SUCCESS, means="the code is dead")

# gateway-api section 4, for answers with a well-formed code. `xx` stands for any service where the SNAP standard
# defines the case; codes of the provider's own document are spelled out.
RULES: Final = (
    _rule("403xx00 404xx04 404xx19", Kind.DONE, Reason.ALREADY_EXPIRED, means="it was expired or cancelled before"),
    _rule("404xx14", Kind.REFUSED, Reason.PAID, means="the bill is paid"),
    _rule("400xx00", Kind.REFUSED, Reason.BAD_REQUEST, means="it does not understand the request"),
    _rule("400xx01 400xx02", Kind.REFUSED, Reason.INVALID_FIELD, means="a field is wrong or missing"),
    _rule("4049308", Kind.REFUSED, Reason.INVALID_MERCHANT, means="no such merchant"),
    _rule("4039319", Kind.REFUSED, Reason.MERCHANT_BLACKLISTED, means="the merchant is blocked"),
    # One code, two meanings in the provider's document: the message decides.
    _rule("4049301", Kind.REFUSED, Reason.NOT_FOUND, says="not found", means="no such bill"),
    _rule("4049301", Kind.SYSTEMIC, says="bad request", means="a header of ours is wrong or missing"),
    _rule("4049301", Kind.REFUSED, Reason.NOT_FOUND, means="no such bill"),
    _rule(
        "4049300",
        Kind.SYSTEMIC,
        says="unauthorised|unauthorized|forbidden",
        means="we may not use this service",
    ),
    _rule("401xx01 401xx03", Kind.TOKEN, means="our access token is not good any more"),
    _rule("401xxxx", Kind.TOKEN, says="token", means="our access token is not good any more"),
    _rule("401xx00", Kind.SYSTEMIC, means="our signature or our client id is refused"),
    _rule("4099300 4099100", Kind.ID_CLASH, means="this external id was used today"),
    _rule("403xx06", Kind.LATER, means="the gateway does not do this at this time"),
    _rule("429xxxx 403xx04", Kind.THROTTLED, means="too many requests"),
    _rule("4xxxxxx", Kind.REFUSED, Reason.REFUSED, means="refused in a way that nobody has described"),
    # 202xx00, 3xx, an odd 2xx, every 5xx.
    _rule("xxxxxxx", Kind.TRANSIENT, effect_unknown=True, means="it failed, and nobody says what happened"),
)

# The same for answers without a well-formed code, by HTTP status; the message is then the body's own text.
BARE_RULES: Final = (
    _rule("401", Kind.TOKEN, says="token", means="our access token is not good any more"),
    _rule("401 403", Kind.SYSTEMIC, means="somebody before the gateway refuses us"),
    _rule("429", Kind.THROTTLED, means="too many requests"),
    # A status below 100 too: the HTTP parser lets "099" pass.
    _rule("*", Kind.TRANSIENT, effect_unknown=True, means="it failed, and nobody says what happened"),
)

_WELL_FORMED = re.compile(r"[2-5]\d{6}\Z", re.ASCII)


def judge(answer: Reply | NoReply) -> Verdict:
    """The verdict on one attempt. A success needs HTTP 2xx *and* a success code; otherwise the code is trusted."""
    if isinstance(answer, NoReply):
        return Verdict(Kind.TRANSIENT, None, answer.sent, None, answer.error[:MAX_MESSAGE])
    code, message = read(answer.body)
    if code is None:
        return _first(BARE_RULES, str(answer.status), None, message or _excerpt(answer.body), answer)
    if SUCCESS.code.fullmatch(code):
        if 200 <= answer.status < 300:
            note = "answered for service 91" if code == "2009100" else ""
            return Verdict(SUCCESS.kind, SUCCESS.reason, False, code, message, note)
        note = f"success code in HTTP {answer.status}"
        return Verdict(Kind.TRANSIENT, None, True, code, message, note)
    return _first(RULES, code, code, message, answer)


def read(body: bytes) -> tuple[str | None, str]:
    """``responseCode`` (7 digits, an integer is tolerated; else None) and ``responseMessage`` of an answer's body."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None, ""
    if not isinstance(value, dict):
        return None, ""
    code, message = value.get("responseCode"), value.get("responseMessage")
    if isinstance(code, int) and not isinstance(code, bool):
        code = str(code) if 0 <= code < 10**7 else None
    if not (isinstance(code, str) and _WELL_FORMED.match(code)):
        code = None
    return code, printable(message)[:MAX_MESSAGE] if isinstance(message, str) else ""


def printable(text: str) -> str:
    """``text`` on one line: what is not printable becomes a blank, so that it can stand in headers and logs."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _first(rules: tuple[Rule, ...], key: str, code: str | None, message: str, reply: Reply) -> Verdict:
    rule = next(rule for rule in rules if rule.code.fullmatch(key) and rule.message.search(message))
    return Verdict(
        rule.kind, rule.reason, rule.effect_unknown, code, message, _note(code, reply.status), reply.retry_after
    )


def _note(code: str | None, status: int) -> str:
    if code is None:
        return ""
    if not code.startswith(str(status)):
        return f"HTTP {status} disagrees with the code"
    return "" if code[3:5] in ("93", "91") else f"answered for service {code[3:5]}"


def _excerpt(body: bytes) -> str:
    text = printable(body[: 4 * MAX_MESSAGE].decode("utf-8", "replace"))
    return " ".join(text.split())[:MAX_MESSAGE]
