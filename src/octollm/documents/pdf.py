"""The text of a PDF, page by page, by PDFium. Images are not read: a page of a scan has no text.

A PDF has pieces of text at places, and no tables. PDFium returns the pieces in the order in which they were written,
which for a table may be column by column. Tables are found by their places, and read row by row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pypdfium2
import pypdfium2.raw as pdfium

from octollm.documents.decoding import clean_text
from octollm.documents.model import Document, DocumentError, Location, ReadBudget, Section

_HYPHEN = re.compile("[\ufffe\x02]\n?")
"""PDFium's mark for a hyphen that only divides a word between lines."""
_MAX_FORM_DEPTH = 3
MAX_PIECES = 4000
"""Pieces of text of a page in which tables are looked for."""
_MIN_TABLE_ROWS = 3
_MIN_GAP = 1.2
"""The gap between two cells, as a multiple of the height of their text. Spaces of justified text are narrower."""
_MIN_VALUES = 0.6
"""Share of numbers in a column that tells a table from running text in columns."""
_VALUE = re.compile(r"\W{0,3}\d[\d.,'’/: \u00a0-]*\)?\s?(?:[^\W\d]{1,4}\.?|[%‰€$£¥])?")
_MAX_VALUE = 24


def read_pdf(name: str, data: bytes, budget: ReadBudget) -> Document:
    """Return the text of each page. Raises :class:`DocumentError`."""
    try:
        with pypdfium2.PdfDocument(data) as pdf:
            return _read_pages(name, pdf, budget)
    except pypdfium2.PdfiumError as exc:
        if getattr(exc, "err_code", None) == pdfium.FPDF_ERR_PASSWORD:
            raise DocumentError("The PDF is encrypted: it opens with a password only.", code="file_encrypted") from exc
        raise DocumentError(f"The PDF is damaged: {exc}") from exc


def _read_pages(name: str, pdf: pypdfium2.PdfDocument, budget: ReadBudget) -> Document:
    budget.add_pages(len(pdf))
    sections: list[Section] = []
    images: list[int] = []
    damaged: list[int] = []
    for number in range(1, len(pdf) + 1):
        try:
            text, has_image = _read_page(pdf, number - 1)
        except pypdfium2.PdfiumError:
            damaged.append(number)
            continue
        budget.add_characters(len(text))
        if text.strip():
            sections.append(Section(text, Location(page=number)))
        elif has_image:
            images.append(number)
    notes: list[str] = []
    if images:
        notes.append(f"{format_numbers('page', images)} not readable: only an image, as of a scan")
    if damaged:
        notes.append(f"{format_numbers('page', damaged)} not readable: damaged")
    return Document(name, "pdf", tuple(sections), (), tuple(notes))


def _read_page(pdf: pypdfium2.PdfDocument, index: int) -> tuple[str, bool]:
    page: Any = pdf[index]  # the library's types have gaps
    try:
        text_page = page.get_textpage()
        try:
            text = _HYPHEN.sub("", clean_text(_read_text(text_page, has_upright_text=page.get_rotation() == 0)))
        finally:
            text_page.close()
        if text.strip():
            return text, False
        found = page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE], max_depth=_MAX_FORM_DEPTH)
        return "", next(iter(found), None) is not None
    finally:
        page.close()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of text, or a cell, with its place in points from the left and the bottom of the page."""

    left: float
    bottom: float
    right: float
    top: float
    text: str


def _read_text(text_page: Any, *, has_upright_text: bool) -> str:
    """Return the text of a page in PDFium's order, but its tables row by row with ``|`` between cells."""
    count = text_page.count_rects()
    if not has_upright_text or not 2 * _MIN_TABLE_ROWS <= count <= MAX_PIECES:
        return text_page.get_text_bounded()
    places = [
        _Piece(left, bottom, right, top, "") for left, bottom, right, top in map(text_page.get_rect, range(count))
    ]
    # The text of each piece costs more than its place, so a page without cells beside each other is done here.
    if sum(len(_join_pieces(line)) > 1 for line in _group_lines(places)) < _MIN_TABLE_ROWS:
        return text_page.get_text_bounded()
    pieces = [replace(p, text=text_page.get_text_bounded(p.left, p.bottom, p.right, p.top).strip()) for p in places]
    lines = [_join_pieces(line) for line in _group_lines([piece for piece in pieces if piece.text])]
    parts: list[str] = []
    left, right = min(piece.left for piece in pieces) - 1, max(piece.right for piece in pieces) + 1
    top = max(piece.top for piece in pieces) + 1
    for rows in _find_tables(lines):
        highest = max(cell.top for cell in rows[0])
        parts.append(text_page.get_text_bounded(left, highest, right, top))
        parts.append("\n".join(_format_rows(rows)))
        top = min(cell.bottom for cell in rows[-1])
    if not parts:
        return text_page.get_text_bounded()
    parts.append(text_page.get_text_bounded(left, min(piece.bottom for piece in pieces) - 1, right, top))
    return "\n".join(part.strip("\r\n") for part in parts if part.strip())


