"""Excel workbooks (.xlsx): a sweep's input, and its report with numbers that stay text. The one door to openpyxl."""

from __future__ import annotations

import datetime
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from typing import IO, Any, Final, cast

from worker.core.mangled import LONGEST_NUMBER
from worker.core.rows import InputError, InputRows, RowRules, is_header, read_table
from worker.shells.source import STDIN, Source

SUFFIX: Final = ".xlsx"
MAGIC: Final = b"PK\x03\x04"
MISSING: Final = (
    "is an Excel workbook (.xlsx); install what reads them, `pip install 'qris-expire-worker[xlsx]'`, or save it as CSV"
)
MOST_ROWS: Final = 1_048_576
"""Rows of a sheet."""
MOST_BYTES: Final = 1 << 30
"""Of what a workbook unpacks to: a small file that unpacks to more is no list of bills."""

_ZEROS: Final = re.compile(r"0+\Z")


def opened(name: str) -> Source:
    """The input of that name: a text or a workbook, by its first bytes. Raises `InputError`."""
    source = Source(name)
    if not source.starts_with(MAGIC):
        return source
    source.close()
    return Workbook(name)


class Workbook(Source):
    """Rows of a sheet instead of lines. Raises `InputError` when it cannot be read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.size = None  # how far it is read is not known
        try:
            if name == STDIN:
                self._file = _seekable(self._file)
            while chunk := self._file.read(1 << 16):
                self._digest.update(chunk)
            self._file.seek(0)
            self._book = _opened(self._file)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._book.close()
        self.close()

    def reading(self, rules: RowRules) -> InputRows:
        """The rows of the first sheet that has a column billnumber. Raises `InputError`."""
        for sheet in self._book.worksheets:
            sheet.reset_dimensions()  # some programs write wrong ones
            first = next((cells for _, cells in _rows(sheet) if any(cells)), [])
            if is_header(first):
                return read_table(_rows(sheet), rules)
        names = ", ".join(self._book.sheetnames)[:120]
        raise InputError(f"has no sheet whose first row has a column billnumber (or billNumber): {names}")


def write(file: IO[bytes], rows: Iterable[Sequence[object]]) -> None:
    """A workbook of one sheet. Texts are text, whatever they look like: no zero is lost, and nothing is a formula."""
    import openpyxl
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("report")
    sheet.freeze_panes = "A2"

    def cell(value: object) -> object:
        if not isinstance(value, str) or value == "":
            return None if value == "" else value
        made = WriteOnlyCell(sheet, value=None)
        made.value = ILLEGAL_CHARACTERS_RE.sub("\ufffd", value)[:32_767]
        made.data_type = "s"
        made.number_format = "@"
        return made

    for row in rows:
        sheet.append([cell(value) for value in row])
    book.save(file)


def available() -> bool:
    """Whether openpyxl is installed: it is an extra."""
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        return False
    return True


def _seekable(stream: IO[bytes]) -> BufferedReader:
    file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by the workbook
    shutil.copyfileobj(stream, file)
    file.seek(0)
    return cast("BufferedReader", file)


def _opened(file: IO[bytes]) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            names = {each.filename for each in archive.infolist()}
            unpacked = sum(each.file_size for each in archive.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"is a damaged zip archive ({error}); save it again as CSV UTF-8 or .xlsx") from None
    if "xl/workbook.xml" not in names:
        kind = "an OpenDocument spreadsheet (.ods)" if "content.xml" in names else "a zip archive"
        raise InputError(f"is {kind}; save the table as CSV UTF-8 or .xlsx")
    if unpacked > MOST_BYTES:
        raise InputError(f"unpacks to {unpacked:,} bytes, at most {MOST_BYTES:,} are read; save it as CSV UTF-8")
    if not available():
        raise InputError(MISSING)
    import openpyxl

    try:
        return openpyxl.load_workbook(file, read_only=True, data_only=True)
    except Exception as error:  # noqa: BLE001  # whatever a damaged file makes it raise
        raise InputError(f"is a workbook that cannot be read ({error}); save it as CSV UTF-8") from None


def _rows(sheet: Any) -> Iterator[tuple[int, list[str]]]:
    for number, cells in enumerate(sheet.iter_rows(), 1):
        yield number, [_text(cell) for cell in cells]


def _text(cell: Any) -> str:
    """A cell as people see it. A number that lost digits in the workbook is written so that it is seen."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        if abs(value) >= 10**LONGEST_NUMBER:
            return f"{value:.{LONGEST_NUMBER - 1}E}"
        zeros = cell.number_format if _ZEROS.match(cell.number_format or "") else ""
        return str(value).zfill(len(zeros))
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return str(value).removesuffix(" 00:00:00")
    return str(value)
