"""Everything on one machine: a broker, the simulated gateway, one worker, a mixed batch, and what became of it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

from worker.core.delivery import Message
from worker.core.lanes import CANCELLATION, SWEEP
from worker.core.topology import Names, topology
from worker.core.words import folded, plural
from worker.sandbox.broker import LoginResult, PrivateBroker, find_server, free_port, try_login
from worker.sandbox.simulator import Script, Simulator
from worker.settings import AmqpSettings, Secret
from worker.shells.amqp.session import BrokerError, apply, connect, publish_command

HOME: Final = Path(__file__).parents[2]
DELAYS: Final = (1,)
LATENCY: Final = 0.1  # seconds the simulated gateway takes: enough to see the lanes at work
LONGEST: Final = 45.0  # seconds from the first command to the last outcome; more means that something is wrong
PACE: Final = 0.1  # seconds between two cancellations, published while the sweep is queued

FAULTS: Final = {
    "latency": LATENCY,
    "rates": [
        {"share": 0.05, "fault": {"code": "5009300", "message": "General Error"}},
        {"share": 0.02, "fault": {"code": "4019301", "message": "Access Token Invalid"}},
        {"share": 0.02, "fault": {"code": "4099300", "message": "Cannot use same X-EXTERNAL-ID in same day"}},
        {"share": 0.01, "fault": {"reset": "after"}},
    ],
    "bills": {
        "PAID-1": [{"code": "4049314", "message": "Paid Bill", "repeat": True}],
        "PAID-2": [{"code": "4049314", "message": "Paid Bill", "repeat": True}],
        "GONE-1": [{"code": "4049301", "message": "QR not Found", "repeat": True}],
        "GONE-2": [{"code": "4049301", "message": "QR not Found", "repeat": True}],
        "OLD-1": [{"code": "4039300", "message": "Transaction Expired", "repeat": True}],
        "STUCK-1": [{"code": "5009300", "message": "General Error", "repeat": True}],
    },
}
SETTINGS: Final = {
    "WORKER_CONCURRENCY": "16",
    "RETRY_MAX_ATTEMPTS": "3",
    "RETRY_INITIAL_SECONDS": "0.2",
    "RETRY_MAX_SECONDS": "1",
    "RETRY_DELAYS_SECONDS": ",".join(map(str, DELAYS)),
    "METRICS_HOST": "127.0.0.1",
    "LOG_FORMAT": "json",
}
FOREIGN: Final = ("AMQP_", "GATEWAY_", "RETRY_", "BREAKER_", "WORKER_", "METRICS_", "LOG_")


class NoBroker(Exception):
    """None was given, none answers on this machine, and no binaries are here to start one."""


class DemoError(Exception):
    """The demo could not show what it should: one line, what happened."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One message as it went over the wire: a command, an outcome or a dead letter, and its AMQP properties."""

    kind: str
    routing_key: str
    properties: dict[str, Any]
    body: bytes

    def line(self) -> str:
        """As JSON. ``body`` is text: it need not be JSON itself."""
        return json.dumps({**asdict(self), "body": self.body.decode("utf-8", "backslashreplace")}, ensure_ascii=False)


@dataclass(slots=True)
class Received:
    """What came back, by command."""

    expected: int
    seen: list[Seen] = field(default_factory=list)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {CANCELLATION: [], SWEEP: []})

    def add(self, outcome: dict[str, Any], published_at: float, now: float) -> None:
        """Counts an outcome once, however often it is reported."""
        if outcome["commandId"] not in self.outcomes:
            self.outcomes[outcome["commandId"]] = outcome
            self.seconds[outcome["lane"]].append(now - published_at)

    def counts(self) -> Counter[tuple[str, str]]:
        """By status and reason."""
        return Counter((o["status"], o["reason"]) for o in self.outcomes.values())


