"""One token for all senders, under real threads: fetched once, refreshed early, thrown away by generation."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import NOON, no_token
from tests.fakes import FakeClock
from tests.waiting import wait_until
from worker.app.tokens import (
    DOUBTS_EVERY,
    REFUSALS_AT_ONCE,
    REFUSALS_EVERY,
    REFUSED_IN_A_ROW,
    RENEWAL_BACKOFF,
    RETRY_EARLY_REFRESH,
    NoTokens,
    TokenStore,
)
from worker.core.grant import Grant
from worker.core.ports import Draining, Token, TokenUnavailable
from worker.core.verdict import Kind

LIFE = 900.0


class Service:
    """The token service, scripted; counts how many ask at the same time."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.fetched = 0
        self.at_once = 0
        self.most_at_once = 0
        self.takes = 0.0
        self.failure: TokenUnavailable | None = None
        self.meanwhile: Callable[[], object] = lambda: None

    def wait(self) -> tuple[threading.Event, threading.Event]:
        """From now on a request waits: (it has come, it may go on)."""
        started, go = threading.Event(), threading.Event()

        def meanwhile() -> None:
            started.set()
            assert go.wait(30)

        self.meanwhile = meanwhile
        return started, go

    def fetch(self) -> Grant:
        self.fetched += 1
        number = self.fetched
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.meanwhile()
            self.clock.sleep(self.takes)
            if self.failure is not None:
                raise self.failure
            return Grant(f"token-{number}", LIFE)
        finally:
            self.at_once -= 1


class RecordingObserver:
    """The store's `RefreshObserver`."""

    def __init__(self) -> None:
        self.results: list[str] = []
        self.expiries: list[float] = []

    def token_refresh(self, result: str) -> None:
        self.results.append(result)

    def token_expiry(self, timestamp: float) -> None:
        self.expiries.append(timestamp)


class Bench:
    """A store on a fake clock."""

    def __init__(self, kind: type[TokenStore] = TokenStore) -> None:
        self.clock = FakeClock()
        self.service = Service(self.clock)
        self.watch = RecordingObserver()
        self.pauses: list[float] = []
        self.store = kind(
            self.service.fetch,
            self.watch,
            clock=self.clock,
            rng=random.Random(1),
            pause=self.pauses.append,
            requesting=threading.Lock(),
        )

    def refuse(self) -> None:
        """The gateway refuses the token that a sender uses now."""
        self.store.refused(self.store.get().generation)

    def refuse_to_the_limit(self) -> Token:
        """Uses up the refusals that are believed at once; the token that is there then."""
        for _ in range(REFUSALS_AT_ONCE):
            self.refuse()
        return self.store.get()


class Senders:
    """Many threads that ask for a token at the same time."""

    def __init__(self, store: TokenStore, count: int) -> None:
        self.tokens: list[Token] = []
        self.failures: list[TokenUnavailable] = []
        self.asking = 0
        self._store = store
        self._barrier = threading.Barrier(count)
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        self._barrier.wait(30)
        with self._lock:
            self.asking += 1
        try:
            self.tokens.append(self._store.get())
        except TokenUnavailable as failure:
            self.failures.append(failure)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


def test_fetched_once() -> None:
    """A token is fetched when it is first wanted, and then it serves."""

    bench = Bench()
    assert bench.service.fetched == 0

    assert {bench.store.get() for _ in range(9)} == {Token("token-1", 1)}
    assert bench.service.fetched == 1
    assert bench.watch.results == ["ok"]
    assert bench.watch.expiries == [NOON + LIFE]


def test_one_request_for_all() -> None:
    """Thirty-two senders without a token make one request and all get its token."""

    bench = Bench()
    started, go = bench.service.wait()
    senders = Senders(bench.store, 32)
    assert started.wait(30)
    wait_until(lambda: senders.asking == 32, 30, "all ask")
    go.set()
    senders.join()

    assert senders.tokens == [Token("token-1", 1)] * 32
    assert bench.service.fetched == 1


def test_one_request_for_all_after_a_refusal() -> None:
    """Thirty-two senders whose token was refused fetch one new token."""

    bench = Bench()
    old = bench.store.get()
    for _ in range(32):
        bench.store.refused(old.generation)
    senders = Senders(bench.store, 32)
    senders.join()

    assert senders.tokens == [Token("token-2", 2)] * 32
    assert bench.service.fetched == 2


def test_shared_failures() -> None:
    """A failed request is made by one sender at a time; those who waited for it share it and ask nobody."""

    bench = Bench()
    bench.service.failure = no_token()
    done: list[Senders] = []
    bench.service.meanwhile = lambda: wait_until(lambda: done and done[0].asking == 32, 30, "all ask")
    senders = Senders(bench.store, 32)
    done.append(senders)
    senders.join()

    shared = Counter(failure.shared for failure in senders.failures)
    assert shared.total() == 32
    assert shared[False] == bench.service.fetched
    assert shared[True] > 0
    assert bench.service.most_at_once == 1
    assert {failure.verdict.kind for failure in senders.failures} == {Kind.SYSTEMIC}


