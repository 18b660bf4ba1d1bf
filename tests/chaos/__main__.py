"""``python -m tests.chaos --seed 1``: one chaos run, reported as it happens, the ledger at the end."""

import argparse
import sys

from tests.chaos.monkey import run


def main() -> int:
    """Exit code 0 when the books balance."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3], help="one run for each")
    parser.add_argument("--commands", type=int, default=20_000)
    arguments = parser.parse_args()
    for seed in arguments.seed:
        print(f"seed {seed}: {arguments.commands} commands, four workers", flush=True)
        print(run(seed, arguments.commands, say=lambda line: print(line, flush=True)).text(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
