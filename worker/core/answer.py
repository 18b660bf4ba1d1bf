"""One HTTP/1.1 answer, read from bytes as they come. Pure: no socket, no clock.

It accepts what RFC 9112 lets a client accept, because firewalls and old servers send it: folded lines, lines that end
with a bare LF, control characters in values, blanks around a chunk's size, the same Content-Length twice. It refuses
whatever leaves the length of an answer open: two different lengths, a length beside a transfer coding, a field name
that is no token. Two readers could see two different answers there, and the worker must never take one call's answer
for another's.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

MAX_BODY_BYTES: Final = 64 * 1024
"""An answer is a hundred bytes; more is a firewall's page or a mistake. The rest is not read, or not decoded."""
MAX_HEAD_BYTES: Final = 64 * 1024
MAX_ANSWER_BYTES: Final = 512 * 1024
"""Of the whole answer: chunk extensions, trailers and one-byte chunks must not go on for ever."""

_STATUS: Final = re.compile(r"HTTP/1\.(\d)[ \t]+([1-9]\d\d)(?:[ \t]+(.*))?", re.ASCII | re.DOTALL)
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_USUAL_FIELD: Final = re.compile(rf"^({_TOKEN.pattern}):([ -~]*)\r\n", re.MULTILINE)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_LENGTH: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_CHUNK_SIZE: Final = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?", re.DOTALL)
_LINE_ENDS: Final = b"\r\n"
_CODINGS: Final = frozenset({"gzip", "x-gzip", "deflate"})
_BY_CONTENT: Final = 47  # zlib tells its own format and gzip's apart, whatever the header calls it
_RAW_DEFLATE: Final = -15
_GZIP_MAGIC: Final = b"\x1f\x8b"


class NotHttp(ValueError):
    """What came is no answer that can be understood in one way only. The text never repeats what came."""


class TooLarge(NotHttp):
    """The head, or the answer with all that surrounds its body, is larger than any answer of a gateway."""


