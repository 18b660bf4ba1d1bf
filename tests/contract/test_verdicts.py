"""Every row of the verdict table, through the real client: what comes over the wire, and what is made of it.

Written from the gateway's document, section 4. Rows run once, in fibers as in the worker; that threads and fibers read
the same answers is test_transport's fact.
"""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from requests.adapters import BaseAdapter

from tests.builders import BILL
from tests.fibers import FiberAdapter, running_fibers
from tests.servers import (
    PATIENT,
    Authority,
    RecordingObserver,
    SimulatedPartner,
    always,
    answer,
    endpoint,
    refusing_port,
    serving,
    swallowing,
)
from worker.core.outcome import Reason
from worker.core.request import SignedRequest
from worker.core.verdict import Kind, Verdict, judge
from worker.sandbox.broker import free_port
from worker.sandbox.simulator import Fault, Script, Simulator
from worker.shells.fibers import Fibers
from worker.shells.gateway import GatewayClient, Plain

IMPATIENT = 0.25
"""Seconds for what does not come."""

Judgement = tuple[Kind, Reason | None, bool]
Transport = Callable[[ssl.SSLContext | None], BaseAdapter]

UNKNOWN: Judgement = (Kind.TRANSIENT, None, True)
NOT_SENT: Judgement = (Kind.TRANSIENT, None, False)
SYSTEMIC: Judgement = (Kind.SYSTEMIC, None, False)
TOKEN: Judgement = (Kind.TOKEN, None, False)
ID_CLASH: Judgement = (Kind.ID_CLASH, None, False)
LATER: Judgement = (Kind.LATER, None, False)
THROTTLED: Judgement = (Kind.THROTTLED, None, False)


def done(reason: Reason) -> Judgement:
    return Kind.DONE, reason, False


def refused(reason: Reason) -> Judgement:
    return Kind.REFUSED, reason, False


SUCCESS = done(Reason.SUCCESS)
ALREADY = done(Reason.ALREADY_EXPIRED)

