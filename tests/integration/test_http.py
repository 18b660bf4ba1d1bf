"""The health endpoint over real sockets."""

import http.client
import json
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from tests.waiting import wait_until
from worker.shells import http as endpoint
from worker.shells.http import Health, HealthServer, ListenError


class FakeSource:
    """A source whose answers a test sets."""

    def __init__(self) -> None:
        self.scrapes = 0
        self.text = b"# HELP a A.\n# TYPE a gauge\na 1.0\n"
        self.health = Health(True, {"consumer": "ok"})
        self.error: Exception | None = None
        self.held: threading.Event | None = None

    def metrics(self) -> bytes:
        self.scrapes += 1
        if self.held:
            self.held.wait(60)
        if self.error:
            raise self.error
        return self.text

    def live(self) -> Health:
        return self.health

    def ready(self) -> Health:
        return self.health


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def server(source: FakeSource) -> Iterator[HealthServer]:
    server = HealthServer("127.0.0.1", 0, source)
    server.start()
    yield server
    server.stop()


def ask(
    port: int, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def handler_threads() -> int:
    return sum(thread.name == "health-request" for thread in threading.enumerate())


def test_metrics_in_the_text_format(server: HealthServer, source: FakeSource) -> None:
    """/metrics answers the source's bytes as text format 0.0.4."""

    response, body = ask(server.port, "/metrics?name[]=a")
    assert (response.status, body) == (200, source.text)
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.version == 11


PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
"""What Prometheus 2.42 accepts."""


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        (PROMETHEUS, True),
        ("application/openmetrics-text", True),
        ("text/plain;version=0.0.4", False),
        ("*/*", False),
        ("application/openmetrics-text;q=0.2, text/plain", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=many", False),
    ],
)
def test_openmetrics_for_who_wants_it(server: HealthServer, source: FakeSource, accept: str, openmetrics: bool) -> None:
    """Who prefers OpenMetrics gets it; everybody else the text format."""

    response, body = ask(server.port, "/metrics", Accept=accept)
    assert response.headers["Content-Type"].startswith("application/openmetrics-text") is openmetrics
    assert body == source.text + (b"# EOF\n" if openmetrics else b"")


def test_many_scrapes_cost_as_much_as_one(source: FakeSource) -> None:
    """Within a second the metrics are rendered once, for both formats and for the page; after that once more."""

    now = [1_800_000_000.0]
    server = HealthServer("127.0.0.1", 0, source, clock=lambda: now[0])
    server.start()
    try:
        for _ in range(20):
            ask(server.port, "/metrics")
            ask(server.port, "/metrics", Accept=PROMETHEUS)
        ask(server.port, "/")
        assert source.scrapes == 1
        now[0] += 1.0
        ask(server.port, "/metrics")
        assert source.scrapes == 2
    finally:
        server.stop()


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
@pytest.mark.parametrize(("ok", "code", "word"), [(True, 200, "ok"), (False, 503, "unavailable")])
def test_health_as_json(server: HealthServer, source: FakeSource, path: str, ok: bool, code: int, word: str) -> None:
    """A probe answers 200 or 503 with each component."""

    source.health = Health(ok, {"consumer": "ok", "socket": Path("/x")})
    response, body = ask(server.port, path)
    assert response.status == code
    assert response.headers["Content-Type"] == "application/json"
    assert json.loads(body) == {"status": word, "components": {"consumer": "ok", "socket": "/x"}}


def test_head_has_the_headers_only(server: HealthServer, source: FakeSource) -> None:
    """HEAD says how long the answer would be and sends none of it."""

    response, body = ask(server.port, "/metrics", "HEAD")
    assert (response.status, body) == (200, b"")
    assert response.headers["Content-Length"] == str(len(source.text))


@pytest.mark.parametrize("path", ["/index.html", "/metrics/", "/nothing"])
def test_other_paths_are_not_found(server: HealthServer, path: str) -> None:
    """Anything but the four paths is 404."""

    assert ask(server.port, path)[0].status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods_are_refused(server: HealthServer, method: str) -> None:
    """Anything but GET and HEAD is 405 and says what is allowed, also to a client that sends a body."""

    response, _ = ask(server.port, "/metrics", method, b"x" * 10_000)
    assert response.status == 405
    assert response.headers["Allow"] == "GET, HEAD"


def test_nonsense_is_a_bad_request(server: HealthServer) -> None:
    """A request that is no HTTP gets 400, and the next one its answer."""

    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(b"GET /livez HTTP/x.y\r\n\r\n")
        assert b"400" in client.recv(1000)
    assert ask(server.port, "/livez")[0].status == 200


def test_a_source_that_raises_is_a_500_and_a_log(server: HealthServer, source: FakeSource) -> None:
    """An error in the source costs one answer, is logged, and the text of it is not shown."""

    source.error = RuntimeError("inside")
    with capture_logs() as logs:
        response, body = ask(server.port, "/metrics")
    assert response.status == 500
    assert b"inside" not in body
    assert [(entry["event"], entry["path"]) for entry in logs] == [("health_source_failed", "/metrics")]
    source.error = None
    assert ask(server.port, "/metrics")[0].status == 200


