"""The layout of a table in rows of cells: its delimiter, header, units and footers, and which rows are data.

The first rows decide about header and units, the last ones about footers; the rows between are only counted and padded,
so that a long file costs one pass.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from octollm.documents.dates import parse_date_shape
from octollm.documents.numbers import Shape, is_unit, parse_number_shape

HEAD_ROWS = 200
"""Rows that decide about delimiter and header."""
TAIL_ROWS = 60
"""Rows at the end among which footers are looked for."""
_FOOTER_ROWS = 12
"""Rows after a blank one that may be footers."""
MAX_COLUMNS = 2000
MAX_QUOTED_LINES = 200
"""Lines of one quoted cell; more mean a quotation mark that is never closed."""
_DELIMITERS = "\t;|,"
_NO_DELIMITER = "\x1f"
_SPACE = " \t\u00a0\u202f\ufeff"
_DIGITS = str.maketrans("012345678", "999999999")
NULL_WORDS = frozenset(
    {"", "-", "--", "---", "–", "—", "na", "n/a", "#n/a", "#na", "#nv", "n.a.", "null", "nan", "k.a.", "k. a.", "n.v.",
     "#value!", "#wert!", "#ref!", "#div/0!", "?", "."}
)  # fmt: skip
"""Words, in lower case, that stand for an empty cell among numbers or dates."""
_RULE_LINE = re.compile(r"[-=_*+ ]{3,}")
_FOOTER = re.compile(
    r"(?:source|sources|note|notes|notiz|hinweis\w*|anmerkung\w*|quelle\w*|stand|as of|as at|created|generated|exported"
    r"|printed|erstellt|gedruckt|exportiert|seite|page|end of|ende|remarque\w*|généré|édité|imprimé|disclaimer"
    r"|closing balance|opening balance|report|\d+ (?:records|rows|zeilen|datensätze))\b.*|[*©].*|\d\).*",
    re.IGNORECASE | re.DOTALL,
)
_SUMMARY = re.compile(
    r"(?:Σ|(?:grand[- ]?|sub[- ]?|sous[- ]?|overall |sub)?total\w{0,2}|gesamt\w*|insgesamt|(?:zwischen|end)?summe|sum"
    r"|somme|somma|suma|totaal|subtotaal|average|mean|mittelwert|durchschnitt|moyenne|media|promedio"
    r"|celkem|součet|summa|yhteensä|totalt|i alt|razem|ogółem|összesen|ukupno|skupaj|spolu|kokku|iš viso|kopā"
    r"|toplam|genel toplam|σύνολο|итого|всего|сумма|разом|усього|общо|укупно"
    r"|合計|总计|總計|合计|小計|小计|総計|합계|총계|소계"
    r"|المجموع|الإجمالي|סך הכל|סה[\"״]כ|รวม|tổng cộng|jumlah|कुल)\b(?P<more>.{0,60})",
    re.IGNORECASE,
)


class LayoutError(ValueError):
    """The rows are no table; the text says why and where."""


def is_summary_label(text: str, *, exactly: bool = False) -> bool:
    """Say whether a cell labels a total, a subtotal or an average; ``exactly`` allows no further words."""
    match = _SUMMARY.fullmatch(text.strip())
    return match is not None and not (exactly and match["more"].strip(" :"))


def strip_cell(text: str) -> str:
    """Return a cell without the spaces around it."""
    return text.strip(_SPACE + "\r\n")


def _is_value(text: str) -> bool:
    """Say whether a cell is a number, a date or a word for an empty cell, rather than a label."""
    if text.lower() in NULL_WORDS:
        return True
    shape = Shape(text.translate(_DIGITS)[:80], 1, text, text)
    return parse_number_shape(shape) is not None or parse_date_shape(shape) is not None


def _filled(row: Sequence[str]) -> list[str]:
    return [cell for cell in map(strip_cell, row) if cell]


def _is_label_row(row: Sequence[str]) -> bool:
    """Say whether most cells of a row are labels. Years may stand among them, as in a table with a column per year."""
    cells = _filled(row)
    values = [cell for cell in cells if _is_value(cell)]
    years = [cell for cell in values if re.fullmatch(r"(?:19|20)\d\d", cell)]
    if len(years) == len(values) >= 2 and len(set(years)) == len(years) and not _is_value(strip_cell(row[0]) or "x"):
        return True
    return bool(cells) and len(values) * 4 <= len(cells)


def _parse(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Yield the rows of delimited text. Raises ``LayoutError`` for a quoted cell that does not end."""
    reader = csv.reader(lines, delimiter=delimiter)
    before = 0
    try:
        for row in reader:
            if reader.line_num - before > MAX_QUOTED_LINES:
                raise LayoutError(f"the quotation mark that opens a cell in line {before + 1} is never closed")
            before = reader.line_num
            yield row
    except csv.Error as error:
        raise LayoutError(f"line {before + 1}: {error}") from error


