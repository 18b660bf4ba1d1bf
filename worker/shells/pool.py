"""The senders: as many fibers as the concurrency. Each takes a command, carries it through, and takes the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog

from worker.app.dispatch import Dispatcher
from worker.app.expire import Expire
from worker.core.settlement import Crashed, Disposition, Hold, Task
from worker.shells.fibers import Fibers

log = structlog.get_logger()

Finish = Callable[[Task, Disposition], None]


class Pool:
    """Which command a sender takes is decided when it is free, not when it is woken, so a cancellation overtakes every
    sweep command that waits. ``finish`` hears of every command that does not stay in hand."""

    def __init__(self, dispatcher: Dispatcher, expire: Expire, finish: Finish, fibers: Fibers, *, senders: int) -> None:
        self._dispatcher = dispatcher
        self._expire = expire
        self._finish = finish
        self._fibers = fibers
        self._senders: Final = senders
        self._since: dict[Task, float] = {}  # when a sender took it
        self._stopped = False

    def start(self) -> None:
        """Starts the senders."""
        for _ in range(self._senders):
            self._fibers.spawn(self._run)

    def stop(self) -> None:
        """Ends the senders when they are free; does not wait. From any thread."""
        self._stopped = True
        self._fibers.soon(self._dispatcher.release)

    def longest(self) -> float:
        """Seconds that the slowest sender has held its command, without those in which the process stood still. From
        any thread."""
        now = time.monotonic() - self._fibers.frozen
        return now - min(tuple(self._since.values()), default=now)

    def in_hand(self, lane: str) -> int:
        """Commands of the lane in senders' hands. From any thread."""
        return sum(task.lane == lane for task in tuple(self._since))

    def _run(self) -> None:
        while not self._stopped:
            taken = self._dispatcher.take()
            if taken is None:
                self._dispatcher.park(self._fibers.resumption())
                self._fibers.park()
            else:
                self._carry(*taken)

    def _carry(self, task: Task, probe: bool) -> None:
        """One command in one sender's hands. Not undone in a `finally`: a fiber that is lost while it waits ends there,
        and `longest` must tell of its command."""
        self._since[task] = self._fibers.now()
        disposition: Disposition
        try:
            disposition = self._expire(task, probe=probe)
        except Exception as error:  # a bug of ours must not take the other senders with it
            log.error(
                "sender.crashed",
                command_id=task.delivery.command_id,
                trace_id=task.delivery.trace_id,
                lane=task.lane,
                exc_info=error,
            )
            disposition = Crashed()
        del self._since[task]
        self._dispatcher.done(task, disposition, probe=probe)
        if not isinstance(disposition, Hold):
            self._finish(task, disposition)
