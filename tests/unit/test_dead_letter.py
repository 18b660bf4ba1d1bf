"""A dead letter as people see it, and the message that brings it back."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import NOON, Properties, body, delivery, outcome
from worker.core.command import command_id
from worker.core.dead_letter import (
    MAX_KINDS,
    Census,
    DeadLetter,
    Filter,
    Parcel,
    escaped,
    export_json,
    pretty,
    read_dead_letter,
    redriven,
)
from worker.core.delivery import COPY_ID, PROGRESS_HEADERS, dead_letter, delayed
from worker.core.outcome import Reason
from worker.core.topology import Names

NAMES = Names("p")


def parcel(
    payload: bytes | None = None,
    *,
    key: str = "cancellation",
    headers: Any = None,
    message_id: Any = "m-1",
    **properties: Any,
) -> Parcel:
    """A message in the queue."""
    made = Properties(headers=headers, message_id=message_id, **properties)
    return Parcel(key, made, body() if payload is None else payload)


def parked(**changed: Any) -> Parcel:
    """One that the worker parked, by its own code."""
    whole = outcome(
        Reason.RETRIES_EXHAUSTED,
        response_code="5009300",
        response_message="Internal Server Error",
        attempts=4,
        **changed,
    )
    arrived = delivery(headers={"batch-id": "B-1", "traceparent": "00-1", "mine": 7}, correlation_id="c-1")
    message = dead_letter(NAMES, arrived, whole)
    properties = dict(message.properties)
    properties.pop("delivery_mode")
    return Parcel(message.routing_key, Properties(**properties), message.body)


def death(queue: str = "p.sweep", reason: str = "delivery_limit", count: int = 1) -> dict[str, Any]:
    """An entry of x-death."""
    moment = datetime.fromtimestamp(NOON, UTC)
    return {"queue": queue, "reason": reason, "count": count, "time": moment, "exchange": "", "routing-keys": ["sweep"]}


def letter(**changed: Any) -> DeadLetter:
    """A dead letter."""
    whole: dict[str, Any] = {
        "command_id": "m-1",
        "lane": "sweep",
        "reason": "credentials",
        "parked_at": NOON,
        "attempts": 4,
        "detail": "",
        "response_code": "4017300",
        "batch_id": "B-1",
        "billnumber": "1",
    }
    return DeadLetter(**{**whole, **changed})


# -- reading


def test_what_the_worker_parked() -> None:
    """Reason, detail, time, lane, attempts and code are read as the worker wrote them."""
    assert read_dead_letter(NAMES, parked()) == DeadLetter(
        command_id="m-1",
        lane="cancellation",
        reason="retries_exhausted",
        parked_at=NOON + 1.5,
        attempts=4,
        detail="Internal Server Error",
        response_code="5009300",
        batch_id="B-1",
        billnumber="10092081",
    )


def test_what_the_broker_moved() -> None:
    """Without our headers, x-death says the reason, the lane and the time; our progress says the calls."""
    headers = {
        "x-death": [death(), death("p.sweep.retry.30", "expired")],
        "qris-attempts": 8,
        "qris-last-code": "5049300",
    }
    found = read_dead_letter(NAMES, parcel(headers=headers, key="sweep"))

    assert (found.reason, found.lane, found.parked_at) == ("delivery_limit", "sweep", NOON)
    assert (found.attempts, found.response_code) == (8, "5049300")
    assert found.detail == "moved here by the broker from p.sweep"


def test_the_broker_has_the_last_word() -> None:
    """The worker takes x-death off what it parks, so dead-* beside it was some producer's."""
    headers = {"x-death": [death(count=2)], "dead-reason": "forged", "dead-lane": "cancellation", "attempts": 99}
    found = read_dead_letter(NAMES, parcel(headers=headers, key="sweep"))

    assert (found.reason, found.lane, found.attempts) == ("delivery_limit", "sweep", None)


