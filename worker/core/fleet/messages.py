"""What the members of a fleet say to each other: frozen values, and their form on the wire.

A message is one JSON object. Unknown fields are ignored, unknown kinds and versions are skipped, so that two versions
of the worker can be members of one fleet. Spans of time are seconds, never times of day: no two clocks need to agree.
The one exception is what people read (``since``). A token travels sealed, a secret never.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Final

VERSION: Final = 1
LARGEST: Final = 65_536
"""Bytes; what is longer is not read."""

Counts = Mapping[str, int]
Seconds = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Pause:
    """An operator's pause of a lane: who wants it, why, since when (seconds since the epoch, for people), for how many
    seconds (None: until `resume`)."""

    by: str = ""
    reason: str = ""
    since: float = 0.0
    seconds: float | None = None

    def left(self, now: float) -> float | None:
        """Seconds left at ``now`` (seconds since the epoch), None for one that does not end by itself: as far as the
        clocks of two machines agree, for nobody else may be left who has seen it begin."""
        return None if self.seconds is None else max(0.0, min(self.seconds, self.since + self.seconds - now))


@dataclass(frozen=True, slots=True)
class Limit:
    """An operator's limit in calls per second, instead of the members' own."""

    rate: float
    by: str = ""
    reason: str = ""
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class OperatorOrders:
    """All that operators want at one time. The highest ``revision`` holds."""

    revision: int = 0
    pauses: Mapping[str, Pause] = field(default_factory=dict)
    limit: Limit | None = None

    def left(self, now: float) -> dict[str, float]:
        """Of each pause that ends by itself, see `Pause.left`."""
        return {lane: left for lane, pause in self.pauses.items() if (left := pause.left(now)) is not None}

    def paused(self, lanes: Iterable[str], by: str, reason: str, since: float, seconds: float | None) -> OperatorOrders:
        """With a `Pause` of these lanes."""
        return replace(self, pauses={**self.pauses, **dict.fromkeys(lanes, Pause(by, reason, since, seconds))})

    def resumed(self, lanes: Container[str]) -> OperatorOrders:
        """Without the pauses of these lanes."""
        return replace(self, pauses={lane: pause for lane, pause in self.pauses.items() if lane not in lanes})

    def limited(self, rate: float, by: str, reason: str, since: float) -> OperatorOrders:
        """With a `Limit`."""
        return replace(self, limit=Limit(rate, by, reason, since))


@dataclass(frozen=True, slots=True)
class BreakerState:
    """The breaker of a lane as the leader has it: ``left`` seconds until its next probes, ``failing`` seconds since the
    first of the failures that it counts."""

    state: int = 0
    cooldown: float = 0.0
    left: float = 0.0
    failures: int = 0
    failing: float = 0.0


@dataclass(frozen=True, slots=True)
class Hello:
    """To all: I am new. ``limit``: my own setting, 0 for none."""

    limit: float = 0.0


@dataclass(frozen=True, slots=True)
class Beat:
    """To all, several times a second, from the leader: I lead ``term``, and this is the state.

    ``at``: the leader's monotonic clock, which others compare with their own. ``limit``: calls per second for the
    fleet, 0 for none. ``hold``: seconds that a throttled answer still holds everybody. ``sure``: the leader knows what
    operators want. ``pauses``: seconds left of each pause that ends by itself.
    """

    term: int
    number: int
    at: float
    limit: float = 0.0
    hold: float = 0.0
    sure: bool = False
    members: int = 1
    used: float = 0.0
    breakers: Mapping[str, BreakerState] = field(default_factory=dict)
    sick: tuple[str, ...] = ()
    orders: OperatorOrders = field(default_factory=OperatorOrders)
    pauses: Seconds = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MemberReport:
    """To the leader: how I am.

    ``wanted``: calls for each lane that would begin now and have no slot yet; ``seen``: slots that I had from this
    leader; ``failures``: bad attempts of each lane since my last report or good answer; ``streaks``: bad attempts in a
    row for each lane, ``since`` seconds ago the first of them; ``unreached``: so many in a row did not even reach the
    gateway; ``candidates``: commands in hand with which a breaker could be probed; ``calls``: all calls so far.
    """

    term: int
    number: int
    limit: float = 0.0
    wanted: Counts = field(default_factory=dict)
    seen: Counts = field(default_factory=dict)
    failures: Counts = field(default_factory=dict)
    streaks: Counts = field(default_factory=dict)
    since: Seconds = field(default_factory=dict)
    unreached: int = 0
    candidates: Counts = field(default_factory=dict)
    calls: int = 0
    sick: bool = False


@dataclass(frozen=True, slots=True)
class MemberGrant:
    """From the leader to one member: begin a call at each of these moments of the leader's clock, or not at all.
    ``answers``: the number of the latest report that it had, ``heard`` at that moment of its clock."""

    term: int
    at: float
    answers: int
    heard: float
    slots: tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """From the leader to one member: test the gateway with one command of the lane."""

    term: int
    number: int
    lane: str


@dataclass(frozen=True, slots=True)
class Probed:
    """To the leader: what came of a probe; ``kind`` is the verdict's label, or "lost"."""

    number: int
    lane: str
    kind: str


@dataclass(frozen=True, slots=True)
class Good:
    """To all: a call of mine had a final answer ``age`` seconds ago, so the gateway works for us."""

    lane: str | None = None
    probe: bool = False
    age: float = 0.0


