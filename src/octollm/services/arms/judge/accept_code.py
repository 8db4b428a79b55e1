"""Checking code that an arm made: valid by the judge's own run, and with tests that really test it."""

from __future__ import annotations

import ast

from octollm.contracts.operations import ValidateRequest
from octollm.services.arms.judge.syntax import parse_python
from octollm.services.arms.judge.testing import Run
from octollm.services.arms.judge.validate import validate

MIN_ASSERTIONS = 2


async def check_code(texts: dict[str, str], run: Run) -> tuple[list[str], int]:
    """Return the reasons against the Python files ``texts`` (name → text), and how many checks were done."""
    tests = [name for name in texts if name.startswith("test")]
    modules = [name for name in texts if name not in tests]
    if not modules:
        return ["There is no Python file with code among the artifacts."], 1
    if not tests:
        return ["There is no test file among the artifacts."], 1
    reasons: list[str] = []
    checks = 0
    for name in modules:
        own = next((test for test in tests if name.removesuffix(".py") in test), tests[0])
        fault = find_test_weakness(texts[own], name.removesuffix(".py"))
        checks += 2
        if fault:
            reasons.append(fault)
        verdict = await validate(
            ValidateRequest(code=texts[name], filename=name, tests=texts[own], tests_filename=own), run
        )
        reasons.extend(verdict.reasons)
    return reasons, checks


def find_test_weakness(tests: str, module: str) -> str:
    """Say why tests prove nothing of ``module``; empty when they import it and compare several of its results."""
    tree, fault = parse_python(tests, "the tests")
    if tree is None:
        return fault
    names = _imported_names(tree, module)
    if not names:
        return f"The tests do not import {module}."
    made = _derived_names(tree, names)
    held = {ast.unparse(node) for node in ast.walk(tree) if _is_assertion(node) and _reads_any(node, names | made)}
    if len(held) < MIN_ASSERTIONS:
        return f"The tests assert less than {MIN_ASSERTIONS} things of {module}."
    if any(isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in names for n in ast.walk(tree)):
        return f"The tests define what they should import from {module}."
    return ""


def _imported_names(tree: ast.Module, module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.asname or alias.name for alias in node.names if alias.name == module)
    return names


def _derived_names(tree: ast.Module, names: set[str]) -> set[str]:
    """Return the variables and attributes that hold something made with ``names``, by what is read of them."""
    made: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _reads_any(node.value, names | made):
            made.update(ast.unparse(target) for target in node.targets)
        elif isinstance(node, ast.withitem) and node.optional_vars and _reads_any(node.context_expr, names):
            made.add(ast.unparse(node.optional_vars))
    return made


def _is_assertion(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.With):
        return any("assertRaises" in ast.unparse(item.context_expr) for item in node.items)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("assert")


def _reads_any(node: ast.AST, names: set[str]) -> bool:
    return any(
        (isinstance(n, ast.Name) and n.id in names) or (isinstance(n, ast.Attribute) and ast.unparse(n) in names)
        for n in ast.walk(node)
    )
