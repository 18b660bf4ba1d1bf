"""The senders: fibers that take commands from the lanes. They never touch the broker."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from worker.app.gate import SendersGate
from worker.core.delivery import Delivery
from worker.core.lanes import Lanes
from worker.core.ports import Draining
from worker.shells.fibers import Fibers


class _Ended(Exception):
    """The pool was stopped."""


Work = Callable[[Delivery, bool], bool]
"""``work(delivery, probe)``: sends it and tells the result; True when it was held back and stays in its lane."""


class Pool:
    """As many senders as the concurrency; each takes, sends, takes, and parks when there is nothing that it may take.

    Which command a sender takes is decided when it is free, not when it is woken, so a cancellation overtakes every
    sweep command that waits. Offering, holding and looking may be done from any thread.
    """

    def __init__(self, lanes: Lanes[Delivery], gate: SendersGate, work: Work, fibers: Fibers) -> None:
        self._lanes = lanes
        self._gate = gate
        self._work = work
        self._fibers = fibers
        self._lock = threading.Lock()  # never held while a fiber waits
        self._parked: deque[Callable[[], None]] = deque()
        self._probes: deque[Delivery] = deque()
        self._choosing = 0  # senders that wait for the rate limit's slot before they take
        self._since: dict[Delivery, float] = {}  # when a sender took it
        self._held = False
        self._stopped = False

    def start(self) -> None:
        """Starts the senders."""
        for _ in range(self._lanes.concurrency):
            self._fibers.spawn(self._run)

    def stop(self) -> None:
        """Ends the senders when they are free; does not wait."""
        with self._lock:
            self._stopped = True
        self._wake(self._lanes.concurrency)

    def offer(self, delivery: Delivery) -> None:
        """A new delivery."""
        with self._lock:
            self._lanes.put(delivery)
        self._wake(1)

    def hold(self) -> None:
        """Hands out nothing more; what is in senders' hands goes on."""
        with self._lock:
            self._held = True
            self._lanes.limit = 0

    def release(self, *, ramp: bool) -> None:
        """Hands out again: with ``ramp`` one at first, one more after each answer, since a gateway that comes back
        must not meet all senders at once."""
        with self._lock:
            if not self._held:
                return
            self._held = False
            self._lanes.limit = 1 if ramp else self._lanes.concurrency
        self._wake(self._lanes.limit)

    def probe(self, delivery: Delivery) -> bool:
        """Sends one waiting command as a probe, whatever holds. False when it waits no more."""
        with self._lock:
            if not self._lanes.take_this(delivery):
                return False
            self._probes.append(delivery)
        self._wake(1)
        return True

    def remove(self, delivery: Delivery) -> bool:
        """Takes one waiting command out of its lane for good. False when a sender has it, or it is gone."""
        with self._lock:
            return self._lanes.remove(delivery)

    def waiting(self) -> list[Delivery]:
        """What waits now, cancellations first."""
        with self._lock:
            return list(self._lanes.waiting())

    def in_hand(self) -> int:
        """Commands in senders' hands."""
        with self._lock:
            return self._lanes.in_hand()

    def longest(self) -> float:
        """Seconds that the slowest sender has held its command."""
        with self._lock:
            return time.monotonic() - min(self._since.values(), default=time.monotonic())

    def _run(self) -> None:
        with suppress(_Ended):
            while True:
                taken = self._take()
                if taken is None:
                    self._fibers.park()
                else:
                    self._send(*taken)

    def _take(self) -> tuple[Delivery, bool] | None:
        """The next command and whether it is a probe; None when there is nothing for this sender, which is then on the
        list of those to wake: put there under the lock, or what is offered meanwhile would wake nobody."""
        with self._lock:
            if self._stopped:
                raise _Ended
            if self._probes:
                return self._since_now(self._probes.popleft()), True
            if self._lanes.takable() <= self._choosing:
                self._list()
                return None
            self._choosing += 1
        draining = False
        try:
            self._gate.pace()  # before the choice, so that the slot goes to the most urgent command
        except Draining:
            draining = True
        with self._lock:
            self._choosing -= 1
            delivery = None if draining else self._lanes.take()
            if delivery is None:
                self._list()
                return None
            return self._since_now(delivery), False

    def _list(self) -> None:
        if self._stopped:
            raise _Ended
        self._parked.append(self._fibers.resumption())

    def _since_now(self, delivery: Delivery) -> Delivery:
        self._since[delivery] = time.monotonic()
        return delivery

    def _send(self, delivery: Delivery, probe: bool) -> None:
        kept = self._work(delivery, probe)
        with self._lock:
            del self._since[delivery]
            self._lanes.done(delivery)
            if kept:
                self._lanes.put_back(delivery)
            ramping = not self._held and self._lanes.limit < self._lanes.concurrency
            if ramping:
                self._lanes.limit += 1
        if ramping:
            self._wake(1)  # beside this one, which is free as well

    def _wake(self, senders: int) -> None:
        """So many of those that are parked look again."""
        for _ in range(min(senders, len(self._parked))):
            try:
                self._parked.popleft()()
            except IndexError:  # another thread was faster
                return
