"""What a sweep's input says: CSV as people have it, or JSON lines; every row is a bill to expire, or why it is none."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from worker.core.command import IDENTIFIER_RULE, MAX_REFERENCE, Invalid, is_identifier, parse, parse_rfc3339

DELIMITERS: Final = (",", ";", "\t", "|")

_COLUMNS: Final = {"billnumber": "bill", "merchantid": "merchant", "reference": "reference", "notafter": "not_after"}
_NEEDLESS = re.compile(r"[\s_-]+")
_SEPARATOR_LINE = re.compile(r"sep=(.)\Z", re.IGNORECASE)
_MANGLED = re.compile(r'[+-]?\d(?:[.,]\d+)?[eE]\+\d+\Z|=".*"\Z')
_DIGITS, _LETTERS = re.compile(r"\d+"), re.compile(r"[A-Za-z]+")


class Row(NamedTuple):
    """One bill to expire. ``merchant`` is empty where the worker's default is to serve; ``not_after`` is RFC 3339."""

    line: int
    bill: str
    merchant: str
    reference: str | None
    not_after: str | None


class BadRow(NamedTuple):
    """A row that is no command, and why. Lines count from 1, the header included."""

    line: int
    reason: str


class InputError(Exception):
    """Nothing can be read from here on. ``line`` is None where it is the input as a whole."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


class _Bad(ValueError):
    """The text says why a row is no command."""


def read(
    lines: Iterable[str], *, json_lines: bool = False, merchant: str = "", merchant_needed: bool = False
) -> Iterator[Row | BadRow]:
    """The rows, in their order, in constant memory. Raises `InputError`.

    ``json_lines`` says so of the whole input; otherwise its first character decides. ``merchant`` serves where a row
    has none; with ``merchant_needed`` there must be one after that.
    """
    numbered = _Numbered(lines)
    first = numbered.first()
    if first is None:
        raise InputError("is empty: not even a header; see what should have written it")
    if json_lines or first.lstrip().startswith("{"):
        return _json_rows(numbered, first, merchant, merchant_needed)
    return _csv_rows(numbered, first, merchant, merchant_needed)


# -- CSV ------------------------------------------------------------------------------------------------------------


class _Numbered:
    """Lines with their numbers; remembers those that the row at hand is made of."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self.number = 0
        self.held: list[str] = []

    def __iter__(self) -> _Numbered:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.held.append(line)
        return line

    def first(self) -> str | None:
        """The first line that is not blank, without a byte-order mark."""
        for line in self:
            self.held.clear()
            text = line.removeprefix("\ufeff") if self.number == 1 else line
            if text.strip():
                return text
        return None


class _Header(NamedTuple):
    """Where the columns are that matter, by our names for them."""

    delimiter: str
    width: int
    places: Mapping[str, int]

    def cell(self, cells: Sequence[str], name: str) -> str:
        """A row's cell; empty where the row or the header has none (spreadsheets leave out trailing empty cells)."""
        place = self.places.get(name)
        return cells[place].strip() if place is not None and place < len(cells) else ""


def _csv_rows(lines: _Numbered, first: str, merchant: str, merchant_needed: bool) -> Iterator[Row | BadRow]:
    header = _header(lines, first)
    rows = csv.reader(lines, delimiter=header.delimiter)
    while True:
        lines.held.clear()
        start = lines.number + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"no CSV from here on ({error}); look for a quote that is not closed", start) from None
        if len(lines.held) > 1:
            _check_swallowed(header, cells, lines.held, start)
        if not any(cell.strip() for cell in cells):
            continue
        try:
            yield _csv_row(header, cells, start, merchant, merchant_needed)
        except _Bad as bad:
            yield BadRow(start, str(bad))


def _csv_row(header: _Header, cells: Sequence[str], line: int, merchant: str, merchant_needed: bool) -> Row:
    if len(cells) > header.width and any(cell.strip() for cell in cells[header.width :]):
        raise _Bad(
            f"has {len(cells)} fields where the header has {header.width}; quote the one that holds the delimiter"
        )
    bill = header.cell(cells, "bill")
    if not bill:
        raise _Bad("billnumber is missing")
    if _MANGLED.match(bill):
        raise _Bad(f"billnumber {bill[:40]} is what a spreadsheet made of it; export that column as text")
    if not is_identifier(bill):
        raise _Bad(f"billnumber must be {IDENTIFIER_RULE}")
    own = header.cell(cells, "merchant") or merchant
    if own and not is_identifier(own):
        raise _Bad(f"merchantId must be {IDENTIFIER_RULE}")
    if merchant_needed and not own:
        raise _Bad(_MERCHANT_MISSING)
    reference = header.cell(cells, "reference") or None
    if reference is not None and len(reference) > MAX_REFERENCE:
        raise _Bad(f"reference must have at most {MAX_REFERENCE} characters")
    not_after = header.cell(cells, "not_after") or None
    if not_after is not None:
        try:
            parse_rfc3339(not_after)
        except ValueError as error:
            raise _Bad(f"notAfter: {error}") from None
    return Row(line, bill, own, reference, not_after)


