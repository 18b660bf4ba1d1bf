"""Bodies become a command, or the contract's reason why they are none; nothing else ever comes out."""

from __future__ import annotations

import base64
import gzip
import json
import uuid
import zlib
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import builders
from tests.builders import BILL, MERCHANT
from worker.core.command import (
    MAX_BODY_BYTES,
    MAX_DETAIL,
    MAX_REFERENCE,
    Command,
    Invalid,
    InvalidReason,
    command_id,
    is_identifier,
    parse,
    parse_rfc3339,
)

IDENTIFIERS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["billnumber", "billNumber", "additionalInfo", "reference", "notAfter", "note"])
VALUES: st.SearchStrategy[Any] = (
    IDENTIFIERS
    | st.text(max_size=140)
    | JSON
    | st.builds(dict, merchantId=IDENTIFIERS | JSON)
    | st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat)
)


def assert_contract(body: bytes, default: str | None = None) -> Command | Invalid:
    """Whatever comes out is a valid command, or one of the three reasons with a bounded text that can be published."""
    parsed = parse(body, default)
    if isinstance(parsed, Command):
        assert is_identifier(parsed.billnumber)
        assert parsed.merchant_id == default or is_identifier(parsed.merchant_id)
        assert parsed.reference is None or len(parsed.reference) <= MAX_REFERENCE
        assert parsed.not_after is None or isinstance(parsed.not_after, float)
    else:
        assert parsed.reason in get_args(InvalidReason)
        assert 0 < len(parsed.detail) <= MAX_DETAIL
        parsed.detail.encode("utf-8")
        assert parsed.billnumber is None or is_identifier(parsed.billnumber)
    return parsed


def invalid(body: bytes | str) -> str:
    """The reason, or the empty text for a command."""
    parsed = assert_contract(body.encode() if isinstance(body, str) else body)
    return parsed.reason if isinstance(parsed, Invalid) else ""


@given(st.binary(max_size=300))
@example(b"")
@example(b"\xff\xfe{\x00}\x00")
def test_any_bytes(body: bytes) -> None:
    """Arbitrary bytes never raise."""

    assert_contract(body)


@given(JSON, st.none() | IDENTIFIERS)
def test_any_json(value: Any, default: str | None) -> None:
    """Arbitrary JSON never raises."""

    assert_contract(json.dumps(value).encode(), default)


@given(st.dictionaries(NAMES, VALUES, max_size=6), st.none() | IDENTIFIERS)
def test_near_valid_json(value: dict[str, Any], default: str | None) -> None:
    """The right field names with the wrong values never raise."""

    assert_contract(json.dumps(value).encode(), default)


@given(st.data())
def test_damaged_commands(data: st.DataObject) -> None:
    """A command with one damaged byte never raises."""

    body = bytearray(builders.body(reference="é", notAfter="2026-11-22T23:59:59+07:00"))
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))

    assert_contract(bytes(body))


@given(IDENTIFIERS, IDENTIFIERS, st.none() | st.text(max_size=MAX_REFERENCE))
def test_every_valid_command(bill: str, merchant: str, reference: str | None) -> None:
    """What the contract allows comes out as it went in."""

    body = builders.body(billnumber=bill, additionalInfo={"merchantId": merchant}, reference=reference)

    assert parse(body) == Command(bill, merchant, reference)


def test_gateway_body() -> None:
    """The gateway's own body is a valid command."""

    body = b'{"billnumber": "10092081", "additionalInfo": {"merchantId": "121xxxx"}}'

    assert parse(body) == Command("10092081", "121xxxx")


@pytest.mark.parametrize("padding", [0, 1])
def test_size_limit(padding: int) -> None:
    """65,536 bytes are still valid, 65,537 are too large."""

    body = builders.body().ljust(65_536 + padding)

    assert len(body) == MAX_BODY_BYTES + padding
    assert invalid(body) == ("too_large" if padding else "")