ROWS: dict[str, tuple[Fault, Judgement]] = {
    # HTTP 2xx and 2009300 or 2009100
    "plain success": (Fault(), SUCCESS),
    "2009300": (Fault(code="2009300"), SUCCESS),
    "2009100, the sample's": (Fault(code="2009100"), SUCCESS),
    "2009300 as an integer": (Fault(body='{"responseCode": 2009300}'), SUCCESS),
    "2009300 in HTTP 201": (Fault(code="2009300", http=201), SUCCESS),
    "2009300 with a raw line break": (Fault(body='{"responseCode":"2009300","responseMessage":"a\nb"}'), SUCCESS),
    "2009300, trickled": (Fault(code="2009300", trickle=0.0001), SUCCESS),
    # expired or cancelled already
    "403xx00": (Fault(code="4039300"), ALREADY),
    "403xx00 of another service": (Fault(code="4034700"), ALREADY),
    "404xx04": (Fault(code="4049304"), ALREADY),
    "404xx19": (Fault(code="4049319"), ALREADY),
    # refused
    "404xx14": (Fault(code="4049314"), refused(Reason.PAID)),
    "404xx14 of another service": (Fault(code="4044714"), refused(Reason.PAID)),
    "400xx00": (Fault(code="4009300"), refused(Reason.BAD_REQUEST)),
    "400xx01": (Fault(code="4009301"), refused(Reason.INVALID_FIELD)),
    "400xx02": (Fault(code="4009302"), refused(Reason.INVALID_FIELD)),
    "400xx01 as an integer": (Fault(body='{"responseCode": 4009301}', http=400), refused(Reason.INVALID_FIELD)),
    "4049308": (Fault(code="4049308"), refused(Reason.INVALID_MERCHANT)),
    "4039319": (Fault(code="4039319"), refused(Reason.MERCHANT_BLACKLISTED)),
    "4049301 not found": (Fault(code="4049301", message="QR not Found"), refused(Reason.NOT_FOUND)),
    "4049301 not found, shouted": (Fault(code="4049301", message="QR NOT FOUND"), refused(Reason.NOT_FOUND)),
    "4049301 other": (Fault(code="4049301", message="Transaksi tidak ada"), refused(Reason.NOT_FOUND)),
    "4049301 silent": (Fault(body='{"responseCode": "4049301"}', http=404), refused(Reason.NOT_FOUND)),
    "4049300 other": (Fault(code="4049300", message="Not here"), refused(Reason.REFUSED)),
    "409xx01": (Fault(code="4099301"), refused(Reason.REFUSED)),
    "405xx00": (Fault(code="4059300"), refused(Reason.REFUSED)),
    "403xx01": (Fault(code="4039301"), refused(Reason.REFUSED)),
    "401xx02": (Fault(code="4019302", message="Missing header"), refused(Reason.REFUSED)),
    # token
    "401xx01": (Fault(code="4019301"), TOKEN),
    "401xx03": (Fault(code="4019303", message="No rights"), TOKEN),
    "401xx01 of another service": (Fault(code="4017301"), TOKEN),
    "401xx00 that names the token": (Fault(code="4019300", message="Invalid Token (B2B)"), TOKEN),
    "401 without code that names the token": (Fault(body='{"responseMessage": "token expired"}', http=401), TOKEN),
    "a challenge and no body": (Fault(body="", http=401, challenge='Bearer error="invalid_token"'), TOKEN),
    "a challenge beside a signature": (Fault(code="4019300", challenge='Bearer error="invalid_token"'), TOKEN),
    # id clash
    "4099300": (Fault(code="4099300"), ID_CLASH),
    # later
    "403xx06": (Fault(code="4039306"), LATER),
    # throttled
    "429xx00": (Fault(code="4299300"), THROTTLED),
    "429xx00 of another service": (Fault(code="4290000"), THROTTLED),
    "429xx00 in HTTP 200": (Fault(code="4299300", http=200), THROTTLED),
    "429 with a page": (Fault(html=429), THROTTLED),
    "429 without a body": (Fault(body="", http=429), THROTTLED),
    "403xx04": (Fault(code="4039304", message="Exceeds limit"), THROTTLED),
    # transient, and what took effect is unknown
    "5009300": (Fault(code="5009300"), UNKNOWN),
    "500xx01": (Fault(code="5009301"), UNKNOWN),
    "504xx00": (Fault(code="5049300"), UNKNOWN),
    "202xx00": (Fault(code="2029300"), UNKNOWN),
    "202xx00 in HTTP 200": (Fault(code="2029300", http=200), UNKNOWN),
    "5009300 in HTTP 200": (Fault(code="5009300", http=200), UNKNOWN),
    "an odd 2xx code": (Fault(code="2009301"), UNKNOWN),
    "success of another service": (Fault(code="2004700"), UNKNOWN),
    "a 3xx code": (Fault(code="3029300", http=200), UNKNOWN),
    "2009300 in HTTP 500": (Fault(code="2009300", http=500), UNKNOWN),
    "2009300 in HTTP 302": (Fault(code="2009300", http=302), UNKNOWN),
    "2009100 in HTTP 404": (Fault(code="2009100", http=404), UNKNOWN),
    "a page in HTTP 200": (Fault(html=200), UNKNOWN),
    "a page in HTTP 302": (Fault(html=302), UNKNOWN),
    "a page in HTTP 400": (Fault(html=400), UNKNOWN),
    "a page in HTTP 404": (Fault(html=404), UNKNOWN),
    "a page in HTTP 502": (Fault(html=502), UNKNOWN),
    "nothing in HTTP 200": (Fault(body=""), UNKNOWN),
    "nothing in HTTP 404": (Fault(body="", http=404), UNKNOWN),
    "JSON that says nothing": (Fault(body="{}"), UNKNOWN),
    "JSON that is no object": (Fault(body='["2009300"]'), UNKNOWN),
    "JSON that is cut off": (Fault(body='{"responseCode":"2009300"'), UNKNOWN),
    "a short code": (Fault(body='{"responseCode": "20093"}'), UNKNOWN),
    "a long code": (Fault(body='{"responseCode": "20093000"}'), UNKNOWN),
    "a code with a line break": (Fault(body='{"responseCode": "2009300\\n"}'), UNKNOWN),
    "a code of 9": (Fault(body='{"responseCode": "9009300"}', http=500), UNKNOWN),
    "a code that is true": (Fault(body='{"responseCode": true}'), UNKNOWN),
    "a code that is null": (Fault(body='{"responseCode": null}'), UNKNOWN),
    "a code that is a fraction": (Fault(body='{"responseCode": 2009300.0}'), UNKNOWN),
    # no answer to a call that was sent
    "read timeout": (Fault(hang=60), UNKNOWN),
    "read timeout, trickling": (Fault(code="2009300", trickle=0.05), UNKNOWN),
    "reset, nothing took effect": (Fault(reset="before"), UNKNOWN),
    "reset, it took effect": (Fault(reset="after"), UNKNOWN),
    # systemic
    "401xx00 invalid signature": (Fault(code="4019300"), SYSTEMIC),
    "401xx00 unknown client": (Fault(code="4019300", message="Unauthorized. Unknown Client"), SYSTEMIC),
    "4049300 forbidden": (Fault(code="4049300"), SYSTEMIC),
    "4049301 bad request": (Fault(code="4049301", message="Bad Request"), SYSTEMIC),
    "401 with a page": (Fault(html=401), SYSTEMIC),
    "401 without a body": (Fault(body="", http=401), SYSTEMIC),
    "403 with a page": (Fault(html=403), SYSTEMIC),
    "401 in other words": (Fault(body='{"message": "Unauthorized"}', http=401), SYSTEMIC),
    "403 with JSON that says nothing": (Fault(body='{"error": "denied"}', http=403), SYSTEMIC),
}


