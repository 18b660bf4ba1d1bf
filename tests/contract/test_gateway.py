"""The gateway's client: tokens, clock skew, rotated trust, proxies; and what the real one shares with the fake."""

from __future__ import annotations

import gzip
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from requests.adapters import BaseAdapter

from tests.builders import BILL
from tests.fakes import FakeClock, FakeGateway
from tests.fibers import running_fibers
from tests.servers import (
    Authority,
    Peer,
    RecordingObserver,
    Server,
    SimulatedPartner,
    always,
    answer,
    endpoint,
    refusing_port,
    serving,
)
from worker import __version__
from worker.core import diagnosis
from worker.core.grant import DEFAULT_LIFETIME, JAKARTA, MAX_LIFETIME, Grant
from worker.core.ports import Gateway, TokenUnavailable
from worker.core.request import SignedRequest
from worker.core.verdict import Kind, NoReply, Reply, Verdict, judge
from worker.sandbox.simulator import Fault, Script, Simulator
from worker.shells.gateway import PLAIN, GatewayClient, Plain, Trust, proxy_for
from worker.shells.transport import BoundedAdapter, Proxy, trust

Build = Callable[..., GatewayClient]


@pytest.fixture
def observer() -> RecordingObserver:
    """What the client reports."""
    return RecordingObserver()


@pytest.fixture
def client_for(observer: RecordingObserver) -> Iterator[Build]:
    """Makes clients of a base URL, and closes their connections afterwards."""
    made: list[BaseAdapter] = []

    def build(
        base_url: str,
        trust: Trust | None = None,
        kind: Callable[[ssl.SSLContext | None], BaseAdapter] = BoundedAdapter,
        **timeouts: float,
    ) -> GatewayClient:
        def adapter(context: ssl.SSLContext | None) -> BaseAdapter:
            made.append(kind(context))
            return made[-1]

        return GatewayClient(endpoint(base_url, **timeouts), observer, trust=trust or PLAIN, adapter=adapter)

    yield build
    for adapter in made:
        adapter.close()


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    """One gateway for all tests; each brings its script."""
    with Simulator() as running:
        yield running


def base_of(server: Server) -> str:
    return f"{server.scheme}://{server.host}:{server.port}/v1.0"


def signed(**headers: str) -> SignedRequest:
    return SignedRequest("1" * 36, b'{"billnumber":"1"}', {"X-EXTERNAL-ID": "1" * 36, **headers})


# -- the token service ----------------------------------------------------------------------------------------------


def granted(client_for: Build, body: bytes, status: bytes = b"200 OK") -> Grant:
    """The token that this answer is."""
    with serving(always(answer(body, status=status))) as server:
        return client_for(base_of(server)).fetch_token("client-1", "2026-11-22T12:00:00.000+07:00", "c2ln")


def not_granted(client_for: Build, body: bytes, status: bytes = b"200 OK") -> Verdict:
    """The judgement of an answer that is none."""
    with pytest.raises(TokenUnavailable) as failure:
        granted(client_for, body, status)
    return failure.value.verdict


