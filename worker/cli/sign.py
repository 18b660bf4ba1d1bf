"""`qris-expire sign`: what would be sent for a bill, to compare it with the provider's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Final

from worker.cli import INVALID, Trouble
from worker.cli.calling import Calling, check_identifiers, merchant_of
from worker.cli.command_line import Argument, Option
from worker.core.command import Command, parse_rfc3339
from worker.core.scheme import NO_TOKEN
from worker.settings import GatewaySettings, load
from worker.shells.clock import SystemClock

if TYPE_CHECKING:
    from worker.core.request import SignedRequest
    from worker.shells.credentials import Credentials

PLACEHOLDER: Final = "ACCESS-TOKEN"
HIDDEN: Final = "***"


def sign(
    bill: Annotated[str, Argument(help="The bill number.")],
    merchant_id: Annotated[str | None, Option(help="The merchant of the bill; else GATEWAY_MERCHANT_ID.")] = None,
    token: Annotated[
        str | None, Option(help=f"The access token to sign with; else the word {PLACEHOLDER} stands for it.")
    ] = None,
    fetch_token: Annotated[bool, Option(help="Fetch a token from the gateway, and sign with it.")] = False,
    timestamp: Annotated[str | None, Option(metavar="RFC3339", help="The time to sign with; else now.")] = None,
    show_secrets: Annotated[bool, Option(help="Print token and signature in full, instead of ***.")] = False,
) -> int:
    """Prints an expire call without sending it: the string to sign, the body and every header.

    The code that signs for the worker makes it, with the settings as they are. Compare it with what the signing page of
    the provider makes of the same token, time (--timestamp) and body. Where the strings differ, there is the mistake.
    Where they are equal and the signatures differ, the secret or the key is wrong.

    Exit code 0: printed. 1: no token could be fetched. 2: input or settings are wrong.

    Examples:

        qris-expire sign 10092081 --merchant-id 121000001
        qris-expire sign 10092081 --fetch-token --show-secrets
    """
    if token is not None and fetch_token:
        raise Trouble("--token and --fetch-token exclude each other; give one", code=INVALID)
    from worker.shells.credentials import Credentials

    gateway = load(GatewaySettings)
    credentials = Credentials(gateway, gateway.reread)
    command = _command(bill, merchant_id, gateway)
    used = _fetched(gateway) if fetch_token else token or PLACEHOLDER
    if gateway.signature == NO_TOKEN and token is None:
        used = ""
    request, signed = _signed(command, gateway, credentials, used, _moment(timestamp))
    hidden = [request.headers["X-SIGNATURE"], *([used] if used not in ("", PLACEHOLDER) else [])]
    secrets = () if show_secrets else tuple(hidden)
    _print(gateway, request, signed, lambda text: _redacted(text, secrets))
    return 0


def _command(bill: str, merchant_id: str | None, gateway: GatewaySettings) -> Command:
    merchant = merchant_of(gateway, merchant_id)
    check_identifiers({"BILL": bill, "--merchant-id": merchant})
    return Command(bill, merchant)


def _moment(text: str | None) -> float:
    try:
        return time.time() if text is None else parse_rfc3339(text)
    except ValueError as error:
        raise Trouble(f"--timestamp: {error}", code=INVALID) from None


def _fetched(gateway: GatewaySettings) -> str:
    with closing(Calling(gateway)) as calling:
        grant = calling.fetch()
        return "" if grant is None else grant.value


def _signed(
    command: Command, gateway: GatewaySettings, credentials: Credentials, token: str, epoch: float
) -> tuple[SignedRequest, str]:
    """The request, and the string that was signed."""
    from worker.core import request
    from worker.core.signing import string_to_sign
    from worker.wiring import external_ids, partner

    signed: list[str] = []

    def sign(method: str, path: str, token: str, body: bytes, timestamp: str) -> str:
        signed.append(string_to_sign(gateway.signature, method, path, token, body, timestamp))
        return credentials.sign(method, path, token, body, timestamp)

    made = request.sign(command, partner(gateway), sign, token, epoch, external_ids(SystemClock())())
    return made, signed[0]


def _redacted(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def _print(gateway: GatewaySettings, request: SignedRequest, signed: str, shown: Callable[[str], str]) -> None:
    means = "GATEWAY_CLIENT_SECRET" if gateway.signature == "hmac-sha512" else "GATEWAY_PRIVATE_KEY_FILE"
    lines = {
        "call": f"POST {gateway.base_url}{gateway.expire_path}",
        "signed with": f"{gateway.signature} and {means}",
        "string to sign": shown(signed),
        "body": request.body.decode("ascii"),
    }
    for name, text in lines.items():
        print(f"{name:<15} {text}")
    for name, value in request.headers.items():
        print(f"{'header':<15} {name}: {shown(value)}")
    print("no expire was sent", file=sys.stderr)
