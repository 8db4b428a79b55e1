"""Input/output examples of a function.

They are parsed from the goal and from the model's answer, rendered as unittest cases, and varied into more inputs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from octollm.services.arms.coder.python_source import try_parse

MAX_EXAMPLES = 8
MIN_EXAMPLES = 3
_MAX_CHARS = 200
_ARROW = re.compile(
    r"\s*(?:->|=>|→|⇒|={1,3}|is|gives|returns|should\s+(?:be|return|give)|must\s+(?:be|return|give)|becomes|evaluates\s+to|"
    r"yields)\s*",
    re.IGNORECASE,
)
_RAISES = re.compile(r"^(?:assert\s+)?(?P<call>.+?)\s+(?:raises|raise|→\s*raises)\s+(?P<error>[A-Z]\w+)\W*$")
_BUILTIN_ERRORS = frozenset(
    {"ValueError", "TypeError", "KeyError", "IndexError", "ZeroDivisionError", "ArithmeticError", "LookupError",
     "OverflowError", "RuntimeError", "StopIteration", "AttributeError", "NotImplementedError", "Exception"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """A Python expression ``call`` that must equal the expression ``expected``, or raise the error it names."""

    call: str
    expected: str
    is_from_goal: bool = False
    """Whether the goal itself states it; such an example is never dropped."""
    kind: Literal["equal", "raises"] = "equal"

    def text(self) -> str:
        """Return the example in readable form, such as ``f(2) == 4``."""
        return f"{self.call} {'raises' if self.kind == 'raises' else '=='} {self.expected}"


def parse_examples(answer: str, name: str) -> list[Example]:
    """Return the assertions in a model's answer that compare a call of ``name`` with a value; ignore the others."""
    examples: list[Example] = []
    for raw in answer.replace("```python", "").replace("```", "").split("\n"):
        line = re.sub(r"^\s*(?:\d+[.)]|[-*])\s+", "", raw).strip()
        example = _parse_raising(line, name) or _parse_assertion(line, name)
        if example and len(line) <= _MAX_CHARS:
            examples.append(example)
    return deduplicate(examples)[:MAX_EXAMPLES]


def parse_goal_examples(goal: str, name: str, parameters: int) -> list[Example]:
    """Return the examples that a goal gives: ``f(2) == 4``; with one parameter also ``'a' becomes 'b'``."""
    examples: list[Example] = []
    for match in re.finditer(rf"\b{re.escape(name)}\(", goal):
        call = _expression_prefix(goal[match.start() :], lambda node: _is_call_of(node, name))
        if call:
            examples.extend(_parse_expected(call, goal[match.start() + len(call) :]))
    if parameters == 1 and not examples:
        for match in re.finditer(r"(?<![\w'\"])(?=['\"\[\d-])", goal):
            literal = _expression_prefix(goal[match.start() :], _is_value)
            if literal and not literal.isdigit():
                examples.extend(_parse_expected(f"{name}({literal})", goal[match.start() + len(literal) :]))
    return deduplicate(examples)[:MAX_EXAMPLES]


def deduplicate(examples: list[Example]) -> list[Example]:
    """Return the first example of each call, so that no two contradict each other."""
    return list({example.call: example for example in reversed(examples)}.values())[::-1]


def are_sufficient(examples: list[Example]) -> bool:
    """Return whether examples are enough to tell right from wrong: several, and not all with the same result."""
    return len(examples) >= MIN_EXAMPLES and len({example.expected for example in examples}) > 1


def render_tests(examples: Sequence[Example], module: str, name: str) -> str:
    """Return the examples as the source of a ``unittest`` module, one method each."""
    lines = [
        "import unittest",
        "",
        f"from {module} import {name}",
        "",
        "",
        f"class {_to_camel_case(name)}Test(unittest.TestCase):",
    ]
    for number, example in enumerate(examples, start=1):
        lines.append(f"    def test_{number}(self):")
        if example.kind == "raises":
            lines.extend([f"        with self.assertRaises({example.expected}):", f"            {example.call}"])
        elif _is_float(example.expected):
            lines.append(f"        self.assertAlmostEqual({example.call}, {example.expected}, places=6)")
        else:
            lines.append(f"        self.assertEqual({example.call}, {example.expected})")
        lines.append("")
    return "\n".join([*lines, "", 'if __name__ == "__main__":', "    unittest.main()", ""])


def _parse_assertion(line: str, name: str) -> Example | None:
    tree = try_parse(line.split("  #", maxsplit=1)[0].strip())
    if tree is None or len(tree.body) != 1:
        return None
    statement = tree.body[0]
    test = statement.test if isinstance(statement, ast.Assert) else None
    test = statement.value if isinstance(statement, ast.Expr) else test
    if test is None:
        return None
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and _is_call_of(test.operand, name):
        return Example(ast.unparse(test.operand), "False")
    if _is_call_of(test, name):
        return Example(ast.unparse(test), "True") if isinstance(statement, ast.Assert) else None
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq | ast.Is):
        return None
    left, right = test.left, test.comparators[0]
    if _uses_name(right, name) and not _uses_name(left, name):
        left, right = right, left
    if not _is_call_of(left, name) or not _is_value(right):
        return None
    return Example(ast.unparse(left), ast.unparse(right))


