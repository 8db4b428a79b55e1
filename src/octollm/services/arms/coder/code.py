"""Writing code: ask the model, run the tests, repair with the reasons, until the judge accepts a solution."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field

from octollm.contracts.operations import ValidateRequest, ValidateResult
from octollm.contracts.task import Check
from octollm.errors import OctoError
from octollm.services.arms.coder import solution as code_prompt
from octollm.services.arms.coder.cross_check import Run, SolutionProbe, probe_solutions
from octollm.services.arms.coder.examples import (
    Example,
    are_sufficient,
    deduplicate,
    generate_calls,
    parse_examples,
    parse_goal_examples,
    render_tests,
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
    CodeSolution,
    OnText,
    Validate,
    extract_module,
    hardcodes_answers,
    module_name,
)
from octollm.services.arms.completion import PromptFunction, PromptMessage

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
    """Test the class ``node`` of ``code``, and where its tests fail it, find out which of the two is wrong.

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


ATTEMPTS = 4
"""Solutions at most: the first, then in turn a fresh one and a mended one."""
MAX_CODE_TOKENS = 600
MAX_EXAMPLE_TOKENS = 220
MIN_AGREEMENT = 0.8
"""Share of the further inputs on which two solutions must do the same."""
_NEW_EXAMPLES_SEED = 91
_TEMPERATURES = (0.0, 0.7, 0.3, 0.9)


@dataclass(slots=True)
class _CandidatePool:
    """What a goal has come to so far."""

    goal: str
    name: str
    examples: list[Example]
    independent: list[str] = field(default_factory=list[str])
    """Solutions that were written from the goal alone."""
    passing: list[tuple[str, ValidateResult]] = field(default_factory=list[tuple[str, ValidateResult]])
    """Solutions that pass every example, with the judge's verdict."""

    has_failing_tests: bool = False
    """Whether the tests have failed a solution that was otherwise sound."""

    has_new_examples: bool = False
    """Whether the model's examples have been asked for anew."""

    @property
    def module(self) -> str:
        return module_name(self.name)


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
    """Write what ``goal`` asks for, with tests that pass.

    The tests come from the goal alone, so code and tests are two opinions; a second solution is a third. Accepted is

    - a solution that passes every example and does the same as another solution on more inputs made by code; or
    - one that two solutions, written apart, agree on, and that breaks examples of the model (never the goal's): few of
      them are dropped, for many others are asked for once, which it must pass; or
    - the only one that passes every example, once these have shown that they tell right from wrong by failing another
      solution, or after all attempts.

    ``texts`` are (name, text) of files to work from; ``reasons`` say why an earlier answer was refused. Raises
    ``OctoError``: ``not_accepted`` with the judge's reasons when nothing is accepted, and what ``ask``, ``validate``
    and ``run`` raise.
    """
    language = code_prompt.detect_other_language(goal)
    if language:
        raise OctoError(f"Only Python can be run and checked here, not {language}.", code="not_accepted")
    base = code_prompt.code_messages(goal, texts, reasons)
    work: _CandidatePool | None = None
    last, why = "", list[str]()
    for attempt in range(ATTEMPTS):
        mends = attempt > 0 and attempt % 2 == 0 and bool(last) and bool(why)
        messages = code_prompt.repair_messages(base, last, why) if mends else base
        answer = await ask(
            messages, max_tokens=MAX_CODE_TOKENS, temperature=_TEMPERATURES[attempt], seed=attempt, on_text=on_text
        )
        code = extract_module(answer)
        if work is None:
            node = _target_definition(goal, code)
            if node is None:
                why = ["There is no function or class in the answer."]
                base = code_prompt.code_messages(f"{goal}\n{code_prompt.FUNCTION_INSTRUCTION}", texts, reasons)
                continue
            if isinstance(node, ast.ClassDef):
                return await write_class(goal, node, code, base, ask, validate, on_text)
            work = _CandidatePool(goal, node.name, await _collect_examples(goal, node, ask))
        fault = await _find_solution_fault(code, work, ask, seed=attempt + 1)
        if fault:
            last, why = "", [fault]
            continue
        accepted, why = await _evaluate(code, work, ask, validate, run, is_independent=not mends)
        last = code
        if not accepted and work.has_failing_tests:
            accepted = _sole_passing_solution(work)
        if accepted:
            return accepted
    accepted = _sole_passing_solution(work) if work else None
    if accepted:
        return accepted
    if work and work.passing:
        why = ["Several solutions pass the tests, but they do not do the same, so none is given as the answer."]
    raise OctoError(f"No solution was accepted: {' '.join(why)[:900]}", code="not_accepted")


async def _find_solution_fault(code: str, work: _CandidatePool, ask: PromptFunction, seed: int) -> str:
    """Say why a solution cannot be tried; weak examples are asked for again first."""
    node = find_definition(code, work.name)
    if not isinstance(node, ast.FunctionDef):
        return f"There is no function {work.name} in the answer."
    if not are_sufficient(work.examples):
        work.examples = deduplicate([*work.examples, *await _collect_examples(work.goal, node, ask, seed)])
    return "" if are_sufficient(work.examples) else "The tests are too few to tell right from wrong."


def _sole_passing_solution(work: _CandidatePool) -> CodeSolution | None:
    """Return the solution that passes every example, if there is just one."""
    if len(work.passing) != 1:
        return None
    code, verdict = work.passing[0]
    return _build_solution(code, work.examples, work, verdict, "the tests were written without sight of the code")


