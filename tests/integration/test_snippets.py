"""The programs that the README shows, run against a real broker, each with the libraries that it names."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.brokers import PrivateBroker
from tests.rabbit import Rabbit
from tests.waiting import wait_until
from tests.worker_process import WorkerProcess
from worker.core.command import Command, parse
from worker.core.topology import Names, topology
from worker.sandbox.broker import free_port
from worker.sandbox.simulator import Simulator

SNIPPETS = Path(__file__).parents[1] / "snippets"
NAMES = Names("qris.expire")  # the default prefix, as the README has it: so only on a broker of our own
INBOX = "orders.outcomes"
SECONDS = 120.0
"""The most a program may take: a cold `go run` compiles its library first."""

JARS = [Path("/usr/share/java") / name for name in ("amqp-client.jar", "slf4j-api.jar")]
GO_SOURCES = Path("/usr/share/gocode")
PHP_LIBRARY = Path("/usr/share/php/PhpAmqpLib/autoload.php")


class Missing(Exception):
    """A language is not here; what to install."""


@dataclass(frozen=True)
class Language:
    """How a pair of snippets is run: `prepare` makes a directory into a project, or raises `Missing`."""

    suffix: str
    command: Sequence[str]
    prepare: Callable[[Path], None]

    def __str__(self) -> str:
        return self.suffix


def _python(_: Path) -> None:
    """Here it is."""


def _need(program: str, package: str) -> None:
    if shutil.which(program) is None:
        raise Missing(f"no {program}; apt-get install {package}")


def _node(project: Path) -> None:
    _need("npm", "nodejs npm")
    try:
        subprocess.run(
            ["npm", "install", "--silent", "--no-audit", "--no-fund", "amqplib@0.10"],
            cwd=project,
            capture_output=True,
            timeout=SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"npm install amqplib failed: {error}") from error


def _go(_: Path) -> None:
    _need("go", "golang-go golang-github-rabbitmq-amqp091-go-dev")
    if not (GO_SOURCES / "src/github.com/rabbitmq/amqp091-go").is_dir():
        raise Missing("no amqp091-go; apt-get install golang-github-rabbitmq-amqp091-go-dev")


def _php(project: Path) -> None:
    _need("php", "php-cli php-amqplib")
    if not PHP_LIBRARY.exists():
        raise Missing("no php-amqplib; apt-get install php-amqplib")
    (project / "vendor").mkdir()
    (project / "vendor" / "autoload.php").symlink_to(PHP_LIBRARY)


def _java(_: Path) -> None:
    _need("javac", "default-jdk-headless librabbitmq-client-java")
    if not all(jar.exists() for jar in JARS):
        raise Missing("no amqp-client; apt-get install librabbitmq-client-java")


LANGUAGES = [
    Language("py", [sys.executable, "{name}.py"], _python),
    Language("js", ["node", "{name}.js"], _node),
    Language("go", ["go", "run", "{name}.go"], _go),
    Language("php", ["php", "{name}.php"], _php),
    Language("java", ["java", "-cp", ":".join(map(str, JARS)), "{Name}.java"], _java),
]


class Program:
    """The two snippets of a language in a project of their own."""

    def __init__(self, language: Language, project: Path, url: str) -> None:
        self._language = language
        self.suffix = language.suffix
        self._project = project
        self._environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "AMQP_URL": url,
            "GO111MODULE": "off",
            "GOPATH": str(GO_SOURCES),
            "GOCACHE": str(project / "cache"),
        }
        for file in SNIPPETS.glob(f"*.{language.suffix}"):
            shutil.copy(file, project)

    def _command(self, name: str, *arguments: str) -> list[str]:
        return [part.format(name=name, Name=name.title()) for part in self._language.command] + list(arguments)

    def publish(self, bill: str, order: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """One command published, or not."""
        return subprocess.run(
            self._command("publish", bill, "M1", order),
            cwd=self._project,
            env=self._environment | environ,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def publishing(self, bill: str, order: str) -> subprocess.Popen[str]:
        """The publisher, started."""
        return subprocess.Popen(
            self._command("publish", bill, "M1", order),
            cwd=self._project,
            env=self._environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @contextmanager
    def consuming(self, target: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The consumer runs meanwhile."""
        log = self._project / "consume.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command("consume", str(target)),
                cwd=self._project,
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,  # `go run` and `java` have children
            )
        try:
            yield process
        finally:
            os.killpg(process.pid, 9)
            process.wait()

    def said(self) -> str:
        return (self._project / "consume.log").read_text()


