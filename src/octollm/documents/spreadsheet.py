"""Workbooks: XLSX, XLS and ODS by calamine. Values are those that the file stores; no formula or macro is run."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta

import python_calamine as calamine

from octollm.documents.archive import BoundedZip
from octollm.documents.decoding import clean_text
from octollm.documents.model import (
    Document,
    DocumentError,
    DocumentKind,
    Location,
    RawCell,
    RawTable,
    ReadBudget,
    Section,
)  # fmt: skip

ROWS_OF_SECTION = 25
"""Rows of a section of text, so that a citation names a short range of cells."""
_EXACT_INTEGERS = 2.0**53


def read_workbook(name: str, data: bytes, kind: DocumentKind, budget: ReadBudget) -> Document:
    """Return each sheet as a table, and as text with ranges of cells. Raises :class:`DocumentError`."""
    formulas = _check_expansion(data, budget) if kind != "xls" else {}
    sections: list[Section] = []
    tables: list[RawTable] = []
    notes: list[str] = []
    try:
        with calamine.CalamineWorkbook.from_filelike(io.BytesIO(data)) as workbook:
            for sheet in workbook.sheets_metadata:
                if sheet.typ != calamine.SheetTypeEnum.WorkSheet:
                    continue
                told: tuple[str, ...] = ()
                if sheet.visible != calamine.SheetVisibleEnum.Visible:
                    told = (f"sheet {sheet.name} is hidden in the workbook, but read",)
                told += tuple(filter(None, (formulas.get(sheet.name, ""),)))
                notes += told
                _read_sheet(workbook.get_sheet_by_name(sheet.name), sections, tables, budget, told)
    except calamine.PasswordError as exc:
        raise DocumentError("The workbook is encrypted: it opens with a password only.", code="file_encrypted") from exc
    except calamine.CalamineError as exc:
        raise DocumentError(f"The workbook is damaged: {exc}") from exc
    return Document(name, kind, tuple(sections), tuple(tables), tuple(notes))


_SHEET_PART = re.compile(r"xl/worksheets/[^/]+\.xml")
_EMPTY_FORMULA = re.compile(
    rb"<c\b(?=[^>]*?\br=\"(?P<cell>[A-Z]+\d+)\")[^>]*>\s*<f\b[^>]*(?:/>|>[^<]*</f>)\s*(?:<v\s*/>|<v>\s*</v>)?\s*</c>"
)
"""A cell of a formula whose result the program that wrote the workbook did not store."""
_SHEET = re.compile(rb"<sheet\b[^>]*>")
_RELATION = re.compile(rb"<Relationship\b[^>]*>")


def _check_expansion(data: bytes, budget: ReadBudget) -> dict[str, str]:
    """Count the members of the workbook's archive, which calamine decompresses by itself.

    Return by sheet what is to be said of its formulas without a stored result: calamine reads them as empty cells.
    """
    found: dict[str, str] = {}
    wanted = ("xl/workbook.xml", "xl/_rels/workbook.xml.rels")
    parts: dict[str, bytes] = {}
    with BoundedZip(data, budget) as archive:
        for info in archive.members:
            if not _SHEET_PART.fullmatch(info.filename) and info.filename not in wanted:
                budget.add_expanded(info.file_size, info.compress_size)
                continue
            content = archive.read(info)
            if info.filename in wanted:
                parts[info.filename] = content
            elif b"<f" in content and (cells := [m["cell"].decode() for m in _EMPTY_FORMULA.finditer(content)]):
                what = "1 formula has" if len(cells) == 1 else f"{len(cells):,} formulas have"
                found[info.filename] = f"undecided: {what} no stored result, the first in {cells[0]}; read as empty"
    if not found or len(parts) < len(wanted):
        return {}
    targets = {_attribute(each, "Id"): _attribute(each, "Target") for each in _RELATION.findall(parts[wanted[1]])}
    return {
        _attribute(sheet, "name"): found[part]
        for sheet in _SHEET.findall(parts[wanted[0]])
        if (part := "xl/" + targets.get(_attribute(sheet, "r:id"), "").removeprefix("/xl/")) in found
    }


def _attribute(element: bytes, name: str) -> str:
    match = re.search(rb"\b" + name.encode() + rb"=\"([^\"]*)\"", element)
    return html.unescape(match[1].decode("utf-8", "replace")) if match else ""


def _read_sheet(
    sheet: calamine.CalamineSheet,
    sections: list[Section],
    tables: list[RawTable],
    budget: ReadBudget,
    notes: tuple[str, ...],
) -> None:
    if sheet.start is None:
        return
    budget.add_cells(sheet.height * sheet.width)
    rows = [[to_raw_cell(cell) for cell in row] for row in sheet.to_python(skip_empty_area=True)]
    sheet_name = clean_text(sheet.name)
    first_row, first_column = sheet.start
    last_column = first_column + max(map(len, rows), default=1) - 1

    def cell_range(start: int, end: int) -> str:
        return f"{column_name(first_column)}{first_row + start + 1}:{column_name(last_column)}{first_row + end}"

    tables.append(RawTable(sheet_name, rows, Location(sheet=sheet_name, cells=cell_range(0, len(rows))), notes))
    for start in range(0, len(rows), ROWS_OF_SECTION):
        chosen = rows[start : start + ROWS_OF_SECTION]
        text = "\n".join(format_row(row) for row in chosen)
        budget.add_characters(len(text))
        if text.strip():
            sections.append(Section(text, Location(sheet=sheet_name, cells=cell_range(start, start + len(chosen)))))


def to_raw_cell(value: object) -> RawCell:
    """Return a cell of calamine: an empty one as ``None``, a whole number as ``int``, a time or duration as text."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return clean_text(value)
    # A datetime is a date, and a bool is an int.
    if isinstance(value, bool | datetime | date):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _EXACT_INTEGERS else float(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return int(value) if value.is_integer() and abs(value) <= _EXACT_INTEGERS else value
    if isinstance(value, time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return _format_duration(value)
    return str(value)


def format_row(row: Sequence[RawCell]) -> str:
    """Return a row as a line of text, without empty cells at its end."""
    cells = ["" if cell is None else _format_cell(cell) for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return " | ".join(cells)


def _format_cell(cell: RawCell) -> str:
    if isinstance(cell, datetime):
        return cell.isoformat(sep=" ")
    if isinstance(cell, date):
        return cell.isoformat()
    return " ".join(str(cell).split())


def _format_duration(value: timedelta) -> str:
    seconds = round(value.total_seconds())
    sign, seconds = ("-", -seconds) if seconds < 0 else ("", seconds)
    return f"{sign}{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def column_name(index: int) -> str:
    """Return the letters of a column, counted from 0: ``A``, ``Z``, ``AA``."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters
