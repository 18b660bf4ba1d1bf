"""What the operating system gives a process: streams, descriptors, memory that nobody else reads, and children."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Final

MOST_DESCRIPTORS: Final = 65_536
"""More are of no use to us, and some systems allow a billion, over which libraries loop."""

PR_SET_DUMPABLE: Final = 4


def open_streams() -> None:
    """Puts /dev/null where standard input, output or error are closed: else the next file or socket of ours would take
    that number, and what a library or a child writes to it would go there."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free number is taken; those below are open by now.
            opened = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def raise_descriptors() -> tuple[int, int]:
    """Raises the soft limit of open files as far as we may; the soft and the hard limit that hold now. The usual 1,024
    protects programs that use select(), and we do not."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return soft, hard


def keep_memory_private() -> None:
    """No core file, and no look into this process by others of the same user: its memory holds secrets."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # A core that is piped to a collector ignores the limit.
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


# Run by a bare interpreter that then becomes the child. Not a preexec_fn: that runs Python between fork and exec of a
# process with threads, which can deadlock. The kernel kills the child when the thread that started it ends; that thread
# may have ended before this was arranged, hence the second look.
_LAUNCHER: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def ends_with_us(command: Sequence[str]) -> list[str]:
    """The command line that runs ``command`` as a child which the kernel ends when the thread that started it ends,
    whatever happens to us."""
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
