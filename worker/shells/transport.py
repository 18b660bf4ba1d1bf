"""A transport adapter for `requests` that bounds the whole answer in time and size, over one socket per adapter.

``requests`` stays the interface: prepared requests go in, responses come out. The stock adapter can bound only
single socket operations, and costs twice the CPU of everything else the worker does for a command. Parsing is
httptools' (llhttp, the parser of Node.js); this module moves bytes and keeps the clock. Sockets never block: who waits
for them, a thread or a fiber, is the caller's choice (`Waiting`).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

import httptools
import requests
from requests import exceptions
from requests.adapters import BaseAdapter
from requests.cookies import RequestsCookieJar
from requests.structures import CaseInsensitiveDict

MAX_BODY_BYTES: Final = 64 * 1024  # an answer is a hundred bytes; more is a firewall's page or a mistake
MAX_HEAD_BYTES: Final = 64 * 1024
MAX_ANSWER_BYTES: Final = 512 * 1024  # all of it: what surrounds chunks and follows them has no end of its own
_READ_BYTES: Final = 16 * 1024
IDLE_SECONDS: Final = 15.0
"""A connection idle for longer is closed, not reused: servers drop idle ones, and a POST into a closing one is a call
of which nobody knows whether it took effect."""


T = TypeVar("T")


class Waiting(Protocol):
    """How the caller waits."""

    def watch(self, connection: socket.socket) -> None:
        """A new connection, before it is waited for."""

    def wait(self, connection: socket.socket, events: int, deadline: float) -> None:
        """Until it is worth trying again (``events``: POLLIN or POLLOUT). Raises TimeoutError after ``deadline``."""

    def call(self, function: Callable[[], T], deadline: float) -> T:
        """Carries out what blocks. May raise TimeoutError after ``deadline``."""


class Blocking:
    """The thread itself waits."""

    def watch(self, connection: socket.socket) -> None:
        """See `Waiting`."""

    def wait(self, connection: socket.socket, events: int, deadline: float) -> None:
        """See `Waiting`."""
        poll = select.poll()  # select() cannot watch a descriptor above 1023
        poll.register(connection, events)
        if not poll.poll(max(_left(deadline), 0.001) * 1000):
            raise TimeoutError("timed out")

    def call(self, function: Callable[[], T], deadline: float) -> T:
        """See `Waiting`. Takes as long as it takes."""
        return function()


BLOCKING: Final = Blocking()


class NotSent(exceptions.ConnectionError):
    """No connection was made, or the request cannot be put into HTTP: the server saw nothing of it."""


class Lost(exceptions.ConnectionError):
    """The request went out, at least in part, and no complete answer came back."""


class BoundedAdapter(BaseAdapter):
    """One keep-alive connection to one origin, for one call at a time.

    ``send(timeout=(connect, total))``: seconds for connecting (TLS included), then for everything else, body included.
    Raises `NotSent` or `Lost`; redirects, cookies, proxies and content codings are not its business.
    """

    def __init__(self, context: ssl.SSLContext | None = None, waiting: Waiting = BLOCKING) -> None:
        super().__init__()
        self._context = context
        self._waiting = waiting
        self._line: _Line | None = None
        self._origin: tuple[str, str, int] | None = None
        self._idle_since = 0.0

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """See `requests.adapters.BaseAdapter.send`; ``verify`` and ``cert`` are the context's, given once."""
        connect, total = timeout
        origin, target = _target(request.url or "")
        data = _serialise(request, origin, target)
        line = self._connected(origin, connect)
        line.begin(total)
        try:
            line.send(data)
            answer = _receive(line)
        except OSError as error:
            self.close()
            raise Lost(describe(error), request=request) from None
        except httptools.HttpParserError as error:
            self.close()
            raise Lost(f"the answer is no HTTP: {error}", request=request) from None
        except httptools.HttpParserUpgrade:  # status 101; no HttpParserError
            self.close()
            raise Lost("the answer changes the protocol", request=request) from None
        except BaseException:
            self.close()
            raise
        if answer.reusable:
            self._idle_since = time.monotonic()
        else:
            self.close()
        return answer.response(request)

    def close(self) -> None:
        """Drops the connection."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _connected(self, origin: tuple[str, str, int], timeout: float) -> _Line:
        line = self._line
        if line is not None and (
            origin != self._origin or time.monotonic() - self._idle_since > IDLE_SECONDS or not line.quiet()
        ):
            self.close()
            line = None
        if line is None:
            line = self._line = _Line(self._open(origin, timeout), self._waiting)
            self._origin = origin
        return line

    def _open(self, origin: tuple[str, str, int], timeout: float) -> socket.socket:
        scheme, host, port = origin
        deadline = time.monotonic() + timeout
        try:
            raw = dial(host, port, deadline, self._waiting)
        except (OSError, UnicodeError) as error:
            raise NotSent(f"no connection to {host}:{port}: {describe(error)}") from None
        if scheme == "http":
            return raw
        try:
            return self._secured(raw, host.rstrip("."), deadline)
        except (OSError, ValueError) as error:
            raw.close()
            raise NotSent(f"no TLS with {host}:{port}: {describe(error)}") from None

    def _secured(self, raw: socket.socket, host: str, deadline: float) -> ssl.SSLSocket:
        context = self._context or ssl.create_default_context()
        secured = context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        try:
            _until_done(
                lambda events: self._waiting.wait(secured, events, deadline), select.POLLIN, secured.do_handshake
            )
        except BaseException:
            secured.close()
            raise
        return secured


class _Line:
    """A connected socket with one deadline for everything until the next `begin`."""

    def __init__(self, connection: socket.socket, waiting: Waiting) -> None:
        self._socket = connection
        self._waiting = waiting
        self._tls = isinstance(connection, ssl.SSLSocket)
        self._deadline = 0.0
        self._used = False
        self._early = False
        self.answer = _Answer()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def begin(self, total: float) -> None:
        """An exchange of at most ``total`` seconds begins."""
        self._deadline = time.monotonic() + total
        # No answer can be there yet: a used one was just found `quiet`. A new one may have been turned away already,
        # TLS may hold bytes that the socket no longer tells of, and who waits (`_wait`) may have used up the news.
        self._early = self._used and not self._tls
        self._used = True
        self.answer.begin()

    def send(self, data: bytes) -> None:
        """All of it. Raises OSError."""
        rest = data
        while rest:
            rest = rest[_until_done(self._wait, select.POLLOUT, self._socket.send, rest) :]

    def receive(self) -> bytes:
        """Some of what comes, empty at the end of the connection. Raises OSError."""
        if self._early:  # a try would be a system call for nothing
            self._wait(select.POLLIN)
        _left(self._deadline)
        return _until_done(self._wait, select.POLLIN, self._socket.recv, _READ_BYTES)

    def quiet(self) -> bool:
        """Whether nothing has come since the last answer: neither its end nor a surplus answer to an older request."""
        if not self._poll.poll(0):
            return True
        if not self._tls:
            return False
        try:
            self._socket.recv(1)
        except ssl.SSLWantReadError:
            return True  # TLS talking to itself: a session ticket, say
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Gives the descriptor back."""
        self._socket.close()

    def _wait(self, events: int) -> None:
        self._early = False
        self._waiting.wait(self._socket, events, self._deadline)


