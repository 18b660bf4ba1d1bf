"""What the transport adapter promises, for threads and for fibers, against servers that do what servers should not."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import resource
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest
import requests

from tests.fibers import FiberAdapter, running_fibers
from tests.servers import (
    Authority,
    Peer,
    after_request,
    always,
    answer,
    refusing_port,
    serving,
    swallowing,
    tunnelling,
)
from worker.core.answer import MAX_BODY_BYTES
from worker.shells import transport
from worker.shells.fibers import Fibers
from worker.shells.transport import BoundedAdapter, Lost, NotSent, Proxy, TooLate, _Headers

BODY = b'{"billnumber":"10092081"}'
TOTAL = 0.5  # seconds for an answer, in tests where it does not come
SLACK = 8.0  # and how much later the adapter may say so: a loaded machine is late, and without a bound it takes longer
GENEROUS = 30.0
MANY = 20  # addresses: with the whole time for each, a call would be later than SLACK


class Adapter(Protocol):
    """What the tests need of one."""

    def send(self, request: requests.PreparedRequest, *, timeout: tuple[float, float]) -> requests.Response: ...
    def close(self) -> None: ...


Make = Callable[..., Any]


@pytest.fixture(scope="module")
def fibers() -> Iterator[Fibers]:
    """One loop for all adapters that wait in fibers."""
    with running_fibers() as running:
        yield running


@pytest.fixture(params=["threads", "fibers"])
def make(request: pytest.FixtureRequest, fibers: Fibers) -> Iterator[Make]:
    """Makes adapters of one kind, and closes them afterwards."""
    kinds: dict[str, Callable[..., Adapter]] = {
        "threads": BoundedAdapter,
        "fibers": partial(FiberAdapter, fibers),
    }
    kind = kinds[request.param]
    made: list[Adapter] = []

    def build(context: ssl.SSLContext | None = None, proxy: Proxy | None = None) -> Adapter:
        made.append(kind(context, proxy=proxy))
        return made[-1]

    yield build
    for adapter in made:
        adapter.close()


@pytest.fixture
def adapter(make: Make) -> Any:
    """One adapter."""
    return make()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that issues the servers' certificates."""
    return Authority("ours", tmp_path_factory.mktemp("ours"))


def post(
    adapter: Any,
    url: str,
    headers: Mapping[str, str] | None = None,
    *,
    body: Any = BODY,
    connect: float = GENEROUS,
    total: float = GENEROUS,
    until: float = math.inf,
) -> requests.Response:
    """One call, as the gateway's client makes it."""
    prepared = requests.PreparedRequest()
    prepared.method, prepared.url, prepared.body = "POST", url, body
    prepared.headers = dict(headers or {"Content-Type": "application/json"})  # type: ignore[assignment]
    response: requests.Response = adapter.send(prepared, timeout=(connect, total, until))
    return response


def resolve_to(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Every name has these ports of this machine for its addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def head_of(request: bytes) -> list[str]:
    return request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")


# -- one connection -------------------------------------------------------------------------------------------------


def test_ten_calls_share_one_connection(adapter: Any) -> None:
    """Keep-alive: ten calls need one connection."""

    with serving(always(answer(b"one"))) as server:
        bodies = [post(adapter, server.url).content for _ in range(10)]

    assert (bodies, server.connections) == ([b"one"] * 10, 1)


def test_the_request_goes_out_as_it_was_built(adapter: Any) -> None:
    """Method, path, host, headers and the exact bytes of the body, with their length and not in chunks."""

    with serving(always(answer())) as server:
        post(adapter, server.url, {"X-SIGNATURE": "abc=", "Content-Type": "application/json"})

    head = head_of(server.requests[0])
    assert head[0] == "POST /v1.0/expire HTTP/1.1"
    assert {f"Host: 127.0.0.1:{server.port}", "X-SIGNATURE: abc=", f"Content-Length: {len(BODY)}"} <= set(head)
    assert not any(line.lower().startswith(("transfer-encoding", "user-agent")) for line in head)
    assert server.requests[0].endswith(b"\r\n\r\n" + BODY)


def test_a_request_arrives_whole_in_the_first_read(adapter: Any) -> None:
    """Head and body go out in one piece: two small packets can wait 40 ms for each other."""
    first: list[bytes] = []

    def handler(peer: Peer) -> None:
        first.append(peer.sock.recv(65_536))
        peer.send(answer())

    with serving(handler) as server:
        post(adapter, server.url)

    assert first[0].endswith(BODY)


def test_the_callers_headers_are_left_alone(adapter: Any) -> None:
    """A signed request's headers are the same after it was sent: it may be sent again."""
    headers = {"X-A": "1"}
    prepared = requests.PreparedRequest()
    prepared.method, prepared.body = "POST", BODY
    prepared.headers = headers  # type: ignore[assignment]

    with serving(always(answer())) as server:
        prepared.url = server.url
        adapter.send(prepared, timeout=(GENEROUS, GENEROUS))

    assert headers == {"X-A": "1"}


def test_a_connection_that_the_server_closed_while_idle_is_replaced(adapter: Any) -> None:
    """The next call goes out once, on a new connection."""

    with serving(always(answer(), close=True)) as server:
        post(adapter, server.url)
        assert server.closed.acquire(timeout=30)
        assert post(adapter, server.url).content == b"ok"

    assert (len(server.requests), server.connections) == (2, 2)


def test_a_request_that_may_not_begin_any_more_is_not_sent(adapter: Any) -> None:
    """The connection that took too long to open is kept for the next call."""

    with serving(always(answer())) as server:
        with pytest.raises(TooLate):
            post(adapter, server.url, until=time.monotonic())
        post(adapter, server.url, until=time.monotonic() + GENEROUS)

    assert (len(server.requests), server.connections) == (1, 1)


def test_a_connection_that_the_server_reset_while_idle_is_replaced(adapter: Any) -> None:
    """A reset that came between two calls costs neither of them anything."""

    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(answer())
        peer.reset()

    with serving(handler) as server:
        post(adapter, server.url)
        assert server.closed.acquire(timeout=30)
        assert post(adapter, server.url).content == b"ok"

    assert (len(server.requests), server.connections) == (2, 2)


def test_a_call_into_a_closing_connection_is_not_repeated(adapter: Any) -> None:
    """The server reads a second request and closes without a word: `Lost`, and it was sent once."""

    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(answer())
        peer.request()

    with serving(handler) as server:
        post(adapter, server.url)
        with pytest.raises(Lost):
            post(adapter, server.url)

    assert (len(server.requests), server.connections) == (2, 1)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(answer(b"ok", b"Connection: close"), id="Connection: close"),
        pytest.param(answer(b"ok").replace(b"1.1", b"1.0"), id="HTTP/1.0"),
    ],
)
def test_an_announced_close_is_believed(adapter: Any, data: bytes) -> None:
    """A connection that the answer says will close is not used again, though the server left it open."""

    with serving(always(data)) as server:
        post(adapter, server.url)
        post(adapter, server.url)

    assert server.connections == 2


