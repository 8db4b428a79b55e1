"""Cross-checking: the strategy for small models, whose code and tests are both unreliable.

Differential testing (self-consistency): solutions written apart run on the same examples and on generated inputs, and
one is accepted because two agree, not because one passes tests that may be wrong. Two samples of one model may share a
wrong reading of the goal. Their agreement therefore never outweighs an example of the goal, and the result says where
it has outweighed the model's own.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass, field
from importlib.resources import files

import msgspec

from octollm import FileRef
from octollm.contracts.operations import RunLimits, RunRequest, RunResult, ValidateResult
from octollm.services.arms.coder.examples import (
    Example,
    are_sufficient,
    deduplicate,
    generate_calls,
    parse_examples,
    parse_goal_examples,
)
from octollm.services.arms.coder.python_source import find_definition, format_signature, try_parse
from octollm.services.arms.coder.solution import (
    CodeSolution,
    Validate,
    build_solution,
    example_messages,
    validate_examples,
)
from octollm.services.arms.completion import PromptFunction

Run = Callable[[RunRequest], Awaitable[RunResult]]
"""The executor's ``run``."""

MAX_EXAMPLE_TOKENS = 220
MIN_AGREEMENT = 0.8
"""Share of the generated inputs on which two solutions must give the same output."""
INDEPENDENT_TESTS = "the tests were written without sight of the code"
_NEW_EXAMPLES_SEED = 91
_PROGRAM = "octollm_probe_program.py"
_PROBE_SECONDS = 10.0


