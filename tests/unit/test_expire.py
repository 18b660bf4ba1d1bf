"""One command to its disposition: attempts, waits, deadlines, outages, and what is known at the end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import builders
from tests.builders import (
    BAD_SIGNATURE,
    BROKEN,
    ID_CLASH,
    NOON,
    NOT_FOUND,
    STALE_TOKEN,
    SUCCESS,
    Properties,
    body,
    no_reply,
    no_token,
    reply,
    throttled,
)
from tests.fakes import Ceiling, FakeClock, FakeGate, FakeGateway, FakeTokens, RecordingObserver
from worker.app.expire import LOST_PERMITS, STARVED_SECONDS, Expire
from worker.core import jakarta
from worker.core.delivery import Delivery, Message, delayed, receive, returned
from worker.core.lanes import CANCELLATION, SWEEP
from worker.core.outcome import Outcome, Reason, Status
from worker.core.ports import Draining, Held, TokenUnavailable
from worker.core.retry import RetryPolicy, Round
from worker.core.settlement import Delay, Disposition, Entry, GiveBack, Hold, Report, Tag, TakenBack, Task
from worker.core.topology import Names
from worker.core.verdict import Kind, NoReply, Reply, judge

LAST_ROUND = {"qris-round": 3}
"""Headers of a command whose delayed rounds are used up."""
THROTTLE, OUTAGE = Held(outage=False), Held(outage=True)
NOT_NOW = reply("4039306", "Feature Not Allowed At This Time")


class Bench:
    """`Expire` on fakes."""

    def __init__(
        self,
        *answers: Reply | NoReply,
        failures: Iterable[TokenUnavailable | None] = (),
        policy: RetryPolicy | None = None,
        rng: random.Random | None = None,
        takes: float = 0.0,
    ) -> None:
        self.clock = FakeClock()
        self.gateway = FakeGateway(self.clock, answers or (SUCCESS,), takes=takes)
        self.tokens = FakeTokens(self.clock, failures)
        self.gate = FakeGate(self.clock)
        self.observer = RecordingObserver()
        self.keys = itertools.count(1)
        numbers = itertools.count(1)
        self.expire = Expire(
            gateway=self.gateway,
            tokens=self.tokens,
            gate=self.gate,
            observer=self.observer,
            clock=self.clock,
            rng=rng or Ceiling(),
            policy=policy or builders.policy(),
            partner=builders.partner(),
            signer=self,
            new_external_id=lambda: f"{next(numbers):036d}",
        )

    @property
    def sign(self) -> Callable[[str, str, str, bytes, str], str]:
        """A signature that shows with which key and for which token it was made."""
        key = next(self.keys)
        return lambda _method, _path, token, _body, _moment: f"key-{key} {token}"

    def __call__(self, work: Delivery | Task | None = None, *, probe: bool = False) -> Disposition:
        task = work if isinstance(work, Task) else Task(work or builders.delivery())
        return self.expire(task, probe=probe)

    def outcome(self, work: Delivery | Task | None = None, *, probe: bool = False) -> Outcome:
        """The outcome of a command that is reported."""
        disposition = self(work, probe=probe)
        assert isinstance(disposition, Report)
        return disposition.outcome

    @property
    def calls(self) -> int:
        return len(self.gateway.sent)


def task(**changed: Any) -> Task:
    """A command in hand; see `builders.delivery`."""
    return Task(builders.delivery(**changed))


def until(seconds: float, **changed: Any) -> Delivery:
    """A command whose notAfter is so many seconds from now."""
    return builders.delivery(body(notAfter=jakarta.iso(NOON + seconds)), **changed)


def next_round(message: Message) -> Delivery:
    """The delivery of a message that we published."""
    properties = Properties(message_id=message.properties["message_id"], headers=message.properties["headers"])
    return receive("cancellation", message.body, properties, redelivered=False, epoch=NOON + 30, monotonic=1_030.0)


@pytest.mark.parametrize(("lost", "entered"), [(0, 1), (1, 2), (5, 1 + LOST_PERMITS)])
def test_a_permit_that_is_over_before_the_connection_is_open(lost: int, entered: int) -> None:
    """It is lost, and the call waits for the next one; but a gateway that closes every connection is called at last."""
    bench = Bench(SUCCESS)
    bench.gate.permit = 0.02
    bench.gateway.connecting.extend([0.3] * lost)
    outcome = bench.outcome()

    assert bench.gate.entered == [(False, True), *[(False, False)] * (entered - 1)]
    assert (outcome.status, outcome.attempts, len(outcome.external_ids)) == (Status.EXPIRED, 1, 1)
    assert bench.calls == 1


STARVED = NoReply(False, "Too many open files", starved=True)


@pytest.mark.parametrize("at", ["call", "token"])
def test_a_process_without_descriptors_costs_the_command_nothing(at: str) -> None:
    """What could not even connect is no attempt and no failure for the breaker; the command stays at the front."""
    failure = TokenUnavailable(judge(STARVED), answer=STARVED)
    bench = Bench(STARVED, SUCCESS) if at == "call" else Bench(failures=[failure, None])
    command = task()

    assert isinstance(bench(command), Hold)
    assert bench.gate.slept == [STARVED_SECONDS]
    assert (command.delivery.progress.attempts, command.delivery.progress.external_ids) == (0, [])
    assert (bench.gate.recorded, bench.observer.attempts) == ([], [])

    outcome = bench.outcome(command)
    assert (outcome.status, outcome.attempts, len(outcome.external_ids)) == (Status.EXPIRED, 1, 1)
    assert not outcome.effect_unknown


def test_success() -> None:
    """A command that the gateway takes is expired after one call."""

    bench = Bench()

    outcome = bench.outcome(builders.delivery(builders.body(reference="ORD-77"), headers={"batch-id": "b-1"}))

    assert outcome == builders.outcome(
        outcome_id=outcome.outcome_id,
        batch_id="b-1",
        external_ids=(f"{1:036d}",),
        received_at=NOON,
        completed_at=NOON,
    )
    assert bench.gateway.sent[0].body == b'{"billnumber":"10092081","additionalInfo":{"merchantId":"121xxxx"}}'
    assert bench.tokens.taken == 1
    assert bench.gate.slept == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff", Reason.MALFORMED_JSON),
        (builders.body(billnumber=7), Reason.INVALID_COMMAND),
        (b" " * 65_537, Reason.TOO_LARGE),
    ],
)
def test_invalid_commands(body: bytes, reason: Reason) -> None:
    """What is no command is reported without a call, a token or a look at the gate."""

    bench = Bench()

    outcome = bench.outcome(builders.delivery(body, lane="sweep", redelivered=True))

    assert (outcome.status, outcome.reason, outcome.lane) == (Status.INVALID, reason, "sweep")
    assert (outcome.attempts, outcome.external_ids, outcome.effect_unknown) == (0, (), False)
    assert outcome.detail
    assert bench.calls == bench.tokens.fetched == len(bench.gate.entered) == 0


@pytest.mark.parametrize("payload", [body(), b"\xff"], ids=["valid", "invalid"])
def test_outcome_ids(payload: bytes) -> None:
    """A redelivery of a command has its outcome id; another bill under the same id, another lane or end has another."""

    def made(payload: bytes = payload, answer: Reply = SUCCESS, **changed: Any) -> str:
        return Bench(answer).outcome(builders.delivery(payload, **changed)).outcome_id

    others = [made(payload + b" "), made(lane="sweep"), made(message_id="m-2"), made(body(billnumber="2"))]
    if payload == body():
        others.append(made(answer=NOT_FOUND))

    assert made() == made(redelivered=True, epoch=NOON + 60, headers={"qris-round": 2, "batch-id": "b"})
    assert len({made(), *others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply("4039300", "Transaction Expired"), Reason.ALREADY_EXPIRED),
        (reply("4049314", "Paid Bill"), Reason.PAID),
        (NOT_FOUND, Reason.NOT_FOUND),
        (reply("4059300", "?"), Reason.REFUSED),
    ],
)
def test_final_answers(answer: Reply, reason: Reason) -> None:
    """A final answer is reported after one call, with the gateway's words."""

    bench = Bench(answer)

    outcome = bench.outcome()

    assert (outcome.reason, outcome.attempts) == (reason, 1)
    assert outcome.response_code == str(answer.body[18:25], "ascii")
    assert outcome.response_message
    assert outcome.detail is None
    assert bench.tokens.taken == 1


