"""A TCP proxy that breaks connections in the ways networks do: slow, silent, reset, refused, half open."""

import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Self

CHUNK = 65_536

HELD_BYTES = 64 * 1024 * 1024
"""The most one direction of a stalled connection swallows, so that no runaway writer eats the memory."""

CALL_SECONDS = 30.0
"""The most a call waits for the loop; it is only ever late when the loop has died."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class _Direction:
    """Bytes on their way from one socket to the other, each with the time at which they may go on."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.chunks: deque[tuple[float, memoryview]] = deque()
        self.held = 0
        self.ended = False
        self.passed_on_end = False
        self.stalled = False
        self.discards = False

    def take(self, due: float) -> None:
        """Read what is there; raises ConnectionError when the source was reset."""
        if data := self.source.recv(CHUNK):
            if not self.discards:
                self.chunks.append((due, memoryview(data)))
                self.held += len(data)
        else:
            self.ended = True

    def give(self, now: float) -> int:
        """Write what is due and fits, then the end of the stream if it has come; how many bytes went."""
        given = 0
        while self.is_due(now):
            due, chunk = self.chunks.popleft()
            try:
                sent = self.sink.send(chunk)
            except BlockingIOError:
                sent = 0
            given += sent
            self.held -= sent
            if sent < len(chunk):
                self.chunks.appendleft((due, chunk[sent:]))
                break
        if self.ended and not self.chunks and not self.stalled and not self.passed_on_end:
            self.passed_on_end = True
            if not self.discards:
                self.sink.shutdown(socket.SHUT_WR)
        return given

    def is_due(self, now: float) -> bool:
        return not self.stalled and bool(self.chunks) and self.chunks[0][0] <= now

    def wants_to_read(self) -> bool:
        return not self.ended and self.held < HELD_BYTES


