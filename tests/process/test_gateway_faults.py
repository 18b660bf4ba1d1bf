"""A gateway that fails, throttles, refuses and forgets, on real processes: nothing is lost, and nothing is spent."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.altered import altered
from tests.brokers import PrivateBroker
from tests.ledger import check_books, take_stock
from tests.proxy import FaultProxy
from tests.rabbit import Rabbit, address, by_way_of, delete_topology, new_prefix
from tests.servers import Authority, Peer, Server, serving
from tests.waiting import wait_until
from tests.worker_process import Outcome, Producer, WorkerProcess, working
from worker.core.lanes import LANES
from worker.core.topology import topology
from worker.sandbox.broker import free_port
from worker.sandbox.simulator import Call, Fault, Pattern, Rate, Script, Simulator, private_pem

BAD_BILL = Script(patterns=(Pattern("^bad", (Fault(code="5009300", repeat=True),)),))

SLACK = 10.0
"""Seconds by which a loaded machine may be late with something."""


def always(fault: Fault) -> Script:
    return Script(rates=(Rate(1.0, fault),))


def bills(name: str, count: int) -> list[str]:
    return [f"{name}-{number}" for number in range(count)]


def statuses(outcomes: list[Outcome]) -> set[str]:
    return {str(outcome.fields["status"]) for outcome in outcomes}


def moment(line: dict[str, str]) -> float:
    """Unix seconds of a log line."""
    return datetime.fromisoformat(line["timestamp"]).timestamp()


def spent(worker: WorkerProcess) -> dict[str, float]:
    """What an outage must not move."""
    metrics = worker.metrics()
    names = ("outcomes_total", "delayed_retries_total", "dead_letters_total", "broker_reconnects_total")
    return {name: metrics(name) for name in names}


def counted(worker: WorkerProcess, facts: dict[str, float]) -> None:
    """Counted when the confirm has come, which may be after the outcome."""
    wait_until(lambda: spent(worker)["outcomes_total"] >= facts["outcomes_total"], 30, "counted")
    assert spent(worker) == facts


# -- the breaker: whatever is wrong, it pauses, and no command loses an attempt

SENDERS = 4
PREFETCHED = 2 * 4 + 2 * 3
"""Deliveries that the two lanes may have in the process: two for each sender that may work for them."""


@dataclass
class Shop:
    """A worker that is shared by tests which break its gateway and repair it again."""

    gateway: Simulator
    worker: WorkerProcess
    producer: Producer


@pytest.fixture(scope="module")
def shop(amqp_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    prefix, folder = new_prefix(), tmp_path_factory.mktemp("shop")
    settings = {
        **altered(folder, "import worker.app.dispatch as d; d.FETCH_EVERY = 0.2"),
        "WORKER_CONCURRENCY": str(SENDERS),
        "BREAKER_FAILURES": "3",
        "BREAKER_COOLDOWN_SECONDS": "0.2",
        "BREAKER_MAX_COOLDOWN_SECONDS": "0.4",
    }
    with (
        # On a port that nobody is given while it is away.
        Simulator(keep_calls=100_000, port=free_port()) as gateway,
        working(amqp_url, prefix, gateway, folder, **settings) as (worker, producer),
    ):
        yield Shop(gateway, worker, producer)
    delete_topology(amqp_url, prefix)


def refuse_connections(gateway: Simulator) -> None:
    gateway.stop()


def kill_tokens(fault: Fault) -> Callable[[Simulator], None]:
    def kill(gateway: Simulator) -> None:
        gateway.replace(Script(token_faults=(replace(fault, repeat=True),)))
        gateway.books._tokens.clear()

    return kill


def answer(fault: Fault) -> Callable[[Simulator], None]:
    return lambda gateway: gateway.replace(always(fault))


TROUBLES = {
    "connections refused": refuse_connections,
    "connections reset": answer(Fault(reset="before")),
    "general errors": answer(Fault(code="5009300")),
    "a firewall's page": answer(Fault(html=403)),
    "a page that says 200": answer(Fault(body="<html>maintenance</html>")),
    "invalid signature": answer(Fault(code="4019300")),
    "client forbidden": answer(Fault(code="4049300")),
    "bad request": answer(Fault(code="4049301", message="Bad Request")),
    "token service down": kill_tokens(Fault(html=503)),
    "token service refuses": kill_tokens(Fault(code="4017300")),
}


MAY_TAKE_EFFECT = {"connections reset", "general errors", "a page that says 200"}
RARE = {"connections reset", "a page that says 200", "bad request", "token service refuses"}


@pytest.mark.parametrize("trouble", [pytest.param(it, marks=pytest.mark.slow) if it in RARE else it for it in TROUBLES])
def test_an_outage_pauses_and_spends_nothing(shop: Shop, trouble: str) -> None:
    """The breaker opens: no outcome, dead letter or delayed round while it lasts, bounded unacked, then all expire."""

    gateway, worker, producer = shop.gateway, shop.worker, shop.producer
    wait_until(lambda: spent(worker)["outcomes_total"] == len(producer.outcomes), 30, "all so far are counted")
    names, before, known = producer.names, spent(worker), len(worker.events("breaker.opened"))
    TROUBLES[trouble](gateway)
    began = len(producer.published)
    producer.publish_many(bills(trouble.replace(" ", "-").replace("'", ""), 60), sweep_every=1, of=2)
    worker.wait_for(lambda: len(worker.events("breaker.opened")) > known, 30, "the breaker opens")
    at = len(worker.events("attempt"))
    worker.wait_for(lambda: len(worker.events("attempt")) >= at + 2, 30, "probes fail")
    assert worker.metrics()("consumption_paused", reason="breaker") == 1
    assert worker.metrics()("breaker_state") > 0
    status, body = worker.get("/readyz")
    assert status == 503
    assert re.search("open", json.loads(body)["components"]["breaker"])
    assert worker.get("/livez")[0] == 200
    assert spent(worker) == before
    probes = len(worker.events("attempt")) - at + SENDERS
    ready = sum(producer.rabbit.depth(names.queue(lane)) for lane in LANES)
    assert 60 - PREFETCHED - probes <= ready
    assert producer.rabbit.depth(names.dead) == 0
    assert {producer.rabbit.depth(names.retry(lane, seconds)) for lane in LANES for seconds in (1, 2)} == {0}
    gateway.start()
    gateway.replace(Script())
    producer.collect_all(30)
    ours = {sent.id for sent in producer.published[began:]}
    mine = [outcome for outcome in producer.outcomes if outcome.command_id in ours]
    assert (len(mine), statuses(mine)) == (60, {"expired"})
    # Every call counts, though none of them cost anything.
    reached = gateway.report().calls_by_bill
    if trouble != "connections refused":
        assert all(it.fields["attempts"] == reached[it.fields["billnumber"]] for it in mine)
    assert all(len(it.fields["externalIds"]) == it.fields["attempts"] >= 1 for it in mine)
    # Nothing was given back and delivered again, either: that would count against the delivery limit.
    unknown = [it.fields for it in mine if it.fields["effectUnknown"]]
    assert bool(unknown) == (trouble in MAY_TAKE_EFFECT), unknown
    worker.wait_ready()
    ended = {**before, "outcomes_total": before["outcomes_total"] + 60}
    counted(worker, ended)
    assert worker.metrics()("breaker_state") == worker.metrics()("in_flight") == 0


# -- the breaker: one outage from a cold start, seen in the gateway's own record of calls

LATENCY = 0.2
COOLDOWN, CEILING = 0.5, 1.2
TURNS = 4
"""Turns of three probes each."""


@dataclass(frozen=True)
class Outage:
    """A worker that never saw this gateway work, until it did."""

    opened_at: float
    spent: dict[str, float]
    probes: list[Call]
    calls_after: list[Call]
    """From the probe that succeeded on."""
    outcomes: list[Outcome]


@pytest.fixture(scope="module")
def outage(amqp_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outage]:
    prefix, folder = new_prefix(), tmp_path_factory.mktemp("outage")
    with Rabbit(amqp_url) as rabbit:
        rabbit.declare(topology(prefix, "quorum", (1, 2)))
    settings = {
        **altered(folder, "import worker.app.dispatch as d; d.FETCH_EVERY = 0.1"),
        "WORKER_CONCURRENCY": "16",
        "BREAKER_FAILURES": "3",
        "BREAKER_COOLDOWN_SECONDS": str(COOLDOWN),
        "BREAKER_MAX_COOLDOWN_SECONDS": str(CEILING),
    }
    broken = replace(always(Fault(code="5009300")), latency=LATENCY)
    with (
        Simulator(broken) as gateway,
        Producer(amqp_url, prefix) as producer,
        WorkerProcess(amqp_url, prefix, gateway, folder, **settings) as worker,
    ):
        producer.publish_many(bills("b", 60))
        worker.wait_for(lambda: worker.events("breaker.opened"), 30, "it opens")
        (opened,) = worker.events("breaker.opened")
        # Nobody calls between the opening and the first cooldown's end, so what is made later is a probe.
        began = moment(opened) + COOLDOWN / 2

        def probes() -> list[Call]:
            calls = gateway.report().calls
            return [call for call in calls if signed_at(call) > began and call.answer == "5009300"]

        worker.wait_for(lambda: len(probes()) >= 3 * TURNS, 30, "it probes")
        lost = spent(worker)
        gateway.replace(Script(latency=LATENCY))
        producer.collect_all(30)
        worker.stop()
        check_books(producer, all_ended=True, no_duplicates=True)
        later = [call for call in gateway.report().calls if call.answer == "2009300"]
        yield Outage(moment(opened), lost, probes(), later, producer.outcomes)
    delete_topology(amqp_url, prefix)


def test_it_opens_from_a_cold_start(outage: Outage) -> None:
    """Without a single success before: it opens, spends nothing, and all expire when the gateway works."""

    assert set(outage.spent.values()) == {0}
    assert (len(outage.outcomes), statuses(outage.outcomes)) == (60, {"expired"})


def turns(outage: Outage) -> list[list[Call]]:
    """The probes, three by three."""
    probes = outage.probes[: 3 * TURNS]
    return [probes[number : number + 3] for number in range(0, len(probes), 3)]


def test_probes_go_out_three_at_a_time(outage: Outage) -> None:
    """No further probe is sent before the three before it were answered, and their cooldown is over."""

    for one, other in pairwise(turns(outage)):
        assert other[0].at - max(call.at for call in one) >= LATENCY + COOLDOWN


def test_each_probe_takes_another_command(outage: Outage) -> None:
    """While there are commands that were no probe yet, no bill is a probe twice."""

    assert len({call.billnumber for call in outage.probes}) == len(outage.probes)


def test_the_cooldown_doubles_to_its_ceiling(outage: Outage) -> None:
    """It begins with BREAKER_COOLDOWN_SECONDS, doubles when all three probes fail, and stays at the maximum."""

    at = [outage.opened_at, *(turn[0].at for turn in turns(outage))]
    pauses = [after - before - LATENCY for before, after in pairwise(at)]
    # The log line about the opening comes a moment after it.
    assert pauses[0] + LATENCY >= COOLDOWN - 0.2
    assert pauses[1] >= 2 * COOLDOWN
    assert min(pauses[2:]) >= CEILING
    # What a loaded machine adds is less than what it would be, doubled on and on.
    assert pauses[TURNS - 1] < COOLDOWN * 2 ** (TURNS - 1)


def test_recovery_ramps_up(outage: Outage) -> None:
    """After the probes that succeed, each answer lets one more call go at once: who comes back is not flooded."""

    calls = outage.calls_after
    assert calls[0].at + LATENCY <= calls[3].at
    for number, call in enumerate(calls):
        answered = sum(other.at + LATENCY <= call.at for other in calls)
        assert number - answered <= 3 + answered
    assert len(calls) == 60


# -- the breaker and single bills


@pytest.fixture(scope="module")
def till(amqp_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A worker for which one bill fails for ever, and whose backoffs are long enough to be noticed. Its breaker bears
    one failure more than a probe under way and a whole round: else a bad bill alone would open it again."""
    prefix = new_prefix()
    settings = {
        "WORKER_CONCURRENCY": "4",
        "RETRY_INITIAL_SECONDS": "2",
        "RETRY_MAX_SECONDS": "2",
        "RETRY_DELAYS_SECONDS": "1",
        "BREAKER_FAILURES": "6",
        "BREAKER_COOLDOWN_SECONDS": "0.5",
        "BREAKER_MAX_COOLDOWN_SECONDS": "1",
    }
    with (
        Simulator(BAD_BILL) as gateway,
        working(amqp_url, prefix, gateway, tmp_path_factory.mktemp("till"), **settings) as (worker, producer),
    ):
        yield Shop(gateway, worker, producer)
    delete_topology(amqp_url, prefix)


