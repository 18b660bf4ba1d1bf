"""What a token answer may say, and what is said about it: never anything that could be a token."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core import diagnosis
from worker.core.grant import Grant, granted, judge_token, said
from worker.core.verdict import NoReply, Reply

SERVICE = diagnosis.CalledService("https://gateway.example/v1.0/access-token/b2b", "GATEWAY_TOKEN_PATH")


def answer(body: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ({"access_token": "hush"}, "accessToken is missing (its fields are access_token)"),
        ({"token": "hush", "expires": 900}, "accessToken is missing (its fields are token, expires)"),
        ({}, "accessToken is missing (it has no fields)"),
        ({"data": {"accessToken": "hush"}}, "accessToken is missing (its fields are data)"),
        ({"responseCode": "2007300", "jwt": "hush"}, "(its fields are responseCode, jwt)"),
        ({"hush" * 9: 1}, "(its fields are ***)"),
        ({f"f{number}": 1 for number in range(12)}, "f7 and 4 more)"),
        ({"accessToken": None}, "accessToken is missing"),
        ({"accessToken": 42}, "accessToken is no string"),
        ({"accessToken": ["hush"]}, "accessToken is no string"),
        ({"accessToken": ""}, "accessToken is empty"),
        ({"accessToken": "hush hush"}, "accessToken has a blank in it"),
        ({"accessToken": "hush\n"}, "accessToken has characters that no header can carry"),
        ({"accessToken": "h\u00fcsh"}, "accessToken has characters that no header can carry"),
        ({"accessToken": "hush" * 2000}, "accessToken has 8000 characters, more than 4096"),
        ("hush", "no JSON object"),
        (["hush"], "no JSON object"),
    ],
)
def test_the_rule_that_an_answer_breaks_is_named(body: object, rule: str) -> None:
    """Of a 2xx nothing else is reported: not by the verdict, not by the diagnosis."""
    reply = answer(body)

    told = (granted(reply, 0.0), judge_token(reply).message, diagnosis.token(reply, SERVICE).text)

    assert all(isinstance(text, str) and rule in text and "hush" not in text for text in told)


@pytest.mark.parametrize("text", [b"hush", b"", b"<html>hush</html>", b"accessToken=hush", b'{"accessToken":"hush'])
def test_a_2xx_that_is_no_json_is_not_quoted(text: bytes) -> None:
    """The whole body could be the token."""
    for told in (judge_token(Reply(200, text)).message, diagnosis.token(Reply(200, text), SERVICE).text):
        assert "HTTP 200" in told
        assert "hush" not in told


@pytest.mark.parametrize(
    "body",
    [{"accessToken": "hush"}, {"access_token": "hush"}, {"token": "hush"}, {"error": "x", "refreshToken": "hush"}],
)
@pytest.mark.parametrize("status", [302, 400, 401, 500])
def test_a_token_in_a_failure_is_not_quoted(body: object, status: int) -> None:
    """Whatever the field is called."""
    reply = answer(body, status)

    assert "hush" not in judge_token(reply).message + diagnosis.token(reply, SERVICE).text


def test_a_refusal_with_a_code_is_quoted() -> None:
    """Its words are what helps; a long opaque word among them is not."""
    reply = answer({"responseCode": "4017300", "responseMessage": f"Invalid Signature {'aB3' * 20}"}, 401)

    assert said(reply) == "Invalid Signature ***"
    assert "4017300 Invalid Signature ***" in diagnosis.token(reply, SERVICE).text


def test_a_2xx_with_a_refusal_in_it_tells_its_code_only() -> None:
    """A message in a 2xx may be anything."""
    reply = answer({"responseCode": "4017300", "responseMessage": "hush"})

    assert judge_token(reply).code == "4017300"
    assert "hush" not in judge_token(reply).message + diagnosis.token(reply, SERVICE).text


def test_a_token_is_in_no_representation() -> None:
    """A grant that is logged or printed by mistake does not show it."""

    assert "hush" not in repr(Grant("hush", 900.0))


TEXTS = st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS | st.just("hush-hush-1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)


@given(
    st.builds(lambda status, value: answer(value, status), st.integers(200, 299), VALUES)
    | st.builds(NoReply, st.booleans(), st.text(max_size=20).filter(str.isprintable))
)
def test_whatever_comes_is_told_on_one_line(reply: Reply | NoReply) -> None:
    """Without the value that could be a token."""
    message = judge_token(reply).message

    assert message.isprintable()
    assert "hush-hush-1" not in message
