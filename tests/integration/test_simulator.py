"""The simulated gateway over real HTTP: what it checks, what it can be made to do, what it reports.

The partner below signs with hashlib and cryptography directly: no side of the product vouches for itself.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import itertools
import json
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.waiting import wait_until
from worker.sandbox.simulator import Fault, Pattern, Rate, Script, ScriptError, Simulator, own_key
from worker.sandbox.simulator.checks import hmac_signed, rsa_signed, string_to_sign
from worker.sandbox.simulator.server import Server

SIGN_PATH = "/qr/qr-mpm-expire-billnumber"

# Known answers that other providers of the same standard published with their documentation.
HMAC_BODY = (
    b'{"partnerReferenceNo":"2020102900000000000001","amount":{"value":"12345678.00","currency":"IDR"},'
    b'"feeAmount":{"value":"12345678.00","currency":"IDR"},"merchantId":"00007100010926",'
    b'"terminalId":"213141251124","validityPeriod":"2009-07-03T12:08:56-07:00"}'
)
HMAC_SIGNATURE = "wmzT7yjg1SxxCsxNsFgCR9SYXiZGGbceF6fV8xe97sAMHxZ+7OEBMIBmvb6Sj6GcksGp3iv77DiomgSbcST3XQ=="
RSA_KEY = (
    "-----BEGIN PUBLIC KEY-----\n"
    "MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAlWbtlh3eM+bW3n5AFj42\n"
    "wddC4L7tQqbLiCFbTv8K67yng9iwK5mEn+UMXiRhvB2JVWFafCPPxFamsiVG3Mjn\n"
    "eGjC0BYgmpmw4qXnAnyO3nCdCuPtmZ3ljhKvSTPdWZxrcLi1Xa9V/+Pzb8hrjb5i\n"
    "wMn6SZFNeMmZYgFKiSeueo6TPln2PoTqXCzs1HtsM8eUVe8GAsjJe/3dYl992nyX\n"
    "OpG21GgNu8o5T3WOptPg6GdDTWkTWUu483yRbVVy04Pz4L8DDZTDv+WcsAViDn1r\n"
    "A/jB1Auj/UGKx2ovGcBH/a/hor5TbABbODU6cPTHT54K3sSZtvZNV4eFDB1f/4wd\n"
    "fwIDAQAB\n"
    "-----END PUBLIC KEY-----\n"
)
RSA_BODY = (
    b'{"createdTime":"2020-01-01T00:00:00+07:00","latestTransactionStatus":"00","originalReferen'
    b'ceNo":"gopayOrderId","finishedTime":"2020-01-02T00:00:00+07:00","originalPartnerReferenceN'
    b'o":"merchant-order-id","transactionStatusDesc":"desc","originalExternalId":"merchant-order'
    b'-id","additionalInfo":{"payOptionDetails":[{"payMethod":"GOPAY","payOption":"GOPAY_WALLET"'
    b'}],"fraudStatus":"accept","refundHistory":[{"refundNo":"96194816941239812","partnerReferen'
    b'ceNo":"239850918204981205970","refundAmount":{"value":"12345678.00","currency":"IDR"},"ref'
    b'undStatus":"00","refundDate":"2020-12-23T07:44:16+07:00","reason":"Customer Complain"}],"v'
    b'alidUpTo":"2021-01-01T00:00:00+07:00"}}'
)
RSA_SIGNATURE = (
    "eUGsomFLNsjWzehgGsa317MqcVOgscay/Hml8yNmOsFhmoBM7pso+UPDgSe34anXvecSQkf5NOr0fbr8k9qdyyoW"
    "iYX7DTq/Wnz8XC0cRCCbNZfyLIyF33HO9cnvxOcRQq9DuWlQtld+uEluuivVdN2TiaWLpUTmfB/H7noZnXWWDj6F"
    "Ya4n5kSo4o3aTeFYAF9EmLp0Tcsl8CiHSQCrQnIbB8M2+puLwyJ1l2OocvZ5qgjf5f2DqlCbemsSMzYzjN+YMrb0"
    "kiDx0TiW5UTk+WZass43xIfb3vdrlX+U2JSk5YsJ8lFpp9F+7FId4cyncElNFEbt3zWuP4iDzXteCg=="
)
JAKARTA = timezone(timedelta(hours=7))

WEB = requests.Session()  # for what is no partner's call
WEB.trust_env = False


def now(offset: float = 0.0, timespec: str = "milliseconds") -> str:
    return (datetime.now(JAKARTA) + timedelta(seconds=offset)).isoformat(timespec=timespec)


Stamp = str | Callable[[], str]  # a call, so that it is made when the test runs and not when it is collected


class Partner:
    """A partner of the gateway with one keep-alive session; every part of a call can be replaced."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.session = requests.Session()
        self.session.trust_env = False
        self.ids = itertools.count(1)
        self.bearer = ""

    def ask_token(self, *, timestamp: Stamp = now, **replaced: Any) -> requests.Response:
        timestamp = timestamp() if callable(timestamp) else timestamp
        client = replaced.pop("client", "demo-client")
        signed = own_key().sign(f"{client}|{timestamp}".encode(), padding.PKCS1v15(), hashes.SHA256())
        headers = {
            "Content-Type": "application/json",
            "X-CLIENT-KEY": client,
            "X-TIMESTAMP": timestamp,
            "X-SIGNATURE": base64.b64encode(signed).decode(),
        }
        return self._post("/access-token/b2b", {"grantType": "client_credentials"}, headers, replaced)

    def log_in(self) -> str:
        self.bearer = self.ask_token().json()["accessToken"]
        return self.bearer

    def expire(self, bill: str = "10092081", *, timestamp: Stamp = now, **replaced: Any) -> requests.Response:
        if not self.bearer:
            self.log_in()
        body = replaced.pop("body", {"billnumber": bill, "additionalInfo": {"merchantId": "121"}})
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        timestamp = timestamp() if callable(timestamp) else timestamp
        token = replaced.pop("token", self.bearer)
        sign_path = replaced.pop("sign_path", SIGN_PATH)
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {token}",
            "X-TIMESTAMP": timestamp,
            "X-PARTNER-ID": "demo-client",
            "CHANNEL-ID": "95051",
            "X-EXTERNAL-ID": str(next(self.ids)).zfill(36),
            "X-SIGNATURE": self._signature(sign_path, token, content, timestamp),
        }
        return self._post(SIGN_PATH, content, headers, replaced)

    def code(self, bill: str = "10092081", **replaced: Any) -> str:
        return str(self.expire(bill, **replaced).json()["responseCode"])

    def _signature(self, path: str, token: str, body: bytes, timestamp: str) -> str:
        scheme = self.simulator.registration.signature
        digest = hashlib.sha256(body).hexdigest()
        middle = digest if scheme == "rsa-sha256-no-token" else f"{token}:{digest}"
        message = f"POST:{path}:{middle}:{timestamp}".encode()
        if scheme == "hmac-sha512":
            return base64.b64encode(hmac.new(b"demo-secret", message, hashlib.sha512).digest()).decode()
        return base64.b64encode(own_key().sign(message, padding.PKCS1v15(), hashes.SHA256())).decode()

    def _post(self, path: str, body: Any, headers: dict[str, str], replaced: dict[str, Any]) -> requests.Response:
        timeout = replaced.pop("timeout", 30)
        content = replaced.pop("content", body if isinstance(body, bytes) else json.dumps(body).encode())
        for name in replaced.pop("without", ()):
            del headers[name]
        headers |= replaced.pop("headers", {})
        assert not replaced
        url = self.simulator.base_url + path
        return self.session.post(url, data=content, headers=headers, timeout=timeout)


