"""The columns of a table: which type each has, and what had to be assumed for it.

A raw table holds text alone, in columns ``c0``, ``c1`` and so on. Each column is typed by the shapes of all its texts;
what one column leaves open, the others of the file decide. Nothing is guessed in silence: an assumption says how a text
is read, and one that is not decided says that it may be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from octollm.documents.dates import DateColumn, DateOrder, is_clock, parse_date_shape, read_date_column
from octollm.documents.layout import NULL_WORDS, Layout
from octollm.documents.numbers import (
    ASCII_DIGITS,
    FOREIGN_DIGITS,
    DecimalMark,
    NumberColumn,
    Shape,
    find_common_unit,
    parse_number_shape,
    read_number_column,
)
from octollm.documents.totals import (
    Query,
    check_summary_rows,
    find_summary_rows,
    find_unlabelled_total,
    note_section_rows,
)

MAX_SHAPES = 2000
"""Shapes of a column that are looked at; one with more is text."""
_SAMPLE_ROWS = 2000
_SHAPE_CHARS = 200
_NULL_TEXTS = NULL_WORDS - {"", "na", ".", "?", "nan", "n.a.", "k.a.", "k. a.", "n.v."}
"""Words for an empty cell in a column of text, where NA may be a country and a point a value."""
_BOOLEANS = (
    ("yes", "no"), ("ja", "nein"), ("true", "false"), ("wahr", "falsch"), ("oui", "non"), ("vrai", "faux"),
    ("sí", "no"), ("si", "no"), ("sim", "não"), ("y", "n"), ("j", "n"), ("ja", "nee"), ("tak", "nie"),
)  # fmt: skip
_FOREIGN = frozenset(FOREIGN_DIGITS)
_DATE_NAME = re.compile(
    r"dat[eu]|day|\btag\b|jour|fecha|\bdata\b|valuta|buchung|zeit|time|дата|tarih|日付|日期|날짜|تاريخ", re.IGNORECASE
)
_MARK_NAMES: dict[DecimalMark, str] = {".": "point", ",": "comma"}
_ORDER_NAMES: dict[DateOrder, str] = {"dmy": "day before month", "mdy": "month before day", "ymd": "year first"}


@dataclass(frozen=True, slots=True)
class TableAssumption:
    """How something in a table is read. ``column`` is empty for the whole table.

    ``decided`` is false when the file does not settle it, so that an answer over the column may be wrong.
    """

    text: str
    column: str = ""
    decided: bool = True


@dataclass
class _Column:
    sql: str
    """Its text, with the digits of other scripts in ASCII."""
    name: str
    shapes: list[Shape]
    null_words: list[Shape]
    is_cut: bool
    text: str = ""
    """Its text as it stands in the file, where that differs."""
    is_native: bool = False
    """Whether its numbers are numbers in the file itself."""
    expression: str = ""
    numbers: NumberColumn | None = None
    dates: DateColumn | None = None
    orders: frozenset[DateOrder] = frozenset()
    notes: list[TableAssumption] = field(default_factory=list[TableAssumption])

    def note(self, text: str, *, decided: bool = True) -> None:
        self.notes.append(TableAssumption(f"{self.name}: {text}", self.name, decided))

    def keep_text(self, reason: str, *, decided: bool) -> None:
        self.numbers = self.dates = None
        self.expression = ""
        self.note(f"kept as text: {reason}", decided=decided)


def quote_name(name: str) -> str:
    """Return ``name`` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_text(text: str) -> str:
    """Return ``text`` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def create_typed_table(query: Query, raw: str, target: str, layout: Layout) -> list[TableAssumption]:
    """Create the table ``target`` from the text columns of ``raw``, and return what was assumed.

    ``raw`` and ``target`` are SQL identifiers. Rows of totals are left out where their arithmetic shows what they are.
    """
    left_out: list[int] = []
    notes: list[tuple[str, bool]] = []
    if layout.text_columns is not None:
        columns = _read_columns(query, raw, layout, left_out)
    else:
        summaries = find_summary_rows(query, raw, layout)
        columns = _read_columns(query, raw, layout, summaries)
        left_out, notes = check_summary_rows(query, raw, _find_cells(columns), summaries)
        if not summaries and (found := find_unlabelled_total(query, raw, _find_cells(columns))):
            left_out, notes = [found[0]], [found[1]]
        if left_out != summaries:
            columns = _read_columns(query, raw, layout, left_out)
        note_section_rows(query, raw, layout)
    is_typed = layout.text_columns is not None
    wanted = [each for each in columns if is_typed or each.shapes or each.null_words or each.name in layout.named]
    _create(query, raw, target, wanted, left_out)
    lossy = [column for column in wanted if _keep_lossy_text(query, raw, target, column, left_out)]
    if lossy:
        query(f"DROP TABLE {target}")
        _create(query, raw, target, wanted, left_out)
    assumptions = [TableAssumption(text) for text in layout.notes]
    assumptions += [TableAssumption(text, decided=False) for text in layout.doubts]
    assumptions += [TableAssumption(text, decided=decided) for text, decided in notes]
    return [*assumptions, *(note for column in wanted for note in column.notes)]


def _find_cells(columns: Sequence[_Column]) -> list[tuple[str, str]]:
    """Return the SQL expressions of each column: its text, and its number, which is empty for other columns."""
    return [(column.sql, column.expression if column.numbers else "") for column in columns]


def _create(query: Query, raw: str, target: str, columns: Sequence[_Column], left_out: Sequence[int]) -> None:
    selected = ", ".join(f"{column.expression or _text_sql(column)} AS {quote_name(column.name)}" for column in columns)
    query(f"CREATE TABLE {target} AS SELECT {selected} FROM {raw}{_where(left_out)}")  # noqa: S608


def _where(left_out: Sequence[int]) -> str:
    return f" WHERE rowid NOT IN ({', '.join(map(str, left_out))})" if left_out else ""


def _read_columns(query: Query, raw: str, layout: Layout, left_out: Sequence[int]) -> list[_Column]:
    """Return the columns with their expressions, decided together."""
    source = raw if not left_out else f"(SELECT * FROM {raw}{_where(left_out)})"  # noqa: S608
    ((rows,),) = query(f"SELECT count(*) FROM {raw}")  # noqa: S608
    texts = range(len(layout.header)) if layout.text_columns is None else layout.text_columns
    lengths = query(f"SELECT 0, {', '.join(f'max(strlen(c{n}))' for n in sorted(texts)) or 0} FROM {raw}")[0]  # noqa: S608
    longest = dict(zip(sorted(texts), lengths[1:], strict=False))
    columns = [
        _profile(query, source, f"c{number}", name, int(rows), is_long=(longest[number] or 0) > _SHAPE_CHARS)
        if number in texts
        else _Column(f"c{number}", name, [], [], is_cut=False, expression=f"c{number}")
        for number, name in enumerate(layout.header)
    ]
    for number, column in enumerate(columns):
        column.is_native = number in layout.numeric
        if number in texts:
            _find_kind(query, source, column)
    _decide_numbers(columns, layout)
    _decide_dates(columns, layout)
    for column in columns:
        _note_null_words(column)
    return columns


def _note_null_words(column: _Column) -> None:
    """Leave out the words for an empty cell, and say so."""
    if column.expression and column.null_words:
        column.expression = f"CASE WHEN {_is_null_word(column.sql)} THEN NULL ELSE {column.expression} END"
    known = [shape for shape in column.null_words if column.expression or shape.low.lower() in _NULL_TEXTS]
    if known and column.shapes:
        count = sum(shape.count for shape in known)
        words = ", ".join(repr(shape.low) for shape in known[:4])
        column.note(f"{count} {'cell' if count == 1 else 'cells'} with {words} read as empty")


def _is_null_word(sql: str) -> str:
    return f"lower({sql}) IN ({_listed(NULL_WORDS)})"


def _profile(query: Query, source: str, name: str, label: str, rows: int, *, is_long: bool) -> _Column:
    """Return a column with its shapes; one with the digits of another script as if they were in ASCII."""
    column = _find_shapes(query, source, name, label, rows, is_long=is_long)
    if not any(not shape.high.isascii() and set(shape.high) & _FOREIGN for shape in column.shapes):
        return column
    in_ascii = f"translate({name}, {quote_text(FOREIGN_DIGITS)}, {quote_text(ASCII_DIGITS)})"
    found = _find_shapes(query, source, in_ascii, label, rows, is_long=is_long)
    found.text = name
    return found


def _find_shapes(query: Query, source: str, name: str, label: str, rows: int, *, is_long: bool) -> _Column:
    text = f"left({name}, {_SHAPE_CHARS})" if is_long else name

    def count(where: str) -> list[Shape]:
        found = query(
            f"SELECT translate({text}, '012345678', '999999999') AS s, count(*), min({text}), max({text}) "  # noqa: S608
            f"FROM {source} WHERE {name} IS NOT NULL{where} GROUP BY s ORDER BY 2 DESC, s LIMIT {MAX_SHAPES + 1}"
        )
        return [Shape(str(pattern), int(number), str(low), str(high)) for pattern, number, low, high in found]

    shapes: list[Shape] = []
    is_text = False
    if rows > 4 * _SAMPLE_ROWS:
        # A sample over the whole file says cheaply that a column is text; for all else every row counts.
        sample = [each for each in count(f" AND rowid % {rows // _SAMPLE_ROWS} = 0") if not _is_null(each)]
        is_text = _count_values(sample) * 2 < sum(each.count for each in sample) and len(sample) > 2
    if is_text:
        shapes = count(f" AND {_is_null_word(name)}")
        return _Column(name, label, [Shape("text", 1, "text", "text")], shapes, is_cut=True)
    shapes = count("")
    return _Column(
        name,
        label,
        [shape for shape in shapes if not _is_null(shape)],
        [shape for shape in shapes if _is_null(shape)],
        is_cut=len(shapes) > MAX_SHAPES,
    )


def _is_null(shape: Shape) -> bool:
    return shape.pattern.lower() in NULL_WORDS


def _count_values(shapes: Sequence[Shape]) -> int:
    return sum(shape.count for shape in shapes if parse_number_shape(shape) or parse_date_shape(shape))


def _text_sql(column: _Column) -> str:
    text = column.text or column.sql
    if not any(shape.low.lower() in _NULL_TEXTS for shape in column.null_words):
        return text
    return f"CASE WHEN lower({text}) IN ({_listed(_NULL_TEXTS)}) THEN NULL ELSE {text} END"


def _listed(words: frozenset[str]) -> str:
    return ", ".join(quote_text(word) for word in sorted(words))


def _find_kind(query: Query, source: str, column: _Column) -> None:
    """Decide what kind of values a column holds, from its own texts alone."""
    shapes = column.shapes
    if not shapes:
        return
    if column.is_cut:
        if _count_values(shapes) * 2 > sum(shape.count for shape in shapes):
            column.keep_text("mixed: most values are numbers or dates, but not all", decided=False)
        return
    if column.is_native:
        parsed = [parse_number_shape(shape) for shape in shapes]
        known = tuple(number for number in parsed if number is not None and "." in number.marks)
        if len(known) == len(shapes):
            column.numbers = NumberColumn(known, frozenset((".",)))
            return
    words = {shape.pattern.lower() for shape in shapes}
    pair = next((pair for pair in _BOOLEANS if words == set(pair)), None)
    if pair is None and words in ({"true"}, {"false"}):
        pair = ("true", "false")
    if pair is not None:
        column.expression = f"CASE lower({column.sql}) WHEN '{pair[0]}' THEN true WHEN '{pair[1]}' THEN false END"
        return
    if is_clock(shapes):
        column.expression = f"TRY_CAST({column.sql} AS TIME)"
        return
    dates = read_date_column(shapes, is_named_date=bool(_DATE_NAME.search(column.name)))
    if dates is not None:
        _read_order(query, source, column, dates)
        return
    numbers = read_number_column(shapes)
    if isinstance(numbers, NumberColumn):
        column.numbers = numbers
        return
    _note_why_text(column, numbers)


def _note_why_text(column: _Column, reason: str) -> None:
    """State why a column of numbers or dates stays text; ``reason`` is why it is none of numbers."""
    shapes = column.shapes
    total = sum(shape.count for shape in shapes)
    count = _count_values(shapes)
    if len(find_common_unit(shapes)) > 1:
        column.keep_text(f"numbers with words that may change them, for example {shapes[0].low!r}", decided=False)
    elif count == total:
        column.keep_text(reason, decided="notations" not in reason)
    elif count * 2 >= total:
        odd = next(s for s in shapes if not (parse_number_shape(s) or parse_date_shape(s)))
        column.keep_text(
            f"mixed: {total - count} of {total} values are no numbers or dates, for example {odd.low[:40]!r}",
            decided=False,
        )


def _read_order(query: Query, source: str, column: _Column, dates: DateColumn) -> None:
    """Decide about day and month by the column's own values."""
    column.dates, column.orders = dates, dates.orders
    if dates.is_ambiguous:
        first, second = dates.greatest_sql(column.sql)
        (greatest,) = query(f"SELECT {first}, {second} FROM {source}")  # noqa: S608
        column.orders = dates.narrowed(greatest)
        if not column.orders:
            column.keep_text("some dates have the day first and others the month", decided=False)
            return
    if any(shape.has_offset for shape in dates.shapes):
        ((count, offset),) = query(
            f"SELECT count(DISTINCT o), min(o) FROM (SELECT regexp_extract({column.sql}, "  # noqa: S608
            f"'(Z|UTC|GMT|[+-]\\d\\d:?\\d\\d)$', 1) AS o FROM {source} WHERE {column.sql} IS NOT NULL)"
        )
        if count > 1:
            column.keep_text("times with different UTC offsets", decided=False)
        else:
            column.note(f"times are at the UTC offset {str(offset).replace('Z', '+00:00')}")


