"""What keeps senders from starting, made to keep pool and consumers: breaker, throttle, broker, start and drain."""

from __future__ import annotations

import time
from typing import Final

from worker.app.gate import Holds, SendersGate
from worker.core.breaker import State
from worker.core.delivery import Delivery
from worker.shells.amqp.consumer import Consumer
from worker.shells.pool import Pool

PAUSE_AFTER: Final = 1.0
"""Seconds between the breaker's opening and the end of consumption; until then, full prefetch windows end it as well. A
quorum queue takes back what is on its way to a consumer that is cancelled, and counts that against the commands."""
LOOK_AGAIN: Final = 1.0  # seconds between two looks for a command to probe with, when there was none


class Regulator:
    """Holds the senders and pauses consumption while it must be; during an outage of the gateway, sends the probes.

    On the loop's thread, so nothing begins to hold between a look at what holds and what follows from it.
    """

    def __init__(self, gate: SendersGate, pool: Pool, consumer: Consumer) -> None:
        self._gate = gate
        self._pool = pool
        self._consumer = consumer
        self._held = True
        self._ramp = False
        self._broken_at: float | None = None
        self._probes = 0
        self._look_at = 0.0
        pool.hold()

    def hold(self) -> None:
        """A hold begins: nothing more is handed out, not even until the next `follow`. It may be over by then."""
        self._held = self._ramp = True
        self._pool.hold()

    def follow(self, holds: Holds, *, begun: bool, broker: bool) -> None:
        """``holds`` is the gate's; ``begun``: senders may start at all; ``broker``: it takes what they bring."""
        draining = self._gate.draining
        pausing = draining or self._broken_for(holds) > PAUSE_AFTER
        if pausing != self._consumer.paused:
            self._consumer.pause() if pausing else self._consumer.resume()
        if holds.any or not broker or not begun or draining:
            self._held = True
            self._ramp = self._ramp or holds.any
            self._pool.hold()
        elif self._held:
            self._pool.release(ramp=self._ramp)
            self._held = self._ramp = False
        if holds.breaker is State.OPEN and broker and not draining and self._gate.probe_due():
            self._probe()

    def _broken_for(self, holds: Holds) -> float:
        """Seconds since the breaker opened."""
        if holds.breaker is State.CLOSED:
            self._broken_at = None
            return 0.0
        if self._broken_at is None:
            self._broken_at = time.monotonic()
        return time.monotonic() - self._broken_at

    def _probe(self) -> None:
        """One command tests the gateway: one that has not been a probe in this outage, from hand or from the queues;
        else the one whose turn was longest ago."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_AGAIN
        fresh = next((d for d in self._ours() if not d.probed), None)
        if fresh is not None:
            self._send(fresh)
        elif self._consumer.up and not self._consumer.fetch(self._fetched):
            self._fetched(False)

    def _fetched(self, _found: bool) -> None:
        if not self._gate.probe_due() or self._gate.draining:
            return
        ours = self._ours()
        if ours:
            self._send(min(ours, key=lambda d: d.probed))

    def _ours(self) -> list[Delivery]:
        """What waits, but for what the broker took back when its connection went: that may be in other hands by now,
        and probing with it, one after the other, would test nothing."""
        return [d for d in self._pool.waiting() if d.entry is not None and not d.entry.orphaned]

    def _send(self, delivery: Delivery) -> None:
        self._probes += 1
        delivery.probed = self._probes
        self._gate.probing()
        if not self._pool.probe(delivery):
            self._gate.probe_lost()
