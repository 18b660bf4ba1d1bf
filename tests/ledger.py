"""The books of a run: every command published has ended, still waits, or is parked. Nothing else."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.rabbit import DELAYS_IN_TESTS, Message
from tests.worker_process import Outcome, Producer
from worker.core.command import command_id
from worker.core.lanes import LANES
from worker.core.topology import Names

SHOWN = 5
"""Ids named in a line of the table; more do not help anybody."""

RETURN_SECONDS = 10.0
"""The most that the broker may take to put back what an ended worker held."""


@dataclass(frozen=True)
class Ledger:
    """What became of the commands, by id. Build it with `take_stock` once no worker holds any."""

    published: frozenset[str]
    outcomes: tuple[Outcome, ...]
    queued: dict[str, frozenset[str]] = field(default_factory=dict)
    """By queue: the lanes and their retry queues."""
    dead: frozenset[str] = frozenset()

    @property
    def ended(self) -> frozenset[str]:
        """Commands with at least one outcome."""
        return frozenset(outcome.command_id for outcome in self.outcomes)

    @property
    def waiting(self) -> frozenset[str]:
        """Commands in a queue, and without an outcome."""
        return frozenset().union(*self.queued.values()) - self.ended

    @property
    def parked(self) -> frozenset[str]:
        """Dead letters without an outcome (the broker's own, after the delivery limit), which wait nowhere."""
        return self.dead - self.ended - self.waiting

    @property
    def contradictions(self) -> frozenset[str]:
        """Commands whose outcomes do not all have the same status."""
        statuses: dict[str, set[str]] = {}
        for outcome in self.outcomes:
            statuses.setdefault(outcome.command_id, set()).add(outcome.fields["status"])
        return frozenset(command for command, said in statuses.items() if len(said) > 1)

    @property
    def lost(self) -> frozenset[str]:
        """Published, and nowhere."""
        return self.published - self.ended - self.waiting - self.parked

    @property
    def unheard_of(self) -> frozenset[str]:
        """Somewhere, and never published."""
        return (self.ended | self.waiting | self.parked) - self.published

    @property
    def duplicates(self) -> dict[str, int]:
        """Commands with more than one outcome message: allowed after a crash, and worth seeing."""
        counts = Counter(outcome.command_id for outcome in self.outcomes)
        return {identity: number for identity, number in sorted(counts.items()) if number > 1}

    @property
    def shared_external_ids(self) -> dict[str, list[str]]:
        """External ids that stand twice in one outcome, or in the outcomes of several commands."""
        owners: dict[str, set[str]] = {}
        repeated: set[str] = set()
        for outcome in self.outcomes:
            ids = outcome.fields["externalIds"]
            repeated |= {one for one, number in Counter(ids).items() if number > 1}
            for one in ids:
                owners.setdefault(one, set()).add(outcome.command_id)
        return {one: sorted(who) for one, who in owners.items() if len(who) > 1 or one in repeated}

    def table(self) -> str:
        """The books as lines: what, how many, and a few of them."""
        by_status = Counter(str(outcome.fields["status"]) for outcome in self.outcomes)
        lines = [
            _line("published", self.published),
            _line("with an outcome", self.ended),
            *(f"    {status:<24}{number:>7} messages" for status, number in sorted(by_status.items())),
            _line("waiting", self.waiting),
            *(_line(f"    {queue}", ids) for queue, ids in self.queued.items() if ids),
            _line("parked without an outcome", self.parked),
            _line("LOST", self.lost),
            _line("never published", self.unheard_of),
            _line("with several outcomes", self.duplicates),
            _line("with different statuses", self.contradictions),
            _line("external ids twice", self.shared_external_ids),
        ]
        return "\n".join(lines)

    def check(self, *, all_ended: bool = False, no_duplicates: bool = False) -> "Ledger":
        """Raises AssertionError with the table unless it balances; itself, for further looks.

        `all_ended`: nothing waits or is parked either. `no_duplicates`: nobody crashed, so one outcome each.
        """
        wrong = [
            name
            for name, there in (
                ("commands are lost", self.lost),
                ("commands came from nowhere", self.unheard_of),
                ("external ids are not unique", self.shared_external_ids),
                ("commands have not ended", all_ended and (self.waiting or self.parked)),
                ("commands have several outcomes", no_duplicates and self.duplicates),
            )
            if there
        ]
        assert not wrong, f"the books do not balance: {', '.join(wrong)}\n{self.table()}"
        # The sum, said once more as a sum: the four sets above are disjoint by construction.
        assert len(self.published) == len(self.ended) + len(self.waiting) + len(self.parked), self.table()
        return self


def take_stock(producer: Producer, delays: Iterable[int] = DELAYS_IN_TESTS) -> Ledger:
    """The ledger of all that this producer published, once no worker runs or holds anything.

    Looking at a queue returns its messages, which counts as one delivery of each: so what is not there yet, because
    the broker puts it back a moment after its holder's end, is not looked for too often.
    """
    deadline = time.monotonic() + RETURN_SECONDS
    while (ledger := _look(producer, delays)).lost and time.monotonic() < deadline:
        time.sleep(RETURN_SECONDS / 20)
    return ledger


def _look(producer: Producer, delays: Iterable[int]) -> Ledger:
    producer.sweep_up()
    names, rabbit = producer.names, producer.rabbit
    queues = [queue for lane in LANES for queue in (names.queue(lane), *_retries(names, lane, delays))]
    return Ledger(
        frozenset(sent.id for sent in producer.published),
        tuple(producer.outcomes),
        {queue: _ids(rabbit.look(queue)) for queue in queues},
        _ids(rabbit.look(names.dead)),
    )


def check_books(producer: Producer, *, all_ended: bool = False, no_duplicates: bool = False) -> Ledger:
    """`take_stock` and `Ledger.check`."""
    return take_stock(producer).check(all_ended=all_ended, no_duplicates=no_duplicates)


def _retries(names: Names, lane: str, delays: Iterable[int]) -> Sequence[str]:
    return [names.retry(lane, seconds) for seconds in delays]


def _ids(messages: Iterable[Message]) -> frozenset[str]:
    return frozenset(command_id(_text(message.properties.message_id), message.body) for message in messages)


def _text(message_id: object) -> str | None:
    return str(message_id) if message_id else None


def _line(name: str, ids: Iterable[str]) -> str:
    names = sorted(ids)
    some = ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
    return f"{name:<28}{len(names):>7}  {some}".rstrip()
