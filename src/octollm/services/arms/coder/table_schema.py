"""Schemas of tables, and the adaptation of a model's SQL to them.

The executor reports the schema and prompts include it; queries are extracted, and identifiers quoted and checked.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Awaitable, Callable

import msgspec

from octollm import OctoError
from octollm.contracts.operations import Cell, RunResult, format_cell
from octollm.errors import map_exceptions

RunSql = Callable[[str], Awaitable[RunResult]]
"""Run one query over the files of the step; ``stdout`` is a table (``contracts.tables``)."""

DESCRIBE = "--describe"
"""Sent to the executor in place of a query, to get the schema of the tables."""
MAX_JOINS = 6
MAX_COLUMNS = 60
"""Columns in a prompt, over all tables."""
_SHOWN_CHARS = 40
_RESERVED_WORDS = frozenset(
    {"ALL", "ANALYSE", "ANALYZE", "AND", "ANTI", "ANY", "ARRAY", "AS", "ASC", "ASOF", "ASYMMETRIC", "AT",
     "AUTHORIZATION", "BINARY", "BOTH", "BY", "CASE", "CAST", "CHECK", "COLLATE", "COLLATION", "COLUMN",
     "CONCURRENTLY", "CONSTRAINT", "CREATE", "CROSS", "DEFAULT", "DEFERRABLE", "DESC", "DESCRIBE", "DISTINCT", "DO",
     "ELSE", "END", "EXCEPT", "FETCH", "FOR", "FOREIGN", "FREEZE", "FROM", "FULL", "GLOB", "GROUP", "HAVING", "ILIKE",
     "IN", "INITIALLY", "INNER", "INTERSECT", "INTO", "IS", "ISNULL", "JOIN", "LAMBDA", "LATERAL", "LEADING", "LEFT",
     "LIKE", "LIMIT", "NATURAL", "NOT", "NOTNULL", "NULL", "OFFSET", "ON", "ONLY", "OR", "ORDER", "OUTER", "OVERLAPS",
     "PIVOT", "PLACING", "POSITIONAL", "PRIMARY", "QUALIFY", "REFERENCES", "RETURNING", "RIGHT", "SELECT", "SEMI",
     "SHOW", "SIMILAR", "SOME", "SUMMARIZE", "SYMMETRIC", "TABLE", "TABLESAMPLE", "THEN", "TO", "TRAILING", "UNION",
     "UNIQUE", "UNPACK", "UNPIVOT", "USER", "USING", "VARIADIC", "VERBOSE", "WHEN", "WHERE", "WINDOW", "WITH"}
)  # fmt: skip
"""Keywords that must be quoted when they are column names; DuckDB would read USER as a function."""


class TableColumn(msgspec.Struct, frozen=True):
    """A column: ``values`` are its distinct texts if they are few, ``min`` and ``max`` the range of other types."""

    name: str
    type: str
    values: tuple[str, ...] = ()
    min: Cell = None
    max: Cell = None

    @property
    def is_text(self) -> bool:
        """Return whether the column holds text."""
        return self.type.upper().startswith(("VARCHAR", "ENUM"))


class TableSchema(msgspec.Struct, frozen=True):
    """A table under the executor's name for it; ``sample`` has its first rows."""

    table: str
    columns: tuple[TableColumn, ...]
    row_count: int = 0
    sample: tuple[tuple[Cell, ...], ...] = ()


class _Description(msgspec.Struct, frozen=True):
    tables: tuple[TableSchema, ...]
    faults: tuple[str, ...] = ()