def test_backoff_between_calls() -> None:
    """Transient answers are retried with a growing backoff, each call with its own id, token, key and time."""

    bench = Bench(BROKEN, no_reply(sent=False), SUCCESS, takes=1.0)

    outcome = bench.outcome()

    assert (outcome.reason, outcome.attempts) == (Reason.SUCCESS, 3)
    assert outcome.external_ids == tuple(request.external_id for request in bench.gateway.sent)
    assert len(set(outcome.external_ids)) == 3
    assert bench.gate.slept == [0.5, 1]
    headers = [request.headers for request in bench.gateway.sent]
    assert [each["X-SIGNATURE"] for each in headers] == ["key-1 token-1", "key-2 token-1", "key-3 token-1"]
    moments = [datetime.fromisoformat(each["X-TIMESTAMP"]).timestamp() - NOON for each in headers]
    assert moments == [0, 1.5, 3.5]


def test_effect_stays_unknown() -> None:
    """A success after a call without an answer says that the earlier one may have taken effect."""

    assert Bench(no_reply(), SUCCESS).outcome().effect_unknown
    assert not Bench(no_reply(sent=False), SUCCESS).outcome().effect_unknown
    assert not Bench(STALE_TOKEN, SUCCESS).outcome().effect_unknown


@pytest.mark.parametrize("answer", [BAD_SIGNATURE, Reply(401, b""), Reply(403, b"")])
def test_a_refusal_that_does_not_name_the_token_puts_it_in_doubt(answer: Reply) -> None:
    """The store learns of the generation in use; it decides whether to renew it."""

    bench = Bench(answer, SUCCESS)

    assert bench.outcome().reason is Reason.SUCCESS
    assert bench.tokens.doubts == [1]
    assert bench.tokens.refusals == []


def test_redelivered() -> None:
    """A redelivered command may have been called for by a process that died."""

    assert Bench().outcome(builders.delivery(redelivered=True)).effect_unknown


# -- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [BROKEN, no_reply(sent=False), BAD_SIGNATURE, STALE_TOKEN, ID_CLASH])
def test_all_calls_count(answer: Reply | NoReply) -> None:
    """A round has so many calls, whatever the answers are (but throttled ones)."""

    bench = Bench(answer)

    assert bench() == Delay(30, 1)
    assert bench.calls == 4


def test_failed_tokens_count() -> None:
    """A call that found no token is a call of the round, but no attempt of the command."""

    bench = Bench(failures=[no_token()] * 9)
    delivery = builders.delivery(headers=LAST_ROUND)

    outcome = bench.outcome(delivery)

    assert (outcome.reason, outcome.attempts, outcome.external_ids) == (Reason.CREDENTIALS, 0, ())
    assert not outcome.effect_unknown
    assert bench.gate.recorded == [(Kind.SYSTEMIC, False)] * 4
    assert bench.gate.recorded_for == [(CANCELLATION, True)] * 4
    assert bench.calls == 0


@pytest.mark.parametrize("lane", [CANCELLATION, SWEEP])
def test_answers_are_recorded_for_their_lane(lane: str) -> None:
    """An answer to an expire call counts for the lane of the command."""

    bench = Bench(BROKEN, SUCCESS)

    bench.outcome(builders.delivery(lane=lane))

    assert bench.gate.recorded == [(Kind.TRANSIENT, False), (Kind.DONE, False)]
    assert bench.gate.recorded_for == [(lane, False)] * 2


def test_budget() -> None:
    """A round ends when the next pause would end after its budget."""

    bench = Bench(BROKEN, takes=9.5)

    assert bench() == Delay(30, 1)
    assert bench.gateway.sent_at == [1_000.0, 1_010.0]


@pytest.mark.parametrize("slot", [1.0, 30.0, 600.0])
def test_waits_for_slots_are_no_part_of_the_budget(slot: float) -> None:
    """Under a low rate limit a failing command has all its calls: waiting for its turn is not its fault."""

    bench = Bench(BROKEN, takes=3.0)
    bench.gate.slot = slot

    assert bench() == Delay(30, 1)
    assert bench.gateway.sent_at == [1_000.0, 1_003.5 + slot, 1_007.5 + 2 * slot, 1_012.5 + 3 * slot]


