"""From a broker's message to a delivery, and to the messages that settle it."""

from __future__ import annotations

import decimal
import json
from datetime import UTC, datetime
from typing import Any

import pika
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import builders
from tests.builders import NOON, delivery
from worker.core import delivery as module
from worker.core.delivery import (
    EFFECT_UNKNOWN,
    MAX_BATCH_ID,
    MAX_EXTERNAL_IDS,
    PROGRESS_HEADERS,
    Delivery,
    Message,
    dead_letter,
    delayed,
    outcome_message,
    receive,
    returned,
)
from worker.core.outcome import Reason
from worker.core.topology import Names

NAMES = Names("p")
FRAME = 131_072  # RabbitMQ's frame_max: a content header must fit one frame, or the broker closes the connection

SHORT = st.text(max_size=60) | st.binary(max_size=255)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-(2**31), 2**31 - 1).map(decimal.Decimal)
    | st.integers(0, 253_370_764_800).map(lambda epoch: datetime.fromtimestamp(epoch, UTC))
    | st.text(max_size=30)
    | st.binary(max_size=30)
)
TABLES = st.dictionaries(
    st.text(max_size=20)
    | st.sampled_from([*PROGRESS_HEADERS, "batch-id", "traceparent", "CC", "BCC", "x-death", "x-delivery-count"]),
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=8,
)
PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        "content_type": SHORT,
        "content_encoding": SHORT,
        "headers": TABLES,
        "priority": st.integers(0, 255),
        "correlation_id": SHORT,
        "reply_to": SHORT,
        "expiration": SHORT,
        "message_id": SHORT,
        "timestamp": st.integers(0, 2**64 - 1),
        "type": SHORT,
        "user_id": SHORT,
        "app_id": SHORT,
        "delivery_mode": st.integers(0, 255),
    },
)


def on_the_wire(properties: dict[str, Any]) -> Any:
    """Properties as the AMQP library reads them from what a producer wrote."""
    raw = b"".join(pika.BasicProperties(**properties).encode())
    return pika.BasicProperties().decode(raw)


def encoded(message: Message) -> bytes:
    """The content header's properties as the AMQP library writes them."""
    return b"".join(pika.BasicProperties(**message.properties).encode())


def every_message(delivery: Delivery) -> list[Message]:
    """All that may be published to settle it."""
    done = builders.outcome(command_id=delivery.command_id, batch_id=delivery.batch_id, lane=delivery.lane)
    lost = builders.outcome(Reason.CREDENTIALS, command_id=delivery.command_id, detail="x" * 300)
    return [
        outcome_message(NAMES.outcomes, delivery, done),
        dead_letter(NAMES, delivery, lost),
        delayed(NAMES, delivery, 30, 1, "copy-1"),
        returned(NAMES, delivery, "copy-1"),
    ]


def again(message: Message, *, redelivered: bool = False) -> Delivery:
    """The delivery of a message of ours."""
    return receive(
        "cancellation",
        message.body,
        on_the_wire(dict(message.properties)),
        redelivered=redelivered,
        epoch=NOON + 60,
        monotonic=2_000.0,
    )


@given(PROPERTIES, st.binary(max_size=30), st.booleans())
def test_whatever_arrives_can_be_settled(properties: dict[str, Any], body: bytes, redelivered: bool) -> None:
    """Whatever a producer put into a message, it is received, and all that settles it can be published."""

    delivery = receive("sweep", body, on_the_wire(properties), redelivered=redelivered, epoch=NOON, monotonic=1.0)

    assert delivery.command_id
    assert delivery.progress.attempts >= 0
    assert len(delivery.progress.external_ids) <= MAX_EXTERNAL_IDS
    for message in every_message(delivery):
        assert len(encoded(message)) < FRAME - 64
        assert message.properties["delivery_mode"] == 2
        assert message.properties["message_id"]


@pytest.mark.parametrize("size", [1_000, 60_000, 130_000])
@pytest.mark.parametrize("name", ["batch-id", "traceparent", "note"])
def test_large_headers(name: str, size: int) -> None:
    """A header that fills a frame does not make what we publish overflow one."""

    delivery = builders.delivery(headers={name: "x" * size}, correlation_id="c" * 255)

    assert all(len(encoded(message)) < FRAME - 64 for message in every_message(delivery))