def test_failures_are_asked_again() -> None:
    """The next sender after a failure asks again."""

    bench = Bench()
    bench.service.failure = no_token(Kind.TRANSIENT)
    for _ in range(2):
        with pytest.raises(TokenUnavailable) as failed:
            bench.store.get()
        assert not failed.value.shared
    bench.service.failure = None

    assert bench.store.get().generation == 1
    assert bench.watch.results == ["error", "error", "ok"]


def test_refused_credentials_are_told() -> None:
    """Refused credentials and a broken service are distinguished."""

    bench = Bench()
    bench.service.failure = no_token(Kind.SYSTEMIC)
    with pytest.raises(TokenUnavailable):
        bench.store.get()

    assert bench.watch.results == ["refused"]


@given(st.integers())
def test_refreshed_early(seed: int) -> None:
    """A token is renewed between 80 and 90 % of its life, at a random point."""

    bench = Bench()
    bench.store._rng = random.Random(seed)
    bench.store.get()
    bench.clock.sleep(LIFE * 0.8 - 0.001)
    assert bench.store.get().generation == 1
    bench.clock.sleep(LIFE * 0.1 + 0.001)
    assert bench.store.get().generation == 2


def test_early_refresh_lets_others_go_on() -> None:
    """While one sender refreshes early the others go on with the token they have."""

    bench = Bench()
    old = bench.store.get()
    bench.clock.sleep(LIFE * 0.95)
    started, go = bench.service.wait()
    refresher = Senders(bench.store, 1)
    assert started.wait(30)

    others = Senders(bench.store, 31)
    others.join()
    go.set()
    refresher.join()

    assert others.tokens == [old] * 31
    assert refresher.tokens == [Token("token-2", 2)]
    assert bench.store.get().generation == 2
    assert bench.service.fetched == 2


def test_failed_early_refresh() -> None:
    """An early refresh that fails costs nobody anything: the token serves to its end, and it is tried again."""

    bench = Bench()
    old = bench.store.get()
    bench.clock.sleep(LIFE * 0.95)
    bench.service.failure = no_token()
    assert [bench.store.get() for _ in range(5)] == [old] * 5
    assert bench.service.fetched == 2
    bench.clock.sleep(RETRY_EARLY_REFRESH)
    assert bench.store.get() == old
    assert bench.service.fetched == 3

    bench.clock.sleep(LIFE * 0.05)
    with pytest.raises(TokenUnavailable):
        bench.store.get()


def test_failed_refresh_does_not_prolong() -> None:
    """An early refresh that fails just before the end does not make the token serve beyond it."""

    bench = Bench()
    bench.store.get()
    bench.service.failure = no_token()
    bench.clock.sleep(LIFE - 1.0)
    bench.store.get()
    bench.clock.sleep(1.0)

    with pytest.raises(TokenUnavailable):
        bench.store.get()


class Late(TokenStore):
    """A store in which one sender finds that a refresh is due, and then is overtaken by another."""

    overtaken = False

    def _refresh_early(self, token: Token) -> Token:
        if not self.overtaken:
            self.overtaken = True
            assert self.get() != token
        return super()._refresh_early(token)


def test_late_to_an_early_refresh() -> None:
    """A sender that comes late to an early refresh takes its token and does not refresh again."""

    bench = Bench(Late)
    bench.store.get()
    bench.clock.sleep(LIFE * 0.95)

    assert bench.store.get() == Token("token-2", 2)
    assert bench.service.fetched == 2


def test_life_begins_before_the_request() -> None:
    """A token's life counts from before it was asked for."""

    bench = Bench()
    bench.service.takes = 100.0
    bench.store.get()
    bench.service.failure, bench.service.takes = no_token(), 0.0
    bench.clock.sleep(LIFE - 101.0)
    assert bench.store.get().generation == 1
    bench.clock.sleep(1.0)
    with pytest.raises(TokenUnavailable):
        bench.store.get()


def test_refused_by_generation() -> None:
    """A refusal throws away the token it names, and never its successor."""

    bench = Bench()
    old = bench.store.get()
    bench.store.refused(old.generation)
    new = bench.store.get()
    assert new.generation == old.generation + 1

    for _ in range(9):
        bench.store.refused(old.generation)
    assert bench.store.get() == new


