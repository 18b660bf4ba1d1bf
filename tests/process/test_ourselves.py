"""What goes wrong in the worker itself, and what that leaves behind: signals, hangs, crashes, redelivered commands."""

import os
import random
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pika
import pytest

from tests.altered import altered
from tests.brokers import PrivateBroker
from tests.ledger import check_books, take_stock
from tests.proxy import FaultProxy
from tests.rabbit import Rabbit, address, by_way_of, new_prefix
from tests.waiting import wait_until
from tests.worker_process import Producer, WorkerProcess, working
from worker.core.lanes import CANCELLATION, LANES, SWEEP, sweep_cap
from worker.core.topology import LANE_DELIVERY_LIMIT, topology
from worker.sandbox.simulator import Fault, Pattern, Rate, Script, Simulator
from worker.wiring import PREFETCH_PER_SENDER

AT_ONCE = 10.0
"""Seconds: what a loaded machine may take for something that waits for nothing; a drain's deadline comes later."""

CLOSING = 3.0
"""Seconds that a drained worker gives a broker that does not answer its close."""

CONCURRENCY = 8
UNACKED = PREFETCH_PER_SENDER[CANCELLATION] * CONCURRENCY + PREFETCH_PER_SENDER[SWEEP] * sweep_cap(CONCURRENCY, 0.75)
"""The most deliveries that one such worker holds."""


def bills(count: int) -> list[str]:
    return [f"b-{number}" for number in range(count)]


def always(fault: Fault) -> Script:
    return Script(rates=(Rate(1.0, fault),))


@contextmanager
def behind_a_proxy(
    url: str, prefix: str, gateway: Simulator, directory: Path, **settings: str
) -> Iterator[tuple[FaultProxy, WorkerProcess, Producer]]:
    """A worker that is ready and reaches the broker through a proxy; its producer does not."""
    with (
        FaultProxy(*address(url)) as proxy,
        WorkerProcess(by_way_of(proxy.port, url), prefix, gateway, directory, **settings) as worker,
    ):
        worker.wait_ready()
        with Producer(url, prefix) as producer:
            yield proxy, worker, producer


# -- signals: what tests/process/test_run.py does not have


