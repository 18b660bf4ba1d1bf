"""System calls of a running process, counted by what disturbs it least of what this machine has.

`perf stat` counts in the kernel, at some hundred nanoseconds a call. `strace` stops the process twice at every call, so
it does more for each wake-up and makes fewer calls than undisturbed: its count is a lower bound at full load.
"""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self

NOT_COUNTED: Final = "SYSTEM CALLS WERE NOT COUNTED: neither perf nor strace may watch the processes here; try as root"
NAMED: Final = (
    *("epoll_wait", "epoll_pwait", "epoll_ctl", "poll", "select"),
    *("sendto", "sendmsg", "recvfrom", "recvmsg", "read", "write", "writev"),
    *("futex", "clock_nanosleep", "getpid", "getrandom"),
)
"""Those that `perf` counts by name: all of them by name would take it ten seconds to begin."""
ALL: Final = "raw_syscalls:sys_enter"
END_SECONDS: Final = 30.0


class NotAllowed(Exception):
    """The tool works here, but may not watch this process: a worker keeps its memory private."""


class Calls(NamedTuple):
    """How many in so many seconds: all of them, and some by name."""

    seconds: float
    whole: int
    named: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that counts until it gets SIGINT, and then writes its findings to a file."""

    name: str
    command: tuple[str, ...]
    """Followed by `-o FILE -p PID`, or by `-o FILE` and another command."""
    read: Callable[[str, float], Calls]
    """Its findings; and the seconds that it was there, for one that does not say them itself."""

    def works(self, directory: Path) -> bool:
        """Whether it is there, and may count."""
        found = directory / "calls.txt"
        try:
            subprocess.run([*self.command, "-o", str(found), "true"], check=True, capture_output=True)
            return self.read(found.read_text(), 1.0).whole > 0
        except (OSError, subprocess.CalledProcessError):
            return False


class Counting:
    """One count of one process, from the beginning of a block to `end`."""

    def __init__(self, tool: Tool, pid: int, directory: Path) -> None:
        self._tool, self._found = tool, directory / "calls.txt"
        self._command = [*tool.command, "-o", str(self._found), "-p", str(pid)]

    def __enter__(self) -> Self:
        self._found.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Nothing more is counted."""
        self._ended = time.monotonic()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(END_SECONDS)

    def calls(self) -> Calls:
        """What was found; raises `NotAllowed`."""
        text = self._found.read_text() if self._found.exists() else ""
        found = self._tool.read(text, self._ended - self._began)
        if not found.whole:
            raise NotAllowed
        return found


def read_perf(text: str, _: float) -> Calls:
    """Lines such as `12433      raw_syscalls:sys_enter`, and one `2.05 seconds time elapsed`."""
    counts = {name: int(count) for count, name in re.findall(r"^\s*(\d+)\s+(\w+:\w+)", text, re.MULTILINE)}
    elapsed = re.search(r"([\d.]+) seconds time elapsed", text)
    named = {name.removeprefix("syscalls:sys_enter_"): count for name, count in counts.items() if name != ALL}
    return Calls(float(elapsed[1]) if elapsed else 0.0, counts.get(ALL, 0), named)


def read_strace(text: str, seconds: float) -> Calls:
    """A table whose columns are share, seconds, microseconds, calls, errors (may be empty), and the call."""
    rows = [line.split() for line in text.splitlines() if re.match(r"\s*\d", line)]
    counts = {row[-1]: int(row[3]) for row in rows}
    whole = counts.pop("total", 0)
    return Calls(seconds, whole, counts)


PERF: Final = Tool(
    "perf stat",
    (*("perf", "stat", "--no-big-num", "-e"), ",".join([ALL, *(f"syscalls:sys_enter_{name}" for name in NAMED)])),
    read_perf,
)
STRACE: Final = Tool("strace -c -f", ("strace", "-c", "-f"), read_strace)


def tool(directory: Path) -> Tool | None:
    """The one that disturbs least of those that work here."""
    return next((one for one in (PERF, STRACE) if one.works(directory)), None)
