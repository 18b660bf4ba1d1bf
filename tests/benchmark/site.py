"""One run's broker objects: the worker's own topology, for all contenders, and an inbox for the outcomes of each lane.

The inboxes are quorum queues, so that a confirm costs what it costs in production. Nobody consumes them while a rate is
measured: how many outcomes there are is asked for, which takes next to nothing of the machine.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import pika

from tests.benchmark.contenders import BenchmarkError
from tests.rabbit import Rabbit, delete_topology, new_prefix
from worker.core.lanes import CANCELLATION, SWEEP
from worker.core.topology import Names, topology

DELAYS: Final = (30, 300, 1800)
LANES: Final = (CANCELLATION, SWEEP)
BATCH: Final = 2_000  # commands that are published before their confirms are waited for
SILENCE: Final = 60.0  # seconds without an outcome after which a run is given up


class Answers(NamedTuple):
    """When the outcome of each command came, by its id; `wait` takes more of them, for so many seconds."""

    came: dict[str, float]
    wait: Callable[[float], None]

    def number(self) -> int:
        """How many commands have one."""
        return len(self.came)


class Site:
    """A context manager; everything on the broker is gone when it is left. For one thread."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = f"benchmark.{new_prefix()}"
        self._names = Names(self.prefix)
        self.exchange = self._names.commands
        self._numbers = count(1)
        self._published: set[str] = set()
        self._seen: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._rabbit = Rabbit(self.url)
        try:
            self._rabbit.declare(topology(self.prefix, "quorum", DELAYS))
            for lane in LANES:
                self._rabbit.declare_queue(self._inbox(lane))
                self._rabbit.bind(self._inbox(lane), self._names.outcomes, f"{lane}.*")
        except BaseException:
            self._delete()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._delete()

    # -- commands

    def load(self, number: int) -> None:
        """Queue so many sweep commands, persistent and confirmed."""
        for done in range(0, number, BATCH):
            commands = self.commands(min(BATCH, number - done))
            messages = ((SWEEP, body, {"message_id": id}) for id, body in commands)
            self._rabbit.publish_many(self.exchange, messages)

    def commands(self, number: int) -> list[tuple[str, bytes]]:
        """Id and body of so many new ones; whoever asks for them publishes them, and `books` expects their outcomes."""
        made = [self._command() for _ in range(number)]
        self._published.update(id for id, _ in made)
        return made

    def queued(self) -> int:
        """Sweep commands that nobody has taken yet."""
        return self._rabbit.depth(self._names.queue(SWEEP))

    def pace(self, lane: str, number: int, per_second: float, watch: Callable[[], None]) -> list[float]:
        """Publish so many commands, one at a time; seconds from publish to outcome of each, in order of arrival.

        `watch` is called now and then, to raise when the contender has ended. The lane's inbox must be empty.
        """
        began: dict[str, float] = {}
        seconds: list[float] = []

        def took(id: str) -> None:
            if id in began and not self._seen[id]:
                seconds.append(time.monotonic() - began[id])

        channel = self._consume(lane, took)
        start = time.monotonic()
        for turn in range(number):
            while (left := start + turn / per_second - time.monotonic()) > 0:
                channel.connection.process_data_events(left)
            ((id, body),) = self.commands(1)
            made = pika.BasicProperties(message_id=id, delivery_mode=2)
            began[id] = time.monotonic()
            channel.basic_publish(self.exchange, lane, body, made)
        deadline = time.monotonic() + SILENCE
        while len(seconds) < number:
            watch()
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{number - len(seconds)} of {number} commands have no outcome; is it stuck?")
            channel.connection.process_data_events(0.1)
        channel.close()
        return seconds

    # -- outcomes

    def outcomes(self, lane: str = SWEEP) -> int:
        """How many of this lane are in its inbox."""
        return self._rabbit.depth(self._inbox(lane))

    @contextmanager
    def answers(self, lane: str) -> Iterator["Answers"]:
        """Takes the outcomes of this lane as they come."""
        came: dict[str, float] = {}
        channel = self._consume(lane, lambda command: came.setdefault(command, time.monotonic()))
        yield Answers(came, channel.connection.sleep)
        channel.close()

    def drain(self) -> None:
        """Take what is in the inboxes, for `books`."""
        for lane in LANES:
            left = self.outcomes(lane)
            if not left:
                continue
            before = self._seen.total()
            channel = self._consume(lane)
            deadline = time.monotonic() + SILENCE + left / 1000
            while self._seen.total() < before + left and time.monotonic() < deadline:
                channel.connection.process_data_events(1)
            channel.close()

    def books(self) -> tuple[int, int]:
        """How many commands have no outcome, and how many outcomes are one too many. When all has ended."""
        self.drain()
        return len(self._published - self._seen.keys()), self._seen.total() - len(self._seen)

    # -- parts

    def _inbox(self, lane: str) -> str:
        return f"{self.prefix}.inbox.{lane}"

    def _command(self) -> tuple[str, bytes]:
        bill = f"{next(self._numbers):08d}"
        body = json.dumps({"billnumber": bill, "additionalInfo": {"merchantId": "121000001"}})
        return f"{self.prefix}-{bill}", body.encode()

    def _consume(self, lane: str, took: Callable[[str], object] = lambda _: None) -> Any:
        """A channel that counts this inbox's outcomes as they come; `took` sees each before it is counted."""

        def on_message(_channel: Any, _method: Any, properties: Any, _body: bytes) -> None:
            took(properties.correlation_id)
            self._seen[properties.correlation_id] += 1

        channel = self._rabbit.plain_channel()
        channel.basic_consume(self._inbox(lane), on_message, auto_ack=True)
        return channel

    def _delete(self) -> None:
        self._rabbit.close()
        with Rabbit(self.url) as rabbit:
            for lane in LANES:
                rabbit.delete_queue(self._inbox(lane))
        delete_topology(self.url, self.prefix, DELAYS)
