"""Who may call the gateway now: holds, recovery, probes, rate and drain, and that nobody waits for ever."""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests import builders
from tests.builders import verdict
from tests.fakes import FakeClock, Stepping, lone_fleet
from worker.app.dispatch import LONGEST_WAIT, PAUSE_AFTER, SETTLE_FOR, SHARED_HOLD, Dispatcher, Wishes
from worker.core.breaker import State, Throttle
from worker.core.fleet.permits import LATE, PACE
from worker.core.lanes import CANCELLATION, LANES, SWEEP, Lanes
from worker.core.ports import Draining, Held
from worker.core.retry import Round
from worker.core.settlement import GiveBack, Hold, Task
from worker.core.verdict import Kind

GONE = GiveBack()
"""Any disposition of a command that leaves the process."""


class Waits:
    """An event on a fake clock: waiting for it moves the clock, and ``meanwhile`` is what happens then."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.waits: list[float] = []
        self.meanwhile: Callable[[], object] = lambda: None
        self.is_over = False

    def is_set(self) -> bool:
        return self.is_over

    def set(self) -> None:
        self.is_over = True

    def wait(self, timeout: float) -> bool:
        self.waits.append(timeout)
        self.meanwhile()
        self.clock.sleep(timeout)
        return self.is_over


class Bench:
    """A dispatcher on a fake clock, with everything that senders and intake do to it."""

    def __init__(self, concurrency: int = 4, *, rate: float = 0.0, begun: bool = True) -> None:
        self.clock = FakeClock()
        self.event = Waits(self.clock)
        self.meanwhile: Callable[[], object] = lambda: None
        """What happens while a sender waits for a permit."""
        lanes: Lanes[Task] = Lanes(concurrency, 0.75)
        self.dispatcher = Dispatcher(
            lanes,
            lone_fleet(self.clock, rate),
            Throttle(0.5, 8.0),
            clock=self.clock,
            rng=random.Random(1),
            draining=self.event,
            event=lambda: Stepping(self.clock, self.meanwhile),
        )
        self.waited: list[float] = []
        self.dispatcher.on_wait = self.waited.append
        if begun:
            self.dispatcher.begin()
            self.look()

    def look(self, *, ready: bool = True, shared: tuple[str, ...] = ()) -> Wishes:
        return self.dispatcher.look(ready=ready, shared=shared)

    def offer(self, lane: str = SWEEP, *names: str, merchant: str = "m") -> list[Task]:
        """New commands."""
        made = []
        for name in names or ("one",):
            body = builders.body(additionalInfo={"merchantId": merchant})
            now = self.clock.monotonic()
            made.append(Task(builders.delivery(body, lane=lane, message_id=name, monotonic=now)))
            self.dispatcher.offer(made[-1])
        return made

    def taken(self) -> list[tuple[str, bool]]:
        """All that senders may take now, by name, and whether as a probe."""
        found = []
        while (taken := self.dispatcher.take()) is not None:
            found.append((taken[0].delivery.command_id, taken[1]))
        return found

    def fail(self, lane: str = SWEEP, times: int = 3) -> None:
        """So many calls of a lane fail."""
        for _ in range(times):
            self.dispatcher.record(lane, verdict(Kind.TRANSIENT), probe=False)

    def work(self, lane: str = CANCELLATION) -> None:
        """A call of a lane succeeds."""
        self.dispatcher.record(lane, verdict(Kind.DONE), probe=False)

    def throttle(self, seconds: str | None = "30") -> None:
        """A throttled answer comes."""
        self.dispatcher.record(SWEEP, verdict(Kind.THROTTLED, retry_after=seconds), probe=False)

    def answer(self, probe: Task, *kinds: Kind, token: bool = False) -> None:
        """A probe is answered, and comes back."""
        for kind in kinds:
            probe.answer = kind  # as the use case notes it
            self.dispatcher.record(probe.lane, verdict(kind), probe=True, token=token)
        self.dispatcher.done(probe, GONE, probe=True)

    def held(self, lane: str = SWEEP, *, probe: bool = False) -> Held | None:
        """What holds a call now."""
        try:
            self.dispatcher.enter(lane, probe=probe, paced=True)
        except Held as hold:
            return hold
        return None


def test_open_way() -> None:
    """Nothing holds a call at first."""

    bench = Bench()
    holds = bench.dispatcher.holds()

    assert bench.held() is None
    assert (holds.breaker, holds.throttled, holds.until) == (State.CLOSED, False, None)
    assert not bench.dispatcher.outage(None)


def test_nothing_goes_before_the_begin() -> None:
    """Commands wait until senders may start and the intake takes what they bring."""

    bench = Bench(begun=False)
    bench.offer()
    bench.look()
    assert bench.taken() == []

    bench.dispatcher.begin()
    bench.look(ready=False)
    assert bench.taken() == []
    bench.look()
    assert bench.taken() == [("one", False)]


def test_an_open_breaker_holds_its_lane_alone() -> None:
    """Sweep commands that fail do not make a cancellation wait."""

    bench = Bench()
    bench.fail(SWEEP)
    bench.offer(SWEEP, "s")
    bench.offer(CANCELLATION, "c")

    hold = bench.held(SWEEP)
    assert hold is not None
    assert hold.outage
    assert bench.held(SWEEP, probe=True) is None
    assert bench.held(CANCELLATION) is None
    assert bench.taken() == [("c", False)]
    assert (bench.dispatcher.outage(SWEEP), bench.dispatcher.outage(CANCELLATION)) == (True, False)


def test_only_the_broken_lane_is_paused() -> None:
    """Consumption of a lane ends a moment after its breaker opened, and begins again when it closes."""

    bench = Bench()
    bench.fail(SWEEP)
    assert bench.look().paused == frozenset()
    bench.clock.sleep(PAUSE_AFTER + 0.1)
    assert bench.look().paused == {SWEEP}

    bench.work()
    assert bench.look().paused == frozenset()


def test_a_throttled_answer_holds_every_lane() -> None:
    """Until its Retry-After is over nobody calls, probes neither; that is no outage, and consumption goes on."""

    bench = Bench()
    bench.offer(CANCELLATION, "c")
    bench.throttle("30")

    for lane in LANES:
        for probe in (False, True):
            hold = bench.held(lane, probe=probe)
            assert hold is not None
            assert not hold.outage
    assert not bench.dispatcher.outage(None)
    assert bench.taken() == []
    bench.clock.sleep(29.9)
    assert bench.look().paused == frozenset()
    assert bench.taken() == []
    bench.clock.sleep(0.1)
    bench.look()
    assert bench.taken() == [("c", False)]


def test_retry_after_as_a_date() -> None:
    """A date is counted from our clock."""

    bench = Bench()
    bench.throttle("Sun, 22 Nov 2026 05:00:10 GMT")

    bench.clock.sleep(9.9)
    assert bench.held() is not None
    bench.clock.sleep(0.1)
    assert bench.held() is None


def test_throttle_without_a_wait() -> None:
    """Without a Retry-After the hold is a backoff."""

    bench = Bench()
    bench.throttle(None)

    assert bench.held() is not None
    bench.clock.sleep(1.0)
    assert bench.held() is None


def test_held_until() -> None:
    """The next call goes out at the first probe, when Retry-After is over, or at the later of both; None: at once."""

    bench = Bench()
    start = bench.clock.monotonic()
    bench.throttle("10")
    assert bench.dispatcher.holds().until == pytest.approx(start + 10)
    bench.fail()
    assert bench.dispatcher.holds().until == pytest.approx(start + 15)
    bench.throttle("30")
    assert bench.dispatcher.holds().until == pytest.approx(start + 30)
    bench.clock.sleep(31.0)
    assert bench.dispatcher.holds().until == bench.clock.monotonic()


def test_three_probes_of_different_merchants() -> None:
    """After the cooldown three commands test the gateway, of as many merchants as there are."""

    bench = Bench()
    bench.offer(SWEEP, "a-1", "a-2", "a-3", merchant="a")
    bench.offer(SWEEP, "b-1", merchant="b")
    bench.offer(SWEEP, "c-1", merchant="c")
    bench.fail(SWEEP)
    bench.clock.sleep(14.9)
    bench.look()
    assert bench.taken() == []
    bench.clock.sleep(0.1)
    bench.look()

    assert bench.taken() == [("a-1", True), ("b-1", True), ("c-1", True)]
    bench.look()
    assert bench.taken() == []


def test_cancellations_are_probed_first() -> None:
    """With both lanes broken, the probes of cancellations come before those of the sweep."""

    bench = Bench(8)
    bench.offer(SWEEP, "s")
    bench.offer(CANCELLATION, "c")
    for lane in LANES:
        bench.fail(lane)
    bench.clock.sleep(15)
    bench.look()

    assert bench.taken() == [("c", True), ("s", True)]


def test_probes_that_are_missing_are_fetched() -> None:
    """A queue is asked for what is missing, not more often than once a second; what it brings goes out as a probe."""

    bench = Bench()
    bench.fail(SWEEP)
    bench.clock.sleep(15)
    assert bench.look().fetch == {SWEEP: 3}
    assert bench.look().fetch == {}
    bench.offer(SWEEP, "fetched")
    bench.dispatcher.fetched(SWEEP)
    assert bench.taken() == [("fetched", True)]

    bench.clock.sleep(1.1)
    assert bench.look().fetch == {SWEEP: 2}


def test_a_probed_command_is_probed_again_when_there_is_no_other() -> None:
    """A lone command must be able to show that the gateway works again."""

    bench = Bench()
    (task,) = bench.offer(SWEEP, "lone")
    task.probed = True
    bench.fail(SWEEP)
    bench.clock.sleep(15)
    assert bench.look().fetch == {SWEEP: 3}
    assert bench.taken() == []
    bench.dispatcher.fetched(SWEEP)

    assert bench.taken() == [("lone", True)]


def test_good_probe_ends_the_outage() -> None:
    """A good answer to a probe lets the lane recover."""

    bench = Bench()
    bench.offer(SWEEP, "s-1", "s-2")
    bench.fail(SWEEP)
    bench.clock.sleep(15)
    bench.look()
    assert [probe for _, probe in bench.taken()] == [True, True]
    bench.dispatcher.record(SWEEP, verdict(Kind.DONE), probe=True)

    assert bench.held() is None
    assert bench.dispatcher.outages(SWEEP) == 1


def test_failed_probes_double_the_cooldown() -> None:
    """When all three have failed, the next ones go out after twice the time."""

    bench = Bench()
    tasks = bench.offer(SWEEP, "s-1", "s-2", "s-3", "s-4")
    bench.fail(SWEEP)
    bench.clock.sleep(15)
    bench.look()
    bench.taken()
    for task in tasks[:3]:
        bench.answer(task, Kind.SYSTEMIC)

    assert bench.dispatcher.holds().cooldowns[SWEEP] == 30
    bench.clock.sleep(29.9)
    bench.look()
    assert bench.taken() == []


def test_each_probe_is_judged_once() -> None:
    """A stale token that a probe replaces is no answer of its own: the next turn waits for the replay, and for all."""

    bench = Bench()
    tasks = bench.offer(SWEEP, "s-1", "s-2", "s-3", "s-4")
    bench.fail(SWEEP)
    bench.clock.sleep(15)
    bench.look()
    bench.taken()
    for task in tasks[:2]:
        bench.answer(task, Kind.TOKEN, Kind.TRANSIENT)
        bench.clock.sleep(100)
        bench.look()
        assert bench.taken() == []
    bench.answer(tasks[2], Kind.TOKEN, Kind.TRANSIENT)

    assert bench.dispatcher.holds().cooldowns[SWEEP] == 30
    bench.clock.sleep(30)
    bench.look()
    assert bench.taken() == [("s-4", True)]


def test_lost_probe_is_followed_by_another() -> None:
    """A probe that ended without an answer makes room for another at once."""

    bench = Bench()
    first, _ = bench.offer(SWEEP, "s-1", "s-2")
    bench.fail(SWEEP)
    bench.clock.sleep(15)
    bench.look()
    bench.taken()
    bench.dispatcher.done(first, GONE, probe=True)
    bench.offer(SWEEP, "s-3")
    bench.look()

    assert bench.taken() == [("s-3", True)]


def test_no_probe_while_throttled() -> None:
    """A throttle delays probes too."""

    bench = Bench()
    bench.offer()
    bench.fail()
    bench.throttle("60")
    bench.clock.sleep(59.0)
    bench.look()
    assert bench.taken() == []
    bench.clock.sleep(1.0)
    bench.look()
    assert bench.taken() == [("one", True)]


def test_orphans_are_no_probes() -> None:
    """What the broker has taken back may be in other hands, and would test nothing."""

    bench = Bench()
    (task,) = bench.offer(SWEEP, "orphan")
    task.entry = builders.orphan()
    bench.fail()
    bench.clock.sleep(15)

    assert bench.look().fetch == {SWEEP: 3}
    assert bench.taken() == []


@pytest.mark.parametrize("hold", [lambda bench: bench.fail(SWEEP), lambda bench: bench.throttle("15")])
def test_recovery(hold: Callable[[Bench], None]) -> None:
    """After a hold one command goes at first, and one more after each answer."""

    bench = Bench(8)
    tasks = bench.offer(SWEEP, *(f"s-{number}" for number in range(20)))
    hold(bench)
    bench.clock.sleep(15)
    bench.dispatcher.record(SWEEP, verdict(Kind.DONE), probe=True)
    bench.look()
    out, counts = [], []
    for _ in range(5):
        while (taken := bench.dispatcher.take()) is not None:
            out.append(taken[0])
        counts.append(len(out))
        bench.dispatcher.done(out.pop(0), GONE, probe=False)

    assert counts == [1, 2, 3, 4, 5]
    assert len(tasks) == 20


def test_without_an_outage_there_is_nothing_to_recover_from() -> None:
    """A lane whose breaker a success elsewhere closes goes on with all its senders."""

    bench = Bench(8)
    bench.offer(SWEEP, *(f"s-{number}" for number in range(20)))
    bench.fail(SWEEP)
    bench.work(CANCELLATION)

    assert len(bench.taken()) == 6


def test_what_failed_on_its_own_account_goes_to_the_end() -> None:
    """A success elsewhere shows that the gateway worked all the time: what had failed lets others go first, with its
    calls counted. After an outage nothing of it counts, and it keeps its place."""

    def interrupted(bench: Bench) -> Task:
        bench.offer(SWEEP, "bad", "good")
        taken = bench.dispatcher.take()
        assert taken is not None
        bench.fail(SWEEP)
        taken[0].round = Round(0.0, calls=2)
        taken[0].round.interrupt(0.0, bench.dispatcher.outages(SWEEP))
        bench.dispatcher.done(taken[0], Hold(), probe=False)
        return taken[0]

    bench = Bench()
    bad = interrupted(bench)
    bench.work(CANCELLATION)
    assert bench.look().give_back == [bad]
    assert bad.delivery.progress.calls == 2
    assert bench.taken() == [("good", False)]

    bench = Bench()
    bad = interrupted(bench)
    bench.dispatcher.record(SWEEP, verdict(Kind.DONE), probe=True)
    assert bench.look().give_back == ()
    assert bench.taken()[0] == ("bad", False)


def test_what_is_held_for_long_goes_back() -> None:
    """A lane that is held for ten minutes gives its commands back, earlier ones first."""

    bench = Bench()
    tasks = bench.offer(SWEEP, "s-1", "s-2")
    bench.fail(SWEEP)
    bench.clock.sleep(LONGEST_WAIT)
    assert not set(bench.look().give_back) & set(tasks)
    bench.clock.sleep(1.0)

    assert [*bench.look().give_back] == [task for task in tasks if not task.probed]


def test_what_waits_for_its_turn_for_long_goes_back() -> None:
    """Under a rate limit so low that the broker would lose its patience, commands go back before it does."""

    bench = Bench(1)
    bench.offer(SWEEP, "s-1", "s-2")
    bench.dispatcher.take()
    bench.clock.sleep(LONGEST_WAIT + 1)

    assert [task.delivery.command_id for task in bench.look().give_back] == ["s-2"]


def test_what_is_held_goes_back_early_where_others_work() -> None:
    """While others consume the lane, the trouble is ours: they get what we hold."""

    bench = Bench()
    tasks = bench.offer(SWEEP, "s-1", "s-2")
    bench.clock.sleep(300.0)  # they have waited for long, which is no reason
    bench.fail(SWEEP)
    bench.look()
    bench.clock.sleep(SHARED_HOLD)
    assert bench.look(shared=(SWEEP,)).give_back == []
    bench.clock.sleep(0.5)
    assert bench.look().give_back == []

    assert bench.look(shared=(SWEEP,)).give_back == tasks


def test_without_a_way_back_it_is_kept() -> None:
    """While the intake takes nothing, what is held stays in hand."""

    bench = Bench()
    bench.offer()
    bench.fail()
    bench.clock.sleep(LONGEST_WAIT + 1)

    assert bench.look(ready=False) == Wishes(frozenset({SWEEP}))


def test_drain() -> None:
    """From a drain on no call begins and nobody sleeps, whatever else holds; all that waits goes back."""

    bench = Bench(rate=4.0)
    tasks = bench.offer(SWEEP, "s-1", "s-2") + bench.offer(CANCELLATION, "c")
    bench.throttle()
    bench.dispatcher.drain()

    for attempt in (
        lambda: bench.dispatcher.enter(SWEEP, probe=True, paced=True),
        lambda: bench.dispatcher.sleep(0),
        lambda: bench.dispatcher.sleep(60),
    ):
        with pytest.raises(Draining):
            attempt()
    assert (bench.look(), bench.dispatcher.settling) == (Wishes(), True)
    bench.clock.sleep(SETTLE_FOR)
    wishes = bench.look()
    assert (wishes.paused, bench.dispatcher.settling) == (frozenset(LANES), False)
    assert set(wishes.give_back) == set(tasks)
    assert bench.look().give_back == []
    assert bench.taken() == []


def test_drain_takes_chosen_probes_back() -> None:
    """A probe that no sender has taken yet goes back, too."""

    bench = Bench()
    tasks = bench.offer()
    bench.fail()
    bench.clock.sleep(15)
    bench.look()
    bench.dispatcher.drain()
    bench.look()
    bench.clock.sleep(SETTLE_FOR)

    assert bench.look().give_back == tasks
    assert bench.dispatcher.in_hand() == bench.dispatcher.waiting() == 0


def test_drain_wakes_sleepers() -> None:
    """A drain ends a backoff that has begun."""

    lanes: Lanes[Task] = Lanes(1, 1.0)
    dispatcher = Dispatcher(
        lanes,
        lone_fleet(FakeClock()),
        Throttle(0.5, 8.0),
        clock=FakeClock(),
        rng=random.Random(1),
        draining=threading.Event(),
        event=threading.Event,
    )
    woken = threading.Event()

    def back_off() -> None:
        with pytest.raises(Draining):
            dispatcher.sleep(600.0)
        woken.set()

    thread = threading.Thread(target=back_off, daemon=True)
    thread.start()
    dispatcher.drain()
    assert woken.wait(10.0)
    thread.join(10.0)


def test_rate_limit() -> None:
    """Calls that were not paced wait for their slot, and learn for how long."""

    bench = Bench(rate=4.0)
    waited = [bench.dispatcher.enter(SWEEP, probe=False, paced=False) for _ in range(3)]
    bench.dispatcher.enter(SWEEP, probe=False, paced=True)

    assert bench.clock.monotonic() < bench.dispatcher.until <= bench.clock.monotonic() + LATE
    assert waited == pytest.approx([0.0, 0.25 / PACE, 0.25 / PACE], abs=0.003)
    assert sum(bench.waited) == pytest.approx(0.5 / PACE, abs=0.006)


def test_no_rate_limit() -> None:
    """Without one a call may begin at any time."""

    bench = Bench()
    bench.dispatcher.enter(SWEEP, probe=False, paced=False)

    assert bench.dispatcher.until == math.inf


def test_a_command_does_not_wait_for_a_permit_in_a_senders_hand() -> None:
    """Where no permit comes for long, the sender gives its command back to the front of the lane: it does not hang."""

    bench = Bench(rate=0.001)
    bench.dispatcher.enter(SWEEP, probe=False, paced=False)
    before = bench.clock.monotonic()
    with pytest.raises(Held) as hold:
        bench.dispatcher.enter(SWEEP, probe=False, paced=False)

    assert not hold.value.outage
    assert bench.clock.monotonic() - before < 60


def test_probes_are_paced() -> None:
    """A probe is a call like any other to the partner's limit."""

    bench = Bench(rate=4.0)
    bench.offer(SWEEP, "s-1", "s-2", "s-3")
    bench.fail(SWEEP)
    bench.clock.sleep(15)
    bench.look()
    before = bench.clock.monotonic()
    assert len(bench.taken()) == 3

    assert bench.clock.monotonic() - before >= 0.5


def test_the_slot_goes_to_the_most_urgent_command() -> None:
    """A cancellation that comes while a sender waits for its slot gets that slot."""

    bench = Bench(rate=4.0)
    bench.offer(SWEEP, "s-1", "s-2")
    bench.dispatcher.take()
    bench.meanwhile = partial(bench.offer, CANCELLATION, "c")
    taken = bench.dispatcher.take()

    assert taken is not None
    assert taken[0].delivery.command_id == "c"


@pytest.mark.parametrize(("begin", "outage"), [(Bench.throttle, False), (Bench.fail, True)])
def test_hold_that_begins_during_the_wait(begin: Callable[[Bench], None], outage: bool) -> None:
    """A hold that begins while a call waits for its slot holds that call."""

    bench = Bench(rate=4.0)
    bench.dispatcher.enter(SWEEP, probe=False, paced=False)
    bench.meanwhile = lambda: begin(bench)

    with pytest.raises(Held) as hold:
        bench.dispatcher.enter(SWEEP, probe=False, paced=False)
    assert hold.value.outage == outage


def test_held_calls_take_no_slot() -> None:
    """A call that is held does not use up the rate."""

    bench = Bench(rate=4.0)
    bench.throttle()
    for _ in range(9):
        with pytest.raises(Held):
            bench.dispatcher.enter(SWEEP, probe=False, paced=False)

    assert bench.waited == []


