"""Acks and confirms: no command is acked before everything that settles it is confirmed, and none is lost.

`Settlement` drives the engine's own Desk against a small model of a broker; the other tests show single facts.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests import builders
from tests.builders import NOON
from worker.core.delivery import Message as Published
from worker.core.outcome import Outcome, Reason
from worker.core.settlement import (
    Acks,
    Arrival,
    Confirms,
    Crashed,
    Delay,
    Desk,
    Disposition,
    Entry,
    GiveBack,
    Ledger,
    Orders,
    Report,
    Tag,
    Take,
    TakenBack,
    Task,
)
from worker.core.topology import Names

NAMES = Names("q")


@dataclass(eq=False)
class Message:
    """One message in the broker. ``number`` is the produced command's; copies of it keep it."""

    number: int
    key: str
    headers: dict[str, Any] = field(default_factory=dict)
    redelivered: bool = False
    given_back: bool = False


@dataclass(eq=False)
class Publication:
    """One message on its way to the broker."""

    message: Published
    task: Task
    disposition: Disposition
    routable: bool = True


@dataclass
class Channel:
    """The broker's side of a consuming channel, and our acks of it."""

    number: int
    tags: int = 0
    unacked: dict[int, Message] = field(default_factory=dict)
    acks: Acks = field(default_factory=Acks)


def outcome_of(task: Task, reason: Reason) -> Outcome:
    """The outcome of a task."""
    return builders.outcome(reason, command_id=task.delivery.command_id, batch_id=task.delivery.batch_id)