@pytest.mark.parametrize(
    "headers",
    [None, {}, {"x-death": "no list"}, {"x-death": [1, None]}, {"x-death": [death("other.queue", "expired")]}],
    ids=["none", "empty", "text", "numbers", "of another queue"],
)
def test_foreign_message(headers: Any) -> None:
    """A message that nobody of ours parked is listed; without a lane, there is no way back for it."""
    found = read_dead_letter(NAMES, parcel(headers=headers, key="somewhere", message_id=None))

    assert found.lane is None
    assert found.reason in ("unknown", "expired")
    assert found.command_id == command_id(None, body())


HEADER = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9)
    | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
NAMED = st.sampled_from(
    ["dead-reason", "dead-at", "dead-lane", "attempts", "last-response-code", "x-death", "batch-id", *PROGRESS_HEADERS]
)


@given(
    st.none() | st.integers() | st.dictionaries(NAMED | st.text(max_size=9), HEADER, max_size=6),
    st.none() | st.text(max_size=9) | st.binary(max_size=9),
    st.binary(max_size=30),
)
def test_nothing_breaks_it(headers: Any, message_id: Any, payload: bytes) -> None:
    """Whatever lies there can be read, exported and brought back, or is known to have no lane."""
    there = parcel(payload, headers=headers, message_id=message_id)
    found = read_dead_letter(NAMES, there)

    json.loads(json.dumps(export_json(found, there)))
    Census(NOON).add(found)
    if found.lane is not None:
        assert redriven(NAMES, found, there, "h", NOON).body == payload


# -- bringing back


def test_fresh_start() -> None:
    """Nothing of its death or its progress comes along; body, properties and foreign headers do."""
    there = parked()
    message = redriven(NAMES, read_dead_letter(NAMES, there), there, "copy-1", NOON)

    assert (message.exchange, message.routing_key, message.body) == ("p.commands", "cancellation", body())
    assert message.properties["headers"] == {"batch-id": "B-1", "traceparent": "00-1", "mine": 7, COPY_ID: "copy-1"}
    assert (message.properties["message_id"], message.properties["correlation_id"]) == ("m-1", "c-1")
    assert message.properties["delivery_mode"] == 2


def test_fresh_start_of_the_brokers_own() -> None:
    """Progress, the broker's records and what would send it elsewhere or make it vanish stay behind."""
    properties = delayed(NAMES, delivery(), 30, 2, "old").properties
    headers = {
        **properties["headers"],
        "x-death": [death()],
        "x-delivery-count": 3,
        "x-acquired-count": 4,
        "x-first-death-queue": "p.sweep",
        "x-last-death-reason": "delivery_limit",
        "CC": ["elsewhere"],
        "BCC": ["elsewhere"],
    }
    there = parcel(headers=headers, expiration="1000", user_id="guest", priority=3)
    message = redriven(NAMES, read_dead_letter(NAMES, there), there, "new", NOON)

    assert message.routing_key == "sweep"
    assert message.properties["headers"] == {COPY_ID: "new"}
    assert set(message.properties) == {"message_id", "priority", "timestamp", "delivery_mode", "headers"}


def test_redriven_is_another_message() -> None:
    """A worker that remembers the parked one must not take a redelivery of the redriven one for it."""
    there = parked()
    message = redriven(NAMES, read_dead_letter(NAMES, there), there, "copy-1", NOON)
    properties = {name: value for name, value in message.properties.items() if name != "delivery_mode"}
    again = delivery(message.body, **properties)

    assert again.command_id == delivery().command_id
    assert again.key != delivery().key
    assert (again.progress.attempts, again.progress.round, again.progress.effect_unknown) == (0, 0, False)


@pytest.mark.parametrize(
    "dated", [{"timestamp": int(NOON) - 7200}, {"headers": {"timestamp_in_ms": 1_790_000_000_000}}, {}]
)
def test_a_redriven_command_is_as_old_as_its_redrive(dated: dict[str, Any]) -> None:
    """Its age counts from the redrive, so that thirty redriven commands are not two hours late."""
    headers = {"dead-reason": "credentials", "dead-lane": "sweep", **dated.get("headers", {})}
    there = parcel(**{**dated, "headers": headers})
    message = redriven(NAMES, read_dead_letter(NAMES, there), there, "copy-1", NOON)
    properties = {name: value for name, value in message.properties.items() if name != "delivery_mode"}

    assert delivery(message.body, epoch=NOON + 5, **properties).since >= NOON


