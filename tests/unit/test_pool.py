"""The senders: fibers that take commands from the lanes and lose none."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests import builders
from tests.fakes import FakeClock
from tests.fibers import Turnstile, running_fibers
from tests.waiting import wait_until
from worker.app.gate import SendersGate
from worker.core.breaker import Breaker, Pacer, Throttle
from worker.core.delivery import Delivery
from worker.core.lanes import CANCELLATION, SWEEP, Lanes
from worker.shells.fibers import Event, Fibers
from worker.shells.pool import Pool

SOON = 20.0  # seconds: far more than a loaded machine needs


class Bench:
    """A pool whose work is scripted: with ``gated`` each command waits until it is let go."""

    def __init__(
        self, fibers: Fibers, concurrency: int = 4, share: float = 0.75, *, gated: bool = False, rate: float = 0.0
    ) -> None:
        self.fibers = fibers
        self.gate = SendersGate(
            Breaker(3, 15.0, 300.0),
            Throttle(0.5, 8.0),
            Pacer(rate),
            clock=FakeClock(),
            rng=random.Random(1),
            draining=Event(fibers),
        )
        self.pool = Pool(Lanes(concurrency, share), self.gate, self.work, fibers)
        self.lock = threading.Lock()
        self.started: list[tuple[str, bool]] = []
        self.finished: list[str] = []
        self.in_hand = Counter[str]()
        self.most = Counter[str]()
        self.keep: Callable[[Delivery], bool] = lambda _: False
        self.turnstile = Turnstile(fibers, 0 if gated else 1_000_000)
        self.ended = 0
        run = self.pool._run

        def sender() -> None:
            run()
            self.ended += 1

        self.pool._run = sender  # type: ignore[method-assign]
        self.pool.start()

    def work(self, delivery: Delivery, probe: bool) -> bool:
        with self.lock:
            self.started.append((delivery.command_id, probe))
            for lane in (delivery.lane, "all"):
                self.in_hand[lane] += 1
                self.most[lane] = max(self.most[lane], self.in_hand[lane])
        self.turnstile.acquire()
        with self.lock:
            for lane in (delivery.lane, "all"):
                self.in_hand[lane] -= 1
            if self.keep(delivery):
                return True
            self.finished.append(delivery.command_id)
        return False

    def offer(self, lane: str, *names: str) -> list[Delivery]:
        """New deliveries."""
        made = [builders.delivery(lane=lane, message_id=name) for name in names]
        for delivery in made:
            self.pool.offer(delivery)
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

        def made(*args: int, **kwargs: float | bool) -> Bench:
            return Bench(loops.enter_context(running_fibers()), *args, **kwargs)  # type: ignore[arg-type]

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
    wait_until(lambda: bench.pool.in_hand() == 0, SOON, "all free")
    assert bench.pool.waiting() == []


def test_concurrency_and_share(make: Callable[..., Bench]) -> None:
    """No more are in hand than there are senders, and no more of the sweep than its share."""

    bench = make(4, share=0.5, gated=True)
    bench.offer(SWEEP, *numbered("s", 20))
    bench.until(2, "started")
    bench.offer(CANCELLATION, *numbered("c", 20))
    bench.until(4, "started")
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


def test_hold_and_release(make: Callable[..., Bench]) -> None:
    """While held nothing is handed out and what is in hand goes on; released, all go."""

    bench = make(4, gated=True)
    bench.offer(CANCELLATION, "first")
    bench.until(1, "started")
    bench.pool.hold()
    bench.offer(CANCELLATION, *numbered("c", 10))
    bench.turnstile.release()
    bench.until(1)
    wait_until(lambda: bench.pool.in_hand() == 0, SOON, "all free")
    assert bench.names() == ["first"]
    assert len(bench.pool.waiting()) == 10

    bench.pool.release(ramp=False)
    bench.turnstile.release(10)
    bench.until(11)


def test_release_twice(make: Callable[..., Bench]) -> None:
    """A release without a hold changes nothing."""

    bench = make()
    bench.pool.release(ramp=True)
    bench.offer(CANCELLATION, *numbered("c", 10))
    bench.until(10)


def test_ramp(make: Callable[..., Bench]) -> None:
    """After an outage one goes at first, and one more after each answer."""

    bench = make(4, gated=True)
    bench.pool.hold()
    bench.offer(CANCELLATION, *numbered("c", 20))
    bench.pool.release(ramp=True)
    in_hand = []
    for expected in (1, 2, 3, 4, 4):
        wait_until(lambda count=expected: bench.in_hand["all"] == count, SOON, f"{expected} in hand")  # type: ignore[misc]
        in_hand.append(bench.in_hand["all"])
        bench.turnstile.release()
        bench.until(len(in_hand))

    assert in_hand == [1, 2, 3, 4, 4]
    assert bench.most["all"] == 4
    bench.turnstile.release(100)
    bench.until(20)


def test_probe(make: Callable[..., Bench]) -> None:
    """While held exactly the probe goes out, as one; what is gone cannot be one."""

    bench = make()
    bench.pool.hold()
    commands = bench.offer(SWEEP, *numbered("s", 3))
    assert bench.pool.probe(commands[1])
    bench.until(1)

    assert bench.started == [("s-1", True)]
    assert not bench.pool.probe(commands[1])
    bench.pool.release(ramp=False)
    bench.until(3)
    assert Counter(bench.names()) == Counter(numbered("s", 3))


def test_failed_probe_waits_again(make: Callable[..., Bench]) -> None:
    """A probe that is given back waits at the front, and goes when senders are released."""

    bench = make()
    bench.keep = lambda _: len(bench.started) == 1
    bench.pool.hold()
    commands = bench.offer(CANCELLATION, *numbered("c", 3))
    assert bench.pool.probe(commands[2])
    wait_until(lambda: len(bench.pool.waiting()) == 3, SOON, "all wait")
    assert bench.pool.waiting()[0] is commands[2]

    bench.pool.release(ramp=True)
    bench.until(3)
    assert bench.started[1] == ("c-2", False)


def test_given_back_commands_are_not_lost(make: Callable[..., Bench]) -> None:
    """A command that a sender gave back is sent again."""

    bench = make()
    left = Counter(dict.fromkeys(numbered("c", 20), 3))

    def keep(delivery: Delivery) -> bool:
        left[delivery.command_id] -= 1
        return left[delivery.command_id] > 0

    bench.keep = keep
    bench.offer(CANCELLATION, *numbered("c", 20))
    bench.until(20)

    assert Counter(bench.names()) == Counter(dict.fromkeys(numbered("c", 20), 3))


def test_remove(make: Callable[..., Bench]) -> None:
    """A command taken out of its lane is never sent; one in a sender's hands cannot be taken."""

    bench = make(1, gated=True)
    commands = bench.offer(CANCELLATION, *numbered("c", 3))
    bench.until(1, "started")

    assert not bench.pool.remove(commands[0])
    assert bench.pool.remove(commands[1])
    assert not bench.pool.remove(commands[1])
    bench.turnstile.release(9)
    bench.until(2)
    assert bench.names() == ["c-0", "c-2"]


