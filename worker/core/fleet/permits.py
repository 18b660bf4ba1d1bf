"""The rate limit of a fleet: slots in time, given out by the leader, and kept by each member without a common clock.

A slot is a moment at which one call may begin. The leader paces the slots evenly and gives them out a little ahead of
their time, cancellations first. A member finds the moment on its own clock, and a slot that is over by more than `LATE`
is lost. Even if something is late, frozen or comes twice, the calls of any second are never more than the slots that
the leader put into it, and unused slots leave no burst behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from worker.core.lanes import CANCELLATION, LANES, SWEEP, SWEEP_TURN

LATE: Final = 0.018
"""Seconds after its slot within which a call must begin."""
PACE: Final = 0.965
"""Share of the limit that is given out. A second at the gateway holds the slots of 1 second + `LATE` and the spread of
the network's delays, some 18 ms: 0.965 * 1.036 is below 1."""
HORIZON: Final = 0.15
"""Seconds ahead of their time up to which slots are given out: what the broker and both processes may take together."""
LEAD: Final = 0.03
"""Seconds ahead of its time at which another member's slot must at least be given out, or it would come too late."""
UNSEEN: Final = 0.3
"""Seconds' worth of slots that a member may have without a sign that it has seen them: one that is frozen wastes no
more."""
DRIFT: Final = 1e-4
"""The most by which one machine's clock runs faster than another's."""


def zeros() -> dict[str, int]:
    """A count for each lane."""
    return dict.fromkeys(LANES, 0)


def whole_limit(limit: float) -> float:
    """The limit that no second exceeds: 1.5 calls in any second are 1; half a call is one every two seconds."""
    return float(math.floor(limit)) if limit >= 1 else limit


@dataclass(slots=True)
class Slots:
    """Evenly spaced moments under a limit (calls per second, more than 0)."""

    limit: float = 0.0
    free: float = -math.inf

    def take(self, earliest: float) -> float:
        """The next slot, at ``earliest`` or later."""
        slot = max(earliest, self.free)
        self.free = slot + 1.0 / (whole_limit(self.limit) * PACE)
        return slot


@dataclass(slots=True)
class Demand:
    """What one member wants, as the leader knows it: calls without a slot for each lane, by its last report and what
    was given since."""

    wanted: dict[str, int] = field(default_factory=zeros)
    given: dict[str, int] = field(default_factory=zeros)
    seen: dict[str, int] = field(default_factory=zeros)

    def reported(self, wanted: Mapping[str, int], seen: Mapping[str, int]) -> None:
        """Its report: what was given, and had not come there yet, was not counted in it."""
        for lane in LANES:
            self.seen[lane] = min(max(self.seen[lane], seen.get(lane, 0)), self.given[lane])
            self.wanted[lane] = max(0, wanted.get(lane, 0) - (self.given[lane] - self.seen[lane]))

    def unseen(self) -> int:
        """Slots given of which it has shown no sign."""
        return sum(self.given[lane] - self.seen[lane] for lane in LANES)


