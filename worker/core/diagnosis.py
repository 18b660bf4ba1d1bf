"""What an answer says about our settings: the mistakes of a partner's first day, one by one, with what to change.

Tables as in `verdict`, read top to bottom; but where a verdict says what to do with the command, a finding says what to
do with the set-up. Sources: gateway-api, sections 2 (what providers contradict themselves in), 4 (codes) and 5 (what
goes wrong for integrators).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, get_args
from urllib.parse import urlsplit

from worker.core.grant import said
from worker.core.scheme import Scheme
from worker.core.verdict import (
    CURE_FORBIDDEN,
    CURE_SIGNATURE,
    CURE_THEIRS,
    CURE_THROTTLED,
    MAX_MESSAGE,
    Kind,
    NoReply,
    Reply,
    json_object,
    judge,
    printable,
    read,
    rule_for,
)

CLOCK_ERROR: Final = "± 0.5 s"
SKEW_WORTH_A_WARNING: Final = 30.0
"""Seconds; some providers refuse signatures that are two minutes off."""
SKEW_REFUSED: Final = 110.0
"""Seconds. Some providers allow two minutes; the Date header that we compare with has no fractions."""


class Finding(NamedTuple):
    """One line for people, and whether our set-up is fine. ``cure``: the line without what was answered. ``signature``:
    it is refused. ``taken``: the call got past the check of its signature."""

    fine: bool
    text: str
    cure: str
    signature: bool = False
    taken: bool = False


@dataclass(frozen=True, slots=True)
class CalledService:
    """What was called: its URL, and the settings that lead there. ``skew``: seconds our clock is ahead, if known."""

    url: str
    path_setting: str
    skew: float | None = None


class Way(NamedTuple):
    """A way to sign expire calls."""

    sign_path: str
    scheme: Scheme


Table = Mapping[str, str]
"""Patterns over an answer's code (or status) and message, or over the error where there was no answer → what to do."""

_TAKEN: Final = (Kind.DONE, Kind.REFUSED, Kind.ID_CLASH)

_CLOCK: Final = "it does not take the time in X-TIMESTAMP: set this machine's clock by NTP (no setting can cure it)"
_CLIENT: Final = (
    "it does not know this client: correct GATEWAY_CLIENT_ID, or GATEWAY_BASE_URL (test and production know different "
    "ones)"
)
_TIMESTAMP: Final = "it wants X-TIMESTAMP in another form: change GATEWAY_TIMESTAMP_MILLISECONDS"

_OF_TOKENS: Final = {
    r"^401.... .*(?:time ?stamp|clock)": _CLOCK,
    r"^400.... .*time ?stamp": _TIMESTAMP,
    r"^40[134].... .*(?:forbidden|not allowed|not authori[sz]ed|access)": CURE_FORBIDDEN,
    r"^40[01].... .*client": _CLIENT,
    r"^401.... .*signature": "GATEWAY_PRIVATE_KEY_FILE is not the key whose public half the provider has for "
    "GATEWAY_CLIENT_ID: give it the public half of this one (openssl pkey -in KEY -pubout), or use the right file",
    r"^(?:429....|403..04)": CURE_THROTTLED,
    r"^5": CURE_THEIRS,
    r"": "it gives us no token: see GATEWAY_CLIENT_ID, GATEWAY_PRIVATE_KEY_FILE and the clock",
}

# What a message adds to its row of the verdict table, whose advice is used if none of these matches.
_OF_EXPIRES: Final = {
    r"^(?:401....|403(?!..06|9319)....|404(?!9301|9308)....) .*(?:forbidden|not allowed)": CURE_FORBIDDEN,
    r"^401.... .*(?:time ?stamp|clock)": _CLOCK,
    r"^401.... .*(?:client|partner)": _CLIENT,
    r"^400.... .*time ?stamp": _TIMESTAMP,
    r"^400..0[12] .*bill": "it does not find the bill in our body, or not in this form: change GATEWAY_BILL_FIELD (to "
    "billNumber, say)",
    r"^400..0[12] .*merchant": "the merchant has a wrong form: correct GATEWAY_MERCHANT_ID (or --merchant-id)",
    r"^400..0[12] .*channel": "correct GATEWAY_CHANNEL_ID, then GATEWAY_CHANNEL_HEADERS",
}

