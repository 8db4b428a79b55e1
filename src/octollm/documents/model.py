"""What reading a file returns: a document of sections and raw tables, or a :class:`DocumentError`."""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import Literal

import msgspec

from octollm.errors import OctoError

DocumentKind = Literal[
    "text", "code", "markdown", "html", "csv", "tsv", "json", "jsonl",
    "pdf", "docx", "pptx", "xlsx", "xls", "ods", "email", "zip", "parquet",
]  # fmt: skip
"""What a file is by its content, whatever its name says."""

RawCell = str | int | float | bool | date | datetime | None
"""A cell as the file holds it; ``None`` is an empty one. A formula counts as its stored result."""


class Location(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where in a file a section or a table stands. What does not apply is 0 or empty; numbers start at 1."""

    page: int = 0
    slide: int = 0
    sheet: str = ""
    cells: str = ""
    """The range of cells in A1 notation, for example ``A1:D20``."""
    line_start: int = 0
    line_end: int = 0
    part: str = ""
    """The part of an e-mail: ``headers``, ``body``, or the name of an attachment."""
    member: str = ""
    """The path of a member of an archive. A member of an inner archive follows the path of that archive."""

    def label(self) -> str:
        """Return the location for a reader, for example ``page 3`` or ``sheet Prices A1:D20``; empty for a whole file.

        Lines are left out, because whoever shows a location shows them beside it.
        """
        words = [self.member, f"part {self.part}" if self.part else "", f"page {self.page}" if self.page else ""]
        words += [f"slide {self.slide}" if self.slide else "", f"sheet {self.sheet}" if self.sheet else ""]
        return ", ".join(word for word in words if word) + (f" {self.cells}" if self.cells else "")


class Section(msgspec.Struct, frozen=True):
    """A piece of text that stands in one place: a page, a slide, a sheet, a member, or the whole file.

    Its lines end with LF. It has no NUL and no lone surrogate.
    """

    text: str
    location: Location = Location()


class RawTable(msgspec.Struct, frozen=True):
    """A table as the file holds it: nothing is a header yet, and no text is a number yet. Rows may differ in length."""

    name: str
    """The name of the sheet, or the caption of the table; empty when it has none."""
    rows: list[list[RawCell]]
    origin: Location = Location()
    notes: tuple[str, ...] = ()
    """What a query over the table has to state, as for a hidden sheet."""


class Document(msgspec.Struct, frozen=True):
    """A file that was read.

    ``kind`` is by content. ``notes`` are the assumptions that were made and the parts that could not be read, each a
    short sentence for the user. A file of rows in text (CSV, JSON) has its text in ``sections`` and no table yet.
    """

    name: str
    kind: DocumentKind
    sections: tuple[Section, ...] = ()
    tables: tuple[RawTable, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The whole text: the sections in order, each beginning on a new line."""
        return "\n".join(section.text for section in self.sections)


class FlatDocument(msgspec.Struct, frozen=True):
    """A document as one text. ``locations`` are the lines (from 1) where sections begin, each with its label."""

    name: str
    kind: DocumentKind
    text: str
    locations: tuple[tuple[int, str], ...] = ()
    notes: tuple[str, ...] = ()


def flatten(document: Document) -> FlatDocument:
    """Return a document as one text, with the lines where its sections begin. A section without a label has none."""
    locations: list[tuple[int, str]] = []
    line = 1
    for section in document.sections:
        label = section.location.label()
        if label or locations:
            locations.append((line, label))
        line += section.text.count("\n") + 1
    return FlatDocument(document.name, document.kind, document.text, tuple(locations), document.notes)


def decode_flat_document(text: str) -> FlatDocument:
    """Return the document of a run that reads. Raises :class:`DocumentError` for any other text."""
    try:
        return msgspec.json.decode(text.encode(), type=FlatDocument)
    except msgspec.DecodeError as exc:
        raise DocumentError("What was read of the file is damaged.") from exc


_EncodedCell = str | int | float | bool | dict[str, str] | None


class _EncodedTable(msgspec.Struct, frozen=True):
    name: str
    rows: list[list[_EncodedCell]]
    origin: Location
    notes: tuple[str, ...]


class _EncodedDocument(msgspec.Struct, frozen=True):
    name: str
    kind: DocumentKind
    sections: tuple[Section, ...]
    tables: tuple[_EncodedTable, ...]
    notes: tuple[str, ...]


def _encode_cell(cell: RawCell) -> _EncodedCell:
    if isinstance(cell, datetime):
        return {"datetime": cell.isoformat()}
    return {"date": cell.isoformat()} if isinstance(cell, date) else cell


def encode_cells(table: RawTable) -> bytes:
    """Return the rows of a table as JSON, with the number of the first one and the notes; a date is an object."""
    first = re.match("[A-Z]+([0-9]+)", table.origin.cells)
    rows = [[_encode_cell(cell) for cell in row] for row in table.rows]
    return msgspec.json.encode({"first_row": int(first[1]) if first else 1, "rows": rows, "notes": table.notes})


def encode_document(document: Document) -> bytes:
    """Return a document as JSON, in which a date is an object, so that it is told from a text."""
    tables = tuple(
        _EncodedTable(
            table.name, [[_encode_cell(cell) for cell in row] for row in table.rows], table.origin, table.notes
        )
        for table in document.tables
    )
    return msgspec.json.encode(
        _EncodedDocument(document.name, document.kind, document.sections, tables, document.notes)
    )


def decode_document(data: bytes) -> Document:
    """Return the document of :func:`encode_document`. Raises :class:`DocumentError` for any other data."""

    def decode(cell: _EncodedCell) -> RawCell:
        if not isinstance(cell, dict):
            return cell
        if "datetime" in cell:
            return datetime.fromisoformat(cell["datetime"])
        return date.fromisoformat(cell["date"])

    try:
        found = msgspec.json.decode(data, type=_EncodedDocument)
        tables = tuple(
            RawTable(table.name, [[decode(cell) for cell in row] for row in table.rows], table.origin, table.notes)
            for table in found.tables
        )
    except (msgspec.DecodeError, KeyError, ValueError) as exc:
        raise DocumentError("What was read of the file is damaged.") from exc
    return Document(found.name, found.kind, found.sections, tables, found.notes)


DocumentErrorCode = Literal["file_unreadable", "file_encrypted", "file_limit_exceeded"]


class DocumentError(OctoError):
    """A file cannot be read.

    ``code`` is ``file_unreadable`` (damaged, or no kind that is read), ``file_encrypted`` (it needs a password), or
    ``file_limit_exceeded``; ``detail`` then names the limit and its value.
    """

    def __init__(self, detail: str, *, code: DocumentErrorCode = "file_unreadable") -> None:
        super().__init__(detail, code=code)


class ReadLimits(msgspec.Struct, frozen=True):
    """Bounds of reading one file, members of archives and attachments included."""

    pages: int = 2000
    """Pages of a PDF, or slides of a presentation."""
    cells: int = 2_000_000
    """Cells of all tables together."""
    characters: int = 32_000_000
    """Characters of all sections together."""
    elements: int = 500_000
    """Elements of an HTML page."""
    members: int = 1000
    """Members of an archive, or parts of an e-mail."""
    nesting: int = 3
    """Archives and e-mails inside one another."""
    expanded_bytes: int = 256 * 1024 * 1024
    """Bytes of all members of archives after decompression, those of Office files included."""
    expansion_ratio: int = 200
    """Bytes after decompression for each byte before it, counted from the first MiB on."""


class ReadBudget:
    """Counts what is read of one file, members and attachments included, against its limits.

    Every method raises :class:`DocumentError` (``file_limit_exceeded``), naming the limit and its value.
    """

    def __init__(self, limits: ReadLimits) -> None:
        self.limits = limits
        self._pages = self._cells = self._characters = self._members = self._expanded = self._depth = 0
        self._elements = 0

    def add_pages(self, number: int) -> None:
        """Count pages or slides."""
        self._pages += number
        _check(self._pages, self.limits.pages, "pages")

    def add_cells(self, number: int) -> None:
        """Count cells of tables."""
        self._cells += number
        _check(self._cells, self.limits.cells, "cells")

    def add_characters(self, number: int) -> None:
        """Count characters of text."""
        self._characters += number
        _check(self._characters, self.limits.characters, "characters of text")

    def add_element(self) -> None:
        """Count one element of an HTML page."""
        self._elements += 1
        if self._elements > self.limits.elements:
            _check(self._elements, self.limits.elements, "elements")

    def add_members(self, number: int) -> None:
        """Count members of an archive, or parts of an e-mail."""
        self._members += number
        _check(self._members, self.limits.members, "members")

    def add_expanded(self, size: int, compressed: int) -> None:
        """Count the bytes of a member before and after decompression. Called before it is decompressed."""
        self._expanded += size
        limit = self.limits.expanded_bytes
        shown = f"{limit // _MIB} MiB" if limit >= _MIB else f"{limit} bytes"
        _check(self._expanded, limit, f"{shown} after decompression", shows_limit=False)
        if size > _MIB and size > compressed * self.limits.expansion_ratio:
            raise DocumentError(
                f"A part of the file grows more than {self.limits.expansion_ratio} times when it is decompressed.",
                code="file_limit_exceeded",
            )

    def enter(self) -> None:
        """Begin a file inside this one; :meth:`leave` ends it."""
        self._depth += 1
        _check(self._depth, self.limits.nesting, "files inside one another")

    def leave(self) -> None:
        """End a file inside this one."""
        self._depth -= 1


def _check(count: int, limit: int, what: str, *, shows_limit: bool = True) -> None:
    if count > limit:
        most = f"{limit:,} {what}" if shows_limit else what
        raise DocumentError(f"The file has more than {most}.", code="file_limit_exceeded")


_MIB = 1024 * 1024
