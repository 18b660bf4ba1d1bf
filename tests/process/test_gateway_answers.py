"""Gateways as they really answer, in front of a whole worker: nothing is lost or misread, and no secret gets out."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.altered import altered
from tests.ledger import check_books
from tests.servers import Authority, Peer, answer, serving
from tests.waiting import wait_until
from tests.worker_process import Outcome, WorkerProcess, working
from worker.sandbox.simulator import Fault, Pattern, Script, Simulator

QUICK = {"BREAKER_COOLDOWN_SECONDS": "0.3", "BREAKER_MAX_COOLDOWN_SECONDS": "0.5", "RETRY_INITIAL_SECONDS": "0.05"}


def bills(name: str, count: int) -> list[str]:
    return [f"{name}-{number}" for number in range(count)]


def statuses(outcomes: list[Outcome]) -> set[str]:
    return {str(outcome.fields["status"]) for outcome in outcomes}


def stop_for(worker: WorkerProcess, seconds: float) -> None:
    """All of its processes stand still for so long."""
    os.killpg(worker.pid, signal.SIGSTOP)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > seconds, seconds + 30, "time passes")
    os.killpg(worker.pid, signal.SIGCONT)


def test_a_process_that_was_stopped_loses_no_answer(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Stopped during its calls for longer than budget and time-out: one call for each command, one outcome."""

    settings = {
        **QUICK,
        **altered(tmp_path, "import worker.service as s; s.LOOP_SILENT = 1.5"),  # what a hung loop is restarted for
        "GATEWAY_READ_TIMEOUT_SECONDS": "1.5",
        "RETRY_BUDGET_SECONDS": "1.5",
        "RETRY_DELAYS_SECONDS": "none",
        "WORKER_CONCURRENCY": "16",
    }
    with (
        Simulator(Script(latency=0.4)) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer),
    ):
        for round_ in range(3):
            producer.publish_many(bills(f"r{round_}", 64))
            wait_until(lambda: gateway.report().in_flight >= 8, 30, "calls are under way")
            stop_for(worker, 4.0)
        producer.collect_all(60)
        blocked = worker.events("loop.blocked")
        worker.stop()
        books = check_books(producer, all_ended=True, no_duplicates=True)

    assert statuses(list(books.outcomes)) == {"expired"}
    assert {outcome.fields["attempts"] for outcome in books.outcomes} == {1}
    assert {outcome.fields["effectUnknown"] for outcome in books.outcomes} == {False}
    assert len([line for line in blocked if line["seconds"] > 3.5]) == 3


def test_time_in_which_a_process_was_stopped_is_no_budget(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """The first answer of each command is an error that came while the process stood still: it is asked again."""

    settings = {
        **QUICK,
        "RETRY_BUDGET_SECONDS": "4",
        "RETRY_DELAYS_SECONDS": "none",
        "WORKER_CONCURRENCY": "16",
        "BREAKER_FAILURES": "1000",
    }
    errors = Pattern("", (Fault(code="5009300", latency=1.2),))
    with (
        Simulator(Script(patterns=(errors,))) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer),
    ):
        producer.publish_many(bills("b", 16))
        wait_until(lambda: gateway.report().in_flight, 30, "calls are under way")
        stop_for(worker, 5.0)
        producer.collect_all(60)
        worker.stop()
        books = check_books(producer, all_ended=True, no_duplicates=True)

    assert statuses(list(books.outcomes)) == {"expired"}
    assert {outcome.fields["attempts"] for outcome in books.outcomes} == {2}


DEAD_TOKENS = {
    "a challenge and no body": Fault(body="", http=401, challenge='Bearer realm="snap", error="invalid_token"'),
    "unauthorized": Fault(body='{"message":"Unauthorized"}', http=401),
    "jwt": Fault(body="Jwt is expired", http=401),
    "session": Fault(code="4019300", message="Unauthorized. [Session expired]"),
    "a bare 403": Fault(body="", http=403),
    "a page": Fault(html=403),
}


