"""Fleets over long times in a virtual world of kills, freezes, partitions, late and lost messages: see `tests.fleet`.

The world itself raises when two lead, when a second at the gateway holds more calls than the limit, and when a lane has
too many probes. The last tests show that it would: a fleet with a mistake in it does not get through.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fleet import Broken, World
from worker.core.breaker import Breakers, State
from worker.core.fleet import follower, permits, terms
from worker.core.fleet.messages import Limit, OperatorOrders, Pause
from worker.core.lanes import LANES, SWEEP


@pytest.mark.parametrize("seed", range(3))
def test_a_limited_fleet(seed: int) -> None:
    """Minutes of faults: one leader, never more calls in a second than allowed, and nobody waits for ever."""

    world = World(seed, 5, 60.0)
    world.run(150.0)
    world.calm(20.0)

    world.check_all_work(within=2.0)
    assert world.most <= 60
    assert world.terms > 3, "too little has happened"


def test_many_members() -> None:
    """The same with fifty members, and with messages that get lost."""

    world = World(7, 50, 20.0, loss=0.002)
    world.run(60.0)
    world.calm(25.0)

    world.check_all_work(within=8.0)


@pytest.mark.parametrize("seed", [11, 12])
def test_a_fleet_without_a_limit(seed: int) -> None:
    """Outages and members with a broken way out: few failures, few probes, and everybody goes on."""

    world = World(seed, 6, 0.0)
    world.run(200.0)
    world.calm(20.0)

    world.check_all_work(within=5.0)


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.5, 7.0, 100.0, 500.0])
def test_the_limit_is_used(limit: float) -> None:
    """While work waits, at least 95 % of what a second may hold is called for, and never more."""

    world = World(1, 3, limit, faults=False, senders=48)
    world.run(5.0)
    before = world.total
    world.run(25.0)

    assert (world.total - before) / 20.0 >= 0.95 * permits.whole_limit(limit) - 1 / 20
    assert world.most <= max(1, permits.whole_limit(limit))


def longest_gap(world: World, seconds: float) -> float:
    """The longest time without a call from now on."""
    end, longest, last, total = world.now + seconds, 0.0, world.now, world.total
    while world.now < end:
        world.run(world.now + 0.01)
        if world.total > total:
            longest, last, total = max(longest, world.now - last), world.now, world.total
    return max(longest, world.now - last)


@pytest.mark.parametrize(("how", "within"), [("killed", 0.9), ("frozen", 1.6), ("drained", 0.6)])
def test_a_new_leader(how: str, within: float) -> None:
    """Without its leader a fleet goes on within so many seconds."""

    world = World(5, 4, 100.0, faults=False)
    world.run(10.0)
    leader = next(node for node in world.nodes if node.name == world.leaders()[0])
    match how:
        case "killed":
            leader.kill()
        case "frozen":
            leader.frozen = world.now + 8.0
        case "drained":
            leader.do(lambda: leader.member.leave(leader.clock))

    assert longest_gap(world, 20.0) < within
    assert world.leaders() != [leader.name]


def test_an_outage() -> None:
    """An outage costs the fleet its threshold, its probes and what was out; then everybody goes on at once."""

    world = World(2, 4, 40.0, faults=False)
    world.run(10.0)
    world.outage, out = True, sum(node.out for node in world.nodes)
    world.run(50.0)
    probes = len(world.probes[SWEEP])
    assert world.failed <= 10 * len(LANES) + out + 3 * len(LANES) * 6
    assert probes

    world.outage = False
    while any(node.member.breakers.state(lane) is not State.CLOSED for node in world.nodes for lane in LANES):
        world.run(world.now + 0.05)
        assert world.now < 80.0
    first = world.now
    world.run(first + 1.0)
    world.check_all_work(within=1.0)


def test_a_sick_member() -> None:
    """Who alone does not reach the gateway is sick, does not stop the others, and works again after its cure."""

    world = World(3, 3, 0.0, faults=False)
    world.run(10.0)
    sick = world.nodes[1]
    sick.cut = True
    world.run(20.0)
    assert sick.member.own.health.sick
    assert [node.member.own.health.sick for node in world.nodes].count(True) == 1
    assert all(node.member.breakers.state(SWEEP) is State.CLOSED for node in world.nodes if node is not sick)

    sick.cut = False
    world.run(20.0 + 2 * 5.0 + 1.0)
    world.check_all_work(within=5.0)


def test_an_operators_pause_reaches_all() -> None:
    """A pause holds everybody within two seconds, also who was started later, and ends by itself."""

    world = World(4, 5, 50.0, faults=False)
    world.run(10.0)
    late = world.nodes[0]
    late.kill()
    pauses = {lane: Pause("ops@host", "maintenance", 0.0, 30.0) for lane in LANES}
    world.order(OperatorOrders(1, pauses))
    world.run(12.0)
    before = world.total
    late.restart()
    world.run(38.0)
    assert world.total == before

    world.run(45.0)
    assert world.total > before


def test_an_operators_limit_reaches_all() -> None:
    """A limit holds for everybody, in place of the settings."""

    world = World(4, 5, 50.0, faults=False)
    world.run(10.0)
    world.order(OperatorOrders(1, limit=Limit(10.0, "ops@host")))
    world.run(12.0)
    before = world.total
    world.run(42.0)

    assert 9.5 <= (world.total - before) / 30.0 <= 10.0


# -- the world notices ------------------------------------------------------------------------------------------------


def many_worlds() -> None:
    """Enough of them for every mistake below; all go on together, since most are found early in one of them."""
    worlds = [World(seed, 4, 60.0) for seed in range(12)]
    for until in range(10, 201, 10):
        for world in worlds:
            world.run(until)


Patch = Callable[[pytest.MonkeyPatch], None]

MISTAKES: dict[str, Patch] = {
    "a leader never stops": lambda patch: patch.setattr(terms, "LEASE", 1e9),
    "others begin before the lease is over": lambda patch: (
        patch.setattr(terms, "SILENT", 0.3),
        patch.setattr(terms, "CHECK", 0.25),
        patch.setattr(terms, "SETTLE", 0.0),
    )[0],
    "the first slot comes at once": lambda patch: patch.setattr(
        terms.Terms, "begins", property(lambda _: 0.0, lambda *_: None)
    ),
    "late slots are used": lambda patch: patch.setattr(permits, "LATE", 3.0),
    "slots are too close": lambda patch: patch.setattr(permits, "PACE", 1.04),
    "probes are not counted": lambda patch: patch.setattr(
        Breakers, "probes_due", lambda self, lane, _now: 3 * (self.state(lane) is not State.CLOSED)
    ),
    "everybody probes while nobody leads": lambda patch: patch.setattr(terms.Terms, "leads", lambda *_: True),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The world does not let a fleet with this mistake through."""

    MISTAKES[mistake](monkeypatch)

    with pytest.raises(Broken):
        many_worlds()


def test_an_unfair_leader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that always serves the first member lets others wait, and that is seen."""

    choose = permits.Shares._choose

    def the_first(shares: permits.Shares, me: str, allowed: int) -> tuple[str, str] | None:
        shares._last.clear()
        return choose(shares, me, allowed)

    monkeypatch.setattr(permits.Shares, "_choose", the_first)
    world = World(1, 8, 20.0, faults=False)
    world.run(30.0)

    with pytest.raises(Broken):
        world.check_all_work(within=10.0)


def test_constants_fit_together() -> None:
    """A second at the gateway never holds more than the limit, and an old leader is silent before a new one speaks."""

    assert permits.PACE * (1 + permits.LATE + 0.015) < 1
    assert terms.LEASE < terms.SILENT
    assert terms.SETTLE > permits.HORIZON + permits.LATE
    assert follower.GONE > 2 * follower.REPORT
