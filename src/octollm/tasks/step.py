"""One step of a task: attempts, each executed by an arm and evaluated by the judge, until a result is accepted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from octollm.clock import Clock
from octollm.context import current_context
from octollm.contracts.api import TaskFailure
from octollm.contracts.attempts import AttemptRequest, AttemptResult, AttemptStatus, AttemptVerdict
from octollm.contracts.operations import AcceptRequest, AcceptResult
from octollm.contracts.problems import allows_new_attempt
from octollm.contracts.stream import StreamEvent
from octollm.contracts.task import Artifact, Evidence, ExecuteResult, PlanStep, Task, TaskContext
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline
from octollm.storage.characters import replace_nul
from octollm.storage.programs import SqlStatement
from octollm.storage.text_stream import TextStream
from octollm.tasks.attempts import AttemptReader, NewAttempt, end_attempt, excerpt, repeats_call
from octollm.tasks.calls import TaskCalls
from octollm.tasks.changes import PendingChanges, TaskChange
from octollm.tasks.documents import add_notes
from octollm.tasks.live_text import LiveText
from octollm.tasks.records import StepRecord, TaskRecord
from octollm.tasks.state import estimate_step_progress
from octollm.tasks.store import TaskStore
from octollm.telemetry import Logger, Tracer

DEFAULT_RETRIES = 1
MAX_ADDED_CHECKS = 20
"""Checks of the judge that are reported with a result."""
MAX_OUTPUT_IN_EVENT = 2000


StoreTexts = Callable[[str, Sequence[Artifact], Mapping[str, str]], Awaitable[None]]
"""Stores a tenant's artifacts whose texts are given by digest."""
LoadTexts = Callable[[str, Sequence[Artifact]], Awaitable[dict[str, str]]]
"""Returns the texts of a tenant's artifacts by digest, without those that are large or not text."""


class ReportProgress(Protocol):
    """Reports the progress of a step, from 0 to 100, with the arm's message if it has one."""

    def __call__(self, step: str, percent: float, message: str = "") -> Awaitable[None]:
        """Report it."""
        ...


MAX_DETAIL = 600
"""Characters of what a task says about the step that failed; its reasons have the rest."""


class StepError(OctoError):
    """A step failed in all of its attempts; ``reasons`` are the judge's, or those of the failure."""

    def __init__(self, step: str, code: str, detail: str, reasons: tuple[str, ...]) -> None:
        super().__init__(detail, code=code)
        self.step = step
        self.reasons = reasons


def make_step_error(spec: PlanStep, code: str, reasons: tuple[str, ...]) -> StepError:
    """Return the error of a step whose attempts are used up."""
    # Whoever shows the detail alone, such as an exception's text, shows the reason with it.
    why = f": {reasons[0]}" if reasons else "."
    return StepError(spec.id, code, f"The step “{spec.title}” failed{why}"[:MAX_DETAIL], reasons)


class ArmSlots:
    """Limits how many steps of one arm this process runs at a time; 0 is any number."""

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._slots: dict[str, asyncio.Semaphore] = {}

    @contextlib.asynccontextmanager
    async def take(self, arm: str, before_wait: Callable[[], Awaitable[None]]) -> AsyncGenerator[None]:
        """Wait for a place of ``arm``, in order. ``before_wait`` is called if there is none now."""
        if not self._limit:
            yield
            return
        slots = self._slots.setdefault(arm, asyncio.Semaphore(self._limit))
        if slots.locked():
            await before_wait()
        async with slots:
            yield