def quote_identifier(name: str) -> str:
    """Return ``name`` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


async def describe_tables(run_sql: RunSql) -> tuple[TableSchema, ...]:
    """Ask the executor for the schemas of the tables.

    Raises ``OctoError``: ``file_invalid`` when a file cannot be read as a table, ``peer_protocol``.
    """
    result = await run_sql(DESCRIBE)
    if result.exit_code != 0:
        detail = (result.stderr.strip() or result.reason or "no reason given")[:300]
        raise OctoError(f"The files could not be read as tables: {detail}", code="file_invalid")
    with map_exceptions(
        OctoError("The executor's description of the tables is not understood.", code="peer_protocol"),
        msgspec.DecodeError,
    ):
        description = msgspec.json.decode(result.stdout.encode(), type=_Description)
    if not description.tables or description.faults:
        detail = "; ".join(description.faults)[:300] or "there is none among them"
        raise OctoError(f"The files could not be read as tables: {detail}", code="file_invalid")
    return description.tables


def format_schema(tables: tuple[TableSchema, ...]) -> str:
    """Return a description of the tables for a prompt: one line per column, then the join conditions."""
    lines: list[str] = []
    for table in tables:
        lines.append(f"Table {_identifier(table.table)} ({table.row_count} rows):")
        for number, column in enumerate(table.columns):
            first = next((row[number] for row in table.sample if number < len(row) and row[number] is not None), None)
            lines.append(f"  {_identifier(column.name)} {column.type}{_describe_content(column, first)}")
    lines = lines[: MAX_COLUMNS + len(tables)]
    lines.extend(f"Rows belong together where {join}." for join in find_join_conditions(tables))
    lines.extend(find_parts(tables))
    return "\n".join(lines)


def find_parts(tables: tuple[TableSchema, ...]) -> list[str]:
    """Return a line for each two tables with the same columns: they are parts of one table, such as two months."""
    return [
        f"{one} and {other} have the same columns. All rows of both: (FROM {one} UNION ALL FROM {other})"
        for one, other in (
            (_identifier(first.table), _identifier(second.table))
            for number, first in enumerate(tables)
            for second in tables[number + 1 :]
            if _names(first) == _names(second)
        )
    ][:MAX_JOINS]


def _names(table: TableSchema) -> set[str]:
    return {column.name for column in table.columns}


def find_join_conditions(tables: tuple[TableSchema, ...]) -> list[str]:
    """Return the join conditions of tables: an equality for each column name that two of them share."""
    conditions: list[str] = []
    for number, one in enumerate(tables):
        for other in tables[number + 1 :]:
            same = _names(one) & _names(other) if _names(one) != _names(other) else set[str]()
            conditions.extend(
                f"{_identifier(one.table)}.{_identifier(name)} = {_identifier(other.table)}.{_identifier(name)}"
                for name in sorted(same)
            )
    return conditions[:MAX_JOINS]


def _identifier(name: str) -> str:
    plain = name.isidentifier() and name.isascii() and name.upper() not in _RESERVED_WORDS
    return name if plain else quote_identifier(name)


def _describe_content(column: TableColumn, first: Cell) -> str:
    if column.values:
        return ": " + ", ".join(_quote_literal(value[:_SHOWN_CHARS]) for value in column.values)
    if column.min is not None:
        return f" from {format_cell(column.min)[:_SHOWN_CHARS]} to {format_cell(column.max)[:_SHOWN_CHARS]}"
    return f", e.g. {_quote_literal(format_cell(first)[:_SHOWN_CHARS])}" if first is not None else ""


def _quote_literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


MAX_QUERY_CHARS = 4000
_FENCE = re.compile(r"```[ \t]*(?:\w+)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_QUERY_START = re.compile(r"\b(with\s+(?:recursive\s+)?\w+|select)\b", re.IGNORECASE)
_MISSING_TABLE = re.compile(r'Referenced table "([^"\n]+)" not found', re.IGNORECASE)
_ONLY_SOURCE = re.compile(r'\bFROM\s+("[^"]+"|\w+)(?=\s*(?:$|WHERE\b|GROUP\b|ORDER\b|HAVING\b|LIMIT\b))', re.IGNORECASE)
"""A source without an alias and without another one beside it."""
_MISSING_COLUMN = re.compile(r'column "?([^"\n]+?)"? (?:not found|that does not exist|cannot be)', re.IGNORECASE)


def extract_query(answer: str) -> str | None:
    """Return the first query of a model's answer, fenced or bare, without its semicolon; ``None`` if there is none."""
    blocks = [block for block in _FENCE.findall(answer) if _QUERY_START.search(block)]
    text = blocks[0] if blocks else answer.replace("```sql", "").replace("```", "")
    text = re.sub(r"--[^\n]*", "", text)
    match = _QUERY_START.search(text)
    if match is None:
        return None
    query = _first_statement(text[match.start() :]).strip()
    if not blocks:
        query = query.split("\n\n")[0].strip()
    return query if query and len(query) <= MAX_QUERY_CHARS else None


