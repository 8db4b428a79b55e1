"""One step of a task: attempts, each executed by an arm and evaluated by the judge, until a result is accepted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from octollm.clock import Clock
from octollm.contracts.operations import AcceptRequest, AcceptResult
from octollm.contracts.problems import allows_new_attempt
from octollm.contracts.stream import StreamEvent
from octollm.contracts.task import Artifact, Evidence, ExecuteResult, PlanStep, Task, TaskContext
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline
from octollm.storage.text_stream import TextStream
from octollm.tasks.calls import TaskCalls
from octollm.tasks.documents import add_notes
from octollm.tasks.live_text import LiveText
from octollm.tasks.records import StepRecord, TaskRecord
from octollm.tasks.state import estimate_step_progress
from octollm.tasks.store import TaskStore
from octollm.telemetry import Logger, Tracer

DEFAULT_RETRIES = 1
MAX_ADDED_CHECKS = 20
"""Checks of the judge that are told with a result."""
MAX_OUTPUT_IN_EVENT = 2000


StoreTexts = Callable[[str, Sequence[Artifact], Mapping[str, str]], Awaitable[None]]
"""Stores a tenant's artifacts whose texts are given by digest."""
LoadTexts = Callable[[str, Sequence[Artifact]], Awaitable[dict[str, str]]]
"""Returns the texts of a tenant's artifacts by digest, without those that are large or not text."""


class StepError(OctoError):
    """A step failed in all of its attempts; ``reasons`` are the judge's, or those of the failure."""

    def __init__(self, step: str, code: str, detail: str, reasons: tuple[str, ...]) -> None:
        super().__init__(detail, code=code)
        self.step = step
        self.reasons = reasons


@dataclass(frozen=True, slots=True)
class StepDependencies:
    """The collaborators of a step."""

    store: TaskStore
    stream: TextStream
    calls: TaskCalls
    clock: Clock
    log: Logger
    tracer: Tracer
    on_progress: Callable[[str, float], Awaitable[None]]
    load_texts: LoadTexts
    store_texts: StoreTexts


async def run_step(
    deps: StepDependencies,
    task: TaskRecord,
    spec: PlanStep,
    record: StepRecord,
    inputs: Mapping[str, str],
    deadline: Deadline,
) -> ExecuteResult:
    """Run ``spec`` until a result is accepted; raise :class:`StepError` when the attempts are used up.

    A step that an earlier epoch started continues with the attempt that is recorded for it.
    """
    with deps.tracer.span(f"step {spec.id}") as span:
        span.attributes |= {"octollm.arm": spec.arm, "octollm.title": spec.title}
        return await _run_attempts(deps, task, spec, record, inputs, deadline)


async def _run_attempts(
    deps: StepDependencies,
    task: TaskRecord,
    spec: PlanStep,
    record: StepRecord,
    inputs: Mapping[str, str],
    deadline: Deadline,
) -> ExecuteResult:
    retries = task.contract.budget.max_retries
    max_attempts = 1 + (DEFAULT_RETRIES if retries is None else retries)
    # A takeover continues the recorded attempt. Its idempotency keys are the same, so finished calls are answered from
    # their stored responses. Only the decision to retry below increments the attempt.
    attempt = max(1, record.attempt)
    reasons = record.reasons
    while True:
        contract = _build_contract(task, spec, inputs, reasons)
        await _start_attempt(deps, task, spec, attempt)
        code, can_retry, pause = "not_accepted", True, 0.0
        try:
            with deps.tracer.span(f"attempt {attempt}") as span:
                result, length = await _execute(deps, task, spec, contract, attempt, deadline)
                verdict = await _judge(deps, task, spec, contract, result, attempt, deadline)
                if verdict.accepted:
                    result = add_notes(_with_checks(result, verdict), contract)
                    await _complete_step(deps, task, spec, result, verdict, attempt, length)
                    return result
                reasons = verdict.reasons or ("The judge did not accept the result and gave no reason.",)
                span.code, span.message = code, reasons[0]
        except OctoError as error:
            # Not a failure of this step: a newer epoch holds the task, or it was cancelled.
            if error.code in ("fence_lost", "cancelled"):
                raise
            code, reasons = error.code, _failure_reasons(error)
            pause = error.retry_after or 0.0
            # Calling before ``retry_after`` has passed would waste an attempt on the same refusal.
            can_retry = allows_new_attempt(error) and pause < deadline.remaining()
        final = attempt >= max_attempts or not can_retry
        # One transaction for the event and the next attempt's number, so that a takeover neither repeats nor skips one.
        await deps.store.change(
            task.task_id,
            "step.failed",
            {"step": spec.id, "attempt": attempt, "reasons": list(reasons), "code": code, "final": final},
            epoch=task.epoch,
            step=(spec.id, {"reasons": list(reasons), **({"status": "failed"} if final else {"attempt": attempt + 1})}),
        )
        if final:
            raise StepError(spec.id, code, f"The step “{spec.title}” failed.", reasons)
        await asyncio.sleep(pause)
        attempt += 1


