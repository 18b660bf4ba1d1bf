"""The way of one command through a real worker: how many functions of ours it calls, in how many files.

`python -m tests.trace [PACKAGE-DIRECTORY]` prints the figures; the directory of another checkout's `worker` compares.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tests.altered import altered
from tests.conftest import DEFAULT_AMQP_URL
from tests.rabbit import delete_topology, new_prefix
from tests.waiting import wait_until
from tests.worker_process import Producer, WorkerProcess
from worker.sandbox.simulator import Simulator

WARM = 20
"""Commands before the one that is traced: it shall find its token, its connection and its code ready."""

HOOK = """
import json, os, sys, threading
import greenlet, pika.channel
from worker.shells.amqp.connection import Connection

calls, here, last_ack = [], os.environ["TRACED"], [0]

def hook(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith(here):
        name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        calls.append((os.path.relpath(frame.f_code.co_filename, here), name))

decode = pika.BasicProperties.decode
of = Connection if hasattr(Connection, "acknowledge") else pika.channel.Channel  # older checkouts ack pika's own way
name = "acknowledge" if of is Connection else "basic_ack"
ack = getattr(of, name)

def decoded(self, *arguments, **options):
    after = decode(self, *arguments, **options)
    if self.message_id and not calls and last_ack[0] >= int(os.environ["TRACE_AFTER"]):  # a command, not the fleet's
        greenlet.settrace(lambda event, pair: sys.setprofile(hook))
        sys.setprofile(hook)
    return after

def acked(self, *arguments, **options):
    tag = max(filter(lambda each: type(each) is int, arguments))
    if calls and tag > last_ack[0]:
        sys.setprofile(None)
        greenlet.settrace(None)
        with open(os.environ["TRACE_TO"] + ".part", "w") as file:
            json.dump(calls, file)
        os.rename(os.environ["TRACE_TO"] + ".part", os.environ["TRACE_TO"])
        calls.clear()
        tag = -1000
    last_ack[0] = tag
    ack(self, *arguments, **options)

pika.BasicProperties.decode = decoded  # once for each delivery
setattr(of, name, acked)
"""


def trace(package: Path) -> list[tuple[str, str]]:
    """(file, function) of every call, from the delivery to the acknowledgement."""
    url, prefix = os.environ.get("AMQP_URL", DEFAULT_AMQP_URL), new_prefix()
    with tempfile.TemporaryDirectory() as name, Simulator() as gateway:
        folder, result = Path(name), Path(name) / "calls.json"
        settings = {
            **altered(folder, HOOK),
            "TRACED": str(package),
            "TRACE_AFTER": str(WARM),
            "TRACE_TO": str(result),
        }
        settings["PYTHONPATH"] = f"{folder / 'altered'}:{package.parent}"
        with WorkerProcess(url, prefix, gateway, folder, **settings) as worker:
            worker.wait_ready()
            with Producer(url, prefix) as producer:
                for number in range(1, 2 * WARM + 1):
                    producer.publish(f"bill-{number}")
                    # It is acked in the turn that writes this line, so the next command comes after it.
                    worker.wait_for(lambda: len(worker.events("command.ended")) == number, 30, f"{number} are acked")  # noqa: B023
            wait_until(result.exists, 30, "it is traced")
            worker.stop()
        delete_topology(url, prefix)
        return [(file, function) for file, function in json.loads(result.read_text())]


def main(arguments: Sequence[str]) -> int:
    """Prints the figures, and the way file by file."""
    package = Path(arguments[0] if arguments else Path(__file__).parents[1] / "worker").resolve()
    calls = trace(package)
    moves = sum(one[0] != other[0] for one, other in pairwise(calls))
    functions, files = len(set(calls)), len({file for file, _ in calls})
    print(f"{len(calls)} calls to {functions} functions in {files} files; {moves} moves between files")
    for file in dict.fromkeys(file for file, _ in calls):
        print(f"  {file}: {', '.join(dict.fromkeys(function for each, function in calls if each == file))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
