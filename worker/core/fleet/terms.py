"""Who leads. The broker elects, a lease fences, and the order of messages decides between an old leader and a new one.

A leadership is a *term*, numbered upwards. To begin one, a member takes the exclusive queue of that term, which the
broker gives to one connection only, and then tells everybody. The leader beats several times a second and reads its own
beats: each of them that comes back proves that it was still heard when it sent it, and lets it lead for `LEASE` more. A
frozen or cut-off leader therefore stops by itself before others may begin (`SILENT`), and finds the beats of its
successor in its own queue when it comes back. Everybody follows the highest term only.

A leader whose connection is gone cannot say anything any more: who can take the queue of its term needs not wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

BEAT: Final = 0.2
"""Seconds between two beats."""
LEASE: Final = 0.8
"""Seconds that a leader leads on after a beat of which it knows that everybody could hear it."""
SILENT: Final = 1.0
"""Seconds without a beat after which others may begin the next term: longer than the lease, since the leader's clock
runs from the sending of the beat and theirs from its coming."""
CHECK: Final = 0.5
"""Seconds without a beat after which others look whether the leader's connection is gone."""
ASK: Final = 0.25
"""Seconds that a new member waits for an answer before it wants to lead."""
SETTLE: Final = 0.2
"""Seconds between the proof that everybody has heard of a new term and its first slot. No slot of the old leader lies
further ahead; and on a cluster's other nodes the news may come that much later."""
RELUCTANT: Final = 5.0
"""Seconds that a sick or leaving member leaves the lead to others before it takes it all the same."""


class Role(Enum):
    """What a member is. It CLAIMS from the moment it holds a term's queue until it reads its own first beat."""

    APART = "apart"
    FOLLOWS = "follows"
    CLAIMS = "claims"
    LEADS = "leads"


@dataclass(frozen=True, slots=True)
class AcquireTerm:
    """To the broker: try to take the exclusive queue of this term."""

    term: int


@dataclass(frozen=True, slots=True)
class ReleaseTerm:
    """To the broker: give the queue of this term back."""

    term: int


@dataclass(slots=True)
class Terms:
    """One member's view of the leadership. Times are its own monotonic seconds. ``ask``: takes what the broker is to be
    asked, in order."""

    me: str
    ask: Callable[[AcquireTerm | ReleaseTerm], None]
    role: Role = Role.APART
    term: int = 0
    leader: str | None = None
    reluctant: bool = False
    """Another member has to lead: we are sick, or about to leave."""
    jitter: Callable[[], float] = lambda: 0.0
    """Up to 1: so that not all members reach for the broker in the same moment."""
    heard: float = 0.0
    lease: float = 0.0
    begins: float = 0.0
    """When our own term's first slot may be."""
    _acquiring: int | None = None
    _highest: int = 0
    """The highest term of which we know that somebody had its queue."""
    _leader_gone: bool = False
    """The leader before us cannot say anything any more."""
    _sent: dict[int, float] = field(default_factory=dict)
    _look: float = 0.0

    def joined(self, now: float) -> None:
        """We hear what is said from now on."""
        self.role = Role.FOLLOWS
        self.leader = None
        self.heard = now
        self._look = now + ASK + 0.1 * self.jitter()

    def lost(self) -> None:
        """The connection is gone, and with it every queue of ours."""
        self.role, self.leader, self._acquiring = Role.APART, None, None
        self._sent.clear()

    def leads(self, now: float) -> bool:
        """Whether we lead, and our lease holds."""
        return self.role is Role.LEADS and now < self.lease

    def beat_sent(self, number: int, now: float) -> None:
        """We have told everybody that we lead our term."""
        self._sent[number] = now

    def heard_beat(self, sender: str, term: int, number: int, now: float) -> bool:
        """A beat has come, our own ones as well. Whether it is the leader's that we follow, or our own."""
        if sender == self.me:
            self._echo(term, number, now)
            return False
        if term <= self.term and self.role is Role.CLAIMS:
            self.heard, self._leader_gone = now, False  # an old leader that is still heard; our first slot comes later
        if term < self.term or (term == self.term and self.leader not in (None, sender)):
            return False
        if self.role in (Role.CLAIMS, Role.LEADS):
            self._step_down()
        self.term, self.leader, self.heard, self._leader_gone = term, sender, now, False
        self._look = now + CHECK + 0.1 * self.jitter()
        return True

    def heard_goodbye(self, sender: str, now: float) -> None:
        """The leader leads no more, or its queue is gone."""
        if sender == self.leader and self.role is Role.FOLLOWS:
            self.leader, self._leader_gone = None, True
            self._look = now

    def took(self, term: int, now: float) -> None:
        """The broker gave us the queue of this term."""
        if self._acquiring != term:
            self.ask(ReleaseTerm(term))  # it was asked for on an earlier connection, or too late
            return
        self._acquiring = None
        if term <= self.term and self.leader is not None:
            if term == self.term:  # its holder's connection is gone
                self._leader_gone, self.leader = True, None
                self._acquire()
            self.ask(ReleaseTerm(term))
            return
        if term < self.term or self.role is not Role.FOLLOWS:
            self.ask(ReleaseTerm(term))
            return
        self.role, self.term, self.leader = Role.CLAIMS, term, self.me
        self._sent.clear()

    def taken(self, term: int, now: float) -> None:
        """Another connection has it."""
        if self._acquiring != term:
            return
        self._acquiring, self._leader_gone = None, False
        self._highest = max(self._highest, term)
        self._look = now + CHECK + 0.1 * self.jitter()

    def resign(self, now: float) -> bool:
        """Gives the lead up; whether we had it."""
        had = self.role in (Role.CLAIMS, Role.LEADS)
        if had:
            self._step_down()
            self.leader, self.heard = None, now
        return had

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self.role is Role.CLAIMS or self.role is Role.LEADS:
            for number in [number for number, sent in self._sent.items() if now - sent > 10 * LEASE]:
                del self._sent[number]
            return
        if self.role is not Role.FOLLOWS or self._acquiring is not None or now < self._look:
            return
        silence = now - self.heard
        if self.reluctant and silence < RELUCTANT:
            self._look = now + CHECK
        elif self.leader is None or silence > SILENT:
            self._acquire()
        else:
            self._acquire(self.term)

    def _acquire(self, term: int | None = None) -> None:
        self._acquiring = term = max(self.term, self._highest) + 1 if term is None else term
        self.ask(AcquireTerm(term))

    def _echo(self, term: int, number: int, now: float) -> None:
        sent = self._sent.pop(number, None)
        if sent is None or term != self.term:
            return
        if self.role is Role.CLAIMS:
            self.role = Role.LEADS
            # Nobody can have heard another leader later than we did: its beats are before our own in our queue.
            self.begins = now + SETTLE if self._leader_gone else max(now + SETTLE, self.heard + SILENT)
            self._leader_gone = False
        if self.role is Role.LEADS:
            self.lease = max(self.lease, sent + LEASE)

    def _step_down(self) -> None:
        self.ask(ReleaseTerm(self.term))
        self.role, self.lease = Role.FOLLOWS, 0.0
        self._sent.clear()
