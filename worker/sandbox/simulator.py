"""The payment gateway, simulated: an HTTP server that checks what the gateway checks, and fails on request.

Signatures are verified here from the gateway's document alone, not with the worker's signing code, so that an
agreement between the two means something. A request goes one way:

    bytes → Request → Claim (pure checks) → Books (tokens, ids, bills, script) → Fault → bytes

`Fault` is anything but a plain success: a refusal that the checks ask for, or what the script asks for.
Scripts are frozen values, also readable from JSON (`Script.parse`).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import select
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar
from urllib.parse import parse_qs

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

SIGNATURES: Final = ("hmac-sha512", "rsa-sha256", "rsa-sha256-no-token")
EXPIRES_IN: Final = ("string", "int", "datetime", "absent")
TOKEN_PATH: Final = "/access-token/b2b"
EXPIRE_PATH: Final = "/qr/qr-mpm-expire-billnumber"
ADMIN_PATH: Final = "/_simulator/"

HEAD_LIMIT: Final = 64 * 1024  # a client that never ends its headers must not fill the memory
BODY_LIMIT: Final = 1024 * 1024  # nor one that announces a huge body; scripts for many bills still fit
DAY: Final = 86_400.0  # the longest wait; poll() cannot count further than 24 days
BACKLOG: Final = 1024  # a worker opens all its connections at once; a short queue drops some for a second

JAKARTA: Final = timezone(timedelta(hours=7))  # the gateway's day, and the zone of its date-times

# The gateway's document, and the SNAP standard for what it leaves out. 4049301 is also "Bad Request": a fault
# in a script is about a bill, so this is the reading without a message.
MESSAGES: Final = {
    "2009300": "Successful",
    "2009100": "Successful",
    "4009301": "Invalid field format billnumber",
    "4019300": "Unauthorized. Invalid Signature",
    "4019301": "Access Token Invalid",
    "4099300": "Cannot use same X-EXTERNAL-ID in same day",
    "4049300": "Unauthorized. Client Forbidden Access API",
    "4049301": "QR not Found",
    "4049304": "Transaction Cancelled",
    "4049308": "Invalid Merchant",
    "4049314": "Paid Bill",
    "4049319": "Bill Expired",
    "4039300": "Transaction Expired",
    "4039319": "Merchant Blacklisted",
    "4299300": "Too Many Requests",
    "5009300": "General Error",
    "5049300": "Timeout",
    "2007300": "Successful",
    "4017300": "Unauthorized. Invalid Signature",
    "4297300": "Too Many Requests",
    "5007300": "General Error",
}


class ScriptError(ValueError):
    """A script that cannot be played. One line: where in the script, and what is wrong."""


# --- the script ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """What one call gets instead of plain success. An empty one is plain success.

    At most one of `code`, `html`, `body`, `hang` and `reset` says what comes back. The checks (headers,
    token, signature, external id, body) come first: a call that fails them gets their refusal and uses up no
    fault.

    `code`, `message`   a SNAP answer; its HTTP status is the code's first three digits, or else `http`
    `html`              this HTTP status with a page, as from a proxy or firewall
    `body`              these bytes with status `http` (200)
    `hang`              seconds without any answer, then the connection closes
    `reset`             a TCP reset; `before`: nothing took effect, not even the external id;
                        `after`: the call took effect
    `latency`           seconds before the answer (or the reset); what takes effect has done so on arrival
    `trickle`           seconds between the bytes of the answer, headers included
    `retry_after`       value of the Retry-After header
    `close`             the connection closes after the answer, announced by Connection: close
    `applied`           whether the bill counts as expired (of the token service: whether a token is issued);
                        by default after a success code, plain success and a reset `after`
    `repeat`            in a sequence: stay here for ever
    """

    code: str | None = None
    message: str | None = None
    http: int | None = None
    latency: float = 0.0
    hang: float = 0.0
    reset: str | None = None
    html: int | None = None
    body: str | None = None
    retry_after: str | None = None
    trickle: float = 0.0
    close: bool = False
    applied: bool | None = None
    repeat: bool = False

    def __post_init__(self) -> None:
        kinds = [
            name
            for name, given in (
                ("code", self.code is not None),
                ("html", self.html is not None),
                ("body", self.body is not None),
                ("hang", self.hang > 0),
                ("reset", self.reset is not None),
            )
            if given
        ]
        if len(kinds) > 1:
            raise ScriptError(f"a fault has one kind of answer, not {' and '.join(kinds)}")
        if min(self.latency, self.hang, self.trickle) < 0:
            raise ScriptError("latency, hang and trickle must not be negative")
        if self.code is not None and not re.fullmatch(r"[2-5]\d{6}", self.code):
            raise ScriptError(f"code {self.code!r} is not a response code of 7 digits")
        if self.message is not None and self.code is None:
            raise ScriptError("message needs a code")
        if self.http is not None and self.code is None and self.body is None:
            raise ScriptError("http needs a code or a body")
        if self.reset not in (None, "before", "after"):
            raise ScriptError(f"reset is 'before' or 'after', not {self.reset!r}")
        if any(status is not None and not 200 <= status <= 599 for status in (self.http, self.html)):
            raise ScriptError("an HTTP status lies between 200 and 599")
        if self.retry_after is not None and not re.fullmatch(r"[ -~]*", self.retry_after):
            raise ScriptError("retry_after holds printable ASCII characters only")

    @classmethod
    def parse(cls, raw: object, where: str = "fault") -> Fault:
        """A fault from a JSON object, keys as above. Raises ScriptError, also for unknown keys."""
        return _built(cls, _members(raw, _FAULT_KEYS, where), where)

    @property
    def takes_effect(self) -> bool:
        """Whether the call did what it asked for, whatever the caller is told."""
        if self.applied is not None:
            return self.applied
        if self.code is not None:
            return self.code.startswith("200")
        return self.reset != "before" and self.html is None and self.body is None and not self.hang

    @property
    def label(self) -> str:
        """The key under which a report counts it; empty for plain success."""
        if self.code is not None:
            return self.code
        if self.reset is not None:
            return f"reset {self.reset}"
        if self.hang:
            return "hang"
        if self.html is not None or self.body is not None:
            return f"http {self.html or self.http or 200}"
        return ""


NORMAL: Final = Fault()


@dataclass(frozen=True, slots=True)
class Pattern:
    """Faults for every bill in which the regular expression `match` is found, each bill from the start."""

    match: str
    faults: tuple[Fault, ...]

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ScriptError(f"match {self.match!r} is no regular expression: {error}") from None
        _check_sequence(self.faults)

    @classmethod
    def parse(cls, raw: object, where: str = "pattern") -> Pattern:
        """From `{"match": "^BAD", "faults": [...]}`."""
        return _built(cls, _members(raw, {"match": _text, "faults": _faults}, where, required=True), where)


@dataclass(frozen=True, slots=True)
class Rate:
    """One fault for a share (0 to 1) of the calls, chosen by a hash of the script's seed and external id."""

    share: float
    fault: Fault

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ScriptError("share lies between 0 and 1")

    @classmethod
    def parse(cls, raw: object, where: str = "rate") -> Rate:
        """From `{"share": 0.05, "fault": {...}}`."""
        readers: Mapping[str, _Reader] = {"share": _number, "fault": Fault.parse}
        return _built(cls, _members(raw, readers, where, required=True), where)