def test_size_comes_first() -> None:
    """What is too large is not looked into, whatever it holds."""

    assert invalid(b"\xff" * 65_537) == "too_large"


@pytest.mark.parametrize(
    "body",
    [
        "",
        " ",
        "{",
        "{}x",
        "{'billnumber': '1'}",
        '{"billnumber": "1",}',
        '{"billnumber": "a\nb"}',
        '{"billnumber": NaN}',
        '{"note": Infinity}',
        '{"note": -Infinity}',
        '{"note": [{"deep": NaN}]}',
        '{"note": 01}',
        "\ufeff" + builders.body().decode(),
    ],
)
def test_malformed(body: str) -> None:
    """NaN, a byte-order mark and everything else that is no JSON is malformed."""

    assert invalid(body) == "malformed_json"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_other_encodings(encoding: str) -> None:
    """Only UTF-8 without a mark is read."""

    body = json.dumps(builders.fields(reference="ü"), ensure_ascii=False)

    assert invalid(body.encode(encoding)) == "malformed_json"


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (gzip.compress(builders.body(), mtime=0), "compressed with gzip"),
        (zlib.compress(builders.body()), "compressed with deflate"),
        (b"\x28\xb5\x2f\xfd\x00", "compressed with zstd"),
        (b"\xef\xbb\xbf" + builders.body(), "byte-order mark"),
        (builders.body().decode().encode("utf-16"), "UTF-16"),
        (builders.body().decode().encode("utf-16-le"), "UTF-16"),
        (builders.body().decode().encode("utf-16-be"), "UTF-16"),
        (builders.body().decode().encode("utf-32"), "UTF-32"),
        (builders.body().decode().encode("utf-32-be"), "UTF-32"),
        (base64.b64encode(builders.body()), "base64"),
        (b'{"reference":"\xe9"}', "byte 0xe9"),
        (b'{"billnumber"', "delimiter"),
    ],
)
def test_why_it_is_malformed(body: bytes, cause: str) -> None:
    """What a producer does wrong is named, not only where the parser stopped."""
    found = parse(body)

    assert isinstance(found, Invalid)
    assert cause in found.detail


def test_latin_1() -> None:
    """Text in another eight-bit encoding is malformed, not guessed."""

    assert invalid(b'{"billnumber":"1","additionalInfo":{"merchantId":"2"},"reference":"\xe9"}') == "malformed_json"


@pytest.mark.parametrize("body", ["[]", '"text"', "1", "null", "true", "[{}]", '[{"billnumber":"1"}]'])
def test_no_object(body: str) -> None:
    """JSON that is no object is an invalid command, not malformed."""

    assert invalid(body) == "invalid_command"


@pytest.mark.parametrize(
    "extra",
    [
        '"billnumber": "10092081"',
        '"note": 1, "note": 1',
        '"note": {"a": 1, "a": 2}',
        '"note": [[{"a": {"b": 1, "b": 1}}]]',
        '"note": {"a": 1, "\\u0061": 2}',
        '"": 1, "": 2',
        '"\\ud800": 1, "\\ud800": 2',
    ],
)
def test_duplicate_keys(extra: str) -> None:
    """A duplicate key at any depth is refused, even in a field that is ignored."""

    assert invalid(f"{builders.body().decode()[:-1]}, {extra}}}") == "invalid_command"