def test_a_bad_bill_among_good_ones_opens_nothing(till: Shop) -> None:
    """It ends unresolved after its rounds, the breaker stays closed, and the good ones beside it do not wait."""

    producer, good = till.producer, 0
    bad = producer.publish("bad-1")
    while not any(outcome.command_id == bad.id for outcome in producer.outcomes):
        assert good < 5000, "the bad bill does not end"
        assert producer.of(producer.publish(f"good-{good}")).fields["status"] == "expired"
        good += 1
    fields = producer.of(bad).fields
    assert (fields["status"], fields["reason"], fields["attempts"]) == ("unresolved", "retries_exhausted", 8)
    assert till.worker.events("breaker.opened") == []
    # One after the other, and more of them than the bad one has calls: they do not take turns with it.
    assert good > 8


def test_the_next_good_command_closes_what_a_bad_bill_alone_has_opened(till: Shop) -> None:
    """A bad bill alone may open the breaker; one good command closes it within a cooldown, and the bad one ends."""

    producer, worker = till.producer, till.worker
    bad = producer.publish("bad-alone")
    worker.wait_for(lambda: worker.events("breaker.opened"), 30, "it opens")
    calls = till.gateway.report().calls_by_bill["bad-alone"]
    wait_until(lambda: till.gateway.report().calls_by_bill["bad-alone"] > calls, 30, "it is the probe")
    began = time.monotonic()
    good = producer.publish("good-at-last")
    assert producer.of(good).fields["status"] == "expired"
    worker.wait_for(lambda: worker.events("breaker.closed"), 30, "it closes")
    assert time.monotonic() - began < 1 + 2 * SLACK
    assert producer.of(bad, 60).fields["reason"] == "retries_exhausted"


