"""Which command a free sender takes next: cancellations first, the sweep bounded by its share, neither starved."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Final, Generic, Protocol, TypeVar

CANCELLATION: Final = "cancellation"
SWEEP: Final = "sweep"
LANES: Final = (CANCELLATION, SWEEP)

SWEEP_TURN: Final = 8
"""While both lanes wait, every eighth turn is the sweep's: a flood of cancellations must not stop a sweep for good."""


class HasLane(Protocol):
    """What the lanes carry."""

    @property
    def lane(self) -> str: ...


T = TypeVar("T", bound=HasLane)


def sweep_cap(concurrency: int, share: float) -> int:
    """The most senders that the sweep may hold: its share rounded down, yet one, or it would never move."""
    return max(1, int(Fraction(str(share)) * concurrency))  # in floats, 0.29 of 100 is 28


class Lanes(Generic[T]):
    """Waiting commands and who may be sent. Not thread-safe; the pool locks around it.

    ``limit`` is how many commands may be in hand at once: the concurrency, less while a recovery ramps up, 0 while
    senders are held.
    """

    def __init__(self, concurrency: int, share: float) -> None:
        self.concurrency = concurrency
        self.limit = concurrency
        self._cap = sweep_cap(concurrency, share)
        self._waiting: Mapping[str, deque[T]] = {lane: deque() for lane in LANES}
        self._in_hand = dict.fromkeys(LANES, 0)
        self._turn = 0

    def put(self, item: T) -> None:
        """A new delivery, at the end of its lane."""
        self._waiting[item.lane].append(item)

    def put_back(self, item: T) -> None:
        """A command that a sender gave back, at the front: it is the oldest."""
        self._waiting[item.lane].appendleft(item)

    def take(self) -> T | None:
        """The next command for a free sender, or None when none may go. Pair with `done`."""
        if self._in_hand[CANCELLATION] + self._in_hand[SWEEP] >= self.limit:
            return None
        lane = self._choose()
        if lane is None:
            return None
        self._in_hand[lane] += 1
        return self._waiting[lane].popleft()

    def takable(self) -> int:
        """How many could be taken now."""
        free = self.limit - self._in_hand[CANCELLATION] - self._in_hand[SWEEP]
        sweep = min(len(self._waiting[SWEEP]), self._cap - self._in_hand[SWEEP])
        return max(0, min(free, len(self._waiting[CANCELLATION]) + max(0, sweep)))

    def take_this(self, item: T) -> bool:
        """Takes one particular waiting command, whatever the limit: a probe. False when it is gone."""
        try:
            self._waiting[item.lane].remove(item)
        except ValueError:
            return False
        self._in_hand[item.lane] += 1
        return True

    def done(self, item: T) -> None:
        """The sender is free again."""
        self._in_hand[item.lane] -= 1

    def remove(self, item: T) -> bool:
        """Drops one waiting command. False when it is not there."""
        try:
            self._waiting[item.lane].remove(item)
        except ValueError:
            return False
        return True

    def waiting(self) -> Iterator[T]:
        """All that wait, cancellations first."""
        for lane in LANES:
            yield from self._waiting[lane]

    def in_hand(self) -> int:
        """Commands in senders' hands."""
        return sum(self._in_hand.values())

    def _choose(self) -> str | None:
        cancellations, sweep = self._waiting[CANCELLATION], self._waiting[SWEEP]
        may_sweep = bool(sweep) and self._in_hand[SWEEP] < self._cap
        if cancellations and may_sweep:
            self._turn = (self._turn + 1) % SWEEP_TURN
            return SWEEP if self._turn == 0 else CANCELLATION
        if cancellations:
            return CANCELLATION
        return SWEEP if may_sweep else None
