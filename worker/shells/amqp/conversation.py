"""One connection for a tool that asks and waits while acks, confirms and deliveries go on: a loop in its own thread.

pika's blocking connection would serve, but it neither joins frames nor lets a wait be cut short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from pika.adapters.select_connection import IOLoop
from pika.exceptions import AMQPError, ChannelClosed

from worker.app.dead_letters import Stop
from worker.shells.amqp.connection import Connection
from worker.shells.amqp.errors import LOCKED
from worker.shells.amqp.session import BrokerUnreachable, broker_error, connect_by

if TYPE_CHECKING:
    from worker.settings import AmqpSettings

ANSWER_SECONDS: Final = 30.0  # for one answer of the broker; a confirm of a lost quorum never comes
CLOSE_SECONDS: Final = 3.0
SLICE: Final = 0.2  # seconds; a request to stop is seen this late at most


class Interrupted(KeyboardInterrupt):
    """Asked to stop, and it can be done at once: the broker takes back what we hold."""


class Conversation:
    """Callbacks only take notes, and wake whoever waits; every wait is a `turn`. Raises `BrokerError` and its kinds.

    ``stop`` says how often people asked to stop: once ends what can be done again, twice ends every wait.
    ``each_turn`` is called before and after each wait, for what is to be written.
    """

    def __init__(self, amqp: AmqpSettings, role: str, *, stop: Stop, each_turn: Callable[[], None]) -> None:
        self._amqp = amqp
        self._role = role
        self._stop = stop
        self._each_turn = each_turn
        self._loop = IOLoop()
        self._connection: Any = None
        self._lost: BaseException | None = None
        self._failure: BaseException | None = None
        self._ends: dict[int, BaseException] = {}  # why channels ended, by number

    def connect(self) -> None:
        """To the first URL that answers."""
        self._connection = connect_by(self._dial, self._amqp, self._role)

    @contextmanager
    def corked(self) -> Iterator[None]:
        """What is written inside the block leaves together at its end."""
        with self._connection.corked():
            yield

    @property
    def largest_frame(self) -> int:
        """Bytes, as agreed with the broker."""
        return int(self._connection.params.frame_max)

    def channel(self, on_end: Callable[[Any, BaseException], None] = lambda *_: None) -> Any:
        """A new one; ``on_end`` hears that it ended, and why."""
        opened, note = self._notes()

        def ended(channel: Any, reason: BaseException) -> None:
            self._ends[channel.channel_number] = reason
            on_end(channel, reason)
            self.wake()

        self._connection.channel(on_open_callback=note)
        self.until(lambda: bool(opened), "open a channel")
        channel = opened[0]
        self._ends.pop(channel.channel_number, None)
        channel.add_on_close_callback(self.guard(ended))
        return channel

    def ask(self, channel: Any, method: str, **arguments: Any) -> Any:
        """One method and its answer. Raises pika's `ChannelClosed` for what somebody else has locked, else ours."""
        answers, note = self._notes()
        number = channel.channel_number
        getattr(channel, method)(callback=note, **arguments)
        self.until(lambda: bool(answers) or number in self._ends, f"answer ({method.replace('_', '.')})")
        if answers:
            return answers[0]
        reason = self._ends[number]
        if isinstance(reason, ChannelClosed) and reason.reply_code == LOCKED:
            raise reason
        raise broker_error(reason if isinstance(reason, Exception) else Exception(reason))

    def until(self, fact: Callable[[], bool], what: str, seconds: float = ANSWER_SECONDS) -> None:
        """Waits for it. Raises `BrokerUnreachable` when the broker does not ``what`` in time."""
        deadline = time.monotonic() + seconds
        while not fact():
            if time.monotonic() > deadline:
                raise BrokerUnreachable(f"the broker did not {what} within {seconds:g} s; look at it, then try again")
            self.turn(SLICE)

    def pause(self, seconds: float) -> None:
        """Waits, whatever happens meanwhile."""
        then = time.monotonic() + seconds
        while time.monotonic() < then:
            self.turn(then - time.monotonic())

    def turn(self, seconds: float) -> None:
        """Lets things happen, until one did or ``seconds`` are over; raises what went wrong meanwhile."""
        self._each_turn()
        self._check()
        self._spin_once(min(seconds, SLICE))
        self._each_turn()
        self._check()
        if self._stop() > 1:
            raise Interrupted

    def wake(self) -> None:
        """Ends the wait that goes on."""
        self._loop.stop()

    def fail(self, error: BaseException) -> None:
        """The next `turn` raises it, unless there was one before."""
        self._failure = self._failure or error

    def guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        """What a callback raises, `turn` raises: pika would drop the connection for it."""

        def guarded(*args: Any) -> None:
            try:
                callback(*args)
            except BaseException as error:  # noqa: BLE001  # see above
                self.fail(error)
                self.wake()

        return guarded

    def hang_up(self, first: Any = None) -> None:
        """Closes, the channel ``first`` before the rest, so that nothing overtakes its acks; errors matter no more."""
        deadline = time.monotonic() + CLOSE_SECONDS
        with suppress(AMQPError):
            if first is not None and first.is_open:
                first.close()
                self._spin(lambda: bool(first.is_closed), deadline)
            self._connection.close()
        self._spin(lambda: bool(self._connection.is_closed), deadline)
        if self._connection.is_closed:
            self._loop.close()

    def break_off(self) -> None:
        """Without a goodbye, which would mix up the order of what is on its way."""
        if self._connection.is_open:
            self._connection.abort("broken off")
            self._spin(lambda: False, time.monotonic() + CLOSE_SECONDS)
        self._loop.close()

    def _dial(self, params: Any) -> Connection:
        answers, note = self._notes()

        def ended(_connection: Any, reason: BaseException) -> None:
            self._lost = reason
            self.wake()

        self._lost = None
        connection = Connection(
            params,
            custom_ioloop=self._loop,
            on_open_callback=note,
            on_open_error_callback=lambda _, error: note(error),
            on_close_callback=ended,
        )
        while not answers:
            self._loop.start()
            if self._stop():
                raise Interrupted
        if isinstance(answers[0], BaseException):
            raise answers[0]
        return connection

    def _notes(self) -> tuple[list[Any], Callable[[Any], None]]:
        """A list, and the callback that puts an answer into it, and wakes whoever waits for one."""
        answers: list[Any] = []

        def note(answer: Any) -> None:
            answers.append(answer)
            self.wake()

        return answers, note

    def _check(self) -> None:
        failure = self._failure or self._lost
        if failure is None:
            return
        if isinstance(failure, (AMQPError, OSError)):
            raise broker_error(failure) from failure
        raise failure

    def _spin(self, fact: Callable[[], bool], deadline: float) -> None:
        while not fact() and self._lost is None and time.monotonic() < deadline:
            self._spin_once(SLICE / 4)

    def _spin_once(self, seconds: float) -> None:
        timer = self._loop.call_later(seconds, self._loop.stop)
        self._loop.start()
        self._loop.remove_timeout(timer)
