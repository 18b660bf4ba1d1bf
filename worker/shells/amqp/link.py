"""One connection that comes back: hosts in turn, backoff with jitter, distinguished by what it is for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import structlog
from pika.adapters.select_connection import IOLoop

from worker.core.fitness import version_problem
from worker.shells.amqp.connection import Connection
from worker.shells.amqp.errors import cure, refusal
from worker.shells.amqp.errors import reason as describe

FIRST_WAIT: Final = 0.1
LONGEST_WAIT: Final = 10.0
"""Seconds between tries, doubling: a broker that comes back must not meet every worker in the same instant."""

HANG_UP_SECONDS: Final = 3.0  # for the broker's answer to a close

ANSWER_SECONDS: Final = 60.0
"""The longest a broker may leave unanswered what makes a connection useful. A queue without its quorum answers nothing,
while heartbeats go on; another host may be on the better side."""

SILENCE: Final = 1.25
"""Heartbeats without a word from the broker after which it is given up. A broker that hears nothing of us takes us for
gone after two heartbeats, ours come twice as often, and what we held is then somebody else's: after half a heartbeat
less we must know. pika's own look comes up to ten seconds after the second."""

Parameters = Callable[[], Sequence[Any]]
Guard = Callable[..., Callable[..., None]]

log = structlog.get_logger()


