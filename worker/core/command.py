"""What a delivery asks for: the body parsed to a `Command`, or to the contract's reason why it is invalid."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections import Counter
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

MAX_BODY_BYTES: Final = 65_536  # keeps one bad producer from filling memory and the dead letters
MAX_REFERENCE: Final = 128
MAX_DETAIL: Final = 300  # error text travels in headers; a header frame is bounded (128 KiB by default)

IDENTIFIER: Final = r"[!-~]{1,64}"
IDENTIFIER_RULE: Final = "1 to 64 printable ASCII characters without blanks"
RFC3339: Final = (
    r"([0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01]))[Tt]"
    r"((?:[01][0-9]|2[0-3]):[0-5][0-9]):([0-5][0-9]|60)(?:\.([0-9]+))?"
    r"([Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
"""Patterns without anchors, in the syntax that Python and ECMA-262 share: the JSON Schema of commands has them, too."""

_IDENTIFIER = re.compile(IDENTIFIER + r"\Z")
_RFC3339 = re.compile(RFC3339 + r"\Z")
_COMMAND_NAMESPACE = uuid.UUID("5a1a31a2-2f4e-5f0f-9a53-8d6f2a0c0c93").bytes

InvalidReason = Literal["malformed_json", "invalid_command", "too_large"]


class Command(NamedTuple):
    """A well-formed order to expire one bill. ``not_after`` is seconds since the epoch."""

    billnumber: str
    merchant_id: str
    reference: str | None = None
    not_after: float | None = None


class Invalid(NamedTuple):
    """Why a body is no command. ``detail`` is for people; what could be read is echoed in the outcome."""

    reason: InvalidReason
    detail: str
    billnumber: str | None = None
    reference: str | None = None


class _Refused(ValueError):
    """The body is JSON but no command; the text says why."""


class _Duplicate(Exception):
    """An object names a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class _Number:
    """Replaces any JSON number: no field takes one, and huge ones cost nothing this way."""


_NUMBER = _Number()


def parse(body: bytes, default_merchant: str | None = None) -> Command | Invalid:
    """The command in ``body`` (UTF-8 JSON, at most 64 KiB); never raises.

    ``default_merchant`` is used if the command has none.
    """
    if len(body) > MAX_BODY_BYTES:
        return Invalid("too_large", f"{len(body)} bytes, at most {MAX_BODY_BYTES} are allowed")
    duplicate = None
    try:
        text = body.decode()  # here: json would also take UTF-16 and UTF-32. A byte-order mark is refused by it
        try:
            value = _decode(text)
        except _Duplicate as found:
            # Whether the rest is JSON at all decides which of the two reasons it is.
            value, duplicate = _decode_plainly(text), found.key
    except (ValueError, RecursionError) as error:
        return Invalid("malformed_json", _short(f"not JSON in UTF-8: {_cause(body) or error}"))
    fields = value if isinstance(value, dict) else {}
    try:
        if not isinstance(value, dict):
            raise _Refused("the body must be a JSON object")
        if duplicate is not None:
            raise _Refused(f"duplicate key {duplicate!r}")
        return _command(fields, default_merchant)
    except _Refused as error:
        return Invalid("invalid_command", _short(str(error)), _echo_bill(fields), _echo_reference(fields))


