"""The visible text and the tables of an HTML page.

Scripts, styles, templates, comments and hidden elements are left out: a browser shows none of them. The parser sends
events and builds no tree, so its time is linear whatever is nested.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from octollm.documents.decoding import clean_text, decode_text
from octollm.documents.model import Document, RawCell, RawTable, ReadBudget, Section

_INVISIBLE = frozenset(
    {"script", "style", "template", "noscript", "noframes", "noembed", "iframe", "object", "svg", "math", "canvas",
     "audio", "video", "datalist", "head"}
)  # fmt: skip
_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "dialog", "div", "dl", "dt",
     "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html",
     "legend", "li", "main", "nav", "ol", "option", "p", "pre", "section", "select", "summary", "table", "tbody",
     "textarea", "tfoot", "thead", "title", "tr", "ul"}
)  # fmt: skip
_APART = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6", "table", "pre", "title"})
_VOID = frozenset(
    {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
)
_HIDDEN_STYLE = re.compile(r"(?:display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse))\b", re.IGNORECASE)
_META_CHARSET = re.compile(rb"<meta\b[^>]{0,200}?\bcharset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\n\f\xa0]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_TRAILING_SPACES = re.compile(r"[ \t]+$", re.MULTILINE)
_MAX_SPAN = 1000
"""Columns that a cell may take (https://html.spec.whatwg.org/#dom-tdth-colspan)."""
_CHUNK = 64 * 1024


def read_html(name: str, data: bytes, budget: ReadBudget) -> Document:
    """Return the visible text of a page and its tables. Raises :class:`DocumentError`."""
    declared = _META_CHARSET.search(data[:4096])
    decoded = decode_text(data, declared[1].decode("ascii", "replace") if declared else "")
    page = extract_visible(decoded.text, budget)
    return Document(name, "html", (Section(page.text),) if page.text else (), page.tables, decoded.notes)


@dataclass(frozen=True, slots=True)
class VisiblePage:
    """What a browser shows of a page. A heading begins with ``#`` and a list item with ``-``, as in Markdown."""

    text: str
    tables: tuple[RawTable, ...]


def extract_visible(source: str, budget: ReadBudget) -> VisiblePage:
    """Return what a browser shows of ``source``. Raises :class:`DocumentError` for too many cells."""
    collector = _VisibleText(budget)
    # Named as text, because lxml has no types.
    etree: Any = import_module("lxml.etree")
    parser = etree.HTMLParser(target=collector, encoding="utf-8", no_network=True)
    for start in range(0, len(source), _CHUNK):
        parser.feed(source[start : start + _CHUNK].encode("utf-8", "replace"))
    if source.strip():
        parser.close()
    return VisiblePage(collector.visible_text(), tuple(collector.tables))


@dataclass(slots=True)
class _Table:
    """A table that is being read; ``cell`` is the text of the open cell, ``None`` outside of one."""

    rows: list[list[RawCell]] = field(default_factory=list[list[RawCell]])
    caption: str = ""
    cell: list[str] | None = None
    span: int = 1


class _VisibleText:
    """A parser target that collects visible text and tables (https://lxml.de/parsing.html#the-target-parser-interface)."""

    def __init__(self, budget: ReadBudget) -> None:
        self._budget = budget
        self._parts: list[str] = []
        self._open: list[_Table] = []
        self._hidden = 0
        self._preformatted = 0
        self._in_title = False
        self._in_caption = False
        self._newlines = 2
        self.tables: list[RawTable] = []

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        """Begin an element."""
        self._budget.add_element()
        if tag == "title" and not self._open:
            self._in_title = True
        elif self._hidden:
            self._hidden += tag not in _VOID
            return
        elif tag not in _VOID and (tag in _INVISIBLE or _is_hidden(tag, attributes)):
            self._hidden = 1
            return
        if tag == "br":
            self._write("\n")
        elif tag == "table":
            self._break(tag)
            self._open.append(_Table())
        elif self._open and tag == "caption":
            self._in_caption = True
        elif self._open and tag == "tr":
            self._open[-1].rows.append([])
        elif self._open and tag in ("td", "th"):
            self._end_cell()
            self._open[-1].cell = []
            self._open[-1].span = _column_span(attributes)
        else:
            self._break(tag)
            if tag in ("h1", "h2", "h3", "h4", "h5", "h6"):
                self._write("#" * int(tag[1]) + " ")
            elif tag == "li":
                self._write("- ")
        self._preformatted += tag in ("pre", "textarea")

    def end(self, tag: str) -> None:
        """End an element."""
        if tag == "title" and self._in_title:
            self._in_title = False
            self._break(tag)
            return
        if self._hidden:
            self._hidden -= tag not in _VOID
            return
        if self._open and tag in ("td", "th"):
            self._end_cell()
        elif tag == "caption":
            self._in_caption = False
        elif self._open and tag == "tr":
            self._end_row()
        elif self._open and tag == "table":
            self._end_table()
        elif tag not in _VOID:
            self._break(tag)
        if tag in ("pre", "textarea"):
            self._preformatted -= 1

    def data(self, data: str) -> None:
        """Take text."""
        if self._hidden and not self._in_title:
            return
        self._write(data if self._preformatted else _SPACE.sub(" ", data))

    def comment(self, text: str) -> None:
        """Leave out a comment."""

    def close(self) -> None:
        """End the page: what is still open ends here."""
        while self._open:
            self._end_cell()
            self._end_row()
            self._end_table()

    def visible_text(self) -> str:
        """Return the text of the page, without spaces at the ends of lines and with at most one blank line in a row."""
        text = _TRAILING_SPACES.sub("", clean_text("".join(self._parts)))
        return _BLANK_LINES.sub("\n\n", text).strip("\n")

    def _write(self, text: str) -> None:
        table = self._open[-1] if self._open else None
        if table is not None and table.cell is not None:
            table.cell.append(text)
        elif self._in_caption and table is not None:
            table.caption += text
        elif table is None or text.strip():
            if not self._preformatted and self._newlines:
                text = text.lstrip(" ")
            if text:
                self._parts.append(text)
                self._newlines = len(text) - len(text.rstrip("\n")) + (self._newlines if text.isspace() else 0)

    def _break(self, tag: str) -> None:
        if tag not in _BLOCKS:
            return
        if self._open and self._open[-1].cell is not None:
            self._open[-1].cell.append(" ")
            return
        # A paragraph and a heading stand apart; other blocks only begin a line.
        missing = (2 if tag in _APART else 1) - self._newlines
        if missing > 0:
            self._parts.append("\n" * missing)
            self._newlines += missing

    def _end_cell(self) -> None:
        table = self._open[-1]
        if table.cell is None:
            return
        if not table.rows:
            table.rows.append([])
        text = " ".join(clean_text("".join(table.cell)).split())
        table.cell = None
        self._budget.add_cells(table.span)
        table.rows[-1] += [text or None, *[None] * (table.span - 1)]

    def _end_row(self) -> None:
        table = self._open[-1]
        self._end_cell()
        if table.rows and table.rows[-1]:
            row = " | ".join("" if cell is None else str(cell) for cell in table.rows[-1])
            self._write_outside(row + "\n")
            self._newlines = 1

    def _end_table(self) -> None:
        table = self._open.pop()
        rows = [row for row in table.rows if row]
        if rows:
            caption = " ".join(clean_text(table.caption).split())
            self.tables.append(RawTable(caption or f"table {len(self.tables) + 1}", rows))
        self._break("table")

    def _write_outside(self, text: str) -> None:
        """Write a row where its table stands: on the page, or in the cell of an outer table."""
        outer = self._open[-2] if len(self._open) > 1 else None
        if outer is not None and outer.cell is not None:
            outer.cell.append(text)
        else:
            self._parts.append(text)


def _is_hidden(tag: str, attributes: Mapping[str, str]) -> bool:
    if "hidden" in attributes or _HIDDEN_STYLE.search(attributes.get("style", "")):
        return True
    return tag == "dialog" and "open" not in attributes


def _column_span(attributes: Mapping[str, str]) -> int:
    span = attributes.get("colspan", "1").strip()
    return min(_MAX_SPAN, max(1, int(span))) if span.isascii() and span.isdigit() and len(span) < 5 else 1