@contextmanager
def gateway(script: Script | None = None, **options: Any) -> Iterator[tuple[Simulator, Partner]]:
    with Simulator(script or Script(), **options) as simulator:
        yield simulator, Partner(simulator)


@pytest.fixture
def partner() -> Iterator[Partner]:
    with gateway() as (_, partner):
        yield partner


# The token service.


def test_a_correct_token_call_gets_a_bearer_token(partner: Partner) -> None:
    """The answer has the standard's fields, the lifetime as text."""

    answer = partner.ask_token()

    assert answer.status_code == 200
    fields = answer.json()
    assert fields["accessToken"]
    assert (fields["responseCode"], fields["tokenType"], fields["expiresIn"]) == ("2007300", "Bearer", "900")


@pytest.mark.parametrize(
    ("replaced", "status", "code"),
    [
        ({"client": "stranger"}, 401, "4017300"),
        ({"headers": {"X-SIGNATURE": base64.b64encode(b"\0" * 256).decode()}}, 401, "4017300"),
        ({"headers": {"X-SIGNATURE": "no base64"}}, 401, "4017300"),
        ({"timestamp": lambda: now(-1000)}, 401, "4017300"),
        ({"timestamp": "22/11/2026 10:00"}, 400, "4007301"),
        ({"without": ["X-CLIENT-KEY"]}, 400, "4007302"),
        ({"content": b'{"grantType":"password"}'}, 400, "4007301"),
        ({"content": b"grantType=client_credentials"}, 400, "4007300"),
    ],
)
def test_a_wrong_token_call_is_refused(partner: Partner, replaced: dict[str, Any], status: int, code: str) -> None:
    """Client, signature, timestamp, headers and body are all checked."""

    answer = partner.ask_token(**replaced)

    assert (answer.status_code, answer.json()["responseCode"]) == (status, code)


