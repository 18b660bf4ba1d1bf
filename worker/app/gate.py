"""What stands before every call: drain, breaker, throttle, rate limit. One per process, shared by all senders."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from worker.core.breaker import Breaker, Pacer, State, Throttle
from worker.core.ports import Clock, Draining, Held
from worker.core.retry import retry_after
from worker.core.verdict import Kind, Verdict


class Event(Protocol):
    """What senders sleep on: a ``threading.Event``, or a fiber's."""

    def is_set(self) -> bool: ...
    def set(self) -> None: ...
    def wait(self, timeout: float) -> bool: ...


@dataclass(frozen=True, slots=True)
class Holds:
    """Why senders are held, at one moment."""

    breaker: State
    throttled: bool

    @property
    def any(self) -> bool:
        """Whether ordinary calls must wait."""
        return self.throttled or self.breaker is not State.CLOSED


class SendersGate:
    """The `Gate` of the core's ports over `Breaker`, `Throttle` and `Pacer`. Thread-safe: who hands out the commands
    may do so from another thread than the senders'.

    ``on_hold`` is called, outside the lock, by the sender whose answer began a hold: at once, since until somebody
    stops handing out commands every sender would take one and give it back.
    """

    def __init__(
        self,
        breaker: Breaker,
        throttle: Throttle,
        pacer: Pacer,
        *,
        clock: Clock,
        rng: random.Random,
        on_hold: Callable[[], None] = lambda: None,
        draining: Event | None = None,
    ) -> None:
        self._breaker = breaker
        self._throttle = throttle
        self._pacer = pacer
        self._clock = clock
        self._rng = rng
        self._lock = threading.Lock()
        self._draining = draining or threading.Event()
        self.on_hold = on_hold

    # -- senders ----------------------------------------------------------------------------------------------------

    def pace(self) -> None:
        """Waits for this process's next slot under the rate limit. Raises `Draining`."""
        if not self._pacer.rate:
            return
        with self._lock:
            wait = self._pacer.reserve(self._clock.monotonic())
        self.sleep(wait)
        with self._lock:
            wait = self._pacer.depart(self._clock.monotonic())
        self.sleep(wait)

    def enter(self, *, probe: bool, paced: bool) -> None:
        """See `Gate`. Held comes before the rate limit's wait and after it: a hold may begin meanwhile."""
        self._check(probe)
        if not paced and self._pacer.rate:
            self.pace()
            self._check(probe)

    def sleep(self, seconds: float) -> None:
        """See `Gate`."""
        if self._draining.wait(seconds) if seconds > 0 else self._draining.is_set():
            raise Draining

    def record(self, verdict: Verdict, *, probe: bool) -> None:
        """See `Gate`."""
        now = self._clock.monotonic()
        with self._lock:
            before = self._holds(now)
            self._breaker.record(verdict.kind, now, probe=probe)
            if verdict.kind is Kind.THROTTLED:
                self._throttle.record(retry_after(verdict.retry_after, self._clock.epoch()), now, self._rng)
            elif verdict.kind.final:
                self._throttle.good()
            after = self._holds(now)
        if after.any and not before.any:
            self.on_hold()

    def outage(self) -> bool:
        """See `Gate`."""
        return self._breaker.state is not State.CLOSED

    # -- whoever hands out the commands -----------------------------------------------------------------------------

    def holds(self) -> Holds:
        """Why senders are held now."""
        with self._lock:
            return self._holds(self._clock.monotonic())

    def probe_due(self) -> bool:
        """Whether a probe may go out."""
        now = self._clock.monotonic()
        with self._lock:
            return self._breaker.probe_due(now) and not self._throttle.holding(now)

    def probing(self) -> None:
        """A probe has been chosen and goes out."""
        with self._lock:
            self._breaker.probing()

    def probe_lost(self) -> None:
        """It came back without an answer that counts."""
        with self._lock:
            self._breaker.probe_lost(self._clock.monotonic())

    def cooldown(self) -> float:
        """Seconds between probes now, for people."""
        return self._breaker.cooldown

    def held_for(self) -> float | None:
        """Seconds until the next call may go out, a probe included; 0 once it may, None while nothing holds."""
        now = self._clock.monotonic()
        with self._lock:
            holds = self._holds(now)
            if not holds.any:
                return None
            until = self._throttle.until if holds.throttled else now
            return (until if holds.breaker is State.CLOSED else max(until, self._breaker.probe_at)) - now

    def drain(self) -> None:
        """From now on no call begins and no sender sleeps."""
        self._draining.set()

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining.is_set()

    def _check(self, probe: bool) -> None:
        if self._draining.is_set():
            raise Draining
        if self._breaker.state is not State.CLOSED and not probe:
            raise Held(outage=True)
        if self._throttle.until > 0.0 and self._throttle.holding(self._clock.monotonic()):
            raise Held(outage=False)

    def _holds(self, now: float) -> Holds:
        return Holds(self._breaker.state, self._throttle.holding(now))