def find_delimiter(lines: Sequence[str]) -> str:
    """Return the delimiter of the first lines of a text.

    The best one gives rows of one length from a header on; a tab or semicolon goes before a comma, which may be a
    decimal mark. A text of one column has a delimiter that does not occur.
    """
    best: tuple[tuple[bool, float, int, int], str] | None = None
    uneven = ""
    for rank, delimiter in enumerate(_DELIMITERS):
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if _filled(row)]
        counted = Counter(len(row) for row in rows if len(row) > 1)
        if not counted:
            continue
        width, count = max(counted.items(), key=lambda item: (item[1] * (item[0] - 1), item[0]))
        start = next(number for number, row in enumerate(rows) if len(row) == width)
        block = rows[start:]
        share, coverage = count / len(block), count / len(rows)
        has_header = _is_label_row(block[0])
        # Lines of many lengths: a header that is divided, and a divider in most of the lines after it.
        header = next(row for row in rows if len(row) > 1)
        is_prose = all(cell.startswith(" ") for cell in header[1:])
        if sum(counted.values()) >= 0.7 * len(rows) and _is_label_row(header) and not is_prose:
            uneven = uneven or delimiter
        # "Hello, world" is prose, not two cells.
        is_prose = start > 0 and all(cell.startswith(" ") for row in block for cell in row[1:])
        if is_prose or (share < 0.6 and coverage < 0.6) or not (has_header or coverage == 1):
            continue
        key = (has_header or coverage == 1, round(coverage, 1), -rank, width)
        if best is None or key > best[0]:
            best = key, delimiter
    return best[1] if best else uneven or _NO_DELIMITER


