"""The system's time, for whatever is handed a clock."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.shells.fibers import Fibers


class SystemClock:
    """The `Clock` of the core's ports."""

    epoch = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


class LoopClock:
    """The `Clock` of whoever runs in fibers: durations leave out the time in which the loop stood still. A process that
    was stopped has not waited."""

    epoch = staticmethod(time.time)

    def __init__(self, fibers: Fibers) -> None:
        self.monotonic = fibers.now
