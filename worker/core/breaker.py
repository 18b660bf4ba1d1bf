"""When senders wait for the gateway: one breaker for each lane, and one throttle."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from worker.core.lanes import LANES
from worker.core.verdict import Kind

PROBES: Final = 3
"""Probes of a lane after each cooldown. With one, a bad command at the front of its lane would cost everybody behind it
a whole cooldown; with many, an outage would meet a crowd."""


class State(IntEnum):
    """As exported: 0 closed, 1 half-open, 2 open."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(slots=True)
class Breaker:
    """One lane's breaker; `Breakers` decides what it counts. Times are monotonic seconds.

    ``outages`` counts how often it was closed by a probe. A round that this breaker interrupted starts afresh only when
    the count has changed since: a success that is no probe's shows that the gateway worked all the time.
    """

    cooldown: float = 0.0
    state: State = State.CLOSED
    failures: int = 0
    probe_at: float = 0.0
    sent: int = 0  # probes since the last cooldown
    out: int = 0  # probes without an answer
    failed: bool = False  # one of them failed
    outages: int = 0

    def open(self, cooldown: float, now: float) -> None:
        """The lane is held; the first probes go out after ``cooldown`` seconds."""
        self.cooldown = cooldown
        self.wait(now)

    def wait(self, now: float) -> None:
        """The next probes go out after the cooldown."""
        self.state, self.probe_at = State.OPEN, now + self.cooldown
        self.sent, self.out, self.failed = 0, 0, False

    def close(self) -> None:
        """The lane continues."""
        self.state, self.failures = State.CLOSED, 0
        self.sent, self.out, self.failed = 0, 0, False


class Breakers:
    """One `Breaker` for each lane of the fleet.

    ``threshold`` consecutive bad attempts of a lane open its breaker, so that an outage costs no command its attempts;
    failures of the token service (lane None) count for every lane. Any final answer, in whatever lane, shows the
    gateway working for us: it resets every count and closes every breaker. After each cooldown (seconds; it doubles up
    to ``max_cooldown``) up to `PROBES` commands of the lane test the gateway. Source: the README's *Breaker*.
    """

    def __init__(self, threshold: int, initial_cooldown: float, max_cooldown: float) -> None:
        self._threshold = threshold
        self._initial = min(initial_cooldown, max_cooldown)
        self._max = max_cooldown
        self._lanes = {lane: Breaker() for lane in LANES}
        self._clean = True  # no failure is counted and none is open: what a good answer finds nearly always

    def record(self, lane: str | None, kind: Kind, now: float, *, probe: bool = False) -> None:
        """Counts one attempt's verdict. A ``probe`` is answered by its own verdict only, or by `probe_lost`. Late bad
        answers to calls from before say nothing new and do not lengthen the cooldown."""
        if kind.final:
            if not self._clean:
                self._worked(lane, probe=probe)
            return
        for name, breaker in self._lanes.items():
            if lane is not None and name != lane:
                continue
            if breaker.state is State.CLOSED:
                if kind.bad:
                    breaker.failures += 1
                    self._clean = False
                    if breaker.failures >= self._threshold:
                        breaker.open(self._initial, now)
            elif probe and lane is not None and breaker.state is State.HALF_OPEN:
                breaker.failed = breaker.failed or kind.bad
                self._probe_back(breaker, now)

    def state(self, lane: str) -> State:
        """Whether the lane's commands may go."""
        return self._lanes[lane].state

    @property
    def worst(self) -> State:
        """The state of the lane that is held most."""
        return max(breaker.state for breaker in self._lanes.values())

    def outages(self, lane: str) -> int:
        """How often a probe has ended an outage of the lane."""
        return self._lanes[lane].outages

    def cooldown(self, lane: str) -> float:
        """Seconds between the lane's probes now."""
        return self._lanes[lane].cooldown

    def probe_at(self, lane: str) -> float:
        """When the lane's next probe may go out, while its breaker is not closed."""
        return self._lanes[lane].probe_at

    def probe_now(self, now: float) -> None:
        """A person says that the gateway works again: probes are due at once."""
        for breaker in self._lanes.values():
            if breaker.state is State.OPEN:
                breaker.probe_at = now

    def failures(self, lane: str) -> int:
        """The lane's consecutive bad attempts."""
        return self._lanes[lane].failures

    def adopt(self, lane: str, state: State, cooldown: float, left: float, now: float) -> None:
        """The lane's breaker is as somebody else has it, who decides; ``left``: seconds until its next probes."""
        breaker = self._lanes[lane]
        if state is State.CLOSED:
            breaker.outages += breaker.state is not State.CLOSED
            breaker.close()
        else:
            breaker.open(cooldown, now)
            breaker.state, breaker.probe_at = state, now + left
            self._clean = False

    def probes_due(self, lane: str, now: float) -> int:
        """How many probes of the lane may go out now."""
        breaker = self._lanes[lane]
        if breaker.state is State.HALF_OPEN or (breaker.state is State.OPEN and now >= breaker.probe_at):
            return PROBES - breaker.sent
        return 0

    def probing(self, lane: str, count: int = 1) -> None:
        """So many probes of the lane have been chosen and go out."""
        breaker = self._lanes[lane]
        breaker.state = State.HALF_OPEN
        breaker.sent += count
        breaker.out += count

    def probe_lost(self, lane: str, now: float) -> None:
        """A probe ended without a call (invalid, past its deadline, taken back): another may go at once."""
        breaker = self._lanes[lane]
        if breaker.state is State.HALF_OPEN:
            breaker.sent -= 1
            self._probe_back(breaker, now)

    def _probe_back(self, breaker: Breaker, now: float) -> None:
        """A probe that was not good. After the last of them the lane waits for the next ones."""
        breaker.out -= 1
        if breaker.out:
            return
        if breaker.sent == 0:
            breaker.state, breaker.probe_at = State.OPEN, now
            return
        if breaker.failed:
            breaker.cooldown = min(breaker.cooldown * 2, self._max)
        breaker.wait(now)

    def _worked(self, lane: str | None, *, probe: bool) -> None:
        """A final answer. A lane's own count must have been clean for its success to show that the gateway worked all
        the time; else it is the end of an outage that this lane had seen as well."""
        seen = lane is None or bool(self._lanes[lane].failures)
        for name, breaker in self._lanes.items():
            if breaker.state is not State.CLOSED and (probe or (seen and name != lane)):
                breaker.outages += 1
            breaker.close()
        self._clean = True


@dataclass(slots=True)
class Throttle:
    """Holds every sender after a throttled answer: for its Retry-After, else for a backoff that doubles while the
    answers stay throttled. Half of the backoff is jitter: it spreads processes, and still is a wait."""

    initial: float
    maximum: float
    until: float = 0.0
    strikes: int = 0

    def record(self, wait: float | None, now: float, rng: random.Random) -> float:
        """A throttled answer with its Retry-After in seconds, or None. Returns the seconds to hold."""
        if now >= self.until:  # answers to calls that were already out are the same strike
            self.strikes += 1
        ceiling = min(self.maximum, self.initial * 2.0 ** min(self.strikes, 30))
        hold = wait or ceiling * rng.uniform(0.5, 1.0)  # "Retry-After: 0" would hold nobody
        self.until = max(self.until, now + hold)
        return hold

    def good(self) -> None:
        """An answer that shows the gateway taking our calls again."""
        self.strikes = 0

    def holding(self, now: float) -> bool:
        """Whether senders must wait."""
        return now < self.until
