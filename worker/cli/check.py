"""`qris-expire check`: is everything in place before the first command?"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from worker.cli import INVALID, Trouble
from worker.core.command import Command, is_identifier
from worker.core.verdict import NoReply

if TYPE_CHECKING:
    from worker.core.diagnosis import Call, Finding
    from worker.settings import AmqpSettings, GatewaySettings, Group, RetrySettings
    from worker.shells.credentials import Credentials
    from worker.shells.gateway import GatewayClient, Grant

G = TypeVar("G", bound="Group")


class _Failed(Exception):
    """What is wrong and what to do, a line each."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines


class _Skipped(Exception):
    """It cannot be looked at; the text says what stands in the way."""


class _Warned(Exception):
    """It works, but may not for long."""


def check(
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="BILL",
            help="Also send an expire for this bill, in earnest: if its QR code lives, it dies. A bill that does not "
            "exist will do.",
        ),
    ] = None,
    merchant_id: Annotated[str | None, typer.Option(help="The bill's merchant; else GATEWAY_MERCHANT_ID.")] = None,
) -> int:
    """Looks at settings, key, broker, topology, token and clock, a line each: ok, or why not and what to do.

    It asks the gateway for a token and sends no expire; at the broker it changes nothing.

    What a token cannot show (signed path, client secret, channel, merchant, whether this client may expire bills) shows
    in an expire call: --probe BILL sends one. If the gateway refuses its signature, up to five more follow, signed in
    other ways, to tell a wrong path or scheme from a wrong secret; the first that is accepted is the last.

    Exit code 0: all ok. 1: something is not. 2: the bill or the merchant cannot be one.
    """
    _check_ids(probe, merchant_id)
    report = _Report()
    amqp, retry, gateway = report.groups()
    report.line("key", lambda: _key(gateway))
    report.line("broker", lambda: _broker(amqp))
    report.line("topology", lambda: _topology(amqp, retry))
    with closing(Caller(gateway)) as caller:
        report.line("token", caller.token)
        report.line("clock", caller.clock)
        if probe is not None:
            report.line("probe", lambda: caller.probe(probe, merchant_id, report))
    return 1 if report.failed else 0


def _check_ids(bill: str | None, merchant: str | None) -> None:
    for name, value in (("--probe", bill), ("--merchant-id", merchant)):
        if value is not None and not is_identifier(value):
            raise Trouble(f"{name} must be 1 to 64 printable ASCII characters without blanks", code=INVALID)


class _Report:
    """The lines, and whether one of them was bad."""

    def __init__(self) -> None:
        self.failed = False

    def line(self, subject: str, look: Callable[[], str]) -> None:
        try:
            self.say(subject, "ok", look())
        except _Warned as warned:
            self.say(subject, "warning", str(warned))
        except _Skipped as skipped:
            self.failed = True
            self.say(subject, "skipped", str(skipped))
        except _Failed as failed:
            self.failed = True
            for text in failed.lines:
                self.say(subject, "FAILED", text)

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
    def say(subject: str, state: str, text: str) -> None:
        """One line."""
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
    from worker.shells.amqp.session import BrokerError, differing, session, verify

    if amqp is None or retry is None:
        raise _Skipped("the AMQP_ or RETRY_ settings are not in order")
    wanted = topology(amqp.prefix, amqp.queue_type, retry.delays_seconds)
    try:
        with session(amqp, "check") as connection:
            missing, others = verify(connection, wanted), differing(connection, wanted)
    except BrokerError as error:
        raise _Failed(str(error)) from None
    if others:
        raise _Failed(*others)
    whole = f"{len(wanted.exchanges)} exchanges and {len(wanted.queues)} queues under {amqp.prefix}"
    if not missing:
        return whole
    if amqp.declare:
        return f"{whole}; {len(missing)} of them are not there yet, `run` will declare them"
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    raise _Failed(missing[0].replace(" is missing", f"{more} is missing"))