_PARAMETERS = [
    pytest.param(one, id=one.suffix, marks=[] if one.suffix == "py" else pytest.mark.slow) for one in LANGUAGES
]


@pytest.fixture(params=_PARAMETERS)
def program(request: pytest.FixtureRequest, fresh: PrivateBroker, tmp_path: Path) -> Program:
    """Each language that is here."""
    language: Language = request.param
    project = tmp_path / "project"
    project.mkdir()
    try:
        language.prepare(project)
    except Missing as reason:
        pytest.skip(f"SNIPPETS NOT RUN ({language}): {reason}")
    return Program(language, project, fresh.url)


def test_a_command_is_published_safely(program: Program, fresh: PrivateBroker) -> None:
    """It is persistent, has a date and an identity made from order and bill, and is a command for the worker."""

    with Rabbit(fresh.url) as rabbit:
        rabbit.declare(topology(NAMES.prefix, "quorum", ()))
        done = program.publish("10092081", "ORD-77")
        assert done.returncode == 0, done.stderr
        message = rabbit.consume(NAMES.queue("cancellation"), 1, 30)[0]
    assert message.properties.delivery_mode == 2
    assert message.properties.message_id == "cancel-ORD-77-10092081"
    assert message.properties.content_type == "application/json"
    assert message.properties.timestamp > 1_700_000_000
    assert parse(message.body) == Command("10092081", "M1", "ORD-77", None)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a program ended with, beside what `go run` and Java's logging library add."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("exit status", "SLF4J:"))]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_command_that_no_queue_takes_is_an_error(program: Program, fresh: PrivateBroker) -> None:
    """Without the lane's queue, without the exchange and without a broker: one line, and an exit code that is not 0."""

    complaint(program.publish("10092081", "ORD-77"))
    with Rabbit(fresh.url) as rabbit:
        rabbit.declare(topology(NAMES.prefix, "quorum", ()))
        rabbit.delete_queue(NAMES.queue("cancellation"))
    assert "no queue took the command" in complaint(program.publish("10092081", "ORD-77"))
    complaint(program.publish("10092081", "ORD-77", AMQP_URL=f"amqp://guest:guest@127.0.0.1:{free_port()}/%2F"))


def test_a_connection_that_is_lost_before_the_confirm_is_an_error(program: Program, fresh: PrivateBroker) -> None:
    """A broker under its memory alarm takes nothing; the connection is closed while the program waits."""
    with Rabbit(fresh.url) as rabbit:
        rabbit.declare(topology(NAMES.prefix, "quorum", ()))
    fresh.ctl("set_vm_memory_high_watermark", "0.0000001")
    try:
        process = program.publishing("10092081", "ORD-77")
        wait_until(lambda: "block" in fresh.ctl("list_connections", "state"), SECONDS, "the connection to be blocked")
        fresh.ctl("close_all_connections", "maintenance")
        _, said = process.communicate(timeout=SECONDS)
    finally:
        fresh.ctl("set_vm_memory_high_watermark", "0.8")
    complaint(subprocess.CompletedProcess([], process.returncode, stderr=said))


