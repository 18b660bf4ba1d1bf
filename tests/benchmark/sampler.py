"""`qris-expire run` that notes its stack every few milliseconds of CPU: for `profile`, which starts it.

Profilers that look from outside cannot see into fibers, and Python runs the handler of a signal on the main thread
only. So the broker's loop, with all fibers, runs on the main thread here, and the rest of the worker on another. The
first SIGUSR2 begins to sample, the second one writes what was found.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from types import FrameType
from typing import Final

from worker import service, signals
from worker.settings import Settings, load
from worker.shells import logs

PERIOD: Final = 0.004  # seconds of CPU time; a sample takes some ten microseconds


class Sampler:
    """Counts stacks, the innermost function first; functions are pairs of file and qualified name."""

    def __init__(self, to: Path) -> None:
        self._to = to
        self._stacks: Counter[tuple[tuple[str, str], ...]] = Counter()
        self._began: tuple[float, float] | None = None

    def sample(self, _: int, frame: FrameType | None) -> None:
        """The handler of SIGPROF. A fiber's stack ends where the fiber began."""
        stack = []
        while frame is not None:
            stack.append((frame.f_code.co_filename, frame.f_code.co_qualname))
            frame = frame.f_back
        self._stacks[tuple(stack)] += 1

    def turn(self, *_: object) -> None:
        """The handler of SIGUSR2: begins, then ends."""
        loop, process = time.thread_time(), time.process_time()
        if self._began is None:
            self._began = loop, process
            signal.setitimer(signal.ITIMER_PROF, PERIOD, PERIOD)
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        share = (loop - self._began[0]) / (process - self._began[1])
        part = self._to.with_suffix(".part")
        part.write_text(json.dumps({"loop": share, "stacks": list(self._stacks.items())}))
        part.rename(self._to)


class MainThread(threading.Thread):
    """The engine's thread, of which the main thread takes the place: `run` is its to call."""

    def __init__(self, target: Callable[[], object], begun: Queue["MainThread"]) -> None:
        super().__init__(target=target)
        self._begun = begun
        self._over = threading.Event()

    def start(self) -> None:
        """The main thread may run."""
        self._begun.put(self)

    def run(self) -> None:
        """Until the loop ends."""
        super().run()
        self._over.set()

    def is_alive(self) -> bool:
        """It is asked after its start only."""
        return not self._over.is_set()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end of the loop."""
        self._over.wait(timeout)


def main(to: Path) -> None:
    """Until it is told to drain."""
    signals.install(worker=True)
    signal.set_wakeup_fd(-1)  # or each sample would wake the thread that waits for signals
    settings = load()
    logs.configure(settings.log.format, settings.log.level, sys.stdout)
    begun: Queue[MainThread] = Queue()

    class Worker(service.Worker):
        def __init__(self, settings: Settings) -> None:
            super().__init__(settings)
            self.engine._thread = MainThread(self.engine._run, begun)

    service.Worker = Worker  # type: ignore[misc]
    sampler = Sampler(to)
    signal.signal(signal.SIGPROF, sampler.sample)
    signal.signal(signal.SIGUSR2, sampler.turn)
    threading.Thread(target=lambda: os._exit(service.serve(settings)), daemon=True).start()
    begun.get().run()
    threading.Event().wait()  # for the other thread, which ends the process


if __name__ == "__main__":
    main(Path(sys.argv[1]))