@pytest.fixture(scope="module")
def fibers() -> Iterator[Fibers]:
    """One loop for all adapters that wait in fibers."""
    with running_fibers() as running:
        yield running


@pytest.fixture
def transport(fibers: Fibers) -> Iterator[Transport]:
    """Makes adapters, and closes them afterwards."""
    made: list[BaseAdapter] = []

    def build(context: ssl.SSLContext | None) -> BaseAdapter:
        made.append(FiberAdapter(fibers, context))
        return made[-1]

    yield build
    for adapter in made:
        adapter.close()


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    """One gateway for all rows."""
    with Simulator() as running:
        yield running


class Caller:
    """A client with a token, and what it makes of answers."""

    def __init__(self, simulator: Simulator, transport: Transport, *, read: float = PATIENT) -> None:
        self.simulator = simulator
        self.partner = SimulatedPartner(simulator)
        self.client = GatewayClient(endpoint(simulator.base_url, read=read), RecordingObserver(), adapter=transport)
        simulator.replace(Script())
        patient = GatewayClient(endpoint(simulator.base_url), RecordingObserver(), adapter=transport)
        self.token = self.partner.token(patient).value

    def verdict(self, fault: Fault) -> Verdict:
        """On a call that gets this."""
        self.simulator.replace(Script(bills={BILL: (fault,)}))
        return self.sent(self.partner.request(self.token))

    def sent(self, request: SignedRequest) -> Verdict:
        """On this call."""
        return judge(self.client.send(request))


@pytest.fixture
def caller(simulator: Simulator, transport: Transport) -> Caller:
    """Whoever calls, patiently."""
    return Caller(simulator, transport)


def judgement(verdict: Verdict) -> Judgement:
    return verdict.kind, verdict.reason, verdict.effect_unknown


