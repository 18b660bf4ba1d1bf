"""A publisher in a process of its own that keeps its schedule, whatever becomes of what it has published.

Its CPU counts for no contender, and no work of the benchmark itself makes it late.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pika

from tests.benchmark.contenders import Process
from tests.benchmark.site import Site
from tests.rabbit import Rabbit

END_SECONDS: Final = 30.0


@contextmanager
def publishing(
    site: Site, lane: str, commands: Sequence[tuple[str, bytes]], per_second: float, directory: Path
) -> Iterator[Process]:
    """Publishes the commands, so many in a second. For `published`, when all have their outcome."""
    work = directory / "publish.json"
    work.write_text(
        json.dumps([site.url, site.exchange, lane, per_second, [(id, body.decode()) for id, body in commands]])
    )
    with Process("publisher", [sys.executable, "-m", __name__, str(work)], {}, directory) as process:
        yield process


def published(process: Process) -> list[float]:
    """The moment (`time.monotonic`) of each publish, in the order of the commands."""
    moments: list[float] = json.loads(process.finish(END_SECONDS))
    return moments


def main(work: Path) -> None:
    """Prints the moments when it has done all of its work."""
    url, exchange, key, per_second, commands = json.loads(work.read_text())
    moments = []
    with Rabbit(url) as rabbit:
        channel = rabbit.plain_channel()
        start = time.monotonic()
        for turn, (id, body) in enumerate(commands):
            time.sleep(max(start + turn / per_second - time.monotonic(), 0))
            moments.append(time.monotonic())
            channel.basic_publish(exchange, key, body, pika.BasicProperties(message_id=id, delivery_mode=2))
    print(json.dumps(moments))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