def test_waits_for_slots_do_not_stretch_the_budget() -> None:
    """What is spent on calls and backoffs counts as ever, however long the waits are."""

    bench = Bench(BROKEN, takes=9.5)
    bench.gate.slot = 30.0

    assert bench() == Delay(30, 1)
    assert bench.gateway.sent_at == [1_000.0, 1_040.0]


def test_wait_for_a_slot_that_a_hold_ends() -> None:
    """The wait for a slot is no part of the budget either when a hold begins meanwhile."""

    bench = Bench(BROKEN, takes=9.0)
    bench.gate.slot = 60.0

    def begin() -> None:
        bench.gate.hold, bench.gate.during_slot = THROTTLE, lambda: None

    bench.gate.during_slot = begin
    held = task()
    assert bench(held) == Hold()
    bench.clock.sleep(100.0)
    bench.gate.hold = None

    assert bench(held) == Delay(30, 1)
    assert bench.gateway.sent_at == [1_000.0, 1_169.5, 1_239.5]


@pytest.mark.parametrize("shared", [False, True])
def test_waits_for_tokens_are_no_part_of_the_budget(shared: bool) -> None:
    """A slow token service leaves a command all its calls, whether it answers in the end or not."""

    bench = Bench(BROKEN, failures=[no_token(Kind.TRANSIENT, shared=shared)] * 2, takes=7.0)
    bench.tokens.takes = 60.0

    assert bench() == Delay(30, 1)
    assert (bench.calls, len(bench.observer.attempts)) == (2, 4)


@given(
    st.lists(
        st.sampled_from([BROKEN, no_reply(), BAD_SIGNATURE, STALE_TOKEN, ID_CLASH, NOT_NOW]), min_size=1, max_size=6
    ),
    st.integers(1, 6),
    st.floats(0.01, 60),
    st.floats(0, 30),
    st.integers(),
)
def test_every_round_ends(
    answers: list[Reply | NoReply], attempts: int, budget: float, takes: float, seed: int
) -> None:
    """Whatever comes, a round keeps its calls and no call starts after its budget."""

    limits = builders.policy(max_attempts=attempts, budget=budget)
    bench = Bench(*answers, policy=limits, rng=random.Random(seed), takes=takes)

    assert bench() == Delay(30, 1)
    assert 1 <= bench.calls <= attempts
    assert all(moment - 1_000 <= budget for moment in bench.gateway.sent_at)


def test_rounds() -> None:
    """Each round that ends without a final answer leads to the next delay; after the last, people must look."""

    dispositions = [Bench(BROKEN)(builders.delivery(headers={"qris-round": round_})) for round_ in range(4)]

    assert dispositions[:3] == [Delay(30, 1), Delay(300, 2), Delay(1800, 3)]
    assert isinstance(dispositions[3], Report)
    assert dispositions[3].outcome.reason is Reason.RETRIES_EXHAUSTED


def test_no_delayed_rounds() -> None:
    """Without delayed rounds a command is reported after its first."""

    assert Bench(BROKEN, policy=builders.policy(delays=())).outcome().reason is Reason.RETRIES_EXHAUSTED


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([BAD_SIGNATURE], Reason.CREDENTIALS),
        ([STALE_TOKEN], Reason.CREDENTIALS),
        ([BROKEN, BROKEN, BROKEN, BAD_SIGNATURE], Reason.CREDENTIALS),
        ([BAD_SIGNATURE, BAD_SIGNATURE, BAD_SIGNATURE, BROKEN], Reason.RETRIES_EXHAUSTED),
        ([ID_CLASH], Reason.RETRIES_EXHAUSTED),
        ([NOT_NOW], Reason.RETRIES_EXHAUSTED),
        ([BAD_SIGNATURE, NOT_NOW], Reason.RETRIES_EXHAUSTED),
        ([no_reply()], Reason.RETRIES_EXHAUSTED),
    ],
)
def test_credentials_or_exhausted(answers: list[Reply | NoReply], reason: Reason) -> None:
    """Systemic or token answers to the end mean credentials; anything else, exhausted retries."""

    outcome = Bench(*answers).outcome(builders.delivery(headers=LAST_ROUND))

    assert (outcome.status, outcome.reason) == (Status.UNRESOLVED, reason)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_not_at_this_time_ends_the_round(before: int) -> None:
    """ "Not allowed at this time" ends the round at once: a moment later it is not allowed either."""

    bench = Bench(*[BROKEN] * before, NOT_NOW)

    assert bench() == Delay(30, 1)
    assert bench.calls == before + 1
    assert bench.gate.recorded[-1] == (Kind.LATER, False)


def test_not_at_this_time_to_the_end() -> None:
    """After the last round it is reported with the gateway's words, and the bill was surely not touched."""

    outcome = Bench(NOT_NOW).outcome(builders.delivery(headers=LAST_ROUND))

    assert (outcome.status, outcome.reason, outcome.attempts) == (Status.UNRESOLVED, Reason.RETRIES_EXHAUSTED, 1)
    assert (outcome.response_code, outcome.effect_unknown) == ("4039306", False)


def test_what_an_unresolved_outcome_tells() -> None:
    """The last answer is reported: code and message, or the error where there was none."""

    told = Bench(BROKEN).outcome(builders.delivery(headers=LAST_ROUND))
    silent = Bench(no_reply()).outcome(builders.delivery(headers=LAST_ROUND))

    assert (told.response_code, told.response_message, told.detail) == ("5009300", "General Error", None)
    assert (silent.response_code, silent.response_message, silent.detail) == (None, None, "read timed out")


def test_bookkeeping_across_rounds() -> None:
    """Attempts, external ids and an unknown effect add up over delayed rounds."""

    first = builders.delivery()
    assert Bench(no_reply())(first) == Delay(30, 1)
    bench = Bench(BAD_SIGNATURE)
    later = next_round(delayed(Names("p"), first, 30, 1, "hop-1"))
    assert bench(later) == Delay(300, 2)
    last = next_round(delayed(Names("p"), later, 300, 2, "hop-2"))

    outcome = Bench(SUCCESS).outcome(last)

    assert (outcome.attempts, len(outcome.external_ids), outcome.effect_unknown) == (9, 9, True)
    assert outcome.received_at == NOON