@pytest.mark.parametrize(("fault", "expected"), ROWS.values(), ids=ROWS.keys())
def test_each_answer_has_its_verdict(
    simulator: Simulator, transport: Transport, fault: Fault, expected: Judgement
) -> None:
    """The row's kind, reason, and whether it may have taken effect."""
    slow = bool(fault.hang) or fault.trickle > 0.01
    caller = Caller(simulator, transport, read=IMPATIENT if slow else PATIENT)

    assert judgement(caller.verdict(fault)) == expected


def test_an_answer_leaves_the_client_fit_for_the_next(caller: Caller) -> None:
    """After every row but the silent ones, in one go on the same client, a plain call succeeds."""
    for fault, expected in ROWS.values():
        if fault.hang or fault.trickle > 0.01:
            continue
        assert (judgement(caller.verdict(fault)), judgement(caller.verdict(Fault()))) == (expected, SUCCESS), fault


@pytest.mark.parametrize("value", ["7", "Sun, 22 Nov 2026 05:00:00 GMT"])
@pytest.mark.parametrize("fault", [Fault(code="4299300"), Fault(html=429)], ids=["with a code", "without"])
def test_retry_after_is_handed_on_as_it_came(caller: Caller, fault: Fault, value: str) -> None:
    """Seconds or a date: reading it is the policy's business."""

    assert caller.verdict(dataclasses.replace(fault, retry_after=value)).retry_after == value


def test_a_throttled_answer_may_have_no_retry_after(caller: Caller) -> None:
    """Then the policy backs off by itself."""

    assert caller.verdict(Fault(code="4299300")).retry_after is None


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        (Fault(code="2009300"), ""),
        (Fault(code="4049308", http=200), "disagrees"),
        (Fault(code="2009300", http=500), "HTTP 500"),
        (Fault(code="4034700"), "service 47"),
        (Fault(code="2009100"), "service 91"),
    ],
)
def test_what_is_odd_about_an_answer_is_noted(caller: Caller, fault: Fault, note: str) -> None:
    """A status that disagrees with its code, and another service's code, are worth a log line."""
    noted = caller.verdict(fault).note

    assert note in noted
    assert bool(noted) == bool(note)


def test_the_gateways_words_are_kept_on_one_line(caller: Caller) -> None:
    """Bounded and printable, so that they can stand in logs and headers."""
    message = caller.verdict(Fault(code="5009300", message="General\r\nError\x1b[31m " + "x" * 1000)).message

    assert message.startswith("General  Error")
    assert message.isprintable()
    assert len(message) <= 200


# -- what the gateway refuses by itself -----------------------------------------------------------------------------


def test_a_dead_token_is_a_token_answer(caller: Caller) -> None:
    """The gateway does not know the token."""

    assert judgement(caller.sent(caller.partner.request("stale"))) == TOKEN


def test_a_wrong_signature_is_systemic(caller: Caller) -> None:
    """Not this bill's fault."""
    request = caller.partner.request(caller.token)
    request.headers["X-SIGNATURE"] = "bm9uZQ=="

    assert judgement(caller.sent(request)) == SYSTEMIC


def test_a_clock_far_off_is_systemic(caller: Caller) -> None:
    """X-TIMESTAMP out of the gateway's range."""

    assert judgement(caller.sent(caller.partner.request(caller.token, late=3600))) == SYSTEMIC


def test_a_missing_header_is_systemic(caller: Caller) -> None:
    """4049301 "Bad Request": our set-up, not this bill."""
    request = caller.partner.request(caller.token)
    del request.headers["CHANNEL-ID"], request.headers["X-CHANNEL-ID"]

    assert judgement(caller.sent(request)) == SYSTEMIC


def test_an_external_id_twice_in_a_day_is_an_id_clash(caller: Caller) -> None:
    """The second call with it is not carried out."""
    request = caller.partner.request(caller.token)

    assert [judgement(caller.sent(request)) for _ in range(2)] == [SUCCESS, ID_CLASH]