@dataclass(slots=True)
class Shares:
    """Who gets the next slot: cancellations of all members first, every eighth turn the sweep's while both wait; the
    members of a lane in turn."""

    slots: Slots = field(default_factory=Slots)
    demands: dict[str, Demand] = field(default_factory=dict)
    _turn: int = 0
    _last: dict[str, str] = field(default_factory=dict)  # by lane: who was served last

    def demand(self, member: str) -> Demand:
        """What the member wants."""
        return self.demands.setdefault(member, Demand())

    def waits(self) -> bool:
        """Whether anybody wants a slot."""
        return any(any(demand.wanted.values()) for demand in self.demands.values())

    def give(self, me: str, now: float, until: float) -> dict[str, list[tuple[float, str]]]:
        """Slots for the members, from now on and up to ``until``. Those of ``me`` need no time to travel."""
        given: dict[str, list[tuple[float, str]]] = {}
        allowed = max(4, int(whole_limit(self.slots.limit) * UNSEEN))
        until = min(until, now + HORIZON)
        while max(self.slots.free, now) < until:
            chosen = self._choose(me, allowed)
            if chosen is None:
                break
            member, lane = chosen
            slot = self.slots.take(now if member == me else now + LEAD)
            demand = self.demands[member]
            demand.wanted[lane] -= 1
            demand.given[lane] += 1
            if member == me:
                demand.seen[lane] += 1
            given.setdefault(member, []).append((slot, lane))
        return given

    def _choose(self, me: str, allowed: int) -> tuple[str, str] | None:
        wanting = {
            lane: [
                member
                for member, demand in self.demands.items()
                if demand.wanted[lane] and (member == me or demand.unseen() < allowed)
            ]
            for lane in LANES
        }
        if wanting[CANCELLATION] and wanting[SWEEP]:
            self._turn = (self._turn + 1) % SWEEP_TURN
            lane = SWEEP if self._turn == 0 else CANCELLATION
        else:
            lane = CANCELLATION if wanting[CANCELLATION] else SWEEP
        if not wanting[lane]:
            return None
        members = sorted(wanting[lane])
        last = self._last.get(lane, "")
        self._last[lane] = next((member for member in members if member > last), members[0])
        return self._last[lane], lane


@dataclass(slots=True)
class Offset:
    """How far the leader's clock is from ours (ours less theirs), between two bounds.

    A message of theirs cannot come before it was sent, and a report of ours cannot have come there before we sent it:
    the best of the first gives the upper bound, the best of the second the lower one. When they cross, our own clock
    has stood still (a paused virtual machine). Everything that waits for us may be old then: only what answers a new
    report counts.
    """

    upper: float = math.inf
    lower: float = -math.inf
    at: float = 0.0
    answers: int = 0
    """The number of the report that must be answered first."""

    def reset(self, next_report: int) -> None:
        """Another leader, or our clock has stood still."""
        self.upper, self.lower, self.answers = math.inf, -math.inf, next_report

    @property
    def known(self) -> bool:
        """Whether both bounds are."""
        return self.lower > -math.inf

    @property
    def doubt(self) -> float:
        """Seconds by which a moment of theirs may be earlier on our clock than `ours` says."""
        return self.upper - self.lower

    def message(self, theirs: float, now: float, next_report: int, lower: float = -math.inf) -> None:
        """A message of the leader has come, sent at ``theirs``. ``lower``: the lower bound that it proves, when it
        answers a report: the moment when we sent that less the one when it was heard."""
        if not self.known and lower == -math.inf:
            return
        grown = max(0.0, now - self.at) * DRIFT
        self.at = now
        self.upper = min(self.upper + grown, now - theirs)
        self.lower = max(self.lower - grown, lower)
        if self.upper < self.lower:
            self.reset(next_report)

    def ours(self, theirs: float) -> float:
        """A moment of the leader's clock on ours, at the latest."""
        return theirs + self.upper


@dataclass(slots=True)
class Permits:
    """The slots that a member holds, on its own clock: when a call may begin, until when, and for which lane; and how
    many calls of each lane would begin now."""

    slots: list[tuple[float, float, str]] = field(default_factory=list)
    wanted: dict[str, int] = field(default_factory=zeros)

    def add(self, slots: Iterable[tuple[float, str]], doubt: float = 0.0) -> None:
        """More of them; a moment may be earlier by ``doubt`` than it seems, so it ends earlier."""
        self.slots.extend((slot, slot + LATE - doubt, lane) for slot, lane in slots)
        self.slots.sort()

    def due(self, now: float) -> Iterator[tuple[str, float]]:
        """Those whose moment has come: the lane, and until when a call may begin; what is over is lost."""
        while self.slots and self.slots[0][0] <= now:
            _, until, lane = self.slots.pop(0)
            if now <= until:
                yield lane, until

    def next(self) -> float:
        """When the next one is due; infinite without any."""
        return self.slots[0][0] if self.slots else math.inf

    def open(self, lane: str) -> int:
        """Calls of the lane that wait and have no slot."""
        return max(0, self.wanted[lane] - sum(1 for _, _, name in self.slots if name == lane))
