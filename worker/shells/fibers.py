"""Senders without threads: each is a fiber, and all run on the thread of the broker's loop.

A command spends its life waiting for the gateway. With a thread for each wait, one thread hands the interpreter lock to
another ten times per command, and the system has to wake it (measured on a quiet machine, side by side: 0.31 ms of CPU
per command with 32 threads, 0.23 with 32 fibers, at 1.5 times the rate). A fiber is a function that can stand still in
the middle (greenlet): it is written like a thread and waits like a coroutine, so requests, tenacity and the use case
stay what they are. The price: whatever blocks without asking `Fibers` blocks everything, so names and foreign adapters
go to `Fibers.call`.
"""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import requests
from requests.adapters import BaseAdapter

from worker.shells.transport import NotSent

SLOW: str | None = None
"""Why fibers are threads here; None where they are greenlets."""
try:
    from greenlet import getcurrent, greenlet
except ImportError as error:
    from worker.shells.baton import getcurrent, greenlet

    SLOW = str(error)

TICK: Final = 0.1  # seconds between two looks for waits that are over: their deadlines are kept as exactly as that

T = TypeVar("T")


class Loop(Protocol):
    """What is used of pika's ``IOLoop``."""

    def activate_poller(self) -> None: ...
    def close(self) -> None: ...
    def poll(self) -> None: ...
    def process_timeouts(self) -> None: ...
    def add_handler(self, fd: int, handler: Callable[[int, int], None], events: int) -> None: ...
    def call_later(self, delay: float, callback: Callable[[], None]) -> Any: ...
    def remove_timeout(self, timeout: Any) -> None: ...
    def add_callback_threadsafe(self, callback: Callable[[], None]) -> None: ...


class NoThread(OSError):
    """What blocks was not begun. Trouble of the system's, like a network's: no bug, and over when that is."""


class Fibers:
    """The fibers of one loop: `start`, then `turn` for ever, on the loop's thread. From others: `soon`, `spawn`, `ask`.

    Sockets are watched edge-triggered from the first to the last moment, which saves two system calls per wait. So a
    fiber has to try first and to wait only when the try would have blocked, or when it cannot have been answered yet.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._ready: deque[Callable[[], object]] = deque()
        self._sockets = select.epoll()
        self._waiting: dict[int, tuple[greenlet, float]] = {}
        self._thread: int | None = None

    def start(self) -> None:
        """The loop's thread begins."""
        self._thread = threading.get_ident()
        self.loop.activate_poller()
        self.loop.add_handler(self._sockets.fileno(), self._look, select.POLLIN)
        self._tick()

    def turn(self) -> None:
        """Waits until something happens, then lets everybody who can go on do so."""
        ready = self._ready
        if ready:  # they do not wait for anything, but the loop looks at the broker first: nobody may keep it from that
            self.loop.add_callback_threadsafe(_nothing)
        self.loop.poll()
        self.loop.process_timeouts()
        for _ in range(len(ready)):
            ready.popleft()()

    def run(self, stopped: Callable[[], bool]) -> None:
        """All of it, for a thread that has nothing else to do: until ``stopped``, which is asked every tick."""
        self.start()
        while not stopped():
            self.turn()
        self.close()

    def close(self) -> None:
        """Gives the descriptors back; what is not done never will be."""
        self._sockets.close()
        self.loop.close()

    def spawn(self, work: Callable[[], None]) -> None:
        """``work`` begins in the next turn. What it raises ends `turn`."""
        self.soon(lambda: greenlet(work).switch())

    def soon(self, callback: Callable[[], object]) -> None:
        """Runs it on the loop's thread, outside every fiber. From any thread."""
        self._ready.append(callback)
        if threading.get_ident() != self._thread:
            self.loop.add_callback_threadsafe(_nothing)

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """``function`` in a fiber of its own, for another thread, which may wait for the answer."""
        answer: Future[T] = Future()
        self.spawn(lambda: _answer(answer, function))
        return answer

    # -- what a fiber waits for -------------------------------------------------------------------------------------

    def park(self) -> bool:
        """Stands still until its `resumption` is called; False when a deadline came first."""
        outside = getcurrent().parent
        assert outside is not None, "only a fiber can wait"
        return bool(outside.switch())

    def resumption(self) -> Callable[[], None]:
        """What lets the fiber that runs now go on after it has parked. From any thread; only the first call counts."""
        armed = [getcurrent()]

        def resume() -> None:
            with suppress(IndexError):  # not looked at first: two threads may call at the same moment
                self.soon(partial(armed.pop().switch, True))

        return resume

    def call(self, function: Callable[[], T], deadline: float = math.inf) -> T:
        """Runs what blocks in a thread; returns or raises what it does, TimeoutError after ``deadline`` (monotonic),
        `NoThread` when the system has none to give.

        The thread is a new one: cheap enough for the rare call that comes here, and as a daemon it keeps no process
        from ending.
        """
        answer: Future[T] = Future()
        resume = self.resumption()

        def work() -> None:
            _answer(answer, function)
            resume()

        try:
            threading.Thread(target=work, name="helper", daemon=True).start()
        except RuntimeError as error:
            raise NoThread(str(error)) from None
        timer = None
        if deadline < math.inf:
            timer = self.loop.call_later(max(0.0, deadline - time.monotonic()), resume)
        self.park()
        if timer is not None:
            self.loop.remove_timeout(timer)
        if not answer.done():
            raise TimeoutError("timed out")
        return answer.result()

    def watch(self, connection: socket.socket) -> None:
        """A connection that will be waited for. Closing it ends the watch."""
        self._sockets.register(connection, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)

    def wait(self, connection: socket.socket, events: int, deadline: float) -> None:
        """Until something has happened to it, ``events`` or not: try again. Raises TimeoutError after ``deadline``
        (monotonic)."""
        if deadline <= time.monotonic():  # `_tick` misses a socket to which something happens in every turn
            raise TimeoutError("timed out")
        self._waiting[connection.fileno()] = (getcurrent(), deadline)
        if not self.park():
            raise TimeoutError("timed out")

    # ---------------------------------------------------------------------------------------------------------------

    def _look(self, _descriptor: int, _events: int) -> None:
        for number, _ in self._sockets.poll(0):
            found = self._waiting.pop(number, None)
            if found is not None:
                self._ready.append(partial(found[0].switch, True))

    def _tick(self) -> None:
        self.loop.call_later(TICK, self._tick)
        now = time.monotonic()
        for number in [number for number, (_, deadline) in self._waiting.items() if deadline <= now]:
            self._ready.append(partial(self._waiting.pop(number)[0].switch, False))