def _first_statement(text: str) -> str:
    inside: str | None = None
    for at, char in enumerate(text):
        if inside:
            inside = None if char == inside else inside
        elif char in "'\"":
            inside = char
        elif char == ";":
            return text[:at]
    return text


def quote_names(query: str, tables: tuple[TableSchema, ...]) -> str:
    """Return ``query`` with names corrected that a model wrote otherwise.

    ``unit_price`` stands for "Unit Price", and ``Osszeg`` for "Összeg". A date is cast where it is compared by LIKE.
    """
    known = {column.name.lower() for table in tables for column in table.columns}
    for name in sorted({column.name for table in tables for column in table.columns}):
        snake = re.sub(r"\W+", "_", name).strip("_").lower()
        folded = "".join(c for c in unicodedata.normalize("NFKD", snake) if not unicodedata.combining(c))
        for word in dict.fromkeys((snake, folded)):
            if word and word not in known:
                query = _replace_name(query, word, quote_identifier(name))
    for column in (column for table in tables for column in table.columns):
        if column.type.startswith(("DATE", "TIMESTAMP")):
            name = rf'(?:"{re.escape(column.name)}"|(?<![\w"]){re.escape(column.name)})'
            query = re.sub(rf"({name})(\s+(?:not\s+)?i?like\b)", r"CAST(\1 AS VARCHAR)\2", query, flags=re.IGNORECASE)
    return query


def quote_reserved_names(query: str, tables: tuple[TableSchema, ...]) -> str:
    """Return a query that does not parse with the columns quoted that are keywords, such as ``at``."""
    for name in sorted({column.name for table in tables for column in table.columns}):
        if name.upper() in _RESERVED_WORDS:
            query = _replace_name(query, name, quote_identifier(name))
    return query


def _replace_name(query: str, word: str, name: str) -> str:
    """Replace a bare word outside of strings and quoted names; a word before a parenthesis is a function."""
    pieces = re.split(r"""('(?:[^']|'')*'|"[^"]*")""", query)
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w|\()", re.IGNORECASE)
    return "".join(piece if number % 2 else pattern.sub(lambda _: name, piece) for number, piece in enumerate(pieces))


def find_select_list(query: str) -> str:
    """Return what a query selects, up to its FROM."""
    match = re.search(r"\bselect\b(.*?)\bfrom\b", query, re.IGNORECASE | re.DOTALL)
    return match[1] if match else query


def join_missing_table(query: str, error: str, tables: tuple[TableSchema, ...]) -> str:
    """Return a query that names columns of a table that it does not read with that table joined, else unchanged.

    The tables are joined on the only column that they share.
    """
    missing = _MISSING_TABLE.search(error)
    source = _ONLY_SOURCE.search(query)
    if missing is None or source is None:
        return query
    known = {table.table.lower(): table for table in tables}
    other, own = known.get(missing[1].lower()), known.get(source[1].strip('"').lower())
    if other is None or own is None or other is own:
        return query
    shared = _names(own) & _names(other)
    if len(shared) != 1:
        return query
    joined = f"{source[0]} JOIN {quote_identifier(other.table)} USING ({quote_identifier(shared.pop())})"
    return query[: source.start()] + joined + query[source.end() :]


def missing_column_hint(error: str, tables: tuple[TableSchema, ...]) -> str:
    """Return a hint how to reach the table or column of a "not found" error, or an empty string."""
    missing = _MISSING_TABLE.search(error)
    if missing and any(table.table.lower() == missing[1].lower() for table in tables):
        joins = [join for join in find_join_conditions(tables) if f"{missing[1].lower()}." in join.lower()]
        return f" Table {missing[1]} must be joined: JOIN {missing[1]} ON {joins[0]}." if joins else ""
    match = _MISSING_COLUMN.search(error)
    if match is None:
        return ""
    name = match[1].split(".")[-1].lower()
    homes = [table.table for table in tables if any(column.name.lower() == name for column in table.columns)]
    joins = find_join_conditions(tables)
    if not homes:
        return ""
    return f" Column {name} is in table {homes[0]}" + (f"; join it on {joins[0]}." if joins else ".")
