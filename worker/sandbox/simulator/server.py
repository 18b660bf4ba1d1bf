"""The gateway over HTTP: reads requests, and does what a fault says, down to the bytes and the resets."""

from __future__ import annotations

import contextlib
import functools
import json
import select
import socket
import socketserver
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from email.utils import formatdate
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

from worker.core.verdict import KNOWN
from worker.sandbox.simulator.checks import Request, claim_of, token_refusal
from worker.sandbox.simulator.script import Fault, Script, ScriptError

if TYPE_CHECKING:
    from worker.sandbox.simulator import Simulator

ADMIN_PATH: Final = "/_simulator/"
HEAD_LIMIT: Final = 64 * 1024  # a client that never ends its headers must not fill the memory
BODY_LIMIT: Final = 1024 * 1024  # nor one that announces a huge body; scripts for many bills still fit
DAY: Final = 86_400.0  # the longest wait; poll() cannot count further than 24 days
BACKLOG: Final = 1024  # a worker opens all its connections at once; a short queue drops some for a second
STAMPS: Final = 35  # SO_TIMESTAMPNS of Linux: the kernel says when bytes came, however late they are read


class _Unreadable(Exception):
    """A request that is no request we read; the status says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


NO_HEADERS: Final[Mapping[str, str | None]] = {}
SUCCESS: Final = b'{"responseCode":"2009300","responseMessage":"Successful"}'


@functools.cache
def _status_line(status: int) -> bytes:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unassigned"
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


def _page(status: int) -> bytes:
    title = _status_line(status).decode()[9:].strip()
    page = f"<html>\r\n<head><title>{title}</title></head>\r\n<body><h1>{title}</h1></body>\r\n</html>\r\n"
    return page.encode()


def _content(fault: Fault, success: bytes) -> tuple[int, bytes, bytes]:
    """HTTP status, content type and body of the answer that `fault` asks for."""
    if fault.html is not None:
        return fault.html, b"text/html", _page(fault.html)
    if fault.body is not None:
        return fault.http or 200, b"application/json", fault.body.encode(errors="surrogatepass")
    if fault.code is None:
        return 200, b"application/json", success
    message = KNOWN.get(fault.code, "Simulated") if fault.message is None else fault.message
    fields = json.dumps({"responseCode": fault.code, "responseMessage": message}, separators=(",", ":"))
    return fault.http or int(fault.code[:3]), b"application/json", fields.encode()


class _Connection(socketserver.BaseRequestHandler):
    """One connection, request after request, each answer in one send.

    It reads requests itself: the stdlib's header parser alone costs more than all the checks together.
    """

    server: Server
    request: socket.socket

    def setup(self) -> None:
        # Without it, an answer can wait 40 ms for the peer's delayed acknowledgement.
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self._came = 0.0
        self._poll: select.poll | None = None
        self._in_flight = False

    def handle(self) -> None:
        # An OSError: the client has gone, or `stop` has cut the connection. Neither concerns anyone here.
        with contextlib.suppress(OSError):
            while self._exchange():
                pass

    def _exchange(self) -> bool:
        """Serve one request; whether another may follow."""
        try:
            request = self._read()
        except _Unreadable as error:
            self._send(_status_line(error.status), b"text/html", _page(error.status), close=True)
            return False
        if request is None:
            return False
        simulator = self.server.simulator
        if request.path == simulator.expire_path and request.method == "POST":
            return self._expire(request, simulator)
        if request.path == simulator.token_path and request.method == "POST":
            return self._token(request, simulator)
        if request.path.startswith(ADMIN_PATH):
            return self._admin(request, simulator)
        known = request.path in (simulator.expire_path, simulator.token_path)
        return self._act(Fault(html=405 if known else 404), b"", request.keep)

    def _expire(self, request: Request, simulator: Simulator) -> bool:
        books = simulator.books
        script = books.script
        fault = books.expire(claim_of(request, simulator.registration, books.now(), script.skew), self._came)
        self._in_flight = True
        try:
            return self._act(fault, SUCCESS, request.keep, script.latency)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Count the call out, once, and before its end can be seen.

        A client that has its answer may send its next call before this thread runs again: counted out
        later, a client that keeps to its limit would seem to exceed it.
        """
        if self._in_flight:
            self._in_flight = False
            self.server.simulator.books.leave()

    def _token(self, request: Request, simulator: Simulator) -> bool:
        books = simulator.books
        script = books.script
        fault, success = books.token(token_refusal(request, simulator.registration, books.now(), script.skew))
        return self._act(fault, success, request.keep, script.latency)

    def _admin(self, request: Request, simulator: Simulator) -> bool:
        match request.method, request.path.removeprefix(ADMIN_PATH):
            case "GET", "health":
                status, answer = 200, {"status": "ok"}
            case "GET", "report":
                asked = parse_qs(request.query)
                status, answer = 200, _report_fields(simulator, "bills" in asked, "calls" in asked)
            case "POST", "script":
                status, answer = _replaced(simulator, request.body)
            case _:
                return self._act(Fault(html=404), b"", request.keep)
        close = not request.keep
        self._send(_status_line(status), b"application/json", json.dumps(answer).encode(), close=close)
        return not close

    def _act(self, fault: Fault, success: bytes, keep: bool, latency: float = 0.0) -> bool:
        """Do what the fault says, or answer with `success`; whether the connection stays open."""
        if latency or fault.latency:
            self._wait(latency + fault.latency)
        if fault.reset is not None:
            self._reset()
            return False
        if fault.hang:
            self._wait(fault.hang)
            self._leave()
            return False
        keep = keep and not fault.close
        status, kind, body = _content(fault, success)
        headers = {"Retry-After": fault.retry_after, "WWW-Authenticate": fault.challenge}
        self._send(_status_line(status), kind, body, headers, fault.trickle, close=not keep)
        return keep

    def _send(
        self,
        status_line: bytes,
        kind: bytes,
        body: bytes,
        headers: Mapping[str, str | None] = NO_HEADERS,
        trickle: float = 0.0,
        *,
        close: bool,
    ) -> None:
        extra = b"Connection: close\r\n" if close else b""
        for name, value in headers.items():
            if value is not None:
                extra += f"{name}: {value}\r\n".encode()
        answer = b"%bDate: %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n%b" % (
            status_line,
            self.server.date(),
            kind,
            len(body),
            extra,
            body,
        )
        if trickle:
            for at in range(len(answer) - 1):
                self.request.sendall(answer[at : at + 1])
                self._wait(trickle)
            answer = answer[-1:]
        self._leave()
        self.request.sendall(answer)

    def _wait(self, seconds: float) -> None:
        """Until the time is over, or at once when the client (or `stop`) has closed the connection.

        Calls that their client has given up must not count as in flight for the rest of a long hang.
        """
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.request, getattr(select, "POLLRDHUP", 0))
        self._poll.poll(min(seconds, DAY) * 1000)

    def _reset(self) -> None:
        self._leave()
        # Lingering for 0 seconds turns the close into a reset.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()

    def _read(self) -> Request | None:
        """The next request; None when the client has gone or the gateway is down."""
        data = self._rest
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > HEAD_LIMIT:
                raise _Unreadable(431)
            more = self._receive()
            if not more:
                return None
            data += more
        method, target, keep, headers = _head(data[:end].decode("latin-1"))
        path, _, query = target.partition("?")
        if self.server.simulator.books.script.down and not path.startswith(ADMIN_PATH):
            self.server.simulator.books.turned_away()
            self._reset()
            return None
        length = _body_length(headers)
        if "expect" in headers:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body_at = end + 4
        while len(data) < body_at + length:
            more = self._receive()
            if not more:
                return None
            data += more
        self._rest = data[body_at + length :]
        return Request(method, path, query, headers, data[body_at : body_at + length], keep)

    def _receive(self) -> bytes:
        """What has come, and notes when: at the edge, not when this thread has its turn."""
        data, notes, _, _ = self.request.recvmsg(65536, 64)
        self._came = time.time()
        for level, kind, value in notes:
            if (level, kind) == (socket.SOL_SOCKET, STAMPS):
                seconds, nanoseconds = struct.unpack("@ll", value[: struct.calcsize("@ll")])
                self._came = seconds + nanoseconds / 1e9
        return data


