"""What `fibers` uses of greenlet, on threads that pass a baton: only the one that holds it runs.

For where greenlet cannot be loaded: a minimal image without libstdc++, a processor without a wheel. It does the same,
at the price that greenlet saves: each switch wakes a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

STACK_BYTES: Final = 512 * 1024  # the default of 8 MB is address space only, but hundreds of them alarm memory limits

_running = threading.local()


class greenlet:  # noqa: N801  # the name that it stands in for
    """A function that can stand still, in a thread of its own. ``parent`` is where it was made."""

    def __init__(self, run: Callable[[], object] | None = None) -> None:
        self._run = run
        self._baton: SimpleQueue[tuple[object, BaseException | None]] = SimpleQueue()
        self._begun = run is None  # without: a thread that was there already
        self.parent = None if run is None else getcurrent()

    def switch(self, value: object = None) -> Any:
        """Goes on there, and stands still here until somebody switches back; returns what that one brought."""
        here = getcurrent()
        if self._begun:
            self._baton.put((value, None))
        else:
            self._begun = True
            self._start()
        brought, error = here._baton.get()
        if error is not None:
            raise error
        return brought

    def _start(self) -> None:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=self._live, name="fiber", daemon=True).start()
        finally:
            threading.stack_size(before)

    def _live(self) -> None:
        assert self._run is not None
        assert self.parent is not None
        _running.greenlet = self
        try:
            self.parent._baton.put((self._run(), None))
        except BaseException as error:  # noqa: BLE001  # it is raised where it was started from, as greenlet does
            self.parent._baton.put((None, error))


def getcurrent() -> greenlet:
    """The one that runs now."""
    found: greenlet | None = getattr(_running, "greenlet", None)
    if found is None:
        found = _running.greenlet = greenlet()
    return found
