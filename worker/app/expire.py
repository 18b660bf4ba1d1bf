"""One command: attempts until an outcome. The function to read first is `Expire.__call__`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn, assert_never, cast

from tenacity import RetryCallState, Retrying, retry_if_result

from worker.core import request
from worker.core.command import Command, Invalid, parse
from worker.core.outcome import STATUS_OF, Outcome, Reason, outcome_id
from worker.core.ports import (
    Attempt,
    Clock,
    Draining,
    Gate,
    Gateway,
    Held,
    Observer,
    Signer,
    Tokens,
    TokenUnavailable,
)
from worker.core.request import Partner, SignedRequest
from worker.core.retry import Again, Decision, Later, Over, RetryPolicy, Round
from worker.core.settlement import Delay, Disposition, GiveBack, Hold, Report, TakenBack, Task
from worker.core.verdict import Kind, NoReply, Reply, Verdict, judge

LOST_PERMITS: Final = 2
"""So many permits may be over before a command's connection is open; then its call goes out late. A gateway that closes
every connection between two rare permits would else never see it."""
STARVED_SECONDS: Final = 0.1  # between two tries of a command for which there was no descriptor
TOKEN_AT_HAND: Final = 0.1  # seconds: a token that took longer was fetched, and other senders waited for it too


class _DeadlinePassed(Exception):
    """``notAfter`` forbids the next call."""


class _TakenBack(Exception):
    """The broker has given the command to somebody else, or will."""


@dataclass(slots=True)
class _Job:
    """One command on its way through a round."""

    task: Task
    command: Command
    round: Round
    probe: bool
    paced: bool = True  # the sender that took it from its lane has waited for the rate limit already
    first: Verdict | None = None  # the result of the first attempt, until tenacity has it
    decision: Decision | None = None  # what follows the last attempt
    shared_failure: bool = False  # the last attempt waited for a token that another sender asked for, and got none


class Expire:
    """Turns a delivery into a disposition: parse, attempt until an answer is final or the round is over, conclude.

    Shared by all senders; ``signer`` has the secrets of now, so that rotated ones take effect.
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
        signer: Signer,
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
            stop=_no_call_follows,
            sleep=gate.sleep,
            retry_error_callback=_last_verdict,
        )

    def __call__(self, task: Task, *, probe: bool = False) -> Disposition:
        """One command to its disposition. A ``probe`` tests an open breaker with it; its calls cost no attempts."""
        command = parse(task.delivery.body, self._default_merchant)
        if isinstance(command, Invalid):
            return Report(self._invalid(task, command))
        job = _Job(task, command, self._round(task, probe), probe)
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
        except _TakenBack:
            return TakenBack()

    def _round(self, task: Task, probe: bool) -> Round:
        """The round that a hold interrupted goes on; otherwise, for a probe, and after an outage, a fresh one."""
        now, progress = self._clock.monotonic(), task.delivery.progress
        kept, task.round = task.round, None
        calls, progress.calls = progress.calls, 0
        if probe:
            return Round(now)
        if kept is None:
            return Round(now, calls)
        if kept.outages is not None and kept.outages != self._gate.outages(task.lane):
            return Round(now)
        kept.resume(now)
        return kept

    def _hold(self, job: _Job, held: Held) -> Disposition:
        """Neither a hold nor a probe costs the command anything. A command whose probe failed lets others go first."""
        if job.probe:
            return GiveBack() if held.outage else Hold()
        task = job.task
        if job.shared_failure:
            return Hold()  # it failed because of the outage: its next round is a fresh one
        job.round.interrupt(self._clock.monotonic(), self._gate.outages(task.lane) if held.outage else None)
        task.round = job.round
        return Hold()

    def _first_or_next(self, job: _Job) -> Verdict:
        first, job.first = job.first, None
        return first or self._attempt(job)

    # -- one attempt ------------------------------------------------------------------------------------------------

    def _attempt(self, job: _Job) -> Verdict:
        """Gate, token, sign, send, judge, report."""
        until = self._enter(job)
        progress = job.task.delivery.progress
        started = self._clock.monotonic()
        try:
            token = self._tokens.get()
        except TokenUnavailable as failure:
            if isinstance(failure.answer, NoReply) and failure.answer.starved:
                self._hold_starved(job, started)
            job.round.calls += 1
            job.shared_failure = failure.shared
            return self._judged(job, failure.verdict, None, None, started, counts=not failure.shared, token=True)
        job.shared_failure = False
        asked, started = started, self._clock.monotonic()
        if started - asked > TOKEN_AT_HAND:
            # All senders may have waited for this token: they must not call together now, nor into a hold or drain.
            job.round.waited(started - asked)
            until = self._enter(job)
            started = self._clock.monotonic()
        lost = 0
        while True:
            job.round.calls += 1
            signed = request.sign(
                job.command,
                self._partner,
                self._signer.sign,
                token.value,
                self._clock.epoch(),
                self._new_external_id(),
            )
            progress.sent(signed.external_id)
            answer = self._gateway.send(signed, until if lost < LOST_PERMITS else math.inf)
            if not isinstance(answer, NoReply) or not (answer.starved or answer.late):
                break
            progress.unsent()
            job.round.calls -= 1
            if answer.starved:
                self._hold_starved(job, started)
            lost += 1
            until = self._enter(job)
            started = self._clock.monotonic()
        verdict = judge(answer)
        if verdict.kind is Kind.TOKEN:
            self._tokens.refused(token.generation)
        elif verdict.doubts_token:
            self._tokens.doubted(token.generation)
        elif verdict.kind.final:
            self._tokens.accepted()
        progress.effect_unknown |= verdict.effect_unknown
        progress.last_code = verdict.code
        return self._judged(job, verdict, signed, answer, started)

    def _hold_starved(self, job: _Job, started: float) -> NoReturn:
        """This process had no descriptor for a connection: that costs the command nothing, and a little later it may be
        different."""
        self._gate.sleep(STARVED_SECONDS)
        job.round.waited(self._clock.monotonic() - started)
        raise Held(outage=False)

    def _enter(self, job: _Job) -> float:
        """Returns when the call may begin, and until when it may; the wait for a slot is no part of the round's budget,
        even when a hold begins meanwhile."""
        self._check(job)
        paced, job.paced = job.paced, False
        try:
            waited = self._gate.enter(job.task.lane, probe=job.probe, paced=paced)
        except Held as held:
            job.round.waited(held.waited)
            raise
        if waited:
            job.round.waited(waited)
            self._check(job)
        return self._gate.until

    def _check(self, job: _Job) -> None:
        if job.task.orphaned:
            raise _TakenBack
        if job.command.not_after is not None and job.command.not_after < self._clock.epoch():
            raise _DeadlinePassed

    def _left(self, job: _Job) -> float | None:
        """Seconds until ``notAfter`` forbids a call."""
        not_after = job.command.not_after
        return None if not_after is None else not_after - self._clock.epoch()

    def _judged(
        self,
        job: _Job,
        verdict: Verdict,
        signed: SignedRequest | None,
        answer: Reply | NoReply | None,
        started: float,
        *,
        counts: bool = True,
        token: bool = False,
    ) -> Verdict:
        seconds = self._clock.monotonic() - started
        if signed is None or verdict.kind is Kind.THROTTLED:
            job.round.waited(seconds)  # no part of the budget
        if counts:
            job.task.answer = verdict.kind
            self._gate.record(job.task.lane, verdict, probe=job.probe, token=token)
        delivery = job.task.delivery
        external_id = None if signed is None else signed.external_id
        status = answer.status if isinstance(answer, Reply) else None
        attempt = Attempt(delivery, job.command, delivery.progress.attempts, external_id, verdict, status, seconds)
        self._observer.attempted(attempt)
        if verdict.kind is Kind.THROTTLED:
            # Throttling costs no attempt, however long it lasts: the command waits for the end of the hold.
            job.round.calls -= 1
            self._observer.retrying(verdict)
            raise Held(outage=False)
        return verdict

    # -- what tenacity asks between attempts ------------------------------------------------------------------------

    def _pause(self, state: RetryCallState) -> float:
        """Decides what follows; seconds until the next call."""
        job, verdict = _job(state), _last_verdict(state)
        decision = job.decision = self._policy.decide(
            verdict,
            job.round,
            round_=job.task.delivery.progress.round,
            now=self._clock.monotonic(),
            left=self._left(job),
            rng=self._rng,
        )
        if not isinstance(decision, Again):
            return 0.0
        if job.probe and decision.pause > 0:
            raise Held(outage=True)  # one call is a probe (and the replay that a stale token costs): enough is known
        self._observer.retrying(verdict)
        return decision.pause

    # -- the end of a round -----------------------------------------------------------------------------------------

    def _conclude(self, job: _Job, verdict: Verdict) -> Disposition:
        """What the last verdict of a round means for the command."""
        if verdict.kind.final and verdict.reason is not None:
            reason = verdict.reason
            if reason is Reason.NOT_FOUND and job.task.delivery.progress.effect_unknown:
                reason = Reason.NOT_FOUND_AFTER_UNKNOWN_EFFECT  # it may be the very effect of an earlier call
            return self._report(job, reason, verdict, None)
        if job.task.orphaned:
            return TakenBack()
        if job.probe or self._gate.outage(job.task.lane):
            raise Held(outage=True)  # its round is over because of the outage, so it is not over
        if job.shared_failure:
            # Nor this one: all senders wait for one request, which counts once. A token service that hangs would end a
            # round of each of them for every failure that the breaker counts.
            raise Held(outage=True)
        decision = job.decision
        if self._gate.outage(None) and self._policy.delays and verdict.kind.bad:
            # Nothing has succeeded since the other lane's breaker opened: it waits, and this costs it no round either.
            seconds = self._policy.delay(0, self._left(job))
            if seconds is not None:
                return Delay(seconds, job.task.delivery.progress.round)
            decision = Over(Reason.DEADLINE_PASSED)
        match decision:
            case Later(seconds, round_):
                return Delay(seconds, round_)
            case Over(reason):
                detail = "notAfter is before the next attempt" if reason is Reason.DEADLINE_PASSED else None
                return self._report(job, reason, verdict, detail)
            case Again() | None:
                raise AssertionError("tenacity stops only where no call follows")
            case _:
                assert_never(decision)

    def _report(self, job: _Job, reason: Reason, verdict: Verdict | None, detail: str | None) -> Report:
        delivery, command = job.task.delivery, job.command
        code = verdict.code if verdict is not None else delivery.progress.last_code
        return Report(
            Outcome(
                outcome_id=outcome_id(delivery.command_id, delivery.lane, delivery.body, STATUS_OF[reason]),
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

    def _invalid(self, task: Task, invalid: Invalid) -> Outcome:
        delivery, reason = task.delivery, Reason(invalid.reason)
        return Outcome(
            outcome_id=outcome_id(delivery.command_id, delivery.lane, delivery.body, STATUS_OF[reason]),
            command_id=delivery.command_id,
            lane=delivery.lane,
            billnumber=invalid.billnumber,
            merchant_id=None,
            reference=invalid.reference,
            batch_id=delivery.batch_id,
            reason=reason,
            response_code=None,
            response_message=None,
            detail=invalid.detail,
            attempts=0,
            external_ids=(),
            effect_unknown=False,
            received_at=delivery.progress.received_at,
            completed_at=self._clock.epoch(),
        )


def _no_call_follows(state: RetryCallState) -> bool:
    return not isinstance(_job(state).decision, Again)


def _not_final(verdict: Verdict) -> bool:
    return not verdict.kind.final


def _job(state: RetryCallState) -> _Job:
    return cast("_Job", state.args[0])


def _last_verdict(state: RetryCallState) -> Verdict:
    assert state.outcome is not None
    return cast("Verdict", state.outcome.result())
