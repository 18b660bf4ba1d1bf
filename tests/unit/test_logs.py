"""Log lines: one per event, whole, dated in Jakarta, and without what must not be shown."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import re
import select
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from worker.shells import logs


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Logging is global; leave it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_line_has_time_level_and_event_first() -> None:
    """A JSON line begins with timestamp in +07:00, level and event."""

    stream = io.StringIO()
    logs.configure("json", "info", stream)

    structlog.get_logger().bind(lane="sweep").info("attempt", seconds=0.2, sent=None)

    (line,) = lines(stream)
    assert list(line) == ["timestamp", "level", "event", "lane", "seconds", "sent"]
    assert (line["level"], line["event"], line["lane"], line["sent"]) == ("info", "attempt", "sweep", None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+07:00", line["timestamp"])


def test_below_the_level_nothing_is_written() -> None:
    """`info` leaves debug out."""

    stream = io.StringIO()
    logs.configure("json", "info", stream)

    structlog.get_logger().debug("detail")

    assert stream.getvalue() == ""


def test_any_value_gives_a_line() -> None:
    """What JSON cannot hold is written as text instead of raising in whoever logs."""

    class Rude:
        def __str__(self) -> str:
            raise RuntimeError("no")

    stream = io.StringIO()
    logs.configure("json", "info", stream)
    cycle: list[Any] = []
    cycle.append(cycle)

    structlog.get_logger().info("odd", nan=float("nan"), set={1}, cycle=cycle, rude=Rude(), text="a\nb\u2028")

    assert len(stream.getvalue().splitlines()) == 1
    (line,) = lines(stream)
    assert (line["nan"], line["set"], line["text"]) == ("nan", "{1}", "a\nb\u2028")
    assert line["rude"] == "<Rude: RuntimeError>"


def test_exception_is_one_line_without_locals() -> None:
    """A traceback stays in its line, and shows no local variable."""

    stream = io.StringIO()
    logs.configure("json", "info", stream)
    password = "".join(["hun", "ter2"])

    try:
        raise RuntimeError(f"amqp://guest:{password}@host")
    except RuntimeError:
        structlog.get_logger().exception("failed")

    (line,) = lines(stream)
    assert line["level"] == "error"
    assert "RuntimeError: amqp://***@host" in line["exception"]
    assert password not in stream.getvalue()


def test_long_traceback_keeps_its_end() -> None:
    """A traceback is cut so that its line fits a pipe's piece; its end says most."""

    stream = io.StringIO()
    logs.configure("json", "info", stream)

    try:
        raise RuntimeError("x" * 10_000 + " the end")
    except RuntimeError:
        structlog.get_logger().exception("failed")

    (line,) = lines(stream)
    assert len(line["exception"]) <= logs.MAX_TRACEBACK + 1
    assert line["exception"].endswith("the end")


def test_libraries_log_in_the_same_form_from_warning_on() -> None:
    """urllib3's warnings come as JSON lines, without passwords; its chatter and all of pika's does not."""

    stream = io.StringIO()
    logs.configure("json", "debug", stream)

    logging.getLogger("pika.adapters").error("seven lines for one lost connection")
    logging.getLogger("urllib3.connectionpool").info("chatter")
    logging.getLogger("urllib3.connectionpool").warning("lost %s", "amqp://guest:hunter2@host")

    (line,) = lines(stream)
    assert (line["level"], line["logger"]) == ("warning", "urllib3.connectionpool")
    assert line["event"] == "lost amqp://***@host"


def test_terminal_gets_the_console_form() -> None:
    """Without a format, a terminal gets text for people and anything else JSON."""

    terminal, pipe = Terminal(), io.StringIO()
    logs.configure(None, "info", terminal)
    structlog.get_logger().info("attempt", lane="sweep")
    logs.configure(None, "info", pipe)
    structlog.get_logger().info("attempt", lane="sweep")

    assert not terminal.getvalue().startswith("{")
    assert "sweep" in terminal.getvalue()
    assert lines(pipe)[0]["lane"] == "sweep"


def test_console_shows_exceptions_without_locals() -> None:
    """The console form prints a plain traceback."""

    stream = io.StringIO()
    logs.configure("console", "info", stream)
    password = "".join(["hun", "ter2"])

    try:
        raise RuntimeError(f"length {len(password)}")
    except RuntimeError:
        structlog.get_logger().exception("failed")

    assert "RuntimeError: length 7" in stream.getvalue()
    assert password not in stream.getvalue()


