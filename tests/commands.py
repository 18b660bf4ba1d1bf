"""Commands of `qris-expire` run within the tests' process: as a person calls them, without half a second of imports."""

from __future__ import annotations

import gc
import warnings

from worker.cli import main


def call(*arguments: str) -> int:
    """The exit code. pika leaves the socket of a connection that failed to the garbage collector, which is of no matter
    to a process that ends, and would be a warning here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        code = main(arguments)
        gc.collect()
    return code
