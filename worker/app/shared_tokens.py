"""One access token for the whole fleet: the leader asks the token service, the others ask the leader.

Between processes a token travels sealed with a key that only the client secret gives. Who cannot open it has another
secret (one was just rotated), or hears no leader, and asks the token service itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from worker.app.dispatch import Event
from worker.app.fleet import Fleet
from worker.app.sealing import Sealing
from worker.app.tokens import TokenStore
from worker.core.fleet.messages import Letter, TokenFailed, TokenGiven, TokenWanted
from worker.core.grant import Grant
from worker.core.ports import TokenUnavailable
from worker.core.verdict import Kind, Verdict

JOINING: Final = 5.0
"""Seconds that the first token waits for the fleet; without a broker a process must still learn whether its credentials
are good."""
LEADERLESS: Final = 3.0
"""Seconds without a leader after which a member asks the token service itself."""
LOOK: Final = 0.25  # seconds between two looks whether there is a leader


@dataclass(slots=True)
class _Held:
    """The fleet's token as we know it: which one, and until when it lives (monotonic)."""

    generation: int = 0
    value: str = ""
    expires: float = 0.0


@dataclass(slots=True)
class _Question:
    """One that we have put to the leader."""

    number: int
    event: Event
    answer: TokenGiven | TokenFailed | None = None


class SharedTokens(TokenStore):
    """A store that fetches of the leader, or of the token service by ``request``. On the loop's thread; what waits does
    so in a fiber. ``options``: the store's."""

    def __init__(
        self,
        fleet: Fleet,
        request: Callable[[], Grant],
        seal: Sealing,
        *,
        event: Callable[[], Event],
        spawn: Callable[[Callable[[], None]], None],
        patience: float,
        **options: Any,
    ) -> None:
        super().__init__(self.fetch, **options)
        self._fleet = fleet
        self._request = request
        self._seal = seal
        self._event = event
        self._spawn = spawn
        self._patience = patience
        self._held = _Held()
        self._wish = TokenWanted()
        self._number = 0
        self._question: _Question | None = None
        fleet.on_token = self._heard

    def refused(self, generation: int) -> bool:
        """The leader is told when we ask for the next token."""
        thrown_away = super().refused(generation)
        if thrown_away:
            self._wish = TokenWanted(refused=self._held.generation)
        return thrown_away

    def doubted(self, generation: int) -> bool:
        """The leader is told when we ask for the next token."""
        to_be_renewed = super().doubted(generation)
        if to_be_renewed:
            self._wish = TokenWanted(doubted=self._held.generation)
        return to_be_renewed

    def test(self) -> bool:
        """Asks the token service, whoever leads: whether it gives us a token shows that we reach the gateway."""
        try:
            grant = self._ask_service()
        except TokenUnavailable:
            return False
        self.adopt(grant)
        self._fleet.say(None, self._given(0))
        return True

    def fetch(self) -> Grant:
        """One token: of the leader, or of the token service when we lead or hear no leader. Raises
        `TokenUnavailable`."""
        deadline = self._clock.monotonic() + self._patience
        alone_until = self._clock.monotonic() + (LEADERLESS if self._fleet.ready else JOINING)
        while self._clock.monotonic() < deadline:
            leader = self._fleet.leader
            if leader == self._fleet.me or self._fleet.alone:
                break
            if leader is not None:
                grant = self._ask_leader(leader, deadline)
                if grant is not None:
                    return grant
            elif self._clock.monotonic() > alone_until:
                break
            else:
                self._event().wait(LOOK)
        return self._ask_service()

    def _ask_service(self) -> Grant:
        asked = self._clock.monotonic()
        grant = self._request()
        self._wish = TokenWanted()
        self._held = _Held(self._held.generation + 1, grant.value, asked + grant.lifetime)
        if self._fleet.leader == self._fleet.me:
            self._fleet.say(None, self._given(0))
        return grant

    def _ask_leader(self, leader: str, deadline: float) -> Grant | None:
        """The leader's answer; None when it is no leader any more, or has another secret."""
        self._number += 1
        question = self._question = _Question(self._number, self._event())
        wish, self._wish = self._wish, TokenWanted()
        self._fleet.say(leader, TokenWanted(wish.refused, wish.doubted, self._number))
        while question.answer is None and self._fleet.leader == leader and self._clock.monotonic() < deadline:
            question.event.wait(LOOK)
        self._question = None
        match question.answer:
            case TokenGiven(generation, _, sealed):
                if self._seal.open(sealed, generation) is None:
                    return self._ask_service()
                return Grant(self._held.value, self._held.expires - self._clock.monotonic())
            case TokenFailed(label, code, message):
                kind = next((kind for kind in Kind if kind.label == label), Kind.TRANSIENT)
                raise TokenUnavailable(Verdict(kind, None, False, code, message), shared=True)
            case None:
                self._wish = wish
                return None

    # -- what others say ----------------------------------------------------------------------------------------------

    def _heard(self, letter: Letter) -> None:
        match letter.message:
            case TokenWanted() as wanted:
                self._spawn(lambda: self._serve(letter.sender, wanted))
            case TokenGiven() as given:
                self._take(given)
            case TokenFailed() as failed if failed.number == self._number:
                self._wake(failed)

    def _take(self, given: TokenGiven) -> None:
        value = self._seal.open(given.sealed, given.generation)
        if value is not None and (given.generation > self._held.generation or given.number):
            self._held = _Held(given.generation, value, self._clock.monotonic() + given.life)
            if not given.number and self._question is None:
                self.adopt(Grant(value, given.life))
        if given.number == self._number or (value is not None and not given.number):
            self._wake(given)

    def _wake(self, answer: TokenGiven | TokenFailed) -> None:
        if self._question is not None and self._question.answer is None:
            self._question.answer = answer
            self._question.event.set()

    def _serve(self, sender: str, wanted: TokenWanted) -> None:
        """As leader: another member needs the token, and may have found that it is dead."""
        own = self.get if self._held.generation else None
        try:
            if own is not None and wanted.refused == self._held.generation:
                super().refused(own().generation)
            elif own is not None and wanted.doubted == self._held.generation:
                super().doubted(own().generation)
            self.get()
        except TokenUnavailable as failure:
            verdict = failure.verdict
            if not failure.shared:
                self._fleet.attempted(None, verdict.kind, self._clock.monotonic())
            self._fleet.say(sender, TokenFailed(verdict.kind.label, verdict.code, verdict.message, wanted.number))
            return
        self._fleet.say(sender, self._given(wanted.number))

    def _given(self, number: int) -> TokenGiven:
        held = self._held
        sealed = self._seal.close(held.value, held.generation)
        return TokenGiven(held.generation, max(0.0, held.expires - self._clock.monotonic()), sealed, number)