def token_body(**fields: Any) -> bytes:
    """As the token service sends it; a field set to ... is left out."""
    whole = {"accessToken": "opaque-1", "tokenType": "Bearer", "expiresIn": "900", **fields}
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    ("value", "lifetime"),
    [
        ("900", 900.0),
        (" 900 ", 900.0),
        (900, 900.0),
        (899.5, 899.5),
        ("899.5", 899.5),
        (0, 1.0),
        ("-5", 1.0),
        (-5, 1.0),
        (10**9, MAX_LIFETIME),
        ("9" * 400, DEFAULT_LIFETIME),
        (10**400, DEFAULT_LIFETIME),
        (float("nan"), DEFAULT_LIFETIME),
        ("Infinity", DEFAULT_LIFETIME),
        ("²", DEFAULT_LIFETIME),
        ("", DEFAULT_LIFETIME),
        ("soon", DEFAULT_LIFETIME),
        ("9999-99-99T00:00:00", DEFAULT_LIFETIME),
        (True, DEFAULT_LIFETIME),
        (None, DEFAULT_LIFETIME),
        ([900], DEFAULT_LIFETIME),
        (..., DEFAULT_LIFETIME),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_lifetime_is_read_whatever_its_form(client_for: Build, value: object, lifetime: float) -> None:
    """`expiresIn` as a number or as text; what says nothing is SNAP's usual quarter of an hour."""

    assert granted(client_for, token_body(expiresIn=value)).lifetime == lifetime


@pytest.mark.parametrize(
    "form",
    [
        lambda moment: moment.isoformat(),
        lambda moment: moment.isoformat(timespec="milliseconds"),
        lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        lambda moment: moment.astimezone(JAKARTA).isoformat(timespec="seconds"),
        lambda moment: moment.astimezone(JAKARTA).strftime("%Y-%m-%d %H:%M:%S"),
    ],
    ids=["utc", "milliseconds", "Z", "+07:00", "no zone"],
)
def test_a_lifetime_may_be_a_moment(client_for: Build, form: Callable[[datetime], str]) -> None:
    """A date-time counts from now; without a zone it is Jakarta's."""
    moment = datetime.now(UTC) + timedelta(seconds=600)

    assert granted(client_for, token_body(expiresIn=form(moment))).lifetime == pytest.approx(600, abs=60)


def test_a_moment_that_has_passed_leaves_a_second(client_for: Build) -> None:
    """A token is used at least once."""

    assert granted(client_for, token_body(expiresIn="2001-01-01T00:00:00+07:00")).lifetime == 1.0


@pytest.mark.parametrize("form", ["string", "int", "datetime", "absent"])
def test_the_gateways_forms_of_a_lifetime(client_for: Build, simulator: Simulator, form: str) -> None:
    """Signed, asked for and granted over HTTP."""
    simulator.replace(Script(expires_in=form, token_lifetime=600))

    grant = SimulatedPartner(simulator).token(client_for(simulator.base_url))

    assert grant.lifetime == pytest.approx(DEFAULT_LIFETIME if form == "absent" else 600, abs=60)


@pytest.mark.parametrize("fields", [{"responseCode": "2007300"}, {"responseCode": ...}, {"responseCode": "nonsense"}])
def test_a_code_is_not_needed_for_a_token(client_for: Build, fields: dict[str, Any]) -> None:
    """SNAP makes it mandatory only on failure: success is HTTP 2xx and a token."""

    assert granted(client_for, token_body(**fields)).value == "opaque-1"


def test_a_long_token_is_taken(client_for: Build) -> None:
    """SNAP allows 2048 characters."""

    assert len(granted(client_for, token_body(accessToken="t" * 2048)).value) == 2048


@pytest.mark.parametrize(
    "token",
    ["", None, 42, ["opaque-1"], ..., "two words", "line\r\nX-Evil: 1", "tab\t", "nul\0", "café", "t" * 5000],
    ids=lambda value: repr(value)[:20],
)
def test_what_cannot_be_a_header_is_no_token(client_for: Build, token: object) -> None:
    """Transient: the service is there and says nothing of use. The text of it stays out of the verdict."""
    verdict = not_granted(client_for, token_body(accessToken=token))

    assert (verdict.kind, verdict.effect_unknown) == (Kind.TRANSIENT, False)
    assert verdict.message.startswith("token service: ")
    assert not (isinstance(token, str) and token and token in verdict.message)


def test_a_token_in_a_failure_is_none_and_stays_secret(client_for: Build) -> None:
    """HTTP 500 with a token in its body: not used, not shown."""
    verdict = not_granted(client_for, token_body(accessToken="hush"), b"500 Internal Server Error")

    assert verdict.kind is Kind.TRANSIENT
    assert "hush" not in verdict.message


def refusal(code: str, message: str = "") -> bytes:
    return json.dumps({"responseCode": code, "responseMessage": message}).encode()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (b"401 Unauthorized", refusal("4017300", "Unauthorized. Invalid Signature"), Kind.SYSTEMIC),
        (b"401 Unauthorized", refusal("4017301", "Invalid Token"), Kind.SYSTEMIC),
        (b"400 Bad Request", refusal("4007302", "Invalid Mandatory Field X-CLIENT-KEY"), Kind.SYSTEMIC),
        (b"403 Forbidden", refusal("4037300", "Forbidden"), Kind.SYSTEMIC),
        (b"403 Forbidden", refusal("4037301", "Feature Not Allowed"), Kind.SYSTEMIC),
        (b"404 Not Found", refusal("4047301", "Not Found"), Kind.SYSTEMIC),
        (b"404 Not Found", refusal("4047304", "Cancelled"), Kind.SYSTEMIC),
        (b"409 Conflict", refusal("4097300", "Conflict"), Kind.SYSTEMIC),
        (b"401 Unauthorized", b"", Kind.SYSTEMIC),
        (b"401 Unauthorized", b"<html>token</html>", Kind.SYSTEMIC),
        (b"403 Forbidden", b"<html>WAF</html>", Kind.SYSTEMIC),
        (b"429 Too Many Requests", refusal("4297300", "Slow down"), Kind.THROTTLED),
        (b"429 Too Many Requests", b"", Kind.THROTTLED),
        (b"500 Internal Server Error", refusal("5007300", "General Error"), Kind.TRANSIENT),
        (b"502 Bad Gateway", b"<html>502</html>", Kind.TRANSIENT),
        (b"404 Not Found", b"<html>404</html>", Kind.TRANSIENT),
        (b"200 OK", b"<html>maintenance</html>", Kind.TRANSIENT),
        (b"200 OK", b"", Kind.TRANSIENT),
        (b"200 OK", b'["opaque-1"]', Kind.TRANSIENT),
        (b"200 OK", refusal("2007300", "Successful"), Kind.TRANSIENT),
        (b"200 OK", refusal("2009300", "Successful"), Kind.TRANSIENT),
        (b"307 Temporary Redirect", token_body(), Kind.TRANSIENT),
    ],
)
def test_a_refused_token_is_systemic(client_for: Build, status: bytes, body: bytes, kind: Kind) -> None:
    """Our credentials or set-up, not this bill; throttled and broken are distinguished; nothing ever took effect."""
    verdict = not_granted(client_for, body, status)

    assert (verdict.kind, verdict.effect_unknown, verdict.reason) == (kind, False, None)