def test_bookkeeping_of_a_returned_command() -> None:
    """What was called for before a drain is known to the process that goes on."""

    bench = Bench(no_reply())
    bench.gate.drain_in = 0.1
    delivery = builders.delivery(headers={"qris-round": 2})
    assert bench(delivery) == GiveBack()

    following = next_round(returned(Names("p"), delivery, "hop-1"))

    assert following.progress.round == 2
    assert Bench(NOT_FOUND).outcome(following).reason is Reason.NOT_FOUND_AFTER_UNKNOWN_EFFECT


def test_latest_ids_are_told() -> None:
    """Every call is counted, the latest twenty ids are reported."""

    headers = {**LAST_ROUND, "qris-attempts": 30, "qris-external-ids": ",".join(["9" * 36] * 20)}

    outcome = Bench(BROKEN).outcome(builders.delivery(headers=headers))

    assert outcome.attempts == 34
    assert outcome.external_ids == ("9" * 36,) * 16 + tuple(f"{number:036d}" for number in range(1, 5))


# -- not found ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [BROKEN, no_reply(), reply("2009300", status=500), Reply(502, b"<html>")])
def test_not_found_after_unknown_effect(before: Reply | NoReply) -> None:
    """A bill that is not found after a call that may have expired it is unresolved."""

    outcome = Bench(before, NOT_FOUND).outcome()

    assert (outcome.status, outcome.reason) == (Status.UNRESOLVED, Reason.NOT_FOUND_AFTER_UNKNOWN_EFFECT)
    assert outcome.effect_unknown
    assert outcome.response_code == "4049301"


@pytest.mark.parametrize("before", [no_reply(sent=False), STALE_TOKEN, ID_CLASH, BAD_SIGNATURE])
def test_not_found_after_no_effect(before: Reply | NoReply) -> None:
    """A bill that is not found after calls that took no effect is not found."""

    assert Bench(before, NOT_FOUND).outcome().reason is Reason.NOT_FOUND


def test_not_found_after_a_throttle() -> None:
    """A throttled call took no effect."""

    bench, held = Bench(throttled(), NOT_FOUND), task()

    assert bench(held) == Hold()
    assert bench.outcome(held).reason is Reason.NOT_FOUND


def test_not_found_in_a_later_round() -> None:
    """An unknown effect of an earlier round, or of another process, is remembered."""

    for delivery in (builders.delivery(headers={"qris-effect-unknown": True}), builders.delivery(redelivered=True)):
        assert Bench(NOT_FOUND).outcome(delivery).reason is Reason.NOT_FOUND_AFTER_UNKNOWN_EFFECT


def test_other_refusals_stay_final() -> None:
    """Only "not found" is in doubt after an unknown effect."""

    assert Bench(no_reply(), reply("4049314", "Paid Bill")).outcome().reason is Reason.PAID


# -- token and external id ------------------------------------------------------------------------------------------


def test_stale_token() -> None:
    """A token answer costs one refresh and one immediate resend with the new token and a new id."""

    bench = Bench(STALE_TOKEN, SUCCESS)

    outcome = bench.outcome()

    assert (outcome.reason, outcome.attempts) == (Reason.SUCCESS, 2)
    assert (bench.tokens.refusals, bench.tokens.fetched) == ([1], 2)
    assert [request.headers["Authorization"] for request in bench.gateway.sent] == ["Bearer token-1", "Bearer token-2"]
    assert bench.gate.slept == []


def test_id_clash() -> None:
    """An external-id answer costs a new id, sent at once with the same token."""

    bench = Bench(ID_CLASH, SUCCESS)

    outcome = bench.outcome()

    assert len(set(outcome.external_ids)) == 2
    assert (bench.tokens.fetched, bench.gate.slept) == (1, [])


@pytest.mark.parametrize(
    ("first", "second"), [(STALE_TOKEN, STALE_TOKEN), (STALE_TOKEN, ID_CLASH), (ID_CLASH, ID_CLASH)]
)
def test_second_resend_backs_off(first: Reply, second: Reply) -> None:
    """Only the first resend of a round is immediate."""

    bench = Bench(first, second, SUCCESS)

    assert bench.outcome().attempts == 3
    assert bench.gate.slept == [0.5]


def test_token_failures_are_retried() -> None:
    """A token service that comes back lets the command through."""

    bench = Bench(failures=[no_token(Kind.TRANSIENT), no_token(Kind.TRANSIENT)])

    outcome = bench.outcome()

    assert (outcome.reason, outcome.attempts) == (Reason.SUCCESS, 1)
    assert bench.gate.slept == [0.5, 1]


def test_shared_token_failures_count_once() -> None:
    """A failure that another sender counted is not counted again."""

    bench = Bench(failures=[no_token(shared=True)])

    bench.outcome()

    assert bench.gate.recorded == [(Kind.DONE, False)]
    assert bench.observer.retries == [Kind.SYSTEMIC]


def test_a_round_that_waited_in_vain_is_not_over() -> None:
    """Of all that wait for one token request only who made it spends a round: the breaker counts one failure, too."""

    vain = [no_token(Kind.TRANSIENT, shared=True)] * 4
    bench = Bench(failures=[*vain, *vain, vain[0], no_token(Kind.TRANSIENT)])
    waiting = task()

    assert [bench(waiting), bench(waiting)] == [Hold(), Hold()]
    assert bench.outcome(waiting).reason is Reason.SUCCESS
    assert Bench(failures=[*vain[:3], no_token(Kind.TRANSIENT)])() == Delay(30, 1)


def test_systemic_answers_keep_the_token() -> None:
    """A bad signature is no reason to ask for a token."""

    bench = Bench(BAD_SIGNATURE, SUCCESS)

    bench.outcome()

    assert (bench.tokens.refusals, bench.tokens.taken, bench.tokens.fetched) == ([], 1, 1)


# -- deadlines ------------------------------------------------------------------------------------------------------


def test_deadline_before_the_first_call() -> None:
    """After notAfter nothing is called."""

    bench = Bench()

    outcome = bench.outcome(until(-0.001))

    assert (outcome.status, outcome.reason, outcome.attempts) == (Status.UNRESOLVED, Reason.DEADLINE_PASSED, 0)
    assert bench.calls == bench.tokens.fetched == 0


def test_deadline_is_inclusive() -> None:
    """At notAfter a call may still start; an answer that comes later counts."""

    bench = Bench(takes=30.0)

    assert bench.outcome(until(0)).reason is Reason.SUCCESS