def test_one_key_in_several_objects() -> None:
    """The same key in different objects is no duplicate."""

    assert not invalid(builders.body(note=[{"billnumber": 1}, {"billnumber": 1, "note": {"note": 1}}]))


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting(opening: str) -> None:
    """Nesting as deep as the size allows is refused without a crash."""

    inner = opening * (60_000 // len(opening))

    assert invalid(f'{{"note": {inner}') == "malformed_json"
    # Python 3.14 reads it, and finds no bill in it.
    assert invalid(f'{{"note": {"[" * 30_000}{"]" * 30_000}}}') in {"malformed_json", "invalid_command"}


@pytest.mark.parametrize("number", ["9" * 60_000, "-" + "9" * 5_000, "1e999999", "1.5", "0", "-0"])
def test_huge_numbers(number: str) -> None:
    """Numbers of any size cost nothing where they are ignored, and are refused as a bill."""

    assert not invalid(f'{builders.body().decode()[:-1]}, "note": {number}}}')
    assert invalid(f'{{"billnumber": {number}, "additionalInfo": {{"merchantId": "1"}}}}') == "invalid_command"


def test_numbers_as_bills() -> None:
    """A bill that is a number is refused, and the text says why."""

    parsed = parse(builders.body(billnumber=10092081))

    assert isinstance(parsed, Invalid)
    assert "leading zeros" in parsed.detail


@pytest.mark.parametrize("bill", ["", " ", "1 2", "1\t", "1\n", "é", "\x7f", "\x00", "x" * 65, "\ud800", "１"])
def test_bad_identifiers(bill: str) -> None:
    """A bill and a merchant are 1 to 64 printable ASCII characters without blanks."""

    assert invalid(builders.body(billnumber=bill)) == "invalid_command"
    assert invalid(builders.body(additionalInfo={"merchantId": bill})) == "invalid_command"


@pytest.mark.parametrize("value", [True, False, [], {}, ["1"], {"a": 1}, 1.5, 0])
def test_other_types(value: object) -> None:
    """Every field of a command is a string."""

    for name in ("billnumber", "billNumber", "reference", "notAfter"):
        assert invalid(json.dumps({**builders.fields(), name: value})) == "invalid_command"
    assert invalid(builders.body(additionalInfo={"merchantId": value})) == "invalid_command"


def test_both_spellings() -> None:
    """Both spellings of the bill are fine, together too if they are equal."""

    assert parse(builders.body(billnumber=..., billNumber="7")) == Command("7", MERCHANT)
    assert parse(builders.body(billnumber="7", billNumber="7")) == Command("7", MERCHANT)
    assert parse(builders.body(billnumber=None, billNumber="7")) == Command("7", MERCHANT)
    assert invalid(builders.body(billnumber="7", billNumber="8")) == "invalid_command"
    assert invalid(builders.body(billnumber="7", billNumber=7)) == "invalid_command"


def test_null_is_absent() -> None:
    """A field that is null is a field that is not there."""

    assert parse(builders.body(reference=None, notAfter=None, note=None)) == Command(BILL, MERCHANT)
    assert parse(builders.body(additionalInfo=None), "M") == Command(BILL, "M")
    assert parse(builders.body(additionalInfo={"merchantId": None}), "M") == Command(BILL, "M")
    assert invalid(builders.body(billnumber=None)) == "invalid_command"


def test_unknown_fields() -> None:
    """Unknown fields are ignored, whatever they hold."""

    body = builders.body(note={"a": [1.5, None]}, additionalInfo={"merchantId": "1", "x": 2})

    assert parse(body) == Command(BILL, "1")


def test_default_merchant() -> None:
    """The default merchant stands in only where the command carries none."""

    assert parse(builders.body(additionalInfo=...), "M") == Command(BILL, "M")
    assert parse(builders.body(additionalInfo={}), "M") == Command(BILL, "M")
    assert parse(builders.body(), "M") == Command(BILL, MERCHANT)
    assert invalid(builders.body(additionalInfo=...)) == "invalid_command"
    assert invalid(builders.body(additionalInfo="M")) == "invalid_command"
    assert isinstance(parse(builders.body(additionalInfo=[]), "M"), Invalid)


def test_reference() -> None:
    """A reference has at most 128 characters, of any kind; a lone surrogate does no harm."""

    assert parse(builders.body(reference="é" * 128)) == Command(BILL, MERCHANT, "é" * 128)
    assert parse(builders.body(reference="\ud800")) == Command(BILL, MERCHANT, "\ud800")
    assert parse(builders.body(reference="")) == Command(BILL, MERCHANT, "")
    assert invalid(builders.body(reference="é" * 129)) == "invalid_command"


def test_what_could_be_read_is_echoed() -> None:
    """An invalid command's outcome names the bill and the reference that could be read."""

    parsed = parse(builders.body(reference="ORD-77", notAfter="soon"))

    assert isinstance(parsed, Invalid)
    assert (parsed.billnumber, parsed.reference) == (BILL, "ORD-77")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-22T23:59:59+07:00", "2026-11-22T16:59:59+00:00"),
        ("2026-11-22t16:59:59z", "2026-11-22T16:59:59+00:00"),
        ("2026-11-22T16:59:59.5Z", "2026-11-22T16:59:59.500000+00:00"),
        ("2026-11-22T16:59:59.1234567Z", "2026-11-22T16:59:59.123456+00:00"),
        ("2026-11-22T16:59:60Z", "2026-11-22T16:59:59+00:00"),
        ("2026-11-22T16:59:59-00:00", "2026-11-22T16:59:59+00:00"),
        ("2024-02-29T00:00:00-12:00", "2024-02-29T12:00:00+00:00"),
        ("1969-12-31T23:59:59Z", "1969-12-31T23:59:59+00:00"),
    ],
)
def test_rfc3339(text: str, expected: str) -> None:
    """Every form of RFC 3339 is read, a leap second as the second before it."""

    assert parse_rfc3339(text) == datetime.fromisoformat(expected).timestamp()