def test_a_connection_idle_for_long_is_not_trusted(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the idle limit the next call takes a new connection: servers drop old ones."""
    monkeypatch.setattr(transport, "IDLE_SECONDS", -1.0)

    with serving(always(answer())) as server:
        post(adapter, server.url)
        post(adapter, server.url)

    assert server.connections == 2


def test_a_process_may_have_more_than_a_thousand_files_open(adapter: Any) -> None:
    """An idle connection is looked at whatever the number of its descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 2048:
        pytest.skip(f"this process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    with contextlib.ExitStack() as opened, serving(always(answer())) as server:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1030):
            opened.callback(os.close, os.dup(0))
        bodies = [post(adapter, server.url).content for _ in range(2)]
        adapter.close()

    assert (bodies, server.connections) == ([b"ok"] * 2, 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_process_without_descriptors_says_so(make: Make, host: str) -> None:
    """That no file may be opened is one error, an unreachable server another, also where the resolver hides it."""
    with serving(always(answer(b"{}"))) as server:
        adapter, url = make(), f"http://{host}:{urlsplit(server.url).port}/"
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            # Above the three standard ones no number may be given out, whichever is free.
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            with pytest.raises(transport.Starved):
                post(adapter, url)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert post(adapter, url).status_code == 200


def test_close_drops_the_connection_and_the_next_call_makes_another(adapter: Any) -> None:
    """A closed adapter lets go of its socket, and works on."""

    with serving(always(answer())) as server:
        post(adapter, server.url)
        adapter.close()
        assert server.closed.acquire(timeout=30)
        assert post(adapter, server.url).content == b"ok"

    assert server.connections == 2


def test_each_thread_has_its_own_connection(make: Make) -> None:
    """Eight threads with an adapter each: every one gets the answers to its own calls."""

    def echo(peer: Peer) -> None:
        while (request := peer.request()) is not None:
            peer.send(answer(request.rpartition(b"\r\n\r\n")[2]))

    adapters = [make() for _ in range(8)]

    with serving(echo) as server, ThreadPoolExecutor(8) as pool:

        def calls(number: int) -> bool:
            names = [f"{number}-{call}".encode() for call in range(20)]
            return all(post(adapters[number], server.url, body=name).content == name for name in names)

        assert all(pool.map(calls, range(8)))

    assert server.connections == 8


# -- answers, well-formed -------------------------------------------------------------------------------------------


def test_status_headers_and_body_are_read(adapter: Any) -> None:
    """Headers are found whatever their case, and repeated ones are joined."""
    data = answer(b"{}", b"retry-AFTER:  7 ", b"X-A: 1", b"X-A: 2", status=b"429 Too Many Requests")

    with serving(always(data)) as server:
        response = post(adapter, server.url)

    assert (response.status_code, response.reason, response.content) == (429, "Too Many Requests", b"{}")
    assert (response.headers["Retry-After"], response.headers.get("x-a")) == ("7", "1, 2")
    assert response.headers.get("date") is None


def test_bytes_beyond_ascii_come_through(adapter: Any) -> None:
    """The body's bytes are untouched, and a header in Latin-1 does no harm."""
    body = bytes(range(256))

    with serving(always(answer(body, b"X-Note: caf\xe9"))) as server:
        response = post(adapter, server.url)

    assert (response.content, response.headers["x-note"]) == (body, "caf\xe9")


CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{"a"\r\n3;name=value\r\n:1}\r\n0\r\n'


@pytest.mark.parametrize("end", [b"\r\n", b"Retry-After: 9\r\nX-Checksum: 1\r\n\r\n"], ids=["plain", "trailers"])
def test_a_chunked_body_is_put_together(adapter: Any, end: bytes) -> None:
    """Chunks with extensions are joined, trailers are no headers, and the connection serves the next call."""

    with serving(always(CHUNKED + end)) as server:
        responses = [post(adapter, server.url) for _ in range(2)]

    assert [response.content for response in responses] == [b'{"a":1}'] * 2
    assert (responses[0].headers.get("retry-after"), server.connections) == (None, 1)


def test_a_body_without_length_ends_with_the_connection(adapter: Any) -> None:
    """RFC 9112 6.3: no length and no chunks."""

    with serving(always(b"HTTP/1.1 200 OK\r\n\r\nall of it", close=True)) as server:
        assert post(adapter, server.url).content == b"all of it"


def test_an_answer_in_single_bytes_is_the_same_answer(adapter: Any) -> None:
    """Where packets end means nothing."""

    with serving(after_request(lambda peer: peer.trickle(CHUNKED + b"\r\n", 0.0))) as server:
        assert post(adapter, server.url).content == b'{"a":1}'


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_a_status_without_body_ends_with_its_headers(adapter: Any, status: bytes) -> None:
    """No length is announced and none is waited for."""

    with serving(always(b"HTTP/1.1 " + status + b"\r\n\r\n")) as server:
        responses = [post(adapter, server.url) for _ in range(2)]

    assert [response.content for response in responses] == [b"", b""]
    assert responses[0].status_code == int(status[:3])


@pytest.mark.parametrize(
    "first", [b"100 Continue\r\n", b"103 Early Hints\r\nRetry-After: 5\r\n", b"102 Processing\r\n"]
)
def test_interim_answers_are_passed_over(adapter: Any, first: bytes) -> None:
    """The answer is the one after them, and their headers are not its own."""
    interim = b"HTTP/1.1 " + first + b"\r\n"

    with serving(always(interim * 3 + answer(b"final"))) as server:
        responses = [post(adapter, server.url) for _ in range(2)]

    assert [response.content for response in responses] == [b"final"] * 2
    assert (responses[0].status_code, responses[0].headers.get("retry-after")) == (200, None)


def test_redirects_are_not_followed(adapter: Any) -> None:
    """A signed POST goes where it was signed for, and nowhere else."""

    with serving(always(answer())) as elsewhere:
        there = answer(b"", b"Location: " + elsewhere.url.encode(), status=b"307 Temporary Redirect")
        with serving(always(there)) as server:
            assert post(adapter, server.url).status_code == 307

    assert elsewhere.connections == 0


def test_cookies_are_not_kept(adapter: Any) -> None:
    """What a balancer wants remembered is not sent back."""

    with serving(always(answer(b"", b"Set-Cookie: node=1"))) as server:
        post(adapter, server.url)
        post(adapter, server.url)

    assert b"cookie" not in server.requests[1].lower()


SURPLUS = {
    "garbage": b"\x00garbage\r\n\r\n",
    "one byte": b"x",
    "another answer": answer(b"surplus"),
    "an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
    "a line break and another answer": b"\r\n" + answer(b"surplus"),
}


@pytest.mark.parametrize("surplus", SURPLUS.values(), ids=SURPLUS.keys())
@pytest.mark.parametrize(
    "first", [answer(b"first"), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"]
)
def test_more_than_one_answer_is_none(adapter: Any, first: bytes, surplus: bytes) -> None:
    """`Lost`, and a new connection for the next call: it is unknown which of the two answers is to this call."""

    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(first + surplus if peer.number == 1 else answer(b"second"))
        peer.gone(GENEROUS)

    with serving(handler) as server:
        with pytest.raises(Lost, match="more than one answer came"):
            post(adapter, server.url)
        assert post(adapter, server.url).content == b"second"

    assert server.connections == 2


def test_more_than_one_answer_inside_tls_is_none(make: Make, authority: Authority) -> None:
    """The same where the second answer came in a record of its own, which one read does not bring along."""
    sent = threading.Event()

    def handler(peer: Peer) -> None:
        while peer.request() is not None:
            if peer.number > 1:
                peer.send(answer(b"second"))
                continue
            head, body = answer(b"first"), b""
            head, body = head[:-5], head[-5:]
            peer.send(head)
            sent.wait(GENEROUS)
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)  # both records leave in one packet
            peer.send(body)
            peer.send(answer(b"surplus"))
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)

    with serving(handler, tls=authority.server("127.0.0.1")) as server:
        adapter = make(authority.trust())
        sent.set()
        with pytest.raises(Lost, match="more than one answer came"):
            post(adapter, server.url)
        assert post(adapter, server.url).content == b"second"


def test_blank_lines_after_an_answer_do_no_harm(adapter: Any) -> None:
    """Some servers end a body with a line break that its length does not count."""

    with serving(always(answer(b"whole") + b"\r\n")) as server:
        bodies = [post(adapter, server.url).content for _ in range(3)]

    assert bodies == [b"whole"] * 3


def test_a_second_answer_that_comes_later_is_never_the_next_calls_answer(adapter: Any) -> None:
    """An idle connection on which something arrives is dropped."""
    surplus = threading.Event()

    def handler(peer: Peer) -> None:
        if peer.number == 1:
            peer.request()
            peer.send(answer(b"first"))
            surplus.wait(GENEROUS)
            peer.send(answer(b"surplus"))
            arrived.set()
            peer.gone(GENEROUS)
        else:
            always(answer(b"second"))(peer)

    arrived = threading.Event()
    with serving(handler) as server:
        first = post(adapter, server.url).content
        surplus.set()
        assert arrived.wait(5)
        second = post(adapter, server.url).content

    assert (first, second, server.connections) == (b"first", b"second", 2)


ODD = {
    "a control character, as a firewall sends it": answer(b"ok", b"Set-Cookie: ___utmvafIumyLc=kUd\x01UpAt; path=/"),
    "a folded line, as a firewall sends it": answer(b"ok", b"Set-Cookie: ___utmvbkyufYZ=yhB\r\n    XaDOyald: ztO;"),
    "bare LF, as an old server sends it": answer(b"ok", b"Server: old").replace(b"\r\n", b"\n"),
    "the length twice": answer(b"ok", b"Content-Length: 2"),
    "a blank after a chunk's size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 \r\nok\r\n0 \r\n\r\n",
    "gzip that nobody asked for": answer(gzip.compress(b"ok"), b"Content-Encoding: gzip"),
    "deflate that nobody asked for": answer(zlib.compress(b"ok"), b"Content-Encoding: deflate"),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
def test_an_odd_answer_that_is_whole_counts(adapter: Any, data: bytes) -> None:
    """What RFC 9112 lets a client accept; test_answer.py has all of it. The connection serves on."""

    with serving(always(data)) as server:
        bodies = [post(adapter, server.url).content for _ in range(2)]

    assert (bodies, server.connections) == ([b"ok"] * 2, 1)


# -- nothing was sent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "x" * 64 + ".invalid"], ids=["unknown", "dots", "long"])
def test_a_name_that_leads_nowhere_sends_nothing(adapter: Any, host: str) -> None:
    """`NotSent`, also for what cannot be a name at all."""

    with pytest.raises(NotSent, match="no connection to"):
        post(adapter, f"http://{host}:8080/")


def test_a_refused_connection_sends_nothing(adapter: Any) -> None:
    """`NotSent`, with the system's words."""

    with pytest.raises(NotSent, match=r"no connection to 127\.0\.0\.1:\d+: Connection refused"):
        post(adapter, f"http://127.0.0.1:{refusing_port()}/")


def test_a_connection_that_does_not_come_about_is_given_up_in_time(adapter: Any) -> None:
    """`NotSent` when the connect timeout is over."""

    with swallowing() as port:
        started = time.monotonic()
        with pytest.raises(NotSent, match="timed out"):
            post(adapter, f"http://127.0.0.1:{port}/", connect=TOTAL)

    assert TOTAL - 0.05 <= time.monotonic() - started < TOTAL + SLACK


def test_several_addresses_share_the_connect_timeout(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with many silent addresses takes no longer than one, and a good last address is still tried."""

    with swallowing() as silent, serving(always(answer())) as server:
        resolve_to(monkeypatch, *[silent] * MANY)
        started = time.monotonic()
        with pytest.raises(NotSent, match="timed out"):
            post(adapter, server.url, connect=TOTAL)
        took = time.monotonic() - started
        resolve_to(monkeypatch, silent, silent, server.port)
        assert post(adapter, server.url, connect=3 * TOTAL).content == b"ok"

    assert took < TOTAL + SLACK


def test_a_resolver_that_hangs(fibers: Fibers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender does not wait longer for a name than for a connection, and nothing was sent."""
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(GENEROUS) and [])
    adapter = FiberAdapter(fibers)

    with pytest.raises(NotSent, match=r"gateway\.example:80: timed out"):
        post(adapter, "http://gateway.example/", connect=0.1)
    answered.set()


@pytest.mark.parametrize(
    "value", ["a\r\nX-Evil: 1", "a\nX-Evil: 1", "a\rb", "a\r\n folded", "a\0b"], ids=["crlf", "lf", "cr", "fold", "nul"]
)
def test_a_header_that_would_be_two_is_refused(adapter: Any, value: str) -> None:
    """`NotSent`, without a byte or even a connection, and the value is not in the error."""

    with serving(always(answer())) as server, pytest.raises(NotSent) as refused:
        post(adapter, server.url, {"X-EXTERNAL-ID": value})

    assert (server.connections, server.requests) == (0, [])
    assert "Evil" not in str(refused.value)


def test_a_header_beyond_latin_1_is_refused(adapter: Any) -> None:
    """`NotSent`: HTTP has no way to say it."""

    with serving(always(answer())) as server, pytest.raises(NotSent, match="Latin-1"):
        post(adapter, server.url, {"X-PARTNER-ID": "Zażółć"})

    assert server.requests == []


def test_a_body_that_is_no_bytes_in_memory_is_refused(adapter: Any) -> None:
    """`NotSent`: a stream could be read only once."""

    with serving(always(answer())) as server, pytest.raises(NotSent):
        post(adapter, server.url, body=iter([b"a"]))

    assert server.requests == []


# -- sent, and no answer --------------------------------------------------------------------------------------------

CUT_OFF = {
    "reset": lambda peer: peer.reset(),
    "closed": lambda _: None,
    "in the status": lambda peer: peer.send(b"HTTP/1.1 20"),
    "in the headers": lambda peer: peer.send(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "after the headers": lambda peer: peer.send(answer(b"", length=9)),
    "in the body": lambda peer: peer.send(answer(b"half", length=9)),
    "in a chunk": lambda peer: peer.send(CHUNKED[:-12]),
    "before the last chunk": lambda peer: peer.send(CHUNKED[:-3]),
}


@pytest.mark.parametrize("then", CUT_OFF.values(), ids=CUT_OFF.keys())
def test_half_an_answer_is_none(adapter: Any, then: Callable[[Peer], None]) -> None:
    """`Lost`: the server had the request, and what it did is not known."""

    with serving(after_request(then)) as server, pytest.raises(Lost):
        post(adapter, server.url)

    assert len(server.requests) == 1


NO_HTTP = {
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "binary": b"\x16\x03\x01\x00\x05\x01\x00" * 20,
    "html": b"<html><body>502</body></html>\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "HTTP/2": b"HTTP/2 200\r\n\r\n" + b"\0" * 9,
    "header without a colon": b"HTTP/1.1 200 OK\r\nnonsense\r\nContent-Length: 2\r\n\r\nok",
    "length no number": b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nok",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nokk",
    "length and chunks": answer(b"2\r\nok\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"),
    "chunk length no number": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nok\r\n0\r\n\r\n",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
}


@pytest.mark.parametrize("data", NO_HTTP.values(), ids=NO_HTTP.keys())
def test_what_is_no_certain_answer_is_none(adapter: Any, data: bytes) -> None:
    """`Lost`, in one short line, and the next call has a new connection."""

    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(data if peer.number == 1 else answer())
        peer.gone(GENEROUS)

    with serving(handler) as server:
        with pytest.raises(Lost) as lost:
            post(adapter, server.url, total=TOTAL)
        assert post(adapter, server.url).content == b"ok"

    assert len(str(lost.value)) < 100
    assert server.connections == 2


SLOW = {
    "nothing": b"",
    "status and headers": b"HTTP/1.1 200 OK\r\n" + b"X-Filler: 12345678\r\n" * 100,
    "interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b"x" * 9999,
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 999,
    "body without length": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 9999,
    "trailers": CHUNKED + b"X-Filler: 12345678\r\n" * 100,
}


def slowly(data: bytes) -> Callable[[Peer], None]:
    """The first line or two at once, so that the trickle begins where it should."""
    at_once = max(data.find(b"\r\n\r\n") + 4, 0) if b"\r\n\r\n" in data[:100] else 0

    def then(peer: Peer) -> None:
        peer.send(data[:at_once])
        peer.trickle(data[at_once:])
        peer.gone(GENEROUS)

    return then


@pytest.mark.parametrize("data", SLOW.values(), ids=SLOW.keys())
def test_the_timeout_bounds_the_whole_answer(adapter: Any, data: bytes) -> None:
    """A byte now and then buys no time: `Lost` when the total is over."""

    with serving(after_request(slowly(data))) as server:
        started = time.monotonic()
        with pytest.raises(Lost, match="timed out"):
            post(adapter, server.url, total=TOTAL)
        took = time.monotonic() - started

    assert TOTAL - 0.05 <= took < TOTAL + SLACK


def test_the_timeout_of_a_second_call_counts_from_its_own_start(adapter: Any) -> None:
    """What earlier calls took is not taken from it."""

    def handler(peer: Peer) -> None:
        while peer.request() is not None:
            peer.gone(0.3)
            peer.send(answer())

    with serving(handler) as server:
        # Together they take longer than the total; each alone leaves a loaded machine most of it.
        assert [post(adapter, server.url, total=2.0).content for _ in range(8)] == [b"ok"] * 8

    assert server.connections == 1


ENDLESS = {
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-Filler: %s\r\n" % (b"x" * 900)),
    "one header": (b"HTTP/1.1 200 OK\r\nX-Filler: ", b"x" * 1000),
    "the status": (b"HTTP/1.1 200 ", b"x" * 1000),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50),
    "trailers": (CHUNKED, b"X-Filler: %s\r\n" % (b"x" * 900)),
    "a chunk's extension": (CHUNKED[:47] + b"1;", b"x" * 1000),
}


@pytest.mark.parametrize(("first", "flood"), ENDLESS.values(), ids=ENDLESS.keys())
def test_an_endless_head_is_bounded_in_size(adapter: Any, first: bytes, flood: bytes) -> None:
    """`Lost` long before the time is over: memory is not the server's to fill."""

    def then(peer: Peer) -> None:
        peer.send(first)
        peer.flood(flood)

    with serving(after_request(then)) as server, pytest.raises(Lost, match=r"bytes|HTTP"):
        post(adapter, server.url)


@pytest.mark.parametrize(
    ("first", "flood"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", b"x" * 1000),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 1000),
        (b"HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\n", b"3e8\r\n" + b"x" * 1000 + b"\r\n"),
    ],
    ids=["without length", "with a length", "in chunks"],
)
def test_an_endless_body_is_cut_and_its_connection_dropped(adapter: Any, first: bytes, flood: bytes) -> None:
    """The answer's status still counts; of its body the first 64 KiB do."""

    def then(peer: Peer) -> None:
        peer.send(first)
        peer.flood(flood)

    with serving(after_request(then)) as server:
        response = post(adapter, server.url)
        assert server.closed.acquire(timeout=30)

    assert (response.status_code, response.content) == (502, b"x" * MAX_BODY_BYTES)


def test_a_body_of_just_the_limit_is_whole(adapter: Any) -> None:
    """64 KiB are read, and the connection serves the next call."""

    with serving(always(answer(b"x" * MAX_BODY_BYTES))) as server:
        bodies = [post(adapter, server.url).content for _ in range(2)]

    assert (bodies, server.connections) == ([b"x" * MAX_BODY_BYTES] * 2, 1)


def test_an_answer_before_the_request_is_not_waited_for(fibers: Fibers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that turns clients away as they connect: all it says may be there by the time a busy loop looks."""

    said = threading.Event()
    turned_away = answer(b"later", b"Connection: close", status=b"503 Service Unavailable")

    def full(peer: Peer) -> None:
        peer.send(turned_away)
        peer.sock.shutdown(socket.SHUT_WR)
        said.set()
        peer.request()
        peer.gone(GENEROUS)

    wait = fibers.wait

    def busy(*arguments: Any) -> None:
        said.wait(GENEROUS)  # on the loop's thread
        wait(*arguments)

    monkeypatch.setattr(fibers, "wait", busy)
    adapter = FiberAdapter(fibers)
    with serving(full) as server:
        response = post(adapter, server.url, total=TOTAL)
    adapter.close()

    assert (response.status_code, response.content) == (503, b"later")


def test_an_answer_amid_the_request_is_not_waited_for(fibers: Fibers) -> None:
    """A server that answers while it is still being sent to, and reads on."""

    more_than_buffers_hold = b"x" * 16_000_000

    def hasty(peer: Peer) -> None:
        peer.send(answer())
        peer.request()
        peer.gone(GENEROUS)

    adapter = FiberAdapter(fibers)
    with serving(hasty) as server:
        assert post(adapter, server.url, body=more_than_buffers_hold).content == b"ok"
    adapter.close()


def test_a_server_that_does_not_read_is_given_up_in_time(adapter: Any) -> None:
    """Sending counts against the total as well."""

    over = threading.Event()
    more_than_buffers_hold = b"x" * 16_000_000

    def deaf(peer: Peer) -> None:
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        over.wait(GENEROUS)

    with serving(deaf) as server:
        started = time.monotonic()
        with pytest.raises(Lost, match="timed out"):
            post(adapter, server.url, body=more_than_buffers_hold, total=TOTAL)
        took = time.monotonic() - started
        over.set()

    assert took < TOTAL + SLACK


def test_an_answer_that_came_while_the_process_was_stopped_counts(fibers: Fibers) -> None:
    """The socket is looked at before the clock is believed."""
    adapter = FiberAdapter(fibers)

    def handler(peer: Peer) -> None:
        peer.request()
        stopped = threading.Event()

        def stand_still() -> None:
            stopped.set()
            time.sleep(4 * TOTAL)  # on the loop's thread, as if the whole process were stopped

        fibers.soon(stand_still)
        stopped.wait(GENEROUS)
        time.sleep(2 * TOTAL)
        peer.send(answer(b"here"))

    with serving(handler) as server:
        assert post(adapter, server.url, total=TOTAL).content == b"here"
    adapter.close()


def test_the_socket_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits and learns only that the time is over still finds what has come meanwhile."""
    come = threading.Event()

    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(answer(b"here"))
        come.set()
        peer.gone(GENEROUS)

    wait = transport.Blocking.wait

    def late(waiting: transport.Blocking, connection: socket.socket, events: int, _deadline: float) -> None:
        come.wait(GENEROUS)
        wait(waiting, connection, events, time.monotonic() + GENEROUS)
        raise TimeoutError("timed out")

    adapter = BoundedAdapter()
    with serving(handler) as server:
        adapter._connected(("http", server.host, server.port), GENEROUS)
        monkeypatch.setattr(transport.Blocking, "wait", late)
        assert post(adapter, server.url).content == b"here"
    adapter.close()


# -- TLS ------------------------------------------------------------------------------------------------------------


def test_a_private_authority_is_trusted_when_it_is_given(make: Make, authority: Authority) -> None:
    """https with GATEWAY_CA_FILE, over one connection."""

    with serving(always(answer(b"secret")), tls=authority.server("127.0.0.1")) as server:
        adapter = make(authority.trust())
        bodies = [post(adapter, server.url).content for _ in range(3)]

    assert (bodies, server.connections) == ([b"secret"] * 3, 1)


def test_the_name_in_the_certificate_is_checked(make: Make, authority: Authority) -> None:
    """A good certificate for another host sends nothing."""

    with (
        serving(always(answer()), tls=authority.server("gateway.example")) as server,
        pytest.raises(NotSent, match="certificate not trusted"),
    ):
        post(make(authority.trust()), server.url)

    assert server.requests == []


def test_a_final_dot_belongs_to_the_name_and_not_to_the_certificate(
    make: Make, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An absolute host name is checked without its dot."""

    with serving(always(answer()), tls=authority.server("gateway.example")) as server:
        resolve_to(monkeypatch, server.port)
        assert post(make(authority.trust()), server.url_for("gateway.example.")).content == b"ok"


def test_an_unknown_authority_is_not_trusted(make: Make, authority: Authority, tmp_path: Path) -> None:
    """A certificate for the right host from someone else sends nothing."""
    other = Authority("other", tmp_path)

    with (
        serving(always(answer()), tls=other.server("127.0.0.1")) as server,
        pytest.raises(NotSent, match="certificate not trusted"),
    ):
        post(make(authority.trust()), server.url)

    assert server.requests == []


def test_the_system_decides_where_no_authority_is_given(make: Make, authority: Authority) -> None:
    """Without a context the system's authorities count, and ours is none of them."""

    with (
        serving(always(answer()), tls=authority.server("127.0.0.1")) as server,
        pytest.raises(NotSent, match="certificate not trusted"),
    ):
        post(make(), server.url)


def test_a_call_adds_no_authority_to_the_context(make: Make, authority: Authority) -> None:
    """A private authority stays the only one that is trusted."""
    context = authority.trust()

    with serving(always(answer()), tls=authority.server("127.0.0.1")) as server:
        post(make(context), server.url)

    assert context.cert_store_stats()["x509_ca"] == 1


def test_a_server_without_tls_sends_nothing(make: Make, authority: Authority) -> None:
    """https to a plain port: the handshake fails before the request."""

    with (
        serving(lambda peer: peer.send(answer())) as server,
        pytest.raises(NotSent, match=r"no TLS with|no connection to"),
    ):
        post(make(authority.trust()), server.url.replace("http:", "https:"))


@pytest.mark.parametrize("trickle", [False, True], ids=["silent", "trickling"])
def test_the_handshake_counts_as_connecting(make: Make, authority: Authority, trickle: bool) -> None:
    """A server that never finishes it is given up when the connect timeout is over, and has seen nothing."""

    def handler(peer: Peer) -> None:
        peer.sock.recv(65_536)
        if trickle:
            peer.trickle(b"\x16\x03\x03\x40\x00" + b"\x02" * 2000)
        peer.gone(GENEROUS)

    with serving(handler) as server:
        started = time.monotonic()
        with pytest.raises(NotSent, match="timed out"):
            post(make(authority.trust()), server.url.replace("http:", "https:"), connect=TOTAL)

    assert TOTAL - 0.05 <= time.monotonic() - started < TOTAL + SLACK


def test_the_timeout_bounds_a_trickle_inside_tls(make: Make, authority: Authority) -> None:
    """One record for each byte, and still no more time than the total."""

    with serving(after_request(slowly(SLOW["body"])), tls=authority.server("127.0.0.1")) as server:
        adapter = make(authority.trust())
        started = time.monotonic()
        with pytest.raises(Lost, match="timed out"):
            post(adapter, server.url, total=TOTAL)
        took = time.monotonic() - started

    assert took < TOTAL + 2 * SLACK


def test_an_answer_in_tiny_records_lets_others_have_a_turn(
    fibers: Fibers, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record for each byte is a read for each byte, and none of them has to wait."""
    turns, give_way = [0], fibers.give_way
    body = b"x" * 4000

    def counted() -> None:
        turns[0] += 1
        give_way()

    def handler(peer: Peer) -> None:
        peer.request()
        for byte in answer(body):
            peer.send(bytes([byte]))
        peer.gone(GENEROUS)

    monkeypatch.setattr(fibers, "give_way", counted)
    adapter = FiberAdapter(fibers, authority.trust())
    with serving(handler, tls=authority.server("127.0.0.1")) as server:
        assert post(adapter, server.url).content == body
    adapter.close()

    assert turns[0] >= len(body) // 64


def test_a_name_in_the_common_name_only_is_not_accepted(make: Make, authority: Authority) -> None:
    """As in browsers and urllib3 2, with a context of the caller's and with our own."""

    with (
        serving(always(answer()), tls=authority.server("localhost", common_name_only=True)) as server,
        pytest.raises(NotSent, match="certificate not trusted"),
    ):
        post(make(authority.trust()), server.url_for("localhost"))

    assert server.requests == []


def test_half_an_answer_inside_tls_is_none(make: Make, authority: Authority) -> None:
    """`Lost`: the request went out."""

    with (
        serving(after_request(CUT_OFF["in the body"]), tls=authority.server("127.0.0.1")) as server,
        pytest.raises(Lost),
    ):
        post(make(authority.trust()), server.url)

    assert len(server.requests) == 1


def test_a_surplus_answer_inside_tls_is_never_the_next_calls_answer(make: Make, authority: Authority) -> None:
    """One that comes after the exchange lies in the socket until the next call looks."""
    over, told = threading.Event(), threading.Event()

    def handler(peer: Peer) -> None:
        while peer.request() is not None:
            peer.send(answer(b"%d" % peer.number))
            if peer.number == 1:
                over.wait(GENEROUS)
                peer.send(answer(b"surplus"))
                told.set()

    with serving(handler, tls=authority.server("127.0.0.1")) as server:
        adapter = make(authority.trust())
        first = post(adapter, server.url).content
        over.set()
        assert told.wait(GENEROUS)
        second = post(adapter, server.url).content

    assert (first, second, server.connections) == (b"1", b"2", 2)


def test_ipv6_is_spoken(adapter: Any) -> None:
    """An address in brackets, also in the Host header."""
    try:
        with serving(always(answer()), host="::1") as server:
            assert post(adapter, server.url).content == b"ok"
    except OSError as error:
        if not isinstance(error, requests.RequestException):
            pytest.skip(f"no IPv6 here: {error}")
        raise

    assert f"Host: [::1]:{server.port}" in head_of(server.requests[0])


def test_ipv6_over_tls(make: Make, authority: Authority) -> None:
    """The certificate is checked against the address."""
    try:
        with serving(always(answer()), host="::1", tls=authority.server("::1")) as server:
            assert post(make(authority.trust()), server.url).content == b"ok"
    except OSError as error:
        if not isinstance(error, requests.RequestException):
            pytest.skip(f"no IPv6 here: {error}")
        raise


# -- through a proxy ------------------------------------------------------------------------------------------------


def proxy_at(port: int, login: str = "") -> Proxy:
    return Proxy.at(f"http://{login}127.0.0.1:{port}")


def test_plain_http_goes_to_the_proxy_with_its_whole_url(make: Make) -> None:
    """The proxy is asked for the gateway's URL, with its own credentials, over one connection."""

    with serving(always(answer(b"via"))) as proxy:
        adapter = make(proxy=proxy_at(proxy.port, "user:pass@"))
        bodies = [post(adapter, "http://gateway.example/v1.0/expire").content for _ in range(2)]

    assert (bodies, proxy.connections) == ([b"via"] * 2, 1)
    head = head_of(proxy.requests[0])
    assert head[0] == "POST http://gateway.example/v1.0/expire HTTP/1.1"
    assert {"Host: gateway.example", "Proxy-Authorization: Basic dXNlcjpwYXNz"} <= set(head)


def test_https_goes_through_a_tunnel_and_is_checked_end_to_end(make: Make, authority: Authority) -> None:
    """CONNECT; the certificate is the gateway's, and the proxy's credentials stay with the proxy."""

    with (
        serving(always(answer(b"inside")), tls=authority.server("gateway.example")) as gateway,
        serving(tunnelling("gateway.example:443", ("127.0.0.1", gateway.port))) as proxy,
    ):
        adapter = make(authority.trust(), proxy_at(proxy.port, "user:pass@"))
        bodies = [post(adapter, "https://gateway.example/v1.0/expire").content for _ in range(3)]
        adapter.close()

    assert (bodies, proxy.connections, gateway.connections) == ([b"inside"] * 3, 1, 1)
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNz" in proxy.requests[0]
    assert not any(b"proxy-authorization" in request.lower() for request in gateway.requests)
    assert head_of(gateway.requests[0])[0] == "POST /v1.0/expire HTTP/1.1"


def test_a_gateway_that_is_someone_else_behind_the_tunnel_is_sent_nothing(make: Make, authority: Authority) -> None:
    """The proxy cannot stand in for the gateway."""

    with (
        serving(always(answer()), tls=authority.server("someone.example")) as gateway,
        serving(tunnelling("gateway.example:443", ("127.0.0.1", gateway.port))) as proxy,
        pytest.raises(NotSent, match="certificate not trusted"),
    ):
        post(make(authority.trust(), proxy_at(proxy.port)), "https://gateway.example/")

    assert gateway.requests == []


@pytest.mark.parametrize("status", ["403 Forbidden", "407 Proxy Authentication Required", "502 Bad Gateway"])
def test_a_proxy_that_refuses_the_tunnel_sends_nothing(make: Make, authority: Authority, status: str) -> None:
    """`NotSent` with the proxy's status, and never with its password, though the proxy repeats that."""
    refusing = always(answer(b"user:hush", b"X-Login: dXNlcjpodXNo", status=f"{status} dXNlcjpodXNo".encode()))

    with (
        serving(refusing) as proxy,
        pytest.raises(NotSent, match=f"through the proxy: it answers {status[:3]}") as refused,
    ):
        post(make(authority.trust(), proxy_at(proxy.port, "user:hush@")), "https://gateway.example/")

    assert "hush" not in str(refused.value)
    assert "dXNlcjpodXNo" not in str(refused.value)


@pytest.mark.parametrize(
    "said",
    [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200"],
    ids=["no HTTP", "too much", "cut off"],
)
def test_a_proxy_that_does_not_open_a_clear_way_sends_nothing(make: Make, authority: Authority, said: bytes) -> None:
    """`NotSent`: whatever is behind it, no byte of the request went there."""

    with serving(always(said, close=True)) as proxy, pytest.raises(NotSent, match="through the proxy"):
        post(make(authority.trust(), proxy_at(proxy.port)), "https://gateway.example/")

    assert all(request.startswith(b"CONNECT ") for request in proxy.requests)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_sends_nothing(make: Make, scheme: str) -> None:
    """`NotSent`: nobody has seen the request."""

    with pytest.raises(NotSent, match="through the proxy: Connection refused"):
        post(make(proxy=proxy_at(refusing_port())), f"{scheme}://gateway.example/")


def test_a_proxy_that_trickles_its_answer_to_connect_is_given_up_in_time(make: Make, authority: Authority) -> None:
    """The tunnel belongs to connecting."""

    with serving(after_request(lambda peer: peer.trickle(SLOW["status and headers"]))) as proxy:
        started = time.monotonic()
        with pytest.raises(NotSent, match="timed out"):
            post(make(authority.trust(), proxy_at(proxy.port)), "https://gateway.example/", connect=TOTAL)

    assert time.monotonic() - started < TOTAL + SLACK


def test_the_timeout_bounds_a_trickle_through_a_tunnel(make: Make, authority: Authority) -> None:
    """`Lost` when the total is over, as without a proxy."""

    with (
        serving(after_request(slowly(SLOW["body"])), tls=authority.server("gateway.example")) as gateway,
        serving(tunnelling("gateway.example:443", ("127.0.0.1", gateway.port))) as proxy,
    ):
        adapter = make(authority.trust(), proxy_at(proxy.port))
        started = time.monotonic()
        with pytest.raises(Lost, match="timed out"):
            post(adapter, "https://gateway.example/", total=TOTAL)
        took = time.monotonic() - started

    assert took < TOTAL + 2 * SLACK


def test_a_header_is_read_whole_whatever_its_case() -> None:
    """A header's value is found under any case of its name; one that is not there has the default."""
    headers = _Headers({"retry-after": "5", "date": "Fri, 27 Nov 2026 07:58:55 GMT"})

    assert headers.get("Retry-After") == "5"
    assert headers.get("date") == "Fri, 27 Nov 2026 07:58:55 GMT"
    assert headers.get("www-authenticate") is None
    assert headers.get("www-authenticate", "none") == "none"
