"""`qris-expire run`: the worker."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from worker import signals, surroundings
from worker.cli import Trouble

if TYPE_CHECKING:
    from worker.settings import Settings


def run() -> int:
    """Runs the worker: it takes commands, expires their bills at the gateway, and publishes the outcomes.

    The first SIGTERM, SIGINT or SIGQUIT drains the worker: it takes nothing new, finishes what it holds, and ends. The
    second one stops it at once; what it holds goes back to the broker. SIGHUP makes it read its mounted secrets again;
    on a terminal SIGHUP drains it. SIGUSR1 writes the stacks of all threads to standard error.

    Exit code 0: drained. 1: stopped before everything was finished. 2: settings are wrong. 3: the broker or the gateway
    refused our credentials at the start.

    Example:

        qris-expire run
    """
    signals.install(worker=True)
    surroundings.keep_memory_private()
    surroundings.raise_descriptors()
    from worker.settings import load

    settings = load()
    from worker.shells import logs

    several = settings.worker.processes > 1
    name = "parent" if several else os.environ.get("QRIS_EXPIRE_PROCESS")
    logs.configure(settings.log.format, settings.log.level, sys.stdout, process=name)
    if signals.received():
        return 0  # told to drain before anything was taken
    if several:
        return _supervise(settings)
    from worker.service import serve

    return serve(settings)


def _supervise(settings: Settings) -> int:
    from worker.processes import supervise

    code = supervise(
        [sys.executable, "-m", "worker", "run"],
        processes=settings.worker.processes,
        host=settings.metrics.host,
        port=settings.metrics.port,
        drain_seconds=settings.worker.drain_seconds,
        environment=dict(os.environ),
    )
    if code not in (0, 1):
        raise Trouble(
            "the processes refused to start; the line above with exit_code says why and what to do", code=code
        )
    return code
