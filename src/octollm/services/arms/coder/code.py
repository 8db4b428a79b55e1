"""Writes Python: asks the model, runs the tests, and repairs with the reasons until a solution is accepted.

This is the plain loop; :mod:`octollm.services.arms.coder.cross_check` decides which solution is accepted.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from octollm import Check, Message, OctoError
from octollm.contracts.operations import ValidateRequest, ValidateResult
from octollm.services.arms.coder.cross_check import (
    INDEPENDENT_TESTS,
    CrossCheck,
    Run,
    collect_examples,
    drop_test_methods,
)
from octollm.services.arms.coder.python_source import (
    add_imports,
    extract_code,
    find_definition,
    find_main_definition,
    format_signature,
    try_parse,
)
from octollm.services.arms.coder.solution import (
    FUNCTION_INSTRUCTION,
    CodeSolution,
    OnText,
    Validate,
    class_test_messages,
    code_messages,
    detect_other_language,
    extract_module,
    find_name_in_goal,
    module_name,
    repair_messages,
)
from octollm.services.arms.completion import PromptFunction, ask_draft

ATTEMPTS = 4
"""Solutions at most: the first, then alternately an independent one and a repaired one."""
MAX_CODE_TOKENS = 600
MAX_CLASS_TOKENS = 700
MIN_ASSERTIONS = 3
_TEMPERATURES = (0.0, 0.7, 0.3, 0.9)
_SECOND_CLASS_TEMPERATURE = 0.7
_SECOND_TESTS_TEMPERATURE = 0.5
_REPAIR_TEMPERATURE = 0.3


async def write_code(
    goal: str,
    ask: PromptFunction,
    validate: Validate,
    run: Run,
    *,
    texts: Sequence[tuple[str, str]] = (),
    reasons: Sequence[str] = (),
    on_text: OnText | None = None,
) -> CodeSolution:
    """Write the code that ``goal`` asks for, with passing tests.

    The tests are derived from the goal alone, so code and tests are independent of each other; a second solution is
    independent of both. A solution is accepted when

    - it passes every example and agrees with another solution on generated inputs; or
    - it agrees with another independent solution but fails examples that the model wrote (never the goal's own): a few
      such examples are dropped, many are replaced once by new ones, which it must pass; or
    - it is the only one that passes every example, and the examples have failed another solution (so they can tell
      right from wrong) or all attempts are used up.

    ``texts`` are (name, text) of input files; ``reasons`` say why an earlier answer was rejected. Raises ``OctoError``:
    ``not_accepted`` with the judge's reasons when nothing is accepted, ``step_stopped`` for a language that is not run
    here; what ``ask``, ``validate`` and ``run`` raise.
    """
    language = detect_other_language(goal)
    if language:
        raise OctoError(f"Only Python can be run and checked here, not {language}.", code="step_stopped")
    base = code_messages(goal, texts, reasons)
    check: CrossCheck | None = None
    previous = ""
    faults: list[str] = []
    for attempt in range(ATTEMPTS):
        # Even attempts repair the last solution; odd ones start over, since only independent solutions can confirm
        # each other.
        is_repair = attempt > 0 and attempt % 2 == 0 and bool(previous) and bool(faults)
        messages = repair_messages(base, previous, faults) if is_repair else base
        answer = await ask_draft(
            ask, messages, max_tokens=MAX_CODE_TOKENS, temperature=_TEMPERATURES[attempt], seed=attempt, on_text=on_text
        )
        code = extract_module(answer)
        if check is None:
            node = _target_definition(goal, code)
            if node is None:
                faults = ["There is no function or class in the answer."]
                base = code_messages(f"{goal}\n{FUNCTION_INSTRUCTION}", texts, reasons)
                continue
            if isinstance(node, ast.ClassDef):
                return await write_class(goal, node, code, base, ask, validate, on_text)
            examples = await collect_examples(goal, node, ask)
            check = CrossCheck(goal, node.name, ask, validate, run, examples)
        fault = await check.find_fault(code, seed=attempt + 1)
        if fault:
            previous, faults = "", [fault]
            continue
        previous = code
        if attempt == 0:
            # The next solution starts over, whatever the judge says of this one.
            check.add_first(code)
            continue
        accepted, faults = await check.evaluate(code, is_independent=not is_repair)
        if not accepted and check.has_failing_tests:
            accepted = await check.conclude()
        if accepted:
            return accepted
    accepted = await check.conclude() if check else None
    if accepted:
        return accepted
    if check and check.passing:
        faults = ["Several solutions pass the tests, but their behaviour differs, so none is returned."]
    raise OctoError(f"No solution was accepted: {' '.join(faults)[:900]}", code="not_accepted")


def _target_definition(goal: str, code: str) -> ast.FunctionDef | ast.ClassDef | None:
    name = find_name_in_goal(goal)
    return (find_definition(code, name) if name else None) or find_main_definition(code)


async def write_class(
    goal: str,
    node: ast.ClassDef,
    code: str,
    base: Sequence[Message],
    ask: PromptFunction,
    validate: Validate,
    on_text: OnText | None,
) -> CodeSolution:
    """Test the class ``node`` of ``code``; where its tests fail, find out whether the class or the tests are wrong.

    The order is: a second, independent class, which passes, or fails the same few tests, which are then dropped; new
    tests; a repaired class. Raises ``not_accepted`` with the reasons when nothing passes.
    """
    session = _ClassSession(goal, node.name, module_name(node.name), ask, validate)
    tests = await session.write_tests(node, seed=0, temperature=0.0)
    verdict = await session.validate_tests(code, tests)
    if verdict.is_valid:
        return session.build_solution(code, tests, verdict, INDEPENDENT_TESTS)

    second = extract_module(
        await ask_draft(
            ask, base, max_tokens=MAX_CLASS_TOKENS, temperature=_SECOND_CLASS_TEMPERATURE, seed=1, on_text=on_text
        )
    )
    if isinstance(find_definition(second, node.name), ast.ClassDef):
        other = await session.validate_tests(second, tests)
        if other.is_valid:
            return session.build_solution(second, tests, other, INDEPENDENT_TESTS)
        failed, failed_by_other = set(verdict.failed_statements), set(other.failed_statements)
        remaining = drop_test_methods(tests, failed & failed_by_other)
        if remaining and failed == failed_by_other:
            retried = await session.validate_tests(code, remaining)
            if retried.is_valid:
                note = "two classes agree; the tests that both fail were dropped"
                return session.build_solution(code, remaining, retried, note, is_guess=True)

    tests = await session.write_tests(node, seed=2, temperature=_SECOND_TESTS_TEMPERATURE)
    verdict = await session.validate_tests(code, tests)
    if verdict.is_valid:
        return session.build_solution(code, tests, verdict, INDEPENDENT_TESTS)

    messages = repair_messages(base, code, verdict.reasons)
    repaired = extract_module(
        await ask_draft(
            ask, messages, max_tokens=MAX_CLASS_TOKENS, temperature=_REPAIR_TEMPERATURE, seed=3, on_text=on_text
        )
    )
    if isinstance(find_definition(repaired, node.name), ast.ClassDef):
        verdict = await session.validate_tests(repaired, tests)
        if verdict.is_valid:
            return session.build_solution(repaired, tests, verdict, INDEPENDENT_TESTS)
    raise OctoError(f"No solution was accepted: {' '.join(verdict.reasons)[:900]}", code="not_accepted")


@dataclass(frozen=True, slots=True)
class _ClassSession:
    """The inputs that every attempt at one class shares."""

    goal: str
    name: str
    module: str
    ask: PromptFunction
    validate: Validate

    async def write_tests(self, node: ast.ClassDef, *, seed: int, temperature: float) -> str:
        messages = class_test_messages(self.goal, format_signature(node), self.module)
        answer = await ask_draft(self.ask, messages, max_tokens=MAX_CLASS_TOKENS, temperature=temperature, seed=seed)
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

    def build_solution(
        self, code: str, tests: str, verdict: ValidateResult, note: str, *, is_guess: bool = False
    ) -> CodeSolution:
        checks = (*verdict.checks, Check("independent", not is_guess, note, checked_by="model"))
        return CodeSolution(f"{self.module}.py", code, f"test_{self.module}.py", tests, checks)


def find_test_fault(tests: str, name: str) -> str:
    """Return the fault of a test module for class ``name``: it must create an instance and assert several times."""
    tree = try_parse(tests)
    if tree is None or not tests.strip():
        return "The tests are not Python."
    is_instantiated = any(
        isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name for n in ast.walk(tree)
    )
    if not is_instantiated:
        return f"The tests never create a {name}."
    if sum(_is_meaningful_assertion(n) for n in ast.walk(tree)) < MIN_ASSERTIONS:
        return "The tests assert too little."
    return ""


def _is_meaningful_assertion(node: ast.AST) -> bool:
    """Return whether a node asserts something about a computed value; ``assert True`` does not."""
    if isinstance(node, ast.Assert):
        parts: list[ast.expr] = [node.test]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("assert"):
        parts = list(node.args)
    else:
        return False
    return any(isinstance(n, ast.Call | ast.Attribute | ast.Subscript) for part in parts for n in ast.walk(part))


def _import_class(tests: str, module: str, name: str) -> str:
    """Return the tests with the class imported from its module; the model's copies and other imports are removed."""
    tree = try_parse(tests)
    if tree is None:
        return tests
    lines = tests.split("\n")
    for node in reversed(tree.body):
        imported = isinstance(node, ast.ImportFrom) and any(alias.name in (name, "*") for alias in node.names)
        if imported or (isinstance(node, ast.ClassDef) and node.name == name):
            del lines[node.lineno - 1 : node.end_lineno]
    return add_imports("\n".join([f"from {module} import {name}", *lines]).strip() + "\n")