class Answer:
    """One answer, put together with `feed` until it is `complete`. Interim (1xx) answers are passed over.

    ``headers`` have lower-case names; repeated ones are joined with commas. ``surplus``: more bytes came than one
    answer has. ``reusable``: the connection may carry another exchange. ``tunnel``: it answers a CONNECT, so what
    follows a success is not its body (RFC 9112, 6.3), and a refusal's does not matter.
    """

    __slots__ = (
        "_at",
        "_body",
        "_buffer",
        "_codings",
        "_kept_alive",
        "_left",
        "_searched",
        "_step",
        "_tunnel",
        "complete",
        "cut",
        "headers",
        "reason",
        "received",
        "status",
    )

    def __init__(self, *, tunnel: bool = False) -> None:
        self.status = 0
        self.reason = ""
        self.headers: dict[str, str] = {}
        self.complete = False
        self.cut = False
        self.received = 0
        self._tunnel = tunnel
        self._kept_alive = False
        self._buffer = bytearray()  # all that came: no answer is larger than `MAX_ANSWER_BYTES`
        self._at = 0  # what stands before is read
        self._searched = 0
        self._body = bytearray()
        self._left = 0
        self._codings: Sequence[str] = ()
        self._step: Callable[[Answer], bool] = Answer._head  # a bound method would make a reference cycle

    def feed(self, data: bytes) -> None:
        """Takes what came. Raises `NotHttp` for what is no answer, `TooLarge` for what has no end."""
        self.received += len(data)
        self._buffer += data
        while not self.complete and self._step(self):
            pass
        if not self.complete:
            if self.status == 0 and self.received > MAX_HEAD_BYTES:
                raise TooLarge(f"more than {MAX_HEAD_BYTES} bytes of headers")
            if self.received > MAX_ANSWER_BYTES:
                raise TooLarge(f"an answer of more than {MAX_ANSWER_BYTES} bytes")

    def end(self) -> bool:
        """The connection has ended. Whether the answer is whole: without a length its body ends there."""
        self.complete = self.complete or self._step is Answer._to_the_end
        return self.complete

    @property
    def surplus(self) -> bool:
        """Line breaks after a body do no harm, and some old servers send them; anything else may be another answer."""
        return self._at < len(self._buffer) and self.complete and bool(self._buffer[self._at :].strip(_LINE_ENDS))

    @property
    def reusable(self) -> bool:
        """Whether the connection is in a known state: kept alive, and nothing came after the answer."""
        return self._kept_alive and not self.cut and self._at == len(self._buffer)

    @property
    def body(self) -> bytes:
        """Decoded, and at most `MAX_BODY_BYTES` of it."""
        body = bytes(self._body)
        if self._codings:
            body = decoded(body, self._codings)
        return decoded(body, ["gzip"]) if body.startswith(_GZIP_MAGIC) else body

    # -- the head -------------------------------------------------------------------------------------------------

    def _head(self) -> bool:
        buffer = self._buffer
        while self._at < len(buffer) and buffer[self._at] in _LINE_ENDS:
            self._at += 1  # blank lines before an answer belong to whatever came before it
        end, after = self._blank_line()
        if end < 0:
            return False
        head = _read_head(buffer[self._at : end + 1].decode("latin-1"), self._tunnel)
        self._at = self._searched = after
        if head.interim:
            return True
        self.status, self.reason, self.headers = head.status, head.reason, head.headers
        self._kept_alive, self._codings = head.kept_alive, head.codings
        if head.bodiless:
            self.complete = True
        elif head.length is not None:
            self._left = head.length
            self._step = Answer._counted
        else:
            self._step = Answer._chunk_size if head.chunked else Answer._to_the_end
        return True

    def _blank_line(self) -> tuple[int, int]:
        """Where the head ends and what follows begins; below 0 while it has no end. A line may end with LF alone."""
        start = max(self._searched - 2, self._at)
        self._searched = len(self._buffer)
        crlf = self._buffer.find(b"\n\r\n", start)
        lf = self._buffer.find(b"\n\n", start, self._searched if crlf < 0 else crlf + 1)
        return (crlf, crlf + 3) if lf < 0 else (lf, lf + 2)

    # -- the body -------------------------------------------------------------------------------------------------

    def _counted(self) -> bool:
        self._take(self._left)
        self.complete = self.complete or self._left == 0
        return False

    def _to_the_end(self) -> bool:
        self._kept_alive = False
        self._left = len(self._buffer) - self._at
        self._take(self._left)
        return False

    def _chunk_size(self) -> bool:
        line = self._line()
        if line is None:
            return False
        found = _CHUNK_SIZE.fullmatch(line)
        if found is None:
            raise NotHttp("the size of a chunk is no number")
        self._left = int(found[1], 16)
        self._step = Answer._chunk if self._left else Answer._trailer
        return True

    def _chunk(self) -> bool:
        self._take(self._left)
        if self.complete or self._left:
            return False
        self._step = Answer._chunk_end
        return True

    def _chunk_end(self) -> bool:
        line = self._line()
        if line is None:
            return False
        if line:
            raise NotHttp("a chunk is longer than it says")
        self._step = Answer._chunk_size
        return True

    def _trailer(self) -> bool:
        """Trailers are no headers (RFC 9110, 6.5.1); an empty line ends them."""
        line = self._line()
        self.complete = line == b""
        return line is not None

    def _line(self) -> bytes | None:
        """The next line without its end; None while it has none."""
        end = self._buffer.find(b"\n", max(self._searched, self._at))
        if end < 0:
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[self._at : end]).removesuffix(b"\r")
        self._at = self._searched = end + 1
        return line

    def _take(self, count: int) -> None:
        """Moves up to so many bytes into the body. A body of more than the limit is cut there, and what it says does
        not matter."""
        piece = self._buffer[self._at : self._at + count]
        self._at += len(piece)
        self._left -= len(piece)
        self._body += piece
        if len(self._body) > MAX_BODY_BYTES:
            del self._body[MAX_BODY_BYTES:]
            self._at = len(self._buffer)
            self.cut = self.complete = True


class _Head(NamedTuple):
    """What a head says: how the connection goes on (``kept_alive``), and how the body ends and is coded. ``interim``:
    the answer is still to come. ``bodiless``: there is no body, whatever the rest says."""

    status: int
    reason: str
    headers: dict[str, str]
    kept_alive: bool = False
    interim: bool = False
    bodiless: bool = False
    length: int | None = None
    chunked: bool = False
    codings: Sequence[str] = ()


