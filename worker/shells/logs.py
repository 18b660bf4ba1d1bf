"""Logs: one line per event, JSON for machines or coloured text for a terminal; structlog and stdlib alike.

Use ``structlog.get_logger()`` anywhere; before `configure` its lines go to structlog's own default.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Final, Literal, TextIO

import structlog

from worker.core import jakarta
from worker.core.compact import compact

LogFormat = Literal["json", "console"]
Render = Callable[[dict[str, Any]], bytes]

FOREIGN_LEVEL: Final = logging.WARNING
"""pika logs every frame at INFO; from this level on its lines and urllib3's are useful."""

MAX_TRACEBACK: Final = 3_000
"""A pipe takes 4 KiB in one piece; longer lines of several processes could mix. The end says most."""

MOST_WAITING: Final = 10_000
"""Lines that wait for a reader of the log: some 3 MB. `log.lost` counts those beyond."""

LAST_WORDS: Final = 1.0  # seconds that the end of the process waits for a reader of the log

_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]*:[^\s@]*(?=@)|(?<=Bearer )\S+", re.IGNORECASE)


def configure(
    format: LogFormat | None = None, level: str = "info", stream: TextIO | None = None, process: str | None = None
) -> None:
    """Sends logs to ``stream`` (standard output): structlog's from ``level`` on, the libraries' from WARNING.

    Without ``format``: console on a terminal, else JSON. ``process`` signs every line, where several processes write
    to one stream. Call it once, before the first line is logged.
    """
    stream = stream or sys.stdout
    if format is None:
        format = "console" if stream.isatty() else "json"
    render = json_line if format == "json" else _console(colors=stream.isatty())
    global _lines
    lowest = logging.getLevelNamesMapping()[level.upper()]
    lines = _lines = _Lines(stream, render, lowest, {} if process is None else {"process": process})
    atexit.register(lines.flush, LAST_WORDS)
    structlog.configure(
        processors=[], wrapper_class=_Logger, logger_factory=lambda *_: lines, cache_logger_on_first_use=True
    )
    logging.basicConfig(handlers=[_Foreign(lines)], level=max(FOREIGN_LEVEL, lowest), force=True)
    # pika logs one lost connection as seven errors of several lines; the links log it as one line of ours.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    logging.captureWarnings(True)


@contextmanager
def gathered() -> Iterator[Callable[[], None]]:
    """Within it, this thread's lines of level info wait until they fill a piece that a pipe takes at once, or until
    what it gives is called: a write for each line costs as much as the line. A warning or worse goes out at once, after
    those that wait."""
    if _lines is None:
        yield lambda: None
        return
    with _lines.gathered():
        yield _lines.bring_out


def json_line(line: dict[str, Any]) -> bytes:
    """What `begun` began, as one JSON object without line breaks."""
    if "exc_info" in line:
        _add_exception(line)
    try:
        return compact(line, str)
    except (TypeError, ValueError, RecursionError):  # a cycle, keys of another type
        return compact({str(key): _plain(value) for key, value in line.items()})


def begun(level: str, event: str) -> dict[str, Any]:
    """What stands first in every line: the time in Jakarta, the level, and what happened."""
    return {"timestamp": jakarta.iso(time.time()), "level": level, "event": event}


def redact(text: str) -> str:
    """Masks passwords in URLs and bearer tokens: a last resort for texts of others. Ours never hold one."""
    return _CREDENTIALS.sub("***", text)


