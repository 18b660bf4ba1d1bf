"""What a sweep's input says: a table as people have it, or JSON lines; every row is a bill to expire, or why not."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from worker.core import mangled
from worker.core.command import IDENTIFIER_RULE, MAX_REFERENCE, Invalid, is_identifier, parse, parse_rfc3339

MAX_IDENTIFIER: Final = 64
DELIMITERS: Final = (",", ";", "\t", "|")

_COLUMNS: Final = {"billnumber": "bill", "merchantid": "merchant", "reference": "reference", "notafter": "not_after"}
_NEEDLESS = re.compile(r"[\s_\-\ufeff\u200b]+")
_SEPARATOR_LINE = re.compile(r"sep=(.)\Z", re.IGNORECASE)
_DIGITS, _LETTERS = re.compile(r"\d+"), re.compile(r"[A-Za-z]+")


class Row(NamedTuple):
    """One bill to expire. ``not_after`` is RFC 3339; ``cells`` is the row as it came, for the report."""

    line: int
    bill: str
    merchant: str
    reference: str | None
    not_after: str | None
    cells: Sequence[str] = ()


class BadRow(NamedTuple):
    """A row that is no command, and why. Lines count from 1, the header included."""

    line: int
    reason: str
    cells: Sequence[str] = ()


class InputError(Exception):
    """Nothing can be read from here on. ``line`` is None where it is the input as a whole."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


class _Bad(ValueError):
    """The text says why a row is no command."""


class Form(NamedTuple):
    """How an input is laid out, for a report in the same form.

    ``places`` says which column holds what, by our names. ``mark``: it begins with a byte-order mark. ``spreadsheet``:
    it bears the signs of a program that opens its reports as well, and that takes numbers for numbers.
    """

    columns: tuple[str, ...]
    places: Mapping[str, int]
    delimiter: str = ","
    mark: bool = False
    spreadsheet: bool = False

    def cell(self, cells: Sequence[str], name: str) -> str:
        """A row's cell; empty where the row or the header has none (spreadsheets leave out trailing empty cells)."""
        place = self.places.get(name)
        return mangled.unwrapped(cells[place].strip()) if place is not None and place < len(cells) else ""


JSON_FORM: Final = Form(("input",), {})
"""Of JSON lines the report has each line as it came, in one column."""


@dataclass(frozen=True, slots=True)
class RowRules:
    """What a row must be. ``merchant`` serves where a row has none; without either, the row is bad. ``as_is``: whatever
    looks mangled is meant so."""

    merchant: str = ""
    as_is: bool = False


class InputRows:
    """The rows of an input, in their order, in constant memory; iterating raises `InputError`.

    ``form`` is known from the beginning, ``remarks`` at the end.
    """

    def __init__(self, form: Form, rows: Iterable[Row | BadRow]) -> None:
        self.form = form
        self._rows = rows
        self._columns = (mangled.Column("billnumber"), mangled.Column("merchantId"))

    def __iter__(self) -> Iterator[Row | BadRow]:
        bills, merchants = self._columns
        for row in self._rows:
            if isinstance(row, Row):
                bills.add(row.line, row.bill)
                merchants.add(row.line, row.merchant)
            yield row

    def remarks(self) -> list[str]:
        """What is odd about the columns as a whole, in sentences for people."""
        return [remark for column in self._columns for remark in column.remarks()]


def read_lines(lines: Iterable[str], rules: RowRules, *, json_lines: bool = False) -> InputRows:
    """The rows of a text. ``json_lines`` says so of the whole input; otherwise its first character decides.

    Raises `InputError`.
    """
    numbered = _Numbered(lines)
    first = numbered.first()
    if first is None:
        raise InputError("is empty: not even a header; see what should have written it")
    if json_lines or first.lstrip().startswith("{"):
        return InputRows(JSON_FORM, _json_rows(numbered, first, rules))
    form = _header(numbered, first)
    return InputRows(form, _csv_rows(form, numbered, rules))


