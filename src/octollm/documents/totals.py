"""Rows of a table that are no data although they stand among it: totals, subtotals, averages and headings of sections.

A total is known by its label and by arithmetic. What only looks like one is kept, and stated as undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from octollm.documents.layout import Layout, is_summary_label

Query = Callable[[str], Sequence[Sequence[Any]]]
"""Runs one SQL statement on DuckDB and returns its rows."""

MAX_SUMMARIES = 200
"""Rows with the label of a total that are looked at."""
_MIN_SUMMED_ROWS = 3
"""Rows above a total without a known label; the sum of two numbers may stand below them by chance."""
_LABEL_COLUMNS = 4
"""Columns from the left in which the label of a total can stand."""


def note_section_rows(query: Query, raw: str, layout: Layout) -> None:
    """State that rows with their first cell alone are counted as data; such a row may head a section."""
    width = len(layout.header)
    if width < 3:
        return
    others = " AND ".join(f"c{number} IS NULL" for number in range(1, width))
    ((count, first),) = query(f"SELECT count(*), min(c0) FROM {raw} WHERE c0 IS NOT NULL AND {others}")  # noqa: S608
    if count:
        verb = "has" if count == 1 else "have"
        layout.doubts.append(
            f"{count} {'row' if count == 1 else 'rows'} {verb} a first cell alone, for example {str(first)[:40]!r}; "
            "each is kept as data, but may head a section."
        )


def find_summary_rows(query: Query, raw: str, layout: Layout) -> list[int]:
    """Return the rows that may be totals: by their label, or as the last row without a key."""
    found: set[int] = set()
    exact: set[int] = set()
    for number in range(min(_LABEL_COLUMNS, len(layout.header))):
        # A coarse filter first: the words of labels begin so in every language that is known.
        rows = query(
            f"SELECT rowid, c{number} FROM {raw} WHERE regexp_matches(c{number}, "  # noqa: S608
            "'^(?i)(Σ|grand|overall|sub|sous|tot|gesamt|insgesamt|zwischen|end|sum|som|average|mean|mittel|durch|moy|"
            "medi|prom|celk|souč|yht|i alt|razem|ogół|össz|ukup|skup|spolu|kokku|iš|kop|toplam|genel|σύν|итого|всего|"
            "сумм|разом|усього|общо|укуп|合|总|總|小計|小计|総|합|총|소|المج|الإج|סה|סך|รวม|tổng|jum|कुल"
            f")') AND length(c{number}) < 80 LIMIT {MAX_SUMMARIES * 10}"
        )
        found.update(int(row) for row, text in rows if is_summary_label(str(text)))
        exact.update(int(row) for row, text in rows if is_summary_label(str(text), exactly=True))
    if found:
        # A merchant's name may begin with "Total"; the row of a total has fewer cells than the others.
        filled = " + ".join(f"(c{number} IS NOT NULL)::INT" for number in range(len(layout.header)))
        sparse = query(
            f"SELECT rowid FROM {raw} WHERE {filled} < (SELECT median({filled}) FROM {raw}) "  # noqa: S608
            f"AND rowid IN ({', '.join(map(str, sorted(found)))})"
        )
        found = exact | {int(row) for (row,) in sparse}
    if len(found) > MAX_SUMMARIES:
        layout.doubts.append(f"{len(found)} rows have labels of totals; all of them are kept as data.")
        return []
    if len(layout.header) > 1 and not found:
        last = query(f"SELECT rowid FROM {raw} WHERE c0 IS NULL ORDER BY rowid DESC LIMIT 2")  # noqa: S608
        ((count,),) = query(f"SELECT count(*) FROM {raw}")  # noqa: S608
        if len(last) == 1 and int(last[0][0]) == int(count) - 1:
            found.add(int(count) - 1)
    return sorted(found)


def check_summary_rows(
    query: Query, raw: str, columns: Sequence[tuple[str, str]], summaries: Sequence[int]
) -> tuple[list[int], list[tuple[str, bool]]]:
    """Return the rows that are totals, and statements on them, each with whether it is decided.

    ``columns`` are the SQL expressions of each column: its text, and its number, which is empty for other columns.
    """
    left_out: list[int] = []
    notes: list[tuple[str, bool]] = []
    if not summaries:
        return left_out, notes
    numeric = [number for _, number in columns if number]
    others = [not number for _, number in columns]
    ((count,),) = query(f"SELECT count(*) FROM {raw}")  # noqa: S608
    for row in summaries:
        cells = query(f"SELECT {', '.join(text for text, _ in columns)} FROM {raw} WHERE rowid = {row}")[0]  # noqa: S608
        shown = " ".join(str(cell) for cell in cells if cell is not None)[:80]
        texts = sum(is_text and cell is not None for is_text, cell in zip(others, cells, strict=True))
        is_sparse = texts <= 1 and sum(others) > 1
        holds = _is_arithmetic(query, raw, numeric, row, summaries) if numeric else False
        if holds:
            left_out.append(row)
            notes.append((f"The row {shown!r} is a total and left out.", True))
        elif is_sparse or (row == int(count) - 1 and texts <= 1):
            if texts:
                left_out.append(row)
                text = f"The row {shown!r} is labelled as a total and left out, but is no sum of the rows."
                notes.append((text, False))
        elif texts and is_summary_label(str(next(cell for cell in cells if cell is not None))):
            text = f"The row {shown!r} may be a total, but is no sum; it is kept."
            notes.append((text, False))
    return left_out, notes


def find_unlabelled_total(
    query: Query, raw: str, columns: Sequence[tuple[str, str]]
) -> tuple[int, tuple[str, bool]] | None:
    """Return the last row and a statement when it is a total in a language whose labels are not known.

    It has fewer cells than the others, at most one text, and each of its numbers is the sum of those above it.
    """
    numeric = [number for _, number in columns if number]
    ((count,),) = query(f"SELECT count(*) FROM {raw}")  # noqa: S608
    row = int(count) - 1
    if not numeric or row < _MIN_SUMMED_ROWS or len(columns) == 1:
        return None
    filled = " + ".join(f"({text} IS NOT NULL)::INT" for text, _ in columns)
    ((own, usual),) = query(
        f"SELECT (SELECT {filled} FROM {raw} WHERE rowid = {row}), (SELECT median({filled}) FROM {raw})"  # noqa: S608
    )
    if own is None or own >= usual:
        return None
    cells = query(f"SELECT {', '.join(text for text, _ in columns)} FROM {raw} WHERE rowid = {row}")[0]  # noqa: S608
    texts = sum(not number and cell is not None for (_, number), cell in zip(columns, cells, strict=True))
    values = query(f"SELECT {', '.join(numeric)} FROM {raw} WHERE rowid = {row}")[0]  # noqa: S608
    sums = query(f"SELECT {', '.join(f'sum({each})::DOUBLE' for each in numeric)} FROM {raw} WHERE rowid < {row}")[0]  # noqa: S608
    pairs = [(value, total) for value, total in zip(values, sums, strict=True) if value is not None]
    if texts > 1 or not any(value for value, _ in pairs) or not all(_is_near(value, total) for value, total in pairs):
        return None
    shown = " ".join(str(cell) for cell in cells if cell is not None)[:80]
    return row, (f"The row {shown!r} is the sum of the rows above it and left out.", True)


def _is_near(value: Any, total: Any) -> bool:
    return total is not None and abs(float(value) - float(total)) <= max(0.0051, 1e-9 * abs(float(total)))


def _is_arithmetic(query: Query, raw: str, numeric: Sequence[str], row: int, summaries: Sequence[int]) -> bool:
    """Say whether a row's numbers are the sums or averages of the rows before it, or of its section."""
    before = [each for each in summaries if each < row]
    values = ", ".join(numeric)
    own = query(f"SELECT {values} FROM {raw} WHERE rowid = {row}")[0]  # noqa: S608
    if all(value in (None, 0) for value in own):
        return False
    for start in dict.fromkeys((0, *(each + 1 for each in before[-1:]))):
        rest = ", ".join(map(str, summaries))
        sums = ", ".join(f"sum({each})::DOUBLE, avg({each}), count(*)" for each in numeric)
        found = query(
            f"SELECT {sums} FROM {raw} WHERE rowid >= {start} AND rowid < {row} AND rowid NOT IN ({rest})"  # noqa: S608
        )[0]
        matched = False
        for number, value in enumerate(own):
            total, mean, rows = found[3 * number : 3 * number + 3]
            if value in (None, 0) or total is None or rows < 2:
                continue
            if any(_is_near(value, each) for each in (total, mean)):
                matched = True
        if matched:
            return True
    return False