async def _start_attempt(deps: StepDependencies, task: TaskRecord, spec: PlanStep, attempt: int) -> None:
    now = deps.clock.now()
    await deps.store.change(
        task.task_id,
        "step.started",
        {"step": spec.id, "title": spec.title, "arm": spec.arm, "attempt": attempt, "run": task.epoch},
        epoch=task.epoch,
        # The saved text is cleared, or clients would get the previous attempt's text as that of this one.
        step=(spec.id, {"status": "running", "attempt": attempt, "run": task.epoch, "text": "", "started_at": now}),
    )


async def _execute(
    deps: StepDependencies, task: TaskRecord, spec: PlanStep, contract: Task, attempt: int, deadline: Deadline
) -> tuple[ExecuteResult, int]:
    text = LiveText(
        deps.store, deps.stream, deps.log, task_id=task.task_id, step=spec.id, attempt=attempt, epoch=task.epoch
    )

    async def on_line(line: StreamEvent) -> None:
        if line.type == "token":
            text.add(line.text, reset=line.reset)
            await deps.on_progress(spec.id, estimate_step_progress(text.length))
        elif line.type == "progress":
            await deps.on_progress(spec.id, line.progress)

    # Leaving the context flushes and saves the text, so that the `text_length` of `step.completed` is final.
    async with text:
        result = await deps.calls.execute(spec.arm, contract, deadline, step=spec.id, attempt=attempt, on_event=on_line)
    # Before the judge or a later step reads them. A takeover gets the same response again, and stores the same bytes.
    await deps.store_texts(task.tenant, result.artifacts, result.texts)
    fields = {name: getattr(result, name) for name in ExecuteResult.__struct_fields__}
    return ExecuteResult(**fields), text.length


async def _judge(
    deps: StepDependencies,
    task: TaskRecord,
    spec: PlanStep,
    contract: Task,
    result: ExecuteResult,
    attempt: int,
    deadline: Deadline,
) -> AcceptResult:
    async def ignore(_line: StreamEvent) -> None:
        """Ignore a line: the verdict comes at the end, and the stream only keeps the connection alive."""

    # Small artifacts are sent with the request: the judge would otherwise fetch each with a call back to here.
    texts = await deps.load_texts(task.tenant, result.artifacts)
    request = AcceptRequest(spec.goal, result, spec.acceptance_criteria, contract.context.files, texts)
    with deps.tracer.span("accept") as span:
        verdict = await deps.calls.accept(request, deadline, step=spec.id, attempt=attempt, on_event=ignore)
        span.attributes |= {"octollm.accepted": verdict.accepted, "octollm.score": verdict.score}
        return verdict


def _with_checks(result: ExecuteResult, verdict: AcceptResult) -> ExecuteResult:
    """Return a result with the judge's checks beside the arm's own, for the reader: also what nobody has checked."""
    evidence = result.evidence or Evidence(kind="text")
    # Of a kind that the arm has told itself, such as the tests of code, one check is enough.
    known = {check.name for check in evidence.checks} | {evidence.kind}
    added = [check for check in verdict.checks if check.name not in known][:MAX_ADDED_CHECKS]
    if not added:
        return result
    evidence = msgspec.structs.replace(evidence, checks=(*evidence.checks, *added))
    return msgspec.structs.replace(result, evidence=evidence)


async def _complete_step(
    deps: StepDependencies,
    task: TaskRecord,
    spec: PlanStep,
    result: ExecuteResult,
    verdict: AcceptResult,
    attempt: int,
    length: int,
) -> None:
    await deps.store.change(
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
        epoch=task.epoch,
        step=(
            spec.id,
            {"status": "completed", "result": result, "reasons": None, "finished_at": deps.clock.now()},
        ),
    )


def _build_contract(task: TaskRecord, spec: PlanStep, inputs: Mapping[str, str], reasons: tuple[str, ...]) -> Task:
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


def _failure_reasons(error: OctoError) -> tuple[str, ...]:
    details = tuple(fault.detail for fault in error.field_errors)
    service = f"{error.service}: " if isinstance(error, RemoteError) and error.code == "internal" else ""
    return details or (service + error.detail,)