def _head(head: str) -> tuple[str, str, bool, dict[str, str]]:
    """Method, target, whether the connection may stay, and headers. Raises _Unreadable."""
    lines = head.lstrip("\r\n").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _Unreadable(400)
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon:
            raise _Unreadable(400)
        headers[name.lower()] = value.strip()
    connection = headers.get("connection", "").lower()
    keep = connection == "keep-alive" if words[2] == "HTTP/1.0" else connection != "close"
    return words[0], words[1], keep, headers


def _body_length(headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise _Unreadable(411)  # chunked bodies; no client of this service needs them
    given = headers.get("content-length", "0")
    if not (given.isascii() and given.isdigit()):
        raise _Unreadable(400)
    length = int(given) if len(given) < 10 else BODY_LIMIT + 1
    if length > BODY_LIMIT:
        raise _Unreadable(413)
    return length


def _report_fields(simulator: Simulator, bills: bool, calls: bool) -> dict[str, Any]:
    fields = asdict(simulator.report(bills=bills))
    fields["calls"] = [call._asdict() for call in fields["calls"]]
    hidden = {"calls_by_bill": not bills, "calls": not calls}
    return {name: value for name, value in fields.items() if not hidden.get(name)}


def _replaced(simulator: Simulator, body: bytes) -> tuple[int, dict[str, Any]]:
    try:
        script = Script.parse(json.loads(body.decode()))
    except ScriptError as error:
        return 400, {"error": str(error)}
    except (ValueError, RecursionError):
        return 400, {"error": "the script is no JSON"}
    simulator.replace(script)
    return 200, {"status": "ok"}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = BACKLOG

    def __init__(self, address: tuple[str, int], simulator: Simulator) -> None:
        self.simulator = simulator
        self._open: set[socket.socket] = set()
        self._dated = (0, b"")
        super().__init__(address, _Connection)

    def server_bind(self) -> None:
        # HTTPServer's own looks up the host's full name: seconds where there is no name server.
        socketserver.TCPServer.server_bind(self)
        if sys.platform == "linux":  # its connections inherit it
            self.socket.setsockopt(socket.SOL_SOCKET, STAMPS, 1)
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]

    def date(self) -> bytes:
        """The Date header: the gateway's clock, formatted once per second."""
        second = int(self.simulator.books.now())
        dated = self._dated
        if dated[0] != second:
            dated = self._dated = (second, formatdate(second, usegmt=True).encode())
        return dated[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self._open.discard(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def cut(self) -> None:
        """Close what clients keep alive, or its threads would go on answering after `stop`."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
