"""The parts of a fleet, each by itself: messages, terms, slots, and what a member says to what it hears."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from itertools import pairwise
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.core.breaker import Breakers, State
from worker.core.fleet.member import Member
from worker.core.fleet.messages import (
    LARGEST,
    Beat,
    BreakerState,
    FleetMessage,
    Good,
    Goodbye,
    Hello,
    Letter,
    Limit,
    MemberGrant,
    MemberReport,
    OperatorOrders,
    Ordered,
    Pause,
    Probe,
    Probed,
    Throttled,
    decode_letter,
    decode_orders,
    encode_letter,
    encode_orders,
)
from worker.core.fleet.own import Changed, MemberSettings, Permit, ReadOrders, Say
from worker.core.fleet.permits import HORIZON, LATE, PACE, Demand, Offset, Permits, Shares, Slots, whole_limit
from worker.core.fleet.terms import ASK, LEASE, RELUCTANT, SETTLE, SILENT, AcquireTerm, ReleaseTerm, Role, Terms
from worker.core.lanes import CANCELLATION, LANES, SWEEP
from worker.core.verdict import Kind

# -- messages ---------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=20)
SECONDS = st.floats(0, 1e9)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that messages have."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return st.one_of(*map(values, inner))
    if origin is tuple and inner[-1] is Ellipsis:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, inner))
    if origin is Mapping:
        return st.dictionaries(TEXT, values(inner[1]), max_size=2)
    if is_dataclass(hint):
        return st.builds(cast(Any, hint), **{name: values(each) for name, each in get_type_hints(hint).items()})
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    return st.from_type(hint)


@given(st.sampled_from(get_args(FleetMessage)).flatmap(values), TEXT, TEXT)
@settings(max_examples=150)
def test_messages_come_back(message: Any, sender: str, client: str) -> None:
    """What is encoded is decoded to the same."""

    letter = Letter(sender, client, message)

    assert decode_letter(encode_letter(letter)) == letter


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.booleans() | st.floats() | TEXT, st.lists).map(str).map(str.encode)
)
def test_garbage_is_no_message(body: bytes) -> None:
    """Whatever arrives, decoding never raises."""

    assert decode_letter(body) is None
    assert decode_orders(body) is None


@given(
    st.sampled_from(["beat", "report", "grant", "ordered", "probe"]),
    st.dictionaries(
        st.sampled_from(["term", "number", "at", "slots", "orders", "wanted", "lane", "breakers", "since", "sick"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
            max_leaves=6,
        ),
    ),
)
def test_wrong_fields_are_no_message(kind: str, fields: dict[str, Any]) -> None:
    """A message with fields of other types is skipped; one that is read has the right ones."""

    document = {"v": 1, "type": kind, "sender": "a", "client": "", "body": fields}
    letter = decode_letter(json.dumps(document).encode())

    assert letter is None or decode_letter(encode_letter(letter)) == letter


def test_other_versions() -> None:
    """Unknown fields are ignored; unknown kinds and other versions are skipped."""

    document = json.loads(encode_letter(Letter("a", "c", Hello(5.0))))
    newer = {**document, "colour": "red", "body": {**document["body"], "mood": "good"}}
    assert decode_letter(json.dumps(newer).encode()) == Letter("a", "c", Hello(5.0))
    assert decode_letter(json.dumps({**document, "type": "waltz"}).encode()) is None
    assert decode_letter(json.dumps({**document, "v": 2}).encode()) is None
    assert decode_letter(json.dumps({**document, "body": {"limit": 10**400}}).encode()) is None


def test_too_long_a_message() -> None:
    """What is longer than any message of ours is not even read."""

    assert decode_letter(encode_letter(Letter("a" * LARGEST, "", Hello()))) is None


def test_orders_come_back() -> None:
    """What rests at the broker is read again."""

    orders = OperatorOrders(3, {SWEEP: Pause("me@host", "why", 5.0, 60.0)}, Limit(5.0, "me@host", "slow", 6.0))

    assert decode_orders(encode_orders(orders)) == orders


# -- terms ------------------------------------------------------------------------------------------------------------


class Asking(Terms):
    """Terms that keep what the broker is to be asked."""

    def __init__(self, me: str) -> None:
        self.steps: list[AcquireTerm | ReleaseTerm] = []
        super().__init__(me, self.steps.append)


def led(terms: Asking, now: float, term: int = 1) -> float:
    """It joins, takes the term, and leads; the moment when it may give slots."""
    terms.joined(now)
    terms.tick(now + ASK + 0.2)
    assert terms.steps == [AcquireTerm(term)]
    terms.steps.clear()
    terms.took(term, now + 0.5)
    terms.beat_sent(1, now + 0.5)
    terms.heard_beat(terms.me, term, 1, now + 0.51)
    assert terms.role is Role.LEADS
    return terms.begins


def test_a_first_member_leads() -> None:
    """Who hears nobody takes the first term, and gives slots only after any other leader's lease would be over."""

    terms = Asking("a")

    assert led(terms, 100.0) >= 100.0 + SILENT
    assert terms.leads(100.6)


