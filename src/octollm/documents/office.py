"""Office Open XML: text and tables of Word documents and presentations (ISO/IEC 29500).

The parts are read as XML rather than by an object model, because a reader needs the text in tracked insertions, content
controls and text boxes as well. A document type declaration, which Office never writes, is refused; so no entity is
defined, and none is read from outside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from posixpath import dirname, join, normpath
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from octollm.documents.archive import BoundedZip
from octollm.documents.decoding import clean_text
from octollm.documents.model import Document, DocumentError, Location, RawCell, RawTable, ReadBudget, Section

_HEADING = re.compile(r"(?:heading|berschrift|titre|ttulo|titolo|kop|overskrift|rubrik)\s?([1-6])", re.IGNORECASE)
_SKIPPED = frozenset({"Fallback", "delText", "instrText", "rPr", "pPr", "tblPr", "trPr", "tcPr", "sectPr"})
"""Elements without text for a reader: deleted text, field codes, properties, and copies for older programs."""


def read_docx(name: str, data: bytes, budget: ReadBudget) -> Document:
    """Return headers, body, footnotes and footers of a Word document, and its tables. Raises :class:`DocumentError`."""
    with BoundedZip(data, budget) as archive:
        main = _find_main_part(archive, "word/document.xml")
        related = _relationships(archive, main)
        words = _WordText(budget)
        for kind in ("header", "", "footnotes", "endnotes", "footer"):
            parts = [main] if not kind else sorted({target for rel, target in related.values() if rel == kind})
            for part in parts:
                if part in archive.names:
                    words.add_part(_parse(archive, part))
    text = clean_text("\n".join(words.lines)).strip("\n")
    sections = (Section(text),) if text else ()
    return Document(name, "docx", sections, tuple(words.tables))


def read_pptx(name: str, data: bytes, budget: ReadBudget) -> Document:
    """Return the text of each slide with its notes, and its tables. Raises :class:`DocumentError`."""
    sections: list[Section] = []
    tables: list[RawTable] = []
    hidden: list[int] = []
    with BoundedZip(data, budget) as archive:
        main = _find_main_part(archive, "ppt/presentation.xml")
        related = _relationships(archive, main)
        ids = [_attribute(element, "id", prefixed=True) for element in _iterate(_parse(archive, main), "sldId")]
        slides = [related[each][1] for each in ids if each in related]
        budget.add_pages(len(slides))
        for number, part in enumerate(slides, start=1):
            if part not in archive.names:
                continue
            slide = _parse(archive, part)
            if _attribute(slide, "show") in ("0", "false"):
                hidden.append(number)
            lines = _slide_lines(slide, number, tables, budget)
            for kind, target in _relationships(archive, part).values():
                if kind == "notesSlide" and target in archive.names:
                    spoken = _slide_lines(_parse(archive, target), number, [], budget, placeholder="body")
                    lines += ["Notes:", *spoken] if spoken else []
            text = clean_text("\n".join(lines)).strip("\n")
            if text:
                sections.append(Section(text, Location(slide=number)))
    notes = (f"slide {', '.join(map(str, hidden[:20]))} hidden in the presentation, but read",) if hidden else ()
    return Document(name, "pptx", tuple(sections), tuple(tables), notes)


class _WordText:
    """Collects the lines and the tables of the parts of a Word document."""

    def __init__(self, budget: ReadBudget) -> None:
        self._budget = budget
        self.lines: list[str] = []
        self.tables: list[RawTable] = []

    def add_part(self, root: Element) -> None:
        """Add the paragraphs and tables of a part, in order."""
        for block in _blocks(root):
            if _local_name(block) == "tbl":
                self._add_table(block)
            else:
                self._add_paragraph(block)

    def _add_paragraph(self, paragraph: Element) -> None:
        text = _paragraph_text(paragraph).strip()
        self._budget.add_characters(len(text))
        style, listed = _paragraph_style(paragraph)
        if not text:
            self.lines.append("")
        elif heading := _HEADING.search(style):
            self.lines += ["", "#" * int(heading[1]) + " " + text, ""]
        else:
            self.lines.append(f"- {text}" if listed else text)

    def _add_table(self, table: Element) -> None:
        rows: list[list[RawCell]] = []
        for row in _children(table, "tr"):
            cells: list[RawCell] = []
            for cell in _children(row, "tc"):
                paragraphs = (_paragraph_text(block) for block in _iterate(cell, "p"))
                text = clean_text(" ".join(" ".join(paragraphs).split()))
                cells += [text or None, *[None] * (_grid_span(cell) - 1)]
            self._budget.add_cells(len(cells))
            self._budget.add_characters(sum(len(cell) for cell in cells if isinstance(cell, str)))
            rows.append(cells)
        if rows:
            self.tables.append(RawTable(f"table {len(self.tables) + 1}", rows))
            self.lines += ["", *(" | ".join("" if cell is None else str(cell) for cell in row) for row in rows), ""]


def _slide_lines(
    slide: Element, number: int, tables: list[RawTable], budget: ReadBudget, *, placeholder: str = ""
) -> list[str]:
    """Return the lines of a slide's shapes; with ``placeholder`` only of shapes that stand for it."""
    lines: list[str] = []
    for shape in _iterate(slide, "sp", "graphicFrame", "cxnSp"):
        if placeholder and not any(_attribute(each, "type") == placeholder for each in _iterate(shape, "ph")):
            continue
        for table in _iterate(shape, "tbl"):
            rows: list[list[RawCell]] = []
            for row in _iterate(table, "tr"):
                cells: list[RawCell] = [
                    clean_text(" ".join(_paragraph_text(each) for each in _iterate(cell, "p"))).strip() or None
                    for cell in _iterate(row, "tc")
                ]
                budget.add_cells(len(cells))
                rows.append(cells)
            tables.append(RawTable(f"slide {number} table {len(tables) + 1}", rows, Location(slide=number)))
            lines += [" | ".join("" if cell is None else str(cell) for cell in row) for row in rows]
        if _local_name(shape) != "graphicFrame":
            lines += [text for each in _iterate(shape, "p") if (text := _paragraph_text(each).strip())]
    budget.add_characters(sum(map(len, lines)))
    return lines


