"""The senders: fibers that carry commands through and lose none."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest

from tests import builders
from tests.builders import verdict
from tests.fakes import FakeClock, lone_fleet
from tests.fibers import Turnstile, running_fibers
from tests.waiting import wait_until
from worker.app.dispatch import Dispatcher
from worker.app.expire import Expire
from worker.core.breaker import Throttle
from worker.core.lanes import CANCELLATION, SWEEP, Lanes
from worker.core.settlement import Crashed, Disposition, GiveBack, Hold, Task
from worker.core.verdict import Kind
from worker.shells.fibers import Event, Fibers
from worker.shells.pool import Pool

SOON = 20.0  # seconds: far more than a loaded machine needs


class Bench:
    """A pool whose work is scripted: with ``gated`` each command waits until it is let go."""

    def __init__(self, fibers: Fibers, concurrency: int = 4, share: float = 0.75, *, gated: bool = False) -> None:
        self.fibers = fibers
        lanes: Lanes[Task] = Lanes(concurrency, share)
        self.dispatcher = Dispatcher(
            lanes,
            lone_fleet(clock := FakeClock()),
            Throttle(0.5, 8.0),
            clock=clock,
            rng=random.Random(1),
            draining=Event(fibers),
            event=lambda: Event(fibers),
        )
        self.pool = Pool(self.dispatcher, cast("Expire", self.work), self.finish, fibers, senders=concurrency)
        self.lock = threading.Lock()
        self.started: list[tuple[str, bool]] = []
        self.finished: list[tuple[str, Disposition]] = []
        self.in_hand = Counter[str]()
        self.most = Counter[str]()
        self.script: Callable[[Task], Disposition] = lambda _: GiveBack()
        self.turnstile = Turnstile(fibers, 0 if gated else 1_000_000)
        self.ended = 0
        run = self.pool._run

        def sender() -> None:
            run()
            self.ended += 1

        self.pool._run = sender  # type: ignore[method-assign]
        self.pool.start()
        self.dispatcher.begin()
        self.look()

    def look(self) -> None:
        """The intake's look at the clock."""
        self.fibers.ask(lambda: self.dispatcher.look(ready=True)).result(SOON)

    def work(self, task: Task, *, probe: bool) -> Disposition:
        with self.lock:
            self.started.append((task.delivery.command_id, probe))
            for lane in (task.lane, "all"):
                self.in_hand[lane] += 1
                self.most[lane] = max(self.most[lane], self.in_hand[lane])
        self.turnstile.acquire()
        with self.lock:
            for lane in (task.lane, "all"):
                self.in_hand[lane] -= 1
        return self.script(task)

    def finish(self, task: Task, disposition: Disposition) -> None:
        self.finished.append((task.delivery.command_id, disposition))

    def offer(self, lane: str, *names: str) -> list[Task]:
        """New commands."""
        made = [Task(builders.delivery(lane=lane, message_id=name)) for name in names]

        def offer() -> None:
            for task in made:
                self.dispatcher.offer(task)

        self.fibers.ask(offer).result(SOON)
        return made

    def until(self, count: int, what: str = "finished") -> None:
        """Waits until so many commands have started or finished."""
        wait_until(lambda: len(getattr(self, what)) >= count, SOON, f"{count} {what}")

    def names(self) -> list[str]:
        """Commands in the order in which they were started."""
        return [name for name, _ in self.started]


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    """Benches whose loops end with the test."""
    with ExitStack() as loops:

        def made(*args: Any, **kwargs: Any) -> Bench:
            return Bench(loops.enter_context(running_fibers()), *args, **kwargs)

        yield made


def numbered(letter: str, count: int) -> list[str]:
    """So many names."""
    return [f"{letter}-{number}" for number in range(count)]


def test_every_command_is_sent_once(make: Callable[..., Bench]) -> None:
    """All that is offered is sent, and nothing twice."""

    bench = make()
    bench.offer(SWEEP, *numbered("s", 50))
    bench.offer(CANCELLATION, *numbered("c", 50))
    bench.until(100)

    assert Counter(bench.names()) == Counter(numbered("s", 50) + numbered("c", 50))
    wait_until(lambda: bench.dispatcher.in_hand() == 0, SOON, "all free")
    assert bench.dispatcher.waiting() == 0
    assert bench.pool.in_hand(SWEEP) == bench.pool.in_hand(CANCELLATION) == 0