def test_a_lease_ends() -> None:
    """A leader that does not read its own beats any more leads no longer than the lease."""

    terms = Asking("a")
    led(terms, 100.0)
    terms.beat_sent(2, 101.0)

    assert not terms.leads(100.5 + LEASE)
    terms.heard_beat("a", 1, 2, 101.5)
    assert terms.leads(101.0 + LEASE - 0.01)
    assert not terms.leads(101.0 + LEASE)


def test_a_higher_term_deposes() -> None:
    """A leader that hears of a later term follows, and gives its queue back."""

    terms = Asking("a")
    led(terms, 100.0)
    assert terms.heard_beat("b", 2, 7, 101.0)

    assert (terms.role, terms.leader, terms.steps) == (Role.FOLLOWS, "b", [ReleaseTerm(1)])
    assert not terms.heard_beat("c", 1, 9, 101.1)
    assert not terms.leads(101.0)


def follower(now: float) -> Asking:
    """It follows b in term 4, heard last at ``now``."""
    terms = Asking("a")
    terms.joined(now)
    assert terms.heard_beat("b", 4, 1, now)
    return terms


def test_a_dead_leader() -> None:
    """Whoever gets the queue of the leader's term knows that it is gone, and begins without the long wait."""

    terms = follower(100.0)
    terms.tick(100.7)
    assert terms.steps == [AcquireTerm(4)]
    terms.steps.clear()
    terms.took(4, 100.71)
    assert terms.steps == [AcquireTerm(5), ReleaseTerm(4)]
    terms.took(5, 100.72)
    terms.beat_sent(1, 100.72)
    terms.heard_beat("a", 5, 1, 100.73)

    assert terms.begins == 100.73 + SETTLE


def test_a_silent_leader() -> None:
    """A leader whose connection lives is replaced after its lease is over, and not before."""

    terms = follower(100.0)
    terms.tick(100.7)
    terms.steps.clear()
    terms.taken(4, 100.71)
    terms.tick(100.9)
    assert terms.steps == []
    terms.tick(101.4)
    assert terms.steps == [AcquireTerm(5)]


def test_a_lost_race() -> None:
    """Who does not get the next term waits for its winner; when that stays silent, the term after is tried."""

    terms = follower(100.0)
    terms.heard_goodbye("b", 100.1)
    terms.tick(100.1)
    terms.steps.clear()
    terms.taken(5, 100.2)
    terms.tick(100.3)
    assert terms.steps == []
    terms.tick(101.0)
    assert terms.steps == [AcquireTerm(6)]


def test_a_reluctant_member() -> None:
    """Who is sick leaves the lead to others, but not for ever."""

    terms = follower(100.0)
    terms.reluctant = True
    terms.heard_goodbye("b", 100.1)
    terms.tick(104.0)
    assert terms.steps == []
    terms.tick(100.0 + RELUCTANT + 1.0)
    assert terms.steps == [AcquireTerm(5)]


def test_a_lost_connection() -> None:
    """Without a connection nobody is followed, and nothing is led."""

    terms = Asking("a")
    led(terms, 100.0)
    terms.lost()

    assert (terms.role, terms.leader) == (Role.APART, None)
    assert not terms.leads(100.6)


def test_a_queue_that_comes_too_late() -> None:
    """A term's queue that nobody asked for any more is given back."""

    terms = Asking("a")
    terms.joined(100.0)
    terms.took(9, 100.1)

    assert terms.steps == [ReleaseTerm(9)]
    assert terms.role is Role.FOLLOWS


# -- slots ------------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 1e5), st.lists(st.floats(0, 2), min_size=1, max_size=50))
def test_slots_are_even(limit: float, pauses: list[float]) -> None:
    """Two slots are never closer than the limit allows, whatever was asked for when."""

    slots, now, taken = Slots(limit), 1000.0, []
    for pause in pauses:
        now += pause
        taken.append(slots.take(now))

    least = 1 / (whole_limit(limit) * PACE)
    assert all(later - earlier > least * 0.999 - 1e-9 for earlier, later in pairwise(taken))


