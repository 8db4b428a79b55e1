"""One step of a task: its attempts, each executed by an arm and judged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec

from octollm.clock import Clock
from octollm.contracts.operations import AcceptRequest, AcceptResult
from octollm.contracts.stream import Line
from octollm.contracts.task import ExecuteResult, PlanStep, TaskContext, TaskContract
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline
from octollm.storage.text_stream import TextStream
from octollm.tasks.calls import TaskCalls
from octollm.tasks.live_text import LiveText
from octollm.tasks.records import StepRecord, TaskRecord
from octollm.tasks.schedule import estimate_within
from octollm.tasks.store import TaskStore
from octollm.telemetry import Log, Tracer

DEFAULT_RETRIES = 1
MAX_OUTPUT_IN_EVENT = 2000
FINAL_CODES = frozenset(
    {
        "authority_missing",
        "budget_exhausted",
        "cancelled",
        "context_too_long",
        "deadline_exceeded",
        "fence_lost",
        "file_invalid",
        "file_not_found",
        "goal_invalid",
        "no_model",
        "no_sandbox",
        "outcome_unknown",
        "scope_missing",
        "state_conflict",
        "token_revoked",
    }
)
"""Failures that the same attempt again would only repeat."""


class StepError(OctoError):
    """A step whose attempts are used up; ``reasons`` are the judge's or the failure's."""

    def __init__(self, step: str, code: str, detail: str, reasons: tuple[str, ...]) -> None:
        super().__init__(detail, code=code)
        self.step = step
        self.reasons = reasons


@dataclass(frozen=True, slots=True)
class StepTools:
    """What running a step needs."""

    store: TaskStore
    stream: TextStream
    calls: TaskCalls
    clock: Clock
    log: Log
    tracer: Tracer
    on_progress: Callable[[str, float], Awaitable[None]]


async def run_step(
    tools: StepTools,
    task: TaskRecord,
    spec: PlanStep,
    record: StepRecord,
    inputs: Mapping[str, str],
    deadline: Deadline,
) -> ExecuteResult:
    """Run ``spec`` until a result is accepted; raise :class:`StepError` when the attempts are used up.

    A step that was begun by an earlier run goes on with the attempt that it was at.
    """
    with tools.tracer.span(f"step {spec.id}") as span:
        span.attributes |= {"octollm.arm": spec.arm, "octollm.title": spec.title}
        return await _run_attempts(tools, task, spec, record, inputs, deadline)


async def _run_attempts(
    tools: StepTools,
    task: TaskRecord,
    spec: PlanStep,
    record: StepRecord,
    inputs: Mapping[str, str],
    deadline: Deadline,
) -> ExecuteResult:
    retries = task.contract.budget.max_retries
    last = 1 + (DEFAULT_RETRIES if retries is None else retries)
    attempt = max(1, record.attempt)
    reasons = record.reasons
    while True:
        contract = _contract(task, spec, inputs, reasons)
        await _begin(tools, task, spec, attempt)
        code = "not_accepted"
        try:
            with tools.tracer.span(f"attempt {attempt}") as span:
                result, length = await _execute(tools, task, spec, contract, attempt, deadline)
                verdict = await _judge(tools, spec, contract, result, attempt, deadline)
                if verdict.accepted:
                    await _complete(tools, task, spec, result, verdict, attempt, length)
                    return result
                reasons = verdict.reasons or ("The judge did not accept the result and gave no reason.",)
                span.code, span.message = code, reasons[0]
        except OctoError as error:
            if error.code in ("fence_lost", "cancelled"):
                raise
            code, reasons = error.code, _reasons(error)
        final = attempt >= last or code in FINAL_CODES
        await tools.store.change(
            task.task_id,
            "step.failed",
            {"step": spec.id, "attempt": attempt, "reasons": list(reasons), "code": code, "final": final},
            run=task.run,
            step=(spec.id, {"reasons": list(reasons), **({"status": "failed"} if final else {"attempt": attempt + 1})}),
        )
        if final:
            raise StepError(spec.id, code, f"The step “{spec.title}” failed.", reasons)
        attempt += 1


async def _begin(tools: StepTools, task: TaskRecord, spec: PlanStep, attempt: int) -> None:
    now = tools.clock.now()
    await tools.store.change(
        task.task_id,
        "step.started",
        {"step": spec.id, "title": spec.title, "arm": spec.arm, "attempt": attempt, "run": task.run},
        run=task.run,
        step=(spec.id, {"status": "running", "attempt": attempt, "run": task.run, "text": "", "started_at": now}),
    )


async def _execute(
    tools: StepTools, task: TaskRecord, spec: PlanStep, contract: TaskContract, attempt: int, deadline: Deadline
) -> tuple[ExecuteResult, int]:
    text = LiveText(
        tools.store, tools.stream, tools.log, task_id=task.task_id, step=spec.id, attempt=attempt, run=task.run
    )

    async def on_line(line: Line) -> None:
        if line.type == "token":
            text.add(line.text, reset=line.reset)
            await tools.on_progress(spec.id, estimate_within(text.length))
        elif line.type == "progress":
            await tools.on_progress(spec.id, line.progress)

    async with text:
        result = await tools.calls.execute(spec.arm, contract, deadline, step=spec.id, attempt=attempt, on_line=on_line)
    return result, text.length


async def _judge(
    tools: StepTools,
    spec: PlanStep,
    contract: TaskContract,
    result: ExecuteResult,
    attempt: int,
    deadline: Deadline,
) -> AcceptResult:
    async def ignore(_line: Line) -> None:
        """Ignore a line: a verdict is told whole, the stream only keeps the connection alive."""

    request = AcceptRequest(spec.goal, result, spec.acceptance_criteria, contract.context.files)
    with tools.tracer.span("accept") as span:
        verdict = await tools.calls.accept(request, deadline, step=spec.id, attempt=attempt, on_line=ignore)
        span.attributes |= {"octollm.accepted": verdict.accepted, "octollm.score": verdict.score}
        return verdict


async def _complete(
    tools: StepTools,
    task: TaskRecord,
    spec: PlanStep,
    result: ExecuteResult,
    verdict: AcceptResult,
    attempt: int,
    length: int,
) -> None:
    await tools.store.change(
        task.task_id,
        "step.completed",
        {
            "step": spec.id,
            "attempt": attempt,
            "output": result.output[:MAX_OUTPUT_IN_EVENT],
            "artifacts": msgspec.to_builtins(result.artifacts),
            "usage": msgspec.to_builtins(result.usage),
            "score": verdict.score,
            "reasons": list(verdict.reasons),
            "text_length": length,
        },
        run=task.run,
        step=(
            spec.id,
            {"status": "completed", "result": result, "reasons": None, "finished_at": tools.clock.now()},
        ),
    )


def _contract(task: TaskRecord, spec: PlanStep, inputs: Mapping[str, str], reasons: tuple[str, ...]) -> TaskContract:
    context = task.contract.context
    files = tuple(file for file in context.files if file.name in spec.files)
    return msgspec.structs.replace(
        task.contract,
        task_id=task.task_id,
        goal=spec.goal,
        context=TaskContext(files=files, text=context.text, inputs=dict(inputs), reasons=reasons),
        acceptance_criteria=spec.acceptance_criteria,
        assigned_arm=spec.arm,
    )


def _reasons(error: OctoError) -> tuple[str, ...]:
    details = tuple(fault.detail for fault in error.faults)
    service = f"{error.service}: " if isinstance(error, RemoteError) and error.code == "internal" else ""
    return details or (service + error.detail,)
