"""A transport adapter for `requests` that bounds the whole answer in time and size, over one socket per adapter.

``requests`` stays the interface: prepared requests go in, responses come out. The adapter that ships with it can bound
only single socket operations, and costs twice the CPU of everything else the worker does for a command. What an answer
is, `worker.core.answer` decides; this module moves bytes and keeps the deadline. Sockets never block: who waits for
them, a thread or a fiber, is the caller's choice (`Waiting`).
"""

from __future__ import annotations

import base64
import errno
import math
import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import requests
from requests import exceptions
from requests.adapters import BaseAdapter
from requests.cookies import RequestsCookieJar
from requests.structures import CaseInsensitiveDict

from worker.core.answer import MAX_ANSWER_BYTES, Answer, NotHttp, TooLarge

_READ_BYTES: Final = 16 * 1024
_READS_IN_A_TURN: Final = 64
"""An answer in one-byte TLS records is a hundred thousand reads, none of which has to wait. After so many reads the
other senders get a turn, and after every read that is as large as reads can be: it may hold thousands of chunks."""
_LATE_READS: Final = MAX_ANSWER_BYTES // _READ_BYTES
"""What is in the socket when the time is over is still read, so many times at most."""
IDLE_SECONDS: Final = 15.0
"""A connection idle for longer is closed, not reused: servers drop idle ones, and a POST into a closing connection is a
call whose effect is unknown."""

_HANDSHAKE_REFUSED: Final = frozenset(
    {
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_REVOKED",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "SSLV3_ALERT_HANDSHAKE_FAILURE",
        "TLSV1_ALERT_UNKNOWN_CA",
        "TLSV1_ALERT_ACCESS_DENIED",
    }
)
"""In TLS 1.3 a client has sent its request before the server refuses its certificate. These alerts end a handshake, so
the request was never read."""

T = TypeVar("T")


class Waiting(Protocol):
    """How the caller waits. Deadlines are moments of its own clock, `now`."""

    def now(self) -> float:
        """Seconds by a monotonic clock; time in which the caller could not run may be left out."""

    def watch(self, connection: socket.socket) -> None:
        """A new connection, before it is waited for."""

    def wait(self, connection: socket.socket, events: int, deadline: float) -> None:
        """Until it is worth trying again (``events``: POLLIN or POLLOUT). Raises TimeoutError after ``deadline``."""

    def give_way(self) -> None:
        """Lets the others have a turn."""

    def call(self, function: Callable[[], T], deadline: float) -> T:
        """Carries out what blocks. May raise TimeoutError after ``deadline``."""


class Blocking:
    """The thread itself waits."""

    def now(self) -> float:
        """See `Waiting`."""
        return time.monotonic()

    def watch(self, connection: socket.socket) -> None:
        """See `Waiting`."""

    def wait(self, connection: socket.socket, events: int, deadline: float) -> None:
        """See `Waiting`."""
        poll = select.poll()  # select() cannot watch a descriptor above 1023
        poll.register(connection, events)
        if not poll.poll(max(deadline - time.monotonic(), 0.0) * 1000):
            raise TimeoutError("timed out")

    def give_way(self) -> None:
        """See `Waiting`. The system does that for threads."""

    def call(self, function: Callable[[], T], deadline: float) -> T:
        """See `Waiting`. Takes as long as it takes."""
        return function()


BLOCKING: Final = Blocking()


