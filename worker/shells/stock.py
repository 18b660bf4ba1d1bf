"""The adapter that ships with requests, under the contract of the bounded one: for proxies, and to fall back to.

urllib3 bounds single socket operations. Here the connection asks the call under way before each of them how much time
and how many bytes are left, so that a trickle of bytes ends when the call's time does.
"""

from __future__ import annotations

import copy
import functools
import http.client
import io
import ssl
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import HTTPError, NewConnectionError
from urllib3.util import SKIP_HEADER
from urllib3.util.response import assert_header_parsing

from worker.shells.transport import (
    IDLE_SECONDS,
    MAX_ANSWER_BYTES,
    MAX_BODY_BYTES,
    MAX_HEAD_BYTES,
    Lost,
    NotSent,
    body_of,
    checked,
    describe,
    dial,
)

_READ_BYTES: Final = 16 * 1024


class StockAdapter(HTTPAdapter):
    """requests' adapter without retries, one keep-alive connection to one origin. For one call at a time.

    Takes, bounds and raises what `BoundedAdapter` does. ``proxies`` are requests' own, scheme to URL; connecting then
    includes the proxy's answer to CONNECT. (Only the TLS handshake *inside* TLS to a proxy is bounded read by read.)
    """

    def __init__(self, context: ssl.SSLContext | None = None, proxies: Mapping[str, str] | None = None) -> None:
        self._context = context
        self._proxies = dict(proxies or {})
        self._call = _Call()
        self._pool: HTTPConnectionPool | None = None
        self._idle_since = 0.0
        super().__init__(pool_connections=1, pool_maxsize=1, max_retries=0)

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """See `BoundedAdapter.send`; ``proxies`` are the constructor's, given once."""
        framed = _framed(request)
        connect, total = timeout
        self._call.start(connect, total)
        if time.monotonic() - self._idle_since > IDLE_SECONDS:
            self.close()
        try:
            response = super().send(framed, stream=True, timeout=(connect, total), proxies=self._proxies)
            whole = _take_body(response)
        except (requests.RequestException, HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            self.close()
            raise self._failure(error, request) from None
        except BaseException:
            self.close()
            raise
        response.request = request
        self._idle_since = time.monotonic()
        if self._call.surplus or not whole:
            self.close()
        return response

    def close(self) -> None:
        """Drops the connection."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        super().close()

    # -- what HTTPAdapter asks for --------------------------------------------------------------------------------

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> Any:
        """The origin, and our context alone: HTTPAdapter's own would bring certifi's CAs into it."""
        parts = urlsplit(request.url or "")
        secure = parts.scheme == "https"
        if secure and self._context is None:
            self._context = ssl.create_default_context()
        origin = {"scheme": parts.scheme, "host": parts.hostname, "port": parts.port}
        return origin, {"ssl_context": self._context} if secure else {}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Nothing: the context says whom to trust."""

    def get_connection_with_tls_context(
        self, request: Any, verify: Any, proxies: Any = None, cert: Any = None
    ) -> HTTPConnectionPool:
        """The pool of the origin, making connections that ask the call."""
        pool: Any = super().get_connection_with_tls_context(request, verify, proxies=proxies, cert=cert)
        if pool is not self._pool:
            kind = _SecureConnection if pool.scheme == "https" else _Connection
            pool.ConnectionCls = functools.partial(kind, self._call)
            self._pool = pool
        return pool  # type: ignore[no-any-return]

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        """Without cookies: they are not its business, and cost more than the rest."""
        response = requests.Response()
        response.status_code = resp.status
        response.reason = resp.reason
        response.headers = CaseInsensitiveDict({name: resp.headers[name].rstrip() for name in resp.headers})
        response.url = req.url
        response.raw = resp
        return response

    def _failure(self, error: Exception, request: requests.PreparedRequest) -> NotSent | Lost:
        cause = _cause(error)
        if self._call.sent:
            return Lost(_words(cause), request=request)
        if not isinstance(cause, (OSError, UnicodeError)):
            return NotSent("the request cannot be put into HTTP", request=request)  # its text may hold a header
        parts = urlsplit(request.url or "")
        to = f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
        via = " through the proxy" if self._proxies else ""
        return NotSent(f"no connection to {to}{via}: {describe(cause)}", request=request)


class _Call:
    """The call under way: what it may still take, and what is known of it."""

    __slots__ = ("_deadline", "_limit", "_received", "_total", "sent", "surplus")

    def __init__(self) -> None:
        self.start(0.0, 0.0)

    def start(self, connect: float, total: float) -> None:
        """Connecting may take ``connect`` seconds, then everything else ``total``."""
        self._deadline = time.monotonic() + connect
        self._total = total
        self._limit = MAX_HEAD_BYTES
        self._received = 0
        self.sent = False
        self.surplus = False

    def sending(self) -> None:
        """From here on the server may have seen the request."""
        self._deadline = time.monotonic() + self._total
        self._received = 0
        self.sent = True
        self.surplus = False

    def headed(self) -> None:
        """The headers are complete."""
        self._limit = MAX_ANSWER_BYTES

    def received(self, count: int) -> None:
        """So many bytes came."""
        self._received += count

    @property
    def deadline(self) -> float:
        """When this part of it ends, by the monotonic clock."""
        return self._deadline

    def left(self) -> float:
        """Seconds for the next operation. Raises OSError when time or bytes are used up."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        if self._received > self._limit:
            raise ConnectionAbortedError(f"more than {self._limit} bytes of an answer")
        return left


class _Connection(HTTPConnection):
    """urllib3's connection; each operation asks the call, and the request goes out in one piece."""

    def __init__(self, call: _Call, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._call = call
        self._pieces: list[bytes] | None = None
        self.response_class = functools.partial(_Response, call)  # type: ignore[assignment]

    def _new_conn(self) -> Any:
        try:
            raw = dial(self._dns_host, self.port, self._call.deadline)
            raw.settimeout(self._call.left())  # bounds a whole TLS handshake, not each of its reads
        except (OSError, UnicodeError) as error:
            # As urllib3's own error: it takes an OSError here for one of sending, and would go on to read an answer.
            raise NewConnectionError(self, "no connection") from error
        return raw

    def _tunnel(self) -> None:
        super()._tunnel()
        self.sock.settimeout(self._call.left())

    def request(self, *args: Any, **kwargs: Any) -> None:
        """See urllib3. A head and a body in two packets can wait 40 ms for each other (Nagle, delayed acks)."""
        if self.is_closed:
            self.connect()
        pieces: list[bytes] = []
        self._pieces = pieces
        try:
            super().request(*args, **kwargs)
        finally:
            self._pieces = None
        self._call.sending()
        self.send(b"".join(pieces))

    def send(self, data: Any) -> None:
        """See http.client."""
        if self._pieces is not None:
            self._pieces.append(data)
            return
        self.sock.settimeout(self._call.left())
        self.sock.sendall(data)


class _SecureConnection(_Connection, HTTPSConnection):
    """The same over TLS."""


class _Response(http.client.HTTPResponse):
    """http.client's response, strict where a lenient reading could take one answer for another."""

    def __init__(self, call: _Call, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_Stream(sock, call), *args, **kwargs)  # type: ignore[arg-type]
        self._call = call

    def begin(self) -> None:
        """See http.client, which passes over 100 only and takes what it can of broken headers."""
        super().begin()
        while 100 <= self.status < 200:
            if self.status == 101:
                raise http.client.HTTPException("the answer changes the protocol")
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()
        assert_header_parsing(self.msg)
        coding = self.msg.get("transfer-encoding")
        if coding is not None and (coding.lower() != "chunked" or "content-length" in self.msg):
            raise http.client.HTTPException("no certain length")
        self._call.headed()


class _Stream(io.RawIOBase):
    """A socket's bytes; each read asks the call."""

    def __init__(self, sock: Any, call: _Call) -> None:
        self._socket = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._call = call
        self._ended = False

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What http.client asks a socket for."""
        return _Buffer(self, _READ_BYTES)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """See `io.RawIOBase`; None once the answer has ended."""
        if self._ended:
            return None
        self._socket.settimeout(self._call.left())
        count: int = self._raw.readinto(buffer)
        self._call.received(count)
        return count

    def end(self) -> None:
        """Nothing more is to be read from the socket."""
        self._ended = True

    def surplus(self) -> None:
        """There was more than the answer."""
        self._call.surplus = True

    def close(self) -> None:
        """Lets go of the socket."""
        self._raw.close()
        super().close()


class _Buffer(io.BufferedReader):
    """One answer's bytes. What is left in it when it closes came after the answer, and dies with the connection."""

    def close(self) -> None:
        """Lets go of the socket."""
        stream = self.raw
        if not self.closed and isinstance(stream, _Stream):
            stream.end()
            if self.peek(1):
                stream.surplus()
        super().close()


def _framed(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """A copy with a length, lest requests sends it in chunks, and without urllib3's name."""
    body = body_of(request)
    checked([f"{name}: {value}" for name, value in request.headers.items()])
    framed = copy.copy(request)
    framed.body = body
    framed.headers = {  # type: ignore[assignment]  # a plain dict does, as for the bounded adapter
        "User-Agent": SKIP_HEADER,
        **request.headers,
        "Content-Length": str(len(body)),
    }
    return framed


def _take_body(response: requests.Response) -> bool:
    """Reads the body, as far as it is taken at all. False when there was more."""
    raw, parts, size = response.raw, [], 0
    while size <= MAX_BODY_BYTES and (data := raw.read(_READ_BYTES, decode_content=False)):
        parts.append(data)
        size += len(data)
    response._content = b"".join(parts)[:MAX_BODY_BYTES]
    response._content_consumed = True  # type: ignore[attr-defined]
    response.raw = None
    if size > MAX_BODY_BYTES:
        raw.close()
        return False
    return True


def _cause(error: BaseException) -> BaseException:
    """What was first: requests wraps urllib3's errors, which wrap the system's."""
    while isinstance(error, (requests.RequestException, HTTPError)):
        within = (argument for argument in error.args if isinstance(argument, BaseException))
        deeper = error.__cause__ or next(within, None) or error.__context__
        if deeper is None:
            break
        error = deeper
    return error


def _words(cause: BaseException) -> str:
    if isinstance(cause, http.client.RemoteDisconnected):
        return "the connection was closed before an answer"
    if isinstance(cause, http.client.IncompleteRead):
        return "the answer is cut off"
    if isinstance(cause, OSError):
        return describe(cause)
    return f"the answer is no HTTP: {type(cause).__name__}"
