"""Chunking: splits a text into passages with line numbers, the same way for storage and for citations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_PASSAGE_CHARS = 700
"""The most characters of a passage: three or four passages fit a small model's prompt."""
_HEADING = re.compile(r"^(#{1,6}\s+\S|={3,}\s*$|-{3,}\s*$)")
_FENCE = re.compile(r"^\s*(```|~~~)")


@dataclass(frozen=True, slots=True)
class LineSpan:
    """A range of lines, 1-based and inclusive; ``text`` has them joined by newlines.

    A line longer than a passage becomes several ``LineSpan`` with the same line number.
    """

    line_start: int
    line_end: int
    text: str


def split_passages(text: str, max_chars: int = MAX_PASSAGE_CHARS) -> list[LineSpan]:
    """Split ``text`` into passages of at most ``max_chars`` characters, in order, without blank ones.

    A Markdown heading begins a passage. Paragraphs are packed together while they fit; a longer one is cut between
    lines, and a longer line between words. Raises ``ValueError`` when ``max_chars`` is below 1.
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


def split_located_passages(text: str, locations: Sequence[tuple[int, str]]) -> list[tuple[LineSpan, str]]:
    """Split ``text`` into passages, each with its location.

    ``locations`` are the lines (from 1) where one begins, in order, each with its label. A passage stands in one only.
    """
    if not locations:
        return [(span, "") for span in split_passages(text)]
    lines = numbered_lines(text)
    starts = [(1, ""), *((line, label) for line, label in locations if 1 <= line <= len(lines))]
    found: list[tuple[LineSpan, str]] = []
    for (start, label), (end, _) in pairwise([*starts, (len(lines) + 1, "")]):
        found += [
            (LineSpan(span.line_start + start - 1, span.line_end + start - 1, span.text), label)
            for span in split_passages("\n".join(lines[start - 1 : end - 1]))
        ]
    return found


def numbered_lines(text: str) -> list[str]:
    """Return the lines of ``text`` as citations count them: only LF and CRLF end a line."""
    return text.replace("\r\n", "\n").split("\n")


def _blocks(text: str) -> Iterator[LineSpan]:
    """Yield paragraphs: the lines between blank lines. A fenced block is one paragraph; a heading begins one."""
    start, lines, fenced = 0, list[str](), False
    for number, line in enumerate(numbered_lines(text), start=1):
        fence = bool(_FENCE.match(line))
        ends = not fenced and (not line.strip() or (line.startswith("#") and bool(_HEADING.match(line))))
        if ends and lines:
            yield LineSpan(start, number - 1, "\n".join(lines))
            lines = []
        if fence:
            fenced = not fenced
        if not line.strip() and not lines:
            continue
        if not lines:
            start = number
        lines.append(line)
    while lines and not lines[-1].strip():
        lines.pop()
    if lines:
        yield LineSpan(start, start + len(lines) - 1, "\n".join(lines))


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
    start, pending = block.line_start, ""
    for number, line in enumerate(block.text.split("\n"), start=block.line_start):
        candidate = f"{pending}\n{line}" if pending else line
        if len(candidate) <= max_chars:
            start, pending = (start, candidate) if pending else (number, line)
            continue
        if pending:
            pieces.append(LineSpan(start, number - 1, pending))
        *whole, pending = _cut_line(line, max_chars)
        pieces.extend(LineSpan(number, number, piece) for piece in whole)
        start = number
    if pending or not pieces:
        pieces.append(LineSpan(start, block.line_end, pending))
    return pieces


def _cut_line(line: str, max_chars: int) -> list[str]:
    pieces: list[str] = []
    start = 0
    # By positions: to cut the rest off each time would copy a line of 20 MB thirty thousand times.
    while len(line) - start > max_chars:
        # A blank in the first half would leave a short piece: then the word is cut.
        end = line.rfind(" ", start + max_chars // 2, start + max_chars + 1)
        end = end if end > start else start + max_chars
        pieces.append(line[start:end].rstrip())
        start = end
        while start < len(line) and line[start].isspace():
            start += 1
    return [*pieces, line[start:]]