@dataclass(frozen=True, slots=True)
class Script:
    """How the gateway behaves. The default behaves well.

    A bill named in `bills` follows that list, one fault per call, then normal; another the first of
    `patterns` that fits; only a bill in neither can be hit by `rates`, whose shares add up to at most 1.

    `token_faults`         the same kind of list for calls of the token service
    `seed`                 of the choice by `rates`
    `down`                 every connection is reset once it has asked for anything but `/_simulator/`
    `latency`              seconds added to every answer of both services
    `requests_per_second`  more expire calls than this in a second get 4299300 with Retry-After; 0: no limit
    `single_token`         a new token kills the old ones
    `token_lifetime`       seconds a new token lives
    `kill_token_every`     after each so many expire calls with a living token, all tokens die; 0: never
    `expires_in`           how the lifetime is told: `string`, `int` (whole seconds), `datetime`, `absent`
    `skew`                 seconds that X-TIMESTAMP may differ from the gateway's clock
    `clock_offset`         seconds the gateway's clock is ahead of this machine's (negative: behind): the Date
                           header, the skew check and the day of external ids follow it
    `already`              response code for a bill that had expired before; by default success again
    """

    bills: Mapping[str, tuple[Fault, ...]] = field(default_factory=dict)
    patterns: tuple[Pattern, ...] = ()
    rates: tuple[Rate, ...] = ()
    token_faults: tuple[Fault, ...] = ()
    seed: int = 1
    down: bool = False
    latency: float = 0.0
    requests_per_second: float = 0.0
    single_token: bool = False
    token_lifetime: float = 900.0
    kill_token_every: int = 0
    expires_in: str = "string"
    skew: float = 300.0
    clock_offset: float = 0.0
    already: str | None = None

    def __post_init__(self) -> None:
        for faults in (self.token_faults, *self.bills.values()):
            _check_sequence(faults)
        if sum(rate.share for rate in self.rates) > 1 + 1e-9:
            raise ScriptError("the shares of rates add up to more than 1")
        if min(self.latency, self.requests_per_second, self.token_lifetime, self.kill_token_every) < 0:
            raise ScriptError("seconds, rates and counts must not be negative")
        if self.expires_in not in EXPIRES_IN:
            raise ScriptError(f"expires_in is one of {', '.join(EXPIRES_IN)}, not {self.expires_in!r}")
        if self.already is not None:
            Fault(code=self.already)

    @classmethod
    def parse(cls, raw: object) -> Script:
        """A script from a JSON object, keys as above. Raises ScriptError, also for unknown keys."""
        return _built(cls, _members(raw, _SCRIPT_KEYS, "script"), "script")

    @classmethod
    def load(cls, path: Path) -> Script:
        """A script from a JSON file. Raises ScriptError; OSError when the file cannot be read."""
        try:
            return cls.parse(json.loads(path.read_bytes()))
        except ScriptError as error:
            raise ScriptError(f"{path}: {error}") from None
        except ValueError as error:
            raise ScriptError(f"{path}: no JSON: {error}") from None


_TYPE_NAMES: Final = {dict: "object", list: "list", str: "text", bool: "true or false", type(None): "null"}


def _wrong(value: object, wanted: str, where: str) -> ScriptError:
    return ScriptError(f"{where}: wanted {wanted}, found {_TYPE_NAMES.get(type(value), 'number')}")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(value, "text", where)
    return value


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(value, "true or false", where)
    return value


