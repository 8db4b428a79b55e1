"""ZIP archives: reading members within bounds. Nothing is extracted to a disk."""

from __future__ import annotations

import io
import unicodedata
import zipfile
from collections.abc import Callable
from types import TracebackType

from octollm.documents.model import Document, DocumentError, Location, RawTable, ReadBudget, Section

ReadInner = Callable[[str, bytes, ReadBudget], Document]
"""Reads a file inside another one."""
_MAX_NAME = 200
_MAX_NOTES = 20
_IGNORED_MEMBERS = ("__MACOSX/", ".DS_Store", "Thumbs.db")


class BoundedZip:
    """A ZIP archive in memory whose members are counted against the bounds before they are decompressed."""

    def __init__(self, data: bytes, budget: ReadBudget) -> None:
        self._budget = budget
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except Exception as exc:  # a damaged archive can fail in any part of the standard library
            raise DocumentError(f"The file is a damaged ZIP archive: {exc}") from exc
        self.members = [info for info in self._zip.infolist() if not info.is_dir()]
        self.names = {info.filename for info in self.members}

    def __enter__(self) -> BoundedZip:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def read(self, member: str | zipfile.ZipInfo) -> bytes:
        """Return the content of a member.

        Raises :class:`DocumentError`: ``file_limit_exceeded``, ``file_encrypted``, or ``file_unreadable`` for a
        damaged one.
        """
        info = self._zip.getinfo(member) if isinstance(member, str) else member
        if info.flag_bits & 1:
            raise DocumentError("It is encrypted: it opens with a password only.", code="file_encrypted")
        # `zipfile` reads no more than the size that is counted here, and then fails by the checksum.
        self._budget.add_expanded(info.file_size, info.compress_size)
        try:
            return self._zip.read(info)
        except Exception as exc:  # as above
            raise DocumentError(f"A member of the archive is damaged: {exc}") from exc


def read_zip(name: str, data: bytes, budget: ReadBudget, read_inner: ReadInner) -> Document:
    """Return the members of an archive as one document, each section and table with the member that it stands in.

    A member that cannot be read becomes a note. Raises :class:`DocumentError` when a bound is exceeded, for a damaged
    archive, and when all members are encrypted.
    """
    sections: list[Section] = []
    tables: list[RawTable] = []
    notes: list[str] = []
    with BoundedZip(data, budget) as archive:
        budget.add_members(len(archive.members))
        encrypted = 0
        for info in archive.members:
            member = printable_name(info.filename)
            if any(part in info.filename for part in _IGNORED_MEMBERS):
                continue
            try:
                inner = read_inner(info.filename, archive.read(info), budget)
            except DocumentError as error:
                if error.code == "file_limit_exceeded":
                    raise
                encrypted += error.code == "file_encrypted"
                notes.append(f"{member} was not read: {error.detail}")
                continue
            place_inside(inner, sections, tables, notes, member=member)
        if encrypted and encrypted == len(archive.members):
            raise DocumentError("The archive is encrypted: it opens with a password only.", code="file_encrypted")
    return Document(name, "zip", tuple(sections), tuple(tables), shorten_notes(notes))


def place_inside(
    inner: Document,
    sections: list[Section],
    tables: list[RawTable],
    notes: list[str],
    *,
    member: str = "",
    part: str = "",
) -> None:
    """Add what was read of a file inside another one, with the member or the e-mail part that it stands in."""

    def place(location: Location) -> Location:
        return Location(
            page=location.page,
            slide=location.slide,
            sheet=location.sheet,
            cells=location.cells,
            line_start=location.line_start,
            line_end=location.line_end,
            part="/".join(filter(None, (part, location.part))),
            member="/".join(filter(None, (member, location.member))),
        )

    sections += [Section(section.text, place(section.location)) for section in inner.sections]
    tables += [RawTable(table.name, table.rows, place(table.origin), table.notes) for table in inner.tables]
    notes += [f"{member or part}: {note}" for note in inner.notes]


def shorten_notes(notes: list[str]) -> tuple[str, ...]:
    """Return the first notes, and how many more there are."""
    more = len(notes) - _MAX_NOTES
    return (*notes[:_MAX_NOTES], *([f"and {more} more notes"] if more > 0 else []))


def printable_name(name: str) -> str:
    """Return a name from inside a file with U+FFFD for what does not print: controls, also those of direction."""
    shown = name[:_MAX_NAME]
    return "".join("\ufffd" if unicodedata.category(char)[0] == "C" else char for char in shown)