def test_idle_with_a_stalled_broker_it_ends_cleanly(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM with nothing to do and a broker that says nothing any more: exit 0, without waiting for its answer."""

    with Simulator() as gateway, behind_a_proxy(amqp_url, prefix, gateway, tmp_path) as (proxy, worker, _):
        proxy.stall()
        assert worker.stop() < CLOSING + AT_ONCE


def test_under_load_with_a_stalled_broker_it_is_forced(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM with outcomes that are not confirmed: it waits until the deadline, exit 1, and nothing is lost."""

    drain = {"WORKER_DRAIN_SECONDS": "2"}
    # The last ones take so long that not all is done before the broker stalls, however late that is.
    slow = Script(latency=0.1, patterns=(Pattern("^b-1..$", (Fault(latency=0.9, repeat=True),)),))
    with (
        Simulator(slow) as gateway,
        behind_a_proxy(amqp_url, prefix, gateway, tmp_path, **drain) as (proxy, worker, producer),
    ):
        producer.publish_many(bills(200), sweep_every=1, of=2)
        producer.collect(50, 30)
        proxy.stall()
        wait_until(lambda: worker.metrics()("publishes_unconfirmed") > 0, 30, "outcomes are on their way")
        began = time.monotonic()
        worker.sigterm()
        assert worker.wait() == 1
        assert 2 <= time.monotonic() - began < 2 + AT_ONCE
        (line,) = worker.events("drain.forced")
        assert "unsettled ones go back to the broker" in line["reason"]
        proxy.reset_all()
        proxy.resume()
        gateway.replace(Script())
        worker.start().wait_ready()
        producer.collect_all(30)
        worker.stop()
        check_books(producer, all_ended=True)
        calls = gateway.report().calls_by_bill
        # One call in each sender's hands, and those whose outcome was not confirmed.
        assert set(calls) == set(bills(200))
        assert sum(calls.values()) - 200 <= 4 * CONCURRENCY


@pytest.mark.slow
def test_a_stall_that_ends_lets_the_drain_finish(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM while the broker stalls for a moment: exit 0 once the confirms come, and nothing was called twice."""

    with (
        Simulator(Script(latency=0.1)) as gateway,
        behind_a_proxy(amqp_url, prefix, gateway, tmp_path) as (proxy, worker, producer),
    ):
        producer.publish_many(bills(200), sweep_every=1, of=2)
        producer.collect(50, 30)
        proxy.stall()
        wait_until(lambda: worker.metrics()("publishes_unconfirmed") > 0, 30, "outcomes are on their way")
        worker.sigterm()
        worker.wait_for(lambda: worker.events("drain.started"), 30, "it drains")
        proxy.resume()
        assert worker.wait() == 0
        worker.start().wait_ready()
        producer.collect_all(30)
        worker.stop()
        check_books(producer, all_ended=True, no_duplicates=True)
        assert gateway.report().calls_by_bill == dict.fromkeys(bills(200), 1)


def test_a_drain_makes_no_suspect_of_what_was_never_called_for(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Bills that are not found, and eight restarts in the middle: each is rejected, since no call for it is in doubt,
    and the broker counts no delivery against it."""

    never = Script(latency=0.05, patterns=(Pattern("", (Fault(code="4049301", message="QR not Found", repeat=True),)),))
    with Simulator(never) as gateway, working(amqp_url, prefix, gateway, tmp_path) as (worker, producer):
        producer.publish_many(bills(600), sweep_every=1, of=2)
        for _ in range(8):
            producer.collect(40, 30)
            worker.stop()
            worker.start().wait_ready()
        producer.collect_all(60)
        assert {(it.fields["status"], it.fields["effectUnknown"]) for it in producer.outcomes} == {("rejected", False)}
        assert producer.rabbit.depth(producer.names.dead) == 0
        producer.publish_many((f"more-{bill}" for bill in bills(300)), sweep_every=1, of=2)
        producer.collect(40, 30)
        worker.stop()
        left = [message for lane in LANES for message in producer.rabbit.look(producer.names.queue(lane))]
        assert len(left) > 100
        assert {(it.properties.headers or {}).get("x-delivery-count", 0) for it in left} == {0}


def test_a_worker_that_lost_a_command_says_nothing_of_it(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """A connection lost in the middle of a call: the command is another worker's, which expires it. What the first one
    learns then (a refused signature, and no such code at the next try) is not published."""

    answers = (
        Fault(code="4019300", latency=3),
        Fault(latency=0.01),
        Fault(code="4049301", message="QR not Found", repeat=True),
    )
    with (
        FaultProxy(*address(amqp_url)) as proxy,
        Simulator(Script(patterns=(Pattern("^lost", answers),))) as gateway,
        working(by_way_of(proxy.port, amqp_url), prefix, gateway, tmp_path, RETRY_DELAYS_SECONDS="1") as (first, _),
        Producer(amqp_url, prefix) as producer,
    ):
        lost = producer.publish("lost")
        wait_until(lambda: gateway.report().in_flight == 1, 30, "it is called for")
        proxy.refuse()
        proxy.reset_all()
        with WorkerProcess(amqp_url, prefix, gateway, tmp_path) as second:
            assert producer.of(lost).fields["status"] == "expired"
            proxy.accept()
            first.wait_ready()
            assert producer.of(producer.publish("other")).fields["status"] == "expired"
            for worker in (first, second):
                worker.stop()
        check_books(producer, all_ended=True, no_duplicates=True)
        assert gateway.report().calls_by_bill["lost"] == 2


@pytest.mark.parametrize(
    ("code", "latency", "heartbeat"),
    [("4019301", 5, 1), ("4039306", 1, 2)],
    ids=["another call would follow", "a delayed round was on its way"],
)
def test_a_worker_that_hears_nothing_of_the_broker_calls_no_more(
    amqp_url: str, prefix: str, tmp_path: Path, code: str, latency: float, heartbeat: int
) -> None:
    """The network swallows everything: the broker takes the worker for gone and gives its command to somebody else,
    who expires it. The worker must know by then: what it would be told next ("not found") is the other's doing. Nor
    does it publish a copy of the command that was on its way."""

    answers = (Fault(code=code, latency=latency), Fault(code="4049301", message="QR not Found", repeat=True))
    with (
        FaultProxy(*address(amqp_url)) as proxy,
        Simulator(Script(patterns=(Pattern("^lost", answers),))) as gateway,
        WorkerProcess(f"{by_way_of(proxy.port, amqp_url)}?heartbeat={heartbeat}", prefix, gateway, tmp_path) as worker,
    ):
        worker.wait_ready()
        with Producer(amqp_url, prefix) as producer:
            lost = producer.publish("lost")
            wait_until(lambda: gateway.report().in_flight == 1, 30, "it is called for")
            proxy.stall()
            (again,) = producer.rabbit.take(producer.names.queue("cancellation"), 1, 30)
            assert (again.body, again.redelivered) == (lost.body, True)
            wait_until(lambda: gateway.report().in_flight == 0, 30, "its answer has come")
            proxy.reset_all()
            proxy.resume()
            worker.wait_ready()
            other = producer.publish("other")
            assert producer.collect(1, 30)[0].command_id == other.id
            delayed = [producer.names.retry("cancellation", delay) for delay in (1, 2)]
            assert [producer.rabbit.depth(queue) for queue in delayed] == [0] * len(delayed)
            worker.stop()
            assert gateway.report().calls_by_bill["lost"] == 1


def test_a_wait_for_the_rate_limit_is_cut_short(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM while senders wait for their slot: exit 0 at once, and what was not called for is back in its lane."""

    with (
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path, GATEWAY_MAX_REQUESTS_PER_SECOND="0.02") as (worker, producer),
    ):
        producer.publish_many(bills(30), sweep_every=1, of=2)
        producer.collect(1, 30)
        assert worker.stop() < AT_ONCE
        books = take_stock(producer).check()
        assert (len(books.ended), len(books.waiting)) == (1, 29)
        assert gateway.report().expire_calls == 1


def test_probes_under_way_are_waited_for(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM with the breaker half-open: the probes' answers are taken, exit 0, their outcomes are there."""

    settings = {"BREAKER_FAILURES": "3", "BREAKER_COOLDOWN_SECONDS": "0.2", "BREAKER_MAX_COOLDOWN_SECONDS": "0.2"}
    with Simulator() as gateway, working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer):
        gateway.replace(always(Fault(code="5009300")))
        producer.publish_many(bills(20))
        worker.wait_for(lambda: worker.events("breaker.opened"), 30, "it opens")
        gateway.replace(Script(latency=4))
        wait_until(
            lambda: gateway.report().in_flight == 3 and worker.metrics()("breaker_state") == 1, 30, "slow probes"
        )
        assert worker.stop() < 4 + AT_ONCE
        books = take_stock(producer).check()
        assert (len(books.ended), len(books.waiting)) == (3, 17)


# -- kill -9


def test_kills_at_any_moment_lose_nothing(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Three SIGKILLs at random moments of a faulty load: all ended, and few calls were made for what had ended."""

    chance = random.Random(7)
    faulty = Script(
        latency=0.01,
        rates=(Rate(0.1, Fault(code="5009300")), Rate(0.05, Fault(code="4019301")), Rate(0.02, Fault(reset="after"))),
    )
    with (
        Simulator(faulty) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, BREAKER_FAILURES="1000") as (worker, producer),
    ):
        producer.publish_many(bills(700), sweep_every=1, of=2)
        for _ in range(3):
            producer.collect(chance.randrange(40, 160), 30)
            worker.kill9()
            worker.start().wait_ready()
        producer.collect_all(40)
        worker.stop()
        books = check_books(producer, all_ended=True)
        assert {str(it.fields["status"]) for it in books.outcomes} == {"expired"}
        # Each kill repeats what was in flight: called and not answered, or answered and its outcome not confirmed.
        assert len(books.duplicates) <= 3 * UNACKED
        assert producer.rabbit.depth(producer.names.dead) == 0


# -- the watchdog, and exceptions where nobody expects them

IMPATIENT = """
import pathlib, worker.service as s
if not pathlib.Path("patient").exists():
    s.LOOP_SILENT = 2.0
    s.SENDER_SILENT = 2.5
"""
"""The loop's patience ends first: a sender that blocks it is no sender that waits."""

LOOP_HANGS = """
import threading, pathlib, worker.shells.amqp.engine as e
take = e.Engine._take_results
def hang(self):
    if pathlib.Path("hang").exists():
        threading.Event().wait()  # for ever
    take(self)
e.Engine._take_results = hang
"""

SENDER_WAITS = """
import pathlib, worker.shells.gateway as g
from greenlet import getcurrent
send = g.GatewayClient.send
def hang(self, *arguments):
    if pathlib.Path("hang").exists():
        getcurrent().parent.switch()
    return send(self, *arguments)
g.GatewayClient.send = hang
"""

SENDER_BLOCKS = SENDER_WAITS.replace("getcurrent().parent.switch()", "import threading; threading.Event().wait()")


@pytest.mark.parametrize(
    ("code", "what"),
    [(LOOP_HANGS, "loop"), (SENDER_WAITS, "sender"), (SENDER_BLOCKS, "loop")],
    ids=["the broker's loop", "a sender waits for ever", "a sender blocks the loop"],
)
def test_a_hang_ends_the_process(amqp_url: str, prefix: str, tmp_path: Path, code: str, what: str) -> None:
    """The watchdog says what hangs and ends the process with exit 1; another one carries on with its commands."""

    quick = {
        "RETRY_BUDGET_SECONDS": "0.3",
        "GATEWAY_CONNECT_TIMEOUT_SECONDS": "0.1",
        "GATEWAY_READ_TIMEOUT_SECONDS": "0.3",
    }
    ours = altered(tmp_path, IMPATIENT + code)
    with Simulator() as gateway, working(amqp_url, prefix, gateway, tmp_path, **quick, **ours) as (worker, producer):
        (tmp_path / "hang").touch()
        producer.publish_many(bills(10))
        assert worker.wait() == 1
        (line,) = worker.events("worker.hung")
        assert what in line["reason"]
        assert (line["exit_code"], line["action"]) == (1, "restart")
        (tmp_path / "hang").unlink()
        (tmp_path / "patient").touch()  # with a loaded machine, which may be as silent as a hang
        worker.start().wait_ready()
        producer.collect_all(30)
        worker.stop()
        check_books(producer, all_ended=True)


def failing(method: str) -> str:
    return f"""
import pathlib, worker.shells.amqp.engine as e
original = e.Engine.{method}
def fail(self, *arguments, **named):
    if pathlib.Path("fail").exists():
        raise RuntimeError("nobody expects this")
    return original(self, *arguments, **named)
e.Engine.{method} = fail
"""


@pytest.mark.parametrize(
    "method",
    ["delivered", pytest.param("confirmed", marks=pytest.mark.slow), pytest.param("_tick", marks=pytest.mark.slow)],
)
def test_an_exception_on_the_loop_ends_the_process(amqp_url: str, prefix: str, tmp_path: Path, method: str) -> None:
    """In a delivery, a confirm or a timer: exit 1 with what happened; nothing hangs on as a zombie, nothing is lost."""

    ours = altered(tmp_path, failing(method))
    with Simulator() as gateway, working(amqp_url, prefix, gateway, tmp_path, **ours) as (worker, producer):
        (tmp_path / "fail").touch()
        producer.publish_many(bills(10))
        assert worker.wait() == 1
        (line,) = worker.events("worker.failed")
        assert "nobody expects this" in line["reason"]
        assert "RuntimeError" in worker.events("broker.loop_failed")[0]["exception"]
        (tmp_path / "fail").unlink()
        worker.start().wait_ready()
        producer.collect_all(30)
        worker.stop()
        check_books(producer, all_ended=True)


def test_an_exception_in_a_sender_stays_there(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """One command that crashes its sender goes back to the broker; the others do not notice, and neither do probes."""

    code = """
import pathlib, worker.app.expire as e
parse = e.parse
def fail(body, *more):
    if b"poison" in body and pathlib.Path("fail").exists():
        raise RuntimeError("nobody expects this")
    return parse(body, *more)
e.parse = fail
"""
    ours = altered(tmp_path, code)
    with Simulator() as gateway, working(amqp_url, prefix, gateway, tmp_path, **ours) as (worker, producer):
        (tmp_path / "fail").touch()
        poison = producer.publish("poison")
        producer.publish_many(bills(50))
        producer.collect(50, 30)
        worker.wait_for(lambda: len(worker.events("sender.crashed")) >= 2, 30, "it comes back, after a while")
        times = [line["timestamp"] for line in worker.events("sender.crashed")]
        assert len(set(times)) == len(times)
        assert worker.get("/readyz")[0] == 200
        (tmp_path / "fail").unlink()
        assert producer.of(poison).fields["status"] == "expired"
        worker.stop()
        check_books(producer, all_ended=True, no_duplicates=True)


# -- a command that kills

KILLS = """
import os, worker.app.expire as e
parse = e.parse
def kill(body, *more):
    if b"poison" in body:
        os._exit(9)
    return parse(body, *more)
e.parse = kill
"""


def take_and_die(url: str, queue: str) -> None:
    """What a process does that crashes on the first command that it takes."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        # What the last one held comes back a moment after its connection went.
        wait_until(lambda: channel.basic_get(queue)[0], 30, "the command is there")


def test_a_command_that_kills_ends_as_a_dead_letter(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """The process crashes on it as often as the delivery limit allows; then it is parked as it came."""

    ours = altered(tmp_path, KILLS)
    with Simulator() as gateway, WorkerProcess(amqp_url, prefix, gateway, tmp_path, **ours) as worker:
        worker.wait_ready()
        worker.stop()
        with Producer(amqp_url, prefix) as producer:
            rabbit, names = producer.rabbit, producer.names
            poison = producer.publish("poison", correlation_id="who-did-this")
            lane = names.queue("cancellation")
            for _ in range(LANE_DELIVERY_LIMIT - 1):
                take_and_die(amqp_url, lane)
            deaths = 0
            while not rabbit.depth(names.dead):
                worker.start()
                assert worker.wait(30) == 9
                deaths += 1
                wait_until(lambda: rabbit.depth(lane) + rabbit.depth(names.dead) == 1, 30, "the broker has it again")
            assert deaths == 2
            (letter,) = rabbit.look(names.dead)
            assert (letter.body, letter.properties.message_id) == (poison.body, poison.id)
            assert letter.properties.correlation_id == "who-did-this"
            assert letter.properties.headers["x-death"][0]["reason"] == "delivery_limit"
            assert "dead-reason" not in letter.properties.headers
            worker.start().wait_ready()
            good = producer.publish("b-1")
            assert producer.of(good).fields["status"] == "expired"
            worker.stop()
            books = take_stock(producer).check()
            assert books.parked == {poison.id}


# -- a log that nobody reads


def test_a_log_that_nobody_reads_stops_nothing(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Its pipe is full, as when a log collector hangs: commands, heartbeats and a clean end do not wait for it."""

    reader, writer = os.pipe()
    with Simulator() as gateway, os.fdopen(reader), os.fdopen(writer) as pipe:
        worker = WorkerProcess(amqp_url, prefix, gateway, tmp_path, LOG_LEVEL="debug")
        worker.stdout = writer
        with worker:
            worker.wait_ready()
            with Producer(amqp_url, prefix) as producer:
                producer.publish_many(bills(1000))
                producer.collect_all(60)
                full = select.poll()
                full.register(pipe, select.POLLOUT)
                assert not full.poll(0), "nothing fits into it any more"
                worker.stop()
                check_books(producer, all_ended=True, no_duplicates=True)


# -- commands that come again


def test_a_lost_connection_calls_nobody_twice(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Connections reset under load, again and again: what is in hand is joined, what is settled is acked, no more."""

    # Their calls outlast a reconnect, however slow the machine; those of the load usually do not.
    slow = ["slow-1", "slow-2", "slow-3"]
    script = Script(latency=0.03, bills={bill: (Fault(latency=5),) for bill in slow})
    with (
        Simulator(script) as gateway,
        behind_a_proxy(amqp_url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="8") as (proxy, worker, producer),
    ):
        in_hand = {producer.publish(bill).id for bill in slow}
        wait_until(lambda: gateway.report().in_flight == len(slow), 30, "the slow ones are in hand")
        # Ready a tick before it takes note: what is lost until then was no connection yet.
        worker.wait_for(lambda: worker.metrics()("broker_connected") == 1, 30, "it is connected")
        proxy.reset_all()
        worker.wait_for(lambda: worker.metrics()("broker_reconnects_total") >= 1, 30, "it is back")
        producer.publish_many(bills(600), sweep_every=1, of=2)
        for resets in range(2, 6):
            producer.collect(60, 30)
            proxy.reset_all()
            worker.wait_for(lambda n=resets: worker.metrics()("broker_reconnects_total") >= n, 30, "it is back")
        producer.collect_all(30)
        worker.stop()
        books = check_books(producer, all_ended=True)
        assert gateway.report().calls_by_bill == dict.fromkeys([*slow, *bills(600)], 1)
        assert {it.fields["attempts"] for it in books.outcomes} == {1}
        assert {event["command_id"] for event in worker.events("delivery.joined")} >= in_hand
        # Published again where the confirm was lost: the same outcome, under the same id.
        for identity in books.duplicates:
            assert len({it.message.properties.message_id for it in books.outcomes if it.command_id == identity}) == 1


@pytest.mark.slow
def test_a_closed_consumer_connection_duplicates_nothing(fresh: PrivateBroker, tmp_path: Path) -> None:
    """The operator closes only the consuming connection, under load: one call for each command, one outcome."""

    prefix = new_prefix()
    with (
        Simulator(Script(latency=0.05)) as gateway,
        working(fresh.url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="16") as (worker, producer),
    ):
        producer.publish_many(bills(3000), sweep_every=1, of=2)
        for closed in range(1, 4):
            producer.collect(100, 30)
            fresh.ctl("close_connection", consuming(fresh), "closed by the test")
            worker.wait_for(lambda n=closed: worker.metrics()("broker_reconnects_total") >= n, 30, "it is back")
        producer.collect_all(60)
        worker.stop()
        check_books(producer, all_ended=True, no_duplicates=True)
        assert gateway.report().calls_by_bill == dict.fromkeys(bills(3000), 1)
        assert worker.events("delivery.joined", "delivery.settled_before")


def consuming(broker: PrivateBroker) -> str:
    """The worker's connection with two channels, one for each lane; the other one publishes."""
    for line in broker.ctl("list_connections", "pid", "channels", "client_properties").splitlines():
        pid, channels, properties = line.split("\t", 2)
        if "qris-expire run" in properties and channels == "2":
            return pid
    raise AssertionError("the worker does not consume")


def test_not_found_is_not_believed_for_what_came_again(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Taken by a process that died, then "not found": its call may be the reason, so it is unresolved, and parked."""

    with Rabbit(amqp_url) as rabbit:
        rabbit.declare(topology(prefix, "quorum", (1, 2)))
    with Simulator(always(Fault(code="4049301"))) as gateway, Producer(amqp_url, prefix) as producer:
        again = producer.publish("came-again")
        take_and_die(amqp_url, producer.names.queue("cancellation"))
        first = producer.publish("came-once", "sweep")
        with WorkerProcess(amqp_url, prefix, gateway, tmp_path) as worker:
            worker.wait_ready()
            fields = producer.of(again).fields
            assert (fields["status"], fields["reason"]) == ("unresolved", "not_found_after_unknown_effect")
            assert (fields["effectUnknown"], fields["attempts"]) == (True, 1)
            fields = producer.of(first).fields
            assert (fields["status"], fields["reason"]) == ("rejected", "not_found")
            assert fields["effectUnknown"] is False
            (letter,) = producer.rabbit.take(producer.names.dead, 1, 30)
            assert letter.body == again.body
            assert letter.properties.headers["dead-reason"] == "not_found_after_unknown_effect"
            worker.stop()


# -- the engine's beat


def test_acks_do_not_wait_for_a_tick(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Without a second turn of the engine's timer, far more commands than the prefetch window holds are done."""

    still = "import worker.service as s, worker.shells.amqp.engine as e; e.TICK = 1000.0; s.LOOP_SILENT = 1e9"
    with (
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="4", **altered(tmp_path, still)) as (
            worker,
            producer,
        ),
    ):
        producer.publish_many(bills(600), sweep_every=1, of=2)
        producer.collect_all(30)
        lanes = [producer.names.queue(lane) for lane in LANES]
        assert [producer.rabbit.depth(lane) for lane in lanes] == [0, 0]
        worker.kill9()
        # All were acked: nothing comes back when it crashes.
        books = check_books(producer, all_ended=True, no_duplicates=True)
        assert len(books.outcomes) == 600