@dataclass(slots=True)
class CrossCheck:
    """The solutions of one goal; each new one is compared with those before it."""

    goal: str
    name: str
    ask: PromptFunction
    validate: Validate
    run: Run
    examples: list[Example]
    independent: list[str] = field(default_factory=list[str])
    """Solutions written from the goal alone, without sight of another."""
    passing: list[tuple[str, ValidateResult]] = field(default_factory=list[tuple[str, ValidateResult]])
    """Solutions that pass every example, with the judge's verdict."""

    has_failing_tests: bool = False
    """Whether the tests rejected a solution that parses and runs: evidence that they can tell right from wrong."""

    has_new_examples: bool = False
    """Whether the model's examples were replaced: once at most, or they could be replaced until they fit the code."""

    unvalidated: str | None = None
    """The first solution, until its verdict is needed."""

    def add_first(self, code: str) -> None:
        """Take the first solution, without a verdict.

        Alone it is never accepted, and where the second one passes and agrees with it, its verdict changes nothing. So
        the judge is asked about it only when the second one is not accepted.
        """
        self.independent.append(code)
        self.unvalidated = code

    async def find_fault(self, code: str, seed: int) -> str:
        """Return why a solution cannot be tested, or an empty string. Collects more examples first if there are few."""
        node = find_definition(code, self.name)
        if not isinstance(node, ast.FunctionDef):
            return f"There is no function {self.name} in the answer."
        if not are_sufficient(self.examples):
            more = await collect_examples(self.goal, node, self.ask, seed)
            self.examples = deduplicate([*self.examples, *more])
        return "" if are_sufficient(self.examples) else "The tests are too few to tell right from wrong."

    async def evaluate(self, code: str, *, is_independent: bool) -> tuple[CodeSolution | None, list[str]]:
        """Evaluate one more solution: return the accepted one, or the reasons against this one.

        ``is_independent`` means that it was written from the goal alone, not repaired from another.
        """
        passing = [solution for solution, _ in self.passing]
        rivals = [*passing, *(solution for solution in self.independent if solution not in passing)]
        if is_independent:
            self.independent.append(code)
        is_sound, reasons = await self._validate(code)
        accepted = None
        if is_sound and rivals:
            accepted = await self._find_agreement(code, rivals, is_independent=is_independent)
        if accepted is None:
            await self._validate_first()
        return accepted, reasons

    async def _validate(self, code: str) -> tuple[bool, list[str]]:
        """Record the verdict on a solution; return whether it is a sound program, and the reasons against it."""
        verdict = await validate_examples(code, self.name, self.examples, self.validate)
        if verdict.is_valid and hardcodes_answers(code, self.examples):
            return False, ["The code hard-codes the answers of the tests instead of computing them."]
        if verdict.is_valid:
            self.passing.append((code, verdict))
        elif any(check.name == "tests" for check in verdict.checks):
            # The program runs and the tests reject it, so they can tell right from wrong. From here on a single
            # passing solution is enough.
            self.has_failing_tests = True
        else:
            return False, list(verdict.reasons)
        return True, list(verdict.reasons)

    async def _validate_first(self) -> None:
        """Ask the judge about the first solution, unless that has been done."""
        if self.unvalidated is not None:
            code, self.unvalidated = self.unvalidated, None
            await self._validate(code)

    async def conclude(self) -> CodeSolution | None:
        """Return the solution that passes every example, if there is exactly one.

        Several that passed were compared already without agreement, so none of them can be trusted.
        """
        await self._validate_first()
        if len(self.passing) != 1:
            return None
        code, verdict = self.passing[0]
        return build_solution(code, self.name, self.examples, verdict, INDEPENDENT_TESTS)

    async def _find_agreement(self, code: str, rivals: Sequence[str], *, is_independent: bool) -> CodeSolution | None:
        """Return the solution to accept when ``code`` and one of its rivals give the same outputs, else ``None``."""
        calls = [*self.examples, *(Example(call, "None") for call in generate_calls(self.examples, self.name))]
        result, *rival_results = await probe_solutions([code, *rivals], calls, self.name, self.run)
        for rival, rival_result in zip(rivals, rival_results, strict=True):
            if result is None or rival_result is None:
                continue
            if not solutions_agree(result, rival_result, len(self.examples)):
                continue
            for candidate in (code, rival):
                verdicts = dict(self.passing)
                if candidate not in verdicts and candidate == self.unvalidated:
                    await self._validate_first()
                    verdicts = dict(self.passing)
                if candidate in verdicts:
                    note = "two solutions agree on further inputs"
                    return build_solution(candidate, self.name, self.examples, verdicts[candidate], note)
            # Both fail examples. Only two independent solutions outweigh the tests: a repaired one inherits mistakes.
            if is_independent and rival in self.independent:
                return await self._override_examples(code, result)
        return None

    async def _override_examples(self, code: str, result: SolutionProbe) -> CodeSolution | None:
        """Accept ``code``, which another solution agrees with, although it fails examples that the model wrote.

        A few failed examples are dropped; many are replaced by new ones, once. The goal's own are never overridden.
        """
        outcomes = list(zip(self.examples, result.passed, strict=False))
        if any(example.is_from_goal and not passed for example, passed in outcomes):
            return None
        examples, number = _passing_examples(self.examples, result), len(self.examples)
        note = f"two solutions agree; {number - len(examples)} of the model's {number} examples were dropped"
        if not examples and not self.has_new_examples:
            self.has_new_examples = True
            node = find_definition(code, self.name)
            assert isinstance(node, ast.FunctionDef)
            examples = await collect_examples(self.goal, node, self.ask, seed=_NEW_EXAMPLES_SEED)
            note = f"two solutions agree; the model's first {number} examples were replaced"
        if not are_sufficient(examples) or hardcodes_answers(code, examples):
            return None
        verdict = await validate_examples(code, self.name, examples, self.validate)
        if not verdict.is_valid:
            return None
        return build_solution(code, self.name, examples, verdict, note, is_guess=True)


async def collect_examples(goal: str, node: ast.FunctionDef, ask: PromptFunction, seed: int = 0) -> list[Example]:
    """Return examples of a function: those in the goal, and those that the model derives from its signature."""
    from_goal = parse_goal_examples(goal, node.name, len(node.args.args))
    answer = await ask(
        example_messages(goal, format_signature(node)),
        max_tokens=MAX_EXAMPLE_TOKENS,
        temperature=0.0 if seed == 0 else 0.7,
        seed=seed,
        # Each line stands for itself, and one that was cut is no assertion.
        suffices=bool,
    )
    return deduplicate([*from_goal, *parse_examples(answer, node.name)])


def _passing_examples(examples: list[Example], result: SolutionProbe) -> list[Example]:
    """Return the examples that ``result`` passes if they are sufficient and at least two thirds, else none."""
    passing = [example for example, passed in zip(examples, result.passed, strict=False) if passed]
    return passing if are_sufficient(passing) and len(passing) * 3 >= len(examples) * 2 else []


