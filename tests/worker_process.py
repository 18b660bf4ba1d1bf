"""A worker of the tests' own: `python -m worker run` against a broker, a prefix and a simulated gateway."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pika
import pika.exceptions
from prometheus_client.parser import text_string_to_metric_families

from tests.rabbit import DELAYS_IN_TESTS, Message, Rabbit
from tests.waiting import wait_until
from worker.core.command import command_id
from worker.core.topology import Names, topology
from worker.sandbox.broker import free_port
from worker.sandbox.simulator import Simulator
from worker.shells.http import FRESH_SECONDS

ROOT = Path(__file__).parents[1]

READY_SECONDS = 30.0
"""The most a worker may take to consume: half a second is usual, a loaded machine takes ten times that."""

END_SECONDS = 30.0

CALM = {
    "WORKER_CONCURRENCY": "8",
    "WORKER_DRAIN_SECONDS": "15",
    "RETRY_DELAYS_SECONDS": "1,2",
    "RETRY_INITIAL_SECONDS": "0.02",
    "RETRY_MAX_SECONDS": "0.1",
    "LOG_FORMAT": "json",
    "LOG_LEVEL": "info",
}
"""Settings unless a test says otherwise: retries that do not keep a test waiting."""

_numbers = count(1)


class Published(NamedTuple):
    """One command as it went out; `id` is what its outcome is to be called."""

    id: str
    lane: str
    body: bytes


class Outcome(NamedTuple):
    """One outcome message and the fields of its JSON."""

    message: Message
    fields: dict[str, Any]

    @property
    def command_id(self) -> str:
        return str(self.fields["commandId"])


class Scrape:
    """One answer of /metrics."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples of `qris_expire_<name>` that have these labels; AssertionError without any."""
        found = [
            sample.value
            for sample in self._samples
            if sample.name == f"qris_expire_{name}" and labels.items() <= sample.labels.items()
        ]
        assert found, f"no sample of {name} with {labels}"
        return sum(found)


