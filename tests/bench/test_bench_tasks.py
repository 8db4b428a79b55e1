"""What the benchmark of tasks measures: that its tasks are real ones, and that its figures add up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_shift


@pytest.fixture(autouse=True)
def bench_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("tasks", "calls")]:
        del sys.modules[name]


async def test_tasks_run_through_every_step_and_are_counted(tmp_path: Path) -> None:
    from tasks import ours, parts  # noqa: PLC0415  found on the path that the fixture sets

    async with ours.embedded(tmp_path / "embedded", free_shift()) as system:
        before = await system.count_ended()
        flow = await ours.flow(system, 4, 2, planned=True)
        assert await system.count_ended() == before + 4
        assert flow.rate > 0
        assert 0 < flow.p50 <= flow.p99
        assert await ours.first_step(system) > 0
        listed = await system.read("/tasks?limit=10&status=completed")
        assert len(listed["tasks"]) == 5
        last = await system.read(f"/tasks/{listed['tasks'][-1]['task_id']}")
        assert [step["arm"] for step in last["steps"]] == [parts.ECHO] * parts.STEPS
        assert last["output"] == "work 1 work 2 work 3"