def test_deadline_between_calls() -> None:
    """No backoff is begun that would end after notAfter; what is known of the calls is reported."""

    bench = Bench(BROKEN)

    outcome = bench.outcome(until(1.4))

    assert (outcome.reason, outcome.attempts, outcome.effect_unknown) == (Reason.DEADLINE_PASSED, 2, True)
    assert outcome.response_code == "5009300"
    assert bench.gate.slept == [0.5]


def test_deadline_before_the_next_round() -> None:
    """No delayed round is begun that would come after notAfter, which is reported at once."""

    outcome = Bench(BROKEN).outcome(until(29))

    assert (outcome.reason, outcome.attempts, outcome.effect_unknown) == (Reason.DEADLINE_PASSED, 4, True)
    assert (outcome.response_code, outcome.detail) == ("5009300", "notAfter is before the next attempt")
    assert Bench(BROKEN)(until(60)) == Delay(30, 1)


def test_earlier_delay_before_a_deadline() -> None:
    """A delay that would end after notAfter gives way to the longest that does not, an earlier one again, until none
    fits."""

    bench = Bench(BROKEN, policy=builders.policy(max_attempts=1))

    def deliver(left: float, round_: int) -> Disposition:
        return bench(until(left, headers={"qris-round": round_}))

    assert [deliver(299.0, 1), deliver(1_799.0, 2), deliver(77.0, 2)] == [Delay(30, 2), Delay(300, 3), Delay(30, 3)]
    last = deliver(29.0, 2)
    assert isinstance(last, Report)
    assert last.outcome.reason is Reason.DEADLINE_PASSED


def test_deadline_is_not_blamed_after_the_last_round() -> None:
    """When all rounds are used up and a call would still be in time, the retries are exhausted."""

    assert Bench(BROKEN).outcome(until(60, headers=LAST_ROUND)).reason is Reason.RETRIES_EXHAUSTED


def test_deadline_while_waiting_to_be_let_in() -> None:
    """A deadline that passes at the gate is one that passed."""

    bench = Bench()
    bench.gate.before_enter = lambda: bench.clock.sleep(2.0)

    assert bench.outcome(until(1)).reason is Reason.DEADLINE_PASSED
    assert bench.calls == bench.tokens.fetched == 0


def test_deadline_while_fetching_a_token() -> None:
    """A deadline that passes while a token is fetched is one that passed: no call starts."""

    bench = Bench()
    bench.tokens.takes = 2.0

    outcome = bench.outcome(until(1))

    assert (outcome.reason, outcome.attempts) == (Reason.DEADLINE_PASSED, 0)
    assert bench.calls == 0


def test_deadline_of_a_held_command() -> None:
    """A deadline passes during an outage as well."""

    bench = Bench()
    bench.gate.hold = OUTAGE

    assert bench.outcome(until(-1)).reason is Reason.DEADLINE_PASSED


@given(
    st.lists(st.sampled_from([BROKEN, STALE_TOKEN, ID_CLASH, throttled(), no_reply()]), min_size=1, max_size=5),
    st.integers(0, 20_000),
    st.floats(0, 9),
    st.integers(),
)
def test_no_call_after_the_deadline(answers: list[Reply | NoReply], ahead: int, takes: float, seed: int) -> None:
    """Whatever comes, no call starts after notAfter."""

    bench = Bench(*answers, takes=takes, rng=random.Random(seed))

    bench(until(ahead / 1000))

    assert all(moment - 1_000 <= ahead / 1000 + 1e-6 for moment in bench.gateway.sent_at)


# -- throttled ------------------------------------------------------------------------------------------------------


def test_throttled_command_is_held() -> None:
    """A throttled answer holds the command, and waiting costs neither calls nor budget."""

    bench = Bench(throttled("15"), throttled("15"), SUCCESS)
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    held = task()

    for _ in range(2):
        assert bench(held) == Hold()
        assert bench(held) == Hold()  # still held
        bench.clock.sleep(15.0)
        bench.gate.hold = None

    outcome = bench.outcome(held)
    assert (outcome.reason, outcome.attempts, outcome.effect_unknown) == (Reason.SUCCESS, 3, False)
    assert bench.gate.slept == []
    assert bench.observer.retries == [Kind.THROTTLED] * 2


@pytest.mark.parametrize("headers", [{}, LAST_ROUND], ids=["first round", "last round"])
@pytest.mark.parametrize("asked", [None, "10", "600"])
@pytest.mark.parametrize("by_token_service", [False, True])
def test_lasting_throttle_costs_nothing(headers: dict[str, int], asked: str | None, by_token_service: bool) -> None:
    """However long a throttle lasts, a command has all its calls and its budget afterwards, in the same round."""

    answers = 500
    failures = [no_token(Kind.THROTTLED)] * answers if by_token_service else []
    bench = Bench(*([] if by_token_service else [throttled(asked)] * answers), BROKEN, failures=failures, takes=1.0)
    bench.tokens.takes = 0.05
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    held = task(headers=headers)

    for _ in range(answers):
        assert bench(held) == Hold()
        bench.gate.hold = None
        bench.clock.sleep(15.0)

    before = bench.calls
    disposition = bench(held)
    moments = bench.gateway.sent_at[before:]
    assert [moment - moments[0] for moment in moments] == [0.0, 1.5, 3.5, 6.5]
    if headers:
        assert isinstance(disposition, Report)
        assert disposition.outcome.reason is Reason.RETRIES_EXHAUSTED
    else:
        assert disposition == Delay(30, 1)


def test_throttle_between_calls() -> None:
    """A round that a throttle interrupts goes on with the calls, the backoff and the budget that it had."""

    bench = Bench(BROKEN, throttled("19"), BROKEN, takes=1.0)
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    held = task()
    assert bench(held) == Hold()
    bench.clock.sleep(500.0)
    bench.gate.hold, bench.gate.hold_after = None, {}

    assert bench(held) == Delay(30, 1)
    assert bench.calls == 5
    assert bench.gate.slept == [0.5, 1, 2]


