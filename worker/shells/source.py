"""A sweep's input, from a file or standard input, as lines of text: checked for UTF-8, digested on the way."""

from __future__ import annotations

import codecs
import hashlib
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from worker.core.rows import InputError

STDIN: Final = "-"
MAX_LINE_BYTES: Final = 1 << 20  # what is no text at all (a disk image, an archive) has no line ends
_WIDE: Final = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_JSON_SUFFIXES: Final = frozenset({".jsonl", ".ndjson"})


class Source:
    """``name`` is a path, or ``-`` for standard input. Raises `InputError` when it cannot be opened."""

    def __init__(self, name: str) -> None:
        self.name = "stdin" if name == STDIN else name
        self.json_lines = Path(name).suffix.lower() in _JSON_SUFFIXES
        self.bytes_read = 0
        self._digest = hashlib.sha256()
        self._file, self.size = _open(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not sys.stdin.buffer:
            self._file.close()

    def lines(self) -> Iterator[str]:
        """All of them, line ends included. Raises `InputError`."""
        number = 0
        while line := self._line(number + 1):
            number += 1
            if number == 1 and line[:2] in _WIDE:
                raise InputError(f"is {_WIDE[line[:2]]}; save it as UTF-8", 1)
            self._digest.update(line)
            self.bytes_read += len(line)
            try:
                yield line.decode()
            except UnicodeDecodeError:
                raise InputError("is not UTF-8 text; save the file as UTF-8", number) from None

    def digest(self, *more: str) -> str:
        """Hexadecimal, of all bytes read and of what else decides what is sent."""
        whole = self._digest.copy()
        for each in more:
            whole.update(b"\0" + each.encode())
        return whole.hexdigest()

    def _line(self, number: int) -> bytes:
        try:
            line = self._file.readline(MAX_LINE_BYTES + 1)
        except OSError as error:
            raise InputError(f"cannot be read on ({error.strerror})", number) from None
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"has a line of more than {MAX_LINE_BYTES} bytes; is it CSV or JSON lines?", number)
        return line


def _open(name: str) -> tuple[BinaryIO, int | None]:
    """The stream, and its size in bytes where that is known."""
    if name == STDIN:
        return sys.stdin.buffer, None
    path = Path(name)
    try:
        status = path.stat()
        return path.open("rb"), status.st_size if stat.S_ISREG(status.st_mode) else None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}); correct the path") from None