@given(st.binary(min_size=1, max_size=255))
@example(b"\xff" * 255)
def test_message_ids_that_are_no_text(message_id: bytes) -> None:
    """A message id that is no UTF-8 is an identity too, and its outcome can be published."""

    delivery = builders.delivery(message_id=on_the_wire({"message_id": message_id}).message_id)

    assert (
        len(encoded(outcome_message(NAMES.outcomes, delivery, builders.outcome(command_id=delivery.command_id))))
        < 1_024
    )
    assert json.loads(json.dumps(delivery.command_id)) == delivery.command_id


def test_identity() -> None:
    """The message id is the command's identity; without one it comes from the body, the same every time."""

    assert builders.delivery().command_id == "m-1"
    assert builders.delivery(message_id=None).command_id == builders.delivery(message_id="").command_id
    assert builders.delivery(b"a", message_id=None).command_id != builders.delivery(b"b", message_id=None).command_id


def test_key_of_a_redelivery() -> None:
    """A redelivery of a message has its key; as another copy, and for another lane, body or id, it is another."""

    key = builders.delivery().key
    others = [
        again(returned(NAMES, builders.delivery(), "copy-1")),
        builders.delivery(lane="sweep"),
        builders.delivery(message_id="m-2"),
        builders.delivery(b"{}"),
    ]

    assert builders.delivery(redelivered=True, epoch=NOON + 9).key == key
    assert len({key, *(other.key for other in others)}) == 5


def test_fresh_progress() -> None:
    """A first delivery has no past: it was received now."""

    assert builders.delivery().progress == builders.progress()


def test_redelivery_makes_the_effect_unknown() -> None:
    """A message that came back may have been called for by a process that died."""

    assert builders.delivery(redelivered=True).progress.effect_unknown


@given(
    st.integers(0, 50),
    st.lists(st.from_regex(r"[0-9]{36}", fullmatch=True), max_size=30),
    st.booleans(),
    st.none() | st.from_regex(r"[2-5][0-9]{6}", fullmatch=True),
)
def test_progress_survives_rounds(attempts: int, ids: list[str], unknown: bool, code: str | None) -> None:
    """What is known of a command's calls survives a delayed round and a return, over the wire."""

    delivery = builders.delivery(headers={"note": "n"}, correlation_id="c")
    for external_id in ids:
        delivery.progress.sent(external_id)
    delivery.progress.attempts, delivery.progress.calls = attempts, 3
    delivery.progress.effect_unknown, delivery.progress.last_code = unknown, code
    expected = {
        "attempts": attempts,
        "external_ids": ids[-20:],
        "effect_unknown": unknown,
        "received_at": NOON,
        "last_code": code,
    }

    later = again(delayed(NAMES, delivery, 30, 2, "copy-1"))
    back = again(returned(NAMES, later, "copy-2"))

    assert later.progress == back.progress == builders.progress(round=2, calls=0, **expected)
    assert again(returned(NAMES, delivery, "copy-3")).progress == builders.progress(calls=3, **expected)
    assert (back.command_id, back.properties.correlation_id, back.headers["note"]) == ("m-1", "c", "n")


def test_latest_external_ids() -> None:
    """The latest twenty external ids are kept, and every call is counted."""

    progress = builders.progress()
    for number in range(25):
        progress.sent(str(number))

    assert progress.attempts == 25
    assert progress.external_ids == [str(number) for number in range(5, 25)]


COUNTS = ("qris-round", "qris-calls", "qris-attempts")


@pytest.mark.parametrize("value", [-1, True, "3", 1.5, None, [1], {"a": 1}, -(2**63)])
def test_forged_counts(value: object) -> None:
    """Headers of ours that are no counts count as nothing."""

    progress = builders.delivery(headers=dict.fromkeys((*COUNTS, "qris-received-at"), value)).progress

    assert (progress.round, progress.calls, progress.attempts, progress.received_at) == (0, 0, 0, NOON)


@pytest.mark.parametrize("value", [module.MAX_COUNT + 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1])
def test_huge_counts_are_not_believed(value: int) -> None:
    """A count that no command reaches was not written by us."""

    delivery = builders.delivery(headers=dict.fromkeys(COUNTS, value))
    delivery.progress.sent("1")

    progress = again(returned(NAMES, delivery, "copy-1")).progress
    assert (progress.round, progress.calls, progress.attempts) == (0, 0, 1)