@pytest.mark.parametrize(
    ("form", "expected"), [("int", 60), ("string", "60"), ("absent", None), ("datetime", r"T.*\+07:00$")]
)
def test_a_lifetime_comes_in_every_form_seen(form: str, expected: Any) -> None:
    """`expires_in` chooses the form of expiresIn."""

    with gateway(Script(expires_in=form, token_lifetime=60)) as (_, partner):
        told = partner.ask_token().json().get("expiresIn")

    assert re.search(expected, told) if form == "datetime" else told == expected


def test_token_faults_follow_their_list(partner: Partner) -> None:
    """One fault per correct call of the token service, then normal."""

    partner.simulator.replace(Script(token_faults=(Fault(code="5007300"), Fault(html=502))))

    assert [partner.ask_token().status_code for _ in range(3)] == [500, 502, 200]


def test_a_token_dies_with_its_lifetime() -> None:
    """After `token_lifetime` seconds, the answer is 4019301."""

    with gateway(Script(token_lifetime=0.05)) as (_, partner):
        partner.log_in()
        refused = wait_until(lambda: partner.code() == "4019301", 30, "the token to die")

    assert refused


@pytest.mark.parametrize(("single", "code"), [(True, "4019301"), (False, "2009300")])
def test_a_new_token_kills_the_old_one_if_told_to(single: bool, code: str) -> None:
    """`single_token` decides whether two tokens live side by side."""

    with gateway(Script(single_token=single)) as (_, partner):
        old = partner.log_in()
        partner.log_in()

        assert partner.code(token=old) == code


def test_tokens_die_after_every_n_calls() -> None:
    """`kill_token_every` 2: two calls pass, the third is refused, and a new token serves two more."""

    with gateway(Script(kill_token_every=2)) as (_, partner):
        before = [partner.code() for _ in range(3)]
        partner.log_in()
        after = [partner.code() for _ in range(3)]

    assert before == after == ["2009300", "2009300", "4019301"]


# The checks of an expire call.


def test_a_correct_expire_call_succeeds(partner: Partner) -> None:
    """The answer is the document's, with a Date header."""

    answer = partner.expire("1")

    assert answer.status_code == 200
    assert answer.json() == {"responseCode": "2009300", "responseMessage": "Successful"}
    assert parsedate_to_datetime(answer.headers["Date"]).timestamp() == pytest.approx(time.time(), abs=5)


def test_a_connection_is_kept(partner: Partner) -> None:
    """Answers, refusals and pages leave the connection open for the next request."""

    link = http.client.HTTPConnection("127.0.0.1", partner.simulator.port, timeout=30)
    link.connect()
    first = link.sock
    for path in ("/v1.0/access-token/b2b", "/v1.0" + SIGN_PATH, "/nowhere"):
        link.request("POST", path, b"{}")
        link.getresponse().read()
        assert link.sock is first
    link.close()


@pytest.mark.parametrize("scheme", ["hmac-sha512", "rsa-sha256", "rsa-sha256-no-token"])
def test_every_scheme_tells_right_from_wrong(scheme: str) -> None:
    """The signature covers path, token, body bytes and timestamp."""

    with gateway(signature=scheme) as (simulator, partner):
        assert partner.code() == "2009300"
        assert partner.code(sign_path="/v1.0" + SIGN_PATH) == "4019300"
        assert partner.code(headers={"X-TIMESTAMP": now(5)}) == "4019300"
        reordered = b'{"additionalInfo":{"merchantId":"121"},"billnumber":"1"}'
        assert partner.code(content=reordered) == "4019300"
        assert simulator.report().signature_failures == 3


def test_a_published_hmac_is_right() -> None:
    """The HMAC check agrees with a known answer, not only with itself."""

    path, stamp = "/v1.0/qr/qr-mpm-generate", "2024-03-05T10:37:16.196Z"
    message = string_to_sign("hmac-sha512", path, "myaccesstoken", HMAC_BODY, stamp)

    assert hmac_signed(b"myclientsecret", message, HMAC_SIGNATURE)
    assert not hmac_signed(b"myclientsecre", message, HMAC_SIGNATURE)


def test_a_published_rsa_signature_is_right() -> None:
    """The RSA check without token agrees with a known answer."""

    key = serialization.load_pem_public_key(RSA_KEY.encode())
    assert isinstance(key, rsa.RSAPublicKey)
    message = string_to_sign("rsa-sha256-no-token", "/v1.0/debit/notify", "", RSA_BODY, "2024-03-05T10:37:16.196Z")

    assert rsa_signed(key, message, RSA_SIGNATURE)
    assert not rsa_signed(key, message + b" ", RSA_SIGNATURE)


