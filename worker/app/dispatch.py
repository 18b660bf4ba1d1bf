"""Who may call the gateway now: the one owner of lanes, hold, recovery, probes, rate and drain of a process.

The dispatcher decides, and does no I/O. Three sides know it, and it knows none of them: senders `take` commands and
bring them back with `done`; the use case enters each call through it (it is the `Gate` of the ports); the intake (the
broker's engine, or the journal of a direct sweep) offers commands and does what `look` answers. All of it happens on
one thread, but for `begin`, `drain` and what only reads.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from worker.app.fleet import Fleet
from worker.core.breaker import State, Throttle
from worker.core.command import Command, parse
from worker.core.lanes import CANCELLATION, LANES, SWEEP, Lanes
from worker.core.ports import Clock, Draining, Held
from worker.core.retry import retry_after
from worker.core.settlement import Disposition, Hold, Task
from worker.core.verdict import Kind, Verdict

PAUSE_AFTER: Final = 1.0
"""Seconds between the opening of a lane's breaker and the end of its consumption; until then full prefetch windows end
it as well. A quorum queue takes back what is on its way to a consumer that is cancelled, and counts that."""
SETTLE_FOR: Final = 0.25
"""The same at the begin of a drain, in which nothing is acked: what is on its way then fills the prefetch windows, and
nothing is any more when consumption ends."""
FETCH_EVERY: Final = 1.0  # seconds between two requests for a command to probe with, when the queue had none
LONGEST_WAIT: Final = 600.0
"""Seconds that a command waits in hand, for the end of a hold or for its turn under a low rate limit; then it goes back
to the end of its lane. The broker closes the channel of a consumer that keeps a delivery for 30 minutes."""
AGE_EVERY: Final = 5.0  # seconds between two looks at how long commands have waited
SHARED_HOLD: Final = 3.0
"""The same while other processes take commands of the lane: they work, so the trouble is ours."""
CANDIDATES: Final = 3  # commands for probes that the fleet is told of; no breaker needs more
PATIENCE: Final = 1.0  # seconds that a sender waits for a permit before it looks again
IN_HAND: Final = 20.0
"""Seconds that a sender waits for a permit with a command in its hand; then the command goes back to the front of its
lane. A fleet may share a low limit, or be out of reach, for as long as it likes: no sender hangs for that."""


class Event(Protocol):
    """What senders sleep on: a ``threading.Event``, or a fiber's."""

    def is_set(self) -> bool: ...
    def set(self) -> None: ...
    def wait(self, timeout: float) -> bool: ...


