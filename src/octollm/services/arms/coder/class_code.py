"""Writing a class: its tests are a module of the model's, looked at by code before they are believed."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from octollm.contracts.asking import PromptFunction, PromptMessage
from octollm.contracts.operations import ValidateRequest, ValidateResult
from octollm.contracts.task import Check
from octollm.errors import OctoError
from octollm.services.arms.coder import code_prompt
from octollm.services.arms.coder.imports import add_imports
from octollm.services.arms.coder.parse import extract_code, find_definition, format_signature, try_parse
from octollm.services.arms.coder.solution import CodeSolution, OnText, Validate, extract_module, module_name

MAX_CLASS_TOKENS = 700
MIN_ASSERTIONS = 3
_FRESH, _NEW_TESTS, _MENDED = 0.7, 0.5, 0.3
"""Temperatures of a second class, of second tests and of a mended class."""


async def write_class(
    goal: str,
    node: ast.ClassDef,
    code: str,
    base: Sequence[PromptMessage],
    ask: PromptFunction,
    validate: Validate,
    on_text: OnText | None,
) -> CodeSolution:
    """Test the class ``node`` of ``solve_code_goal``, and where its tests fail it, find out which of the two is wrong.

    Tried in turn: a second class written apart, which may pass, or may fail the same few tests, which are then dropped;
    second tests; a mended class. Raises ``OctoError`` (``not_accepted``) with the reasons when nothing passes.
    """
    desk = _ClassSession(goal, node.name, module_name(node.name), ask, validate)
    tests = await desk.write_tests(node, seed=0, temperature=0.0)
    verdict = await desk.validate_tests(code, tests)
    if verdict.is_valid:
        return desk.build_solution(code, tests, verdict, "the tests were written without sight of the code")

    second = extract_module(await ask(base, max_tokens=MAX_CLASS_TOKENS, temperature=_FRESH, seed=1, on_text=on_text))
    if isinstance(find_definition(second, node.name), ast.ClassDef):
        other = await desk.validate_tests(second, tests)
        if other.is_valid:
            return desk.build_solution(second, tests, other, "the tests were written without sight of the code")
        kept = drop_test_methods(tests, _failed_statements(verdict) & _failed_statements(other))
        if kept and _failed_statements(verdict) == _failed_statements(other):
            again = await desk.validate_tests(code, kept)
            if again.is_valid:
                return desk.build_solution(
                    code, kept, again, "tests that two classes written apart both fail were dropped"
                )

    tests = await desk.write_tests(node, seed=2, temperature=_NEW_TESTS)
    verdict = await desk.validate_tests(code, tests)
    if verdict.is_valid:
        return desk.build_solution(code, tests, verdict, "the tests were written without sight of the code")

    messages = code_prompt.repair_messages(base, code, verdict.reasons)
    mended = extract_module(
        await ask(messages, max_tokens=MAX_CLASS_TOKENS, temperature=_MENDED, seed=3, on_text=on_text)
    )
    if isinstance(find_definition(mended, node.name), ast.ClassDef):
        verdict = await desk.validate_tests(mended, tests)
        if verdict.is_valid:
            return desk.build_solution(mended, tests, verdict, "the tests were written without sight of the code")
    raise OctoError(f"No solution was accepted: {' '.join(verdict.reasons)[:900]}", code="not_accepted")


@dataclass(frozen=True, slots=True)
class _ClassSession:
    """What every try for one class shares."""

    goal: str
    name: str
    module: str
    ask: PromptFunction
    validate: Validate

    async def write_tests(self, node: ast.ClassDef, *, seed: int, temperature: float) -> str:
        messages = code_prompt.class_test_messages(self.goal, format_signature(node), self.module)
        answer = await self.ask(messages, max_tokens=MAX_CLASS_TOKENS, temperature=temperature, seed=seed)
        return _import_class(extract_code(answer), self.module, self.name)

    async def validate_tests(self, code: str, tests: str) -> ValidateResult:
        fault = find_test_fault(tests, self.name)
        if fault:
            return ValidateResult(is_valid=False, reasons=(fault,))
        return await self.validate(
            ValidateRequest(
                code=code, filename=f"{self.module}.py", tests=tests, tests_filename=f"test_{self.module}.py"
            )
        )

    def build_solution(self, code: str, tests: str, verdict: ValidateResult, note: str) -> CodeSolution:
        checks = (*verdict.checks, Check("independent", True, note))
        return CodeSolution(f"{self.module}.py", code, f"test_{self.module}.py", tests, checks)


def drop_test_methods(tests: str, statements: frozenset[str]) -> str:
    """Return the tests without the methods that hold any of ``statements``; empty if too few methods would be left."""
    tree = try_parse(tests)
    methods = [
        node
        for node in (ast.walk(tree) if tree else ())
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]
    lines = tests.split("\n")
    blamed = [
        node
        for node in methods
        if any(lines[at].strip() in statements for at in range(node.lineno - 1, node.end_lineno or node.lineno))
    ]
    if not blamed or len(blamed) * 3 > len(methods):
        return ""
    for node in sorted(blamed, key=lambda each: -each.lineno):
        del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(lines)


def _failed_statements(verdict: ValidateResult) -> frozenset[str]:
    """Return the statements of tests that a verdict names."""
    return frozenset(reason.split(" failed: ")[0].removesuffix(" is not so") for reason in verdict.reasons)


def find_test_fault(tests: str, name: str) -> str:
    """Say what is wrong with a test module for ``name``: it must make one and assert several things of it."""
    tree = try_parse(tests)
    if tree is None or not tests.strip():
        return "The tests are not Python."
    made = any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name for n in ast.walk(tree))
    if not made:
        return f"The tests never make a {name}."
    if sum(_is_meaningful_assertion(n) for n in ast.walk(tree)) < MIN_ASSERTIONS:
        return "The tests assert too little."
    return ""


def _is_meaningful_assertion(node: ast.AST) -> bool:
    """Return whether a node is an assertion about something that is computed."""
    if isinstance(node, ast.Assert):
        parts: list[ast.expr] = [node.test]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("assert"):
        parts = list(node.args)
    else:
        return False
    return any(isinstance(n, ast.Call | ast.Attribute | ast.Subscript) for part in parts for n in ast.walk(part))


def _import_class(tests: str, module: str, name: str) -> str:
    """Return the tests with the class imported from its module: no copy of it, nor an import from elsewhere."""
    tree = try_parse(tests)
    if tree is None:
        return tests
    lines = tests.split("\n")
    for node in reversed(tree.body):
        imported = isinstance(node, ast.ImportFrom) and any(alias.name in (name, "*") for alias in node.names)
        if imported or (isinstance(node, ast.ClassDef) and node.name == name):
            del lines[node.lineno - 1 : node.end_lineno]
    return add_imports("\n".join([f"from {module} import {name}", *lines]).strip() + "\n")
