"""The meaning of every answer. `TABLE` is written from the gateway's description, row by row, not from the code."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import no_reply, reply
from worker.core import verdict as verdict_table
from worker.core.outcome import REASONS, Reason, Status
from worker.core.verdict import (
    BARE_RULES,
    MAX_MESSAGE,
    RULES,
    Kind,
    NoReply,
    Reply,
    Rule,
    Verdict,
    judge,
    read,
    rule_for,
)
from worker.core.verdict import SUCCESS as SUCCESS_RULE

UNKNOWN = True
"""The call may have taken effect."""
KNOWN = False

Meaning = tuple[Kind, Reason | None, bool]
SUCCESS: Meaning = (Kind.DONE, Reason.SUCCESS, KNOWN)
ALREADY: Meaning = (Kind.DONE, Reason.ALREADY_EXPIRED, KNOWN)
TOKEN: Meaning = (Kind.TOKEN, None, KNOWN)
CLASH: Meaning = (Kind.ID_CLASH, None, KNOWN)
THROTTLED: Meaning = (Kind.THROTTLED, None, KNOWN)
TRANSIENT: Meaning = (Kind.TRANSIENT, None, UNKNOWN)
NOT_SENT: Meaning = (Kind.TRANSIENT, None, KNOWN)
SYSTEMIC: Meaning = (Kind.SYSTEMIC, None, KNOWN)
LATER: Meaning = (Kind.LATER, None, KNOWN)


def refused(reason: Reason) -> Meaning:
    """The gateway's final no."""
    return (Kind.REFUSED, reason, KNOWN)


def bare(status: int, text: bytes = b"") -> Reply:
    """An answer that carries no code of the standard."""
    return Reply(status, text)


HTML = b"<html><head><title>Error</title></head><body>Request blocked.</body></html>"

