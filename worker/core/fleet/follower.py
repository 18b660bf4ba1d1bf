"""What a member knows of the leader that it follows: its latest beat, its clock, and what it has been told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from worker.core.breaker import State
from worker.core.fleet.messages import Beat, BreakerState, Good, MemberGrant, MemberReport
from worker.core.fleet.own import Own
from worker.core.fleet.permits import LATE, Offset, zeros
from worker.core.fleet.terms import BEAT
from worker.core.lanes import LANES

REPORT: Final = 1.0
"""Seconds between two reports of a member that has nothing new to report."""
GONE: Final = 5.0
"""Seconds without a report after which a member counts no more."""
WANT: Final = 0.05
"""Seconds between two reports of what waits for slots: what happens at the same time is reported together."""


class Follower:
    """It mirrors the leader's breakers, tells it what waits and what fails, and finds the moments of its slots."""

    def __init__(self, own: Own) -> None:
        self.beat: Beat | None = None
        self.report_at = 0.0
        self._own = own
        self._offset = Offset()
        self._sent: dict[int, float] = {}  # when we sent our latest reports to this leader
        self._seen = zeros()
        self._known = zeros()  # what the leader knows of what we want
        self._failures = zeros()  # bad attempts that it has not heard of
        self._reported = float("-inf")

    def begin(self, now: float) -> None:
        """Another leader: it knows nothing of us."""
        self._offset.reset(self._own.number + 1)
        self._sent.clear()
        self._seen = zeros()
        self.soon(now, 0.0)

    def heard(self, beat: Beat, now: float) -> None:
        """The leader's beat."""
        self.beat = beat
        self._offset.message(beat.at, now, self._own.number + 1)
        if beat.hold > 0:
            self._own.standing.hold(beat.hold, now)
        self._mirror(beat.breakers, now)

    def _mirror(self, breakers: Mapping[str, BreakerState], now: float) -> None:
        """Our breakers follow the leader's."""
        ours, health = self._own.breakers, self._own.health
        uneasy = any(health.streaks.values())
        for lane in LANES:
            theirs = breakers.get(lane, BreakerState())
            try:
                state = State(theirs.state)
            except ValueError:
                continue
            uneasy = uneasy or theirs.failures > 0 or state is not State.CLOSED
            before = ours.state(lane)
            if state is not before or state is not State.CLOSED:
                ours.adopt(lane, state, theirs.cooldown, theirs.left, now)
                if state is not before:
                    self._own.changed()
            good = health.silent_good(theirs.failing, now) if theirs.failures else None
            if good is not None:
                self._own.say(None, Good(good, age=now - health.told))
        health.uneasy = uneasy

    # -- reports ------------------------------------------------------------------------------------------------------

    def soon(self, now: float, gap: float) -> None:
        """There is something to report, ``gap`` seconds after the last report at the earliest."""
        self.report_at = min(self.report_at, max(now, self._reported + gap))

    def failed(self, lanes: tuple[str, ...]) -> None:
        """A bad attempt, for the next report."""
        for lane in lanes:
            self._failures[lane] += 1

    def worked(self) -> None:
        """A good answer of whomever: what failed before it is not reported any more."""
        self._failures = zeros()

    def wants(self, lane: str, now: float) -> None:
        """What waits for slots has changed: reports it, if the leader knows it too little."""
        known, waiting = self._known[lane], self._own.permits.open(lane)
        if (waiting and not known) or known < waiting // 2 or waiting < known // 2:
            self.soon(now, WANT)

    def tick(self, now: float) -> None:
        """Reports what is due, and asks again when a beat is missing and something waits."""
        missed = now - self._own.terms.heard > 1.25 * BEAT and now - self._reported > BEAT
        if now >= self.report_at or (missed and any(self._own.permits.wanted.values())):
            self._report(now)

    def _report(self, now: float) -> None:
        own, health = self._own, self._own.health
        self._reported, self.report_at = now, now + REPORT
        number = own.next_number()
        self._sent = {each: sent for each, sent in self._sent.items() if now - sent <= GONE} | {number: now}
        self._known = {lane: own.permits.open(lane) for lane in LANES}
        report = MemberReport(
            own.terms.term,
            number,
            limit=own.settings.limit,
            wanted=own.wanted(),
            seen=dict(self._seen),
            failures={lane: count for lane, count in self._failures.items() if count},
            streaks={lane: count for lane, count in health.streaks.items() if count},
            since={lane: now - at for lane, at in health.since.items()},
            unreached=health.unreached,
            candidates=dict(own.candidates),
            calls=health.calls,
            sick=health.sick,
        )
        own.say(own.terms.leader, report)
        self.worked()

    # -- slots --------------------------------------------------------------------------------------------------------

    def granted(self, grant: MemberGrant, now: float) -> None:
        """Slots of ours, by the leader's clock."""
        own, offset = self._own, self._offset
        slots = [(slot, lane) for slot, lane in grant.slots if lane in LANES]
        for _, lane in slots:
            self._seen[lane] += 1
            self._known[lane] = max(0, self._known[lane] - 1)
        sent = self._sent.get(grant.answers)
        lower = float("-inf")
        if sent is not None and grant.answers >= offset.answers:
            lower = sent - grant.heard
        offset.message(grant.at, now, own.number + 1, lower)
        if offset.known:
            own.permits.add(((offset.ours(slot), lane) for slot, lane in slots), offset.doubt)
        else:
            own.permits.slots.clear()
        if offset.doubt > LATE / 2:
            self.soon(now, WANT)
        for lane in LANES:
            self.wants(lane, now)
