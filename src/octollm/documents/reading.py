"""The document reader reads untrusted files: the kind by content, then the reader of that kind, within one budget."""

from __future__ import annotations

from importlib import import_module

from octollm.documents.archive import read_zip
from octollm.documents.decoding import decode_text
from octollm.documents.detection import PLAIN_KINDS, detect_kind, kind_by_name
from octollm.documents.html import read_html
from octollm.documents.mail import read_email
from octollm.documents.model import Document, DocumentError, DocumentKind, ReadBudget, ReadLimits, Section

_CONTAINERS = ("zip", "email")


def read_document(name: str, data: bytes, limits: ReadLimits | None = None) -> Document:
    """Read a file of any kind. The parsers of binary formats run in this process: call it inside a sandbox.

    Raises :class:`DocumentError`, and nothing else, whatever the bytes are; but a parser may use up memory or time,
    which only a process around it bounds.
    """
    return _read(name, data, ReadBudget(limits or ReadLimits()))


def read_plain(name: str, data: bytes, limits: ReadLimits | None = None) -> Document:
    """Read a file whose kind is one of :data:`PLAIN_KINDS`: text in any encoding, source code, or HTML.

    It is safe in any process. Raises :class:`DocumentError`, also for other kinds.
    """
    kind = detect_kind(name, data)
    if kind not in PLAIN_KINDS:
        raise DocumentError(f"The file is of the kind {kind}, which is read in the sandbox only.")
    return _read_kind(name, data, kind, ReadBudget(limits or ReadLimits()))


def _read(name: str, data: bytes, budget: ReadBudget) -> Document:
    return _read_kind(name, data, detect_kind(name, data), budget)


def _read_inner(name: str, data: bytes, budget: ReadBudget) -> Document:
    budget.enter()
    try:
        return _read(name, data, budget)
    finally:
        budget.leave()


def _read_kind(name: str, data: bytes, kind: DocumentKind, budget: ReadBudget) -> Document:
    try:
        document = _dispatch(name, data, kind, budget)
    except DocumentError:
        raise
    except (RecursionError, MemoryError) as exc:
        raise DocumentError(
            "The file is nested too deeply, or needs more memory than reading may use.", code="file_limit_exceeded"
        ) from exc
    except Exception as exc:  # a library met bytes that its authors did not think of
        raise DocumentError(f"The file is damaged: reading it as {kind} failed ({type(exc).__name__}).") from exc
    notes = [*name_notes(name, kind), *document.notes]
    if not data:
        notes.append("the file is empty")
    return Document(name, document.kind, document.sections, document.tables, tuple(notes))


def _dispatch(name: str, data: bytes, kind: DocumentKind, budget: ReadBudget) -> Document:
    if kind == "html":
        document = read_html(name, data, budget)
        budget.add_characters(sum(len(section.text) for section in document.sections))
        return document
    if kind in PLAIN_KINDS:
        decoded = decode_text(data)
        budget.add_characters(len(decoded.text))
        return Document(name, kind, (Section(decoded.text),) if decoded.text else (), (), decoded.notes)
    if kind == "zip":
        return read_zip(name, data, budget, _read_inner)
    if kind == "email":
        return read_email(name, data, budget, _read_inner)
    if kind == "parquet":
        return Document(name, kind)
    # Imported when such a file is read: most processes never load these libraries.
    if kind == "pdf":
        return import_module("octollm.documents.pdf").read_pdf(name, data, budget)
    if kind == "docx":
        return import_module("octollm.documents.office").read_docx(name, data, budget)
    if kind == "pptx":
        return import_module("octollm.documents.office").read_pptx(name, data, budget)
    return import_module("octollm.documents.spreadsheet").read_workbook(name, data, kind, budget)


def name_notes(name: str, kind: DocumentKind) -> tuple[str, ...]:
    """Return a note when the content is not what the name says."""
    claimed = kind_by_name(name)
    if claimed is None or claimed == kind or (claimed in PLAIN_KINDS and kind in PLAIN_KINDS):
        return ()
    return (f"named as {claimed.upper()}, read as {kind.upper()} by its content",)