def test_the_prefix_comes_from_the_environment(program: Program, fresh: PrivateBroker) -> None:
    """AMQP_PREFIX chooses the topology, for producers as for the worker."""
    other = Names("shop.expire")
    with Rabbit(fresh.url) as rabbit:
        rabbit.declare(topology(other.prefix, "quorum", ()))
        done = program.publish("10092081", "ORD-77", AMQP_PREFIX=other.prefix)
        assert done.returncode == 0, done.stderr
        assert rabbit.consume(other.queue("cancellation"), 1, 30)


def test_a_consumer_without_the_exchange_says_so_and_tries_again(
    program: Program, fresh: PrivateBroker, kept: Path
) -> None:
    """It names the exchange, and consumes once the topology is declared; also after its queue was deleted."""

    with program.consuming(kept) as consumer, Rabbit(fresh.url) as rabbit:
        wait_until(lambda: "exchange" in program.said(), SECONDS, "the consumer says what is missing")
        rabbit.declare(topology(NAMES.prefix, "quorum", ()))
        wait_until(lambda: listens(program, consumer, fresh), SECONDS, "the consumer listens")
        rabbit.delete_queue(INBOX)
        wait_until(lambda: listens(program, consumer, fresh), SECONDS, "the consumer listens again")


def test_outcomes_come_once(program: Program, fresh: PrivateBroker, tmp_path: Path, kept: Path) -> None:
    """A command that is published twice has two outcomes with one id, and the consumer keeps one; it gets the next one
    although its connection was lost in between, and although the broker was away."""

    with (
        Simulator() as gateway,
        WorkerProcess(fresh.url, NAMES.prefix, gateway, tmp_path) as worker,
    ):
        worker.wait_ready()
        with program.consuming(kept) as consumer:
            wait_until(lambda: listens(program, consumer, fresh), SECONDS, "the consumer listens")
            for order in ("ORD-1", "ORD-1", "ORD-2", "ORD-3"):
                if order == "ORD-2":
                    fresh.ctl("close_all_connections", "maintenance")
                if order == "ORD-3":
                    fresh.kill()
                    wait_until(lambda: program.said().count("not consuming") > 1, SECONDS, "the consumer has noticed")
                    fresh.start()
                wait_until(lambda: listens(program, consumer, fresh), SECONDS, "the consumer listens again")
                worker.wait_ready()
                done = program.publish(f"bill-{order}", order)
                assert done.returncode == 0, done.stderr
            # In order: when the last one is there, both of the first were handled.
            wait_until(lambda: any("ORD-3" in text for text in outcomes(kept)), SECONDS, "the last outcome is kept")
            wait_until(lambda: worker.metrics()("outcomes_total") == 4, 30, "all four are counted")
    assert [sum(order in text for text in outcomes(kept)) for order in ("ORD-1", "ORD-2", "ORD-3")] == [1, 1, 1]
    assert all('"status":"expired"' in text for text in outcomes(kept))


def listens(program: Program, consumer: subprocess.Popen[bytes], broker: PrivateBroker) -> bool:
    """Whether the consumer, which never ends, has a queue. Before that the queue is not bound, and misses outcomes."""
    assert consumer.poll() is None, program.said()
    with Rabbit(broker.url) as rabbit:
        return rabbit.has_queue(INBOX) and bool(rabbit.channel.queue_declare(INBOX, passive=True).method.consumer_count)


@pytest.fixture
def kept(tmp_path: Path, program: Program) -> Path:
    """Where a consumer keeps outcomes: a database, or a directory of files."""
    directory = tmp_path / "kept"
    directory.mkdir()
    return directory / "outcomes.db" if program.suffix == "py" else directory


def outcomes(kept: Path) -> list[str]:
    """The outcomes that a consumer has, from its files or its table."""
    if kept.is_dir():
        return [file.read_text() for file in kept.iterdir()]
    connection = sqlite3.connect(kept)
    try:
        return [row[0] for row in connection.execute("SELECT outcome FROM outcomes")]
    except sqlite3.OperationalError:  # not created yet
        return []
    finally:
        connection.close()
