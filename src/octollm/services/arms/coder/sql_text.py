"""SQL as a model writes it: taken out of its answer, with names put right."""

from __future__ import annotations

import re

from octollm.services.arms.coder.describe import TableSchema, find_join_conditions, quote_identifier

MAX_QUERY_CHARS = 4000
_FENCE = re.compile(r"```[ \t]*(?:\w+)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_QUERY_START = re.compile(r"\b(with\s+(?:recursive\s+)?\w+|select)\b", re.IGNORECASE)
_MISSING_COLUMN = re.compile(r'column "?([^"\n]+?)"? (?:not found|that does not exist|cannot be)', re.IGNORECASE)


def extract_query(answer: str) -> str | None:
    """Return the one query of a model's answer, fenced or bare, without its semicolon; ``None`` if there is none."""
    blocks = [block for block in _FENCE.findall(answer) if _QUERY_START.search(block)]
    text = blocks[0] if blocks else answer.replace("```sql", "").replace("```", "")
    text = re.sub(r"--[^\n]*", "", text)
    found = _QUERY_START.search(text)
    if found is None:
        return None
    query = _first_statement(text[found.start() :]).strip()
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
    """Return ``query`` with names put right that a model wrote as one word: ``unit_price`` for "Unit Price"."""
    known = {column.name.lower() for table in tables for column in table.columns}
    for name in {column.name for table in tables for column in table.columns}:
        word = re.sub(r"\W+", "_", name).strip("_").lower()
        if not word or name.isidentifier() or word in known:
            continue
        query = re.sub(
            rf"(?<![\w'\"]){re.escape(word)}(?![\w'\"(])",
            quote_identifier(name).replace("\\", r"\\"),
            query,
            flags=re.IGNORECASE,
        )
    return query


def missing_column_hint(error: str, tables: tuple[TableSchema, ...]) -> str:
    """Say where the column is that a database's error misses, if a table has it; empty otherwise."""
    found = _MISSING_COLUMN.search(error)
    if found is None:
        return ""
    name = found[1].split(".")[-1].lower()
    homes = [table.table for table in tables if any(column.name.lower() == name for column in table.columns)]
    joins = find_join_conditions(tables)
    if not homes:
        return ""
    return f" Column {name} is in table {homes[0]}" + (f"; join it on {joins[0]}." if joins else ".")