class Settlement(RuleBasedStateMachine):
    """The Desk that the engine has, with its confirms and acks, against a broker that does its worst."""

    def __init__(self) -> None:
        super().__init__()
        # the broker
        self.ready: deque[Message] = deque()
        self.channel = Channel(1)
        self.outstanding: dict[int, Publication] = {}  # by the number that the broker counts
        self.counted = 0
        self.told: Counter[int] = Counter()  # outcomes, by the produced command
        self.produced = 0
        self.twins: set[int] = set()
        # ours
        ids = itertools.count(1)
        self.desk = Desk(NAMES, lambda: f"copy-{next(ids)}")
        self.confirms: Confirms[Publication] = Confirms()
        self.backlog: deque[Publication] = deque()
        self.working: list[Task] = []
        self.publishing: list[Task] = []
        self.may_ack: dict[int, Message] = {}

    # -- what the world does ----------------------------------------------------------------------------------------

    @rule(twin=st.integers(0, 3))
    def produce(self, twin: int) -> None:
        """A producer sends a command, maybe one it has sent before (the same id and body)."""
        self.produced += 1
        again = twin == 0 and self.ready
        key = self.ready[-1].key if again else f"k-{self.produced}"
        if again:
            self.twins |= {self.ready[-1].number, self.produced}
        self.ready.append(Message(self.produced, key, {"batch-id": str(self.produced)}))

    @precondition(lambda self: self.ready)
    @rule()
    def another_worker_dies(self) -> None:
        """Another worker had the next message and gave it back."""
        self.ready[0].redelivered = True

    @precondition(lambda self: self.ready)
    @rule()
    def deliver(self) -> None:
        channel, message = self.channel, self.ready.popleft()
        channel.tags += 1
        channel.unacked[channel.tags] = message
        tag = Tag(channel.number, channel.tags)
        delivery = builders.delivery(
            message_id=message.key, headers=message.headers, redelivered=message.redelivered, lane="sweep"
        )
        arrival = self.desk.deliver(delivery, tag)
        match arrival.take:
            case Take.WORK:
                assert arrival.task is not None
                assert arrival.task.delivery is delivery
                assert delivery.progress.effect_unknown or not message.redelivered
                if arrival.known is None:
                    self.working.append(arrival.task)
                else:
                    assert message.redelivered
                    self.settle(arrival.task, arrival.known)
            case Take.JOINED:
                assert message.redelivered
                assert arrival.task in [*self.working, *self.publishing]
                assert arrival.task.delivery.progress.effect_unknown
            case Take.SETTLED:
                assert message.redelivered
                self.ack(tag)

    @rule()
    def consumer_lost(self) -> None:
        """The consuming channel is closed; the broker has back what it held."""
        self.desk.channel_lost(self.channel.number)
        for message in self.channel.unacked.values():
            message.redelivered, message.given_back = True, False
        self.ready.extendleft(reversed(self.channel.unacked.values()))
        self.channel = Channel(self.channel.number + 1)
        self.may_ack = {}

    @rule(taken=st.booleans())
    def publisher_lost(self, taken: bool) -> None:
        """The publishing channel is closed; what was not confirmed may have been taken, or not."""
        for publication in self.outstanding.values() if taken else ():
            self.store(publication)
        self.backlog.extendleft(reversed(self.confirms.lost()))
        self.outstanding, self.counted = {}, 0

    # -- what senders do --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.working)
    @rule(data=st.data(), reason=st.sampled_from([Reason.SUCCESS, Reason.PAID, Reason.RETRIES_EXHAUSTED]))
    def report(self, data: st.DataObject, reason: Reason) -> None:
        """An outcome, or an outcome and a dead letter."""
        task = self.pick(data)
        task.delivery.progress.sent("1" * 36)
        self.settle(task, Report(outcome_of(task, reason)))

    @precondition(lambda self: self.working)
    @rule(data=st.data(), disposition=st.sampled_from([Delay(30, 1), GiveBack(), TakenBack()]))
    def finish(self, data: st.DataObject, disposition: Disposition) -> None:
        """A delayed round, the end of its lane, or a command that may have been taken back."""
        self.settle(self.pick(data), disposition)

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        """A drain without a way to publish hands a delivery back."""
        for tag in self.desk.abandon(self.pick(data)):
            self.hand_back(tag)

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """A sender crashed: its delivery is rejected."""
        orders = self.desk.settle(self.pick(data), Crashed())
        assert not orders.publish
        for tag in orders.reject:
            self.hand_back(tag)

    # -- publishing -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.backlog)
    @rule(routable=st.booleans())
    def publish(self, routable: bool) -> None:
        publication = self.backlog.popleft()
        publication.routable = routable
        self.counted += 1
        assert self.confirms.published(publication) == self.counted
        self.outstanding[self.counted] = publication

    @precondition(lambda self: self.outstanding)
    @rule(data=st.data(), multiple=st.booleans(), ack=st.booleans())
    def answer(self, data: st.DataObject, multiple: bool, ack: bool) -> None:
        """The broker confirms or nacks one publication, or all up to it."""
        number = data.draw(st.sampled_from(sorted(self.outstanding)))
        self.confirm(number, multiple=multiple, ack=ack)

    @rule(number=st.integers(1, 50), multiple=st.booleans())
    def stray_confirm(self, number: int, multiple: bool) -> None:
        """A confirm of what is not pending changes nothing."""
        if number in self.outstanding or (multiple and any(known <= number for known in self.outstanding)):
            return
        assert self.confirms.settle(number, multiple=multiple, ack=True) == ([], [])

    @rule()
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
        working, self.working = self.working, []
        for task in working:
            self.settle(task, Report(outcome_of(task, Reason.SUCCESS)))
        while self.backlog or self.outstanding:
            while self.backlog:
                self.publish(routable=True)
            self.confirm(self.counted, multiple=True, ack=True)
        self.flush()
        assert not self.channel.unacked
        assert not self.publishing
        assert len(self.confirms) == len(self.desk) == 0

    # -- helpers ----------------------------------------------------------------------------------------------------

    def pick(self, data: st.DataObject) -> Task:
        return self.working.pop(data.draw(st.integers(0, len(self.working) - 1)))

    def settle(self, task: Task, disposition: Disposition) -> None:
        """As the engine does."""
        orphaned = task.orphaned
        orders = self.desk.settle(task, disposition)
        assert not orders.reject
        if orphaned:
            assert orders == Orders(taken_back=True), "published for a command that the broker has given away"
            return
        if orders.again:
            self.working.append(task)
            return
        assert orders.publish
        self.publishing.append(task)
        self.backlog.extend(Publication(message, task, disposition) for message in orders.publish)

    def ack(self, tag: Tag) -> None:
        assert tag.channel == self.channel.number, "an ack for a dead channel"
        self.may_ack[tag.number] = self.channel.unacked[tag.number]
        self.channel.acks.settle(tag.number)

    def hand_back(self, tag: Tag) -> None:
        self.channel.acks.skip(tag.number)
        message = self.channel.unacked.pop(tag.number)
        message.redelivered = True
        self.ready.append(message)

    def store(self, publication: Publication) -> None:
        """The broker takes a message."""
        message, delivery = publication.message, publication.task.delivery
        number = int(delivery.batch_id or 0)
        if message.exchange == NAMES.outcomes:
            self.told[number] += 1
        elif message.exchange != NAMES.dead:
            headers = dict(message.properties["headers"])
            self.ready.append(Message(number, delivery.command_id, headers))

    def confirm(self, number: int, *, multiple: bool, ack: bool) -> None:
        numbers = [known for known in self.outstanding if known <= number] if multiple else [number]
        answered = [self.outstanding.pop(known) for known in numbers]
        promised = [publication for publication in answered if ack and publication.routable]
        for publication in answered:
            if not publication.routable:
                self.confirms.returned(publication)  # a return always comes before the confirm of the same publication
        confirmed, again = self.confirms.settle(number, multiple=multiple, ack=ack)
        assert confirmed == promised
        assert again == [publication for publication in answered if publication not in promised]
        for publication in confirmed:
            self.store(publication)
            settled = self.desk.confirmed(publication.task, publication.disposition)
            if settled is not None:
                assert not any(other.task is publication.task for other in self.waiting(but=confirmed))
                self.publishing.remove(settled.task)
                for tag in settled.tags:
                    self.ack(tag)
        self.backlog.extend(again)

    def waiting(self, but: list[Publication]) -> list[Publication]:
        """Publications without their confirm."""
        return [each for each in [*self.backlog, *self.outstanding.values()] if each not in but]

    # -- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every command has an outcome, or is with the broker: in a queue, or not acked. (Of two commands that nobody
        can tell apart, one stands for both.)"""
        there = {message.number for message in [*self.ready, *self.channel.unacked.values()]}
        lost = set(range(1, self.produced + 1)) - there - set(self.told) - self.twins
        assert not lost

    @invariant()
    def nothing_is_forgotten(self) -> None:
        """Whatever is unacked is in a sender's hands, or waits for a confirm or the flush."""
        owned = {tag.number for task in [*self.working, *self.publishing] for tag in tags(task)}
        for number in self.channel.unacked:
            assert (number in owned) + (number in self.may_ack) == 1

    @invariant()
    def tags_are_alive(self) -> None:
        for task in [*self.working, *self.publishing]:
            assert task.orphaned == (not tags(task))
            assert all(tag.channel == self.channel.number for tag in tags(task))
            assert all(tag.number in self.channel.unacked for tag in tags(task))

    @invariant()
    def counts_are_true(self) -> None:
        assert len(self.confirms) == len(self.outstanding)
        assert list(self.confirms) == list(self.outstanding.values())
        assert len(self.desk) == len(self.working) + len(self.publishing)


