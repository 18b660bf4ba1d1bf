"""One worker process against a broker and the simulated gateway: what goes in and what comes out.

Most tests share one worker, each with bills of its own; the first word of a bill chooses how the gateway answers.
"""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import pika
import pytest

from tests.ledger import check_books
from tests.proxy import FaultProxy
from tests.rabbit import Message, Rabbit, by_way_of, delete_topology, new_prefix
from tests.waiting import wait_until
from tests.worker_process import Outcome, Producer, Published, Scrape, WorkerProcess, command_body, working
from worker.core.topology import topology
from worker.sandbox.simulator import Fault, Pattern, Script, Simulator

JAKARTA = timezone(timedelta(hours=7))

GENERAL_ERROR = Fault(code="5009300")

ANSWERS = Script(
    patterns=(
        Pattern("^twice", (GENERAL_ERROR,)),
        Pattern("^late", (GENERAL_ERROR,) * 4),
        Pattern("^never", (Fault(code="5009300", repeat=True),)),
        Pattern("^clash", (Fault(code="4099300"),)),
        Pattern("^already", (Fault(code="4039300"),)),
        Pattern("^paid", (Fault(code="4049314"),)),
        Pattern("^lost", (GENERAL_ERROR, Fault(code="4049301"))),
        Pattern("^mute", (Fault(reset="after"),) * 3 + (Fault(html=502),)),
    )
)

PROPERTIES: dict[str, Any] = {
    "content_type": "application/json",
    "correlation_id": "corr-1",
    "reply_to": "somewhere",
    "type": "expire",
    "app_id": "billing",
    "priority": 3,
}
"""What a producer may add, and a dead letter keeps."""


def headers_of(message: Message) -> dict[str, Any]:
    """Its headers but those that the broker adds on delivery."""
    return {name: value for name, value in message.properties.headers.items() if not name.startswith("x-")}


class Desk:
    """The shared worker, with its gateway, its producer and what is dead-lettered."""

    def __init__(self, url: str, worker: WorkerProcess, producer: Producer, gateway: Simulator) -> None:
        self.url = url
        self.worker = worker
        self.producer = producer
        self.gateway = gateway
        self.rabbit = producer.rabbit
        self.names = producer.names
        self._dead: list[Message] = []

    def ask(self, bill: str, lane: str = "cancellation", **properties: Any) -> Outcome:
        """Publish one command and wait for its outcome."""
        return self.producer.of(self.producer.publish(bill, lane, **properties))

    def dead_letter(self, identity: str) -> Message:
        """The dead letter with this message id; what comes before it is remembered."""
        while (found := next((it for it in self._dead if it.properties.message_id == identity), None)) is None:
            self._dead += self.rabbit.take(self.names.dead, 1, 30)
        return found

    def is_parked(self, identity: str) -> bool:
        """Whether it is dead-lettered, once everything before this call has been settled."""
        marker = self.producer.publish_body(b"?", message_id=f"marker-{len(self.producer.published)}")
        self.dead_letter(marker.id)
        return any(letter.properties.message_id == identity for letter in self._dead)

    def calls(self, bill: str) -> int:
        return self.gateway.report().calls_by_bill.get(bill, 0)


