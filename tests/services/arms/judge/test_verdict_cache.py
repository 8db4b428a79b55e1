"""The judge runs the same tests on the same code once for a task, and again whenever anything differs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import msgspec
import pytest

from octollm.contracts.operations import RunRequest, RunResult, ValidateRequest, ValidateResult
from octollm.services.arms.judge.service import VerdictCache

Run = Callable[[RunRequest], Awaitable[RunResult]]
TESTS = """
import unittest
from code_a import f

class T(unittest.TestCase):
    def test_f(self):
        self.assertEqual(f(), 1)
"""
REQUEST = ValidateRequest("def f():\n    return 1\n", "python", "code_a.py", TESTS, "test_code_a.py")
WRONG = msgspec.structs.replace(REQUEST, code="def f():\n    return 2\n")


@dataclass
class Caller:
    """The part of a Context that the cache uses; it counts the runs of the executor behind it."""

    run: Run | None = None
    task_id: str = "task-1"
    tenant: str = "acme"
    requests: list[RunRequest] = field(default_factory=list)

    @property
    def info(self) -> SimpleNamespace:
        return SimpleNamespace(tenant=self.tenant)

    async def send(self, _operation: object, request: RunRequest, **_options: object) -> RunResult:
        self.requests.append(request)
        assert self.run is not None
        return await self.run(request)


async def validate_twice(
    run: Run, first: Caller, second: Caller, one: ValidateRequest = REQUEST, other: ValidateRequest = REQUEST
) -> tuple[list[ValidateResult], int]:
    """Validate for each caller, and return the verdicts and how many runs there were."""
    cache, requests = VerdictCache(), list[RunRequest]()
    verdicts: list[ValidateResult] = []
    for caller, request in ((first, one), (second, other)):
        bound = cache.bind(replace(caller, run=run, requests=requests))  # type: ignore[arg-type]
        verdicts.append(await bound(request))
    return verdicts, len(requests)


async def test_code_that_is_valid_is_run_once_for_its_task(run: Run) -> None:
    [one, other], runs = await validate_twice(run, Caller(), Caller())
    assert one.is_valid
    assert (other, runs) == (one, 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Caller(), Caller(task_id="task-2")),
        (Caller(), Caller(tenant="other")),
        (Caller(task_id=""), Caller(task_id="")),
    ],
    ids=["another task", "another tenant", "no task"],
)
async def test_it_is_run_again_for_anybody_else(run: Run, first: Caller, second: Caller) -> None:
    verdicts, runs = await validate_twice(run, first, second)
    assert [verdict.is_valid for verdict in verdicts] == [True, True]
    assert runs == 2


@pytest.mark.parametrize(("one", "other"), [(REQUEST, WRONG), (WRONG, REQUEST), (WRONG, WRONG)])
async def test_other_code_and_code_that_was_refused_are_run_again(
    run: Run, one: ValidateRequest, other: ValidateRequest
) -> None:
    verdicts, runs = await validate_twice(run, Caller(), Caller(), one, other)
    assert [verdict.is_valid for verdict in verdicts] == [one is REQUEST, other is REQUEST]
    assert runs == 2
