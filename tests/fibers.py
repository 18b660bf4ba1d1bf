"""A loop with fibers in a thread of its own, and what tests wait with in there."""

import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import requests
from requests.adapters import BaseAdapter

from worker.shells.amqp.connection import new_loop
from worker.shells.fibers import Fibers
from worker.shells.transport import BoundedAdapter, Proxy


@contextmanager
def running_fibers() -> Iterator[Fibers]:
    """Turns until the end of the block."""
    fibers, over = Fibers(new_loop()), threading.Event()
    thread = threading.Thread(target=fibers.run, args=(over.is_set,), name="fibers", daemon=True)
    thread.start()
    try:
        yield fibers
    finally:
        fibers.soon(over.set)  # wakes the loop, which would else see it with its next tick
        thread.join(10)
        assert not thread.is_alive(), "a fiber blocks the loop"


class FiberAdapter(BaseAdapter):
    """The bounded adapter, whose calls run in a fiber each and wait for the loop."""

    def __init__(self, fibers: Fibers, context: ssl.SSLContext | None = None, *, proxy: Proxy | None = None) -> None:
        super().__init__()
        self._fibers = fibers
        self._adapter = BoundedAdapter(context, fibers, proxy)

    def send(self, *arguments: Any, **options: Any) -> requests.Response:
        """See `BoundedAdapter`."""
        return self._fibers.ask(lambda: self._adapter.send(*arguments, **options)).result(60)

    def close(self) -> None:
        """Drops the connection."""
        self._fibers.ask(self._adapter.close).result(60)


class Turnstile:
    """A semaphore for fibers that any thread releases."""

    def __init__(self, fibers: Fibers, value: int) -> None:
        self._fibers = fibers
        self._value = value
        self._waiting: deque[Callable[[], None]] = deque()

    def release(self, count: int = 1) -> None:
        """So many more may pass."""
        self._fibers.soon(lambda: self._let(count))

    def acquire(self) -> None:
        """Waits for its turn."""
        if self._value:
            self._value -= 1
        else:
            self._waiting.append(self._fibers.resumption())
            self._fibers.park()

    def _let(self, count: int) -> None:
        for _ in range(count):
            if self._waiting:
                self._waiting.popleft()()
            else:
                self._value += 1
