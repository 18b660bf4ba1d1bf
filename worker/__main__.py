"""`qris-expire`, and ``python -m worker``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits with its code."""
    from worker import signals, surroundings

    surroundings.open_streams()
    arguments = sys.argv[1:]
    if next((word for word in arguments if not word.startswith("-")), None) == "run":
        signals.install(worker=True)  # before the imports, which take long enough for a SIGTERM to arrive in them
    from worker.cli import main as command_line

    sys.exit(command_line(arguments))


if __name__ == "__main__":
    main()
