"""A fleet in virtual time: members, a broker between them, and a gateway that counts. Every run is decided by its seed.

`python -m tests.fleet --members 50 --hours 2 --seed 1` runs one and says what it saw.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from worker.core.breaker import Breakers, State
from worker.core.fleet.member import Member
from worker.core.fleet.messages import Letter, OperatorOrders, Ordered
from worker.core.fleet.own import Changed, MemberSettings, Permit, ReadOrders, Say
from worker.core.fleet.terms import AcquireTerm, ReleaseTerm, Role
from worker.core.lanes import CANCELLATION, LANES, SWEEP
from worker.core.verdict import Kind

COOLDOWN: Final = 5.0
THRESHOLD: Final = 10
HEARTBEAT: Final = 20.0


class Broken(AssertionError):
    """The fleet did what it must never do."""


class Node:
    """One process: a member, its clock, its connection, and senders with work to do."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.name = f"m{number:03}"
        rng = world.rng
        self.base = rng.uniform(0, 1e5)
        self.drift = rng.uniform(-5e-5, 5e-5)
        self.frozen = 0.0
        self.cut = False
        self.alive = True
        self.connection = 0
        self.last_out = 0.0
        self.last_in = 0.0
        self.held_back = 0.0  # the network delivers nothing before
        self.out = 0
        self.sweep = number % 5 != 4
        self.cancellations = 0
        self.called = world.now
        self.rules = MemberSettings(world.limit, THRESHOLD, COOLDOWN, 10.0)
        self.member = self._member()
        self.timer = 0

    def _member(self) -> Member:
        return Member(
            self.name,
            "client",
            self.rules,
            Breakers(THRESHOLD, COOLDOWN, 4 * COOLDOWN),
            self.world.rng,
            alone=False,
        )

    @property
    def clock(self) -> float:
        return self.base + self.world.now * (1 + self.drift)

    def do(self, action: Callable[[], None]) -> None:
        """Now, or as soon as the process runs again."""
        if not self.alive:
            return
        if self.frozen > self.world.now:
            self.world.at(self.frozen + 1e-6, lambda: self.do(action))
            return
        action()
        self.carry_out()

    def carry_out(self) -> None:
        while self.member.actions:
            action = self.member.actions.pop(0)
            match action:
                case Say(to, message):
                    self.world.publish(self, to, Letter(self.name, "client", message))
                case AcquireTerm(term):
                    self.world.acquire_term(self, term)
                case ReleaseTerm(term):
                    self.world.release_term(self, term)
                case Permit(_, until):
                    self.permitted(until)
                case ReadOrders():
                    self.world.at(
                        self.world.now + 0.003,
                        lambda: self.do(lambda: self.member.rested(self.clock, self.world.orders, {})),
                    )
                case Changed() | Letter():
                    pass
        self.look()
        if self.member.actions:
            self.carry_out()
        else:
            self.wind()

    def wind(self) -> None:
        self.timer += 1
        mine = self.timer

        def ring() -> None:
            if mine == self.timer:
                self.do(lambda: self.member.tick(self.clock))

        clock = self.clock
        delay = max(0.0, self.member.next(clock) - clock)
        self.world.at(self.world.now + delay + self.world.rng.uniform(0, 0.0015), ring)

    # -- work ---------------------------------------------------------------------------------------------------------

    def may(self, lane: str) -> bool:
        member = self.member
        return (
            member.own.standing.sure
            and member.terms.role is not Role.APART
            and not member.own.health.sick
            and not member.own.left
            and member.breakers.state(lane) is State.CLOSED
            and not member.own.standing.paused(lane, self.clock)
            and self.clock >= member.own.standing.held_until
        )

    def look(self) -> None:
        """What the dispatcher of a process does."""
        member, clock = self.member, self.clock
        if member.terms.role is Role.APART:
            return
        if member.own.health.test_due(clock):
            member.own.health.testing = True
            good = not self.cut and not self.world.outage
            self.world.at(self.world.now + 0.05, lambda: self.do(lambda: member.tested(self.clock, good=good)))
        for lane in LANES:
            member.candidates(clock, lane, self.commands(lane))
        probing = {lane: min(member.probes(lane, clock), self.commands(lane)) for lane in LANES}
        if self.world.limit:
            for lane in LANES:
                free = self.world.senders - self.out
                wants = min(free, self.commands(lane)) if self.may(lane) else 0
                self.want(lane, max(0, wants) + probing[lane])
        else:
            for lane in LANES:
                for _ in range(probing[lane]):
                    self.probe(lane)
            while self.out < self.world.senders and self.world.rng.random() < 0.5:
                open_ = [lane for lane in LANES if self.may(lane) and self.commands(lane)]
                if not open_:
                    break
                self.start(open_[0], probe=False)

    def want(self, lane: str, calls: int) -> None:
        if calls != self.member.own.permits.wanted[lane]:
            self.member.waiting(self.clock, lane, calls)

    def commands(self, lane: str) -> int:
        return self.cancellations if lane == CANCELLATION else 100 * self.sweep

    def permitted(self, until: float) -> None:
        """A slot has come."""
        if self.clock > until:
            return
        self.world.slots_fired += 1
        if any(self.probe(lane) for lane in LANES if self.commands(lane)):
            return
        if self.cancellations and self.may(CANCELLATION) and self.out < self.world.senders:
            self.start(CANCELLATION, probe=False)
        elif self.sweep and self.may(SWEEP) and self.out < self.world.senders:
            self.start(SWEEP, probe=False)

    def probe(self, lane: str) -> bool:
        """Sends a probe, if one is ours now: one that an earlier leader gave is void."""
        if not self.member.take_probe(self.clock, lane):
            return False
        self.start(lane, probe=True)
        return True

    def start(self, lane: str, *, probe: bool) -> None:
        world = self.world
        self.out += 1
        self.called = world.now
        if lane == CANCELLATION and self.cancellations:
            self.cancellations -= 1
        if not self.cut:
            world.at(world.now + world.rng.uniform(0.0005, 0.006), lambda: world.arrived(self, lane, probe))
        if probe:
            world.probe_started(lane)
        good = not self.cut and not world.outage
        takes = world.rng.uniform(0.01, 0.1)
        member = self.member

        def back() -> None:
            if member is not self.member:
                return
            self.out -= 1
            kind = Kind.DONE if good else Kind.TRANSIENT
            if not good:
                world.failed += 1
            member.attempted(self.clock, lane, kind, probe=probe, reached=not self.cut)

        world.at(world.now + takes, lambda: self.do(back))

    # -- faults -------------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        if not self.alive or self.connection:
            return
        if self.world.broker_down > self.world.now:
            self.world.at(self.world.broker_down + self.world.rng.uniform(0, 1), self.connect)
            return
        self.connection = next(self.world.connections)
        self.last_in = self.last_out = self.world.now
        self.do(lambda: self.member.joined(self.clock))

    def disconnect(self, *, again: bool) -> None:
        """Its connection ends: the broker forgets it, the process hears of it."""
        if not self.connection:
            return
        self.world.closed(self)
        self.connection = 0
        if again:
            self.do(lambda: self.member.lost(self.clock))
            self.world.at(self.world.now + self.world.rng.uniform(0.05, 2.0), self.connect)

    def kill(self) -> None:
        self.disconnect(again=False)
        self.alive = False

    def restart(self) -> None:
        self.alive, self.frozen, self.held_back, self.cut = True, 0.0, 0.0, False
        self.out = 0
        self.base = self.world.rng.uniform(0, 1e5)
        self.called = self.world.now
        self.member = self._member()
        self.connect()


