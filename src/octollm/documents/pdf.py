"""The text of a PDF, page by page, by PDFium. Images are not read: a page of a scan has no text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pypdfium2
import pypdfium2.raw as pdfium

from octollm.documents.decoding import clean_text
from octollm.documents.model import Document, DocumentError, Location, ReadBudget, Section

_HYPHEN = re.compile("[\ufffe\x02]\n?")
"""PDFium's mark for a hyphen that only divides a word between lines."""
_MAX_FORM_DEPTH = 3


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
            text = _HYPHEN.sub("", clean_text(text_page.get_text_bounded()))
        finally:
            text_page.close()
        if text.strip():
            return text, False
        found = page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE], max_depth=_MAX_FORM_DEPTH)
        return "", next(iter(found), None) is not None
    finally:
        page.close()


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