class Proxy(NamedTuple):
    """An HTTP proxy, spoken to in clear. ``authorization``: the value of Proxy-Authorization, or nothing."""

    host: str
    port: int
    authorization: str = ""

    @classmethod
    def at(cls, url: str) -> Proxy:
        """The proxy of an ``http://user:password@host:port`` URL. Raises ValueError, without the URL in it, for what is
        none."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or port == 0 or parts.scheme not in ("http", "https"):
            raise ValueError("must be the URL of an HTTP proxy, as http://host:3128, or empty")
        if parts.scheme == "https":
            raise ValueError(
                "TLS to a proxy is not supported (what goes through it is encrypted); begin it with http://"
            )
        if parts.username is None:
            return cls(host, port or 80)
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return cls(host, port or 80, f"Basic {base64.b64encode(login.encode()).decode()}")


class NotSent(exceptions.ConnectionError):
    """No connection was made, or the request cannot be put into HTTP: the server saw nothing of it."""


class Starved(NotSent):
    """This process may open no more files, so there was no call."""


class TooLate(NotSent):
    """The time in which the request was to begin was over when the connection was open, and nothing was sent."""


class Lost(exceptions.ConnectionError):
    """The request went out, at least in part, and no complete answer came back."""


class BoundedAdapter(BaseAdapter):
    """One keep-alive connection to one origin, for one call at a time, through a proxy where one is given.

    ``send(timeout=(connect, total))``: seconds for connecting (the proxy's CONNECT and TLS included), then for
    everything else, body included; a third one is the moment by `time.monotonic` until which the request must begin.
    Raises `NotSent` or `Lost`; redirects and cookies are not its business.
    """

    def __init__(
        self, context: ssl.SSLContext | None = None, waiting: Waiting = BLOCKING, proxy: Proxy | None = None
    ) -> None:
        super().__init__()
        self._context = context
        self._waiting = waiting
        self._proxy = proxy
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
        """See `requests.adapters.BaseAdapter.send`; ``verify``, ``cert`` and ``proxies`` are the constructor's, given
        once."""
        connect, total, *latest = timeout
        origin, opening = _opening(request.method or "", request.url or "", self._proxy)
        data = _serialised(request, opening)
        line = self._connected(origin, connect)
        if latest and latest[0] < math.inf and time.monotonic() > latest[0]:
            raise TooLate("the time of its permit was over before it could be sent")
        line.begin(total)
        try:
            line.send(data)
            answer = line.receive(Answer())
            reusable = answer.reusable
            surplus = not answer.cut and (
                (not reusable and answer.surplus) or (line.may_hold_more and line.holds_more())
            )
        except (OSError, NotHttp) as error:
            self.close()
            if isinstance(error, ssl.SSLError) and error.reason in _HANDSHAKE_REFUSED:
                raise NotSent(f"no TLS with {origin[1]}:{origin[2]}: {describe(error)}") from None
            raise Lost(describe(error), request=request) from None
        except BaseException:
            self.close()
            raise
        if surplus:
            self.close()
            raise Lost("more than one answer came, and it is unknown which one is this call's", request=request)
        if reusable and not line.ended:
            self._idle_since = time.monotonic()
        else:
            self.close()
        return _response(answer, request)

    def close(self) -> None:
        """Drops the connection."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _connected(self, origin: tuple[str, str, int], timeout: float) -> _Line:
        line = self._line
        if line is not None and (
            origin != self._origin
            or time.monotonic() - self._idle_since > IDLE_SECONDS
            or line.holds_more()
            or line.ended
        ):
            self.close()
            line = None
        if line is None:
            line = self._line = _Line(self._open(origin, timeout), self._waiting)
            self._origin, self._idle_since = origin, time.monotonic()
        return line

    def _open(self, origin: tuple[str, str, int], timeout: float) -> socket.socket:
        scheme, host, port = origin
        deadline = self._waiting.now() + timeout
        via = " through the proxy" if self._proxy else ""
        try:
            to = self._proxy or Proxy(host, port)
            raw = dial(to.host, to.port, deadline, self._waiting)
            if scheme == "http":
                return raw
            if self._proxy is not None:
                self._tunnel(raw, host, port, deadline)
        except (OSError, UnicodeError, NotHttp) as error:
            kind = Starved if isinstance(error, OSError) and _starved(error) else NotSent
            raise kind(f"no connection to {host}:{port}{via}: {describe(error)}") from None
        try:
            return self._secured(raw, host.rstrip("."), deadline)
        except (OSError, ValueError) as error:
            raw.close()
            raise NotSent(f"no TLS with {host}:{port}{via}: {describe(error)}") from None

    def _tunnel(self, raw: socket.socket, host: str, port: int, deadline: float) -> None:
        """Asks the proxy for a way to the gateway. Raises OSError or `NotHttp`; the socket is closed then."""
        assert self._proxy is not None
        authority = _authority(host, port)
        lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}", *_proxy_fields(self._proxy)]
        line = _Line(raw, self._waiting, deadline)
        try:
            line.send(_head(lines))
            answer = line.receive(Answer(tunnel=True))
            if not 200 <= answer.status < 300:
                raise ConnectionRefusedError(None, f"it answers {answer.status}")
            if answer.surplus:
                raise NotHttp("it says more than that the way is open")
        except BaseException:
            raw.close()
            raise

    def _secured(self, raw: socket.socket, host: str, deadline: float) -> ssl.SSLSocket:
        context = self._context or trust()
        secured = context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        try:
            _until_done(
                lambda events: self._waiting.wait(secured, events, deadline), select.POLLIN, secured.do_handshake
            )
        except BaseException:
            secured.close()
            raise
        return secured


