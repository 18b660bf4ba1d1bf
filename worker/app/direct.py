"""A batch without a broker: the journal is the intake of the same dispatcher, and takes what the senders bring."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Final, Protocol, TypeVar, assert_never

from worker.app.dispatch import Dispatcher, Holds, Wishes
from worker.app.sweep import AT_ONCE, Ended, Screen, failing
from worker.core.breaker import State
from worker.core.delivery import BATCH_ID, Delivery, Progress
from worker.core.lanes import SWEEP
from worker.core.outcome import encode_outcome
from worker.core.ports import Clock
from worker.core.settlement import Crashed, Delay, Disposition, GiveBack, Hold, Report, TakenBack, Task
from worker.core.sweep import Facts, Job, Recorded, Tally, Told, batch_command_id, command_body, read_outcome

TICK: Final = 0.1
AHEAD: Final = 4
"""Bills taken at once for each sender: what a crash leaves as *maybe sent*, against a write to disk for each bill."""

T = TypeVar("T")


class DirectJournal(Protocol):
    """What must survive (see `worker.shells.journal`). Each method returns when its change is on disk."""

    facts: Facts

    def take(self, after: int, limit: int) -> list[Job]: ...
    def take_due(self, now: float, limit: int) -> list[Job]: ...
    def next_due(self) -> float | None: ...
    def put_back(self, jobs: Iterable[tuple[int, Progress, float | None]]) -> None: ...
    def record(self, outcomes: Sequence[Told]) -> Recorded: ...
    def tally(self) -> Tally: ...


class OnLoop(Protocol):
    """Runs a function on the senders' thread, which the dispatcher belongs to, and returns its result."""

    def __call__(self, function: Callable[[], T]) -> T: ...