# -- nothing was sent -----------------------------------------------------------------------------------------------


def unreachable(
    transport: Transport, base_url: str, context: ssl.SSLContext | None = None, *, connect: float = PATIENT
) -> Verdict:
    """On a call to where no gateway is."""
    client = GatewayClient(
        endpoint(base_url, connect=connect), RecordingObserver(), trust=Plain(context), adapter=transport
    )
    return judge(client.send(SignedRequest("1" * 36, b"{}", {"X-EXTERNAL-ID": "1" * 36})))


def test_a_refused_connection_sent_nothing(transport: Transport) -> None:
    """Nobody listens."""

    assert judgement(unreachable(transport, f"http://127.0.0.1:{refusing_port()}")) == NOT_SENT


def test_a_stopped_gateway_sent_nothing_and_is_found_again(transport: Transport) -> None:
    """The kept connection is seen to be closed; a restarted gateway answers the next call."""
    with Simulator(port=free_port()) as simulator:
        caller = Caller(simulator, transport)
        simulator.stop()
        stopped = caller.verdict(Fault())
        simulator.start()
        restarted = caller.verdict(Fault())

    assert (judgement(stopped), judgement(restarted)) == (NOT_SENT, SUCCESS)


def test_a_name_that_does_not_resolve_sent_nothing(transport: Transport) -> None:
    """DNS failure."""

    assert judgement(unreachable(transport, "http://gateway.invalid:8443")) == NOT_SENT


def test_a_connect_timeout_sent_nothing(transport: Transport) -> None:
    """Packets that nobody answers."""
    with swallowing() as port:
        verdict = unreachable(transport, f"http://127.0.0.1:{port}", connect=IMPATIENT)

    assert (judgement(verdict), "timed out" in verdict.message) == (NOT_SENT, True)


def test_a_certificate_that_nobody_vouches_for_sent_nothing(transport: Transport, tmp_path: Path) -> None:
    """TLS failure."""
    theirs = Authority("theirs", tmp_path)
    with serving(always(answer()), tls=theirs.server("127.0.0.1")) as server:
        verdict = unreachable(transport, f"https://127.0.0.1:{server.port}", ssl.create_default_context())

    assert (judgement(verdict), server.requests) == (NOT_SENT, [])
    assert "certificate not trusted" in verdict.message


def test_a_redirect_is_not_followed(transport: Transport) -> None:
    """3xx, wherever it points: unknown, and the call went to one place only."""
    with serving(always(answer(b'{"responseCode":"2009300"}'))) as elsewhere:
        there = answer(b"", b"Location: " + elsewhere.url.encode(), status=b"302 Found")
        with serving(always(there)) as server:
            verdict = unreachable(transport, f"http://127.0.0.1:{server.port}")

    assert (judgement(verdict), elsewhere.connections, len(server.requests)) == (UNKNOWN, 0, 1)


@pytest.mark.parametrize("name", ["reset", "closed"])
def test_a_connection_that_breaks_before_an_answer_is_unknown(transport: Transport, name: str) -> None:
    """The request went out first."""

    with serving(lambda peer: peer.reset() if peer.request() and name == "reset" else None) as server:
        verdict = unreachable(transport, f"http://127.0.0.1:{server.port}")

    assert (judgement(verdict), len(server.requests)) == (UNKNOWN, 1)


def test_a_request_that_cannot_be_put_into_http_sent_nothing(transport: Transport) -> None:
    """A line break in a header: no byte goes out, and nothing can have taken effect."""
    with serving(always(answer())) as server:
        client = GatewayClient(endpoint(f"http://127.0.0.1:{server.port}"), RecordingObserver(), adapter=transport)
        verdict = judge(client.send(SignedRequest("1", b"{}", {"Authorization": "Bearer a\r\nX-Evil: 1"})))

    assert (judgement(verdict), server.requests) == (NOT_SENT, [])
    assert "Bearer" not in verdict.message
