"""What an answer says about our settings: the mistakes of a partner's first day, told apart, with what to change.

Tables as in `verdict`, read top to bottom; but where a verdict says what to do with the command, a finding says what to
do with the set-up. Sources: gateway-api, sections 2 (what providers contradict themselves in), 4 (codes) and 5 (what
goes wrong for integrators).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, get_args
from urllib.parse import urlsplit

from worker.core.signing import Scheme
from worker.core.verdict import MAX_MESSAGE, Kind, NoReply, Reply, judge, printable, read

SKEW_WORTH_A_WARNING: Final = 30.0
SKEW_REFUSED: Final = 110.0
"""Seconds. Some providers allow two minutes; the Date header that we compare with tells no fractions."""


class Finding(NamedTuple):
    """One line for people, and whether our set-up is fine. ``cure``: the line without what was answered. ``signature``:
    it is refused. ``taken``: the call got past the check of its signature."""

    fine: bool
    text: str
    cure: str
    signature: bool = False
    taken: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """What was called: its URL, and the settings that lead there. ``skew``: seconds our clock is ahead, if known."""

    url: str
    path_setting: str
    skew: float | None = None


class Way(NamedTuple):
    """A way to sign expire calls."""

    sign_path: str
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class _Sign:
    """One row: patterns over code and message → what it is a sign of."""

    code: str
    message: str
    text: str
    fine: bool = False
    signature: bool = False


_TAKEN: Final = (Kind.DONE, Kind.REFUSED, Kind.ID_CLASH)

_CLOCK: Final = "it does not take the time in X-TIMESTAMP: set this machine's clock by NTP (no setting can mend it)"
_CLIENT: Final = (
    "it does not know this client: correct GATEWAY_CLIENT_ID, or GATEWAY_BASE_URL (test and production know different "
    "ones)"
)
_FORBIDDEN: Final = (
    "it knows us, but this client may not use this service: ask the provider to enable it for GATEWAY_CLIENT_ID"
)
_THROTTLED: Final = (
    "too many requests just now: try again later, and set GATEWAY_MAX_REQUESTS_PER_SECOND for the worker"
)
_THEIRS: Final = "it failed by itself, which says nothing about our settings: try again later"

_OF_TOKENS: Final = (
    _Sign(r"401....", r"time ?stamp|clock", _CLOCK),
    _Sign(r"400....", r"time ?stamp", "it wants X-TIMESTAMP in another form: change GATEWAY_TIMESTAMP_MILLISECONDS"),
    _Sign(r"40[134]....", r"forbidden|not allowed|not authori[sz]ed|access", _FORBIDDEN),
    _Sign(r"40[01]....", r"client", _CLIENT),
    _Sign(
        r"401....",
        r"signature",
        "GATEWAY_PRIVATE_KEY_FILE is not the key whose public half the provider has for GATEWAY_CLIENT_ID: give it the "
        "public half of this one (openssl pkey -in KEY -pubout), or use the right file",
    ),
    _Sign(r"429....|403..04", r"", _THROTTLED),
    _Sign(r"5......", r"", _THEIRS),
    _Sign(r".......", r"", "it gives us no token: see GATEWAY_CLIENT_ID, GATEWAY_PRIVATE_KEY_FILE and the clock"),
)

_OF_EXPIRES: Final = (
    _Sign(r"200(93|91)00", r"", "the bill is expired now; path, signature, channel and merchant are right", fine=True),
    _Sign(r"403..00|404..04|404..19", r"", "the bill had expired before; all our settings are right", fine=True),
    _Sign(r"404..14", r"", "the bill is paid; all our settings are right", fine=True),
    _Sign(
        r"4049308",
        r"",
        "the merchant is none of this client's: correct GATEWAY_MERCHANT_ID (or --merchant-id)",
    ),
    _Sign(r"4039319", r"", "the merchant is blacklisted: talk to the provider; our settings are right"),
    _Sign(
        r"4049301",
        r"bad\s+request",
        "a header is wrong or missing: correct GATEWAY_CHANNEL_ID first, then GATEWAY_CHANNEL_HEADERS, then "
        "GATEWAY_TIMESTAMP_MILLISECONDS",
    ),
    _Sign(r"4049301", r"", "it does not know the bill; path, signature and channel are right", fine=True),
    _Sign(r"4049300", r"unauthori[sz]ed|forbidden", _FORBIDDEN),
    _Sign(r"40[134]....", r"forbidden|not allowed", _FORBIDDEN),
    _Sign(
        r"401..0[13]|401....", r"token", "it refuses the token that it just gave us: is GATEWAY_BASE_URL one system?"
    ),
    _Sign(r"401....", r"time ?stamp|clock", _CLOCK),
    _Sign(r"401....", r"client|partner", _CLIENT),
    _Sign(r"401..00", r"", "it does not take our signature", signature=True),
    _Sign(r"400....", r"time ?stamp", "it wants X-TIMESTAMP in another form: change GATEWAY_TIMESTAMP_MILLISECONDS"),
    _Sign(
        r"400..0[12]",
        r"bill",
        "it does not find the bill in our body, or not in this form: change GATEWAY_BILL_FIELD (to billNumber, say)",
    ),
    _Sign(r"400..0[12]", r"merchant", "the merchant has a wrong form: correct GATEWAY_MERCHANT_ID (or --merchant-id)"),
    _Sign(r"400..0[12]", r"channel", "correct GATEWAY_CHANNEL_ID, then GATEWAY_CHANNEL_HEADERS"),
    _Sign(r"409....", r"", "the X-EXTERNAL-ID was used today: try again; every call has a new one"),
    _Sign(r"429....|403..04", r"", _THROTTLED),
    _Sign(r"[25]......", r"", _THEIRS),
    _Sign(r".......", r"", "it refuses the call: ask the provider what the code means for this client"),
)

_OF_PAGES: Final = (
    _Sign(
        r"403",
        r"",
        "a firewall in front of the gateway turns us away: have the outbound address of this machine put on the "
        "provider's IP allow-list",
    ),
    _Sign(r"400", r"https", "plain http is spoken to an https port: begin GATEWAY_BASE_URL with https://"),
    _Sign(
        r"40[45]",
        r"",
        "there is no such service: GATEWAY_BASE_URL must end with the version, as https://host/v1.0; else see "
        "{setting}",
    ),
    _Sign(r"407", r"", "the proxy wants a login: correct HTTPS_PROXY, or put the gateway into NO_PROXY"),
    _Sign(
        r"401", r"", "something in front of the gateway wants a login: correct GATEWAY_BASE_URL, or ask the provider"
    ),
    _Sign(r"429", r"", _THROTTLED),
    _Sign(r"3..", r"", "it is a redirect, which is not followed: set GATEWAY_BASE_URL to the API's own address"),
    _Sign(r"2..", r"", "this is not the gateway's API: correct GATEWAY_BASE_URL, then {setting}"),
    _Sign(r"5..", r"", _THEIRS),
    _Sign(r".*", r"", "this is no answer of the gateway's API: correct GATEWAY_BASE_URL, then {setting}"),
)

_OF_SILENCE: Final = (
    _Sign(
        r"not sent",
        r"hostname mismatch|IP address mismatch",
        "GATEWAY_BASE_URL has another host name than the certificate",
    ),
    _Sign(
        r"not sent",
        r"not trusted|certificate",
        "set GATEWAY_CA_FILE to the CA certificates that the gateway's is signed with",
    ),
    _Sign(
        r"not sent",
        r"\bTLS\b",
        "no TLS is spoken there: correct the port in GATEWAY_BASE_URL, or begin it with http://",
    ),
    _Sign(r"not sent", r"proxy", "correct HTTPS_PROXY, or put the gateway into NO_PROXY"),
    _Sign(r"not sent", r"refused", "nothing listens there: correct host and port in GATEWAY_BASE_URL"),
    _Sign(
        r"not sent",
        r"name|address associated|resolution",
        "the host name is not known here: correct GATEWAY_BASE_URL, or this machine's DNS",
    ),
    _Sign(
        r"not sent",
        r"timed out|unreachable|no route",
        "no way leads there: a firewall, or an IP allow-list that drops us; else correct GATEWAY_BASE_URL",
    ),
    _Sign(r"not sent", r"", "correct GATEWAY_BASE_URL"),
    _Sign(
        r"sent",
        r"no HTTP",
        "what answers speaks no HTTP: https:// instead of http:// in GATEWAY_BASE_URL, or another port",
    ),
    _Sign(
        r"sent",
        r"timed out",
        "it took the request and stays silent: try again; if it is that slow, raise GATEWAY_READ_TIMEOUT_SECONDS",
    ),
    _Sign(
        r"sent",
        r"",
        "it hung up: is it an https port that GATEWAY_BASE_URL calls by http, or a firewall? Else try again later",
    ),
)


def token(answer: Reply | NoReply, call: Call) -> Finding:
    """What the token service's answer is a sign of, where it was no token."""
    if isinstance(answer, Reply) and b"accessToken" in answer.body:
        text = f"HTTP {answer.status} without a usable token: ask the provider what accessToken should look like"
        return Finding(False, text, text)  # the body's own words could be the token
    return _found(answer, call, _OF_TOKENS)


