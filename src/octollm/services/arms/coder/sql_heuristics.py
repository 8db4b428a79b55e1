"""Text rules, without a model call, that check the SQL of small models.

They find the SQL functions that a question requires, and issues that make a query implausible.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from octollm.contracts.operations import ResultSet
from octollm.services.arms.coder.table_schema import TableSchema, find_select_list
from octollm.text.lexical import extract_numbers


@dataclass(frozen=True, slots=True)
class RequiredFunction:
    """An SQL function that a question asks for.

    ``trigger`` matches such questions, and ``satisfied_by`` the queries that use it; empty where there are other ways.
    """

    sql: str
    trigger: str
    satisfied_by: str = ""


_REQUIRED_FUNCTIONS = (
    RequiredFunction("COUNT(*)", r"\bhow many (?:rows|records|entries|lines)\b", r"\bcount\s*\("),
    RequiredFunction(
        "COUNT(*)",
        r"\b(?:how many|wie viele|combien d(?:e\b|['’])|cuánt[oa]s)(?: (?P<column>\w+))?|"
        r"^\W*(?:(?:what is )?the number of|number of|count)\b",
        r"\b(?:count|sum)\s*\(",
    ),
    RequiredFunction(
        "SUM(…)",
        r"\b(?:total|sum|altogether|combined|add up|summe|gesamtsumme|insgesamt|en tout|somme|suma)\b",
        r"\b(?:sum|count)\s*\(",
    ),
    RequiredFunction("SUM(…)", r"\b(?:their (?:total|sum)|together)\b", r"\bsum\s*\("),
    RequiredFunction(
        "AVG(…)",
        r"\b(?:average|mean|durchschnitt(?:lich\w*)?|im schnitt|mittelwert|moyenne|en promedio|promedio|de media)\b",
        r"\b(?:avg|mean|sum)\s*\(",
    ),
    RequiredFunction("MEDIAN(…)", r"\b(?:median|médiane|mediana)\b", r"\b(?:median|quantile\w*|percentile\w*)\s*\("),
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
    """Return the functions that a question requires; a word that is also a column's name is not a request."""
    columns = {column.name.lower() for table in tables for column in table.columns}
    required: list[RequiredFunction] = []
    for function in _REQUIRED_FUNCTIONS:
        match = re.search(function.trigger, goal, re.IGNORECASE)
        if match and (match.groupdict().get("column") or match.group()).lower() not in columns:
            required.append(function)
    return required


def required_functions_hint(goal: str, tables: tuple[TableSchema, ...]) -> str:
    """Return a prompt line with the required functions if there are several (small models forget one), else empty."""
    names = list(dict.fromkeys(function.sql for function in find_required_functions(goal, tables)))
    return f"The query needs {' and '.join(names)}." if len(names) > 1 else ""