def test_throttle_that_an_outage_follows() -> None:
    """A round that a throttle interrupted goes on, whatever ended meanwhile."""

    bench, held = Bench(BROKEN, throttled("19"), BROKEN), task()
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    assert bench(held) == Hold()
    bench.gate.hold = OUTAGE
    assert bench(task()) == Hold()
    bench.gate.hold, bench.gate.hold_after = None, {}
    bench.gate.over[held.lane] += 1

    assert bench(held) == Delay(30, 1)
    assert bench.calls == 5


def test_held_time_costs_no_budget() -> None:
    """A round that a throttle interrupted goes on with the budget it had: neither the throttled call nor the hold is
    part of it."""

    bench = Bench(BROKEN, throttled("19"), BROKEN, takes=8.0)
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    held = task()
    assert bench(held) == Hold()
    bench.clock.sleep(500.0)
    bench.gate.hold, bench.gate.hold_after = None, {}

    assert bench(held) == Delay(30, 1)
    assert bench.gateway.sent_at == [1_000.0, 1_008.5, 1_516.5, 1_525.5]


def test_deadline_of_a_throttled_command() -> None:
    """A deadline that passes while the gateway throttles us is one that passed."""

    bench = Bench(throttled("100"))
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    held = Task(until(60))
    assert bench(held) == Hold()
    bench.clock.sleep(61.0)

    outcome = bench.outcome(held)

    assert (outcome.reason, outcome.attempts, outcome.response_code) == (Reason.DEADLINE_PASSED, 1, "4299300")


# -- outages --------------------------------------------------------------------------------------------------------


def test_outage_holds() -> None:
    """While the breaker is open nothing is called, and the command has lost nothing."""

    bench = Bench()
    bench.gate.hold = OUTAGE
    held = task()

    assert bench(held) == Hold()
    assert bench.calls == bench.tokens.fetched == 0
    bench.gate.hold = None
    assert bench.outcome(held).attempts == 1


def interrupted(bench: Bench, held: Task) -> None:
    """Its round is interrupted by its lane's breaker after two calls, and the breaker is closed again later."""
    bench.gate.hold_after = {Kind.SYSTEMIC: OUTAGE}
    assert bench(held) == Hold()
    assert bench.calls == 2
    assert bench(held) == Hold()  # still held
    bench.gate.hold, bench.gate.hold_after = None, {}
    bench.clock.sleep(1_000.0)


def test_outage_during_a_round() -> None:
    """A round that an outage ends starts afresh after it, with all its calls and budget."""

    bench, held = Bench(BROKEN, BAD_SIGNATURE, BROKEN), task()
    interrupted(bench, held)
    bench.gate.over[held.lane] += 1

    assert bench(held) == Delay(30, 1)
    assert bench.calls == 6
    assert held.delivery.progress.attempts == 6
    assert bench.gate.slept == [0.5, 1, 0.5, 1, 2]


def test_hold_while_others_succeed() -> None:
    """If no outage has ended since (others succeeded all the time), the command itself failed: its round goes on with
    the calls, the backoff and the budget that it had."""

    bench, held = Bench(BROKEN, BAD_SIGNATURE, BROKEN), task()
    interrupted(bench, held)

    assert bench(held) == Delay(30, 1)
    assert bench.calls == 4
    assert bench.gate.slept == [0.5, 1, 2]


def test_outage_of_the_other_lane_changes_no_round() -> None:
    """Only outages of the command's own lane let its round start afresh."""

    bench, held = Bench(BROKEN, BAD_SIGNATURE, BROKEN), task()
    interrupted(bench, held)
    bench.gate.over[SWEEP] += 1

    assert bench(held) == Delay(30, 1)
    assert bench.calls == 4


def test_round_that_a_hold_interrupts_twice() -> None:
    """A round that goes on after a hold may be interrupted again."""

    bench, held = Bench(BROKEN), task()
    bench.gate.hold_after = {Kind.TRANSIENT: OUTAGE}
    for _ in range(3):
        assert bench(held) == Hold()
        bench.gate.hold = None
        bench.clock.sleep(1_000.0)
    bench.gate.hold_after = {}

    assert bench(held) == Delay(30, 1)
    assert bench.calls == 4


def test_kept_round() -> None:
    """What a hold interrupts is kept with the command, and only then."""

    bench, held = Bench(BROKEN, SUCCESS), task()
    bench.gate.hold_after = {Kind.TRANSIENT: OUTAGE}
    bench.gate.over[held.lane] = 7

    assert bench(held) == Hold()
    assert held.round == Round(1_000.0, calls=1, failures=1, interrupted=1_000.5, outages=7)
    bench.gate.hold = None
    bench.outcome(held)
    assert held.round is None


def test_round_that_went_back_goes_on() -> None:
    """A command that went to the end of its lane in the middle of a round has the calls left that it had."""

    bench = Bench(BROKEN)

    assert bench(builders.delivery(headers={"qris-calls": 2})) == Delay(30, 1)
    assert bench.calls == 2


@pytest.mark.parametrize("calls", [4, 5, 10**6])
def test_round_that_went_back_used_up(calls: int) -> None:
    """Whatever its headers say of its round, a command is called for once before the round ends."""

    bench = Bench(BROKEN)
    forged = builders.delivery(headers={"qris-calls": calls})

    assert bench(forged) == Delay(30, 1)
    assert bench.calls == 1
    assert forged.progress.calls == 0


@pytest.mark.parametrize("round_", [0, 3])
@pytest.mark.parametrize("answer", [BROKEN, BAD_SIGNATURE, STALE_TOKEN, no_reply(), NOT_NOW])
def test_no_round_ends_in_an_outage(round_: int, answer: Reply | NoReply) -> None:
    """A round whose last call falls into an outage is not over: no delayed round, no report."""

    bench = Bench(answer, policy=builders.policy(max_attempts=1))
    bench.gate.broken = {CANCELLATION}

    assert bench(builders.delivery(headers={"qris-round": round_})) == Hold()
    assert bench.calls == 1


@pytest.mark.parametrize("round_", [0, 2, 3])
@pytest.mark.parametrize("answer", [BROKEN, BAD_SIGNATURE, no_reply()])
def test_round_ends_while_the_other_lane_is_held(round_: int, answer: Reply | NoReply) -> None:
    """While nothing succeeds in any lane, a round that failed costs none: the command waits and comes round again."""

    bench = Bench(answer)
    bench.gate.broken = {SWEEP}

    assert bench(builders.delivery(headers={"qris-round": round_})) == Delay(30, round_)
    assert bench.calls == 4