def test_no_message_id() -> None:
    """One that never had an id comes back under the id that was derived from its body."""
    there = parcel(headers={"x-death": [death()]}, message_id=None)

    message = redriven(NAMES, read_dead_letter(NAMES, there), there, "h", NOON)

    assert message.properties["message_id"] == command_id(None, body())


def test_no_lane_no_way_back() -> None:
    """Without a lane there is nothing to publish to."""
    there = parcel(key="somewhere")

    with pytest.raises(ValueError, match="no lane"):
        redriven(NAMES, read_dead_letter(NAMES, there), there, "h", NOON)


# -- choosing and counting


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (Filter(), True),
        (Filter(reasons=frozenset({"credentials", "x"})), True),
        (Filter(reasons=frozenset({"x"})), False),
        (Filter(lanes=frozenset({"sweep"})), True),
        (Filter(lanes=frozenset({"cancellation"})), False),
        (Filter(before=NOON), False),
        (Filter(before=NOON + 1), True),
        (Filter(batches=frozenset({"B-1"}), bills=frozenset({"1"})), True),
        (Filter(batches=frozenset({"B-1"}), bills=frozenset({"2"})), False),
    ],
)
def test_filter(chosen: Filter, expected: bool) -> None:
    """All parts that are set must fit."""
    assert chosen.matches(letter()) is expected


def test_before_needs_a_time() -> None:
    """A letter whose time is unknown was never parked before anything."""
    assert not Filter(before=NOON).matches(letter(parked_at=None))


def test_census() -> None:
    """Counts by reason, lane and age, the largest first; unknown ages are in the count alone."""
    census = Census(NOON)
    for age in (60, 7200, 2 * 86_400, 30 * 86_400):
        census.add(letter(parked_at=NOON - age))
    census.add(letter(lane=None, reason="unknown", parked_at=None))
    first, second = census.lines()

    assert (first[0], first[1], first[2].count, first[2].ages) == ("credentials", "sweep", 4, [1, 1, 1, 1])
    assert (second[0], second[1], second[2].count, second[2].ages) == ("unknown", "unknown", 1, [0, 0, 0, 0])
    assert census.total.count == 5


def test_census_is_bounded() -> None:
    """A flood of foreign reasons is counted together."""
    census = Census(NOON)
    for number in range(MAX_KINDS * 2):
        census.add(letter(reason=f"r{number}"))

    assert len(census.kinds) == MAX_KINDS + 1
    assert census.total.count == MAX_KINDS * 2


# -- showing


def test_escaped() -> None:
    """What a producer sent cannot move the cursor, hide a line or turn the text around."""
    assert escaped("a\x1b[2Jb\r\n\x9bé\u202e") == "a\\x1b[2Jb\\r\\n\\x9bé\\u202e"


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"a":"\\u001b[31m"}', '{\n  "a": "\\u001b[31m"\n}'),
        (b'{"a":1,"a":2}', '{"a":1,"a":2}'),
        (b"not json\x1b", "not json\\x1b"),
        (b"\xff\x00", "2 bytes that are no text, in base64: /wA="),
    ],
)
def test_pretty(payload: bytes, expected: str) -> None:
    """JSON is indented, unless that would hide why it was refused; the rest is made harmless."""
    assert pretty(payload) == expected


def test_export() -> None:
    """An exported line has the body as it came, as text or as base64."""
    there = parcel(b"\xff", headers={"raw": b"\xff", "when": datetime.fromtimestamp(0, UTC), "nan": float("nan")})

    assert export_json(read_dead_letter(NAMES, there), there)["bodyBase64"] == "/w=="
    assert export_json(read_dead_letter(NAMES, there), there)["headers"] == {
        "raw": "\\xff",
        "when": "1970-01-01T00:00:00+00:00",
        "nan": "nan",
    }
    assert export_json(letter(), parcel())["body"] == body().decode()