class WorkerProcess:
    """One `qris-expire run`; leaving it as a context manager kills it. Start it again for a restart.

    Its environment is `PATH` and the settings, nothing of the shell that runs the tests. Log and error output go to
    files in `directory`, one pair per start. A setting of None is left out.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        gateway: Simulator | Mapping[str, str],
        directory: Path,
        **settings: str | None,
    ) -> None:
        self.names = Names(prefix)
        self.port = free_port()
        self._directory = directory
        self._gateway = gateway
        self._settings = settings
        self._url = url
        self._scraped_at = 0.0  # monotonic
        self._logs: list[Path] = []
        self._errors: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.stdout: int | None = None  # a descriptor instead of the log file

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self.kill9()

    # -- its life

    def start(self) -> Self:
        """Start it and do not wait."""
        assert not self.running, "it runs already"
        number = next(_numbers)
        self._logs.append(self._directory / f"worker-{number}.log")
        self._errors.append(self._directory / f"worker-{number}.err")
        with self._logs[-1].open("wb") as log, self._errors[-1].open("wb") as errors:
            self._process = subprocess.Popen(
                self.command(),
                env=self.environment(),
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log if self.stdout is None else self.stdout,
                stderr=errors,
                # A family (WORKER_PROCESSES) is one group, so that nobody is left when it is killed.
                start_new_session=True,
            )
        return self

    def command(self) -> list[str]:
        """How it is started."""
        return [sys.executable, "-m", "worker", "run"]

    def environment(self) -> dict[str, str]:
        """What it is started with."""
        gateway = self._gateway
        if isinstance(gateway, Simulator):
            gateway = gateway.environment(self._directory / "gateway-key.pem")
        own = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "AMQP_URL": self._url,
            "AMQP_PREFIX": self.names.prefix,
            "METRICS_HOST": "127.0.0.1",
            "METRICS_PORT": str(self.port),
        }
        merged = {**own, **CALM, **gateway, **self._settings}
        return {name: value for name, value in merged.items() if value is not None}

    def wait_ready(self, timeout: float = READY_SECONDS) -> Self:
        """Until /readyz says 200; an AssertionError with its last words if it ends before."""
        self.wait_for(lambda: self.get("/readyz")[0] == 200, timeout, "ready")
        return self

    def wait_for(self, fact: Any, timeout: float, what: str) -> Any:
        """`wait_until`, but an end of the process ends the wait."""

        def look() -> Any:
            # The order matters: what it said before it ended still counts.
            running = self.running
            found = fact()
            assert found or running, f"{what}: the worker ended with {self.exit_code}\n{self.last_words()}"
            return found

        return wait_until(look, timeout, what)

    def sigterm(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def kill9(self) -> None:
        """SIGKILL for it and whatever it started, and wait."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self, timeout: float = END_SECONDS) -> int:
        """Its exit code; an AssertionError with its last words if it does not end within `timeout` seconds."""
        assert self._process is not None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {timeout:g} s\n{self.last_words()}") from None

    def stop(self, timeout: float = END_SECONDS) -> float:
        """SIGTERM, and exit 0; how many seconds that took."""
        began = time.monotonic()
        self.sigterm()
        code = self.wait(timeout)
        assert code == 0, f"exit {code}\n{self.last_words()}"
        return time.monotonic() - began

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    # -- what it says

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an answer of its metrics port; (0, why) when there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException) as error:  # it may end in the middle of its answer
            return 0, str(error)
        finally:
            connection.close()

    def components(self) -> dict[str, str]:
        """What /readyz says about each component; empty when it says nothing."""
        status, body = self.get("/readyz")
        return dict(json.loads(body)["components"]) if status else {}

    def metrics(self) -> Scrape:
        """A scrape of now: one is rendered once a second, so this waits until ours of before is too old."""
        time.sleep(max(0.0, self._scraped_at + FRESH_SECONDS - time.monotonic()))
        status, text = self.get("/metrics")
        self._scraped_at = time.monotonic()
        assert status == 200, text
        return Scrape(text)

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Its log lines with one of these events, over all starts; all lines without names."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if not names or line["event"] in names]

    def log(self) -> str:
        """What it logged, over all starts; a line that is just being written is left out."""
        return "".join(log.read_text().rpartition("\n")[0] + "\n" for log in self._logs)

    def errors(self) -> str:
        """What it wrote to standard error, over all starts."""
        return "".join(error.read_text() for error in self._errors)

    def last_words(self, lines: int = 15) -> str:
        said = [*self.log().splitlines()[-lines:], *self.errors().splitlines()[-lines:]]
        return "\n".join(line[:400] for line in said)


