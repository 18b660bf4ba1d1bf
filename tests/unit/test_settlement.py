"""Acks and confirms: no command is acked before everything that settles it is confirmed, and none is forgotten.

`Settlement` plays consumer and publisher against a small model of a broker; the other tests show single facts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.core.settlement import Acks, Confirms, Entry, Ledger, Tag, Take

KEYS = ("a", "b", "c")


@dataclass(eq=False)
class Message:
    """One message in the broker."""

    key: str
    redelivered: bool = False
    given_back: bool = False


@dataclass(eq=False)
class Publication:
    """One message on its way to the broker."""

    entry: Entry
    routable: bool = True
    promised: bool = False


@dataclass
class Channel:
    """The broker's side of a consuming channel, and our acks of it."""

    number: int
    tags: int = 0
    unacked: dict[int, Message] = field(default_factory=dict)
    acks: Acks = field(default_factory=Acks)


class Settlement(RuleBasedStateMachine):
    """Ledger, Confirms and Acks together, wired as the engine wires them, against a broker that does its worst."""

    def __init__(self) -> None:
        super().__init__()
        # the broker
        self.ready: deque[Message] = deque()
        self.acked: list[Message] = []
        self.channel = Channel(1)
        self.outstanding: dict[int, Publication] = {}  # by the number that the broker counts
        self.counted = 0
        # ours
        self.ledger = Ledger()
        self.confirms: Confirms[Publication] = Confirms()
        self.backlog: deque[Publication] = deque()
        self.working: list[Entry] = []
        self.publishing: list[Entry] = []
        self.publications: dict[Entry, list[Publication]] = {}
        self.may_ack: dict[int, Message] = {}
        self.promised: set[str] = set()

    # -- what the world does ----------------------------------------------------------------------------------------

    @rule(key=st.sampled_from(KEYS))
    def produce(self, key: str) -> None:
        """A producer sends a command, maybe one it has sent before."""
        self.ready.append(Message(key))

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
        take, entry = self.ledger.deliver(message.key, tag, redelivered=message.redelivered)
        match take:
            case Take.WORK:
                self.working.append(entry)
                assert entry.tags == [tag]
            case Take.JOINED:
                assert message.redelivered
                assert entry in self.working or entry in self.publishing
                assert tag in entry.tags
            case Take.SETTLED:
                assert message.redelivered
                assert message.key in self.promised
                self.settle(tag)

    @rule()
    def consumer_lost(self) -> None:
        """The consuming channel dies; the broker has back what it held."""
        self.ledger.channel_lost(self.channel.number)
        for message in self.channel.unacked.values():
            message.redelivered, message.given_back = True, False
        self.ready.extendleft(reversed(self.channel.unacked.values()))
        self.channel = Channel(self.channel.number + 1)
        self.may_ack = {}

    @rule()
    def publisher_lost(self) -> None:
        """The publishing channel dies; what was not confirmed may have been taken, or not."""
        self.backlog.extendleft(reversed(self.confirms.lost()))
        self.outstanding, self.counted = {}, 0

    # -- what senders do --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.working)
    @rule(data=st.data(), messages=st.integers(1, 2))
    def finish(self, data: st.DataObject, messages: int) -> None:
        """An outcome, or an outcome and a dead letter."""
        entry = self.pick(data)
        self.publishing.append(entry)
        self.ledger.publish(entry, messages)
        self.publications[entry] = [Publication(entry) for _ in range(messages)]
        self.backlog.extend(self.publications[entry])

    @precondition(lambda self: any(entry.orphaned for entry in self.working))
    @rule()
    def drop(self) -> None:
        """An orphan is not started."""
        entry = next(entry for entry in self.working if entry.orphaned)
        self.working.remove(entry)
        assert not self.ledger.abandon(entry)

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """A drain leaves a delivery to the end of its channel."""
        for tag in self.ledger.abandon(self.pick(data)):
            self.channel.unacked[tag.number].given_back = True

    @precondition(lambda self: self.working)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        """A sender crashed: its delivery is nacked."""
        for tag in self.ledger.abandon(self.pick(data)):
            self.channel.acks.skip(tag.number)
            message = self.channel.unacked.pop(tag.number)
            message.redelivered = True
            self.ready.append(message)

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
                self.acked.append(channel.unacked.pop(tag))
                assert not self.acked[-1].given_back
                del self.may_ack[tag]

    @rule()
    def calm(self) -> None:
        """Everything is finished, confirmed and flushed: nothing stays unacked but what was given back."""
        for entry in self.working:
            self.ledger.publish(entry, 1)
            self.publications[entry] = [Publication(entry)]
            self.backlog.extend(self.publications[entry])
            self.publishing.append(entry)
        self.working = []
        while self.backlog or self.outstanding:
            while self.backlog:
                self.publish(routable=True)
            self.confirm(self.counted, multiple=True, ack=True)
        self.flush()
        assert all(message.given_back for message in self.channel.unacked.values())
        assert not self.publishing
        assert len(self.confirms) == len(self.ledger) == 0

    # -- helpers ----------------------------------------------------------------------------------------------------

    def pick(self, data: st.DataObject) -> Entry:
        return self.working.pop(data.draw(st.integers(0, len(self.working) - 1)))

    def settle(self, tag: Tag) -> None:
        assert tag.channel == self.channel.number, "an ack for a dead channel"
        self.may_ack[tag.number] = self.channel.unacked[tag.number]
        self.channel.acks.settle(tag.number)

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
            self.confirmed(publication)
        self.backlog.extend(again)

    def confirmed(self, publication: Publication) -> None:
        entry, publication.promised = publication.entry, True
        held = list(entry.tags)
        tags = self.ledger.confirmed(entry)
        if not all(each.promised for each in self.publications[entry]):
            assert not tags, "acked before the last confirm"
            return
        assert list(tags) == held
        self.publishing.remove(entry)
        self.promised.add(entry.key)
        for tag in tags:
            self.settle(tag)

    # -- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def acked_only_after_a_promise(self) -> None:
        assert all(message.key in self.promised for message in self.acked)

    @invariant()
    def nothing_is_forgotten(self) -> None:
        """Whatever is unacked is in a sender's hands, waits for a confirm or the flush, or was given back."""
        owned = {tag.number for entry in [*self.working, *self.publishing] for tag in entry.tags}
        for number, message in self.channel.unacked.items():
            assert (number in owned) + (number in self.may_ack) + message.given_back == 1

    @invariant()
    def tags_are_alive(self) -> None:
        for entry in [*self.working, *self.publishing]:
            assert entry.orphaned == (not entry.tags)
            assert all(tag.channel == self.channel.number for tag in entry.tags)
            assert all(tag.number in self.channel.unacked for tag in entry.tags)

    @invariant()
    def counts_are_true(self) -> None:
        assert len(self.confirms) == len(self.outstanding)
        assert list(self.confirms) == list(self.outstanding.values())
        assert len(self.ledger) == len(self.working) + len(self.publishing)


TestSettlement = Settlement.TestCase
TestSettlement.settings = settings(max_examples=80, stateful_step_count=40)


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
    """The ack of a returned publication promises nothing, and the next try of it counts anew."""

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


def test_the_oldest_of_a_lane() -> None:
    """The oldest dated command that is open counts, of its own lane alone."""

    ledger = Ledger()
    dates = {"a": ("sweep", 5.0), "b": ("sweep", 3.0), "c": ("sweep", None), "d": ("cancellation", 1.0)}
    for number, (key, (lane, published_at)) in enumerate(dates.items(), 1):
        _, entry = ledger.deliver(key, Tag(1, number), redelivered=False)
        entry.lane, entry.published_at = lane, published_at
        if key == "b":
            oldest = entry
    assert ledger.oldest("sweep") == 3.0

    ledger.abandon(oldest)
    assert (ledger.oldest("sweep"), ledger.oldest("cancellation"), ledger.oldest("other")) == (5.0, 1.0, None)


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
