"""The worker: claims, its bound, and what becomes of tasks that it stops, loses or crashes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, cast

import pytest
from task_kit import ServiceRequest, TaskKit, answer, plan_of, plan_step

from octollm.contracts.task import Budget, ExecuteResult
from octollm.errors import OctoError
from octollm.storage import RedisKeys, open_redis
from octollm.tasks.clock_guard import COMPARE_SECONDS, ClockGuard
from octollm.tasks.leases import LeaseRenewer, TaskLeases
from octollm.tasks.scheduling import MAX_GENERATIONS
from octollm.tasks.worker import Worker, hint_listener
from octollm.testing import wait_until


class FakeRenewer:
    """Holds leases without renewing them; ``lose`` reports one as lost."""

    failure = ""

    def __init__(self, on_lost: Callable[[str], None]) -> None:
        self.lose = on_lost
        self.leases: dict[str, int] = {}

    def add(self, task_id: str, epoch: int) -> None:
        self.leases[task_id] = epoch

    def remove(self, task_id: str, epoch: int) -> None:
        assert self.leases.pop(task_id) == epoch

    @asynccontextmanager
    async def run(self, _on_failure: object) -> AsyncGenerator[None]:
        yield


class BlockingArm:
    """An arm that answers once it is released."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.released = asyncio.Event()

    async def __call__(self, request: ServiceRequest) -> ExecuteResult:
        self.running.append(request.token)
        await self.released.wait()
        return ExecuteResult("done")


def make_worker(kit: TaskKit, **options: Any) -> tuple[Worker, FakeRenewer]:
    kit.services.handlers["planner.plan"] = plan_of(plan_step("a"))
    renewers: list[FakeRenewer] = []

    def create_renewer(on_lost: Callable[[str], None]) -> LeaseRenewer:
        renewers.append(FakeRenewer(on_lost))
        return cast("LeaseRenewer", renewers[0])

    worker = Worker(kit.deps, TaskLeases(kit.db, "w1"), create_renewer, service="orchestrator", **options)
    return worker, renewers[0]


async def has_status(kit: TaskKit, task_id: str, status: str) -> bool:
    return (await kit.store.get(task_id)).status == status


async def test_worker_runs_the_tasks_that_it_finds(kit: TaskKit) -> None:
    kit.services.handlers["coder.execute"] = answer("done")
    ids = [await kit.submit() for _ in range(3)]
    worker, renewer = make_worker(kit)
    async with worker.run():
        for task_id in ids:
            await wait_until(lambda: has_status(kit, task_id, "completed"), description="the task completes")  # noqa: B023
        await wait_until(lambda: not renewer.leases, description="no lease is renewed any more")


async def test_worker_claims_no_more_than_its_bound(kit: TaskKit) -> None:
    arm = BlockingArm()
    kit.services.handlers["coder.execute"] = arm
    ids = [await kit.submit() for _ in range(3)]
    worker, renewer = make_worker(kit, max_tasks=2)
    async with worker.run():
        await wait_until(lambda: len(arm.running) == 2, description="two tasks run")
        worker.wake()
        assert len(renewer.leases) == 2
        assert await has_status(kit, ids[2], "accepted")
        arm.released.set()
        await wait_until(lambda: has_status(kit, ids[2], "completed"), description="the third task follows")


async def test_drain_releases_tasks_for_another_worker(kit: TaskKit) -> None:
    arm = BlockingArm()
    kit.services.handlers["coder.execute"] = arm
    task_id = await kit.submit()
    worker, _ = make_worker(kit)
    async with worker.run():
        await wait_until(lambda: bool(arm.running), description="the task runs")
    # At once, without waiting for the lease to expire: the clock stands still.
    assert await TaskLeases(kit.db, "w2").acquire(exclude=frozenset()) == (task_id, 2)
    assert await has_status(kit, task_id, "running")


