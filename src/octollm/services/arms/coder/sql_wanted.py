"""What a question wants computed, told by its words: the functions of SQL that an answer cannot do without."""

from __future__ import annotations

import re
from dataclasses import dataclass

from octollm.services.arms.coder.describe import TableInfo


@dataclass(frozen=True, slots=True)
class Wanted:
    """A function that a question ``asks`` for; ``done_by`` is how a query has it, empty where it has other ways."""

    sql: str
    asks: str
    done_by: str = ""


_WANTED = (
    Wanted("COUNT(*)", r"\bhow many (?:rows|records|entries|lines)\b", r"\bcount\s*\("),
    Wanted(
        "COUNT(*)",
        r"\bhow many\b|^\W*(?:(?:what is )?the number of|number of|count)\b",
        r"\b(?:count|sum)\s*\(",
    ),
    Wanted("SUM(…)", r"\b(?:total|sum|altogether|combined)\b", r"\b(?:sum|count)\s*\("),
    Wanted("SUM(…)", r"\btheir (?:total|sum)\b", r"\bsum\s*\("),
    Wanted("AVG(…)", r"\b(?:average|mean)\b", r"\b(?:avg|mean|sum)\s*\("),
    Wanted("MEDIAN(…)", r"\bmedian\b", r"\b(?:median|quantile\w*|percentile\w*)\s*\("),
    Wanted("MAX(…)", r"\b(?:highest|best|maximum|largest|biggest|longest|latest)\b"),
    Wanted("MIN(…)", r"\b(?:lowest|worst|minimum|smallest|shortest|earliest)\b"),
    Wanted(
        "DATE_TRUNC(…)",
        r"\b(?:per|each|every|by) (?P<column>week|month|quarter|year)\b",
        r"\b(?:date_trunc|strftime|extract|date_part|week|month|monthname|quarter|year)\s*\(",
    ),
    Wanted(
        "GROUP BY",
        r"\b(?:per|for (?:each|every)|of (?:each|every)|in each|by each)\b",
        r"\bgroup\s+by\b|\bover\s*\(|\bdistinct\b|\bpivot\b",
    ),
)


def wanted_in(goal: str, tables: tuple[TableInfo, ...]) -> list[Wanted]:
    """Return what a question wants; a word that is the name of a column asks for nothing."""
    columns = {column.name.lower() for table in tables for column in table.columns}
    found: list[Wanted] = []
    for wanted in _WANTED:
        said = re.search(wanted.asks, goal, re.IGNORECASE)
        if said and (said.groupdict().get("column") or said.group()).lower() not in columns:
            found.append(wanted)
    return found


def hint(goal: str, tables: tuple[TableInfo, ...]) -> str:
    """Name what a question wants when it is more than one thing, of which small models forget one; else empty."""
    names = list(dict.fromkeys(wanted.sql for wanted in wanted_in(goal, tables)))
    return f"The query needs {' and '.join(names)}." if len(names) > 1 else ""
