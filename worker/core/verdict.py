"""The judgement of one attempt: one table of data, read top to bottom; the first row that matches wins.

To teach the worker a code, add it to its row here (``known``), or add a row. The label values of the metrics, the
simulator's messages and what `check` makes of an answer follow from this table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Any, Final, NamedTuple

import orjson

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
    LATER = ("later", False, False)  # ends the round: asking again at once would be answered in the same way
    TRANSIENT = ("transient", False, True)
    SYSTEMIC = ("systemic", False, True)

    def __init__(self, label: str, final: bool, bad: bool) -> None:
        # Plain attributes: a set of members would hash one at every look, which costs more than the look.
        self.label = label
        self.final = final
        self.bad = bad


class Reply(NamedTuple):
    """The gateway answered: HTTP status, body (bounded and decoded by the shell), and the two headers that matter.
    ``challenge`` is WWW-Authenticate."""

    status: int
    body: bytes
    retry_after: str | None = None
    challenge: str | None = None


class NoReply(NamedTuple):
    """It did not. ``sent`` says whether it may have seen the request; ``error`` is for people.

    ``starved``: this process had no descriptor for a connection, so there was no call at all. ``late``: nor was there
    when the time of its permit was over before the request could be sent.
    """

    sent: bool
    error: str
    starved: bool = False
    late: bool = False


class Verdict(NamedTuple):
    """The judgement. ``reason`` is set for final kinds only; ``note`` is worth a log line when not empty.

    ``doubts_token``: the answer does not name the token, but a dead one may be the cause (see `judge`).
    """

    kind: Kind
    reason: Reason | None
    effect_unknown: bool
    code: str | None
    message: str
    note: str = ""
    retry_after: str | None = None
    doubts_token: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: patterns over ``responseCode`` and ``responseMessage`` → what it means.

    ``codes``, ``phrases`` and ``means`` are the row in words, for people. ``known``: codes that a gateway is known to
    send, each with the message of its document or of the SNAP standard. ``cure``: what the answer to an expire call
    says about our settings; ``fine``: that they are right.
    """

    code: re.Pattern[str]
    message: re.Pattern[str]
    kind: Kind
    reason: Reason | None
    effect_unknown: bool
    codes: tuple[str, ...]
    phrases: tuple[str, ...]
    means: str
    known: Mapping[str, str] = field(default_factory=dict)
    cure: str = ""
    fine: bool = False