def _until_done(wait: Callable[[int], None], events: int, operation: Callable[..., T], *arguments: Any) -> T:
    """The operation's result, waiting for the socket as often as it would block. Raises OSError."""
    while True:
        try:
            return operation(*arguments)
        except BlockingIOError:
            awaited = events
        except ssl.SSLWantReadError:
            awaited = select.POLLIN
        except ssl.SSLWantWriteError:
            awaited = select.POLLOUT
        wait(awaited)


class _Answer:
    """What the parser reports of one connection's answers, one after the other; 1xx answers are passed over.

    One for all: a parser and its callbacks hold each other, so a new pair for every answer would be work for the
    garbage collector, ten times the price of making it.
    """

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.begin()

    def begin(self) -> None:
        """The next answer may come."""
        self.headers: dict[str, tuple[str, str]] = {}  # as CaseInsensitiveDict keeps them
        self.reason = ""
        self.body: list[bytes] = []
        self.size = 0
        self.status = 0
        self.headed = False
        self.complete = False
        self.keep_alive = False
        self.surplus = False

    # -- httptools' callbacks; an exception in one ends the parse ---------------------------------------------------

    def on_message_begin(self) -> None:
        self.surplus = self.complete  # a second answer to one request: not ours, and nothing after it can be trusted

    def on_status(self, status: bytes) -> None:
        if not self.surplus:
            self.reason = status.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.surplus or self.headed:  # headed: trailers, which are no headers (RFC 9110 6.5.1)
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1").rstrip(" \t")
        self.headers[key] = (key, f"{self.headers[key][1]}, {text}" if key in self.headers else text)

    def on_headers_complete(self) -> None:
        if self.surplus:
            return
        self.status = self.parser.get_status_code()
        if self.status >= 200:
            self.headed = True

    def on_body(self, data: bytes) -> None:
        if not self.surplus:
            self.size += len(data)
            self.body.append(data)

    def on_message_complete(self) -> None:
        if self.surplus:
            return
        if self.status < 200:
            self.headers.clear()  # 100 Continue, 103 Early Hints: the answer is still to come
            return
        self.complete = True
        self.keep_alive = self.parser.should_keep_alive()

    # ---------------------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Parses what came. Raises httptools' errors for what is no HTTP."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            if not self.complete:
                raise
            self.surplus = True  # whatever follows a whole answer, the answer stands

    @property
    def too_large(self) -> bool:
        return self.size > MAX_BODY_BYTES

    @property
    def reusable(self) -> bool:
        return self.complete and self.keep_alive and not self.surplus

    def ends_with_connection(self) -> bool:
        """RFC 9112 6.3: without a length the body ends where the connection does."""
        return self.headed and "content-length" not in self.headers and "transfer-encoding" not in self.headers

    def response(self, request: requests.PreparedRequest) -> requests.Response:
        response = _Response()
        response.status_code = self.status
        response.reason = self.reason
        response.headers = _Headers(self.headers)
        response._content = b"".join(self.body)[:MAX_BODY_BYTES]
        response.url = request.url or ""
        response.request = request
        return response


