"""Checks of a query against the words of its question, without a model.

Two drafts of one model may share a wrong reading, so their agreement proves little. A superlative or a comparison of
the question has a direction, and a value or column that it names belongs into the query. Where the query says the
opposite it is rejected; where it says less, its answer is uncertain. The words are English, German, French and Spanish.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from octollm.contracts.operations import ResultSet, format_cell
from octollm.services.arms.coder.query_parts import Direction, Extreme, QueryParts, parse_query
from octollm.services.arms.coder.question_words import (
    AGES,
    ASKS_FOR_LABEL,
    COMPARED,
    COUNTED,
    DURATIONS,
    GENERIC_NAMES,
    LISTS_ALL,
    NEGATION,
    PRICES,
    QUANTITIES,
    SPEEDS,
    SUPERLATIVES,
    WEIGHTS,
    YEARS,
    Superlative,
)
from octollm.services.arms.coder.sql_heuristics import QueryIssue
from octollm.services.arms.coder.table_schema import TableColumn, TableSchema
from octollm.text.lexical import STOP_WORDS, stem


def find_contradictions(goal: str, query: str, table: ResultSet, tables: tuple[TableSchema, ...]) -> list[QueryIssue]:
    """Return where a query does not do what the words of its question say. An empty list is no proof that it does.

    A fatal issue rules the query out. Any other makes its answer uncertain; ``is_note`` marks what a repair of the
    query would not make better.
    """
    parts = parse_query(query)
    question = _Question(goal, tables)
    issues = [
        *_check_superlatives(question, parts, table),
        *_check_comparisons(question, parts),
        *_check_values(question, parts, table),
        *_check_columns(question, parts),
        *_check_counts(question, parts),
    ]
    return list(dict.fromkeys(issues))


class _Question:
    """A question in lower case, and without the names and values of its tables where a word is looked for."""

    def __init__(self, goal: str, tables: tuple[TableSchema, ...]) -> None:
        self.goal = " ".join(goal.split())
        self.tables = tables
        self.columns = {column.name.lower(): column for table in tables for column in table.columns}
        self.values = list(_find_named_values(self.goal, tables))
        plain = self.goal.lower()
        for name in (*(value for value, _ in self.values), *self.columns, *(t.table.lower() for t in tables)):
            for form in dict.fromkeys((name.lower(), name.lower().replace("_", " "))):
                if len(form) > 1:
                    plain = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", "…", plain)
        self.words = plain

    def column_of(self, names: Iterable[str]) -> list[TableColumn]:
        """Return the columns among the names of an expression."""
        return [self.columns[name] for name in names if name in self.columns]


def _find_named_values(goal: str, tables: tuple[TableSchema, ...]) -> Iterable[tuple[str, TableColumn]]:
    """Yield each text value of a column that a question has word for word."""
    for table in tables:
        own = {stem(word) for word in _split_name(table.table)}
        for column in table.columns:
            for value in column.values if column.is_text else ():
                is_word = len(value) > 2 and value.lower() not in STOP_WORDS and any(c.isalpha() for c in value)
                is_name = stem(value.lower()) in own | {stem(word) for word in _split_name(column.name)}
                if is_word and not is_name and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", goal, re.IGNORECASE):
                    yield value, column


def _split_name(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[^\W_\d]+", re.sub(r"(?<=[a-zß-ÿ])(?=[A-Z])", " ", name))]


# Superlatives


def _check_superlatives(question: _Question, parts: QueryParts, table: ResultSet) -> Iterable[QueryIssue]:
    text = question.words
    if all(each.row_count <= 1 for each in question.tables):
        return
    for superlative in SUPERLATIVES:
        match = superlative.pattern.search(text)
        if match is None:
            continue
        text = superlative.pattern.sub("…", text)
        word = match.group()
        wanted = [(extreme, _direction_in(superlative, extreme, question)) for extreme in parts.extremes]
        known = [(extreme, direction) for extreme, direction in wanted if direction and extreme.direction]
        if known and len(known) == len(wanted) and all(extreme.direction != it for extreme, it in known):
            extreme, direction = known[0]
            names = ", ".join(column.name for column in question.column_of(sorted(extreme.names))) or "value"
            side, taken = ("highest", "lowest") if direction == "max" else ("lowest", "highest")
            yield QueryIssue(
                f"The question asks for the {word}, which is the {side} {names}; the query takes the {taken}. "
                f"Use {direction.upper()}(…) or ORDER BY … {'DESC ' if direction == 'max' else ''}LIMIT 1.",
                is_fatal=True,
            )
        elif not wanted and not parts.has_other_extreme and not LISTS_ALL.search(question.words):
            if superlative.is_weak and not parts.is_sorted and table.row_count <= 1:
                continue
            yield QueryIssue(
                f"The question asks for the {word}, but the query takes no highest or lowest value.", is_fatal=True
            )
        elif wanted and (fitting := _other_measure(superlative, [extreme for extreme, _ in wanted], question)):
            yield QueryIssue(f"The question asks for the {word}: compare {fitting}.", is_fatal=True)


def _direction_in(superlative: Superlative, extreme: Extreme, question: _Question) -> Direction | None:
    """Return which side of an expression a superlative means; ``None`` where its columns do not tell."""
    columns = question.column_of(extreme.names)
    direction = superlative.direction
    if superlative.measure == "slowness":
        words = {word for column in columns for word in _split_name(column.name)}
        if words & SPEEDS:
            return _opposite(direction)
        return direction if words & DURATIONS or any(_is_span(column) for column in columns) else None
    if superlative.measure == "age":
        if any(_is_date(column) for column in columns):
            return _opposite(direction)
        return direction if {word for each in columns for word in _split_name(each.name)} & AGES else None
    if superlative.measure == "time":
        return direction if any(_is_date(column) for column in columns) else None
    return direction


def _opposite(direction: Direction) -> Direction:
    return "min" if direction == "max" else "max"


def _is_span(column: TableColumn) -> bool:
    return column.type.upper().startswith(("INTERVAL", "TIME")) and not column.type.upper().startswith("TIMESTAMP")


def _is_date(column: TableColumn) -> bool:
    """Return whether a column holds points in time: dates, or years by name."""
    is_number = not column.is_text and column.type.upper() not in ("BOOLEAN",)
    return column.type.upper().startswith(("DATE", "TIMESTAMP", "TIME")) or (
        is_number and bool(YEARS & set(_split_name(column.name)))
    )


def _other_measure(superlative: Superlative, extremes: Sequence[Extreme], question: _Question) -> str:
    """Return the columns that a superlative is about, when the query compares others; empty when it may be right."""
    named = {"price": PRICES, "weight": WEIGHTS, "age": AGES}.get(superlative.measure, frozenset[str]())
    if superlative.is_weak or (superlative.measure != "time" and not named):
        return ""
    fitting = [
        column
        for column in question.columns.values()
        if (_is_date(column) if superlative.measure == "time" else named & set(_split_name(column.name)))
        or (superlative.measure == "age" and _is_date(column))
    ]
    compared = [question.column_of(extreme.names) for extreme in extremes]
    # A count or an alias without AS has no column: it may be of anything.
    if not fitting or not all(compared) or any(column in fitting for columns in compared for column in columns):
        return ""
    return " or ".join(column.name for column in fitting[:3])


# Comparisons


def _check_comparisons(question: _Question, parts: QueryParts) -> Iterable[QueryIssue]:
    """Yield an issue for each limit of the question that the query compares the other way round."""
    text = question.words
    for sign, pattern in reversed(COMPARED):
        for match in pattern.finditer(text):
            number = _to_number(match["number"])
            signs = {each.sign for each in parts.comparisons if _to_number(each.value) == number} & {
                "<",
                ">",
                "<=",
                ">=",
            }
            # Where the query says NOT, or has the number on both sides, its direction is not told by the sign.
            if number is None or len(signs) != 1 or parts.negates or sign in signs:
                continue
            yield QueryIssue(
                f"The question says “{match.group()}”: that is {sign} {match['number']}, and the query has "
                f"{signs.pop()} {match['number']}.",
                is_fatal=True,
            )
        text = pattern.sub("…", text)


def _to_number(text: str) -> float | None:
    """Return the value of a number however it is grouped; a comma before three digits is no decimal comma."""
    if text in ("zero", "null", "zéro", "cero"):
        return 0.0
    plain = re.sub(r"[.,](?=\d{3}(?:\D|$))", "", text).replace(",", ".")
    try:
        return float(plain)
    except ValueError:
        return None


# Values and columns that the question names


def _check_values(question: _Question, parts: QueryParts, table: ResultSet) -> Iterable[QueryIssue]:
    """Yield an issue for each value of a column that the question names and the query ignores or negates."""
    texts = [text.casefold() for text in parts.texts]
    shown = {format_cell(cell).casefold() for row in table.rows for cell in row}
    for value, column in question.values:
        plain = value.casefold()
        if not any(plain in text or (text.strip("%") and text.strip("%") in plain) for text in texts):
            if plain not in shown:
                yield QueryIssue(
                    f"The question names '{value}' of {column.name}, but the query does not.", is_fatal=True
                )
            continue
        is_negated = [each.sign in ("<>", "!=") for each in parts.comparisons if each.value.casefold() == plain]
        if is_negated and all(is_negated) and not NEGATION.search(question.goal):
            yield QueryIssue(f"The question asks for '{value}', but the query leaves it out.", is_fatal=True)
    if not question.values:
        yield from _check_similar_values(question, parts)


def _check_similar_values(question: _Question, parts: QueryParts) -> Iterable[QueryIssue]:
    """Yield a note on a value that the question has in another form, such as *errors* for ``ERROR``."""
    asked = {stem(word) for word in re.findall(r"[^\W\d_]{3,}", question.words) if word not in STOP_WORDS}
    for table in question.tables:
        for column in table.columns:
            for value in column.values if column.is_text else ():
                if " " in value or stem(value.lower()) not in asked or len(value) < 3:
                    continue
                if not any(value.casefold() in text.casefold() for text in parts.texts):
                    yield QueryIssue(
                        f"The question may mean '{value}' of {column.name}, which the query does not name."
                    )


def _check_columns(question: _Question, parts: QueryParts) -> Iterable[QueryIssue]:
    """Yield an issue for each column that the question names and the query does not read."""
    if parts.selects_all:
        return
    text = question.goal.lower()
    for match in COUNTED.finditer(text):
        text = text.replace(match["noun"], "…")
    own = {word for table in question.tables for word in _split_name(table.table)}
    for name, column in question.columns.items():
        words = _split_name(name)
        if len(name) < 3 or name in parts.names or not words or (len(words) == 1 and words[0] in GENERIC_NAMES | own):
            continue
        if name in {value.lower() for value, _ in question.values}:
            continue
        # A text column is a label: *the slowest boat* need not be named, *which boat* has to be.
        before = ASKS_FOR_LABEL if column.is_text else r"(?<!\w)"
        forms = "|".join(re.escape(form) for form in dict.fromkeys((name, name.replace("_", " "))))
        if re.search(rf"{before}(?:{forms})(?!\w)", text):
            yield QueryIssue(f"The question names the column {column.name}, but the query does not read it.")


def _check_counts(question: _Question, parts: QueryParts) -> Iterable[QueryIssue]:
    """Yield a note where rows were counted although a column has quantities: *how many pipes* has two readings."""
    match = COUNTED.search(question.goal.lower())
    if match is None or "count" not in parts.names or "sum" in parts.names or match["noun"] in ("rows", "zeilen"):
        return
    noun = stem(match["noun"])
    for table in question.tables:
        names = [_split_name(column.name) for column in table.columns]
        # Each row is one of what is counted where it has a number of its own: order_id.
        if any(stem(word) == noun for words in names for word in words):
            continue
        for column, words in zip(table.columns, names, strict=True):
            is_used = column.name.lower() in parts.names - {"count"} or any(
                column.name.lower() in extreme.names for extreme in parts.extremes
            )
            if not column.is_text and QUANTITIES & set(words) and not is_used:
                yield QueryIssue(
                    f"The query counts rows; the column {column.name}, which may say how many, is not added up.",
                    is_note=True,
                )
