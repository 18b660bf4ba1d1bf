"""Everything the gateway remembers, and its verdict on a call."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Final, NamedTuple

from worker.sandbox.simulator.checks import BAD_SIGNATURE, BAD_TOKEN, BAD_TOKEN_SIGNATURE, SAME_ID, Claim
from worker.sandbox.simulator.script import NORMAL, Fault, Script

JAKARTA: Final = timezone(timedelta(hours=7))  # the gateway's day, and the zone of its date-times


class Call(NamedTuple):
    """One expire call: when it came (Unix seconds), what it named, how it was answered (as in `by_code`)."""

    at: float
    billnumber: str
    merchant_id: str
    external_id: str
    answer: str


@dataclass(slots=True)
class SimulatorReport:
    """What the simulator has seen since it was made. Times are Unix seconds of this machine's clock."""

    expire_calls: int = 0  # refused ones included
    token_calls: int = 0
    # Expire answers by response code, or "hang", "reset after", "http 502"; their sum is all.
    by_code: dict[str, int] = field(default_factory=Counter)
    token_by_code: dict[str, int] = field(default_factory=Counter)  # the same of the token service
    turned_away: int = 0  # connections that were reset because the gateway was down; no calls
    bills_expired: int = 0  # different bills
    bills_called: int = 0  # different bills
    calls_by_bill: dict[str, int] = field(default_factory=dict)  # refused ones included; empty unless asked for
    duplicates: int = 0  # calls with an external id already used that day
    signature_failures: int = 0  # both services
    throttled: int = 0
    in_flight: int = 0
    max_concurrency: int = 0  # expire calls between arrival and answer
    peak_per_second: int = 0  # the most expire calls that arrived within one second
    first_call_at: float | None = None
    last_call_at: float | None = None
    calls: tuple[Call, ...] = ()  # the latest `keep_calls` expire calls, in order of arrival