class Caller:
    """The gateway, called as the worker does."""

    def __init__(self, gateway: GatewaySettings | None) -> None:
        self._gateway = gateway
        self._skew = _Skew()
        self._client: GatewayClient | None = None
        self._grant: Grant | None = None

    def token(self) -> str:
        """Asks for one."""
        from worker.shells.credentials import Credentials, CredentialsError

        gateway = self._gateway
        if gateway is None:
            raise _Skipped("the GATEWAY_ settings are not in order")
        try:
            grant = self.fetch(Credentials(gateway, gateway.reread))
        except CredentialsError as error:
            raise _Failed(str(error)) from None
        except Trouble as trouble:
            raise _Failed(*trouble.lines) from None
        return f"good for {grant.lifetime:.0f} s"

    def fetch(self, credentials: Credentials) -> Grant:
        """A token. Raises `Trouble` with what its refusal is a sign of, and `CredentialsError`."""
        from worker.core import diagnosis
        from worker.core.ports import TokenUnavailable
        from worker.service import SystemClock, endpoint, fetcher, transport
        from worker.shells.gateway import GatewayClient

        gateway = self._gateway
        assert gateway is not None
        adapter = transport(gateway, os.environ)
        client = GatewayClient(endpoint(gateway), self._skew, context=lambda: credentials.context, adapter=adapter)
        self._client = client
        try:
            self._grant = fetcher(client, credentials, gateway, SystemClock())()
        except TokenUnavailable as failure:
            answer = failure.answer or NoReply(False, failure.verdict.message)
            raise Trouble(diagnosis.token(answer, self._call("TOKEN")).text) from None
        return self._grant

    def close(self) -> None:
        """Gives its connection back."""
        if self._client is not None:
            self._client.close()

    def clock(self) -> str:
        """What the answer to the token request showed of it."""
        from worker.core import diagnosis

        if self._skew.seconds is None:
            if self._grant is not None:
                return "not known: the gateway's answers have no Date"
            raise _Skipped("no answer of the gateway to compare with")
        finding = diagnosis.clock(self._skew.seconds)
        if not finding.fine:
            raise _Warned(finding.text)
        return finding.text

    def probe(self, bill: str, merchant: str | None, report: _Report) -> str:
        """Sends an expire; where its signature is refused, others, to learn what is wrong with it."""
        from worker.core import diagnosis

        gateway = self._gateway
        if gateway is None or self._grant is None:
            raise _Skipped("without a token no expire can be sent")
        merchant = merchant or gateway.merchant_id
        if merchant is None:
            raise _Failed("the bill needs a merchant; give --merchant-id, or set GATEWAY_MERCHANT_ID")
        report.say("probe", "sending", f"an expire for bill {bill} of merchant {merchant}, in earnest")
        command = Command(bill, merchant)
        finding = self._expire(command, gateway)
        if finding.fine:
            return finding.text
        if not finding.signature:
            raise _Failed(finding.text)
        ways = list(
            diagnosis.other_ways(
                diagnosis.Way(gateway.sign_path, gateway.signature), gateway.base_url, gateway.expire_path
            )
        )
        report.say("probe", "sending", f"{finding.text}; trying up to {len(ways)} other ways to sign")
        for way in ways:
            other = gateway.model_copy(update={"sign_path": way.sign_path, "signature": way.scheme})
            tried = self._expire(command, other)
            if tried.taken:
                raise _Failed(f"{_change(gateway, other)}: signed so, the call is taken. Then: {tried.text}")
            if not tried.signature:
                raise _Failed(f"{finding.text}; nor can other ways be tried: {tried.text}")
        raise _Failed(_wrong_secret(gateway))

    def _expire(self, command: Command, gateway: GatewaySettings) -> Finding:
        from worker.core import diagnosis, request
        from worker.service import SystemClock, external_ids, partner
        from worker.shells.credentials import Credentials

        assert self._client is not None
        assert self._grant is not None
        clock = SystemClock()
        signed = request.sign(
            command,
            partner(gateway),
            Credentials(gateway, gateway.reread).sign,
            self._grant.value,
            clock.epoch(),
            external_ids(clock)(),
        )
        return diagnosis.expire(self._client.send(signed), self._call("EXPIRE"))

    def _call(self, which: str) -> Call:
        from worker.core.diagnosis import Call

        gateway = self._gateway
        assert gateway is not None
        path = gateway.token_path if which == "TOKEN" else gateway.expire_path
        return Call(gateway.base_url + path, f"GATEWAY_{which}_PATH", self._skew.seconds)


def _change(ours: GatewaySettings, other: GatewaySettings) -> str:
    """The settings that differ, as they should be."""
    wanted = []
    if other.sign_path != ours.sign_path:
        wanted.append(f"GATEWAY_SIGN_PATH={other.sign_path}")
    if other.signature != ours.signature:
        wanted.append(f"GATEWAY_SIGNATURE={other.signature}")
    return f"set {' and '.join(wanted)}"


def _wrong_secret(gateway: GatewaySettings) -> str:
    if gateway.signature != "hmac-sha512":
        return (
            f"no way to sign is accepted: with {gateway.signature} the provider has another public key for expires "
            "than for tokens; if it wants hmac-sha512, set GATEWAY_SIGNATURE, and correct GATEWAY_CLIENT_SECRET, too"
        )
    secret = gateway.client_secret.get_secret_value()
    blanks = ", and it begins or ends with a blank" if secret != secret.strip() else ""
    return (
        f"no way to sign is accepted: GATEWAY_CLIENT_SECRET is wrong{blanks}; else ask which path GATEWAY_SIGN_PATH is"
    )


class _Skew:
    """Takes what the client tells."""

    seconds: float | None = None

    def request(self, operation: str, response_code: str, seconds: float) -> None:
        """Not of interest here."""

    def clock_skew(self, seconds: float) -> None:
        """How far our clock is ahead."""
        self.seconds = seconds