def tags(task: Task) -> list[Tag]:
    """The deliveries that a task answers for."""
    assert task.entry is not None
    return task.entry.tags


TestSettlement = Settlement.TestCase
TestSettlement.settings = settings(max_examples=80, stateful_step_count=50)


def arrived(desk: Desk, number: int = 1, *, channel: int = 1, redelivered: bool = False, key: str = "m-1") -> Arrival:
    """What the desk says of a delivery."""
    return desk.deliver(builders.delivery(message_id=key, redelivered=redelivered), Tag(channel, number))


def new_desk() -> Desk:
    """A desk whose copies are all named alike."""
    return Desk(NAMES, lambda: "copy")


def task_of(arrival: Arrival) -> Task:
    """The task of a delivery that is to be worked on."""
    assert arrival.task is not None
    return arrival.task


def test_an_orphan_publishes_nothing() -> None:
    """Once the broker has a command again, whatever we learned of it is not published: another process reports it."""

    for disposition in (Report(builders.outcome(Reason.NOT_FOUND)), Delay(30, 1), GiveBack(), TakenBack()):
        desk = new_desk()
        task = task_of(arrived(desk))
        desk.channel_lost(1)

        assert desk.settle(task, disposition) == Orders(taken_back=True)
        assert len(desk) == 0


