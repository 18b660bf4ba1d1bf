"""A sweep's input, from a file or standard input, as lines of text: checked for UTF-8, digested on the way."""

from __future__ import annotations

import codecs
import hashlib
import shlex
import stat
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Final, Self, cast

from worker.core.rows import InputError, InputRows, RowRules, read_lines

STDIN: Final = "-"
MAX_LINE_BYTES: Final = 1 << 20  # what is no text at all (a disk image, an archive) has no line ends
SAVE_AS: Final = "in Excel: File > Save As > 'CSV UTF-8 (Comma delimited) (*.csv)'"
_ENCODED: Final = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),  # Excel's "Unicode Text"
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_PACKED: Final = (
    (b"\x1f\x8b", "gzip", "gzip -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"\xfd7zXZ", "xz", "xz -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
)
_OTHER: Final = (
    (b"\xd0\xcf\x11\xe0", f"an Excel workbook of the old form (.xls) or with a password; save it as CSV ({SAVE_AS})"),
    (b"%PDF", "a PDF document; export the table itself as CSV"),
    (b"<", f"HTML or XML, whatever its name says; open it in a spreadsheet and save it as CSV ({SAVE_AS})"),
)
_JSON_SUFFIXES: Final = frozenset({".jsonl", ".ndjson"})


class Source:
    """Lines of text. ``name`` is a path, or ``-`` for standard input. Raises `InputError` when it cannot be opened."""

    def __init__(self, name: str) -> None:
        self.name = "stdin" if name == STDIN else name
        self.json_lines = Path(name).suffix.lower() in _JSON_SUFFIXES
        self.bytes_read = 0
        self._digest = hashlib.sha256()
        self._file, self.size = _open(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Standard input stays open."""
        if self._file is not sys.stdin.buffer:
            self._file.close()

    def starts_with(self, mark: bytes) -> bool:
        """Whether these are its first bytes; nothing is read by that."""
        try:
            return self._file.peek(len(mark)).startswith(mark)
        except OSError:  # reported when it is read
            return False

    def lines(self) -> Iterator[str]:
        """All of them, line ends included. Raises `InputError`."""
        number = 0
        while line := self._line(number + 1):
            number += 1
            if number == 1:
                _check_kind(self.name, line)
            self._digest.update(line)
            self.bytes_read += len(line)
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(_not_utf8(line, error.start), number) from None
            if b"\0" in line:
                raise InputError(
                    f"has NUL bytes: it is UTF-16 without its mark, or no text; save it as UTF-8 ({SAVE_AS})", number
                )
            yield text

    def reading(self, rules: RowRules) -> InputRows:
        """The rows, as they are read. Raises `InputError`."""
        return read_lines(self.lines(), rules, json_lines=self.json_lines)

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


def _check_kind(name: str, start: bytes) -> None:
    """Raises `InputError` for what is no text, by its first bytes, with what to do about it."""
    for mark, encoding in _ENCODED:
        if start.startswith(mark):
            raise InputError(f"is {encoding}; save it as UTF-8 ({SAVE_AS})", 1)
    for mark, packed, unpack in _PACKED:
        if start.startswith(mark):
            raise InputError(
                f"is compressed with {packed}; unpack it: {unpack} {shlex.quote(name)} | qris-expire sweep -"
            )
    for mark, what in _OTHER:
        if start.lstrip().startswith(mark):
            raise InputError(f"is {what}")


def _not_utf8(line: bytes, at: int) -> str:
    """The first letter that is not UTF-8, as the usual other encoding has it, and the text around it."""
    text, letter = line.decode("cp1252", "replace"), line[at : at + 1].decode("cp1252", "replace")
    around = text[max(0, at - 15) : at + 15].strip()
    return (
        f"is not UTF-8 text: byte 0x{line[at]:02X}, {letter!r} in Windows-1252 (as in {around!r}); "
        f"save the file as UTF-8 ({SAVE_AS})"
    )


def _open(name: str) -> tuple[BufferedReader, int | None]:
    """The stream, and its size in bytes where that is known."""
    if name == STDIN:
        return cast("BufferedReader", sys.stdin.buffer), None
    path = Path(name)
    try:
        status = path.stat()
        return path.open("rb"), status.st_size if stat.S_ISREG(status.st_mode) else None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}); correct the path") from None
