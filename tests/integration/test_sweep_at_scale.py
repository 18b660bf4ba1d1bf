"""A hundred thousand bills, and how fast they are published beside a program that does nothing else."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from tests.integration.test_sweep import Desk, listen, rows_of, worker
from tests.rabbit import Rabbit
from tests.waiting import wait_until
from worker.app.sweep import Sweep
from worker.cli.meter import Meter
from worker.core.rows import JSON_FORM, Row
from worker.core.sweep import Batch, Bill, command_message, inbox_name
from worker.core.topology import Names, topology
from worker.sandbox.simulator import Script, Simulator
from worker.shells.amqp.bulk import WINDOW, Bulk, Route
from worker.shells.clock import SystemClock
from worker.shells.journal import Journal, Load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BILLS = 100_000
MEASURED = 40_000
ROUNDS = 3
MEMORY_KIB = 128 * 1024


@pytest.fixture
def rabbit(amqp_url: str, prefix: str) -> Iterator[Rabbit]:
    with Rabbit(amqp_url) as connection:
        connection.declare(topology(prefix, "quorum", ()))
        yield connection
        connection.delete_queue(inbox_name(Names(prefix), "b"))


def test_hundred_thousand_bills_interrupted_twice(tmp_path: Path, amqp_url: str, prefix: str, rabbit: Rabbit) -> None:
    """Killed, stopped and gone on with, it adds up, no bill has two ids, and memory does not grow with the file."""

    desk, tap = Desk(tmp_path, amqp_url, prefix), listen(Desk(tmp_path, amqp_url, prefix), rabbit)
    name, call = desk.file(BILLS), ("--wait", "--batch-id", "b", "--report", "out.csv")
    script = Script.parse({"bills": {"00000007": [{"code": "4049314", "repeat": True}]}})
    settings = {"WORKER_CONCURRENCY": "32", "LOG_LEVEL": "error"}

    with Simulator(script) as gateway, worker(desk, gateway, **settings):
        with desk.calling("sweep", name, *call) as process:
            wait_until(lambda: desk.published("b") > BILLS // 10, 120, "publishing")
            process.kill()
        assert desk.published("b") < BILLS
        with desk.calling("sweep", name, *call) as process:
            wait_until(lambda: desk.answered("b") > BILLS // 4, 600, "following")
            used = _most_memory(process.pid)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
            assert process.returncode == 130, said
        with desk.calling("sweep", "--follow", "b", "--report", "out.csv") as process:
            wait_until(lambda: desk.answered("b") > BILLS * 0.99, 900, "nearly all")
            used = max(used, _most_memory(process.pid))
            printed, said = process.communicate(timeout=900)

    assert process.returncode == 1, said
    assert rows_of(printed) == {
        "expired success": BILLS - 1,
        "rejected paid": 1,
        "total rows of the input": BILLS,
    }
    report = desk.report()
    assert [line["billnumber"] for line in report] == [f"{number:08d}" for number in range(1, BILLS + 1)]
    seen = rabbit.consume(tap, rabbit.depth(tap), 120)
    ids = {(json.loads(message.body)["billnumber"], message.properties.message_id) for message in seen}
    assert ids == {(line["billnumber"], line["commandId"]) for line in report}
    print(f"{len(seen) - BILLS:,} of {BILLS:,} commands went out twice; at most {used:,} KiB of memory")
    assert used < MEMORY_KIB


def test_merchant_of_a_later_batch_does_not_wait_for_the_earlier_one(
    tmp_path: Path, amqp_url: str, prefix: str, rabbit: Rabbit
) -> None:
    """Its 100 bills, behind 2,000 of another merchant in the file, are done within twice the time that they take when
    that batch is alone, though a batch of 40,000 has begun before."""

    desk = Desk(tmp_path, amqp_url, prefix)
    rows = [f"{number:08d},BIG" for number in range(50_000, 52_000)] + [f"{number:08d},FEW" for number in range(100)]
    (tmp_path / "later.csv").write_text("\n".join(["billnumber,merchantId", *rows, ""]))
    early = desk.file(40_000, "early.csv", first=100_000)

    def seconds(batch: str) -> float:
        """Until the merchant with few bills is done, from the start of the program."""
        began = time.monotonic()
        with desk.calling("sweep", "later.csv", "--wait", "--batch-id", batch) as process:
            query = "SELECT count(*) FROM bills WHERE merchant = 'FEW' AND status IS NOT NULL"
            wait_until(lambda: desk.fact(batch, query) == 100, 120, "100 bills")
            took = time.monotonic() - began
            assert process.wait(120) == 0
        rabbit.delete_queue(inbox_name(desk.names, batch))
        return took

    with Simulator(Script.parse({"latency": 0.002})) as gateway, worker(desk, gateway, WORKER_CONCURRENCY="32") as it:
        it.wait_ready()
        alone = [seconds(f"alone-{turn}") for turn in range(ROUNDS)]
        with desk.calling("sweep", early, "--wait", "--batch-id", "early") as process:
            wait_until(lambda: desk.answered("early") > 2000, 60, "the early batch is under way")
            beside = [seconds(f"beside-{turn}") for turn in range(ROUNDS)]
            assert process.poll() is None
            assert desk.answered("early") < 40_000
    rabbit.delete_queue(inbox_name(desk.names, "early"))
    print(f"alone {alone}, beside a batch of 40,000 {beside}")

    assert sorted(beside)[ROUNDS // 2] <= 2 * sorted(alone)[ROUNDS // 2]


def test_publishing_keeps_up_with_a_bare_publisher(tmp_path: Path, amqp_url: str, prefix: str, rabbit: Rabbit) -> None:
    """At least half as fast as pika alone, pipelined through the same window with messages made beforehand."""

    names, size = Names(prefix), Batch("b", MEASURED)
    bills = [Bill(number, f"{number:08d}", "M1", None, None) for number in range(1, MEASURED + 1)]
    messages = [command_message(names, size, bill, 0.0) for bill in bills]
    prepared = [(each.body, pika.BasicProperties(**each.properties)) for each in messages]
    ratios: list[float] = []
    for turn in range(ROUNDS):
        bare = _bare(amqp_url, names, prepared)
        ours = _ours(tmp_path, amqp_url, names, bills, turn)
        rabbit.purge(names.queue("sweep"))
        ratios.append(bare / ours)
        print(f"bare {MEASURED / bare:,.0f}/s, sweep {MEASURED / ours:,.0f}/s, ratio {bare / ours:.2f}")

    assert max(ratios) >= 0.5


def _most_memory(process: int) -> int:
    """The most it has held so far, in KiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1])


