"""What the gateway can check of a request without any memory: pure, one request at a time.

From the gateway's document alone, not with the worker's signing code, so that an agreement between the two means
something.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from worker.sandbox.simulator.script import Fault

NO_TOKEN: Final = "rsa-sha256-no-token"
SIGNATURES: Final = ("hmac-sha512", "rsa-sha256", NO_TOKEN)


class Request(NamedTuple):
    """One HTTP request as it came. Header names in lower case; of a repeated header the last one counts."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes
    keep: bool


@dataclass(frozen=True, slots=True)
class Registration:
    """What the gateway knows about its one client, and which signatures it accepts."""

    client_id: str
    client_secret: bytes = field(repr=False)
    channel_id: str
    public_key: RSAPublicKey
    signature: str
    sign_path: str


class Claim(NamedTuple):
    """An expire call after the checks that need no memory: what is wrong with it, and what it asks for. ``token`` is
    None where the scheme has none."""

    refusal: Fault | None
    token: str | None
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
    if scheme == NO_TOKEN:
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


def _header_refusal(headers: Mapping[str, str], registration: Registration, now: float, skew: float) -> Fault | None:
    moment = _moment(headers.get("x-timestamp", ""))
    external_id = headers.get("x-external-id", "")
    channels = {headers[name] for name in ("channel-id", "x-channel-id") if name in headers}
    if (
        moment is None
        or not _is_json(headers.get("content-type", ""))
        or not headers.get("x-partner-id")
        or not headers.get("x-signature")
        or channels != {registration.channel_id}
        or not (external_id.isascii() and external_id.isdigit() and len(external_id) <= 36)
    ):
        return BAD_HEADER
    if headers["x-partner-id"] != registration.client_id:
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


def claim_of(request: Request, registration: Registration, now: float, skew: float) -> Claim:
    """An expire call, checked as far as that goes without memory. `now` and `skew` in seconds."""
    headers = request.headers
    refusal = _header_refusal(headers, registration, now, skew)
    kind, _, token = headers.get("authorization", "").partition(" ")
    token = token.strip() if kind.lower() == "bearer" else ""
    signed = False
    if refusal is None:
        message = string_to_sign(
            registration.signature, registration.sign_path, token, request.body, headers["x-timestamp"]
        )
        if registration.signature == "hmac-sha512":
            signed = hmac_signed(registration.client_secret, message, headers["x-signature"])
        else:
            signed = rsa_signed(registration.public_key, message, headers["x-signature"])
    asked = None if registration.signature == NO_TOKEN else token
    return Claim(refusal, asked, signed, headers.get("x-external-id", ""), *_asked(request.body))


def token_refusal(request: Request, registration: Registration, now: float, skew: float) -> Fault | None:
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
    if headers["x-client-key"] != registration.client_id:
        return Fault(code="4017300", message="Unauthorized. Unknown Client")
    if abs(moment - now) > skew:
        return Fault(code="4017300", message="Unauthorized. X-TIMESTAMP Out Of Range")
    message = f"{registration.client_id}|{headers['x-timestamp']}".encode()
    if not rsa_signed(registration.public_key, message, headers["x-signature"]):
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
