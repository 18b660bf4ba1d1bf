"""Signals, remembered from the first moment: none that arrives during the imports is lost.

SIGTERM, SIGINT and SIGQUIT ask the process to stop: the first to drain, the second to stop at once. SIGHUP does the
same, since it says that the terminal is gone. Only a worker without a terminal is asked by it to read its mounted
secrets again, which is what service managers mean by a reload. A SIGHUP that the process was started to ignore
(``nohup``) stays ignored.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import time
from types import FrameType
from typing import Final

STOPS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

_stops: list[int] = []
_hangups: list[int] = []
_pipe: tuple[int, int] | None = None


def install(*, worker: bool = False) -> None:
    """Starts remembering. Main thread only; a second call changes nothing.

    ``worker``: without a terminal, SIGHUP asks for mounted secrets to be read again; SIGUSR1 writes the stacks of all
    threads to standard error, for whoever wants to know where a worker hangs; SIGUSR2 does nothing.
    """
    global _pipe
    if _pipe is not None:
        return
    _pipe = os.pipe()
    for end in _pipe:
        os.set_blocking(end, False)
    # Written by Python's C handler: `sleep` returns even if a signal came between its look and its poll.
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    for number in STOPS:
        signal.signal(number, _stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _hang_up if worker and not os.isatty(0) else _stop)
    if worker:
        if sys.stderr is not None:
            faulthandler.register(signal.SIGUSR1)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def wake_on_child() -> None:
    """From now on, `sleep` also returns when a child process ends."""
    signal.signal(signal.SIGCHLD, lambda *_: None)


def received() -> int:
    """How many came that ask to stop: 1 asks for a drain, 2 for a stop at once."""
    return len(_stops)


def names() -> list[str]:
    """Which they were, in order, for the log."""
    return [signal.Signals(number).name for number in _stops]


def hangups() -> int:
    """How many came that ask to read the mounted secrets again."""
    return len(_hangups)


def sleep(seconds: float | None) -> None:
    """Blocks the main thread until any signal arrives, or for ``seconds``."""
    if _pipe is None:
        raise RuntimeError("signals.install() comes first")
    poll = select.poll()  # not select(): descriptors may be above 1,023
    poll.register(_pipe[0], select.POLLIN)
    poll.poll(None if seconds is None else max(seconds, 0) * 1000)
    with contextlib.suppress(BlockingIOError):
        os.read(_pipe[0], 512)


def wait(timeout: float | None = None) -> int:
    """Blocks the main thread until a signal asks to stop or ``timeout`` seconds are over; how many came."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not _stops:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        sleep(left)
    return len(_stops)


def _stop(number: int, _frame: FrameType | None) -> None:
    _stops.append(number)


def _hang_up(number: int, _frame: FrameType | None) -> None:
    _hangups.append(number)
