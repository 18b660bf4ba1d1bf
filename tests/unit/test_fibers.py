"""Fibers: many waits in one thread, each as if it were alone."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog
from pika.adapters.select_connection import _PollerBase

from tests.fakes import FakeClock
from tests.fibers import running_fibers
from tests.waiting import wait_until
from worker.shells import fibers as fibers_module
from worker.shells.fibers import AT_ONCE, SPACING, STANDSTILL, Event, Fibers, Lock, NoThread

SOON = 20.0  # seconds: far more than a loaded machine needs
NEVER = 3600.0
POLL_SECONDS = 60.0  # the longest that pika's loop waits for anything, where a test says so: a loaded machine is faster


@pytest.fixture
def fibers() -> Iterator[Fibers]:
    """Those of a running loop."""
    with running_fibers() as running:
        yield running


@pytest.fixture
def soon_still(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds after which the loop stood still: fewer than in the product, so that a test need not block for long."""
    monkeypatch.setattr(fibers_module, "STANDSTILL", 0.25)
    return 0.25


def together(fibers: Fibers, *work: Callable[[], object]) -> list[object]:
    """What all of them return, run side by side."""
    asked: list[Future[object]] = [fibers.ask(each) for each in work]
    return [each.result(SOON) for each in asked]


def test_only_one_runs_at_a_time(fibers: Fibers) -> None:
    """However many there are, between two waits each is alone."""
    running, most = [0], [0]

    def work() -> None:
        for _ in range(20):
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.monotonic()
            running[0] -= 1
            Event(fibers).wait(0.0)

    together(fibers, *[work] * 50)

    assert most == [1]


def test_all_run_on_the_loop_s_thread(fibers: Fibers) -> None:
    """None has a thread of its own."""

    assert set(together(fibers, *[threading.get_ident] * 50)) == {fibers._thread}


class Turning:
    """Fibers whose loop waits for nothing but once for ``quiet`` seconds, on a clock that moves only when they do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = FakeClock()
        monkeypatch.setattr(fibers_module, "time", self.clock)
        self.quiet = 0.0
        loop = SimpleNamespace(poll=self.poll, process_timeouts=lambda: None, hurry=lambda: None)
        self.fibers = Fibers(cast("Any", loop))

    def poll(self) -> None:
        self.clock.sleep(self.quiet)
        self.quiet = 0.0

    def turns(self, number: int) -> float:
        """Seconds that so many turns in a row wait."""
        start = self.clock.monotonic()
        for _ in range(number):
            self.fibers.turn()
        return self.clock.monotonic() - start


def test_turns_of_a_busy_loop_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those saved up in quiet moments begin at once, the others one after another."""
    turning = Turning(monkeypatch)

    assert turning.turns(AT_ONCE) == 0
    assert turning.turns(100) == pytest.approx(100 * SPACING)
    turning.quiet = 2 * SPACING * AT_ONCE
    turning.turns(1)
    assert turning.turns(AT_ONCE) == pytest.approx(0)
    assert turning.turns(1) == pytest.approx(SPACING)


def test_who_is_ready_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fiber that gave way waits for nothing, so its turn keeps no distance."""
    turning = Turning(monkeypatch)
    turning.turns(2 * AT_ONCE)

    turning.fibers._ready.append(lambda: None)

    assert turning.turns(1) == 0


def test_a_sleep_is_one_fiber_s(fibers: Fibers) -> None:
    """The others go on meanwhile, in the order in which they wake."""
    woken: list[float] = []
    start = Event(fibers)

    def sleeper(seconds: float) -> Callable[[], None]:
        def sleep() -> None:
            start.wait(NEVER)
            Event(fibers).wait(seconds)
            woken.append(seconds)

        return sleep

    sleeping = [fibers.ask(sleeper(seconds)) for seconds in (0.6, 0.2, 0.4, 0.0)]
    wait_until(lambda: len(start._waiting) == 4, SOON, "all wait")
    start.set()  # in one turn, so that it does not matter how long asking took
    for each in sleeping:
        each.result(SOON)

    assert woken == [0.0, 0.2, 0.4, 0.6]


def test_what_a_fiber_raises_reaches_who_asked(fibers: Fibers) -> None:
    """And the loop goes on."""
    with pytest.raises(ZeroDivisionError):
        fibers.ask(lambda: 1 / 0).result(SOON)

    assert together(fibers, lambda: 7) == [7]


def test_an_event_wakes_all_and_stays_set(fibers: Fibers) -> None:
    """Set by any thread; who comes later does not wait."""
    event = Event(fibers)
    waiting = [fibers.ask(lambda: event.wait(NEVER)) for _ in range(5)]
    wait_until(lambda: len(event._waiting) == 5, SOON, "all wait")
    event.set()

    assert [each.result(SOON) for each in waiting] == [True] * 5
    assert together(fibers, lambda: event.wait(NEVER)) == [True]
    assert event.is_set()


def test_an_event_set_while_a_wait_begins(fibers: Fibers, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, between the fiber's look and its being among those to wake: it does not wait."""
    event, resumption = Event(fibers), fibers.resumption

    def late() -> Callable[[], None]:
        event.set()
        return resumption()

    monkeypatch.setattr(fibers, "resumption", late)

    assert together(fibers, lambda: event.wait(NEVER)) == [True]