def test_a_throttled_token_service_says_for_how_long(client_for: Build) -> None:
    """Retry-After comes through."""
    held = answer(b"", b"Retry-After: 7", status=b"429 Too Many Requests")
    with serving(always(held)) as server, pytest.raises(TokenUnavailable) as failure:
        client_for(base_of(server)).fetch_token("c", "t", "s")

    assert failure.value.verdict.retry_after == "7"


@pytest.mark.parametrize("sent", [True, False])
def test_a_silent_token_service_is_transient(client_for: Build, sent: bool) -> None:
    """Nobody there, or nobody who answers: neither has an effect."""
    with serving(lambda peer: peer.reset() if peer.request() else None) as server:
        base = base_of(server) if sent else f"http://127.0.0.1:{refusing_port()}"
        with pytest.raises(TokenUnavailable) as failure:
            client_for(base).fetch_token("c", "t", "s")

    assert (failure.value.verdict.kind, failure.value.verdict.effect_unknown) == (Kind.TRANSIENT, False)


def test_a_wrong_signature_is_refused_by_the_token_service(client_for: Build, simulator: Simulator) -> None:
    """The gateway checks it: systemic, with its code."""
    simulator.replace(Script())
    with pytest.raises(TokenUnavailable) as failure:
        client_for(simulator.base_url).fetch_token("demo-client", "2026-11-22T12:00:00.000+07:00", "c2ln")

    assert (failure.value.verdict.kind, failure.value.verdict.code) == (Kind.SYSTEMIC, "4017300")


