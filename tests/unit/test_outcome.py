"""How a command's end is reported: status, identity, JSON."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import builders
from worker.core.compact import compact
from worker.core.lanes import LANES
from worker.core.outcome import (
    DEAD_LETTERED,
    OUTCOME_TYPE,
    REASONS,
    STATUS_OF,
    Reason,
    Status,
    encode_outcome,
    outcome_id,
)

CONTRACT = {
    "expired": {"success", "already_expired"},
    "rejected": {
        "invalid_field",
        "bad_request",
        "not_found",
        "invalid_merchant",
        "merchant_blacklisted",
        "paid",
        "refused",
    },
    "unresolved": {"retries_exhausted", "deadline_passed", "not_found_after_unknown_effect", "credentials"},
    "invalid": {"malformed_json", "invalid_command", "too_large"},
}
TEXTS = st.none() | st.text(max_size=30)


def test_statuses_and_reasons_are_the_contract_s() -> None:
    """The closed lists of statuses and reasons are the documented ones, each reason with one status."""

    assert {str(status): {str(reason) for reason in reasons} for status, reasons in REASONS.items()} == CONTRACT
    assert set(STATUS_OF) == set(Reason)


def test_what_people_must_look_at() -> None:
    """Unresolved and invalid commands are dead-lettered; the gateway's own answers are not."""

    assert {Status.UNRESOLVED, Status.INVALID} == DEAD_LETTERED
    assert [builders.outcome(reason).dead_lettered for reason in (Reason.SUCCESS, Reason.PAID)] == [False, False]
    assert builders.outcome(Reason.CREDENTIALS).dead_lettered


def test_type() -> None:
    """The outcome's type is the documented one."""

    assert OUTCOME_TYPE == "qris.expire.outcome.v1"


def test_json() -> None:
    """The JSON has the documented fields, in their order, with Jakarta's times."""

    text = encode_outcome(builders.outcome(attempts=2, effect_unknown=True))

    assert json.loads(text) == {
        "outcomeId": builders.outcome().outcome_id,
        "commandId": "m-1",
        "lane": "cancellation",
        "billnumber": "10092081",
        "merchantId": "121xxxx",
        "reference": "ORD-77",
        "batchId": None,
        "status": "expired",
        "reason": "success",
        "responseCode": "2009300",
        "responseMessage": "Successful",
        "detail": None,
        "attempts": 2,
        "externalIds": ["1" * 36],
        "effectUnknown": True,
        "receivedAt": "2026-11-22T12:00:00.000+07:00",
        "completedAt": "2026-11-22T12:00:01.500+07:00",
    }
    assert list(json.loads(text))[:3] == ["outcomeId", "commandId", "lane"]


@given(st.text(max_size=30), TEXTS, TEXTS, TEXTS)
def test_any_text_is_encoded(command_id: str, reference: str | None, batch: str | None, detail: str | None) -> None:
    """Whatever a producer sent is reported back in ASCII and read as the same, lone surrogates too."""

    made = builders.outcome(command_id=command_id, reference=reference, batch_id=batch, detail=detail)

    read = json.loads(encode_outcome(made).decode("ascii"))

    assert (read["commandId"], read["reference"], read["batchId"], read["detail"]) == (
        command_id,
        reference,
        batch,
        detail,
    )


VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()).map(tuple)


@given(st.dictionaries(st.text(), VALUES))
@example({"delete": "\x7f", "wide": 2**70, "half": "\ud800"})
def test_compact_is_what_json_writes(value: dict[str, Any]) -> None:
    """The same bytes, whichever of the two writes them."""
    assert compact(value) == json.dumps(value, separators=(",", ":")).encode("ascii")


COMMANDS = st.tuples(
    st.text(st.sampled_from("1\n\ud800é"), max_size=4), st.sampled_from(LANES), st.binary(max_size=3) | st.just(b"1\n1")
)


@given(COMMANDS, COMMANDS, st.sampled_from(Status), st.sampled_from(Status))
@example(("1\n1", "sweep", b""), ("1", "sweep", b"1\n"), Status.EXPIRED, Status.EXPIRED)
def test_outcome_ids(
    one: tuple[str, str, bytes], other: tuple[str, str, bytes], status: Status, another: Status
) -> None:
    """Two outcomes share an id exactly when the command (its id, lane and body) and the status are the same."""

    made = outcome_id(*one, status)

    assert (made == outcome_id(*other, another)) == ((one, status) == (other, another))
    assert str(uuid.UUID(made)) == made
    assert (uuid.UUID(made).version, uuid.UUID(made).variant) == (5, uuid.RFC_4122)


def test_outcome_id_is_the_same_everywhere() -> None:
    """The id is RFC 9562's name-based UUID, so every process and version makes the same."""

    made = outcome_id("m-1", "sweep", b'{"billnumber":"1"}', Status.EXPIRED)

    namespace = uuid.UUID("0c4f3f6e-0f3a-5d2b-8c39-0d0a3a5f1d11")
    assert made == str(uuid.uuid5(namespace, 'expired\nsweep\n3\nm-1\n{"billnumber":"1"}'))
    assert made == "05ed4300-c812-5e94-8393-5574fc2307fd"


@pytest.mark.parametrize("changed", [{"completed_at": 1.0}, {"attempts": 9}, {"external_ids": ()}, {"detail": "x"}])
def test_outcome_id_survives_a_redelivery(changed: dict[str, Any]) -> None:
    """What differs from one redelivery to the next does not change the id."""

    assert json.loads(encode_outcome(builders.outcome(**changed)))["outcomeId"] == builders.outcome().outcome_id