TABLE: list[tuple[str, Reply | NoReply, Meaning]] = [
    # HTTP 2xx and 2009300 or 2009100
    ("success", reply("2009300", "Successful"), SUCCESS),
    ("success of 91", reply("2009100", "Successful"), SUCCESS),
    ("success in 201", reply("2009300", "Successful", status=201), SUCCESS),
    ("success in 299", reply("2009300", "", status=299), SUCCESS),
    ("success as an integer", reply(2009300, "Successful"), SUCCESS),
    # 403xx00, 404xx04, 404xx19 (expired or cancelled already)
    ("expired transaction", reply("4039300", "Transaction Expired"), ALREADY),
    ("cancelled", reply("4049304", "Transaction Cancelled"), ALREADY),
    ("expired bill", reply("4049319", "Bill expired"), ALREADY),
    ("expired, other service", reply("4034700", "Transaction Expired"), ALREADY),
    ("cancelled, other service", reply("4044704", ""), ALREADY),
    ("expired bill, other service", reply("4044719", ""), ALREADY),
    # 404xx14 paid bill
    ("paid", reply("4049314", "Paid Bill"), refused(Reason.PAID)),
    ("paid, other service", reply("4042414", "Bill has been paid"), refused(Reason.PAID)),
    # 400xx00, 400xx01, 400xx02
    ("bad request", reply("4009300", "Bad Request"), refused(Reason.BAD_REQUEST)),
    ("invalid field", reply("4009301", "Invalid field format billnumber"), refused(Reason.INVALID_FIELD)),
    ("missing field", reply("4009302", "Missing mandatory field"), refused(Reason.INVALID_FIELD)),
    ("bad request, other service", reply("4004700", ""), refused(Reason.BAD_REQUEST)),
    ("invalid field, other service", reply("4004701", ""), refused(Reason.INVALID_FIELD)),
    ("missing field, other service", reply("4004702", ""), refused(Reason.INVALID_FIELD)),
    # 4049308 · 4039319
    ("invalid merchant", reply("4049308", "Invalid Merchant"), refused(Reason.INVALID_MERCHANT)),
    ("blacklisted", reply("4039319", "Merchant Blacklisted"), refused(Reason.MERCHANT_BLACKLISTED)),
    # 4049301 "not found"
    ("not found", reply("4049301", "QR not Found"), refused(Reason.NOT_FOUND)),
    ("not found, shouted", reply("4049301", "QR NOT FOUND"), refused(Reason.NOT_FOUND)),
    # 401xx01, 401xx03, or 401 whose message names the token
    ("invalid token", reply("4019301", "Invalid Token (B2B)"), TOKEN),
    ("token missing", reply("4019303", "Token Not Found (B2B)"), TOKEN),
    ("01 without a message", reply("4019301"), TOKEN),
    ("03 without a message", reply("4019303"), TOKEN),
    ("token, other service", reply("4017301", ""), TOKEN),
    ("00 that names the token", reply("4019300", "Unauthorized. Invalid Token"), TOKEN),
    ("00 that says the token expired", reply("4019300", "access token expired"), TOKEN),
    ("any 401 that names the token", reply("4019307", "TOKEN is not valid"), TOKEN),
    ("bare 401 that names the token", bare(401, b'{"responseMessage": "Token expired"}'), TOKEN),
    ("bare 401 in other words", bare(401, b'{"error": "invalid_token"}'), TOKEN),
    # any answer whose WWW-Authenticate has error="invalid_token"
    ("challenge", Reply(401, b"", None, 'Bearer error="invalid_token"'), TOKEN),
    ("challenge in full", Reply(401, HTML, None, 'Bearer realm="snap", error="invalid_token", scope="a"'), TOKEN),
    ("challenge without quotes", Reply(401, b"", None, "Bearer realm=snap,error=invalid_token"), TOKEN),
    ("challenge, shouted", Reply(401, b"", None, 'BEARER ERROR = "INVALID_TOKEN"'), TOKEN),
    ("challenge in single quotes", Reply(401, b"", None, "Bearer realm='a'; error='invalid_token'"), TOKEN),
    ("second challenge", Reply(401, b"", None, 'Basic realm="x", Bearer error="invalid_token"'), TOKEN),
    ("challenge in 403", Reply(403, b"", None, 'Bearer error="invalid_token"'), TOKEN),
    ("challenge in 500", Reply(500, b"oops", None, 'Bearer error="invalid_token"'), TOKEN),
    (
        "challenge beside a signature",
        reply("4019300", "Invalid Signature", challenge='Bearer error="invalid_token"'),
        TOKEN,
    ),
    ("challenge beside success", reply("2009300", "Successful", challenge='Bearer error="invalid_token"'), SUCCESS),
    ("other challenge", Reply(401, b"", None, 'Bearer realm="snap", error="insufficient_scope"'), SYSTEMIC),
    ("challenge that only tells of it", Reply(401, b"", None, 'Bearer error_description="invalid_token"'), SYSTEMIC),
    ("challenge with a longer word", Reply(401, b"", None, 'Bearer error="invalid_token_format"'), SYSTEMIC),
    # 4099300
    ("id clash of 91", reply("4099100", "Cannot use same X-EXTERNAL-ID in same day"), CLASH),
    ("id clash", reply("4099300", "Cannot use same X-EXTERNAL-ID in same day"), CLASH),
    # 429xx00, HTTP 429 without a code, 403xx04
    ("too many requests", reply("4299300", "Too Many Requests"), THROTTLED),
    ("too many requests, other service", reply("4294700", ""), THROTTLED),
    ("bare 429", bare(429), THROTTLED),
    ("bare 429 in HTML", bare(429, HTML), THROTTLED),
    ("limit exceeded", reply("4039304", "Activity Count Limit Exceeded"), THROTTLED),
    ("limit exceeded, other service", reply("4034704", ""), THROTTLED),
    # 403xx06
    ("not at this time", reply("4039306", "Feature Not Allowed At This Time"), LATER),
    ("not at this time, other service", reply("4034706", ""), LATER),
    ("not at this time in 200", reply("4039306", "", status=200), LATER),
    # 5009300, other 500xx.., 504xx00, 202xx00
    ("general error", reply("5009300", "General Error"), TRANSIENT),
    ("internal error", reply("5009301", "Internal Server Error"), TRANSIENT),
    ("external error", reply("5009302", "External Server Error"), TRANSIENT),
    ("general error, other service", reply("5004700", ""), TRANSIENT),
    ("gateway timeout", reply("5049300", "Timeout"), TRANSIENT),
    ("in progress", reply("2029300", "Request In Progress"), TRANSIENT),
    # anything without a well-formed code, whatever its status, except 401, 403 and 429
    ("empty 200", bare(200), TRANSIENT),
    ("empty 204", bare(204), TRANSIENT),
    ("HTML in 200", bare(200, HTML), TRANSIENT),
    ("HTML in 404", bare(404, HTML), TRANSIENT),
    ("HTML in 502", bare(502, HTML), TRANSIENT),
    ("JSON that says nothing", bare(200, b"{}"), TRANSIENT),
    ("JSON that is no object", bare(400, b"[]"), TRANSIENT),
    ("JSON null", bare(503, b"null"), TRANSIENT),
    ("bare 400", bare(400), TRANSIENT),
    ("bare 409", bare(409), TRANSIENT),
    ("bare 500", bare(500, b"oops"), TRANSIENT),
    ("bare 503", bare(503), TRANSIENT),
    ("short code", reply("20093", "Successful", status=200), TRANSIENT),
    ("long code", reply("20093000", "Successful", status=200), TRANSIENT),
    ("padded code", reply(" 2009300", "Successful", status=200), TRANSIENT),
    ("code with a newline", reply("2009300\n", "Successful", status=200), TRANSIENT),
    ("code in other digits", reply("２００９３００", "Successful", status=200), TRANSIENT),
    ("code as a float", reply(2009300.0, "Successful", status=200), TRANSIENT),
    ("code true", reply(True, "Successful", status=200), TRANSIENT),
    ("code in a list", reply(["2009300"], "Successful", status=200), TRANSIENT),
    ("only a message", bare(404, b'{"responseMessage": "QR not Found"}'), TRANSIENT),
    # 3xx; 2xx with an odd code; a success code in an HTTP error
    ("redirect", bare(302), TRANSIENT),
    ("redirect with a page", bare(301, HTML), TRANSIENT),
    ("3xx code", reply("3029300", "Found"), TRANSIENT),
    ("odd code", reply("2009301", "Successful"), TRANSIENT),
    ("other odd code", reply("2019300", "Created"), TRANSIENT),
    ("success of another service", reply("2004700", "Successful"), TRANSIENT),
    ("success code in 500", reply("2009300", "Successful", status=500), TRANSIENT),
    ("success code in 404", reply("2009300", "Successful", status=404), TRANSIENT),
    ("success code in 401", reply("2009100", "Successful", status=401), TRANSIENT),
    ("success code in 302", reply("2009300", "Successful", status=302), TRANSIENT),
    # read timeout, connection reset after sending; connection refused, DNS, TLS, connect timeout
    ("timeout", no_reply(sent=True), TRANSIENT),
    ("not sent", no_reply(sent=False), NOT_SENT),
    # our credentials or set-up
    ("invalid signature", reply("4019300", "Unauthorized. Invalid Signature"), SYSTEMIC),
    ("unknown client", reply("4019300", "Unauthorized. Unknown client"), SYSTEMIC),
    ("401xx00 without a message", reply("4019300"), SYSTEMIC),
    ("401xx00, other service", reply("4017300", "Unauthorized. Signature"), SYSTEMIC),
    ("forbidden API", reply("4049300", "Unauthorized. Client Forbidden Access API"), SYSTEMIC),
    ("unauthorized", reply("4049300", "UNAUTHORIZED"), SYSTEMIC),
    ("forbidden", reply("4049300", "forbidden"), SYSTEMIC),
    ("bad headers", reply("4049301", "Bad Request"), SYSTEMIC),
    ("bare 401", bare(401), SYSTEMIC),
    ("bare 401 in HTML", bare(401, HTML), SYSTEMIC),
    ("bare 403", bare(403), SYSTEMIC),
    ("bare 403 in HTML", bare(403, HTML), SYSTEMIC),
    # 4049301 with any other message
    ("01 without a message", reply("4049301"), refused(Reason.NOT_FOUND)),
    ("01 in other words", reply("4049301", "idQr tidak ditemukan"), refused(Reason.NOT_FOUND)),
    ("01 with a message of no text", reply("4049301", ["Bad Request"]), refused(Reason.NOT_FOUND)),
    # any other well-formed 4xx code
    ("other 404", reply("4049302", "?"), refused(Reason.REFUSED)),
    ("other 403", reply("4039318", "Inactive Card"), refused(Reason.REFUSED)),
    ("other 400", reply("4009303", "?"), refused(Reason.REFUSED)),
    ("other 405", reply("4059300", "Requested Function Is Not Supported"), refused(Reason.REFUSED)),
    ("forbidden API in other words", reply("4049300", "?"), refused(Reason.REFUSED)),
    # read leniently
    ("Latin-1", Reply(200, b'{"responseCode":"2009300","responseMessage":"Succ\xe8s"}'), SUCCESS),
    (
        "Latin-1, paid",
        Reply(404, b'{"responseCode":"4049314","responseMessage":"D\xe9j\xe0 pay\xe9"}'),
        refused(Reason.PAID),
    ),
    ("Windows-1252", Reply(200, b'{"responseCode":"2009300","responseMessage":"\x93Successful\x94"}'), SUCCESS),
    ("a line break", Reply(200, b'{"responseCode":"2009300","responseMessage":"Succ\ness\tful\r"}'), SUCCESS),
    ("NUL", Reply(404, b'{"responseCode":"4049314","responseMessage":"Paid\x00Bill"}'), refused(Reason.PAID)),
    ("a control character in another field", Reply(200, b'{"a":"\x01\x02","responseCode":"2009300"}'), SUCCESS),
    ("a byte-order mark", Reply(200, b'\xef\xbb\xbf{"responseCode":"2009300"}'), SUCCESS),
    ("UTF-16", Reply(200, '{"responseCode":"2009300"}'.encode("utf-16")), SUCCESS),
    ("blanks around", Reply(200, b' \r\n{"responseCode":"2009300"}\r\n\r\n'), SUCCESS),
    ("a broken byte in a name", Reply(200, b'{"not\xe9":1,"responseCode":"2009300"}'), SUCCESS),
    (
        "an escape that JSON does not have",
        Reply(200, b"""{"responseCode":"2009300","responseMessage":"it\\'s"}"""),
        SUCCESS,
    ),
    ("a path", Reply(404, b'{"x":"C:\\qris\\u1","responseCode":"4049314"}'), refused(Reason.PAID)),
    ("a NUL at the end", Reply(200, b'{"responseCode":"2009300"}\n\x00'), SUCCESS),
    ("an escape that hides an end", Reply(200, b'{"responseCode":"2009300","responseMessage":"\\"}'), TRANSIENT),
    (
        "two codes and an odd escape",
        Reply(200, b'{"responseCode":"2009300","responseCode":"5009300","x":"\\q"}'),
        TRANSIENT,
    ),
    ("two objects", Reply(200, b'{"responseCode":"2009300"}{"responseCode":"5009300"}'), TRANSIENT),
    ("cut after the code", Reply(200, b'{"responseCode":"2009300","responseMessage":"Succ'), TRANSIENT),
    ("only in a comment", Reply(200, b'<!-- {"responseCode":"2009300"} -->'), TRANSIENT),
    ("two codes", Reply(200, b'{"responseCode":"2009300","responseCode":"5009300"}'), TRANSIENT),
    ("another code inside", Reply(200, b'{"responseCode":"2009300","x":{"responseCode":"5009300"}}'), SUCCESS),
    ("inside another object", Reply(200, b'{"data":{"responseCode":"2009300"}}'), TRANSIENT),
    # the code is trusted over the HTTP status
    ("paid in 200", reply("4049314", "Paid Bill", status=200), refused(Reason.PAID)),
    ("not found in 500", reply("4049301", "QR not Found", status=500), refused(Reason.NOT_FOUND)),
    ("general error in 200", reply("5009300", "General Error", status=200), TRANSIENT),
    ("token in 403", reply("4019301", "Invalid Token (B2B)", status=403), TOKEN),
    ("bad request in 429", reply("4009300", "Bad Request", status=429), refused(Reason.BAD_REQUEST)),
    ("throttled in 200", reply("4299300", "", status=200), THROTTLED),
]