@pytest.mark.parametrize(
    ("replaced", "status", "code"),
    [
        ({"token": "unknown"}, 401, "4019301"),
        ({"without": ["Authorization"]}, 401, "4019301"),
        ({"headers": {"X-SIGNATURE": "AAAA"}}, 401, "4019300"),
        ({"headers": {"X-SIGNATURE": "caf\u00e9"}}, 401, "4019300"),
        ({"headers": {"X-PARTNER-ID": "stranger"}}, 401, "4019300"),
        ({"timestamp": lambda: now(-1000)}, 401, "4019300"),
        ({"timestamp": lambda: now(1000)}, 401, "4019300"),
        ({"timestamp": "2026-11-22 10:00:00"}, 404, "4049301"),
        ({"timestamp": "2026-13-22T10:00:00+07:00"}, 404, "4049301"),
        ({"without": ["X-TIMESTAMP"]}, 404, "4049301"),
        ({"without": ["X-SIGNATURE"]}, 404, "4049301"),
        ({"without": ["X-PARTNER-ID"]}, 404, "4049301"),
        ({"without": ["X-EXTERNAL-ID"]}, 404, "4049301"),
        ({"without": ["CHANNEL-ID"]}, 404, "4049301"),
        ({"headers": {"CHANNEL-ID": "1"}}, 404, "4049301"),
        ({"headers": {"X-CHANNEL-ID": "1"}}, 404, "4049301"),
        ({"headers": {"X-EXTERNAL-ID": "12ab"}}, 404, "4049301"),
        ({"headers": {"X-EXTERNAL-ID": "1" * 37}}, 404, "4049301"),
        ({"headers": {"Content-Type": "text/plain"}}, 404, "4049301"),
    ],
)
def test_a_wrong_header_is_refused(partner: Partner, replaced: dict[str, Any], status: int, code: str) -> None:
    """Each header of an expire call is checked, in presence, form and value."""

    answer = partner.expire(**replaced)

    assert (answer.status_code, answer.json()["responseCode"]) == (status, code)
    assert "Date" in answer.headers
    assert partner.simulator.report().bills_expired == 0


@pytest.mark.parametrize(
    "replaced",
    [
        {"timestamp": lambda: now(timespec="seconds")},
        {"timestamp": lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")},
        {"without": ["CHANNEL-ID"], "headers": {"X-CHANNEL-ID": "95051"}},
        {"headers": {"X-CHANNEL-ID": "95051"}},
        {"headers": {"Content-Type": "application/json; charset=utf-8"}},
        {"body": {"billNumber": "1", "additionalInfo": {"merchantId": "121"}}},
        {"body": b' {"billnumber" : "1",\n "additionalInfo": {"merchantId": "121"}} '},
    ],
)
def test_every_documented_form_is_accepted(partner: Partner, replaced: dict[str, Any]) -> None:
    """The document contradicts itself; the simulator takes all of its forms."""

    assert partner.code(**replaced) == "2009300"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"additionalInfo": {"merchantId": "121"}}, "billnumber"),
        ({"billnumber": 10092081, "additionalInfo": {"merchantId": "121"}}, "billnumber"),
        ({"billnumber": "1", "billNumber": "2", "additionalInfo": {"merchantId": "121"}}, "billnumber"),
        ({"billnumber": "1"}, "additionalInfo"),
        ({"billnumber": "1", "additionalInfo": {}}, "merchantId"),
        (["billnumber"], "body"),
        (b"{", "body"),
        (b"\xff", "body"),
    ],
)
def test_a_wrong_field_is_named(partner: Partner, body: Any, field: str) -> None:
    """4009301 says which field of the body it is about."""

    answer = partner.expire(body=body)

    assert answer.status_code == 400
    assert answer.json() == {"responseCode": "4009301", "responseMessage": f"Invalid field format {field}"}


def test_an_external_id_serves_once_a_day() -> None:
    """The second use is 4099300 with HTTP 409; leading zeros count; a new day in Jakarta begins afresh."""

    midnight = datetime.now(JAKARTA).replace(hour=23, minute=59, second=30)
    before = (midnight - datetime.now(JAKARTA)).total_seconds()
    with gateway(Script(clock_offset=before, skew=1e6)) as (simulator, partner):
        assert partner.code(headers={"X-EXTERNAL-ID": "0042"}) == "2009300"
        again = partner.expire(headers={"X-EXTERNAL-ID": "0042"})
        assert (again.status_code, again.json()["responseCode"]) == (409, "4099300")
        assert partner.code(headers={"X-EXTERNAL-ID": "42"}) == "2009300"
        simulator.replace(Script(clock_offset=before + 60, skew=1e6))
        assert partner.code(headers={"X-EXTERNAL-ID": "0042"}) == "2009300"

        assert simulator.report().duplicates == 1