def test_cancellations_come_first() -> None:
    """Every eighth slot is the sweep's while cancellations of any member wait, all of them when none does."""

    shares = Shares(Slots(100_000.0))
    shares.demand("a").reported({SWEEP: 1000}, {})
    shares.demand("b").reported({CANCELLATION: 64}, {})
    given = shares.give("x", 0.0, 1.0)

    assert [lane for _, lane in given["b"]] == [CANCELLATION] * 64
    first = sorted((slot, lane) for slots in given.values() for slot, lane in slots)[:72]
    assert [lane for _, lane in first].count(SWEEP) in range(8, 11)


def test_members_have_their_turns() -> None:
    """The slots of a lane go round."""

    shares = Shares(Slots(100.0))
    for name in "abcd":
        shares.demand(name).reported({SWEEP: 50}, {})
    given = shares.give("a", 0.0, 1.0)

    assert {len(slots) for slots in given.values()} <= {3, 4}
    assert all(0.0 <= slot <= HORIZON + 0.03 for slots in given.values() for slot, _ in slots)


def test_a_lanes_turns_do_not_hang_on_the_other_lane() -> None:
    """A member with many cancellations does not put the sweep of others out of turn."""

    shares = Shares(Slots(100.0))
    for name in "abcd":
        shares.demand(name).reported({SWEEP: 50}, {})
    for second in range(60):
        shares.demand("b").wanted[CANCELLATION] = int(second % 3 == 0)
        shares.give("x", second, second + 0.031)  # one slot
        for demand in shares.demands.values():
            demand.seen = dict(demand.given)
    swept = {name: demand.given[SWEEP] for name, demand in shares.demands.items()}

    assert max(swept.values()) - min(swept.values()) <= 1


def test_a_silent_member_wastes_little() -> None:
    """A member that shows no sign of having seen its slots gets no more than a part of a second's."""

    shares, now, total = Shares(Slots(100.0)), 0.0, 0
    shares.demand("a").reported({SWEEP: 1000}, {})
    for _ in range(100):
        now += 0.05
        total += len(shares.give("x", now, now + 1).get("a", ()))

    assert total <= 30


def test_a_report_that_crosses_slots() -> None:
    """Slots that were on their way when a member reported are not given twice."""

    demand = Demand()
    demand.reported({SWEEP: 5}, {})
    demand.given[SWEEP], demand.wanted[SWEEP] = 3, 2
    demand.reported({SWEEP: 5}, {SWEEP: 1})

    assert demand.wanted[SWEEP] == 3
    assert demand.unseen() == 2


@given(
    st.floats(-1e5, 1e5),
    st.lists(st.tuples(st.floats(0.0001, 0.5), st.floats(0.0001, 0.5), st.floats(0, 5)), min_size=1, max_size=30),
)
def test_bounds_hold_the_offset(offset: float, exchanges: list[tuple[float, float, float]]) -> None:
    """Whatever the delays, the true offset lies between the bounds, and the doubt is at most the best round trip."""

    known, ours, best = Offset(), 1000.0, float("inf")
    for number, (there, back, pause) in enumerate(exchanges):
        ours += pause
        sent, heard = ours, ours + there - offset
        ours += there + back
        known.message(heard, ours, number, sent - heard)
        best = min(best, there + back)
        assert known.lower - 1e-6 <= offset <= known.upper + 1e-6
    assert known.doubt <= best + 1.0 * 1e-2


def test_a_clock_that_stood_still() -> None:
    """Messages that seem to come before they were sent make everything unknown until a new report is answered."""

    known = Offset()
    known.message(100.0, 1000.0, 5, 999.99 - 99.99)
    before = known.known
    known.message(103.0, 1000.5, 8)

    assert (before, known.known, known.answers) == (True, False, 8)


def test_a_late_slot_is_lost() -> None:
    """A slot is good from its moment on for a little while; with doubt, for less."""

    permits = Permits()
    permits.add([(10.0, SWEEP), (10.1, SWEEP), (10.2, SWEEP)], doubt=0.005)
    assert list(permits.due(9.9)) == []
    assert list(permits.due(10.0)) == [(SWEEP, 10.0 + LATE - 0.005)]
    assert [lane for lane, _ in permits.due(10.2)] == [SWEEP]
    assert permits.next() == float("inf")


# -- a member ---------------------------------------------------------------------------------------------------------


def member(name: str = "a", *, limit: float = 0.0, alone: bool = False) -> Member:
    """A member with a breaker of three failures and a cooldown of 5 s."""
    return Member(
        name,
        "client",
        MemberSettings(limit, 3, 5.0, 10.0),
        Breakers(3, 5.0, 20.0),
        random.Random(1),
        alone=alone,
    )