async def test_lost_lease_stops_the_task_and_leaves_it_open(kit: TaskKit) -> None:
    arm = BlockingArm()
    kit.services.handlers["coder.execute"] = arm
    task_id = await kit.submit()
    worker, renewer = make_worker(kit)
    async with worker.run():
        await wait_until(lambda: bool(arm.running), description="the task runs")
        kit.clock.advance(10)
        assert await TaskLeases(kit.db, "w2").acquire(exclude=frozenset()) == (task_id, 2)
        renewer.lose(task_id)
        await wait_until(lambda: not renewer.leases, description="the work is stopped")
        # The other worker's lease is untouched: the release names the lost epoch.
        assert await TaskLeases(kit.db, "w3").acquire(exclude=frozenset()) is None
        assert await has_status(kit, task_id, "running")


async def test_stop_waits_until_the_call_is_closed(kit: TaskKit) -> None:
    closed: list[bool] = []
    started = asyncio.Event()

    async def execute(_request: ServiceRequest) -> ExecuteResult:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            closed.append(True)
        raise AssertionError

    kit.services.handlers["coder.execute"] = execute
    task_id = await kit.submit()
    worker, _ = make_worker(kit)
    async with worker.run():
        await asyncio.wait_for(started.wait(), 10)
        await kit.store.change(task_id, "task.cancelled", {"status": "cancelled"}, new_status="cancelled")
        await worker.stop(task_id)
        assert closed == [True]
        await worker.stop("unknown")


