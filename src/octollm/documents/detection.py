"""What a file is, by its content. The name decides only between kinds of text that look alike."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import PurePosixPath
from typing import Literal

from octollm.documents.decoding import SAMPLE_BYTES, decode_text
from octollm.documents.model import DocumentError, DocumentKind

DocumentUse = Literal["table", "text"]

TABLE_KINDS = frozenset[DocumentKind]({"csv", "tsv", "json", "jsonl", "parquet", "xlsx", "xls", "ods"})
"""Kinds that are rows and columns, so that questions over them are queries."""
PLAIN_KINDS = frozenset[DocumentKind]({"text", "code", "markdown", "html", "csv", "tsv", "json", "jsonl"})
"""Kinds that are text. The parsers of the others take binary formats."""

_PDF_HEADER_BYTES = 1024
"""A PDF's header may follow other bytes (ISO 32000-1, annex H.3.4.1)."""
_PARQUET = b"PAR1"
"""Magic bytes at both ends of a Parquet file."""
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_SIGNATURES = (
    (b"\x89PNG", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"), (b"GIF8", "a GIF image"),
    (b"RIFF", "audio, video or a WebP image"), (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x1f\x8b", "a gzip archive"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive"), (b"Rar!", "a RAR archive"),
    (b"BZh", "a bzip2 archive"), (b"\xfd7zXZ", "an xz archive"), (b"\x7fELF", "a program"), (b"MZ", "a program"),
    (b"ID3", "an MP3 recording"), (b"OggS", "an Ogg recording"), (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"), (b"{\\rtf", "an RTF document"),
)  # fmt: skip
_OFFICE_FOLDERS: tuple[tuple[str, DocumentKind], ...] = (("word/", "docx"), ("ppt/", "pptx"), ("xl/", "xlsx"))
_SUFFIXES: dict[str, DocumentKind] = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html", ".xhtml": "html", ".eml": "email",
    ".pdf": "pdf", ".docx": "docx", ".pptx": "pptx", ".xlsx": "xlsx", ".xlsm": "xlsx", ".xls": "xls", ".ods": "ods",
    ".zip": "zip", ".parquet": "parquet", ".txt": "text", ".log": "text", ".rst": "text",
    **dict.fromkeys(
        (".py", ".pyi", ".js", ".mjs", ".ts", ".tsx", ".jsx", ".java", ".kt", ".go", ".rs", ".c", ".h", ".cc", ".cpp",
         ".hpp", ".cs", ".rb", ".php", ".swift", ".scala", ".lua", ".sh", ".bash", ".sql", ".r", ".css", ".proto",
         ".tf", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".svg"),
        "code",
    ),
}  # fmt: skip
_HTML_START = re.compile(
    r"\s*(?:<!--.*?-->\s*|<\?xml[^>]*>\s*)*<(?:!doctype\s+html|html[\s>]|head[\s>]|body[\s>])", re.I | re.S
)
_TABLE_START = re.compile(r"\s*<(?:table|meta|div|style)\b", re.IGNORECASE)
_HEADER_LINE = re.compile(r"[!-9;-~]+:")
_EMAIL_HEADERS = frozenset({"from", "to", "date", "subject", "received", "message-id", "mime-version", "return-path"})


def kind_by_name(name: str) -> DocumentKind | None:
    """Return the kind that a file's name claims; ``None`` when it claims none."""
    return _SUFFIXES.get(PurePosixPath(name.replace("\\", "/")).suffix.lower())


def use_of(kind: DocumentKind) -> DocumentUse:
    """Say whether files of a kind are queried as tables or read as text."""
    return "table" if kind in TABLE_KINDS else "text"


def detect_kind(name: str, data: bytes) -> DocumentKind:
    """Return what a file is by its content.

    Raises :class:`DocumentError`: ``file_encrypted`` for an encrypted Office file, ``file_unreadable`` for a kind that
    is not read, saying what it is.
    """
    claimed = kind_by_name(name)
    if not data and claimed is not None and claimed not in PLAIN_KINDS and claimed != "email":
        raise DocumentError(f"The file is empty, so it is no {claimed.upper()}.")
    if data.startswith(b"%PDF-") or (
        b"%PDF-" in data[:_PDF_HEADER_BYTES] and b"startxref" in data[-_PDF_HEADER_BYTES:]
    ):
        return "pdf"
    if data.startswith(_PARQUET):
        if not data.endswith(_PARQUET):
            raise DocumentError("The file is a damaged Parquet file: its end is missing.")
        return "parquet"
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _detect_in_zip(data)
    if data.startswith(_OLE):
        return _detect_in_ole(data)
    for signature, meaning in _SIGNATURES:
        # Two letters begin a text as well.
        if data.startswith(signature) and (
            len(signature) > 2 or b"\0" in data[:64] or signature[0] > 0x7F or data[1] > 0x7F
        ):
            raise DocumentError(f"The file is {meaning}, which is not read.")
    return _detect_in_text(name, data)


def _detect_in_zip(data: bytes) -> DocumentKind:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if "mimetype" in names and archive.getinfo("mimetype").file_size < 200:
                media_type = archive.read("mimetype").decode("ascii", "replace")
                if "opendocument.spreadsheet" in media_type:
                    return "ods"
                if "opendocument" in media_type or "epub" in media_type:
                    raise DocumentError(f"The file is of the type {media_type.strip()[:80]}, which is not read.")
    except DocumentError:
        raise
    except Exception as exc:  # a damaged archive can fail in any part of the standard library
        raise DocumentError(f"The file is a damaged ZIP archive: {exc}") from exc
    if "[Content_Types].xml" in names:
        for folder, kind in _OFFICE_FOLDERS:
            if any(name.startswith(folder) for name in names):
                return kind
    return "zip"


def _detect_in_ole(data: bytes) -> DocumentKind:
    """Tell the formats in a compound file by the names of their streams ([MS-CFB] section 2.6)."""

    def has_stream(name: str) -> bool:
        return name.encode("utf-16-le") in data

    if has_stream("EncryptedPackage"):
        raise DocumentError("The file is encrypted: it opens with a password only.", code="file_encrypted")
    if has_stream("Workbook") or has_stream("Book"):
        return "xls"
    if has_stream("WordDocument"):
        raise DocumentError("The file is a Word document of 97–2003 (.doc), which is not read. Save it as .docx.")
    if has_stream("PowerPoint Document"):
        raise DocumentError("The file is a presentation of 97–2003 (.ppt), which is not read. Save it as .pptx.")
    raise DocumentError("The file is an OLE compound file, which is not read.")


def _detect_in_text(name: str, data: bytes) -> DocumentKind:
    sample = decode_text(data[:SAMPLE_BYTES]).text
    claimed = kind_by_name(name)
    if claimed in ("code", "markdown", "html"):
        return claimed
    if _HTML_START.match(sample):
        return "html"
    if claimed in ("csv", "tsv", "json", "jsonl"):
        return claimed
    if claimed == "email" or (claimed is None and _begins_with_headers(sample)):
        return "email"
    if claimed in ("xls", "xlsx", "ods"):
        # Many programs export a page or a text of tab-separated values under the name of a workbook.
        if _TABLE_START.match(sample):
            return "html"
        return "tsv" if "\t" in sample.split("\n", 1)[0] else "csv"
    start = sample.lstrip()[:1]
    if claimed is None and start in ("{", "["):
        lines = [line for line in sample.split("\n")[:3] if line.strip()]
        return (
            "jsonl" if len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines) else "json"
        )
    return "text"


def _begins_with_headers(sample: str) -> bool:
    """Say whether text begins with the header fields of an e-mail (RFC 5322 section 2.2), ended by an empty line."""
    names: set[str] = set()
    for line in sample.split("\n")[:200]:
        if not line:
            return len(names & _EMAIL_HEADERS) >= 3
        if line[0] not in " \t":
            field = _HEADER_LINE.match(line)
            if field is None:
                return False
            names.add(field[0][:-1].lower())
    return False
