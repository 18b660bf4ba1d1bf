"""pika's connection, writing what belongs together in one piece."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pika
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.exceptions import NoFreeChannels, StreamLostError

from worker.shells.fibers import Loop


def new_loop() -> Loop:
    """pika's loop, for connections and fibers to share."""
    loop: Loop = IOLoop()
    return loop


class Services(SelectorIOServicesAdapter):  # type: ignore[misc]
    """Reports a peer that has reset the connection by the time it is looked at; pika 1.4 lets the `ValueError` end the
    loop, and with it the process, at a load balancer without a broker behind it."""

    def create_streaming_connection(
        self, protocol_factory: Callable[[], Any], sock: Any, on_done: Callable[[Any], None], *more: Any, **named: Any
    ) -> Any:
        """See pika. What it returns can be cancelled."""
        try:
            return super().create_streaming_connection(protocol_factory, sock, on_done, *more, **named)
        except ValueError:
            gone = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            return self.call_later(0, partial(on_done, gone))


class Connection(pika.SelectConnection):  # type: ignore[misc]  # pika 1.4 ships no types
    """Joins the frames of a message, and of a whole batch while `corked`.

    pika 1.4 hands each frame to the socket by itself: three system calls for a publish, and each of them lets another
    thread take the interpreter lock. The one private method overridden here has a test of its own.
    """

    _held: list[bytes] | None = None
    complaint = ""
    """Why we ended it, when the broker left us no other way."""

    def __init__(self, parameters: Any, *, custom_ioloop: IOLoop, **callbacks: Callable[..., None]) -> None:
        super().__init__(parameters, custom_ioloop=Services(custom_ioloop), **callbacks)

    def abort(self, reason: str) -> None:
        """Ends it without the broker's help; its close callback follows. pika has a private method for that only."""
        self._terminate_stream(StreamLostError(reason))

    def channel(self, channel_number: int | None = None, on_open_callback: Any = None) -> Any:
        """Opens a channel; ends the connection, with a complaint, where the broker allows no further one."""
        try:
            return super().channel(channel_number, on_open_callback)
        except NoFreeChannels:
            most = self.params.channel_max
            self.complaint = f"the broker allows only {most} channels to a connection; raise its channel_max"
            self.close(200, self.complaint)
            return None

    @contextmanager
    def corked(self) -> Iterator[None]:
        """Holds frames back until the end of the block."""
        self._held = []
        try:
            yield
        finally:
            frames, self._held = self._held, None
            if frames and self.is_open:
                self._output_marshaled_frames(frames)

    def _output_marshaled_frames(self, marshaled_frames: Sequence[bytes]) -> None:
        if self._held is None:
            super()._output_marshaled_frames([b"".join(marshaled_frames)])
        else:
            self._held.extend(marshaled_frames)