@dataclass(frozen=True, slots=True)
class StepDependencies:
    """The collaborators of a step."""

    store: TaskStore
    stream: TextStream
    calls: TaskCalls
    clock: Clock
    log: Logger
    tracer: Tracer
    on_progress: ReportProgress
    load_texts: LoadTexts
    store_texts: StoreTexts
    attempts: AttemptReader
    changes: PendingChanges
    arm_slots: ArmSlots = field(default_factory=ArmSlots)


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
        if task.contract.parent_task_id is not None:
            # No place is needed: a step that has one may wait for the sub-task.
            return await _run_attempts(deps, task, spec, record, inputs, deadline)
        async with deps.arm_slots.take(spec.arm, deps.changes.flush):
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
    # Not the number of the attempt: an attempt that a person interrupted is no failure.
    failures = 0 if attempt == 1 else await deps.attempts.count_failures(task.task_id, spec.id)
    reasons = record.reasons
    while True:
        contract = _build_contract(task, spec, inputs, reasons)
        contract, deadline = await _start_attempt(deps, task, spec, contract, attempt, deadline)
        code, can_retry, pause = "not_accepted", True, 0.0
        why: tuple[str, ...] = ()
        result: ExecuteResult | None = None
        verdict: AcceptResult | None = None
        failure: TaskFailure | None = None
        try:
            with deps.tracer.span(f"attempt {attempt}") as span:
                # Decided by what is stored, so that a worker that takes over decides alike.
                call = attempt if attempt == 1 else await deps.attempts.call_of(task.task_id, spec.id, attempt)
                result, length = await _execute(deps, task, spec, contract, attempt, call, deadline)
                verdict = await _judge(deps, task, spec, contract, result, attempt, deadline)
                if verdict.accepted:
                    result = add_notes(_with_checks(result, verdict), contract)
                    _complete_step(deps, task, spec, result, verdict, attempt, length)
                    return result
                why = reasons = verdict.reasons or ("The judge did not accept the result and gave no reason.",)
                span.code, span.message = code, reasons[0]
        except OctoError as error:
            # Not a failure of this step: a newer epoch holds the task, or it was cancelled.
            if error.code in ("fence_lost", "cancelled"):
                raise
            code, why = error.code, _failure_reasons(error)
            failure = replace_nul(TaskFailure(code, error.detail, (), error.field_errors))
            if not repeats_call(failure.code, has_result=result is not None):
                reasons = why
            pause = error.retry_after or 0.0
            # Calling before ``retry_after`` has passed would waste an attempt on the same refusal.
            can_retry = allows_new_attempt(error) and pause < deadline.remaining()
        if code == "deadline_exceeded" and await _is_extended(deps, task, deadline):
            # The call had the deadline that the task had when it was made. That is no failure of the step.
            can_retry = True
        else:
            failures += 1
        final = failures >= max_attempts or not can_retry
        end = _attempt_end(deps, task, spec, attempt, _Outcome(result, verdict, failure))
        # One transaction for the event and the next attempt's number, so that a takeover neither repeats nor skips one.
        values = (
            {"reasons": list(why), "status": "failed"} if final else {"reasons": list(reasons), "attempt": attempt + 1}
        )
        data = {"step": spec.id, "attempt": attempt, "reasons": list(why), "code": code, "final": final}
        await deps.changes.apply(
            TaskChange(task.task_id, (("step.failed", data),), task.epoch, steps=((spec.id, values),), statements=end)
        )
        if final:
            raise make_step_error(spec, code, why)
        await asyncio.sleep(pause)
        attempt += 1


async def _is_extended(deps: StepDependencies, task: TaskRecord, deadline: Deadline) -> bool:
    """Return whether the task has time left although ``deadline``, which was its own, has passed."""
    ends_at = (await deps.store.get(task.task_id)).deadline_at
    return deadline.remaining() <= 0 and ends_at is not None and ends_at > deps.clock.now()


