"""The parts of a query that its question speaks of: extremes, comparisons, names and texts.

A tokenizer is enough: what it does not understand it leaves out, and no check is made of that.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Direction = Literal["max", "min"]

_TOKEN = re.compile(
    r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|[^\W\d]\w*|\d+(?:\.\d+)?|<=|>=|<>|!=|==|::|[<>=]|[^\s]", re.UNICODE
)
_EXTREME_FUNCTIONS: dict[str, tuple[Direction, int]] = {
    "max": ("max", 0), "min": ("min", 0), "arg_max": ("max", 1), "argmax": ("max", 1), "max_by": ("max", 1),
    "arg_min": ("min", 1), "argmin": ("min", 1), "min_by": ("min", 1),
}  # fmt: skip
"""Functions that pick an extreme, and which argument it is of."""
_OTHER_EXTREMES = frozenset({"mode", "quantile", "quantile_cont", "quantile_disc", "percentile_cont", "rank",
                             "dense_rank", "row_number", "first", "last", "first_value", "last_value", "all", "any",
                             "greatest", "least", "nth_value"})  # fmt: skip
_COMPARISONS = ("<", ">", "<=", ">=", "=", "==", "<>", "!=")
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_NEGATED = frozenset({"-", "/", "abs", "not"})
"""Words and signs that turn or bend the direction of an expression."""
_ORDER_END = frozenset({"limit", "asc", "desc", ",", ")", "nulls", "rows", "range", "offset", "union", "qualify"})


@dataclass(frozen=True, slots=True)
class Extreme:
    """A highest or lowest value that a query takes, and the names in its expression, in lower case.

    ``direction`` is ``None`` for an expression that a sign or a division may turn. ``counts``: it is of a count.
    """

    direction: Direction | None
    names: frozenset[str]
    counts: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """``name sign value`` of a query; the value is a number or a text as it is written."""

    name: str
    sign: str
    value: str


@dataclass(frozen=True, slots=True)
class QueryParts:
    """What a query has. ``names`` are in lower case, ``texts`` are its literals without quotation marks."""

    extremes: tuple[Extreme, ...]
    has_other_extreme: bool
    is_sorted: bool
    comparisons: tuple[Comparison, ...]
    names: frozenset[str]
    texts: tuple[str, ...]
    selects_all: bool
    negates: bool


def parse_query(query: str) -> QueryParts:
    """Return the parts of a query, whatever it is."""
    parts = [_fold(part) for part in _TOKEN.findall(query)]
    aliases = _find_aliases(parts)
    names = {_unquote(part) for part in parts if _is_name(part)}
    return QueryParts(
        extremes=tuple(_find_extremes(parts, aliases)),
        has_other_extreme=bool(_OTHER_EXTREMES.intersection(parts)),
        is_sorted=any(one == "order" and other == "by" for one, other in itertools.pairwise(parts)),
        comparisons=tuple(_find_comparisons(parts)),
        names=frozenset(names),
        texts=tuple(part[1:-1].replace("''", "'") for part in parts if part[0] == "'"),
        selects_all=any(
            part == "*" and before in ("select", ".", "distinct") for before, part in itertools.pairwise(parts)
        ),
        negates=bool({"not", "<>", "!=", "except", "anti"}.intersection(parts)),
    )


def _fold(part: str) -> str:
    return part if part[0] == "'" else part.lower()


def _is_name(part: str) -> bool:
    return part[0] == '"' or part[0].isalpha() or part[0] == "_"


def _unquote(part: str) -> str:
    return part[1:-1].replace('""', '"') if part[0] == '"' else part


def _find_aliases(parts: Sequence[str]) -> dict[str, list[str]]:
    """Return the expression of each ``expression AS alias``."""
    aliases: dict[str, list[str]] = {}
    for at, part in enumerate(parts[:-1]):
        if part != "as" or not _is_name(parts[at + 1]):
            continue
        depth, start = 0, at
        while start > 0:
            before = parts[start - 1]
            depth += (before == ")") - (before == "(")
            if depth < 0 or (depth == 0 and before in (",", "select", "distinct", "from", "join")):
                break
            start -= 1
        aliases.setdefault(_unquote(parts[at + 1]), list(parts[start:at]))
    return aliases


def _find_extremes(parts: Sequence[str], aliases: dict[str, list[str]]) -> list[Extreme]:
    found: list[Extreme] = []
    for at, part in enumerate(parts[:-1]):
        if part in _EXTREME_FUNCTIONS and parts[at + 1] == "(":
            direction, number = _EXTREME_FUNCTIONS[part]
            arguments = _split_arguments(parts, at + 1)
            if number < len(arguments):
                found.append(_to_extreme(direction, arguments[number], aliases))
        elif part == "order" and parts[at + 1] == "by":
            found.extend(_find_ordered(parts, at, aliases))
    return found


def _split_arguments(parts: Sequence[str], opening: int) -> list[list[str]]:
    arguments: list[list[str]] = [[]]
    depth = 0
    for part in parts[opening:]:
        depth += (part == "(") - (part == ")")
        if depth == 0:
            break
        if part == "," and depth == 1:
            arguments.append([])
        elif not (part == "(" and depth == 1 and arguments == [[]]):
            arguments[-1].append(part)
    return arguments


def _find_ordered(parts: Sequence[str], at: int, aliases: dict[str, list[str]]) -> list[Extreme]:
    """Return the extreme of ``ORDER BY … LIMIT``, or of a window that is ordered; a bare order has none."""
    expression: list[str] = []
    depth, end = 0, at + 2
    while end < len(parts) and not (depth == 0 and parts[end] in _ORDER_END):
        depth += (parts[end] == "(") - (parts[end] == ")")
        expression.append(parts[end])
        end += 1
    direction: Direction = "max" if end < len(parts) and parts[end] == "desc" else "min"
    depth = 0
    is_limited = False
    for part in parts[end:]:
        depth += (part == "(") - (part == ")")
        if depth < 0:
            # The end of a window or a subquery.
            is_limited = is_limited or "over" in parts[max(0, at - 12) : at]
            break
        is_limited = is_limited or (depth == 0 and part == "limit")
    return [_to_extreme(direction, expression, aliases)] if is_limited and expression else []


def _to_extreme(direction: Direction, expression: Sequence[str], aliases: dict[str, list[str]]) -> Extreme:
    resolved = _resolve(expression, aliases)
    names = frozenset(_unquote(part) for part in resolved if _is_name(part))
    # An ordinal or a function within may be anything.
    is_clear = not _NEGATED.intersection(resolved) and not (len(resolved) == 1 and resolved[0].isdigit())
    return Extreme(direction if is_clear else None, names, "count" in resolved)


def _resolve(expression: Sequence[str], aliases: dict[str, list[str]]) -> list[str]:
    """Return an expression with its aliases replaced by what they stand for, once."""
    resolved: list[str] = []
    for part in expression:
        name = _unquote(part)
        meaning = aliases.get(name) if _is_name(part) else None
        resolved += meaning if meaning and name not in [_unquote(each) for each in meaning] else [part]
    return resolved


def _find_comparisons(parts: Sequence[str]) -> list[Comparison]:
    found: list[Comparison] = []
    for at, sign in enumerate(parts):
        if sign not in _COMPARISONS or at == 0 or at + 1 >= len(parts):
            continue
        left, right = _operand(parts, at, -1), _operand(parts, at, 1)
        if _is_literal(right) and _is_name(left):
            found.append(Comparison(_unquote(left), sign, right.strip("'")))
        elif _is_literal(left) and _is_name(right):
            found.append(Comparison(_unquote(right), _MIRRORED.get(sign, sign), left.strip("'")))
    return found


def _operand(parts: Sequence[str], at: int, step: int) -> str:
    """Return the operand next to a sign: the name within a function, or a number with its minus sign."""
    part = parts[at + step]
    if step > 0 and part == "-" and at + 2 < len(parts) and parts[at + 2][0].isdigit():
        return "-" + parts[at + 2]
    if step > 0 and part in ("date", "timestamp") and at + 2 < len(parts):
        return parts[at + 2]
    while step < 0 and part == ")" and at > 1:
        at -= 1
        part = parts[at - 1]
    return part


def _is_literal(part: str) -> bool:
    return part[0] == "'" or part.lstrip("-")[:1].isdigit()
