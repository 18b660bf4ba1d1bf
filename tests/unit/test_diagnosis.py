"""What an answer says about our settings: each first-day mistake has its own words, and names what to change."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import no_reply, reply
from worker.core import diagnosis, verdict
from worker.core.diagnosis import CalledService, Way, clock, expire, other_ways, token
from worker.core.verdict import NoReply, Reply
from worker.settings import reference

Cases = dict[str, tuple[Reply | NoReply, str]]

BASE = "https://gateway.example/v1.0"
SERVICE = CalledService(f"{BASE}/qr/qr-mpm-expire-billnumber", "GATEWAY_EXPIRE_PATH", 0.4)
PAGE = b"<html><head><title>Request Rejected</title></head></html>"

OF_TOKENS: Cases = {
    "key": (reply("4017300", "Unauthorized. Invalid Signature"), "GATEWAY_PRIVATE_KEY_FILE"),
    "client": (reply("4017300", "Unauthorized. Unknown Client"), "GATEWAY_CLIENT_ID"),
    "client field": (reply("4007302", "Invalid Mandatory Field X-CLIENT-KEY"), "GATEWAY_CLIENT_ID"),
    "clock": (reply("4017300", "Unauthorized. X-TIMESTAMP Out Of Range"), "clock"),
    "timestamp": (reply("4007301", "Invalid Field Format X-TIMESTAMP"), "GATEWAY_TIMESTAMP_MILLISECONDS"),
    "forbidden": (reply("4037300", "Unauthorized. Client Forbidden Access API"), "ask the provider to enable"),
    "throttled": (reply("4297300", "Too Many Requests"), "GATEWAY_MAX_REQUESTS_PER_SECOND"),
    "theirs": (reply("5007300", "General Error"), "try again later"),
    "odd": (reply("4227300", "What"), "GATEWAY_CLIENT_ID"),
}
OF_EXPIRES: Cases = {
    "signature": (reply("4019300", "Unauthorized. Invalid Signature"), "does not take our signature"),
    "client": (reply("4019300", "Unauthorized. Unknown Client"), "GATEWAY_CLIENT_ID"),
    "clock": (reply("4019300", "Unauthorized. X-TIMESTAMP Out Of Range"), "clock"),
    "token": (reply("4019301", "Access Token Invalid"), "GATEWAY_BASE_URL"),
    "channel": (reply("4049301", "Bad Request"), "GATEWAY_CHANNEL_ID"),
    "channel field": (reply("4009302", "Invalid Mandatory Field CHANNEL-ID"), "GATEWAY_CHANNEL_ID"),
    "merchant": (reply("4049308", "Invalid Merchant"), "GATEWAY_MERCHANT_ID"),
    "merchant field": (reply("4009301", "Invalid field format merchantId"), "GATEWAY_MERCHANT_ID"),
    "bill field": (reply("4009302", "Invalid Mandatory Field billNumber"), "GATEWAY_BILL_FIELD"),
    "blacklisted": (reply("4039319", "Merchant Blacklisted"), "talk to the provider"),
    "forbidden": (reply("4049300", "Unauthorized. Client Forbidden Access API"), "ask the provider to enable"),
    "unauthorised": (reply("4049300", "Unauthorised"), "ask the provider to enable"),
    "same id": (reply("4099300", "Cannot use same X-EXTERNAL-ID in same day"), "try again"),
    "theirs": (reply("5009300", "General Error"), "try again later"),
    "odd": (reply("4229300", "What"), "ask the provider"),
}
OF_BOTH: Cases = {
    "allow-list": (Reply(403, PAGE), "IP allow-list"),
    "version": (Reply(404, PAGE), "must end with the version"),
    "not ours": (Reply(200, PAGE), "GATEWAY_BASE_URL"),
    "redirect": (Reply(301, b""), "a redirect"),
    "proxy": (Reply(407, PAGE), "HTTPS_PROXY"),
    "login": (Reply(401, b""), "GATEWAY_BASE_URL"),
    "https": (Reply(400, b"The plain HTTP request was sent to HTTPS port"), "begin GATEWAY_BASE_URL with https://"),
    "down": (Reply(502, PAGE), "try again later"),
    "json": (Reply(404, b'{"message":"no Route matched"}'), "must end with the version"),
    "teapot": (Reply(418, b""), "GATEWAY_EXPIRE_PATH"),
    "refused": (NoReply(False, "no connection to h:1: Connection refused"), "host and port in GATEWAY_BASE_URL"),
    "name": (NoReply(False, "no connection to h:1: Name or service not known"), "DNS"),
    "no way": (NoReply(False, "no connection to h:1: timed out"), "IP allow-list"),
    "plain": (NoReply(False, "no TLS with h:1: wrong version number"), "no TLS is spoken there"),
    "ca": (
        NoReply(False, "no TLS with h:1: certificate not trusted: unable to get local issuer certificate"),
        "GATEWAY_CA_FILE",
    ),
    "certificate's name": (
        NoReply(
            False, "no TLS with h:1: certificate not trusted: Hostname mismatch, certificate is not valid for 'h'."
        ),
        "another host name than the certificate",
    ),
    "silent": (no_reply(), "GATEWAY_READ_TIMEOUT_SECONDS"),
    "no http": (NoReply(True, "the answer is no HTTP: expected HTTP/"), "https://"),
    "hung up": (NoReply(True, "Connection reset by peer"), "hung up"),
}
FINE = {
    "expired": reply("2009300", "Successful"),
    "expired before": reply("4039300", "Transaction Expired"),
    "paid": reply("4049314", "Paid Bill"),
    "not found": reply("4049301", "QR not Found"),
}


@pytest.mark.parametrize("case", OF_TOKENS | OF_BOTH)
def test_token_service(case: str) -> None:
    """Each refusal of a token names its own cure."""

    answer, cure = (OF_TOKENS | OF_BOTH)[case]

    found = token(answer, SERVICE)

    assert cure in found.text
    assert not found.fine


@pytest.mark.parametrize("case", OF_EXPIRES | OF_BOTH)
def test_expire_service(case: str) -> None:
    """Each refusal of an expire names its own cure."""

    answer, cure = (OF_EXPIRES | OF_BOTH)[case]

    found = expire(answer, SERVICE)

    assert cure in found.text
    assert (found.fine, found.signature) == (False, case == "signature")


@pytest.mark.parametrize(
    ("sent", "error", "word"),
    [
        (False, "no TLS with h:1: tlsv1 unrecognized name", "does not know the host name"),
        (False, "no TLS with h:1: certificate not trusted: EE certificate key too weak", "not safe any more"),
        (
            False,
            "no TLS with h:1: certificate not trusted: CA signature digest algorithm too weak",
            "not safe any more",
        ),
        (False, "no TLS with h:1: tlsv1 alert internal error", "speaks TLS but refuses"),
        (True, "tlsv1 alert internal error", "speaks TLS but refuses"),
        (True, "more than 65536 bytes of headers", "larger than any"),
        (True, "an answer of more than 524288 bytes", "larger than any"),
        (False, "no connection to h:1: Too many open files", "ulimit -n"),
        (False, "no connection to h:1 through the proxy: it answers 502", "proxy finds no way"),
    ],
)
def test_silence_is_not_blamed_on_the_wrong_setting(sent: bool, error: str, word: str) -> None:
    """What the other side or the system says about it leads to the cure that helps."""

    assert word in token(NoReply(sent, error), SERVICE).cure
    assert "http://" not in token(NoReply(sent, error), SERVICE).cure


@pytest.mark.parametrize("case", FINE)
def test_answers_about_the_bill_are_fine(case: str) -> None:
    """An answer about the bill itself shows that all our settings are right."""

    found = expire(FINE[case], SERVICE)

    assert (found.fine, found.taken) == (True, True)


def test_mistakes_are_told_apart() -> None:
    """No two of the first-day mistakes get the same words."""
    apart = (
        "key",
        "client",
        "clock",
        "forbidden",
        "allow-list",
        "version",
        "ca",
        "certificate's name",
        "plain",
        "name",
    )

    told = [token((OF_TOKENS | OF_BOTH)[case][0], SERVICE).text.partition(" (")[0] for case in apart]
    told += [
        expire(OF_EXPIRES[case][0], SERVICE).text.partition(" (")[0] for case in ("signature", "channel", "merchant")
    ]

    assert len(set(told)) == len(told)


@pytest.mark.parametrize("judge", [token, expire])
def test_clock_that_is_off_is_no_wrong_signature(judge: object) -> None:
    """Where the Date header shows that our clock is far off, a refused signature is laid to it."""

    answer = reply("4019300", "Unauthorized. Invalid Signature")
    far, near = (
        CalledService(SERVICE.url, "GATEWAY_EXPIRE_PATH", -400.0),
        CalledService(SERVICE.url, "GATEWAY_EXPIRE_PATH", 20.0),
    )

    assert callable(judge)
    assert "our clock is -400 s off" in judge(answer, far).text
    assert not judge(answer, far).signature
    assert "clock" not in judge(answer, near).text


@pytest.mark.parametrize(("skew", "fine"), [(0.0, True), (30.0, True), (-30.1, False), (95.0, False)])
def test_clock_is_warned_of_above_half_a_minute(skew: float, fine: bool) -> None:
    """A clock that is more than 30 s off is worth a warning."""

    assert clock(skew).fine == fine


def test_success_needs_both() -> None:
    """A success code in an HTTP error is no proof that anything is right."""

    assert not expire(reply("2009300", "Successful", status=500), SERVICE).fine


def test_token_is_never_shown() -> None:
    """An answer that holds a token we cannot use is not quoted."""

    found = token(Reply(200, b'{"accessToken": "top secret"}'), SERVICE)

    assert "top secret" not in found.text


@given(
    st.builds(
        Reply,
        st.integers(100, 599),
        st.binary(max_size=80)
        | st.builds(
            lambda code, message: json.dumps({"responseCode": code, "responseMessage": message}).encode(),
            st.from_regex("[2-5][0-9]{6}", fullmatch=True),
            st.text(max_size=30),
        ),
    )
    | st.builds(NoReply, st.booleans(), st.text(max_size=30).filter(str.isprintable)),
    st.none() | st.floats(-1e6, 1e6),
)
def test_every_answer_has_its_line(answer: Reply | NoReply, skew: float | None) -> None:
    """Whatever comes, there is one line about it."""

    for judge in (token, expire):
        found = judge(answer, CalledService(SERVICE.url, "GATEWAY_EXPIRE_PATH", skew))
        assert found.text.isprintable()
        assert not (found.fine and found.signature)


def test_other_ways_to_sign() -> None:
    """The path with and without the version, each scheme; ours is not among them, our scheme comes first."""

    ours = Way("/qr/expire", "hmac-sha512")

    ways = list(other_ways(ours, BASE, "/qr/expire"))

    assert ways[0] == Way("/v1.0/qr/expire", "hmac-sha512")
    assert len(ways) == len(set(ways)) == 5
    assert ours not in ways


def test_settings_that_are_named_exist() -> None:
    """No finding sends anybody to a setting that there is not."""

    known = {variable for variable, _, _ in reference()}
    text = "".join(Path(module.__file__ or "").read_text() for module in (diagnosis, verdict))

    assert set(re.findall(r"GATEWAY_[A-Z_]+", text)) <= known
