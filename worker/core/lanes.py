"""Which command a free sender takes next: cancellations first, the sweep bounded by its share, neither starved."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
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
    """Waiting commands and who may be sent.

    ``limit`` is how many commands of a lane may be in hand at once: the concurrency, less while the lane recovers, 0
    while it is held.
    """

    def __init__(self, concurrency: int, share: float) -> None:
        self.concurrency = concurrency
        self.limit = dict.fromkeys(LANES, concurrency)
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
        hand, waiting, limit = self._in_hand, self._waiting, self.limit
        if hand[CANCELLATION] + hand[SWEEP] >= self.concurrency:
            return None
        may_cancel = bool(waiting[CANCELLATION]) and hand[CANCELLATION] < limit[CANCELLATION]
        may_sweep = bool(waiting[SWEEP]) and hand[SWEEP] < min(self._cap, limit[SWEEP])
        if may_cancel and may_sweep:
            self._turn = (self._turn + 1) % SWEEP_TURN
            may_cancel = self._turn != 0
        if not (may_cancel or may_sweep):
            return None
        lane = CANCELLATION if may_cancel else SWEEP
        hand[lane] += 1
        return waiting[lane].popleft()

    def takable(self) -> int:
        """How many could be taken now."""
        free = self.concurrency - self.in_hand()
        return max(0, min(free, self._takable(CANCELLATION) + self._takable(SWEEP)))

    def take_this(self, item: T) -> bool:
        """Takes one particular waiting command, whatever the limit: a probe. False when it is gone."""
        if not self.remove(item):
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

    def waiting(self, lane: str) -> Sequence[T]:
        """What waits in the lane, first come first."""
        return tuple(self._waiting[lane])

    def in_hand(self) -> int:
        """Commands in senders' hands."""
        return self._in_hand[CANCELLATION] + self._in_hand[SWEEP]

    def _takable(self, lane: str) -> int:
        most = min(self.limit[lane], self._cap) if lane == SWEEP else self.limit[lane]
        return max(0, min(most - self._in_hand[lane], len(self._waiting[lane])))