def test_the_clock_can_be_off() -> None:
    """`clock_offset` moves the Date header and the skew check."""

    with gateway(Script(clock_offset=3600)) as (_, partner):
        refused = partner.ask_token()
        accepted = partner.ask_token(timestamp=now(3600))

    ahead = parsedate_to_datetime(refused.headers["Date"]).timestamp() - time.time()
    assert ahead == pytest.approx(3600, abs=5)
    assert (refused.status_code, accepted.status_code) == (401, 200)


def test_an_unknown_path_is_a_plain_page(partner: Partner) -> None:
    """404 in HTML, as a proxy in front of the gateway would answer; a wrong method is 405."""

    answer = WEB.post(partner.simulator.base_url + "/qr/qr-mpm-expire", data=b"{}", timeout=30)

    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "text/html")
    assert WEB.get(partner.simulator.base_url + SIGN_PATH, timeout=30).status_code == 405


# Faults.


def test_a_bill_follows_its_list(partner: Partner) -> None:
    """One fault per call, `{}` is success, normal after the end; other bills are not concerned."""

    script = {"bills": {"B1": [{"code": "5009300"}, {}, {"code": "4039319", "http": 200}]}}
    partner.simulator.replace(Script.parse(script))

    answers = [partner.expire("B1") for _ in range(4)]

    assert [a.json()["responseCode"] for a in answers] == ["5009300", "2009300", "4039319", "2009300"]
    assert [a.status_code for a in answers] == [500, 200, 200, 200]
    assert answers[2].json()["responseMessage"] == "Merchant Blacklisted"
    assert partner.code("B2") == "2009300"


def test_a_refused_call_uses_up_no_fault(partner: Partner) -> None:
    """The checks come first: a wrong signature gets its refusal, the fault waits."""

    partner.simulator.replace(Script(bills={"B1": (Fault(code="5009300"),)}))

    codes = [partner.code("B1", headers={"X-SIGNATURE": "AAAA"}), partner.code("B1")]

    assert codes == ["4019300", "5009300"]


def test_a_repeated_fault_stays(partner: Partner) -> None:
    """`repeat` keeps the last entry of a list for ever."""

    partner.simulator.replace(Script(bills={"B1": (Fault(), Fault(code="5009300", repeat=True))}))

    assert [partner.code("B1") for _ in range(4)] == ["2009300", "5009300", "5009300", "5009300"]


def test_a_pattern_counts_for_each_bill(partner: Partner) -> None:
    """Every bill that fits starts at the first fault; a bill with a list of its own is not concerned."""

    pattern = Pattern("^BAD", (Fault(code="4049308"),))
    partner.simulator.replace(Script(patterns=(pattern,), bills={"BAD3": ()}))

    codes = [partner.code(bill) for bill in ("BAD1", "BAD2", "BAD1", "BAD3", "GOOD")]

    assert codes == ["4049308", "4049308", "2009300", "2009300", "2009300"]


def test_chance_is_repeatable() -> None:
    """Faults by rate depend on seed and external id alone."""

    def hit(seed: int) -> list[bool]:
        with gateway(Script(rates=(Rate(0.3, Fault(code="5009300")),), seed=seed)) as (_, partner):
            return [partner.code() == "5009300" for _ in range(60)]

    assert hit(1) == hit(1) != hit(2)
    assert 5 < sum(hit(1)) < 35


def test_a_page_instead_of_json(partner: Partner) -> None:
    """`html` answers with that status and a page."""

    partner.simulator.replace(Script(bills={"B1": (Fault(html=503, retry_after="7"),)}))

    answer = partner.expire("B1")

    assert (answer.status_code, answer.headers["Content-Type"]) == (503, "text/html")
    assert answer.text.startswith("<html>")
    assert answer.headers["Retry-After"] == "7"


def test_any_body(partner: Partner) -> None:
    """`body` answers with exactly these bytes, and the bill counts as expired only if `applied` says so."""

    odd = '{"responseCode":2009300}'
    partner.simulator.replace(Script(bills={"B1": (Fault(body=""), Fault(body=odd, http=202, applied=True))}))

    empty, number = partner.expire("B1"), partner.expire("B1")

    assert (empty.status_code, empty.content) == (200, b"")
    assert (number.status_code, number.text) == (202, odd)
    assert partner.simulator.report().bills_expired == 1


