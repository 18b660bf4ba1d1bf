"""``python -m tests.contract``: writes the shipped documents as the code has them; ``--demo``: with new examples."""

import sys

from rich.console import Console

from tests.contract import documents
from worker.sandbox import demo

if __name__ == "__main__":
    if "--demo" in sys.argv[1:]:
        print(documents.write_examples(demo.run(120, None, Console())))
    for path in documents.write():
        print(path)