def said(member: Member) -> list[FleetMessage]:
    """What it has said since the last look."""
    found = [action.message for action in member.actions if isinstance(action, Say)]
    member.actions.clear()
    return found


def leading(now: float, **options: Any) -> Member:
    """A member that leads from ``now`` on."""
    found = member(**options)
    found.joined(now - 2.0)
    found.tick(now - 1.5)
    assert AcquireTerm(1) in found.actions
    found.took(now - 1.4, 1)
    beat = next(message for message in said(found) if isinstance(message, Beat))
    found.received(now - 1.39, Letter(found.me, "client", beat))
    assert ReadOrders() in found.actions
    found.rested(now - 1.3, None, {})
    keep(found, now)
    return found


def keep(member: Member, now: float) -> None:
    """Its lease goes on: it reads its own beats."""
    member.tick(now)
    for message in said(member):
        if isinstance(message, Beat):
            member.received(now, Letter(member.me, "client", message))
    member.actions.clear()


def following(now: float, **options: Any) -> Member:
    """A member that follows "b"."""
    found = member(**options)
    found.joined(now)
    found.received(now, Letter("b", "client", Beat(3, 1, 50.0, sure=True)))
    found.tick(now)
    found.actions.clear()
    return found


def test_alone() -> None:
    """Without a fleet a member gives itself slots at once, and its own probes."""

    alone = member(limit=10.0, alone=True)
    alone.waiting(100.0, SWEEP, 2)
    assert [action for action in alone.actions if isinstance(action, Permit)] == [Permit(SWEEP, 100.0 + LATE)]

    for _ in range(3):
        alone.attempted(101.0, SWEEP, Kind.TRANSIENT)
    assert (alone.breakers.state(SWEEP), alone.breakers.state(CANCELLATION)) == (State.OPEN, State.CLOSED)
    alone.tick(106.1)
    assert alone.probes(SWEEP, 106.1) == 3
    assert alone.take_probe(106.1, SWEEP)
    alone.attempted(106.2, SWEEP, Kind.DONE, probe=True)
    assert alone.breakers.state(SWEEP) is State.CLOSED
    assert not said(alone)


def test_all_is_well() -> None:
    """While all is well, good answers say nothing to anybody."""

    for one in (leading(100.0), following(100.0)):
        for _ in range(100):
            one.attempted(100.01, SWEEP, Kind.DONE)
        assert one.actions == []


def test_not_ready_before_it_knows() -> None:
    """A new member calls nobody before it knows what operators want."""

    new = member()
    new.joined(100.0)
    ready = [new.own.standing.sure]
    for number, sure in enumerate((False, True)):
        new.received(100.1, Letter("b", "client", Beat(3, number, 50.0, sure=sure)))
        ready.append(new.own.standing.sure)

    assert ready == [False, False, True]
    assert Changed() in new.actions


def test_no_connection_no_slots() -> None:
    """Under a limit, who has lost the fleet gets no slot; without one, its own breaker decides."""

    lost = following(100.0, limit=10.0)
    lost.lost(101.0)
    lost.waiting(101.0, SWEEP, 5)
    lost.tick(110.0)
    assert not [action for action in lost.actions if isinstance(action, Permit)]
    assert lost.limit(110.0) == 10.0

    for _ in range(3):
        lost.attempted(111.0, SWEEP, Kind.TRANSIENT)
    assert lost.breakers.state(SWEEP) is State.OPEN


def test_failures_of_all_are_counted_together() -> None:
    """The failures of three members open the breaker of their lane, and every member is informed."""

    one = leading(100.0)
    for name in ("b", "c"):
        one.received(100.1, Letter(name, "client", MemberReport(1, 1, failures={SWEEP: 1}, streaks={SWEEP: 1})))
    assert one.breakers.state(SWEEP) is State.CLOSED
    one.attempted(100.2, SWEEP, Kind.TRANSIENT)
    assert one.breakers.state(SWEEP) is State.OPEN
    one.tick(100.3)
    beat = [message for message in said(one) if isinstance(message, Beat)][-1]
    assert beat.breakers[SWEEP].state == State.OPEN
    assert beat.breakers[CANCELLATION].state == State.CLOSED


def test_a_good_answer_of_anybody_counts() -> None:
    """A good answer of another member, of another lane even, resets the count and closes the breaker."""

    one = leading(100.0)
    for name in ("b", "c", "b"):
        one.received(100.1, Letter(name, "client", MemberReport(1, 1, failures={SWEEP: 1})))
    assert one.breakers.state(SWEEP) is State.OPEN
    one.received(100.2, Letter("c", "client", Good(CANCELLATION)))

    assert one.breakers.state(SWEEP) is State.CLOSED
    assert one.breakers.failures(SWEEP) == 0