def test_a_code_that_we_expired_is_reported_when_it_comes_back() -> None:
    """A call that succeeded after its delivery was lost is not repeated if the command comes back to us."""

    desk = new_desk()
    task, report = task_of(arrived(desk)), Report(builders.outcome())
    desk.channel_lost(1)
    task.delivery.progress.sent("1" * 36)
    desk.settle(task, report)

    back = arrived(desk, channel=2, redelivered=True)
    assert back.known == report
    assert task_of(back).delivery.progress.attempts == 1


def test_a_refusal_is_not_believed_when_its_command_comes_back() -> None:
    """Another process may have expired the code meanwhile, so that it is not found: we call again."""

    desk = new_desk()
    task = task_of(arrived(desk))
    desk.channel_lost(1)
    task.delivery.progress.sent("1" * 36)
    desk.settle(task, Report(builders.outcome(Reason.NOT_FOUND)))

    back = arrived(desk, channel=2, redelivered=True)
    assert back.known is None
    assert task_of(back).delivery.progress.effect_unknown


def test_losing_the_channel_makes_the_effect_unknown() -> None:
    """A command that comes back while it is in hand may have been in other hands, too."""

    desk = new_desk()
    task = task_of(arrived(desk))
    desk.channel_lost(1)
    assert not task.delivery.progress.effect_unknown

    assert arrived(desk, channel=2, redelivered=True).take is Take.JOINED
    assert task.delivery.progress.effect_unknown


def test_a_command_that_was_never_called_for_comes_back_without_suspicion() -> None:
    """A copy that goes back to the end of its lane says what is known, and a new copy is no redelivery."""

    desk = new_desk()
    (message,) = desk.settle(task_of(arrived(desk)), GiveBack()).publish
    copy = builders.delivery(headers=message.properties["headers"])

    assert not copy.progress.effect_unknown
    assert copy.progress.attempts == 0
    assert copy.copy_id == "copy"


@pytest.mark.parametrize("other", ["confirmed", "refused"])
def test_a_command_is_parked_once(other: str) -> None:
    """Of a command with two messages one is refused for good: its deliveries are parked, whatever becomes of the other
    message; nothing is acked, and nothing of it is kept."""

    desk = new_desk()
    task = task_of(arrived(desk))
    report = Report(builders.outcome(Reason.RETRIES_EXHAUSTED))
    assert len(desk.settle(task, report).publish) == 2

    assert desk.park(task) == [Tag(1, 1)]
    if other == "confirmed":
        assert desk.confirmed(task, report) is None
    else:
        assert list(desk.park(task)) == []

    assert len(desk) == 0
    again = arrived(desk, 2, redelivered=True)
    assert again.take is Take.WORK, "redriven or redelivered, it is a command like any other"


def test_the_oldest_of_a_lane() -> None:
    """The oldest dated command in hand counts, of its own lane alone."""

    desk, tasks = new_desk(), {}
    for number, (lane, date) in enumerate(
        [("sweep", NOON - 5), ("sweep", NOON - 9), ("sweep", None), ("cancellation", NOON - 20)], 1
    ):
        delivery = builders.delivery(message_id=str(number), lane=lane, timestamp=date)
        tasks[date] = task_of(desk.deliver(delivery, Tag(1, number)))
    assert desk.oldest("sweep") == NOON - 8  # a date in whole seconds is read as the end of its second

    desk.abandon(tasks[NOON - 9])
    assert (desk.oldest("sweep"), desk.oldest("cancellation"), desk.oldest("other")) == (NOON - 4, NOON - 19, None)


def settled(ledger: Ledger, entry: Entry) -> list[Tag]:
    """The tags to ack once the entry's only publication is confirmed."""
    ledger.publish(entry, 1)
    return list(ledger.confirmed(entry))