def test_concurrency_and_share(make: Callable[..., Bench]) -> None:
    """No more are in hand than there are senders, and no more of the sweep than its share."""

    bench = make(4, share=0.5, gated=True)
    bench.offer(SWEEP, *numbered("s", 20))
    bench.until(2, "started")
    bench.offer(CANCELLATION, *numbered("c", 20))
    bench.until(4, "started")
    assert (bench.pool.in_hand(SWEEP), bench.pool.in_hand(CANCELLATION)) == (2, 2)
    bench.turnstile.release(100)
    bench.until(40)

    assert bench.most[SWEEP] == 2
    assert bench.most["all"] <= 4


def test_cancellations_overtake(make: Callable[..., Bench]) -> None:
    """A cancellation goes before every sweep command that waits."""

    bench = make(1, gated=True)
    bench.offer(SWEEP, *numbered("s", 5))
    bench.until(1, "started")
    bench.offer(CANCELLATION, "c")
    bench.turnstile.release(6)
    bench.until(6)

    assert bench.names() == ["s-0", "c", "s-1", "s-2", "s-3", "s-4"]


def test_a_hold_leaves_what_is_in_hand(make: Callable[..., Bench]) -> None:
    """While a lane is held nothing of it is handed out, and what is in hand goes on; after it, all go."""

    bench = make(4, gated=True)
    bench.offer(SWEEP, "first")
    bench.until(1, "started")
    for _ in range(3):
        bench.fibers.ask(lambda: bench.dispatcher.record(SWEEP, verdict(Kind.TRANSIENT), probe=False)).result(SOON)
    bench.offer(SWEEP, *numbered("s", 10))
    bench.turnstile.release()
    bench.until(1)
    wait_until(lambda: bench.dispatcher.in_hand() == 0, SOON, "all free")
    assert bench.names() == ["first"]
    assert bench.dispatcher.waiting() == 10

    bench.fibers.ask(lambda: bench.dispatcher.record(SWEEP, verdict(Kind.DONE), probe=False)).result(SOON)
    bench.turnstile.release(10)
    bench.until(11)


def test_held_commands_are_not_lost(make: Callable[..., Bench]) -> None:
    """A command that is held is sent again, and is reported when it leaves."""

    bench = make()
    left = Counter(dict.fromkeys(numbered("c", 20), 3))

    def script(task: Task) -> Disposition:
        left[task.delivery.command_id] -= 1
        return Hold() if left[task.delivery.command_id] > 0 else GiveBack()

    bench.script = script
    bench.offer(CANCELLATION, *numbered("c", 20))
    bench.until(20)

    assert Counter(bench.names()) == Counter(dict.fromkeys(numbered("c", 20), 3))


def test_a_crash_takes_nobody_along(make: Callable[..., Bench]) -> None:
    """A sender that fails in a way that nobody expected says so, and goes on with the next command."""

    bench = make(1)

    def script(task: Task) -> Disposition:
        if task.delivery.command_id == "bad":
            raise RuntimeError("boom")
        return GiveBack()

    bench.script = script
    bench.offer(CANCELLATION, "bad", "good")
    bench.until(2)

    assert bench.finished == [("bad", Crashed()), ("good", GiveBack())]


def test_the_slowest_sender(make: Callable[..., Bench]) -> None:
    """It knows how long the slowest sender has held its command; zero when all are free."""

    bench = make(2, gated=True)
    assert bench.pool.longest() == 0.0
    bench.offer(CANCELLATION, "c")
    bench.until(1, "started")
    wait_until(lambda: bench.pool.longest() > 0.02, SOON, "time passes")
    bench.turnstile.release()
    wait_until(lambda: bench.pool.longest() == 0.0, SOON, "all free")


def test_stop(make: Callable[..., Bench]) -> None:
    """Stopped senders end when they are free."""

    bench = make(4, gated=True)
    bench.offer(CANCELLATION, "c")
    bench.until(1, "started")
    bench.pool.stop()
    bench.turnstile.release()
    bench.until(1)

    wait_until(lambda: bench.ended == 4, SOON, "senders end")
