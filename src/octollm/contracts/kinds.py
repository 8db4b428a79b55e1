"""What kind of work a file is for, told by its name and its first bytes."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal

FileKind = Literal["table", "text", "binary"]

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson", ".parquet"})
"""Files with rows and columns, which the executor reads as tables."""
TEXT_SUFFIXES = frozenset(
    {".md", ".markdown", ".txt", ".rst", ".adoc", ".org", ".tex", ".html", ".htm", ".xml", ".yaml", ".yml",
     ".toml", ".ini", ".cfg", ".conf", ".env", ".log", ".py", ".pyi", ".js", ".mjs", ".ts", ".tsx", ".jsx", ".java",
     ".kt", ".go", ".rs", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".rb", ".php", ".swift", ".scala", ".lua", ".sh",
     ".bash", ".sql", ".r", ".css", ".proto", ".tf", ".diff", ".patch", ".srt", ".vtt", ".eml"}
)  # fmt: skip
"""Files to read and quote by line."""
_PLAIN_NAMES = frozenset({"readme", "license", "licence", "makefile", "dockerfile", "changelog", "notice", "authors"})
_SNIFF_BYTES = 8192


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; empty when there is none."""
    return PurePosixPath(name.replace("\\", "/")).suffix.lower()


def file_kind(name: str, head: bytes | None = None) -> FileKind:
    """Return the kind of a file. ``head`` is its beginning, asked only where the name does not tell."""
    suffix = suffix_of(name)
    if suffix in TABLE_SUFFIXES:
        return "table"
    stem = PurePosixPath(name).name.lower()
    if suffix in TEXT_SUFFIXES or stem in _PLAIN_NAMES:
        return "text"
    if head is None:
        return "text" if not suffix else "binary"
    return "text" if _is_text(head[:_SNIFF_BYTES]) else "binary"


def _is_text(head: bytes) -> bool:
    if b"\x00" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # A character may be cut at the end of what was read.
        return error.start >= len(head) - 3
    return True