@dataclass(frozen=True, slots=True)
class Throttled:
    """To all: the gateway wants no call for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Goodbye:
    """To all: I leave, or lead no more (``term``, 0 for a member that led nothing)."""

    term: int = 0
    leaves: bool = True


@dataclass(frozen=True, slots=True)
class Ordered:
    """From an operator's tool to all. ``probe``: test the gateway now."""

    orders: OperatorOrders | None = None
    pauses: Seconds = field(default_factory=dict)
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Who:
    """From an operator's tool to all: tell me (``reply_to`` of the message) how you are."""


@dataclass(frozen=True, slots=True)
class Card:
    """To an operator's tool: how one member is and what it knows."""

    host: str = ""
    process: int = 0
    version: str = ""
    client: str = ""
    role: str = ""
    term: int = 0
    leader: str = ""
    members: int = 0
    sick: bool = False
    limit: float = 0.0
    own_limit: float = 0.0
    used: float = 0.0
    calls: int = 0
    hold: float = 0.0
    waiting: Counts = field(default_factory=dict)
    breakers: Mapping[str, BreakerState] = field(default_factory=dict)
    orders: OperatorOrders = field(default_factory=OperatorOrders)
    pauses: Seconds = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenWanted:
    """To the leader: I need a token; that of generation ``refused`` (0: none) was refused, or may be dead
    (``doubted``)."""

    refused: int = 0
    doubted: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True)
class TokenGiven:
    """From the leader: the token, sealed with a key that only the client secret gives. ``life``: seconds that it still
    lives. ``number``: of the question that this answers, 0 when nobody asked."""

    generation: int
    life: float
    sealed: str
    number: int = 0


@dataclass(frozen=True, slots=True)
class TokenFailed:
    """From the leader: the token service gave none; the verdict on its answer."""

    kind: str
    code: str | None = None
    message: str = ""
    number: int = 0


FleetMessage = (
    Hello
    | Beat
    | MemberReport
    | MemberGrant
    | Probe
    | Probed
    | Good
    | Throttled
    | Goodbye
    | Ordered
    | Who
    | Card
    | TokenWanted
    | TokenGiven
    | TokenFailed
)

KINDS: Final[Mapping[str, type[FleetMessage]]] = {
    kind.__name__.removeprefix("Member").lower(): kind for kind in typing.get_args(FleetMessage)
}
NAMES: Final = {kind: name for name, kind in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Letter:
    """A message and whose it is: ``client`` tells fleets of one prefix apart ("" for an operator's tool)."""

    sender: str
    client: str
    message: FleetMessage


def encode_letter(letter: Letter) -> bytes:
    """UTF-8 JSON on one line."""
    document = {
        "v": VERSION,
        "type": NAMES[type(letter.message)],
        "sender": letter.sender,
        "client": letter.client,
        "body": asdict(letter.message),
    }
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def decode_letter(body: bytes) -> Letter | None:
    """The letter, or None for what is no message of this version: nothing that arrives may stop a member."""
    if len(body) > LARGEST:
        return None
    try:
        document = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("v") != VERSION:
        return None
    kind = KINDS.get(str(document.get("type")))
    sender, client, content = document.get("sender"), document.get("client"), document.get("body")
    if kind is None or not (isinstance(sender, str) and isinstance(client, str) and isinstance(content, dict)):
        return None
    try:
        return Letter(sender, client, _read(kind, content))
    except _DoesNotFitError:
        return None


def encode_orders(orders: OperatorOrders) -> bytes:
    """Orders as they rest at the broker."""
    return json.dumps({"v": VERSION, **asdict(orders)}, separators=(",", ":"), allow_nan=False).encode()


def newest(bodies: Sequence[bytes]) -> tuple[int, OperatorOrders | None]:
    """Which of the messages that rest in the queue of the orders holds, and what it says; None for what is not one."""
    read = [decode_orders(body) for body in bodies]
    index = max(range(len(read)), key=lambda each: -1 if (it := read[each]) is None else it.revision)
    return index, read[index]


def decode_orders(body: bytes) -> OperatorOrders | None:
    """The same back; None for what is not a message."""
    try:
        document = json.loads(body[:LARGEST], parse_constant=_no_constant)
        return None if document.get("v") != VERSION else typing.cast(OperatorOrders, _read(OperatorOrders, document))
    except (ValueError, RecursionError, AttributeError, _DoesNotFitError):
        return None


class _DoesNotFitError(Exception):
    """A field has another type than ours."""


def _no_constant(text: str) -> float:
    raise ValueError(text)


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def _read(kind: Any, document: Mapping[str, Any]) -> Any:
    hints = _hints(kind)
    try:
        return kind(
            **{each.name: _fit(document[each.name], hints[each.name]) for each in fields(kind) if each.name in document}
        )
    except (TypeError, OverflowError) as error:  # a field without a default is missing; a number that fits no float
        raise _DoesNotFitError from error


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _fit(value, next(each for each in inner if each is not type(None)))
    if origin is tuple and isinstance(value, list):
        if inner[-1] is Ellipsis:
            return tuple(_fit(each, inner[0]) for each in value)
        if len(inner) == len(value):
            return tuple(_fit(each, wanted) for each, wanted in zip(value, inner, strict=True))
    elif origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if isinstance(value, dict):
            return {name: _fit(each, inner[1]) for name, each in value.items()}
    elif is_dataclass(hint) and isinstance(value, dict):
        return _read(typing.cast(type[Any], hint), value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise _DoesNotFitError
