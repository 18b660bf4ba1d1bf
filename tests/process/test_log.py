"""The log has a line for the end of every command, and says what the worker is doing."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.worker_process import WorkerProcess, working
from worker.sandbox.broker import free_port
from worker.sandbox.simulator import Fault, Script, Simulator

ALWAYS_FAILS = (Fault(code="5009300", repeat=True),)
PAID = (Fault(code="4049314", message="Paid Bill", repeat=True),)


def ends(worker: WorkerProcess, command_id: str) -> list[dict[str, Any]]:
    """What the log says of one command, but for its single calls."""
    return [
        line
        for line in worker.events()
        if line.get("command_id") == command_id and line["event"].startswith("command.")
    ]


def test_each_end_of_a_command_is_a_line(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Expired, refused, delayed, given up and invalid: status, reason and attempts stand in one line each."""
    script = Script(bills={"stuck": ALWAYS_FAILS, "paid": PAID})
    settings = {
        "RETRY_MAX_ATTEMPTS": "2",
        "RETRY_INITIAL_SECONDS": "0.01",
        "RETRY_DELAYS_SECONDS": "1",
        "BREAKER_FAILURES": "1000",
    }
    with Simulator(script) as gateway, working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer):
        good, paid, stuck = (producer.publish(bill) for bill in ("good", "paid", "stuck"))
        invalid = producer.publish_body(b"{", lane="sweep")
        producer.collect_all(60)

        def told(command_id: str) -> list[tuple[Any, ...]]:
            names = ("level", "event", "lane", "status", "reason", "attempts", "dead_lettered", "seconds_until_retry")
            return [tuple(line.get(name) for name in names) for line in ends(worker, command_id)]

        worker.stop()
        lane = "cancellation"
        assert told(good.id) == [("info", "command.ended", lane, "expired", "success", 1, False, None)]
        assert told(paid.id) == [("info", "command.ended", lane, "rejected", "paid", 1, False, None)]
        assert told(stuck.id) == [
            ("info", "command.delayed", lane, None, None, 2, None, 1),
            ("warning", "command.ended", lane, "unresolved", "retries_exhausted", 4, True, None),
        ]
        assert told(invalid.id) == [("warning", "command.ended", "sweep", "invalid", "malformed_json", 0, True, None)]
        (line,) = ends(worker, good.id)
        assert (line["billnumber"], len(line["external_ids"])) == ("good", 1)


def test_a_command_that_goes_back_is_a_line(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """A drain in the middle of a backoff: the log says that the command is at the broker again."""
    settings = {"RETRY_INITIAL_SECONDS": "60", "RETRY_MAX_SECONDS": "60", "RETRY_BUDGET_SECONDS": "900"}
    with (
        Simulator(Script(bills={"stuck": ALWAYS_FAILS})) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer),
    ):
        stuck = producer.publish("stuck")
        worker.wait_for(lambda: worker.events("attempt"), 30, "a first call")
        worker.stop()

        (line,) = ends(worker, stuck.id)
        assert (line["event"], line["lane"]) == ("command.returned", "cancellation")


@pytest.mark.parametrize("processes", [1, 2])
def test_the_log_says_when_and_where_the_worker_is_ready(
    amqp_url: str, prefix: str, tmp_path: Path, processes: int
) -> None:
    """One line of each process when it takes commands, with the address of the page."""
    with (
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_PROCESSES=str(processes)) as (worker, _),
    ):
        worker.wait_for(lambda: len(worker.events("worker.ready")) == processes, 30, "the lines")
        worker.stop()
        pages = {line["page"] for line in worker.events("worker.ready")}
        assert pages == {f"http://127.0.0.1:{worker.port}/"}


def test_a_broker_that_is_not_there_is_named(prefix: str, tmp_path: Path) -> None:
    """The line about waiting says for which host, and for how long."""
    port = free_port()
    with (
        Simulator() as gateway,
        WorkerProcess(f"amqp://guest:guest@127.0.0.1:{port}/", prefix, gateway, tmp_path) as worker,
    ):
        worker.wait_for(lambda: worker.events("broker.waiting"), 30, "the line")
        line = worker.events("broker.waiting")[0]
        assert line["host"] == f"127.0.0.1:{port}"
        assert line["retry_in"] > 0
        worker.stop()


def test_an_open_breaker_names_its_next_probe(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """When it opens and after each probe that failed, the log says in how many seconds the next one goes out."""
    settings = {
        "BREAKER_FAILURES": "1",
        "BREAKER_COOLDOWN_SECONDS": "0.2",
        "BREAKER_MAX_COOLDOWN_SECONDS": "0.4",
        "RETRY_INITIAL_SECONDS": "0.01",
    }
    with (
        Simulator(Script(bills={"stuck": ALWAYS_FAILS})) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer),
    ):
        producer.publish("stuck")
        worker.wait_for(lambda: len(worker.events("breaker.probe_failed")) > 1, 30, "two probes that failed")
        gateway.replace(Script())
        worker.wait_for(lambda: worker.events("breaker.closed"), 30, "the breaker to close")
        (opened, *_) = worker.events("breaker.opened")
        failed = worker.events("breaker.probe_failed")
        assert (opened["lane"], opened["next_probe_in"]) == ("cancellation", 0.2)
        assert failed[0]["next_probe_in"] == 0.4
        worker.stop()


def test_processes_sign_their_lines(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """With several processes each line names the one that wrote it; the parent is one of them."""
    with (
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_PROCESSES="2") as (worker, _),
    ):
        worker.wait_for(lambda: len(worker.events("worker.ready")) == 2, 30, "both to be ready")
        worker.stop()
        lines = worker.events()
        assert {line["process"] for line in lines} == {"parent", "process-0", "process-1"}
        assert {line["process"] for line in lines if line["event"] == "worker.ready"} == {"process-0", "process-1"}


def test_a_hangup_reads_the_mounted_secrets_again(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGHUP reaches every process, which say so and go on."""
    with (
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_PROCESSES="2") as (worker, producer),
    ):
        os.kill(worker.pid, signal.SIGHUP)
        worker.wait_for(lambda: len(worker.events("credentials.reloaded")) == 2, 30, "both to read them again")
        command = producer.publish("after")
        assert producer.of(command).fields["status"] == "expired"
        worker.stop()


def test_lines_for_people_have_date_and_zone(prefix: str, tmp_path: Path) -> None:
    """LOG_FORMAT=console: who reads it in the morning knows which night it was."""
    with (
        Simulator() as gateway,
        WorkerProcess("amqp://127.0.0.1:1/", prefix, gateway, tmp_path, LOG_FORMAT="console") as worker,
    ):
        worker.wait_for(lambda: "broker.waiting" in worker.log(), 30, "a line")
        worker.stop()
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\+07:00 ", worker.log())
