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
    no_reply,
    no_token,
    reply,
    throttled,
)
from tests.fakes import Ceiling, FakeClock, FakeGate, FakeGateway, FakeTokens, RecordingObserver
from worker.app.expire import Delay, Disposition, Expire, GiveBack, Hold, Report
from worker.core import jakarta
from worker.core.delivery import Delivery, Message, delayed, receive, returned
from worker.core.outcome import Outcome, Reason, Status
from worker.core.ports import Draining, Held, TokenUnavailable
from worker.core.retry import RetryPolicy
from worker.core.topology import Names
from worker.core.verdict import Kind, NoReply, Reply

LAST_ROUND = {"qris-round": 3}
"""Headers of a command whose delayed rounds are used up."""
THROTTLE, OUTAGE = Held(outage=False), Held(outage=True)


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
            signer=self.signer,
            new_external_id=lambda: f"{next(numbers):036d}",
        )

    def signer(self) -> Callable[[str, str, str, bytes, str], str]:
        """A signature that shows with which key and for which token it was made."""
        key = next(self.keys)
        return lambda _method, _path, token, _body, _moment: f"key-{key} {token}"

    def __call__(self, delivery: Delivery | None = None, *, probe: bool = False) -> Disposition:
        return self.expire(delivery or builders.delivery(), probe=probe)

    def outcome(self, delivery: Delivery | None = None, *, probe: bool = False) -> Outcome:
        """The outcome of a command that is reported."""
        disposition = self(delivery, probe=probe)
        assert isinstance(disposition, Report)
        return disposition.outcome

    @property
    def calls(self) -> int:
        return len(self.gateway.sent)


def until(seconds: float, **fields: Any) -> Delivery:
    """A command whose notAfter is so many seconds from now."""
    return builders.delivery(builders.body(notAfter=jakarta.iso(NOON + seconds), **fields))


def next_round(message: Message) -> Delivery:
    """The delivery of a message that we published."""
    properties = Properties(message_id=message.properties["message_id"], headers=message.properties["headers"])
    return receive("cancellation", message.body, properties, redelivered=False, epoch=NOON + 30, monotonic=1_030.0)


def test_success() -> None:
    """A command that the gateway takes is expired after one call."""

    bench = Bench()

    outcome = bench.outcome(builders.delivery(builders.body(reference="ORD-77"), headers={"batch-id": "b-1"}))

    assert outcome == builders.outcome(batch_id="b-1", external_ids=(f"{1:036d}",), received_at=NOON, completed_at=NOON)
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


def test_redelivered() -> None:
    """A redelivered command may have been called for by a process that died."""

    assert Bench().outcome(builders.delivery(redelivered=True)).effect_unknown


# -- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [BROKEN, no_reply(sent=False), BAD_SIGNATURE, STALE_TOKEN, ID_CLASH, throttled()])
def test_all_calls_count(answer: Reply | NoReply) -> None:
    """A round has so many calls, whatever the answers are."""

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
    assert bench.calls == 0


def test_budget() -> None:
    """A round ends when the next pause would end after its budget."""

    bench = Bench(BROKEN, takes=9.5)

    assert bench() == Delay(30, 1)
    assert bench.gateway.sent_at == [1_000.0, 1_010.0]


@given(
    st.lists(st.sampled_from([BROKEN, no_reply(), BAD_SIGNATURE, STALE_TOKEN, ID_CLASH]), min_size=1, max_size=6),
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
        ([throttled()], Reason.RETRIES_EXHAUSTED),
        ([no_reply()], Reason.RETRIES_EXHAUSTED),
    ],
)
def test_credentials_or_exhausted(answers: list[Reply | NoReply], reason: Reason) -> None:
    """Systemic or token answers to the end mean credentials; anything else, exhausted retries."""

    outcome = Bench(*answers).outcome(builders.delivery(headers=LAST_ROUND))

    assert (outcome.status, outcome.reason) == (Status.UNRESOLVED, reason)


def test_what_an_unresolved_outcome_tells() -> None:
    """The last answer is told: code and message, or the error where there was none."""

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
    """Every call is counted, the latest twenty ids are told."""

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


@pytest.mark.parametrize("before", [no_reply(sent=False), STALE_TOKEN, ID_CLASH, BAD_SIGNATURE, throttled()])
def test_not_found_after_no_effect(before: Reply | NoReply) -> None:
    """A bill that is not found after calls that took no effect is not found."""

    assert Bench(before, NOT_FOUND).outcome().reason is Reason.NOT_FOUND


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
    delivery = builders.delivery()

    assert [bench(delivery), bench(delivery)] == [Hold(), Hold()]
    assert bench.outcome(delivery).reason is Reason.SUCCESS
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
    """No backoff is begun that would end after notAfter; what is known of the calls is told."""

    bench = Bench(BROKEN)

    outcome = bench.outcome(until(1.4))

    assert (outcome.reason, outcome.attempts, outcome.effect_unknown) == (Reason.DEADLINE_PASSED, 2, True)
    assert outcome.response_code == "5009300"
    assert bench.gate.slept == [0.5]


