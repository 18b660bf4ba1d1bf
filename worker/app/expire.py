"""One command: attempts until an outcome. The function to read first is `Expire.__call__`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

from tenacity import RetryCallState, Retrying, retry_if_result

from worker.core import request
from worker.core.command import Command, Invalid, parse
from worker.core.delivery import Delivery
from worker.core.outcome import Outcome, Reason
from worker.core.ports import (
    Attempt,
    Clock,
    Draining,
    Gate,
    Gateway,
    Held,
    Observer,
    Tokens,
    TokenUnavailable,
)
from worker.core.request import Partner, SignedRequest
from worker.core.retry import RetryPolicy, Round, retry_after
from worker.core.signing import Sign
from worker.core.verdict import Kind, NoReply, Reply, Verdict, judge

TOKEN_AT_HAND: Final = 0.1  # seconds: a token that took longer was fetched, and other senders waited for it too


@dataclass(frozen=True, slots=True)
class Report:
    """The command is finished: publish its outcome, and its dead letter where the status has one."""

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Delay:
    """It waits ``seconds`` in the broker; then comes round ``round``."""

    seconds: int
    round: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Senders are held: it stays in hand, at the front of its lane, and has lost nothing."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """We are draining: it goes back to its queue."""


Disposition = Report | Delay | Hold | GiveBack


class _DeadlinePassed(Exception):
    """``notAfter`` forbids the next call."""


@dataclass(slots=True)
class _Job:
    """One command on its way through a round."""

    delivery: Delivery
    command: Command
    round: Round
    probe: bool
    paced: bool = True  # whoever took it from its lane has waited for the rate limit already
    first: Verdict | None = None  # what the first attempt came to, until tenacity has been told
    in_vain: bool = False  # the last attempt waited for a token that another sender asked for, and there was none


class Expire:
    """Turns a delivery into a disposition: parse, attempt until an answer is final or the round is over, conclude.

    Shared by all senders; ``signer`` is asked anew for every attempt, so that rotated secrets take effect.
    """

    def __init__(
        self,
        *,
        gateway: Gateway,
        tokens: Tokens,
        gate: Gate,
        observer: Observer,
        clock: Clock,
        rng: random.Random,
        policy: RetryPolicy,
        partner: Partner,
        signer: Callable[[], Sign],
        new_external_id: Callable[[], str],
        default_merchant: str | None = None,
    ) -> None:
        self._gateway = gateway
        self._tokens = tokens
        self._gate = gate
        self._observer = observer
        self._clock = clock
        self._rng = rng
        self._policy = policy
        self._partner = partner
        self._signer = signer
        self._new_external_id = new_external_id
        self._default_merchant = default_merchant
        # One shared object, called directly: a decorated function copies itself for every call. What tenacity keeps of
        # a decision is the thread's, which is all senders', so nothing here may wait but `sleep`, which comes after it.
        # `stop` is a plain function: tenacity's own reads its own clock.
        self._attempts = Retrying(
            retry=retry_if_result(_not_final),
            wait=self._pause,
            stop=self._over,
            sleep=gate.sleep,
            retry_error_callback=_last_verdict,
        )

    def __call__(self, delivery: Delivery, *, probe: bool = False) -> Disposition:
        """One command to its disposition. A ``probe`` tests an open breaker with it; its calls cost no attempts."""
        command = parse(delivery.body, self._default_merchant)
        if isinstance(command, Invalid):
            return Report(self._invalid(delivery, command))
        job = _Job(delivery, command, self._round(delivery, probe), probe)
        try:
            verdict = self._attempt(job)
            if not verdict.kind.final:  # asked here, since most need no second call, and tenacity costs 10 µs
                job.first = verdict
                verdict = self._attempts(self._first_or_next, job)
            return self._conclude(job, verdict)
        except _DeadlinePassed:
            return self._report(job, Reason.DEADLINE_PASSED, None, "notAfter has passed")
        except Held as held:
            return self._hold(job, held)
        except Draining:
            return GiveBack()

    def _round(self, delivery: Delivery, probe: bool) -> Round:
        """The round that a throttle interrupted goes on; otherwise, and for a probe, a fresh one."""
        now = self._clock.monotonic()
        kept, delivery.round = delivery.round, None
        if kept is None or probe:
            return Round(now)
        kept.resume(now)
        return kept

    def _hold(self, job: _Job, held: Held) -> Hold:
        """An outage costs the round nothing, so it starts afresh; after a throttle its calls still count."""
        if not (held.outage or job.probe):
            job.round.interrupt(self._clock.monotonic())
            job.delivery.round = job.round
        return Hold()

    def _first_or_next(self, job: _Job) -> Verdict:
        first, job.first = job.first, None
        return first or self._attempt(job)

    # -- one attempt ------------------------------------------------------------------------------------------------

    def _attempt(self, job: _Job) -> Verdict:
        """Gate, token, sign, send, judge, tell."""
        self._check_deadline(job, 0.0)
        self._gate.enter(probe=job.probe, paced=job.paced)
        self._check_deadline(job, 0.0)
        job.paced = False
        started = self._clock.monotonic()
        try:
            token = self._tokens.get()
        except TokenUnavailable as failure:
            job.round.calls += 1
            job.in_vain = failure.shared
            return self._judged(job, failure.verdict, None, None, started, counts=not failure.shared)
        job.in_vain = False
        if self._clock.monotonic() - started > TOKEN_AT_HAND:
            # All senders may have waited for this token: they must not call together now, nor into a hold or drain.
            self._gate.enter(probe=job.probe, paced=False)
            self._check_deadline(job, 0.0)
        job.round.calls += 1
        signed = self._sign(job.command, token.value)
        job.delivery.progress.sent(signed.external_id)
        started = self._clock.monotonic()
        answer = self._gateway.send(signed)
        verdict = judge(answer)
        if verdict.kind is Kind.TOKEN:
            self._tokens.refused(token.generation)
        elif verdict.kind.final:
            self._tokens.accepted()
        job.delivery.progress.effect_unknown |= verdict.effect_unknown
        job.delivery.progress.last_code = verdict.code
        return self._judged(job, verdict, signed, answer, started)

    def _sign(self, command: Command, token: str) -> SignedRequest:
        now = self._clock.epoch()
        return request.sign(command, self._partner, self._signer(), token, now, self._new_external_id())

    def _judged(
        self,
        job: _Job,
        verdict: Verdict,
        signed: SignedRequest | None,
        answer: Reply | NoReply | None,
        started: float,
        *,
        counts: bool = True,
    ) -> Verdict:
        if counts:
            self._gate.record(verdict, probe=job.probe)
        delivery = job.delivery
        self._observer.attempted(
            Attempt(
                command_id=delivery.command_id,
                lane=delivery.lane,
                billnumber=job.command.billnumber,
                batch_id=delivery.batch_id,
                number=delivery.progress.attempts,
                external_id=None if signed is None else signed.external_id,
                verdict=verdict,
                status=answer.status if isinstance(answer, Reply) else None,
                seconds=self._clock.monotonic() - started,
            )
        )
        return verdict

    def _check_deadline(self, job: _Job, ahead: float) -> None:
        not_after = job.command.not_after
        if not_after is not None and self._clock.epoch() + ahead > not_after:
            raise _DeadlinePassed

    # -- what tenacity asks between attempts ------------------------------------------------------------------------

    def _pause(self, state: RetryCallState) -> float:
        job, verdict = _job(state), _last_verdict(state)
        return job.round.pause(verdict, self._policy, self._rng)

    def _over(self, state: RetryCallState) -> bool:
        job, verdict = _job(state), _last_verdict(state)
        if job.probe and state.upcoming_sleep > 0:
            raise Held(outage=True)  # one call is a probe (and the replay that a stale token costs): enough is known
        over = job.round.over(state.upcoming_sleep, self._clock.monotonic(), self._policy)
        # A wait that the gateway asks for and that does not fit the budget is spent in the broker.
        over = over or self._asked_wait(verdict) > self._policy.budget
        if not over:
            self._check_deadline(job, state.upcoming_sleep)
            self._observer.retrying(verdict)
        return over

    def _asked_wait(self, verdict: Verdict) -> float:
        if verdict.kind is not Kind.THROTTLED:
            return 0.0
        return retry_after(verdict.retry_after, self._clock.epoch()) or 0.0

    # -- the end of a round -----------------------------------------------------------------------------------------

    def _conclude(self, job: _Job, verdict: Verdict) -> Disposition:
        """What the last verdict of a round means for the command."""
        if verdict.kind.final and verdict.reason is not None:
            return self._report(job, _final_reason(job, verdict), verdict, None)
        if self._gate.outage():
            raise Held(outage=True)  # its round is over because of the outage, so it is not over
        if job.in_vain:
            # Nor this one: all senders wait for one request, which counts once. A token service that hangs would end a
            # round of each of them for every failure that the breaker counts.
            raise Held(outage=True)
        asked = self._asked_wait(verdict)
        following = self._policy.next_delay(job.delivery.progress.round, asked)
        if following is not None:
            seconds, round_ = following
            not_after = job.command.not_after
            if not_after is not None and self._clock.epoch() + seconds > not_after:
                return self._report(job, Reason.DEADLINE_PASSED, verdict, "notAfter is before the next round")
            return Delay(seconds, round_)
        if asked > self._policy.budget and job.round.calls < self._policy.max_attempts:
            # No delayed round is left to wait in; the hold is every sender's, so it waits with them.
            raise Held(outage=False)
        if verdict.kind in (Kind.SYSTEMIC, Kind.TOKEN):
            return self._report(job, Reason.CREDENTIALS, verdict, None)
        return self._report(job, Reason.RETRIES_EXHAUSTED, verdict, None)

    def _report(self, job: _Job, reason: Reason, verdict: Verdict | None, detail: str | None) -> Report:
        delivery, command = job.delivery, job.command
        code = verdict.code if verdict is not None else delivery.progress.last_code
        return Report(
            Outcome(
                command_id=delivery.command_id,
                lane=delivery.lane,
                billnumber=command.billnumber,
                merchant_id=command.merchant_id,
                reference=command.reference,
                batch_id=delivery.batch_id,
                reason=reason,
                response_code=code,
                response_message=(verdict.message or None) if verdict is not None and verdict.code else None,
                detail=detail if verdict is None or verdict.code else (detail or verdict.message or None),
                attempts=delivery.progress.attempts,
                external_ids=tuple(delivery.progress.external_ids),
                effect_unknown=delivery.progress.effect_unknown,
                received_at=delivery.progress.received_at,
                completed_at=self._clock.epoch(),
            )
        )

    def _invalid(self, delivery: Delivery, invalid: Invalid) -> Outcome:
        return Outcome(
            command_id=delivery.command_id,
            lane=delivery.lane,
            billnumber=invalid.billnumber,
            merchant_id=None,
            reference=invalid.reference,
            batch_id=delivery.batch_id,
            reason=Reason(invalid.reason),
            response_code=None,
            response_message=None,
            detail=invalid.detail,
            attempts=0,
            external_ids=(),
            effect_unknown=False,
            received_at=delivery.progress.received_at,
            completed_at=self._clock.epoch(),
        )


def _final_reason(job: _Job, verdict: Verdict) -> Reason:
    """ "Not found" after a call that may have taken effect may be that very effect: nobody knows."""
    assert verdict.reason is not None
    if verdict.reason is Reason.NOT_FOUND and job.delivery.progress.effect_unknown:
        return Reason.NOT_FOUND_AFTER_UNKNOWN_EFFECT
    return verdict.reason


def _not_final(verdict: Verdict) -> bool:
    return not verdict.kind.final


def _job(state: RetryCallState) -> _Job:
    return cast("_Job", state.args[0])


def _last_verdict(state: RetryCallState) -> Verdict:
    assert state.outcome is not None
    return cast("Verdict", state.outcome.result())
