"""What a member knows of itself, whoever leads: its calls, its probes, what operators want of it, what is to be done.

Each of these facts has one owner here; `leader` and `follower` look at them, and `member` puts all together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from worker.core.breaker import Breakers
from worker.core.fleet.messages import FleetMessage, Goodbye, Letter, OperatorOrders
from worker.core.fleet.permits import Permits, zeros
from worker.core.fleet.terms import AcquireTerm, ReleaseTerm, Role, Terms
from worker.core.lanes import LANES
from worker.core.retry import MAX_RETRY_AFTER

UNTAKEN: Final = 2.0
"""Seconds after which a probe that finds no command goes to another member."""
LOOK_AGAIN: Final = 1.0
"""Seconds until the next probe after one that found no command."""
DISTRUST: Final = 1.0
"""Seconds in which a member that has just recovered does not believe that it is sick: the news crosses its own."""


@dataclass(frozen=True, slots=True)
class MemberSettings:
    """A member's own settings: its limit (calls per second, 0 for none), the breaker's threshold and first cooldown
    (seconds), and the longest that a call may take (seconds)."""

    limit: float
    threshold: int
    cooldown: float
    call_seconds: float


# -- what is to be done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Say:
    """To one member, or to all (None)."""

    to: str | None
    message: FleetMessage


@dataclass(frozen=True, slots=True)
class Permit:
    """One expire call may begin now, and until ``until``; the slot was given for ``lane``."""

    lane: str
    until: float


@dataclass(frozen=True, slots=True)
class ReadOrders:
    """Look what operators want: it rests at the broker. `Member.rested` has the answer."""


@dataclass(frozen=True, slots=True)
class Changed:
    """Senders have to look again."""


Action = Say | Permit | ReadOrders | Changed | Letter | AcquireTerm | ReleaseTerm
"""A letter is a message about tokens, for those who know them."""


# -- the facts --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class OwnHealth:
    """How our own calls end, and whether we are sick: whether they fail where those of others succeed."""

    cooldown: float
    calls: int = 0
    good: dict[str, float] = field(default_factory=dict)
    """When each lane had its latest good answer."""
    streaks: dict[str, int] = field(default_factory=zeros)
    """Bad attempts in a row of each lane; ``since`` when."""
    since: dict[str, float] = field(default_factory=dict)
    unreached: int = 0
    """So many in a row did not even reach the gateway."""
    uneasy: bool = False
    """Somebody's calls fail, so a good answer of ours is worth telling."""
    told: float = 0.0
    """When the good answer came that we told last."""
    sick: bool = False
    testing: bool = False
    """Whether a test of ourselves is out."""
    _test_at: float = 0.0
    _recovered: float = float("-inf")

    def had_good(self, now: float) -> None:
        """A good answer, and everybody is told."""
        self._reset()
        self.uneasy, self.told = False, now

    def had_bad(self, lanes: Iterable[str], now: float, *, reached: bool) -> None:
        """A bad attempt; it counts for each of the lanes."""
        self.uneasy = True
        self.unreached = 0 if reached else self.unreached + 1
        for lane in lanes:
            self.streaks[lane] += 1
            self.since.setdefault(lane, now)

    def silent_good(self, failing: float, now: float) -> str | None:
        """The lane that had a good answer in the last ``failing`` seconds of which nobody has heard. It counts as told
        now."""
        lane = max(self.good, key=lambda name: self.good[name], default=None)
        if lane is None or self.good[lane] <= self.told or now - self.good[lane] >= failing:
            return None
        self.told = self.good[lane]
        return lane

    def believes(self, now: float) -> bool:
        """Whether we believe the leader that we are sick."""
        return not self.sick and now > self._recovered + DISTRUST

    def fall_sick(self, now: float) -> None:
        """We give back, take nothing, and test ourselves after a cooldown."""
        self.sick = True
        self.test_again(now + self.cooldown)

    def recover(self) -> None:
        """We work again: the leader says so."""
        self.sick = self.testing = False

    def cure(self, now: float) -> None:
        """We work again: we have had a good answer ourselves."""
        self.recover()
        self._recovered = now
        self._reset()

    def test_due(self, now: float) -> bool:
        """Whether we, being sick, may test ourselves now."""
        return self.sick and not self.testing and now >= self._test_at

    def test_again(self, at: float) -> None:
        """The next test of ourselves is at this moment."""
        self.testing, self._test_at = False, at

    def _reset(self) -> None:
        self.streaks, self.unreached = zeros(), 0
        self.since.clear()


