"""One access token for all senders: fetched once at a time, refreshed early, thrown away by generation."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

from worker.core.ports import Clock, Token, TokenUnavailable
from worker.core.verdict import Kind
from worker.shells.gateway import Grant

REFRESH_FROM: Final = 0.8
REFRESH_TO: Final = 0.9
"""A token is renewed at a random point of this share of its life, so that processes do not ask together."""
RETRY_EARLY_REFRESH: Final = 5.0  # seconds after an early refresh that failed; the old token still serves
REFUSALS_AT_ONCE: Final = 5
REFUSALS_EVERY: Final = 10.0
"""So many refused tokens are replaced at once, and one more every ten seconds. Beyond that a refusal alone is not
believed (a gateway that refuses one call in fifty would be asked for a token every few milliseconds)…"""
REFUSED_IN_A_ROW: Final = 3
"""…unless this many come without one accepted call between them: then the token is dead."""
TRUCE: Final = 4.0
"""Tokens that die this fast are killed by another process's new ones. Waiting up to this long before killing theirs in
turn lets each work for a while; without it both would refresh for ever and neither would get a call through."""


class Watch(Protocol):
    """What the store tells about its refreshes."""

    def token_refresh(self, result: str) -> None: ...
    def token_expiry(self, timestamp: float) -> None: ...


class Flight(Protocol):
    """What senders queue on for a token: a ``threading.Lock``, or a fiber's."""

    def acquire(self, blocking: bool = ...) -> bool: ...
    def release(self) -> None: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *_: Any) -> None: ...


class TokenStore:
    """The `Tokens` of the core's ports. ``fetch`` makes one token request; ``pause`` waits (and raises on a drain)."""

    def __init__(
        self,
        fetch: Callable[[], Grant],
        watch: Watch,
        *,
        clock: Clock,
        rng: random.Random,
        pause: Callable[[float], None],
        flight: Flight | None = None,
    ) -> None:
        self._fetch = fetch
        self._watch = watch
        self._clock = clock
        self._rng = rng
        self._pause = pause
        self._lock = threading.Lock()
        self._flight = flight or threading.Lock()
        self._flights = 0
        self._failure: TokenUnavailable | None = None
        self._token: Token | None = None
        self._generation = 0
        self._refresh_at = 0.0
        self._expires_at = 0.0
        self._refused = 0  # in a row, without an accepted call between them
        self._allowance = float(REFUSALS_AT_ONCE)
        self._allowance_at = clock.monotonic()
        self._truce = False

    def get(self) -> Token:
        """See `Tokens`. The fast path takes no lock: a token is one immutable object."""
        token, now = self._token, self._clock.monotonic()
        if token is not None and now < self._refresh_at:
            return token
        if token is not None and now < self._expires_at:
            return self._refresh_early(token)
        return self._refresh_now()

    def accepted(self) -> None:
        """See `Tokens`. Called for every good answer, so it is one comparison."""
        if self._refused:
            self._refused = 0

    def refused(self, generation: int) -> None:
        """See `Tokens`."""
        with self._lock:
            token = self._token
            if token is None or token.generation != generation:
                return
            self._refused += 1
            now = self._clock.monotonic()
            earned = (now - self._allowance_at) / REFUSALS_EVERY
            self._allowance = min(self._allowance + earned, float(REFUSALS_AT_ONCE))
            self._allowance_at = now
            if self._allowance >= 1.0:
                self._allowance -= 1.0
            elif self._refused >= REFUSED_IN_A_ROW:
                self._truce = True
            else:
                return
            self._refused = 0
            self._token = None

    def renew(self) -> None:
        """Credentials were rotated: the next `get` asks for a token with the new ones."""
        self._token = None

    def _refresh_early(self, token: Token) -> Token:
        """One sender fetches the successor; the others go on with the token they have."""
        if not self._flight.acquire(blocking=False):
            return token
        try:
            current = self._token
            if current is not None and current is not token:
                return current  # another sender was faster
            return self._renew()
        except TokenUnavailable:
            self._refresh_at = min(self._clock.monotonic() + RETRY_EARLY_REFRESH, self._expires_at)
            return token
        finally:
            self._flight.release()

    def _refresh_now(self) -> Token:
        """One sender fetches, the others wait for its result, good or bad: a dead token service gets one request at
        a time, and a sender never queues for a second failure."""
        flights = self._flights
        with self._flight:
            token = self._token
            if token is not None and self._clock.monotonic() < self._expires_at:
                return token
            if self._flights != flights and self._failure is not None:
                raise TokenUnavailable(self._failure.verdict, shared=True)
            if self._truce:
                self._truce = False
                self._pause(self._rng.uniform(0.0, TRUCE))
            return self._renew()

    def _renew(self) -> Token:
        """One token request; the flight's lock is held."""
        asked = self._clock.monotonic()
        try:
            grant = self._fetch()
        except TokenUnavailable as failure:
            self._failure = failure
            self._watch.token_refresh("refused" if failure.verdict.kind is Kind.SYSTEMIC else "error")
            raise
        finally:
            self._flights += 1
        self._failure = None
        self._generation += 1
        self._refresh_at = asked + grant.lifetime * self._rng.uniform(REFRESH_FROM, REFRESH_TO)
        self._expires_at = asked + grant.lifetime
        self._token = Token(grant.value, self._generation)
        self._watch.token_refresh("ok")
        self._watch.token_expiry(self._clock.epoch() + grant.lifetime)
        return self._token
