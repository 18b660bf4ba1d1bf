"""The endpoint for scrapes, probes and people: `/metrics`, `/livez`, `/readyz`, `/`, over TCP or a Unix socket.

Standard library only. One request per connection: an idle keep-alive connection would hold a thread, and a
scrape every few seconds gains nothing from it.
"""

import errno
import json
import os
import socket
import socketserver
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from worker.core.scrapes import openmetrics
from worker.shells.page import HEADERS, HTML_TYPE, Recent, StatusPage

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
JSON_TYPE: Final = "application/json"
TEXT_TYPE: Final = "text/plain; charset=utf-8"

HANDLERS: Final = 8
"""Requests answered at a time: two Prometheus servers, the probes and a curious person, not a flood."""
FRESH_SECONDS: Final = 1.0
"""The metrics are rendered once in so many seconds, however many ask and however often: 8 clients that did nothing else
took four fifths of the worker's rate."""
BACKLOG: Final = 128
"""Connections that wait to be accepted: beyond that the kernel drops them, and a client tries again after 1 s."""
CONNECTION_SECONDS: Final = 10.0
"""A connection's whole life: a client that sends a byte now and then must not keep its thread."""
SILENCE_SECONDS: Final = 5.0
"""The longest wait for one read or write."""
GIVE_WAY_SECONDS: Final = 1.0
"""How long a new connection waits for the thread of the one that was cut off for it."""
RESERVE: Final = 2
"""Descriptors kept for when there are no others: one for the connection, one for what a scrape reads of the process."""
BODY_BYTES: Final = 64 * 1024
"""What is read of an unwanted body, so that closing does not reset the connection under our answer."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Health:
    """An answer to a probe; `components` must be JSON, or have a `str()` that may be shown."""

    ok: bool
    components: Mapping[str, object]


class HealthSource(Protocol):
    """Where the answers come from. Called in handler threads, several at a time; may raise (then: 500)."""

    def metrics(self) -> bytes:
        """The scrape, in Prometheus text format 0.0.4."""

    def live(self) -> Health:
        """Whether the loops turn."""

    def ready(self) -> Health:
        """Whether commands are being taken."""


class ListenError(OSError):
    """The endpoint cannot be opened; one line for people: what happened and what to do."""

    def __str__(self) -> str:
        return str(self.strerror)


class HealthServer:
    """Serves a source until stopped, in daemon threads; `start` binds, and raises `ListenError`."""

    def __init__(
        self,
        host: str,
        port: int,
        source: HealthSource,
        *,
        clock: Callable[[], float] = time.time,
        fresh: float = FRESH_SECONDS,
    ) -> None:
        """``clock``: unix time; ``fresh``: the most seconds that a scrape may be old."""
        self._source = _Recent(source, clock, fresh)
        self._clock = clock
        self._host = host
        self._port = port
        self._path: Path | None = None
        self._server: _Server | None = None

    @classmethod
    def unix(cls, path: Path | str, source: HealthSource) -> "HealthServer":
        """The same over a Unix socket, for a parent on this host, which renders no oftener than its own server does; a
        socket left at `path` is replaced."""
        server = cls("", 0, source, fresh=0.0)
        server._path = Path(path)
        return server

    @property
    def port(self) -> int:
        """The TCP port; once started, the real one where 0 was asked for. 0 for a Unix socket."""
        return self._port

    def start(self) -> None:
        """Binds, then serves in the background."""
        if self._path is None:
            listener = _listen_tcp(self._host, self._port)
            self._port = listener.getsockname()[1]
        else:
            listener = _listen_unix(self._path)
        self._server = _Server(listener, self._source, self._clock)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="health", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Takes no more connections; answers under way may still finish. May be called twice."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        self._thread.join()
        server.server_close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=dual)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            why, remedy = "the port is taken", "stop what holds it, or set METRICS_PORT to a free one"
        elif number == errno.EACCES:
            why, remedy = "permission denied", "set METRICS_PORT to 1024 or higher"
        else:
            # create_server adds the address to its text: only the system's own words are wanted.
            why = os.strerror(number) if number and number > 0 else str(error)
            remedy = "set METRICS_HOST to an address of this host, and METRICS_PORT"
        raise ListenError(number, f"cannot serve metrics on {host}:{port}: {why}; {remedy}") from error


def _listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        why = error.strerror or str(error)
        raise ListenError(
            error.errno,
            f"cannot serve metrics on the socket {path}: {why}; "
            "use a directory that is writable and has a short path (TMPDIR)",
        ) from error
    return listener


class _Recent:
    """A source whose metrics are rendered once in ``fresh`` seconds."""

    def __init__(self, source: HealthSource, clock: Callable[[], float], fresh: float) -> None:
        self.live = source.live
        self.ready = source.ready
        self.metrics = Recent(source.metrics, clock, fresh)


class _Server(socketserver.BaseServer):
    """Accepts in one thread, answers in at most `HANDLERS`; the oldest connection gives way to a new one.

    Giving way rather than refusing: a probe must get its answer even while slow clients hold every thread.
    """

    def __init__(self, listener: socket.socket, source: HealthSource, clock: Callable[[], float]) -> None:
        super().__init__(listener.getsockname(), _Handler)
        self.socket = listener
        self._slots = threading.BoundedSemaphore(HANDLERS)
        self._open: dict[socket.socket, float] = {}  # until when, oldest first
        self._reserve: list[int] = []  # descriptors for the day when the process has none left
        self._lock = threading.Lock()
        self._source = source
        self._page = StatusPage(source, clock)
        self._take_reserve()
        self._answers: dict[str, Callable[[str], tuple[int, str, bytes]]] = {
            "/": lambda _: (HTTPStatus.OK, HTML_TYPE, self._page.html()),
            "/metrics": self._metrics,
            "/livez": lambda _: _health(source.live()),
            "/readyz": lambda _: _health(source.ready()),
        }

    def _metrics(self, accept: str) -> tuple[int, str, bytes]:
        scrape = self._source.metrics()
        self._page.scraped(scrape)
        if _prefers_openmetrics(accept):
            return HTTPStatus.OK, OPENMETRICS_TYPE, openmetrics(scrape.decode()).encode()
        return HTTPStatus.OK, METRICS_TYPE, scrape

    def answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a GET of this path with this Accept header; never raises."""
        found = self._answers.get(path)
        if found is None:
            return HTTPStatus.NOT_FOUND, TEXT_TYPE, b"not found\n"
        try:
            return found(accept)
        except Exception:
            log.exception("health_source_failed", path=path)
            return HTTPStatus.INTERNAL_SERVER_ERROR, TEXT_TYPE, b"internal error, see the log\n"

    def fileno(self) -> int:
        return self.socket.fileno()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return self.socket.accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._reserve:
                raise
            self._give_up_reserve()
            return self.socket.accept()

    def _take_reserve(self) -> None:
        """A probe must be answered even while the senders hold every descriptor that the process may have."""
        with self._lock, suppress(OSError):
            while len(self._reserve) < RESERVE:
                self._reserve.append(os.open(os.devnull, os.O_RDONLY))

    def _give_up_reserve(self) -> None:
        with self._lock:
            while self._reserve:
                os.close(self._reserve.pop())

    def server_close(self) -> None:
        self.socket.close()
        self._give_up_reserve()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self._cut(oldest=True)
            if not self._slots.acquire(timeout=GIVE_WAY_SECONDS):
                # Every thread is inside the source: the one case in which a newcomer is turned away.
                log.warning("health_busy", handlers=HANDLERS)
                self.shutdown_request(request)
                return
        with self._lock:
            self._open[request] = time.monotonic() + CONNECTION_SECONDS
        handler = threading.Thread(
            target=self._serve, args=(request, client_address), name="health-request", daemon=True
        )
        try:
            handler.start()
        except RuntimeError as error:  # the system has none to give
            log.warning("health_busy", error=str(error))
            self._over(request)

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError as error:  # the client went away: nobody else is concerned
            log.debug("health_connection_failed", error=repr(error))
        finally:
            self._over(request)

    def _over(self, request: socket.socket) -> None:
        with self._lock:
            self._open.pop(request, None)
        self.shutdown_request(request)
        self._slots.release()

    def service_actions(self) -> None:
        self._cut(oldest=False)
        if not self._open:
            self._take_reserve()

    def _cut(self, *, oldest: bool) -> None:
        """Ends the connections whose time is over, and the oldest one; their threads see the end of file."""
        now = time.monotonic()
        with self._lock:
            over = [connection for connection, until in self._open.items() if until <= now]
            if oldest and not over:
                over = list(self._open)[:1]
            for connection in over:
                del self._open[connection]
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with suppress(OSError):
            request.shutdown(socket.SHUT_WR)
        request.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "qris-expire"
    sys_version = ""
    timeout = SILENCE_SECONDS
    server: _Server

    def do_GET(self) -> None:
        self._send(*self.server.answer(self.path.partition("?")[0], self.headers.get("Accept", "")))

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class comes here for a bad request, and with 501 for a method that has no `do_`."""
        # A request line that was not understood counts as HTTP/0.9, whose answers have no status line.
        self.request_version = self.protocol_version
        if code != HTTPStatus.NOT_IMPLEMENTED:
            self._send(code, TEXT_TYPE, f"{message or HTTPStatus(code).phrase}\n".encode())
            return
        self._read_body()
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, TEXT_TYPE, b"only GET and HEAD\n", allow="GET, HEAD")

    def _read_body(self) -> None:
        length = self.headers.get("Content-Length", "")
        if length.isdecimal() and len(length) < 10:
            self.rfile.read(min(int(length), BODY_BYTES))

    def _send(self, code: int, content_type: str, body: bytes, allow: str | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if content_type == HTML_TYPE:
            for name, value in HEADERS.items():
                self.send_header(name, value)
        if allow:
            self.send_header("Allow", allow)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line per scrape and probe would be most of the log."""


def _prefers_openmetrics(accept: str) -> bool:
    """Whether OpenMetrics is named in an Accept header, and wanted no less than the text format."""
    wanted: dict[str, float] = {}
    for part in accept.lower().split(","):
        media, *parameters = (each.strip() for each in part.split(";"))
        quality = next((each.removeprefix("q=") for each in parameters if each.startswith("q=")), "1")
        with suppress(ValueError):
            wanted[media] = max(wanted.get(media, 0.0), float(quality))
    best = wanted.get("application/openmetrics-text", 0.0)
    return best > 0 and best >= wanted.get("text/plain", 0.0)


def _health(health: Health) -> tuple[int, str, bytes]:
    status = HTTPStatus.OK if health.ok else HTTPStatus.SERVICE_UNAVAILABLE
    document = {"status": "ok" if health.ok else "unavailable", "components": dict(health.components)}
    return status, JSON_TYPE, json.dumps(document, default=str).encode() + b"\n"
