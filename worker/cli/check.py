"""`qris-expire check`: is everything in place before the first command?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

from worker.cli import INVALID, Trouble
from worker.cli.calling import Calling
from worker.cli.command_line import Option
from worker.cli.screen import tell
from worker.core.command import IDENTIFIER_RULE, Command, is_identifier
from worker.core.scheme import NO_TOKEN, oddity_of

if TYPE_CHECKING:
    from worker.core.diagnosis import Finding
    from worker.settings import AmqpSettings, GatewaySettings, Group, RetrySettings

G = TypeVar("G", bound="Group")
Say = Callable[[str, str, str], None]


class _Failed(Exception):
    """What is wrong and what to do, a line each."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines


class _Skipped(Exception):
    """It cannot be checked; the text says why."""


class _Warned(Exception):
    """It works, but may not for long: why and what to do, a line each."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines


def check(
    probe: Annotated[
        str | None,
        Option(
            metavar="BILL",
            help="Also send a real expire call: if the QR code of this bill is valid, it expires. A bill that does not "
            "exist will do.",
        ),
    ] = None,
    merchant_id: Annotated[str | None, Option(help="The bill's merchant; else GATEWAY_MERCHANT_ID.")] = None,
) -> int:
    """Looks at settings, key, broker, topology, policies, token and clock, a line each: ok, or why not and what to do.

    It asks the gateway for a token and sends no expire; at the broker it changes nothing.

    What a token cannot show (signed path, client secret, channel, merchant, whether this client may expire bills) shows
    in an expire call: --probe BILL sends one. If the gateway refuses its signature, up to five more follow, signed in
    other ways, to tell a wrong path or scheme from a wrong secret; the first that is accepted is the last.

    Exit code 0: all ok. 1: something is not. 2: the bill or the merchant cannot be one.

    Examples:

        qris-expire check
        qris-expire check --probe 10092081 --merchant-id 121000001
    """
    _check_ids(probe, merchant_id)
    report = _Report()
    amqp, retry, gateway = report.groups()
    report.line("key", lambda: _key(gateway))
    report.line("broker", lambda: _broker(amqp))
    report.line("topology", lambda: _topology(amqp, retry))
    report.line("policies", lambda: _policies(amqp, retry))
    with closing(Calling(gateway)) if gateway else nullcontext() as calling:
        report.line("token", lambda: _token(calling))
        report.line("clock", lambda: _clock(calling))
        if probe is not None:
            report.line("probe", lambda: _probe(calling, probe, merchant_id, report.say))
    return 1 if report.failed else 0


def _check_ids(bill: str | None, merchant: str | None) -> None:
    for name, value in (("--probe", bill), ("--merchant-id", merchant)):
        if value is not None and not is_identifier(value):
            raise Trouble(f"{name} must be {IDENTIFIER_RULE}", code=INVALID)


class _Report:
    """The lines, and whether one of them was bad."""

    def __init__(self) -> None:
        self.failed = False

    def line(self, subject: str, look: Callable[[], str]) -> None:
        try:
            self.say(subject, "ok", look())
        except _Warned as warned:
            for text in warned.lines:
                self.say(subject, "warning", text)
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
            settings = load()
        except SettingsError as error:
            problems = error.problems
            self.line("settings", lambda: _fail(*problems))
        else:
            for advice in settings.advice():
                self.say("settings", "warning", advice)
            self.line("settings", lambda: f"{sum(len(group.declared()) for group in GROUPS)} in order")
        return _valid(AmqpSettings), _valid(RetrySettings), _valid(GatewaySettings)

    @staticmethod
    def say(subject: str, state: str, text: str) -> None:
        """One line."""
        tell(f"{subject:<9} {state:<8} {text}".rstrip(), indent=19)


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
    from worker.core.fitness import version_problem

    if amqp is None:
        raise _Skipped("the AMQP_ settings are not in order")
    version = _version(amqp)
    problem = version_problem(version)
    if problem is not None:
        raise _Warned(problem)
    return f"RabbitMQ {version}"


def _version(amqp: AmqpSettings) -> str:
    from worker.shells.amqp.session import BrokerError, session

    try:
        with session(amqp, "check") as connection:
            properties = connection._impl.server_properties or {}
    except BrokerError as error:
        raise _Failed(str(error)) from None
    version = properties.get("version", b"?")
    return version.decode() if isinstance(version, bytes) else str(version)


def _policies(amqp: AmqpSettings | None, retry: RetrySettings | None) -> str:
    """Those that would remove messages: AMQP shows none, the management API does."""
    from worker.core.fitness import hides_commands
    from worker.core.lanes import LANES
    from worker.core.topology import topology
    from worker.shells.amqp.management import NotVisible, policies, problems

    if amqp is None or retry is None:
        raise _Skipped("the AMQP_ or RETRY_ settings are not in order")
    wanted = topology(amqp.prefix, amqp.queue_type, retry.delays_seconds)
    version = _version(amqp)
    try:
        found = policies(amqp, wanted)
    except NotVisible as reason:
        advice = hides_commands(version, amqp.queue_type, None)
        raise _Warned(str(reason), *([advice] if advice else [])) from None
    wrong = problems(found, wanted)
    if wrong:
        raise _Failed(*wrong)
    lanes = [found.get(amqp.names.queue(lane), {}) for lane in LANES]
    advice = next(filter(None, (hides_commands(version, amqp.queue_type, policy) for policy in lanes)), None)
    if advice:
        raise _Warned(advice)
    return f"none on {len(found)} queues that removes messages"


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


def _token(calling: Calling | None) -> str:
    from worker.shells.credentials import CredentialsError

    if calling is None:
        raise _Skipped("the GATEWAY_ settings are not in order")
    try:
        grant = calling.fetch()
    except CredentialsError as error:
        raise _Failed(str(error)) from None
    except Trouble as trouble:
        raise _Failed(*trouble.lines) from None
    if grant is None:
        return f"none is asked for: {calling.gateway.signature} signs without one"
    return f"good for {grant.lifetime:.0f} s"


def _clock(calling: Calling | None) -> str:
    """What the answer to the token request showed of it."""
    from worker.core import diagnosis

    if calling is None or calling.skew is None:
        if calling is not None and calling.token is not None:
            return "not known: the gateway's answers have no Date"
        raise _Skipped("no answer of the gateway to compare with")
    finding = diagnosis.clock(calling.skew)
    if not finding.fine:
        raise _Warned(finding.text)
    return finding.text


def _probe(calling: Calling | None, bill: str, merchant: str | None, say: Say) -> str:
    """Sends an expire; where its signature is refused, others, to learn what is wrong with it."""
    if calling is None or calling.token is None:
        raise _Skipped("without a token no expire can be sent")
    merchant = merchant or calling.gateway.merchant_id
    if merchant is None:
        raise _Failed("the bill needs a merchant; give --merchant-id, or set GATEWAY_MERCHANT_ID")
    say("probe", "sending", f"a real expire call for bill {bill} of merchant {merchant}")
    command = Command(bill, merchant)
    finding = calling.expire(command, calling.gateway)
    if finding.signature:
        _try_other_ways(calling, command, finding, say)
    return finding.text if finding.fine else _fail(finding.text)


def _try_other_ways(calling: Calling, command: Command, refused: Finding, say: Say) -> NoReturn:
    """A gateway refuses a wrong path, scheme and secret in the same words; what it takes instead distinguishes them."""
    from worker.core.diagnosis import Way, other_ways

    ours = calling.gateway
    ways = [
        way
        for way in other_ways(Way(ours.sign_path, ours.signature), ours.base_url, ours.expire_path)
        if calling.can_sign(way.scheme)
    ]
    say("probe", "sending", f"{refused.text}; trying up to {len(ways)} other ways to sign")
    for way in ways:
        other = replace(ours, sign_path=way.sign_path, signature=way.scheme)
        tried = calling.expire(command, other)
        if tried.taken:
            raise _Failed(f"{_change(ours, other)}: signed so, the call is taken. Then: {tried.text}")
        if not tried.signature and way.scheme != NO_TOKEN:  # without a token it is the token that is missed
            raise _Failed(f"{refused.text}; nor can other ways be tried: {tried.text}")
    raise _Failed(_wrong_secret(ours))


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
    secret = "" if gateway.client_secret is None else gateway.client_secret.get_secret_value()
    oddity = oddity_of(secret)
    also = f", and {oddity}" if oddity else ""
    return f"no way to sign is accepted: GATEWAY_CLIENT_SECRET is wrong{also}; else ask which path GATEWAY_SIGN_PATH is"