def _ours(directory: Path, url: str, names: Names, bills: list[Bill], turn: int) -> float:
    """Seconds for the use case with its journal."""
    load, path = Load(directory), directory / f"turn-{turn}.db"
    load.fill([Row(bill.number, bill.bill, bill.merchant, None, None) for bill in bills])
    load.keep(path, batch="b", source="f", digest="d", form=JSON_FORM, now=time.time())
    journal, parameters = Journal(path), [pika.URLParameters(url)]
    with Meter("sweep", follow=False) as meter:
        errand = Sweep(journal, names, follow=False, stop=lambda: 0, screen=meter, clock=SystemClock())
        route = Route(names, topology(names.prefix, "quorum", ()), declare=True)
        began = time.monotonic()
        Bulk(route, lambda: parameters, errand, publishing=True, rng=random.Random(1)).run()
        took = time.monotonic() - began
    assert journal.facts.published == len(bills)
    journal.close()
    return took


def _bare(url: str, names: Names, prepared: list[tuple[bytes, Any]]) -> float:
    """Seconds for a program that only publishes, with the same window of unconfirmed messages."""
    waiting = iter(prepared)
    sent = confirmed = 0
    began = time.monotonic()

    def refill(channel: Any) -> None:
        nonlocal sent
        while sent - confirmed < WINDOW and (message := next(waiting, None)) is not None:
            channel.basic_publish(names.commands, "sweep", *message, mandatory=True)
            sent += 1

    def settled(channel: Any, frame: Any) -> None:
        nonlocal confirmed
        assert isinstance(frame.method, pika.spec.Basic.Ack)
        confirmed = frame.method.delivery_tag if frame.method.multiple else confirmed + 1
        refill(channel)
        if confirmed >= len(prepared):
            connection.close()

    def opened(channel: Any) -> None:
        channel.confirm_delivery(lambda frame: settled(channel, frame), callback=lambda _: refill(channel))

    connection = pika.SelectConnection(
        pika.URLParameters(url),
        on_open_callback=lambda it: it.channel(on_open_callback=opened),
        on_close_callback=lambda it, _: it.ioloop.stop(),
    )
    connection.ioloop.start()
    connection.ioloop.close()
    return time.monotonic() - began
