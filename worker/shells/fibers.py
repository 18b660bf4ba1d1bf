"""Fibers: the worker's one piece of unusual machinery. All senders run on one thread, and none blocks another.

Why it exists. A command spends its life waiting for the gateway. With a thread for each wait, one thread hands the
interpreter lock to another ten times for each command, and the system has to wake it (measured side by side: 0.31 ms of
CPU for a command with 32 threads, 0.23 ms with 32 fibers, at 1.5 times the rate). A fiber is a function that can pause
in the middle (greenlet). It is written like a thread and waits like a coroutine, so requests, tenacity and the
use case stay what they are, and the broker's library, which wants one thread, runs on the same one.

How to read it. `Fibers.turn` is the whole scheduler: it lets pika's loop look at the broker and at the timers, then
runs whatever has become ready. A fiber that has to wait asks for a `resumption`, gives it to whoever will call it, and
calls `park`; everything else here (`wait`, `call`, `Event`, `Lock`) is made of these two. Sockets of the gateway are
watched by one epoll, which pika's loop watches as one more descriptor.

What must not block. Anything that waits without asking `Fibers` stops every sender and the broker's heartbeats: name
look-ups, reading files that may hang, ``time.sleep``, ``threading`` locks that are held for long. What has to block
goes to `Fibers.call`, which gives it a thread. If something blocks all the same, the log says ``loop.blocked`` and
names it.

The clock. A process can be stopped (SIGSTOP, a frozen virtual machine) and the loop can be blocked. Time in which no
fiber could run is no time that the gateway was given, so deadlines count by `Fibers.now`, a clock that stood still
meanwhile; and the socket is always looked at before a deadline is believed (`worker.shells.transport`).
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
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import structlog
from greenlet import getcurrent, greenlet

log = structlog.get_logger()

_LONGEST_WAIT: Final = 3600.0  # seconds; a timer takes no infinity
_BLOCKED: Final = "nothing that blocks may run on the loop's thread; report it, unless the process was stopped"
TICK: Final = 0.1  # seconds between two looks for waits that are over: their deadlines are kept as exactly as that
SPACING: Final = 0.002
AT_ONCE: Final = 10
"""Seconds between two turns of a busy loop; and so many turns, saved up in quiet moments, begin at once. What happens
meanwhile is dealt with together: outcomes, acks and system calls in company, by code that is warm. A lone command takes
four turns, so it never waits. Measured at 800 commands a second: a quarter less CPU, 3 ms more until the outcome."""
STANDSTILL: Final = 0.5
"""Seconds without a look at the clock, which is looked at every tick: more, and the loop stood still. The log says so,
and no deadline or budget counts that time."""

T = TypeVar("T")


class Loop(Protocol):
    """What is used of pika's ``IOLoop``; and ``hurry``: the next ``poll`` only looks, and waits for nothing."""

    def hurry(self) -> None: ...
    def activate_poller(self) -> None: ...
    def close(self) -> None: ...
    def poll(self) -> None: ...
    def process_timeouts(self) -> None: ...
    def add_handler(self, fd: int, handler: Callable[[int, int], None], events: int) -> None: ...
    def call_later(self, delay: float, callback: Callable[[], None]) -> Any: ...
    def remove_timeout(self, timeout: Any) -> None: ...
    def add_callback_threadsafe(self, callback: Callable[[], None]) -> None: ...


class NoThread(OSError):
    """The system has no thread for a call that would block, so the call was not begun. Like a network failure: no bug,
    and it passes."""