class _Logger(structlog.BoundLoggerBase):
    """structlog's logger, which hands each event to `_Lines` at once. Its own way there, by processors of which we have
    one, costs as much as the line."""

    _logger: _Lines

    def debug(self, event: str, **fields: Any) -> None:
        """A line for developers."""
        self._logger.log(logging.DEBUG, event, self._context, fields)

    def info(self, event: str, **fields: Any) -> None:
        """What happens."""
        self._logger.log(logging.INFO, event, self._context, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """What somebody should look at."""
        self._logger.log(logging.WARNING, event, self._context, fields)

    def error(self, event: str, **fields: Any) -> None:
        """What somebody has to repair."""
        self._logger.log(logging.ERROR, event, self._context, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error with the traceback of the exception that is being handled."""
        self.error(event, **{"exc_info": True, **fields})

    def is_enabled_for(self, level: int) -> bool:
        """Whether lines of this level of `logging` are written."""
        return level >= self._logger.lowest


class _Lines:
    """The stream, a whole line at a time: one write(2) each, so that several processes do not mix.

    A pipe that nobody reads is full after 64 KiB, and a write to it would stop whoever logs: here the loop, with its
    heartbeats and all senders. So once the stream takes nothing, lines wait, and a thread brings them out.
    """

    def __init__(self, stream: TextIO, render: Render, lowest: int, signature: Mapping[str, str]) -> None:
        self.lowest = lowest
        self._stream = stream
        self._render = render
        self._signature = signature  # which of several processes it is
        self._lock = threading.RLock()  # a signal's handler may log in the middle of a line of the same thread
        self._waiting: deque[bytes] = deque()  # the first one is being written
        self._catching_up = False
        self._lost = 0
        self._gatherer: int | None = None  # the thread whose lines are gathered
        self._gathered: list[bytes] = []
        self._size = 0  # of those
        self._writable = select.poll()
        try:
            self._fd: int | None = stream.fileno()
            self._writable.register(self._fd, select.POLLOUT)
        except (OSError, ValueError):  # a stream in memory
            self._fd = None

    def log(self, level: int, event: str, *fields: Mapping[str, Any]) -> None:
        """Writes a line of this level of `logging`, if it is not too low; one of info or debug in company, where this
        thread gathers lines."""
        if level < self.lowest:
            return
        line = self._line(level, event, *fields)
        if self._gatherer != threading.get_ident():
            self._write(line)
        elif level <= logging.INFO:
            self._size += len(line)
            if self._size > select.PIPE_BUF or self._waiting:  # or a reader is awaited: then each line waits by itself
                self.bring_out()
                self._size = len(line)
            self._gathered.append(line)
        else:
            self.bring_out()
            self._write(line)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See the module's `gathered`."""
        self._gatherer = threading.get_ident()
        try:
            yield
        finally:
            self._gatherer = None
            self.bring_out()

    def bring_out(self) -> None:
        """Writes what was gathered."""
        if self._gathered:
            lines, self._gathered, self._size = self._gathered, [], 0
            self._write(b"".join(lines))

    def _line(self, level: int, event: str, *fields: Mapping[str, Any]) -> bytes:
        line = begun(_name(level), event)
        for more in (self._signature, *fields):
            line.update(more)
        return self._render(line) + b"\n"

    def _write(self, data: bytes) -> None:
        """A full disk or a closed pipe loses the line, never the command that is worked on."""
        if self._fd is None:
            self._stream.write(data.decode())
            return
        with self._lock:
            # A pipe or terminal that says it takes something takes PIPE_BUF at once.
            if not self._waiting and len(data) <= select.PIPE_BUF and self._writable.poll(0):
                _write(self._fd, data)
                return
            if len(self._waiting) < MOST_WAITING:
                self._waiting.append(data)
            else:
                self._lost += data.count(b"\n")
            if not self._catching_up:
                self._catching_up = True
                try:
                    threading.Thread(target=self._catch_up, args=(self._fd,), name="log", daemon=True).start()
                except RuntimeError:  # the system has none to give; the next line asks again
                    self._catching_up = False

    def flush(self, seconds: float) -> None:
        """Gives what waits so long to come out."""
        deadline = time.monotonic() + seconds
        while self._waiting and time.monotonic() < deadline:
            time.sleep(0.01)

    def _catch_up(self, fd: int) -> None:
        waiting = True
        while waiting:
            _write(fd, self._waiting[0])
            with self._lock:
                self._waiting.popleft()
                if self._lost:
                    self._waiting.append(self._line(logging.WARNING, "log.lost", {"lines": self._lost}))
                    self._lost = 0
                waiting = self._catching_up = bool(self._waiting)


@cache
def _name(level: int) -> str:
    return logging.getLevelName(level).lower()


_lines: _Lines | None = None


def _write(fd: int, data: bytes) -> None:
    with suppress(OSError):
        done = os.write(fd, data)
        while done < len(data):  # only lines beyond PIPE_BUF get here
            done += os.write(fd, data[done:])


class _Foreign(logging.Handler):
    """Lines of libraries that log with the standard library."""

    def __init__(self, lines: _Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Never raises."""
        try:
            fields: dict[str, Any] = {"logger": record.name}
            if record.exc_info:
                fields["exc_info"] = record.exc_info
            self._lines.log(record.levelno, redact(record.getMessage()), fields)
        except Exception:  # noqa: BLE001  # logging must not end what it reports
            self.handleError(record)


def _add_exception(line: dict[str, Any]) -> None:
    text = _traceback(line.pop("exc_info"))
    if text:
        line["exception"] = text


def _traceback(info: object) -> str:
    """The traceback, without local variables: those may hold secrets."""
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if not isinstance(error, BaseException):
        return ""
    text = redact("".join(traceback.format_exception(error)).rstrip())
    return text if len(text) <= MAX_TRACEBACK else "…" + text[-MAX_TRACEBACK:]


def _plain(value: object) -> object:
    if isinstance(value, str | int | bool | None):
        return value
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001  # a foreign __str__ must not stop the worker
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _console(*, colors: bool) -> Render:
    renderer = structlog.dev.ConsoleRenderer(
        colors=colors, timestamp_key="timestamp", exception_formatter=structlog.dev.plain_traceback
    )

    def render(line: dict[str, Any]) -> bytes:
        if "exc_info" in line:
            _add_exception(line)
        line["timestamp"] = str(line["timestamp"]).replace("T", " ")
        return str(renderer(None, str(line["level"]), line)).encode("utf-8", "backslashreplace")

    return render