class World:
    """Time, the broker and the gateway."""

    def __init__(
        self, seed: int, members: int, limit: float, *, faults: bool = True, loss: float = 0.0, senders: int = 4
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.limit = limit
        self.loss = loss
        self.senders = senders
        self.orders: OperatorOrders | None = None
        self.outage = False
        self.broker_down = 0.0
        self.connections = itertools.count(1)
        self.failed = 0
        self.slots_fired = 0
        self.calls: deque[float] = deque()
        self.total = 0
        self.most = 0
        self.probes: dict[str, deque[float]] = {lane: deque() for lane in LANES}
        self.holders: dict[int, tuple[str, int]] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.events = 0
        self.terms = 0
        self.counts = dict.fromkeys(("kill", "freeze", "partition", "late", "outage", "cut", "broker", "restart"), 0)
        self.nodes = [Node(self, number) for number in range(members)]
        for node in self.nodes:
            self.at(self.rng.uniform(0, 2), node.connect)
            self._cancel_later(node)
        self.quiet = 0.0
        """When the last fault was over."""
        self._faults = faults
        if faults:
            self.at(5.0, self._fault)

    def at(self, moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(moment, self.now), next(self._order), action))

    def calm(self, seconds: float) -> None:
        """No fault begins any more, and so much time passes after the last one."""
        self._faults = False
        self.run(max(self.now, self.quiet) + seconds)

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
            self.events += 1
        self.now = until

    # -- what must never be -------------------------------------------------------------------------------------------

    def leaders(self) -> list[str]:
        """Who leads, as far as it can give slots that anybody would use."""
        return [
            node.name
            for node in self.nodes
            if node.alive and node.member.terms.leads(node.clock) and node.clock >= node.member.terms.begins
        ]

    def check(self) -> None:
        leaders = self.leaders()
        if len(leaders) > 1:
            raise Broken(f"{self.now:.3f}: {leaders} lead")

    def check_all_work(self, within: float) -> None:
        """Everybody is connected, well, lets every lane go, and has called lately if it has work."""
        for node in self.nodes:
            member, silent = node.member, self.now - node.called
            well = node.connection and not member.own.health.sick and member.breakers.worst is State.CLOSED
            if not well or (node.sweep and silent > within):
                raise Broken(f"{self.now:.3f}: {node.name} does not work ({silent:.1f} s without a call)")
        if len(self.leaders()) != 1:
            raise Broken(f"{self.now:.3f}: {self.leaders()} lead")

    def arrived(self, node: Node, lane: str, probe: bool) -> None:
        """A call at the gateway's edge."""
        self.calls.append(self.now)
        self.total += 1
        while self.calls[0] <= self.now - 1.0:
            self.calls.popleft()
        self.most = max(self.most, len(self.calls))
        if self.limit and len(self.calls) > max(1, self.limit):
            raise Broken(f"{self.now:.3f}: {len(self.calls)} calls in one second, {self.limit} are allowed")

    def probe_started(self, lane: str) -> None:
        """No more than three of a lane within a cooldown, and one more that finds out who is sick."""
        probes = self.probes[lane]
        probes.append(self.now)
        while probes[0] <= self.now - 0.95 * COOLDOWN:
            probes.popleft()
        if len(probes) > 4:
            raise Broken(f"{self.now:.3f}: {len(probes)} probes of {lane} within one cooldown")

    # -- the broker ---------------------------------------------------------------------------------------------------

    def publish(self, node: Node, to: str | None, letter: Letter) -> None:
        connection = node.connection
        if not connection:
            return
        node.last_out = max(node.last_out, self.now + self.rng.uniform(0.0003, 0.003), node.held_back)
        self.at(node.last_out, lambda: self.route(node, connection, to, letter))

    def route(self, node: Node, connection: int, to: str | None, letter: Letter) -> None:
        if node.connection != connection:
            return
        self.check()
        if to is None:
            for other in self.nodes:
                if other.connection and not (self.loss and self.rng.random() < self.loss):
                    self.deliver(other, letter)
            return
        target = next((other for other in self.nodes if other.name == to and other.connection), None)
        if target is None:
            self.later(node, lambda: node.member.undelivered(node.clock, to))
        elif not (self.loss and self.rng.random() < self.loss):
            self.deliver(target, letter)

    def deliver(self, node: Node, letter: Letter) -> None:
        self.later(node, lambda: node.member.received(node.clock, letter))

    def later(self, node: Node, action: Callable[[], None]) -> None:
        """On its connection, behind what is on the way already."""
        connection = node.connection
        late = 0.0
        if self._faults and self.rng.random() < 0.0005:
            late = self.rng.uniform(0.05, 1.5)
            self.counts["late"] += 1
        node.last_in = max(node.last_in, self.now + self.rng.uniform(0.0003, 0.003) + late, node.held_back)

        def come() -> None:
            if node.connection == connection:
                node.do(lambda: action() if node.connection == connection else None)

        self.at(node.last_in, come)

    def acquire_term(self, node: Node, term: int) -> None:
        connection = node.connection
        node.last_out = max(node.last_out, self.now + self.rng.uniform(0.0003, 0.003), node.held_back)

        def ask() -> None:
            if node.connection != connection:
                return
            if self.holders.setdefault(term, (node.name, connection)) == (node.name, connection):
                self.terms = max(self.terms, term)
                self.later(node, lambda: node.member.took(node.clock, term))
            else:
                self.later(node, lambda: node.member.taken(node.clock, term))

        self.at(node.last_out, ask)

    def release_term(self, node: Node, term: int) -> None:
        connection = node.connection
        node.last_out = max(node.last_out, self.now + self.rng.uniform(0.0003, 0.003), node.held_back)

        def give() -> None:
            if self.holders.get(term) == (node.name, connection):
                del self.holders[term]

        self.at(node.last_out, give)

    def closed(self, node: Node) -> None:
        for term in [term for term, holder in self.holders.items() if holder == (node.name, node.connection)]:
            del self.holders[term]

    # -- what happens to them -----------------------------------------------------------------------------------------

    def order(self, orders: OperatorOrders) -> None:
        """An operator's tool speaks."""
        self.orders = orders
        for node in self.nodes:
            if node.connection:
                self.deliver(node, Letter("tool", "", Ordered(orders)))

    def _cancel_later(self, node: Node) -> None:
        def come() -> None:
            if node.alive and node.connection and node.cancellations < 5:
                node.cancellations += 1
                node.do(lambda: None)
            self._cancel_later(node)

        self.at(self.now + self.rng.expovariate(0.1), come)

    def _fault(self) -> None:
        if not self._faults:
            return
        self.at(self.now + self.rng.expovariate(0.12), self._fault)
        leaders = self.leaders()
        victim = self.rng.choice(self.nodes)
        if leaders and self.rng.random() < 0.5:
            victim = next(node for node in self.nodes if node.name == leaders[0])
        kind = self.rng.choices(("kill", "freeze", "partition", "outage", "cut", "broker"), (30, 30, 20, 6, 10, 2))[0]
        if not victim.alive:
            return
        self.counts[kind] += 1
        seconds = self.rng.choice((0.1, 0.5, 0.9, 1.1, 2.0, 8.0, 30.0)) * self.rng.uniform(0.8, 1.2)
        over = self.now + seconds
        match kind:
            case "kill":
                victim.kill()
                self.at(over, victim.restart)
            case "freeze":
                victim.frozen = over
                if seconds > HEARTBEAT:
                    self.at(self.now + HEARTBEAT, lambda: victim.disconnect(again=True))
            case "partition":
                victim.held_back = over
                if seconds > HEARTBEAT:
                    self.at(self.now + HEARTBEAT, lambda: victim.disconnect(again=True))
            case "outage":
                self.outage = True
                self.at(over, lambda: setattr(self, "outage", False))
            case "cut":
                victim.cut = True
                self.at(over, lambda: setattr(victim, "cut", False))
            case "broker":
                self.broker_down = over
                for node in self.nodes:
                    node.disconnect(again=True)
        self.quiet = max(self.quiet, over)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=50)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--limit", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--loss", type=float, default=0.0)
    options = parser.parse_args()
    world, began = World(options.seed, options.members, options.limit, loss=options.loss), time.monotonic()
    for minute in range(int(options.hours * 60)):
        world.run(60.0 * (minute + 1))
    hours = world.now / 3600
    world.calm(25.0)
    world.check_all_work(within=4.0 * options.members / options.limit if options.limit else 5.0)
    print(
        f"seed {options.seed}: {hours} h of {options.members} members: {world.events} events, "
        f"{world.total} calls ({world.total / world.now:.2f}/s of {options.limit}), most in a second {world.most}, "
        f"{world.terms} terms, {world.failed} failed, {world.counts}, {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