@pytest.mark.parametrize(("when", "expired"), [("before", 0), ("after", 1)])
def test_a_reset_is_one(partner: Partner, when: str, expired: int) -> None:
    """The peer sees a reset, not an end; `after` has expired the bill, `before` not even used up the id."""

    partner.log_in()
    partner.simulator.replace(Script(bills={"B1": (Fault(reset=when),)}))

    with pytest.raises(requests.ConnectionError, match="reset by peer"):
        partner.expire("B1", headers={"X-EXTERNAL-ID": "7"})

    assert partner.simulator.report().bills_expired == expired
    again = "4099300" if expired else "2009300"
    assert partner.code("B1", headers={"X-EXTERNAL-ID": "7"}) == again


def test_a_hang_ends_without_an_answer(partner: Partner) -> None:
    """`hang` closes the connection after its seconds; nothing took effect."""

    partner.log_in()
    partner.simulator.replace(Script(bills={"B1": (Fault(hang=0.1),)}))

    started = time.monotonic()
    with pytest.raises(requests.ConnectionError, match="without response"):
        partner.expire("B1")

    assert time.monotonic() - started >= 0.1
    assert partner.simulator.report().bills_expired == 0


def test_a_call_given_up_is_not_in_flight(partner: Partner) -> None:
    """When the client of a hanging call has gone, the call no longer counts."""

    partner.log_in()
    partner.simulator.replace(Script(bills={"B1": (Fault(hang=60),)}))

    with pytest.raises(requests.ReadTimeout):
        partner.expire("B1", timeout=0.05)

    partner.session.close()

    def seen() -> tuple[int, int]:
        report = partner.simulator.report()
        return report.by_code.get("hang", 0), report.in_flight

    wait_until(lambda: seen() == (1, 0), 30, "the call to arrive and be given up")


def test_an_answer_can_be_late(partner: Partner) -> None:
    """A call with `latency` has taken effect although its client gave up."""

    partner.log_in()
    partner.simulator.replace(Script(bills={"B1": (Fault(latency=60),)}))

    with pytest.raises(requests.ReadTimeout):
        partner.expire("B1", timeout=0.05)

    wait_until(lambda: partner.simulator.report().bills_expired == 1, 30, "the call to take effect")


def test_an_answer_can_trickle(partner: Partner) -> None:
    """With `trickle`, no wait for a byte is long, but the whole answer is."""

    patience = 3.0  # for a byte; a hundred times what each needs
    partner.log_in()
    partner.simulator.replace(Script(bills={"B1": (Fault(trickle=0.03),)}))

    started = time.monotonic()
    assert partner.expire("B1", timeout=patience).status_code == 200

    assert time.monotonic() - started > patience


def test_a_connection_can_be_closed(partner: Partner) -> None:
    """`close` announces the end of the connection."""

    partner.simulator.replace(Script(bills={"B1": (Fault(close=True),)}))

    assert partner.expire("B1").headers["Connection"] == "close"
    assert partner.code("B1") == "2009300"


def test_down_resets_all_but_the_simulator_itself(partner: Partner) -> None:
    """`down` resets kept and new connections; its own pages still answer, to end it."""

    partner.expire()
    root = partner.simulator.base_url.removesuffix("/v1.0")
    WEB.post(f"{root}/_simulator/script", json={"down": True}, timeout=30).raise_for_status()

    for _ in range(2):
        with pytest.raises(requests.ConnectionError):
            partner.expire()

    WEB.post(f"{root}/_simulator/script", json={}, timeout=30).raise_for_status()
    assert partner.code() == "2009300"
    assert partner.simulator.report().turned_away == 2


def test_stopped_it_refuses_and_started_it_remembers(partner: Partner) -> None:
    """`stop` also ends kept connections; `start` takes the same port and the same token."""

    partner.expire("1")
    address = partner.simulator.base_url
    partner.simulator.stop()
    with pytest.raises(requests.ConnectionError):
        partner.expire("2")

    partner.simulator.start()

    assert partner.simulator.base_url == address
    assert partner.code("2") == "2009300"


def test_stopping_ends_calls_in_flight(partner: Partner) -> None:
    """A simulator in the middle of a hang stops at once."""

    partner.log_in()
    partner.simulator.replace(Script(latency=60))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(partner.expire, timeout=30)
        wait_until(lambda: partner.simulator.report().in_flight, 30, "the call to arrive")
        partner.simulator.stop()
        assert isinstance(call.exception(timeout=30), requests.ConnectionError)


