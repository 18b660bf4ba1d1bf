"""Secrets are taken out of whatever comes back, in every form in which a server may repeat them."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.masking import masked

JWT = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJxcmlzIn0.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg"
SIGNATURE = "mZ1/8Bq+0fJ3nUu9T2iQvYt5xkW4sRcE7gHdLpOaNzKbXyM6wV1DjFhGtS8lPo2rAeIuCqQ5Zn9/Ym0TxBw3Kg=="
SHORT = 'p+ss/"w&rd'

FORMS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in JSON": lambda secret: json.dumps(secret)[1:-1],
    "in JSON, with the slash escaped": lambda secret: json.dumps(secret)[1:-1].replace("/", "\\/"),
    "in a URL": lambda secret: quote(secret, safe=""),
    "in a form": quote_plus,
    "in HTML": html.escape,
}
LONG_FORMS: dict[str, Callable[[str], str]] = {
    **FORMS,
    "in JSON, with + and = escaped": lambda secret: secret.replace("+", "\\u002b").replace("=", "\\u003d"),
    "in HTML, with all marks escaped": lambda secret: secret.replace("/", "&#x2F;").replace("+", "&#43;"),
    "cut off at its end": lambda secret: secret[:48],
}


@pytest.mark.parametrize("form", LONG_FORMS.values(), ids=LONG_FORMS.keys())
@pytest.mark.parametrize("secret", [JWT, SIGNATURE], ids=["token", "signature"])
def test_tokens_and_signatures_are_masked_in_every_form(form: Callable[[str], str], secret: str) -> None:
    """Nothing of it stays that anybody could use, and the text around it does."""
    text = f'Forbidden: "Authorization: Bearer {form(secret)}", request 17'.encode()

    found = masked(text, (secret,)).decode()

    assert not any(secret[at : at + 8] in found for at in range(len(secret) - 8))
    assert found.startswith('Forbidden: "Authorization: ')
    assert found.endswith(", request 17")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_short_secrets_are_masked_in_the_usual_forms(form: Callable[[str], str]) -> None:
    """A client secret has no run that no text holds, so its forms are looked for one by one."""

    assert masked(f"secret <{form(SHORT)}> is wrong".encode(), (SHORT,)) == b"secret <***> is wrong"


def test_a_secret_of_several_words_is_masked_whole() -> None:
    """Though one of its words alone gives it away."""
    secret = 'correct horse, "batterystaple1" x'

    for form in FORMS.values():
        assert masked(f"<{form(secret)}>".encode(), (secret,)) == b"<***>"


def test_a_code_beside_a_secret_stays_readable() -> None:
    """What is masked is the secret, and the answer is judged as before."""
    body = json.dumps({"responseCode": "4019300", "responseMessage": f"bad token {JWT}"}).encode()

    assert json.loads(masked(body, (JWT,))) == {"responseCode": "4019300", "responseMessage": "bad token ***"}


@pytest.mark.parametrize("quoted", ['"{}"', '{{"authorization":"Bearer {}"}}', "'{}'", "\\{}\\", '\\"{}\\"', "{}\n"])
@pytest.mark.parametrize("secret", [JWT, SIGNATURE, SHORT], ids=["token", "signature", "secret"])
def test_json_with_a_quoted_secret_stays_json(secret: str, quoted: str) -> None:
    """A backslash behind the secret belongs to the mark that follows: without it the code would be lost."""
    body = json.dumps({"responseCode": "4019301", "responseMessage": f"bad token {quoted.format(secret)}"})

    for text in (body, body.replace("/", "\\/")):
        found = json.loads(masked(text.encode(), (secret,)))
        assert found["responseCode"] == "4019301"
        assert secret not in found["responseMessage"]


def test_all_secrets_are_masked_wherever_they_stand() -> None:
    """Each of them, each time."""
    text = f"{JWT} {SIGNATURE} hush {JWT} hush".encode()

    assert masked(text, (JWT, SIGNATURE, "hush")) == b"*** *** *** *** ***"


@given(st.binary(max_size=200))
def test_text_without_a_secret_stays_as_it_is(text: bytes) -> None:
    """Byte by byte."""

    assert masked(text, (JWT, SIGNATURE, "", "abc")) == text


@given(st.text(min_size=4, max_size=60), st.binary(max_size=40), st.binary(max_size=40))
def test_no_secret_survives(secret: str, before: bytes, after: bytes) -> None:
    """Whatever it is made of, and whatever stands around it."""
    secret = secret.replace("*", "x").encode("utf-8", "replace").decode()

    assert secret.encode() not in masked(before + secret.encode() + after, (secret,))


@given(st.binary(min_size=64, max_size=64))
def test_no_signature_survives(digest: bytes) -> None:
    """Any HMAC, repeated in JSON by an encoder that escapes the slash."""
    signature = base64.b64encode(digest).decode()
    text = json.dumps({"responseMessage": f"X-SIGNATURE {signature} is wrong"}).replace("/", "\\/")

    assert json.loads(masked(text.encode(), (signature,)))["responseMessage"] == "X-SIGNATURE *** is wrong"


def test_a_long_page_takes_no_long_time() -> None:
    """A hostile page is one word of 64 KiB, or holds the secret thousands of times."""
    words = (b"x" * 32_000 + JWT.encode() + b"x" * 32_000, b"x" * 60_000 + b" " + JWT.encode(), JWT.encode() * 700)

    assert [masked(word, (JWT,)) for word in words] == [b"***", b"x" * 60_000 + b" ***", b"***"]
    assert masked(f"{JWT} ".encode() * 700, (JWT,)) == b"*** " * 700