# -- the breaker and the broker


@pytest.mark.parametrize(
    ("kind", "pause_after"), [pytest.param("quorum", 1.0, marks=pytest.mark.slow), ("classic", 0.0)]
)
def test_what_is_on_its_way_when_it_opens_is_kept(
    amqp_url: str, prefix: str, tmp_path: Path, kind: str, pause_after: float
) -> None:
    """Deliveries under way while consumption is being paused are kept: sent back, they would count as redelivered."""

    settings = {
        **altered(tmp_path, f"import worker.app.dispatch as d; d.PAUSE_AFTER = {pause_after}"),
        "AMQP_QUEUE_TYPE": kind,
        "BREAKER_FAILURES": "3",
        "BREAKER_COOLDOWN_SECONDS": "1.5",
        "BREAKER_MAX_COOLDOWN_SECONDS": "1.5",
    }
    with (
        FaultProxy(*address(amqp_url)) as proxy,
        # So slow that there is work left for both outages, however late they begin.
        Simulator(Script(latency=0.1)) as gateway,
        WorkerProcess(by_way_of(proxy.port, amqp_url), prefix, gateway, tmp_path, **settings) as worker,
    ):
        worker.wait_ready()
        with Producer(amqp_url, prefix) as producer:
            proxy.latency(0.05)
            producer.publish_many(bills("b", 600))
            for outages in range(1, 3):
                producer.collect(60, 30)
                gateway.replace(always(Fault(code="4019300")))
                worker.wait_for(lambda n=outages: len(worker.events("breaker.opened")) == n, 30, "it opens")
                gateway.replace(Script(latency=0.1 if outages == 1 else 0))
                worker.wait_for(lambda n=outages: len(worker.events("breaker.closed")) == n, 30, "it closes")
            producer.collect_all(30)
            worker.stop()
            check_books(producer, all_ended=True, no_duplicates=True)
            # A refused signature takes no effect; only a delivery that came back makes it unknown.
            assert [it.command_id for it in producer.outcomes if it.fields["effectUnknown"]] == []


def test_recovery_does_not_wait_for_what_the_broker_took_back(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """A connection lost while the breaker is open: the next probe is a command that is still ours, and closes it."""

    settings = {
        "WORKER_CONCURRENCY": "16",
        "BREAKER_FAILURES": "3",
        "BREAKER_COOLDOWN_SECONDS": "1",
        "BREAKER_MAX_COOLDOWN_SECONDS": "1",
    }
    with (
        FaultProxy(*address(amqp_url)) as proxy,
        Simulator(always(Fault(code="5009300"))) as gateway,
        WorkerProcess(by_way_of(proxy.port, amqp_url), prefix, gateway, tmp_path, **settings) as worker,
    ):
        worker.wait_ready()
        with Producer(amqp_url, prefix) as producer:
            producer.publish_many(bills("b", 80), sweep_every=1, of=2)
            worker.wait_for(lambda: worker.events("breaker.opened"), 30, "it opens")
            proxy.reset_all()
            worker.wait_for(lambda: worker.metrics()("broker_reconnects_total") >= 1, 30, "it is back")
            gateway.replace(Script())
            began = time.monotonic()
            worker.wait_for(lambda: worker.events("breaker.closed"), 30, "it closes")
            assert time.monotonic() - began < 1 + 1 + SLACK
            producer.collect_all(30)
            worker.stop()
            books = check_books(producer, all_ended=True, no_duplicates=True)
            calls = gateway.report().calls_by_bill
            assert all(it.fields["attempts"] == calls[it.fields["billnumber"]] for it in books.outcomes)


def test_what_the_broker_took_back_is_not_given_back_again(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """A connection lost while the breaker is open, then SIGTERM: each command is in its lane once, not twice."""

    settings = {"BREAKER_FAILURES": "3", "BREAKER_COOLDOWN_SECONDS": "60", "BREAKER_MAX_COOLDOWN_SECONDS": "60"}
    with (
        FaultProxy(*address(amqp_url)) as proxy,
        Simulator(always(Fault(code="5009300"))) as gateway,
        WorkerProcess(by_way_of(proxy.port, amqp_url), prefix, gateway, tmp_path, **settings) as worker,
    ):
        worker.wait_ready()
        with Producer(amqp_url, prefix) as producer:
            producer.publish_many(bills("b", 40), sweep_every=1, of=2)
            worker.wait_for(lambda: worker.events("breaker.opened"), 30, "it opens")
            proxy.reset_all()
            worker.wait_for(lambda: worker.metrics()("broker_reconnects_total") >= 1, 30, "it is back")
            worker.stop()
            lanes = [producer.names.queue(lane) for lane in LANES]
            wait_until(lambda: sum(map(producer.rabbit.depth, lanes)) >= 40, 30, "all are back in their lanes")
            assert sum(map(producer.rabbit.depth, lanes)) == 40
            assert len(take_stock(producer).check().waiting) == 40


# -- the breaker, for longer than a delivery may be kept


def test_an_outage_longer_than_the_hold_limit_returns_commands(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """What waits too long goes to its lane's end as a fresh message: no redelivery counts, its calls stay known."""

    settings = {"BREAKER_FAILURES": "3", "BREAKER_COOLDOWN_SECONDS": "60", "BREAKER_MAX_COOLDOWN_SECONDS": "60"}
    impatient = altered(tmp_path, "import worker.app.dispatch as d; d.LONGEST_WAIT = 1.5")
    with (
        Simulator(always(Fault(code="5009300"))) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="4", **settings, **impatient) as (
            worker,
            producer,
        ),
    ):
        producer.publish_many(bills("b", 40), sweep_every=1, of=2)
        worker.wait_for(lambda: worker.events("breaker.opened"), 30, "it opens")
        lanes = [producer.names.queue(lane) for lane in LANES]
        wait_until(lambda: sum(producer.rabbit.depth(lane) for lane in lanes) == 40, 30, "all were returned")
        calls = gateway.report().calls_by_bill
        for lane in lanes:
            messages = producer.rabbit.look(lane)
            returned = [message for message in messages if "qris-hop" in (message.properties.headers or {})]
            # They are behind those that were never taken.
            assert messages[len(messages) - len(returned) :] == returned
            assert len(returned) >= 3
            for message in messages:
                assert not message.redelivered
                assert (message.properties.headers or {}).get("x-delivery-count", 0) == 0
            for message in returned:
                called = calls.get(json.loads(message.body)["billnumber"], 0)
                assert message.properties.headers["qris-attempts"] == called
        assert set(spent(worker).values()) == {0}
        worker.stop()
        gateway.replace(Script())
        worker.start().wait_ready()
        producer.collect_all(30)
        worker.stop()
        books = check_books(producer, all_ended=True, no_duplicates=True)
        calls = gateway.report().calls_by_bill
        assert statuses(list(books.outcomes)) == {"expired"}
        assert all(it.fields["attempts"] == calls[it.fields["billnumber"]] for it in books.outcomes)


# -- secrets that are rotated while it runs


@dataclass
class Vault:
    """A worker whose secrets are mounted files, and its gateway behind TLS."""

    shop: Shop
    folder: Path
    key_file: Path
    authorities: tuple[Authority, Authority]
    server: Server
    certified_by: Callable[[Authority], None]

    def mount(self, path: Path, content: bytes) -> None:
        """As a mounted secret is swapped: another file takes the name."""
        new = self.folder / "new"
        new.write_bytes(content)
        new.replace(path)

    def is_kept(self, variable: str) -> None:
        """It has seen the broken file, says which, and works with what it had."""
        worker, producer = self.shop.worker, self.shop.producer
        worker.wait_for(
            lambda: any(variable in line["reason"] for line in worker.events("credentials.kept")), 10, "it says so"
        )
        assert producer.of(producer.publish(f"kept-{variable}")).fields["status"] == "expired"

    def recovers(self, name: str, repair: Callable[[], None]) -> None:
        """The gateway wants the new secret: it pauses until it is mounted, then everything expires."""
        worker, producer = self.shop.worker, self.shop.producer
        wait_until(lambda: spent(worker)["outcomes_total"] == len(producer.outcomes), 30, "all so far are counted")
        before, known = spent(worker), len(worker.events("breaker.opened"))
        producer.publish_many(bills(name, 10))
        worker.wait_for(lambda: len(worker.events("breaker.opened")) > known, 30, "it opens")
        assert spent(worker) == before
        repair()
        producer.collect_all(30)
        assert statuses(producer.outcomes) == {"expired"}


@pytest.fixture(scope="module")
def vault(amqp_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    prefix, folder = new_prefix(), tmp_path_factory.mktemp("vault")
    old, new = Authority("old", folder), Authority("new", folder)
    secret, ca = folder / "secret", folder / "ca"
    secret.write_text("demo-secret\n")
    ca.write_bytes(old.file.read_bytes())
    front = old.server("127.0.0.1")
    current = {"context": front}

    def choose(connection: object, _name: object, _context: object) -> None:
        connection.context = current["context"]  # type: ignore[attr-defined]

    front.sni_callback = choose

    with ExitStack() as stack:
        gateway = stack.enter_context(Simulator())

        def pass_on(peer: Peer) -> None:
            with socket.create_connection(("127.0.0.1", gateway.port)) as upstream:
                behind = Peer(upstream, 0)
                while (asked := peer.request()) is not None:
                    behind.send(asked)
                    answered = behind.request()
                    if answered is None:
                        return
                    peer.send(answered)

        server = stack.enter_context(serving(pass_on, tls=front))

        def certified_by(authority: Authority) -> None:
            current["context"] = authority.server("127.0.0.1")
            for peer in server.peers:
                peer.sock.close()

        settings: dict[str, str | None] = {
            **altered(folder, "import worker.wiring as w; w.SECRETS_EVERY = 0.3"),
            "GATEWAY_BASE_URL": f"https://127.0.0.1:{server.port}/v1.0",
            "GATEWAY_CA_FILE": str(ca),
            "GATEWAY_CLIENT_SECRET": None,
            "GATEWAY_CLIENT_SECRET_FILE": str(secret),
            "BREAKER_FAILURES": "3",
            "BREAKER_COOLDOWN_SECONDS": "0.2",
            "BREAKER_MAX_COOLDOWN_SECONDS": "0.4",
        }
        worker, producer = stack.enter_context(working(amqp_url, prefix, gateway, folder, **settings))
        yield Vault(
            Shop(gateway, worker, producer), folder, folder / "gateway-key.pem", (old, new), server, certified_by
        )
    delete_topology(amqp_url, prefix)


def test_a_rotated_client_secret_is_taken_over(vault: Vault) -> None:
    """An empty file keeps the old secret and says so; the new one ends the outage without a restart."""

    gateway, file = vault.shop.gateway, vault.folder / "secret"
    vault.mount(file, b"\n")
    vault.is_kept("GATEWAY_CLIENT_SECRET")
    gateway.registration = replace(gateway.registration, client_secret=b"rotated")
    vault.recovers("secret", lambda: vault.mount(file, b"rotated\n"))


def test_a_rotated_private_key_is_taken_over(vault: Vault) -> None:
    """A damaged PEM keeps the old key and says so; the new one ends the outage without a restart."""

    gateway, key = vault.shop.gateway, rsa.generate_private_key(public_exponent=65537, key_size=2048)
    vault.mount(vault.key_file, private_pem(key)[:200])
    vault.is_kept("GATEWAY_PRIVATE_KEY_FILE")
    gateway.registration = replace(gateway.registration, public_key=key.public_key())
    gateway.books._tokens.clear()
    vault.recovers("key", lambda: vault.mount(vault.key_file, private_pem(key)))


def test_a_rotated_ca_is_taken_over(vault: Vault) -> None:
    """A file without certificates keeps the old CA and says so; the new one ends the outage without a restart."""

    file, (_, new) = vault.folder / "ca", vault.authorities
    vault.mount(file, b"-----BEGIN CERTIFICATE-----\nrubbish\n")
    vault.is_kept("GATEWAY_CA_FILE")
    vault.certified_by(new)
    vault.recovers("ca", lambda: vault.mount(file, new.file.read_bytes()))


@pytest.mark.slow
def test_a_rotated_broker_password_is_taken_over(fresh: PrivateBroker, tmp_path: Path) -> None:
    """It is used by the next connection; a broken file keeps the old URL and says so; refused, it waits and lives."""

    fresh.ctl("add_user", "worker", "first-password")
    fresh.ctl("set_permissions", "worker", ".*", ".*", ".*")
    file, prefix = tmp_path / "url", new_prefix()

    def url(password: str) -> str:
        return fresh.url.replace("guest:guest", f"worker:{password}")

    def mount(content: str) -> None:
        (tmp_path / "new").write_text(content)
        (tmp_path / "new").replace(file)

    mount(url("first-password") + "\n")
    with (
        Simulator() as gateway,
        WorkerProcess(fresh.url, prefix, gateway, tmp_path, AMQP_URL=None, AMQP_URL_FILE=str(file)) as worker,
    ):
        worker.wait_ready()
        with Producer(fresh.url, prefix) as producer:
            assert producer.of(producer.publish("b-1")).fields["status"] == "expired"
            mount("not a URL")
            fresh.ctl("close_all_user_connections", "worker", "test")
            worker.wait_for(lambda: worker.events("credentials.kept"), 30, "it keeps the old one")
            assert producer.of(producer.publish("b-2")).fields["status"] == "expired"
            fresh.ctl("change_password", "worker", "second-password")
            fresh.ctl("close_all_user_connections", "worker", "test")
            worker.wait_for(
                lambda: any("refuses our login" in line["reason"] for line in worker.events("broker.waiting")),
                20,
                "it is refused",
            )
            assert worker.get("/livez")[0] == 200
            assert worker.get("/readyz")[0] == 503
            mount(url("second-password"))
            assert producer.of(producer.publish("b-3"), 30).fields["status"] == "expired"
            worker.stop()
            check_books(producer, all_ended=True, no_duplicates=True)
    assert "password" not in worker.log() + worker.errors()


# -- throttling and the rate limit


@pytest.mark.parametrize("form", ["seconds", pytest.param("date", marks=pytest.mark.slow)])
def test_a_throttled_answer_holds_every_sender(shop: Shop, form: str) -> None:
    """No call arrives before Retry-After is over, in seconds or as a date; then all expire, by one call each."""

    gateway, worker, producer = shop.gateway, shop.worker, shop.producer
    before = spent(worker)
    until = int(time.time()) + 7
    value = formatdate(until, usegmt=True) if form == "date" else "6"
    gateway.replace(Script(patterns=(Pattern(f"^slow-{form}", (Fault(code="4299300", retry_after=value),)),)))
    slow = producer.publish(f"slow-{form}")
    wait_until(lambda: gateway.report().calls_by_bill.get(f"slow-{form}"), 30, "it is called for")
    (call,) = (call for call in gateway.report().calls if call.billnumber == f"slow-{form}")
    worker.wait_for(lambda: worker.metrics()("consumption_paused", reason="throttled") == 1, 30, "it is throttled")
    assert worker.components()["throttle"] == "throttled"
    began = len(producer.published)
    producer.publish_many(bills(f"held-{form}", 40), sweep_every=1, of=2)
    producer.collect_all(30)
    hold = until - call.at if form == "date" else 6
    early = [late.at - call.at for late in gateway.report().calls if call.at < late.at < call.at + hold - 0.1]
    assert early == []
    assert producer.of(slow).fields["attempts"] == 2
    ours = {sent.id for sent in producer.published[began:]}
    held = [outcome for outcome in producer.outcomes if outcome.command_id in ours]
    assert {(it.fields["status"], it.fields["attempts"]) for it in held} == {("expired", 1)}
    worker.wait_ready()
    ended = {**before, "outcomes_total": before["outcomes_total"] + 41}
    counted(worker, ended)


def test_a_hold_that_is_over_at_once(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Shorter than a turn of the loop, as for a Retry-After that names this very second: senders go on all the same."""

    brief = {"RETRY_INITIAL_SECONDS": "0.0001", "RETRY_MAX_SECONDS": "0.0001"}
    script = Script(patterns=(Pattern("^slow", (Fault(code="4299300"),)),))
    with Simulator(script) as gateway, working(amqp_url, prefix, gateway, tmp_path, **brief) as (_, producer):
        outcomes = [producer.of(producer.publish(bill)) for bill in bills("slow", 20)]

    assert statuses(outcomes) == {"expired"}


def test_throttling_costs_nothing_however_long_it_lasts(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """A gateway that throttles for longer than the budget, more often than there are attempts: no delayed round, no
    dead letter, and every command is expired in the end."""

    script = Script(patterns=(Pattern("^slow", (Fault(code="4299300", retry_after="1"),) * 6),))
    settings = {"RETRY_BUDGET_SECONDS": "1", "RETRY_MAX_ATTEMPTS": "2", "RETRY_DELAYS_SECONDS": "none"}
    with (
        Simulator(script) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer),
    ):
        slow = producer.publish("slow-1")
        fields = producer.of(slow, 30).fields
        assert (fields["status"], fields["attempts"], fields["effectUnknown"]) == ("expired", 7, False)
        assert worker.metrics()("retries_total", reason="throttled") == 6
        assert worker.metrics()("delayed_retries_total") == 0
        worker.stop()
        check_books(producer, all_ended=True, no_duplicates=True)


# -- things that share the worker do not harm each other

BROKEN_MERCHANT = Pattern("^bad", (Fault(code="5009300", repeat=True),))


@pytest.mark.parametrize(
    ("bad", "good", "seconds"),
    [(60, 40, 1.0), pytest.param(400, 300, 10.0, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])],
)
def test_a_broken_merchant_stops_no_cancellation(
    amqp_url: str, prefix: str, tmp_path: Path, bad: int, good: int, seconds: float
) -> None:
    """A sweep that begins with bills that always fail: cancellations are expired as they come, and the good bills
    behind the bad ones while those go through their rounds."""

    quick = {"BREAKER_COOLDOWN_SECONDS": "2", "RETRY_DELAYS_SECONDS": "1,2"}
    settings = quick if bad < 400 else {"WORKER_CONCURRENCY": "32", "RETRY_DELAYS_SECONDS": None}
    with (
        Simulator(Script(patterns=(BROKEN_MERCHANT,)), keep_calls=100_000) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **settings) as (worker, producer),
    ):
        producer.publish_many([*bills("bad", bad), *bills("good", good)])
        published: list[float] = []
        behind = {sent.id for sent in producer.published[bad:]}
        worker.wait_for(lambda: worker.events("breaker.opened"), 30, "the bad bills open the breaker of the sweep")
        deadline = time.monotonic() + (90 if bad < 400 else 1200)
        while not behind <= {outcome.command_id for outcome in producer.outcomes}:
            assert time.monotonic() < deadline, "the good bills are not reached"
            began = time.monotonic()
            published.append(time.time())
            outcome = producer.of(producer.publish(f"now-{len(published)}"), 30)
            assert outcome.fields["status"] == "expired"
            time.sleep(max(0.0, began + seconds - time.monotonic()))  # the pace of the cancellations
        assert statuses([it for it in producer.outcomes if it.command_id in behind]) == {"expired"}
        called = {call.billnumber: call.at for call in gateway.report().calls}
        waits = sorted(called[f"now-{number}"] - at for number, at in enumerate(published, 1))
        assert waits[int(len(waits) * 0.95)] < 2
        assert worker.components()["breaker"] in {"ok", "sweep open", "sweep half-open"}
        assert {event["lane"] for event in worker.events("breaker.opened")} == {"sweep"}


def test_what_a_worker_without_a_way_out_holds_goes_to_the_others(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Of two workers one cannot reach the gateway: what it has in hand is expired by the other, soon."""

    nowhere = {"GATEWAY_BASE_URL": f"http://127.0.0.1:{free_port()}/v1.0", "BREAKER_FAILURES": "3"}
    with (
        Simulator(Script(latency=0.05)) as gateway,
        working(amqp_url, prefix, gateway, tmp_path) as (_, producer),
        WorkerProcess(amqp_url, prefix, gateway, tmp_path, **nowhere) as broken,
    ):
        broken.wait_for(lambda: broken.components().get("consumer") == "ok", 30, "it consumes")
        producer.publish_many(bills("b", 300), sweep_every=1, of=2)
        broken.wait_for(lambda: broken.events("attempt"), 30, "it tries")
        producer.collect_all(60)
        assert statuses(producer.outcomes) == {"expired"}
        check_books(producer, all_ended=True)


@pytest.mark.slow
def test_bad_bills_ahead_of_good_ones(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """A sweep alone: the probes find the good bills behind the bad ones, and all good ones are expired in a minute."""

    settings = {"BREAKER_COOLDOWN_SECONDS": "1", "BREAKER_MAX_COOLDOWN_SECONDS": "2"}
    with (
        Simulator(Script(patterns=(BROKEN_MERCHANT,))) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, **settings) as (_, producer),
    ):
        producer.publish_many([*bills("bad", 40), *bills("good", 300)])
        producer.collect(300, 60)
        assert {it.command_id for it in producer.outcomes if it.fields["status"] == "expired"} >= {
            sent.id for sent in producer.published[40:]
        }


RATE = 40
BURST = 15
"""What a machine that stalls again and again may bring at once, above the rate; without a limit all senders would."""


def signed_at(call: Call) -> float:
    """When the worker made it, to the millisecond: an arrival is also late by what the simulator's machine does."""
    return datetime.strptime(call.external_id[:17] + "000+0700", "%Y%m%d%H%M%S%f%z").timestamp()


def test_the_rate_limit_is_kept(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """GATEWAY_MAX_REQUESTS_PER_SECOND is used and not exceeded by 5 %, without bursts, and cancellations overtake the
    sweep in the queue."""

    with (
        Simulator(Script(latency=0.02)) as gateway,
        working(
            amqp_url, prefix, gateway, tmp_path, GATEWAY_MAX_REQUESTS_PER_SECOND=str(RATE), WORKER_CONCURRENCY="16"
        ) as (worker, producer),
    ):
        producer.publish_many(bills("sweep", 160), sweep_every=1)
        producer.collect(40, 30)
        urgent = time.time()
        for number in range(20):
            producer.publish(f"urgent-{number}")
        published = time.time()
        producer.collect_all(30)
        worker.stop()
        calls = gateway.report().calls
    at = sorted(map(signed_at, calls))
    assert len(at) == 180
    # A loaded machine may be slower, and late with some of them at once; see the next test.
    assert RATE / 2 < (len(at) - 1) / (at[-1] - at[0]) < RATE * 1.05
    for number, first in enumerate(at):
        assert sum(first <= other < first + 1 for other in at[number:]) <= RATE * 1.05 + BURST
    queued = [call.billnumber.partition("-")[0] for call in calls if call.at > urgent]
    last = len(queued) - queued[::-1].index("urgent")
    # Every eighth turn is the sweep's, and what came while they were being published and delivered: in order of their
    # publication all that was left of the sweep, a hundred or so, would have come first.
    assert queued[:last].count("sweep") <= 20 / 7 + 1 + (published - urgent) * RATE + RATE / 2
    assert {call.answer for call in calls} == {"2009300"}


def test_a_stalled_process_does_not_make_up_for_lost_time_at_once(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Stopped for a second and continued, as by a throttled CPU: its senders do not all call in the same moment."""

    limit = {"GATEWAY_MAX_REQUESTS_PER_SECOND": str(RATE), "WORKER_CONCURRENCY": "32"}
    with Simulator() as gateway, working(amqp_url, prefix, gateway, tmp_path, **limit) as (worker, producer):
        producer.publish_many(bills("b", 200))
        producer.collect(20, 30)
        os.killpg(worker.pid, signal.SIGSTOP)
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 1, 30, "a second passes")
        os.killpg(worker.pid, signal.SIGCONT)
        producer.collect_all(30)
        at = sorted(map(signed_at, gateway.report().calls))
        assert max(after - before for before, after in pairwise(at)) > 0.9
        for number, first in enumerate(at):
            # All 32 at once, and then the usual, would be more than fifty.
            assert sum(first <= other < first + 0.5 for other in at[number:]) <= RATE * 0.5 * 1.05 + BURST


# -- clocks and tokens


@pytest.mark.parametrize(("offset", "warned"), [(120, True), (-15, False)])
def test_a_clock_that_is_off_is_told(amqp_url: str, prefix: str, tmp_path: Path, offset: int, warned: bool) -> None:
    """The difference to the gateway's Date is exported, and warned about above 30 s; the commands go on."""

    with (
        Simulator(Script(clock_offset=offset)) as gateway,
        working(amqp_url, prefix, gateway, tmp_path) as (worker, producer),
    ):
        assert producer.of(producer.publish("b-1")).fields["status"] == "expired"
        assert worker.metrics()("clock_skew_seconds") == pytest.approx(-offset, abs=5)
        said = worker.events("clock.skewed")
        assert [round(line["seconds"] / 10) for line in said] == ([-12] if warned else [])
        assert all(line["level"] == "warning" and "clock" in line["action"] for line in said)


def test_processes_that_kill_each_others_tokens_get_through(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """WORKER_PROCESSES=2 and a gateway where a new token kills the old one: all expire, with few tokens asked for."""

    with (
        Simulator(Script(single_token=True, latency=0.01)) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_PROCESSES="2", WORKER_CONCURRENCY="4") as (
            worker,
            producer,
        ),
    ):
        producer.publish_many(bills("b", 400), sweep_every=1, of=2)
        producer.collect_all(60)
        worker.stop()
        books = check_books(producer, all_ended=True, no_duplicates=True)
        assert statuses(list(books.outcomes)) == {"expired"}
        assert gateway.report().token_calls < 40


@pytest.mark.slow
def test_workers_that_kill_each_others_tokens_get_through(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Two workers of their own, with 20 s of work: neither starves, all expire, with few tokens asked for."""

    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with (
        Simulator(Script(single_token=True, latency=0.1)) as gateway,
        WorkerProcess(amqp_url, prefix, gateway, folders[0], WORKER_CONCURRENCY="8") as one,
        WorkerProcess(amqp_url, prefix, gateway, folders[1], WORKER_CONCURRENCY="8") as two,
    ):
        one.wait_ready()
        two.wait_ready()
        with Producer(amqp_url, prefix) as producer:
            producer.publish_many(bills("b", 2000), sweep_every=1, of=2)
            producer.collect_all(90)
            shares = [worker.metrics()("outcomes_total", status="expired") for worker in (one, two)]
            one.stop()
            two.stop()
            books = take_stock(producer).check(all_ended=True, no_duplicates=True)
        assert statuses(list(books.outcomes)) == {"expired"}
        assert min(shares) > 200
        assert gateway.report().token_calls < 60