def test_too_many_calls_are_throttled() -> None:
    """More than `requests_per_second` get 4299300 and Retry-After; they use up neither id nor room."""

    with gateway(Script(requests_per_second=0.001)) as (simulator, partner):
        answers = [partner.expire(headers={"X-EXTERNAL-ID": str(at)}) for at in range(3)]

        assert [answer.status_code for answer in answers] == [200, 429, 429]
        assert answers[1].json()["responseCode"] == "4299300"
        assert 900 <= int(answers[1].headers["Retry-After"]) <= 1000
        simulator.replace(Script())
        assert partner.code(headers={"X-EXTERNAL-ID": "1"}) == "2009300"
        assert simulator.report().throttled == 2


def test_an_expired_bill_can_be_told_apart() -> None:
    """By default a bill expires again and again; `already` gives the second call its own code."""

    with gateway() as (simulator, partner):
        assert [partner.code("1"), partner.code("1")] == ["2009300", "2009300"]
        simulator.replace(Script(already="4039300"))
        again = partner.expire("1")
        assert (again.status_code, again.json()["responseCode"]) == (403, "4039300")
        assert simulator.report().bills_expired == 1


# Scripts.


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ([], "script: wanted an object, found list"),
        ({"bill": {}}, "script: unknown key 'bill'"),
        ({"bills": {"B1": [{"codes": "5009300"}]}}, r"script\.bills\.B1\[0\]: unknown key 'codes'"),
        ({"bills": {"B1": [{"code": 5009300}]}}, r"bills\.B1\[0\]\.code: wanted text, found number"),
        ({"bills": {"B1": [{"code": "500"}]}}, "7 digits"),
        ({"bills": {"B1": [{"code": "5009300", "html": 500}]}}, "code and html"),
        ({"bills": {"B1": [{"repeat": True}, {}]}}, "nothing comes after"),
        ({"bills": {"B1": [{"latency": -1}]}}, "negative"),
        ({"bills": {"B1": [{"latency": True}]}}, "wanted a number, found true or false"),
        ({"bills": {"B1": [{"reset": "now"}]}}, "'before' or 'after'"),
        ({"bills": {"B1": [{"retry_after": "1\r\nX: y"}]}}, "printable"),
        ({"patterns": [{"match": "(", "faults": []}]}, "no regular expression"),
        ({"patterns": [{"match": "x"}]}, r"patterns\[0\]: faults is missing"),
        ({"rates": [{"share": 0.6, "fault": {}}, {"share": 0.6, "fault": {}}]}, "more than 1"),
        ({"expires_in": "soon"}, "expires_in is one of"),
        ({"already": "gone"}, "7 digits"),
    ],
)
def test_a_wrong_script_is_refused_in_one_line(raw: Any, complaint: str) -> None:
    """The error says where and what; unknown keys are errors."""

    with pytest.raises(ScriptError, match=complaint) as refusal:
        Script.parse(raw)

    assert "\n" not in str(refusal.value)


def test_a_wrong_script_over_http_changes_nothing(partner: Partner) -> None:
    """POST /_simulator/script answers 400 with the reason, and the old script goes on."""

    partner.simulator.replace(Script(bills={"B1": (Fault(code="5009300", repeat=True),)}))
    root = partner.simulator.base_url.removesuffix("/v1.0")

    refused = WEB.post(f"{root}/_simulator/script", json={"bils": {}}, timeout=30)

    assert (refused.status_code, "bils" in refused.json()["error"]) == (400, True)
    assert WEB.post(f"{root}/_simulator/script", data=b"{", timeout=30).status_code == 400
    assert partner.code("B1") == "5009300"


# What it reports.


def test_the_report_adds_up() -> None:
    """Calls, codes, bills and times are counted, with the latest calls in order."""

    with gateway(Script(bills={"B1": (Fault(code="5009300"), Fault(reset="after"))}), keep_calls=2) as (
        simulator,
        partner,
    ):
        partner.expire("B1")
        with pytest.raises(requests.ConnectionError):
            partner.expire("B1")
        partner.expire("B2")
        report = simulator.report()

    assert (report.expire_calls, report.token_calls) == (3, 1)
    assert report.by_code == {"2009300": 1, "5009300": 1, "reset after": 1}
    assert report.token_by_code == {"2007300": 1}
    assert (sum(report.by_code.values()), sum(report.token_by_code.values())) == (
        report.expire_calls,
        report.token_calls,
    )
    assert report.calls_by_bill == {"B1": 2, "B2": 1}
    assert (report.bills_called, report.bills_expired) == (2, 2)
    assert [(call.billnumber, call.answer) for call in report.calls] == [
        ("B1", "reset after"),
        ("B2", "2009300"),
    ]
    assert report.first_call_at is not None
    assert report.last_call_at is not None
    assert report.first_call_at <= report.last_call_at <= time.time()


