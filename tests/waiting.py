"""Wait for a fact instead of sleeping for a while."""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], timeout: float, what: str) -> T:
    """Poll until `predicate` is true, return its value; an AssertionError names `what` and the last value."""
    deadline = time.monotonic() + timeout
    pause = 0.002
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout:g} s, last seen {value!r}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    return value


@contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """Of all test processes of this user, only one does `what` (a word, such as "apt") at a time; the others wait."""
    with (Path(tempfile.gettempdir()) / f"qris-expire-tests-{os.geteuid()}-{what}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