def _rule(
    codes: str,
    kind: Kind,
    reason: Reason | None = None,
    *,
    means: str,
    says: str = "",
    effect_unknown: bool = False,
    known: Mapping[str, str] | None = None,
    cure: str = "",
    fine: bool = False,
) -> Rule:
    """``codes``: separated by blanks, x for any digit, * for anything. ``says``: words of the message; | is or."""
    numbers, phrases = tuple(codes.split()), tuple(filter(None, says.split("|")))
    code = re.compile("|".join(numbers).replace("x", ".").replace("*", ".*"))
    message = re.compile("|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in phrases), re.IGNORECASE)
    return Rule(code, message, kind, reason, effect_unknown, numbers, phrases, means, known or {}, cure, fine)


CURE_FORBIDDEN: Final = (
    "it knows us, but this client may not use this service: ask the provider to enable it for GATEWAY_CLIENT_ID"
)
CURE_THROTTLED: Final = (
    "too many requests just now: try again later, and set GATEWAY_MAX_REQUESTS_PER_SECOND for the worker"
)
CURE_THEIRS: Final = "it failed by itself, which says nothing about our settings: try again later"
CURE_TOKEN: Final = "it refuses the token that it just gave us: is GATEWAY_BASE_URL one system?"
CURE_SIGNATURE: Final = "it does not take our signature"
_CURE_FIELD: Final = "it refuses a field of our body: see GATEWAY_BILL_FIELD, and the merchant of the bill"

# It also needs HTTP 2xx.
SUCCESS: Final = _rule(
    "2009300 2009100",
    Kind.DONE,
    Reason.SUCCESS,
    means="the QR code is expired now",
    known={"2009300": "Successful", "2009100": "Successful"},
    cure="the bill is expired now; path, signature, channel and merchant are right",
    fine=True,
)

# gateway-api section 4, for answers with a well-formed code. `xx` stands for any service where the SNAP standard
# defines the case; codes of the provider's own document are spelled out. Service 93 expires, 91 is its sibling, 73 is
# the token service.
RULES: Final = (
    _rule(
        "403xx00 404xx04 404xx19",
        Kind.DONE,
        Reason.ALREADY_EXPIRED,
        means="it was expired or cancelled before",
        known={"4039300": "Transaction Expired", "4049304": "Transaction Cancelled", "4049319": "Bill Expired"},
        cure="the bill had expired before; all our settings are right",
        fine=True,
    ),
    _rule(
        "404xx14",
        Kind.REFUSED,
        Reason.PAID,
        means="the bill is paid",
        known={"4049314": "Paid Bill"},
        cure="the bill is paid; all our settings are right",
        fine=True,
    ),
    _rule(
        "400xx00",
        Kind.REFUSED,
        Reason.BAD_REQUEST,
        means="the gateway does not understand the request",
        known={"4009300": "Bad Request", "4007300": "Bad Request"},
        cure="it does not understand the request: ask the provider what it misses in it",
    ),
    _rule(
        "400xx01 400xx02",
        Kind.REFUSED,
        Reason.INVALID_FIELD,
        means="a field is wrong or missing",
        known={
            "4009301": "Invalid field format billnumber",
            "4009302": "Invalid mandatory field billnumber",
            "4007301": "Invalid field format X-TIMESTAMP",
            "4007302": "Invalid mandatory field X-CLIENT-KEY",
        },
        cure=_CURE_FIELD,
    ),
    _rule(
        "4049308",
        Kind.REFUSED,
        Reason.INVALID_MERCHANT,
        means="the gateway does not know the merchant",
        known={"4049308": "Invalid Merchant"},
        cure="the merchant is none of this client's: correct GATEWAY_MERCHANT_ID (or --merchant-id)",
    ),
    _rule(
        "4039319",
        Kind.REFUSED,
        Reason.MERCHANT_BLACKLISTED,
        means="the merchant is blocked",
        known={"4039319": "Merchant Blacklisted"},
        cure="the merchant is blacklisted: talk to the provider; our settings are right",
    ),
    # One code, two meanings in the provider's document: the message decides.
    _rule(
        "4049301",
        Kind.REFUSED,
        Reason.NOT_FOUND,
        says="not found",
        means="the gateway does not know the bill",
        known={"4049301": "QR not Found"},
        cure="it does not know the bill; path, signature and channel are right",
        fine=True,
    ),
    _rule(
        "4049301",
        Kind.SYSTEMIC,
        says="bad request",
        means="one of our headers is wrong or missing",
        cure="a header is wrong or missing: correct GATEWAY_CHANNEL_ID first, then GATEWAY_CHANNEL_HEADERS, then "
        "GATEWAY_TIMESTAMP_MILLISECONDS",
    ),
    _rule(
        "4049301",
        Kind.REFUSED,
        Reason.NOT_FOUND,
        means="the gateway does not know the bill",
        cure="it does not know the bill; path, signature and channel are right",
        fine=True,
    ),
    _rule(
        "4049300",
        Kind.SYSTEMIC,
        says="unauthorised|unauthorized|forbidden",
        means="we may not use this service",
        known={"4049300": "Unauthorized. Client Forbidden Access API"},
        cure=CURE_FORBIDDEN,
    ),
    _rule(
        "401xx01 401xx03",
        Kind.TOKEN,
        means="our access token is not valid any more",
        known={"4019301": "Access Token Invalid", "4019303": "Token Not Found", "4017301": "Access Token Invalid"},
        cure=CURE_TOKEN,
    ),
    _rule("401xxxx", Kind.TOKEN, says="token", means="our access token is not valid any more", cure=CURE_TOKEN),
    _rule(
        "401xx00",
        Kind.SYSTEMIC,
        means="our signature or our client id is refused, or the access token is not valid any more",
        known={"4019300": "Unauthorized. Invalid Signature", "4017300": "Unauthorized. Invalid Signature"},
        cure=CURE_SIGNATURE,
    ),
    _rule(
        "4099300 4099100",
        Kind.ID_CLASH,
        means="this external id was used today",
        known={
            "4099300": "Cannot use same X-EXTERNAL-ID in same day",
            "4099100": "Cannot use same X-EXTERNAL-ID in same day",
        },
        cure="the X-EXTERNAL-ID was used today: try again; every call has a new one",
    ),
    _rule(
        "429xxxx 403xx04",
        Kind.THROTTLED,
        means="too many requests",
        known={"4299300": "Too Many Requests", "4039304": "Exceeds Transaction Limit", "4297300": "Too Many Requests"},
        cure=CURE_THROTTLED,
    ),
    _rule(
        "403xx06",
        Kind.LATER,
        means="it is not allowed at this time of day",
        known={"4039306": "Feature Not Allowed At This Time"},
        cure="it takes no such call at this time of day: try again later, and ask the provider for its hours",
    ),
    _rule(
        "4xxxxxx",
        Kind.REFUSED,
        Reason.REFUSED,
        means="refused with a code that is not documented",
        cure="it refuses the call: ask the provider what the code means for this client",
    ),
    # 202xx00, 3xx, an odd 2xx, every 5xx.
    _rule(
        "xxxxxxx",
        Kind.TRANSIENT,
        effect_unknown=True,
        means="it failed, and the effect is unknown",
        known={
            "2029300": "Request In Progress",
            "5009300": "General Error",
            "5049300": "Timeout",
            "5007300": "General Error",
        },
        cure=CURE_THEIRS,
    ),
)

# The same for answers without a well-formed code, by HTTP status; the message is then the body's own text.
BARE_RULES: Final = (
    _rule("401", Kind.TOKEN, says="token", means="our access token is not valid any more"),
    _rule("401 403", Kind.SYSTEMIC, means="something before the gateway refuses us"),
    _rule("429", Kind.THROTTLED, means="too many requests"),
    _rule("*", Kind.TRANSIENT, effect_unknown=True, means="it failed, and the effect is unknown"),
)

TOKEN_GRANTED: Final = "2007300"
"""What a token service answers with a token. It is no verdict on an expire call, so it has no row."""

KNOWN: Final[Mapping[str, str]] = {
    **{code: message for rule in (SUCCESS, *RULES) for code, message in rule.known.items()},
    TOKEN_GRANTED: "Successful",
}
"""Every code that a gateway is known to send, with its message."""

_WELL_FORMED: Final = re.compile(r"[2-5]\d{6}\Z", re.ASCII)
_INVALID_TOKEN: Final = re.compile(r"(?:^|[\s,;])error\s*=\s*[\"']?invalid_token(?![\w-])", re.IGNORECASE)


@lru_cache(maxsize=32)  # a gateway answers nearly all calls in the same few words
def judge(answer: Reply | NoReply) -> Verdict:
    """The verdict on one attempt. A success needs HTTP 2xx *and* a success code; otherwise the code is trusted.

    A WWW-Authenticate header with ``error="invalid_token"`` (RFC 6750) is a token answer, whatever else the answer
    says but success. Any other systemic refusal by 401 or 403 leaves the token in doubt: what is in front of a
    gateway answers a dead token without a word of it (gateway-api, section 4).
    """
    if isinstance(answer, NoReply):
        return Verdict(Kind.TRANSIENT, None, answer.sent, None, answer.error[:MAX_MESSAGE])
    code, message = read(answer.body)
    succeeded = code in SUCCESS.codes
    if succeeded and 200 <= answer.status < 300:
        note = "answered for service 91" if code == "2009100" else ""
        return Verdict(SUCCESS.kind, SUCCESS.reason, False, code, message, note)
    if answer.challenge is not None and _INVALID_TOKEN.search(answer.challenge):
        said = message or _excerpt(answer.body) or "invalid_token"
        return Verdict(Kind.TOKEN, None, False, code, said, _note(code, answer.status))
    if code is None:
        return _first(BARE_RULES, str(answer.status), None, message or _excerpt(answer.body), answer)
    if succeeded:
        return Verdict(Kind.TRANSIENT, None, True, code, message, f"success code in HTTP {answer.status}")
    return _first(RULES, code, code, message, answer)


def rule_for(code: str, message: str) -> Rule:
    """The row that a well-formed code and its message belong to, whatever the HTTP status."""
    return next(rule for rule in (SUCCESS, *RULES) if rule.code.fullmatch(code) and rule.message.search(message))


def read(body: bytes) -> tuple[str | None, str]:
    """``responseCode`` (7 digits, an integer is tolerated; else None) and ``responseMessage`` of an answer's body."""
    value = json_object(body)
    if value is None:
        return None, ""
    code, message = value.get("responseCode"), value.get("responseMessage")
    if isinstance(code, int) and not isinstance(code, bool):
        code = str(code) if 0 <= code < 10**7 else None
    if not (isinstance(code, str) and _WELL_FORMED.match(code)):
        code = None
    return code, printable(message)[:MAX_MESSAGE] if isinstance(message, str) else ""


def json_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object that the whole body is, else None.

    Read leniently, since the code counts and not the text around it: bytes that are not in the encoding are replaced,
    raw control characters in strings are accepted, and so are backslashes that escape nothing and NULs around the
    object. An object that gives its code twice is none.
    """
    # An answer with two codes says two things, and orjson would take the last. A name may be written with escapes, too.
    if body.count(b"responseCode") < 2 and b"\\u00" not in body:
        with suppress(ValueError):
            value = orjson.loads(body)
            return value if isinstance(value, dict) else None
    text = body.decode(json.detect_encoding(body), "replace")
    try:
        value = _decode(text)
    except RecursionError:
        return None
    except ValueError:
        try:
            value = _decode(_ESCAPE.sub(_escaped, text).strip("\0 \t\r\n"))
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


_ESCAPE: Final = re.compile(r"\\(?:[\"\\/bfnrt]|u[0-9A-Fa-f]{4})|\\")


def _escaped(found: re.Match[str]) -> str:
    """An escape as it is; a backslash that begins none, as a backslash."""
    return "\\\\" if found[0] == "\\" else found[0]


def _one_code(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if [name for name, _ in pairs].count("responseCode") > 1:
        raise ValueError("two codes in one object")
    return dict(pairs)


_decode: Final = json.JSONDecoder(strict=False, object_pairs_hook=_one_code).decode


def printable(text: str) -> str:
    """``text`` on one line: what is not printable becomes a blank, so that headers and logs can hold it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _first(rules: tuple[Rule, ...], key: str, code: str | None, message: str, reply: Reply) -> Verdict:
    rule = next(rule for rule in rules if rule.code.fullmatch(key) and rule.message.search(message))
    doubts = rule.kind is Kind.SYSTEMIC and (key[:3] in _UNAUTHORIZED or str(reply.status) in _UNAUTHORIZED)
    return Verdict(
        rule.kind,
        rule.reason,
        rule.effect_unknown,
        code,
        message,
        _note(code, reply.status),
        reply.retry_after,
        doubts,
    )


_UNAUTHORIZED: Final = ("401", "403")


def _note(code: str | None, status: int) -> str:
    if code is None:
        return ""
    if not code.startswith(str(status)):
        return f"HTTP {status} disagrees with the code"
    return "" if code[3:5] in ("93", "91") else f"answered for service {code[3:5]}"


def _excerpt(body: bytes) -> str:
    text = printable(body[: 4 * MAX_MESSAGE].decode("utf-8", "replace"))
    return " ".join(text.split())[:MAX_MESSAGE]
