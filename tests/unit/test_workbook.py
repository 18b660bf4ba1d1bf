"""Excel workbooks as a sweep's input and report: numbers, dates and texts as Excel keeps them."""

from __future__ import annotations

import datetime
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import openpyxl
import pytest

from worker.core.rows import BadRow, InputError, Row, RowRules
from worker.shells.workbook import Workbook, opened, write

HEADER = ("No", "Bill Number", "Merchant Id")


def saved(path: Path, rows: Sequence[Sequence[object]], formats: dict[str, str] | None = None) -> Path:
    book = openpyxl.Workbook()
    notes = book.active
    notes.title = "notes"
    notes.append(["Unpaid bills of yesterday"])
    sheet = book.create_sheet("bills")
    for row in rows:
        sheet.append(row)
    for place, number_format in (formats or {}).items():
        sheet[place].number_format = number_format
    book.save(path)
    return path


def read(path: Path) -> list[Row | BadRow]:
    with opened(str(path)) as source:
        return list(source.reading(RowRules()))


def test_bills_are_read_from_the_sheet_that_has_them(tmp_path: Path) -> None:
    """Texts with their zeros, numbers by their digits, the lines as Excel counts them; empty rows are none."""

    rows = [HEADER, (1, "0010092081", 121000001), (None, None, None), (2, 10092082, "M1"), (3, 92083, "M1")]

    found = read(saved(tmp_path / "bills.xlsx", rows, {"B5": "00000000"}))

    assert [(row.line, row.bill, row.merchant) for row in found if isinstance(row, Row)] == [
        (2, "0010092081", "121000001"),
        (4, "10092082", "M1"),
        (5, "00092083", "M1"),
    ]
    assert found[0].cells == ["1", "0010092081", "121000001"]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (10092085.5, "has the decimals of a number"),
        (12345678901234567890, "is a number in scientific notation, whose last digits are gone"),
        (datetime.datetime(2026, 11, 22, tzinfo=None), "is a date"),  # noqa: DTZ001  # as Excel has them
        (True, "stands for no value at all"),
        ("#N/A", "is an error of the spreadsheet"),
        ("10.092.081", "has the separators of thousands"),
        (-5, "has the sign of a number"),
    ],
)
def test_cell_that_is_no_bill_is_a_bad_row(tmp_path: Path, value: object, why: str) -> None:
    """Whatever Excel keeps of a cell, the sheet says what the cell is."""

    (bad,) = read(saved(tmp_path / "bills.xlsx", [HEADER, (1, value, "M1")]))

    assert isinstance(bad, BadRow)
    assert why in bad.reason


def test_workbook_without_bills_is_refused(tmp_path: Path) -> None:
    """With the names of its sheets."""

    with pytest.raises(InputError, match=r"no sheet whose first row has a column billnumber .*: notes, bills"):
        read(saved(tmp_path / "bills.xlsx", [("a", "b")]))


@pytest.mark.parametrize(
    ("names", "why"),
    [(["content.xml"], "OpenDocument"), (["a.csv"], "is a zip archive"), (["xl/workbook.xml"], "cannot be read")],
)
def test_other_archives_are_named(tmp_path: Path, names: list[str], why: str) -> None:
    """A zip archive may be many things."""

    path = tmp_path / "bills.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "x")

    with pytest.raises(InputError, match=why):
        read(path)


def test_damaged_archive_is_named(tmp_path: Path) -> None:
    """Half of a download is no workbook."""

    path = saved(tmp_path / "bills.xlsx", [HEADER])
    path.write_bytes(path.read_bytes()[:500])

    with pytest.raises(InputError, match="damaged"):
        read(path)


def test_small_file_that_unpacks_to_very_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fill memory and disk."""

    path = saved(tmp_path / "bills.xlsx", [HEADER, (1, "1", "M")])
    monkeypatch.setattr("worker.shells.workbook.MOST_BYTES", 100)

    with pytest.raises(InputError, match="at most 100 are read"):
        read(path)


def test_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra; the line says how to install it, or what to do without it."""

    path = saved(tmp_path / "bills.xlsx", [HEADER])
    monkeypatch.setattr("worker.shells.workbook.available", lambda: False)

    with pytest.raises(InputError, match=r"qris-expire-worker\[xlsx\].*or save it as CSV"):
        read(path)


def test_report_keeps_texts(tmp_path: Path) -> None:
    """Zeros, long digits and what looks like a formula stay what they are; numbers are numbers."""

    texts = ["0010092081", "20261122210000123", "=1+1", "-5", "a\x00b", "22/11/2026"]
    file = io.BytesIO()

    write(file, [["a", "b", "c", "d", "e", "f", "g", "h"], [*texts, 7, None]])

    file.seek(0)
    sheet = openpyxl.load_workbook(file)["report"]
    cells = list(sheet[2])
    assert [cell.value for cell in cells] == [*texts[:4], "a\ufffdb", texts[5], 7, None]
    assert {cell.data_type for cell in cells[:6]} == {"s"}
    path = tmp_path / "again.xlsx"
    path.write_bytes(file.getvalue())
    with Workbook(str(path)) as book, pytest.raises(InputError, match="no sheet"):
        book.reading(RowRules())