def test_a_call_is_stamped_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the simulator finds time to read it."""

    accept, late = Server.process_request, 1.0

    def slowly(server: Server, request: Any, address: Any) -> None:
        time.sleep(late)  # the call lies in the socket meanwhile
        accept(server, request, address)

    with gateway() as (simulator, partner):
        partner.expire("B1")
        monkeypatch.setattr(Server, "process_request", slowly)
        partner.session.close()
        began = time.time()
        partner.expire("B2")
        call = simulator.report().calls[-1]

    assert began <= call.at < began + late


def test_the_report_over_http(partner: Partner) -> None:
    """GET /_simulator/report is JSON; the bills are in it when asked for."""

    partner.expire("B1")
    root = partner.simulator.base_url.removesuffix("/v1.0")

    plain = WEB.get(f"{root}/_simulator/report", timeout=30).json()
    full = WEB.get(f"{root}/_simulator/report?bills=1&calls=1", timeout=30).json()

    assert plain["expire_calls"] == 1
    assert "calls_by_bill" not in plain
    assert full["calls_by_bill"] == {"B1": 1}
    assert full["calls"][0]["merchant_id"] == "121"
    assert WEB.get(f"{root}/_simulator/health", timeout=30).json() == {"status": "ok"}


def test_concurrency_is_measured() -> None:
    """Calls that overlap are seen to overlap, and none of them is lost."""

    with gateway() as (simulator, partner):
        partner.log_in()
        simulator.replace(Script(latency=2.5))
        barrier = threading.Barrier(8)

        def call(at: int) -> str:
            own = Partner(simulator)
            own.bearer = partner.bearer
            barrier.wait()
            return own.code(str(at), headers={"X-EXTERNAL-ID": str(at)})

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(call, range(8))) == {"2009300"}

        report = simulator.report()
        assert (report.bills_expired, report.max_concurrency, report.in_flight) == (8, 8, 0)
        assert 1 <= report.peak_per_second <= 8


# Keys and settings.


def test_the_environment_is_that_of_a_worker(tmp_path: Path) -> None:
    """`environment` writes the private key for its owner only and names every setting without default."""

    with gateway() as (simulator, _):
        settings = simulator.environment(tmp_path / "key.pem")

    key_file = Path(settings["GATEWAY_PRIVATE_KEY_FILE"])
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert key_file.read_bytes() == simulator.private_key_pem
    assert settings["GATEWAY_BASE_URL"] == simulator.base_url
    assert {"GATEWAY_CLIENT_ID", "GATEWAY_CLIENT_SECRET", "GATEWAY_CHANNEL_ID"} < settings.keys()


def test_a_given_public_key_is_the_one_that_counts() -> None:
    """With someone else's key, our signatures are refused and no private key can be had."""

    other = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    with gateway(public_key=other) as (simulator, partner):
        assert partner.ask_token().status_code == 401
        with pytest.raises(ValueError, match="public key only"):
            _ = simulator.private_key_pem


def test_the_secret_is_in_no_repr() -> None:
    """Neither the simulator nor its rules show the client's secret."""

    simulator = Simulator(client_secret="hush")

    assert "hush" not in repr(simulator) + repr(simulator.registration)


# The command.


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker", "simulator", *options],
            cwd=tmp_path,
            env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_command_prints_settings_serves_and_reports(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Its export lines are what a worker needs; SIGTERM ends it with a table and exit 0."""

    process = command("--port", "0", "--latency", "0.001")
    assert process.stdout is not None
    lines = list(itertools.takewhile(lambda line: not line.startswith("# ready"), process.stdout))
    settings = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
    root = settings["GATEWAY_BASE_URL"].removesuffix("/v1.0")
    WEB.get(f"{root}/_simulator/health", timeout=30).raise_for_status()

    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)

    assert (process.returncode, errors) == (0, "")
    assert "expire calls" in output
    assert settings["GATEWAY_PRIVATE_KEY_FILE"] == str(tmp_path / "simulator-key.pem")
    key = serialization.load_pem_private_key((tmp_path / "simulator-key.pem").read_bytes(), None)
    assert key.key_size == 2048  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--signature", "md5"], "signature is one of"),
        (["--script", "bad.json"], "unknown key 'bils'"),
        (["--script", "missing.json"], "missing.json: No such file"),
        (["--key-file", "bad.json"], "no readable key"),
    ],
)
def test_the_command_refuses_in_one_line(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path, options: list[str], complaint: str
) -> None:
    """Wrong options exit 2 with one line on stderr."""

    (tmp_path / "bad.json").write_text('{"bils": {}}')

    process = command("--port", "0", *options)
    output, errors = process.communicate(timeout=30)

    assert (process.returncode, output, errors.count("\n")) == (2, "", 1)
    assert complaint in errors
