"""Runs one task: plans, runs steps in parallel as their dependencies allow, replans once, assembles the result.

Every state change is committed before the next action. So a worker that takes over after a crash loads the plan and the
completed steps, and repeats at most the calls that were in flight, with the same idempotency keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

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
from octollm.tasks.approvals import ApprovalGate, ApprovalStore
from octollm.tasks.attempts import AttemptReader
from octollm.tasks.calls import TaskCalls, TaskTokenMinter
from octollm.tasks.changes import PendingChanges, TaskChange, plan_change, planning_change
from octollm.tasks.documents import LoadFile, read_task_files
from octollm.tasks.ledger import BudgetLedger
from octollm.tasks.live_text import LiveText
from octollm.tasks.records import StepRecord, TaskRecord, new_step_record
from octollm.tasks.state import PLANNED_PROGRESS, assemble_result, compute_progress, find_ready_steps, is_found
from octollm.tasks.step import (
    ArmSlots,
    LoadTexts,
    ReportProgress,
    StepDependencies,
    StepError,
    StoreTexts,
    make_step_error,
    run_step,
)
from octollm.tasks.store import TaskStore
from octollm.telemetry import Logger, Metrics, Span, Tracer

MAX_PARALLEL = 4
"""Steps of one task at a time, so that a wide plan does not occupy all arms."""
MAX_OUTPUT_IN_EVENT = 4000
MAX_PROGRESS_MESSAGE = 200
"""Characters of the message of an arm in a progress event, such as ``chunk 3 of 12``."""
APPROVAL_POLL_SECONDS = 1.0
"""Interval at which decisions are looked up while other steps of the task run."""
MIN_PROGRESS_DELTA = 4.0
"""Percentage points between two progress events: each is a durable event, so a long text must not cause hundreds."""


@dataclass(frozen=True, slots=True)
class RunnerDependencies:
    """The collaborators of a runner.

    ``load_allowed_scopes`` returns the intersection of a task's authority and its principal's current scopes.
    """

    store: TaskStore
    approvals: ApprovalStore
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
    attempts: AttemptReader
    arm_slots: ArmSlots = field(default_factory=ArmSlots)


class _SuspendedError(Exception):
    """The task waits for a person: it has released its lease, and this run of it is over."""


class TaskRunner:
    """Runs one task in one epoch. Cancelling :meth:`run` closes its calls, which cancels the work of every callee."""

    def __init__(self, deps: RunnerDependencies, task: TaskRecord) -> None:
        self._deps = deps
        self._task = task
        self._step_progress: dict[str, float] = {}
        self._done: set[str] = set()
        self._reported_progress = task.progress
        self._span: Span | None = None
        self._changes = PendingChanges(deps.store.apply)

    async def run(self) -> None:
        """Run the task to its end and record the result, or until it waits for a person.

        Otherwise only ``fence_lost`` and cancellation leave it open.
        """
        with self._deps.tracer.span("task") as self._span:
            self._span.attributes["octollm.run"] = self._task.epoch
            await self._run_to_end()

    async def _run_to_end(self) -> None:
        seconds = self._seconds_left()
        try:
            async with asyncio.timeout(None) as scope:
                expiry = asyncio.create_task(self._expire(scope, seconds), name="deadline")
                try:
                    await self._run(Deadline.after(self._deps.clock, seconds))
                finally:
                    expiry.cancel()
        except _SuspendedError:
            if self._span is not None:
                self._span.attributes["octollm.waits_for"] = "approval"
            return
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

    async def _expire(self, scope: asyncio.Timeout, seconds: float) -> None:
        """Let ``scope`` time out when the task's deadline passes, which a person may put off meanwhile."""
        known = self._task.deadline_at
        while seconds > 0:
            await asyncio.sleep(seconds)
            latest = known
            with suppress(OctoError):
                latest = (await self._deps.store.get(self._task.task_id)).deadline_at
            seconds = 0.0 if known is None or latest is None else latest - known
            known = latest
        scope.reschedule(asyncio.get_running_loop().time())

    async def _run(self, deadline: Deadline) -> None:
        tools, task = self._deps, self._task
        calls = TaskCalls(tools.client, tools.token_minter, task, await tools.load_allowed_scopes(task))
        # After a takeover the stored plan is used. Its documents are in memory, since they are stored before the plan.
        # A crash before ``set_plan`` repeats the planning; its model calls are answered from the journal.
        # A fork has a plan from the beginning, but its documents may be gone from memory.
        if task.plan is None or task.started_at is None:
            asks_planner = task.plan is None and task.contract.assigned_arm is None
            takes_time = asks_planner or bool(task.contract.context.files)
            self._changes.defer(planning_change(task.task_id, task.epoch, announce=takes_time))
            if takes_time:
                # Before the calls, so that a watcher knows what the task is at.
                await self._changes.flush()
            await self._read_files(calls, deadline)
            plan = task.plan or await self._plan(calls, deadline, ())
            self._changes.defer(plan_change(task.task_id, plan, task.epoch, replan=False, reasons=()))
        else:
            plan = task.plan
        try:
            # The number of the plan, since each has to be approved by itself.
            number = 2 if task.plan is not None and await tools.store.was_replanned(task.task_id) else 1
            results = await self._run_steps(plan, calls, deadline, number)
        except StepError as error:
            # Only a rejected result is worth a new plan, which is made from the judge's reasons. After another failure
            # (an arm that is down, no budget) a new plan would meet the same obstacle.
            if error.code != "not_accepted":
                raise
            plan = await self._replan(plan, calls, deadline, error)
            results = await self._run_steps(plan, calls, deadline, 2)
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
        # As of now: a person may have added some since the worker took the task.
        instructions = (await self._deps.store.get(task.task_id)).instructions
        arms = await self._deps.list_arms(task.tenant)
        if contract.parent_task_id is not None:
            # A sub-task may use fewer than its principal: the planner chooses among those.
            arms = tuple(arm for arm in arms if calls.may_execute(arm.name))
        request = PlanRequest(
            contract.goal,
            msgspec.structs.replace(contract.context, instructions=instructions),
            arms,
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
        await self._changes.apply(
            planning_change(task.task_id, task.epoch),
            plan_change(task.task_id, merged, task.epoch, replan=True, reasons=error.reasons),
        )
        return merged

    async def _run_steps(
        self, plan: Plan, calls: TaskCalls, deadline: Deadline, number: int
    ) -> dict[str, ExecuteResult]:
        """Run the steps of the plan of this number; the first failure cancels the others.

        Raises :class:`_SuspendedError` when nothing is left to do before a person decides.
        """
        tools, task = self._deps, self._task
        if task.plan is None and number == 1:
            records = {step.id: new_step_record(step) for step in plan.steps}
        else:
            await self._changes.flush()
            records = {record.step: record for record in await tools.store.steps(task.task_id)}
        results = {name: record.result for name, record in records.items() if record.result is not None}
        # Steps that completed in an earlier epoch or in the first plan are not run again.
        self._done = {name for name in results if records[name].status in ("completed", "skipped")}
        await self._check_failed(records.values())
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
            tools.attempts,
            self._changes,
            tools.arm_slots,
        )
        gate = await self._open_gate(calls, number)
        running: dict[asyncio.Task[ExecuteResult], PlanStep] = {}
        started: set[str] = set()
        try:
            while len(self._done) < len(plan.steps):
                ready = find_ready_steps(plan.steps, self._done, started)
                allowed = (await gate.filter(ready))[: MAX_PARALLEL - len(running)]
                if not allowed or gate.holds_steps:
                    await self._changes.flush()
                for step in allowed:
                    started.add(step.id)
                    inputs = {need: results[need].output for need in step.depends_on}
                    work = run_step(step_tools, task, step, records[step.id], inputs, deadline)
                    running[asyncio.create_task(work, name=f"step {step.id}")] = step
                if gate.holds_steps:
                    if not await gate.request(suspend=not running):
                        continue
                    if not running:
                        raise _SuspendedError
                if not running:
                    raise OctoError("The plan has steps that depend on each other in a cycle.", code="plan_invalid")
                # While some steps run and others wait for a person, the decision is looked up: a wake-up may be lost.
                timeout = APPROVAL_POLL_SECONDS if gate.holds_steps else None
                finished, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
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

    async def _check_failed(self, records: Iterable[StepRecord]) -> None:
        """Raise the error of a step that failed in an earlier epoch, which ended before the new plan or the task's end.

        The attempts of the step are used up: a further one would repeat the keys of the last one with other reasons.
        """
        for record in records:
            if record.status == "failed":
                code = await self._deps.attempts.load_failure_code(self._task.task_id, record.step, record.attempt)
                raise make_step_error(record.spec, code, record.reasons)

    async def _open_gate(self, calls: TaskCalls, number: int) -> ApprovalGate:
        tools, task = self._deps, self._task
        arms = await tools.list_arms(task.tenant)

        async def read_cost() -> float:
            return (await tools.ledger.usage(task.task_id)).cost_usd

        return ApprovalGate(
            tools.approvals,
            task,
            "plan" if number == 1 else f"plan-{number}",
            {arm.name: arm.approval for arm in arms if arm.approval},
            lambda arm, scope: calls.may_lead_to(f"{arm}:execute", scope),
            read_cost,
        )

    def _progress_reporter(self, plan: Plan) -> ReportProgress:
        self._reported_progress = max(self._reported_progress, PLANNED_PROGRESS)

        async def report(step: str, percent: float, message: str = "") -> None:
            self._step_progress[step] = max(self._step_progress.get(step, 0.0), percent)
            progress = compute_progress(plan.steps, self._done, self._step_progress)
            if progress - self._reported_progress >= MIN_PROGRESS_DELTA:
                # Set before the write, so that the other steps do not report the same rise while it waits.
                self._reported_progress = progress
                # An arm of anybody writes it, and terminals show it.
                printable = "".join(char for char in message if char.isprintable())[:MAX_PROGRESS_MESSAGE]
                data = {"step": step, **({"message": printable} if printable else {})}
                await self._changes.apply(
                    TaskChange(self._task.task_id, (("task.progress", data),), self._task.epoch, progress=progress)
                )

        return report

    async def _complete(self, plan: Plan, results: Mapping[str, ExecuteResult]) -> None:
        tools, task = self._deps, self._task
        output, artifacts = assemble_result(plan.steps, results)
        usage = await tools.ledger.usage(task.task_id)
        found = is_found(plan.steps, results)
        listed = msgspec.to_builtins(artifacts)
        data = {
            "status": "completed",
            "duration_ms": self._duration_ms(),
            "output": output[:MAX_OUTPUT_IN_EVENT],
            "artifacts": listed,
            "usage": msgspec.to_builtins(usage),
            "found": found,
        }
        columns = {
            "output": output,
            "result": {"artifacts": listed, "found": found},
            "finished_at": tools.clock.now(),
        }
        await self._changes.apply(
            TaskChange(task.task_id, (("task.completed", data),), task.epoch, ("completed",), 100.0, columns)
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
        data = {
            "status": "failed",
            "code": error.code,
            "reason": error.detail,
            "reasons": list(reasons),
            "duration_ms": self._duration_ms(),
        }
        columns = {"error": reason, "finished_at": tools.clock.now()}
        await self._changes.apply(
            TaskChange(task.task_id, (("task.failed", data),), task.epoch, ("failed",), columns=columns)
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
