"""`qris-expire check`: is everything in place before the first command?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, TypeVar

from worker.cli import expected
from worker.cli.calling import Calling, check_identifiers, merchant_of
from worker.cli.command_line import Option
from worker.cli.screen import tell
from worker.core.command import Command
from worker.core.fitness import hides_commands, version_problem
from worker.core.lanes import LANES
from worker.core.scheme import NO_TOKEN, oddity_of
from worker.core.topology import topology
from worker.settings import GROUPS, AmqpSettings, GatewaySettings, RetrySettings, SettingsError, SettingsGroup, load

if TYPE_CHECKING:
    from worker.core.diagnosis import Finding

G = TypeVar("G", bound="SettingsGroup")
Say = Callable[[str, str, str], None]


FAILED: Final = "FAILED"
SKIPPED: Final = "skipped"
"""It cannot be checked."""
WARNING: Final = "warning"
"""It works, but may not for long."""


class _NotOk(Exception):
    """What a line says instead of ok, and why and what to do, a line each."""

    def __init__(self, state: str, *lines: str) -> None:
        super().__init__(state, *lines)
        self.state = state
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
    check_identifiers({"--probe": probe, "--merchant-id": merchant_id})
    lines = _Lines()
    lines.line("settings", lambda: _settings(lines.say))
    # Each as far as it is valid: a wrong gateway must not hide what is wrong with the broker.
    amqp, retry, gateway = _valid(AmqpSettings), _valid(RetrySettings), _valid(GatewaySettings)
    lines.line("key", lambda: _key(gateway))
    lines.line("broker", lambda: _broker(amqp))
    lines.line("topology", lambda: _topology(amqp, retry))
    lines.line("policies", lambda: _policies(amqp, retry))
    with closing(Calling(gateway)) if gateway else nullcontext() as calling:
        lines.line("token", lambda: _token(calling))
        lines.line("clock", lambda: _clock(calling))
        if probe is not None:
            lines.line("probe", lambda: _probe(calling, probe, merchant_id, lines.say))
    return 1 if lines.failed else 0


class _Lines:
    """The lines, and whether one of them was bad."""

    def __init__(self) -> None:
        self.failed = False

    def line(self, subject: str, look: Callable[[], str]) -> None:
        try:
            self.say(subject, "ok", look())
        except _NotOk as found:
            self._tell(subject, found.state, found.lines)
        except Exception as error:
            trouble = expected(error)
            if trouble is None:
                raise
            self._tell(subject, FAILED, trouble.lines)

    def _tell(self, subject: str, state: str, lines: Sequence[str]) -> None:
        self.failed |= state != WARNING
        for text in lines:
            self.say(subject, state, text)

    @staticmethod
    def say(subject: str, state: str, text: str) -> None:
        """One line."""
        tell(f"{subject:<9} {state:<8} {text}".rstrip(), indent=19)


def _settings(say: Say) -> str:
    for advice in load().advice():
        say("settings", WARNING, advice)
    return f"{sum(len(group.declared()) for group in GROUPS)} in order"


def _valid(group: type[G]) -> G | None:
    try:
        return load(group)
    except SettingsError:
        return None


def _key(gateway: GatewaySettings | None) -> str:
    from worker.shells.credentials import Credentials

    if gateway is None:
        raise _NotOk(SKIPPED, "the GATEWAY_ settings are not in order")
    credentials = Credentials(gateway, gateway.reread)
    return f"RSA, {credentials.key_bits} bits; expires are signed with {gateway.signature}"


def _broker(amqp: AmqpSettings | None) -> str:
    if amqp is None:
        raise _NotOk(SKIPPED, "the AMQP_ settings are not in order")
    version = _version(amqp)
    problem = version_problem(version)
    if problem is not None:
        raise _NotOk(WARNING, problem)
    return f"RabbitMQ {version}"


def _version(amqp: AmqpSettings) -> str:
    from worker.shells.amqp.session import session

    with session(amqp, "check") as connection:
        properties = connection._impl.server_properties or {}
    version = properties.get("version", b"?")
    return version.decode() if isinstance(version, bytes) else str(version)


def _policies(amqp: AmqpSettings | None, retry: RetrySettings | None) -> str:
    """Those that would remove messages: AMQP shows none, the management API does."""
    from worker.shells.amqp.management import NotVisible, policies, problems

    if amqp is None or retry is None:
        raise _NotOk(SKIPPED, "the AMQP_ or RETRY_ settings are not in order")
    wanted = topology(amqp.prefix, amqp.queue_type, retry.delays_seconds)
    version = _version(amqp)
    try:
        found = policies(amqp, wanted)
    except NotVisible as reason:
        advice = hides_commands(version, amqp.queue_type, None)
        raise _NotOk(WARNING, str(reason), *([advice] if advice else [])) from None
    wrong = problems(found, wanted)
    if wrong:
        raise _NotOk(FAILED, *wrong)
    lanes = [found.get(amqp.names.queue(lane), {}) for lane in LANES]
    advice = next(filter(None, (hides_commands(version, amqp.queue_type, policy) for policy in lanes)), None)
    if advice:
        raise _NotOk(WARNING, advice)
    return f"none on {len(found)} queues that removes messages"


def _topology(amqp: AmqpSettings | None, retry: RetrySettings | None) -> str:
    from worker.shells.amqp.session import differing, session, verify

    if amqp is None or retry is None:
        raise _NotOk(SKIPPED, "the AMQP_ or RETRY_ settings are not in order")
    wanted = topology(amqp.prefix, amqp.queue_type, retry.delays_seconds)
    with session(amqp, "check") as connection:
        missing, others = verify(connection, wanted), differing(connection, wanted)
    if others:
        raise _NotOk(FAILED, *others)
    whole = f"{len(wanted.exchanges)} exchanges and {len(wanted.queues)} queues under {amqp.prefix}"
    if not missing:
        return whole
    if amqp.declare:
        return f"{whole}; {len(missing)} of them are not there yet, `run` will declare them"
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    raise _NotOk(FAILED, missing[0].replace(" is missing", f"{more} is missing"))


def _token(calling: Calling | None) -> str:
    if calling is None:
        raise _NotOk(SKIPPED, "the GATEWAY_ settings are not in order")
    grant = calling.fetch()
    if grant is None:
        return f"none is asked for: {calling.gateway.signature} signs without one"
    return f"good for {grant.lifetime:.0f} s"


def _clock(calling: Calling | None) -> str:
    """What the answer to the token request showed of it."""
    from worker.core import diagnosis

    if calling is None or calling.skew is None:
        if calling is not None and calling.token is not None:
            return "not known: the gateway's answers have no Date"
        raise _NotOk(SKIPPED, "no answer of the gateway to compare with")
    finding = diagnosis.clock(calling.skew)
    if not finding.fine:
        raise _NotOk(WARNING, finding.text)
    return finding.text


def _probe(calling: Calling | None, bill: str, merchant: str | None, say: Say) -> str:
    """Sends an expire; where its signature is refused, others, to learn what is wrong with it."""
    if calling is None or calling.token is None:
        raise _NotOk(SKIPPED, "without a token no expire can be sent")
    command = Command(bill, merchant_of(calling.gateway, merchant))
    say("probe", "sending", f"a real expire call for bill {bill} of merchant {command.merchant_id}")
    finding = calling.expire(command, calling.gateway)
    if finding.signature:
        _try_other_ways(calling, command, finding, say)
    if not finding.fine:
        raise _NotOk(FAILED, finding.text)
    return finding.text


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
            raise _NotOk(FAILED, f"{_change(ours, other)}: signed so, the call is taken. Then: {tried.text}")
        if not tried.signature and way.scheme != NO_TOKEN:  # without a token it is the token that is missed
            raise _NotOk(FAILED, f"{refused.text}; nor can other ways be tried: {tried.text}")
    raise _NotOk(FAILED, _wrong_secret(ours))


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