_COMPARISON = re.compile(
    r"\"?([\w ]+?)\"?\s*\)?\s*(?:=|<>|!=)\s*'((?:[^']|'')*)'|\"?([\w ]+?)\"?\s+(?:not\s+)?in\s*\(([^()]*)\)",
    re.IGNORECASE,
)
_STRING = re.compile(r"'((?:[^']|'')*)'")
_PLAIN_VALUE = re.compile(r"-?\d+(?:\.\d+)?|\d{4}-\d\d-\d\d(?:[ T][\d:.]+)?")
_DATE_EQUALITY = re.compile(r"(?<![<>])=\s*(?:DATE\s*)?'\d{4}-\d\d-\d\d'", re.IGNORECASE)
_DIGITS = re.compile(r"\d+(?:\.\d+)?")
_AFTER_YEAR = re.compile(r"\bafter ((?:19|20)\d\d)\b(?!-)", re.IGNORECASE)
_ASKS_FOR_EACH = re.compile(r"\b(?:each|every|per|by|both)\b", re.IGNORECASE)
_ASKS_FOR_NAME = re.compile(r"\W*(?:which|who|whose)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class QueryIssue:
    """A reason to distrust a query, worded as an instruction to repair it. A fatal one rules the query out.

    A note is told with the answer, and the model is not asked to repair it. ``unknown_value`` is a text that the query
    looks for in a column that never has it.
    """

    text: str
    is_fatal: bool = False
    is_note: bool = False
    unknown_value: str = ""


def find_query_issues(goal: str, query: str, table: ResultSet, tables: tuple[TableSchema, ...]) -> list[QueryIssue]:
    """Return the issues of a query and its rows. An empty list is no proof that the query is right."""
    issues = find_unknown_values(query, tables)
    cells = [cell for row in table.rows for cell in row]
    # Of tables without a row, no rows, NULL and 0 are the right answers.
    has_rows = not tables or any(each.row_count for each in tables)
    if has_rows and not issues and not _has_only_known_values(query, tables):
        # An empty result is suspicious only if a condition may be wrong: with known values it may be the answer.
        if not cells:
            issues.append(QueryIssue("The query gives no rows. Check its conditions.", is_fatal=True))
        elif all(cell is None for cell in cells):
            issues.append(QueryIssue("The query gives only NULL. Check its conditions and columns.", is_fatal=True))
        elif all(cell is None or cell == 0 for cell in cells):
            issues.append(QueryIssue("The query gives only 0. Check its conditions.", is_fatal=True))
    missing = sorted(extract_numbers(goal) - extract_numbers(query) - set(_DIGITS.findall(query)))
    if missing:
        issues.append(QueryIssue(f"The question names {', '.join(missing)}, but the query does not."))
    issues.extend(
        QueryIssue(f"After {year} begins with {int(year) + 1}-01-01.", is_fatal=True)
        for year in _AFTER_YEAR.findall(goal)
        if re.search(rf">=?\s*(?:DATE\s*)?'{year}-01-01'", query, re.IGNORECASE)
    )
    issues.extend(
        QueryIssue(f"The query needs {function.sql} as well.", is_fatal=True)
        for function in find_required_functions(goal, tables)
        if function.satisfied_by and not re.search(function.satisfied_by, query, re.IGNORECASE)
    )
    if (
        table.row_count > 1
        and re.search(r"\bunion\b", query, re.IGNORECASE)
        and not re.search(r"\bgroup\s+by\b", query, re.IGNORECASE)
        and any(
            function.satisfied_by and function.sql != "GROUP BY" for function in find_required_functions(goal, tables)
        )
        and not _ASKS_FOR_EACH.search(goal)
    ):
        issues.append(
            QueryIssue("The question asks for one value of all tables: SELECT … FROM (… UNION ALL …).", is_fatal=True)
        )
    if table.row_count > 1 and (group := find_unselected_group(query)):
        issues.append(QueryIssue(f"The query groups by {group}. Select {group} as well.", is_fatal=True))
    has_text_cell = any(isinstance(cell, str) for cell in cells)
    if cells and not has_text_cell and _ASKS_FOR_NAME.match(goal) and any(c.is_text for t in tables for c in t.columns):
        issues.append(
            QueryIssue("The question asks which one, but the query gives no name. Select the column that names it.")
        )
    return list(dict.fromkeys(issues))


_GROUP = re.compile(r"\bgroup\s+by\s+(\"[^\"]+\"|[\w.]+)\s*(?:$|;|\border\b|\bhaving\b|\blimit\b)", re.IGNORECASE)


def find_unselected_group(query: str) -> str:
    """Return the only column that a query groups by, when its rows do not say which group they are; else empty."""
    match = _GROUP.search(query)
    if match is None or match[1].isdigit() or len(re.findall(r"\bselect\b", query, re.IGNORECASE)) > 1:
        return ""
    name = match[1].split(".")[-1].strip('"')
    selected = find_select_list(query)
    return (
        ""
        if "*" in re.sub(r"count\s*\(\s*\*\s*\)", "", selected, flags=re.IGNORECASE)
        or re.search(rf"(?<!\w){re.escape(name)}(?!\w)", selected, re.IGNORECASE)
        else match[1]
    )


def _has_only_known_values(query: str, tables: tuple[TableSchema, ...]) -> bool:
    """Return whether a query has a condition, and each text in it is a known value of a column, a number or a date.

    Equality with a date does not count: the question may mean a whole month or year.
    """
    if _DATE_EQUALITY.search(query):
        return False
    known = {value for table in tables for column in table.columns for value in column.values}
    literals = [literal.replace("''", "'") for literal in _STRING.findall(query)]
    compares = bool(re.search(r"\bwhere\b|\bfilter\b", query, re.IGNORECASE))
    return compares and all(literal in known or _PLAIN_VALUE.fullmatch(literal) for literal in literals)


def find_unknown_values(query: str, tables: tuple[TableSchema, ...]) -> list[QueryIssue]:
    """Return an issue for each text value that a query compares with a column that never contains it."""
    known: dict[str, set[str]] = {}
    for table in tables:
        for column in table.columns:
            if column.values:
                known.setdefault(column.name.lower(), set()).update(column.values)
    issues: list[QueryIssue] = []
    for one, value, several, values in _COMPARISON.findall(query):
        name = (one or several).split()[-1].lower() if (one or several).split() else ""
        name = name if name in known else (one or several).strip().lower()
        for literal in [value] if one else _STRING.findall(values):
            if name in known and literal.replace("''", "'") not in known[name] and literal:
                listed = ", ".join(f"'{each}'" for each in sorted(known[name])[:12])
                text = f"Column {name} never is '{literal}'; it is one of {listed}."
                issues.append(QueryIssue(text, is_fatal=True, unknown_value=literal.replace("''", "'")))
    return issues
