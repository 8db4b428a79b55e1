"""File kinds and media types by name and first bytes, and whether an arm accepts a file.

The result is the same on every machine: nothing is read from the system's tables.
"""

from __future__ import annotations

import functools
import mimetypes
import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from octollm.contracts.task import FileKind, FileRef

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson", ".parquet"})
"""Files with rows and columns, which the executor loads as tables."""
TEXT_SUFFIXES = frozenset(
    {".md", ".markdown", ".txt", ".rst", ".adoc", ".org", ".tex", ".html", ".htm", ".xml", ".yaml", ".yml",
     ".toml", ".ini", ".cfg", ".conf", ".env", ".log", ".py", ".pyi", ".js", ".mjs", ".ts", ".tsx", ".jsx", ".java",
     ".kt", ".go", ".rs", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".rb", ".php", ".swift", ".scala", ".lua", ".sh",
     ".bash", ".sql", ".r", ".css", ".proto", ".tf", ".diff", ".patch", ".srt", ".vtt", ".eml"}
)  # fmt: skip
"""Files to read and quote by line."""
_PLAIN_NAMES = frozenset({"readme", "license", "licence", "makefile", "dockerfile", "changelog", "notice", "authors"})
_SNIFF_BYTES = 8192
_EXTRA_MEDIA_TYPES = {
    ".sqlite": "application/vnd.sqlite3",
    ".sqlite3": "application/vnd.sqlite3",
    ".db": "application/vnd.sqlite3",
    ".parquet": "application/vnd.apache.parquet",
    ".jsonl": "application/jsonl",
    ".ndjson": "application/x-ndjson",
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
    ".toml": "application/toml",
    ".webp": "image/webp",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
}
"""Media types of IANA's registry that Python's own table lacks."""
_TEXT_TYPES = re.compile(r"^text/|[+/](?:xml|json|yaml|toml|javascript|rtf|x-(?:c?sh|tcl|tex|texinfo|troff.*))$")
DEFAULT_MEDIA_TYPE = "application/octet-stream"


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; empty when there is none."""
    return PurePosixPath(name.replace("\\", "/")).suffix.lower()


def file_kind(name: str, head: bytes | None = None) -> FileKind:
    """Return the kind of a file by its name, or by ``head``, its first bytes, where the name does not tell.

    Without ``head``, a file is binary only when its name says so.
    """
    suffix = suffix_of(name)
    if suffix in TABLE_SUFFIXES:
        return "table"
    stem = PurePosixPath(name).name.lower()
    if suffix in TEXT_SUFFIXES or stem in _PLAIN_NAMES:
        return "text"
    if head is None:
        known = _media_types().get(suffix)
        return "text" if known is None or _TEXT_TYPES.search(known) else "binary"
    return "text" if _is_text(head[:_SNIFF_BYTES]) else "binary"


def kind_of_file(file: FileRef) -> FileKind:
    """Return the kind of a task's file: by its content if that was looked at, else by its name."""
    return file.kind or file_kind(file.name)


def media_type_of(name: str) -> str:
    """Return the media type for a file's name; ``application/octet-stream`` for an unknown suffix."""
    return _media_types().get(suffix_of(name), DEFAULT_MEDIA_TYPE)


def accepts_file(accepted: Collection[str], name: str) -> bool:
    """Return whether an arm that accepts these media types, or ranges such as ``image/*``, accepts a file."""
    media_type = media_type_of(name)
    return media_type in accepted or f"{media_type.split('/')[0]}/*" in accepted


@functools.cache
def _media_types() -> Mapping[str, str]:
    return {**mimetypes.MimeTypes(()).types_map[True], **_EXTRA_MEDIA_TYPES}


def _is_text(head: bytes) -> bool:
    if b"\x00" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # The last character of the head may be incomplete.
        return error.start >= len(head) - 3
    return True