def test_refusals_are_rate_limited() -> None:
    """Refusals that come fast between accepted calls cost five tokens at once, then one in ten seconds."""

    bench = Bench()
    serving = bench.refuse_to_the_limit()
    fetched = bench.service.fetched
    for _ in range(50):
        bench.refuse()
        bench.store.accepted()
    assert bench.store.get() == serving
    assert bench.service.fetched == fetched

    bench.clock.sleep(REFUSALS_EVERY)
    bench.refuse()
    assert bench.store.get().generation == serving.generation + 1
    bench.refuse()
    assert bench.store.get().generation == serving.generation + 1
    assert bench.pauses == []


def test_allowance_is_bounded() -> None:
    """A quiet day does not earn more than five refusals at once."""

    bench = Bench()
    bench.refuse_to_the_limit()
    bench.clock.sleep(LIFE / 2)

    last = bench.refuse_to_the_limit()
    bench.refuse()
    bench.store.accepted()
    assert bench.store.get() == last


def test_renewal_backoff() -> None:
    """A token refused several times in a row is dead, however fast; before its successor there is a short wait."""

    bench = Bench()
    serving = bench.refuse_to_the_limit()
    for _ in range(REFUSED_IN_A_ROW - 1):
        bench.refuse()
    assert bench.store.get() == serving
    bench.refuse()
    assert bench.pauses == []

    assert bench.store.get().generation == serving.generation + 1
    assert len(bench.pauses) == 1
    assert 0 <= bench.pauses[0] <= RENEWAL_BACKOFF


def test_renewal_backoff_is_one_wait() -> None:
    """Only the renewal that follows such refusals waits; the next one does not."""

    bench = Bench()
    bench.refuse_to_the_limit()
    for _ in range(REFUSED_IN_A_ROW):
        bench.refuse()
    bench.store.get()
    bench.clock.sleep(REFUSALS_EVERY)
    bench.refuse()
    bench.store.get()

    assert len(bench.pauses) == 1


def test_drain_during_a_renewal_backoff() -> None:
    """A drain ends the wait, and the store still works for whoever asks."""

    def drain(_: float) -> None:
        raise Draining

    bench = Bench()
    bench.store._pause = drain
    bench.refuse_to_the_limit()
    for _ in range(REFUSED_IN_A_ROW):
        bench.refuse()
    with pytest.raises(Draining):
        bench.store.get()

    assert bench.store.get().value.startswith("token-")


def test_rotated_credentials() -> None:
    """After credentials were rotated the next sender asks for a token with the new ones."""

    bench = Bench()
    bench.store.get()
    bench.store.renew()

    assert bench.store.get().generation == 2


# -- a token in doubt -------------------------------------------------------------------------------------------------


def test_doubt_renews_once() -> None:
    """However many answers leave one token in doubt, one request replaces it."""

    bench = Bench()
    old = bench.store.get()
    for _ in range(32):
        bench.store.doubted(old.generation)

    assert [bench.store.get().generation for _ in range(9)] == [old.generation + 1] * 9
    assert bench.service.fetched == 2
    bench.store.doubted(old.generation)
    assert bench.store.get().generation == old.generation + 1


def test_doubts_are_rate_limited() -> None:
    """A gateway that refuses everything for another reason costs one token request in ten seconds."""

    bench = Bench()
    for _ in range(50):
        bench.store.doubted(bench.store.get().generation)
    assert bench.store.get().generation == 2
    bench.clock.sleep(DOUBTS_EVERY)
    bench.store.doubted(2)

    assert bench.store.get().generation == 3


def test_doubt_that_cannot_be_settled_costs_nobody_the_token() -> None:
    """The token service fails: the token in doubt goes on to serve, and the service is asked again in a while."""

    bench = Bench()
    old = bench.store.get()
    bench.store.doubted(old.generation)
    bench.service.failure = no_token(Kind.TRANSIENT)

    assert [bench.store.get() for _ in range(9)] == [old] * 9
    assert bench.service.fetched == 2
    bench.service.failure = None
    bench.clock.sleep(RETRY_EARLY_REFRESH)
    assert bench.store.get().generation == old.generation + 1


def test_doubt_lets_others_go_on() -> None:
    """While one sender renews a token in doubt the others go on with it."""

    bench = Bench()
    old = bench.store.get()
    bench.store.doubted(old.generation)
    started, go = bench.service.wait()
    renewing = Senders(bench.store, 1)
    assert started.wait(30)
    others = Senders(bench.store, 31)
    others.join()
    go.set()
    renewing.join()

    assert (others.tokens, renewing.tokens) == ([old] * 31, [Token("token-2", 2)])


def test_no_tokens() -> None:
    """Where the gateway has none, the token is empty, whatever is said about it."""

    tokens = NoTokens()
    tokens.accepted()
    tokens.refused(0)
    tokens.doubted(0)
    tokens.renew()

    assert tokens.get() == Token("", 0)