_OF_PAGES: Final = {
    r"^403": "a firewall in front of the gateway turns us away: have the outbound address of this machine put on the "
    "provider's IP allow-list",
    r"^400 .*https": "plain http is spoken to an https port: begin GATEWAY_BASE_URL with https://",
    r"^40[45]": "there is no such service: GATEWAY_BASE_URL must end with the version, as https://host/v1.0; else see "
    "{setting}",
    r"^407": "the proxy wants a login: correct HTTPS_PROXY, or put the gateway into NO_PROXY",
    r"^401": "something in front of the gateway wants a login: correct GATEWAY_BASE_URL, or ask the provider",
    r"^429": CURE_THROTTLED,
    r"^3": "it is a redirect, which is not followed: set GATEWAY_BASE_URL to the API's own address",
    r"^2": "this is not the gateway's API: correct GATEWAY_BASE_URL, then {setting}",
    r"^5": CURE_THEIRS,
    r"": "this is no answer of the gateway's API: correct GATEWAY_BASE_URL, then {setting}",
}

_TLS_REFUSED: Final = (
    "it speaks TLS but refuses this connection: it may ask for a client certificate (GATEWAY_CERT_FILE), or for other "
    "ciphers; ask the provider"
)
_NOT_SENT: Final = {
    r"too many open files": "raise the limit of open files of this process (ulimit -n)",
    r"hostname mismatch|IP address mismatch": "GATEWAY_BASE_URL has another host name than the certificate",
    r"certificate has expired": "the gateway's certificate has expired: the provider has to renew it; else this "
    "machine's clock is wrong",
    r"not yet valid": "this machine's clock is wrong: set it by NTP; else the certificate is too new",
    r"key too weak|algorithm too weak|(?:ee|ca) key too small": "the gateway's certificate is of a kind that is not "
    "safe any more: the provider has to renew it",
    r"revoked": "the gateway's certificate was revoked: the provider has to renew it",
    r"alert certificate required": "it asks for a client certificate: set GATEWAY_CERT_FILE and GATEWAY_KEY_FILE to "
    "the one that the provider issued",
    r"alert (?:unknown ca|bad certificate|certificate (?:expired|revoked|unknown)|unsupported certificate"
    r"|access denied|decrypt error)": "it refuses our client certificate: correct GATEWAY_CERT_FILE and "
    "GATEWAY_KEY_FILE, or set them",
    r"alert protocol version|unsupported protocol": "it speaks no version of TLS that is safe (1.2 or 1.3): ask the "
    "provider for an address that does",
    r"unrecognized name": "it does not know the host name of GATEWAY_BASE_URL: correct that",
    r"alert|no shared cipher|no ciphers|dh key too small|legacy": _TLS_REFUSED,
    r"not trusted|certificate": "set GATEWAY_CA_FILE to the CA certificates that the gateway's is signed with",
    r"no TLS.*(?:wrong version number|record layer|http request|packet length|unknown protocol|bad record)": "no TLS "
    "is spoken there: correct the port in GATEWAY_BASE_URL, or begin it with http://",
    r"no TLS.*timed out": "it took the connection and stays silent about TLS: correct the port in GATEWAY_BASE_URL, or "
    "try again later",
    r"no TLS": "it hangs up during the TLS handshake: a firewall or an IP allow-list may do that; else correct the "
    "port in GATEWAY_BASE_URL",
    r"proxy: it answers 407": "the proxy wants a login: put it into HTTPS_PROXY (http://user:pass@host)",
    r"proxy: it answers 403": "the proxy does not allow the way to the gateway: have it allowed, or put the gateway "
    "into NO_PROXY",
    r"proxy: it answers 50.": "the proxy finds no way to the gateway: correct GATEWAY_BASE_URL, or ask who runs the "
    "proxy",
    r"proxy": "correct HTTPS_PROXY, or put the gateway into NO_PROXY",
    r"refused": "nothing listens there: correct host and port in GATEWAY_BASE_URL",
    r"name|address associated|resolution": "the host name is not known here: correct GATEWAY_BASE_URL, or this "
    "machine's DNS",
    r"timed out|unreachable|no route": "no way leads there: a firewall, or an IP allow-list that drops us; else "
    "correct GATEWAY_BASE_URL",
    r"": "correct GATEWAY_BASE_URL",
}
_SENT: Final = {
    r"no HTTP": "what answers speaks no HTTP: https:// instead of http:// in GATEWAY_BASE_URL, or another port",
    r"timed out": "it took the request and stays silent: try again; if it is that slow, raise "
    "GATEWAY_READ_TIMEOUT_SECONDS",
    r"alert": _TLS_REFUSED,
    r"more than \d+ bytes": "its answer is larger than any of the gateway's API: correct GATEWAY_BASE_URL, then "
    "{setting}",
    r"more than one answer": "its answers have more bytes than they say, which no client can rely on: ask the provider "
    "to correct that",
    r"": "it hung up: it is an https port that GATEWAY_BASE_URL calls by http, a firewall, or a gateway that asks for "
    "a client certificate (GATEWAY_CERT_FILE); else try again later",
}


