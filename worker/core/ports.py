"""What the use cases need from the outside: each port fits on a screen; its fake lives beside the tests.

All senders share one of each, and take turns on one thread: while one waits inside, others come in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from worker.core.command import Command
from worker.core.delivery import Delivery
from worker.core.request import SignedRequest
from worker.core.signing import Sign
from worker.core.verdict import NoReply, Reply, Verdict


@dataclass(frozen=True, slots=True)
class Token:
    """An access token and the generation it belongs to: a refusal names a generation, so that late answers to an old
    token never throw away its successor. An empty value: the gateway has no tokens."""

    value: str = field(repr=False)
    generation: int


class TokenUnavailable(Exception):
    """No token could be had; ``verdict`` judges the token service's answer like any other.

    ``shared``: another sender made that one request and reports it; it must not be counted twice. ``answer``: what
    came, for a closer look at what is wrong; it may hold a token.
    """

    def __init__(self, verdict: Verdict, *, shared: bool = False, answer: Reply | NoReply | None = None) -> None:
        super().__init__(verdict.message)
        self.verdict = verdict
        self.shared = shared
        self.answer = answer


class Tokens(Protocol):
    """One token for all senders."""

    def get(self) -> Token:
        """A token that is good by our clock. Raises `TokenUnavailable`; may block for one token request."""

    def accepted(self) -> None:
        """The gateway took a call, so it takes the token."""

    def refused(self, generation: int) -> object:
        """The gateway refused the token of this generation: the next `get` fetches a new one (unless refusals come so
        fast that one alone proves nothing)."""

    def doubted(self, generation: int) -> object:
        """The gateway refused a call in a way that may mean a dead token of this generation: it is renewed, at most
        once in a while, and serves until there is another."""


class Signer(Protocol):
    """Signs expire calls with the secrets of now: they may be rotated."""

    @property
    def sign(self) -> Sign:
        """See `Sign`; asked for again for every attempt."""


class Gateway(Protocol):
    """Sends one signed expire call: no retries of its own, bounded in time and size; never raises for what the network
    or the gateway does."""

    def send(self, request: SignedRequest, until: float = math.inf) -> Reply | NoReply:
        """The answer, or that there was none: there is no call when it cannot begin ``until`` this monotonic second,
        since a connection had to be opened first, or the process stood still."""


class Clock(Protocol):
    """Time, and waiting for it."""

    def epoch(self) -> float:
        """Seconds since the epoch: deadlines and what people read."""

    def monotonic(self) -> float:
        """Seconds for durations."""


class Held(Exception):
    """The command's lane is held: it goes back to the front and loses nothing. ``outage``: by the breaker. ``waited``:
    seconds that it had waited for a slot by then."""

    def __init__(self, *, outage: bool, waited: float = 0.0) -> None:
        super().__init__("breaker" if outage else "throttled")
        self.outage = outage
        self.waited = waited


class Draining(Exception):
    """The process is shutting down: the command goes back to the broker."""


class Gate(Protocol):
    """What every expire call has to pass."""

    def enter(self, lane: str, *, probe: bool, paced: bool) -> float:
        """Returns when a call may go out now, and until when: see `until`. Waits for a slot of the rate limit unless
        ``paced``. Returns the seconds that it waited. Raises `Held`, `Draining`."""

    @property
    def until(self) -> float:
        """Until which monotonic second the call may begin that has just entered; infinite without a rate limit."""

    def record(self, lane: str, verdict: Verdict, *, probe: bool, token: bool = False) -> None:
        """Learns from the answer: of the expire call, or (``token``) of the token service."""

    def outage(self, lane: str | None) -> bool:
        """Whether the breaker of the lane is not closed; with None, that of any lane."""

    def outages(self, lane: str) -> int:
        """How many outages of the lane are over (see `Breakers.outages`)."""

    def sleep(self, seconds: float) -> None:
        """Backs off. Raises `Draining` as soon as a drain begins."""


class Observer(Protocol):
    """Sees every attempt: metrics and the one wide log line."""

    def attempted(self, attempt: Attempt) -> None:
        """One expire call, or the failure to get a token for it, was judged."""

    def retrying(self, verdict: Verdict) -> None:
        """Another call follows for this verdict."""


class Attempt(NamedTuple):
    """One attempt as it is logged. ``seconds`` is the call's duration; ``external_id`` is None when none was sent."""

    delivery: Delivery
    command: Command
    number: int
    external_id: str | None
    verdict: Verdict
    status: int | None
    seconds: float
