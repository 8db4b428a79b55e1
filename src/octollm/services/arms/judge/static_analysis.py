"""What is known of tests from their text: constants, tables of cases, uses of names, and which tests there are."""

from __future__ import annotations

import ast
import builtins
import collections
import datetime
import decimal
import fractions
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

MAX_BITS = 20_000
"""Bits of an integer that is computed."""
MAX_ITEMS = 100_000
"""Items of a sequence that is computed."""


class NotConstantError(Exception):
    """An expression whose value the text alone does not give."""


_LIBRARY: dict[str, object] = {
    "math.pi": math.pi, "math.e": math.e, "math.tau": math.tau, "math.inf": math.inf, "math.nan": math.nan,
    "decimal.Decimal": decimal.Decimal, "fractions.Fraction": fractions.Fraction,
    "datetime.date": datetime.date, "datetime.datetime": datetime.datetime, "datetime.time": datetime.time,
    "datetime.timedelta": datetime.timedelta, "datetime.timezone.utc": datetime.UTC,
    "collections.Counter": collections.Counter, "collections.OrderedDict": collections.OrderedDict,
    "collections.deque": collections.deque,
    **{name: getattr(builtins, name) for name in (
        "set", "frozenset", "float", "int", "str", "bytes", "bytearray", "complex", "list", "tuple", "dict", "range"
    )},
}  # fmt: skip
"""Values and constructors that an expected value may be made with."""
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left / right,
    ast.FloorDiv: lambda left, right: left // right,
    ast.Mod: operator.mod,
    ast.Pow: lambda left, right: left**right,
    ast.BitOr: lambda left, right: left | right,
    ast.BitAnd: lambda left, right: left & right,
    ast.BitXor: lambda left, right: left ^ right,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert, ast.Not: operator.not_,
}  # fmt: skip


def find_library_names(tree: ast.Module) -> dict[str, object]:
    """Return the names by which a module can reach what constants are made with; a name that it stores is none."""
    found = {name: value for name, value in _LIBRARY.items() if "." not in name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                prefix = f"{alias.name}."
                local = f"{alias.asname or alias.name}."
                found |= {local + n.removeprefix(prefix): v for n, v in _LIBRARY.items() if n.startswith(prefix)}
        elif isinstance(node, ast.ImportFrom) and node.module in (
            "math",
            "decimal",
            "fractions",
            "datetime",
            "collections",
        ):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                local = alias.asname or alias.name
                found |= {
                    local + n.removeprefix(whole): v
                    for n, v in _LIBRARY.items()
                    if n == whole or n.startswith(whole + ".")
                }
    stored, _ = name_uses(tree)
    return {name: value for name, value in found.items() if name.split(".")[0] not in stored}


def evaluate_constant(node: ast.expr, library: Mapping[str, object]) -> object:
    """Return the value of an expression of constants. Raises ``NotConstantError``, also for a value too large."""
    try:
        return _evaluate(node, library)
    except NotConstantError:
        raise
    except (ArithmeticError, ValueError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        # What it raises, the tests raise themselves when they run.
        raise NotConstantError from error


def _evaluate(node: ast.expr, library: Mapping[str, object]) -> object:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=elts) | ast.Tuple(elts=elts) | ast.Set(elts=elts):
            values = [_evaluate(each, library) for each in elts]
            return (
                values if isinstance(node, ast.List) else tuple(values) if isinstance(node, ast.Tuple) else set(values)
            )
        case ast.Dict(keys=keys, values=items):
            if None in keys:
                raise NotConstantError
            return {
                _evaluate(key, library): _evaluate(value, library)
                for key, value in zip(keys, items, strict=True)
                if key is not None
            }
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_evaluate(operand, library))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _compute(op, _evaluate(left, library), _evaluate(right, library))
        case ast.Name() | ast.Attribute():
            value = library.get(ast.unparse(node))
            if value is None or callable(value):
                raise NotConstantError
            return value
        case ast.Call(func=func, args=args, keywords=keywords):
            make = library.get(ast.unparse(func))
            if not callable(make):
                raise NotConstantError
            values = [_evaluate(each, library) for each in args]
            named = {keyword.arg or "": _evaluate(keyword.value, library) for keyword in keywords}
            _check_arguments(make, [*values, *named.values()])
            return make(*values, **named)
        case _:
            raise NotConstantError


def _check_arguments(make: object, values: Sequence[object]) -> None:
    for value in values:
        if isinstance(value, range) and len(value) > MAX_ITEMS:
            raise NotConstantError
        # Ten digits of exponent are a number of ten thousand million digits; bytes(n) takes n bytes.
        if make is fractions.Fraction and isinstance(value, str | float | decimal.Decimal):
            raise NotConstantError
        if any(make is kind for kind in (bytes, bytearray, str)) and not isinstance(
            value, list | tuple | range | bytes | str
        ):
            raise NotConstantError


def _compute(op: ast.operator, left: object, right: object) -> object:
    """Compute with bounds: the tests are a stranger's text."""
    if isinstance(op, ast.Mod) and isinstance(left, str | bytes):
        raise NotConstantError
    if isinstance(left, int) and isinstance(right, int):
        bits = max(left.bit_length(), 1) * (abs(right) if isinstance(op, ast.Pow) else 2)
        if bits > MAX_BITS or right.bit_length() > MAX_BITS:
            raise NotConstantError
    if isinstance(op, ast.Pow) and not (isinstance(left, int | float) and isinstance(right, int | float)):
        raise NotConstantError
    if isinstance(op, ast.Mult):
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
                size: int = len(one)  # pyright: ignore[reportUnknownArgumentType]
                if size * other > MAX_ITEMS:
                    raise NotConstantError
    return _BINARY[type(op)](left, right)


