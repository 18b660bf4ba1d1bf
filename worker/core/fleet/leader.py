"""What the leader knows and decides: who is a member and who is sick, each lane's breaker, who probes and who calls.

A member that hears no leader has one of its own, for a fleet of one: so its own breakers go on to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from worker.core.breaker import State
from worker.core.fleet.follower import GONE, REPORT
from worker.core.fleet.messages import Beat, BreakerState, MemberGrant, MemberReport, Probe
from worker.core.fleet.own import LOOK_AGAIN, Own
from worker.core.fleet.permits import Shares
from worker.core.fleet.terms import BEAT, Role
from worker.core.lanes import LANES
from worker.core.verdict import Kind

SOON: Final = 0.02
"""Seconds between two beats, or two reports of failures: what happens at the same time is told together."""
LEARN: Final = 2.0
"""Seconds after its beginning in which a leader keeps to its predecessor's limit: not all members may have reported
yet."""


@dataclass(slots=True)
class Peer:
    """A member as the leader knows it, the leader itself included. Times are the leader's. The fields are those of
    `MemberReport`; ``good``: when each lane of it had its latest good answer, ``used``: its calls per second."""

    heard: float
    limit: float = 0.0
    streaks: Mapping[str, int] = field(default_factory=dict)
    since: Mapping[str, float] = field(default_factory=dict)
    unreached: int = 0
    good: dict[str, float] = field(default_factory=dict)
    candidates: Mapping[str, int] = field(default_factory=dict)
    reports: int = -1
    calls: int = 0
    calls_at: float = 0.0
    used: float = 0.0
    said_sick: bool = False

    def called(self, calls: int, now: float) -> None:
        """It has made so many calls so far."""
        if now - self.calls_at >= REPORT / 2:
            self.used = max(0, calls - self.calls) / (now - self.calls_at) if self.calls_at else 0.0
            self.calls, self.calls_at = calls, now


@dataclass(frozen=True, slots=True)
class Probing:
    """A probe that is out: whose, of which lane, and when it is lost."""

    member: str
    lane: str
    deadline: float


class Leader:
    """One leadership. ``last``: the latest beat of the leader before us, from which we go on."""

    def __init__(self, own: Own, now: float, last: Beat | None = None) -> None:
        self.peers = {own.me: Peer(now, own.settings.limit, candidates=dict(own.candidates))}
        self.shares = Shares()
        self.sick = set(last.sick) - {own.me} if last is not None else set()
        self.beat_at = 0.0
        self._own = own
        self._began = now
        self._last_limit = last.limit if last is not None else 0.0
        self._beaten = float("-inf")
        self._suspects: dict[str, str] = {}  # by lane: who alone has failed
        self._failing: dict[str, float] = {}  # by lane: since when there are failures
        self._failers: dict[str, set[str]] = {lane: set() for lane in LANES}
        self._probes: dict[int, Probing] = {}
        self._look: dict[str, float] = {}  # by lane: no probe before
        self._prober = ""  # who probed last

    def limit(self, now: float) -> float:
        """The smallest limit of a member, in calls per second; 0 for none."""
        limits = [peer.limit for peer in self.peers.values()]
        if now - self._began < LEARN:
            limits.append(self._last_limit)
        return min((limit for limit in limits if limit > 0), default=0.0)

    def used(self) -> float:
        """Calls per second of all members."""
        return sum(peer.used for peer in self.peers.values())

    def listed(self) -> set[str]:
        """The members that are to give back what they hold."""
        return self.sick | set(self._suspects.values())

    def breakers(self, now: float) -> dict[str, BreakerState]:
        """Those of the lanes, as they are told."""
        ours = self._own.breakers
        return {
            lane: BreakerState(
                int(ours.state(lane)),
                ours.cooldown(lane),
                max(0.0, ours.probe_at(lane) - now),
                ours.failures(lane),
                now - self._failing[lane] if lane in self._failing else 0.0,
            )
            for lane in LANES
        }

    # -- members ------------------------------------------------------------------------------------------------------

    def hello(self, member: str, limit: float, now: float) -> None:
        """A member begins, or begins again, and so do the counts of its slots."""
        self.forget(member, now)
        self.peers[member] = Peer(now, limit)
        self.beat(now)

    def reported(self, member: str, report: MemberReport, now: float) -> None:
        """How a member is."""
        peer = self.peers.get(member)
        if peer is None:
            peer = self.peers[member] = Peer(now)
            if report.sick:
                self.sick.add(member)
            self.beat_soon(now)
        peer.heard, peer.limit, peer.reports = now, report.limit, report.number
        peer.streaks, peer.unreached = report.streaks, report.unreached
        peer.since = {lane: now - age for lane, age in report.since.items()}
        peer.candidates = report.candidates
        peer.called(report.calls, now)
        if peer.said_sick and not report.sick:
            self.sick.discard(member)
            self.beat_soon(now)
        peer.said_sick = report.sick
        self.count(member, report.failures, now)
        self.judge(now)
        if member not in self.sick:
            self.shares.demand(member).reported(report.wanted, report.seen)

    def tick(self, now: float) -> None:
        """Beats, and forgets members that are silent and probes that do not come back."""
        if now < self.beat_at:
            return
        me = self.peers[self._own.me]
        me.heard = now
        me.called(self._own.health.calls, now)
        for name in [name for name, peer in self.peers.items() if now - peer.heard > GONE]:
            self.forget(name, now)
        self._lose(now, [number for number, probe in self._probes.items() if now > probe.deadline])
        self.beat(now)

    def forget(self, member: str, now: float) -> None:
        """It is gone."""
        if self.peers.pop(member, None) is None:
            return
        self.shares.demands.pop(member, None)
        self.sick.discard(member)
        self._suspects = {lane: suspect for lane, suspect in self._suspects.items() if suspect != member}
        self._lose(now, [number for number, probe in self._probes.items() if probe.member == member])
        self.beat_soon(now)

    # -- beats --------------------------------------------------------------------------------------------------------

    def beat_soon(self, now: float) -> None:
        """Something is worth telling."""
        self.beat_at = min(self.beat_at, max(now, self._beaten + SOON))
        if now >= self.beat_at:
            self.beat(now)

    def beat(self, now: float) -> None:
        """Tells everybody the state of the fleet."""
        own, standing = self._own, self._own.standing
        if own.terms.role not in (Role.CLAIMS, Role.LEADS):
            return
        number = own.next_number()
        self._beaten, self.beat_at = now, now + BEAT
        own.terms.beat_sent(number, now)
        beat = Beat(
            own.terms.term,
            number,
            now,
            limit=standing.limit(self.limit(now)),
            hold=max(0.0, standing.held_until - now),
            sure=standing.sure,
            members=len(self.peers),
            used=round(self.used(), 2),
            breakers=self.breakers(now),
            sick=tuple(sorted(self.listed())),
            orders=standing.orders,
            pauses=standing.pauses(now),
        )
        own.say(None, beat)

    # -- failures and good answers ------------------------------------------------------------------------------------

    def count(self, who: str, failures: Mapping[str, int], now: float) -> None:
        """Bad attempts of a member, by lane."""
        if who in self.sick:
            return
        breakers = self._own.breakers
        for lane, count in failures.items():
            if lane not in LANES or count <= 0:
                continue
            self._own.health.uneasy = True  # our own next good answer is worth telling
            if self._suspects.get(lane, who) != who:
                self._unsuspect(lane, now)
            before, first = breakers.state(lane), lane not in self._failing
            self._failing.setdefault(lane, now)
            self._failers[lane].add(who)
            for _ in range(min(count, self._own.settings.threshold)):
                breakers.record(lane, Kind.TRANSIENT, now)
            opened = before is State.CLOSED and breakers.state(lane) is not State.CLOSED
            if opened:
                self._suspect(lane, now)
                self._own.changed()
            if first or opened:
                self.beat_soon(now)

    def worked(self, who: str, lane: str | None, at: float, now: float, *, probe: bool) -> None:
        """A good answer of a member ``at`` that moment closes every breaker and resets every count, unless it is older
        than the failures."""
        if who in self.peers:
            self.peers[who].good[lane or LANES[0]] = at
        if self._failing and at < min(self._failing.values()):
            return
        breakers, told = self._own.breakers, bool(self._failing)
        if any(breakers.state(name) is not State.CLOSED for name in LANES):
            told = True
            self._own.changed()
        breakers.record(lane, Kind.DONE, now, probe=probe)
        self.judge(now)
        self._failing.clear()
        self._failers = {name: set() for name in LANES}
        self._suspects.clear()
        if told:
            self.beat_soon(now)

    def judge(self, now: float) -> None:
        """Finds out who is sick: who fails while others' calls succeed in the same lane (in any lane, if it does not
        even reach the gateway)."""
        health, me = self._own.health, self.peers[self._own.me]
        me.streaks, me.since, me.unreached, me.good = health.streaks, health.since, health.unreached, health.good
        for name, peer in self.peers.items():
            if name not in self.sick and self._fails_alone(name, peer):
                self.sick.add(name)
                self.shares.demands.pop(name, None)
                self.beat_soon(now)

    def _fails_alone(self, name: str, peer: Peer) -> bool:
        threshold = self._own.settings.threshold
        return any(
            at > peer.since[lane] and (peer.unreached >= threshold or good == lane)
            for lane, streak in peer.streaks.items()
            if streak >= threshold and lane in peer.since
            for other in self._healthy(except_=name)
            for good, at in self.peers[other].good.items()
        )

    def _suspect(self, lane: str, now: float) -> None:
        """The lane's breaker has opened. If one member alone has failed, the trouble may be its own: another one tests
        the gateway at once, and it gives back what it holds meanwhile."""
        if len(self._failers[lane]) == 1:
            (suspect,) = self._failers[lane]
            if self._healthy(except_=suspect):
                self._suspects[lane] = suspect
                self._look.pop(lane, None)
                self.probe(now)

    def _unsuspect(self, lane: str, now: float) -> None:
        """Another member fails as well: it is an outage, and the first cooldown begins."""
        del self._suspects[lane]
        cooldown = self._own.settings.cooldown
        self._own.breakers.adopt(lane, State.OPEN, cooldown, cooldown, now)
        self.beat_soon(now)
        self._own.changed()

    def _healthy(self, except_: str | None = None) -> list[str]:
        return sorted(name for name in self.peers if name not in self.sick and name != except_)

    # -- probes -------------------------------------------------------------------------------------------------------

    def probe_now(self, now: float) -> None:
        """A person says that the gateway works again."""
        self._own.breakers.probe_now(now)
        self._look.clear()
        self.probe(now)

    def probe(self, now: float) -> None:
        """Gives out the probes that are due. While nobody leads, nobody probes: the next leader is a second away."""
        if not self._own.terms.leads(now):
            return
        breakers = self._own.breakers
        for lane in LANES:
            if breakers.state(lane) is State.CLOSED or now < self._look.get(lane, 0.0):
                continue
            suspect = self._suspects.get(lane)
            if suspect is None:
                due = breakers.probes_due(lane, now)
            else:
                due = int(not any(probe.lane == lane for probe in self._probes.values()))
            self.give_probes(lane, self._probers(lane, due, suspect), now)

    def give_probes(self, lane: str, members: list[str], now: float) -> None:
        """One to each of these members."""
        own = self._own
        if members:
            own.breakers.probing(lane, len(members))
        for name in members:
            number = own.next_number()
            self._probes[number] = Probing(name, lane, now + own.settings.call_seconds)
            if name == own.me:
                own.probes.give(number, lane, now)
                own.changed()
            else:
                own.say(name, Probe(own.terms.term, number, lane))

    def _probers(self, lane: str, due: int, suspect: str | None) -> list[str]:
        """Who probes: members with commands of the lane in hand, one each, then a second one. If there are none, one of
        the others looks into the queue."""
        turn = sorted(self._healthy(except_=suspect), key=lambda name: (name <= self._prober, name))
        chosen: list[str] = []
        while len(chosen) < due:
            more = [name for name in turn if self.peers[name].candidates.get(lane, 0) > chosen.count(name)]
            if not more:
                break
            chosen += more[: due - len(chosen)]
        if due > 0 and not chosen:
            chosen = turn[:1]
        if chosen:
            self._prober = chosen[-1]
        return chosen

    def probed(self, member: str, number: int, lane: str, label: str, now: float) -> None:
        """What came of a probe: the label of its verdict, or "lost"."""
        probe = self._probes.get(number)
        if probe is None or (probe.member, probe.lane) != (member, lane):
            return
        if label == "lost":
            self._look[lane] = now + LOOK_AGAIN
            self._lose(now, [number])
            return
        kind = next((kind for kind in Kind if kind.label == label), None)
        if kind is None:
            return
        del self._probes[number]
        if kind.final:
            return  # it was told to all
        self._own.breakers.record(lane, kind, now, probe=True)
        if kind.bad:
            self._failers[lane].add(member)
            if self._suspects.get(lane, member) != member:
                self._unsuspect(lane, now)
        self.beat_soon(now)

    def _lose(self, now: float, numbers: list[int]) -> None:
        """These probes do not come back."""
        for number in numbers:
            self._own.breakers.probe_lost(self._probes.pop(number).lane, now)

    # -- slots --------------------------------------------------------------------------------------------------------

    def share(self, now: float, until: float) -> None:
        """Gives out slots up to the moment ``until``, our own ones to ourselves."""
        own = self._own
        self.shares.demand(own.me).wanted = own.wanted()
        limit = own.standing.limit(self.limit(now))
        if not limit or now >= until:
            return
        self.shares.slots.limit = limit
        for name, slots in self.shares.give(own.me, now, until).items():
            if name == own.me:
                own.permits.add(slots)
            else:
                peer = self.peers[name]
                own.say(name, MemberGrant(own.terms.term, now, peer.reports, peer.heard, tuple(slots)))
