"""Runs one task: plans, runs steps in parallel as their dependencies allow, replans once, assembles the result.

Every state change is committed before the next action. So a worker that takes over after a crash loads the plan and the
completed steps, and repeats at most the calls that were in flight, with the same idempotency keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from octollm.capability import ScopeSet
from octollm.clock import Clock
from octollm.contracts.api import TaskFailure
from octollm.contracts.stream import StreamEvent
from octollm.contracts.task import ArmInfo, ExecuteResult, FileRef, Plan, PlanRequest, PlanStep
from octollm.documents.model import FlatDocument
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.client import ServiceClient
from octollm.storage.text_stream import TextStream
from octollm.tasks.calls import TaskCalls, TaskTokenMinter
from octollm.tasks.documents import LoadFile, read_task_files
from octollm.tasks.ledger import BudgetLedger
from octollm.tasks.live_text import LiveText
from octollm.tasks.records import TaskRecord
from octollm.tasks.state import PLANNED_PROGRESS, assemble_result, compute_progress, find_ready_steps
from octollm.tasks.step import LoadTexts, StepDependencies, StepError, StoreTexts, run_step
from octollm.tasks.store import TaskStore
from octollm.telemetry import Logger, Metrics, Span, Tracer

MAX_PARALLEL = 4
"""Steps of one task at a time, so that a wide plan does not occupy all arms."""
MAX_OUTPUT_IN_EVENT = 4000
MIN_PROGRESS_DELTA = 4.0
"""Percentage points between two progress events: each is a durable event, so a long text must not cause hundreds."""


@dataclass(frozen=True, slots=True)
class RunnerDependencies:
    """The collaborators of a runner.

    ``load_allowed_scopes`` returns the intersection of a task's authority and its principal's current scopes.
    """

    store: TaskStore
    ledger: BudgetLedger
    stream: TextStream
    client: ServiceClient
    token_minter: TaskTokenMinter
    clock: Clock
    log: Logger
    metrics: Metrics
    tracer: Tracer
    load_allowed_scopes: Callable[[TaskRecord], Awaitable[ScopeSet]]
    list_arms: Callable[[str], Awaitable[tuple[ArmInfo, ...]]]
    """Returns the arms of a tenant, for the planner."""
    load_file: LoadFile
    """Returns the bytes of a task's file, which is read before planning."""
    load_texts: LoadTexts
    """Reads the small artifacts of a result, which are sent to the judge with its request."""
    store_texts: StoreTexts
    """Stores the small artifacts that come with a result."""