async def test_hints_of_other_replicas_stop_a_cancelled_task_and_wake_for_a_waiting_one(
    kit: TaskKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm, keys = BlockingArm(), RedisKeys()
    kit.services.handlers["coder.execute"] = arm
    task_id = await kit.submit()
    worker, renewer = make_worker(kit)
    woken: list[None] = []
    monkeypatch.setattr(worker, "wake_if_free", lambda: woken.append(None))
    async with worker.run(), open_redis("memory://") as redis, hint_listener(redis, keys, worker) as hints:
        # What was announced before it listened is lost, so it looks once.
        await wait_until(lambda: len(woken) == 1, description="it listens")
        assert (await hints.check_health()).ok
        await redis.publish([(keys.queue, b"task"), (keys.cancel, b"unknown")])
        await wait_until(lambda: len(woken) == 2, description="it looks for the waiting task")
        await wait_until(lambda: bool(arm.running), description="the task runs")
        await kit.store.change(task_id, "task.cancelled", {"status": "cancelled"}, new_status="cancelled")
        await redis.publish([(keys.cancel, task_id.encode())])
        await wait_until(lambda: not renewer.leases, description="the task is stopped")


async def test_crash_fails_the_task_instead_of_repeating_it(kit: TaskKit) -> None:
    async def crash(_request: ServiceRequest) -> ExecuteResult:
        raise ZeroDivisionError

    kit.services.handlers["coder.execute"] = crash
    task_id = await kit.submit()
    worker, _ = make_worker(kit)
    async with worker.run():
        await wait_until(lambda: has_status(kit, task_id, "failed"), description="the task fails")
    view = await kit.store.view(task_id, "acme")
    assert view.error is not None
    assert view.error.code == "internal"
    assert "ZeroDivisionError" in view.error.detail
    assert "task.crashed" in cast("Any", kit.deps.log).events


async def test_a_full_worker_tells_the_others_that_a_task_waits(kit: TaskKit) -> None:
    arm = BlockingArm()
    kit.services.handlers["coder.execute"] = arm
    hints: list[str] = []

    async def announce() -> None:
        hints.append("task")

    await kit.submit()
    worker, _ = make_worker(kit, max_tasks=1, announce=announce)
    async with worker.run():
        await wait_until(lambda: bool(arm.running), description="the task runs")
        assert not hints, "it had room"
        await kit.submit()
        worker.wake()
        await wait_until(lambda: bool(hints), description="the others are told")
        hints.clear()
    assert hints, "and they are told of what it hands back"


async def test_every_place_may_be_held_by_tasks_that_wait_for_their_sub_tasks(each_kit: TaskKit) -> None:
    """A chain of the deepest kind at a worker with one place for each generation, beside others that want it."""
    kit = each_kit
    chain = [await kit.submit(budget=Budget(max_tokens=1000))]
    for _ in range(MAX_GENERATIONS):
        chain.append(await kit.submit_below(chain[-1]))
    # They come first, and nobody ends before its own sub-task does.
    others = [await kit.submit_below(chain[0], priority=50) for _ in range(3)]
    parents = dict(pairwise(chain))

    async def execute(request: ServiceRequest) -> ExecuteResult:
        child = parents.get(request.body["task_id"])
        if child is not None:
            await wait_until(lambda: has_status(kit, child, "completed"), description="its sub-task completes")
        return ExecuteResult("done")

    kit.services.handlers["coder.execute"] = execute
    worker, _ = make_worker(kit, max_tasks=1, max_subtasks=1)
    async with worker.run():
        for task_id in (*others, chain[0]):
            await wait_until(lambda: has_status(kit, task_id, "completed"), description="the task completes")  # noqa: B023


async def test_a_worker_whose_clock_is_wrong_claims_nothing_until_it_is_right(each_kit: TaskKit) -> None:
    """The kit's clock stands far from that of a database server; on SQLite, whose clock is ours, that is no matter."""
    kit = each_kit
    kit.services.handlers["coder.execute"] = answer("done")
    task_id, guard = await kit.submit(), ClockGuard(kit.db)
    worker, _ = make_worker(kit, clock_guard=guard)
    async with worker.run():
        if kit.db.dialect == "postgresql":
            await wait_until(
                lambda: "differs by" in worker.failure, description="the worker says why it claims nothing"
            )
            assert await has_status(kit, task_id, "accepted")
            kit.clock.time = time.time()
            worker.wake()
        await wait_until(lambda: has_status(kit, task_id, "completed"), description="the task completes")
        assert worker.failure == ""


class Server:
    """A database server with a clock that the test sets, beside the two of this process."""

    dialect = "postgresql"

    def __init__(self) -> None:
        self.time, self.wall, self.mono, self.asked = 1000.0, 1000.0, 0.0, 0
        self.clock = self

    def now(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.mono

    async def fetch(self, _sql: str) -> list[dict[str, float]]:
        self.asked += 1
        return [{"now": self.time}]


async def test_a_step_of_the_clock_is_noticed_before_the_next_comparison() -> None:
    server = Server()
    guard = ClockGuard(cast("Any", server))
    for _ in range(3):
        await guard.check()
    assert server.asked == 1
    server.wall += 3600
    for _ in range(2):
        with pytest.raises(OctoError, match=r"differs by \+3600 s"):
            await guard.check()
    server.wall -= 3600
    await guard.check()
    # Both clocks drift apart slowly: no step, but the next comparison finds it.
    server.time += 6
    await guard.check()
    server.mono += COMPARE_SECONDS
    server.wall += COMPARE_SECONDS
    server.time += COMPARE_SECONDS
    with pytest.raises(OctoError, match=r"differs by -6 s"):
        await guard.check()


async def test_a_task_whose_calls_close_slowly_delays_no_other_cancellation(kit: TaskKit) -> None:
    closing: list[str] = []
    closed = asyncio.Event()

    async def execute(request: ServiceRequest) -> ExecuteResult:
        running.append(request.body["task_id"])
        try:
            await asyncio.Event().wait()
        finally:
            closing.append(request.body["task_id"])
            await closed.wait()
        raise AssertionError

    running: list[str] = []
    kit.services.handlers["coder.execute"] = execute
    ids = {await kit.submit() for _ in range(3)}
    worker, renewer = make_worker(kit)
    async with open_redis("memory://") as redis, worker.run(), hint_listener(redis, RedisKeys(), worker):
        await wait_until(lambda: set(running) == ids, description="all run")
        for task_id in ids:
            await kit.store.change(task_id, "task.cancelled", {"status": "cancelled"}, new_status="cancelled")

        async def announce() -> bool:
            # Each again, until the listener is there: a repeated hint must not cut off what closes the calls.
            await redis.publish([(RedisKeys().cancel, each.encode()) for each in ids])
            return set(closing) == ids

        await wait_until(announce, description="all close their calls at the same time", timeout=4)
        assert len(closing) == len(renewer.leases) == 3
        closed.set()
        await wait_until(lambda: not renewer.leases, description="all have stopped")
