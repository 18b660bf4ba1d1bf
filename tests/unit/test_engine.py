"""The engine settles: no command is acked before everything that settles it is confirmed, and none is lost.

The machine drives the engine with its desk and its dispatcher, as they are. Only the broker is a model, which does its
worst: channels and connections that end, messages that come back, confirms in any order, refusals.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests import builders
from tests.fakes import FakeClock, Stepping, lone_fleet
from worker.app.dispatch import Dispatcher
from worker.core.breaker import Throttle
from worker.core.lanes import SWEEP, Lanes
from worker.core.outcome import Reason
from worker.core.settlement import (
    Acks,
    Confirms,
    Crashed,
    Delay,
    Desk,
    Disposition,
    GiveBack,
    Report,
    Tag,
    TakenBack,
    Task,
)
from worker.core.topology import Names
from worker.shells.amqp.engine import PARK_AFTER, TICK, Engine, Order
from worker.shells.amqp.publisher import Publication
from worker.shells.metrics import Metrics
from worker.shells.tracing import Tracing

pytestmark = pytest.mark.usefixtures("plain_logs")

NAMES = Names("q")
REASONS = (Reason.SUCCESS, Reason.RETRIES_EXHAUSTED)


@dataclass(eq=False)
class Message:
    """One message in the broker. ``number`` is the produced command's; copies of it keep it."""

    number: int
    key: str
    headers: dict[str, Any] = field(default_factory=dict)
    redelivered: bool = False


@dataclass
class Channel:
    """The broker's side of a consuming channel, and our acks of it."""

    number: int
    tags: int = 0
    unacked: dict[int, Message] = field(default_factory=dict)
    acks: Acks = field(default_factory=Acks)


class Consumer:
    """The consumer, as far as the engine knows it."""

    shared = ()
    acks = waiting = dict.fromkeys((SWEEP,), 0)
    to_flush = False

    def __init__(self, settlement: Settlement) -> None:
        self.settle = settlement.ack
        self.reject = self.give_back = settlement.hand_back
        self.park = settlement.dead_letter

    def pause(self, lanes: frozenset[str]) -> None:
        """The model delivers what it likes."""

    def flush(self) -> None:
        """The model flushes when it likes."""


class Publisher:
    """The publisher, as far as the engine knows it. ``ready``: what is published goes out."""

    ready = True
    refused = 0

    def __init__(self, settlement: Settlement) -> None:
        self._backlog = settlement.backlog
        self._outstanding = settlement.outstanding

    @property
    def idle(self) -> bool:
        return not self._backlog and not self._outstanding

    def publish(self, *publications: Publication[Order]) -> None:
        self._backlog.extend(publications)

    def withdraw(self, unwanted: Callable[[Publication[Order]], bool]) -> list[Publication[Order]]:
        found = [each for each in self._backlog if unwanted(each)]
        for each in found:
            self._backlog.remove(each)
        return found


class Wire:
    """The broker, as far as the engine knows it."""

    closed = False

    def __init__(self, settlement: Settlement) -> None:
        self._settlement = settlement
        self.consumer = Consumer(settlement)
        self.publisher = Publisher(settlement)

    def tick(self, now: float) -> None:
        """Nothing is late."""

    def tell(self) -> None:
        """Nothing to tell."""

    def close(self) -> None:
        """Only when everything is confirmed and acked: what comes later is lost."""
        self._settlement.flush()
        assert not self._settlement.channel.unacked or not self.publisher.ready
        assert not self._settlement.backlog
        assert not self._settlement.outstanding
        self.closed = True


