"""The senders: plain threads that take commands from the lanes. They never touch the broker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from worker.app.gate import SendersGate
from worker.core.delivery import Delivery
from worker.core.lanes import Lanes
from worker.core.ports import Draining

STACK_BYTES: Final = 512 * 1024  # the default of 8 MB is address space only, but 32 of them alarm memory limits


class _Ticket:
    """One more command may be waiting."""


class _Stop:
    """The thread ends."""


_TICKET, _STOP = _Ticket(), _Stop()

Work = Callable[[Delivery, bool], bool]
"""``work(delivery, probe)``: sends it and tells the result; True when it was held back and stays in its lane."""


class Pool:
    """Threads, tickets and the lanes' lock.

    A ticket in the queue wakes one thread (a C-level wait, 0.3 µs); which command it takes is decided only then, so a
    cancellation overtakes every sweep command that waits. A ticket that finds nothing takable is owed, and issued
    again when a sender is free or the limit rises.
    """

    def __init__(self, lanes: Lanes[Delivery], gate: SendersGate, work: Work) -> None:
        self._lanes = lanes
        self._gate = gate
        self._work = work
        self._lock = threading.Lock()
        self._tickets: SimpleQueue[_Ticket | _Stop | Delivery] = SimpleQueue()
        self._owed = 0
        self._since: dict[int, float] = {}  # thread → when it took the command that it holds
        self._held = False
        self._threads = [
            threading.Thread(target=self._run, name=f"sender-{number}", daemon=True)
            for number in range(1, lanes.concurrency + 1)
        ]

    def start(self) -> None:
        """Starts the senders."""
        before = threading.stack_size(STACK_BYTES)
        try:
            for thread in self._threads:
                thread.start()
        finally:
            threading.stack_size(before)

    def stop(self) -> None:
        """Ends the threads when they are free; does not wait."""
        for _ in self._threads:
            self._tickets.put(_STOP)

    def offer(self, delivery: Delivery) -> None:
        """A new delivery."""
        with self._lock:
            self._lanes.put(delivery)
        self._tickets.put(_TICKET)

    def hold(self) -> None:
        """Hands out nothing more; what is in senders' hands goes on. Safe from any thread."""
        with self._lock:
            self._held = True
            self._lanes.limit = 0

    def release(self, *, ramp: bool) -> None:
        """Hands out again: with ``ramp`` one at first, one more after each answer, since a gateway that comes back
        must not meet all senders at once."""
        with self._lock:
            if self._held:
                self._held = False
                self._raise_limit(1 if ramp else self._lanes.concurrency)

    def probe(self, delivery: Delivery) -> bool:
        """Sends one waiting command as a probe, whatever holds. False when it waits no more."""
        with self._lock:
            if not self._lanes.take_this(delivery):
                return False
        self._tickets.put(delivery)
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
        while True:
            ticket = self._tickets.get()
            if isinstance(ticket, _Stop):
                return
            if isinstance(ticket, Delivery):
                self._send(ticket, probe=True)
                continue
            try:
                self._gate.pace()  # before the choice, so that the slot goes to the most urgent command
            except Draining:
                continue
            with self._lock:
                delivery = self._lanes.take()
                if delivery is None and next(self._lanes.waiting(), None) is not None:
                    self._owed += 1
            if delivery is not None:
                self._send(delivery, probe=False)

    def _send(self, delivery: Delivery, *, probe: bool) -> None:
        me = threading.get_ident()
        self._since[me] = time.monotonic()
        kept = self._work(delivery, probe)
        with self._lock:
            del self._since[me]
            self._lanes.done(delivery)
            if kept:
                self._lanes.put_back(delivery)
                self._owed += 1
            more = 1
            if not self._held and self._lanes.limit < self._lanes.concurrency:
                self._lanes.limit += 1
                more = 2
            self._issue(more)

    def _raise_limit(self, limit: int) -> None:
        self._lanes.limit = limit
        self._issue(limit)

    def _issue(self, tickets: int) -> None:
        """Owed tickets for ``tickets`` more takings; the lock is held."""
        if not self._owed or self._held:
            return
        count = min(tickets, self._owed)
        self._owed -= count
        for _ in range(count):
            self._tickets.put(_TICKET)