@pytest.mark.parametrize(
    ("seconds", "believed"),
    [
        (0, True),
        (-1, True),
        (-30 * 86_400, True),
        (-30 * 86_400 - 1, False),
        (1, False),
        (40 * 365 * 86_400, False),
        (-NOON, False),
        (1 - NOON, False),
    ],
    ids=["now", "a second ago", "30 days ago", "older", "in a second", "in 40 years", "1970", "a second later"],
)
def test_believed_receipt(seconds: float, believed: bool) -> None:
    """A time of receipt in the future, or longer ago than a command lives, is not believed."""

    delivery = builders.delivery(headers={"qris-received-at": int((NOON + seconds) * 1000)})

    assert delivery.progress.received_at == (NOON + seconds if believed else NOON)


@given(st.integers(-(2**63), 2**63 - 1))
def test_any_receipt(milliseconds: int) -> None:
    """Whatever a producer wrote, a command was received within the last 30 days."""

    received_at = builders.delivery(headers={"qris-received-at": milliseconds}).progress.received_at

    assert NOON - module.MAX_AGE <= received_at <= NOON


@pytest.mark.parametrize("value", ["yes", 1, "false", b"\x01", None])
def test_forged_effect(value: object) -> None:
    """Only a true of ours says that the effect is unknown."""

    assert not builders.delivery(headers={EFFECT_UNKNOWN: value}).progress.effect_unknown


def test_forged_ids() -> None:
    """External ids that are none are dropped."""

    headers = {"qris-external-ids": "1,x, 2," + "9" * 37 + ",٣,,7"}

    assert builders.delivery(headers=headers).progress.external_ids == ["1", "7"]


@pytest.mark.parametrize(
    ("timestamp", "stamped", "expected"),
    [
        (None, None, None),
        (0, None, None),
        (True, None, None),
        ("1", "2", None),
        (1_795_323_590, None, NOON - 9),
        (1_795_323_590_250, None, NOON - 9.75),
        (1_795_323_590, 1_795_323_590_250, NOON - 9.75),
        (None, 1_795_323_590_250, NOON - 9.75),
        (1_795_323_590_250, 0, NOON - 9.75),
    ],
)
def test_publishing_time(timestamp: object, stamped: object, expected: float | None) -> None:
    """Milliseconds date a command exactly, the broker's before the producer's; a whole second ends when it ends."""

    delivery = builders.delivery(timestamp=timestamp, headers={"timestamp_in_ms": stamped}, epoch=NOON)

    assert delivery.published_at == expected


@pytest.mark.parametrize("timestamp", [1_795_323_600, 1_795_323_599, 1_795_323_605, 1_795_323_600_100])
def test_published_before_received(timestamp: int) -> None:
    """No command is published later than it was received: not by a rounded timestamp, nor by a clock that is ahead."""

    assert builders.delivery(timestamp=timestamp, epoch=NOON).published_at == NOON


def test_an_undated_command_is_as_old_as_its_first_delivery() -> None:
    """Nobody dated it: its age counts from the first delivery, through all its rounds."""

    headers = {"qris-received-at": int(NOON - 300) * 1000}

    assert builders.delivery(epoch=NOON).since == NOON
    assert builders.delivery(epoch=NOON, headers=headers).since == NOON - 300
    assert builders.delivery(epoch=NOON, headers=headers).published_at is None


def test_published_before_first_received() -> None:
    """A broker that sets a timestamp at every publish does not make a command young again."""

    headers = {"qris-received-at": int(NOON - 300) * 1000, "timestamp_in_ms": int(NOON - 1) * 1000}

    assert builders.delivery(timestamp=int(NOON), headers=headers, epoch=NOON).published_at == NOON - 300


def test_outcome_message() -> None:
    """An outcome is persistent, typed and routed by lane and status, and carries what it must."""

    delivery = builders.delivery(
        correlation_id="c-1",
        headers={"batch-id": "b-1", "traceparent": "00-1", "note": "n", "qris-round": 1},
    )
    outcome = builders.outcome(batch_id="b-1")

    message = outcome_message(NAMES.outcomes, delivery, outcome)

    assert (message.exchange, message.routing_key) == ("p.outcomes", "cancellation.expired")
    assert message.properties == {
        "content_type": "application/json",
        "delivery_mode": 2,
        "type": "qris.expire.outcome.v1",
        "message_id": outcome.outcome_id,
        "correlation_id": "c-1",
        "timestamp": int(NOON + 1),
        "headers": {"batch-id": "b-1", "traceparent": "00-1"},
    }