def test_stop(make: Callable[..., Bench]) -> None:
    """Stopped senders end when they are free."""

    bench = make(4, gated=True)
    bench.offer(CANCELLATION, "c")
    bench.until(1, "started")
    bench.pool.stop()
    bench.turnstile.release()
    bench.until(1)

    wait_until(lambda: bench.ended == 4, SOON, "senders end")


def test_rate_limit_comes_before_the_choice(make: Callable[..., Bench]) -> None:
    """A cancellation that comes while a sender waits for the rate limit gets that sender's slot."""

    bench = make(1, rate=2.0)
    slot = Turnstile(bench.fibers, 0)

    def wait_for_slot(timeout: float) -> bool:  # noqa: ARG001  # as long as this test wants
        slot.acquire()
        return False

    bench.gate._draining.wait = wait_for_slot  # type: ignore[method-assign]
    bench.offer(SWEEP, "s-0")
    bench.until(1)
    bench.offer(SWEEP, "s-1")
    wait_until(lambda: len(slot._waiting) == 1, SOON, "the sender waits for its slot")
    bench.offer(CANCELLATION, "c")
    slot.release(9)
    bench.until(2)

    assert bench.names()[:2] == ["s-0", "c"]


def test_drain_ends_the_wait_for_a_slot(make: Callable[..., Bench]) -> None:
    """A sender that waits for the rate limit takes nothing once a drain begins."""

    bench = make(1, rate=0.01)
    bench.offer(CANCELLATION, "first")
    bench.until(1)
    bench.offer(CANCELLATION, "second")
    bench.gate.drain()
    bench.pool.stop()

    wait_until(lambda: bench.ended == 1, SOON, "senders end")
    assert bench.names() == ["first"]
    assert [delivery.command_id for delivery in bench.pool.waiting()] == ["second"]


@pytest.mark.parametrize("seed", range(6))
def test_no_command_is_left_behind(make: Callable[..., Bench], seed: int) -> None:
    """Whatever holds, probes and given-back commands there were, in the end everything was sent."""

    rng = random.Random(seed)
    bench = make(rng.randint(1, 6), share=rng.choice([0.25, 0.5, 1.0]))
    bench.keep = lambda _: rng.random() < 0.3
    offered: list[str] = []
    for number in range(120):
        match rng.randrange(8):
            case 0:
                bench.pool.hold()
            case 1 | 2:
                bench.pool.release(ramp=rng.random() < 0.5)
            case 3:
                waiting = bench.pool.waiting()
                if waiting:
                    bench.pool.probe(rng.choice(waiting))
            case _:
                offered.append(f"m-{number}")
                bench.offer(rng.choice([CANCELLATION, SWEEP]), offered[-1])
    bench.pool.release(ramp=True)
    bench.until(len(offered))

    assert sorted(bench.finished) == sorted(offered)