class TaskRunner:
    """Runs one task in one epoch. Cancelling :meth:`run` closes its calls, which cancels the work of every callee."""

    def __init__(self, deps: RunnerDependencies, task: TaskRecord) -> None:
        self._deps = deps
        self._task = task
        self._step_progress: dict[str, float] = {}
        self._done: set[str] = set()
        self._reported_progress = task.progress
        self._span: Span | None = None

    async def run(self) -> None:
        """Run the task to its end and record the result. Only ``fence_lost`` and cancellation leave it open."""
        with self._deps.tracer.span("task") as self._span:
            self._span.attributes["octollm.run"] = self._task.epoch
            await self._run_to_end()

    async def _run_to_end(self) -> None:
        tools = self._deps
        deadline = Deadline.after(tools.clock, self._seconds_left())
        try:
            async with asyncio.timeout(deadline.remaining()):
                await self._run(deadline)
        except TimeoutError:
            await self.fail(OctoError("The task exceeded its time limit.", code="deadline_exceeded"))
        except OctoError as error:
            # A worker with a newer epoch runs the task and will record its end.
            if error.code == "fence_lost":
                raise
            # The task was ended from outside, for example cancelled; its end is recorded already.
            if error.code == "state_conflict" and await self._has_ended():
                return
            await self.fail(error)

    async def _run(self, deadline: Deadline) -> None:
        tools, task = self._deps, self._task
        calls = TaskCalls(tools.client, tools.token_minter, task, await tools.load_allowed_scopes(task))
        # After a takeover the stored plan is used. Its documents are in memory, since they are stored before the plan.
        # A crash before ``set_plan`` repeats the planning; its model calls are answered from the journal.
        if task.plan is None:
            await tools.store.begin_planning(task.task_id, task.epoch)
            await self._read_files(calls, deadline)
            plan = await self._plan(calls, deadline, ())
            await tools.store.set_plan(task.task_id, plan, task.epoch, replan=False, reasons=())
        else:
            plan = task.plan
        try:
            results = await self._run_steps(plan, calls, deadline)
        except StepError as error:
            # Only a rejected result is worth a new plan, which is made from the judge's reasons. After another failure
            # (an arm that is down, no budget) a new plan would meet the same obstacle.
            if error.code != "not_accepted":
                raise
            plan = await self._replan(plan, calls, deadline, error)
            results = await self._run_steps(plan, calls, deadline)
        await self._complete(plan, results)

    async def _read_files(self, calls: TaskCalls, deadline: Deadline) -> None:
        """Read the task's files, put their texts into memory, and store what was noted on them."""
        tools, task = self._deps, self._task
        if not task.contract.context.files:
            return

        async def read_binary(file: FileRef) -> FlatDocument:
            return await calls.read_file(file, deadline)

        arms = await tools.list_arms(task.tenant)
        read = await read_task_files(task.contract, task.tenant, arms, tools.load_file, read_binary)
        for document in read.documents:
            await calls.store_document(document, deadline)
        context = msgspec.structs.replace(task.contract.context, files=read.files)
        contract = msgspec.structs.replace(task.contract, context=context)
        if contract != task.contract:
            await tools.store.set_files(task.task_id, contract, task.epoch)
            self._task = replace(task, contract=contract)

    async def _plan(self, calls: TaskCalls, deadline: Deadline, reasons: tuple[str, ...]) -> Plan:
        task, contract = self._task, self._task.contract
        if contract.assigned_arm is not None:
            files = tuple(file.name for file in contract.context.files)
            step = PlanStep(
                "step-1",
                contract.goal[:80],
                contract.assigned_arm,
                contract.goal,
                (),
                contract.acceptance_criteria,
                files,
            )
            return Plan((step,))
        request = PlanRequest(
            contract.goal,
            contract.context,
            await self._deps.list_arms(task.tenant),
            contract.acceptance_criteria,
            reasons,
        )
        # A replan counts as attempt 2 of the plan, so that it has its own idempotency key and live text.
        attempt = 2 if reasons else 1
        text = LiveText(
            self._deps.store,
            self._deps.stream,
            self._deps.log,
            task_id=task.task_id,
            step="plan",
            attempt=attempt,
            epoch=task.epoch,
        )

        async def on_line(line: StreamEvent) -> None:
            if line.type == "token":
                text.add(line.text, reset=line.reset)

        with self._deps.tracer.span("plan"):
            async with text:
                return await calls.plan(request, deadline, on_line, attempt=attempt)

    async def _replan(self, plan: Plan, calls: TaskCalls, deadline: Deadline, error: StepError) -> Plan:
        """Return a new plan for the remaining work, once at most; raise ``error`` when it would repeat the old one."""
        tools, task = self._deps, self._task
        # From the database, because the replan may have happened in an earlier epoch.
        if task.contract.assigned_arm is not None or await tools.store.was_replanned(task.task_id):
            raise error
        new_plan = await self._plan(calls, deadline, error.reasons)
        # The same work would be rejected again, so the task fails with the judge's reasons instead.
        before = {_work_of(step) for step in plan.steps}
        if all(_work_of(step) in before for step in new_plan.steps):
            raise error
        completed_steps = [step for step in plan.steps if step.id in self._done]
        merged = Plan((*completed_steps, *find_remaining_steps(completed_steps, new_plan.steps)), new_plan.usage)
        await tools.store.begin_planning(task.task_id, task.epoch)
        await tools.store.set_plan(task.task_id, merged, task.epoch, replan=True, reasons=error.reasons)
        return merged

    async def _run_steps(self, plan: Plan, calls: TaskCalls, deadline: Deadline) -> dict[str, ExecuteResult]:
        """Run the plan's steps; the first failure cancels the others."""
        tools, task = self._deps, self._task
        records = {record.step: record for record in await tools.store.steps(task.task_id)}
        results = {name: record.result for name, record in records.items() if record.result is not None}
        # Steps that completed in an earlier epoch or in the first plan are not run again.
        self._done = {name for name in results if records[name].status == "completed"}
        step_tools = StepDependencies(
            tools.store,
            tools.stream,
            calls,
            tools.clock,
            tools.log,
            tools.tracer,
            self._progress_reporter(plan),
            tools.load_texts,
            tools.store_texts,
        )
        running: dict[asyncio.Task[ExecuteResult], PlanStep] = {}
        started: set[str] = set()
        try:
            while len(self._done) < len(plan.steps):
                for step in find_ready_steps(plan.steps, self._done, started):
                    if len(running) >= MAX_PARALLEL:
                        break
                    started.add(step.id)
                    inputs = {need: results[need].output for need in step.depends_on}
                    work = run_step(step_tools, task, step, records[step.id], inputs, deadline)
                    running[asyncio.create_task(work, name=f"step {step.id}")] = step
                if not running:
                    raise OctoError("The plan has steps that depend on each other in a cycle.", code="plan_invalid")
                finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for each in finished:
                    step = running.pop(each)
                    results[step.id] = each.result()
                    self._done.add(step.id)
        finally:
            for each in running:
                each.cancel()
            # Awaited, so that the calls of the cancelled steps are closed before the end of the task is recorded.
            await asyncio.gather(*running, return_exceptions=True)
        return results

    def _progress_reporter(self, plan: Plan) -> Callable[[str, float], Awaitable[None]]:
        self._reported_progress = max(self._reported_progress, PLANNED_PROGRESS)

        async def report(step: str, percent: float) -> None:
            self._step_progress[step] = max(self._step_progress.get(step, 0.0), percent)
            progress = compute_progress(plan.steps, self._done, self._step_progress)
            if progress - self._reported_progress >= MIN_PROGRESS_DELTA:
                # Set before the write, so that the other steps do not report the same rise while it waits.
                self._reported_progress = progress
                await self._deps.store.change(
                    self._task.task_id, "task.progress", {"step": step}, epoch=self._task.epoch, progress=progress
                )

        return report

    async def _complete(self, plan: Plan, results: Mapping[str, ExecuteResult]) -> None:
        tools, task = self._deps, self._task
        output, artifacts = assemble_result(plan.steps, results)
        usage = await tools.ledger.usage(task.task_id)
        listed = msgspec.to_builtins(artifacts)
        await tools.store.change(
            task.task_id,
            "task.completed",
            {
                "status": "completed",
                "duration_ms": self._duration_ms(),
                "output": output[:MAX_OUTPUT_IN_EVENT],
                "artifacts": listed,
                "usage": msgspec.to_builtins(usage),
            },
            new_status="completed",
            epoch=task.epoch,
            progress=100.0,
            output=output,
            result={"artifacts": listed},
            finished_at=tools.clock.now(),
        )
        tools.metrics.tasks.labels("completed").inc()
        tools.log.info("task.completed", duration_ms=self._duration_ms(), tokens=usage.total_tokens)

    async def fail(self, error: OctoError) -> None:
        """Record that the task failed, and why."""
        tools, task = self._deps, self._task
        if self._span is not None:
            self._span.record_error(error)
        reasons = error.reasons if isinstance(error, StepError) else ()
        faults = error.field_errors
        reason = TaskFailure(error.code, error.detail, reasons, faults)
        await tools.store.change(
            task.task_id,
            "task.failed",
            {
                "status": "failed",
                "code": error.code,
                "reason": error.detail,
                "reasons": list(reasons),
                "duration_ms": self._duration_ms(),
            },
            new_status="failed",
            epoch=task.epoch,
            error=reason,
            finished_at=tools.clock.now(),
        )
        tools.metrics.tasks.labels("failed").inc()
        tools.log.warning("task.failed", error=error, reasons=list(reasons))

    async def _has_ended(self) -> bool:
        return (await self._deps.store.get(self._task.task_id)).status in ("completed", "failed", "cancelled")

    def _seconds_left(self) -> float:
        at = self._task.deadline_at
        return 3600.0 if at is None else max(0.0, at - self._deps.clock.now())

    def _duration_ms(self) -> int:
        return int((self._deps.clock.now() - self._task.created_at) * 1000)


def _work_of(step: PlanStep) -> tuple[str, str, tuple[str, ...]]:
    return step.arm, step.goal, step.files


def find_remaining_steps(completed: Sequence[PlanStep], new_steps: Sequence[PlanStep]) -> list[PlanStep]:
    """Return the steps of a new plan that are still to run, with ids that no completed step has.

    A new step whose arm, goal and files are those of a completed step takes its result. Ids cannot tell, because every
    plan counts its steps from 1.
    """
    results = {_work_of(step): step.id for step in completed}
    names = {step.id: results.get(_work_of(step), f"{step.id}-again") for step in new_steps}
    return [
        msgspec.structs.replace(
            step,
            id=names[step.id],
            # A dependency outside of the new plan is dropped: the step would wait for ever.
            depends_on=tuple(dict.fromkeys(names[need] for need in step.depends_on if need in names)),
        )
        for step in new_steps
        if _work_of(step) not in results
    ]
