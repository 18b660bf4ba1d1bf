"""What is sent: the body, the external id and the signed headers of one attempt."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Final, NamedTuple

from worker.core import jakarta
from worker.core.command import Command
from worker.core.signing import Sign

EXTERNAL_ID_DIGITS: Final = 36  # SNAP: a numeric string of at most 36, unique in the day
NODE_DIGITS: Final = 11
_NODES: Final = 10**NODE_DIGITS
_SERIALS: Final = 10 ** (EXTERNAL_ID_DIGITS - 17 - NODE_DIGITS)


class SignedRequest(NamedTuple):
    """The exact bytes and headers of one expire call. Holds a bearer token: never log its headers."""

    external_id: str
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Partner:
    """What every expire call of this partner has in common."""

    client_id: str
    channel_id: str
    channel_headers: tuple[str, ...] = ("CHANNEL-ID", "X-CHANNEL-ID")
    sign_path: str = "/qr/qr-mpm-expire-billnumber"
    bill_field: str = "billnumber"
    milliseconds: bool = True


def external_id(epoch: float, node: int, serial: int) -> str:
    """36 digits, unique for ever: 17 of Jakarta time, 11 of the process's random ``node``, 8 of its ``serial``.

    The time keeps restarts apart, the node keeps processes apart, the serial keeps calls of one millisecond apart.
    """
    return f"{jakarta.digits(epoch)}{node % _NODES:011d}{serial % _SERIALS:08d}"


def external_ids(epoch: Callable[[], float], node: int) -> Callable[[], str]:
    """What gives a new external id of this process at each call."""
    serial = itertools.count()
    return lambda: external_id(epoch(), node, next(serial))


def body(command: Command, bill_field: str = "billnumber") -> bytes:
    """The gateway's body, compact, in the order of its document. Built once: these bytes are hashed and sent."""
    bill, merchant = encode_basestring_ascii(command.billnumber), encode_basestring_ascii(command.merchant_id)
    return f'{{"{bill_field}":{bill},"additionalInfo":{{"merchantId":{merchant}}}}}'.encode("ascii")


def sign(command: Command, partner: Partner, signer: Sign, token: str, epoch: float, ext_id: str) -> SignedRequest:
    """One attempt's request at ``epoch``: one timestamp for header and signature, its own external id. With an empty
    ``token`` there is no Authorization."""
    payload = body(command, partner.bill_field)
    timestamp = jakarta.iso(epoch, milliseconds=partner.milliseconds)
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    headers["X-TIMESTAMP"] = timestamp
    headers["X-PARTNER-ID"] = partner.client_id
    headers["X-EXTERNAL-ID"] = ext_id
    headers["X-SIGNATURE"] = signer("POST", partner.sign_path, token, payload, timestamp)
    for name in partner.channel_headers:
        headers[name] = partner.channel_id
    return SignedRequest(ext_id, payload, headers)
