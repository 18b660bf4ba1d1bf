"""The fleet as the rest of the process sees it: carries out what its member says, over a wire to the other members."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, Final, ParamSpec, Protocol, assert_never

from worker.core.fleet.member import Member
from worker.core.fleet.messages import Card, FleetMessage, Letter, OperatorOrders
from worker.core.fleet.own import Changed, Permit, ReadOrders, Say
from worker.core.fleet.terms import AcquireTerm, ReleaseTerm
from worker.core.ports import Clock
from worker.core.verdict import Kind

SLACK: Final = 0.0005
"""Seconds by which an earlier moment must be earlier to be worth another timer."""


class Wire(Protocol):
    """The way to the other members. All of it returns at once; answers come to the `Fleet`."""

    def say(self, to: str | None, letter: Letter) -> None:
        """To one member, or to all."""

    def acquire_term(self, term: int) -> None:
        """Tries to take the queue of a term: `Fleet.took` or `Fleet.taken` follows."""

    def release_term(self, term: int) -> None:
        """Gives it back."""

    def read_orders(self) -> None:
        """Asks what operators want: `Fleet.rested` follows."""


class Timers(Protocol):
    """The loop's."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any: ...
    def remove_timeout(self, timeout: Any) -> None: ...


P = ParamSpec("P")


def _told(what: Callable[Concatenate[Member, float, P], None]) -> Callable[Concatenate[Fleet, P], None]:
    """The member is told what happens, and when, and what it asks for is carried out."""

    @functools.wraps(what)
    def tell(fleet: Fleet, /, *args: P.args, **options: P.kwargs) -> None:
        what(fleet.member, fleet._clock.monotonic(), *args, **options)
        fleet._carry_out()

    return tell


class Fleet:
    """One member, driven. Everything on the loop's thread, but for `card`. ``wire`` is set by who connects.

    Without a wire the member is alone and gives itself slots and probes, so senders have one code path only.
    """

    def __init__(self, member: Member, clock: Clock, timers: Timers) -> None:
        self.member = member
        self.wire: Wire | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Something of what is asked has changed: look again."""
        self.on_permit: Callable[[str, float], None] = lambda _lane, _until: None
        """One call may begin now, until the second moment at the latest; the slot was given for the lane."""
        self.on_token: Callable[[Letter], None] = lambda _letter: None
        """A message about tokens."""
        self._clock = clock
        self._timers = timers
        self._timer: Any = None
        self._wakes_at = float("inf")
        self._carrying = False
        self.limited = member.limit(clock.monotonic()) > 0
        """Whether each call needs a permit, probes too."""

    def start(self) -> None:
        """Time begins to pass."""
        self._tick()

    # -- what the dispatcher asks -------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether calls may begin at all: we know what operators want."""
        return self.member.alone or self.member.own.standing.sure

    @property
    def me(self) -> str:
        """Our name in the fleet."""
        return self.member.me

    @property
    def leader(self) -> str | None:
        """Who leads, as far as we know."""
        return self.member.terms.leader

    @property
    def alone(self) -> bool:
        """Whether there is no fleet."""
        return self.member.alone

    def in_time(self, until: float) -> bool:
        """Whether a permit is still good."""
        return self._clock.monotonic() <= until

    @property
    def held_until(self) -> float:
        """When the hold of a throttled answer, to whomever, is over."""
        return self.member.own.standing.held_until

    @property
    def sick(self) -> bool:
        """We fail where others succeed: give back, take nothing."""
        return self.member.own.health.sick

    def paused(self, lane: str) -> bool:
        """Whether an operator has paused the lane."""
        standing = self.member.own.standing
        return bool(standing.orders.pauses) and standing.paused(lane, self._clock.monotonic())

    def probes(self, lane: str) -> int:
        """Probes of the lane that we may send now."""
        return self.member.probes(lane, self._clock.monotonic())

    def test_due(self) -> bool:
        """Whether we, being sick, may test ourselves now."""
        return self.member.own.health.test_due(self._clock.monotonic())

    def card(self) -> Card:
        """The state of the fleet, for people. From any thread."""
        return self.member.card(self._clock.monotonic())

    # -- what happens ------------------------------------------------------------------------------------------------

    def attempted(self, lane: str | None, kind: Kind, now: float, *, probe: bool = False, reached: bool = True) -> None:
        self.member.attempted(now, lane, kind, probe=probe, reached=reached)
        if self.member.actions:
            self._carry_out()

    def take_probe(self, lane: str) -> bool:
        return self.member.take_probe(self._clock.monotonic(), lane)

    def take_test(self) -> None:
        """We test ourselves: `tested` or `probe_lost` follows."""
        self.member.own.health.testing = True

    def rested(self, orders: OperatorOrders | None) -> None:
        """What rested at the broker."""
        self._rested(orders, {} if orders is None else orders.left(self._clock.epoch()))

    throttled = _told(Member.throttled)
    waiting = _told(Member.waiting)
    candidates = _told(Member.candidates)
    probe_lost = _told(Member.probe_lost)
    tested = _told(Member.tested)
    leave = _told(Member.leave)
    joined = _told(Member.joined)
    lost = _told(Member.lost)
    received = _told(Member.received)
    undelivered = _told(Member.undelivered)
    took = _told(Member.took)
    taken = _told(Member.taken)
    _rested = _told(Member.rested)

    def say(self, to: str | None, message: FleetMessage) -> None:
        """To one member, or to all: what is about tokens, or answers a tool."""
        if self.wire is not None:
            self.wire.say(to, Letter(self.member.me, self.member.client, message))

    # -----------------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._timer, self._wakes_at = None, float("inf")
        self.member.tick(self._clock.monotonic())
        self._carry_out()

    def _carry_out(self) -> None:
        if self._carrying:
            return  # the caller that does it already continues with what was added
        self._carrying = True
        actions, changed = self.member.actions, False
        try:
            while actions:
                action = actions.pop(0)
                match action:
                    case Say(to, message):
                        self.say(to, message)
                    case Permit(lane, until):
                        self.on_permit(lane, until)
                    case Changed():
                        changed = True
                    case Letter():
                        self.on_token(action)
                    case AcquireTerm(term):
                        if self.wire is not None:
                            self.wire.acquire_term(term)
                    case ReleaseTerm(term):
                        if self.wire is not None:
                            self.wire.release_term(term)
                    case ReadOrders():
                        if self.wire is not None:
                            self.wire.read_orders()
                    case _:
                        assert_never(action)
                if changed and not actions:
                    changed = False
                    self.on_change()
        finally:
            self._carrying = False
        self._wind()

    def _wind(self) -> None:
        now = self._clock.monotonic()
        limited = self.member.limit(now) > 0
        if limited is not self.limited:
            self.limited = limited
            self.on_change()
        moment = self.member.next(now)
        if moment < self._wakes_at - SLACK:
            if self._timer is not None:
                self._timers.remove_timeout(self._timer)
            self._wakes_at = moment
            self._timer = self._timers.call_later(max(0.0, moment - now), self._tick)