def test_lines_of_several_threads_stay_whole() -> None:
    """Each line is one write: threads and processes on one pipe do not mix theirs."""

    reader, writer = os.pipe()
    read: list[bytes] = []
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb") as end:
        collector = threading.Thread(target=lambda: read.extend(end.readline() for _ in range(800)))
        collector.start()
        logs.configure("json", "info", stream)
        log = structlog.get_logger()
        writers = [
            threading.Thread(target=lambda: [log.info("attempt", text="x" * 500) for _ in range(200)]) for _ in range(4)
        ]
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()
        collector.join(30)

    assert [json.loads(line)["text"] for line in read] == ["x" * 500] * 800


def test_gathered_lines_are_written_together() -> None:
    """When they fill what a pipe takes at once, or when they are asked for: in their order, whole lines each time."""

    reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)  # a read gives one write
    with os.fdopen(writer, "w") as stream:
        logs.configure("json", "info", stream)
        log = structlog.get_logger()
        with logs.gathered() as bring_out:
            for number in range(30):
                log.info("attempt", number=number, text="x" * 400)
            written = [os.read(reader, select.PIPE_BUF) for _ in range(3)]
            with pytest.raises(BlockingIOError):
                os.read(reader, select.PIPE_BUF)
            bring_out()
            written.append(os.read(reader, select.PIPE_BUF))
    os.close(reader)

    assert [json.loads(line)["number"] for line in b"".join(written).splitlines()] == list(range(30))
    assert all(each.startswith(b"{") and each.endswith(b"}\n") for each in written)


def test_warnings_and_other_threads_are_not_gathered() -> None:
    """A warning goes out at once, after what waits before it; a line of another thread does not wait."""

    stream = io.StringIO()
    logs.configure("json", "info", stream)
    log = structlog.get_logger()
    with logs.gathered():
        log.info("first")
        other = threading.Thread(target=lambda: log.info("other thread"))
        other.start()
        other.join()
        assert [line["event"] for line in lines(stream)] == ["other thread"]
        log.warning("second")
        assert [line["event"] for line in lines(stream)] == ["other thread", "first", "second"]
        log.info("third")
    log.info("fourth")

    assert [line["event"] for line in lines(stream)] == ["other thread", "first", "second", "third", "fourth"]


def test_gathered_lines_wait_one_by_one_for_a_reader() -> None:
    """So that the most that waits is a number of lines."""

    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb") as end:
        logs.configure("json", "info", stream)
        log = structlog.get_logger()
        most = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) // 1000 + 100
        with logs.gathered():
            for number in range(most):
                log.info("attempt", number=number, text="x" * 1000)
        came = [json.loads(end.readline())["number"] for _ in range(most)]

    assert came == list(range(most))


def test_closed_pipe_does_not_stop_the_worker() -> None:
    """A line that cannot be written is lost; whoever logs goes on."""

    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        logs.configure("json", "info", stream)
        os.close(reader)

        structlog.get_logger().info("attempt")


def test_a_pipe_that_nobody_reads_stops_nobody() -> None:
    """Lines wait for a reader, in their order; of those that are too many, one line says how many, in their place."""

    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb") as end:
        logs.configure("json", "info", stream)
        log = structlog.get_logger()
        logged = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) // 1000 + logs.MOST_WAITING + 50
        for number in range(logged):
            log.info("attempt", number=number, text="x" * 1000)
        came = [json.loads(end.readline())]
        while came[-1]["event"] != "log.lost":
            came.append(json.loads(end.readline()))
        lost = came.pop()
        log.info("attempt", number=logged, text="late")
        assert json.loads(end.readline())["number"] == logged

    numbers = [line["number"] for line in came]
    assert (lost["level"], lost["lines"]) == ("warning", logged - len(numbers))
    assert lost["lines"] >= 50
    assert numbers == list(range(len(numbers)))


def test_a_line_longer_than_a_pipe_takes_at_once_stops_nobody() -> None:
    """A pipe that takes 4 KiB would stop who writes more."""

    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb") as end:
        logs.configure("json", "info", stream)
        text = "x" * 2 * fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)

        structlog.get_logger().info("attempt", text=text)

        assert json.loads(end.readline())["text"] == text


def test_without_a_thread_lines_wait_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has none to give: whoever logs does not hear of it, and the next line brings the others out."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb") as end:
        logs.configure("json", "info", stream)
        log = structlog.get_logger()
        too_long_to_write_at_once = "x" * 5_000
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            log.info("first", text=too_long_to_write_at_once)
        log.info("second")

        assert [json.loads(end.readline())["event"] for _ in range(2)] == ["first", "second"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("amqps://u:p@h/ and https://a:b@c", "amqps://***@h/ and https://***@c"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("amqp://host:5672/ is fine", "amqp://host:5672/ is fine"),
    ],
)
def test_redaction_of_foreign_texts(text: str, shown: str) -> None:
    """Passwords in URLs and bearer tokens are masked in texts of others."""

    assert logs.redact(text) == shown
