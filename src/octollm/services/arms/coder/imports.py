"""Adding the imports of the standard library that a model forgot. It is mechanical, so no model is asked."""

from __future__ import annotations

import ast
import builtins
import sys

from octollm.services.arms.coder.parse import try_parse

_MODULE_OF_NAME: dict[str, str] = {
    name: module
    for module, names in {
        "typing": "Any Callable Dict Generic Iterable Iterator List Optional Sequence Set Tuple TypeVar Union",
        "collections": "Counter OrderedDict defaultdict deque namedtuple",
        "itertools": "accumulate chain combinations groupby islice permutations product zip_longest",
        "functools": "cache lru_cache partial reduce wraps",
        "dataclasses": "dataclass field",
        "datetime": "date timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "enum": "Enum",
        "abc": "ABC abstractmethod",
        "pathlib": "Path",
    }.items()
    for name in names.split()
}


def add_imports(code: str) -> str:
    """Return ``solve_code_goal`` with an import for each name that it reads, does not define, and the library is known for."""
    tree = try_parse(code)
    if tree is None:
        return code
    missing = _read_names(tree) - _bound_names(tree) - set(dir(builtins))
    dotted = {n.value.id for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    added: list[str] = []
    for name in missing:
        if name in _MODULE_OF_NAME:
            added.append(f"from {_MODULE_OF_NAME[name]} import {name}")
        elif name in sys.stdlib_module_names and name in dotted:
            added.append(f"import {name}")
    if not added:
        return code
    lines = code.split("\n")
    at = _header_end(tree)
    return "\n".join([*lines[:at], *sorted(added), *([] if _has_import_after(tree, at) else [""]), *lines[at:]])


def _read_names(tree: ast.Module) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _bound_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
    return names


def _header_end(tree: ast.Module) -> int:
    """Return the number of lines of the docstring and ``__future__`` imports."""
    at = 0
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node is tree.body[0]
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not docstring and not future:
            break
        at = node.end_lineno or node.lineno
    return at


def _has_import_after(tree: ast.Module, line: int) -> bool:
    after = [node for node in tree.body if node.lineno > line]
    return bool(after) and isinstance(after[0], ast.Import | ast.ImportFrom)
