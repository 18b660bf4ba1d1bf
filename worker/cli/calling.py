"""Calls of the gateway by commands that look closely at its answers, made as the worker makes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from worker.cli import INVALID, Trouble
from worker.core.command import IDENTIFIER_RULE, Command, is_identifier
from worker.core.scheme import NO_TOKEN, WITH_SECRET
from worker.settings import GatewaySettings
from worker.shells.clock import SystemClock

if TYPE_CHECKING:
    from worker.core.diagnosis import CalledService, Finding
    from worker.core.grant import Grant
    from worker.shells.gateway import GatewayClient


def check_identifiers(given: Mapping[str, str | None]) -> None:
    """Name on the command line → bill number or merchant id, or None where it was not given. Raises `Trouble`."""
    for name, value in given.items():
        if value is not None and not is_identifier(value):
            raise Trouble(f"{name} must be {IDENTIFIER_RULE}", code=INVALID)


def merchant_of(gateway: GatewaySettings, given: str | None) -> str:
    """The merchant that was given, else that of the settings. Raises `Trouble` where there is none."""
    merchant = gateway.merchant_id if given is None else given
    if merchant is None:
        raise Trouble("the bill needs a merchant; give --merchant-id, or set GATEWAY_MERCHANT_ID", code=INVALID)
    return merchant


class Calling:
    """One client, and the token that it was given."""

    def __init__(self, gateway: GatewaySettings) -> None:
        self.gateway = gateway
        self.skew: float | None = None
        """Seconds that our clock is ahead of the gateway's, once an answer had a Date."""
        self.token: str | None = None
        self._client: GatewayClient | None = None

    def close(self) -> None:
        """Gives its connection back."""
        if self._client is not None:
            self._client.close()

    def fetch(self) -> Grant | None:
        """A token; None where the gateway has none. Raises `Trouble` with what its refusal is a sign of, and
        `CredentialsError`."""
        from worker.core import diagnosis
        from worker.core.ports import TokenUnavailable
        from worker.core.verdict import NoReply
        from worker.shells.credentials import Credentials
        from worker.shells.gateway import GatewayClient
        from worker.wiring import endpoint, fetcher, transport

        gateway = self.gateway
        credentials = Credentials(gateway, gateway.reread)
        adapter = transport(gateway, os.environ)
        self._client = GatewayClient(
            endpoint(gateway),
            self,
            trust=credentials,
            adapter=adapter,
        )
        if gateway.signature == NO_TOKEN:
            self.token = ""
            return None
        try:
            grant = fetcher(self._client, credentials, gateway, SystemClock())()
        except TokenUnavailable as failure:
            answer = failure.answer or NoReply(False, failure.verdict.message)
            raise Trouble(diagnosis.token(answer, self._service("TOKEN", gateway.token_path)).text) from None
        self.token = grant.value
        return grant

    def expire(self, command: Command, gateway: GatewaySettings) -> Finding:
        """What comes of an expire call, after `fetch`, that is signed as ``gateway`` says."""
        from worker.core import diagnosis, request
        from worker.shells.credentials import Credentials
        from worker.wiring import external_ids, partner

        assert self._client is not None
        assert self.token is not None
        clock = SystemClock()
        sign = Credentials(gateway, gateway.reread).sign
        token = "" if gateway.signature == NO_TOKEN else self.token
        signed = request.sign(command, partner(gateway), sign, token, clock.epoch(), external_ids(clock)())
        return diagnosis.expire(self._client.send(signed), self._service("EXPIRE", gateway.expire_path))

    def can_sign(self, scheme: str) -> bool:
        """Whether there is what ``scheme`` signs with: a token for all but one, and for one the client secret."""
        if scheme == WITH_SECRET and self.gateway.client_secret is None:
            return False
        return scheme == NO_TOKEN or bool(self.token)

    def _service(self, which: str, path: str) -> CalledService:
        from worker.core.diagnosis import CalledService

        return CalledService(self.gateway.base_url + path, f"GATEWAY_{which}_PATH", self.skew)

    # -- the client's observer -----------------------------------------------------------------------------------------

    def request(self, operation: str, response_code: str, seconds: float) -> None:
        """Not of interest here."""

    def clock_skew(self, seconds: float) -> None:
        """How far our clock is ahead."""
        self.skew = seconds