@pytest.mark.parametrize("told", DEAD_TOKENS.values(), ids=DEAD_TOKENS.keys())
def test_a_dead_token_is_replaced_whatever_it_is_called(
    amqp_url: str, prefix: str, tmp_path: Path, told: Fault
) -> None:
    """Long before its life is over, with one token request; no command is lost or dead-lettered for it."""

    with (
        Simulator(Script(dead_token=told)) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **QUICK) as (worker, producer),
    ):
        producer.publish_many(bills("before", 20))
        producer.collect_all(30)
        gateway.books._tokens.clear()
        producer.publish_many(bills("after", 60))
        producer.collect_all(30)
        worker.stop()
        books = check_books(producer, all_ended=True, no_duplicates=True)

    assert statuses(list(books.outcomes)) == {"expired"}
    assert gateway.report().token_calls == 2


def test_a_wrong_signature_costs_few_tokens(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Every call is refused by 401: the token in doubt is renewed now and then, not for every refusal."""

    with (
        Simulator() as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **QUICK) as (worker, producer),
    ):
        gateway.registration = replace(gateway.registration, client_secret=b"another")
        producer.publish_many(bills("b", 20))
        wait_until(lambda: gateway.report().signature_failures >= 16, 30, "probes fail, too")
        asked = gateway.report().token_calls
        assert worker.running

    assert asked <= 1 + 1 + 1  # at the start, by the first doubt, and after ten seconds on a loaded machine


class Standing:
    """A server that answers every request by a rule, and keeps the heads that it got."""

    def __init__(self, respond: Callable[[str, str], bytes]) -> None:
        self.heads: list[str] = []
        self._respond = respond
        self._lock = threading.Lock()

    def __call__(self, peer: Peer) -> None:
        while (request := peer.request()) is not None:
            head = request.partition(b"\r\n\r\n")[0].decode()
            with self._lock:
                self.heads.append(head)
            peer.send(self._respond(head.split(" ")[1], head))


SUCCESS = answer(b'{"responseCode":"2009300","responseMessage":"Successful"}')


def test_a_gateway_without_tokens_is_asked_for_none(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """rsa-sha256-no-token: no token request, no Authorization, no client secret in the settings."""

    standing = Standing(lambda path, _head: SUCCESS if "expire" in path else answer(b"", status=b"404 Not Found"))
    with Simulator() as keys, serving(standing) as server:
        settings = {
            "GATEWAY_BASE_URL": f"http://127.0.0.1:{server.port}/v1.0",
            "GATEWAY_SIGNATURE": "rsa-sha256-no-token",
            "GATEWAY_CLIENT_SECRET": None,
        }
        with working(amqp_url, prefix, keys, tmp_path, **settings) as (worker, producer):
            producer.publish_many(bills("b", 20))
            producer.collect_all(30)
            worker.stop()

    assert statuses(producer.outcomes) == {"expired"}
    assert len(standing.heads) == 20
    assert not any("authorization" in head.lower() for head in standing.heads)
    assert all("User-Agent: qris-expire-worker/" in head for head in standing.heads)


def test_the_simulator_checks_signatures_without_a_token(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """The same end to end, with the signatures checked."""

    with (
        Simulator(signature="rsa-sha256-no-token") as gateway,
        working(amqp_url, prefix, gateway, tmp_path, GATEWAY_CLIENT_SECRET=None) as (_, producer),
    ):
        producer.publish_many(bills("b", 20))
        producer.collect_all(30)
        report = gateway.report()

    assert statuses(producer.outcomes) == {"expired"}
    assert (report.token_calls, report.signature_failures) == (0, 0)


TOKEN = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJxcmlzIn0.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg"
SECRET = "a-secret-of-the-client"
GRANT = answer(json.dumps({"accessToken": TOKEN, "expiresIn": 900}).encode())


@pytest.mark.parametrize("status", [b"403 Forbidden", b"404 Not Found", b"502 Bad Gateway"])
def test_no_secret_gets_out(amqp_url: str, prefix: str, tmp_path: Path, status: bytes) -> None:
    """A page that repeats our headers: nothing of them is in the log, the outcomes, the dead letters or the metrics."""

    def respond(path: str, head: str) -> bytes:
        if "expire" not in path:
            return GRANT
        said = json.dumps({"responseCode": "4049399", "responseMessage": f"{SECRET} {head[:150]}"})
        return answer((said if status.startswith(b"404") else f"<html>{SECRET}: {head}</html>").encode(), status=status)

    standing = Standing(respond)
    with Simulator() as keys, serving(standing) as server:
        settings = {
            **QUICK,
            "GATEWAY_BASE_URL": f"http://127.0.0.1:{server.port}/v1.0",
            "GATEWAY_CLIENT_SECRET": SECRET,
            "RETRY_MAX_ATTEMPTS": "1",
            "RETRY_DELAYS_SECONDS": "none",
            "LOG_LEVEL": "debug",
        }
        with working(amqp_url, prefix, keys, tmp_path, **settings) as (worker, producer):
            producer.publish("b-0")
            wait_until(lambda: worker.events("attempt"), 30, "it has called")
            _, metrics = worker.get("/metrics")
            if status.startswith(b"404"):
                producer.collect_all(30)
            worker.stop()
            log = worker.log()
        signature = next(head for head in standing.heads if "expire" in head).partition("X-SIGNATURE: ")[2].split()[0]

    texts = [log, str(metrics), *(json.dumps(outcome.fields) for outcome in producer.outcomes)]
    for text in texts:
        assert not any(secret[:16] in text for secret in (TOKEN, SECRET, signature))
    assert "***" in log


def test_a_token_answer_of_another_shape_is_not_told(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Its field names are, and the worker waits for a better one."""

    standing = Standing(lambda _path, _head: answer(json.dumps({"access_token": TOKEN}).encode()))
    with Simulator() as keys, serving(standing) as server:
        settings = {**QUICK, "GATEWAY_BASE_URL": f"http://127.0.0.1:{server.port}/v1.0"}
        with WorkerProcess(amqp_url, prefix, keys, tmp_path, **settings) as worker:
            wait_until(lambda: worker.events("gateway.waiting"), 30, "it says so")
            worker.stop()
            log = worker.log()

    assert "accessToken is missing (its fields are access_token)" in log
    assert TOKEN[:16] not in log


def test_a_client_certificate_that_is_rotated(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """The gateway asks for one, and then for one of another authority: mounted, it is used without a restart."""

    old, new = Authority("old", tmp_path), Authority("new", tmp_path)
    certificate, key = tmp_path / "client.pem", tmp_path / "client.key"

    def mount(authority: Authority) -> None:
        for source, target in zip(authority.issue("worker"), (certificate, key), strict=True):
            (tmp_path / "swap").write_bytes(source.read_bytes())
            (tmp_path / "swap").replace(target)

    mount(old)
    front = old.server("127.0.0.1", wants_client=True)
    with Simulator() as gateway:

        def pass_on(peer: Peer) -> None:
            with socket.create_connection(("127.0.0.1", gateway.port)) as upstream:
                behind = Peer(upstream, 0)
                while (asked := peer.request()) is not None:
                    behind.send(asked)
                    answered = behind.request()
                    if answered is None:
                        return
                    peer.send(answered)

        with serving(pass_on, tls=front) as server:
            settings = {
                **QUICK,
                "GATEWAY_BASE_URL": f"https://127.0.0.1:{server.port}/v1.0",
                "GATEWAY_CA_FILE": str(old.file),
                "GATEWAY_CERT_FILE": str(certificate),
                "GATEWAY_KEY_FILE": str(key),
            }
            with working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer):
                producer.publish_many(bills("old", 10))
                producer.collect_all(30)
                front.load_verify_locations(new.file)
                mount(new)
                worker.wait_for(lambda: worker.events("credentials.reloaded"), 30, "it is taken over")
                producer.publish_many(bills("new", 10))
                producer.collect_all(30)
                worker.stop()

    assert statuses(producer.outcomes) == {"expired"}