def in_words(rule: Rule) -> list[Reply]:
    """Answers made from the words of a row: each of its codes, with each of its phrases."""
    codes = [code.replace("x", "5").replace("*", "500") for code in rule.codes]
    return [
        bare(int(code), text.encode()) if rule in BARE_RULES else reply(code, text)
        for code in codes
        for text in (rule.phrases or ("-",))
    ]


@pytest.mark.parametrize("rule", [*RULES, *BARE_RULES], ids=lambda rule: " ".join((*rule.codes, *rule.phrases)))
def test_a_row_in_words(rule: Rule) -> None:
    """What a row says to people is what it does: answers made from its words are judged by it."""

    assert rule.means
    assert {meaning(judge(answer)) for answer in in_words(rule)} == {(rule.kind, rule.reason, rule.effect_unknown)}


STATUSES = st.integers(0, 999)
CODES = st.from_regex(r"[0-9]{7}", fullmatch=True) | st.sampled_from(["2009300", "2009100"]) | st.text(max_size=9)
BODIES = st.binary(max_size=120) | st.builds(
    lambda code, message: json.dumps({"responseCode": code, "responseMessage": message}).encode(),
    CODES | st.integers() | st.booleans() | st.none() | st.floats(),
    st.text(max_size=300) | st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2),
)
REPLIES = st.builds(
    Reply,
    STATUSES,
    BODIES,
    st.none() | st.text(max_size=10),
    st.none() | st.sampled_from(['Bearer error="invalid_token"', "Basic"]),
)