class Link:
    """A `Connection` on a shared loop. All methods belong to the loop's thread.

    ``parameters`` is asked again before every try, so that a rotated password is picked up. ``guard`` wraps every
    callback: pika turns an exception in one into a lost connection, or lets the loop's thread end in silence.
    """

    def __init__(
        self,
        name: str,
        loop: IOLoop,
        parameters: Parameters,
        *,
        on_up: Callable[[Any], None],
        on_down: Callable[[str], None],
        on_refused: Callable[[str, str], None],
        on_blocked: Callable[[bool], None],
        guard: Guard,
        rng: random.Random,
    ) -> None:
        self.name = name
        self.blocked = False
        self.trouble = "not connected yet"
        self._loop = loop
        self._parameters = parameters
        self._on_up = on_up
        self._on_down = on_down
        self._on_refused = on_refused
        self._on_blocked = on_blocked
        self._guard = guard
        self._rng = rng
        self._connection: Any = None
        self._turn = rng.randrange(1 << 16)  # processes begin at different hosts
        self._failures = 0
        self._host = ""  # the one that was tried last
        self._closing = False
        self._asked_at: float | None = None
        self._heard = 0
        self._heard_at = 0.0
        self._doubted = False

    @property
    def up(self) -> bool:
        """Whether the connection is open."""
        return self._connection is not None and bool(self._connection.is_open)

    @property
    def connection(self) -> Any:
        """pika's, while it is there."""
        return self._connection

    @property
    def closed(self) -> bool:
        """Whether it was closed for good."""
        return self._closing and self._connection is None

    def connect(self) -> None:
        """Tries the next host; never gives up until `close`."""
        if self._closing:
            return
        try:
            hosts = self._parameters()
        except ValueError as error:  # a secret file that is just being replaced
            self._retry(str(error))
            return
        parameters = hosts[self._turn % len(hosts)]
        self._turn += 1
        self._host = f"{parameters.host}:{parameters.port}"
        self._connection = Connection(
            parameters,
            on_open_callback=self._guard(self._opened),
            on_open_error_callback=self._guard(self._not_opened),
            on_close_callback=self._guard(self._lost),
            custom_ioloop=self._loop,
        )

    def works(self) -> None:
        """The connection does its work: the first consume-ok or confirm. Merely connecting proves nothing: a worker
        that is thrown out right after connecting would otherwise reconnect as fast as it can."""
        self._failures = 0

    def expect(self, answered: bool, now: float) -> None:
        """Told some times a second whether the broker has answered all that was asked on this connection."""
        self._listen(now)
        if answered or not self.up or self.blocked:
            self._asked_at = None
        elif self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at > ANSWER_SECONDS:
            self._asked_at = None
            self.reconnect(f"no answer from the broker for {ANSWER_SECONDS:.0f} s")

    def _listen(self, now: float) -> None:
        """Ends a connection on which nothing comes any more, not even heartbeats."""
        if not self.up:
            self._heard = 0
        elif self._connection.bytes_received != self._heard:
            self._heard, self._heard_at, self._doubted = self._connection.bytes_received, now, False
        elif (beat := self._connection.params.heartbeat) and now - self._heard_at > SILENCE * beat:
            # After a standstill of this process, what has come is only read between two looks.
            if self._doubted:
                self._connection.abort("no heartbeat from the broker")
            self._doubted = not self._doubted

    def reconnect(self, reason: str) -> None:
        """Drops the connection; a new one follows."""
        if not self.up:
            return  # it is being closed already
        self.trouble = reason
        log.warning("broker.reconnect", link=self.name, reason=reason)
        self._hang_up(reason)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Calls it on the loop after so many seconds."""
        self._loop.call_later(seconds, self._guard(callback))

    def close(self) -> None:
        """Closes for good, after what was written. One that is still being opened is left to the end of the process:
        it holds nothing, and pika 1.4 fails when it is closed during the handshake."""
        self._closing = True
        if self.up:
            self._hang_up("closed by us")
        elif self._connection is not None and not self._connection.is_closing:
            self._connection = None

    def _hang_up(self, reason: str) -> None:
        connection = self._connection
        if connection is None or connection.is_closed or connection.is_closing:
            return
        connection.close(200, reason[:200])
        # pika waits for the broker's answer, for ever if need be, and what hangs up may be a broker that is silent.
        self._loop.call_later(HANG_UP_SECONDS, self._guard(lambda: self._abort(connection)))

    def _abort(self, connection: Any) -> None:
        if connection is self._connection and not connection.is_closed:
            connection.abort("the broker did not answer the close")

    def _opened(self, connection: Any) -> None:
        if self._closing:
            return
        self.trouble = ""
        connection.add_on_connection_blocked_callback(self._guard(self._now_blocked))
        connection.add_on_connection_unblocked_callback(self._guard(self._now_unblocked))
        _warn_of_version(connection.server_properties)
        self._on_up(connection)

    def _not_opened(self, _connection: Any, error: BaseException) -> None:
        self._connection = None
        reason = describe(error)
        if refusal(error) is not None:
            self._on_refused(reason, cure(error))
        self._retry(reason)

    def _lost(self, connection: Any, error: BaseException) -> None:
        reason = connection.complaint or describe(error)
        self._connection = None
        self.blocked = False
        self.trouble = self.trouble or reason
        self._on_down(reason)
        self._retry(self.trouble)

    def _retry(self, reason: str) -> None:
        if self._closing:
            return
        self.trouble = reason
        ceiling = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(self._failures, 20))
        self._failures += 1
        wait = self._rng.uniform(ceiling / 2, ceiling)
        log.warning("broker.waiting", link=self.name, host=self._host, reason=reason, retry_in=round(wait, 2))
        self._loop.call_later(wait, self._guard(self.connect))

    def _now_blocked(self, _connection: Any, method: Any) -> None:
        self.blocked = True
        log.warning("broker.blocked", link=self.name, reason=str(getattr(method.method, "reason", "")))
        self._on_blocked(True)

    def _now_unblocked(self, _connection: Any, _method: Any) -> None:
        self.blocked = False
        log.info("broker.unblocked", link=self.name)
        self._on_blocked(False)


def _warn_of_version(properties: Any) -> None:
    version = (properties or {}).get("version", b"")
    problem = version_problem(version.decode("utf-8", "replace") if isinstance(version, bytes) else str(version))
    if problem is not None:
        _warn_once(problem)


@cache
def _warn_once(problem: str) -> None:
    """Each reconnect finds the same broker."""
    log.warning("broker.unfit", reason=problem)