def test_ack_follows_the_last_confirm() -> None:
    """An outcome with a dead letter is acked after both confirms."""

    ledger = Ledger()
    _, entry = ledger.deliver("k", Tag(1, 1), redelivered=False)
    ledger.publish(entry, 2)

    assert list(ledger.confirmed(entry)) == []
    assert list(ledger.confirmed(entry)) == [Tag(1, 1)]


def test_lost_channel_is_not_acked() -> None:
    """An entry whose channel died before its confirm acks nothing."""

    ledger = Ledger()
    _, entry = ledger.deliver("k", Tag(1, 1), redelivered=False)
    ledger.channel_lost(1)

    assert entry.orphaned
    assert settled(ledger, entry) == []


def test_redelivery_joins_what_is_in_hand() -> None:
    """A command that comes back while it is being called for is not called for twice."""

    ledger = Ledger()
    _, entry = ledger.deliver("k", Tag(1, 1), redelivered=False)
    ledger.channel_lost(1)

    assert ledger.deliver("k", Tag(2, 1), redelivered=True) == (Take.JOINED, entry)
    assert settled(ledger, entry) == [Tag(2, 1)]


def test_redelivery_of_what_is_settled() -> None:
    """A command that comes back because its ack was lost is acked and not called for again."""

    ledger = Ledger()
    _, entry = ledger.deliver("k", Tag(1, 1), redelivered=False)
    assert settled(ledger, entry) == [Tag(1, 1)]
    ledger.channel_lost(1)

    assert ledger.deliver("k", Tag(2, 1), redelivered=True)[0] is Take.SETTLED


def test_settled_while_its_channel_was_lost() -> None:
    """A command confirmed while the broker had it back is acked when it comes."""

    ledger = Ledger()
    _, entry = ledger.deliver("k", Tag(1, 1), redelivered=False)
    ledger.channel_lost(1)
    settled(ledger, entry)

    assert ledger.deliver("k", Tag(2, 1), redelivered=True)[0] is Take.SETTLED


def test_the_same_command_twice() -> None:
    """A producer that sends a command twice gets two answers: at once, and after the first is settled."""

    ledger = Ledger()
    _, first = ledger.deliver("k", Tag(1, 1), redelivered=False)
    take, second = ledger.deliver("k", Tag(1, 2), redelivered=False)
    assert take is Take.WORK
    assert settled(ledger, first) == [Tag(1, 1)]
    assert settled(ledger, second) == [Tag(1, 2)]

    assert ledger.deliver("k", Tag(1, 3), redelivered=False)[0] is Take.WORK


def test_given_back_by_another_worker() -> None:
    """While the channel of a settled command lives, a redelivery under its key is another message: it is worked."""

    ledger = Ledger()
    _, entry = ledger.deliver("k", Tag(1, 1), redelivered=False)
    settled(ledger, entry)

    assert ledger.deliver("k", Tag(1, 2), redelivered=True)[0] is Take.WORK


def test_given_back_while_its_twin_is_in_hand() -> None:
    """While the channel of a command in hand lives, a redelivery under its key is another message: it is worked."""

    ledger = Ledger()
    _, first = ledger.deliver("k", Tag(1, 1), redelivered=False)

    take, second = ledger.deliver("k", Tag(1, 2), redelivered=True)

    assert take is Take.WORK
    assert second is not first


def test_twin_of_a_settled_command_comes_back() -> None:
    """A command sent again after its twin was settled is worked, even when it comes back unanswered itself."""

    ledger = Ledger()
    settled(ledger, ledger.deliver("k", Tag(1, 1), redelivered=False)[1])
    ledger.channel_lost(1)
    _, twin = ledger.deliver("k", Tag(2, 1), redelivered=False)
    ledger.abandon(twin)
    ledger.channel_lost(2)

    assert ledger.deliver("k", Tag(3, 1), redelivered=True)[0] is Take.WORK


def test_memory_is_bounded() -> None:
    """The oldest settled commands are forgotten, and then a second call is harmless."""

    ledger = Ledger(remembered=2)
    for number, key in enumerate("abc", 1):
        settled(ledger, ledger.deliver(key, Tag(1, number), redelivered=False)[1])
    ledger.channel_lost(1)

    takes = [ledger.deliver(key, Tag(2, number), redelivered=True)[0] for number, key in enumerate("abc", 1)]

    assert takes == [Take.WORK, Take.SETTLED, Take.SETTLED]


