"""More inputs like those of the examples, made by code, to see whether two solutions do the same."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from itertools import pairwise

from octollm.services.arms.coder.examples import Example

MAX_CALLS = 30
_MAX_TEXT = 60
_MAX_ITEMS = 12
_MAX_INT = 1000

InputValue = object


def generate_calls(examples: Sequence[Example], name: str) -> list[str]:
    """Return calls of ``name`` with inputs near those of the examples: between them, put together, cut, mixed.

    They stay near on purpose: what a solution makes of an input that the task never meant says nothing.
    """
    rows = [row for row in (_arguments(example.call, name) for example in examples) if row]
    if not rows:
        return []
    width = max(len(row) for row in rows)
    rows = [row for row in rows if len(row) == width]
    made: list[tuple[InputValue, ...]] = []
    for at in range(width):
        pool = [row[at] for row in rows]
        variants = _nearby_values(pool)
        for number, value in enumerate(variants):
            base = rows[number % len(rows)]
            made.append((*base[:at], value, *base[at + 1 :]))
    if width > 1:
        made.extend((*row[:-1], rows[-1 - number][-1]) for number, row in enumerate(rows))
    known = {example.call for example in examples}
    calls = [f"{name}({', '.join(map(repr, row))})" for row in made]
    return [call for call in dict.fromkeys(calls) if call not in known][:MAX_CALLS]


def _arguments(call: str, name: str) -> tuple[InputValue, ...] | None:
    """Return the plain positional arguments of the call of ``name`` within ``call``."""
    found = [
        node
        for node in ast.walk(ast.parse(call))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]
    if len(found) != 1 or found[0].keywords or not found[0].args:
        return None
    try:
        return tuple(ast.literal_eval(argument) for argument in found[0].args)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _nearby_values(pool: Sequence[InputValue]) -> list[InputValue]:
    """Return new values of the kind that most of ``pool`` are of."""
    ints = [value for value in pool if isinstance(value, int) and not isinstance(value, bool)]
    floats = [value for value in pool if isinstance(value, float)]
    texts = [value for value in pool if isinstance(value, str)]
    lists: list[list[InputValue]] = [list(value) for value in pool if isinstance(value, list)]  # pyright: ignore[reportUnknownArgumentType]
    most = max((ints, floats, texts, lists), key=len)
    if most is ints and ints:
        return _exclude_known(_nearby_ints(ints), pool)
    if most is floats and floats:
        return _exclude_known(((one + other) / 2 for one, other in pairwise(floats)), pool)
    if most is texts and texts:
        return _exclude_known(_nearby_texts(texts), pool)
    return _exclude_known(_nearby_lists(lists), pool) if lists else []


def _nearby_ints(pool: Sequence[int]) -> Iterable[int]:
    low, high = min(pool), min(max(pool), _MAX_INT)
    step = max(1, (high - low) // 12)
    yield from range(low, high + 1, step)
    if low >= 0:
        yield from range(high + 1, high + 13)


def _nearby_texts(pool: Sequence[str]) -> Iterable[str]:
    for one, other in zip(pool, [*pool[1:], pool[0]], strict=True):
        yield (one + other)[:_MAX_TEXT]
        yield one[::-1]
        yield one[: len(one) // 2]


def _nearby_lists(pool: Sequence[list[InputValue]]) -> Iterable[list[InputValue]]:
    ordered = all(_is_sorted(value) for value in pool)
    for one, other in zip(pool, [*pool[1:], pool[0]], strict=True):
        joined = (one + other)[:_MAX_ITEMS]
        if ordered:
            try:
                joined.sort(key=lambda value: value)  # pyright: ignore[reportArgumentType,reportCallIssue]
            except TypeError:
                continue
            yield joined
            continue
        yield joined
        yield one[::-1]
        yield one[: len(one) // 2]


def _is_sorted(values: list[InputValue]) -> bool:
    try:
        return values == sorted(values)  # pyright: ignore[reportArgumentType,reportCallIssue]
    except TypeError:
        return False


def _exclude_known(values: Iterable[InputValue], pool: Sequence[InputValue]) -> list[InputValue]:
    """Return the values once each, those of the pool left out."""
    shown = {repr(value) for value in pool}
    return list({repr(value): value for value in values if repr(value) not in shown}.values())