@pytest.fixture(scope="module")
def desk(amqp_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    prefix = new_prefix()
    settings = {
        "TZ": "EST5EDT",  # New York, in the form that needs no zone files
        "GATEWAY_MERCHANT_ID": "M-DEFAULT",
        "BREAKER_FAILURES": "10000",
    }
    with (
        Simulator(ANSWERS) as gateway,
        working(amqp_url, prefix, gateway, tmp_path_factory.mktemp("desk"), **settings) as (worker, producer),
    ):
        yield Desk(amqp_url, worker, producer, gateway)
    delete_topology(amqp_url, prefix)


def moment(text: str) -> float:
    """Unix seconds of a time that must be in Jakarta's zone and have milliseconds."""
    assert text[19] == "."
    assert text[23:] == "+07:00"
    return datetime.fromisoformat(text).timestamp()


# -- outcomes


def test_an_outcome_is_what_the_contract_says(desk: Desk) -> None:
    """Properties, headers and every field of the outcome of a command that needed a second call."""

    began = time.time()
    sent = desk.producer.publish_body(
        command_body("twice-1", "M1", reference="ORD-77", notAfter="2099-01-01T00:00:00Z", other=1),
        "sweep",
        message_id="contract-1",
        correlation_id="corr-1",
        headers={"batch-id": "B7", "traceparent": "00-abc", "private": "x"},
        timestamp=int(began),
    )
    message, fields = desk.producer.of(sent)
    properties = message.properties
    assert message.key == "sweep.expired"
    assert (properties.type, properties.content_type) == ("qris.expire.outcome.v1", "application/json")
    assert (properties.delivery_mode, properties.correlation_id) == (2, "corr-1")
    assert properties.headers == {"batch-id": "B7", "traceparent": "00-abc"}
    assert properties.message_id == fields["outcomeId"] == str(UUID(fields["outcomeId"]))
    first, second = fields.pop("externalIds")
    assert first != second
    assert first.isdigit()
    assert len(first) <= 36
    received, completed = moment(fields.pop("receivedAt")), moment(fields.pop("completedAt"))
    assert began - 0.01 <= received <= completed <= time.time()
    del fields["outcomeId"]
    assert fields == {
        "commandId": "contract-1",
        "lane": "sweep",
        "billnumber": "twice-1",
        "merchantId": "M1",
        "reference": "ORD-77",
        "batchId": "B7",
        "status": "expired",
        "reason": "success",
        "responseCode": "2009300",
        "responseMessage": "Successful",
        "detail": None,
        "attempts": 2,
        "effectUnknown": True,
    }


def test_absent_fields_are_null(desk: Desk) -> None:
    """Without batch, reference and correlation: nulls, no headers, and the correlation is the command's id."""

    message, fields = desk.ask("plain-1")
    assert (fields["reference"], fields["batchId"], fields["detail"]) == (None, None, None)
    assert (fields["attempts"], fields["effectUnknown"], len(fields["externalIds"])) == (1, False, 1)
    assert not message.properties.headers
    assert message.properties.correlation_id == fields["commandId"] == "id-plain-1"


@pytest.mark.parametrize(
    ("bill", "status", "reason", "code", "attempts"),
    [
        ("clash-1", "expired", "success", "2009300", 2),
        ("already-1", "expired", "already_expired", "4039300", 1),
        ("paid-1", "rejected", "paid", "4049314", 1),
    ],
)
def test_the_gateways_answer_becomes_status_and_reason(
    desk: Desk, bill: str, status: str, reason: str, code: str, attempts: int
) -> None:
    """A final answer is reported with its code, and is not dead-lettered."""

    message, fields = desk.ask(bill, "sweep")
    assert message.key == f"sweep.{status}"
    assert (fields["status"], fields["reason"], fields["responseCode"]) == (status, reason, code)
    assert fields["attempts"] == attempts
    assert not desk.is_parked(fields["commandId"])


def test_a_command_without_an_id_is_known_by_its_body(desk: Desk) -> None:
    """The same bytes twice without message_id: two outcomes with one command id and one outcome id."""

    first = desk.ask("nameless-1", message_id=None)
    seen = len(desk.producer.outcomes)
    desk.producer.publish("nameless-1", message_id=None)
    (second,) = desk.producer.collect(1, 30)
    assert len(desk.producer.outcomes) == seen + 1
    assert first.fields["commandId"] == second.fields["commandId"] != ""
    assert first.fields["outcomeId"] == second.fields["outcomeId"]
    other = desk.ask("nameless-2", message_id=None)
    assert other.fields["commandId"] != first.fields["commandId"]


def test_a_redelivered_command_keeps_its_ids(desk: Desk) -> None:
    """Taken by another consumer that ends with it, a command has the ids that it would have had."""

    expected = desk.ask("again-1").fields["outcomeId"]
    with Rabbit(desk.url) as other:
        sent = snatched(desk, other, "again-1")
    (outcome,) = desk.producer.collect(1, 30)
    assert (outcome.command_id, outcome.fields["outcomeId"]) == (sent.id, expected)
    # It is unknown whether the other consumer has called.
    assert outcome.fields["effectUnknown"] is True
    assert desk.calls("again-1") == 2


def snatched(desk: Desk, other: Rabbit, bill: str) -> Published:
    """A command that a consumer with priority takes from the worker's queue, and does not ack."""
    channel = other.plain_channel()
    taken: list[bytes] = []
    channel.basic_consume(
        desk.names.queue("cancellation"),
        lambda *delivery: taken.append(delivery[-1]),
        arguments={"x-priority": 10},
    )
    sent = desk.producer.publish(bill)
    while not taken:
        channel.connection.process_data_events(time_limit=5)
    assert json.loads(taken[0])["billnumber"] == bill
    return sent


def test_the_default_merchant_stands_in(desk: Desk) -> None:
    """A command that names no merchant goes to the gateway, and into the outcome, with GATEWAY_MERCHANT_ID."""

    outcome = desk.ask("merchant-1", merchant=None)
    (call,) = [call for call in desk.gateway.report().calls if call.billnumber == "merchant-1"]
    assert call.merchant_id == outcome.fields["merchantId"] == "M-DEFAULT"


def test_an_outcome_that_nobody_wants_is_kept(desk: Desk) -> None:
    """With nothing bound to the outcomes, they gather in the queue of the unrouted."""

    desk.producer.turn_away()
    try:
        sent = desk.producer.publish("unwanted-1")
        (message,) = desk.rabbit.take(desk.names.unrouted, 1, 30)
    finally:
        desk.producer.listen()
    desk.producer.outcomes.append(Outcome(message, json.loads(message.body)))
    assert desk.producer.of(sent).fields["status"] == "expired"
    assert (message.key, message.exchange) == ("cancellation.expired", desk.names.outcomes)


# -- invalid commands


BODY_LIMIT = 65_536


def padded(bill: str, size: int) -> bytes:
    """A valid command of exactly so many bytes."""
    shortest = len(command_body(bill, padding=""))
    return command_body(bill, padding="x" * (size - shortest))


@pytest.mark.parametrize(
    ("body", "reason", "bill"),
    [
        (b"", "malformed_json", None),
        (b"{", "malformed_json", None),
        (b'{"billnumber": NaN}', "malformed_json", None),
        (b"\xef\xbb\xbf" + command_body("bom"), "malformed_json", None),
        (b"\xff\xfe\x00", "malformed_json", None),
        (b"[" * 60_000, "malformed_json", None),
        (b"[]", "invalid_command", None),
        (b'{"billnumber": 10092081}', "invalid_command", None),
        (b'{"billnumber": "b", "billnumber": "b"}', "invalid_command", None),
        (b'{"billnumber": "b-1", "billNumber": "b-2"}', "invalid_command", "b-1"),
        (command_body("b 1"), "invalid_command", None),
        (command_body("b-1", "x" * 65), "invalid_command", "b-1"),
        (command_body("b-1", reference="r" * 129), "invalid_command", "b-1"),
        (command_body("b-1", notAfter="2026-11-22 23:59:59"), "invalid_command", "b-1"),
        (padded("b-1", BODY_LIMIT + 1), "too_large", None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_invalid_command_is_told_and_parked(
    desk: Desk, body: bytes, reason: str, bill: str | None, request: pytest.FixtureRequest
) -> None:
    """Its outcome says why; its own bytes and properties lie with the dead letters, with what was found."""

    identity = f"invalid-{request.node.callspec.id}"
    headers = {"batch-id": "B1", "mine": 1}
    sent = desk.producer.publish_body(body, "sweep", message_id=identity, headers=headers, **PROPERTIES)
    message, fields = desk.producer.of(sent)
    assert message.key == "sweep.invalid"
    assert (fields["status"], fields["reason"], fields["attempts"]) == ("invalid", reason, 0)
    if bill:
        assert fields["billnumber"] == bill
    assert fields["detail"]
    letter = desk.dead_letter(identity)
    assert letter.body == body
    found = headers_of(letter)
    assert moment(found.pop("dead-at")) <= time.time()
    assert found == {
        **headers,
        "dead-reason": reason,
        "dead-detail": fields["detail"],
        "dead-lane": "sweep",
        "attempts": 0,
        "last-response-code": "",
    }
    assert {name: getattr(letter.properties, name) for name in PROPERTIES} == PROPERTIES
    assert letter.properties.delivery_mode == 2


def test_sixty_four_kibibytes_are_still_valid(desk: Desk) -> None:
    """A command of exactly 65,536 bytes is carried out."""

    sent = desk.producer.publish_body(padded("big-1", BODY_LIMIT), message_id="big-1")
    assert desk.producer.of(sent).fields["status"] == "expired"


def test_strange_properties_harm_nobody(desk: Desk) -> None:
    """Ids that are no text, headers of every type and a far date: the command is answered and parked like any other."""

    strange: dict[str, Any] = {
        "message_id": b"\xff" * 250,
        "timestamp": 2**63,
        "headers": {
            "batch-id": 7,
            "traceparent": {"deep": [1, None, b"\xff", True, datetime(2026, 1, 1, tzinfo=UTC)]},
            "qris-round": "many",
            "qris-attempts": -1,
            "qris-external-ids": [1],
            "qris-received-at": 2**62,
            "x-death": "not a list",
            "long": "x" * 60_000,
        },
    }
    for body, more in ((command_body("late-3"), {"correlation_id": b"\xfe" * 255}), (b"no command", {})):
        desk.rabbit.publish(desk.names.commands, "cancellation", body, **strange, **more)
    outcomes = desk.producer.collect(2, 30)
    assert {outcome.fields["status"] for outcome in outcomes} == {"expired", "invalid"}
    assert {outcome.fields["batchId"] for outcome in outcomes} == {"7"}
    assert desk.worker.components() == dict.fromkeys(desk.worker.components(), "ok")
    desk.producer.outcomes = [outcome for outcome in desk.producer.outcomes if outcome not in outcomes]


# -- rounds, dead letters and the properties that must not travel


def test_what_is_unresolved_is_parked(desk: Desk) -> None:
    """After every round, the outcome counts all calls and names the latest 20; the dead letter says why it is there."""

    sent = desk.producer.publish("never-1", headers={"batch-id": "B1"}, **PROPERTIES)
    message, fields = desk.producer.of(sent)
    assert message.key == "cancellation.unresolved"
    assert (fields["reason"], fields["responseCode"]) == ("retries_exhausted", "5009300")
    # Three rounds of RETRY_MAX_ATTEMPTS calls.
    assert (fields["attempts"], len(set(fields["externalIds"])), desk.calls("never-1")) == (12, 12, 12)
    assert fields["effectUnknown"] is True
    letter = desk.dead_letter(sent.id)
    assert letter.body == sent.body
    headers = headers_of(letter)
    assert moment(headers.pop("dead-at")) <= time.time()
    assert headers == {
        "batch-id": "B1",
        "dead-reason": "retries_exhausted",
        "dead-detail": "General Error",
        "dead-lane": "cancellation",
        "attempts": 12,
        "last-response-code": "5009300",
    }
    assert {name: getattr(letter.properties, name) for name in PROPERTIES} == PROPERTIES


def test_a_delayed_round_remembers(desk: Desk) -> None:
    """The calls of the first round are in the outcome of the second: count, ids, unknown effect, time of receipt."""

    before = desk.worker.metrics()
    _, fields = desk.ask("late-1", "sweep")
    assert (fields["status"], fields["attempts"], fields["effectUnknown"]) == ("expired", 5, True)
    assert len(set(fields["externalIds"])) == 5
    # The delay lies between: it was received in the first round.
    assert moment(fields["completedAt"]) - moment(fields["receivedAt"]) > 0.9
    after = desk.worker.metrics()
    assert after("commands_total", lane="sweep") - before("commands_total", lane="sweep") == 1
    assert after("delayed_retries_total", lane="sweep") - before("delayed_retries_total", lane="sweep") == 1


def test_not_found_after_an_unknown_effect_is_not_believed(desk: Desk) -> None:
    """A bill that is gone after a call without an answer may have expired: unresolved, and parked."""

    _, fields = desk.ask("lost-1")
    assert (fields["status"], fields["reason"]) == ("unresolved", "not_found_after_unknown_effect")
    assert desk.dead_letter("id-lost-1").properties.headers["dead-reason"] == fields["reason"]


def test_the_unknown_effect_survives_a_delay(desk: Desk) -> None:
    """Calls that ended without an answer make the effect unknown, also for a success a round later."""

    _, fields = desk.ask("mute-1")
    assert (fields["status"], fields["attempts"], fields["effectUnknown"]) == ("expired", 5, True)


def test_no_call_starts_after_not_after(desk: Desk) -> None:
    """A deadline that has passed ends the command without a call, one before the next round ends it with those made."""

    past = desk.producer.publish_body(command_body("past-1", notAfter="2020-01-01T00:00:00Z"), message_id="past-1")
    soon = datetime.now(JAKARTA) + timedelta(seconds=0.9)
    short = desk.producer.publish_body(command_body("never-2", notAfter=soon.isoformat()), message_id="short-1")
    for sent, bill, most in ((past, "past-1", 0), (short, "never-2", 4)):
        fields = desk.producer.of(sent).fields
        assert (fields["status"], fields["reason"]) == ("unresolved", "deadline_passed")
        # Of a round of four a loaded machine may not make all in time; none of the next round is made.
        attempts = desk.calls(bill)
        assert attempts <= most
        assert (fields["attempts"], len(fields["externalIds"])) == (attempts, attempts)
        assert desk.dead_letter(sent.id).properties.headers["attempts"] == attempts


def test_properties_that_would_misroute_do_not_travel(desk: Desk) -> None:
    """user_id, expiration, CC and BCC stay behind: nothing vanishes, is copied, or closes a channel."""

    spy = desk.rabbit.temporary_queue()
    hazards: dict[str, Any] = {"user_id": "guest", "expiration": "600000"}
    copies = {"CC": [spy], "BCC": [spy], "batch-id": "B1"}
    delayed = desk.producer.publish("late-2", headers=dict(copies), **hazards)
    invalid = desk.producer.publish_body(b"bad", message_id="bad-1", headers=dict(copies), **hazards)
    letter = desk.dead_letter(invalid.id)
    assert (letter.properties.user_id, letter.properties.expiration) == (None, None)
    assert not {"CC", "BCC"} & letter.properties.headers.keys()
    outcome = desk.producer.of(delayed)
    assert (outcome.fields["status"], outcome.fields["attempts"]) == ("expired", 5)
    assert outcome.message.properties.headers == {"batch-id": "B1"}
    assert desk.rabbit.depth(spy) == 0
    assert not desk.worker.events("broker.reconnect")


def test_commands_with_one_id_do_not_replace_each_other(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """A producer that gives all its commands one id: over a lost connection, every bill still gets its call."""

    port = pika.URLParameters(amqp_url).port
    bills = {f"b-{number}" for number in range(6)}
    with (
        FaultProxy("127.0.0.1", port) as proxy,
        # Their calls outlast the reconnect, on a loaded machine too.
        Simulator(Script(latency=5)) as gateway,
        WorkerProcess(by_way_of(proxy.port, amqp_url), prefix, gateway, tmp_path) as worker,
    ):
        worker.wait_ready()
        with Producer(amqp_url, prefix) as producer:
            for bill in bills:
                producer.publish(bill, message_id="always the same")
            wait_until(lambda: gateway.report().in_flight == len(bills), 30, "all are in hand")
            proxy.reset_all()
            producer.collect(len(bills), 30)
            assert {outcome.fields["billnumber"] for outcome in producer.outcomes} == bills
            worker.stop()
            # In hand when the connection went, so they were joined, not called for again.
            assert gateway.report().calls_by_bill == dict.fromkeys(bills, 1)
            assert len(worker.events("delivery.joined")) == len(bills)


# -- metrics and probes


def test_metrics_move_as_the_contract_says(desk: Desk) -> None:
    """A command that ends, one with a resend and an invalid one move their counters, and nothing names a bill."""

    before = desk.worker.metrics()
    desk.ask("twice-9", timestamp=int(time.time()) - 500)
    desk.ask("clash-9")
    desk.producer.of(desk.producer.publish_body(b"bad", message_id="bad-9"))
    lane = {"lane": "cancellation"}

    def settled() -> Scrape | None:
        """Counted when the confirm has come, which may be after the outcome, and acked later still."""
        now = desk.worker.metrics()
        return now if now("acks_total", **lane) - before("acks_total", **lane) == 3 else None

    after = wait_until(settled, 30, "counted")
    assert after

    def moved(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    assert moved("commands_total", **lane) == 3
    assert moved("outcomes_total", **lane, status="expired", reason="success") == 2
    assert moved("outcomes_total", **lane, status="invalid", reason="malformed_json") == 1
    assert moved("dead_letters_total", reason="malformed_json") == 1
    assert moved("gateway_requests_total", operation="expire", response_code="2009300") == 2
    assert moved("gateway_requests_total", operation="expire", response_code="5009300") == 1
    assert moved("gateway_requests_total", operation="expire", response_code="4099300") == 1
    assert moved("gateway_request_duration_seconds_count", operation="expire") == 4
    assert moved("retries_total", reason="transient") == 1
    assert moved("retries_total", reason="id_clash") == 1
    assert moved("retries_total") == 2
    assert after("senders") == 8
    assert moved("command_duration_seconds_count", **lane) == 3
    assert moved("command_age_seconds_count", **lane) == 3
    assert moved("commands_undated_total", **lane) == 2
    assert moved("command_age_seconds_sum", **lane) == pytest.approx(500, abs=60)
    assert moved("publish_confirm_seconds_count") == 4  # three outcomes, one dead letter
    assert abs(after("last_outcome_timestamp_seconds") - time.time()) < 60
    assert after("token_expiry_timestamp_seconds") > time.time()
    assert after("token_refreshes_total", result="ok") == 1
    assert (after("broker_connected"), after("breaker_state"), after("consumption_paused")) == (1, 0, 0)
    assert (after("in_flight"), after("publishes_unconfirmed"), after("broker_reconnects_total")) == (0, 0, 0)
    assert abs(after("clock_skew_seconds")) < 10
    for private in ("twice-9", "id-clash-9", "M1", "M-DEFAULT"):
        assert private not in after.text


def test_the_oldest_command_in_hand(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """While a command waits for its answer its publication is on the scrape, and afterwards no more."""

    def oldest() -> float:
        return worker.metrics()("oldest_command_timestamp_seconds", lane="sweep")

    with (
        Simulator(Script(latency=5)) as gateway,
        working(amqp_url, prefix, gateway, tmp_path) as (worker, producer),
    ):
        published = int(time.time()) - 60
        producer.publish("old-1", "sweep", timestamp=published)
        producer.publish("new-1", "sweep", timestamp=published + 30)
        assert wait_until(oldest, 30, "in hand") == published + 1
        producer.collect_all(30)
        wait_until(lambda: oldest() == 0, 30, "nothing in hand")


def test_what_waits_is_told_without_a_date(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Commands that nobody dated and that wait in the queue are on the scrape, and are counted as undated."""

    with (
        Simulator(Script(latency=1)) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="2") as (worker, producer),
    ):
        for number in range(40):
            producer.publish(f"undated-{number}")
        waiting = wait_until(lambda: worker.metrics()("commands_waiting", lane="cancellation"), 30, "commands wait")
        assert 20 <= waiting <= 36  # four are in hand or behind it
        producer.collect_all(60)
        wait_until(lambda: worker.metrics()("commands_waiting", lane="cancellation") == 0, 30, "nothing waits")
        assert worker.metrics()("commands_undated_total", lane="cancellation") == 40


def test_every_series_exists_from_the_start(desk: Desk) -> None:
    """Known label values are there before anything happened, at zero."""

    scrape = desk.worker.metrics()
    for lane in ("cancellation", "sweep"):
        assert scrape("outcomes_total", lane=lane, status="unresolved", reason="credentials") == 0
    for reason in ("breaker", "throttled", "broker_blocked", "draining"):
        assert scrape("consumption_paused", reason=reason) == 0
    assert scrape("retries_total", reason="throttled") == 0
    assert scrape("gateway_requests_total", operation="token", response_code="none") == 0
    assert scrape("token_refreshes_total", result="refused") == 0
    assert scrape("build_info") == 1


def test_the_metrics_port_answers(desk: Desk) -> None:
    """/livez and /readyz say ok in JSON, /metrics is there, anything else is 404."""

    for path in ("/livez", "/readyz"):
        status, body = desk.worker.get(path)
        assert (status, json.loads(body)["status"]) == (200, "ok")
    assert desk.worker.get("/metrics")[0] == 200
    assert desk.worker.get("/other")[0] == 404


def test_the_shared_worker_lost_nothing(desk: Desk) -> None:
    """After all of the above, the books balance and nothing was logged as an error but what was asked for."""

    desk.producer.collect_all(30)
    parked = {letter.properties.message_id for letter in desk.rabbit.look(desk.names.dead)}
    assert parked <= {sent.id for sent in desk.producer.published} | {None}
    assert desk.worker.running
    assert [line for line in desk.worker.events() if line["level"] == "error"] == []
    assert desk.worker.errors() == ""


# -- workers of another kind


def test_a_missing_topology_is_named_and_waited_for(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """With AMQP_DECLARE=false, what is missing stands in /readyz and the log, and its appearance suffices."""

    with Simulator() as gateway, WorkerProcess(amqp_url, prefix, gateway, tmp_path, AMQP_DECLARE="false") as worker:
        missing = f"{prefix}.dead"
        worker.wait_for(lambda: missing in " ".join(map(str, worker.components().values())), 30, "it is named")
        assert worker.get("/readyz")[0] == 503
        assert worker.get("/livez")[0] == 200
        worker.wait_for(
            lambda: any(missing in line["reason"] for line in worker.events("broker.reconnect")), 30, "so says the log"
        )
        with Rabbit(amqp_url) as rabbit:
            assert not rabbit.has_exchange(missing)
            rabbit.declare(topology(prefix, "quorum", (1, 2)))
        worker.wait_ready()
        with Producer(amqp_url, prefix) as producer:
            assert producer.of(producer.publish("b-1")).fields["status"] == "expired"
            worker.stop()
            check_books(producer, all_ended=True, no_duplicates=True)


def test_classic_queues_carry_everything_too(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """With AMQP_QUEUE_TYPE=classic: a success, a delayed round and a dead letter."""

    with (
        Simulator(ANSWERS) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, AMQP_QUEUE_TYPE="classic") as (worker, producer),
    ):
        sent = [producer.publish(bill, "sweep") for bill in ("plain-1", "late-1")]
        bad = producer.publish_body(b"bad", message_id="bad")
        assert [producer.of(one).fields["status"] for one in sent] == ["expired", "expired"]
        assert producer.of(bad).fields["status"] == "invalid"
        assert producer.rabbit.take(worker.names.dead, 1, 30)[0].body == b"bad"
        worker.stop()
        check_books(producer, all_ended=True, no_duplicates=True)


def test_the_sweep_keeps_to_its_share(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """Half of eight senders is the most a sweep gets, and cancellations overtake what is queued of it."""

    with (
        # Long calls: on a loaded machine, too, as many are under way at once as may be.
        Simulator(Script(latency=0.5)) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_CONCURRENCY="8", WORKER_SWEEP_SHARE="0.5") as (
            worker,
            producer,
        ),
    ):
        producer.publish_many(f"sweep-{number}" for number in range(60))
        producer.collect(8, 30)
        assert gateway.report().max_concurrency == 4
        assert worker.metrics()("in_flight", lane="sweep") <= 4
        producer.publish_many((f"urgent-{number}" for number in range(12)), sweep_every=0)
        producer.collect_all(30)
        order = [outcome.fields["lane"] for outcome in producer.outcomes]
        last_urgent = max(at for at, lane in enumerate(order) if lane == "cancellation")
        assert order[last_urgent:].count("sweep") >= 20, "they waited for the sweep"
        assert 4 < gateway.report().max_concurrency <= 8
        worker.stop()
        check_books(producer, all_ended=True, no_duplicates=True)


def test_two_processes_are_one_worker(amqp_url: str, prefix: str, tmp_path: Path) -> None:
    """WORKER_PROCESSES=2: both take commands, one scrape adds them up, one SIGTERM drains both and exits 0."""

    with (
        Simulator(Script(latency=0.5)) as gateway,
        working(amqp_url, prefix, gateway, tmp_path, WORKER_PROCESSES="2", WORKER_CONCURRENCY="4") as (
            worker,
            producer,
        ),
    ):
        producer.publish_many((f"b-{number}" for number in range(50)), sweep_every=1, of=2)
        producer.collect_all(30)
        scrape = wait_until(
            lambda: (now := worker.metrics())("outcomes_total", status="expired") == 50 and now, 5, "counted"
        )
        assert scrape
        assert scrape("commands_total") == 50
        assert scrape("token_refreshes_total", result="ok") == 2
        assert 4 < gateway.report().max_concurrency <= 8
        worker.stop()
        assert len(worker.events("drain.finished")) >= 2
        check_books(producer, all_ended=True, no_duplicates=True)