def test_an_event_that_does_not_come(fibers: Fibers) -> None:
    """The wait ends with its time, says so, and leaves nothing behind."""
    event = Event(fibers)

    assert together(fibers, lambda: event.wait(0.01)) == [False]
    assert event._waiting == []


def test_an_event_set_as_its_wait_ends_wakes_once(fibers: Fibers) -> None:
    """Timer and event in one turn: the second must not wake the fiber out of its next wait."""
    event = Event(fibers)
    after = Event(fibers)

    def work() -> bool:
        fibers.loop.call_later(0.0, event.set)
        event.wait(0.0)
        return after.wait(0.2)

    assert together(fibers, work) == [False]


def test_a_lock_lets_one_in_at_a_time_in_order(fibers: Fibers) -> None:
    """First come, first served; asking without waiting gets no for an answer."""
    lock, inside, order = Lock(fibers), [0, 0], []

    def work(number: int) -> Callable[[], None]:
        def enter() -> None:
            with lock:
                inside[0] += 1
                inside[1] = max(inside)
                order.append(number)
                assert not lock.acquire(blocking=False)
                Event(fibers).wait(0.01)
                inside[0] -= 1

        return enter

    together(fibers, *map(work, range(6)))

    assert (order, inside) == ([0, 1, 2, 3, 4, 5], [0, 1])
    assert lock.acquire(blocking=False)


def test_a_call_that_blocks_stops_nobody(fibers: Fibers) -> None:
    """It runs in a thread of its own; its answer or failure comes back to its fiber."""
    release = threading.Event()
    blocked = fibers.ask(lambda: fibers.call(lambda: release.wait(SOON)))

    assert together(fibers, lambda: "goes on") == ["goes on"]
    release.set()
    assert blocked.result(SOON) is True
    with pytest.raises(ZeroDivisionError):
        fibers.ask(lambda: fibers.call(lambda: 1 / 0)).result(SOON)


def test_a_call_that_blocks_for_too_long_is_left_alone(fibers: Fibers) -> None:
    """Its fiber goes on at the deadline; that it ends later wakes nobody."""
    release = threading.Event()

    def work() -> str:
        try:
            fibers.call(release.wait, time.monotonic() + 0.05)
        except TimeoutError as error:
            release.set()
            Event(fibers).wait(0.1)
            return str(error)
        return "it ended"

    assert together(fibers, work) == ["timed out"]