class Producer:
    """Publishes commands and reads their outcomes, which gather in a durable queue of its own from the start.

    Over one connection, so for one thread; make it once the topology exists. `published` and `outcomes` are all
    that it ever saw.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self.names = Names(prefix)
        self.rabbit = Rabbit(url)
        self.published: list[Published] = []
        self.outcomes: list[Outcome] = []
        self.inbox = f"{prefix}.test.inbox"
        self.rabbit.declare_queue(self.inbox, "classic")
        self.listen()
        self._url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rabbit.close()
        # Over a new connection: a test may have cost the old one its life, and the inbox is durable.
        with suppress(pika.exceptions.AMQPError), Rabbit(self._url) as rabbit:
            rabbit.delete_queue(self.inbox)

    def reconnect(self) -> None:
        """After the broker was away; the inbox is where it was."""
        self.rabbit.close()
        self.rabbit = Rabbit(self._url)

    def listen(self) -> None:
        """Bind the inbox to all outcomes."""
        self.rabbit.bind(self.inbox, self.names.outcomes, "#")

    def turn_away(self) -> None:
        """Bind it no more: nobody wants the outcomes."""
        self.rabbit.channel.queue_unbind(self.inbox, self.names.outcomes, "#")

    def publish(
        self, bill: str, lane: str = "cancellation", *, merchant: str | None = "M1", **properties: Any
    ) -> Published:
        """One command, confirmed; a `message_id` is made from the bill unless given (None: without)."""
        return self.publish_body(command_body(bill, merchant), lane, **{"message_id": f"id-{bill}", **properties})

    def publish_body(self, body: bytes, lane: str = "cancellation", **properties: Any) -> Published:
        """These very bytes, confirmed."""
        self.rabbit.publish(self.names.commands, lane, body, **properties)
        return self._sent(body, lane, properties.get("message_id"))

    def publish_many(self, bills: Iterable[str], sweep_every: int = 1, of: int = 1) -> None:
        """Commands, all confirmed: `sweep_every` of each `of` to the sweep lane, the rest to the other."""
        sent = [
            self._sent(command_body(bill), "sweep" if number % of < sweep_every else "cancellation", f"id-{bill}")
            for number, bill in enumerate(bills)
        ]
        messages = ((one.lane, one.body, {"message_id": one.id}) for one in sent)
        self.rabbit.publish_many(self.names.commands, messages)

    def _sent(self, body: bytes, lane: str, message_id: str | None) -> Published:
        sent = Published(command_id(message_id, body), lane, body)
        self.published.append(sent)
        return sent

    def collect(self, count: int, timeout: float) -> list[Outcome]:
        """The next `count` outcomes; an AssertionError if fewer come in `timeout` seconds."""
        taken = [
            Outcome(message, json.loads(message.body)) for message in self.rabbit.consume(self.inbox, count, timeout)
        ]
        self.outcomes += taken
        return taken

    def collect_all(self, timeout: float) -> None:
        """Until every command published so far has an outcome."""
        deadline = time.monotonic() + timeout
        while missing := {sent.id for sent in self.published} - {got.command_id for got in self.outcomes}:
            left = max(deadline - time.monotonic(), 0.0)
            # One at a time at the end: a duplicate fills the place of a missing one.
            try:
                self.collect(1 if len(missing) < 50 else len(missing) // 2, left)
            except AssertionError:
                some = ", ".join(sorted(missing)[:5])
                raise AssertionError(
                    f"{len(missing)} without an outcome after {timeout:g} s ({some}); in the queues: {self.depths()}"
                ) from None

    def depths(self) -> dict[str, int]:
        """Messages ready in each queue of the prefix; those in a worker's hands are not counted."""
        queues = (queue.name for queue in topology(self.names.prefix, "quorum", DELAYS_IN_TESTS).queues)
        return {queue: self.rabbit.depth(queue) for queue in queues if self.rabbit.has_queue(queue)}

    def sweep_up(self) -> None:
        """Whatever outcomes have come beyond those waited for: duplicates."""
        self.collect(self.rabbit.depth(self.inbox), 30)

    def of(self, sent: Published, timeout: float = 30) -> Outcome:
        """The first outcome of this command."""

        def found() -> Iterator[Outcome]:
            return (outcome for outcome in self.outcomes if outcome.command_id == sent.id)

        deadline = time.monotonic() + timeout
        while (outcome := next(found(), None)) is None:
            left = deadline - time.monotonic()
            assert left > 0, f"no outcome of {sent.id} within {timeout:g} s"
            self.collect(1, left)
        return outcome


def command_body(bill: str, merchant: str | None = "M1", **fields: Any) -> bytes:
    """A command's JSON; `merchant` None leaves it out."""
    info = {} if merchant is None else {"additionalInfo": {"merchantId": merchant}}
    return json.dumps({"billnumber": bill, **info, **fields}).encode()


@contextmanager
def working(
    url: str, prefix: str, gateway: Simulator, directory: Path, **settings: str | None
) -> Iterator[tuple[WorkerProcess, Producer]]:
    """A worker that is ready, and a producer beside it."""
    with WorkerProcess(url, prefix, gateway, directory, **settings) as worker:
        worker.wait_ready()
        with Producer(url, prefix) as producer:
            yield worker, producer
