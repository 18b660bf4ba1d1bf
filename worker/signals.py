"""SIGTERM and SIGINT, remembered from the first moment: none that comes during the imports is lost."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from types import FrameType

_seen: list[int] = []
_pipe: tuple[int, int] | None = None


def install() -> None:
    """Starts remembering. Main thread only; calling it again changes nothing."""
    global _pipe
    if _pipe is not None:
        return
    _pipe = os.pipe()
    for end in _pipe:
        os.set_blocking(end, False)
    # Written by Python's C handler: `wait` returns even if a signal came between its look and its select.
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _remember)


def received() -> int:
    """How many came so far: 1 asks for a drain, 2 for a stop at once."""
    return len(_seen)


def names() -> list[str]:
    """Which they were, in order, for the log."""
    return [signal.Signals(number).name for number in _seen]


def wait(timeout: float | None = None, seen: int = 0) -> int:
    """Blocks the main thread until more than ``seen`` came or ``timeout`` seconds are over; how many came."""
    if _pipe is None:
        raise RuntimeError("signals.install() comes first")
    deadline = None if timeout is None else time.monotonic() + timeout
    while len(_seen) <= seen:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        if select.select([_pipe[0]], [], [], left)[0]:
            _drain(_pipe[0])
    return len(_seen)


def _remember(number: int, _frame: FrameType | None) -> None:
    _seen.append(number)


def _drain(end: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(end, 512)