def _read_head(text: str, tunnel: bool) -> _Head:
    """Reads all lines before the blank one. How the body ends: RFC 9112, 6.3."""
    first, _, rest = text.partition("\n")
    minor, status, reason = _status(first.removesuffix("\r"))
    headers = _fields(rest)
    if status < 200:
        if status == 101:
            raise NotHttp("the answer changes the protocol")
        return _Head(status, reason, headers, interim=True)  # 100 Continue, 103 Early Hints: they have no body
    connection = headers.get("connection", "").lower()
    kept_alive = "close" not in connection and (minor > 0 or "keep-alive" in connection)
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None and length is not None:
        raise NotHttp("it has both a Content-Length and a Transfer-Encoding")
    codings = _list(headers["content-encoding"]) if "content-encoding" in headers else []
    if status in (204, 304) or tunnel:
        return _Head(status, reason, headers, kept_alive, bodiless=True, codings=codings)
    if coding is None:
        return _Head(
            status, reason, headers, kept_alive, length=None if length is None else _length(length), codings=codings
        )
    transfer = _list(coding)
    chunked = transfer[-1:] == ["chunked"]
    others = [each for each in transfer[: -1 if chunked else None] if each != "identity"]
    if not transfer or not _CODINGS.issuperset(others):
        raise NotHttp("its Transfer-Encoding is not known")
    return _Head(status, reason, headers, kept_alive and minor > 0, chunked=chunked, codings=codings + others)


@lru_cache(maxsize=64)  # a gateway has a few status lines
def _status(line: str) -> tuple[int, int, str]:
    found = _STATUS.fullmatch(line)
    if found is None:
        raise NotHttp("it does not begin with a status line")
    return int(found[1]), int(found[2]), (found[3] or "").strip()


def _fields(text: str) -> dict[str, str]:
    """The field lines of a head. Nearly always each is plain and not repeated, and one pattern finds them all."""
    headers = {name.lower(): value.strip(" ") for name, value in _USUAL_FIELD.findall(text)}
    return headers if len(headers) == text.count("\n") else _unusual_fields(text)


def _unusual_fields(text: str) -> dict[str, str]:
    headers: dict[str, str] = {}
    name = ""
    for line in text.replace("\r\n", "\n").removesuffix("\n").split("\n"):
        if line[:1] in _FOLDS:  # the line before goes on; before the first field it is nothing (RFC 9112, 2.2 and 5.2)
            if name:
                headers[name] = f"{headers[name]} {_printable(line)}".strip()
            continue
        name, value = _field(line)
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


_FOLDS: Final = frozenset(" \t")


def _field(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    name = name.rstrip(" \t").lower()
    if not colon or not _TOKEN.fullmatch(name):
        raise NotHttp("a header has no name")
    return name, _printable(value)


def _printable(value: str) -> str:
    if not value.isprintable():
        value = _CONTROL.sub(" ", value)  # RFC 9110, 5.5
    return value.strip(" ")


@lru_cache(maxsize=64)  # a gateway's answers have a few lengths
def _length(value: str) -> int:
    """The same number twice is one number (RFC 9110, 8.6)."""
    texts = [text.strip() for text in value.split(",")]
    if not all(_LENGTH.fullmatch(text) for text in texts):
        raise NotHttp("its Content-Length is no number")
    numbers = {int(text) for text in texts}
    if len(numbers) > 1:
        raise NotHttp("it has two different Content-Lengths")
    return numbers.pop()


def _list(value: str) -> list[str]:
    return [item for item in (item.strip().lower() for item in value.split(",")) if item]


def decoded(body: bytes, codings: Sequence[str]) -> bytes:
    """The body without its content codings, the last one first, cut at `MAX_BODY_BYTES`.

    What is not in the coding that its header names stays as it is: some servers decode a body and leave the header.
    Names that are no coding of ours, such as a character set, are passed over.
    """
    for coding in reversed(codings):
        if coding not in _CODINGS:
            continue
        plain = _inflated(body, _BY_CONTENT)
        if plain is None and coding == "deflate":  # some servers send it without zlib's frame
            plain = _inflated(body, _RAW_DEFLATE)
        if plain is None:
            return body
        body = plain
    return body


def _inflated(body: bytes, window: int) -> bytes | None:
    """All whole members of the stream, up to `MAX_BODY_BYTES`; None for what is not in this format, or cut off."""
    plain = b""
    while body and len(plain) < MAX_BODY_BYTES:
        stream = zlib.decompressobj(window)
        try:
            more = stream.decompress(body, MAX_BODY_BYTES - len(plain))
        except zlib.error:
            return plain or None
        if not stream.eof and len(plain) + len(more) < MAX_BODY_BYTES:
            return plain or None
        plain += more
        body = stream.unused_data
    return plain
