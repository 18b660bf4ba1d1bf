"""`qris-expire run` as the system sees it: a mixed load, signals, crashes, exit codes, and what it never says."""

import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pika
import pytest

from tests.ledger import check_books, take_stock
from tests.proxy import FaultProxy
from tests.rabbit import Rabbit, by_way_of
from tests.waiting import wait_until
from tests.worker_process import Producer, WorkerProcess, working
from worker.app.tokens import REFUSALS_AT_ONCE, REFUSALS_EVERY
from worker.core.lanes import CANCELLATION, SWEEP, sweep_cap
from worker.core.topology import topology
from worker.sandbox.broker import free_port
from worker.sandbox.simulator import Fault, Pattern, Rate, Script, Simulator
from worker.wiring import PREFETCH_PER_SENDER

AT_ONCE = 10.0
"""Seconds: what a loaded machine may take for something that waits for nothing; a drain's deadline comes later."""

LONG_BACKOFF = {
    "RETRY_INITIAL_SECONDS": "60",
    "RETRY_MAX_SECONDS": "60",
    "RETRY_BUDGET_SECONDS": "900",
    "BREAKER_FAILURES": "1000",
}

CONCURRENCY = 16
UNACKED = PREFETCH_PER_SENDER[CANCELLATION] * CONCURRENCY + PREFETCH_PER_SENDER[SWEEP] * sweep_cap(CONCURRENCY, 0.75)
"""The most deliveries that one such worker holds."""

FAULTY = Script(
    rates=(
        Rate(0.05, Fault(code="5009300")),
        Rate(0.02, Fault(code="4019301")),
        Rate(0.02, Fault(code="4099300")),
        Rate(0.01, Fault(reset="after")),
    )
)
OUT_OF_ORDER = Script(rates=(Rate(1.0, Fault(code="5009300")),))


def bills(count: int) -> list[str]:
    return [f"b-{number}" for number in range(count)]


# -- a mixed load


