"""Chunking: a text split into passages with line numbers, the same for whoever stores and whoever cites."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

MAX_PASSAGE_CHARS = 700
"""Characters of a passage: three or four of them fit a small model's prompt."""
_HEADING = re.compile(r"^(#{1,6}\s+\S|={3,}\s*$|-{3,}\s*$)")
_FENCE = re.compile(r"^\s*(```|~~~)")


@dataclass(frozen=True, slots=True)
class LineSpan:
    """A run of lines: 1-based, both included. ``text`` has them joined by newlines.

    A line longer than a passage is cut into several ``LineSpan`` of the same number.
    """

    line_start: int
    line_end: int
    text: str


def split_passages(text: str, max_chars: int = MAX_PASSAGE_CHARS) -> list[LineSpan]:
    """Split ``text`` into passages of at most ``max_chars`` characters, in order, blank ones left out.

    A Markdown heading begins a passage; paragraphs are packed together while they fit; one that does not
    fit is cut between lines, and a longer line between words.
    """
    if max_chars < 1:
        raise ValueError("max_chars must be at least 1")
    passages: list[LineSpan] = []
    pending: list[LineSpan] = []
    for block in _blocks(text):
        joined = _join([*pending, block])
        opens_section = bool(_HEADING.match(block.text)) and not _only_headings(pending)
        if pending and (opens_section or len(joined.text) > max_chars):
            passages.append(_join(pending))
            pending = []
            joined = block
        if len(joined.text) <= max_chars:
            pending.append(block)
            continue
        *whole, last = _cut(block, max_chars)
        passages.extend(whole)
        pending = [last]
    if pending:
        passages.append(_join(pending))
    return passages


def numbered_lines(text: str) -> list[str]:
    """Return the lines of ``text`` as citations count them: LF and CRLF end a line, nothing else does."""
    return text.replace("\r\n", "\n").split("\n")


def _blocks(text: str) -> Iterator[LineSpan]:
    """Paragraphs: lines between blank lines. A fenced block is one; a heading begins one."""
    start, held, fenced = 0, list[str](), False
    for number, line in enumerate(numbered_lines(text), start=1):
        fence = bool(_FENCE.match(line))
        ends = not fenced and (not line.strip() or (line.startswith("#") and bool(_HEADING.match(line))))
        if ends and held:
            yield LineSpan(start, number - 1, "\n".join(held))
            held = []
        if fence:
            fenced = not fenced
        if not line.strip() and not held:
            continue
        if not held:
            start = number
        held.append(line)
    while held and not held[-1].strip():
        held.pop()
    if held:
        yield LineSpan(start, start + len(held) - 1, "\n".join(held))


def _only_headings(blocks: list[LineSpan]) -> bool:
    return all("\n" not in block.text and _HEADING.match(block.text) for block in blocks)


def _join(blocks: list[LineSpan]) -> LineSpan:
    first, text = blocks[0], blocks[0].text
    for before, block in pairwise(blocks):
        text += "\n" * (block.line_start - before.line_end) + block.text
    return LineSpan(first.line_start, blocks[-1].line_end, text)


def _cut(block: LineSpan, max_chars: int) -> list[LineSpan]:
    """Cut a block between lines, and a line that is too long between words."""
    pieces: list[LineSpan] = []
    start, held = block.line_start, ""
    for number, line in enumerate(block.text.split("\n"), start=block.line_start):
        candidate = f"{held}\n{line}" if held else line
        if len(candidate) <= max_chars:
            start, held = (start, candidate) if held else (number, line)
            continue
        if held:
            pieces.append(LineSpan(start, number - 1, held))
        *whole, held = _cut_line(line, max_chars)
        pieces.extend(LineSpan(number, number, piece) for piece in whole)
        start = number
    if held or not pieces:
        pieces.append(LineSpan(start, block.line_end, held))
    return pieces


def _cut_line(line: str, max_chars: int) -> list[str]:
    pieces: list[str] = []
    while len(line) > max_chars:
        at = line.rfind(" ", max_chars // 2, max_chars + 1)
        at = at if at > 0 else max_chars
        pieces.append(line[:at].rstrip())
        line = line[at:].lstrip()
    return [*pieces, line]