def test_a_good_answer_of_the_leader_counts() -> None:
    """So it does when others have failed, and the leader itself has not."""

    one = leading(100.0)
    one.received(100.1, Letter("b", "client", MemberReport(1, 1, failures={SWEEP: 2})))
    one.attempted(100.2, SWEEP, Kind.DONE)

    assert one.breakers.failures(SWEEP) == 0


def test_an_old_good_answer_counts_only_if_it_was_later() -> None:
    """A good answer from before the failures does not close the breaker."""

    one = leading(100.0)
    for name in ("b", "c", "b"):
        one.received(100.1, Letter(name, "client", MemberReport(1, 1, failures={SWEEP: 1})))
    one.received(100.2, Letter("c", "client", Good(SWEEP, age=1.0)))
    assert one.breakers.state(SWEEP) is State.OPEN


def test_a_silent_success_is_told_when_it_matters() -> None:
    """Who has had a good answer since the failures began says so when it hears of them."""

    one = following(100.0)
    one.attempted(100.5, SWEEP, Kind.DONE)
    one.received(100.6, Letter("b", "client", Beat(3, 2, 50.6, breakers={SWEEP: BreakerState(0, 0, 0, 2, 0.4)})))
    (good,) = [message for message in said(one) if isinstance(message, Good)]
    assert good.age == pytest.approx(0.1)
    one.attempted(100.7, SWEEP, Kind.DONE)
    assert [type(message) for message in said(one)] == [Good]


def open_together(one: Member, now: float) -> None:
    """Three members fail, so its breaker of the sweep lane opens."""
    for name in ("b", "c", "d"):
        report = MemberReport(1, 1, failures={SWEEP: 1}, streaks={SWEEP: 1}, since={SWEEP: 0.1}, candidates={SWEEP: 2})
        one.received(now, Letter(name, "client", report))
    assert one.breakers.state(SWEEP) is State.OPEN


def test_three_probes_of_the_whole_fleet() -> None:
    """After the cooldown three members probe with one command each, and no further one before they are back."""

    one = leading(100.0)
    open_together(one, 100.1)
    for name in ("b", "c", "d"):
        one.received(104.9, Letter(name, "client", MemberReport(1, 2, candidates={SWEEP: 2})))
    keep(one, 104.9)
    one.tick(105.2)
    probes = [action for action in one.actions if isinstance(action, Say) and isinstance(action.message, Probe)]
    assert sorted(str(action.to) for action in probes) == ["b", "c", "d"]
    one.actions.clear()
    one.tick(105.3)
    assert not [message for message in said(one) if isinstance(message, Probe)]


def test_a_probe_that_finds_nothing_goes_on() -> None:
    """A member that has no command for a probe gives it back, and another gets it."""

    one = following(100.0)
    one.received(100.1, Letter("b", "client", Probe(3, 17, SWEEP)))
    assert one.probes(SWEEP, 100.1) == 1
    one.tick(102.5)
    assert one.probes(SWEEP, 102.5) == 0
    assert Probed(17, SWEEP, "lost") in said(one)


def test_a_probe_comes_back() -> None:
    """The verdict on a probe is told to the leader, a good one to all."""

    one = following(100.0)
    for number, kind in ((1, Kind.TRANSIENT), (2, Kind.DONE)):
        one.received(100.1, Letter("b", "client", Probe(3, number, SWEEP)))
        assert one.take_probe(100.1, SWEEP)
        one.attempted(100.2, SWEEP, kind, probe=True)
        heard = said(one)
        assert Probed(number, SWEEP, kind.label) in heard
        assert (Good(SWEEP, True) in heard) == kind.final


def test_one_that_fails_alone() -> None:
    """When one member alone has failed, another tests the gateway at once; its success makes the first one sick."""

    one = leading(100.0)
    one.received(100.0, Letter("c", "client", MemberReport(1, 1, candidates={SWEEP: 1})))
    report = MemberReport(1, 1, failures={SWEEP: 3}, streaks={SWEEP: 3}, since={SWEEP: 0.5}, unreached=3)
    one.received(100.1, Letter("b", "client", report))
    (probe,) = [action for action in one.actions if isinstance(action, Say) and isinstance(action.message, Probe)]
    assert probe.to == "c"
    one.tick(100.13)
    beat = [message for message in said(one) if isinstance(message, Beat)][-1]
    assert beat.sick == ("b",)

    assert isinstance(probe.message, Probe)
    one.received(100.2, Letter("c", "client", Good(SWEEP, True)))
    one.received(100.2, Letter("c", "client", Probed(probe.message.number, SWEEP, "done")))
    one.tick(100.3)
    beat = [message for message in said(one) if isinstance(message, Beat)][-1]
    assert (beat.sick, one.breakers.state(SWEEP)) == (("b",), State.CLOSED)

    one.received(100.4, Letter("b", "client", replace(report, number=2)))
    assert one.breakers.failures(SWEEP) == 0, "failures of a sick member do not count"


