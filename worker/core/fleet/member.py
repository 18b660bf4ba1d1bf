"""One member of a fleet: it hears what happens here and what others say, and says what is to be done.

The leader decides for all: it counts failures for the one breaker of each lane, hands out probes and slots, and finds
out who is sick (`leader`). The others obey its beats (`follower`). Who hears no leader decides for itself, but makes no
call under a limit. Everything that must be quick (a good answer that ends an outage, a throttled one that holds all)
goes to all at once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

from worker.core.breaker import Breakers, State
from worker.core.fleet.follower import WANT, Follower
from worker.core.fleet.leader import SOON, Leader
from worker.core.fleet.messages import (
    Beat,
    Card,
    Good,
    Goodbye,
    Hello,
    Letter,
    MemberGrant,
    MemberReport,
    OperatorOrders,
    Ordered,
    Probe,
    Probed,
    Throttled,
    TokenFailed,
    TokenGiven,
    TokenWanted,
)
from worker.core.fleet.own import LOOK_AGAIN, UNTAKEN, MemberSettings, Own, Permit, ReadOrders
from worker.core.fleet.terms import BEAT, Role
from worker.core.lanes import LANES
from worker.core.verdict import Kind

REST: Final = 60.0  # seconds between two looks of a member without a fleet that waits for nothing


class Member:
    """See the module. After each method `actions` is to be carried out, in order, and emptied. What
    happens is told with the moment when it does.

    ``alone``: there is no fleet; its member gives itself slots and probes.
    """

    def __init__(
        self, me: str, client: str, settings: MemberSettings, breakers: Breakers, rng: random.Random, *, alone: bool
    ) -> None:
        self.me = me
        self.client = client
        self.alone = alone
        self.breakers = breakers
        self.own = Own(me, settings, breakers, rng.random)
        self.terms, self.actions = self.own.terms, self.own.actions
        self.leader = Leader(self.own, 0.0)
        self.follower = Follower(self.own)
        self._said_hold = 0.0

    # -- what is asked ------------------------------------------------------------------------------------------------

    def limit(self, now: float) -> float:
        """Calls per second of the whole fleet; 0 for none."""
        beat, own = self.follower.beat, self.own.settings.limit
        if self._leads or beat is None:
            return self.own.standing.limit(self.leader.limit(now))
        return self.own.standing.limit(min(beat.limit or own, own or beat.limit))

    def probes(self, lane: str, now: float) -> int:
        """Probes of the lane that we may send now."""
        if self.terms.role is Role.APART:
            return self.breakers.probes_due(lane, now)
        return self.own.probes.given(lane)

    def next(self, now: float) -> float:
        """When `tick` has something to do, at the latest."""
        idle = self.terms.role is Role.APART
        moments = [now + (REST if idle else BEAT / 2), *self.own.standing.ends.values(), self.own.permits.next()]
        if self._follows:
            moments.append(self.follower.report_at)
        elif self._leads:
            moments.append(self.leader.beat_at)
        if not self._follows and self.leader.shares.waits():
            moments.append(now + WANT)
        return max(now, min(moments))

    def card(self, now: float) -> Card:
        """How we are, for people."""
        own, beat = self.own, self.follower.beat
        return Card(
            client=self.client,
            role=self.terms.role.value,
            term=self.terms.term,
            leader=self.terms.leader or "",
            members=len(self.leader.peers) if self._leads or beat is None or not self._follows else beat.members,
            sick=self.own.health.sick,
            limit=self.limit(now),
            own_limit=own.settings.limit,
            used=self.leader.used() if self._leads or beat is None else beat.used,
            calls=own.health.calls,
            hold=max(0.0, self.own.standing.held_until - now),
            waiting=dict(own.permits.wanted),
            breakers=self.leader.breakers(now),
            orders=self.own.standing.orders,
            pauses=own.standing.pauses(now),
        )

    # -- what happens here --------------------------------------------------------------------------------------------

    def attempted(self, now: float, lane: str | None, kind: Kind, *, probe: bool = False, reached: bool = True) -> None:
        """An attempt was judged; ``lane`` None: a token request's. ``reached``: the gateway may have seen it."""
        health = self.own.health
        health.calls += lane is not None
        if kind.final:
            health.good[lane or LANES[0]] = now
            if health.uneasy or probe or health.sick:
                self._had_good(lane, kind, now, probe=probe)
        elif probe and health.testing:
            health.test_again(now + health.cooldown)
        elif kind.bad:
            self._had_bad(lane, kind, now, probe=probe, reached=reached)
        elif probe and lane is not None:
            self._probe_back(lane, kind.label, now)

    def throttled(self, now: float, seconds: float) -> None:
        """A throttled answer to us holds everybody for so long."""
        self.own.standing.hold(seconds, now)
        if self.own.standing.held_until > self._said_hold + 0.1 * seconds:  # many calls that were out say nothing new
            self._said_hold = self.own.standing.held_until
            self.own.say(None, Throttled(seconds))

    def waiting(self, now: float, lane: str, calls: int) -> None:
        """So many calls of the lane would begin now if they were permitted."""
        self.own.permits.wanted[lane] = calls
        if self._follows:
            self.follower.wants(lane, now)
        else:
            self._share(now)

    def candidates(self, now: float, lane: str, commands: int) -> None:
        """So many commands in hand could be probes."""
        if commands != self.own.candidates[lane]:
            self.own.candidates[lane] = commands
            self.leader.peers[self.me].candidates = dict(self.own.candidates)
            self.follower.soon(now, WANT)

    def take_probe(self, now: float, lane: str) -> bool:
        """One of our probes goes out. False when there is none any more: the leader that gave it leads no more."""
        if self.terms.role is Role.APART and self.breakers.probes_due(lane, now):
            self.leader.give_probes(lane, [self.me], now)
        return self.own.probes.take(lane)

    def probe_lost(self, now: float, lane: str) -> None:
        """A probe that we took ended without a verdict; so did a test."""
        if self.own.health.testing:
            self.own.health.test_again(now + LOOK_AGAIN)
        self._probe_back(lane, "lost", now)

    def tested(self, now: float, good: bool) -> None:
        """The result of a token request of a test."""
        if good:
            self._cure(now)
        else:
            self.own.health.test_again(now + self.own.health.cooldown)

    def leave(self, now: float) -> None:
        """We drain: others lead, and nobody waits for us."""
        if self.own.left:
            return
        self.own.left = self.terms.reluctant = True
        self.own.say(None, Goodbye(self.terms.term if self._leads else 0))
        self.terms.resign(now)

    # -- the connection -----------------------------------------------------------------------------------------------

    def joined(self, now: float) -> None:
        """Our queue is there: what is said from now on reaches us."""
        self.terms.joined(now)
        self.own.say(None, Hello(self.own.settings.limit))

    def rename(self, me: str) -> None:
        """Another name, before we join: the queue of the old one is still at the broker. To the others we are new."""
        self.leader.peers[me] = self.leader.peers.pop(self.me)
        self.me = self.terms.me = self.own.me = me

    def lost(self, now: float) -> None:
        """The connection is gone."""
        self.terms.lost()
        self.own.permits.slots.clear()
        self._no_leader(now)
        self.own.changed()

    def took(self, now: float, term: int) -> None:
        """See `Terms`."""
        before = self.terms.role
        self.terms.took(term, now)
        if before is Role.FOLLOWS and self.terms.role is Role.CLAIMS:
            self._no_leader(now)
            self.leader = Leader(self.own, now, self.follower.beat)
            self.leader.shares.slots.free = float("inf")  # until our first beat has come back
            if self.own.health.sick:
                self._cure(now)
            self.leader.beat(now)

    def taken(self, now: float, term: int) -> None:
        """See `Terms`."""
        self.terms.taken(term, now)

    def undelivered(self, now: float, to: str) -> None:
        """The queue of a member is gone, so its connection is."""
        if to == self.terms.leader and self._follows:
            self._leader_gone(to, now)
        elif self._leads:
            self.leader.forget(to, now)

    def rested(self, now: float, orders: OperatorOrders | None, left: Mapping[str, float]) -> None:
        """What operators want, as it rested at the broker; ``left``: seconds left of pauses that end by themselves."""
        self._know(orders, left, now)
        if self._leads:
            self.leader.beat(now)

    def received(self, now: float, letter: Letter) -> None:
        """A message has come."""
        sender, message = letter.sender, letter.message
        if letter.client not in (self.client, "") or self.own.left:
            return
        if sender == self.me:
            if isinstance(message, Beat):
                self._own_beat(message, now)
            return
        match message:
            case Beat():
                self._heard_beat(sender, message, now)
            case MemberReport(term):
                if self._leads and term == self.terms.term:
                    self.leader.reported(sender, message, now)
                    self._about_us(now)
                    self._share(now)
            case MemberGrant(term):
                if self._leads_us(sender, term):
                    self.follower.granted(message, now)
                    self._fire(now)
            case Hello(limit):
                if self._leads:
                    self.leader.hello(sender, limit, now)
            case Good(lane, probe, age):
                self._worked(sender, lane if lane in LANES else None, now - max(0.0, age), now, probe=probe)
            case Throttled(seconds):
                self.own.standing.hold(seconds, now)
                self.own.changed()
            case Probe(term, number, lane):
                if self._leads_us(sender, term) and lane in LANES:
                    self.own.probes.give(number, lane, now)
                    self.own.changed()
            case Probed(number, lane, label):
                self.leader.probed(sender, number, lane, label, now)
                self._about_us(now)
            case Goodbye():
                if sender == self.terms.leader:
                    self._leader_gone(sender, now)
                if message.leaves and self._leads:
                    self.leader.forget(sender, now)
            case Ordered(orders, pauses, probe):
                if orders is not None and orders.revision > self.own.standing.orders.revision:
                    self._obey(orders, pauses, now)
                if probe and not self._follows:
                    self.leader.probe_now(now)
            case TokenWanted() | TokenGiven() | TokenFailed():
                self.actions.append(letter)

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self.own.left:
            return
        self.terms.tick(now)
        if self._leads:
            self.leader.tick(now)
        elif self._follows:
            self.follower.tick(now)
        for number, lane in self.own.probes.untaken(now - UNTAKEN):
            self._return_probe(number, lane, "lost", now)
        self.leader.probe(now)
        self._share(now)
        self._fire(now)
        if self.own.standing.tick(now):
            self.own.changed()

    # -- roles --------------------------------------------------------------------------------------------------------

    @property
    def _leads(self) -> bool:
        return self.terms.leader == self.me

    @property
    def _follows(self) -> bool:
        return self.terms.leader not in (None, self.me)

    def _leads_us(self, sender: str, term: int) -> bool:
        return self._follows and sender == self.terms.leader and term == self.terms.term

    def _no_leader(self, now: float) -> None:
        """No leader decides for us any more. Probes that are out may still come back to nobody, so those of the lane
        wait."""
        self.own.probes.drop()
        self.leader = Leader(self.own, now)
        for lane in LANES:
            if self.breakers.state(lane) is State.HALF_OPEN:
                cooldown = self.breakers.cooldown(lane)
                self.breakers.adopt(lane, State.OPEN, cooldown, cooldown, now)

    def _leader_gone(self, name: str, now: float) -> None:
        self.terms.heard_goodbye(name, now)
        self._no_leader(now)
        self.tick(now)

    def _own_beat(self, beat: Beat, now: float) -> None:
        before = self.terms.role
        self.terms.heard_beat(self.me, beat.term, beat.number, now)
        if before is Role.CLAIMS and self.terms.role is Role.LEADS:
            self.leader.shares.slots.free = self.terms.begins
            self.actions.append(ReadOrders())
            self.own.changed()

    def _heard_beat(self, sender: str, beat: Beat, now: float) -> None:
        before, led = self.terms.leader, self._leads
        followed = self.terms.heard_beat(sender, beat.term, beat.number, now)
        if not followed:
            return
        if led:
            self._no_leader(now)
        if before != sender:
            self.follower.begin(now)
            self.own.probes.drop()
        self.follower.heard(beat, now)
        if beat.sure:
            self._know(beat.orders, beat.pauses, now)
        listed = self.me in beat.sick
        if listed and self.own.health.believes(now):
            self._fall_sick(now)
            self.follower.soon(now, 0.0)
        elif not listed and self.own.health.sick:
            self._recover()

    def _know(self, orders: OperatorOrders | None, left: Mapping[str, float], now: float) -> None:
        """What operators want, by the broker or a leader that is sure of it."""
        if orders is not None and orders.revision >= self.own.standing.orders.revision:
            self._obey(orders, left, now)
        if not self.own.standing.sure:
            self.own.standing.sure = True
            self.own.changed()

    def _obey(self, orders: OperatorOrders, left: Mapping[str, float], now: float) -> None:
        if self.own.standing.obey(orders, left, now):
            if self._leads:
                self.leader.beat_soon(now)
            self.own.changed()

    # -- failures and good answers ------------------------------------------------------------------------------------

    def _had_good(self, lane: str | None, kind: Kind, now: float, *, probe: bool) -> None:
        self.own.health.had_good(now)
        if probe and lane is not None:
            self._probe_back(lane, kind.label, now)
        if self.own.health.sick:
            self._cure(now)
        self.own.say(None, Good(lane, probe))
        self._worked(self.me, lane, now, now, probe=probe)

    def _had_bad(self, lane: str | None, kind: Kind, now: float, *, probe: bool, reached: bool) -> None:
        lanes = LANES if lane is None else (lane,)
        self.own.health.had_bad(lanes, now, reached=reached)
        if probe and lane is not None:
            self._probe_back(lane, kind.label, now)
        elif self._follows:
            self.follower.failed(lanes)
        else:
            self.leader.count(self.me, dict.fromkeys(lanes, 1), now)
        if self._leads:
            self.leader.judge(now)
            self._about_us(now)
        else:
            self.follower.soon(now, SOON)

    def _worked(self, who: str, lane: str | None, at: float, now: float, *, probe: bool) -> None:
        """A good answer of whomever: see `Leader.worked`. Our own breakers close at once, whoever leads."""
        self.leader.worked(who, lane, at, now, probe=probe)
        self.follower.worked()
        self._about_us(now)

    def _probe_back(self, lane: str, label: str, now: float) -> None:
        """A probe of ours is back."""
        number = self.own.probes.back(lane)
        if number is not None:
            self._return_probe(number, lane, label, now)

    def _return_probe(self, number: int, lane: str, label: str, now: float) -> None:
        if self._follows:
            self.own.say(self.terms.leader, Probed(number, lane, label))
        else:
            self.leader.probed(self.me, number, lane, label, now)

    # -- sickness -----------------------------------------------------------------------------------------------------

    def _about_us(self, now: float) -> None:
        """What we, as leader, have found out about ourselves. Who is sick leads no more; who is only suspected does."""
        if not self._leads:
            return
        listed = self.me in self.leader.listed()
        if listed and not self.own.health.sick:
            self._fall_sick(now)
            self.terms.reluctant = False
        elif not listed and self.own.health.sick:
            self._recover()
        if self.me in self.leader.sick:
            self.terms.reluctant = True
            self.leader.beat(now)
            self.own.say(None, Goodbye(self.terms.term, leaves=False))
            self.terms.resign(now)
            self._no_leader(now)

    def _fall_sick(self, now: float) -> None:
        self.own.health.fall_sick(now)
        self.terms.reluctant = True
        for number, lane in self.own.probes.untaken(float("inf")):
            self._return_probe(number, lane, "lost", now)
        self.own.changed()

    def _recover(self) -> None:
        self.own.health.recover()
        self.terms.reluctant = self.own.left
        self.own.changed()

    def _cure(self, now: float) -> None:
        self.own.health.cure(now)
        self.leader.sick.discard(self.me)
        self.follower.soon(now, 0.0)
        self._recover()

    # -- slots --------------------------------------------------------------------------------------------------------

    def _share(self, now: float) -> None:
        """Gives out slots, as leader, or to ourselves when there is no fleet."""
        if self._leads or self.alone:
            self.leader.share(now, float("inf") if self.alone else self.terms.lease)
            self._fire(now)

    def _fire(self, now: float) -> None:
        for lane, until in self.own.permits.due(now):
            self.actions.append(Permit(lane, until))
