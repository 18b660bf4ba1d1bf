"""What Linux says about processes and about the machine (`/proc`), and how to wait until it is quiet."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, Self

CORES: Final = os.cpu_count() or 1
TICKS: Final = os.sysconf("SC_CLK_TCK")  # per second

QUIET: Final = 0.2
"""The share of the machine that others may use when a run starts. Above it, caches and cores are not our own."""


def family(pid: int) -> Iterator[int]:
    """This process and all below it that live."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))


class Cpu(NamedTuple):
    """Seconds: the whole, user and system, and what of it was in the system."""

    whole: float
    system: float


def cpu_seconds(pid: int) -> Cpu:
    """Of a process, of all below it, and of those that it has outlived. 10 ms is its grain."""
    whole = system = 0
    for member in family(pid):
        with suppress(OSError):
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            whole += sum(int(field) for field in fields[11:15])
            system += int(fields[12]) + int(fields[14])
    return Cpu(whole / TICKS, system / TICKS)


def resident(pid: int, *, peak: bool = False) -> float:
    """MiB resident of a process and all below it, now or each at its highest."""
    field = "VmHWM:" if peak else "VmRSS:"
    kilobytes = 0
    for member in family(pid):
        with suppress(OSError):
            for line in Path(f"/proc/{member}/status").read_text().splitlines():
                if line.startswith(field):
                    kilobytes += int(line.split()[1])
    return kilobytes / 1024


class Times(NamedTuple):
    """Seconds since the machine started, over all cores: `stolen` is what the hypervisor gave to others."""

    at: float
    busy: float
    stolen: float

    @classmethod
    def now(cls) -> Self:
        """Right now."""
        with Path("/proc/stat").open() as stat:
            user, nice, system, _, _, irq, soft, stolen = (int(field) for field in stat.readline().split()[1:9])
        return cls(time.monotonic(), (user + nice + system + irq + soft) / TICKS, stolen / TICKS)

    def shares(self, later: "Times") -> tuple[float, float]:
        """Busy and stolen shares of the machine between two moments."""
        whole = max(later.at - self.at, 0.001) * CORES
        return (later.busy - self.busy) / whole, (later.stolen - self.stolen) / whole


LOOK = 1.0
"""Seconds over which one look measures what others use."""


class Patience:
    """How long the program may still wait for a quiet machine, in seconds, over all runs.

    Bounded, for a machine that is never quiet: then the runs go on, and the table says how busy it was.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def wait(self) -> float:
        """Look for a second at a time until it is quiet; the share of the machine that others used last."""
        while True:
            before = Times.now()
            time.sleep(LOOK)
            used = sum(before.shares(Times.now()))
            if used <= QUIET or self._left <= 0:
                return used
            self._left -= LOOK


def load_average() -> float:
    """Runnable and waiting threads, over the last minute."""
    return os.getloadavg()[0]