def expire(answer: Reply | NoReply, call: Call) -> Finding:
    """What an expire call's answer is a sign of."""
    return _found(answer, call, _OF_EXPIRES)


def clock(skew: float) -> Finding:
    """How far our clock is off, in seconds ahead of the gateway's."""
    text = f"{skew:+.1f} s off the gateway's"
    if abs(skew) <= SKEW_WORTH_A_WARNING:
        return Finding(True, text, "")
    cure = "set this machine's clock by NTP, since some providers take no more than two minutes"
    return Finding(False, f"{text}: {cure}", cure)


def other_ways(way: Way, base_url: str, expire_path: str) -> Iterator[Way]:
    """Other ways to sign than ours, the likelier ones first: providers sign the path with the version or without, and
    call HMAC-SHA512 "asymmetric"."""
    paths = dict.fromkeys([way.sign_path, urlsplit(base_url).path.rstrip("/") + expire_path, expire_path])
    schemes: tuple[Scheme, ...] = get_args(Scheme)
    for scheme in sorted(schemes, key=lambda scheme: scheme != way.scheme):
        for path in paths:
            if (path, scheme) != way:
                yield Way(path, scheme)


def _found(answer: Reply | NoReply, call: Call, table: tuple[_Sign, ...]) -> Finding:
    if isinstance(answer, NoReply):
        key, message, said, table = ("sent" if answer.sent else "not sent"), answer.error, answer.error, _OF_SILENCE
    else:
        code, message = read(answer.body)
        if code is not None:
            key, said = code, f"{code} {message}".rstrip()
        else:
            key, message, table = str(answer.status), _text(answer), _OF_PAGES
            said = f"HTTP {answer.status} with {_kind(answer)}"
    row = next(row for row in table if re.fullmatch(row.code, key) and re.search(row.message, message, re.IGNORECASE))
    text = row.text.format(setting=call.path_setting)
    if row.fine and isinstance(answer, Reply) and judge(answer).reason is None:
        text = f"HTTP {answer.status} and its code contradict each other: ask the provider"
        return Finding(False, f"{text} ({said})", text)
    if row.signature or "signature" in message.lower():
        text = _signed_late(call) or text
    told = f"{text} ({said}, from {call.url})"
    return Finding(row.fine, told, text, row.signature and text == row.text, judge(answer).kind in _TAKEN)


def _signed_late(call: Call) -> str | None:
    """A clock that is off can be told as a wrong signature."""
    if call.skew is None or abs(call.skew) < SKEW_REFUSED:
        return None
    return f"our clock is {call.skew:+.0f} s off the gateway's: set it by NTP, then look again"


def _text(reply: Reply) -> str:
    return printable(reply.body[: 4 * MAX_MESSAGE].decode("utf-8", "replace"))


def _kind(reply: Reply) -> str:
    """What the body is, in a word or its own few."""
    text = " ".join(_text(reply).split())
    if not text:
        return "an empty body"
    if text.startswith("<"):
        title = re.search(r"<title>([^<]{1,60})", text, re.IGNORECASE)
        return f"an HTML page {title[1].strip()!r}" if title else "an HTML page"
    return f"no SNAP code: {text[:80]}"


def rows() -> Iterator[_Sign]:
    """Every row of every table."""
    for table in (_OF_TOKENS, _OF_EXPIRES, _OF_PAGES, _OF_SILENCE):
        yield from table
