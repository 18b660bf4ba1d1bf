"""What both peers share: settings, the command, the signature, the answer's meaning, the outcome.

All of it is leaner than the worker's own, which favours the peers: fewer checks, a shorter outcome, and no metrics,
log, breaker, deduplication, lanes or delayed rounds.
"""

import base64
import hashlib
import hmac
import json
import os
import secrets
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

ATTEMPTS: Final = 4
BACKOFF: Final = 0.02  # seconds, doubled with each attempt
TIMEOUT: Final = 20.0  # seconds an answer may take

AMQP_URL: Final = os.environ["AMQP_URL"]
COMMANDS: Final = f"{os.environ['AMQP_PREFIX']}.sweep"
OUTCOMES: Final = f"{os.environ['AMQP_PREFIX']}.outcomes"
CONCURRENCY: Final = int(os.environ["WORKER_CONCURRENCY"])

_BASE: Final = os.environ["GATEWAY_BASE_URL"]
_PATH: Final = "/qr/qr-mpm-expire-billnumber"
_CLIENT: Final = os.environ["GATEWAY_CLIENT_ID"]
_CHANNEL: Final = os.environ["GATEWAY_CHANNEL_ID"]
_SECRET: Final = os.environ["GATEWAY_CLIENT_SECRET"].encode()
_KEY_FILE: Final = Path(os.environ["GATEWAY_PRIVATE_KEY_FILE"])
_ZONE: Final = timezone(timedelta(hours=7))

EXPIRE_URL: Final = _BASE + _PATH
TOKEN_URL: Final = _BASE + "/access-token/b2b"
TOKEN_BODY: Final = b'{"grantType":"client_credentials"}'

_run: Final = f"{secrets.randbelow(10**16):016d}"
_numbers: Final = count(1)


class Command(NamedTuple):
    """A command that may be sent: its identity, its bill, and the exact bytes for the gateway."""

    id: str
    bill: str
    body: bytes


class Answer(NamedTuple):
    """What an answer means: `done`, `refused`, `token` (fetch a new one) or `again`; and its code."""

    verdict: str
    code: str


class Outcome(NamedTuple):
    """What is published: routing key, `message_id`, body."""

    key: str
    id: str
    body: bytes


def command(message_id: str, raw: bytes) -> Command:
    """Raises ValueError, KeyError or TypeError for what is no command."""
    fields = json.loads(raw)
    bill, merchant = fields["billnumber"], fields["additionalInfo"]["merchantId"]
    if not (isinstance(bill, str) and 0 < len(bill) <= 64 and isinstance(merchant, str) and merchant):
        raise ValueError("no bill or no merchant")
    sent = {"billnumber": bill, "additionalInfo": {"merchantId": merchant}}
    return Command(message_id, bill, json.dumps(sent, separators=(",", ":")).encode())


def external_id() -> str:
    """Numeric, 32 digits, never twice."""
    return f"{_run}{next(_numbers):016d}"


def headers(token: str, body: bytes, ext_id: str) -> dict[str, str]:
    """The signed headers of one attempt."""
    timestamp = _now()
    digest = hashlib.sha256(body).hexdigest()
    to_sign = f"POST:{_PATH}:{token}:{digest}:{timestamp}".encode()
    return {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {token}",
        "X-TIMESTAMP": timestamp,
        "X-PARTNER-ID": _CLIENT,
        "X-EXTERNAL-ID": ext_id,
        "X-SIGNATURE": base64.b64encode(hmac.digest(_SECRET, to_sign, "sha512")).decode(),
        "CHANNEL-ID": _CHANNEL,
        "X-CHANNEL-ID": _CHANNEL,
    }


def token_headers() -> dict[str, str]:
    """The signed headers of one token request."""
    key = serialization.load_pem_private_key(_KEY_FILE.read_bytes(), None)
    assert isinstance(key, RSAPrivateKey)
    timestamp = _now()
    signature = key.sign(f"{_CLIENT}|{timestamp}".encode(), padding.PKCS1v15(), hashes.SHA256())
    return {
        "Content-Type": "application/json",
        "X-TIMESTAMP": timestamp,
        "X-CLIENT-KEY": _CLIENT,
        "X-SIGNATURE": base64.b64encode(signature).decode(),
    }


def judge(status: int, content: bytes) -> Answer:
    """The short form of the gateway's table."""
    try:
        code = str(json.loads(content)["responseCode"])
    except (ValueError, KeyError, TypeError):
        return Answer("again", "")
    if status == 200 and code in ("2009300", "2009100"):
        return Answer("done", code)
    if status == 401:
        return Answer("token", code)
    return Answer("again" if status >= 500 or status in (200, 202, 429) else "refused", code)


def outcome(asked: Command, answer: Answer, attempts: int, ext_id: str) -> Outcome:
    """The outcome of a command after its last answer."""
    status = {"done": "expired", "refused": "rejected"}.get(answer.verdict, "unresolved")
    made = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{asked.id}\n{status}"))
    fields = {
        "outcomeId": made,
        "commandId": asked.id,
        "billnumber": asked.bill,
        "status": status,
        "responseCode": answer.code,
        "attempts": attempts,
        "externalId": ext_id,
        "completedAt": _now(),
    }
    return Outcome(f"sweep.{status}", made, json.dumps(fields, separators=(",", ":")).encode())


class Token:
    """The token at hand; `renew` takes the token service's answer."""

    def __init__(self) -> None:
        self._value = ""
        self._until = 0.0

    def get(self) -> str | None:
        """None when there is none that still lives."""
        return self._value if time.monotonic() < self._until else None

    def renew(self, asked: float, content: bytes) -> str:
        """`asked` is the monotonic time before the request."""
        grant = json.loads(content)
        self._value, self._until = grant["accessToken"], asked + int(grant["expiresIn"]) - 30
        return self._value

    def drop(self, value: str) -> None:
        """The gateway does not take it any more."""
        if value == self._value:
            self._until = 0.0


def properties(make: Callable[..., Any], asked: Command, result: Outcome) -> Any:
    """The AMQP properties of an outcome, made by the library's own class."""
    return make(content_type="application/json", delivery_mode=2, correlation_id=asked.id, message_id=result.id)


def _now() -> str:
    return datetime.now(_ZONE).isoformat(timespec="milliseconds")