def test_length_counts_twins() -> None:
    """The ledger's length is what is not settled, twins included."""

    ledger = Ledger()
    entries = [ledger.deliver("k", Tag(1, number), redelivered=False)[1] for number in (1, 2)]
    assert len(ledger) == 2

    settled(ledger, entries[0])
    assert len(ledger) == 1


def test_confirms_out_of_order() -> None:
    """Confirms come in any order, one by one and in ranges."""

    confirms: Confirms[str] = Confirms()
    assert [confirms.published(name) for name in "abcde"] == [1, 2, 3, 4, 5]

    assert confirms.settle(3, multiple=False, ack=True) == (["c"], [])
    assert confirms.settle(4, multiple=True, ack=True) == (["a", "b", "d"], [])
    assert confirms.settle(4, multiple=True, ack=True) == ([], [])
    assert list(confirms) == ["e"]


def test_return_is_no_promise() -> None:
    """The ack of a returned publication promises nothing, and the next try of it counts again."""

    confirms: Confirms[str] = Confirms()
    confirms.published("a")
    confirms.published("b")
    confirms.returned("a")
    assert confirms.is_returned("a")

    assert confirms.settle(2, multiple=True, ack=True) == (["b"], ["a"])
    confirms.published("a")
    assert not confirms.is_returned("a")
    assert confirms.settle(3, multiple=False, ack=True) == (["a"], [])


def test_nack_is_no_promise() -> None:
    """Nacked publications go again, returned ones too."""

    confirms: Confirms[str] = Confirms()
    for name in "ab":
        confirms.published(name)
    confirms.returned("a")

    assert confirms.settle(2, multiple=True, ack=False) == ([], ["a", "b"])
    assert not confirms.is_returned("a")


def test_lost_publications_go_again() -> None:
    """A lost channel gives back all that is unconfirmed, in order, and the next one counts from 1."""

    confirms: Confirms[str] = Confirms()
    for name in "abc":
        confirms.published(name)
    confirms.returned("c")
    confirms.settle(2, multiple=False, ack=True)

    assert confirms.lost() == ["a", "c"]
    assert len(confirms) == 0
    assert confirms.published("c") == 1
    assert confirms.settle(1, multiple=False, ack=True) == (["c"], [])


@given(
    st.permutations(range(1, 13)), st.lists(st.integers(1, 4), min_size=12, max_size=12), st.sets(st.integers(1, 12))
)
def test_acks_are_joined(order: list[int], bursts: list[int], skipped: set[int]) -> None:
    """Whatever the order, every tag is acked once, frames name unacked tags, and ranges cover settled ones only."""

    acks, unacked, done = Acks(), set(range(1, 13)), set[int]()
    left = deque(order)
    for burst in bursts:
        for _ in range(min(burst, len(left))):
            number = left.popleft()
            if number in skipped:
                acks.skip(number)
                unacked.discard(number)
            else:
                acks.settle(number)
                done.add(number)
        for number, multiple in acks.flush():
            assert number in unacked
            covered = {tag for tag in unacked if tag <= number} if multiple else {number}
            assert covered <= done
            unacked -= covered
        assert not unacked & done

    assert acks.flush() == []


def test_prefix_is_one_frame() -> None:
    """Settled tags without a gap are one frame; a straggler does not hold up those behind it."""

    acks = Acks()
    for number in (1, 2, 3, 5, 6):
        acks.settle(number)
    assert acks.flush() == [(3, True), (5, False), (6, False)]

    acks.settle(4)
    acks.settle(7)
    assert acks.flush() == [(7, True)]


def test_range_ends_on_an_unacked_tag() -> None:
    """A range never ends on a tag that was acked already: the broker would close the channel."""

    acks = Acks()
    acks.settle(2)
    acks.settle(3)
    assert acks.flush() == [(2, False), (3, False)]

    acks.settle(1)
    assert acks.flush() == [(1, False)]