@given(st.datetimes(timezones=st.integers(-1439, 1439).map(lambda m: timezone(timedelta(minutes=m)))))
def test_rfc3339_round_trip(moment: datetime) -> None:
    """Any time with an offset is read as what it is."""

    assert parse_rfc3339(moment.isoformat()) == moment.timestamp()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "2026-11-22",
        "2026-11-22T23:59:59",
        "2026-11-22 23:59:59+07:00",
        "2026-11-22T23:59+07:00",
        "20261122T235959Z",
        "2026-11-22T23:59:59+0700",
        "2026-11-22T23:59:59+07",
        "2026-11-22T23:59:59,5Z",
        "2026-11-22T23:59:59.Z",
        "2026-02-30T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-11-22T24:00:00Z",
        "2026-11-22T23:60:00Z",
        "2026-11-22T23:59:61Z",
        "2026-11-22T23:59:59+24:00",
        "2026-11-22T23:59:59+07:60",
        "2026-11-22T23:59:59+07:00\n",
        " 2026-11-22T23:59:59+07:00",
        "0000-01-01T00:00:00Z",
        "２026-11-22T23:59:59Z",
        "2026-W47-7T23:59:59Z",
    ],
)
def test_no_rfc3339(text: str) -> None:
    """What RFC 3339 does not allow is refused: a deadline that is misread is worse than none."""

    with pytest.raises(ValueError, match=r"RFC 3339|must be|out of range"):
        parse_rfc3339(text)
    assert invalid(builders.body(notAfter=text)) == "invalid_command"


@given(
    st.text(max_size=40)
    | st.from_regex(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", fullmatch=True)
)
def test_any_not_after(text: str) -> None:
    """Whatever stands in notAfter, the answer is a command or invalid."""

    assert_contract(builders.body(notAfter=text))


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_derived_identity(one: bytes, other: bytes) -> None:
    """Without a message id the identity is a UUID of the body: equal bodies, equal ids."""

    assert str(uuid.UUID(command_id(None, one))) == command_id("", one)
    assert (command_id(None, one) == command_id(None, other)) == (one == other)


def test_given_identity() -> None:
    """A message id is the identity, whatever the body."""

    assert command_id("m-1", b"a") == command_id("m-1", b"b") == "m-1"
