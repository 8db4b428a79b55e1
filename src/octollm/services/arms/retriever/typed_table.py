"""Tables of cited cells: columns get types from their values, and the table is written as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

import msgspec

from octollm import Citation
from octollm.documents.dates import MONTH_NUMBERS, DateColumn, read_date_column
from octollm.documents.numbers import DecimalMark, NumberColumn, Shape, read_number_column

ColumnType = Literal["text", "integer", "number", "date"]
TypedValue = str | int | float | None
_DIGIT = re.compile(r"\d")
_DATE_NAME = re.compile(r"dat[eu]|\btag\b|jour|fecha|\bdata\b|deadline|frist|fällig|due", re.IGNORECASE)
_IDENTIFIER_NAME = re.compile(
    r"phone|telefon|\btel\b|fax|\biban\b|\bzip\b|postal|postleitzahl|\bplz\b|number|nummer|\bno\.?$|\bid\b|\bcode\b|account|konto",
    re.IGNORECASE,
)
"""Fields whose digits are no amount."""
_FORMULA = ("=", "+", "@", "\t", "\r")


@dataclass(frozen=True, slots=True)
class Cell:
    """A value as the document has it, with its lines; empty where the document has none."""

    text: str = ""
    citation: Citation | None = None


@dataclass(frozen=True, slots=True)
class TypedColumn:
    """A column with its values. ``unit`` is what stands beside its numbers, such as a currency."""

    name: str
    type: ColumnType
    values: tuple[TypedValue, ...]
    unit: str = ""


def type_column(name: str, texts: Sequence[str]) -> tuple[TypedColumn, str]:
    """Return a column with typed values, and a note if a choice was left open; the values stay text then.

    The whole column decides, as in tables: ``1.234`` and ``03/04/2024`` are read only if the other values settle them.
    """
    filled = [text for text in texts if text]
    plain = TypedColumn(name, "text", tuple(text or None for text in texts))
    if not filled:
        return plain, ""
    shapes = [Shape(_DIGIT.sub("9", text), 1, text, text) for text in filled]
    dates = read_date_column(shapes, is_named_date=bool(_DATE_NAME.search(name)))
    if dates is not None and not dates.has_time and not any(shape.year_digits == 2 for shape in dates.shapes):
        return _type_dates(plain, texts, dates)
    numbers = read_number_column(shapes)
    if isinstance(numbers, str) or len(numbers.units) > 1 or _IDENTIFIER_NAME.search(name):
        return plain, ""
    # A day and a month without a year is no amount.
    if any(unit.lower().rstrip(".") in MONTH_NUMBERS for unit in numbers.units):
        return plain, ""
    mark = numbers.evidence or (numbers.likely_mark if numbers.is_ambiguous else ".")
    if mark is None:
        return plain, f"{name}: {numbers.example()} has two readings, so the values stay text"
    values = tuple(_read_number(text, numbers, mark) for text in texts)
    kind: ColumnType = "integer" if numbers.is_integer(mark) else "number"
    return TypedColumn(name, kind, values, next(iter(numbers.units), "")), ""


def _read_number(text: str, numbers: NumberColumn, mark: DecimalMark) -> TypedValue:
    if not text:
        return None
    for unit in numbers.units:
        text = text.replace(unit, " ")
    negative = bool(re.search(r"[-−–(]|[Dd][Rr]\.?$", re.sub(r"[.,][-−–—]+", "", text)))
    digits = re.sub(rf"[^\d{re.escape(mark)}]", "", re.sub(r"[.,][-−–—]+", "", text)).replace(mark, ".")
    number = float(digits) if not numbers.is_integer(mark) else int(digits or 0)
    return -number if negative else number


def _type_dates(plain: TypedColumn, texts: Sequence[str], dates: DateColumn) -> tuple[TypedColumn, str]:
    numeric = [[int(part) for part in re.findall(r"\d+", text)[:2]] for text in texts if text]
    greatest = [max((parts[at] for parts in numeric if len(parts) == 2), default=0) for at in (0, 1)]
    orders = dates.narrowed(greatest) if dates.is_ambiguous else dates.orders
    if dates.is_ambiguous and len(orders) > 1:
        example = next(text for text in texts if text)
        return plain, f"{plain.name}: {example} has two readings, so the values stay text"
    read = tuple(_read_date(text, "mdy" if "dmy" not in orders and "mdy" in orders else "dmy") for text in texts)
    if any(text and value is None for text, value in zip(texts, read, strict=True)):
        return plain, ""
    return TypedColumn(plain.name, "date", read), ""


def _read_date(text: str, order: Literal["dmy", "mdy"]) -> str | None:
    """Return a date as ISO 8601; ``None`` for a text that is none."""
    numbers = [int(part) for part in re.findall(r"\d+", text)]
    names = [MONTH_NUMBERS[word] for word in re.findall(r"[^\W\d_]+", text.lower()) if word in MONTH_NUMBERS]
    try:
        if names and len(numbers) == 2:
            day, year = sorted(numbers)
            return date(year, names[0], day).isoformat()
        if len(numbers) != 3:
            return None
        if numbers[0] > 31:
            return date(*numbers).isoformat()
        first, second, year = numbers
        return (date(year, second, first) if order == "dmy" else date(year, first, second)).isoformat()
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class CitedTable:
    """Rows of cells; ``files`` has the document of each row."""

    fields: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    files: tuple[str, ...]

    @property
    def citations(self) -> list[Citation]:
        """The lines of all cells, in order."""
        return [cell.citation for row in self.rows for cell in row if cell.citation is not None]

    def typed(self) -> tuple[list[TypedColumn], list[str]]:
        """Return the typed columns, and notes on what was left open."""
        found = [type_column(field, [row[at].text for row in self.rows]) for at, field in enumerate(self.fields)]
        return [column for column, _ in found], [note for _, note in found if note]

    def render(self) -> str:
        """Return the table for a reader: each cell as the document has it, with its lines."""
        if len(self.rows) == 1:
            return "\n".join(
                f"{field}: {_render_cell(cell)}" for field, cell in zip(self.fields, self.rows[0], strict=True)
            )
        several = len(set(self.files)) > 1
        header = [*(["file"] if several else []), *self.fields]
        lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        for file, row in zip(self.files, self.rows, strict=True):
            cells = [*([_escape(file)] if several else []), *map(_render_cell, row)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def to_csv(self, columns: Sequence[TypedColumn]) -> str:
        """Return the table as CSV (RFC 4180), with typed values. A text that a spreadsheet would run is quoted."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(["file", *self.fields])
        for at, file in enumerate(self.files):
            writer.writerow([_safe(file), *(_safe(column.values[at]) for column in columns)])
        return out.getvalue()

    def to_json(self, columns: Sequence[TypedColumn]) -> str:
        """Return the table as JSON: its columns with their types, and each row with its file and its sources."""
        rows = [
            {
                "file": file,
                "values": {column.name: column.values[at] for column in columns},
                "sources": {
                    field: cell.citation.reference
                    for field, cell in zip(self.fields, row, strict=True)
                    if cell.citation is not None
                },
            }
            for at, (file, row) in enumerate(zip(self.files, self.rows, strict=True))
        ]
        described = [
            {"name": column.name, "type": column.type, **({"unit": column.unit} if column.unit else {})}
            for column in columns
        ]
        encoded = msgspec.json.encode({"columns": described, "rows": rows})
        return msgspec.json.format(encoded).decode() + "\n"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _render_cell(cell: Cell) -> str:
    if cell.citation is None or not cell.text:
        return ""
    return f"{_escape(cell.text)} {cell.citation.reference}"


def _safe(value: TypedValue) -> TypedValue:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