def _parse_raising(line: str, name: str) -> Example | None:
    match = _RAISES.match(line)
    if match is None or match["error"] not in _BUILTIN_ERRORS:
        return None
    tree = try_parse(match["call"])
    if tree is None or len(tree.body) != 1 or not isinstance(tree.body[0], ast.Expr):
        return None
    call = tree.body[0].value
    return Example(ast.unparse(call), match["error"], kind="raises") if _is_call_of(call, name) else None


def _parse_expected(call: str, rest: str) -> list[Example]:
    call = ast.unparse(ast.parse(call, mode="eval"))
    raising = re.match(r"\s*(?:raises|should raise|must raise)\s+(?:an?\s+)?([A-Z]\w+)", rest)
    if raising and raising[1] in _BUILTIN_ERRORS:
        return [Example(call, raising[1], is_from_goal=True, kind="raises")]
    arrow = _ARROW.match(rest)
    value = _expression_prefix(rest[arrow.end() :], _is_value) if arrow else ""
    return [Example(call, ast.unparse(ast.parse(value, mode="eval")), is_from_goal=True)] if value else []


def _expression_prefix(text: str, fits: Callable[[ast.expr], bool]) -> str:
    """Return the shortest prefix of ``text``, ending with a closing bracket or quote, whose expression ``fits``."""
    number = re.match(r"-?\d+(?:\.\d+)?|True|False|None", text)
    ends = [number.end()] if number else [m.end() for m in re.finditer(r"['\")\]}]", text[:_MAX_CHARS])]
    for end in ends:
        tree = try_parse(text[:end])
        if tree and len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr) and fits(tree.body[0].value):
            return text[:end]
    return ""


def _is_call_of(node: ast.AST, name: str) -> bool:
    """Return whether ``node`` calls ``name``, also as an argument of a built-in, or with an attribute or item of it."""
    if isinstance(node, ast.Attribute | ast.Subscript):
        return _is_call_of(node.value, name)
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute):
        return _is_call_of(node.func.value, name)
    wraps = {"list", "sorted", "dict", "set", "tuple", "len", "round", "next", "isinstance", "str"}
    if isinstance(node.func, ast.Name) and node.func.id in wraps and node.args:
        return _is_call_of(node.args[0], name)
    return isinstance(node.func, ast.Name) and node.func.id == name


def _uses_name(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def _is_value(node: ast.AST) -> bool:
    """Return whether ``node`` is a value built from literals and built-in types only."""
    builtin_names = {"set", "frozenset", "dict", "list", "tuple", "float", "range", "True", "False", "None"}
    return all(not isinstance(n, ast.Name) or n.id in builtin_names for n in ast.walk(node)) and not isinstance(
        node, ast.Compare | ast.BoolOp | ast.Lambda
    )


def _is_float(expected: str) -> bool:
    try:
        return isinstance(ast.literal_eval(expected), float)
    except (ValueError, SyntaxError):
        return False


def _to_camel_case(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_")) or "Code"


MAX_CALLS = 30
_MAX_TEXT = 60
_MAX_ITEMS = 12
_MAX_INT = 1000

InputValue = object


def generate_calls(examples: Sequence[Example], name: str) -> list[str]:
    """Return calls of ``name`` with variations of the examples' inputs: interpolated, joined, cut, recombined.

    Inputs stay close to the examples on purpose: the output for an input that the goal does not define proves nothing.
    """
    rows = [row for row in (_arguments(example.call, name) for example in examples) if row]
    if not rows:
        return []
    width = max(len(row) for row in rows)
    rows = [row for row in rows if len(row) == width]
    rows_generated: list[tuple[InputValue, ...]] = []
    for at in range(width):
        pool = [row[at] for row in rows]
        variants = _nearby_values(pool)
        for number, value in enumerate(variants):
            base = rows[number % len(rows)]
            rows_generated.append((*base[:at], value, *base[at + 1 :]))
    if width > 1:
        rows_generated.extend((*row[:-1], rows[-1 - number][-1]) for number, row in enumerate(rows))
    known = {example.call for example in examples}
    calls = [f"{name}({', '.join(map(repr, row))})" for row in rows_generated]
    return [call for call in dict.fromkeys(calls) if call not in known][:MAX_CALLS]


def _arguments(call: str, name: str) -> tuple[InputValue, ...] | None:
    """Return the literal positional arguments of the call of ``name`` within ``call``, or ``None``."""
    calls = [
        node
        for node in ast.walk(ast.parse(call))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]
    if len(calls) != 1 or calls[0].keywords or not calls[0].args:
        return None
    try:
        return tuple(ast.literal_eval(argument) for argument in calls[0].args)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _nearby_values(pool: Sequence[InputValue]) -> list[InputValue]:
    """Return new values of the most frequent type in ``pool``."""
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
    # Sorted in every example means that the goal may require it, as a binary search does.
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
    """Return the distinct values that are not in ``pool``."""
    known = {repr(value) for value in pool}
    return list({repr(value): value for value in values if repr(value) not in known}.values())