def test_a_token_that_cannot_be_had_counts_for_every_lane() -> None:
    """Failures of the token service open every lane's breaker; a probe's answers its lane's probe, too."""

    bench = Bench()
    for _ in range(3):
        bench.dispatcher.record(SWEEP, verdict(Kind.TRANSIENT), probe=False, token=True)
    assert [bench.dispatcher.outage(lane) for lane in LANES] == [True, True]

    (task,) = bench.offer()
    bench.clock.sleep(15)
    bench.look()
    assert bench.taken() == [("one", True)]
    bench.answer(task, Kind.TRANSIENT, token=True)
    assert bench.dispatcher.holds().cooldowns == {SWEEP: 30.0, CANCELLATION: 15.0}


class Dispatching(RuleBasedStateMachine):
    """Offers, takes, answers, holds, probes, lost channels, clock jumps and a drain, with a fake intake: nobody waits
    for ever, nothing is held without a reason, no command is lost, and a drain ends."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(3)
        self.dispatcher = self.bench.dispatcher
        self.out: list[tuple[Task, bool]] = []
        self.offered: list[Task] = []  # in this order, or a failure could not be repeated
        self.ready = True
        self.parked = 0
        self.queue: list[Task] = []  # what the intake was given back

    # -- the intake --------------------------------------------------------------------------------------------------

    @rule(lane=st.sampled_from(LANES), merchant=st.sampled_from("ab"))
    def offer(self, lane: str, merchant: str) -> None:
        (task,) = self.bench.offer(lane, f"m-{len(self.offered)}", merchant=merchant)
        self.offered.append(task)

    @rule(seconds=st.sampled_from([0.1, 2.0, 15.0, 61.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.bench.clock.sleep(seconds)
        self.look()
        if self.ready:
            assert self.dispatcher.waiting() + self.dispatcher.in_hand() == len(self.offered), "somebody is lost"

    @rule(lane=st.sampled_from(LANES))
    def calls_fail(self, lane: str) -> None:
        """An outage of the lane begins, or goes on."""
        self.bench.fail(lane)

    @rule(lane=st.sampled_from(LANES))
    def probes_are_due(self, lane: str) -> None:
        """An outage lasts until commands of the lane are chosen to test the gateway."""
        self.offer(lane, "a")
        self.calls_fail(lane)
        self.time_passes(15.0)

    @rule(ready=st.booleans())
    def broker(self, ready: bool) -> None:
        self.ready = ready
        self.look()

    def look(self, shared: tuple[str, ...] = ()) -> None:
        wishes = self.bench.look(ready=self.ready, shared=shared)
        for task in wishes.give_back:
            self.leave(task)
        for lane, count in wishes.fetch.items():
            assert 1 <= count <= 3
            mine = [task for task in self.queue if task.lane == lane][:count]
            for task in mine:
                self.queue.remove(task)
                task.probed, task.round = False, None
                self.offered.append(task)
                self.dispatcher.offer(task)
            self.dispatcher.fetched(lane)

    @precondition(lambda self: self.offered)
    @rule(data=st.data())
    def taken_back(self, data: st.DataObject) -> None:
        """The broker takes a delivery back."""
        data.draw(st.sampled_from(self.offered)).entry = builders.orphan()

    # -- senders -----------------------------------------------------------------------------------------------------

    @rule()
    def take(self) -> None:
        taken = self.dispatcher.take()
        if taken is None:
            self.parked += 1
            self.dispatcher.park(self.woken)
        else:
            task, probe = taken
            assert task in self.offered
            assert all(task is not other for other, _ in self.out)
            held = self.dispatcher.outage(task.lane)
            assert probe or not held
            self.out.append(taken)

    def woken(self) -> None:
        self.parked -= 1
        assert self.parked >= 0

    @precondition(lambda self: self.out)
    @rule(data=st.data(), kind=st.sampled_from(Kind))
    def answer(self, data: st.DataObject, kind: Kind) -> None:
        """One call comes back; what is not final is tried again, or held."""
        task, probe = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        if task.orphaned:
            self.bring(task, probe=probe)
            return
        retry_after = "20" if kind is Kind.THROTTLED else None
        task.answer = kind
        self.dispatcher.record(task.lane, verdict(kind, retry_after=retry_after), probe=probe)
        if kind.final or probe or not self.dispatcher.outage(task.lane):
            self.bring(task, probe=probe)
        else:
            task.round = Round(0.0, calls=1)
            task.round.interrupt(0.0, self.dispatcher.outages(task.lane))
            self.dispatcher.done(task, Hold(), probe=probe)

    def bring(self, task: Task, *, probe: bool) -> None:
        self.dispatcher.done(task, GONE, probe=probe)
        self.leave(task)

    def leave(self, task: Task) -> None:
        self.offered.remove(task)
        if not task.orphaned:
            self.queue.append(task)

    # -- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def no_command_is_lost(self) -> None:
        assert self.dispatcher.waiting() + self.dispatcher.in_hand() <= len(self.offered)
        assert self.dispatcher.in_hand() == len(self.out)

    @invariant()
    def limits_hold(self) -> None:
        count = Counter(task.lane for task, _ in self.out)
        ordinary = Counter(task.lane for task, probe in self.out if not probe)
        assert ordinary.total() <= 3
        assert ordinary[SWEEP] <= 2
        assert count.total() <= 3 + 6

    @rule()
    def nothing_is_held_without_a_reason(self) -> None:
        """Once the gateway works and the broker is there, everything goes within a while."""
        self.ready = True
        for _ in range(400):
            self.bench.clock.sleep(7.0)
            self.look()
            while (taken := self.dispatcher.take()) is not None:
                self.out.append(taken)
            for task, probe in self.out:
                if not task.orphaned:
                    task.answer = Kind.DONE
                    self.dispatcher.record(task.lane, verdict(Kind.DONE), probe=probe)
                self.dispatcher.done(task, GONE, probe=probe)
                self.offered.remove(task)
            self.out = []
            if not self.offered and not self.dispatcher.outage(None):
                break
        assert not self.offered, "somebody waits for ever"
        assert self.dispatcher.waiting() == 0

    def teardown(self) -> None:
        """A drain ends: what is out comes back, and what waits is given back at once."""
        self.dispatcher.drain()
        self.look()
        self.bench.clock.sleep(SETTLE_FOR)
        self.look()
        for task, probe in self.out:
            self.bring(task, probe=probe)
        self.out = []
        self.look()
        assert self.dispatcher.take() is None
        assert not self.offered
        assert self.dispatcher.waiting() == self.dispatcher.in_hand() == 0


TestDispatching = Dispatching.TestCase
TestDispatching.settings = settings(max_examples=100, stateful_step_count=50)