def test_one_that_fails_first() -> None:
    """When the second one fails too it is an outage: nobody is sick, and the first cooldown begins."""

    one = leading(100.0)
    one.received(100.0, Letter("c", "client", MemberReport(1, 1, candidates={SWEEP: 1})))
    one.received(
        100.1, Letter("b", "client", MemberReport(1, 1, failures={SWEEP: 3}, streaks={SWEEP: 3}, since={SWEEP: 0.5}))
    )
    (probe,) = [message for message in said(one) if isinstance(message, Probe)]
    one.received(100.2, Letter("c", "client", Probed(probe.number, SWEEP, "transient")))
    keep(one, 100.3)

    assert one.breakers.state(SWEEP) is State.OPEN
    assert one.breakers.probe_at(SWEEP) == pytest.approx(105.2)
    assert one.breakers.cooldown(SWEEP) == 5.0
    one.tick(100.6)
    assert [message.sick for message in said(one) if isinstance(message, Beat)] == [()]


def test_another_lane_proves_nothing_against_a_member() -> None:
    """Failures in one lane do not make a member sick while others succeed in another lane only."""

    one = leading(100.0)
    one.received(100.0, Letter("c", "client", MemberReport(1, 1)))
    one.received(
        100.1, Letter("b", "client", MemberReport(1, 1, failures={SWEEP: 2}, streaks={SWEEP: 20}, since={SWEEP: 5}))
    )
    one.received(100.2, Letter("c", "client", Good(CANCELLATION)))
    keep(one, 100.3)
    assert one.leader.peers["b"].streaks == {SWEEP: 20}
    one.tick(100.6)
    assert [message.sick for message in said(one) if isinstance(message, Beat)] == [()]


def test_a_sick_member_tests_itself() -> None:
    """It tests itself once a cooldown, and a good answer makes it work again; it does not believe old news then."""

    one = following(100.0)
    one.received(100.1, Letter("b", "client", Beat(3, 2, 50.1, sick=("a",), sure=True)))
    assert one.own.health.sick
    assert not one.own.health.test_due(105.0)
    assert one.own.health.test_due(105.2)
    one.own.health.testing = True
    assert not one.own.health.test_due(105.2)
    one.tested(106.0, good=False)
    assert not one.own.health.test_due(110.9)
    one.own.health.testing = True
    one.attempted(111.5, CANCELLATION, Kind.DONE, probe=True)
    cured = not one.own.health.sick
    one.received(111.6, Letter("b", "client", Beat(3, 3, 61.5, sick=("a",), sure=True)))
    assert (cured, one.own.health.sick) == (True, False)


def test_a_sick_leader_resigns() -> None:
    """A leader that is sick informs every member and lets another one lead."""

    one = leading(100.0)
    one.received(100.0, Letter("b", "client", MemberReport(1, 1)))
    for second in range(3):
        one.attempted(100.1 + second / 100, SWEEP, Kind.TRANSIENT, reached=False)
    one.received(100.3, Letter("b", "client", Good(SWEEP)))

    heard = said(one)
    assert Goodbye(1, leaves=False) in heard
    assert [message.sick for message in heard if isinstance(message, Beat)][-1] == ("a",)
    assert one.own.health.sick
    assert one.terms.role is Role.FOLLOWS


def test_a_hold_is_for_all() -> None:
    """A throttled answer to anybody holds everybody; many at once are reported once."""

    one = following(100.0)
    for _ in range(50):
        one.throttled(100.1, 10.0)
    assert said(one) == [Throttled(10.0)]
    one.received(101.0, Letter("c", "client", Throttled(1e9)))
    assert one.own.standing.held_until == 701.0


def test_the_smallest_limit_holds() -> None:
    """The limit is the smallest of the members', and an operator's in place of all."""

    one = leading(100.0, limit=50.0)
    one.received(100.1, Letter("b", "client", Hello(20.0)))
    one.received(100.1, Letter("c", "client", Hello(0.0)))
    assert one.limit(103.0) == 20.0
    one.received(103.0, Letter("b", "client", Goodbye()))
    assert one.limit(103.1) == 50.0
    one.received(104.0, Letter("tool", "", Ordered(OperatorOrders(1, limit=Limit(80.0)))))
    assert one.limit(104.1) == 80.0