@pytest.mark.parametrize(
    ("left", "delays", "expected"),
    [(60, (30, 300), Delay(30, 1)), (60, (300, 30), Delay(30, 1)), (20, (30, 5, 10), Delay(10, 1))],
)
def test_deadline_while_the_other_lane_is_held(left: int, delays: tuple[int, ...], expected: Delay) -> None:
    """That wait ends before notAfter, too."""

    bench = Bench(BROKEN, policy=builders.policy(delays=delays))
    bench.gate.broken = {SWEEP}

    assert bench(until(left, headers={"qris-round": 1})) == expected


def test_no_delay_fits_while_the_other_lane_is_held() -> None:
    """Where none does, the deadline has passed."""

    bench = Bench(BROKEN)
    bench.gate.broken = {SWEEP}

    assert bench.outcome(until(29, headers=LAST_ROUND)).reason is Reason.DEADLINE_PASSED


@pytest.mark.parametrize(
    ("answer", "delays"), [(BROKEN, ()), (ID_CLASH, (30,)), (NOT_NOW, (30,))], ids=["no delays", "id clash", "not now"]
)
def test_rounds_that_the_other_lane_does_not_save(answer: Reply, delays: tuple[int, ...]) -> None:
    """What is no failure of the gateway's ends as ever, and so does everything where there are no delayed rounds."""

    bench = Bench(answer, policy=builders.policy(delays=delays))
    bench.gate.broken = {SWEEP}

    outcome = bench.outcome(builders.delivery(headers=LAST_ROUND))

    assert outcome.reason is Reason.RETRIES_EXHAUSTED


@pytest.mark.parametrize("lane", [CANCELLATION, SWEEP])
def test_final_answers_in_an_outage(lane: str) -> None:
    """A final answer is reported, outage or not."""

    bench = Bench(SUCCESS)
    bench.gate.broken = {lane}

    assert bench.outcome().reason is Reason.SUCCESS


@pytest.mark.parametrize("answer", [BROKEN, BAD_SIGNATURE, no_reply(), no_reply(sent=False), NOT_NOW])
@pytest.mark.parametrize("headers", [{}, LAST_ROUND, {"qris-calls": 3}])
def test_probe_is_one_call(answer: Reply | NoReply, headers: dict[str, int]) -> None:
    """A probe sends one call; when it fails the command goes to the end of its lane, whatever round it is in."""

    bench = Bench(answer)
    bench.gate.hold = OUTAGE
    probed = task(headers=headers)

    for number in range(1, 9):
        assert bench(probed, probe=True) == GiveBack()
        assert bench.calls == number
    assert bench.gate.slept == []
    assert all(probe for _, probe in bench.gate.recorded)
    assert (probed.round, probed.delivery.progress.calls) == (None, 0)
    assert probed.delivery.progress.attempts == 8
    assert bench.observer.retries == []


def test_probe_without_a_token() -> None:
    """A probe for which no token could be had has failed as well."""

    bench = Bench(failures=[no_token(Kind.TRANSIENT), no_token(Kind.TRANSIENT, shared=True)])
    bench.gate.hold = OUTAGE
    probed = task()

    assert [bench(probed, probe=True), bench(probed, probe=True)] == [GiveBack(), GiveBack()]
    assert bench.gate.recorded == [(Kind.TRANSIENT, True)]
    assert bench.gate.recorded_for == [(CANCELLATION, True)]
    assert bench.calls == 0


def test_probe_replays_a_stale_token() -> None:
    """A probe whose token went stale during the outage sends once more with a new one."""

    bench = Bench(STALE_TOKEN, SUCCESS)
    bench.gate.hold = OUTAGE

    assert bench.outcome(probe=True).reason is Reason.SUCCESS
    assert bench.gate.recorded == [(Kind.TOKEN, True), (Kind.DONE, True)]


def test_probe_replays_once() -> None:
    """A probe whose new token is refused as well has failed."""

    bench = Bench(STALE_TOKEN)
    bench.gate.hold = OUTAGE

    assert bench(probe=True) == GiveBack()
    assert bench.calls == 2


def test_probe_after_a_throttle() -> None:
    """A probe has a round of its own, however many calls a hold interrupted."""

    bench = Bench(BROKEN, throttled("15"), throttled("15"), STALE_TOKEN, SUCCESS)
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    probed = task(headers={"qris-calls": 2})
    for _ in range(2):
        assert bench(probed) == Hold()
        bench.gate.hold = None
    bench.gate.hold = OUTAGE

    assert bench.outcome(probed, probe=True).attempts == 5


def test_probe_that_succeeds() -> None:
    """A probe is a command like any other: its final answer is reported."""

    bench = Bench(NOT_FOUND)
    bench.gate.hold = OUTAGE

    assert bench.outcome(probe=True).reason is Reason.NOT_FOUND


def test_throttled_probe() -> None:
    """A probe that is throttled is held at the front of its lane and keeps no round."""

    bench = Bench(throttled("15"))
    bench.gate.hold = OUTAGE
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    probed = task()

    assert bench(probed, probe=True) == Hold()
    assert (bench.calls, probed.round) == (1, None)


@pytest.mark.parametrize("answer", [BROKEN, BAD_SIGNATURE, NOT_NOW])
def test_probe_that_fails_after_the_outage(answer: Reply) -> None:
    """A probe costs no round either when another one has closed the breaker before it fails."""

    for delays in ((30,), ()):
        bench = Bench(answer, policy=builders.policy(max_attempts=1, delays=delays))
        assert bench(probe=True) == GiveBack()


def test_probe_that_the_deadline_overtakes() -> None:
    """A probe after its notAfter is reported without a call."""

    bench = Bench()
    bench.gate.hold = OUTAGE

    assert bench.outcome(until(-1), probe=True).reason is Reason.DEADLINE_PASSED
    assert bench.calls == 0


def test_probes_cost_no_attempts() -> None:
    """A command that was a probe many times has all its calls afterwards."""

    bench = Bench(BROKEN)
    probed = task()
    bench.gate.hold = OUTAGE
    for _ in range(5):
        bench(probed, probe=True)
    bench.gate.hold = None

    assert bench(probed) == Delay(30, 1)
    assert bench.calls == 9


# -- taken back by the broker ---------------------------------------------------------------------------------------


