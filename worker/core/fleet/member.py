"""One member of a fleet: it hears what happens here and what others say, and says what is to be done.

The leader decides for all: it counts failures for the one breaker of each lane, hands out probes and slots, and finds
out who is sick. The others obey its beats. Who hears no leader decides for itself, but makes no call under a limit.
Everything that must be quick (a good answer that ends an outage, a throttled one that holds all) goes to all at once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from worker.core.breaker import Breakers, State
from worker.core.fleet.messages import (
    Beat,
    Card,
    Good,
    Goodbye,
    Grant,
    Hello,
    Letter,
    Message,
    Ordered,
    Orders,
    Probe,
    Probed,
    Report,
    Throttled,
    TokenFailed,
    TokenGiven,
    TokenWanted,
    Told,
    Who,
)
from worker.core.fleet.permits import LATE, Offset, Purse, Shares
from worker.core.fleet.terms import BEAT, Lock, Role, Terms, Unlock
from worker.core.lanes import LANES
from worker.core.retry import MAX_RETRY_AFTER
from worker.core.verdict import Kind

REPORT: Final = 1.0
"""Seconds between two reports of a member that has nothing new to report."""
GONE: Final = 5.0
"""Seconds without a report after which a member counts no more."""
SOON: Final = 0.02
"""Seconds between two reports of failures, or two beats: what happens at the same time is reported together."""
WANT: Final = 0.05
"""The same for reports of what waits for slots."""
LEARN: Final = 2.0
"""Seconds after its beginning in which a leader keeps to its predecessor's limit: not all members may have reported
yet."""
UNTAKEN: Final = 2.0
"""Seconds after which a probe that finds no command goes to another member."""
LOOK_AGAIN: Final = 1.0
"""Seconds until the next probe after one that found no command."""
REST: Final = 60.0  # seconds between two looks of a member without a fleet that waits for nothing
DISTRUST: Final = 1.0
"""Seconds in which a member that has just recovered does not believe that it is sick: the news crosses its own."""


@dataclass(frozen=True, slots=True)
class Rules:
    """A member's own settings: its limit (calls per second, 0 for none), the breaker's threshold and first cooldown
    (seconds), and the longest that a call may take (seconds)."""

    limit: float
    threshold: int
    cooldown: float
    call_seconds: float


@dataclass(frozen=True, slots=True)
class Say:
    """To one member, or to all (None)."""

    to: str | None
    message: Message


@dataclass(frozen=True, slots=True)
class Call:
    """One expire call may begin now, and until ``until``; the slot was given for ``lane``."""

    lane: str
    until: float


@dataclass(frozen=True, slots=True)
class ReadOrders:
    """Look what operators want: it rests at the broker. `Member.rested` has the answer."""


@dataclass(frozen=True, slots=True)
class Changed:
    """Senders have to look again."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A message about tokens, for those who know them."""

    letter: Letter


Action = Say | Call | ReadOrders | Changed | Pass | Lock | Unlock


@dataclass(slots=True)
class Peer:
    """A member as the leader knows it, the leader itself included. Times are the leader's."""

    heard: float
    limit: float = 0.0
    streaks: Mapping[str, int] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
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