def _decide_numbers(columns: Sequence[_Column], layout: Layout) -> None:
    """Decide the decimal marks; an ambiguous column follows the others."""
    proven: set[DecimalMark] = {
        column.numbers.evidence
        for column in columns
        if column.numbers and column.numbers.evidence and not column.is_native
    }
    for column in columns:
        if column.numbers is None:
            continue
        numbers, mark = column.numbers, column.numbers.evidence or "."
        if numbers.is_ambiguous:
            mark = _choose_mark(column, numbers, proven, columns, layout)
        column.expression = numbers.sql(column.sql, mark)
        _note_units(column, numbers, layout)


def _choose_mark(
    column: _Column,
    numbers: NumberColumn,
    proven: set[DecimalMark],
    columns: Sequence[_Column],
    layout: Layout,
) -> DecimalMark:
    example = numbers.example()
    if len(proven) == 1:
        mark = next(iter(proven))
        column.note(
            f"read {example} as {_show_number(example, mark)} (decimal {_MARK_NAMES[mark]} elsewhere in the file)"
        )
        return mark
    likely = numbers.likely_mark
    if proven:
        mark, why = likely or ".", "other columns use both decimal marks"
    elif likely:
        mark, why = likely, "the other numbers of the column make that likely"
    elif layout.delimiter == ";":
        mark, why = ",", "semicolons separate the cells"
    elif any(column.dates and any(shape.mark == "." for shape in column.dates.shapes) for column in columns):
        mark, why = ",", "the dates of the file are written with points"
    else:
        mark, why = ".", "nothing in the file speaks against it"
    readings = " or ".join(_show_number(example, each) for each in (".", ","))
    read = _show_number(example, mark)
    column.note(f"undecided: {example!r} can be {readings}; read as {read}, because {why}", decided=False)
    return mark


