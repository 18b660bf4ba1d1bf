"""Acks and confirms: no command is acked before everything that settles it is confirmed, and none is lost.

Single facts; `tests/unit/test_engine.py` drives all of it against a model of a broker.
"""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import builders
from tests.builders import NOON
from worker.core.outcome import Reason
from worker.core.settlement import (
    Acks,
    Arrival,
    Confirms,
    Delay,
    Desk,
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
