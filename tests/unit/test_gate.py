"""What stands before every call: drain, throttle, breaker, rate limit."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from tests.builders import verdict
from tests.fakes import FakeClock
from worker.app.gate import Holds, SendersGate
from worker.core.breaker import Breaker, Pacer, State, Throttle
from worker.core.ports import Draining, Held
from worker.core.verdict import Kind


class Gate(SendersGate):
    """The gate on a fake clock: waiting moves it, and ``meanwhile`` is what happens while somebody waits."""

    def __init__(self, rate: float = 0.0) -> None:
        self.clock = FakeClock()
        self.waits: list[float] = []
        self.holds_begun = 0
        self.meanwhile: Callable[[], None] = lambda: None
        super().__init__(
            Breaker(3, 15.0, 300.0),
            Throttle(0.5, 8.0),
            Pacer(rate),
            clock=self.clock,
            rng=random.Random(1),
            on_hold=self.hold_begins,
        )

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.meanwhile()
        self.clock.sleep(seconds)
        super().sleep(0)

    def hold_begins(self) -> None:
        """As the pool does: it may look at the gate, so no lock may be held."""
        assert self.holds().any
        self.holds_begun += 1

    def break_(self) -> None:
        """An outage begins."""
        for _ in range(3):
            self.record(verdict(Kind.TRANSIENT), probe=False)

    def throttle(self, seconds: str = "30") -> None:
        """A throttled answer comes."""
        self.record(verdict(Kind.THROTTLED, retry_after=seconds), probe=False)


def held(gate: SendersGate, *, probe: bool = False) -> Held | None:
    """What holds a call now."""
    try:
        gate.enter(probe=probe, paced=True)
    except Held as hold:
        return hold
    return None


def test_open_way() -> None:
    """Nothing holds a call at first."""

    gate = Gate()

    assert held(gate) is None
    assert gate.holds() == Holds(State.CLOSED, False)
    assert not gate.holds().any
    assert not gate.outage()


def test_held_for() -> None:
    """Calls are held until the probe, until Retry-After is over, or until the later of both; None: not at all."""

    gate = Gate()
    assert gate.held_for() is None
    gate.throttle("10")
    assert gate.held_for() == pytest.approx(10.0)
    gate.break_()
    assert gate.held_for() == pytest.approx(15.0)
    gate.throttle("30")
    assert gate.held_for() == pytest.approx(30.0)
    gate.clock.sleep(31.0)
    assert gate.held_for() == 0.0


def test_outage() -> None:
    """An open breaker holds everybody but a probe."""

    gate = Gate()
    gate.break_()

    hold = held(gate)
    assert hold is not None
    assert hold.outage
    assert held(gate, probe=True) is None
    assert gate.outage()
    assert gate.holds().any


def test_throttle() -> None:
    """A throttled answer holds everybody, probes too, until its Retry-After is over; that is no outage."""

    gate = Gate()
    gate.throttle("30")

    for probe in (False, True):
        hold = held(gate, probe=probe)
        assert hold is not None
        assert not hold.outage
    assert not gate.outage()
    gate.clock.sleep(30.0)
    assert held(gate) is None


def test_retry_after_as_a_date() -> None:
    """A date is counted from our clock."""

    gate = Gate()
    gate.throttle("Sun, 22 Nov 2026 05:00:10 GMT")

    gate.clock.sleep(9.9)
    assert held(gate) is not None
    gate.clock.sleep(0.1)
    assert held(gate) is None


def test_throttle_without_a_wait() -> None:
    """Without a Retry-After the hold is a backoff, which good answers reset."""

    gate = Gate()
    gate.record(verdict(Kind.THROTTLED), probe=False)

    assert held(gate) is not None
    gate.clock.sleep(1.0)
    assert held(gate) is None


def test_good_probe_opens_the_way() -> None:
    """A probe goes out after the cooldown, and its good answer ends the outage."""

    gate = Gate()
    gate.break_()
    assert not gate.probe_due()
    gate.clock.sleep(15.0)
    assert gate.probe_due()
    gate.probing()
    assert not gate.probe_due()
    assert gate.holds().breaker is State.HALF_OPEN

    gate.record(verdict(Kind.DONE), probe=True)
    assert held(gate) is None


def test_failed_probe() -> None:
    """A failed probe doubles the cooldown."""

    gate = Gate()
    gate.break_()
    gate.clock.sleep(15.0)
    gate.probing()
    gate.record(verdict(Kind.SYSTEMIC), probe=True)

    assert gate.cooldown() == 30
    gate.clock.sleep(29.9)
    assert not gate.probe_due()


def test_lost_probe() -> None:
    """A probe that came back without an answer makes room for another."""

    gate = Gate()
    gate.break_()
    gate.clock.sleep(15.0)
    gate.probing()
    gate.probe_lost()

    assert gate.probe_due()


def test_no_probe_while_throttled() -> None:
    """A throttle delays probes too."""

    gate = Gate()
    gate.break_()
    gate.throttle("60")
    gate.clock.sleep(59.0)
    assert not gate.probe_due()
    gate.clock.sleep(1.0)
    assert gate.probe_due()


def test_who_begins_a_hold_says_so() -> None:
    """The answer that begins a hold tells it once; those that prolong it do not; the next hold tells again."""

    gate = Gate()
    gate.break_()
    gate.break_()
    gate.throttle()
    assert gate.holds_begun == 1

    gate.clock.sleep(60.0)
    gate.record(verdict(Kind.DONE), probe=False)
    assert not gate.holds().any
    gate.throttle()
    assert gate.holds_begun == 2


def test_rate_limit() -> None:
    """Calls that were not paced wait for their slot."""

    gate = Gate(rate=4.0)
    for _ in range(3):
        gate.enter(probe=False, paced=False)
    gate.enter(probe=False, paced=True)

    assert sum(gate.waits) == pytest.approx(0.5)


def test_no_rate_limit() -> None:
    """Without a rate nobody waits."""

    gate = Gate()
    gate.pace()
    gate.enter(probe=False, paced=False)

    assert gate.waits == []


@pytest.mark.parametrize(("begin", "outage"), [(Gate.throttle, False), (Gate.break_, True)])
def test_hold_that_begins_during_the_wait(begin: Callable[[Gate], None], outage: bool) -> None:
    """A hold that begins while a call waits for its slot holds that call."""

    gate = Gate(rate=4.0)
    gate.meanwhile = lambda: begin(gate)

    with pytest.raises(Held) as hold:
        gate.enter(probe=False, paced=False)
    assert hold.value.outage == outage


def test_held_calls_take_no_slot() -> None:
    """A call that is held does not use up the rate."""

    gate = Gate(rate=4.0)
    gate.throttle()
    for _ in range(9):
        with pytest.raises(Held):
            gate.enter(probe=False, paced=False)

    assert gate.waits == []


def test_drain() -> None:
    """From a drain on no call begins and nobody sleeps, whatever else holds."""

    gate = Gate(rate=4.0)
    gate.throttle()
    gate.drain()

    assert gate.draining
    with pytest.raises(Draining):
        gate.enter(probe=True, paced=True)
    with pytest.raises(Draining):
        gate.sleep(0)
    with pytest.raises(Draining):
        gate.pace()


def test_drain_wakes_sleepers() -> None:
    """A drain ends a backoff that has begun."""

    gate = SendersGate(Breaker(3, 15.0, 300.0), Throttle(0.5, 8.0), Pacer(0.0), clock=FakeClock(), rng=random.Random(1))
    woken = threading.Event()

    def back_off() -> None:
        with pytest.raises(Draining):
            gate.sleep(600.0)
        woken.set()

    thread = threading.Thread(target=back_off, daemon=True)
    thread.start()
    gate.drain()
    assert woken.wait(10.0)
    thread.join(10.0)
