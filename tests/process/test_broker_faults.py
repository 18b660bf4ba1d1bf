"""Faults of the broker under load: nothing is lost, the worker stays, says what it waits for, and goes on by itself."""

import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import PrivateBroker
from tests.load import Scene, confirm_seconds, under_load
from tests.proxy import FaultProxy
from tests.rabbit import Rabbit, address, by_way_of, delete_topology, new_prefix
from tests.servers import Authority, Peer, serving
from tests.waiting import wait_until
from tests.worker_process import Producer, WorkerProcess, working
from worker.core.lanes import CANCELLATION, SWEEP
from worker.core.topology import topology
from worker.sandbox.broker import free_port
from worker.sandbox.simulator import Fault, Pattern, Script, Simulator
from worker.wiring import PREFETCH_PER_SENDER

CONCURRENCY = 8

CONFIRM_SECONDS = 2.0
"""In the tests that wait for it to pass: in the product it is 30."""

SCRIPT = Script(
    latency=0.01,
    patterns=(
        Pattern("^late", (Fault(code="5009300"),) * 4),
        Pattern("^slow", (Fault(latency=10.0),)),
    ),
)
"""`late` bills need a delayed round, `slow` ones a call of ten seconds."""

SEEN_LATENCY = 0.1
"""Of a network on which a reconnect takes a second or more: long enough for `/readyz` to be seen saying why."""


@pytest.fixture
def broker(private_broker: PrivateBroker) -> PrivateBroker:
    """The private broker, running. Tests have prefixes of their own and repair what they break: none needs a reset."""
    private_broker.start()
    return private_broker