class _Connection:
    """The two sockets of one connection, and its two directions."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.to_server = _Direction(client, server)
        self.to_client = _Direction(server, client)
        self.directions = (self.to_server, self.to_client)
        self.half_open = False
        self.reset_held_back = False

    def is_over(self) -> bool:
        if self.half_open:
            return self.to_server.ended
        return all(direction.passed_on_end for direction in self.directions)

    def is_stalled(self) -> bool:
        return any(direction.stalled for direction in self.directions)

    def drop_server(self) -> None:
        """The server sees a reset; the client sees nothing, now or later."""
        _reset(self.server)
        self.half_open = True
        self.to_server.discards = self.to_client.discards = True
        self.to_server.chunks.clear()
        self.to_client.chunks.clear()
        self.to_client.ended = True

    def interest(self, now: float) -> dict[socket.socket, int]:
        """What to ask the selector for, per socket."""
        wanted = {self.client: 0, self.server: 0}
        for direction in self.directions:
            if direction.wants_to_read():
                wanted[direction.source] |= selectors.EVENT_READ
            if direction.is_due(now):
                wanted[direction.sink] |= selectors.EVENT_WRITE
        if self.reset_held_back:
            return dict.fromkeys(wanted, 0)
        return wanted


class FaultProxy:
    """Forwards `port` of loopback to a server, until told otherwise; call it from any thread.

    A fault is in force when its method returns. Stalls and latency also hold for connections made later. The
    counters may trail the bytes by a moment.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        self._target = (target_host, target_port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.refused = 0
        self.bytes_to_server = 0
        self.bytes_to_client = 0
        self._live: list[_Connection] = []
        self._latency = 0.0
        self._now = 0.0
        self._stalled_to_server = self._stalled_to_client = False
        self._answered_bytes: int | None = None
        self._refusing = False
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._calls: SimpleQueue[tuple[Callable[[], None], threading.Event]] = SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="fault-proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def live(self) -> int:
        """Connections that are open now."""
        return len(self._live)

    def latency(self, seconds: float) -> None:
        """Delay every byte read from now on by so much, each way; an answer takes twice as long."""

        def change() -> None:
            self._latency = seconds

        self._call(change)

    def stall(self) -> None:
        """Go on taking connections and bytes, forward nothing either way, not even the end of one."""
        self._call(lambda: self._set_stalls(True, True))

    def stall_towards_client(self) -> None:
        """The server gets everything, the client gets nothing: what was done, and the answer is missing."""
        self._call(lambda: self._set_stalls(False, True))

    def stall_towards_client_after(self, sent: int) -> None:
        """The same, once more than so many bytes went to the server in all: what comes later is never answered."""

        def change() -> None:
            self._answered_bytes = sent

        self._call(change)

    def resume(self) -> None:
        """End every stall; what was held goes on its way, in order."""
        self._call(lambda: self._set_stalls(False, False))

    def reset_all(self) -> None:
        """Send a reset to both ends of every connection."""

        def reset() -> None:
            for connection in list(self._live):
                self._end(connection, _reset)

        self._call(reset)

    def refuse(self) -> None:
        """Reset new connections at once; the open ones go on."""
        self._call(lambda: self._set_refusing(True))

    def accept(self) -> None:
        """Take new connections again."""
        self._call(lambda: self._set_refusing(False))

    def half_open(self) -> None:
        """Every open connection loses its server; its client's socket stays open, and silent for ever."""

        def halve() -> None:
            for connection in self._live:
                if not connection.half_open:
                    self._forget(connection.server)
                    connection.drop_server()

        self._call(halve)

    def stop(self) -> None:
        """Close everything; calling it again is fine."""
        if self._thread.is_alive():
            self._call(self._set_stopping)
            self._thread.join(CALL_SECONDS)
        self._wake_writer.close()

    def _call(self, change: Callable[[], None]) -> None:
        done = threading.Event()
        self._calls.put((change, done))
        self._wake_writer.send(b"!")
        if not done.wait(CALL_SECONDS):
            raise AssertionError("the proxy's loop has died")

    def _set_stalls(self, to_server: bool, to_client: bool) -> None:
        self._stalled_to_server, self._stalled_to_client = to_server, to_client
        for connection in self._live:
            self._apply_stalls(connection)

    def _apply_stalls(self, connection: _Connection) -> None:
        connection.to_server.stalled = self._stalled_to_server
        connection.to_client.stalled = self._stalled_to_client

    def _set_refusing(self, refusing: bool) -> None:
        self._refusing = refusing

    def _set_stopping(self) -> None:
        self._stopping = True

    def _loop(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        finally:
            for connection in list(self._live):
                self._end(connection, socket.socket.close)
            self._selector.close()
            self._listener.close()
            self._wake_reader.close()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._next_due()):
            if key.fileobj is self._listener:
                self._welcome()
            elif key.fileobj is self._wake_reader:
                self._carry_out_calls()
            elif events & selectors.EVENT_READ and key.data in self._live:
                self._read(key.data, key.fileobj)
        # One time for the whole turn: a chunk falling due between two looks would be forgotten.
        self._now = time.monotonic()
        for connection in list(self._live):
            self._forward(connection, self._now)

    def _welcome(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # the client has gone again
        if self._refusing:
            self.refused += 1
            _reset(client)
            return
        self.connections += 1
        connection = _Connection(client, socket.socket())
        for end in (connection.client, connection.server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._apply_stalls(connection)
        self._live.append(connection)
        # A failure to connect shows as an error on the socket, like any later one.
        connection.server.connect_ex(self._target)

    def _carry_out_calls(self) -> None:
        self._wake_reader.recv(CHUNK)
        while not self._calls.empty():
            change, done = self._calls.get()
            change()
            done.set()

    def _read(self, connection: _Connection, source: object) -> None:
        due = time.monotonic() + self._latency
        for direction in connection.directions:
            if direction.source is source:
                try:
                    direction.take(due)
                except BlockingIOError:
                    pass
                except OSError:
                    self._was_reset(connection)

    def _forward(self, connection: _Connection, now: float) -> None:
        if connection.reset_held_back:
            self._was_reset(connection)
        try:
            if not connection.half_open:
                self.bytes_to_server += connection.to_server.give(now)
                if self._answered_bytes is not None and self.bytes_to_server > self._answered_bytes:
                    self._answered_bytes = None
                    self._set_stalls(False, True)
                self.bytes_to_client += connection.to_client.give(now)
        except OSError:
            self._was_reset(connection)
        if connection in self._live:
            if connection.is_over():
                self._end(connection, socket.socket.close)
            else:
                self._register(connection, now)

    def _was_reset(self, connection: _Connection) -> None:
        # A cable that carries nothing carries no reset either: the other end learns of it after the stall.
        connection.reset_held_back = connection.is_stalled()
        if not connection.reset_held_back:
            self._end(connection, _reset)

    def _register(self, connection: _Connection, now: float) -> None:
        registered = self._selector.get_map()
        for end, wanted in connection.interest(now).items():
            if end.fileno() == -1:
                continue
            if end not in registered:
                if wanted:
                    self._selector.register(end, wanted, connection)
            elif not wanted:
                self._selector.unregister(end)
            elif registered[end].events != wanted:
                self._selector.modify(end, wanted, connection)

    def _next_due(self) -> float | None:
        times = [
            direction.chunks[0][0]
            for connection in self._live
            for direction in connection.directions
            if direction.chunks and not direction.stalled
        ]
        # One that was due already waits for its socket to take more, and the selector reports it.
        later = [due for due in times if due > self._now]
        return max(0.0, min(later) - time.monotonic()) if later else None

    def _forget(self, end: socket.socket) -> None:
        if end.fileno() != -1 and end in self._selector.get_map():
            self._selector.unregister(end)

    def _end(self, connection: _Connection, how: Callable[[socket.socket], None]) -> None:
        if connection in self._live:
            self._live.remove(connection)
        for end in (connection.client, connection.server):
            self._forget(end)
            how(end)


def _reset(end: socket.socket) -> None:
    if end.fileno() != -1:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        end.close()