def _group_lines(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Yield the pieces of each line from the top of the page on, from left to right."""
    line: list[_Piece] = []
    for piece in sorted(pieces, key=lambda each: -(each.top + each.bottom)):
        middle = (piece.top + piece.bottom) / 2
        if line and not line[0].bottom <= middle <= line[0].top:
            yield sorted(line, key=lambda each: each.left)
            line = []
        line.append(piece)
    if line:
        yield sorted(line, key=lambda each: each.left)


def _join_pieces(line: Sequence[_Piece]) -> list[_Piece]:
    """Return the cells of a line: pieces with a narrow gap between them are one."""
    cells = [line[0]]
    for piece in line[1:]:
        last = cells[-1]
        gap, height = piece.left - last.right, max(last.top - last.bottom, piece.top - piece.bottom)
        if gap > _MIN_GAP * height:
            cells.append(piece)
            continue
        between = " " if gap > 0.1 * height else ""
        cells[-1] = _Piece(
            last.left,
            min(last.bottom, piece.bottom),
            max(last.right, piece.right),
            max(last.top, piece.top),
            last.text + between + piece.text,
        )
    return cells


def _find_tables(lines: Sequence[list[_Piece]]) -> Iterator[list[list[_Piece]]]:
    """Yield the lines of each table: at least three with cells in the same columns, one of which holds numbers."""
    block: list[list[_Piece]] = []
    for line in [*lines, []]:
        if len(line) > 1:
            block.append(line)
            continue
        if len(block) >= _MIN_TABLE_ROWS and _is_table(block):
            yield block
        block = []


def _is_table(rows: Sequence[list[_Piece]]) -> bool:
    columns = _find_columns(rows)
    if len(columns) < 2:
        return False
    for left, right in columns:
        cells = [cell.text for row in rows for cell in row if left <= cell.left <= right]
        values = sum(len(text) <= _MAX_VALUE and _VALUE.fullmatch(text) is not None for text in cells)
        if values >= 2 and values >= _MIN_VALUES * len(cells):
            return True
    return False


def _find_columns(rows: Sequence[list[_Piece]]) -> list[tuple[float, float]]:
    """Return the columns from left to right; cells that overlap are in one."""
    columns: list[tuple[float, float]] = []
    for cell in sorted((cell for row in rows for cell in row), key=lambda each: each.left):
        if columns and cell.left <= columns[-1][1]:
            columns[-1] = (columns[-1][0], max(columns[-1][1], cell.right))
        else:
            columns.append((cell.left, cell.right))
    return columns


def _format_rows(rows: Sequence[list[_Piece]]) -> list[str]:
    columns = _find_columns(rows)
    return [
        " | ".join(" ".join(cell.text for cell in row if left <= cell.left <= right) for left, right in columns).rstrip(
            " |"
        )
        for row in rows
    ]


def format_numbers(noun: str, numbers: Sequence[int]) -> str:
    """Return numbers in ascending order with ranges and a verb, for example ``pages 2, 4–6 are``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in ranges[:20])
    more = ", …" if len(ranges) > 20 else ""
    return f"{noun} {shown} is" if len(numbers) == 1 else f"{noun}s {shown}{more} are"