@pytest.fixture(scope="module")
def stage(private_broker: PrivateBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One worker that outlives all the faults of the tests that ask for `scene`."""
    private_broker.start()
    directory = tmp_path_factory.mktemp("stage")
    with under_load(private_broker.url, directory, script=SCRIPT, lanes=(), BREAKER_FAILURES="1000") as scene:
        yield scene


@pytest.fixture
def scene(stage: Scene) -> Iterator[Scene]:
    """The shared worker, ready and under load in both lanes."""
    stage.gateway.replace(SCRIPT)
    stage.wait_ready()
    stage.begin()
    stage.load(CANCELLATION, SWEEP)
    yield stage
    stage.repair()


# -- connections


def test_connections_closed_by_the_operator(scene: Scene, broker: PrivateBroker) -> None:
    """All connections closed at once: the worker connects again, having said who closed them."""

    with scene.cut_off():
        broker.ctl("close_all_connections", "maintenance at noon")
    scene.wait_said("broker.waiting", "maintenance at noon")
    scene.more_calls()
    scene.settle()


def test_latency_and_resets(scene: Scene) -> None:
    """A slow network that resets every connection three times: the worker connects again each time."""

    scene.network.latency(0.03)
    with scene.cut_off():
        scene.network.reset_all()
        scene.wait_unready("publisher")
    for number in range(1, 4):
        if number > 1:
            scene.network.reset_all()
        scene.worker.wait_for(
            lambda n=number: len(scene.lines("broker.connected")) >= n, 20, f"connected again, {number}"
        )
        scene.wait_ready()
        scene.more_calls()
    scene.wait_said("broker.waiting", "reset")
    scene.settle()


# -- what the worker relies on


def test_a_lane_queue_deleted(scene: Scene, broker: PrivateBroker) -> None:
    """A queue deleted while the other lane is busy: it is noticed, by the broker's cancel or since a look at the queue
    came first, and the queue is declared again."""

    scene.unload(CANCELLATION)
    scene.gather(30)
    queue = scene.names.queue(CANCELLATION)
    with scene.cut_off(), Rabbit(broker.url) as operator:
        operator.delete_queue(queue)
    scene.wait_said("broker.reconnect", queue)
    scene.load(CANCELLATION)
    scene.settle()


def test_the_outcome_exchange_deleted(scene: Scene, broker: PrivateBroker) -> None:
    """The exchange of the outcomes deleted: it is declared again, and what could not be published is."""

    with scene.cut_off(), Rabbit(broker.url) as operator:
        operator.delete_exchange(scene.names.outcomes)
    scene.wait_said("broker.reconnect", f"no exchange '{scene.names.outcomes}'")
    scene.more_calls()
    scene.settle()


def test_a_retry_queue_deleted(scene: Scene, broker: PrivateBroker) -> None:
    """A delayed round whose queue is gone: said, declared again, and the command has its round."""

    queue = scene.names.retry(CANCELLATION, 1)
    with Rabbit(broker.url) as operator:
        operator.delete_queue(queue)
    late = [scene.producer.publish(f"late-{number}") for number in range(3)]
    scene.wait_said("publish.refused", queue)
    scene.wait_unready("publisher", queue)
    books = scene.settle()
    outcomes = [outcome for outcome in books.outcomes if outcome.command_id in {sent.id for sent in late}]
    assert [outcome.fields["attempts"] for outcome in outcomes] == [5, 5, 5]


@pytest.mark.parametrize("what", ["queue", "exchange"])
def test_the_dead_letters_deleted(what: str, scene: Scene, broker: PrivateBroker) -> None:
    """Queue or exchange of the dead letters gone while one is due: declared again, and the dead letter is there."""

    names = scene.names
    scene.network.latency(SEEN_LATENCY)
    with Rabbit(broker.url) as operator:
        {"queue": operator.delete_queue, "exchange": operator.delete_exchange}[what](names.dead)
    poor = scene.producer.publish_body(b"?" + what.encode(), message_id=f"poor-{what}")
    scene.wait_said(*{"queue": ("publish.refused", names.dead), "exchange": ("broker.reconnect", names.dead)}[what])
    scene.wait_unready("publisher", names.dead)
    books = scene.settle()
    assert poor.id in books.dead


def test_outcomes_that_nobody_wants(scene: Scene) -> None:
    """Without anything bound to the outcomes they are all kept, and the worker is ready all the while."""

    scene.producer.turn_away()
    first, unrouted = len(scene.producer.outcomes), scene.names.unrouted
    wait_until(lambda: scene.producer.rabbit.depth(unrouted) > 10, 30, "outcomes gather there")
    books = scene.settle()
    assert any(outcome.message.redelivered is False for outcome in books.outcomes[first:])
    assert not scene.lookout.unready(since=scene.began)


# -- a broker that does not take what we publish


def test_a_memory_alarm(scene: Scene, broker: PrivateBroker) -> None:
    """While the broker blocks publishers nothing is called for beyond what is in hand; afterwards all goes on."""

    # Half a minute's work, however long the broker takes for its alarm.
    scene.gateway.replace(Script(latency=1))
    scene.producer.publish_many((f"before-{number}" for number in range(300)), of=2)
    with broker.memory_alarm():
        scene.wait_unready("publisher", "blocked by the broker (memory or disk alarm)")
        scene.wait_said("broker.blocked", "memory")
        scene.wait_metric(lambda metrics: metrics("consumption_paused", reason="broker_blocked") == 1)
        scene.wait_metric(lambda metrics: metrics("in_flight") == 0)
        called = sum(bill.startswith("before-") for bill in scene.gateway.report().calls_by_bill)
    scene.gateway.replace(SCRIPT)
    scene.wait_ready()
    scene.wait_said("broker.unblocked", "")  # a line of level info comes a little later than what it tells
    since, until = (moment(scene.lines(f"broker.{event}")[0]) for event in ("blocked", "unblocked"))
    during = [call for call in scene.gateway.report().calls if since < call.at < until]
    assert len(during) <= CONCURRENCY
    assert called < 300
    scene.settle()


def test_a_nack(scene: Scene, broker: PrivateBroker) -> None:
    """Outcomes that the broker refuses are kept and published on a new channel until it takes them."""

    full = f"{scene.names.prefix}.full"
    with Rabbit(broker.url) as operator:
        operator.declare_queue(full, "classic", max_length=1, overflow="reject-publish")
        operator.bind(full, scene.names.outcomes, "#")
        scene.wait_said("publish.refused", scene.names.outcomes)
        scene.wait_unready("publisher", scene.names.outcomes)
        operator.delete_queue(full)
    scene.wait_ready()
    scene.more_calls()
    scene.settle()


def moment(line: dict[str, Any]) -> float:
    """Unix seconds of a log line."""
    return datetime.fromisoformat(line["timestamp"]).timestamp()


@pytest.fixture
def impatient(tmp_path: Path) -> str:
    """The PYTHONPATH of a process that waits `CONFIRM_SECONDS` for a confirm."""
    return confirm_seconds(tmp_path, CONFIRM_SECONDS)


def test_confirms_that_never_come(broker: PrivateBroker, tmp_path: Path, impatient: str) -> None:
    """A queue that takes outcomes and never confirms them: the worker says so, tries again, and stops calling."""

    with under_load(broker.url, tmp_path, per_second=40, PYTHONPATH=impatient) as scene:
        silent = f"{scene.names.prefix}.silent"
        with Rabbit(broker.url) as operator:
            operator.declare_queue(silent, "quorum")
            operator.bind(silent, scene.names.outcomes, "#")
            server = f"'%2F_{silent}'"
            broker.ctl("eval", f"sys:suspend({server}).")
            scene.wait_said("broker.reconnect", "no confirm for 2 s")
            scene.wait_unready("publisher", "no confirm")
            scene.wait_metric(lambda metrics: metrics("in_flight") == 0)
            assert scene.worker.metrics()("publishes_unconfirmed") <= CONCURRENCY * sum(PREFETCH_PER_SENDER.values())
            broker.ctl("eval", f"sys:resume({server}).")
            scene.wait_ready()
            scene.more_calls()
            operator.delete_queue(silent)
        scene.settle()


@pytest.mark.slow
def test_confirms_that_an_alarm_holds_up(broker: PrivateBroker, tmp_path: Path) -> None:
    """It owed confirms when it blocked, for longer than one may take: it has its time afterwards."""

    patience = 10.0
    slow = Script(patterns=tuple(Pattern(f"^{seconds}s", (Fault(latency=seconds),)) for seconds in range(3, 9)))
    impatient = confirm_seconds(tmp_path, patience)
    with (
        under_load(broker.url, tmp_path, script=slow, lanes=(), PYTHONPATH=impatient) as scene,
        Rabbit(broker.url) as operator,
    ):
        silent = f"{scene.names.prefix}.silent"
        operator.declare_queue(silent, "quorum")
        operator.bind(silent, scene.names.outcomes, "#")
        server = f"'%2F_{silent}'"
        broker.ctl("eval", f"sys:suspend({server}).")
        scene.producer.publish_many(["at-once", *(f"{seconds}s" for seconds in range(3, 9))])
        with broker.memory_alarm():
            scene.wait_said("broker.blocked", "memory")
            began = time.monotonic()
            wait_until(lambda: time.monotonic() > began + patience, 2 * patience, "no confirm could take so long")
        scene.wait_said("broker.unblocked", "")
        broker.ctl("eval", f"sys:resume({server}).")
        scene.wait_metric(lambda metrics: metrics("publishes_unconfirmed") == 0)
        assert not scene.lines("broker.reconnect")
        operator.delete_queue(silent)
        scene.settle(no_duplicates=True)


@pytest.mark.slow
def test_a_silent_publish_path(broker: PrivateBroker, tmp_path: Path, impatient: str) -> None:
    """Everything reaches the broker and nothing comes back, not even the answer to a close: the worker hangs up."""

    with under_load(
        broker.url,
        tmp_path,
        script=Script(latency=0.5),
        per_second=4,
        worker_url=lambda url: f"{url}?heartbeat=0",
        PYTHONPATH=impatient,
    ) as scene:
        scene.wait_metric(lambda metrics: metrics("in_flight") >= 2)
        scene.network.stall_towards_client()
        scene.wait_said("broker.reconnect", "no confirm for 2 s")
        scene.wait_said("broker.waiting", "no confirm for 2 s")
        scene.wait_unready("publisher")
        scene.network.resume()
        scene.wait_ready()
        scene.more_calls()
        scene.settle()


def test_a_silent_lane_while_the_gateway_is_away(broker: PrivateBroker, tmp_path: Path) -> None:
    """A lane that does not answer when asked for a command to probe with: those in hand serve, again and again."""

    settings = {"BREAKER_FAILURES": "3", "BREAKER_COOLDOWN_SECONDS": "0.2", "BREAKER_MAX_COOLDOWN_SECONDS": "0.2"}
    prefix = new_prefix()
    with (
        Simulator(Script(patterns=(Pattern("", (Fault(code="5009300", repeat=True),)),))) as gateway,
        working(broker.url, prefix, gateway, tmp_path, **settings) as (worker, producer),
    ):
        producer.publish_many((f"bill-{number}" for number in range(2)), sweep_every=0)
        worker.wait_for(lambda: worker.events("breaker.opened"), 20, "it opens")
        server = f"'%2F_{producer.names.queue(SWEEP)}'"
        broker.ctl("eval", f"sys:suspend({server}).")
        at = len(worker.events("attempt"))
        worker.wait_for(lambda: len(worker.events("attempt")) > at + 4, 20, "probes go on")
        gateway.replace(Script())
        worker.wait_for(lambda: worker.events("breaker.closed"), 20, "it closes")
        broker.ctl("eval", f"sys:resume({server}).")
        producer.collect_all(20)
    delete_topology(broker.url, prefix)


# -- a broker that takes deliveries or consumers away


def test_a_consumer_timeout(scene: Scene, broker: PrivateBroker) -> None:
    """A call that outlasts the broker's patience: what is held is taken back, and it is settled once."""

    scene.network.latency(SEEN_LATENCY)
    with broker_setting(broker, consumer_timeout=2000, channel_tick_interval=500):
        # Read when a channel opens.
        with scene.cut_off():
            scene.network.reset_all()
        slow = scene.producer.publish("slow-1")
        # In a closed channel up to 4.2, in a cancel since: told in the same words.
        scene.wait_said("consumer.timeout", "")
    scene.wait_said("broker.reconnect", "consumer timeout of")
    scene.wait_unready("consumer", "consumer timeout of")
    scene.wait_ready()
    scene.wait_said("delivery.joined", slow.id)
    books = scene.settle()
    assert [outcome.command_id for outcome in books.outcomes].count(slow.id) == 1
    assert scene.gateway.report().calls_by_bill["slow-1"] == 1


@contextmanager
def broker_setting(broker: PrivateBroker, **milliseconds: int) -> Iterator[None]:
    """These settings of the broker, and then its own again."""

    kept = {name: broker.ctl("eval", f"element(2, application:get_env(rabbit, {name})).") for name in milliseconds}

    def tell(values: Mapping[str, object]) -> None:
        broker.ctl("eval", ", ".join(f"application:set_env(rabbit, {n}, {v})" for n, v in values.items()) + ".")

    tell(milliseconds)
    try:
        yield
    finally:
        tell({name: value.strip() for name, value in kept.items()})


def test_a_queue_that_crashes(broker: PrivateBroker, tmp_path: Path) -> None:
    """The broker loses a lane's queue and starts it again with its messages: nothing is lost."""

    with under_load(broker.url, tmp_path, AMQP_QUEUE_TYPE="classic") as scene:
        queue = scene.names.queue(SWEEP)
        scene.producer.publish_many(f"many-{number}" for number in range(300))
        resource = f'rabbit_misc:r(<<"/">>, queue, <<"{queue}">>)'
        broker.ctl("eval", f"{{ok, Q}} = rabbit_amqqueue:lookup({resource}), exit(amqqueue:get_pid(Q), kill).")
        wait_until(lambda: f"Restarting crashed queue '{queue}'" in broker.log_tail(200), 30, "it has crashed")
        scene.more_calls()
        scene.settle()


# -- logins and addresses


def test_a_password_that_no_longer_fits(scene: Scene, broker: PrivateBroker) -> None:
    """A login refused after a reconnect is waited for, visibly, and is no reason to end."""

    broker.ctl("change_password", "guest", "another")
    try:
        scene.network.reset_all()
        scene.wait_said("broker.waiting", "the broker refuses our login")
        scene.wait_unready("consumer", "the broker refuses our login")
    finally:
        broker.ctl("change_password", "guest", "guest")
    scene.wait_ready()
    scene.more_calls()
    scene.settle()


def test_a_broker_that_refuses_at_start(broker: PrivateBroker, tmp_path: Path) -> None:
    """A wrong password or a virtual host that is not there: exit 3, and the log says which."""

    at = f"127.0.0.1:{broker.port}"
    with Simulator() as gateway:
        for url, what in {
            f"amqp://guest:wrong@{at}/%2F": "login",
            f"amqp://guest:guest@{at}/nowhere": "vhost",
        }.items():
            with WorkerProcess(url, new_prefix(), gateway, tmp_path) as worker:
                assert worker.wait() == 3
                (line,) = worker.events("broker.refused")
                assert what in line["reason"]
                assert "AMQP_URL" in line["action"]
                assert "wrong" not in worker.log()


def test_a_connection_lost_during_the_login_is_no_refusal(broker: PrivateBroker, tmp_path: Path) -> None:
    """A network that breaks in the middle of the first handshake is waited for: nobody has refused anything."""

    with FaultProxy(*address(broker.url)) as network, Simulator() as gateway:
        # The broker's own greeting is longer than 8 bytes: with more than twice ours, a login has gone out.
        network.stall_towards_client_after(100)
        with WorkerProcess(by_way_of(network.port, broker.url), new_prefix(), gateway, tmp_path) as worker:
            worker.wait_for(lambda: network.bytes_to_server > 100, 30, "the login is on its way")
            network.reset_all()
            network.resume()
            worker.wait_ready()
            reasons = {line["reason"] for line in worker.events("broker.waiting")}
            assert "the connection was lost during the login (Connection reset by peer)" in reasons
            assert not any("refuses" in reason for reason in reasons)
            worker.stop()


def test_several_hosts(broker: PrivateBroker, tmp_path: Path) -> None:
    """Of several URLs the first leads nowhere: it is named, and the other is used, also after a loss."""

    nowhere = free_port()
    with under_load(broker.url, tmp_path, worker_url=lambda url: f"{by_way_of(nowhere, url)},{url}") as scene:
        with scene.cut_off():
            scene.network.reset_all()
        scene.more_calls()
        scene.wait_said("broker.waiting", "Connection refused")
        scene.settle()


# -- TLS


def relay(broker: PrivateBroker) -> Callable[[Peer], None]:
    """What a TLS port of the broker does once the handshake is over."""

    def handler(peer: Peer) -> None:
        with socket.create_connection(address(broker.url)) as upstream:
            other = {peer.sock: upstream, upstream: peer.sock}
            while True:
                ready = [peer.sock] if pending(peer.sock) else select.select(list(other), [], [], 30)[0]
                for end in ready:
                    data = end.recv(65_536)
                    if not data:
                        return
                    other[end].sendall(data)

    return handler


def pending(sock: socket.socket) -> int:
    """Bytes that TLS has read already, which no `select` shows."""
    return sock.pending() if isinstance(sock, ssl.SSLSocket) else 0


def test_tls_to_a_plain_port(broker: PrivateBroker, tmp_path: Path) -> None:
    """amqps:// to a port that speaks no TLS: it waits, and the log says that it is about TLS."""

    url = f"amqps://guest:guest@127.0.0.1:{broker.port}/%2F"
    with Simulator() as gateway, WorkerProcess(url, new_prefix(), gateway, tmp_path) as worker:
        waits_and_says(worker, "TLS")


def test_plain_to_a_tls_port(broker: PrivateBroker, tmp_path: Path) -> None:
    """amqp:// to a port that speaks TLS: it waits, and the log says that this is no AMQP."""

    tls = Authority("authority", tmp_path).server("localhost", "127.0.0.1")
    with Simulator() as gateway, serving(relay(broker), tls=tls) as server:
        url = f"amqp://guest:guest@127.0.0.1:{server.port}/%2F"
        with WorkerProcess(url, new_prefix(), gateway, tmp_path) as worker:
            waits_and_says(worker, "no AMQP port")


def test_a_certificate_that_is_not_trusted(broker: PrivateBroker, tmp_path: Path) -> None:
    """amqps:// with a certificate of an unknown authority: it waits and says so; with AMQP_CA_FILE it works."""

    authority = Authority("authority", tmp_path)
    with Simulator() as gateway, serving(relay(broker), tls=authority.server("localhost", "127.0.0.1")) as server:
        url = f"amqps://guest:guest@127.0.0.1:{server.port}/%2F"
        with WorkerProcess(url, new_prefix(), gateway, tmp_path) as worker:
            waits_and_says(worker, "TLS: the certificate is not trusted")
        prefix = new_prefix()
        with WorkerProcess(url, prefix, gateway, tmp_path, AMQP_CA_FILE=str(authority.file)) as worker:
            worker.wait_ready()
            with Producer(broker.url, prefix) as producer:
                assert producer.of(producer.publish("b-1")).fields["status"] == "expired"
            worker.stop()


def waits_and_says(worker: WorkerProcess, text: str) -> None:
    """It is alive and not ready, its log names the reason; SIGTERM ends it with 0."""
    said = worker.wait_for(
        lambda: [line for line in worker.events("broker.waiting") if text in line["reason"]], 30, text
    )
    assert said
    assert (worker.get("/livez")[0], worker.get("/readyz")[0]) == (200, 503)
    worker.wait_for(lambda: text in worker.components()["consumer"], 30, f"/readyz says {text}")
    worker.stop()


# -- what takes longer


@pytest.mark.slow
def test_a_half_open_connection(broker: PrivateBroker, tmp_path: Path) -> None:
    """The broker has forgotten us and nobody said so: heartbeats notice, and the worker connects again."""

    with under_load(broker.url, tmp_path, worker_url=lambda url: f"{url}?heartbeat=2") as scene:
        scene.network.latency(0.03)
        scene.network.half_open()
        scene.wait_said("broker.waiting", "heartbeat", timeout=30)
        scene.wait_unready()
        scene.wait_ready()
        scene.more_calls()
        scene.settle()
        print(f"half-open, heartbeat 2: calls paused {scene.longest_silence():.1f} s")


@pytest.mark.slow
def test_a_node_killed(broker: PrivateBroker, tmp_path: Path) -> None:
    """kill -9 of the node and its restart: nothing lost, no restart of the worker."""

    with under_load(broker.url, tmp_path, worker_url=lambda _: broker.url) as scene:
        queues = [queue.name for queue in topology(scene.names.prefix, "quorum", (1, 2)).queues]
        wait_until(lambda: all(broker.would_remember(queue) for queue in queues), 30, "the node knows its queues")
        broker.kill()
        scene.wait_unready()
        scene.wait_said("broker.waiting", "Connection refused")
        broker.start()
        scene.wait_ready()
        scene.more_calls(timeout=60)
        scene.settle()
        print(f"node killed: calls paused {scene.longest_silence():.1f} s")


@pytest.mark.slow
def test_a_node_stopped(broker: PrivateBroker, tmp_path: Path) -> None:
    """An orderly stop and start of the node, with a second worker that starts meanwhile: both wait and go on."""

    with under_load(broker.url, tmp_path, worker_url=lambda _: broker.url) as scene:
        broker.stop()
        scene.wait_unready()
        prefix = new_prefix()
        with WorkerProcess(broker.url, prefix, scene.gateway, tmp_path) as second:
            second.wait_for(lambda: second.events("broker.waiting"), 30, "the second one waits")
            assert (second.get("/livez")[0], second.get("/readyz")[0]) == (200, 503)
            broker.start()
            scene.wait_ready()
            second.wait_ready()
            with Producer(broker.url, prefix) as producer:
                assert producer.of(producer.publish("b-1")).fields["status"] == "expired"
            second.stop()
        scene.more_calls(timeout=60)
        scene.settle()
        print(f"node stopped: calls paused {scene.longest_silence():.1f} s")
