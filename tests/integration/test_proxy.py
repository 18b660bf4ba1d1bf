"""The fault proxy breaks connections in the way each of its methods says, and in no other."""

import socket
import time
from collections.abc import Iterator
from threading import Thread

import pytest

from tests.proxy import FaultProxy
from tests.rabbit import address, by_way_of
from tests.waiting import wait_until
from worker.sandbox.broker import LoginResult, free_port, try_login

SECONDS = 30.0


class Echo:
    """A server that says back what it hears."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.heard = b""
        self.resets = 0
        self.ends = 0
        self._threads = [Thread(target=self._welcome, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        # Closing alone does not wake a thread that is in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(SECONDS)

    def _welcome(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(Thread(target=self._serve, args=(client,), daemon=True))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                while data := client.recv(65_536):
                    self.heard += data
                    client.sendall(data)
                self.ends += 1
            except ConnectionError:
                self.resets += 1


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", echo.port) as running:
        yield running


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with dial(proxy) as connected:
        yield connected


def dial(proxy: FaultProxy) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", proxy.port), SECONDS)
    connection.settimeout(SECONDS)
    return connection


def hear(client: socket.socket, size: int) -> bytes:
    heard = b""
    while len(heard) < size and (data := client.recv(65_536)):
        heard += data
    return heard


def hears_nothing(client: socket.socket) -> bool:
    client.settimeout(0.1)
    try:
        return client.recv(1) is None
    except TimeoutError:
        return True
    finally:
        client.settimeout(SECONDS)


def test_forwards_both_ways_and_counts(client: socket.socket, proxy: FaultProxy) -> None:
    """Without a fault every byte arrives, and is counted each way."""

    client.sendall(b"hello")

    assert hear(client, 5) == b"hello"
    assert (proxy.connections, proxy.live) == (1, 1)
    wait_until(lambda: (proxy.bytes_to_server, proxy.bytes_to_client) == (5, 5), SECONDS, "both are counted")


def test_large_transfer_keeps_its_order(client: socket.socket) -> None:
    """Megabytes arrive complete and in order, although socket buffers are smaller."""

    data = b"".join(number.to_bytes(4, "big") for number in range(1_000_000))
    Thread(target=client.sendall, args=(data,), daemon=True).start()

    assert hear(client, len(data)) == data


def test_end_of_stream_passes(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """A client that closes properly is seen closing properly by the server."""

    client.sendall(b"bye")
    client.shutdown(socket.SHUT_WR)

    assert hear(client, 4) == b"bye"
    wait_until(lambda: echo.ends == 1 and proxy.live == 0, SECONDS, "both ends closed")
    assert echo.resets == 0


def test_latency_counts_each_way(client: socket.socket, proxy: FaultProxy) -> None:
    """Latency delays the request and the answer alike."""

    proxy.latency(0.1)
    started = time.monotonic()
    client.sendall(b"hello")

    assert hear(client, 5) == b"hello"
    assert 0.2 <= time.monotonic() - started < SECONDS


def test_stall_forwards_nothing_until_resume(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """A stalled proxy takes the bytes, passes none on, and delivers them all on resume."""

    proxy.stall()
    client.sendall(b"hello")

    assert hears_nothing(client)
    assert echo.heard == b""

    proxy.resume()
    assert hear(client, 5) == b"hello"


def test_stall_holds_back_the_end(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """The server of a stalled connection does not learn that its client has gone."""

    proxy.stall()
    client.close()

    with dial(proxy):
        wait_until(lambda: proxy.connections == 2, SECONDS, "the next connection is taken")
    assert echo.ends == echo.resets == 0

    proxy.resume()
    wait_until(lambda: echo.ends == 2, SECONDS, "both ends have arrived")


def test_stall_towards_client_only(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """The server hears the client, and its answers are held."""

    proxy.stall_towards_client()
    client.sendall(b"hello")

    wait_until(lambda: echo.heard == b"hello", SECONDS, "the server hears")
    assert hears_nothing(client)

    proxy.resume()
    assert hear(client, 5) == b"hello"


def test_stall_towards_client_after_some_bytes(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """What the server got before is answered, what it gets later is not."""

    proxy.stall_towards_client_after(5)
    client.sendall(b"hello")
    assert hear(client, 5) == b"hello"

    client.sendall(b"again")
    wait_until(lambda: echo.heard == b"helloagain", SECONDS, "the server hears")
    assert hears_nothing(client)

    proxy.resume()
    assert hear(client, 5) == b"again"


def test_reset_all_resets_both_ends(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """After a reset both ends get ECONNRESET, and a new connection works."""

    client.sendall(b"hello")
    assert hear(client, 5) == b"hello"
    proxy.reset_all()

    with pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_until(lambda: echo.resets == 1, SECONDS, "the server is reset, too")
    with dial(proxy) as again:
        again.sendall(b"again")
        assert hear(again, 5) == b"again"


def test_absent_server_is_a_reset() -> None:
    """A server that is not there shows as a reset, since the proxy has accepted by then."""

    with (
        FaultProxy("127.0.0.1", free_port()) as nowhere,
        pytest.raises(ConnectionResetError),
        dial(nowhere) as client,
    ):
        client.recv(1)


def test_refuse_resets_new_connections_only(client: socket.socket, proxy: FaultProxy) -> None:
    """A refusing proxy keeps what is open and resets what is new, until it accepts again."""

    client.sendall(b"a")
    assert hear(client, 1) == b"a"
    proxy.refuse()

    with pytest.raises(ConnectionResetError), dial(proxy) as refused:
        refused.recv(1)
    client.sendall(b"b")
    assert hear(client, 1) == b"b"
    assert proxy.refused == 1

    proxy.accept()
    with dial(proxy) as accepted:
        accepted.sendall(b"c")
        assert hear(accepted, 1) == b"c"


def test_half_open_is_silence_for_the_client(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """The server loses the connection; the client can go on writing and hears nothing."""

    client.sendall(b"hello")
    assert hear(client, 5) == b"hello"
    proxy.half_open()
    client.sendall(b"is anybody there")

    wait_until(lambda: echo.resets == 1, SECONDS, "the server has lost it")
    assert hears_nothing(client)
    assert echo.heard == b"hello"

    client.close()
    wait_until(lambda: proxy.live == 0, SECONDS, "the proxy forgets it with its client")


def test_stop_ends_every_connection(client: socket.socket, proxy: FaultProxy) -> None:
    """A stopped proxy has closed its connections, and its port is free."""

    client.sendall(b"hello")
    assert hear(client, 5) == b"hello"
    proxy.stop()

    assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        dial(proxy)


def test_amqp_passes_through(amqp_url: str) -> None:
    """An AMQP login works through the proxy, and gets no answer while it is stalled."""

    with FaultProxy(*address(amqp_url)) as between:
        url = by_way_of(between.port, amqp_url)

        assert try_login(url, timeout=SECONDS) is LoginResult.READY
        between.stall()
        assert try_login(url, timeout=0.3) is LoginResult.NOT_THERE
