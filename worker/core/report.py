"""A batch's report: a line for each row of the input, in a form that spreadsheets leave as it is."""

from __future__ import annotations

import json
from typing import Any, Final, Protocol

from worker.core import mangled
from worker.core.sweep import Facts, batch_command_id

REPORT_COLUMNS: Final = (
    "line",
    "billnumber",
    "merchantId",
    "reference",
    "commandId",
    "status",
    "reason",
    "responseCode",
    "responseMessage",
    "detail",
    "attempts",
    "effectUnknown",
    "externalIds",
    "completedAt",
)
_SENT: Final = {"bill": "billnumber", "merchant": "merchantId", "reference": "reference"}
"""Columns of the input that are ours as well when they have these very names: they show what was sent."""


class ReportRow(Protocol):
    """A row of the input with what the journal knows of its bill."""

    def __getitem__(self, column: str, /) -> Any: ...


class BatchReport:
    """The lines of a batch's report, one for each row of the input: its columns as they came, then ours."""

    def __init__(self, facts: Facts) -> None:
        form = facts.form
        self._facts = facts
        self._width = len(form.columns)
        self._shared = {
            name: form.places[ours]
            for ours, name in _SENT.items()
            if name in form.columns and ours in form.places and form.columns[form.places[ours]] == name
        }
        self._own = [column for column in REPORT_COLUMNS if column not in self._shared]

    def header(self) -> list[str]:
        """The names of the columns. One of the input that has the name of one of ours gets another name."""
        columns = [f"{name} (input)" if name in self._own else name for name in self._facts.form.columns]
        return [*columns, *self._own]

    def line(self, row: ReportRow) -> list[object]:
        """A row of the input."""
        cells: list[object] = list(json.loads(row["cells"]))
        cells += [""] * (self._width - len(cells))
        if len(cells) > self._width:  # an invalid row; nothing of it gets lost
            cells[self._width - 1 :] = [self._facts.form.delimiter.join(map(str, cells[self._width - 1 :]))]
        ours = self._skipped(row) or self._sent(row)
        if row["why"] is None:
            for name, place in self._shared.items():
                cells[place] = ours[name] or ""
        return cells + [ours.get(column) for column in self._own]

    def _skipped(self, row: ReportRow) -> dict[str, Any] | None:
        if row["why"] is not None:
            return {"line": row["line"], "status": "skipped", "reason": "invalid", "detail": row["why"]}
        if row["first"] == row["line"]:
            return None
        stands = f"the same bill of the same merchant as line {row['first']}, which stands for it"
        return {**self._identity(row), "status": "skipped", "reason": "duplicate", "detail": stands}

    def _identity(self, row: ReportRow) -> dict[str, Any]:
        return {
            "line": row["line"],
            "billnumber": row["bill"],
            "merchantId": row["merchant"],
            "reference": row["reference"],
            "commandId": batch_command_id(self._facts.batch.id, row["bill"], row["merchant"]),
        }

    def _sent(self, row: ReportRow) -> dict[str, Any]:
        return {
            **self._identity(row),
            "status": row["status"] or ("waiting" if row["number"] <= self._facts.published else "unsent"),
            "reason": row["reason"],
            "responseCode": row["response_code"],
            "responseMessage": row["response_message"],
            "detail": row["detail"],
            "attempts": row["attempts"],
            "effectUnknown": None if row["status"] is None else "true" if row["effect_unknown"] else "false",
            "externalIds": row["external_ids"],
            "completedAt": row["completed_at"] if row["status"] else None,
        }


_FORMULA: Final = tuple("=+-@\t\r\n＝＋－＠")
_NUMBER_LENGTH: Final = 11  # digits from which on a spreadsheet shows a number as 1,23E+11


def harmless(cell: object) -> object:
    """A cell that no spreadsheet takes for a formula: text may come from a gateway, or from anybody."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def kept_as_text(cell: object) -> object:
    """A cell of a CSV file whose digits a spreadsheet keeps: those that it would take for a number or a date."""
    if not isinstance(cell, str) or mangled.unwrapped(cell) != cell:
        return cell
    if not cell.isascii() or '"' in cell or cell.startswith(_FORMULA):
        return harmless(cell)
    if cell.isdigit():
        changed = len(cell) > _NUMBER_LENGTH or (cell.startswith("0") and cell != "0")
    else:
        changed = any(map(str.isdigit, cell)) and " " not in cell and mangled.cause(cell) is not None
    return f'="{cell}"' if changed else harmless(cell)