def _signed(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise _wrong(value, "a number", where)
    return float(value)


def _number(value: object, where: str) -> float:
    number = _signed(value, where)
    if not 0 <= number < float("inf"):
        raise ScriptError(f"{where}: must not be negative or infinite")
    return number


def _integer(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(value, "a whole number", where)
    if value < 0:
        raise ScriptError(f"{where}: must not be negative")
    return value


def _items(value: object, where: str) -> list[tuple[object, str]]:
    if not isinstance(value, list):
        raise _wrong(value, "a list", where)
    return [(item, f"{where}[{at}]") for at, item in enumerate(value)]


def _faults(value: object, where: str) -> tuple[Fault, ...]:
    return tuple(Fault.parse(*item) for item in _items(value, where))


def _patterns(value: object, where: str) -> tuple[Pattern, ...]:
    return tuple(Pattern.parse(*item) for item in _items(value, where))


def _rates(value: object, where: str) -> tuple[Rate, ...]:
    return tuple(Rate.parse(*item) for item in _items(value, where))


def _bills(value: object, where: str) -> dict[str, tuple[Fault, ...]]:
    if not isinstance(value, dict):
        raise _wrong(value, "an object", where)
    return {bill: _faults(faults, f"{where}.{bill}") for bill, faults in value.items()}


_Reader = Callable[[object, str], Any]
_T = TypeVar("_T")

_FAULT_KEYS: Final[Mapping[str, _Reader]] = {
    "code": _text,
    "message": _text,
    "http": _integer,
    "latency": _number,
    "hang": _number,
    "reset": _text,
    "html": _integer,
    "body": _text,
    "retry_after": _text,
    "trickle": _number,
    "close": _flag,
    "applied": _flag,
    "repeat": _flag,
}
_SCRIPT_KEYS: Final[Mapping[str, _Reader]] = {
    "bills": _bills,
    "patterns": _patterns,
    "rates": _rates,
    "token_faults": _faults,
    "seed": _integer,
    "down": _flag,
    "latency": _number,
    "requests_per_second": _number,
    "single_token": _flag,
    "token_lifetime": _number,
    "kill_token_every": _integer,
    "expires_in": _text,
    "skew": _number,
    "clock_offset": _signed,
    "already": _text,
}


def _members(raw: object, readers: Mapping[str, _Reader], where: str, *, required: bool = False) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise _wrong(raw, "an object", where)
    if unknown := [key for key in raw if key not in readers]:
        raise ScriptError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(readers)}")
    if required and (missing := [key for key in readers if key not in raw]):
        raise ScriptError(f"{where}: {missing[0]} is missing")
    return {key: readers[key](value, f"{where}.{key}") for key, value in raw.items()}


def _built(kind: Callable[..., _T], members: dict[str, Any], where: str) -> _T:
    try:
        return kind(**members)
    except ScriptError as error:
        raise ScriptError(f"{where}: {error}") from None


def _check_sequence(faults: Sequence[Fault]) -> None:
    if any(fault.repeat for fault in faults[:-1]):
        raise ScriptError("nothing comes after a fault with repeat")


PLAIN: Final = Script()


# --- the checks: pure, one request at a time ----------------------------------------------------------------


class Request(NamedTuple):
    """One HTTP request as it came. Header names in lower case; of a repeated header the last one stands."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes
    keep: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """What the gateway knows about its one client, and how it wants to be signed to."""

    client_id: str
    client_secret: bytes = field(repr=False)
    channel_id: str
    public_key: RSAPublicKey
    signature: str
    sign_path: str


class Claim(NamedTuple):
    """An expire call after the checks that need no memory: what is wrong with it, and what it asks for."""

    refusal: Fault | None
    token: str
    signed: bool
    external_id: str
    field_error: Fault | None
    bill: str
    merchant: str


BAD_HEADER: Final = Fault(code="4049301", message="Bad Request")
UNKNOWN_CLIENT: Final = Fault(code="4019300", message="Unauthorized. Unknown Client")
OUT_OF_TIME: Final = Fault(code="4019300", message="Unauthorized. X-TIMESTAMP Out Of Range")
BAD_SIGNATURE: Final = Fault(code="4019300", message="Unauthorized. Invalid Signature")
BAD_TOKEN_SIGNATURE: Final = Fault(code="4017300", message="Unauthorized. Invalid Signature")
BAD_TOKEN: Final = Fault(code="4019301", message="Access Token Invalid")
SAME_ID: Final = Fault(code="4099300", message="Cannot use same X-EXTERNAL-ID in same day")

# TZD of the document: +07:00, any other offset, or Z.
_TIMESTAMP: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?([+-]\d\d:\d\d|Z)", re.ASCII)


def string_to_sign(scheme: str, path: str, token: str, body: bytes, timestamp: str) -> bytes:
    """POST:path:token:lower(hex(sha256(body))):timestamp; the scheme may leave out the token."""
    digest = hashlib.sha256(body).hexdigest()
    if scheme == "rsa-sha256-no-token":
        return f"POST:{path}:{digest}:{timestamp}".encode()
    return f"POST:{path}:{token}:{digest}:{timestamp}".encode()


def hmac_signed(secret: bytes, message: bytes, signature: str) -> bool:
    """Whether `signature` is the base64 of HMAC-SHA512 over `message`."""
    expected = base64.b64encode(hmac.digest(secret, message, "sha512"))
    return hmac.compare_digest(expected, signature.encode())


def rsa_signed(key: RSAPublicKey, message: bytes, signature: str) -> bool:
    """Whether `signature` is the base64 of RSA-SHA256 (PKCS#1 v1.5) over `message`."""
    try:
        key.verify(base64.b64decode(signature, validate=True), message, padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def _moment(timestamp: str) -> float | None:
    """Unix seconds of an X-TIMESTAMP, None when its form is wrong."""
    if not _TIMESTAMP.fullmatch(timestamp):
        return None
    try:
        return datetime.fromisoformat(timestamp).timestamp()
    except (ValueError, OverflowError):
        return None


def _is_json(content_type: str) -> bool:
    return content_type == "application/json" or (content_type.partition(";")[0].strip().lower() == "application/json")


def _header_refusal(headers: Mapping[str, str], rules: Rules, now: float, skew: float) -> Fault | None:
    moment = _moment(headers.get("x-timestamp", ""))
    external_id = headers.get("x-external-id", "")
    channels = {headers[name] for name in ("channel-id", "x-channel-id") if name in headers}
    if (
        moment is None
        or not _is_json(headers.get("content-type", ""))
        or not headers.get("x-partner-id")
        or not headers.get("x-signature")
        or channels != {rules.channel_id}
        or not (external_id.isascii() and external_id.isdigit() and len(external_id) <= 36)
    ):
        return BAD_HEADER
    if headers["x-partner-id"] != rules.client_id:
        return UNKNOWN_CLIENT
    return OUT_OF_TIME if abs(moment - now) > skew else None


def _field_error(name: str) -> Fault:
    return Fault(code="4009301", message=f"Invalid field format {name}")


def _asked(body: bytes) -> tuple[Fault | None, str, str]:
    """What is wrong with the body, the bill it names and the merchant; either may be empty if it is wrong."""
    try:
        fields = json.loads(body.decode())
    except (ValueError, RecursionError):
        return _field_error("body"), "", ""
    if not isinstance(fields, dict):
        return _field_error("body"), "", ""
    bill, other = fields.get("billnumber"), fields.get("billNumber")
    bill = other if bill is None else bill
    if not isinstance(bill, str) or not 0 < len(bill) <= 64 or (other is not None and other != bill):
        return _field_error("billnumber"), "", ""
    info = fields.get("additionalInfo")
    if not isinstance(info, dict):
        return _field_error("additionalInfo"), bill, ""
    merchant = info.get("merchantId")
    if not isinstance(merchant, str) or not 0 < len(merchant) <= 64:
        return _field_error("merchantId"), bill, ""
    return None, bill, merchant


def claim_of(request: Request, rules: Rules, now: float, skew: float) -> Claim:
    """An expire call, checked as far as that goes without memory. `now` and `skew` in seconds."""
    headers = request.headers
    refusal = _header_refusal(headers, rules, now, skew)
    kind, _, token = headers.get("authorization", "").partition(" ")
    token = token.strip() if kind.lower() == "bearer" else ""
    signed = False
    if refusal is None:
        message = string_to_sign(rules.signature, rules.sign_path, token, request.body, headers["x-timestamp"])
        if rules.signature == "hmac-sha512":
            signed = hmac_signed(rules.client_secret, message, headers["x-signature"])
        else:
            signed = rsa_signed(rules.public_key, message, headers["x-signature"])
    return Claim(refusal, token, signed, headers.get("x-external-id", ""), *_asked(request.body))


def token_refusal(request: Request, rules: Rules, now: float, skew: float) -> Fault | None:
    """What is wrong with a call of the token service, None if nothing is."""
    headers = request.headers
    for name in ("X-CLIENT-KEY", "X-TIMESTAMP", "X-SIGNATURE"):
        if not headers.get(name.lower()):
            return Fault(code="4007302", message=f"Invalid Mandatory Field {name}")
    if not _is_json(headers.get("content-type", "")):
        return Fault(code="4007301", message="Invalid Field Format Content-Type")
    moment = _moment(headers["x-timestamp"])
    if moment is None:
        return Fault(code="4007301", message="Invalid Field Format X-TIMESTAMP")
    if headers["x-client-key"] != rules.client_id:
        return Fault(code="4017300", message="Unauthorized. Unknown Client")
    if abs(moment - now) > skew:
        return Fault(code="4017300", message="Unauthorized. X-TIMESTAMP Out Of Range")
    message = f"{rules.client_id}|{headers['x-timestamp']}".encode()
    if not rsa_signed(rules.public_key, message, headers["x-signature"]):
        return BAD_TOKEN_SIGNATURE
    return _grant_refusal(request.body)


def _grant_refusal(body: bytes) -> Fault | None:
    try:
        fields = json.loads(body.decode())
    except (ValueError, RecursionError):
        return Fault(code="4007300", message="Bad Request")
    if not isinstance(fields, dict) or fields.get("grantType") != "client_credentials":
        return Fault(code="4007301", message="Invalid Field Format grantType")
    return None


# --- the books: everything the gateway remembers ------------------------------------------------------------


class Call(NamedTuple):
    """One expire call: when it came (Unix seconds), what it named, how it was answered (as in `by_code`)."""

    at: float
    billnumber: str
    merchant_id: str
    external_id: str
    answer: str


@dataclass(frozen=True, slots=True)
class Report:
    """What the simulator has seen since it was made. Times are Unix seconds of this machine's clock."""

    expire_calls: int  # refused ones included
    token_calls: int
    by_code: dict[str, int]  # answers by response code, or "hang", "reset after", "http 502", "down"
    bills_expired: int  # different bills
    bills_called: int  # different bills
    calls_by_bill: dict[str, int]  # calls that named the bill, refused ones included; empty unless asked for
    duplicates: int  # calls with an external id already used that day
    signature_failures: int  # both services
    throttled: int
    in_flight: int
    max_concurrency: int  # expire calls between arrival and answer
    peak_per_second: int  # the most expire calls that arrived within one second
    first_call_at: float | None
    last_call_at: float | None
    calls: tuple[Call, ...]  # the latest `keep_calls` expire calls, in order of arrival


class _Window:
    """Monotonic times of what happened in the last `seconds`: memory for one window, not for a run."""

    __slots__ = ("_times", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._times: deque[float] = deque()

    def count(self, now: float) -> int:
        times = self._times
        horizon = now - self.seconds
        while times and times[0] <= horizon:
            times.popleft()
        return len(times)

    def add(self, now: float) -> None:
        self._times.append(now)

    def until_next_leaves(self, now: float) -> float:
        return self._times[0] + self.seconds - now if self._times else 0.0


class Books:
    """Tokens, external ids, bills and the position in the script, behind one lock.

    A bill costs its name and a small integer (calls doubled, plus one when expired), an external id one
    integer: a million of each stays below 250 MB.
    """

    def __init__(self, script: Script, keep_calls: int) -> None:
        self._lock = threading.Lock()
        self._tokens: dict[str, float] = {}
        self._ids: set[int] = set()
        self._day = 0
        self._bills: dict[bytes, int] = {}
        self._bills_expired = 0
        self._expire_calls = self._token_calls = self._live_calls = 0
        self._duplicates = self._signature_failures = self._throttled = 0
        self._in_flight = self._max_in_flight = self._peak = 0
        self._by_code: Counter[str] = Counter()
        self._first: float | None = None
        self._last: float | None = None
        self._recent = _Window(1.0)
        self._calls: deque[Call] = deque(maxlen=keep_calls)
        self.replace(script)

    def replace(self, script: Script) -> None:
        """Play another script from its start. Tokens, ids, bills and counts stay."""
        patterns = [(re.compile(pattern.match), pattern.faults) for pattern in script.patterns]
        with self._lock:
            self.script = script
            self._patterns = patterns
            self._positions: dict[str, int] = {}
            self._token_position = 0
            rate = script.requests_per_second
            self._limit = max(1, int(rate))
            # 2.5 in a second is 2 in 0.8 s, 0.5 is 1 in 2 s.
            self._admitted = _Window(self._limit / rate if rate else 0.0)

    def now(self) -> float:
        """The gateway's clock, Unix seconds."""
        return time.time() + self.script.clock_offset

    def expire(self, claim: Claim) -> Fault:
        """Judge one expire call and enter it. The caller owes a `leave` once it is answered."""
        with self._lock:
            at = self._arrived(claim.bill)
            fault = self._judged(claim)
            answer = fault.label or "2009300"
            self._by_code[answer] += 1
            self._calls.append(Call(at, claim.bill, claim.merchant, claim.external_id, answer))
            return fault

    def leave(self) -> None:
        """An expire call has been answered, or given up."""
        with self._lock:
            self._in_flight -= 1

    def token(self, refusal: Fault | None) -> tuple[Fault, bytes]:
        """Judge one call of the token service: what it gets, and the body of a success."""
        with self._lock:
            self._token_calls += 1
            self._signature_failures += refusal is BAD_TOKEN_SIGNATURE
            fault = refusal or self._next_token_fault()
            self._by_code[fault.label or "2007300"] += 1
            return fault, self._issued() if fault.takes_effect else b""

    def turned_away(self) -> None:
        """A connection was reset because the gateway is down."""
        with self._lock:
            self._by_code["down"] += 1

    def report(self, *, bills: bool) -> Report:
        with self._lock:
            calls_by_bill = dict(self._bills) if bills else {}
            report = Report(
                expire_calls=self._expire_calls,
                token_calls=self._token_calls,
                by_code=dict(sorted(self._by_code.items())),
                bills_expired=self._bills_expired,
                bills_called=len(self._bills),
                calls_by_bill={},
                duplicates=self._duplicates,
                signature_failures=self._signature_failures,
                throttled=self._throttled,
                in_flight=self._in_flight,
                max_concurrency=self._max_in_flight,
                peak_per_second=self._peak,
                first_call_at=self._first,
                last_call_at=self._last,
                calls=tuple(self._calls),
            )
        # A million names take a moment to decode: not while every sender waits for the lock.
        for name, entry in calls_by_bill.items():
            report.calls_by_bill[name.decode(errors="surrogatepass")] = entry >> 1
        return report

    def _arrived(self, bill: str) -> float:
        at, instant = time.time(), time.monotonic()
        self._expire_calls += 1
        self._in_flight += 1
        self._max_in_flight = max(self._max_in_flight, self._in_flight)
        self._recent.add(instant)
        self._peak = max(self._peak, self._recent.count(instant))
        if self._first is None:
            self._first = at
        self._last = at
        if bill:
            key = bill.encode(errors="surrogatepass")
            self._bills[key] = self._bills.get(key, 0) + 2
        return at

    def _judged(self, claim: Claim) -> Fault:
        if self.script.requests_per_second and (throttled := self._over_rate()):
            return throttled
        if claim.refusal is not None:
            return claim.refusal
        if self._tokens.get(claim.token, 0.0) <= time.monotonic():
            return BAD_TOKEN
        self._use_token()
        if not claim.signed:
            self._signature_failures += 1
            return BAD_SIGNATURE
        return self._first_use(claim)

    def _over_rate(self) -> Fault | None:
        """A refusal while the window is full; refused calls take no room in it, or it would never empty."""
        now = time.monotonic()
        if self._admitted.count(now) < self._limit:
            self._admitted.add(now)
            return None
        self._throttled += 1
        wait = max(1, -int(-self._admitted.until_next_leaves(now) // 1))
        return Fault(code="4299300", retry_after=str(wait))

    def _use_token(self) -> None:
        every = self.script.kill_token_every
        self._live_calls += 1
        if every and self._live_calls % every == 0:
            self._tokens.clear()

    def _first_use(self, claim: Claim) -> Fault:
        identity = int("1" + claim.external_id)  # half the memory of a text; the 1 keeps leading zeros apart
        today = int(self.now() + 7 * 3600) // 86400
        if today != self._day:
            self._day = today
            self._ids.clear()
        if identity in self._ids:
            self._duplicates += 1
            return SAME_ID
        self._ids.add(identity)
        if claim.field_error is not None:
            return claim.field_error
        fault = self._next_fault(claim)
        if fault.reset == "before":
            self._ids.discard(identity)
        return self._effected(fault, claim.bill)

    def _effected(self, fault: Fault, bill: str) -> Fault:
        if not fault.takes_effect:
            return fault
        key = bill.encode(errors="surrogatepass")
        entry = self._bills[key]
        if not entry & 1:
            self._bills[key] = entry | 1
            self._bills_expired += 1
        elif self.script.already is not None and not fault.label:
            return Fault(code=self.script.already, latency=fault.latency)
        return fault

    def _next_fault(self, claim: Claim) -> Fault:
        script = self.script
        faults = script.bills.get(claim.bill)
        if faults is None and self._patterns:
            faults = next((faults for match, faults in self._patterns if match.search(claim.bill)), None)
        if faults is not None:
            return self._next_in_turn(claim.bill, faults)
        return self._by_chance(claim.external_id) if script.rates else NORMAL

    def _next_in_turn(self, bill: str, faults: tuple[Fault, ...]) -> Fault:
        position = self._positions.get(bill, 0)
        if position >= len(faults):
            return NORMAL
        if not faults[position].repeat:
            self._positions[bill] = position + 1
        return faults[position]

    def _by_chance(self, external_id: str) -> Fault:
        """The same for the same seed and external id, whatever the order of arrival."""
        digest = hashlib.blake2b(f"{self.script.seed}:{external_id}".encode(), digest_size=8).digest()
        left = int.from_bytes(digest, "big") / 2**64
        for rate in self.script.rates:
            if left < rate.share:
                return rate.fault
            left -= rate.share
        return NORMAL

    def _next_token_fault(self) -> Fault:
        faults = self.script.token_faults
        if self._token_position >= len(faults):
            return NORMAL
        fault = faults[self._token_position]
        self._token_position += not fault.repeat
        return fault

    def _issued(self) -> bytes:
        script, now = self.script, time.monotonic()
        alive = {} if script.single_token else {t: until for t, until in self._tokens.items() if until > now}
        token = secrets.token_urlsafe(32)
        self._tokens = alive | {token: now + script.token_lifetime}
        fields: dict[str, str | int] = {
            "responseCode": "2007300",
            "responseMessage": "Successful",
            "accessToken": token,
            "tokenType": "Bearer",
        }
        match script.expires_in:
            case "string":
                fields["expiresIn"] = str(int(script.token_lifetime))
            case "int":
                fields["expiresIn"] = int(script.token_lifetime)
            case "datetime":
                until = datetime.fromtimestamp(self.now() + script.token_lifetime, JAKARTA)
                fields["expiresIn"] = until.isoformat(timespec="seconds")
        return json.dumps(fields).encode()


# --- HTTP ---------------------------------------------------------------------------------------------------


class _Unreadable(Exception):
    """A request that is no request we read; the status says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


SUCCESS: Final = b'{"responseCode":"2009300","responseMessage":"Successful"}'


@functools.cache
def _status_line(status: int) -> bytes:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unassigned"
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


def _page(status: int) -> bytes:
    title = _status_line(status).decode()[9:].strip()
    page = f"<html>\r\n<head><title>{title}</title></head>\r\n<body><h1>{title}</h1></body>\r\n</html>\r\n"
    return page.encode()


def _content(fault: Fault, success: bytes) -> tuple[int, bytes, bytes]:
    """HTTP status, content type and body of the answer that `fault` asks for."""
    if fault.html is not None:
        return fault.html, b"text/html", _page(fault.html)
    if fault.body is not None:
        return fault.http or 200, b"application/json", fault.body.encode(errors="surrogatepass")
    if fault.code is None:
        return 200, b"application/json", success
    message = MESSAGES.get(fault.code, "Simulated") if fault.message is None else fault.message
    fields = json.dumps({"responseCode": fault.code, "responseMessage": message}, separators=(",", ":"))
    return fault.http or int(fault.code[:3]), b"application/json", fields.encode()


class _Connection(socketserver.BaseRequestHandler):
    """One connection, request after request, each answer in one send.

    It reads requests itself: the stdlib's header parser alone costs more than all the checks together.
    """

    server: _Server
    request: socket.socket

    def setup(self) -> None:
        # Without it, an answer can wait 40 ms for the peer's delayed acknowledgement.
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self._poll: select.poll | None = None
        self._in_flight = False

    def handle(self) -> None:
        # An OSError: the client has gone, or `stop` has cut the connection. Neither concerns anyone here.
        with contextlib.suppress(OSError):
            while self._exchange():
                pass

    def _exchange(self) -> bool:
        """Serve one request; whether another may follow."""
        try:
            request = self._read()
        except _Unreadable as error:
            self._send(_status_line(error.status), b"text/html", _page(error.status), close=True)
            return False
        if request is None:
            return False
        simulator = self.server.simulator
        if request.path == simulator.expire_path and request.method == "POST":
            return self._expire(request, simulator)
        if request.path == simulator.token_path and request.method == "POST":
            return self._token(request, simulator)
        if request.path.startswith(ADMIN_PATH):
            return self._admin(request, simulator)
        known = request.path in (simulator.expire_path, simulator.token_path)
        return self._act(Fault(html=405 if known else 404), b"", request.keep)

    def _expire(self, request: Request, simulator: Simulator) -> bool:
        books = simulator.books
        script = books.script
        fault = books.expire(claim_of(request, simulator.rules, books.now(), script.skew))
        self._in_flight = True
        try:
            return self._act(fault, SUCCESS, request.keep, script.latency)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Count the call out, once, and before its end can be seen.

        A client that has its answer may send its next call before this thread runs again: counted out
        later, a client that keeps to its limit would seem to exceed it.
        """
        if self._in_flight:
            self._in_flight = False
            self.server.simulator.books.leave()

    def _token(self, request: Request, simulator: Simulator) -> bool:
        books = simulator.books
        script = books.script
        fault, success = books.token(token_refusal(request, simulator.rules, books.now(), script.skew))
        return self._act(fault, success, request.keep, script.latency)

    def _admin(self, request: Request, simulator: Simulator) -> bool:
        match request.method, request.path.removeprefix(ADMIN_PATH):
            case "GET", "health":
                status, answer = 200, {"status": "ok"}
            case "GET", "report":
                asked = parse_qs(request.query)
                status, answer = 200, _report_fields(simulator, "bills" in asked, "calls" in asked)
            case "POST", "script":
                status, answer = _replaced(simulator, request.body)
            case _:
                return self._act(Fault(html=404), b"", request.keep)
        close = not request.keep
        self._send(_status_line(status), b"application/json", json.dumps(answer).encode(), close=close)
        return not close

    def _act(self, fault: Fault, success: bytes, keep: bool, latency: float = 0.0) -> bool:
        """Do what the fault says, or answer with `success`; whether the connection stays open."""
        if latency or fault.latency:
            self._wait(latency + fault.latency)
        if fault.reset is not None:
            self._reset()
            return False
        if fault.hang:
            self._wait(fault.hang)
            self._leave()
            return False
        keep = keep and not fault.close
        status, kind, body = _content(fault, success)
        self._send(_status_line(status), kind, body, fault.retry_after, fault.trickle, close=not keep)
        return keep

    def _send(
        self,
        status_line: bytes,
        kind: bytes,
        body: bytes,
        retry_after: str | None = None,
        trickle: float = 0.0,
        *,
        close: bool,
    ) -> None:
        extra = b"Connection: close\r\n" if close else b""
        if retry_after is not None:
            extra += b"Retry-After: %b\r\n" % retry_after.encode()
        answer = b"%bDate: %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n%b" % (
            status_line,
            self.server.date(),
            kind,
            len(body),
            extra,
            body,
        )
        if trickle:
            for at in range(len(answer) - 1):
                self.request.sendall(answer[at : at + 1])
                self._wait(trickle)
            answer = answer[-1:]
        self._leave()
        self.request.sendall(answer)

    def _wait(self, seconds: float) -> None:
        """Until the time is over, or at once when the client (or `stop`) has closed the connection.

        Calls that their client has given up must not count as in flight for the rest of a long hang.
        """
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.request, getattr(select, "POLLRDHUP", 0))
        self._poll.poll(min(seconds, DAY) * 1000)

    def _reset(self) -> None:
        self._leave()
        # Lingering for 0 seconds turns the close into a reset.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()

    def _read(self) -> Request | None:
        """The next request; None when the client has gone or the gateway is down."""
        data = self._rest
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > HEAD_LIMIT:
                raise _Unreadable(431)
            more = self.request.recv(65536)
            if not more:
                return None
            data += more
        method, target, keep, headers = _head(data[:end].decode("latin-1"))
        path, _, query = target.partition("?")
        if self.server.simulator.books.script.down and not path.startswith(ADMIN_PATH):
            self.server.simulator.books.turned_away()
            self._reset()
            return None
        length = _body_length(headers)
        if "expect" in headers:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body_at = end + 4
        while len(data) < body_at + length:
            more = self.request.recv(65536)
            if not more:
                return None
            data += more
        self._rest = data[body_at + length :]
        return Request(method, path, query, headers, data[body_at : body_at + length], keep)


def _head(head: str) -> tuple[str, str, bool, dict[str, str]]:
    """Method, target, whether the connection may stay, and headers. Raises _Unreadable."""
    lines = head.lstrip("\r\n").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _Unreadable(400)
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon:
            raise _Unreadable(400)
        headers[name.lower()] = value.strip()
    connection = headers.get("connection", "").lower()
    keep = connection == "keep-alive" if words[2] == "HTTP/1.0" else connection != "close"
    return words[0], words[1], keep, headers


def _body_length(headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise _Unreadable(411)  # chunked bodies; no client of this service needs them
    given = headers.get("content-length", "0")
    if not (given.isascii() and given.isdigit()):
        raise _Unreadable(400)
    length = int(given) if len(given) < 10 else BODY_LIMIT + 1
    if length > BODY_LIMIT:
        raise _Unreadable(413)
    return length


def _report_fields(simulator: Simulator, bills: bool, calls: bool) -> dict[str, Any]:
    fields = asdict(simulator.report(bills=bills))
    fields["calls"] = [call._asdict() for call in fields["calls"]]
    hidden = {"calls_by_bill": not bills, "calls": not calls}
    return {name: value for name, value in fields.items() if not hidden.get(name)}


def _replaced(simulator: Simulator, body: bytes) -> tuple[int, dict[str, Any]]:
    try:
        script = Script.parse(json.loads(body.decode()))
    except ScriptError as error:
        return 400, {"error": str(error)}
    except (ValueError, RecursionError):
        return 400, {"error": "the script is no JSON"}
    simulator.replace(script)
    return 200, {"status": "ok"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = BACKLOG

    def __init__(self, address: tuple[str, int], simulator: Simulator) -> None:
        self.simulator = simulator
        self._open: set[socket.socket] = set()
        self._dated = (0, b"")
        super().__init__(address, _Connection)

    def server_bind(self) -> None:
        # HTTPServer's own looks up the host's full name: seconds where there is no name server.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]

    def date(self) -> bytes:
        """The Date header: the gateway's clock, formatted once per second."""
        second = int(self.simulator.books.now())
        dated = self._dated
        if dated[0] != second:
            dated = self._dated = (second, formatdate(second, usegmt=True).encode())
        return dated[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self._open.discard(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def cut(self) -> None:
        """Close what clients keep alive, or its threads would go on answering after `stop`."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


# --- the simulator ------------------------------------------------------------------------------------------

_PAIR_LOCK: Final = threading.Lock()


@functools.cache
def _generated() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def own_key() -> rsa.RSAPrivateKey:
    """The RSA-2048 pair of simulators without a given key: one per process, since making it takes a while."""
    with _PAIR_LOCK:
        return _generated()


def private_pem(key: rsa.RSAPrivateKey) -> bytes:
    """An unencrypted PKCS#8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_private(path: Path, pem: bytes) -> None:
    """Write a key that only its owner may read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(pem)


class Simulator:
    """The gateway on a port of its own; a context manager. Safe to use from several threads.

    `port` 0 takes a free one, which a later `start` keeps: stopped, it refuses connections, started again it
    remembers everything. Without `public_key`, a key pair is made (`private_key_pem`). `keep_calls` bounds
    `Report.calls`. Raises ValueError for an unknown `signature`, `start` OSError when it cannot listen.
    """

    def __init__(
        self,
        script: Script = PLAIN,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        client_id: str = "demo-client",
        client_secret: str = "demo-secret",
        channel_id: str = "95051",
        public_key: RSAPublicKey | None = None,
        signature: str = "hmac-sha512",
        sign_path: str = EXPIRE_PATH,
        base_path: str = "/v1.0",
        keep_calls: int = 1000,
    ) -> None:
        if signature not in SIGNATURES:
            raise ValueError(f"signature is one of {', '.join(SIGNATURES)}, not {signature!r}")
        self.books = Books(script, keep_calls)
        self.rules = Rules(
            client_id=client_id,
            client_secret=client_secret.encode(),
            channel_id=channel_id,
            public_key=public_key or own_key().public_key(),
            signature=signature,
            sign_path=sign_path,
        )
        self.token_path = base_path + TOKEN_PATH
        self.expire_path = base_path + EXPIRE_PATH
        self._host, self._port, self._base_path = host, port, base_path
        self._has_private_key = public_key is None
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Listen, and serve in a thread of its own. Does nothing when it already does."""
        if self._server is not None:
            return self
        server = _Server((self._host, self._port), self)
        self._port = server.server_address[1]
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="simulator", daemon=True
        )
        self._server = server
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening and close every connection, calls in flight included."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        server.shutdown()
        server.server_close()
        self._thread.join()
        server.cut()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port; 0 before the first `start` of a simulator that takes a free one."""
        return self._port

    @property
    def base_url(self) -> str:
        """The GATEWAY_BASE_URL of a worker on this machine."""
        host = "127.0.0.1" if self._host in ("", "0.0.0.0") else self._host
        return f"http://{host}:{self._port}{self._base_path}"

    @property
    def private_key_pem(self) -> bytes:
        """The client's private key, PKCS#8. Raises ValueError when only a public key was given."""
        if not self._has_private_key:
            raise ValueError("the simulator was given a public key only; the private key is with its owner")
        return private_pem(own_key())

    def environment(self, key_file: Path) -> dict[str, str]:
        """The GATEWAY_ settings of a worker that talks to this simulator.

        Writes the private key to `key_file` (mode 0600), unless a public key was given: then the file is
        taken to hold the private key that belongs to it.
        """
        if self._has_private_key:
            write_private(key_file, self.private_key_pem)
        loopback = self.base_url.startswith(("http://127.", "http://localhost:"))
        allowed = {} if loopback else {"GATEWAY_ALLOW_HTTP": "true"}
        return allowed | {
            "GATEWAY_BASE_URL": self.base_url,
            "GATEWAY_CLIENT_ID": self.rules.client_id,
            "GATEWAY_CLIENT_SECRET": self.rules.client_secret.decode(),
            "GATEWAY_PRIVATE_KEY_FILE": str(key_file.absolute()),
            "GATEWAY_CHANNEL_ID": self.rules.channel_id,
            "GATEWAY_SIGNATURE": self.rules.signature,
            "GATEWAY_SIGN_PATH": self.rules.sign_path,
        }

    def report(self, *, bills: bool = True) -> Report:
        """What it has seen. `bills=False` leaves `calls_by_bill` empty: cheap, however many there were."""
        return self.books.report(bills=bills)

    def replace(self, script: Script) -> None:
        """Play another script, from its start, while running. Tokens, ids, bills and counts stay."""
        self.books.replace(script)