async def _start_attempt(
    deps: StepDependencies, task: TaskRecord, spec: PlanStep, contract: Task, attempt: int, deadline: Deadline
) -> tuple[Task, Deadline]:
    """Record that an attempt begins; return the contract for it, and the task's deadline."""
    now = deps.clock.now()
    context, trace = contract.context, current_context().trace
    inputs = {step: excerpt(output) for step, output in context.inputs.items()}
    files = tuple(file.name for file in context.files)
    request = AttemptRequest(
        contract.goal, inputs, files, context.reasons, budget=contract.budget, deadline=contract.deadline
    )
    begun = NewAttempt(task, spec, attempt, request, "" if trace is None else trace.trace_id)
    data = {"step": spec.id, "title": spec.title, "arm": spec.arm, "attempt": attempt, "run": task.epoch}
    # The saved text is cleared, or clients would get the previous attempt's text as that of this one.
    values = {"status": "running", "attempt": attempt, "run": task.epoch, "text": "", "started_at": now}
    applied = await deps.changes.apply(
        TaskChange(task.task_id, (("step.started", data),), task.epoch, steps=((spec.id, values),), attempt=begun)
    )
    (start,) = applied.starts
    if start.deadline_at is not None and start.deadline_at != task.deadline_at:
        # A person has put it off since the worker took the task.
        deadline = Deadline.after(deps.clock, start.deadline_at - now)
    # What a person has changed since the attempt first began is left to the next one.
    return msgspec.structs.replace(
        contract,
        context=msgspec.structs.replace(context, instructions=start.request.instructions),
        budget=start.request.budget,
        deadline=start.request.deadline,
    ), deadline


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What an attempt has come to: the arm's result, the judge's verdict on it, and the failure of either call."""

    result: ExecuteResult | None = None
    verdict: AcceptResult | None = None
    failure: TaskFailure | None = None


def _attempt_end(
    deps: StepDependencies, task: TaskRecord, spec: PlanStep, attempt: int, outcome: _Outcome
) -> list[SqlStatement]:
    """Return the writes that record the outcome of an attempt."""
    result, verdict = outcome.result, outcome.verdict
    status: AttemptStatus = "failed"
    if verdict is not None and outcome.failure is None:
        status = "accepted" if verdict.accepted else "rejected"
    output = "" if result is None else result.output
    stored = AttemptResult(
        output=None if result is None else excerpt(output),
        artifacts=() if result is None else result.artifacts,
        evidence=None if result is None else result.evidence,
        verdict=None
        if verdict is None
        else AttemptVerdict(verdict.accepted, verdict.score, verdict.reasons, verdict.checks),
        error=outcome.failure,
    )
    return end_attempt(task, spec.id, attempt, status, stored, output, deps.clock.now())


async def _execute(
    deps: StepDependencies,
    task: TaskRecord,
    spec: PlanStep,
    contract: Task,
    attempt: int,
    call: int,
    deadline: Deadline,
) -> tuple[ExecuteResult, int]:
    text = LiveText(
        deps.store, deps.stream, deps.log, task_id=task.task_id, step=spec.id, attempt=attempt, epoch=task.epoch
    )

    async def on_line(line: StreamEvent) -> None:
        if line.type == "token":
            text.add(line.text, reset=line.reset)
            await deps.on_progress(spec.id, estimate_step_progress(text.length))
        elif line.type == "progress":
            await deps.on_progress(spec.id, line.progress, line.message)

    # Leaving the context flushes and saves the text, so that the `text_length` of `step.completed` is final.
    async with text:
        result = await deps.calls.execute(
            spec.arm, contract, deadline, step=spec.id, attempt=attempt, call=call, on_event=on_line
        )
    # Before the judge or a later step reads them. A takeover gets the same response again, and stores the same bytes.
    await deps.store_texts(task.tenant, result.artifacts, result.texts)
    fields = {name: getattr(result, name) for name in ExecuteResult.__struct_fields__}
    return replace_nul(ExecuteResult(**fields)), text.length


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
    # The result is measured by what a person added, too.
    goal = "\n".join((spec.goal, *(f"- {each}" for each in contract.context.instructions)))
    request = AcceptRequest(goal, result, spec.acceptance_criteria, contract.context.files, texts)
    with deps.tracer.span("accept") as span:
        verdict = replace_nul(
            await deps.calls.accept(request, deadline, step=spec.id, attempt=attempt, on_event=ignore)
        )
        span.attributes |= {"octollm.accepted": verdict.accepted, "octollm.score": verdict.score}
        return verdict


def _with_checks(result: ExecuteResult, verdict: AcceptResult) -> ExecuteResult:
    """Return a result with the judge's checks beside the arm's own, for the reader: also what nobody has checked."""
    evidence = result.evidence or Evidence(kind="text")
    # Of a kind that the arm has reported itself, such as the tests of code, one check is enough.
    known = {check.name for check in evidence.checks} | {evidence.kind}
    added = [check for check in verdict.checks if check.name not in known][:MAX_ADDED_CHECKS]
    if not added:
        return result
    evidence = msgspec.structs.replace(evidence, checks=(*evidence.checks, *added))
    return msgspec.structs.replace(result, evidence=evidence)


def _complete_step(
    deps: StepDependencies,
    task: TaskRecord,
    spec: PlanStep,
    result: ExecuteResult,
    verdict: AcceptResult,
    attempt: int,
    length: int,
) -> None:
    data = {
        "step": spec.id,
        "attempt": attempt,
        "output": result.output[:MAX_OUTPUT_IN_EVENT],
        "artifacts": msgspec.to_builtins(result.artifacts),
        "usage": msgspec.to_builtins(result.usage),
        "score": verdict.score,
        "reasons": list(verdict.reasons),
        "text_length": length,
    }
    values = {"status": "completed", "result": result, "reasons": None, "finished_at": deps.clock.now()}
    # The runner writes it with the start of the next step, or with the end of the task.
    ended = _attempt_end(deps, task, spec, attempt, _Outcome(result, verdict))
    deps.changes.defer(
        TaskChange(task.task_id, (("step.completed", data),), task.epoch, steps=((spec.id, values),), statements=ended)
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
    return replace_nul(details or (service + error.detail,))
