"""A transport adapter for `requests` that bounds the whole answer in time and size, over one socket per adapter.

``requests`` stays the interface: prepared requests go in, responses come out. The stock adapter can bound only
single socket operations, and costs twice the CPU of everything else the worker does for a command. Parsing is
httptools' (llhttp, the parser of Node.js); this module moves bytes and keeps the clock.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final
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
SLACK: Final = 0.1  # seconds by which the bound of a whole answer may be missed
IDLE_SECONDS: Final = 15.0
"""A connection idle for longer is closed, not reused: servers drop idle ones, and a POST into a closing one is a call
of which nobody knows whether it took effect."""


class NotSent(exceptions.ConnectionError):
    """No connection was made, or the request cannot be put into HTTP: the server saw nothing of it."""


class Lost(exceptions.ConnectionError):
    """The request went out, at least in part, and no complete answer came back."""


class BoundedAdapter(BaseAdapter):
    """One keep-alive connection to one origin. Not thread-safe: one adapter (and session) per thread.

    ``send(timeout=(connect, total))``: seconds for connecting (TLS included), then for everything else, body included.
    Raises `NotSent` or `Lost`; redirects, cookies, proxies and content codings are not its business.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self._context = context
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
            line = self._line = _Line(self._open(origin, timeout))
            self._origin = origin
        return line

    def _open(self, origin: tuple[str, str, int], timeout: float) -> socket.socket:
        scheme, host, port = origin
        deadline = time.monotonic() + timeout
        try:
            raw = dial(host, port, deadline)
        except (OSError, UnicodeError) as error:
            raise NotSent(f"no connection to {host}:{port}: {describe(error)}") from None
        if scheme == "http":
            return raw
        try:
            raw.settimeout(_left(deadline))  # bounds the whole handshake, not each of its reads
            context = self._context or ssl.create_default_context()
            return context.wrap_socket(raw, server_hostname=host.rstrip("."))
        except (OSError, ValueError) as error:
            raw.close()
            raise NotSent(f"no TLS with {host}:{port}: {describe(error)}") from None


class _Line:
    """A connected socket with one deadline for everything until the next `begin`.

    Every system call lets another thread take the interpreter lock, and getting it back costs more than the call. So
    the time-out of single operations is changed only when the time that is left differs from it by more than `SLACK`:
    for a usual exchange never. Plain sockets keep it in the kernel, which also saves Python's poll before each
    operation; TLS has to have it from Python.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._tls = isinstance(connection, ssl.SSLSocket)
        if not self._tls:
            connection.settimeout(None)
        self._limit = -1.0
        self._deadline = 0.0
        self._poll = select.poll()  # select() cannot watch a descriptor above 1023
        self._poll.register(connection, select.POLLIN)

    def begin(self, total: float) -> None:
        """An exchange of at most ``total`` seconds begins."""
        self._deadline = time.monotonic() + total

    def send(self, data: bytes) -> None:
        """All of it. Raises OSError."""
        rest = memoryview(data)
        try:
            while rest:
                self._bound()
                rest = rest[self._socket.send(rest) :]
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def receive(self) -> bytes:
        """Some of what comes, empty at the end of the connection. Raises OSError."""
        self._bound()
        try:
            return self._socket.recv(16 * 1024)
        except BlockingIOError:
            raise TimeoutError("timed out") from None

    def quiet(self) -> bool:
        """Whether nothing has come since the last answer: neither its end nor a surplus answer to an older request."""
        if not self._poll.poll(0):
            return True
        if not self._tls:
            return False
        try:
            self._set(0.0)
            self._socket.recv(1)
        except ssl.SSLWantReadError:
            return True  # TLS talking to itself: a session ticket, say
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Gives the descriptor back."""
        self._socket.close()

    def _bound(self) -> None:
        left = _left(self._deadline)
        if abs(left - self._limit) > SLACK:
            self._set(left)

    def _set(self, seconds: float) -> None:
        self._limit = seconds
        if self._tls:
            self._socket.settimeout(seconds)
            return
        whole, micro = divmod(max(int(seconds * 1_000_000), 1), 1_000_000)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", whole, micro))


class _Answer:
    """What the parser reports of one response; 1xx answers are passed over."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.headers: dict[str, str] = {}
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
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

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
        response.headers = CaseInsensitiveDict(self.headers)
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


def dial(host: str, port: int, deadline: float) -> socket.socket:
    """A connected socket that waits for nothing before it sends. Raises OSError, or UnicodeError for what is no name.

    Each address of a name gets an equal share of the time that is left, or one that swallows packets would keep the
    next from being tried. Looking up the name takes the time that the system's resolver takes.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure: OSError = OSError("no address")
    for tried, (family, kind, protocol, _, address) in enumerate(found):
        raw: socket.socket | None = None
        try:
            raw = socket.socket(family, kind, protocol)
            raw.settimeout(_left(deadline) / (len(found) - tried))
            raw.connect(address)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            failure = error
            if raw is not None:
                raw.close()
        else:
            return raw
    raise failure


def _receive(line: _Line) -> _Answer:
    answer = _Answer()
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