class Fibers:
    """The fibers of one loop: `start`, then `turn` for ever, on the loop's thread. From others: `soon`, `spawn`, `ask`.

    Sockets are watched edge-triggered from the first to the last moment, which saves two system calls per wait. So a
    fiber has to try first and to wait only when the try would have blocked, or when it cannot have been answered yet.

    ``frozen``: seconds in which the loop stood still, all together.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.frozen = 0.0
        self._told = 0.0
        self._looked_at = time.monotonic()
        self._next = 0.0  # when the next turn may begin
        self._ready: deque[Callable[[], object]] = deque()
        self._sockets = select.epoll()
        self._waiting: dict[int, tuple[greenlet, float]] = {}
        self._thread: int | None = None

    def start(self) -> None:
        """The loop's thread begins."""
        self._thread = threading.get_ident()
        self._looked_at = time.monotonic()
        self.loop.activate_poller()
        self.loop.add_handler(self._sockets.fileno(), self._look, select.POLLIN)
        self._tick()

    def turn(self) -> None:
        """Waits until something happens, then lets everybody who can go on do so."""
        ready = self._ready
        if ready:  # they do not wait for anything, but the loop looks at the broker first: nobody may keep it from that
            self.loop.hurry()
        else:
            self._keep_distance()
        self._run(self.loop.poll)
        self._run(self.loop.process_timeouts)
        for _ in range(len(ready)):
            self._run(ready.popleft())

    def _keep_distance(self) -> None:
        """Waits until the next turn may begin."""
        early = self._next - self._looked_at
        if early > 0:
            time.sleep(early)
        self._next = max(self._next, self._looked_at - SPACING * (AT_ONCE - 1)) + SPACING

    def now(self) -> float:
        """Seconds by a monotonic clock that stops while the loop is blocked. On the loop's thread."""
        at = time.monotonic()
        if at - self._looked_at > STANDSTILL:
            self.frozen += at - self._looked_at
        self._looked_at = at
        return at - self.frozen

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
        self.soon(partial(_begin, work))

    def soon(self, callback: Callable[[], object]) -> None:
        """Runs it on the loop's thread, outside every fiber. From any thread."""
        self._ready.append(callback)
        if threading.get_ident() != self._thread:
            self.loop.add_callback_threadsafe(_nothing)

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """``function`` in a fiber of its own, for another thread, which may wait for the answer."""
        answer: Future[T] = Future()
        self.spawn(partial(_answer, answer, function))
        return answer

    # -- what a fiber waits for -------------------------------------------------------------------------------------

    def park(self) -> bool:
        """Pauses until its `resumption` is called; False if a deadline came first."""
        outside = getcurrent().parent
        assert outside is not None, "only a fiber can wait"
        return bool(outside.switch())

    def resumption(self) -> Callable[[], None]:
        """What lets the fiber that runs now go on after it has parked. From any thread; only the first call counts."""
        armed = [getcurrent()]

        def resume() -> None:
            try:
                fiber = armed.pop()  # not looked at first: two threads may call at the same moment
            except IndexError:
                return
            self.soon(partial(fiber.switch, True))

        return resume

    def give_way(self) -> None:
        """Lets all that are ready have their turn first."""
        self.resumption()()
        self.park()

    def call(self, function: Callable[[], T], deadline: float = math.inf) -> T:
        """Runs what blocks in a thread; returns or raises what it does, TimeoutError after ``deadline`` (a moment of
        `now`), `NoThread` when the system has none to give.

        The thread is a new one: cheap enough for the rare call that comes here, and as a daemon it keeps no process
        from ending.
        """
        answer: Future[T] = Future()
        done = Event(self)

        def work() -> None:
            _answer(answer, function)
            done.set()

        try:
            threading.Thread(target=work, name="helper", daemon=True).start()
        except RuntimeError as error:
            raise NoThread(str(error)) from None
        while not done.is_set():  # time in which the loop stood still moves the deadline
            left = deadline - self.now()
            if left <= 0:
                raise TimeoutError("timed out")
            done.wait(min(left, _LONGEST_WAIT))
        return answer.result()

    def watch(self, connection: socket.socket) -> None:
        """A connection that will be waited for. Closing it ends the watch."""
        self._sockets.register(connection, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET)

    def wait(self, connection: socket.socket, events: int, deadline: float) -> None:
        """Until something has happened to it, ``events`` or not: try again. Raises TimeoutError after ``deadline`` (a
        moment of `now`)."""
        if deadline <= self.now():  # `_tick` misses a socket to which something happens in every turn
            raise TimeoutError("timed out")
        fiber = getcurrent()
        assert fiber.parent is not None, "only a fiber can wait"
        self._waiting[connection.fileno()] = (fiber, deadline)
        if not fiber.parent.switch():
            raise TimeoutError("timed out")

    # ---------------------------------------------------------------------------------------------------------------

    def _look(self, _descriptor: int, _events: int) -> None:
        for number, _ in self._sockets.poll(0):
            found = self._waiting.pop(number, None)
            if found is not None:
                self._ready.append(partial(found[0].switch, True))

    def _tick(self) -> None:
        self.loop.call_later(TICK, self._tick)
        self._look(0, 0)  # what has come wakes its fiber, even if its deadline has passed meanwhile
        now = self.now()
        for number in [number for number, (_, deadline) in self._waiting.items() if deadline <= now]:
            self._ready.append(partial(self._waiting.pop(number)[0].switch, False))

    def _run(self, callback: Callable[[], object]) -> None:
        """Reports what has run for so long that nothing else could."""
        callback()
        at = time.monotonic()
        if at - self._looked_at > STANDSTILL or self.frozen > self._told:  # or it has noticed itself
            self.now()
            seconds, self._told = round(self.frozen - self._told, 3), self.frozen
            log.warning("loop.blocked", seconds=seconds, by=self._name(callback), action=_BLOCKED)
        self._looked_at = at

    def _name(self, ran: Callable[..., object]) -> str:
        if ran == self.loop.poll:
            return "a callback of the broker's connection, or the whole process was stopped"
        if ran == self.loop.process_timeouts:
            return "the callback of a timer"
        fiber = getattr(getattr(ran, "func", None), "__self__", None)
        if not isinstance(fiber, greenlet):
            return _title(ran)
        frame = fiber.gr_frame
        while frame is not None and frame.f_code.co_filename == __file__:  # how it waits says nothing
            frame = frame.f_back
        now = "has ended" if frame is None else f"waits now in {frame.f_code.co_qualname}, line {frame.f_lineno}"
        return f"the fiber of {fiber.name}, which {now}"


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


def _begin(work: Callable[[], None]) -> None:
    fiber = greenlet(work)
    fiber.name = _title(work)
    fiber.switch()


def _title(work: Callable[..., object]) -> str:
    function = work.args[-1] if isinstance(work, partial) and work.args else work
    return getattr(function, "__qualname__", repr(function))


def _answer(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001  # it is for who waits for the answer
        future.set_exception(error)


def _nothing() -> None:
    """The loop looks."""