def test_correlation_id() -> None:
    """Without a correlation id the outcome carries the message id."""

    message = outcome_message(NAMES.outcomes, builders.delivery(), builders.outcome())

    assert message.properties["correlation_id"] == "m-1"


def test_dead_letter() -> None:
    """A dead letter keeps body and properties and says why it is one."""

    delivery = builders.delivery(
        b"\xff",
        content_type="text/plain",
        priority=3,
        reply_to="q",
        app_id="shop",
        headers={"note": "n", "batch-id": "b-1"},
    )
    outcome = builders.outcome(
        Reason.RETRIES_EXHAUSTED, attempts=4, response_code="5009300", response_message="General Error"
    )

    message = dead_letter(NAMES, delivery, outcome)

    assert (message.exchange, message.body) == ("p.dead", b"\xff")
    assert message.properties == {
        "content_type": "text/plain",
        "priority": 3,
        "reply_to": "q",
        "app_id": "shop",
        "message_id": "m-1",
        "delivery_mode": 2,
        "headers": {
            "note": "n",
            "batch-id": "b-1",
            "dead-reason": "retries_exhausted",
            "dead-detail": "General Error",
            "dead-at": "2026-11-22T12:00:01.500+07:00",
            "dead-lane": "cancellation",
            "attempts": 4,
            "last-response-code": "5009300",
        },
    }


def test_dangerous_properties() -> None:
    """What would close the channel, make the message vanish or send it elsewhere is left out."""

    delivery = builders.delivery(
        user_id="guest",
        expiration="1",
        headers={"CC": ["x"], "BCC": ["y"], "x-death": [{}], "x-delivery-count": 3, "x-acquired-count": 4, "x-mine": 1},
    )

    for message in every_message(delivery):
        assert not {"user_id", "expiration"} & set(message.properties)
        assert not {"CC", "BCC", "x-death", "x-delivery-count", "x-acquired-count"} & set(message.properties["headers"])
    assert dead_letter(NAMES, delivery, builders.outcome()).properties["headers"]["x-mine"] == 1


def test_redrive_starts_afresh() -> None:
    """A dead letter carries no progress, so that a redriven command has no past."""

    delivery = builders.delivery(headers={"qris-round": 3, "qris-attempts": 16, "qris-hop": "h", EFFECT_UNKNOWN: True})

    headers = dead_letter(NAMES, delivery, builders.outcome(Reason.CREDENTIALS)).properties["headers"]

    assert not set(headers) & set(PROGRESS_HEADERS)


def test_where_commands_wait() -> None:
    """A delayed round waits in its delay's queue; a returned command goes to the end of its lane."""

    delivery = builders.delivery(lane="sweep")

    late, back = delayed(NAMES, delivery, 300, 2, "h"), returned(NAMES, delivery, "h")

    assert (late.exchange, late.routing_key) == ("", "p.sweep.retry.300")
    assert (back.exchange, back.routing_key) == ("p.commands", "sweep")


def test_derived_identity_is_kept() -> None:
    """A command without a message id keeps its derived one through the rounds."""

    delivery = builders.delivery(message_id=None)

    assert again(delayed(NAMES, delivery, 30, 1, "h")).command_id == delivery.command_id


def test_foreign_headers_are_bounded() -> None:
    """Headers too large to be published again are dropped, but for what is carried."""

    delivery = builders.delivery(headers={"note": "x" * module.MAX_HEADER_BYTES, "batch-id": "b-1"})

    headers = delayed(NAMES, delivery, 30, 1, "h").properties["headers"]

    assert "note" not in headers
    assert headers["batch-id"] == "b-1"


def test_a_batch_id_is_cut() -> None:
    """A batch id stands in every outcome and log line of the batch, so a huge one is cut."""

    assert len(delivery(headers={"batch-id": "b" * 100_000}).batch_id or "") == MAX_BATCH_ID