@dataclass(slots=True)
class Standing:
    """What everybody obeys: what operators want, as far as we know, and the hold of a throttled answer."""

    orders: OperatorOrders = field(default_factory=OperatorOrders)
    sure: bool = False
    """Whether we know what operators want."""
    held_until: float = 0.0
    ends: dict[str, float] = field(default_factory=dict)
    """When pauses end by themselves."""

    def hold(self, seconds: float, now: float) -> None:
        """No call for so many seconds."""
        self.held_until = max(self.held_until, now + min(max(seconds, 0.0), MAX_RETRY_AFTER))

    def limit(self, own: float) -> float:
        """An operator's limit in place of the members' own, in calls per second."""
        return own if self.orders.limit is None else self.orders.limit.rate

    def paused(self, lane: str, now: float) -> bool:
        """Whether an operator has paused the lane."""
        return lane in self.orders.pauses and now < self.ends.get(lane, float("inf"))

    def pauses(self, now: float) -> dict[str, float]:
        """Seconds left of the pauses that end by themselves."""
        return {lane: max(0.0, end - now) for lane, end in self.ends.items()}

    def obey(self, orders: OperatorOrders, left: Mapping[str, float], now: float) -> bool:
        """What operators want now; ``left``: seconds left of pauses. Whether it is something else than before."""
        changed = orders != self.orders
        self.orders = orders
        for lane in LANES:
            pause = orders.pauses.get(lane)
            if pause is None or pause.seconds is None:
                self.ends.pop(lane, None)
            elif changed or lane not in self.ends:
                self.ends[lane] = now + max(0.0, left.get(lane, pause.seconds))
        return changed

    def tick(self, now: float) -> bool:
        """Ends pauses whose time is over; whether there was one."""
        over = {lane for lane, end in self.ends.items() if now >= end}
        if over:
            self.ends = {lane: end for lane, end in self.ends.items() if lane not in over}
            left = {lane: pause for lane, pause in self.orders.pauses.items() if lane not in over}
            self.orders = replace(self.orders, pauses=left)
        return bool(over)


@dataclass(slots=True)
class Probes:
    """The probes that the leader has given us, by lane: those that no sender has yet, with the moment when they came,
    and those that are out."""

    _given: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: {lane: [] for lane in LANES})
    _out: dict[str, list[int]] = field(default_factory=lambda: {lane: [] for lane in LANES})

    def give(self, number: int, lane: str, now: float) -> None:
        """One more."""
        self._given[lane].append((number, now))

    def given(self, lane: str) -> int:
        """How many may go out."""
        return len(self._given[lane])

    def take(self, lane: str) -> bool:
        """One goes out, if there is one."""
        if not self._given[lane]:
            return False
        self._out[lane].append(self._given[lane].pop(0)[0])
        return True

    def back(self, lane: str) -> int | None:
        """The number of one that came back."""
        return self._out[lane].pop(0) if self._out[lane] else None

    def untaken(self, before: float) -> list[tuple[int, str]]:
        """Those that came before this moment and are with no sender. They are ours no more."""
        found = [(number, lane) for lane in LANES for number, came in self._given[lane] if came < before]
        for lane in LANES:
            self._given[lane] = [each for each in self._given[lane] if each[1] >= before]
        return found

    def drop(self) -> None:
        """They are void."""
        for lane in LANES:
            self._given[lane].clear()
            self._out[lane].clear()


class Own:
    """One member's own facts, and its list of what is to be done."""

    def __init__(self, me: str, settings: MemberSettings, breakers: Breakers, jitter: Callable[[], float]) -> None:
        self.me = me
        self.settings = settings
        self.breakers = breakers
        self.actions: list[Action] = []
        self.terms = Terms(me, self.actions.append, jitter=jitter)
        self.health = OwnHealth(settings.cooldown)
        self.standing = Standing()
        self.permits = Permits()
        self.probes = Probes()
        self.candidates = zeros()
        """Commands in hand with which a breaker could be probed."""
        self.left = False
        self.number = 0
        """That of the latest beat, report or probe of ours."""

    def next_number(self) -> int:
        """One that no message of ours has had."""
        self.number += 1
        return self.number

    def say(self, to: str | None, message: FleetMessage) -> None:
        """To one member, or to all; nothing without a fleet. Who leaves says goodbye to all, and nothing else."""
        parting = to is None and self.left and not isinstance(message, Goodbye)
        if self.terms.role is not Role.APART and not parting:
            self.actions.append(Say(to, message))

    def changed(self) -> None:
        """Senders have to look again."""
        self.actions.append(Changed())

    def wanted(self) -> dict[str, int]:
        """Calls of each lane that wait and have no slot; none while we are sick."""
        return zeros() if self.health.sick else {lane: self.permits.open(lane) for lane in LANES}
