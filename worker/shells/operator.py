"""Who runs a command, for those who read of it later."""

from __future__ import annotations

import getpass
import os
import socket


def user() -> str:
    """The name of this process's user; its number where it has none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def who() -> str:
    """``user@host``"""
    return f"{user()}@{socket.gethostname()}"