class Event:
    """`threading.Event` for fibers: they wait, any thread sets it."""

    def __init__(self, fibers: Fibers) -> None:
        self._fibers = fibers
        self._set = False
        self._waiting: list[Callable[[], None]] = []

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._set

    def set(self) -> None:
        """Wakes all that wait, for good."""
        self._set = True
        for resume in tuple(self._waiting):
            resume()

    def wait(self, timeout: float) -> bool:
        """Until it is set, or ``timeout`` seconds are over; whether it is set."""
        if self._set:
            return True
        resume = self._fibers.resumption()
        timer = self._fibers.loop.call_later(timeout, resume)
        self._waiting.append(resume)
        if self.is_set():  # since we looked, by a thread that has not seen us among those to wake
            resume()
        self._fibers.park()
        self._waiting.remove(resume)
        self._fibers.loop.remove_timeout(timer)
        return self._set


class Lock:
    """`threading.Lock` for fibers, first come first served."""

    def __init__(self, fibers: Fibers) -> None:
        self._fibers = fibers
        self._taken = False
        self._waiting: deque[Callable[[], None]] = deque()

    def acquire(self, blocking: bool = True) -> bool:
        """Whether the lock is the caller's now."""
        if self._taken and blocking:
            self._waiting.append(self._fibers.resumption())
            return self._fibers.park()  # `release` has handed it over
        free, self._taken = not self._taken, True
        return free

    def release(self) -> None:
        """Gives it to whoever has waited longest."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._taken = False

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Offloaded(BaseAdapter):
    """A foreign adapter, whose waits block: its calls go to threads."""

    def __init__(self, fibers: Fibers, adapter: BaseAdapter) -> None:
        super().__init__()
        self._fibers = fibers
        self._adapter = adapter

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        """See `requests.adapters.BaseAdapter.send`."""
        try:
            return self._fibers.call(partial(self._adapter.send, request, *arguments, **options))
        except NoThread as error:
            raise NotSent(str(error), request=request) from None

    def close(self) -> None:
        """Drops its connections."""
        self._adapter.close()


def _answer(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001  # it is for who waits for the answer
        future.set_exception(error)


def _nothing() -> None:
    """The loop looks."""