def is_header(cells: Sequence[str]) -> bool:
    """Whether it names a column of bills."""
    return any(_COLUMNS.get(_NEEDLESS.sub("", cell).lower()) == "bill" for cell in cells)


def read_table(table: Iterable[tuple[int, Sequence[str]]], rules: RowRules) -> InputRows:
    """The rows of a spreadsheet, from (line, cells), the header first. Raises `InputError`."""
    rows = ((line, cells) for line, cells in table if any(cell.strip() for cell in cells))
    line, cells = next(rows, (0, ()))
    form = Form(tuple(cells), _places(cells, line), ";", mark=True, spreadsheet=True)
    if "bill" not in form.places:
        raise InputError(f"has no column billnumber (or billNumber) in its header: {', '.join(cells)[:120]!r}", line)
    return InputRows(form, (_row(form, cells, line, rules) for line, cells in rows))


# -- CSV ------------------------------------------------------------------------------------------------------------


class _Numbered:
    """Lines with their numbers; remembers those that the row at hand is made of."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self.number = 0
        self.held: list[str] = []
        self.marked = False

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
            if self.number == 1 and line.startswith("\ufeff"):
                self.marked = True
            text = line.lstrip("\ufeff") if self.number == 1 else line
            if text.strip():
                return text
        return None


def _csv_rows(form: Form, lines: _Numbered, rules: RowRules) -> Iterator[Row | BadRow]:
    rows = csv.reader(lines, delimiter=form.delimiter)
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
            _check_swallowed(form, cells, lines.held, start)
        if any(cell.strip() for cell in cells):
            yield _row(form, cells, start, rules)


def _row(form: Form, cells: Sequence[str], line: int, rules: RowRules) -> Row | BadRow:
    try:
        return _good_row(form, cells, line, rules)
    except _Bad as bad:
        return BadRow(line, str(bad), cells)


def _good_row(form: Form, cells: Sequence[str], line: int, rules: RowRules) -> Row:
    width = len(form.columns)
    if any(cell.strip() for cell in cells[width:]):
        raise _Bad(f"has {len(cells)} fields where the header has {width}; quote the one that holds the delimiter")
    bill = form.cell(cells, "bill")
    if not bill:
        raise _Bad("billnumber is missing")
    _check_identifier("billnumber", bill, rules)
    merchant = _merchant(form.cell(cells, "merchant") or None, rules)
    reference = form.cell(cells, "reference") or None
    if reference is not None and len(reference) > MAX_REFERENCE:
        raise _Bad(f"reference must have at most {MAX_REFERENCE} characters, and has {len(reference)}")
    not_after = form.cell(cells, "not_after") or None
    if not_after is not None:
        try:
            parse_rfc3339(not_after)
        except ValueError as error:
            raise _Bad(f"notAfter: {mangled.shown(not_after)} is {error}") from None
    return Row(line, bill, merchant, reference, not_after, cells)


def _check_identifier(name: str, value: str, rules: RowRules) -> None:
    """Raises `_Bad` for what the worker would refuse, and for what nobody meant."""
    cause = None if rules.as_is else mangled.cause(value)
    if cause is not None:
        raise _Bad(
            f"{name} {mangled.shown(value)} {cause}: this is what a spreadsheet made of it; {mangled.TEXT_COLUMN} "
            "(or send it as it is with --accept-as-is)"
        )
    if not is_identifier(value):
        raise _Bad(f"{name} must be {IDENTIFIER_RULE}; {mangled.intruder(value, MAX_IDENTIFIER)}")


def _merchant(own: str | None, rules: RowRules) -> str:
    """The row's own merchant, or the one that serves in its place."""
    if own is not None:
        _check_identifier("merchantId", own, rules)
    elif not rules.merchant:
        raise _Bad(
            "merchantId is missing; add the column, or give the merchant of all such rows with --merchant-id "
            "(or GATEWAY_MERCHANT_ID)"
        )
    return rules.merchant if own is None else own