def meaning(verdict: Verdict) -> Meaning:
    """The part that the table decides."""
    return verdict.kind, verdict.reason, verdict.effect_unknown


@pytest.mark.parametrize(("answer", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_table(answer: Reply | NoReply, expected: Meaning) -> None:
    """Every answer of the description means what it says there."""

    assert meaning(judge(answer)) == expected


@given(REPLIES)
def test_judge_never_raises(answer: Reply) -> None:
    """Any answer gets a verdict whose reason belongs to its kind and whose text fits on one short line."""

    verdict = judge(answer)

    assert verdict.message.isprintable()
    assert len(verdict.message) <= MAX_MESSAGE
    match verdict.kind:
        case Kind.DONE:
            assert verdict.reason in REASONS[Status.EXPIRED]
        case Kind.REFUSED:
            assert verdict.reason in REASONS[Status.REJECTED]
        case _:
            assert verdict.reason is None
    assert not (verdict.effect_unknown and verdict.kind is not Kind.TRANSIENT)


@given(REPLIES)
def test_success_needs_both(answer: Reply) -> None:
    """An answer is a success if and only if the HTTP status is 2xx and the code is a success code."""

    code = read(answer.body)[0]

    succeeded = judge(answer).reason is Reason.SUCCESS

    assert succeeded == (200 <= answer.status < 300 and code in ("2009300", "2009100"))


@given(st.booleans(), st.text())
def test_no_answer(sent: bool, error: str) -> None:
    """Without an answer the effect is unknown exactly when the call may have been seen."""

    assert meaning(judge(NoReply(sent, error))) == (TRANSIENT if sent else NOT_SENT)


@given(st.from_regex(r"[2-5][0-9]{6}", fullmatch=True), st.text(max_size=20))
def test_integer_codes(code: str, message: str) -> None:
    """A code that is an integer means what its digits mean."""

    assert judge(reply(code, message)) == judge(reply(int(code), message))


@pytest.mark.parametrize("again", ["responseCode", "respons\\u0065Code"])
def test_an_answer_with_two_codes_has_none(again: str) -> None:
    """Whichever comes last, and however its name is written."""
    for first, second in (("2009300", "4049301"), ("4049301", "2009300")):
        body = f'{{"responseCode": "{first}", "{again}": "{second}"}}'.encode()

        assert read(body)[0] is None
        assert judge(Reply(200, body)).kind is Kind.TRANSIENT


@pytest.mark.parametrize(
    "body",
    [
        b'{"responseCode": ' + b"9" * 6_000 + b"}",
        b'{"responseCode": 1e999}',
        b"[" * 50_000,
        b'{"responseCode": "2009300"',
        b'{"responseCode": "2009300", "responseMessage": "\\ud800"}',
        "{}".encode("utf-16"),
        b"\xff\xfe",
        b"NaN",
    ],
    ids=["huge", "float", "deep", "cut", "surrogate", "utf-16", "mark", "nan"],
)
def test_hostile_bodies(body: bytes) -> None:
    """Bodies made to break a parser get a verdict."""

    judge(Reply(200, body)).message.encode("utf-8")


@given(STATUSES, BODIES, st.text(max_size=30))
def test_retry_after_travels(status: int, body: bytes, value: str) -> None:
    """A throttled verdict carries its Retry-After."""

    verdict = judge(Reply(status, body, value))

    assert verdict.kind is not Kind.THROTTLED or verdict.retry_after == value


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        (reply("2009300", "Successful"), False),
        (reply("4049301", "QR not Found"), False),
        (reply("2009100", "Successful"), True),
        (reply("2009300", "Successful", status=500), True),
        (reply("4049301", "QR not Found", status=500), True),
        (reply("5004700", "General Error"), True),
        (reply("5009100", "General Error"), False),
        (bare(502, HTML), False),
    ],
)
def test_notes(answer: Reply, worth: bool) -> None:
    """A code that disagrees with the status or names another service is worth a log line."""

    assert bool(judge(answer).note) == worth