_MERCHANT_MISSING: Final = "merchantId is missing, and neither --merchant-id nor GATEWAY_MERCHANT_ID gives one"


def _header(lines: _Numbered, first: str) -> _Header:
    """The first line; or the second, where the first is the ``sep=;`` that spreadsheets write."""
    line = first.rstrip("\r\n")
    separator = _SEPARATOR_LINE.match(line.strip())
    if separator is not None:
        line = next(lines, "").rstrip("\r\n")
    if "\r" in line:
        raise InputError("has carriage returns alone as line ends; save it with LF or CRLF", lines.number)
    candidates = [_parsed(line, delimiter) for delimiter in ([separator[1]] if separator else DELIMITERS)]
    found = [header for header in candidates if header is not None and "bill" in header.places]
    if not found:
        raise InputError(f"has no column billnumber (or billNumber) in its header: {line[:120]!r}", lines.number)
    return max(found, key=lambda header: header.width)


def _parsed(line: str, delimiter: str) -> _Header | None:
    try:
        cells = next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return None
    places: dict[str, int] = {}
    for place, cell in enumerate(cells):
        name = _COLUMNS.get(_NEEDLESS.sub("", cell).lower())
        if name is None:
            continue
        if name in places:
            raise InputError(f"names the column {cell.strip()} twice in its header; leave one", 1)
        places[name] = place
    return _Header(delimiter, len(cells), places)


def _check_swallowed(header: _Header, cells: Sequence[str], lines: Sequence[str], start: int) -> None:
    """A quote that is not closed makes the rows after it part of one field, and their bills would be lost without a
    word. A field may have line breaks, but none of its lines may look like a row of its own."""
    bill = header.cell(cells, "bill")
    # The first line without its quotes: what an open one hides. Only it and the last one hold cells of this row.
    for offset, line in enumerate([lines[0].replace('"', ""), *lines[1:]]):
        alone = next(csv.reader([line], delimiter=header.delimiter), [])
        other = header.cell(alone, "bill")
        if other == bill and offset in (0, len(lines) - 1):
            continue
        alike = _shape(other) == _shape(bill) or (len(alone) == header.width and any(map(str.isdigit, other)))
        if alike and is_identifier(other):
            raise InputError(
                f"has a quoted field that takes in a row, up to line {start + len(lines) - 1}; close it", start
            )


def _shape(text: str) -> str:
    return _LETTERS.sub("a", _DIGITS.sub("9", text))


# -- JSON lines -----------------------------------------------------------------------------------------------------


def _json_rows(lines: _Numbered, first: str, merchant: str, merchant_needed: bool) -> Iterator[Row | BadRow]:
    line: str | None = first
    while line is not None:
        number = lines.number
        if line.strip():
            try:
                yield _json_row(line, number, merchant, merchant_needed)
            except _Bad as bad:
                yield BadRow(number, str(bad))
        lines.held.clear()
        line = next(lines, None)


def _json_row(line: str, number: int, merchant: str, merchant_needed: bool) -> Row:
    """A command as the queue takes it, on one line; ``merchantId`` may also stand beside the bill."""
    command = parse(line.strip().encode(), default_merchant="-")
    if isinstance(command, Invalid):
        raise _Bad(command.detail)
    fields: dict[str, Any] = json.loads(line)
    info = fields.get("additionalInfo") or {}
    given = [value for value in (info.get("merchantId"), fields.get("merchantId")) if value is not None]
    if any(not isinstance(value, str) or not is_identifier(value) for value in given):
        raise _Bad(f"merchantId must be {IDENTIFIER_RULE}")
    if len(set(given)) > 1:
        raise _Bad("merchantId and additionalInfo.merchantId differ")
    if command.reference is not None and any("\ud800" <= letter <= "\udfff" for letter in command.reference):
        raise _Bad("reference holds half of a surrogate pair")
    own = given[0] if given else merchant
    if merchant_needed and not own:
        raise _Bad(_MERCHANT_MISSING)
    return Row(number, command.billnumber, own, command.reference, fields.get("notAfter"))