def _show_number(text: str, mark: DecimalMark) -> str:
    """Return a number in the English notation, for a reader."""
    digits = re.sub(rf"[^0-9{mark}]", "", text)
    whole, found, places = digits.partition(mark)
    return f"{int(whole or '0'):,}" + (f".{places}" if found else "")


def _note_units(column: _Column, numbers: NumberColumn, layout: Layout) -> None:
    units = numbers.units
    if len(units) > 1:
        column.note(f"different units, {', '.join(units[:6])}, are read as plain numbers", decided=False)
    elif units and any(not shape.unit for shape in numbers.shapes) and units[0] in "%‰":
        column.note(f"some numbers have {units[0]} and some have none; all are read as plain numbers", decided=False)
    elif units == ("%",):
        column.note("percentages: 12.5 % is read as 12.5")
    elif units:
        column.note(f"in {units[0]}")
    elif column.name in layout.units:
        column.note(f"in {layout.units[column.name]}")
    if any(re.search("[Dd][Rr]\\.?$", shape.shape.pattern) for shape in numbers.shapes):
        column.note("Dr is read as negative")


def _decide_dates(columns: Sequence[_Column], layout: Layout) -> None:
    """Decide the order of day and month; an ambiguous column follows the others."""
    dated = [column for column in columns if column.dates]
    proven: set[DateOrder] = {
        next(iter(column.orders))
        for column in dated
        if column.dates and column.dates.is_ambiguous and len(column.orders) == 1
    }
    for column in dated:
        dates = column.dates
        assert dates is not None
        order = next(iter(column.orders))
        if len(column.orders) > 1:
            order = _choose_order(column, dates, proven, columns, layout)
        column.expression = dates.sql(column.sql, order)
        if dates.has_short_year:
            column.note("years of two digits are read as 1969 to 2068")
        constant = next((s for s in dates.shapes if s.may_begin_with_year), None)
        if constant is not None and order == "dmy":
            column.note(f"undecided: {constant.shape.low} may begin with the year; read with the day first",
                        decided=False)  # fmt: skip