def test_old_orders_change_nothing() -> None:
    """Of two orders the later revision holds, in whatever order they come."""

    one = leading(100.0)
    one.received(100.1, Letter("tool", "", Ordered(OperatorOrders(2, {SWEEP: Pause()}))))
    one.received(100.2, Letter("tool", "", Ordered(OperatorOrders(1))))
    assert one.own.standing.paused(SWEEP, 100.3)
    assert not one.own.standing.paused(CANCELLATION, 100.3)


def test_a_pause_ends_by_itself() -> None:
    """A pause for some seconds is over after them, for those too who heard of it from the leader."""

    one = following(100.0)
    orders = OperatorOrders(1, {SWEEP: Pause(seconds=60.0)})
    one.received(100.1, Letter("b", "client", Beat(3, 2, 50.1, sure=True, orders=orders, pauses={SWEEP: 20.0})))
    assert one.own.standing.paused(SWEEP, 120.0)
    one.tick(120.2)
    assert not one.own.standing.paused(SWEEP, 120.2)
    assert Changed() in one.actions


def test_another_client_is_another_fleet() -> None:
    """Members with another client id at the gateway are not listened to."""

    one = member()
    one.joined(100.0)
    one.received(100.1, Letter("b", "another", Beat(3, 1, 50.0, sure=True)))

    assert not one.own.standing.sure
    assert one.terms.leader is None


def test_slots_for_others() -> None:
    """The leader gives slots to who wants them, and the member calls at their moments of its own clock."""

    one, other = leading(100.0, limit=10.0), following(7000.0, limit=10.0)
    other.follower.beat = replace(other.follower.beat or Beat(3, 1, 0.0), limit=10.0)
    other.waiting(7000.0, SWEEP, 3)
    other.tick(7000.06)
    report = next(message for message in said(other) if isinstance(message, MemberReport))
    one.received(100.001, Letter("o", "client", replace(report, term=1)))
    grant = next(message for message in said(one) if isinstance(message, MemberGrant))
    other.received(7000.062, Letter("b", "client", replace(grant, term=3)))
    other.tick(7000.2)
    assert other.limit(7000.2) == 10.0
    first = grant.slots[0][0] - 100.001 + 7000.062
    other.tick(first)
    calls = [action for action in other.actions if isinstance(action, Permit)]
    assert len(calls) <= 1


def test_a_member_that_comes_back_gets_slots() -> None:
    """A member that lost its connection counts its slots again, and so does the leader."""

    one = leading(100.0, limit=10.0)
    one.received(100.0, Letter("b", "client", Hello(10.0)))
    one.received(100.1, Letter("b", "client", MemberReport(1, 1, wanted={SWEEP: 3})))
    assert any(isinstance(message, MemberGrant) for message in said(one))
    one.received(101.0, Letter("b", "client", Hello(10.0)))
    one.received(101.1, Letter("b", "client", MemberReport(1, 1, wanted={SWEEP: 1})))
    keep(one, 101.2)

    assert one.leader.shares.demands["b"].unseen() <= 1


def test_an_undelivered_message() -> None:
    """When the leader's queue is gone, its follower reaches for the next term at once."""

    one = following(100.0)
    one.undelivered(100.1, "b")

    assert AcquireTerm(4) in one.actions