def token(answer: Reply | NoReply, service: CalledService) -> Finding:
    """What the token service's answer is a sign of, where it was no token."""
    if _grants_nothing(answer):
        text = f"{said(answer)}: ask the provider how it names its token; else correct GATEWAY_BASE_URL"
        return Finding(False, text, text)
    return _found(answer, service, _OF_TOKENS, said(answer))


def _grants_nothing(answer: Reply | NoReply) -> bool:
    """Whether it is a success without a usable token."""
    if isinstance(answer, NoReply) or not 200 <= answer.status < 300 or json_object(answer.body) is None:
        return False
    code, _ = read(answer.body)
    return code is None or code.startswith("2")


def expire(answer: Reply | NoReply, service: CalledService) -> Finding:
    """What an expire call's answer is a sign of."""
    return _found(answer, service, None, None)


def clock(skew: float) -> Finding:
    """How far our clock is off, in seconds ahead of the gateway's, which tells whole seconds only."""
    way = "ahead of" if skew > 0 else "behind"
    text = f"the same as the gateway's ({CLOCK_ERROR})"
    if abs(skew) > 0.5:
        text = f"{abs(skew):.1f} s {way} the gateway's ({CLOCK_ERROR})"
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


def _found(answer: Reply | NoReply, service: CalledService, table: Table | None, shown: str | None) -> Finding:
    """``table``: the rows for answers with a code; None for those of the verdict table. ``shown``: what may be shown of
    the answer; None for all of it."""
    fine = signature = False
    if isinstance(answer, NoReply):
        said, message = answer.error, answer.error
        text = _first(_SENT if answer.sent else _NOT_SENT, message)
    else:
        code, message = read(answer.body)
        if code is None:
            message = _text(answer)
            said = f"HTTP {answer.status} with {_kind(answer)}" if shown is None else shown
            text = _first(_OF_PAGES, f"{answer.status} {message}")
        elif table is None:
            said = f"{code} {message}".rstrip()
            rule = rule_for(code, message)
            added = "" if rule.fine or rule.kind is Kind.TOKEN else _first(_OF_EXPIRES, f"{code} {message}")
            text, fine, signature = added or rule.cure, rule.fine, not added and rule.cure is CURE_SIGNATURE
        else:
            said = f"{code} {shown}"
            text = _first(table, f"{code} {message}")
    text = text.format(setting=service.path_setting)
    if fine and isinstance(answer, Reply) and judge(answer).reason is None:
        text = f"HTTP {answer.status} and its code contradict each other: ask the provider"
        return Finding(False, f"{text} ({said})", text)
    if (signature or "signature" in message.lower()) and (late := _signed_late(service)):
        text, signature = late, False
    told = f"{text} ({said}, from {service.url})"
    return Finding(fine, told, text, signature, judge(answer).kind in _TAKEN)


def _first(table: Table, answer: str) -> str:
    """What the first pattern that matches stands for; "" if none does."""
    return next((text for pattern, text in table.items() if re.search(pattern, answer, re.IGNORECASE)), "")


def _signed_late(service: CalledService) -> str | None:
    """A wrong clock can be reported as a wrong signature."""
    if service.skew is None or abs(service.skew) < SKEW_REFUSED:
        return None
    return f"our clock is {service.skew:+.0f} s off the gateway's: set it by NTP, then look again"


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
