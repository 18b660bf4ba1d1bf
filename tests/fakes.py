"""Fakes of the core's ports. Time is the fake clock's: whoever sleeps or takes long moves it."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable

from tests.builders import NOON
from worker.app.fleet import Fleet
from worker.core.breaker import Breakers
from worker.core.fleet.member import Member
from worker.core.fleet.own import MemberSettings
from worker.core.ports import Attempt, Draining, Held, Token, TokenUnavailable
from worker.core.request import SignedRequest
from worker.core.verdict import Kind, NoReply, Reply, Verdict


class FakeClock:
    """The `Clock` of the ports; moved by hand or by sleeping."""

    def __init__(self, epoch: float = NOON, monotonic: float = 1_000.0) -> None:
        self._epoch = epoch
        self._monotonic = monotonic
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def epoch(self) -> float:
        return self._epoch

    def monotonic(self) -> float:
        return self._monotonic

    def sleep(self, seconds: float) -> None:
        """Time passes, and timers ring at their moments."""
        end = self._monotonic + seconds
        while self._timers and min(at for at, _ in self._timers) <= end:
            at, ring = timer = min(self._timers, key=lambda each: each[0])
            self._timers.remove(timer)
            self._pass(max(0.0, at - self._monotonic))
            ring()
        self._pass(max(0.0, end - self._monotonic))

    def call_later(self, delay: float, callback: Callable[[], None]) -> tuple[float, Callable[[], None]]:
        """A timer, as a loop has them."""
        timer = (self._monotonic + delay, callback)
        self._timers.append(timer)
        return timer

    def remove_timeout(self, timer: tuple[float, Callable[[], None]]) -> None:
        """It does not ring."""
        if timer in self._timers:
            self._timers.remove(timer)

    def _pass(self, seconds: float) -> None:
        self._epoch += seconds
        self._monotonic += seconds


class Stepping:
    """An event on a fake clock: waiting for it moves the clock step by step until it is set; ``meanwhile`` is called as
    soon as somebody waits."""

    def __init__(self, clock: FakeClock, meanwhile: Callable[[], object] = lambda: None) -> None:
        self._clock = clock
        self._meanwhile = meanwhile
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def wait(self, timeout: float) -> bool:
        end = self._clock.monotonic() + timeout
        self._meanwhile()
        while not self._set and self._clock.monotonic() < end:
            self._clock.sleep(0.001)
        return self._set


def lone_fleet(clock: FakeClock, rate: float = 0.0) -> Fleet:
    """A process that is its whole fleet: its breakers open after three failures, for 15 s at first and 60 at most."""
    member = Member(
        "me",
        "client",
        MemberSettings(rate, 3, 15.0, 30.0),
        Breakers(3, 15.0, 60.0),
        random.Random(1),
        alone=True,
    )
    return Fleet(member, clock, clock)


class FakeGateway:
    """The `Gateway` of the ports: gives the scripted answers in their order, the last one for ever."""

    def __init__(self, clock: FakeClock, answers: Iterable[Reply | NoReply], *, takes: float = 0.0) -> None:
        self._clock = clock
        self._answers = deque(answers)
        self.takes = takes
        self.connecting: deque[float] = deque()  # seconds that the next connections take to open
        self.sent: list[SignedRequest] = []
        self.sent_at: list[float] = []

    def send(self, request: SignedRequest, until: float = math.inf) -> Reply | NoReply:
        self._clock.sleep(self.connecting.popleft() if self.connecting else 0.0)
        if self._clock.monotonic() > until:
            return NoReply(False, "too late", late=True)
        self.sent.append(request)
        self.sent_at.append(self._clock.monotonic())
        self._clock.sleep(self.takes)
        return self._answers.popleft() if len(self._answers) > 1 else self._answers[0]


class FakeTokens:
    """The `Tokens` of the ports: ``failures`` first (None: none), then tokens named by their generation. Each request
    takes ``takes`` seconds."""

    def __init__(
        self, clock: FakeClock, failures: Iterable[TokenUnavailable | None] = (), *, takes: float = 0.0
    ) -> None:
        self._clock = clock
        self._failures = deque(failures)
        self._missing = True
        self.takes = takes
        self.generation = 0
        self.fetched = 0
        self.taken = 0  # calls of `accepted`
        self.refusals: list[int] = []
        self.doubts: list[int] = []

    def get(self) -> Token:
        failure = self._failures.popleft() if self._failures else None
        if failure is not None:
            self._clock.sleep(self.takes)
            raise failure
        if self._missing:
            self._clock.sleep(self.takes)
            self._missing = False
            self.generation += 1
            self.fetched += 1
        return Token(f"token-{self.generation}", self.generation)

    def accepted(self) -> None:
        self.taken += 1

    def refused(self, generation: int) -> None:
        self.refusals.append(generation)
        self._missing = self._missing or generation == self.generation

    def doubted(self, generation: int) -> None:
        self.doubts.append(generation)


class FakeGate:
    """The `Gate` of the ports: ``hold`` is what holds senders now, ``hold_after`` what begins to with a verdict.

    ``broken`` are the lanes whose breaker is not closed, ``over`` counts the outages that ended; a call that is not
    paced waits ``slot`` seconds; ``drain_in`` seconds of backoff begin a drain.
    """

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.hold: Held | None = None
        self.hold_after: dict[Kind, Held] = {}
        self.draining = False
        self.drain_in: float | None = None
        self.broken: set[str] = set()
        self.over: Counter[str] = Counter()
        self.slot = 0.0
        self.before_enter: Callable[[], None] = lambda: None
        self.during_slot: Callable[[], None] = lambda: None
        self.entered: list[tuple[bool, bool]] = []
        self.permit = math.inf  # seconds in which a call has to begin that may
        self.recorded: list[tuple[Kind, bool]] = []
        self.recorded_for: list[tuple[str, bool]] = []  # lane, and whether the token service answered
        self.slept: list[float] = []

    def enter(self, lane: str, *, probe: bool, paced: bool) -> float:
        began = self._clock.monotonic()
        self.before_enter()
        self._check(probe=probe)
        if self.slot and not paced:
            self._clock.sleep(self.slot)
            self.during_slot()
            self._check(probe=probe, waited=self._clock.monotonic() - began)
        self.entered.append((probe, paced))
        return self._clock.monotonic() - began

    def _check(self, *, probe: bool, waited: float = 0.0) -> None:
        if self.draining:
            raise Draining
        if self.hold is not None and not (probe and self.hold.outage):
            raise Held(outage=self.hold.outage, waited=waited)

    @property
    def until(self) -> float:
        return self._clock.monotonic() + self.permit

    def record(self, lane: str, verdict: Verdict, *, probe: bool, token: bool = False) -> None:
        self.recorded.append((verdict.kind, probe))
        self.recorded_for.append((lane, token))
        self.hold = self.hold_after.get(verdict.kind, self.hold)

    def outage(self, lane: str | None) -> bool:
        held = self.hold is not None and self.hold.outage
        return held or (bool(self.broken) if lane is None else lane in self.broken)

    def outages(self, lane: str) -> int:
        return self.over[lane]

    def sleep(self, seconds: float) -> None:
        if self.drain_in is not None and self.drain_in <= seconds:
            self._clock.sleep(self.drain_in)
            self.draining = True
        if self.draining:
            raise Draining
        self._clock.sleep(seconds)
        if seconds:
            self.slept.append(seconds)


class RecordingObserver:
    """The `Observer` of the ports."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.retries: list[Kind] = []

    def attempted(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)

    def retrying(self, verdict: Verdict) -> None:
        self.retries.append(verdict.kind)


class Ceiling(random.Random):
    """Chance that always draws the highest: backoffs are their ceilings."""

    def uniform(self, a: float, b: float) -> float:
        return b