@pytest.mark.parametrize(
    ("answer", "doubts"),
    [
        (bare(401), True),
        (bare(403), True),
        (bare(401, b'{"message":"Unauthorized"}'), True),
        (bare(401, b"Jwt is expired"), True),
        (bare(403, HTML), True),
        (reply("4019300", "Unauthorized. [Session expired]"), True),
        (reply("4019300", "Unauthorized. Invalid Signature"), True),
        (reply("4017300", "Unauthorized"), True),
        (reply("4049300", "Forbidden", status=403), True),
        (reply("4049300", "Forbidden"), False),
        (reply("4049301", "Bad Request"), False),
        (reply("4019301", "Access Token Invalid"), False),
        (reply("4039318", "Inactive Card"), False),
        (reply("4039306", "Not Allowed At This Time"), False),
        (reply("4039304", "Limit"), False),
        (bare(429), False),
        (bare(500), False),
        (reply("2009300", "Successful"), False),
        (no_reply(), False),
    ],
)
def test_refusals_that_leave_the_token_in_doubt(answer: Reply | NoReply, doubts: bool) -> None:
    """A systemic refusal by 401 or 403 may be a dead token that nobody names; token answers are certain."""

    assert judge(answer).doubts_token == doubts


def test_every_known_code_has_one_row() -> None:
    """A code's message in the table leads to the row that it stands in."""

    for rule in (SUCCESS_RULE, *RULES):
        for code, message in rule.known.items():
            assert rule_for(code, message) is rule
    assert len(verdict_table.KNOWN) == sum(len(rule.known) for rule in (SUCCESS_RULE, *RULES)) + 1


def test_text_of_a_page() -> None:
    """An answer without a code shows the beginning of its text on one line."""

    assert judge(bare(502, b"<html>\r\n  <body>\tBad\x00Gateway</body>")).message == "<html> <body> Bad Gateway</body>"


@pytest.mark.parametrize(
    ("message", "expected"), [("a\nb\x1b[31m", "a b [31m"), ("x" * 999, "x" * MAX_MESSAGE), (7, ""), (None, "")]
)
def test_messages_are_one_line(message: Any, expected: str) -> None:
    """The gateway's text can stand in a header and a log line, whatever it sent."""

    assert judge(reply("5009300", message)).message == expected