def test_a_health_that_is_no_json_is_a_500(server: HealthServer, source: FakeSource) -> None:
    """A component that cannot be written does not end the server."""

    source.health = Health(True, {"consumer": {("a", "b"): 1}})
    with capture_logs():
        assert ask(server.port, "/livez")[0].status == 500
    source.health = Health(True, {})
    assert ask(server.port, "/livez")[0].status == 200


def test_slow_clients_neither_pile_up_threads_nor_keep_a_probe_waiting(server: HealthServer) -> None:
    """With many connections that send nothing, threads stay few and a probe is answered."""

    with ExitStack() as stack:
        for _ in range(5 * endpoint.HANDLERS):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
        assert ask(server.port, "/livez")[0].status == 200
        assert handler_threads() <= endpoint.HANDLERS
    wait_until(lambda: handler_threads() == 0, 30, "no handler left")


def test_a_dripping_client_is_cut_off(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a byte now and then loses its connection when its time is over."""

    monkeypatch.setattr(endpoint, "CONNECTION_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.05) as client:

        def is_cut() -> bool:
            try:
                client.sendall(b"G")
                return client.recv(100) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        wait_until(is_cut, 30, "the slow connection is cut")
    wait_until(lambda: handler_threads() == 0, 30, "no handler left")


def test_a_source_that_hangs_turns_newcomers_away(
    server: HealthServer, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While every thread is inside the source a newcomer is refused; afterwards all goes on."""

    monkeypatch.setattr(endpoint, "GIVE_WAY_SECONDS", 0.05)
    source.held = threading.Event()
    with ExitStack() as stack:
        for _ in range(endpoint.HANDLERS):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        wait_until(lambda: handler_threads() == endpoint.HANDLERS, 30, "all handlers busy")
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(server.port, "/livez")
        source.held.set()
        source.held = None
    wait_until(lambda: handler_threads() == 0, 30, "no handler left")
    assert ask(server.port, "/livez")[0].status == 200


def test_a_time_without_threads_is_got_over(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """More newcomers than handlers while the system has no thread to give: afterwards a probe is answered again."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as exhausted:
        exhausted.setattr(threading.Thread, "start", refuse)
        for _ in range(2 * endpoint.HANDLERS):
            with pytest.raises((OSError, http.client.HTTPException)):
                ask(server.port, "/livez")
    assert ask(server.port, "/livez")[0].status == 200


def test_a_taken_port_says_what_to_do(server: HealthServer, source: FakeSource) -> None:
    """Starting on a taken port is one line with the address and the setting."""

    with pytest.raises(ListenError) as caught:
        HealthServer("127.0.0.1", server.port, source).start()
    text = str(caught.value)
    assert isinstance(caught.value, OSError)
    assert "\n" not in text
    assert f"127.0.0.1:{server.port}" in text
    assert "METRICS_PORT" in text


@pytest.mark.parametrize("host", ["192.0.2.1", "no host"])
def test_a_foreign_address_says_what_to_do(source: FakeSource, host: str) -> None:
    """Starting on an address that is not this host's names METRICS_HOST."""

    with pytest.raises(ListenError, match="METRICS_HOST") as caught:
        HealthServer(host, 0, source).start()
    assert "\n" not in str(caught.value)


def test_stopping_frees_the_port(source: FakeSource) -> None:
    """After stop, which may come twice, the port can be had again at once."""

    first = HealthServer("127.0.0.1", 0, source)
    first.start()
    assert ask(first.port, "/livez")[0].status == 200
    first.stop()
    first.stop()
    second = HealthServer("127.0.0.1", first.port, source)
    second.start()
    assert ask(second.port, "/livez")[0].status == 200
    second.stop()


def test_over_a_unix_socket(source: FakeSource, tmp_path: Path) -> None:
    """The same answers over a Unix socket; one left by a dead process is replaced, and stop removes it."""

    path = tmp_path / "0.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    server = HealthServer.unix(path, source)
    server.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, response.read()) == (200, source.text)
    server.stop()
    assert not path.exists()


def test_a_path_that_is_no_socket_is_left_alone(source: FakeSource, tmp_path: Path) -> None:
    """A file at the socket's path is an error, not something to delete."""

    path = tmp_path / "0.sock"
    path.write_text("kept")
    with pytest.raises(ListenError, match="TMPDIR"):
        HealthServer.unix(path, source).start()
    assert path.read_text() == "kept"


def test_an_endless_socket_path_says_what_to_do(source: FakeSource, tmp_path: Path) -> None:
    """A path longer than the kernel takes is one line that names TMPDIR."""

    with pytest.raises(ListenError, match="TMPDIR"):
        HealthServer.unix(tmp_path / ("x" * 120), source).start()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


def fill(taken: list[int]) -> None:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))


def test_a_probe_is_answered_when_no_descriptor_is_left(server: HealthServer) -> None:
    """While every descriptor of the process is in use, the endpoint has its own in reserve, again and again."""
    clients = [socket.socket() for _ in range(3)]
    taken: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, highest + 5), hard))
        with pytest.raises(OSError, match="Too many open files"):
            fill(taken)

        for client in clients:
            client.settimeout(30)
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            while client.recv(4096):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in taken:
            os.close(number)
        for client in clients:
            client.close()