def test_deadline_before_the_next_round() -> None:
    """No delayed round is begun that would come after notAfter."""

    assert Bench(BROKEN).outcome(until(29)).reason is Reason.DEADLINE_PASSED
    assert Bench(BROKEN)(until(60)) == Delay(30, 1)


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
    """A throttled answer holds the command; its calls still count, and waiting costs neither calls nor budget."""

    bench = Bench(throttled("15"), throttled("15"), SUCCESS)
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    delivery = builders.delivery()

    for _ in range(2):
        assert bench(delivery) == Hold()
        assert bench(delivery) == Hold()  # still held
        bench.clock.sleep(15.0)
        bench.gate.hold = None

    outcome = bench.outcome(delivery)
    assert (outcome.reason, outcome.attempts, outcome.effect_unknown) == (Reason.SUCCESS, 3, False)
    assert bench.gate.slept == []
    assert bench.observer.retries == [Kind.THROTTLED] * 2


def test_throttled_calls_are_limited() -> None:
    """A command that is throttled again and again uses up its calls."""

    bench = Bench(throttled("15"))
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    delivery = builders.delivery()

    dispositions = []
    for _ in range(4):
        dispositions.append(bench(delivery))
        bench.clock.sleep(15.0)
        bench.gate.hold = None

    assert dispositions == [Hold(), Hold(), Hold(), Delay(30, 1)]
    assert bench.calls == 4


def test_held_time_costs_no_budget() -> None:
    """A round that a throttle interrupted goes on with the budget it had."""

    bench = Bench(throttled("19"), BROKEN, takes=8.0)
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    delivery = builders.delivery()
    assert bench(delivery) == Hold()
    bench.clock.sleep(500.0)
    bench.gate.hold, bench.gate.hold_after = None, {}

    assert bench(delivery) == Delay(30, 1)
    assert bench.gateway.sent_at == [1_000.0, 1_508.0, 1_516.5]


@pytest.mark.parametrize(
    ("asked", "disposition"), [("21", Delay(30, 1)), ("31", Delay(300, 2)), ("600", Delay(1800, 3))]
)
def test_long_wait_is_spent_in_the_broker(asked: str, disposition: Delay) -> None:
    """A wait longer than the budget goes to the first delay that is long enough."""

    bench = Bench(throttled(asked))

    assert bench() == disposition
    assert bench.calls == 1


def test_long_wait_without_a_round() -> None:
    """Where no delayed round is left, the command waits with the senders, and its calls stay limited."""

    bench = Bench(throttled("100"))
    delivery = builders.delivery(headers=LAST_ROUND)

    for _ in range(3):
        assert bench(delivery) == Hold()
        bench.clock.sleep(100.0)

    outcome = bench.outcome(delivery)
    assert (outcome.reason, outcome.attempts) == (Reason.RETRIES_EXHAUSTED, 4)


def test_wait_ends_after_the_deadline() -> None:
    """A long wait that would end after notAfter is not begun."""

    assert Bench(throttled("100")).outcome(until(60)).reason is Reason.DEADLINE_PASSED


# -- outages --------------------------------------------------------------------------------------------------------


def test_outage_holds() -> None:
    """While the breaker is open nothing is called, and the command has lost nothing."""

    bench = Bench()
    bench.gate.hold = OUTAGE
    delivery = builders.delivery()

    assert bench(delivery) == Hold()
    assert bench.calls == bench.tokens.fetched == 0
    bench.gate.hold = None
    assert bench.outcome(delivery).attempts == 1


def test_outage_during_a_round() -> None:
    """A round that an outage ends starts afresh after it, with all its calls and budget."""

    bench = Bench(BROKEN)
    delivery = builders.delivery()
    bench.gate.hold_after = {Kind.TRANSIENT: OUTAGE}
    assert bench(delivery) == Hold()
    assert bench.calls == 1

    bench.gate.hold, bench.gate.hold_after = None, {}
    bench.clock.sleep(1_000.0)
    assert bench(delivery) == Delay(30, 1)
    assert bench.calls == 5
    assert delivery.progress.attempts == 5


@pytest.mark.parametrize("round_", [0, 3])
@pytest.mark.parametrize("answer", [BROKEN, BAD_SIGNATURE, STALE_TOKEN, no_reply(), throttled("100")])
def test_no_round_ends_in_an_outage(round_: int, answer: Reply | NoReply) -> None:
    """A round whose last call falls into an outage is not over: no delayed round, no report."""

    bench = Bench(answer, policy=builders.policy(max_attempts=1))
    bench.gate.broken = True

    assert bench(builders.delivery(headers={"qris-round": round_})) == Hold()
    assert bench.calls == 1


