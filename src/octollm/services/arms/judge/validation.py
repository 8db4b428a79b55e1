"""Validates code: syntax, then pyflakes, then its tests in the sandbox.

The first stage that fails gives the reasons.
"""

from __future__ import annotations

import ast
import asyncio
import json
import secrets
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files

from pyflakes import checker, messages

from octollm import Check, FileRef
from octollm.contracts.operations import RunLimits, RunRequest, RunResult, ValidateRequest, ValidateResult
from octollm.services.arms.judge.instrumentation import instrument
from octollm.services.arms.judge.observations import ENDED_EARLY, Verdict, judge_report

MAX_CODE_CHARS = 200_000
"""Characters of one file; a longer one is rejected."""


def parse_python(code: str, filename: str) -> tuple[ast.Module | None, str]:
    """Return the syntax tree of ``code``, or ``None`` and the reason."""
    if len(code) > MAX_CODE_CHARS:
        return None, f"{filename} is longer than {MAX_CODE_CHARS} characters."
    if not code.strip():
        return None, f"{filename} is empty."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(code, filename=filename)
            compile(tree, filename, "exec", dont_inherit=True)
    except SyntaxError as error:
        line = (error.text or "").strip()[:120]
        at = f" at line {error.lineno}" if error.lineno else ""
        return None, f"Syntax error in {filename}{at}: {error.msg}" + (f": {line}" if line else "")
    except (ValueError, RecursionError, MemoryError) as error:
        return None, f"{filename} cannot be compiled: {str(error)[:200] or type(error).__name__}"
    return tree, ""


MAX_LINT_REASONS = 5
_LINT_ERRORS = (
    messages.UndefinedName,
    messages.UndefinedLocal,
    messages.UndefinedExport,
    messages.DuplicateArgument,
    messages.ReturnOutsideFunction,
    messages.YieldOutsideFunction,
    messages.ContinueOutsideLoop,
    messages.BreakOutsideLoop,
    messages.TwoStarredExpressions,
    messages.TooManyExpressionsInStarredAssignment,
    messages.RaiseNotImplemented,
    messages.ForwardAnnotationSyntaxError,
    messages.StringDotFormatMissingArgument,
    messages.PercentFormatPositionalCountMismatch,
    messages.PercentFormatMissingArgument,
)


def lint(tree: ast.Module, filename: str) -> list[str]:
    """Return the errors that pyflakes finds, without its style warnings, by line, at most ``MAX_LINT_REASONS``."""
    messages = [
        message for message in checker.Checker(tree, filename=filename).messages if isinstance(message, _LINT_ERRORS)
    ]
    messages.sort(key=lambda message: message.lineno)
    texts = [f"Line {m.lineno} of {filename}: {m.message % m.message_args}" for m in messages]
    return list(dict.fromkeys(texts))[:MAX_LINT_REASONS]


Run = Callable[[RunRequest], Awaitable[RunResult]]
"""The executor's ``run``."""
Validate = Callable[[ValidateRequest], Awaitable[ValidateResult]]
"""Validates code, and its tests if it has any."""

TESTING_PROGRAM = "octollm_testing_program.py"
TEST_PAYLOAD = "octollm_tests.json"
TEST_SECONDS = 10.0
"""Wall time of one run of the tests."""
TEST_OUTPUT_BYTES = 1024 * 1024
"""Bytes of the report and of what the code prints past it."""
MAX_REASON_CHARS = 300
_NONCE_BYTES = 16


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """Result of a test run: the number of tests, the reasons why they failed, and what the evidence is worth."""

    ran: int
    reasons: tuple[str, ...]
    detail: str = ""
    failed_statements: tuple[str, ...] = ()