# -- any order of events ----------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """One member of a fleet, and whatever others may say to it at whatever time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.one = member("a", limit=10.0)
        self.asked: list[int] = []
        self.numbers: list[tuple[int, int]] = []
        self.slots: list[float] = []
        self.joined = False

    def look(self) -> None:
        for action in self.one.actions:
            match action:
                case AcquireTerm(term):
                    self.asked.append(term)
                case Permit(_, until):
                    assert until - LATE - 1e-9 <= self.now <= until
                    self.slots.append(self.now)
                case Say(None, Beat() as beat):
                    self.numbers.append((beat.term, beat.number))
        self.one.actions.clear()

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.2, 0.5, 1.1, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.one.tick(self.now)
        self.look()

    @precondition(lambda self: not self.joined)
    @rule()
    def join(self) -> None:
        self.joined = True
        self.one.joined(self.now)
        self.look()

    @precondition(lambda self: self.joined)
    @rule()
    def lose(self) -> None:
        self.joined = False
        self.asked.clear()
        self.numbers.clear()
        self.one.lost(self.now)
        self.look()

    @precondition(lambda self: self.asked)
    @rule(given_=st.booleans())
    def answer_acquire(self, given_: bool) -> None:
        term = self.asked.pop(0)
        (self.one.took if given_ else self.one.taken)(self.now, term)
        self.look()

    @precondition(lambda self: self.numbers)
    @rule()
    def echo(self) -> None:
        term, number = self.numbers.pop(0)
        self.one.received(self.now, Letter(self.one.me, "client", Beat(term, number, 0.0)))
        self.look()

    @precondition(lambda self: not self.joined)
    @rule()
    def rename(self) -> None:
        self.one.rename(f"{self.one.me}.2")
        self.look()

    @precondition(lambda self: self.joined)
    @rule(
        sender=st.sampled_from(["b", "c"]),
        message=st.one_of(
            st.builds(
                Beat,
                term=st.integers(1, 9),
                number=st.integers(0, 99),
                at=SECONDS,
                sure=st.booleans(),
                sick=st.sampled_from([(), ("a",), ("b",)]),
                breakers=st.dictionaries(
                    st.sampled_from(LANES),
                    st.builds(BreakerState, st.integers(-1, 3), st.floats(0, 9), st.floats(0, 9)),
                ),
            ),
            st.builds(
                MemberReport,
                term=st.integers(0, 9),
                number=st.integers(0, 99),
                wanted=st.dictionaries(st.sampled_from(LANES), st.integers(-5, 50)),
                failures=st.dictionaries(st.sampled_from([*LANES, "other"]), st.integers(-1, 5)),
                streaks=st.dictionaries(st.sampled_from([*LANES, "other"]), st.integers(-1, 5)),
                since=st.dictionaries(st.sampled_from(LANES), st.floats(-1, 5)),
                sick=st.booleans(),
            ),
            st.builds(
                MemberGrant,
                term=st.integers(1, 9),
                at=SECONDS,
                answers=st.integers(0, 99),
                heard=SECONDS,
                slots=st.just(((1.0, SWEEP), (1.1, "other"))),
            ),
            st.builds(Probe, st.integers(1, 9), st.integers(0, 99), st.sampled_from([*LANES, "other"])),
            st.builds(Probed, st.integers(0, 99), st.sampled_from(LANES), st.sampled_from(["lost", "done", "x"])),
            st.builds(Good, st.sampled_from([None, *LANES, "other"]), st.booleans(), st.floats(-1, 9)),
            st.builds(Throttled, st.floats(-5, 5)),
            st.builds(Goodbye, st.integers(0, 9), st.booleans()),
            st.just(Hello(5.0)),
        ),
    )
    def hear(self, sender: str, message: FleetMessage) -> None:
        self.one.received(self.now, Letter(sender, "client", message))
        self.look()

    @rule(lane=st.sampled_from([*LANES, None]), kind=st.sampled_from(Kind), reached=st.booleans())
    def attempt(self, lane: str | None, kind: Kind, reached: bool) -> None:
        self.one.attempted(self.now, lane, kind, reached=reached)
        self.look()

    @rule(lane=st.sampled_from(LANES), calls=st.integers(0, 20))
    def want(self, lane: str, calls: int) -> None:
        self.one.waiting(self.now, lane, calls)
        self.look()

    @precondition(lambda self: any(self.one.probes(lane, self.now) for lane in LANES))
    @rule(kind=st.sampled_from([*Kind, None]))
    def probe(self, kind: Kind | None) -> None:
        lane = next(lane for lane in LANES if self.one.probes(lane, self.now))
        assert self.one.take_probe(self.now, lane)
        if kind is None:
            self.one.probe_lost(self.now, lane)
        else:
            self.one.attempted(self.now, lane, kind, probe=True)
        self.look()

    @precondition(lambda self: self.one.own.health.test_due(self.now))
    @rule(good=st.booleans())
    def test(self, good: bool) -> None:
        self.one.own.health.testing = True
        self.one.tested(self.now, good=good)
        self.look()

    @invariant()
    def slots_are_apart(self) -> None:
        assert all(later - earlier > 0.07 for earlier, later in pairwise(self.slots))

    @invariant()
    def few_probes(self) -> None:
        assert all(
            self.one.probes(lane, self.now) <= 3 or self.one.terms.leader not in (None, self.one.me) for lane in LANES
        )

    @invariant()
    def a_lease_needs_an_echo(self) -> None:
        assert self.one.terms.lease <= self.now + LEASE

    @invariant()
    def something_is_to_come(self) -> None:
        assert self.now <= self.one.next(self.now) <= self.now + (0.2 if self.joined else 60.0)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
