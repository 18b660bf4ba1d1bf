"""The two reasons to hold every sender: a gateway that does not work for us, and one that says slow down."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from worker.core.verdict import Kind


class State(IntEnum):
    """As exported: 0 closed, 1 half-open, 2 open."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(slots=True)
class Breaker:
    """Opens after ``threshold`` consecutive bad attempts over all commands and the token service, so that an outage
    burns no command's attempts. Single probes test the gateway after each cooldown (seconds), which doubles up to
    ``max_cooldown``. Times are monotonic seconds, passed in.
    """

    threshold: int
    initial_cooldown: float
    max_cooldown: float
    state: State = State.CLOSED
    failures: int = 0
    cooldown: float = 0.0
    probe_at: float = 0.0

    def record(self, kind: Kind, now: float, *, probe: bool = False) -> None:
        """Counts one attempt's verdict. A late good answer to a call from before is as good as a probe's: it shows
        the gateway working. Late bad ones say nothing new and do not lengthen the cooldown."""
        if kind.final:
            self._close()
        elif self.state is State.CLOSED:
            self.failures += kind.bad
            if self.failures >= self.threshold:
                self._open(now)
        elif probe:
            if kind.bad:
                self.cooldown = min(self.cooldown * 2, self.max_cooldown)
            self._wait(now)

    def probe_due(self, now: float) -> bool:
        """Whether a probe may go out now."""
        return self.state is State.OPEN and now >= self.probe_at

    def probing(self) -> None:
        """A probe has gone out: no second one until it is back."""
        self.state = State.HALF_OPEN

    def probe_lost(self, now: float) -> None:
        """The probe's command ended without a call (invalid, past its deadline): another may go at once."""
        if self.state is State.HALF_OPEN:
            self.state, self.probe_at = State.OPEN, now

    def _open(self, now: float) -> None:
        self.cooldown = min(self.initial_cooldown, self.max_cooldown)
        self._wait(now)

    def _wait(self, now: float) -> None:
        self.state = State.OPEN
        self.probe_at = now + self.cooldown

    def _close(self) -> None:
        self.state = State.CLOSED
        self.failures = 0


@dataclass(slots=True)
class Throttle:
    """Holds every sender after a throttled answer: for its Retry-After, else for a backoff that doubles while the
    answers stay throttled. Half of the backoff is jittered: it shall spread processes, and still be a wait."""

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


CATCH_UP: Final = 1.05


@dataclass(slots=True)
class Pacer:
    """At most ``rate`` calls in any second, evenly spaced: a partner's limit counts bursts too. 0: no limit.

    A caller takes a slot, waits for it, then waits for its departure. The second step is for a process that was stopped
    for a moment (CPU throttling, a migrated machine): all its callers wake up at once, and would all call at once. They
    go `CATCH_UP` times as fast as the limit instead.
    """

    rate: float
    free_at: float = 0.0
    departed_at: float = float("-inf")

    def reserve(self, now: float) -> float:
        """Takes the next slot; seconds until it."""
        if not self.rate:
            return 0.0
        slot = max(self.free_at, now)
        self.free_at = slot + 1.0 / self.rate
        return slot - now

    def depart(self, now: float) -> float:
        """Seconds until a caller whose slot has come may go: 0.0, unless others have just gone."""
        if not self.rate:
            return 0.0
        self.departed_at = max(self.departed_at + 1.0 / (self.rate * CATCH_UP), now)
        return self.departed_at - now
