"""One access token for all senders: fetched once at a time, renewed early, thrown away by generation."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, Final, Protocol

from worker.core.grant import Grant
from worker.core.ports import Clock, Token, TokenUnavailable
from worker.core.verdict import Kind

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
DOUBTS_EVERY: Final = REFUSALS_EVERY
"""An answer that leaves the token in doubt (a 401 or 403 that does not name it) renews it at most so often: where the
doubt is unfounded, every other refusal would cost a token request."""
RENEWAL_BACKOFF: Final = 4.0
"""Tokens that become invalid this fast are replaced by another process's new ones. Waiting up to this long before the
next renewal lets each process work for a while; without it both would renew for ever and no call would succeed."""


class RefreshObserver(Protocol):
    """What the store reports about its refreshes."""

    def token_refresh(self, result: str) -> None: ...
    def token_expiry(self, timestamp: float) -> None: ...


class Mutex(Protocol):
    """What senders wait on for a token request: a fiber's lock."""

    def acquire(self, blocking: bool = ...) -> bool: ...
    def release(self) -> None: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *_: Any) -> None: ...


class TokenStore:
    """The `Tokens` of the core's ports, for senders that take turns on one thread. ``fetch`` makes one token request;
    ``pause`` waits (and raises on a drain)."""

    def __init__(
        self,
        fetch: Callable[[], Grant],
        observer: RefreshObserver,
        *,
        clock: Clock,
        rng: random.Random,
        pause: Callable[[float], None],
        requesting: Mutex,
    ) -> None:
        self._fetch = fetch
        self._observer = observer
        self._clock = clock
        self._rng = rng
        self._pause = pause
        self._requesting = requesting
        self._requests = 0
        self._failure: TokenUnavailable | None = None
        self._token: Token | None = None
        self._generation = 0
        self._refresh_at = 0.0
        self._expires_at = 0.0
        self._refused = 0  # in a row, without an accepted call between them
        self._allowance = float(REFUSALS_AT_ONCE)
        self._allowance_at = clock.monotonic()
        self._backs_off = False
        self._doubted_until = -math.inf

    def get(self) -> Token:
        """The fast path takes no lock: a token is one immutable object."""
        token, now = self._token, self._clock.monotonic()
        if token is not None and now < self._refresh_at:
            return token
        if token is not None and now < self._expires_at:
            return self._refresh_early(token)
        return self._refresh_now()

    def accepted(self) -> None:
        """Called for every good answer, so it is one comparison."""
        if self._refused:
            self._refused = 0

    def refused(self, generation: int) -> bool:
        """Whether the token was thrown away."""
        token = self._token
        if token is None or token.generation != generation:
            return False
        self._refused += 1
        now = self._clock.monotonic()
        earned = (now - self._allowance_at) / REFUSALS_EVERY
        self._allowance = min(self._allowance + earned, float(REFUSALS_AT_ONCE))
        self._allowance_at = now
        if self._allowance >= 1.0:
            self._allowance -= 1.0
        elif self._refused >= REFUSED_IN_A_ROW:
            self._backs_off = True
        else:
            return False
        self._refused = 0
        self._token = None
        return True

    def doubted(self, generation: int) -> bool:
        """Whether it is to be renewed. It still serves whoever asks meanwhile: the doubt may be unfounded."""
        token, now = self._token, self._clock.monotonic()
        if token is None or token.generation != generation or now < self._doubted_until:
            return False
        self._doubted_until = now + DOUBTS_EVERY
        self._refresh_at = now
        return True

    def renew(self) -> None:
        """Credentials were rotated: the next `get` asks for a token with the new ones."""
        self._token = None

    def adopt(self, grant: Grant) -> None:
        """A token that somebody else has asked for: it is the one to use."""
        self._hold(grant, self._clock.monotonic())

    def _refresh_early(self, token: Token) -> Token:
        """One sender fetches the successor; the others go on with the token they have."""
        if not self._requesting.acquire(blocking=False):
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
            self._requesting.release()

    def _refresh_now(self) -> Token:
        """One sender fetches, the others wait for its result, good or bad: a dead token service gets one request at
        a time, and a sender never queues for a second failure."""
        requests = self._requests
        with self._requesting:
            token = self._token
            if token is not None and self._clock.monotonic() < self._expires_at:
                return token
            if self._requests != requests and self._failure is not None:
                raise TokenUnavailable(self._failure.verdict, shared=True)
            if self._backs_off:
                self._backs_off = False
                self._pause(self._rng.uniform(0.0, RENEWAL_BACKOFF))
            return self._renew()

    def _renew(self) -> Token:
        """One token request; the lock is held."""
        asked = self._clock.monotonic()
        try:
            grant = self._fetch()
        except TokenUnavailable as failure:
            self._failure = failure
            self._observer.token_refresh("refused" if failure.verdict.kind is Kind.SYSTEMIC else "error")
            raise
        finally:
            self._requests += 1
        self._observer.token_refresh("ok")
        return self._hold(grant, asked)

    def _hold(self, grant: Grant, asked: float) -> Token:
        """``asked``: when its life began at the latest."""
        self._failure = None
        self._generation += 1
        self._refresh_at = asked + grant.lifetime * self._rng.uniform(REFRESH_FROM, REFRESH_TO)
        self._expires_at = asked + grant.lifetime
        token = self._token = Token(grant.value, self._generation)
        self._observer.token_expiry(self._clock.epoch() + grant.lifetime)
        return token


class NoTokens:
    """The `Tokens` of a gateway that has none: requests are signed without a token, and nobody is asked for one."""

    def get(self) -> Token:
        """An empty token: no Authorization is sent."""
        return NO_TOKEN

    def accepted(self) -> None: ...
    def refused(self, generation: int) -> None: ...
    def doubted(self, generation: int) -> None: ...
    def renew(self) -> None: ...


NO_TOKEN: Final = Token("", 0)