def test_final_answers_in_an_outage() -> None:
    """A final answer is reported, outage or not."""

    bench = Bench(SUCCESS)
    bench.gate.broken = True

    assert bench.outcome().reason is Reason.SUCCESS


@pytest.mark.parametrize("answer", [BROKEN, BAD_SIGNATURE, no_reply(), no_reply(sent=False)])
@pytest.mark.parametrize("headers", [{}, LAST_ROUND])
def test_probe_is_one_call(answer: Reply | NoReply, headers: dict[str, int]) -> None:
    """A probe sends one call; when it fails the command is held, whatever round it is in."""

    bench = Bench(answer)
    bench.gate.hold = OUTAGE
    delivery = builders.delivery(headers=headers)

    for number in range(1, 9):
        assert bench(delivery, probe=True) == Hold()
        assert bench.calls == number
    assert bench.gate.slept == []
    assert all(probe for _, probe in bench.gate.recorded)
    assert delivery.round is None


def test_probe_replays_a_stale_token() -> None:
    """A probe whose token went stale during the outage sends once more with a new one."""

    bench = Bench(STALE_TOKEN, SUCCESS)
    bench.gate.hold = OUTAGE

    assert bench.outcome(probe=True).reason is Reason.SUCCESS
    assert bench.gate.recorded == [(Kind.TOKEN, True), (Kind.DONE, True)]


def test_probe_after_a_throttle() -> None:
    """A probe has a round of its own, however many calls a throttle interrupted."""

    bench = Bench(throttled("15"), throttled("15"), throttled("15"), STALE_TOKEN, SUCCESS)
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    delivery = builders.delivery()
    for _ in range(3):
        assert bench(delivery) == Hold()
        bench.gate.hold = None
    bench.gate.hold = OUTAGE

    assert bench.outcome(delivery, probe=True).attempts == 5


def test_probe_that_succeeds() -> None:
    """A probe is a command like any other: its final answer is reported."""

    bench = Bench(NOT_FOUND)
    bench.gate.hold = OUTAGE

    assert bench.outcome(probe=True).reason is Reason.NOT_FOUND


def test_throttled_probe() -> None:
    """A probe that is throttled is held and keeps no round."""

    bench = Bench(throttled("15"))
    bench.gate.hold = OUTAGE
    bench.gate.hold_after = {Kind.THROTTLED: THROTTLE}
    delivery = builders.delivery()

    assert bench(delivery, probe=True) == Hold()
    assert (bench.calls, delivery.round) == (1, None)


def test_probes_cost_no_attempts() -> None:
    """A command that was a probe many times has all its calls afterwards."""

    bench = Bench(BROKEN)
    delivery = builders.delivery()
    bench.gate.hold = OUTAGE
    for _ in range(5):
        bench(delivery, probe=True)
    bench.gate.hold = None

    assert bench(delivery) == Delay(30, 1)
    assert bench.calls == 9


# -- draining -------------------------------------------------------------------------------------------------------


def test_drain_before_a_call() -> None:
    """A command that meets a drain goes back without a call."""

    bench = Bench()
    bench.gate.draining = True

    assert bench() == GiveBack()
    assert bench.calls == 0


@pytest.mark.parametrize("answer", [BROKEN, BAD_SIGNATURE, throttled(), no_reply()])
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
    bench.gate.before_enter = lambda: None
    send = bench.gateway.send

    def drained(request: Any) -> Reply | NoReply:
        bench.gate.draining = True
        return send(request)

    bench.gateway.send = drained  # type: ignore[method-assign]

    assert bench.outcome().reason is Reason.SUCCESS


def test_drain_while_a_token_is_fetched() -> None:
    """A drain that interrupts the wait for a token gives the command back."""

    bench = Bench()

    def get() -> Any:
        raise Draining

    bench.tokens.get = get  # type: ignore[method-assign]

    assert bench() == GiveBack()


# -- what is told on the way ----------------------------------------------------------------------------------------


def test_attempts_are_observed() -> None:
    """Every attempt is told with what a log line needs."""

    bench = Bench(BROKEN, SUCCESS, takes=0.25)

    bench.outcome(builders.delivery(lane="sweep", headers={"batch-id": "b-1"}))

    first, second = bench.observer.attempts
    assert (first.command_id, first.lane, first.billnumber, first.batch_id) == ("m-1", "sweep", "10092081", "b-1")
    assert (first.number, first.external_id, first.status, first.seconds) == (1, f"{1:036d}", 500, 0.25)
    assert (first.verdict.kind, second.verdict.kind) == (Kind.TRANSIENT, Kind.DONE)
    assert second.number == 2
    assert bench.observer.retries == [Kind.TRANSIENT]


def test_failed_tokens_are_observed() -> None:
    """An attempt that found no token is told without an external id and status."""

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