_MARKS: Final = (
    (b"\x1f\x8b", "it is compressed with gzip; send it as it is"),
    (b"\x78\x01", "it is compressed with deflate; send it as it is"),
    (b"\x78\x9c", "it is compressed with deflate; send it as it is"),
    (b"\x78\xda", "it is compressed with deflate; send it as it is"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd; send it as it is"),
    (b"\xef\xbb\xbf", "it begins with a byte-order mark; leave that out"),
    (b"\xff\xfe\0\0", "it is UTF-32; send UTF-8"),
    (b"\0\0", "it is UTF-32; send UTF-8"),
    (b"\xff\xfe", "it is UTF-16; send UTF-8"),
    (b"\xfe\xff", "it is UTF-16; send UTF-8"),
    (b"{\0\0", "it is UTF-32; send UTF-8"),
    (b"{\0", "it is UTF-16; send UTF-8"),
    (b"\0{", "it is UTF-16; send UTF-8"),
    (b"eyJ", "it is base64 of JSON; send the JSON itself"),
)


def _cause(body: bytes) -> str:
    """Why a body is no JSON in UTF-8, by how it begins; empty where the parser's own words say it."""
    if not body.strip():
        return "the body is empty"
    return next((cause for mark, cause in _MARKS if body.startswith(mark)), "")


def command_id(message_id: str | None, body: bytes) -> str:
    """The command's identity: its ``message_id``, else a UUID derived from the body."""
    return message_id or name_uuid(_COMMAND_NAMESPACE, body.hex().encode())


def name_uuid(namespace: bytes, name: bytes) -> str:
    """The UUID of version 5 (RFC 9562) of this name, in the namespace with these 16 bytes. `uuid.uuid5` makes the same,
    in four times the time."""
    found = hashlib.sha1(namespace + name, usedforsecurity=False).hexdigest()
    variant = "89ab"[int(found[16], 16) & 3]
    return f"{found[:8]}-{found[8:12]}-5{found[13:16]}-{variant}{found[17:20]}-{found[20:32]}"


def is_identifier(text: str) -> bool:
    """Whether a bill number or a merchant id follows `IDENTIFIER_RULE`."""
    return _IDENTIFIER.match(text) is not None


def parse_rfc3339(text: str) -> float:
    """Seconds since the epoch. Raises `ValueError` for anything RFC 3339 does not allow (an offset is required)."""
    match = _RFC3339.match(text)
    if match is None:
        raise ValueError("not an RFC 3339 time such as 2026-11-22T23:59:59+07:00")
    day, minutes, seconds, fraction, offset = match.groups()
    # A leap second is legal in RFC 3339 and unknown to datetime; the second before it is the safe reading.
    seconds = "59" if seconds == "60" else seconds
    micro = ((fraction or "") + "000000")[:6]
    offset = "+00:00" if offset in "Zz" else offset
    try:
        return datetime.fromisoformat(f"{day}T{minutes}:{seconds}.{micro}{offset}").timestamp()
    except OverflowError as error:  # year 1 or 9999 pushed over the edge by its offset
        raise ValueError("the time is out of range") from error


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        raise _Duplicate(next(key for key, count in Counter(key for key, _ in items).items() if count > 1))
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON value")


def _number(_: str) -> object:
    return _NUMBER


# Made once: json.loads with hooks builds a decoder for every call.
_numbers: Final[dict[str, Any]] = {"parse_int": _number, "parse_float": _number, "parse_constant": _refuse_constant}
_decode = json.JSONDecoder(object_pairs_hook=_pairs, **_numbers).decode
_decode_plainly = json.JSONDecoder(**_numbers).decode


def _command(fields: dict[str, Any], default_merchant: str | None) -> Command:
    return Command(_bill(fields), _merchant(fields, default_merchant), _reference(fields), _not_after(fields))


def _bill(fields: dict[str, Any]) -> str:
    plain, camel = fields.get("billnumber"), fields.get("billNumber")
    if plain is None and camel is None:
        raise _Refused("billnumber is missing")
    bill = _identifier("billNumber" if plain is None else "billnumber", camel if plain is None else plain)
    if plain is not None and camel is not None and bill != _identifier("billNumber", camel):
        raise _Refused("billnumber and billNumber differ")
    return bill


def _merchant(fields: dict[str, Any], default: str | None) -> str:
    info = fields.get("additionalInfo")
    if info is not None and not isinstance(info, dict):
        raise _Refused("additionalInfo must be an object")
    value = info.get("merchantId") if info else None
    if value is not None:
        return _identifier("additionalInfo.merchantId", value)
    if default is None:
        raise _Refused("additionalInfo.merchantId is missing, and GATEWAY_MERCHANT_ID sets no default")
    return default


def _identifier(name: str, value: object) -> str:
    if isinstance(value, _Number):
        raise _Refused(f"{name} must be a string: a number has already lost its leading zeros")
    if not isinstance(value, str):
        raise _Refused(f"{name} must be a string")
    if not is_identifier(value):
        raise _Refused(f"{name} must be {IDENTIFIER_RULE}")
    return value


def _reference(fields: dict[str, Any]) -> str | None:
    value = fields.get("reference")
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_REFERENCE:
        raise _Refused(f"reference must be a string of at most {MAX_REFERENCE} characters")
    return value


def _not_after(fields: dict[str, Any]) -> float | None:
    value = fields.get("notAfter")
    if value is None:
        return None
    if not isinstance(value, str):
        raise _Refused("notAfter must be a string")
    try:
        return parse_rfc3339(value)
    except ValueError as error:
        raise _Refused(f"notAfter: {error}") from None


def _echo_bill(fields: dict[str, Any]) -> str | None:
    value = fields.get("billnumber") or fields.get("billNumber")
    return value if isinstance(value, str) and is_identifier(value) else None


def _echo_reference(fields: dict[str, Any]) -> str | None:
    value = fields.get("reference")
    return value if isinstance(value, str) and len(value) <= MAX_REFERENCE else None


def _short(text: str) -> str:
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 1] + "…"
