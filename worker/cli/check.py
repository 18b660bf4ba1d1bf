"""`qris-expire check`: is everything in place before the first command?"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from worker.settings import AmqpSettings, GatewaySettings, Group, RetrySettings

G = TypeVar("G", bound="Group")


class _Failed(Exception):
    """What is wrong and what to do, a line each."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines


class _Skipped(Exception):
    """It cannot be looked at; the text says what stands in the way."""


def check() -> int:
    """Looks at settings, key, broker, topology and token, a line each: ok, or why not and what to do.

    It asks the gateway for a token and sends no expire; at the broker it changes nothing.

    Exit code 0: all ok. 1: something is not.
    """
    report = _Report()
    amqp, retry, gateway = report.groups()
    report.line("key", lambda: _key(gateway))
    report.line("broker", lambda: _broker(amqp))
    report.line("topology", lambda: _topology(amqp, retry))
    report.line("token", lambda: _token(gateway))
    return 1 if report.failed else 0


class _Report:
    """The lines, and whether one of them was bad."""

    def __init__(self) -> None:
        self.failed = False

    def line(self, subject: str, look: Callable[[], str]) -> None:
        try:
            self._print(subject, "ok", look())
        except _Skipped as skipped:
            self.failed = True
            self._print(subject, "skipped", str(skipped))
        except _Failed as failed:
            self.failed = True
            for text in failed.lines:
                self._print(subject, "FAILED", text)

    def groups(self) -> tuple[AmqpSettings | None, RetrySettings | None, GatewaySettings | None]:
        """All settings, as far as they are valid: a wrong gateway must not hide what is wrong with the broker."""
        from worker.settings import GROUPS, AmqpSettings, GatewaySettings, RetrySettings, SettingsError, load

        try:
            load()
        except SettingsError as error:
            problems = error.problems
            self.line("settings", lambda: _fail(*problems))
        else:
            self.line("settings", lambda: f"{sum(len(group.model_fields) for group in GROUPS)} in order")
        return _valid(AmqpSettings), _valid(RetrySettings), _valid(GatewaySettings)

    @staticmethod
    def _print(subject: str, state: str, text: str) -> None:
        typer.echo(f"{subject:<9} {state:<8} {text}".rstrip())


def _fail(*lines: str) -> str:
    raise _Failed(*lines)


def _valid(group: type[G]) -> G | None:
    from worker.settings import SettingsError, load

    try:
        return load(group)
    except SettingsError:
        return None


def _key(gateway: GatewaySettings | None) -> str:
    from worker.shells.credentials import Credentials, CredentialsError

    if gateway is None:
        raise _Skipped("the GATEWAY_ settings are not in order")
    try:
        credentials = Credentials(gateway, gateway.reread)
    except CredentialsError as error:
        raise _Failed(str(error)) from None
    return f"RSA, {credentials.key_bits} bits; expires are signed with {gateway.signature}"


def _broker(amqp: AmqpSettings | None) -> str:
    from worker.shells.amqp.session import BrokerError, session

    if amqp is None:
        raise _Skipped("the AMQP_ settings are not in order")
    try:
        with session(amqp, "check") as connection:
            properties = connection._impl.server_properties or {}
    except BrokerError as error:
        raise _Failed(str(error)) from None
    version = properties.get("version", b"?")
    return f"RabbitMQ {version.decode() if isinstance(version, bytes) else version}"


def _topology(amqp: AmqpSettings | None, retry: RetrySettings | None) -> str:
    from worker.core.topology import topology
    from worker.shells.amqp.session import BrokerError, session, verify

    if amqp is None or retry is None:
        raise _Skipped("the AMQP_ or RETRY_ settings are not in order")
    wanted = topology(amqp.prefix, amqp.queue_type, retry.delays_seconds)
    try:
        with session(amqp, "check") as connection:
            missing = verify(connection, wanted)
    except BrokerError as error:
        raise _Failed(str(error)) from None
    whole = f"{len(wanted.exchanges)} exchanges and {len(wanted.queues)} queues under {amqp.prefix}"
    if not missing:
        return whole
    if amqp.declare:
        return f"{whole}; {len(missing)} of them are not there yet, `run` will declare them"
    others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    raise _Failed(missing[0].replace(" is missing", f"{others} is missing"))


def _token(gateway: GatewaySettings | None) -> str:
    from worker.core.ports import TokenUnavailable
    from worker.service import SystemClock, endpoint, fetcher, transport
    from worker.shells.credentials import Credentials, CredentialsError
    from worker.shells.gateway import GatewayClient

    if gateway is None:
        raise _Skipped("the GATEWAY_ settings are not in order")
    skew = _Skew()
    try:
        credentials = Credentials(gateway, gateway.reread)
        client = GatewayClient(
            endpoint(gateway), skew, context=lambda: credentials.context, adapter=transport(gateway, os.environ)
        )
        grant = fetcher(client, credentials, gateway, SystemClock())()
    except CredentialsError as error:
        raise _Failed(str(error)) from None
    except TokenUnavailable as failure:
        verdict = failure.verdict
        code = f" ({verdict.code})" if verdict.code else ""
        see = "GATEWAY_BASE_URL, GATEWAY_CLIENT_ID, the key and the clock"
        raise _Failed(f"{verdict.message}{code}; see {see}") from None
    return f"good for {grant.lifetime:.0f} s; our clock is {skew.seconds:+.1f} s off the gateway's"


class _Skew:
    """Takes what the client tells."""

    seconds = 0.0

    def request(self, operation: str, response_code: str, seconds: float) -> None:
        """Not of interest here."""

    def clock_skew(self, seconds: float) -> None:
        """How far our clock is ahead."""
        self.seconds = seconds