async def run_tests(request: ValidateRequest, run: Run) -> SuiteResult:
    """Run the tests of ``request`` with the executor, and compare its observations. A run without a test has failed.

    The expected values stay in this process (:mod:`octollm.services.arms.judge.instrumentation`). Raises what ``run``
    raises.
    """
    nonce = secrets.token_hex(_NONCE_BYTES)
    control = (f"test_{secrets.token_hex(_NONCE_BYTES)}", secrets.token_hex(_NONCE_BYTES))
    try:
        # In a thread: long tests take a while.
        tests = await asyncio.to_thread(instrument, request.tests, control)
    except RecursionError:
        return SuiteResult(0, (f"{request.tests_filename} is nested too deeply.",))
    payload = {
        "module": request.tests_filename.removesuffix(".py"),
        "filename": request.tests_filename,
        "tests": tests.program,
        "nonce": nonce,
    }
    result = await run(
        RunRequest(
            language="python",
            command=(TESTING_PROGRAM, TEST_PAYLOAD),
            files=(
                FileRef(request.filename, text=request.code),
                FileRef(TEST_PAYLOAD, text=json.dumps(payload)),
                FileRef(TESTING_PROGRAM, text=_read_program()),
            ),
            limits=RunLimits(wall_seconds=TEST_SECONDS, output_bytes=TEST_OUTPUT_BYTES),
        )
    )
    if result.reason == "timeout":
        return SuiteResult(0, ("The tests did not end in time: look for a loop without an end.",))
    if result.reason:
        return SuiteResult(0, (f"The tests were stopped by a limit: {result.reason}.",))
    verdict = judge_report(result.stdout, nonce, tests, control)
    reasons = [reason[:MAX_REASON_CHARS] for reason in verdict.reasons]
    if reasons and reasons[0].startswith(ENDED_EARLY):
        last = (result.stderr.strip().split("\n") or [""])[-1][:MAX_REASON_CHARS]
        reasons[0] = f"{reasons[0]} {last}".strip()
    if not reasons and verdict.ran == 0:
        reasons.append("There are no tests: none was run.")
    return SuiteResult(
        verdict.ran,
        tuple(dict.fromkeys(reasons)),
        _describe_evidence(verdict),
        tuple(dict.fromkeys(verdict.failed_statements)),
    )


def _describe_evidence(verdict: Verdict) -> str:
    """Say how many tests passed, and how many of their assertions only the sandbox has checked."""
    inside, compared = verdict.compared_inside, verdict.compared
    if not compared:
        return f"{verdict.ran} passed; they compare nothing that can be checked outside the sandbox"
    if not inside:
        return f"{verdict.ran} passed"
    share = "all assertions" if inside == compared else f"{inside} of {compared} assertions"
    return f"{verdict.ran} passed; {share} checked inside the sandbox only"


def _read_program() -> str:
    return files(__package__ or "").joinpath("testing_program.py").read_text("utf-8")


PYTHON_NAMES = frozenset({"python", "python3", "py"})


async def validate(request: ValidateRequest, run: Run) -> ValidateResult:
    """Validate code, and run its tests if it has any. Only ``run`` executes code.

    Languages other than Python are not valid. Raises what ``run`` raises.
    """
    if request.language.strip().lower() not in PYTHON_NAMES:
        return _rejection((), "language", [f"Only Python can be checked here, not {request.language[:40]}."])
    passed: list[Check] = []
    parts = [(request.code, request.filename)]
    if request.tests.strip():
        parts.append((request.tests, request.tests_filename))
    trees = [(parse_python(text, name), name) for text, name in parts]
    faults = [reason for (_, reason), _ in trees if reason]
    if faults:
        return _rejection(passed, "syntax", faults)
    passed.append(Check("syntax", True))
    faults = [fault for (tree, _), name in trees if tree is not None for fault in lint(tree, name)]
    if faults:
        return _rejection(passed, "lint", faults)
    passed.append(Check("lint", True))
    if request.tests.strip():
        result = await run_tests(request, run)
        if result.reasons:
            return _rejection(passed, "tests", list(result.reasons), result.failed_statements)
        passed.append(Check("tests", True, result.detail))
    return ValidateResult(is_valid=True, checks=tuple(passed))


def _rejection(
    passed: list[Check] | tuple[Check, ...], check: str, reasons: list[str], failed_statements: tuple[str, ...] = ()
) -> ValidateResult:
    failed = Check(check, False, reasons[0])
    return ValidateResult(False, tuple(reasons), (*passed, failed), failed_statements)