@dataclass(frozen=True, slots=True)
class Holds:
    """Why lanes are held, at one moment. ``until``: the monotonic second when the next call may go out, a probe
    included; None while nothing holds."""

    breakers: Mapping[str, State]
    cooldowns: Mapping[str, float]
    probes: Mapping[str, float]
    """When the next probe of an open breaker goes out, in monotonic seconds."""
    throttled: bool
    until: float | None
    paused: frozenset[str] = frozenset()
    """Lanes that an operator has paused."""
    sick: bool = False
    """We fail where others succeed."""

    @property
    def breaker(self) -> State:
        """The state of the lane that is held most."""
        return max(self.breakers.values())


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the intake is to do: take nothing new from the lanes in ``paused``, bring so many single commands of those
    in ``fetch`` (then call `Dispatcher.fetched`), and give these tasks back to the end of their lanes."""

    paused: frozenset[str] = frozenset()
    fetch: Mapping[str, int] = field(default_factory=dict)
    give_back: Sequence[Task] = ()


@dataclass(slots=True, eq=False)
class _Waiter:
    """A sender that waits for a permit, with a command of ``lane`` in its hand, or (None) before it takes one."""

    lane: str | None
    event: Event
    until: float | None = None


class Dispatcher:
    """The commands in hand, and which of them may go.

    A lane is held while there is a reason: see `_reason`, which alone knows them. After a hold a lane recovers: one
    command at first and one more after each answer, since a gateway that comes back must not meet all senders at once.
    """

    def __init__(
        self,
        lanes: Lanes[Task],
        fleet: Fleet,
        throttle: Throttle,
        *,
        clock: Clock,
        rng: random.Random,
        draining: Event,
        event: Callable[[], Event],
    ) -> None:
        self._lanes = lanes
        self._fleet = fleet
        self._breakers = fleet.member.breakers
        self._throttle = throttle
        self._clock = clock
        self._rng = rng
        self._draining = draining
        self._begun = False
        self._ready = False
        self._held: dict[str, str | None] = dict.fromkeys(LANES)
        """What held each lane when that was last looked at."""
        self._recovering: dict[str, int] = {}
        """How many commands of a lane may be in hand until it is held no more and has recovered."""
        self._broken_at: dict[str, float] = {}
        self._outages: dict[str, int] = {}  # that were over when the lane's breaker opened
        self._aged_at = 0.0
        self._pause_at: float | None = None  # in a drain
        self._settled = False
        self._fetch_at = dict.fromkeys(LANES, 0.0)
        self._fetching: set[str] = set()
        self._probes: deque[Task] = deque()  # chosen, and not with a sender yet
        self._event = event
        self._waiters: dict[str | None, deque[_Waiter]] = {lane: deque() for lane in (*LANES, None)}
        self._permit = 0.0  # until when the latest permit is good
        self._test_at = 0.0
        self.on_test: Callable[[], None] = lambda: None
        """We are sick, and there is no command to test the gateway with: ask the token service (`Fleet.tested`)."""
        self.on_wait: Callable[[float], None] = lambda _seconds: None
        """A sender has waited so long for a permit."""
        self._parked: deque[Callable[[], None]] = deque()
        self._failed: list[Task] = []  # failed while others succeeded and their lane was held: others go first
        fleet.on_change = self._fleet_changed
        fleet.on_permit = self._permitted
        self._update()

    # -- the intake --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Senders may start, from the next `look` on. From any thread."""
        self._begun = True

    def drain(self) -> None:
        """No call begins and no sender sleeps any more. From any thread."""
        self._draining.set()

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining.is_set()

    @property
    def settling(self) -> bool:
        """Whether a drain has begun and consumption still goes on: nothing is to be acked before `look` ends it."""
        return self.draining and not self._settled

    def offer(self, task: Task) -> None:
        """A new command."""
        self._lanes.put(task)
        if self._parked:
            self._wake(1)

    def look(self, *, ready: bool, shared: Iterable[str] = ()) -> Wishes:
        """Looks at the clock. To be called ten times a second and after each change.

        ``ready``: the intake takes what senders bring. ``shared``: paused lanes of which others take commands.
        """
        now = self._clock.monotonic()
        self._ready = ready
        self._update()
        if self.draining:
            self._fleet.leave()
            self._look_again()
            self._pause_at = self._pause_at or now + SETTLE_FOR
            self._settled = now >= self._pause_at
            return Wishes(self._paused(now), give_back=self._all_waiting() if self._settled else ())
        if self._fleet.sick:
            return self._sick(now) if ready and self._begun else Wishes(frozenset(LANES))
        if not self._broken_at and not self._failed and now < self._aged_at and not self._by_operator():
            return _NOTHING
        self._aged_at = now + AGE_EVERY
        fetch = {}
        if ready and self._begun and not self._throttle.holding(now):
            for lane in LANES:
                missing = self._probe(lane, now)
                if not missing or now < self._fetch_at[lane]:
                    continue
                self._fetch_at[lane] = now + FETCH_EVERY
                if lane in self._fetching:  # a queue without its quorum answers nothing: what is in hand has to do
                    self._probe(lane, now, again=True)
                else:
                    self._fetching.add(lane)
                    fetch[lane] = missing
        return Wishes(
            self._paused(now) | self._by_operator(), fetch, self._too_long(now, frozenset(shared)) if ready else ()
        )

    def fetched(self, lane: str) -> None:
        """All that the queue had for the last request was offered."""
        self._fetching.discard(lane)
        now = self._clock.monotonic()
        if self._ready and not self.draining and not self._throttle.holding(now):
            self._probe(lane, now, again=True)

    def waiting(self) -> int:
        """Commands in hand that no sender has."""
        return sum(len(self._lanes.waiting(lane)) for lane in LANES) + len(self._probes)

    def in_hand(self) -> int:
        """Commands in senders' hands."""
        return self._lanes.in_hand() - len(self._probes)

    def holds(self) -> Holds:
        """Why lanes are held now. From any thread."""
        now = self._clock.monotonic()
        throttled = self._throttle.holding(now)
        breakers = {lane: self._breakers.state(lane) for lane in LANES}
        until = [self._throttle.until] if throttled else []
        probes = {lane: self._breakers.probe_at(lane) for lane, state in breakers.items() if state is not State.CLOSED}
        first = [min(probes.values())] if probes else []
        until = [max(*until, *first)] if until and first else until or first
        return Holds(
            breakers,
            {lane: self._breakers.cooldown(lane) for lane in LANES},
            {lane: at for lane, at in probes.items() if breakers[lane] is State.OPEN},
            throttled,
            max(now, until[0]) if until else None,
            self._by_operator(),
            self._fleet.sick,
        )

    # -- senders -----------------------------------------------------------------------------------------------------

    def take(self) -> tuple[Task, bool] | None:
        """The next command for a free sender and whether it is a probe; None when there is none for it, and then it
        parks. Waits for the rate limit's slot before it chooses, so that the slot goes to the most urgent command."""
        started = None
        while self._fleet.limited:
            if self._takable() <= len(self._waiters[None]):
                return None
            started = started or self._clock.monotonic()
            try:
                if self._pace(None):
                    self.on_wait(self._clock.monotonic() - started)
                    break
            except Draining:
                return None
        while self._probes:
            task = self._probes.popleft()
            if self._fleet.sick or self._fleet.take_probe(task.lane):
                return task, True
            self._lanes.done(task)  # it was given by a leader that leads no more
            self._lanes.put_back(task)
            task.probed = False
        task_ = self._lanes.take()
        return None if task_ is None else (task_, False)

    def park(self, resume: Callable[[], None]) -> None:
        """A sender that found nothing stands still; ``resume`` is called once, when it has to look again."""
        self._parked.append(resume)

    def release(self) -> None:
        """Lets every parked sender go."""
        self._wake(len(self._parked))

    def done(self, task: Task, disposition: Disposition, *, probe: bool) -> None:
        """The sender is free again. A command that is held waits again at the front of its lane."""
        lane = task.lane
        self._lanes.done(task)
        if isinstance(disposition, Hold):
            self._lanes.put_back(task)
        if probe:
            self._probe_back(task)
        if lane in self._recovering and self._lanes.limit[lane]:
            self._recovering[lane] += 1
            if self._recovering[lane] >= self._lanes.concurrency:
                del self._recovering[lane]
            self._update()
            self._wake(1)  # beside this one, which is free as well

    # -- the gate ----------------------------------------------------------------------------------------------------

    def enter(self, lane: str, *, probe: bool, paced: bool) -> float:
        """See `Gate`. A hold is looked for before the wait for a slot and after it: one may begin meanwhile."""
        self._check(lane, probe)
        if not self._fleet.limited or (paced and self._fleet.in_time(self._permit)):
            return 0.0
        started = self._clock.monotonic()
        while self._fleet.limited and not self._pace(lane):
            waited = self._clock.monotonic() - started
            self._check(lane, probe, waited)
            if waited > IN_HAND:
                raise Held(outage=False, waited=waited)
        waited = self._clock.monotonic() - started
        self._check(lane, probe, waited)
        self.on_wait(waited)
        return waited

    @property
    def until(self) -> float:
        """See `Gate`."""
        return self._permit if self._fleet.limited else math.inf

    def record(self, lane: str, verdict: Verdict, *, probe: bool, token: bool = False) -> None:
        """See `Gate`."""
        kind, now = verdict.kind, self._clock.monotonic()
        if not probe or kind.final:  # a probe that fails is judged when it is back: a stale token is replaced first
            reached = kind.final or _reached(verdict)
            self._fleet.attempted(None if token else lane, kind, now, probe=probe, reached=reached)
        if kind is Kind.THROTTLED:
            asked = retry_after(verdict.retry_after, self._clock.epoch())
            self._fleet.throttled(self._throttle.record(asked, now, self._rng))
        elif kind.final and self._throttle.strikes:
            self._throttle.good()
        if not kind.final or self._broken_at:
            self._update()

    def outage(self, lane: str | None) -> bool:
        """See `Gate`."""
        state = self._breakers.worst if lane is None else self._breakers.state(lane)
        return state is not State.CLOSED

    def outages(self, lane: str) -> int:
        """See `Gate`."""
        return self._breakers.outages(lane)

    def sleep(self, seconds: float) -> None:
        """See `Gate`."""
        if self._draining.wait(seconds) if seconds > 0 else self._draining.is_set():
            raise Draining

    # ----------------------------------------------------------------------------------------------------------------

    def _reason(self, lane: str, now: float) -> str | None:
        """What holds the lane; None: its commands may go."""
        if self.draining:
            return "draining"
        if not self._begun:
            return "starting"
        if not self._ready:
            return "broker"
        if not self._fleet.ready:
            return "fleet"
        if self._fleet.sick:
            return "sick"
        if self._breakers.state(lane) is not State.CLOSED:
            return "breaker"
        if self._throttle.holding(now):
            return "throttled"
        return "operator" if self._fleet.paused(lane) else None

    def _update(self) -> None:
        """Makes the lanes' limits follow the reasons to hold."""
        now = self._clock.monotonic()
        for lane in LANES:
            reason = self._held[lane] = self._reason(lane, now)
            if self._breakers.state(lane) is State.CLOSED:
                if self._broken_at.pop(lane, None) is not None:
                    self._closed(lane)
            else:
                if lane not in self._broken_at:
                    self._broken_at[lane], self._outages[lane] = now, self._breakers.outages(lane)
                self._fleet.candidates(lane, min(CANDIDATES, len(self._lanes.waiting(lane))))
            if reason in ("breaker", "throttled", "sick"):
                self._recovering[lane] = 1
            before = self._lanes.limit[lane]
            limit = 0 if reason else self._recovering.get(lane, self._lanes.concurrency)
            self._lanes.limit[lane] = limit
            if limit > before:
                self._wake(limit - before)

    def _paused(self, now: float) -> frozenset[str]:
        if self._settled:
            return frozenset(LANES)
        return frozenset(lane for lane, since in self._broken_at.items() if now - since > PAUSE_AFTER)

    def _closed(self, lane: str) -> None:
        """The lane's breaker is closed again. If the gateway worked all the time, what had failed did so on its own
        account: it goes to the end of the lane, since others shall have their turn, and nothing has to recover."""
        self._fetching.discard(lane)
        outages = self._breakers.outages(lane)
        if outages == self._outages[lane]:
            self._recovering.pop(lane, None)
        for task in self._lanes.waiting(lane):
            task.probed = False
            failed = task.round is not None and task.round.calls > 0 and task.round.outages == outages
            if failed and self._lanes.remove(task):
                assert task.round is not None
                task.delivery.progress.calls = task.round.calls
                self._failed.append(task)

    def _check(self, lane: str, probe: bool, waited: float = 0.0) -> None:
        if self._draining.is_set():
            raise Draining
        if self._held[lane] is None:  # what holds it is there from the look that follows each change
            return
        if not probe and (self._fleet.sick or self._breakers.state(lane) is not State.CLOSED):
            raise Held(outage=True, waited=waited)
        if self._fleet.paused(lane):
            raise Held(outage=False, waited=waited)
        if self._throttle.until > 0.0 and self._throttle.holding(self._clock.monotonic()):
            raise Held(outage=False, waited=waited)

    # -- the fleet ---------------------------------------------------------------------------------------------------

    def _fleet_changed(self) -> None:
        self._throttle.until = max(self._throttle.until, self._fleet.held_until)
        self._update()
        self._look_again()

    def _look_again(self) -> None:
        """Who waits for a permit may be held now, or need none any more."""
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.event.set()

    def _by_operator(self) -> frozenset[str]:
        """The lanes that an operator has paused."""
        return frozenset(lane for lane in LANES if self._fleet.paused(lane))

    def _takable(self) -> int:
        return self._lanes.takable() + len(self._probes)

    def _pace(self, lane: str | None) -> bool:
        """Waits for a permit. Whether it is one; else the sender has to look at everything again. Raises `Draining`."""
        waiter = _Waiter(lane, self._event())
        self._waiters[lane].append(waiter)
        self._tell_waiting()
        waiter.event.wait(PATIENCE)
        if waiter in self._waiters[lane]:
            self._waiters[lane].remove(waiter)
        self._tell_waiting()
        if self.draining:
            raise Draining
        if waiter.until is None or not self._fleet.in_time(waiter.until):
            return False
        self._permit = waiter.until
        return True

    def _permitted(self, lane: str, until: float) -> None:
        """One call may begin: a cancellation's where one waits, whatever lane it was given for."""
        choosing = self._waiters[None] if self._takable() else ()
        cancels = choosing if self._cancels() else ()
        for waiters in (self._waiters[CANCELLATION], cancels, self._waiters[SWEEP], choosing):
            if waiters:
                waiter = waiters.popleft()
                waiter.until = until
                waiter.event.set()
                return

    def _cancels(self) -> int:
        """Cancellations that senders without a command would take."""
        waiting = len(self._lanes.waiting(CANCELLATION)) if self._lanes.limit[CANCELLATION] else 0
        return waiting + sum(1 for task in self._probes if task.lane == CANCELLATION)

    def _tell_waiting(self) -> None:
        choosing = min(len(self._waiters[None]), self._takable())
        cancels = min(choosing, self._cancels())
        self._fleet.waiting(CANCELLATION, len(self._waiters[CANCELLATION]) + cancels)
        self._fleet.waiting(SWEEP, len(self._waiters[SWEEP]) + choosing - cancels)

    def _sick(self, now: float) -> Wishes:
        """We hand out nothing, and give back what waits; once in a while one command tests the gateway for us."""
        if not self._fleet.test_due():
            return Wishes(frozenset(LANES), give_back=self._all_waiting())
        found = next((task for lane in LANES for task in self._lanes.waiting(lane) if not task.orphaned), None)
        if found is not None:
            self._fleet.take_test()
            self._choose_probe(found)
            return Wishes(frozenset(LANES), give_back=self._all_waiting(probes=False))
        if now >= self._test_at:
            self._test_at = now + FETCH_EVERY
            self._fetching.update(LANES)
            return Wishes(frozenset(LANES), dict.fromkeys(LANES, 1))
        if not self._fetching:  # there is no command in the queues
            self._fleet.take_test()
            self.on_test()
        return Wishes(frozenset(LANES))

    # ----------------------------------------------------------------------------------------------------------------

    def _probe(self, lane: str, now: float, *, again: bool = False) -> int:
        """Chooses the probes that are due: commands not probed in this outage, of different merchants where there
        are several; ``again``: others, too. Returns how many are missing."""
        due = self._fleet.probes(lane) - sum(1 for task in self._probes if task.lane == lane)
        if due <= 0:
            return 0
        # What the broker took back may be in other hands by now, and probing with it would test nothing.
        ours = [task for task in self._lanes.waiting(lane) if not task.orphaned]
        chosen = _of_different_merchants([task for task in ours if not task.probed], due)
        if again and not chosen:
            chosen = ours[:1]
        for task in chosen:
            self._choose_probe(task)
        return due - len(chosen)

    def _choose_probe(self, task: Task) -> None:
        self._lanes.take_this(task)
        task.probed, task.answer = True, None
        self._probes.append(task)
        self._wake(1)

    def _probe_back(self, task: Task) -> None:
        if task.answer is None:
            self._fleet.probe_lost(task.lane)
        elif not task.answer.final:
            self._fleet.attempted(task.lane, task.answer, self._clock.monotonic(), probe=True)

    def _too_long(self, now: float, shared: frozenset[str]) -> Sequence[Task]:
        """What goes back to its lane: what has waited too long, and what failed while others succeeded."""
        back, self._failed = self._failed, []
        for lane in LANES:
            since = self._broken_at.get(lane, now) if lane in shared else 0.0
            longest = SHARED_HOLD if lane in shared else LONGEST_WAIT
            for task in self._lanes.waiting(lane):
                if now - max(task.delivery.arrived, since) > longest:
                    self._lanes.remove(task)
                    back.append(task)
        return back

    def _all_waiting(self, *, probes: bool = True) -> Sequence[Task]:
        back, self._failed = self._failed, []
        while probes and self._probes:
            task = self._probes.popleft()
            self._lanes.done(task)
            self._fleet.probe_lost(task.lane)
            back.append(task)
        for lane in LANES:
            for task in self._lanes.waiting(lane):
                self._lanes.remove(task)
                back.append(task)
        return back

    def _wake(self, senders: int) -> None:
        """So many of those that are parked look again."""
        for _ in range(min(senders, len(self._parked))):
            self._parked.popleft()()


_NOTHING: Final = Wishes()


def _reached(verdict: Verdict) -> bool:
    """Whether the gateway may have seen the call: all but what could not even be sent."""
    return verdict.kind is not Kind.TRANSIENT or verdict.effect_unknown or verdict.code is not None


def _of_different_merchants(tasks: Sequence[Task], count: int) -> list[Task]:
    """The first ``count``, as many merchants among them as there are."""
    chosen: list[Task] = []
    merchants: set[str | None] = set()
    rest: list[Task] = []
    for task in tasks:
        command = parse(task.delivery.body)
        merchant = command.merchant_id if isinstance(command, Command) else None
        (rest if merchant in merchants else chosen).append(task)
        merchants.add(merchant)
    return (chosen + rest)[:count]