@dataclass
class Layout:
    """The columns of a table and how its rows are read; :meth:`data` yields the rows and completes ``notes``."""

    header: list[str]
    units: dict[str, str]
    start: int
    """The row at which the data begins, from 0."""
    notes: list[str] = field(default_factory=list[str])
    doubts: list[str] = field(default_factory=list[str])
    """Notes on what could not be decided, or what is left out that may be data."""
    label_row: tuple[str, ...] = ()
    has_typed_rows: bool = False
    row_noun: str = "line"
    delimiter: str = ""
    numeric: frozenset[int] = frozenset()
    """The columns, from 0, whose values are numbers in the file itself, as in a spreadsheet, and not texts."""
    text_columns: frozenset[int] | None = None
    """The columns, from 0, that are texts in a file with types and records of its own, as JSON; else ``None``."""
    named: frozenset[str] = frozenset()
    """The columns that have a name of their own; another one without a value is no column."""

    def data(self, rows: Iterable[list[str]], start: int | None = None) -> Iterator[list[str]]:
        """Yield the data among ``rows``, which begin at ``start`` (by default all data), each as long as the header."""
        width = len(self.header)
        held: deque[tuple[int, bool, list[str]]] = deque()
        """The last rows, each with its number and whether a blank row goes before it."""
        counts: Counter[str] = Counter()
        first: dict[str, int] = {}
        after_blank = False
        label = self.label_row[0] if self.label_row else ""
        for number, row in enumerate(rows, (self.start if start is None else start) + 1):
            # The first condition holds for nearly every row of a long file, and costs little.
            if len(row) != width or after_blank or not row[0][:1].isalnum() or row[0] == label:
                cells = _filled(row)
                if not cells:
                    after_blank = True
                    continue
                if after_blank and self._is_second_table(row):
                    self.doubts.append(
                        f"A second table begins in {self.row_noun} {number} ({', '.join(cells)[:80]}); it is not read."
                    )
                    break
                if all(map(_RULE_LINE.fullmatch, cells)):
                    continue
                if self.label_row and cells == _filled(self.label_row):
                    counts["header"] += 1
                    continue
            held.append((number, after_blank, row))
            after_blank = False
            if len(held) > TAIL_ROWS:
                at, _, kept = held.popleft()
                yield kept if len(kept) == width else self._fit(kept, at, counts, first)
        for at, _, kept in self._without_footers(list(held)):
            yield self._fit(kept, at, counts, first)
        self._note_counts(counts, first)

    def _fit(self, row: list[str], number: int, counts: Counter[str], first: dict[str, int]) -> list[str]:
        width = len(self.header)
        if len(row) == width:
            return row
        if len(row) < width:
            counts["short"] += 1
            first.setdefault("short", number)
            return row + [""] * (width - len(row))
        if any(map(strip_cell, row[width:])):
            counts["long"] += 1
            first.setdefault("long", number)
        return row[:width]

    def _is_second_table(self, row: list[str]) -> bool:
        return len(_filled(row)) >= 2 and self.has_typed_rows and _is_label_row(row) and not any(
            map(is_summary_label, row)
        ) and len(_filled(row)) * 2 > len(self.header)  # fmt: skip

    def _without_footers(self, held: list[tuple[int, bool, list[str]]]) -> list[tuple[int, bool, list[str]]]:
        """Return the last rows without the footers; a row with the label of a total is left for its arithmetic."""
        width = len(self.header)
        if width == 1:
            return held
        typical = sorted(len(_filled(row)) for _, _, row in held)[len(held) // 2] if held else 0
        keys = [strip_cell(row[0]) for _, _, row in held]
        has_typed_keys = sum(map(_is_value, keys)) * 2 > len(keys)
        footers: set[int] = set()
        is_sure = True
        for at in range(len(held) - 1, -1, -1):
            cells = _filled(held[at][2])
            if any(map(is_summary_label, cells)):
                continue
            is_apart = any(held[each][1] for each in range(max(0, at - _FOOTER_ROWS), at + 1))
            is_note = bool(keys[at]) and not _is_value(keys[at]) and len(cells) < typical
            if is_apart and has_typed_keys:
                is_sparse = len(cells) * 3 <= typical * 2
            else:
                is_sparse = len(cells) <= max(1, int(0.4 * typical))
            is_said = bool(_FOOTER.fullmatch(keys[at])) or keys[at].endswith(":") or len(keys[at]) > 40
            if not (is_note and is_sparse and (is_apart or is_said or width > 3)):
                break
            footers.add(at)
            is_sure = is_sure and (is_apart or is_said)
        if footers:
            texts = [" ".join(_filled(held[at][2])) for at in sorted(footers)]
            where = held[min(footers)][0]
            # Without a blank row before it or the words of a note, a sparse row may be data.
            (self.notes if is_sure else self.doubts).append(
                f"{_count(len(texts), self.row_noun)} after the table, from {self.row_noun} {where} on, not read as "
                f"data: {'; '.join(texts)[:120]!r}."
            )
        return [row for at, row in enumerate(held) if at not in footers]

    def _note_counts(self, counts: Counter[str], first: dict[str, int]) -> None:
        if counts["header"]:
            self.notes.append(f"The header is repeated {counts['header']} times; the repetitions are left out.")
        if counts["short"]:
            self.notes.append(
                f"{_count(counts['short'], self.row_noun)} with fewer cells than the header (the first is "
                f"{self.row_noun} {first['short']}); the missing cells are empty."
            )
        if counts["long"]:
            self.doubts.append(
                f"{_count(counts['long'], self.row_noun)} with more cells than the header (the first is "
                f"{self.row_noun} {first['long']}); what is beyond the header is left out, and cells may be shifted."
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def find_layout(head: Sequence[list[str]], *, row_noun: str = "line") -> Layout:
    """Return the layout of a table from its first rows. Raises ``LayoutError`` when they are no table."""
    filled = [len(_filled(row)) for row in head]
    most = max(filled, default=0)
    if most == 0:
        raise LayoutError("there is no cell with content")
    at, has_header = _find_header(head, filled, most)
    layout = Layout([], {}, at, row_noun=row_noun)
    title = [" ".join(_filled(row)) for row in head[:at] if _filled(row)]
    if has_header:
        layout.start = at + 1
    following = [row for row in head[layout.start :] if _filled(row)]
    width = max((len(row) for row in [head[at]]), default=0)
    longest = Counter(_used_width(row) for row in following).most_common(1)
    if longest and longest[0][0] > width and longest[0][1] * 2 > len(following):
        if has_header and longest[0][0] > width:
            raise LayoutError(
                f"{row_noun} {at + 1}, the header, has {width} cells, but most {row_noun}s after it have "
                f"{longest[0][0]}; a cell holds the delimiter without quotation marks"
            )
        width = longest[0][0]
    width = max(width, 1) if not has_header else max(_used_width(head[at]), longest[0][0] if longest else 0, 1)
    if width > MAX_COLUMNS:
        raise LayoutError(f"there are {width} columns; at most {MAX_COLUMNS} are read")
    labels = [strip_cell(cell) for cell in (head[at] if has_header else [])][:width]
    labels += [""] * (width - len(labels))
    if has_header:
        layout.label_row = tuple((list(head[at]) + [""] * width)[:width])
        _read_units(layout, head, labels)
        labels = _with_groups(head, at, labels, title)
    layout.has_typed_rows = any(not _is_label_row(row) for row in following[:5])
    layout.header = _unique_names(labels, layout, has_header=has_header)
    layout.named = frozenset(name for name, label in zip(layout.header, labels, strict=True) if label)
    if title:
        (layout.notes if has_header else layout.doubts).append(
            f"{_count(len(title), row_noun)} before the table not read as data: {'; '.join(title)[:120]!r}."
        )
    if has_header and following and not any(_is_value(cell) for row in following[:HEAD_ROWS] for cell in _filled(row)):
        layout.notes.append(f"{row_noun.capitalize()} {at + 1} is read as the header.")
    return layout


def _used_width(row: Sequence[str]) -> int:
    return next((len(row) - at for at, cell in enumerate(reversed(row)) if strip_cell(cell)), 0)


def _find_header(head: Sequence[list[str]], filled: Sequence[int], most: int) -> tuple[int, bool]:
    """Return the row of the header, or the first row of data and ``False`` when there is no header."""
    threshold = max(1.0, 0.6 * most)
    candidates = [at for at, count in enumerate(filled) if count >= threshold]
    at = candidates[0]
    if not _is_label_row(head[at]):
        return at, False
    while True:
        after = [each for each in range(at + 1, len(head)) if filled[each]][:3]
        if not after or not _is_label_row(head[after[0]]) or all(map(is_unit, _filled(head[after[0]]))):
            break
        is_metadata = strip_cell(head[at][0]).endswith(":") and filled[at] <= 2
        is_fuller = filled[after[0]] > filled[at] and (len(after) == 1 or not _is_label_row(head[after[1]]))
        # A blank row between short labelled rows and a header that values follow.
        is_apart = after[0] > at + 1 and filled[at] <= filled[after[0]] and len(after) > 1
        is_apart = is_apart and filled[at] <= 2 and not _is_label_row(head[after[1]])
        if not (is_metadata or is_fuller or is_apart):
            break
        at = after[0]
    body = [row for row in head[at + 1 :] if _filled(row)]
    repeated = sum(
        any(number < len(row) and strip_cell(row[number]) == strip_cell(cell) for row in body)
        for number, cell in enumerate(head[at]) if strip_cell(cell)
    )  # fmt: skip
    whole = any(list(row) == list(head[at]) for row in body)
    if repeated * 3 >= filled[at] and not whole and body:
        return at, False  # the cells of the first row are values of their columns
    return at, True


def _read_units(layout: Layout, head: Sequence[list[str]], labels: Sequence[str]) -> None:
    """Take a row of units under the header out of the data."""
    after = next((at for at in range(layout.start, len(head)) if _filled(head[at])), None)
    if after is None:
        return
    cells = [strip_cell(cell) for cell in head[after]]
    if not any(cells) or not all(is_unit(cell) for cell in cells if cell):
        return
    layout.start = after + 1
    layout.units = {labels[n] or f"column_{n + 1}": cell.strip("[]()") for n, cell in enumerate(cells) if cell}
    layout.notes.append(
        f"{layout.row_noun.capitalize()} {after + 1} holds units: "
        + ", ".join(f"{name} in {unit}" for name, unit in layout.units.items())[:200] + "."
    )  # fmt: skip


def _with_groups(head: Sequence[list[str]], at: int, labels: list[str], title: list[str]) -> list[str]:
    """Return labels that repeat with the label of their group, where the row above the header groups them.

    A column without a label of its own is named by that row.
    """
    named = [label for label in labels if label]
    if len(set(named)) == len(named) or at == 0 or len(_filled(head[at - 1])) < 2:
        return labels
    group = ""
    joined: list[str] = []
    for number, label in enumerate(labels):
        own = strip_cell(head[at - 1][number]) if number < len(head[at - 1]) else ""
        group = own or group
        joined.append(f"{group} {label}" if named.count(label) > 1 else label or own)
    if title:
        title.pop()
    return joined


def _unique_names(labels: Sequence[str], layout: Layout, *, has_header: bool) -> list[str]:
    """Return distinct names; an empty one is numbered. SQL does not tell upper from lower case."""
    names: list[str] = []
    taken: set[str] = set()
    repeated: list[str] = []
    empty: list[str] = []
    known = {" ".join(label.split()).lower() for label in labels if label}
    for number, label in enumerate(labels, 1):
        base = " ".join(label.split())[:200] or f"column_{number}"
        name, count = base, 1
        while name.lower() in taken or (count > 1 and name.lower() in known):
            count += 1
            name = f"{base}_{count}"
        if count > 1:
            repeated.append(name)
        elif not label:
            empty.append(name)
        taken.add(name.lower())
        names.append(name)
    if not has_header:
        layout.notes.append(f"There is no header; the columns are called {', '.join(names)[:120]}.")
    elif empty:
        layout.notes.append(f"Columns without a name are called {', '.join(empty)[:120]}.")
    if repeated:
        layout.notes.append(f"Columns whose name repeats are called {', '.join(repeated)[:120]}.")
    return names


def parse_lines(lines: Iterable[str], delimiter: str | None = None) -> tuple[Layout, Iterator[list[str]]]:
    """Return the layout of delimited text, and its rows of data. Raises ``LayoutError``, also while rows are read."""
    source = iter(lines)
    sample = list(itertools.islice(source, HEAD_ROWS))
    if sample and re.fullmatch(r"sep=.\s*", sample[0].lstrip("\ufeff"), re.IGNORECASE):
        delimiter = delimiter or sample[0].lstrip("\ufeff")[4]
        sample[0] = "\n"  # a blank line in its place keeps the numbers of the lines
    delimiter = delimiter or find_delimiter(sample)

    rows = _parse(itertools.chain(sample, source), delimiter)
    head = list(itertools.islice(rows, HEAD_ROWS))
    layout = find_layout(head)
    layout.delimiter = "" if delimiter == _NO_DELIMITER else delimiter
    if not layout.delimiter and any(mark in layout.header[0] for mark in _DELIMITERS):
        layout.doubts.append(f"The lines are read as one column, {layout.header[0][:80]!r}; they may hold several.")
    return layout, layout.data(itertools.chain(head[layout.start :], rows))


Cell = str | int | float | bool | dict[str, str] | None
"""A cell of a spreadsheet; a date is an object with ``date`` or ``datetime`` in ISO 8601."""


def parse_cells(rows: Sequence[Sequence[Cell]], first_row: int = 1) -> tuple[Layout, Iterator[list[str]]]:
    """Return the layout of a spreadsheet's cells, and its rows of data as text. Raises ``LayoutError``.

    ``first_row`` is the number of the first row in the sheet.
    """
    blank: list[list[str]] = [[] for _ in range(first_row - 1)]
    texts = [*blank, *([_cell_text(cell) for cell in row] for row in rows)]
    layout = find_layout(texts[: HEAD_ROWS + len(blank)], row_noun="row")
    kinds: dict[int, set[type]] = {}
    for row in rows[max(0, layout.start - len(blank)) :]:
        for number, cell in enumerate(row):
            is_empty = cell is None or (isinstance(cell, str) and strip_cell(cell).lower() in NULL_WORDS)
            if not is_empty:
                kinds.setdefault(number, set()).add(type(cell))
    layout.numeric = frozenset(number for number, found in kinds.items() if found <= {int, float})
    return layout, layout.data(texts[layout.start :])


def _cell_text(cell: Cell) -> str:
    if isinstance(cell, dict):
        return next(iter(cell.values()), "").replace("T", " ")
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return "" if cell is None else str(cell)