def trust(ca_file: Path | None = None, cert_file: Path | None = None, key_file: Path | None = None) -> ssl.SSLContext:
    """Whom to trust: the system's authorities, or those of a file; and the client certificate to show, if there is one.
    Raises `Unusable` for a file that is not what it should be.

    A certificate has to name its host in subjectAltName. A name that is only in the subject's common name is not
    accepted, as in browsers and urllib3 2: authorities check that field less.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (ssl.SSLError, OSError):
        raise Unusable(_unreadable(ca_file) or "holds no CA certificate in PEM", "ca_file") from None
    context.hostname_checks_common_name = False
    if cert_file is None:
        return context
    try:
        context.load_cert_chain(cert_file, key_file, password="")  # without it, OpenSSL would ask the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise Unusable("is not the key of the certificate in GATEWAY_CERT_FILE", "key_file") from None
        raise Unusable(*_no_pair(cert_file, key_file)) from None
    except (OSError, ValueError):
        raise Unusable(*_no_pair(cert_file, key_file)) from None
    return context


class Unusable(ValueError):
    """A file of the settings that TLS cannot use. ``setting`` is its field."""

    def __init__(self, problem: str, setting: str) -> None:
        super().__init__(problem)
        self.setting = setting


def _unreadable(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        path.open("rb").close()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def _no_pair(cert_file: Path, key_file: Path | None) -> tuple[str, str]:
    """Which of the two is wrong, and how."""
    for path, setting in ((cert_file, "cert_file"), (key_file, "key_file")):
        if problem := _unreadable(path):
            return problem, setting
    if b"BEGIN CERTIFICATE" not in cert_file.read_bytes():
        return "holds no certificate in PEM", "cert_file"
    if key_file is not None and b"ENCRYPTED" in key_file.read_bytes():
        return "is encrypted; decrypt it: openssl pkey -in KEY -out KEY.pem", "key_file"
    return "holds no private key in PEM", "key_file"


class _Line:
    """A connected socket with one deadline for everything until the next `begin`.

    ``ended``: the peer has closed. ``may_hold_more``: the last read need not have brought all that had come.
    """

    def __init__(self, connection: socket.socket, waiting: Waiting, deadline: float = 0.0) -> None:
        self.ended = False
        self.may_hold_more = False
        self._socket = connection
        self._waiting = waiting
        self._tls = isinstance(connection, ssl.SSLSocket)
        self._deadline = deadline
        self._used = False
        self._waits_first = False
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def begin(self, total: float) -> None:
        """An exchange of at most ``total`` seconds begins."""
        self._deadline = self._waiting.now() + total
        # No answer can be there yet on a used connection, which was just found to hold nothing: a try would be a system
        # call for nothing. A new one may have been turned away already, TLS may hold bytes that the socket no longer
        # tells of, and whoever waits while it sends (`_wait`) may have used up the event that tells of them.
        self._waits_first = self._used and not self._tls
        self._used = True

    def send(self, data: bytes) -> None:
        """All of it. Raises OSError."""
        rest = data
        try:
            while rest:
                rest = rest[_until_done(self._wait, select.POLLOUT, self._socket.send, rest) :]
        except TimeoutError:
            raise
        except OSError:
            if self._tls:
                self._hear_why()
            raise

    def _hear_why(self) -> None:
        """A peer that has closed may have said why in an alert that nobody has read. Raises that as ssl.SSLError."""
        with suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLEOFError, ConnectionError):
            self._socket.recv(_READ_BYTES)

    def receive(self, answer: Answer) -> Answer:
        """One whole answer. Raises OSError, or `NotHttp` for what is none."""
        reads = late = 0
        while not answer.complete:
            if reads and self._waiting.now() > self._deadline:  # what is there already is read, but not for ever
                late += 1
                if late > _LATE_READS:
                    raise TimeoutError("timed out")
            data = _until_done(self._wait, select.POLLIN, self._socket.recv, _READ_BYTES, waits_first=self._waits_first)
            if not data:
                self.ended = True
                if not answer.end():
                    said = "the answer is cut off" if answer.received else "the connection was closed before an answer"
                    raise ConnectionResetError(None, said)
                break
            answer.feed(data)
            self.may_hold_more = self._tls or len(data) == _READ_BYTES
            reads += 1
            if reads % _READS_IN_A_TURN == 0 or len(data) == _READ_BYTES:
                self._waiting.give_way()
        return answer

    def holds_more(self) -> bool:
        """Whether bytes have come that nobody asked for, such as a second answer to an older request."""
        if not (self._poll.poll(0) or (self._tls and self._socket.pending())):  # type: ignore[attr-defined]
            return False
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False  # TLS talking to itself: a session ticket, say
        except OSError:
            data = b""
        self.ended = self.ended or not data
        return bool(data.strip(b"\r\n"))

    def close(self) -> None:
        """Gives the descriptor back."""
        self._socket.close()

    def _wait(self, events: int) -> None:
        self._waits_first = False
        self._waiting.wait(self._socket, events, self._deadline)


def _until_done(
    wait: Callable[[int], None], events: int, operation: Callable[..., T], *arguments: Any, waits_first: bool = False
) -> T:
    """The operation's result, waiting for the socket as often as it would block, and before the first try where told
    so. Raises OSError.

    The socket has the last word, not the clock: after a deadline has passed the operation is tried once more, since the
    process may have been stopped while the answer came.
    """
    over: TimeoutError | None = None
    awaited = events if waits_first else 0
    while True:
        if awaited:
            try:
                wait(awaited)
            except TimeoutError as error:
                over = error
        try:
            return operation(*arguments)
        except BlockingIOError:
            awaited = events
        except ssl.SSLWantReadError:
            awaited = select.POLLIN
        except ssl.SSLWantWriteError:
            awaited = select.POLLOUT
        if over is not None:
            raise over


def _response(answer: Answer, request: requests.PreparedRequest) -> requests.Response:
    response = _Response()
    response.status_code = answer.status
    response.reason = answer.reason
    response.headers = _Headers(answer.headers)
    response._content = answer.body
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
    elapsed = timedelta(0)

    def __init__(self) -> None:
        self.history = []

    @property
    def cookies(self) -> RequestsCookieJar:  # type: ignore[override]
        """None are kept."""
        return RequestsCookieJar()


class _Headers(CaseInsensitiveDict[str]):
    """Takes over the headers of an answer, whose names are in small letters already; its parent would copy them one by
    one, through three frames of Python each."""

    def __init__(self, store: dict[str, str] | None = None) -> None:
        self._store: dict[str, str] = store if store is not None else {}

    def __getitem__(self, key: str) -> str:
        return self._store[key.lower()]

    def __setitem__(self, key: str, value: str) -> None:
        self._store[key.lower()] = value

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def lower_items(self) -> Iterator[tuple[str, str]]:
        """See the parent."""
        return iter(self._store.items())

    def get(self, name: str, default: Any = None) -> Any:
        """See the parent, which raises and catches a KeyError for each header that an answer does not have."""
        return self._store.get(name.lower(), default)

    def copy(self) -> CaseInsensitiveDict[str]:
        """See the parent, whose constructor is another."""
        return CaseInsensitiveDict(self.items())


@lru_cache(maxsize=64)  # a worker calls two
def _opening(method: str, url: str, proxy: Proxy | None) -> tuple[tuple[str, str, int], tuple[str, ...]]:
    """Scheme, host and port of the URL; and the lines that begin each request to it."""
    parts = urlsplit(url)
    scheme, host, default = parts.scheme, parts.hostname or "", 443 if parts.scheme == "https" else 80
    port = parts.port or default
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    authority = _authority(host, port) if port != default else _authority(host)
    fields = [f"Host: {authority}"]
    if proxy is not None and scheme == "http":
        target = f"http://{authority}{target}"
        fields += _proxy_fields(proxy)
    return (scheme, host, port), (f"{method} {target} HTTP/1.1", *fields)


def _serialised(request: requests.PreparedRequest, opening: Sequence[str]) -> bytes:
    """The whole request in one piece: a head and a body in two packets can wait 40 ms for each other (Nagle, delayed
    acknowledgements)."""
    body = request.body if isinstance(request.body, bytes) else _body_of(request)
    lines = [*opening, *[f"{name}: {value}" for name, value in request.headers.items()]]
    if "Content-Length" not in request.headers:
        lines.append(f"Content-Length: {len(body)}")
    return _head(lines) + body


def _authority(host: str, port: int | None = None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def _proxy_fields(proxy: Proxy) -> list[str]:
    return [f"Proxy-Authorization: {proxy.authorization}"] if proxy.authorization else []


def _head(lines: list[str]) -> bytes:
    """The head of a request. Raises `NotSent` where a line holds a line break or NUL: a value with CRLF in it would be
    a header of its own."""
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1 or "\0" in head:
        raise NotSent("a header holds a line break or NUL")
    try:
        return f"{head}\r\n\r\n".encode("latin-1")
    except UnicodeEncodeError:
        raise NotSent("a header holds characters beyond Latin-1") from None


def _body_of(request: requests.PreparedRequest) -> bytes:
    """The bytes to send of a body that is not given as bytes. Raises `NotSent` for one that is not in memory."""
    body = request.body or ""
    if not isinstance(body, str):
        raise NotSent("only bodies in memory are sent")
    return body.encode()


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
            left = deadline - waiting.now()
            if left <= 0:
                raise TimeoutError("timed out")
            raw = socket.socket(family, kind, protocol)
            raw.setblocking(False)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _connect(raw, address, waiting.now() + left / (len(found) - tried), waiting)
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


def _starved(error: OSError) -> bool:
    """Whether descriptors are what was missing. The resolver says something else then, so one is tried."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    if not isinstance(error, socket.gaierror):
        return False
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as another:
        return another.errno in (errno.EMFILE, errno.ENFILE)
    return False


def _connect(raw: socket.socket, address: Any, deadline: float, waiting: Waiting) -> None:
    begun = False

    def connect() -> None:
        nonlocal begun
        number = raw.connect_ex(address)
        if not begun:
            begun = True
            waiting.watch(raw)
        if number in (errno.EINPROGRESS, errno.EALREADY):
            raise BlockingIOError
        if number not in (0, errno.EISCONN):
            raise OSError(number, os.strerror(number))

    _until_done(lambda events: waiting.wait(raw, events, deadline), select.POLLOUT, connect)


def describe(error: Exception) -> str:
    """The error in words, without addresses of memory or of peers."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, TooLarge):
        return str(error)
    if isinstance(error, NotHttp):
        return f"the answer is no HTTP: {error}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if isinstance(error, UnicodeError):
        return "no valid host name"
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