def test_the_token_request_is_the_documents(client_for: Build) -> None:
    """Method, path, headers and body of service 73."""
    with serving(always(answer(token_body()))) as server:
        client_for(base_of(server)).fetch_token("client-1", "2026-11-22T12:00:00.000+07:00", "c2ln")

    head, _, body = server.requests[0].decode().partition("\r\n\r\n")
    lines = head.split("\r\n")
    assert (lines[0], body) == ("POST /v1.0/access-token/b2b HTTP/1.1", '{"grantType":"client_credentials"}')
    assert {
        "Content-Type: application/json",
        "X-CLIENT-KEY: client-1",
        "X-TIMESTAMP: 2026-11-22T12:00:00.000+07:00",
        "X-SIGNATURE: c2ln",
    } <= set(lines)


def test_token_requests_are_told_to_the_observer(
    client_for: Build, observer: RecordingObserver, simulator: Simulator
) -> None:
    """Each with its code, the failed ones too."""
    simulator.replace(Script(token_faults=(Fault(code="5007300"), Fault(html=502))))
    client, partner = client_for(simulator.base_url), SimulatedPartner(simulator)
    for _ in range(2):
        with pytest.raises(TokenUnavailable):
            partner.token(client)
    partner.token(client)

    assert observer.requests == [("token", "5007300"), ("token", ""), ("token", "2007300")]


# -- what every request carries, and what never comes back ------------------------------------------------------------


def test_every_request_names_the_product_and_wants_no_coding(client_for: Build) -> None:
    """The default rules of AWS WAF refuse a request without a User-Agent."""
    with serving(always(answer(token_body()))) as server:
        client = client_for(base_of(server))
        client.fetch_token("client-1", "2026-11-22T12:00:00.000+07:00", "c2ln")
        client.send(signed())

    for request in server.requests:
        head = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        assert f"User-Agent: qris-expire-worker/{__version__}" in head
        assert "Accept-Encoding: identity" in head


TOKEN = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJxcmlzIn0.c2lnbmF0dXJl"
SIGNATURE = "mZ1/8Bq+0fJ3nUu9T2iQvYt5xkW4sRcE7gHdLpOaNzKbXyM6wV1DjFhGtS8lPo2rAeIuCqQ5Zn9/Ym0TxBw3Kg=="
SECRET = "s3cret/wörd"


def echoing(form: Callable[[str], bytes], status: bytes, *headers: bytes) -> Callable[[Peer], None]:
    """A server that repeats the head of every request in its body."""

    def handler(peer: Peer) -> None:
        while (request := peer.request()) is not None:
            head = request.partition(b"\r\n\r\n")[0].decode()
            peer.send(answer(form(f"{head} {SECRET}"), *headers, status=status))

    return handler


@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad Request", b"401 Unauthorized", b"403 Forbidden", b"502 Bad"])
@pytest.mark.parametrize(
    "form",
    [
        lambda text: text.encode(),
        lambda text: json.dumps({"responseCode": "4019300", "responseMessage": text}).encode(),
        lambda text: json.dumps({"responseMessage": text}, ensure_ascii=False).replace("/", "\\/").encode(),
        lambda text: f"<html><title>{text}</title></html>".encode(),
        lambda text: gzip.compress(json.dumps({"headers": text.split()}).encode()),
    ],
    ids=["text", "SNAP", "JSON", "HTML", "gzip"],
)
def test_a_page_that_repeats_our_headers_shows_no_secret(
    observer: RecordingObserver, form: Callable[[str], bytes], status: bytes
) -> None:
    """Token, signature and client secret are masked before anything is judged, reported or kept."""
    with serving(echoing(form, status, b"Retry-After: " + SIGNATURE.encode())) as server:
        client = GatewayClient(endpoint(base_of(server)), observer, trust=Plain(secrets=(SECRET,)))
        request = signed(**{"Authorization": f"Bearer {TOKEN}", "X-SIGNATURE": SIGNATURE})
        reply = client.send(request)
        with pytest.raises(TokenUnavailable) as failure:
            client.fetch_token("client-1", "2026-11-22T12:00:00.000+07:00", SIGNATURE)
        client.close()

    assert isinstance(reply, Reply)
    service = diagnosis.CalledService(server.url, "GATEWAY_EXPIRE_PATH")
    told = [
        repr(reply),
        repr(judge(reply)),
        diagnosis.expire(reply, service).text,
        repr(failure.value.verdict),
        repr(failure.value.answer),
        diagnosis.token(failure.value.answer or reply, service).text,
    ]
    for text in told:
        assert not any(secret[:20] in text for secret in (TOKEN, SIGNATURE, SECRET, json.dumps(SECRET)[1:-1]))