def _choose_order(
    column: _Column,
    dates: DateColumn,
    proven: set[DateOrder],
    columns: Sequence[_Column],
    layout: Layout,
) -> DateOrder:
    example = next(shape.shape.low for shape in dates.shapes if "dmy" in shape.orders and "mdy" in shape.orders)
    if len(proven) == 1:
        order = next(iter(proven))
        column.note(f"read {example} with {_ORDER_NAMES[order]} (as in other columns of the file)")
        return order
    units = {unit for other in columns if other.numbers for unit in other.numbers.units}
    order, why = "dmy", "most countries write dates so"
    if any(shape.has_meridiem for shape in dates.shapes) or units & {"$", "US$", "USD"}:
        order, why = "mdy", "am and pm, or US dollars, make that likely"
    elif layout.delimiter == ";" or any(n.numbers and n.numbers.evidence == "," for n in columns):
        why = "the file is written with decimal commas or semicolons"
    column.note(
        f"undecided: {example} has the day or the month first; read with {_ORDER_NAMES[order]}, because {why}",
        decided=False,
    )
    return order


def _keep_lossy_text(query: Query, raw: str, target: str, column: _Column, left_out: Sequence[int]) -> bool:
    """Keep a column as text when one of its values is lost by its type; return whether it is."""
    if not column.expression or not column.shapes:
        return False
    total = sum(shape.count for shape in column.shapes)
    ((count,),) = query(f"SELECT count({quote_name(column.name)}) FROM {target}")  # noqa: S608
    if count == total:
        return False
    ((example,),) = query(
        f"SELECT min({column.sql}) FROM (SELECT * FROM {raw}{_where(left_out)}) WHERE {column.sql} IS NOT NULL "  # noqa: S608
        f"AND NOT {_is_null_word(column.sql)} AND ({column.expression}) IS NULL"
    )
    kind = "date" if column.dates else "number" if column.numbers else "time"
    column.notes.clear()
    column.keep_text(
        f"{total - count} of {total} values are no {kind}, for example {str(example)[:40]!r}", decided=False
    )
    return True