class _Window:
    """Monotonic times of what happened in the last `seconds`: memory for one window, not for a run."""

    __slots__ = ("_times", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._times: deque[float] = deque()

    def count(self, now: float) -> int:
        times = self._times
        horizon = now - self.seconds
        while times and times[0] <= horizon:
            times.popleft()
        return len(times)

    def add(self, now: float) -> None:
        self._times.append(now)

    def until_next_leaves(self, now: float) -> float:
        return self._times[0] + self.seconds - now if self._times else 0.0


class Books:
    """Tokens, external ids, bills and the position in the script, behind one lock.

    A bill costs its name and a small integer (calls doubled, plus one when expired), an external id one
    integer: a million of each stays below 250 MB.
    """

    def __init__(self, script: Script, keep_calls: int) -> None:
        self._lock = threading.Lock()
        self._tokens: dict[str, float] = {}
        self._ids: set[int] = set()
        self._day = 0
        self._bills: dict[bytes, int] = {}
        self._live_calls = 0
        self._seen = SimulatorReport()
        self._recent = _Window(1.0)
        self._calls: deque[Call] = deque(maxlen=keep_calls)
        self.replace(script)

    def replace(self, script: Script) -> None:
        """Play another script from its start. Tokens, ids, bills and counts stay."""
        patterns = [(re.compile(pattern.match), pattern.faults) for pattern in script.patterns]
        with self._lock:
            self.script = script
            self._patterns = patterns
            self._positions: dict[str, int] = {}
            self._token_position = 0
            rate = script.requests_per_second
            self._limit = max(1, int(rate))
            # 2.5 in a second is 2 in 0.8 s, 0.5 is 1 in 2 s.
            self._admitted = _Window(self._limit / rate if rate else 0.0)

    def now(self) -> float:
        """The gateway's clock, Unix seconds."""
        return time.time() + self.script.clock_offset

    def expire(self, claim: Claim, at: float) -> Fault:
        """Judge one expire call that came ``at`` (Unix seconds), and enter it. The caller owes a `leave` once it is
        answered."""
        with self._lock:
            self._arrived(claim.bill, at)
            fault = self._judged(claim)
            answer = fault.label or "2009300"
            self._seen.by_code[answer] += 1
            self._calls.append(Call(at, claim.bill, claim.merchant, claim.external_id, answer))
            return fault

    def leave(self) -> None:
        """An expire call has been answered, or given up."""
        with self._lock:
            self._seen.in_flight -= 1

    def token(self, refusal: Fault | None) -> tuple[Fault, bytes]:
        """Judge one call of the token service: what it gets, and the body of a success."""
        with self._lock:
            self._seen.token_calls += 1
            self._seen.signature_failures += refusal is BAD_TOKEN_SIGNATURE
            fault = refusal or self._next_token_fault()
            self._seen.token_by_code[fault.label or "2007300"] += 1
            return fault, self._issued() if fault.takes_effect else b""

    def tokens(self) -> tuple[str, ...]:
        """The tokens that live."""
        with self._lock:
            now = time.monotonic()
            return tuple(token for token, until in self._tokens.items() if until > now)

    def turned_away(self) -> None:
        """A connection was reset because the gateway is down."""
        with self._lock:
            self._seen.turned_away += 1

    def report(self, *, bills: bool) -> SimulatorReport:
        with self._lock:
            calls_by_bill = dict(self._bills) if bills else {}
            report = replace(
                self._seen,
                by_code=dict(sorted(self._seen.by_code.items())),
                token_by_code=dict(sorted(self._seen.token_by_code.items())),
                bills_called=len(self._bills),
                calls_by_bill={},
                calls=tuple(self._calls),
            )
        # A million names take a moment to decode: not while every sender waits for the lock.
        for name, entry in calls_by_bill.items():
            report.calls_by_bill[name.decode(errors="surrogatepass")] = entry >> 1
        return report

    def _arrived(self, bill: str, at: float) -> None:
        instant, seen = time.monotonic(), self._seen
        seen.expire_calls += 1
        seen.in_flight += 1
        seen.max_concurrency = max(seen.max_concurrency, seen.in_flight)
        self._recent.add(instant)
        seen.peak_per_second = max(seen.peak_per_second, self._recent.count(instant))
        seen.first_call_at = min(at, at if seen.first_call_at is None else seen.first_call_at)
        seen.last_call_at = max(at, seen.last_call_at or at)
        if bill:
            key = bill.encode(errors="surrogatepass")
            self._bills[key] = self._bills.get(key, 0) + 2

    def _judged(self, claim: Claim) -> Fault:
        if self.script.requests_per_second and (throttled := self._over_rate()):
            return throttled
        if claim.refusal is not None:
            return claim.refusal
        if claim.token is not None and self._tokens.get(claim.token, 0.0) <= time.monotonic():
            return self.script.dead_token or BAD_TOKEN
        self._use_token()
        if not claim.signed:
            self._seen.signature_failures += 1
            return BAD_SIGNATURE
        return self._first_use(claim)

    def _over_rate(self) -> Fault | None:
        """A refusal while the window is full; refused calls take no room in it, or it would never empty."""
        now = time.monotonic()
        if self._admitted.count(now) < self._limit:
            self._admitted.add(now)
            return None
        self._seen.throttled += 1
        wait = max(1, -int(-self._admitted.until_next_leaves(now) // 1))
        return Fault(code="4299300", retry_after=str(wait))

    def _use_token(self) -> None:
        every = self.script.kill_token_every
        self._live_calls += 1
        if every and self._live_calls % every == 0:
            self._tokens.clear()

    def _first_use(self, claim: Claim) -> Fault:
        identity = int("1" + claim.external_id)  # half the memory of a text; the 1 keeps leading zeros apart
        today = int(self.now() + 7 * 3600) // 86400
        if today != self._day:
            self._day = today
            self._ids.clear()
        if identity in self._ids:
            self._seen.duplicates += 1
            return SAME_ID
        self._ids.add(identity)
        if claim.field_error is not None:
            return claim.field_error
        fault = self._next_fault(claim)
        if fault.reset == "before":
            self._ids.discard(identity)
        return self._effected(fault, claim.bill)

    def _effected(self, fault: Fault, bill: str) -> Fault:
        if not fault.takes_effect:
            return fault
        key = bill.encode(errors="surrogatepass")
        entry = self._bills[key]
        if not entry & 1:
            self._bills[key] = entry | 1
            self._seen.bills_expired += 1
        elif self.script.already is not None and not fault.label:
            return Fault(code=self.script.already, latency=fault.latency)
        return fault

    def _next_fault(self, claim: Claim) -> Fault:
        script = self.script
        faults = script.bills.get(claim.bill)
        if faults is None and self._patterns:
            faults = next((faults for match, faults in self._patterns if match.search(claim.bill)), None)
        if faults is not None:
            return self._next_in_turn(claim.bill, faults)
        return self._by_chance(claim.external_id) if script.rates else NORMAL

    def _next_in_turn(self, bill: str, faults: tuple[Fault, ...]) -> Fault:
        position = self._positions.get(bill, 0)
        if position >= len(faults):
            return NORMAL
        if not faults[position].repeat:
            self._positions[bill] = position + 1
        return faults[position]

    def _by_chance(self, external_id: str) -> Fault:
        """The same for the same seed and external id, whatever the order of arrival."""
        digest = hashlib.blake2b(f"{self.script.seed}:{external_id}".encode(), digest_size=8).digest()
        left = int.from_bytes(digest, "big") / 2**64
        for rate in self.script.rates:
            if left < rate.share:
                return rate.fault
            left -= rate.share
        return NORMAL

    def _next_token_fault(self) -> Fault:
        faults = self.script.token_faults
        if self._token_position >= len(faults):
            return NORMAL
        fault = faults[self._token_position]
        self._token_position += not fault.repeat
        return fault

    def _issued(self) -> bytes:
        script, now = self.script, time.monotonic()
        alive = {} if script.single_token else {t: until for t, until in self._tokens.items() if until > now}
        token = secrets.token_urlsafe(32)
        self._tokens = alive | {token: now + script.token_lifetime}
        fields: dict[str, str | int] = {
            "responseCode": "2007300",
            "responseMessage": "Successful",
            "accessToken": token,
            "tokenType": "Bearer",
        }
        match script.expires_in:
            case "string":
                fields["expiresIn"] = str(int(script.token_lifetime))
            case "int":
                fields["expiresIn"] = int(script.token_lifetime)
            case "datetime":
                until = datetime.fromtimestamp(self.now() + script.token_lifetime, JAKARTA)
                fields["expiresIn"] = until.isoformat(timespec="seconds")
        return json.dumps(fields).encode()