async def _evaluate(
    code: str, work: _CandidatePool, ask: PromptFunction, validate: Validate, run: Run, *, is_independent: bool
) -> tuple[CodeSolution | None, list[str]]:
    """Judge one more solution beside those before it: what is accepted, or the reasons against this one."""
    verdict = await _validate_examples(code, work.examples, work, validate)
    before = [each for each, _ in work.passing]
    rivals = [*before, *(each for each in work.independent if each not in before)]
    if is_independent:
        work.independent.append(code)
    if verdict.is_valid and hardcodes_answers(code, work.examples):
        return None, ["The code holds the answers of the tests instead of computing them."]
    if verdict.is_valid:
        work.passing.append((code, verdict))
    elif any(check.name == "tests" for check in verdict.checks):
        work.has_failing_tests = True
    else:
        return None, list(verdict.reasons)
    if not rivals:
        return None, list(verdict.reasons)
    return await _find_agreement(code, rivals, work, ask, validate, run, is_independent=is_independent), list(
        verdict.reasons
    )


async def _find_agreement(
    code: str,
    rivals: Sequence[str],
    work: _CandidatePool,
    ask: PromptFunction,
    validate: Validate,
    run: Run,
    *,
    is_independent: bool,
) -> CodeSolution | None:
    """Return what is accepted because a solution and one of its rivals do the same, if that is so."""
    calls = [*work.examples, *(Example(call, "None") for call in generate_calls(work.examples, work.name))]
    mine, *others = await probe_solutions([code, *rivals], calls, work.name, run)
    passed = dict(work.passing)
    for rival, other in zip(rivals, others, strict=True):
        if mine is None or other is None or not solutions_agree(mine, other, len(work.examples)):
            continue
        for each in (code, rival):
            if each in passed:
                return _build_solution(
                    each, work.examples, work, passed[each], "two solutions do the same on more inputs"
                )
        if is_independent and rival in work.independent:
            return await _override_examples(code, mine, work, ask, validate)
    return None


async def _override_examples(
    code: str, mine: SolutionProbe, work: _CandidatePool, ask: PromptFunction, validate: Validate
) -> CodeSolution | None:
    """Return a solution that breaks examples although another one bears it out, if the examples are to blame.

    Few broken ones are dropped; where they are many, others are asked for, once.
    """
    if any(example.is_from_goal and not passed for example, passed in zip(work.examples, mine.passed, strict=False)):
        return None
    kept, number = _passing_examples(work.examples, mine), len(work.examples)
    note = f"two solutions agree; {number - len(kept)} of the model's {number} examples were dropped"
    if not kept and not work.has_new_examples:
        work.has_new_examples = True
        node = find_definition(code, work.name)
        assert isinstance(node, ast.FunctionDef)
        kept = await _collect_examples(work.goal, node, ask, seed=_NEW_EXAMPLES_SEED)
        note = f"two solutions agree; the model's first {number} examples were replaced"
    if not are_sufficient(kept) or hardcodes_answers(code, kept):
        return None
    verdict = await _validate_examples(code, kept, work, validate)
    return _build_solution(code, kept, work, verdict, note) if verdict.is_valid else None


def solutions_agree(one: SolutionProbe, other: SolutionProbe, examples: int) -> bool:
    """Return whether two solutions gave the same for every example and for most of the calls after them."""
    if one.outputs[:examples] != other.outputs[:examples] or all(gave.startswith("raises ") for gave in one.outputs):
        return False
    more = list(zip(one.outputs[examples:], other.outputs[examples:], strict=True))
    return sum(a == b for a, b in more) >= MIN_AGREEMENT * len(more)


def _target_definition(goal: str, code: str) -> ast.FunctionDef | ast.ClassDef | None:
    named = code_prompt.find_name_in_goal(goal)
    return (find_definition(code, named) if named else None) or find_main_definition(code)


async def _collect_examples(goal: str, node: ast.FunctionDef, ask: PromptFunction, seed: int = 0) -> list[Example]:
    given = parse_goal_examples(goal, node.name, len(node.args.args))
    answer = await ask(
        code_prompt.example_messages(goal, format_signature(node)),
        max_tokens=MAX_EXAMPLE_TOKENS,
        temperature=0.0 if seed == 0 else 0.7,
        seed=seed,
    )
    return deduplicate([*given, *parse_examples(answer, node.name)])


async def _validate_examples(
    code: str, examples: list[Example], work: _CandidatePool, validate: Validate
) -> ValidateResult:
    return await validate(
        ValidateRequest(
            code=code,
            filename=f"{work.module}.py",
            tests=render_tests(examples, work.module, work.name) if examples else "",
            tests_filename=f"test_{work.module}.py",
        )
    )


def _passing_examples(examples: list[Example], outcome: SolutionProbe) -> list[Example]:
    """Return the examples that hold, if they are most of them and tell right from wrong."""
    kept = [example for example, passed in zip(examples, outcome.passed, strict=False) if passed]
    return kept if are_sufficient(kept) and len(kept) * 3 >= len(examples) * 2 else []


def _build_solution(
    code: str, examples: list[Example], work: _CandidatePool, verdict: ValidateResult, note: str
) -> CodeSolution:
    checks = [*verdict.checks, Check("independent", True, note)]
    return CodeSolution(
        filename=f"{work.module}.py",
        code=code,
        tests_filename=f"test_{work.module}.py",
        tests=render_tests(examples, work.module, work.name),
        checks=tuple(checks),
    )