def _header(lines: _Numbered, first: str) -> Form:
    """Of the first line; or of the second, where the first is the ``sep=;`` that spreadsheets write."""
    line = first.rstrip("\r\n")
    separator = _SEPARATOR_LINE.match(line.strip())
    if separator is not None:
        line = next(lines, "").rstrip("\r\n")
    if "\r" in line:
        raise InputError(
            "has carriage returns alone as line ends; save it with LF or CRLF (in Excel as "
            "'CSV UTF-8 (Comma delimited)', not as 'CSV (Macintosh)')",
            lines.number,
        )
    found = []
    for delimiter in [separator[1]] if separator else DELIMITERS:
        with suppress(csv.Error):
            columns = tuple(next(csv.reader([line], delimiter=delimiter), []))
            found.append(Form(columns, _places(columns, lines.number), delimiter, lines.marked))
    found = [form for form in found if "bill" in form.places]
    if not found:
        raise InputError(f"has no column billnumber (or billNumber) in its header: {line[:120]!r}", lines.number)
    return max(found, key=lambda form: len(form.columns))._replace(spreadsheet=lines.marked or separator is not None)


def _places(columns: Sequence[str], line: int) -> dict[str, int]:
    """Where the columns are that matter, by our names for them."""
    places: dict[str, int] = {}
    for place, cell in enumerate(columns):
        name = _COLUMNS.get(_NEEDLESS.sub("", cell).lower())
        if name is None:
            continue
        if name in places:
            raise InputError(f"names the column {cell.strip()} twice in its header; leave one", line)
        places[name] = place
    return places


def _check_swallowed(form: Form, cells: Sequence[str], lines: Sequence[str], start: int) -> None:
    """A quote that is not closed makes the rows after it part of one field, and their bills would be lost without a
    word. A field may have line breaks, but none of its lines may look like a row of its own."""
    bill = form.cell(cells, "bill")
    # The first line without its quotes: what an open one hides. Only it and the last one hold cells of this row.
    for offset, line in enumerate([lines[0].replace('"', ""), *lines[1:]]):
        alone = next(csv.reader([line], delimiter=form.delimiter), [])
        other = form.cell(alone, "bill")
        if other == bill and offset in (0, len(lines) - 1):
            continue
        alike = _shape(other) == _shape(bill) or (len(alone) == len(form.columns) and any(map(str.isdigit, other)))
        if alike and is_identifier(other):
            raise InputError(
                f"has a quoted field that takes in a row, up to line {start + len(lines) - 1}; close it", start
            )


def _shape(text: str) -> str:
    return _LETTERS.sub("a", _DIGITS.sub("9", text))


# -- JSON lines -----------------------------------------------------------------------------------------------------


def _json_rows(lines: _Numbered, first: str, rules: RowRules) -> Iterator[Row | BadRow]:
    for line in itertools.chain([first], lines):
        number, text = lines.number, line.strip()
        lines.held.clear()
        if text:
            try:
                yield _json_row(text, number, rules)
            except _Bad as bad:
                yield BadRow(number, str(bad), (text,))


def _json_row(line: str, number: int, rules: RowRules) -> Row:
    """A command as the queue takes it, on one line; ``merchantId`` may also be beside the bill."""
    command = parse(line.encode(), default_merchant="-")
    if isinstance(command, Invalid):
        raise _Bad(f"{command.detail}, in {mangled.shown(line)}")
    fields: dict[str, Any] = json.loads(line)
    info = fields.get("additionalInfo") or {}
    given = [value for value in (info.get("merchantId"), fields.get("merchantId")) if value is not None]
    if any(not isinstance(value, str) for value in given):
        raise _Bad(f"merchantId must be {IDENTIFIER_RULE}, as a string")
    if len(set(given)) > 1:
        raise _Bad("merchantId and additionalInfo.merchantId differ")
    _check_identifier("billnumber", command.billnumber, rules)
    merchant = _merchant(given[0] if given else None, rules)
    if command.reference is not None and any("\ud800" <= letter <= "\udfff" for letter in command.reference):
        raise _Bad("reference holds half of a surrogate pair")
    return Row(number, command.billnumber, merchant, command.reference, fields.get("notAfter"), (line,))
