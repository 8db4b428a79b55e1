"""The judge runs the same tests on the same code once for a task, and again whenever anything differs."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from octollm import FileRef
from octollm.contracts.operations import RunRequest, RunResult
from octollm.services.arms.judge.service import RunCache

FILES = (FileRef("code.py", text="x = 1"), FileRef("tests.py", text="import code"))
REQUEST = RunRequest("python", ("tests.py",), FILES)


@dataclass
class Caller:
    """The part of a Context that the cache uses; the executor behind it counts its runs."""

    task_id: str = "task-1"
    tenant: str = "acme"
    exit_code: int = 0
    requests: list[RunRequest] = field(default_factory=list)

    @property
    def info(self) -> SimpleNamespace:
        return SimpleNamespace(tenant=self.tenant)

    async def send(self, _operation: object, request: RunRequest, **_options: object) -> RunResult:
        self.requests.append(request)
        return RunResult(self.exit_code, f"run {len(self.requests)}", "")


async def run_twice(first: Caller, second: Caller, one: RunRequest = REQUEST, other: RunRequest = REQUEST) -> int:
    """Run one request for each caller, with the same executor behind both, and return how many runs there were."""
    cache = RunCache()
    second.requests = first.requests
    await cache.bind(first)(one)  # type: ignore[arg-type]
    await cache.bind(second)(other)  # type: ignore[arg-type]
    return len(first.requests)


async def test_the_same_run_for_the_same_task_is_made_once() -> None:
    assert await run_twice(Caller(), Caller()) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Caller(), Caller(task_id="task-2")),
        (Caller(), Caller(tenant="other")),
        (Caller(task_id=""), Caller(task_id="")),
        (Caller(exit_code=1), Caller()),
    ],
    ids=["another task", "another tenant", "no task", "a run that was cut off"],
)
async def test_another_run_is_made_for_anybody_else(first: Caller, second: Caller) -> None:
    assert await run_twice(replace(first, requests=[]), replace(second)) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (REQUEST, RunRequest("python", ("tests.py",), (FileRef("code.py", text="x = 2"), REQUEST.files[1]))),
        (REQUEST, RunRequest("python", ("tests.py", "-v"), REQUEST.files)),
        (RunRequest("sql", ("SELECT 1",)), RunRequest("sql", ("SELECT 1",))),
    ],
    ids=["other code", "another command", "a query"],
)
async def test_another_program_or_a_query_is_run(one: RunRequest, other: RunRequest) -> None:
    assert await run_twice(Caller(), Caller(), one, other) == 2