def test_five_thousand_mixed_commands_all_expire(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Of 5,000 commands, one call in ten failing, each has one outcome, `expired`, and few tokens were asked for."""

    began = time.monotonic()
    with Simulator(FAULTY) as gateway:
        with working(amqp_url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="32") as (worker, producer):
            producer.publish_many(bills(5000), sweep_every=4, of=5)
            producer.collect_all(180)
            worker.stop()
            books = check_books(producer, all_ended=True, no_duplicates=True)
        report = gateway.report(bills=False)
    assert Counter(str(outcome.fields["status"]) for outcome in books.outcomes) == {"expired": 5000}
    assert sum(int(outcome.fields["attempts"]) for outcome in books.outcomes) == report.expire_calls > 5200
    assert (report.bills_expired, report.duplicates) == (5000, 0)
    # Its first, and those for which it believed that the last one was refused: the longer it takes, the more.
    took = time.monotonic() - began
    assert report.token_calls <= 1 + REFUSALS_AT_ONCE + took / REFUSALS_EVERY + 1


# -- ends under load


@contextmanager
def under_load(
    url: str, prefix: str, gateway: Simulator, directory: Path, commands: int
) -> Iterator[tuple[WorkerProcess, Producer]]:
    """A worker that has done a third of its commands, in both lanes; the last third would take it half a minute."""
    settings = {"WORKER_CONCURRENCY": str(CONCURRENCY)}
    with working(url, prefix, gateway, directory, **settings) as (worker, producer):
        producer.publish_many(bills(commands), sweep_every=1, of=2)
        producer.collect(commands // 3, 30)
        yield worker, producer


# So that something is left when the signal comes, however late that is.
BUSY = Script(latency=0.02, patterns=(Pattern("^b-1...$", (Fault(latency=1.0, repeat=True),)),))


def test_a_drain_under_load_repeats_nothing(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM with every sender busy: exit 0 in time; after a restart every bill was called exactly once."""

    with (
        Simulator(BUSY) as gateway,
        under_load(amqp_url, prefix, gateway, tmp_path, 1500) as (worker, producer),
    ):
        assert worker.stop() < 15
        books = take_stock(producer).check(no_duplicates=True)
        assert books.waiting, "all was done before the signal came"
        gateway.replace(Script())
        worker.start().wait_ready()
        producer.collect_all(30)
        worker.stop()
        check_books(producer, all_ended=True, no_duplicates=True)
        assert gateway.report().calls_by_bill == dict.fromkeys(bills(1500), 1)


def test_a_kill_under_load_loses_nothing(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGKILL with every sender busy: after a restart each command has an outcome, and few were called twice."""

    with (
        Simulator(BUSY) as gateway,
        under_load(amqp_url, prefix, gateway, tmp_path, 1500) as (worker, producer),
    ):
        worker.kill9()
        gateway.replace(Script())
        worker.start().wait_ready()
        producer.collect_all(30)
        worker.stop()
        books = check_books(producer, all_ended=True)
        calls = gateway.report().calls_by_bill
        assert set(calls) == set(bills(1500))
        again = [bill for bill, number in calls.items() if number > 1]
        # What was in flight: called for and not acked is at most what the prefetch windows hold.
        assert sum(calls.values()) - 1500 == len(again) <= UNACKED
        assert len(books.duplicates) <= UNACKED
        by_id = {outcome.command_id: outcome for outcome in producer.outcomes}
        for bill in again:
            assert by_id[f"id-{bill}"].fields["effectUnknown"] is True


# -- ends while it waits


def test_idle_it_ends_at_once(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM with nothing to do: exit 0."""

    with Simulator() as gateway, WorkerProcess(amqp_url, prefix, gateway, tmp_path) as worker:
        worker.wait_ready()
        assert worker.stop() < AT_ONCE
        assert [line["event"] for line in worker.events("drain.started", "drain.finished")] == [
            "drain.started",
            "drain.finished",
        ]


def test_a_backoff_is_cut_short(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM during backoff: exit 0 at once, no outcome; the command is back in its lane and its calls are known."""

    with (
        Simulator(OUT_OF_ORDER) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **LONG_BACKOFF) as (worker, producer),
    ):
        producer.publish_many(bills(6))
        wait_until(lambda: len(gateway.report().calls_by_bill) == 6, 30, "all were called for")
        assert worker.stop() < AT_ONCE
        books = take_stock(producer).check()
        assert (books.outcomes, len(books.waiting)) == ((), 6)
        calls = gateway.report().calls_by_bill
        gateway.replace(Script())
        worker.start().wait_ready()
        producer.collect_all(30)
        worker.stop()
        check_books(producer, all_ended=True, no_duplicates=True)
        for outcome in producer.outcomes:
            assert outcome.fields["attempts"] == calls[outcome.fields["billnumber"]] + 1
            assert len(outcome.fields["externalIds"]) == outcome.fields["attempts"]
            assert outcome.fields["effectUnknown"] is True


@pytest.mark.parametrize(
    ("script", "pause"),
    [
        (Script(down=True), "breaker"),
        (Script(rates=(Rate(1.0, Fault(code="4299300", retry_after="500")),)), "throttled"),
    ],
    ids=["breaker", "throttled"],
)
def test_a_pause_is_cut_short(amqp_url: str, prefix: str, tmp_path: Path, script: Script, pause: str) -> None:
    """SIGTERM while senders are held: exit 0 at once, and every command is back in its lane without an outcome."""

    settings = {"BREAKER_FAILURES": "3", "BREAKER_COOLDOWN_SECONDS": "60", "RETRY_BUDGET_SECONDS": "900"}
    with (
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer),
    ):
        gateway.replace(script)
        producer.publish_many(bills(40), sweep_every=1, of=2)
        wait_until(lambda: worker.metrics()("consumption_paused", reason=pause) == 1, 30, "senders are held")
        assert worker.get("/readyz")[0] == 503
        assert worker.get("/livez")[0] == 200
        assert worker.stop() < AT_ONCE
        books = take_stock(producer).check()
        assert (books.outcomes, len(books.waiting)) == ((), 40)
        gateway.replace(Script())
        worker.start().wait_ready()
        producer.collect_all(30)
        worker.stop()
        books = check_books(producer, all_ended=True, no_duplicates=True)
        assert {str(outcome.fields["status"]) for outcome in books.outcomes} == {"expired"}


def test_without_a_broker_it_ends_at_once(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM while the broker is away: exit 0, and what was in its hands is carried out after a restart."""

    with (
        FaultProxy("127.0.0.1", pika.URLParameters(amqp_url).port) as proxy,
        Simulator(Script(rates=(Rate(1.0, Fault(code="5009300")),))) as gateway,
        WorkerProcess(
            by_way_of(proxy.port, amqp_url),
            prefix,
            gateway,
            tmp_path,
            **LONG_BACKOFF,
        ) as worker,
    ):
        worker.wait_ready()
        with Producer(amqp_url, prefix) as producer:
            producer.publish_many(bills(20))
            # Six of eight senders are all that the sweep may have.
            wait_until(lambda: len(gateway.report().calls_by_bill) == 6, 30, "senders are in their backoff")
            proxy.refuse()
            proxy.reset_all()
            wait_until(lambda: worker.metrics()("broker_connected") == 0, 30, "it has noticed")
            assert worker.stop() < AT_ONCE
            gateway.replace(Script())
            proxy.accept()
            worker.start().wait_ready()
            producer.collect_all(30)
            worker.stop()
            check_books(producer, all_ended=True, no_duplicates=True)


def test_before_the_first_connection_it_ends_at_once(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM while it waits for a broker that was never there, or one that says nothing: exit 0."""

    with FaultProxy("127.0.0.1", pika.URLParameters(amqp_url).port) as proxy, Simulator() as gateway:
        for trouble in (proxy.refuse, proxy.stall):
            trouble()
            with WorkerProcess(by_way_of(proxy.port, amqp_url), prefix, gateway, tmp_path) as worker:
                worker.wait_for(lambda: proxy.refused >= 2 or proxy.connections >= 2, 30, "it tries")
                worker.wait_for(lambda: worker.get("/livez")[0] == 200, 30, "it lives")
                assert worker.stop() < AT_ONCE
            proxy.accept()


def test_a_silent_token_service_does_not_delay_the_end(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM while the first token is being waited for: exit 0 at once."""

    with (
        Simulator(Script(token_faults=(Fault(hang=60, repeat=True),))) as gateway,
        WorkerProcess(amqp_url, prefix, gateway, tmp_path) as worker,
    ):
        worker.wait_for(lambda: gateway.report().token_calls == 1, 30, "a token is asked for")
        assert worker.stop() < AT_ONCE


def test_a_second_signal_means_now(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM twice with a call that hangs: exit 1 at once, and the command is back in its lane."""

    with (
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path) as (worker, producer),
    ):
        gateway.replace(Script(latency=30))
        producer.publish("b-0")
        wait_until(lambda: gateway.report().in_flight == 1, 30, "it is called for")
        worker.sigterm()
        worker.wait_for(lambda: worker.events("drain.started"), 30, "it drains")
        began = time.monotonic()
        worker.sigterm()
        assert worker.wait() == 1
        assert time.monotonic() - began < AT_ONCE
        books = take_stock(producer).check()
        assert books.waiting == {"id-b-0"}


def test_a_drain_that_takes_too_long_is_forced(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """SIGTERM with a call that hangs beyond WORKER_DRAIN_SECONDS: exit 1 then, and the command is back in its lane."""

    with (
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_DRAIN_SECONDS="1") as (worker, producer),
    ):
        gateway.replace(Script(latency=30))
        producer.publish("b-0")
        wait_until(lambda: gateway.report().in_flight == 1, 30, "it is called for")
        began = time.monotonic()
        worker.sigterm()
        assert worker.wait() == 1
        assert 1 <= time.monotonic() - began < 1 + AT_ONCE
        assert worker.events("drain.forced")[0]["exit_code"] == 1
        assert take_stock(producer).check().waiting == {"id-b-0"}


# -- exit codes at the start, and what is waited for


def test_wrong_settings_are_all_named_before_anything_is_touched(tmp_path: Path) -> None:
    """Exit 2 names every setting that is wrong, by its variable, and nobody was connected to."""

    with socket.create_server(("127.0.0.1", 0)) as broker:
        broker.setblocking(False)
        url = f"amqp://guest:hunter2-secret@127.0.0.1:{broker.getsockname()[1]}/%2F"
        wrong = {
            "GATEWAY_BASE_URL": "http://example.com/v1.0",
            "GATEWAY_CLIENT_ID": "",
            "GATEWAY_SIGNATURE": "md5",
            "WORKER_CONCURRENCY": "0",
            "RETRY_DELAYS_SECONDS": "1.5",
            "WORKER_CONCURENCY": "8",
        }
        with WorkerProcess(url, "t.wrong", {}, tmp_path, **wrong) as worker:
            assert worker.wait() == 2
        with pytest.raises(BlockingIOError):
            broker.accept()
    said = worker.errors()
    for name in (*wrong, "GATEWAY_CLIENT_SECRET", "GATEWAY_PRIVATE_KEY_FILE", "GATEWAY_CHANNEL_ID"):
        assert name in said, said
    assert "hunter2" not in said
    assert "Traceback" not in said


def test_a_broker_that_refuses_the_login_ends_it(amqp_url: str, tmp_path: Path) -> None:
    """Exit 3 with one line that says what to do, without the password."""

    url = by_way_of(pika.URLParameters(amqp_url).port, "amqp://guest:hunter2-secret@host/%2F")
    with Simulator() as gateway, WorkerProcess(url, "t.refused", gateway, tmp_path) as worker:
        assert worker.wait() == 3
    (line,) = worker.events("broker.refused")
    assert "AMQP_URL" in line["action"]
    assert "hunter2" not in worker.log() + worker.errors()


def test_a_token_service_that_refuses_ends_it(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Exit 3 with one line that says what to do, and no command was taken."""

    with Rabbit(amqp_url) as rabbit:
        rabbit.declare(topology(prefix, "quorum", (1, 2)))
    refuses = Script(token_faults=(Fault(code="4017300", repeat=True),))
    with Simulator(refuses) as gateway, Producer(amqp_url, prefix) as producer:
        producer.publish("b-0")
        with WorkerProcess(amqp_url, prefix, gateway, tmp_path) as worker:
            assert worker.wait() == 3
        (line,) = worker.events("gateway.refused")
        assert "GATEWAY_CLIENT_ID" in line["action"]
        assert gateway.report().expire_calls == 0
        assert take_stock(producer).check().waiting == {"id-b-0"}


def test_an_absent_broker_is_waited_for(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Without a broker it lives, is not ready, and begins when there is one."""

    with (
        FaultProxy("127.0.0.1", pika.URLParameters(amqp_url).port) as proxy,
        Simulator() as gateway,
    ):
        proxy.refuse()
        with WorkerProcess(by_way_of(proxy.port, amqp_url), prefix, gateway, tmp_path) as worker:
            worker.wait_for(lambda: proxy.refused >= 4, 30, "it tries again")
            assert worker.get("/livez")[0] == 200
            assert worker.get("/readyz")[0] == 503
            # What happened, in the system's own words: pika's wrappers have none.
            reasons = [str(line["reason"]) for line in worker.events("broker.waiting")]
            assert not [reason for reason in reasons if reason.startswith("AMQPConn")]
            proxy.accept()
            worker.wait_ready()
            with Producer(amqp_url, prefix) as producer:
                assert producer.of(producer.publish("b-0")).fields["status"] == "expired"
            worker.stop()


def test_an_absent_gateway_is_waited_for(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Without a gateway no command is lost, ended or delayed; they end when it comes, with their calls uncounted."""

    with Rabbit(amqp_url) as rabbit:
        rabbit.declare(topology(prefix, "quorum", (1, 2)))
    quick = {
        "BREAKER_FAILURES": "3",
        "BREAKER_COOLDOWN_SECONDS": "0.3",
        "BREAKER_MAX_COOLDOWN_SECONDS": "0.3",
    }
    gateway = Simulator(port=free_port())
    with (
        Producer(amqp_url, prefix) as producer,
        WorkerProcess(amqp_url, prefix, gateway, tmp_path, **quick) as worker,
    ):
        producer.publish_many(bills(30), sweep_every=1, of=2)
        worker.wait_for(lambda: len(worker.events("token.refresh")) >= 6, 30, "it tries again and again")
        assert worker.events("gateway.waiting")
        assert worker.get("/livez")[0] == 200
        assert worker.metrics()("breaker_state") > 0
        assert worker.metrics()("outcomes_total") == 0
        with gateway:
            producer.collect_all(30)
            worker.wait_ready()
            worker.stop()
        books = check_books(producer, all_ended=True, no_duplicates=True)
        assert {(it.fields["status"], it.fields["attempts"]) for it in books.outcomes} == {("expired", 1)}


# -- secrets


def test_no_secret_is_ever_said(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """At LOG_LEVEL=debug, through refusals and lost connections, neither log nor metrics hold a credential."""

    secret, password = "s3cret-of-the-client", "hunter2-secret"
    port = pika.URLParameters(amqp_url).port
    script = Script(
        rates=(Rate(0.2, Fault(code="4019301")), Rate(0.1, Fault(code="4019300")), Rate(0.1, Fault(html=502))),
        token_faults=(Fault(), Fault(html=503), Fault(body='{"accessToken": ""}')),
    )
    with (
        FaultProxy("127.0.0.1", port) as proxy,
        Simulator(script, client_secret=secret) as gateway,
        FaultProxy("127.0.0.1", port) as absent,
    ):
        absent.refuse()
        away = by_way_of(absent.port, f"amqp://guest:{password}@host/%2F")
        settings = {"LOG_LEVEL": "debug", "BREAKER_FAILURES": "1000"}
        urls = f"{away},{by_way_of(proxy.port, amqp_url)},{away}"
        with WorkerProcess(urls, prefix, gateway, tmp_path, **settings) as worker:
            worker.wait_ready()
            tokens = set(gateway.books._tokens)
            with Producer(amqp_url, prefix) as producer:
                producer.publish_many(bills(60))
                producer.collect(20, 30)
                proxy.reset_all()
                producer.collect_all(30)
                tokens |= set(gateway.books._tokens)
                metrics = worker.metrics().text
                worker.stop()
        key = (tmp_path / "gateway-key.pem").read_text().splitlines()[1]
        said = worker.log() + worker.errors() + metrics
        assert absent.refused > 0
        assert len(tokens) > 1
        assert len(worker.events("attempt")) > 60
        for hidden in (secret, password, key, "guest:guest", *tokens):
            assert hidden not in said