def _blocks(root: Element) -> Iterator[Element]:
    """Yield paragraphs and tables in order, out of content controls and text boxes too; not those inside of tables."""
    stack = [iter(root)]
    while stack:
        element = next(stack[-1], None)
        if element is None:
            stack.pop()
            continue
        name = _local_name(element)
        if name in ("p", "tbl"):
            yield element
        if name == "p":
            stack.append(iter(list(_iterate(element, "txbxContent"))))
        elif name != "tbl" and name not in _SKIPPED:
            stack.append(iter(element))


def _paragraph_text(paragraph: Element) -> str:
    """Return the text of a paragraph's runs, without hidden ones and without its text boxes."""
    parts: list[str] = []
    stack = [iter(paragraph)]
    while stack:
        element = next(stack[-1], None)
        if element is None:
            stack.pop()
            continue
        name = _local_name(element)
        if name == "t":
            parts.append(element.text or "")
        elif name == "tab":
            parts.append("\t")
        elif name in ("br", "cr"):
            parts.append("\n")
        elif name == "noBreakHyphen":
            parts.append("-")
        elif name not in _SKIPPED and name != "txbxContent" and not (name == "r" and _is_hidden_run(element)):
            stack.append(iter(element))
    return "".join(parts)


def _is_hidden_run(run: Element) -> bool:
    return any(
        _attribute(flag, "val") not in ("0", "false")
        for properties in _children(run, "rPr")
        for flag in _children(properties, "vanish")
    )


def _paragraph_style(paragraph: Element) -> tuple[str, bool]:
    """Return the id of a paragraph's style, and whether it is an item of a list."""
    for properties in _children(paragraph, "pPr"):
        styles = [_attribute(style, "val") for style in _children(properties, "pStyle")]
        return (styles or [""])[0], next(_children(properties, "numPr"), None) is not None
    return "", False


def _grid_span(cell: Element) -> int:
    for properties in _children(cell, "tcPr"):
        for span in _children(properties, "gridSpan"):
            value = _attribute(span, "val")
            return min(100, max(1, int(value))) if value.isascii() and value.isdigit() and len(value) < 4 else 1
    return 1


class _TreeWithoutDoctype(ElementTree.TreeBuilder):
    """Builds a tree, and refuses a document type declaration before an entity of it is read."""

    def doctype(self, name: str, public_id: str | None, system: str | None) -> None:
        """Refuse the declaration."""
        raise DocumentError("A part of the file declares a document type, which Office files do not have.")


def _parse(archive: BoundedZip, part: str) -> Element:
    parser = ElementTree.XMLParser(target=_TreeWithoutDoctype())  # noqa: S314  no entity can be declared
    try:
        parser.feed(archive.read(part))
        return parser.close()
    except ElementTree.ParseError as exc:
        raise DocumentError(f"The part {part} of the file is damaged: {exc.msg}") from exc


def _find_main_part(archive: BoundedZip, usual: str) -> str:
    main = [target for kind, target in _relationships(archive, "").values() if kind == "officeDocument"]
    part = next(iter(main), usual)
    if part not in archive.names:
        raise DocumentError(f"The file is damaged: the part {part} is missing.")
    return part


def _relationships(archive: BoundedZip, part: str) -> dict[str, tuple[str, str]]:
    """Return the relationships of a part by id: the last word of the type, and the target's path in the archive."""
    folder = dirname(part)
    path = join(folder, "_rels", part.rsplit("/", 1)[-1] + ".rels")
    if path not in archive.names:
        return {}
    related: dict[str, tuple[str, str]] = {}
    for element in _iterate(_parse(archive, path), "Relationship"):
        if _attribute(element, "TargetMode") == "External":
            continue
        target = _attribute(element, "Target")
        resolved = target.lstrip("/") if target.startswith("/") else normpath(join(folder, target))
        related[_attribute(element, "Id")] = (_attribute(element, "Type").rsplit("/", 1)[-1], resolved)
    return related


def _local_name(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _children(element: Element, name: str) -> Iterator[Element]:
    return (child for child in element if _local_name(child) == name)


def _iterate(element: Element, *names: str) -> Iterator[Element]:
    """Yield elements of these local names: transitional and strict files have different namespaces."""
    return (each for each in element.iter() if _local_name(each) in names)


def _attribute(element: Element, name: str, *, prefixed: bool = False) -> str:
    """Return an attribute by its local name; with ``prefixed`` only one that has a namespace."""
    for key, value in element.attrib.items():
        if key.rpartition("}")[2] == name and (not prefixed or key.startswith("{")):
            return value
    return ""
