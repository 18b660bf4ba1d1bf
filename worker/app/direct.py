"""A batch without a broker: the same engine straight from the journal to the gateway; the journal is the queue."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, assert_never

from worker.app.expire import Delay, Disposition, Expire, GiveBack, Hold, Report
from worker.app.gate import SendersGate
from worker.app.sweep import Ended, Screen
from worker.core.breaker import State
from worker.core.delivery import BATCH_ID, Delivery
from worker.core.delivery import Progress as Travelling
from worker.core.lanes import SWEEP
from worker.core.outcome import encode
from worker.core.ports import Clock
from worker.core.sweep import (
    Facts,
    Job,
    Progress,
    Recorded,
    Standing,
    Tally,
    Told,
    command_body,
    command_id,
    read_outcome,
)

TICK: Final = 0.1
AT_ONCE: Final = 500  # results kept in one transaction
AHEAD: Final = 4
"""Bills taken at once for each sender: what a crash leaves as *maybe sent*, against a write to disk for each bill."""


class Journal(Protocol):
    """What must survive. Each method returns when its change is on disk."""

    facts: Facts

    def take(self, after: int, limit: int) -> list[Job]:
        """The next bills to send, marked as begun before anybody sends them."""

    def take_due(self, now: float, limit: int) -> list[Job]:
        """The bills whose delayed round has come (``now``: seconds since the epoch), marked as begun."""

    def next_due(self) -> float | None:
        """When the next delayed round begins."""

    def put_back(self, jobs: Iterable[tuple[int, Progress, float | None]]) -> None:
        """Bills (number, progress, due) that were not finished."""

    def record(self, outcomes: Sequence[Told]) -> Recorded:
        """Keeps what tells more than is known."""

    def tally(self) -> Tally:
        """The sum."""


class Senders(Protocol):
    """What carries out `Direct.work`."""

    def offer(self, delivery: Delivery) -> None: ...
    def hold(self) -> None: ...
    def release(self, *, ramp: bool) -> None: ...
    def probe(self, delivery: Delivery) -> bool: ...
    def remove(self, delivery: Delivery) -> bool: ...
    def waiting(self) -> list[Delivery]: ...
    def in_hand(self) -> int: ...


@dataclass(slots=True)
class _NoProperties:
    """What a message would have brought along."""

    content_type: Any = None
    content_encoding: Any = None
    headers: Any = None
    priority: Any = None
    correlation_id: Any = None
    reply_to: Any = None
    message_id: Any = None
    timestamp: Any = None
    type: Any = None
    app_id: Any = None


class Direct:
    """One batch. `run` has a thread, which alone touches the journal; `work` is called in the senders'.

    A bill is marked as begun before a sender gets it, and finished only with its outcome: after a crash, those in
    between are sent again as what they are, sent maybe.
    """

    def __init__(
        self,
        journal: Journal,
        expire: Expire,
        gate: SendersGate,
        *,
        concurrency: int,
        drain_seconds: float,
        stop: Callable[[], int],
        chores: Callable[[], None],
        screen: Screen,
        clock: Clock,
    ) -> None:
        self._journal = journal
        self._batch = journal.facts.batch.id
        self._expire = expire
        self._gate = gate
        self._concurrency = concurrency
        self._drain_seconds = drain_seconds
        self._stop = stop
        self._chores = chores
        self._screen = screen
        self._clock = clock
        self._results: queue.SimpleQueue[tuple[Delivery, Disposition | Exception]] = queue.SimpleQueue()
        self._numbers: dict[str, int] = {}  # command id → number, of what the senders have
        self._read = 0
        self._exhausted = False
        self._next_due = journal.next_due()
        self._was_held = False
        self._probes = 0
        tally = journal.tally()
        self._standing = Standing(tally.bills, tally.bills, dict(tally.told))
        self.crashes: list[Exception] = []

    def work(self, delivery: Delivery, probe: bool) -> bool:
        """One bill in one sender's hands. True when it stays where it is."""
        result: Disposition | Exception
        try:
            result = self._expire(delivery, probe=probe)
        except Exception as error:  # noqa: BLE001  # a bug of ours must not take the other senders with it
            result = error
        finally:
            if probe:
                self._gate.probe_lost()
        if isinstance(result, Hold):
            return True
        self._results.put((delivery, result))
        return False

    def run(self, senders: Senders) -> Ended:
        """Until every bill has its outcome, or people want it to end."""
        self._gate.on_hold = partial(self._hold_now, senders)
        while not self._stop():
            self._refill(senders)
            self._regulate(senders)
            self._collect(TICK)
            self._chores()
            self._screen.show(self._standing, self._trouble())
            if self._exhausted and not self._numbers and self._next_due is None:
                return Ended.DONE
        return self._drain(senders)

    # -- out --------------------------------------------------------------------------------------------------------

    def _refill(self, senders: Senders) -> None:
        room = AHEAD * self._concurrency - len(self._numbers)
        if room < AHEAD * self._concurrency // 2:
            return
        now = self._clock.epoch()
        jobs = []
        if self._next_due is not None and self._next_due <= now:
            jobs = self._journal.take_due(now, room)
            self._next_due = self._journal.next_due()
        if not jobs and not self._exhausted:
            jobs = self._journal.take(self._read, room)
            self._exhausted = not jobs
            self._read = jobs[-1].bill.number if jobs else self._read
        for job in jobs:
            delivery = self._delivery(job)
            self._numbers[delivery.command_id] = job.bill.number
            senders.offer(delivery)

    def _delivery(self, job: Job) -> Delivery:
        bill, earlier = job.bill, job.progress
        return Delivery(
            lane=SWEEP,
            body=command_body(bill),
            properties=_NoProperties(),
            redelivered=job.begun,
            arrived=self._clock.monotonic(),
            command_id=command_id(self._batch, bill.bill, bill.merchant),
            hop="",
            progress=Travelling(
                round=earlier.round,
                attempts=earlier.attempts,
                external_ids=list(earlier.external_ids),
                effect_unknown=earlier.effect_unknown or job.begun,
                received_at=earlier.received_at or self._clock.epoch(),
                last_code=earlier.last_code,
            ),
            published_at=None,
            headers={BATCH_ID: self._batch},
        )

    def _hold_now(self, senders: Senders) -> None:
        """In the sender whose answer began a hold. It may be over by the next look."""
        self._was_held = True
        senders.hold()

    def _regulate(self, senders: Senders) -> None:
        """Makes the senders follow what holds them, and tests a gateway that fails with single bills."""
        holds = self._gate.holds()
        if holds.any:
            self._was_held = True
            senders.hold()
        elif self._was_held:
            self._was_held = False
            senders.release(ramp=True)
        if holds.breaker is State.OPEN and self._gate.probe_due():
            self._probe(senders)

    def _probe(self, senders: Senders) -> None:
        """With the bill whose turn was longest ago, so that no bad one can hold the breaker open."""
        waiting = senders.waiting()
        if not waiting:
            return
        chosen = min(waiting, key=lambda delivery: delivery.probed)
        self._probes += 1
        chosen.probed = self._probes
        self._gate.probing()
        if not senders.probe(chosen):
            self._gate.probe_lost()

    # -- back -------------------------------------------------------------------------------------------------------

    def _collect(self, wait: float) -> None:
        """What senders have finished, into the journal."""
        told: list[Told] = []
        unfinished: list[tuple[int, Progress, float | None]] = []
        for delivery, result in self._finished(wait):
            number = self._numbers.pop(delivery.command_id)
            match result:
                case Report(outcome):
                    found = read_outcome(encode(outcome))
                    assert found is not None
                    told.append(found)
                case Delay(seconds, round_):
                    delivery.progress.round = round_
                    unfinished.append((number, _progress(delivery), self._clock.epoch() + seconds))
                case Exception():
                    self.crashes.append(result)  # it stays begun, so the next run sends it as what it is, sent maybe
                case GiveBack() | Hold():
                    unfinished.append((number, _progress(delivery), None))
                case _:
                    assert_never(result)
        if told:
            self._standing.add(self._journal.record(told))
        if unfinished:
            self._journal.put_back(unfinished)
            self._next_due = self._journal.next_due()

    def _finished(self, wait: float) -> list[tuple[Delivery, Disposition | Exception]]:
        found = []
        try:
            found.append(self._results.get(timeout=wait))
            while len(found) < AT_ONCE:
                found.append(self._results.get_nowait())
        except queue.Empty:
            pass
        return found

    def _drain(self, senders: Senders) -> Ended:
        """Takes nothing new, finishes what is on its way, gives the rest back; a second wish means now."""
        deadline = self._clock.monotonic() + self._drain_seconds
        self._gate.drain()
        senders.hold()
        while self._numbers and self._stop() < 2 and self._clock.monotonic() < deadline:
            unsent = [delivery for delivery in senders.waiting() if senders.remove(delivery)]
            if unsent:
                self._journal.put_back([(self._numbers.pop(each.command_id), _progress(each), None) for each in unsent])
            self._collect(TICK)
            self._screen.show(self._standing, f"stopping: {senders.in_hand()} calls are on their way")
        return Ended.STOPPED

    def _trouble(self) -> str:
        holds = self._gate.holds()
        if holds.breaker is not State.CLOSED:
            return f"the gateway fails; one bill tests it every {self._gate.cooldown():.0f} s"
        if holds.throttled:
            return "the gateway asks us to slow down"
        if self._exhausted and self._next_due is not None and not self._numbers:
            return f"the next round begins in {max(0.0, self._next_due - self._clock.epoch()):.0f} s"
        return ""


def _progress(delivery: Delivery) -> Progress:
    progress = delivery.progress
    return Progress(
        progress.round,
        progress.attempts,
        tuple(progress.external_ids),
        progress.effect_unknown,
        progress.received_at,
        progress.last_code,
    )
