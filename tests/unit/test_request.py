"""What is sent: body, external id and signed headers of one attempt."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

from hypothesis import example, given
from hypothesis import strategies as st

from tests import builders
from tests.builders import NOON
from worker.core import jakarta, request
from worker.core.request import EXTERNAL_ID_DIGITS, NODE_DIGITS, external_id

EPOCHS = st.floats(0, 4_000_000_000)
NODES = st.integers(0, 10**NODE_DIGITS - 1)
SERIALS = st.integers(0, 10**8 - 1)
JAKARTA = timezone(timedelta(hours=7))


def sign_nothing(method: str, path: str, token: str, body: bytes, timestamp: str) -> str:
    """A signature that shows what was signed."""
    return f"{method} {path} {token} {body.decode()} {timestamp}"


@given(EPOCHS, st.integers(0), st.integers(0))
def test_external_ids_are_36_digits(epoch: float, node: int, serial: int) -> None:
    """An external id has 36 digits, however long the process runs."""

    made = external_id(epoch, node, serial)

    assert len(made) == EXTERNAL_ID_DIGITS == 36
    assert made.isascii()
    assert made.isdigit()


@given(st.sets(st.tuples(NODES, SERIALS), max_size=20), EPOCHS)
@example({(0, 0), (0, 10**7), (10**10, 0), (1, 0), (0, 1)}, 0.0)
def test_external_ids_are_unique(calls: set[tuple[int, int]], epoch: float) -> None:
    """Within one millisecond no two calls of any processes share an external id."""

    assert len({external_id(epoch, node, serial) for node, serial in calls}) == len(calls)


@given(st.integers(0, 4_000_000_000_000), st.integers(0, 4_000_000_000_000), NODES, SERIALS)
def test_external_ids_differ_in_time(one: int, other: int, node: int, serial: int) -> None:
    """A restarted process never repeats an id: the millisecond is part of it."""

    same = external_id(one / 1000, node, serial) == external_id(other / 1000, node, serial)

    assert same == (one == other)


def test_external_id_begins_with_the_day() -> None:
    """People can read an external id's time, in Jakarta's zone."""

    assert external_id(NOON + 0.123, 42, 7) == "20261122120000123" + "00000000042" + "00000007"


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64))
def test_body_is_the_document_s(bill: str) -> None:
    """The body is compact JSON in the order of the gateway's document."""

    payload = request.body(builders.command(bill, "M"))

    assert (
        payload
        == json.dumps({"billnumber": bill, "additionalInfo": {"merchantId": "M"}}, separators=(",", ":")).encode()
    )


def test_bill_field() -> None:
    """The other spelling of the bill is a setting."""

    assert request.body(builders.command("1", "2"), "billNumber") == (
        b'{"billNumber":"1","additionalInfo":{"merchantId":"2"}}'
    )


def test_headers() -> None:
    """All headers are there; one timestamp serves header and signature; the hashed bytes are the sent ones."""

    signed = request.sign(builders.command(), builders.partner(), sign_nothing, "tok", NOON + 0.25, "1" * 36)

    moment = "2026-11-22T12:00:00.250+07:00"
    assert signed.headers == {
        "Content-Type": "application/json",
        "Authorization": "Bearer tok",
        "X-TIMESTAMP": moment,
        "X-PARTNER-ID": "client-1",
        "X-EXTERNAL-ID": "1" * 36,
        "X-SIGNATURE": f"POST /qr/qr-mpm-expire-billnumber tok {signed.body.decode()} {moment}",
        "CHANNEL-ID": "95051",
        "X-CHANNEL-ID": "95051",
    }


def test_settings_of_the_request() -> None:
    """Signed path, channel headers and milliseconds are settings."""

    partner = builders.partner(sign_path="/v1.0/qr", channel_headers=("CHANNEL-ID",), milliseconds=False)

    headers = request.sign(builders.command(), partner, sign_nothing, "tok", NOON, "1").headers

    assert headers["X-SIGNATURE"].startswith("POST /v1.0/qr tok ")
    assert headers["X-TIMESTAMP"] == "2026-11-22T12:00:00+07:00"
    assert "X-CHANNEL-ID" not in headers


def test_times_ignore_tz(zone: str) -> None:
    """Times are Jakarta's in any zone of the machine."""

    assert jakarta.iso(NOON) == "2026-11-22T12:00:00.000+07:00", zone
    assert jakarta.digits(NOON) == "20261122120000000", zone


@given(st.integers(-2_000_000_000_000, 4_000_000_000_000))
def test_times_are_exact(milliseconds: int) -> None:
    """A time is written to the millisecond, and read back as the same."""

    text = jakarta.iso(milliseconds / 1000)

    assert round(datetime.fromisoformat(text).timestamp() * 1000) == milliseconds
    assert datetime.fromisoformat(text).utcoffset() == JAKARTA.utcoffset(None)
