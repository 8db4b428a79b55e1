"""What a task costs: transactions, statements, events and calls, which no change raises unseen."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from task_kit import TaskKit, answer, plan_of, plan_step

from octollm.storage import DatabaseConnection, Transaction
from octollm.storage.programs import Program
from octollm.tasks.leases import TaskLeases
from octollm.tasks.runner import TaskRunner
from octollm.tasks.scheduling import places_of


class Counts:
    """Counts what goes to the database of a kit."""

    def __init__(self, kit: TaskKit, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: Counter[str] = Counter()
        run, fetch, transaction, read = kit.db.run, kit.db.fetch, kit.db.transaction, kit.db.read

        async def counted_run(program: Program[Any]) -> Any:
            self.found["transactions"] += 1
            return await run(self._statements(program))

        async def counted_fetch(sql: str, *parameters: object) -> Any:
            self.found["reads"] += 1
            return await fetch(sql, *parameters)

        @contextlib.asynccontextmanager
        async def counted_transaction(**options: Any) -> AsyncGenerator[Transaction]:
            self.found["transactions of the engine"] += 1
            async with transaction(**options) as tx:
                yield tx

        @contextlib.asynccontextmanager
        async def counted_read() -> AsyncGenerator[DatabaseConnection]:
            self.found["reads of the engine"] += 1
            async with read() as connection:
                yield connection

        for name, counted in (
            ("run", counted_run),
            ("fetch", counted_fetch),
            ("transaction", counted_transaction),
            ("read", counted_read),
        ):
            monkeypatch.setattr(kit.db, name, counted)

    def _statements(self, program: Program[Any]) -> Program[Any]:
        rows: Any = None
        try:
            statement = next(program)
            while True:
                self.found["statements"] += 1
                rows = yield statement
                statement = program.send(rows)
        except StopIteration as end:
            return end.value


async def run_one(kit: TaskKit, **contract: Any) -> str:
    kit.services.handlers["coder.execute"] = answer("done")
    kit.services.handlers["planner.plan"] = plan_of(plan_step("a"), plan_step("b", "a"), plan_step("c", "b"))
    task_id = await kit.submit(**contract)
    (claim,) = await TaskLeases(kit.db, "w1").claim(places_of(1, 0))
    await TaskRunner(kit.deps, claim.task).run()
    return task_id


async def test_a_task_of_one_step(kit: TaskKit, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(kit, monkeypatch)
    task_id = await run_one(kit, assigned_arm="coder")
    # Stored; claimed; planned and started; ended.
    assert counts.found["transactions"] == 4
    # One looks for waiting sub-tasks. On PostgreSQL the events of a transaction are one statement; here each has one
    # for its version.
    assert counts.found["statements"] <= 26
    # Whether a lease has expired, and the usage.
    assert counts.found["reads"] == 2
    assert not counts.found["transactions of the engine"], counts.found
    assert not counts.found["reads of the engine"], counts.found
    assert [each.operation for each in kit.services.requests] == ["coder.execute", "judge.accept"]
    assert len(await kit.events(task_id)) == 6


async def test_a_task_of_three_steps(kit: TaskKit, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(kit, monkeypatch)
    task_id = await run_one(kit)
    # Stored; claimed; planning; planned and a started; b started; c started; ended.
    assert counts.found["transactions"] == 7
    assert counts.found["statements"] <= 48
    assert counts.found["reads"] == 2
    assert not counts.found["transactions of the engine"], counts.found
    # The instructions, which a person may add until the planner is asked.
    assert counts.found["reads of the engine"] == 1, counts.found
    operations = Counter(each.operation for each in kit.services.requests)
    assert operations == {"planner.plan": 1, "coder.execute": 3, "judge.accept": 3}
    assert len(await kit.events(task_id)) == 11
