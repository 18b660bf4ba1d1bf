"""Who may call the gateway now: the one owner of lanes, hold, recovery, probes, rate and drain of a process.

The dispatcher decides, and does no I/O. Three sides know it, and it knows none of them: senders `take` commands and
bring them back with `done`; the use case enters each call through it (it is the `Gate` of the ports); the intake (the
broker's engine, or the journal of a direct sweep) offers commands and does what `look` answers. All of it happens on
one thread, but for `begin`, `drain` and what only reads.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from worker.core.breaker import Breakers, Pacer, State, Throttle
from worker.core.command import Command, parse
from worker.core.lanes import LANES, Lanes
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


class Dispatcher:
    """The commands in hand, and which of them may go.

    A lane is held while there is a reason: see `_reason`, which alone knows them. After a hold a lane recovers: one
    command at first and one more after each answer, since a gateway that comes back must not meet all senders at once.
    """

    def __init__(
        self,
        lanes: Lanes[Task],
        breakers: Breakers,
        throttle: Throttle,
        pacer: Pacer,
        *,
        clock: Clock,
        rng: random.Random,
        draining: Event,
    ) -> None:
        self._lanes = lanes
        self._breakers = breakers
        self._throttle = throttle
        self._pacer = pacer
        self._clock = clock
        self._rng = rng
        self._draining = draining
        self._begun = False
        self._ready = False
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
        self._choosing = 0  # senders that wait for the rate limit's slot before they take
        self._parked: deque[Callable[[], None]] = deque()
        self._failed: list[Task] = []  # failed on their own account while their lane was held: others go first
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
        self._wake(1)

    def look(self, *, ready: bool, shared: Iterable[str] = ()) -> Wishes:
        """Looks at the clock. To be called ten times a second and after each change.

        ``ready``: the intake takes what senders bring. ``shared``: paused lanes of which others take commands.
        """
        now = self._clock.monotonic()
        self._ready = ready
        self._update()
        if self.draining:
            self._pause_at = self._pause_at or now + SETTLE_FOR
            self._settled = now >= self._pause_at
            return Wishes(self._paused(now), give_back=self._all_waiting() if self._settled else ())
        if not self._broken_at and not self._failed and now < self._aged_at:
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
        return Wishes(self._paused(now), fetch, self._too_long(now, frozenset(shared)) if ready else ())

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
        )

    # -- senders -----------------------------------------------------------------------------------------------------

    def take(self) -> tuple[Task, bool] | None:
        """The next command for a free sender and whether it is a probe; None when there is none for it, and then it
        parks. Waits for the rate limit's slot before it chooses, so that the slot goes to the most urgent command."""
        if self._pacer.rate:
            if self._lanes.takable() + len(self._probes) <= self._choosing:
                return None
            self._choosing += 1
            try:
                self._pace()
            except Draining:
                return None
            finally:
                self._choosing -= 1
        if self._probes:
            return self._probes.popleft(), True
        task = self._lanes.take()
        return None if task is None else (task, False)

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
        if paced or not self._pacer.rate:
            return 0.0
        started = self._clock.monotonic()
        self._pace()
        self._check(lane, probe)
        return self._clock.monotonic() - started

    def record(self, lane: str, verdict: Verdict, *, probe: bool, token: bool = False) -> None:
        """See `Gate`."""
        kind, now = verdict.kind, self._clock.monotonic()
        if not probe or kind.final:  # a probe that fails is judged when it is back: a stale token is replaced first
            self._breakers.record(None if token else lane, kind, now, probe=probe)
        if kind is Kind.THROTTLED:
            self._throttle.record(retry_after(verdict.retry_after, self._clock.epoch()), now, self._rng)
        elif kind.final:
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
        if self._breakers.state(lane) is not State.CLOSED:
            return "breaker"
        return "throttled" if self._throttle.holding(now) else None

    def _update(self) -> None:
        """Makes the lanes' limits follow the reasons to hold."""
        now = self._clock.monotonic()
        for lane in LANES:
            reason = self._reason(lane, now)
            if self._breakers.state(lane) is State.CLOSED:
                if self._broken_at.pop(lane, None) is not None:
                    self._closed(lane)
            elif lane not in self._broken_at:
                self._broken_at[lane], self._outages[lane] = now, self._breakers.outages(lane)
            if reason in ("breaker", "throttled"):
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

    def _check(self, lane: str, probe: bool) -> None:
        if self._draining.is_set():
            raise Draining
        if not probe and self._breakers.state(lane) is not State.CLOSED:
            raise Held(outage=True)
        if self._throttle.until > 0.0 and self._throttle.holding(self._clock.monotonic()):
            raise Held(outage=False)

    def _pace(self) -> None:
        """Waits for this process's next slot under the rate limit. Raises `Draining`."""
        self.sleep(self._pacer.reserve(self._clock.monotonic()))
        self.sleep(self._pacer.depart(self._clock.monotonic()))

    def _probe(self, lane: str, now: float, *, again: bool = False) -> int:
        """Chooses the probes that are due: commands that were none in this outage, of different merchants where there
        are several; ``again``: others, too. Returns how many are missing."""
        due = self._breakers.probes_due(lane, now)
        if not due:
            return 0
        # What the broker took back may be in other hands by now, and probing with it would test nothing.
        ours = [task for task in self._lanes.waiting(lane) if not task.orphaned]
        chosen = _of_different_merchants([task for task in ours if not task.probed], due)
        if again and not chosen:
            chosen = ours[:1]
        for task in chosen:
            self._lanes.take_this(task)
            task.probed, task.answer = True, None
            self._probes.append(task)
        if chosen:
            self._breakers.probing(lane, len(chosen))
            self._wake(len(chosen))
        return due - len(chosen)

    def _probe_back(self, task: Task) -> None:
        now = self._clock.monotonic()
        if task.answer is None:
            self._breakers.probe_lost(task.lane, now)
        elif not task.answer.final:
            self._breakers.record(task.lane, task.answer, now, probe=True)

    def _too_long(self, now: float, shared: frozenset[str]) -> Sequence[Task]:
        """What goes back to its lane: what has waited too long, and what failed on its own account."""
        back, self._failed = self._failed, []
        for lane in LANES:
            since = self._broken_at.get(lane, now) if lane in shared else 0.0
            longest = SHARED_HOLD if lane in shared else LONGEST_WAIT
            for task in self._lanes.waiting(lane):
                if now - max(task.delivery.arrived, since) > longest:
                    self._lanes.remove(task)
                    back.append(task)
        return back

    def _all_waiting(self) -> Sequence[Task]:
        back, self._failed = self._failed, []
        while self._probes:
            task = self._probes.popleft()
            self._lanes.done(task)
            self._breakers.probe_lost(task.lane, self._clock.monotonic())
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