class Direct:
    """One batch. `run` has a thread, which alone touches the journal; `finish` is called in the senders'.

    A bill is marked as begun before a sender gets it, and finished only with its outcome: after a crash, those in
    between are sent again as what they are, sent maybe.
    """

    def __init__(
        self,
        journal: DirectJournal,
        dispatcher: Dispatcher,
        on_loop: OnLoop,
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
        self._dispatcher = dispatcher
        self._on_loop = on_loop
        self._ahead = AHEAD * concurrency
        self._drain_seconds = drain_seconds
        self._stop = stop
        self._chores = chores
        self._screen = screen
        self._clock = clock
        self._results: queue.SimpleQueue[tuple[Task, Disposition]] = queue.SimpleQueue()
        self._numbers: dict[Task, int] = {}  # of the bills that the dispatcher has
        self._read = 0
        self._exhausted = False
        self._next_due = journal.next_due()
        self._tally = journal.tally()
        self.crashes = 0

    def finish(self, task: Task, disposition: Disposition) -> None:
        """A sender is done with a bill. In the senders' thread."""
        self._results.put((task, disposition))

    def run(self) -> Ended:
        """Until every bill has its outcome, or people want it to end."""
        self._dispatcher.begin()
        while not self._stop():
            wishes = self._on_loop(lambda: self._dispatcher.look(ready=True))
            self._give_back(wishes.give_back)
            room = self._ahead - len(self._numbers)
            if SWEEP not in wishes.paused and room >= self._ahead // 2:
                self._offer(self._next(room))
            self._fetch(wishes)
            self._collect(TICK)
            self._chores()
            self._screen.show(self._tally, self._trouble())
            if self._exhausted and not self._numbers and self._next_due is None:
                return Ended.DONE
        return self._drain()

    # -- out --------------------------------------------------------------------------------------------------------

    def _fetch(self, wishes: Wishes) -> None:
        """Single bills to probe with."""
        for lane, count in wishes.fetch.items():
            self._offer(self._next(count) if lane == SWEEP else [])
            self._on_loop(partial(self._dispatcher.fetched, lane))

    def _next(self, limit: int) -> list[Job]:
        """New bills, and those whose time has come again: an eighth of these while there are new ones, so that bills
        that fail again and again do not stop the others."""
        due: list[Job] = []
        if self._next_due is not None and self._next_due <= self._clock.epoch():
            due = self._journal.take_due(self._clock.epoch(), limit if self._exhausted else max(1, limit // 8))
            self._next_due = self._journal.next_due()
        fresh: list[Job] = []
        if not self._exhausted and len(due) < limit:
            fresh = self._journal.take(self._read, limit - len(due))
            self._exhausted = not fresh
            self._read = fresh[-1].bill.number if fresh else self._read
        return fresh + due

    def _offer(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        tasks = {Task(self._delivery(job)): job.bill.number for job in jobs}
        self._numbers |= tasks

        def offer() -> None:
            for task in tasks:
                self._dispatcher.offer(task)

        self._on_loop(offer)

    def _delivery(self, job: Job) -> Delivery:
        bill, progress = job.bill, job.progress
        progress.effect_unknown = progress.effect_unknown or job.begun
        progress.received_at = progress.received_at or self._clock.epoch()
        return Delivery(
            lane=SWEEP,
            body=command_body(bill),
            properties=SimpleNamespace(),  # only what is published looks at them
            redelivered=job.begun,
            arrived=self._clock.monotonic(),
            command_id=batch_command_id(self._batch, bill.bill, bill.merchant),
            copy_id="",
            progress=progress,
            published_at=None,
            headers={BATCH_ID: self._batch},
            batch_id=self._batch,
        )

    # -- back -------------------------------------------------------------------------------------------------------

    def _give_back(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self.finish(task, GiveBack())

    def _collect(self, wait: float) -> None:
        """What senders have finished, into the journal. What goes back to the end of the lane is due at once; in a
        drain it waits for the next run."""
        told: list[Told] = []
        unfinished: list[tuple[int, Progress, float | None]] = []
        for task, disposition in self._finished(wait):
            number, progress = self._numbers.pop(task), task.delivery.progress
            match disposition:
                case Report(outcome):
                    found = read_outcome(encode_outcome(outcome))
                    assert found is not None
                    told.append(found)
                case Delay(seconds, round_):
                    progress.round, progress.calls = round_, 0
                    unfinished.append((number, progress, self._clock.epoch() + seconds))
                case Crashed():
                    self.crashes += 1  # it stays begun, so the next run sends it as what it is, sent maybe
                case GiveBack() | Hold() | TakenBack():
                    due = None if self._dispatcher.draining else self._clock.epoch()
                    unfinished.append((number, progress, due))
                case _:
                    assert_never(disposition)
        if told:
            self._tally.add(self._journal.record(told))
        if unfinished:
            self._journal.put_back(unfinished)
            self._next_due = self._journal.next_due()

    def _finished(self, wait: float) -> list[tuple[Task, Disposition]]:
        found = []
        try:
            found.append(self._results.get(timeout=wait))
            while len(found) < AT_ONCE:
                found.append(self._results.get_nowait())
        except queue.Empty:
            pass
        return found

    def _drain(self) -> Ended:
        """Takes nothing new, finishes what is on its way, gives the rest back; a second wish means now."""
        deadline = self._clock.monotonic() + self._drain_seconds
        self._dispatcher.drain()
        while self._numbers and self._stop() < 2 and self._clock.monotonic() < deadline:
            self._give_back(self._on_loop(lambda: self._dispatcher.look(ready=True)).give_back)
            self._collect(TICK)
            self._screen.show(self._tally, f"stopping: {self._dispatcher.in_hand()} calls are on their way")
        return Ended.STOPPED

    def _trouble(self) -> str:
        holds: Holds = self._dispatcher.holds()
        if holds.breakers[SWEEP] is not State.CLOSED:
            return failing((holds.until or 0.0) - self._clock.monotonic())
        if holds.throttled:
            return "the gateway asks us to slow down"
        if holds.sick:
            return "our calls fail while those of others succeed; we test the gateway now and then"
        if SWEEP in holds.paused:
            return "paused by an operator, see `qris-expire fleet`"
        if self._exhausted and self._next_due is not None and not self._numbers:
            return f"the next round begins in {max(0.0, self._next_due - self._clock.epoch()):.0f} s"
        return ""