# -- the clock ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 120.0, -45.0])
def test_the_clocks_skew_is_read_from_date(
    client_for: Build, observer: RecordingObserver, simulator: Simulator, offset: float
) -> None:
    """How far our clock is ahead of the gateway's, to about half a second: Date has whole ones."""
    simulator.replace(Script(clock_offset=offset))
    began = time.monotonic()
    client_for(simulator.base_url).send(signed())
    took = time.monotonic() - began

    assert observer.skews == [pytest.approx(-offset, abs=0.6 + took)]


def test_the_skew_is_read_now_and_then(client_for: Build, observer: RecordingObserver, simulator: Simulator) -> None:
    """Not at every call: parsing a date costs as much as signing."""
    simulator.replace(Script())
    client = client_for(simulator.base_url)
    for _ in range(5):
        client.send(signed())

    assert len(observer.skews) == 1


@pytest.mark.parametrize("zone", ["GMT", "+0000", "-0000", ""])
def test_a_date_means_the_same_in_every_time_zone(
    client_for: Build, observer: RecordingObserver, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    """Whatever TZ says, and whether or not the server names its zone."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        now = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S ") + zone
        with serving(always(answer(b"{}", b"Date: " + now.encode()))) as server:
            client_for(base_of(server)).send(signed())
    finally:
        monkeypatch.undo()
        time.tzset()

    assert observer.skews == [pytest.approx(0, abs=60)]


@pytest.mark.parametrize("date", [b"yesterday", b"", b"Sun, 99 Nov 2026 25:61:00 GMT", b"0", b"\xff\xfe"])
def test_a_date_that_is_none_is_passed_over(client_for: Build, observer: RecordingObserver, date: bytes) -> None:
    """The answer counts, the skew is not reported."""
    with serving(always(answer(b"{}", b"Date: " + date))) as server:
        reply = client_for(base_of(server)).send(signed())

    assert (reply, observer.skews) == (Reply(200, b"{}"), [])


# -- trust and senders ----------------------------------------------------------------------------------------------


class Rotated:
    """Trust in the latest of these."""

    secrets: tuple[str, ...] = ()

    def __init__(self, contexts: Sequence[ssl.SSLContext]) -> None:
        self._contexts = contexts

    @property
    def context(self) -> ssl.SSLContext:
        return self._contexts[-1]


def test_a_call_that_may_not_begin_any_more_is_none(client_for: Build) -> None:
    """The gateway sees nothing of it, and the connection is there for the next one."""
    with serving(always(answer(b"{}"))) as server:
        client = client_for(base_of(server))
        late = client.send(signed(), until=time.monotonic())
        sent = client.send(signed())

    assert isinstance(late, NoReply)
    assert (late.sent, late.late) == (False, True)
    assert isinstance(sent, Reply)
    assert (len(server.requests), server.connections) == (1, 1)


def test_a_rotated_authority_takes_effect_with_the_next_call(client_for: Build, tmp_path: Path) -> None:
    """A new context means a new connection, and the old one is closed; the same context keeps it."""
    ours, theirs = Authority("ours", tmp_path), Authority("theirs", tmp_path)
    contexts = [ours.trust()]

    with serving(always(answer(b"{}")), tls=ours.server("127.0.0.1")) as server:
        client = client_for(base_of(server), Rotated(contexts))
        kept = [client.send(signed()) for _ in range(3)], server.connections
        contexts.append(ours.trust())
        renewed = client.send(signed()), server.connections
        assert server.closed.acquire(timeout=30)
        contexts.append(theirs.trust())
        distrusted = client.send(signed())

    assert kept == ([Reply(200, b"{}")] * 3, 1)
    assert renewed == (Reply(200, b"{}"), 2)
    assert isinstance(distrusted, NoReply)
    assert (distrusted.sent, len(server.requests)) == (False, 4)


def test_each_call_under_way_has_a_connection_of_its_own(client_for: Build) -> None:
    """One client for all senders; answers are never mixed up, and connections are used again."""
    everyone = threading.Barrier(6)

    def echo(peer: Peer) -> None:
        everyone.wait(30)
        while (request := peer.request()) is not None:
            peer.send(answer(request.partition(b"X-EXTERNAL-ID: ")[2].partition(b"\r\n")[0]))

    with serving(echo) as server, running_fibers() as fibers:
        client = client_for(base_of(server), kind=lambda trust: BoundedAdapter(trust, fibers))

        def calls(number: int) -> list[Reply | NoReply]:
            return [client.send(signed(**{"X-EXTERNAL-ID": f"{number}-{call}"})) for call in range(20)]

        senders = [fibers.ask(partial(calls, number)) for number in range(6)]
        for number, sender in enumerate(senders):
            assert sender.result(60) == [Reply(200, f"{number}-{call}".encode()) for call in range(20)]

    assert server.connections == 6


def test_the_environment_does_not_speak_into_a_call(client_for: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies are the wiring's business, and no netrc replaces our Authorization."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{refusing_port()}")
    with serving(always(answer(b"{}"))) as server:
        reply = client_for(base_of(server)).send(signed(Authorization="Bearer opaque-1"))

    assert reply == Reply(200, b"{}")
    assert b"\r\nAuthorization: Bearer opaque-1\r\n" in server.requests[0]


def test_a_client_certificate_is_shown_to_a_gateway_that_asks_for_one(client_for: Build, tmp_path: Path) -> None:
    """With it the call is answered; without, nothing was sent, and the diagnosis names the settings."""
    ours = Authority("ours", tmp_path)
    with serving(always(answer(b"{}")), tls=ours.server("127.0.0.1", wants_client=True)) as server:
        with_one, without = trust(ours.file, *ours.issue("worker")), trust(ours.file)
        shown = client_for(base_of(server), Plain(with_one)).send(signed())
        silent = client_for(base_of(server), Plain(without)).send(signed())

    assert shown == Reply(200, b"{}")
    assert isinstance(silent, NoReply)
    assert not silent.sent
    assert (
        "GATEWAY_CERT_FILE" in diagnosis.expire(silent, diagnosis.CalledService(server.url, "GATEWAY_EXPIRE_PATH")).text
    )


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        ("expired", "the provider has to renew it"),
        ("other", "GATEWAY_CA_FILE"),
        ("other name", "another host name than the certificate"),
        ("old TLS", "no version of TLS"),
        ("their client", "GATEWAY_CERT_FILE"),
        ("no TLS", "no TLS is spoken there"),
        ("hang up", "firewall"),
    ],
)
def test_what_is_wrong_with_tls_is_told_apart(client_for: Build, tmp_path: Path, kind: str, cure: str) -> None:
    """Each by what has to be changed, from the words that the system really uses; nothing was sent."""
    ours, theirs = Authority("ours", tmp_path), Authority("theirs", tmp_path)
    contexts = {
        "expired": ours.server("127.0.0.1", expired=True),
        "other": theirs.server("127.0.0.1"),
        "other name": ours.server("gateway.example"),
        "their client": ours.server("127.0.0.1", wants_client=True),
        "old TLS": ours.server("127.0.0.1"),
    }
    trusted = trust(ours.file, *theirs.issue("worker")) if kind == "their client" else trust(ours.file)
    if kind == "old TLS":
        contexts[kind].maximum_version = ssl.TLSVersion.TLSv1_2
        trusted.minimum_version = ssl.TLSVersion.TLSv1_3

    def handler(peer: Peer) -> None:
        if kind == "no TLS":
            peer.send(answer(b"{}"))
        elif kind == "hang up":
            peer.sock.recv(65_536)
        else:
            always(answer(b"{}"))(peer)

    with serving(handler, tls=contexts.get(kind)) as server:
        base = base_of(server).replace("http:", "https:")
        reply = client_for(base, Plain(trusted)).send(signed())

    assert isinstance(reply, NoReply)
    assert not reply.sent
    assert server.requests == []
    assert cure in diagnosis.expire(reply, diagnosis.CalledService(base, "GATEWAY_EXPIRE_PATH")).text


# -- proxies --------------------------------------------------------------------------------------------------------

GATEWAY = "https://api.gateway.example/v1.0"


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://p:3128"}, Proxy("p", 3128)),
        ({"https_proxy": "http://small:1", "HTTPS_PROXY": "http://p:3128"}, Proxy("small", 1)),
        ({"ALL_PROXY": "http://p:3128"}, Proxy("p", 3128)),
        ({"ALL_PROXY": "http://all:1", "HTTPS_PROXY": "http://p:3128"}, Proxy("p", 3128)),
        ({"HTTPS_PROXY": "p:3128"}, Proxy("p", 3128)),
        ({"HTTPS_PROXY": "http://p"}, Proxy("p", 80)),
        ({"HTTPS_PROXY": "http://user:p%40ss@p:3128"}, Proxy("p", 3128, "Basic dXNlcjpwQHNz")),
        ({"HTTPS_PROXY": "http://[::1]:3128"}, Proxy("::1", 3128)),
        ({"HTTP_PROXY": "http://p:3128"}, None),
        ({"HTTPS_PROXY": ""}, None),
        ({"HTTPS_PROXY": "http://p:3128", "NO_PROXY": "gateway.example"}, None),
        ({"HTTPS_PROXY": "http://p:3128", "no_proxy": ".gateway.example, other"}, None),
        ({"HTTPS_PROXY": "http://p:3128", "NO_PROXY": "*"}, None),
        ({"HTTPS_PROXY": "http://p:3128", "NO_PROXY": "way.example"}, Proxy("p", 3128)),
        ({"HTTPS_PROXY": "socks5://p:1080", "NO_PROXY": "gateway.example"}, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_the_proxy_is_the_environments(environ: dict[str, str], found: Proxy | None) -> None:
    """By the gateway's scheme, then for all, unless its host is excepted."""

    assert proxy_for(GATEWAY, environ) == found


@pytest.mark.parametrize("excepted", ["10.0.0.0/8", "10.1.2.3"])
def test_an_address_can_be_excepted_with_its_network(excepted: str) -> None:
    """NO_PROXY takes addresses and networks."""
    proxy = {"HTTPS_PROXY": "http://p:3128"}

    assert proxy_for("https://10.1.2.3/v1.0", {**proxy, "NO_PROXY": excepted}) is None
    assert proxy_for("https://11.1.2.3/v1.0", {**proxy, "NO_PROXY": excepted}) == Proxy("p", 3128)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080/v1.0", "http://localhost/v1.0", "http://[::1]:8080/v1.0"])
def test_this_machine_is_never_behind_a_proxy(url: str) -> None:
    """A simulator is called directly, whatever the machine's environment says."""

    assert proxy_for(url, {"HTTP_PROXY": "http://p:3128", "ALL_PROXY": "http://p:3128"}) is None


@pytest.mark.parametrize(
    "proxy", ["socks5://user:hush@p:1080", "ftp://user:hush@p", "http://", "http://user:hush@p:port", "http://[p"]
)
def test_a_proxy_that_cannot_be_spoken_to_is_refused_by_name(proxy: str) -> None:
    """One line, the variable first, and never its value."""
    with pytest.raises(ValueError, match=r"\AHTTPS_PROXY: must be [^\n]*\Z") as refused:
        proxy_for(GATEWAY, {"HTTPS_PROXY": proxy})

    assert "hush" not in str(refused.value)


def test_tls_to_a_proxy_is_refused_by_name() -> None:
    """What goes through the tunnel is encrypted anyway, and the error says what to write instead."""
    with pytest.raises(ValueError, match=r"\AHTTPS_PROXY: TLS to a proxy is not supported.*http://\Z") as refused:
        proxy_for(GATEWAY, {"HTTPS_PROXY": "https://user:hush@p:3128"})

    assert "hush" not in str(refused.value)


def test_asking_for_the_proxy_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the process's own does not count."""
    monkeypatch.setenv("NO_PROXY", "gateway.example")
    monkeypatch.setenv("HTTPS_PROXY", "http://ours:1")
    before = dict(os.environ)

    assert proxy_for(GATEWAY, {"HTTPS_PROXY": "http://theirs:1"}) == Proxy("theirs", 1)
    assert dict(os.environ) == before


# -- what every gateway of the port does -------------------------------------------------------------------------------

ANSWERS: dict[str, tuple[Fault | None, Reply | NoReply]] = {
    "success": (Fault(), Reply(200, b'{"responseCode":"2009300","responseMessage":"Successful"}')),
    "refused": (
        Fault(code="4049308"),
        Reply(404, b'{"responseCode":"4049308","responseMessage":"Invalid Merchant"}'),
    ),
    "throttled": (
        Fault(code="4299300", retry_after="7"),
        Reply(429, b'{"responseCode":"4299300","responseMessage":"Too Many Requests"}', "7"),
    ),
    "empty": (Fault(body="", http=502), Reply(502, b"")),
    "lost": (Fault(reset="after"), NoReply(True, "")),
    "not sent": (None, NoReply(False, "")),
}


@pytest.fixture(params=["real", "fake"])
def gateway(
    request: pytest.FixtureRequest, client_for: Build, simulator: Simulator
) -> Callable[[str], tuple[Gateway, SignedRequest]]:
    """A gateway that gives the named answer, and a call that it takes."""

    def real(name: str) -> tuple[Gateway, SignedRequest]:
        fault, _ = ANSWERS[name]
        simulator.replace(Script())
        partner = SimulatedPartner(simulator)
        call = partner.request(partner.token(client_for(simulator.base_url)).value)
        simulator.replace(Script(bills={BILL: (fault or Fault(),)}))
        base = simulator.base_url if fault else f"http://127.0.0.1:{refusing_port()}"
        return client_for(base), call

    def fake(name: str) -> tuple[Gateway, SignedRequest]:
        return FakeGateway(FakeClock(), [ANSWERS[name][1]]), signed()

    return real if request.param == "real" else fake


@pytest.mark.parametrize("name", ANSWERS)
def test_a_gateway_gives_the_answer_or_says_that_there_was_none(
    gateway: Callable[[str], tuple[Gateway, SignedRequest]], name: str
) -> None:
    """Status, body and Retry-After as they came; without an answer, whether the call was sent; nothing is raised."""
    port, call = gateway(name)
    given, expected = port.send(call), ANSWERS[name][1]

    assert judge(given).kind is judge(expected).kind
    match given, expected:
        case Reply(), Reply():
            assert given == expected
        case NoReply(), NoReply():
            assert given.sent == expected.sent
        case _:
            pytest.fail(f"{given!r} is not like {expected!r}")


def test_a_gateway_leaves_the_request_as_it_was(
    gateway: Callable[[str], tuple[Gateway, SignedRequest]],
) -> None:
    """Its bytes and headers may be logged, compared and sent again."""
    port, call = gateway("success")
    before = (call.external_id, call.body, dict(call.headers))
    port.send(call)

    assert (call.external_id, call.body, call.headers) == before