def owned(**changed: Any) -> Task:
    """A command whose delivery a channel of ours holds."""
    return Task(builders.delivery(**changed), Entry("key", [Tag(1, 1)]))


def lose(owner: Task) -> None:
    """The channel is lost, and the broker has the command again."""
    assert owner.entry is not None
    owner.entry.tags.clear()


def lost_in_call(bench: Bench, owner: Task, number: int = 1) -> None:
    """The channel is lost while call ``number`` is out."""
    send = bench.gateway.send

    def sent(request: Any, *_: object) -> Reply | NoReply:
        if bench.calls == number - 1:
            lose(owner)
        return send(request)

    bench.gateway.send = sent  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("probe", [False, True])
def test_taken_back_before_the_first_call(probe: bool) -> None:
    """A command that the broker has again is not called for here."""

    bench, lost = Bench(), owned()
    lose(lost)

    assert bench(lost, probe=probe) == TakenBack()
    assert bench.calls == bench.tokens.fetched == 0


@pytest.mark.parametrize("answer", [BROKEN, STALE_TOKEN, ID_CLASH, BAD_SIGNATURE, no_reply()])
@pytest.mark.parametrize("during", [1, 2, 4])
def test_taken_back_between_calls(answer: Reply | NoReply, during: int) -> None:
    """A round whose command the broker takes back ends with the call that is out: no further call, round or report."""

    bench, lost = Bench(answer), owned()
    lost_in_call(bench, lost, during)

    assert bench(lost) == TakenBack()
    assert bench.calls == lost.delivery.progress.attempts == during


def test_taken_back_while_waiting_for_a_slot() -> None:
    """A command that is lost while it waits for its slot is not called for."""

    bench, lost = Bench(BROKEN), owned()
    bench.gate.slot = 5.0
    bench.gate.during_slot = lambda: lose(lost)

    assert bench(lost) == TakenBack()
    assert bench.calls == 1


def test_taken_back_while_a_token_is_fetched() -> None:
    """A command that is lost while a token is fetched is not called for."""

    bench, lost = Bench(), owned()
    bench.tokens.takes = 1.0
    sleep = bench.clock.sleep

    def slept(seconds: float) -> None:
        sleep(seconds)
        lose(lost)

    bench.clock.sleep = slept  # type: ignore[method-assign]

    assert bench(lost) == TakenBack()
    assert (bench.calls, bench.tokens.fetched) == (0, 1)


@pytest.mark.parametrize("answer", [SUCCESS, NOT_FOUND])
def test_taken_back_before_a_final_answer(answer: Reply) -> None:
    """The result of a call that was under way goes to the desk, which knows what may be published."""

    bench, lost = Bench(answer), owned()
    lost_in_call(bench, lost)

    assert bench.outcome(lost).attempts == 1


@pytest.mark.parametrize("round_", [0, 3])
@pytest.mark.parametrize("broken", [set(), {CANCELLATION}, {SWEEP}])
def test_taken_back_in_the_last_call_of_a_round(broken: set[str], round_: int) -> None:
    """Whether rounds are left or not, an orphan's round ends in nothing, outage or not."""

    bench = Bench(BROKEN, policy=builders.policy(max_attempts=1))
    bench.gate.broken = broken
    lost = owned(headers={"qris-round": round_})
    lost_in_call(bench, lost)

    assert bench(lost) == TakenBack()


# -- draining -------------------------------------------------------------------------------------------------------


def test_drain_before_a_call() -> None:
    """A command that meets a drain goes back without a call."""

    bench = Bench()
    bench.gate.draining = True

    assert bench() == GiveBack()
    assert bench.calls == 0


@pytest.mark.parametrize("answer", [BROKEN, BAD_SIGNATURE, ID_CLASH, no_reply()])
def test_drain_during_a_backoff(answer: Reply | NoReply) -> None:
    """A drain ends a backoff: the command goes back with what is known of its calls."""

    bench = Bench(answer)
    bench.gate.drain_in = 0.0
    delivery = builders.delivery(headers=LAST_ROUND)

    assert bench(delivery) == GiveBack()
    assert delivery.progress.attempts == bench.calls == 1


def test_drain_does_not_stop_a_call() -> None:
    """A call that is out when a drain begins is finished and reported."""

    bench = Bench()
    send = bench.gateway.send

    def drained(request: Any, *_: object) -> Reply | NoReply:
        bench.gate.draining = True
        return send(request)

    bench.gateway.send = drained  # type: ignore[assignment, method-assign]

    assert bench.outcome().reason is Reason.SUCCESS


def test_drain_while_a_token_is_fetched() -> None:
    """A drain that interrupts the wait for a token gives the command back."""

    bench = Bench()

    def get() -> Any:
        raise Draining

    bench.tokens.get = get  # type: ignore[method-assign]

    assert bench() == GiveBack()


# -- what is reported on the way --------------------------------------------------------------------------------------


def test_attempts_are_observed() -> None:
    """Every attempt is reported with what a log line needs."""

    bench = Bench(BROKEN, SUCCESS, takes=0.25)

    bench.outcome(builders.delivery(lane="sweep", headers={"batch-id": "b-1"}))

    first, second = bench.observer.attempts
    assert (first.delivery.command_id, first.command.billnumber) == ("m-1", "10092081")
    assert (first.number, first.external_id, first.status, first.seconds) == (1, f"{1:036d}", 500, 0.25)
    assert (first.verdict.kind, second.verdict.kind) == (Kind.TRANSIENT, Kind.DONE)
    assert second.number == 2
    assert bench.observer.retries == [Kind.TRANSIENT]


def test_failed_tokens_are_observed() -> None:
    """An attempt that found no token is reported without an external id and status."""

    bench = Bench(failures=[no_token(Kind.TRANSIENT)])

    bench.outcome()

    first = bench.observer.attempts[0]
    assert (first.number, first.external_id, first.status) == (0, None, None)


def test_retries_are_told_when_one_follows() -> None:
    """The last answer of a round is no retry."""

    bench = Bench(BROKEN)
    bench()

    assert bench.observer.retries == [Kind.TRANSIENT] * 3


def test_pacing() -> None:
    """The first call was paced by whoever took the command; every other one waits at the gate."""

    bench = Bench(BROKEN, BROKEN, SUCCESS)
    bench.outcome()

    assert bench.gate.entered == [(False, True), (False, False), (False, False)]