def test_a_call_without_a_thread_fails_and_wakes_nobody(fibers: Fibers, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, as trouble of the system's; its deadline does not end the fiber's next wait."""

    def work() -> float:
        with monkeypatch.context() as exhausted:
            exhausted.setattr(threading.Thread, "start", refuse)
            with pytest.raises(NoThread, match="can't start new thread"):
                fibers.call(lambda: None, time.monotonic() + 0.05)
        began = time.monotonic()
        Event(fibers).wait(0.2)
        return time.monotonic() - began

    (waited,) = together(fibers, work)

    assert isinstance(waited, float)
    assert waited > 0.15


def refuse(_thread: threading.Thread) -> None:
    """What a system at its limit says."""
    raise RuntimeError("can't start new thread")


def test_sockets_wake_who_waits_for_them(fibers: Fibers) -> None:
    """Each fiber gets what came on its own connection."""
    pairs = [socket.socketpair() for _ in range(20)]

    def reader(ours: socket.socket) -> Callable[[], bytes]:
        def read() -> bytes:
            ours.setblocking(False)
            fibers.watch(ours)
            while True:
                try:
                    return ours.recv(100)
                except BlockingIOError:
                    fibers.wait(ours, select.POLLIN, time.monotonic() + SOON)

        return read

    asked = [fibers.ask(reader(ours)) for ours, _ in pairs]
    wait_until(lambda: len(fibers._waiting) == len(pairs), SOON, "all wait")
    for number, (_, theirs) in reversed(list(enumerate(pairs))):
        theirs.send(b"%d" % number)

    assert [each.result(SOON) for each in asked] == [b"%d" % number for number in range(len(pairs))]
    for pair in pairs:
        for end in pair:
            end.close()


def test_a_wait_for_a_socket_ends_at_its_deadline(fibers: Fibers) -> None:
    """With a time-out, and whatever comes then wakes nobody."""
    ours, theirs = socket.socketpair()

    def read() -> str:
        ours.setblocking(False)
        fibers.watch(ours)
        try:
            while True:  # a new socket can be written to, which is news as well
                fibers.wait(ours, select.POLLIN, time.monotonic() + 0.05)
        except TimeoutError as error:
            return str(error)

    assert together(fibers, read) == ["timed out"]
    theirs.send(b"late")
    assert together(fibers, lambda: Event(fibers).wait(0.1)) == [False]
    ours.close()
    theirs.close()


def test_a_socket_that_never_rests_buys_no_time(fibers: Fibers) -> None:
    """Something happens to it in every turn, as with a trickle on a busy loop: the deadline counts all the same."""
    ours, theirs = socket.socketpair()
    began = time.monotonic()
    over = Event(fibers)

    def read() -> str:
        ours.setblocking(False)
        fibers.watch(ours)
        try:
            while time.monotonic() - began < SOON:
                fibers.wait(ours, select.POLLIN, began + 0.2)
                with suppress(BlockingIOError):  # a new socket can be written to, which is news as well
                    ours.recv(100)
        except TimeoutError as error:
            return str(error)
        finally:
            over.set()
        return "no time-out"

    def feed() -> None:
        while not over.is_set():
            theirs.send(b"x")
            resume = fibers.resumption()
            resume()
            fibers.park()

    assert together(fibers, read, feed)[0] == "timed out"
    ours.close()
    theirs.close()


def test_only_a_fiber_can_wait(fibers: Fibers) -> None:
    """Elsewhere it is a mistake that is reported at once."""
    with pytest.raises(AssertionError, match="only a fiber"):
        fibers.park()


def test_a_fiber_s_bug_ends_the_loop() -> None:
    """Nothing that a fiber raises is swallowed: whoever turns the loop gets it."""
    from worker.shells.amqp.connection import new_loop

    alone = Fibers(new_loop())
    alone.start()

    def bug() -> None:
        raise RuntimeError("bug")

    alone.spawn(bug)
    with pytest.raises(RuntimeError, match="bug"):
        alone.turn()
    alone.close()


def test_a_busy_fiber_lets_the_loop_look(fibers: Fibers) -> None:
    """Fibers that keep waking each other keep nobody else from being heard."""
    over = Event(fibers)

    def spin() -> None:
        while not over.is_set():
            resume = fibers.resumption()
            resume()
            fibers.park()

    spinning = fibers.ask(spin)
    fibers.loop.add_callback_threadsafe(over.set)

    assert spinning.result(SOON) is None


def test_who_is_ready_between_two_turns_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop's thread wakes after a turn goes on in the next, though nothing else happens for seconds."""
    from worker.shells.amqp.connection import new_loop

    monkeypatch.setattr(fibers_module, "TICK", NEVER)
    monkeypatch.setattr(_PollerBase, "_MAX_POLL_TIMEOUT", POLL_SECONDS)
    alone = Fibers(new_loop())
    alone.start()
    began = time.monotonic()
    alone.soon(lambda: None)
    alone.turn()
    took = time.monotonic() - began
    alone.close()

    assert took < POLL_SECONDS / 2


# -- the clock --------------------------------------------------------------------------------------------------------


def stand_still(seconds: float) -> None:
    """What nothing on the loop's thread may do."""
    time.sleep(seconds)


def test_time_in_which_the_loop_stood_still_does_not_count(soon_still: float, fibers: Fibers) -> None:
    """The loop's clock goes with the monotonic one, but for a standstill."""

    def measure() -> tuple[float, float, float]:
        Event(fibers).wait(0.0)
        began, moment, frozen = time.monotonic(), fibers.now(), fibers.frozen
        stand_still(2 * soon_still)
        passed = fibers.now() - moment
        return time.monotonic() - began, passed, fibers.frozen - frozen

    real, passed, frozen = fibers.ask(measure).result(SOON)

    assert frozen >= 2 * soon_still
    assert real - passed == pytest.approx(frozen, abs=0.1)


def test_a_deadline_moves_by_the_time_that_the_loop_stood_still(fibers: Fibers) -> None:
    """What others were given no time for is no time-out of theirs."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    def read() -> bytes:
        fibers.watch(ours)
        deadline = fibers.now() + 10.0
        while True:
            try:
                return ours.recv(100)
            except BlockingIOError:
                fibers.wait(ours, select.POLLIN, deadline)

    waits = fibers.ask(read)
    wait_until(lambda: fibers._waiting, SOON, "it waits")
    fibers._looked_at -= 3600.0  # as after an hour in which the process was stopped
    wait_until(lambda: fibers.frozen > 3599.0, SOON, "the loop has noticed")
    theirs.send(b"in time")

    assert waits.result(SOON) == b"in time"
    ours.close()
    theirs.close()


def test_what_has_come_is_seen_before_the_deadline_is(fibers: Fibers) -> None:
    """Data and deadline in the same turn: the data counts."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)

    def late() -> None:
        stand_still(0.4)
        theirs.send(b"here")

    def read() -> bytes:
        fibers.watch(ours)
        fibers.wait(ours, select.POLLIN, fibers.now() + SOON)  # a new socket can be written to, which is news as well
        deadline = fibers.now() + 0.2
        fibers.soon(late)
        fibers.wait(ours, select.POLLIN, deadline)
        return ours.recv(100)

    assert together(fibers, read) == [b"here"]
    ours.close()
    theirs.close()


def test_a_call_s_deadline_moves_as_well(fibers: Fibers) -> None:
    """A name that is looked up while the process is stopped has not timed out."""
    release = threading.Event()

    def work() -> str:
        def thaw() -> None:
            fibers._looked_at -= 3600.0
            release.set()

        fibers.loop.call_later(0.05, thaw)
        return fibers.call(lambda: "found" if release.wait(SOON) else "", fibers.now() + 30.0)

    assert together(fibers, work) == ["found"]


def test_what_blocks_the_loop_is_named(soon_still: float, fibers: Fibers) -> None:
    """One line with the seconds and the culprit; a fiber is named by its function and by where it waits afterwards."""

    def sinner() -> None:
        stand_still(1.5 * soon_still)
        pause(fibers)

    def accomplice() -> None:
        stand_still(1.5 * soon_still)

    with structlog.testing.capture_logs() as lines:

        def untold() -> float:
            return fibers.frozen - sum(float(line["seconds"]) for line in blockings(lines))

        (before,) = together(fibers, untold)
        together(fibers, sinner)
        fibers.soon(accomplice)
        wait_until(lambda: blockings(lines, "accomplice"), SOON, "both are told")
        assert together(fibers, untold) == [pytest.approx(before, abs=0.01)], "told twice, or not at all"

    (by_fiber,), (by_callback,) = blockings(lines, "sinner"), blockings(lines, "accomplice")
    assert by_fiber["seconds"] >= 1.5 * soon_still
    assert by_callback["seconds"] >= 1.5 * soon_still


def test_a_fiber_that_blocks_after_a_wait_is_named(soon_still: float, fibers: Fibers) -> None:
    """By the function that it was begun with, and the line where it waits now."""
    over = Event(fibers)

    def sinner() -> None:
        pause(fibers)
        stand_still(1.5 * soon_still)
        over.wait(SOON)

    with structlog.testing.capture_logs() as lines:
        fibers.spawn(sinner)
        wait_until(lambda: blockings(lines, "sinner"), SOON, "it is told")
    over.set()

    (line,) = blockings(lines, "sinner")
    assert line["by"].count("sinner") == 2


def test_a_loop_that_turns_tells_of_nothing(fibers: Fibers) -> None:
    """A wait is no blocking, however many fibers wait; a stalled machine's standstills are shorter than all of it."""
    with structlog.testing.capture_logs() as lines:
        together(fibers, *[lambda: Event(fibers).wait(4 * STANDSTILL)] * 20)

    assert sum(line["seconds"] for line in blockings(lines)) < 4 * STANDSTILL


def pause(fibers: Fibers) -> None:
    Event(fibers).wait(0.01)


def blockings(lines: Sequence[MutableMapping[str, Any]], by: str = "") -> list[MutableMapping[str, Any]]:
    """What the log says of a blocked loop; ``by`` whom, since a stalled machine blocks it as well."""
    return [line for line in lines if line["event"] == "loop.blocked" and by in line["by"]]