def demo_commands(size: int, exchange: str) -> list[Message]:
    """A sweep of mostly good bills, cancellations beside it, and every kind of trouble."""
    special = list(FAULTS["bills"])  # type: ignore[call-overload]
    cancellations = [(bill, _body(bill)) for bill in special]
    cancellations += [(f"c{n}", _body(f"C{n:06d}")) for n in range(size // 6 - len(special))]
    sweep = [
        ("late", _body("LATE-1", notAfter="2020-01-01T00:00:00+07:00")),
        ("broken", b'{"billnumber": '),
        ("number", b'{"billnumber": 10092081}'),
    ]
    sweep += [(f"s{n}", _body(f"S{n:06d}")) for n in range(size - len(cancellations) - len(sweep))]
    return [
        Message(
            exchange, lane, body, {"content_type": "application/json", "delivery_mode": 2, "message_id": f"demo-{name}"}
        )
        for lane, commands in ((CANCELLATION, cancellations), (SWEEP, sweep))
        for name, body in commands
    ]


def run(size: int, given: AmqpSettings | None, console: Console) -> list[Seen]:
    """The whole demo, and every message of it, at the broker that was ``given`` or at one of its own.

    Raises `DemoError`, and `NoBroker` before anything is shown; leaves no process, queue or file behind, whatever
    happens.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qris-expire-demo-")))
        amqp = replace(_broker(stack, given, console), prefix=f"demo.{secrets.token_hex(4)}")
        simulator = stack.enter_context(Simulator(Script.parse(FAULTS)))
        fact(console, "gateway", f"simulated at {simulator.base_url}, with faults on one call in ten")
        channel, inbox = stack.enter_context(_prepared(amqp))
        port = free_port()
        settings = {**_variables(amqp), "METRICS_PORT": str(port)}
        environment = environment_of(simulator, directory, settings)
        worker = stack.enter_context(_worker(environment, directory))
        fact(console, "worker", f"process {worker.pid} on {amqp.prefix}, metrics at http://127.0.0.1:{port}/metrics")
        received = Received(size)
        started = time.monotonic()
        try:
            _watch(channel, inbox, amqp.names, received, simulator, worker, console)
        except DemoError as error:
            raise DemoError(f"{error}; its last line: {_last_line(directory)}") from None
        took = time.monotonic() - started
        metrics = _scrape(port)
        _stop(worker, directory)
        dead = _parked(channel, amqp.names)
        _report(console, received, simulator, took, metrics, len(dead))
    return received.seen + dead


# -- the parts ------------------------------------------------------------------------------------------------------


def _broker(stack: ExitStack, given: AmqpSettings | None, console: Console) -> AmqpSettings:
    """The broker that was ``given``, which must answer; else the one of this machine, else a private node."""
    if given is not None:
        try:
            connect(given, "demo").close()
        except BrokerError as error:
            raise DemoError(f"AMQP_URL: {error}; without AMQP_URL, the demo brings its own broker or none") from None
        console.print("broker     the RabbitMQ at AMQP_URL")
        return given
    here = AmqpSettings()
    if try_login(here.urls()[0], 3) is LoginResult.READY:
        console.print("broker     the RabbitMQ of this machine")
        return here
    if find_server() is None:
        raise NoBroker
    console.print("broker     starting a private RabbitMQ node …")
    private = stack.enter_context(PrivateBroker())
    fact(console, "broker", f"private node at 127.0.0.1:{private.port}, gone when the demo ends")
    return AmqpSettings(url=Secret(private.url))


def environment_of(simulator: Simulator, directory: Path, settings: dict[str, str]) -> dict[str, str]:
    """The environment of a child process that calls the simulated gateway: ours, with no settings but the demo's."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
        **SETTINGS,
        **simulator.environment(directory / "client-key.pem"),
        **settings,
        # From a checkout that is not installed, the child would not find its own package.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")])),
    }


def _variables(amqp: AmqpSettings) -> dict[str, str]:
    """The settings of the broker as a child process gets them."""
    values = {
        "AMQP_URL": amqp.url.get_secret_value(),
        "AMQP_PREFIX": amqp.prefix,
        "AMQP_QUEUE_TYPE": amqp.queue_type,
        **{f"AMQP_{name.upper()}": getattr(amqp, name) for name in ("ca_file", "cert_file", "key_file")},
    }
    return {name: str(value) for name, value in values.items() if value is not None}


@contextmanager
def _prepared(amqp: AmqpSettings) -> Iterator[tuple[Any, str]]:
    """A channel, and a queue that gets a copy of every outcome; all of it is deleted at the end."""
    made = topology(amqp.prefix, amqp.queue_type, DELAYS)
    connection = connect(amqp)
    try:
        apply(connection, made)
        channel = connection.channel()
        channel.confirm_delivery()
        inbox = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(inbox, amqp.names.outcomes, "#")
        yield channel, inbox
    finally:
        with suppress(Exception):
            channel = connection.channel()
            for queue in made.queues:
                channel.queue_delete(queue.name)
            for exchange in made.exchanges:
                channel.exchange_delete(exchange.name)
        with suppress(Exception):
            connection.close()


@contextmanager
def _worker(environment: dict[str, str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (directory / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", "run"],
            env=environment,
            cwd=directory,  # away from a .env that is not the demo's
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _watch(
    channel: Any,
    inbox: str,
    names: Names,
    received: Received,
    simulator: Simulator,
    worker: subprocess.Popen[bytes],
    console: Console,
) -> None:
    """Publishes the sweep at once and the cancellations beside it, takes the outcomes, shows both."""
    published: dict[str, float] = {}
    commands = demo_commands(received.expected, names.commands)
    cancellations = [command for command in commands if command.routing_key == CANCELLATION]

    def send(command: Message) -> None:
        published[command.properties["message_id"]] = time.monotonic()
        dated = command._replace(properties={**command.properties, "timestamp": int(time.time())})
        received.seen.append(Seen("command", dated.routing_key, dict(dated.properties), dated.body))
        publish_command(channel, names, dated)

    for command in commands:
        if command.routing_key == SWEEP:
            send(command)
    deadline = time.monotonic() + LONGEST
    next_at = time.monotonic()
    with _view(console) as show:
        while len(received.outcomes) < received.expected:
            now = time.monotonic()
            if worker.poll() is not None:
                raise DemoError(f"the worker ended early, with exit code {worker.returncode}")
            if now > deadline:
                raise DemoError(f"only {len(received.outcomes)} of {received.expected} outcomes after {LONGEST:.0f} s")
            if cancellations and now >= next_at:
                next_at = now + PACE
                send(cancellations.pop())
            _take(channel, inbox, received, published)
            show(partial(_picture, received, simulator, _depth(channel, names.queue(SWEEP))))


def _take(channel: Any, inbox: str, received: Received, published: dict[str, float]) -> None:
    quiet = time.monotonic() + 0.1
    while time.monotonic() < quiet:
        method, properties, body = channel.basic_get(inbox, auto_ack=True)
        if method is None:
            time.sleep(0.02)
            continue
        received.seen.append(_seen("outcome", method.routing_key, properties, body))
        outcome = json.loads(body)
        received.add(outcome, published[outcome["commandId"]], time.monotonic())


def _parked(channel: Any, names: Names) -> list[Seen]:
    """The dead letters; the queue is deleted with the demo."""
    found: list[Seen] = []
    while True:
        method, properties, body = channel.basic_get(names.dead, auto_ack=True)
        if method is None:
            return found
        found.append(_seen("dead letter", method.routing_key, properties, body))


def _seen(kind: str, routing_key: str, properties: Any, body: bytes) -> Seen:
    given = {name: value for name, value in vars(properties).items() if value is not None}
    return Seen(kind, routing_key, given, body)


def _depth(channel: Any, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).method.message_count)


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def _stop(worker: subprocess.Popen[bytes], directory: Path) -> None:
    worker.send_signal(signal.SIGTERM)
    try:
        code = worker.wait(30)
    except subprocess.TimeoutExpired:
        raise DemoError("the worker did not drain within 30 s") from None
    if code != 0:
        raise DemoError(f"the worker ended with exit code {code}; its last line: {_last_line(directory)}")


def _last_line(directory: Path) -> str:
    return "".join((directory / "worker.log").read_text().splitlines()[-1:])


# -- what a person sees ---------------------------------------------------------------------------------------------

Show = Callable[[Callable[[], Table]], None]


@contextmanager
def _view(console: Console) -> Iterator[Show]:
    """A live table on a terminal, a line every other second elsewhere."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8, transient=True) as live:
            yield lambda picture: live.update(picture())
        return
    last = time.monotonic()

    def line(picture: Callable[[], Table]) -> None:
        nonlocal last
        if time.monotonic() - last >= 2:
            last = time.monotonic()
            console.print(picture().caption)

    yield line


def _table(title: str, received: Received, **more: Any) -> Table:
    table = Table("status", "reason", title=title, title_justify="left", **more)
    table.add_column("commands", justify="right")
    for (status, reason), count in sorted(received.counts().items()):
        table.add_row(status, reason, str(count))
    return table


def _picture(received: Received, simulator: Simulator, waiting: int) -> Table:
    calls = simulator.report(bills=False).expire_calls
    progress = (
        f"{len(received.outcomes)} of {received.expected} outcomes, {calls} calls, {waiting} waiting in the sweep"
    )
    return _table("qris-expire demo", received, caption=progress, caption_justify="left", min_width=60)


def _report(console: Console, received: Received, simulator: Simulator, took: float, metrics: str, dead: int) -> None:
    counts = received.counts()
    table = _table("What became of them", received)
    table.add_section()
    table.add_row("total", f"of {received.expected} commands published", str(counts.total()))
    console.print(table)
    fact(console, "gateway", seen_by_gateway(simulator))
    cancelled = sorted(received.seconds[CANCELLATION])
    fact(
        console,
        "speed",
        f"{took:.1f} s in all; half of the cancellations had their outcome within "
        f"{cancelled[len(cancelled) // 2]:.2f} s, while the sweep was queued",
    )
    fact(console, "dead", f"{dead} dead letters, each with its reason: the commands that are unresolved or invalid")
    retried = next((o for o in received.outcomes.values() if o["attempts"] > 1 and o["status"] == "expired"), None)
    if retried is not None:
        console.print("an outcome, as a consumer receives it:")
        fact(console, "", json.dumps(retried))
    console.print("some of its metrics:")
    for line in metrics.splitlines():
        if line.startswith(("qris_expire_outcomes_total", "qris_expire_retries_total")) and not line.endswith(" 0.0"):
            console.print(f"  {line}", highlight=False, markup=False)
    console.print(f"the worker drained and ended with 0: {received.expected} commands, {counts.total()} outcomes.")


def fact(console: Console, name: str, text: str) -> None:
    """One line; on a terminal broken between words."""
    line = f"{name:<11}{text}"
    console.print(folded(line, console.width, 11) if console.is_terminal else line)


def seen_by_gateway(simulator: Simulator) -> str:
    """The calls that it got and what it answered, in one line that adds up."""
    seen = simulator.report(bills=False)
    answered = ", ".join(f"{code} ×{count}" for code, count in seen.by_code.items())
    return f"{plural(seen.expire_calls, 'expire call')}: {answered}; {plural(seen.token_calls, 'token call')}"


def _body(bill: str, **more: str) -> bytes:
    return json.dumps({"billnumber": bill, "additionalInfo": {"merchantId": "121000001"}, **more}).encode()
