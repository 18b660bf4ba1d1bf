"""A sweep's reports in a program that reads spreadsheets as Excel does, set to Indonesian."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pytest

from tests.integration.test_sweep import NOBODY, Desk

pytestmark = [pytest.mark.slow]

# Field separator, quote, UTF-8, first line, no column formats, Indonesian, quoted fields are no texts of their own,
# numbers and dates are recognised, and formulas evaluated: what Excel does with a .csv that is double-clicked.
AS_EXCEL = "CSV:{},34,76,1,,1057,false,true,false,false,false,0,true"

Opened = Callable[[str, str], list[tuple[object, ...]]]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """Opens a file in LibreOffice, and returns the cells that people see."""
    program = shutil.which("soffice")
    if program is None:
        pytest.skip("NOT TESTED: no LibreOffice; apt-get install libreoffice-calc")

    def open_(name: str, filter_: str) -> list[tuple[object, ...]]:
        out = tmp_path / "opened"
        profile = f"-env:UserInstallation=file://{tmp_path}/profile"
        how = ["--infilter=" + filter_] if filter_ else []
        subprocess.run(
            [program, profile, "--headless", *how, "--convert-to", "xlsx", "--outdir", str(out), str(tmp_path / name)],
            capture_output=True,
            timeout=240,
            check=True,
        )
        book = openpyxl.load_workbook(out / f"{Path(name).stem}.xlsx", data_only=True)
        return list(book.worksheets[0].iter_rows(values_only=True))

    return open_


@pytest.mark.parametrize("name", ["out.csv", "out.xlsx"])
def test_report_opens_in_columns_with_numbers_as_they_were(tmp_path: Path, opened: Opened, name: str) -> None:
    """Each column is one, leading zeros and long numbers are there, and nothing is computed from foreign text."""

    rows = ["1;0010092081;121000001;Jaya", "2;12345678901234567;121000001;=1+1", "3;10.092.083;121000001;-5"]
    text = "\r\n".join(["No;Bill Number;Merchant Id;Toko", *rows, ""])
    (tmp_path / "bills.csv").write_text("\ufeff" + text, newline="")
    desk = Desk(tmp_path, NOBODY, "p")
    done = desk("sweep", "bills.csv", "--dry-run", "--skip-invalid", "--report", name)
    assert done.returncode == 0, done.stderr

    header, *lines = opened(name, AS_EXCEL.format(59) if name.endswith("csv") else "")

    assert header[:6] == ("No", "Bill Number", "Merchant Id", "Toko", "line", "billnumber")
    columns = {str(title): [line[place] for line in lines] for place, title in enumerate(header)}
    assert columns["Bill Number"] == ["0010092081", "12345678901234567", "10.092.083"]
    assert columns["billnumber"][:2] == ["0010092081", "12345678901234567"]
    assert [str(cell) for cell in columns["line"]] == ["2", "3", "4"]
    assert columns["status"] == ["unsent", "unsent", "skipped"]
    assert [str(cell).lstrip("'") for cell in columns["Toko"]] == ["Jaya", "=1+1", "-5"]


def test_formulas_of_somebody_else_are_texts(tmp_path: Path, opened: Opened) -> None:
    """In a report with commas, too."""

    (tmp_path / "bills.csv").write_text('billnumber,merchantId,reference\n1,M,"=1+1"\n2,M,"@SUM(1,2)"\n3,M,"+3"\n')
    desk = Desk(tmp_path, NOBODY, "p")
    done = desk("sweep", "bills.csv", "--dry-run", "--report", "out.csv")
    assert done.returncode == 0, done.stderr

    header, *lines = opened("out.csv", AS_EXCEL.format(44))

    place = header.index("reference")
    assert [line[place] for line in lines] == ["'=1+1", "'@SUM(1,2)", "'+3"]
