"""Is this code valid? Syntax, then lint, then its tests; the first that fails gives the reasons."""

from __future__ import annotations

from octollm.contracts.operations import ValidateRequest, ValidateResult
from octollm.contracts.task import Check
from octollm.services.arms.judge.lint import lint
from octollm.services.arms.judge.syntax import parse_python
from octollm.services.arms.judge.testing import Run, run_tests

PYTHON_NAMES = frozenset({"python", "python3", "py"})


async def validate(request: ValidateRequest, run: Run) -> ValidateResult:
    """Validate code, and its tests where there are any. Nothing of it runs outside of ``run``.

    Other languages than Python are not valid here, with that as the reason. Raises what ``run`` raises.
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
        tested = await run_tests(request, run)
        if tested.reasons:
            return _rejection(passed, "tests", list(tested.reasons))
        passed.append(Check("tests", True, f"{tested.ran} passed"))
    return ValidateResult(is_valid=True, checks=tuple(passed))


def _rejection(passed: list[Check] | tuple[Check, ...], check: str, reasons: list[str]) -> ValidateResult:
    failed = Check(check, False, reasons[0])
    return ValidateResult(is_valid=False, reasons=tuple(reasons), checks=(*passed, failed))
