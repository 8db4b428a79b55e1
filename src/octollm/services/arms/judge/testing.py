"""Running tests where they can do no harm, and saying what failed in words that help to mend the code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files

import msgspec

from octollm.contracts.operations import RunLimits, RunRequest, RunResult, ValidateRequest
from octollm.contracts.task import FileRef
from octollm.services.arms.judge.testing_program import MARKER

Run = Callable[[RunRequest], Awaitable[RunResult]]
"""The executor's ``run``."""

TESTING_PROGRAM = "octollm_testing_program.py"
TEST_SECONDS = 10.0
"""Wall time of one run of the tests."""
MAX_REASON_CHARS = 300


class FailedTest(msgspec.Struct, frozen=True):
    """A test that failed: its name, its error, and the statement of the tests that raised it."""

    test: str
    error: str
    source: str = ""


class SuiteReport(msgspec.Struct, frozen=True):
    """What the testing program prints."""

    ran: int
    failures: tuple[FailedTest, ...] = ()


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """How the tests ended: how many ran, and why they are not passed."""

    ran: int
    reasons: tuple[str, ...]


async def run_tests(request: ValidateRequest, run: Run) -> SuiteResult:
    """Run the tests of ``request`` with the executor. No test run at all counts as failed.

    Raises what ``run`` raises.
    """
    result = await run(
        RunRequest(
            language="python",
            command=(TESTING_PROGRAM, request.tests_filename.removesuffix(".py")),
            files=(
                FileRef(request.filename, text=request.code),
                FileRef(request.tests_filename, text=request.tests),
                FileRef(TESTING_PROGRAM, text=_read_program()),
            ),
            limits=RunLimits(wall_seconds=TEST_SECONDS),
        )
    )
    if result.reason == "timeout":
        return SuiteResult(0, ("The tests did not end in time: look for a loop without an end.",))
    if result.reason:
        return SuiteResult(0, (f"The tests were stopped by a limit: {result.reason}.",))
    report = _parse_report(result.stdout)
    if report is None:
        last = (result.stderr.strip().split("\n") or [""])[-1][:MAX_REASON_CHARS]
        return SuiteResult(0, (f"The code ended the program before its tests were done. {last}".strip(),))
    reasons = [describe_failure(failure) for failure in report.failures]
    if not reasons and report.ran == 0:
        reasons.append("There are no tests: none was run.")
    return SuiteResult(report.ran, tuple(dict.fromkeys(reasons)))


def describe_failure(failure: FailedTest) -> str:
    """Say what failed: the statement of the test, then what happened."""
    error = failure.error.removeprefix("AssertionError: ")
    where = failure.source or failure.test
    return f"{where} failed: {error}"[:MAX_REASON_CHARS] if error != "AssertionError" else f"{where} is not so"


def _parse_report(stdout: str) -> SuiteReport | None:
    lines = [line for line in stdout.split("\n") if line.startswith(MARKER)]
    if not lines:
        return None
    try:
        return msgspec.json.decode(lines[-1].removeprefix(MARKER).encode(), type=SuiteReport)
    except msgspec.DecodeError:
        return None


def _read_program() -> str:
    return files(__package__ or "").joinpath("testing_program.py").read_text("utf-8")