class _Response(requests.Response):
    """A response without the cookie jar that every `requests.Response` makes, locks and all: it costs as much as the
    exchange. Whoever asks for cookies gets an empty one."""

    _content_consumed = True
    _next = None
    raw = None
    encoding = None
    history: list[requests.Response]

    def __init__(self) -> None:
        self.history = []
        self.elapsed = timedelta(0)

    @property
    def cookies(self) -> RequestsCookieJar:  # type: ignore[override]
        """None are kept."""
        return RequestsCookieJar()


class _Headers(CaseInsensitiveDict[str]):
    """Takes over what its parent would copy entry by entry, through three frames of Python each."""

    def __init__(self, store: dict[str, tuple[str, str]] | None = None) -> None:
        self._store = store if store is not None else {}

    def copy(self) -> CaseInsensitiveDict[str]:
        """See the parent, whose constructor is another."""
        return CaseInsensitiveDict(self.items())


@lru_cache(maxsize=64)  # a worker calls two
def _target(url: str) -> tuple[tuple[str, str, int], str]:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    return (parts.scheme, parts.hostname or "", port), target


def _serialise(request: requests.PreparedRequest, origin: tuple[str, str, int], target: str) -> bytes:
    scheme, host, port = origin
    body = body_of(request)
    default = 443 if scheme == "https" else 80
    authority = f"[{host}]" if ":" in host else host
    if port != default:
        authority = f"{authority}:{port}"
    lines = [f"{request.method} {target} HTTP/1.1", f"Host: {authority}"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    if "Content-Length" not in request.headers:
        lines.append(f"Content-Length: {len(body)}")
    return checked(lines) + b"\r\n\r\n" + body


def checked(lines: list[str]) -> bytes:
    """The lines of a head joined, without its end. Raises `NotSent` where one holds a line break or NUL: a value with
    CRLF in it would be a header of its own."""
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1 or "\0" in head:
        raise NotSent("a header holds a line break or NUL")
    try:
        return head.encode("latin-1")
    except UnicodeEncodeError:
        raise NotSent("a header holds characters beyond Latin-1") from None


def body_of(request: requests.PreparedRequest) -> bytes:
    """The bytes to send. Raises `NotSent` for a body that is not in memory."""
    body = request.body or b""
    if isinstance(body, str):
        return body.encode()
    if not isinstance(body, bytes):
        raise NotSent("only bodies in memory are sent")
    return body


def dial(host: str, port: int, deadline: float, waiting: Waiting = BLOCKING) -> socket.socket:
    """A connected socket that never blocks, nor waits before it sends. Raises OSError, or UnicodeError for what is no
    name.

    Each address of a name gets an equal share of the time that is left, or one that swallows packets would keep the
    next from being tried. A thread that looks up the name takes the time that the system's resolver takes.
    """
    found = waiting.call(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), deadline)
    failure: OSError = OSError("no address")
    for tried, (family, kind, protocol, _, address) in enumerate(found):
        raw: socket.socket | None = None
        try:
            raw = socket.socket(family, kind, protocol)
            raw.setblocking(False)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _connect(raw, address, time.monotonic() + _left(deadline) / (len(found) - tried), waiting)
        except OSError as error:
            failure = error
            if raw is not None:
                raw.close()
        except BaseException:
            if raw is not None:
                raw.close()
            raise
        else:
            return raw
    raise failure


def _connect(raw: socket.socket, address: Any, deadline: float, waiting: Waiting) -> None:
    number = raw.connect_ex(address)
    waiting.watch(raw)
    if number == errno.EINPROGRESS:
        waiting.wait(raw, select.POLLOUT, deadline)
        number = raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))


def _receive(line: _Line) -> _Answer:
    answer = line.answer
    received = 0
    while not answer.complete:
        data = line.receive()
        if not data:
            if answer.ends_with_connection():
                answer.complete = True
                return answer
            raise ConnectionResetError(
                "the connection was closed before an answer" if not received else "the answer is cut off"
            )
        received += len(data)
        answer.feed(data)
        if not answer.headed and received > MAX_HEAD_BYTES:
            raise ConnectionAbortedError(f"more than {MAX_HEAD_BYTES} bytes of headers")
        if received > MAX_ANSWER_BYTES:
            raise ConnectionAbortedError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        if answer.too_large:
            return answer  # not complete, so the connection is not reused; what it says does not matter
    return answer


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def describe(error: Exception) -> str:
    """The error in words, without addresses of memory or of peers."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not trusted: {error.verify_message}"
    if isinstance(error, UnicodeError):
        return "no valid host name"
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