class Member:
    """See the module. After each method `actions` is to be carried out, in order, and emptied.

    ``alone``: there is no fleet; its member gives itself slots and probes.
    """

    def __init__(
        self, me: str, client: str, rules: Rules, breakers: Breakers, rng: random.Random, *, alone: bool
    ) -> None:
        self.me = me
        self.client = client
        self.rules = rules
        self.breakers = breakers
        self.alone = alone
        self.actions: list[Action] = []
        self.terms = Terms(me, jitter=rng.random)
        self.sick = False
        self.held_until = 0.0
        self.orders = Orders()
        self.sure = False
        """Whether we know what operators want."""
        self.told: Beat | None = None
        """The leader's latest beat."""
        self.calls = 0
        self.left = False
        self._ends: dict[str, float] = {}  # when pauses end by themselves
        self._wanted = dict.fromkeys(LANES, 0)
        self._candidates = dict.fromkeys(LANES, 0)
        self._purse = Purse()
        self._offset = Offset()
        self._sent: dict[int, float] = {}  # our latest reports to this leader
        self._seen = dict.fromkeys(LANES, 0)
        self._known = dict.fromkeys(LANES, 0)  # what the leader knows of what we want
        self._failures = dict.fromkeys(LANES, 0)
        self._streaks = dict.fromkeys(LANES, 0)
        self._since: dict[str, float] = {}
        self._unreached = 0
        self._good: dict[str, float] = {}
        self._good_told = 0.0
        self._uneasy = False
        self._granted: dict[str, list[tuple[int, float]]] = {lane: [] for lane in LANES}
        self._taken: dict[str, list[int]] = {lane: [] for lane in LANES}
        self._test_at = 0.0
        self._testing = False
        self._cured = float("-inf")
        self._said_hold = 0.0
        self._numbers = 0
        self._report_at = 0.0
        self._reported = float("-inf")
        self._beat_at = 0.0
        self._beaten = float("-inf")
        self._since_term = 0.0
        # The leader's.
        self.peers: dict[str, Peer] = {}
        self.shares = Shares()
        self._sick: set[str] = set()
        self._suspects: dict[str, str] = {}  # by lane: who alone has failed
        self._failing: dict[str, float] = {}
        self._failers: dict[str, set[str]] = {lane: set() for lane in LANES}
        self._probes: dict[int, tuple[str, str, float]] = {}
        self._look: dict[str, float] = {}
        self._prober = ""
        self._inherited = 0.0

    # -- what is asked ------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether calls may begin at all: we know what operators want."""
        return self.alone or self.sure

    def limit(self, now: float) -> float:
        """Calls per second of the whole fleet; 0 for none."""
        if self.orders.limit is not None:
            return self.orders.limit.rate
        limits = [self.rules.limit]
        if self._leads:
            limits += [peer.limit for peer in self.peers.values()]
            if now - self._since_term < LEARN:
                limits.append(self._inherited)
        elif self.told is not None:
            limits.append(self.told.limit)
        return min((limit for limit in limits if limit > 0), default=0.0)

    def state(self, lane: str) -> State:
        """The lane's breaker."""
        return self.breakers.state(lane)

    def paused(self, lane: str, now: float) -> bool:
        """Whether an operator has paused the lane."""
        return lane in self.orders.pauses and now < self._ends.get(lane, float("inf"))

    def pauses(self, now: float) -> dict[str, float]:
        """Seconds left of the pauses that end by themselves."""
        return {lane: max(0.0, end - now) for lane, end in self._ends.items()}

    def probes(self, lane: str, now: float) -> int:
        """Probes of the lane that we may send now."""
        if self.terms.role is Role.APART:
            return self.breakers.probes_due(lane, now)
        return len(self._granted[lane])

    def test_due(self, now: float) -> bool:
        """Whether we, being sick, may test ourselves now."""
        return self.sick and not self._testing and now >= self._test_at

    def next(self, now: float) -> float:
        """When `tick` has something to do, at the latest."""
        idle = self.terms.role is Role.APART
        moments = [now + (REST if idle else BEAT / 2), *self._ends.values()]
        slot = self._purse.next()
        if slot is not None:
            moments.append(slot)
        if self._follows:
            moments.append(self._report_at)
        elif self._leads:
            moments.append(self._beat_at)
        if any(need.wanted[lane] for need in self.shares.needs.values() for lane in LANES):
            moments.append(now + WANT)
        return max(now, min(moments))

    def card(self, now: float) -> Card:
        """How we are, for people."""
        beat = self.told
        leads = self._leads
        return Card(
            client=self.client,
            role=self.terms.role.value,
            term=self.terms.term,
            leader=self.terms.leader or "",
            members=self.members(),
            sick=self.sick,
            limit=self.limit(now),
            own_limit=self.rules.limit,
            used=self._used() if leads or beat is None else beat.used,
            calls=self.calls,
            hold=max(0.0, self.held_until - now),
            waiting=dict(self._wanted),
            breakers=self._breakers_told(now),
            orders=self.orders,
            pauses=self.pauses(now),
        )

    def members(self) -> int:
        """How many members the fleet has, as far as we know."""
        return len(self.peers) if self._leads else self.told.members if self._follows and self.told else 1

    # -- what happens here --------------------------------------------------------------------------------------------

    def attempted(self, lane: str | None, kind: Kind, now: float, *, probe: bool = False, reached: bool = True) -> None:
        """An attempt was judged; ``lane`` None: a token request's. ``reached``: the gateway may have seen it."""
        self.calls += lane is not None
        if kind.final:
            self._good[lane or LANES[0]] = now
            if self._uneasy or probe or self.sick:
                self._had_good(lane, kind, now, probe=probe)
            return
        if probe and self._testing:
            self._testing, self._test_at = False, now + self.rules.cooldown
        elif kind.bad:
            self._had_bad(lane, kind, now, probe=probe, reached=reached)
        elif probe and lane is not None:
            self._answered_probe(lane, kind, now)

    def throttled(self, seconds: float, now: float) -> None:
        """A throttled answer to us holds everybody for so long."""
        self.held_until = max(self.held_until, now + seconds)
        if self.held_until > self._said_hold + 0.1 * seconds:  # many calls that were out say nothing new
            self._said_hold = self.held_until
            self._say(None, Throttled(seconds))

    def waiting(self, lane: str, calls: int, now: float) -> None:
        """So many calls of the lane would begin now if they were permitted."""
        self._wanted[lane] = calls
        if self._leads or self.alone:
            self._want(now)
            self._grant(now)
        elif self._follows:
            known, open_ = self._known[lane], self._open(lane)
            if (open_ and not known) or known < open_ // 2 or open_ < known // 2:
                self._soon(now, WANT)

    def candidates(self, lane: str, commands: int, now: float) -> None:
        """So many commands in hand could be probes."""
        if commands != self._candidates[lane]:
            self._candidates[lane] = commands
            if self._leads:
                self.peers[self.me].candidates = dict(self._candidates)
            else:
                self._soon(now, WANT)

    def take_probe(self, lane: str, now: float) -> bool:
        """One of our probes goes out. False when there is none any more: the leader that gave it leads no more."""
        if self.terms.role is Role.APART and self.breakers.probes_due(lane, now):
            self.breakers.probing(lane)
            self._grant_probes(lane, [self.me], now)
        if not self._granted[lane]:
            return False
        number, _ = self._granted[lane].pop(0)
        self._taken[lane].append(number)
        return True

    def probe_lost(self, lane: str, now: float) -> None:
        """A probe that we took ended without a verdict; so did a test."""
        if self._testing:
            self._testing, self._test_at = False, now + LOOK_AGAIN
        if self._taken[lane]:
            self._return_probe(self._taken[lane].pop(0), lane, now)

    def take_test(self) -> None:
        """We test ourselves."""
        self._testing = True

    def tested(self, *, good: bool, now: float) -> None:
        """The result of a token request of a test."""
        self._testing = False
        if good:
            self._cure(now)
        else:
            self._test_at = now + self.rules.cooldown

    def leave(self, now: float) -> None:
        """We drain: others lead, and nobody waits for us."""
        if self.left:
            return
        self.left = self.terms.reluctant = True
        self._say(None, Goodbye(self.terms.term if self.terms.leader == self.me else 0))
        self.terms.resign(now)
        self._steps()

    # -- the connection -----------------------------------------------------------------------------------------------

    def joined(self, now: float) -> None:
        """Our queue is there: what is said from now on reaches us."""
        self.terms.joined(now)
        self._say(None, Hello(self.rules.limit))

    def lost(self, now: float) -> None:
        """The connection is gone."""
        self.terms.lost()
        self._purse.slots.clear()
        self._no_leader(now)
        self.actions.append(Changed())

    def took(self, term: int, now: float) -> None:
        """See `Terms`."""
        before = self.terms.role
        self.terms.took(term, now)
        self._steps()
        if before is Role.FOLLOWS and self.terms.role is Role.CLAIMS:
            self._begin(now)
            self._beat(now)

    def taken(self, term: int, now: float) -> None:
        """See `Terms`."""
        self.terms.taken(term, now)
        self._steps()

    def undelivered(self, to: str, now: float) -> None:
        """The queue of a member is gone, so its connection is."""
        if to == self.terms.leader and self._follows:
            self.terms.heard_goodbye(to, now)
            self._no_leader(now)
            self.tick(now)
        else:
            self._forget(to, now)

    def rested(self, orders: Orders | None, left: Mapping[str, float], now: float) -> None:
        """What operators want, as it rested at the broker; ``left``: seconds left of pauses that end by themselves."""
        if orders is not None and orders.revision >= self.orders.revision:
            self._obey(orders, left, now)
        if not self.sure:
            self.sure = True
            self.actions.append(Changed())
        if self._leads:
            self._beat(now)

    def receive(self, letter: Letter, now: float) -> None:
        """A message has come."""
        sender, message = letter.sender, letter.message
        if letter.client not in (self.client, "") or self.left:
            return
        if sender == self.me:
            if isinstance(message, Beat):
                self._own_beat(message, now)
            return
        match message:
            case Beat():
                self._heard_beat(sender, message, now)
            case Report():
                if self._leads and message.term == self.terms.term:
                    self._heard_report(sender, message, now)
            case Grant():
                if self._follows and sender == self.terms.leader and message.term == self.terms.term:
                    self._heard_grant(message, now)
            case Hello(limit):
                if self._leads:
                    self._forget(sender, now)  # it begins again, and so do the counts of its slots
                    self.peers[sender] = Peer(now, limit)
                    self._beat(now)
            case Good(lane, probe, age):
                self._heard_good(sender, lane, now, probe=probe, age=age)
            case Throttled(seconds):
                self.held_until = max(self.held_until, now + min(max(seconds, 0.0), MAX_RETRY_AFTER))
                self.actions.append(Changed())
            case Probe(term, number, lane):
                if self._follows and sender == self.terms.leader and term == self.terms.term and lane in LANES:
                    self._granted[lane].append((number, now))
                    self.actions.append(Changed())
            case Probed(number, lane, kind):
                self._heard_probed(sender, number, lane, kind, now)
            case Goodbye():
                if sender == self.terms.leader:
                    self.terms.heard_goodbye(sender, now)
                    self._no_leader(now)
                    self.tick(now)
                if message.leaves:
                    self._forget(sender, now)
            case Ordered(orders, pauses, probe):
                if orders is not None and orders.revision > self.orders.revision:
                    self._obey(orders, pauses, now)
                if probe and self._decides:
                    self.breakers.probe_now(now)
                    self._look.clear()
                    self._probe(now)
            case TokenWanted() | TokenGiven() | TokenFailed():
                self.actions.append(Pass(letter))
            case Who() | Card():
                pass

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self.left:
            return
        self.terms.tick(now)
        self._steps()
        if self._leads:
            if now >= self._beat_at:
                self._expire(now)
                self._beat(now)
        elif self._follows:
            missed = now - self.terms.heard > 1.25 * BEAT and now - self._reported > BEAT
            if now >= self._report_at or (missed and any(self._wanted.values())):
                self._report(now)
        self._return_untaken(now)
        self._probe(now)
        if self._leads or self.alone:
            self._want(now)
            self._grant(now)
        self._fire(now)
        for lane in [lane for lane, end in self._ends.items() if now >= end]:
            del self._ends[lane]
            self.orders = Orders(
                self.orders.revision,
                {name: pause for name, pause in self.orders.pauses.items() if name != lane},
                self.orders.limit,
            )
            self.actions.append(Changed())

    # -- roles --------------------------------------------------------------------------------------------------------

    @property
    def _leads(self) -> bool:
        return self.terms.leader == self.me

    @property
    def _follows(self) -> bool:
        return self.terms.leader not in (None, self.me)

    @property
    def _decides(self) -> bool:
        """Whether our own breakers decide: we lead, or nobody does."""
        return not self._follows

    def _begin(self, now: float) -> None:
        """We have a term. What we knew as a follower is where we go on from."""
        self._no_leader(now)
        last, self._since_term = self.told, now
        self._inherited = last.limit if last is not None else 0.0
        self.peers = {self.me: Peer(now, self.rules.limit, candidates=dict(self._candidates))}
        self.shares = Shares()
        self.shares.slots.pause(float("inf"))  # until our first beat has come back
        self._sick = set(last.sick) - {self.me} if last is not None else set()
        self._suspects.clear()
        self._failing.clear()
        self._failers = {lane: set() for lane in LANES}
        self._probes.clear()
        self._beaten = float("-inf")
        if self.sick:
            self._cure(now)

    def _no_leader(self, now: float) -> None:
        """No leader decides for us any more. Probes that are out may still come back to nobody, so those of the lane
        wait."""
        self._drop_probes()
        for lane in LANES:
            if self.breakers.state(lane) is State.HALF_OPEN:
                cooldown = self.breakers.cooldown(lane)
                self.breakers.adopt(lane, State.OPEN, cooldown, cooldown, now)

    def _drop_probes(self) -> None:
        for lane in LANES:
            self._granted[lane].clear()
            self._taken[lane].clear()
        self._probes.clear()

    def _own_beat(self, beat: Beat, now: float) -> None:
        before = self.terms.role
        self.terms.heard_beat(self.me, beat.term, beat.number, now)
        if before is Role.CLAIMS and self.terms.role is Role.LEADS:
            self.shares.slots.free = self.terms.begins
            self.actions.append(ReadOrders())
            self.actions.append(Changed())

    def _heard_beat(self, sender: str, beat: Beat, now: float) -> None:
        before, led = self.terms.leader, self._leads
        followed = self.terms.heard_beat(sender, beat.term, beat.number, now)
        self._steps()
        if not followed:
            return
        if led:
            self._no_leader(now)
        if before != sender:
            self._offset.reset(self._numbers + 1)
            self._sent.clear()
            self._seen = dict.fromkeys(LANES, 0)
            self._drop_probes()
            self._soon(now, 0.0)
        self.told = beat
        self._offset.message(beat.at, now, self._numbers + 1)
        if beat.hold > 0:
            self.held_until = max(self.held_until, now + min(beat.hold, MAX_RETRY_AFTER))
        self._mirror(beat, now)
        if beat.orders.revision >= self.orders.revision and beat.sure:
            self._obey(beat.orders, beat.pauses, now)
        if beat.sure and not self.sure:
            self.sure = True
            self.actions.append(Changed())
        self._hear_sick(beat, now)

    def _hear_sick(self, beat: Beat, now: float) -> None:
        listed = self.me in beat.sick
        if listed and not self.sick and now > self._cured + DISTRUST:
            self._fall_sick(now)
            self._soon(now, 0.0)
        elif not listed and self.sick:
            self.sick = self._testing = self.terms.reluctant = False
            self.actions.append(Changed())

    def _fall_sick(self, now: float) -> None:
        self.sick, self._testing = True, False
        self._test_at = now + self.rules.cooldown
        self.terms.reluctant = True
        for lane in LANES:
            for number, _ in self._granted[lane]:
                self._return_probe(number, lane, now)
            self._granted[lane].clear()
        self.actions.append(Changed())

    def _cure(self, now: float) -> None:
        self.sick = self._testing = self.terms.reluctant = self.left
        self._cured = now
        self._streaks = dict.fromkeys(LANES, 0)
        self._since.clear()
        self._unreached = 0
        self._sick.discard(self.me)
        self._soon(now, 0.0)
        self.actions.append(Changed())

    def _mirror(self, beat: Beat, now: float) -> None:
        """Our breakers follow the leader's."""
        uneasy = False
        for lane in LANES:
            told = beat.breakers.get(lane, Told())
            try:
                state = State(told.state)
            except ValueError:
                continue
            uneasy = uneasy or told.failures > 0 or state is not State.CLOSED
            if state is not self.breakers.state(lane) or state is not State.CLOSED:
                changed = state is not self.breakers.state(lane)
                self.breakers.adopt(lane, state, told.cooldown, told.left, now)
                if changed:
                    self.actions.append(Changed())
            latest = max(self._good.values(), default=0.0)
            if told.failures and latest > self._good_told and now - latest < told.failing:
                self._good_told = latest
                best = max(self._good, key=lambda name: self._good[name])
                self._say(None, Good(best, age=now - latest))
        self._uneasy = uneasy or any(self._streaks.values())

    # -- failures and good answers ------------------------------------------------------------------------------------

    def _had_good(self, lane: str | None, kind: Kind, now: float, *, probe: bool) -> None:
        self._streaks = dict.fromkeys(LANES, 0)
        self._since.clear()
        self._unreached = 0
        self._failures = dict.fromkeys(LANES, 0)
        self._uneasy = False
        self._good_told = now
        if probe and lane is not None and self._taken[lane]:
            number = self._taken[lane].pop(0)
            self._probes.pop(number, None)
            if self._follows:
                self._say(self.terms.leader, Probed(number, lane, kind.label))
        if self.sick:
            self._cure(now)
        self._say(None, Good(lane, probe))
        self._close(self.me, lane, kind, now, probe=probe, at=now)

    def _had_bad(self, lane: str | None, kind: Kind, now: float, *, probe: bool, reached: bool) -> None:
        self._uneasy = True
        self._unreached = 0 if reached else self._unreached + 1
        lanes = LANES if lane is None else (lane,)
        for name in lanes:
            self._streaks[name] += 1
            self._since.setdefault(name, now)
        if probe and lane is not None:
            self._answered_probe(lane, kind, now)
        elif self._decides:
            self._count(self.me, dict.fromkeys(lanes, 1), now)
        else:
            for name in lanes:
                self._failures[name] += 1
        if self._leads:
            self._about_me(now)
            self._judge(now)
        else:
            self._soon(now, SOON)

    def _answered_probe(self, lane: str, kind: Kind, now: float) -> None:
        """One of our probes failed."""
        if not self._taken[lane]:
            return
        number = self._taken[lane].pop(0)
        if self._follows:
            self._say(self.terms.leader, Probed(number, lane, kind.label))
        else:
            self._probe_back(self.me, number, lane, kind, now)

    def _heard_good(self, sender: str, lane: str | None, now: float, *, probe: bool, age: float) -> None:
        at = now - max(0.0, age)
        if self._leads and sender in self.peers:
            self.peers[sender].good[lane if lane in LANES else LANES[0]] = at
        self._close(sender, lane if lane in LANES else None, Kind.DONE, now, probe=probe, at=at)

    def _close(self, who: str, lane: str | None, kind: Kind, now: float, *, probe: bool, at: float) -> None:
        """Somebody's good answer closes every breaker and resets every count, if it is not older than the failures."""
        if self._failing and at < min(self._failing.values()):
            return
        open_ = any(self.breakers.state(name) is not State.CLOSED for name in LANES)
        self.breakers.record(lane, kind, now, probe=probe)
        self._failures = dict.fromkeys(LANES, 0)
        if self._leads:
            if who == self.me:
                self._about_me(now)
            self._judge(now)
            counted = bool(self._failing)
            self._failing.clear()
            self._failers = {name: set() for name in LANES}
            self._suspects.clear()
            if open_ or counted:
                self._beat_soon(now)
        else:
            self._failing.clear()
        if open_:
            self.actions.append(Changed())

    def _count(self, who: str, failures: Mapping[str, int], now: float) -> None:
        """Bad attempts of somebody, where we decide."""
        if who in self._sick:
            return
        opened = False
        for lane, count in failures.items():
            if lane not in LANES or count <= 0:
                continue
            if self._suspects.get(lane, who) != who:
                self._unsuspect(lane, now)
            before = self.breakers.state(lane)
            first = lane not in self._failing
            self._failing.setdefault(lane, now)
            self._failers[lane].add(who)
            for _ in range(min(count, self.rules.threshold)):
                self.breakers.record(lane, Kind.TRANSIENT, now)
            if before is State.CLOSED and self.breakers.state(lane) is not State.CLOSED:
                opened = True
                self._suspect(lane, now)
            if first or opened:
                self._beat_soon(now)
        if opened:
            self.actions.append(Changed())

    def _suspect(self, lane: str, now: float) -> None:
        """The lane's breaker has opened. If one member alone has failed, the trouble may be its own: another one tests
        the gateway at once, and it gives back what it holds meanwhile."""
        failers = self._failers[lane]
        if len(failers) == 1 and self._healthy(except_=failers):
            self._suspects[lane] = next(iter(failers))
            self._look.pop(lane, None)
            if self._suspects[lane] == self.me and not self.sick:
                self._fall_sick(now)
                self.terms.reluctant = False
            self._probe(now)

    def _unsuspect(self, lane: str, now: float) -> None:
        """Another member fails as well: it is an outage, and the first cooldown begins."""
        who = self._suspects.pop(lane)
        cooldown = self.rules.cooldown
        self.breakers.adopt(lane, State.OPEN, cooldown, cooldown, now)
        if who == self.me and self.me not in self._sick and self.me not in self._suspects.values():
            self.sick = self._testing = False
        self._beat_soon(now)
        self.actions.append(Changed())

    def _about_me(self, now: float) -> None:
        mine = self.peers[self.me]
        mine.heard, mine.streaks, mine.since = now, dict(self._streaks), dict(self._since)
        mine.unreached, mine.good = self._unreached, dict(self._good)

    def _judge(self, now: float) -> None:
        """Who fails while others' calls succeed in the same lane (in any lane, if it does not even reach the
        gateway)?"""
        for name, peer in self.peers.items():
            if name in self._sick:
                continue
            for lane, streak in peer.streaks.items():
                if streak < self.rules.threshold or lane not in peer.since:
                    continue
                anywhere = peer.unreached >= self.rules.threshold
                if any(
                    at > peer.since[lane] and (anywhere or good == lane)
                    for other, known in self.peers.items()
                    if other != name and other not in self._sick
                    for good, at in known.good.items()
                ):
                    self._sick.add(name)
                    self.shares.forget(name)
                    self._beat_soon(now)
                    break
        if self.me in self._sick:
            if not self.sick:
                self._fall_sick(now)
            self.terms.reluctant = True
            self._beat(now)
            self._say(None, Goodbye(self.terms.term, leaves=False))
            self.terms.resign(now)
            self._no_leader(now)
            self._steps()

    # -- probes -------------------------------------------------------------------------------------------------------

    def _healthy(self, except_: set[str]) -> list[str]:
        return sorted(name for name in self.peers if name not in self._sick and name not in except_)

    def _probe(self, now: float) -> None:
        """Gives out the probes that are due. While nobody leads, nobody probes: the next leader is a second away."""
        if not self.terms.leads(now):
            return
        for lane in LANES:
            if self.breakers.state(lane) is State.CLOSED or now < self._look.get(lane, 0.0):
                continue
            suspect = self._suspects.get(lane)
            if suspect is not None:
                out = any(name == lane for _, name, _ in self._probes.values())
                due = 0 if out else 1
            else:
                due = self.breakers.probes_due(lane, now)
            if not due:
                continue
            chosen = self._probers(lane, due, {suspect} if suspect else set())
            if chosen:
                self.breakers.probing(lane, len(chosen))
                self._grant_probes(lane, chosen, now)

    def _probers(self, lane: str, due: int, except_: set[str]) -> list[str]:
        """Who probes: members with commands of the lane in hand, one each, then a second one. If there are none, one of
        the others looks into the queue."""
        healthy = self._healthy(except_)
        able = {name: self.peers[name].candidates.get(lane, 0) for name in healthy}
        turn = sorted(healthy, key=lambda name: (name <= self._prober, name))
        chosen: list[str] = []
        while len(chosen) < due:
            more = [name for name in turn if able[name] > chosen.count(name)]
            if not more:
                break
            chosen += more[: due - len(chosen)]
        if not chosen:
            chosen = turn[:1]
        if chosen:
            self._prober = chosen[-1]
        return chosen

    def _grant_probes(self, lane: str, members: list[str], now: float) -> None:
        for name in members:
            self._numbers += 1
            self._probes[self._numbers] = (name, lane, now + self.rules.call_seconds)
            if name == self.me:
                self._granted[lane].append((self._numbers, now))
                self.actions.append(Changed())
            else:
                self._say(name, Probe(self.terms.term, self._numbers, lane))

    def _return_untaken(self, now: float) -> None:
        for lane in LANES:
            while self._granted[lane] and now - self._granted[lane][0][1] > UNTAKEN:
                number, _ = self._granted[lane].pop(0)
                self._return_probe(number, lane, now)

    def _return_probe(self, number: int, lane: str, now: float) -> None:
        if self._follows:
            self._say(self.terms.leader, Probed(number, lane, "lost"))
        else:
            self._heard_probed(self.me, number, lane, "lost", now)

    def _heard_probed(self, sender: str, number: int, lane: str, label: str, now: float) -> None:
        if label == "lost":
            known = self._probes.pop(number, None)
            if known is not None and known[0] == sender:
                self._look[known[1]] = now + LOOK_AGAIN
                self.breakers.probe_lost(known[1], now)
            return
        kind = next((kind for kind in Kind if kind.label == label), None)
        if kind is not None:
            self._probe_back(sender, number, lane, kind, now)

    def _probe_back(self, sender: str, number: int, lane: str, kind: Kind, now: float) -> None:
        known = self._probes.get(number)
        if known is None or known[:2] != (sender, lane):
            return
        del self._probes[number]
        if kind.final:
            return  # sent to all
        self.breakers.record(lane, kind, now, probe=True)
        if kind.bad:
            self._failers[lane].add(sender)
            if lane in self._suspects and sender != self._suspects[lane]:
                self._unsuspect(lane, now)
        self._beat_soon(now)

    # -- slots --------------------------------------------------------------------------------------------------------

    def _open(self, lane: str) -> int:
        """Calls that wait and have no slot."""
        return max(0, self._wanted[lane] - self._purse.held(lane))

    def _want(self, now: float) -> None:
        """What we ourselves want, as leader."""
        need = self.shares.need(self.me)
        for lane in LANES:
            need.wanted[lane] = 0 if self.sick else self._open(lane)

    def _grant(self, now: float) -> None:
        limit = self.limit(now)
        if not limit or not (self.alone or self.terms.leads(now)):
            return
        self.shares.slots.limit = limit
        until = float("inf") if self.alone else self.terms.lease
        for name, slots in self.shares.give(self.me, now, until).items():
            if name == self.me:
                self._purse.add(slots)
            else:
                peer = self.peers[name]
                self._say(name, Grant(self.terms.term, now, peer.reports, peer.heard, tuple(slots)))
        self._fire(now)

    def _heard_grant(self, grant: Grant, now: float) -> None:
        for _, lane in grant.slots:
            if lane in LANES:
                self._seen[lane] += 1
                self._known[lane] = max(0, self._known[lane] - 1)
        sent = self._sent.get(grant.answers)
        if sent is not None and grant.answers >= self._offset.answers:
            self._offset.answer(grant.at, now, sent, grant.heard, self._numbers + 1)
        else:
            self._offset.message(grant.at, now, self._numbers + 1)
        if self._offset.known:
            self._purse.add(
                ((self._offset.ours(slot), lane) for slot, lane in grant.slots if lane in LANES), self._offset.doubt
            )
            self._fire(now)
        else:
            self._purse.slots.clear()
        if self._offset.doubt > LATE / 2:
            self._soon(now, WANT)
        for lane in LANES:
            if self._known[lane] < self._open(lane) // 2 or (self._open(lane) and not self._known[lane]):
                self._soon(now, WANT)

    def _fire(self, now: float) -> None:
        for lane, until in self._purse.due(now):
            self.actions.append(Call(lane, until))

    # -- telling ------------------------------------------------------------------------------------------------------

    def _say(self, to: str | None, message: Message) -> None:
        if (
            not self.alone
            and self.terms.role is not Role.APART
            and not (to is None and self.left and not isinstance(message, Goodbye))
        ):
            self.actions.append(Say(to, message))

    def _steps(self) -> None:
        self.actions.extend(self.terms.steps)
        self.terms.steps.clear()

    def _soon(self, now: float, gap: float) -> None:
        self._report_at = min(self._report_at, max(now, self._reported + gap))

    def _beat_soon(self, now: float) -> None:
        self._beat_at = min(self._beat_at, max(now, self._beaten + SOON))
        if self._leads and now >= self._beat_at:
            self._beat(now)

    def _report(self, now: float) -> None:
        self._reported, self._report_at = now, now + REPORT
        self._numbers += 1
        self._sent[self._numbers] = now
        for number in [number for number in self._sent if now - self._sent[number] > GONE]:
            del self._sent[number]
        self._known = {lane: self._open(lane) for lane in LANES}
        self._say(
            self.terms.leader,
            Report(
                self.terms.term,
                self._numbers,
                limit=self.rules.limit,
                wanted=dict.fromkeys(LANES, 0) if self.sick else dict(self._known),
                seen=dict(self._seen),
                failures={lane: count for lane, count in self._failures.items() if count},
                streaks={lane: count for lane, count in self._streaks.items() if count},
                since={lane: now - at for lane, at in self._since.items()},
                unreached=self._unreached,
                candidates=dict(self._candidates),
                calls=self.calls,
                sick=self.sick,
            ),
        )
        self._failures = dict.fromkeys(LANES, 0)

    def _heard_report(self, sender: str, report: Report, now: float) -> None:
        peer = self.peers.get(sender)
        if peer is None:
            peer = self.peers[sender] = Peer(now)
            if report.sick:
                self._sick.add(sender)
            self._beat_soon(now)
        peer.heard, peer.limit, peer.reports = now, report.limit, report.number
        peer.streaks, peer.unreached = report.streaks, report.unreached
        peer.since = {lane: now - age for lane, age in report.since.items()}
        peer.candidates = report.candidates
        peer.called(report.calls, now)
        if peer.said_sick and not report.sick:
            self._sick.discard(sender)
            self._beat_soon(now)
        peer.said_sick = report.sick
        self._count(sender, report.failures, now)
        self._judge(now)
        if self._leads:
            if sender not in self._sick:
                self.shares.need(sender).reported(report.wanted, report.seen)
            self._grant(now)

    def _expire(self, now: float) -> None:
        """Forgets members that are silent, and probes that do not come back."""
        self.peers[self.me].heard = now
        self.peers[self.me].called(self.calls, now)
        for name in [name for name, peer in self.peers.items() if now - peer.heard > GONE]:
            self._forget(name, now)
        for number, (name, lane, deadline) in list(self._probes.items()):
            if now > deadline or (name not in self.peers and name != self.me):
                del self._probes[number]
                self.breakers.probe_lost(lane, now)

    def _forget(self, name: str, now: float) -> None:
        if not self._leads or self.peers.pop(name, None) is None:
            return
        self.shares.forget(name)
        self._sick.discard(name)
        for lane in [lane for lane, suspect in self._suspects.items() if suspect == name]:
            del self._suspects[lane]
        for number in [number for number, (prober, _, _) in self._probes.items() if prober == name]:
            _, lane, _ = self._probes.pop(number)
            self.breakers.probe_lost(lane, now)
        self._beat_soon(now)

    def _obey(self, orders: Orders, left: Mapping[str, float], now: float) -> None:
        """What operators want."""
        changed = orders != self.orders
        self.orders = orders
        for lane in LANES:
            pause = orders.pauses.get(lane)
            if pause is None or pause.seconds is None:
                self._ends.pop(lane, None)
            elif changed or lane not in self._ends:
                self._ends[lane] = now + max(0.0, left.get(lane, pause.seconds))
        if changed:
            self._beat_soon(now)
            self.actions.append(Changed())

    def _used(self) -> float:
        return sum(peer.used for peer in self.peers.values())

    def _breakers_told(self, now: float) -> dict[str, Told]:
        return {
            lane: Told(
                int(self.breakers.state(lane)),
                self.breakers.cooldown(lane),
                max(0.0, self.breakers.probe_at(lane) - now),
                self.breakers.failures(lane),
                now - self._failing[lane] if lane in self._failing else 0.0,
            )
            for lane in LANES
        }

    def _beat(self, now: float) -> None:
        if self.terms.role not in (Role.CLAIMS, Role.LEADS):
            return
        self._numbers += 1
        self._beaten, self._beat_at = now, now + BEAT
        self.terms.beat_sent(self._numbers, now)
        self._say(
            None,
            Beat(
                self.terms.term,
                self._numbers,
                now,
                limit=self.limit(now),
                hold=max(0.0, self.held_until - now),
                sure=self.sure,
                members=len(self.peers),
                used=round(self._used(), 2),
                breakers=self._breakers_told(now),
                sick=tuple(sorted(self._sick | set(self._suspects.values()))),
                orders=self.orders,
                pauses=self.pauses(now),
            ),
        )