class Settlement(RuleBasedStateMachine):
    """The engine against a broker that does its worst."""

    def __init__(self) -> None:
        super().__init__()
        # the broker
        self.ready: deque[Message] = deque()
        self.channel = Channel(1)
        self.outstanding: dict[int, Publication[Order]] = {}  # by the number that the broker counts
        self.unroutable: set[Publication[Order]] = set()
        self.counted = 0
        self.told: Counter[int] = Counter()  # outcomes, by the produced command
        self.dead: set[int] = set()  # commands that the broker parked
        self.produced = 0
        self.twins: set[int] = set()
        # ours
        self.confirms: Confirms[Publication[Order]] = Confirms()
        self.backlog: deque[Publication[Order]] = deque()
        self.working: list[Task] = []
        self.expired: set[int] = set()  # commands that the broker took back before we had expired their bills
        self.crashed: set[int] = set()  # tags that are rejected in a while
        self.may_ack: dict[int, Message] = {}
        self.clock = FakeClock()
        self.wire = Wire(self)
        ids = itertools.count(1)
        self.lanes: Lanes[Task] = Lanes(1_000, 1.0)
        self.dispatcher = Dispatcher(
            self.lanes,
            lone_fleet(self.clock),
            Throttle(0.5, 8.0),
            clock=self.clock,
            rng=random.Random(1),
            draining=Stepping(self.clock),
            event=lambda: Stepping(self.clock),
        )
        self.engine = Engine(
            lambda _: cast("Any", self.wire),
            Desk(NAMES, lambda: f"copy-{next(ids)}"),
            self.dispatcher,
            fibers=cast("Any", SimpleNamespace(loop=self.clock, soon=lambda callback: callback())),
            watch=Metrics("1"),
            clock=self.clock,
            tracing=Tracing(),
            fleet=cast("Any", SimpleNamespace(closed=True, close=lambda: None)),
            parks=True,
        )
        self.engine.begin()
        self.engine._tick()  # and from then on by its own timer
        self.engine._end_turn()

    # -- what the world does ----------------------------------------------------------------------------------------

    @initialize(twins=st.lists(st.booleans(), min_size=2, max_size=5))
    def some_come(self, twins: list[bool]) -> None:
        for twin in twins:
            self.come(twin)

    @rule(twin=st.booleans())
    def come(self, twin: bool) -> None:
        """A producer sends a command, maybe one that it has sent before (the same id and body), and the next command
        that waits is delivered."""
        self.produced += 1
        key = f"k-{self.produced}"
        if twin and self.ready:
            key = self.ready[-1].key
            self.twins |= {self.ready[-1].number, self.produced}
        self.ready.append(Message(self.produced, key, {"batch-id": str(self.produced)}))
        self.deliver(redelivered=False)

    @precondition(lambda self: self.ready)
    @rule(redelivered=st.booleans())
    def deliver(self, redelivered: bool) -> None:
        """The next command comes; maybe another worker had it and gave it back."""
        channel, message = self.channel, self.ready.popleft()
        message.redelivered |= redelivered
        channel.tags += 1
        channel.unacked[channel.tags] = message
        method = SimpleNamespace(delivery_tag=channel.tags, redelivered=message.redelivered)
        properties = builders.Properties(message_id=message.key, headers=message.headers)
        self.engine.delivered(SWEEP, channel.number, None, method, properties, builders.body())
        self.turn()

    @rule(what=st.sampled_from(["consumer lost", "publisher lost", "restart", "alarm"]), taken=st.booleans())
    def trouble(self, what: str, taken: bool) -> None:
        """``taken``: the broker has what it could not confirm any more."""
        if what in ("consumer lost", "restart"):
            self.consumer_lost()
        if what in ("publisher lost", "restart"):
            self.publisher_lost(taken=taken)
        if what == "alarm":
            self.set_ready(not self.wire.publisher.ready)

    # -- what senders do --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.working)
    @rule(data=st.data(), brings=st.sampled_from([*REASONS, Delay(30, 1), GiveBack(), TakenBack(), Crashed()]))
    def finish(self, data: st.DataObject, brings: Reason | Disposition) -> None:
        """An outcome, maybe with a dead letter, a delayed round, the end of its lane, a command that may have been
        taken back, or a crash of its sender."""
        task = self.working.pop(data.draw(st.integers(0, len(self.working) - 1)))
        if brings is Reason.SUCCESS and task.orphaned:
            self.expired.add(int(task.delivery.batch_id or 0))
        if isinstance(brings, Reason):
            task.delivery.progress.sent("1" * 36)
            brings = self.outcome_of(task, brings)
        elif isinstance(brings, Crashed):
            self.crashed |= {tag.number for tag in tags(task)}
        self.bring(task, brings)

    # -- publishing -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.backlog and self.wire.publisher.ready)
    @rule(routable=st.booleans())
    def publish(self, routable: bool) -> None:
        publication = self.backlog.popleft()
        if publication.published_at and self.engine.not_again(publication):
            return
        publication.published_at = 1.0
        assert not copy_of_what_the_broker_has(publication)
        self.counted += 1
        assert self.confirms.published(publication) == self.counted
        self.outstanding[self.counted] = publication
        if not routable:
            self.unroutable.add(publication)

    @precondition(lambda self: self.outstanding)
    @rule(data=st.data(), multiple=st.booleans(), ack=st.booleans())
    def answer(self, data: st.DataObject, multiple: bool, ack: bool) -> None:
        """The broker confirms or nacks one publication, or all up to it."""
        number = data.draw(st.sampled_from(sorted(self.outstanding)))
        self.confirm(number, multiple=multiple, ack=ack)

    @precondition(lambda self: self.backlog)
    @rule(times=st.sampled_from([1, PARK_AFTER]))
    def refuse(self, times: int) -> None:
        """The broker closes the channel on the next message, once or more often."""
        publication = self.backlog.popleft()
        publication.tries += times
        if not self.engine.not_taken(publication, "too large"):
            self.backlog.append(publication)

    @rule(seconds=st.sampled_from([0.0, 2.0]))
    def time_passes(self, seconds: float) -> None:
        """Timers ring, and acks go out."""
        self.clock.sleep(seconds)
        self.turn()
        self.flush()

    def flush(self) -> None:
        """Acks go out; the broker closes a channel that acks what it does not have."""
        channel = self.channel
        for number, multiple in channel.acks.flush():
            assert number in channel.unacked, "the broker would close the channel"
            covered = [tag for tag in channel.unacked if tag <= number] if multiple else [number]
            for tag in covered:
                assert tag in self.may_ack, "acked without a promise"
                channel.unacked.pop(tag)
                del self.may_ack[tag]

    @rule()
    def calm(self) -> None:
        """Everything is finished, confirmed and flushed: nothing stays unacked."""
        self.set_ready(True)
        self.time_passes(2.0)
        self.end_all()
        assert not self.channel.unacked
        assert not self.engine.unsettled()

    def teardown(self) -> None:
        """A drain loses nothing, with a way to publish or without; with one it ends."""
        self.engine.drain()
        for tick in range(20):
            self.turn()
            self.end_all(publishing=self.wire.publisher.ready and tick > 10)  # a broker that is slow to confirm
            self.clock.sleep(TICK)
        assert self.engine.failure is None
        if self.wire.publisher.ready:
            assert self.engine._stopped
            assert not self.engine.unsettled()
        self.nothing_is_lost()

    # -- helpers ----------------------------------------------------------------------------------------------------

    def consumer_lost(self) -> None:
        """The consuming connection is gone; the broker has back what it held."""
        for message in self.channel.unacked.values():
            message.redelivered = True
        self.ready.extendleft(reversed(self.channel.unacked.values()))
        self.engine.channel_lost(self.channel.number)
        self.expired -= {message.number for message in self.channel.unacked.values()}  # those came back once
        self.channel = Channel(self.channel.number + 1)
        self.may_ack, self.crashed = {}, set()
        self.engine.disconnected()

    def publisher_lost(self, *, taken: bool) -> None:
        """The publishing connection is gone; what was not confirmed may have been taken, or not."""
        for publication in self.outstanding.values() if taken else ():
            self.store(publication)
        self.backlog.extendleft(reversed(self.confirms.lost()))
        self.outstanding.clear()
        self.unroutable.clear()
        self.counted = 0
        self.engine.disconnected()

    def set_ready(self, ready: bool) -> None:
        """Whether the broker takes messages."""
        self.wire.publisher.ready = ready
        self.engine.changed()
        self.turn()

    def outcome_of(self, task: Task, reason: Reason) -> Report:
        delivery = task.delivery
        return Report(builders.outcome(reason, command_id=delivery.command_id, batch_id=delivery.batch_id))

    def bring(self, task: Task, disposition: Disposition) -> None:
        """A sender is done with a command."""
        self.dispatcher.done(task, disposition, probe=False)
        self.engine.finish(task, disposition)
        self.turn()

    def turn(self) -> None:
        """The loop turns, and senders take what they can."""
        self.engine._end_turn()
        assert not self.engine._results, "an outcome waits for the slowest sender"
        while taken := self.dispatcher.take():
            number = int(taken[0].delivery.batch_id or 0)
            assert number not in self.expired - self.twins, "called again for a bill that we have expired"
            self.working.append(taken[0])

    def end_all(self, *, publishing: bool = True) -> None:
        """Senders finish, and the broker confirms."""
        while self.working or (publishing and (self.backlog or self.outstanding)):
            while self.working:
                task = self.working.pop()
                self.bring(task, self.outcome_of(task, Reason.RETRIES_EXHAUSTED))  # two messages
            while publishing and self.backlog:
                self.publish(routable=True)
            for number in tuple(self.outstanding) if publishing else ():
                self.confirm(number, multiple=False, ack=True)
        self.flush()

    def ack(self, tag: Tag) -> None:
        for publication in (*self.backlog, *self.outstanding.values()):
            assert tag not in tags(publication.settles[0]), "acked before everything that settles it is confirmed"
        if tag.channel == self.channel.number:  # else the consumer drops it
            self.may_ack[tag.number] = self.channel.unacked[tag.number]
            self.channel.acks.settle(tag.number)

    def hand_back(self, tag: Tag) -> None:
        message = self.given_up(tag)
        if message is not None:
            message.redelivered = True
            self.ready.append(message)

    def dead_letter(self, tag: Tag) -> None:
        message = self.given_up(tag)
        if message is not None:
            self.dead.add(message.number)

    def given_up(self, tag: Tag) -> Message | None:
        if tag.channel != self.channel.number:
            return None
        self.channel.acks.skip(tag.number)
        self.crashed.discard(tag.number)
        return self.channel.unacked.pop(tag.number)

    def store(self, publication: Publication[Order]) -> None:
        """The broker takes a message."""
        message, (task, _) = publication.message, publication.settles
        number = int(task.delivery.batch_id or 0)
        if message.exchange == NAMES.outcomes:
            self.told[number] += 1
        elif message.exchange != NAMES.dead:
            self.ready.append(Message(number, task.delivery.command_id, dict(message.properties["headers"])))

    def confirm(self, number: int, *, multiple: bool, ack: bool) -> None:
        numbers = [known for known in self.outstanding if known <= number] if multiple else [number]
        answered = [self.outstanding.pop(known) for known in numbers]
        promised = [each for each in answered if ack and each not in self.unroutable]
        for publication in answered:
            if publication in self.unroutable:
                self.confirms.returned(publication)  # a return always comes before the confirm of the same publication
                self.unroutable.discard(publication)
        confirmed, again = self.confirms.settle(number, multiple=multiple, ack=ack)
        assert confirmed == promised
        assert again == [publication for publication in answered if publication not in promised]
        for publication in confirmed:
            assert not self.wire.closed
            self.store(publication)
            self.engine.confirmed(publication)
        self.backlog.extend(again)
        self.turn()

    # -- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every command has an outcome, or is with the broker: in a queue, not acked, or in the dead letters. (Of two
        commands that nobody can tell apart, one stands for both.)"""
        there = {message.number for message in [*self.ready, *self.channel.unacked.values()]}
        assert not set(range(1, self.produced + 1)) - there - set(self.told) - self.dead - self.twins

    @invariant()
    def nothing_is_forgotten(self) -> None:
        """Whatever is unacked waits for a sender, is in its hands, or waits for a confirm, the flush or its
        rejection."""
        published = [each.settles[0] for each in (*self.backlog, *self.outstanding.values())]
        owned = {tag.number for task in (*self.working, *self.lanes.waiting(SWEEP), *published) for tag in tags(task)}
        for number in self.channel.unacked:
            assert (number in owned) + (number in self.may_ack) + (number in self.crashed) == 1

    @invariant()
    def no_copy_waits_of_what_the_broker_has(self) -> None:
        assert not any(copy_of_what_the_broker_has(each) for each in self.backlog if not each.published_at)

    @invariant()
    def nobody_works_for_a_dead_channel(self) -> None:
        for task in self.working:
            assert all(tag.channel == self.channel.number for tag in tags(task))
            assert all(tag.number in self.channel.unacked for tag in tags(task))


def copy_of_what_the_broker_has(publication: Publication[Order]) -> bool:
    """Whether there would be two of a command."""
    return publication.settles[0].orphaned and publication.message.exchange not in (NAMES.outcomes, NAMES.dead)


def tags(task: Task) -> list[Tag]:
    """The deliveries that a task answers for."""
    assert task.entry is not None
    return task.entry.tags


TestSettlement = Settlement.TestCase
TestSettlement.settings = settings(max_examples=250, stateful_step_count=50)


def test_a_refused_copy_is_not_sent_again_when_the_broker_has_its_command() -> None:
    """Its first try was refused, and meanwhile the broker took the command back: then there would be two."""
    scene = Settlement()
    scene.come(twin=False)
    scene.bring(scene.working.pop(), Delay(30, 1))
    scene.publish(routable=True)
    scene.consumer_lost()
    scene.confirm(1, multiple=False, ack=False)

    scene.publish(routable=True)

    assert not scene.outstanding
    assert not scene.backlog
    assert not scene.engine.unsettled()


def test_what_crashed_its_sender_goes_back_before_a_drain_ends() -> None:
    """Else its delivery would not be counted, and a command that crashes every sender would never be parked."""
    scene = Settlement()
    scene.come(twin=False)
    task = scene.working.pop()
    scene.crashed.add(1)
    scene.bring(task, Crashed())

    scene.teardown()

    assert [message.number for message in scene.ready] == [1]
    assert not scene.channel.unacked
