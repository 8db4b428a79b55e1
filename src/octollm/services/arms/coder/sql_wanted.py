"""What a question wants computed, told by its words: the functions of SQL that an answer cannot do without."""

from __future__ import annotations

import re
from dataclasses import dataclass

from octollm.services.arms.coder.describe import TableSchema


@dataclass(frozen=True, slots=True)
class RequiredFunction:
    """A function that a question ``asks`` for; ``done_by`` is how a query has it, empty where it has other ways."""

    sql: str
    trigger: str
    satisfied_by: str = ""


_REQUIRED_FUNCTIONS = (
    RequiredFunction("COUNT(*)", r"\bhow many (?:rows|records|entries|lines)\b", r"\bcount\s*\("),
    RequiredFunction(
        "COUNT(*)",
        r"\bhow many\b|^\W*(?:(?:what is )?the number of|number of|count)\b",
        r"\b(?:count|sum)\s*\(",
    ),
    RequiredFunction("SUM(…)", r"\b(?:total|sum|altogether|combined)\b", r"\b(?:sum|count)\s*\("),
    RequiredFunction("SUM(…)", r"\btheir (?:total|sum)\b", r"\bsum\s*\("),
    RequiredFunction("AVG(…)", r"\b(?:average|mean)\b", r"\b(?:avg|mean|sum)\s*\("),
    RequiredFunction("MEDIAN(…)", r"\bmedian\b", r"\b(?:median|quantile\w*|percentile\w*)\s*\("),
    RequiredFunction("MAX(…)", r"\b(?:highest|best|maximum|largest|biggest|longest|latest)\b"),
    RequiredFunction("MIN(…)", r"\b(?:lowest|worst|minimum|smallest|shortest|earliest)\b"),
    RequiredFunction(
        "DATE_TRUNC(…)",
        r"\b(?:per|each|every|by) (?P<column>week|month|quarter|year)\b",
        r"\b(?:date_trunc|strftime|extract|date_part|week|month|monthname|quarter|year)\s*\(",
    ),
    RequiredFunction(
        "GROUP BY",
        r"\b(?:per|for (?:each|every)|of (?:each|every)|in each|by each)\b",
        r"\bgroup\s+by\b|\bover\s*\(|\bdistinct\b|\bpivot\b",
    ),
)


def find_required_functions(goal: str, tables: tuple[TableSchema, ...]) -> list[RequiredFunction]:
    """Return what a question wants; a word that is the name of a column asks for nothing."""
    columns = {column.name.lower() for table in tables for column in table.columns}
    found: list[RequiredFunction] = []
    for wanted in _REQUIRED_FUNCTIONS:
        said = re.search(wanted.trigger, goal, re.IGNORECASE)
        if said and (said.groupdict().get("column") or said.group()).lower() not in columns:
            found.append(wanted)
    return found


def required_functions_hint(goal: str, tables: tuple[TableSchema, ...]) -> str:
    """Name what a question wants when it is more than one thing, of which small models forget one; else empty."""
    names = list(dict.fromkeys(wanted.sql for wanted in find_required_functions(goal, tables)))
    return f"The query needs {' and '.join(names)}." if len(names) > 1 else ""