NameUses = tuple[dict[str, int], dict[str, list[ast.Name]]]
"""How often each name is stored in a scope, and where it is read."""


def name_uses(scope: ast.AST) -> NameUses:
    """Return how often each name is stored within ``scope``, and where each is read."""
    stored: collections.Counter[str] = collections.Counter()
    loaded: dict[str, list[ast.Name]] = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                loaded.setdefault(node.id, []).append(node)
            else:
                stored[node.id] += 1
        elif isinstance(node, ast.arg):
            stored[node.arg] += 1
        elif isinstance(node, ast.Global | ast.Nonlocal):
            stored.update([*node.names, *node.names])
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node is not scope:
            stored[node.name] += 1
    return dict(stored), loaded


def own_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a scope, but not those of functions and classes in it."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        yield node
        for name in ("body", "orelse", "finalbody"):
            yield from own_statements(getattr(node, name, ()))
        for handler in getattr(node, "handlers", ()):
            yield from own_statements(handler.body)


def find_table(
    loop: ast.For, scope: ast.AST, scope_uses: NameUses, tree: ast.Module, module_uses: NameUses
) -> tuple[ast.expr | None, ast.expr]:
    """Return the constant table that a loop goes over, if there is one, and what each row is bound to.

    The table is written in the loop, or in a variable that nothing else reads.
    """
    table, target = loop.iter, loop.target
    if isinstance(table, ast.Call) and isinstance(table.func, ast.Name) and table.func.id == "enumerate" and table.args:
        if not isinstance(target, ast.Tuple) or len(target.elts) != 2:
            return None, target
        table, target = table.args[0], target.elts[1]
    is_mapping = False
    if isinstance(table, ast.Call) and isinstance(table.func, ast.Attribute) and table.func.attr == "items":
        table, is_mapping = table.func.value, True
    if isinstance(table, ast.Name):
        name = table.id
        # A name that the scope does not store is the module's.
        place, (stored, loaded) = (scope, scope_uses) if name in scope_uses[0] else (tree, module_uses)
        found = [
            node.value
            for node in own_statements(getattr(place, "body", ()))
            if isinstance(node, ast.Assign) and [ast.unparse(each) for each in node.targets] == [name]
        ]
        if stored.get(name) != 1 or len(loaded.get(name, [])) != 1 or not found:
            return None, target
        table = found[0]
    is_table = isinstance(table, ast.Dict) if is_mapping else isinstance(table, ast.List | ast.Tuple)
    starred = isinstance(table, ast.List | ast.Tuple) and any(isinstance(each, ast.Starred) for each in table.elts)
    is_repeated = isinstance(table, ast.Dict) and table_length(table) != len(table.keys)
    return (table if is_table and not starred and not is_repeated else None), target


def table_length(table: ast.expr) -> int:
    """Return how many rows a table has."""
    if isinstance(table, ast.Dict):
        return len({ast.unparse(key) for key in table.keys if key is not None})
    return len(table.elts) if isinstance(table, ast.List | ast.Tuple) else 0


def find_test_bodies(tree: ast.Module) -> Iterator[tuple[list[ast.stmt], int]]:
    """Yield the bodies of the tests that certainly run, and how often; those that may be skipped are left out."""
    if any(isinstance(node, ast.FunctionDef) and node.name == "load_tests" for node in tree.body):
        return
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = {}
    classes: dict[str, ast.ClassDef] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            functions[node.name] = node
        elif isinstance(node, ast.ClassDef) and any(
            "TestCase" in ast.unparse(base) or ast.unparse(base) in classes for base in node.bases
        ):
            classes[node.name] = node
    for node in functions.values():
        times = 1
        for each in node.decorator_list:
            # What `pytest.mark.parametrize` has become.
            is_table = isinstance(each, ast.Call) and ast.unparse(each.func).endswith(".cases") and len(each.args) > 1
            times *= table_length(each.args[1]) if is_table and isinstance(each, ast.Call) else 0
        if node.decorator_list or not node.args.args:
            yield node.body, times
    for each in classes.values():
        set_up = [part for part in each.body if isinstance(part, ast.FunctionDef) and part.name.startswith("setUp")]
        if each.decorator_list or any(is_skip(node) for part in set_up for node in ast.walk(part)):
            continue
        methods = {
            part.name: part
            for part in each.body
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and part.name.startswith("test")
        }
        for method in methods.values():
            if not any(
                "skip" in ast.unparse(each).lower() or "expectedF" in ast.unparse(each)
                for each in method.decorator_list
            ):
                yield method.body, 1


def is_skip(node: ast.AST) -> bool:
    """Return whether a node skips the test that it stands in."""
    return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).split(".")[-1] in (
        "skipTest",
        "SkipTest",
        "skip",
    )


def drop_docstrings(tree: ast.Module) -> None:
    """Remove texts that do nothing: they may name expected values."""
    for node in ast.walk(tree):
        body: list[ast.stmt] | None = getattr(node, "body", None)
        if isinstance(body, list) and not isinstance(node, ast.IfExp | ast.Lambda):
            rest = [
                part
                for part in body
                if not (
                    isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and part.value.value is not ...
                )
            ]
            body[:] = rest or ([] if isinstance(node, ast.Module) else [ast.copy_location(ast.Pass(), body[0])])