def solutions_agree(one: SolutionProbe, other: SolutionProbe, examples: int) -> bool:
    """Return whether two solutions gave the same output for every example and for most of the generated calls.

    Most is enough, since a generated input may lie outside what the goal defines. Solutions that raise on every call
    do not agree: any two broken programs would.
    """
    if one.outputs[:examples] != other.outputs[:examples] or all(gave.startswith("raises ") for gave in one.outputs):
        return False
    more = list(zip(one.outputs[examples:], other.outputs[examples:], strict=True))
    return sum(a == b for a, b in more) >= MIN_AGREEMENT * len(more)


def hardcodes_answers(code: str, examples: Sequence[Example]) -> bool:
    """Return whether ``code`` contains the string inputs of most examples: it looks answers up, not computes them."""
    tree = try_parse(code)
    constants: set[str] = set()
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            constants.add(node.value)
    inputs = [
        {n.value for n in ast.walk(ast.parse(e.call)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        for e in examples
    ]
    long = [{text for text in texts if len(text) > 3} for texts in inputs]
    long = [texts for texts in long if texts]
    return len(long) >= 2 and sum(bool(texts & constants) for texts in long) * 2 > len(long)


def drop_test_methods(tests: str, statements: Set[str]) -> str:
    """Return the tests without the methods that contain any of ``statements``.

    Empty when no method does, or more than a third of them: then the class is more likely wrong than its tests.
    """
    tree = try_parse(tests)
    methods = [
        node
        for node in (ast.walk(tree) if tree else ())
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]
    lines = tests.split("\n")
    failed_methods = [
        node
        for node in methods
        if any(
            " ".join((ast.get_source_segment(tests, part) or "").split()) in statements
            or lines[part.lineno - 1].strip().removesuffix(":") in statements
            for part in ast.walk(node)
            if isinstance(part, ast.stmt)
        )
    ]
    if not failed_methods or len(failed_methods) * 3 > len(methods):
        return ""
    for node in sorted(failed_methods, key=lambda each: -each.lineno):
        del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class SolutionProbe:
    """Results of one solution for the examples, in their order: whether each passed, and its output."""

    passed: tuple[bool, ...]
    outputs: tuple[str, ...]


async def probe_solutions(
    solutions: Sequence[str], examples: Sequence[Example], name: str, run: Run
) -> list[SolutionProbe | None]:
    """Return the result of each solution; ``None`` for one that ended the process or exceeded its time.

    Raises what ``run`` raises.
    """
    # Most solutions end: one run serves them all. Where one has no end, or ends the program, those without an outcome
    # run again, each apart, so that it spoils only itself.
    outcomes = await _probe_together(solutions, examples, name, run)
    if len(solutions) == 1:
        return outcomes
    return [
        outcome or (await _probe_together([solution], examples, name, run))[0]
        for solution, outcome in zip(solutions, outcomes, strict=True)
    ]


async def _probe_together(
    solutions: Sequence[str], examples: Sequence[Example], name: str, run: Run
) -> list[SolutionProbe | None]:
    cases = [[example.call, example.expected, example.kind] for example in examples]
    nonce = secrets.token_hex(16)
    # Named by content: a solution cannot guess the name of another to import it.
    modules = [f"candidate_{hashlib.sha256(solution.encode()).hexdigest()[:16]}" for solution in solutions]
    sources = dict(zip(modules, solutions, strict=True))
    result = await run(
        RunRequest(
            language="python",
            command=(_PROGRAM, name, *sources),
            files=(
                *(FileRef(f"{module}.py", text=source) for module, source in sources.items()),
                FileRef("examples.json", text=msgspec.json.encode({"nonce": nonce, "examples": cases}).decode()),
                FileRef(_PROGRAM, text=files(__package__ or "").joinpath("probe_program.py").read_text("utf-8")),
            ),
            limits=RunLimits(wall_seconds=_PROBE_SECONDS),
        )
    )
    report: dict[str, list[tuple[bool, str]]] = {}
    for line in result.stdout.split("\n"):
        if line.startswith(nonce):
            with contextlib.suppress(msgspec.DecodeError):
                report |= msgspec.json.decode(line.removeprefix(nonce).encode(), type=dict[str, list[tuple[bool, str]]])
    return [_to_probe(report.get(module, []), len(examples)) for module in modules]


def _to_probe(rows: Sequence[tuple[bool, str]], examples: int) -> SolutionProbe | None:
    if len(rows) != examples:
        return None
    return SolutionProbe(tuple(row[0] for row in rows), tuple(row[1] for row in rows))
