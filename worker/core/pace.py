"""How fast a sweep goes: the speed that people see, and how far it may publish ahead of its outcomes."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

WINDOW: Final = 10_000
"""Bills of a batch without an outcome at any time, unless people say otherwise: bills that wait for a delayed round are
among them, so it bounds what an outage leaves at the broker."""

FIRST_AHEAD: Final = 100
QUEUED_SECONDS: Final = 0.5
"""Work that a sweep keeps in the lane. An outcome is answered by the next bill within 0.2 s."""
SHORT_SECONDS: Final = 0.1
LEAST_READY: Final = 10
MOST_READY: Final = 50
GROWTH: Final = 1.5
DECAY: Final = 0.9
UNSEEN_SECONDS: Final = 3.0
"""A worker that is just being started consumes by then."""

SPEED_SECONDS: Final = 15.0  # the rate that people see is that of the latest seconds


class Speed:
    """How many a second, lately. Times are monotonic seconds, passed in."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def mark(self, now: float, done: int, total: float = math.inf) -> None:
        """So many, of ``total``, are done now. When all are, the speed stays what it was."""
        if self._marks and self._marks[-1][1] >= total:
            return
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[0][0] > SPEED_SECONDS:
            self._marks.popleft()

    @property
    def per_second(self) -> float:
        """0 before anything is known."""
        if len(self._marks) < 2:
            return 0.0
        (then, before), (now, after) = self._marks[0], self._marks[-1]
        return (after - before) / (now - then) if now > then else 0.0

    def left(self, remaining: int) -> float | None:
        """Seconds for so many more; None when nothing moves."""
        rate = self.per_second
        return remaining / rate if rate > 0 else None


class Pace:
    """How many bills of a batch may be published ahead of its outcomes: enough that no worker waits, and few enough
    that other sweeps need not wait behind them. The lane is first in, first out: what one sweep has in it delays every
    other one by as much.

    All sweeps of a lane see the same numbers (its depth, and the outcomes of all of them) and so get equal shares.
    Times are monotonic seconds, passed in.
    """

    def __init__(self, window: int, now: float) -> None:
        self._window = window
        self._began = now
        self._outcomes = 0
        self._speed = Speed()
        self._grown = 0.0
        self._consumed = False

    def heard(self, outcomes: int) -> None:
        """So many outcomes of the lane came, of whatever batch."""
        self._outcomes += outcomes

    def seen(self, now: float, ahead: int, ready: int, consumers: int) -> None:
        """The lane as it is now: messages that wait in it, and its consumers. ``ahead``: of our own bills."""
        self._speed.mark(now, self._outcomes)
        self._consumed = self._consumed or consumers > 0
        rate = self._speed.per_second
        if ready < max(LEAST_READY, rate * SHORT_SECONDS):
            if ahead >= self.allowed(now):  # the workers are about to run dry, and it is for us to publish more
                self._grown = min(float(self._window), max(self._grown, ahead) * GROWTH)
        elif ready > max(MOST_READY, rate * QUEUED_SECONDS):
            self._grown *= DECAY

    def allowed(self, now: float) -> int:
        """Bills ahead. As many as the window has while no worker has been seen: there is nobody to be kept waiting."""
        if not self._consumed and now - self._began > UNSEEN_SECONDS:
            return self._window
        return min(self._window, round(max(FIRST_AHEAD, self._speed.per_second * QUEUED_SECONDS, self._grown)))
