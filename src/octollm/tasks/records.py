"""Task and step records read from SQL rows, and the views of them that the API returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec

from octollm.clock import format_rfc3339
from octollm.contracts.api import StepView, TaskFailure, TaskSummary, TaskView
from octollm.contracts.approvals import ApprovalView
from octollm.contracts.task import ExecuteResult, Plan, PlanStep, StepStatus, Task, TaskStatus, Usage

T = TypeVar("T")
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One task."""

    task_id: str
    tenant: str
    kind: str
    sub: str
    cred: str
    authority: str
    contract: Task
    status: TaskStatus
    progress: float
    version: int
    epoch: int
    plan: Plan | None
    correlation_id: str
    traceparent: str
    created_at: float
    started_at: float | None
    deadline_at: float | None
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of a task."""

    step: str
    arm: str
    title: str
    status: StepStatus
    attempt: int
    epoch: int
    spec: PlanStep
    result: ExecuteResult | None
    reasons: tuple[str, ...]
    text: str


def task_from_row(row: Row) -> TaskRecord:
    """Read a row of ``tasks``."""
    return TaskRecord(
        task_id=row["task_id"],
        tenant=row["tenant"],
        kind=row["kind"],
        sub=row["sub"],
        cred=row["cred"],
        authority=row["authority"],
        contract=msgspec.convert(row["contract"], Task),
        status=row["status"],
        progress=row["progress"],
        version=row["version"],
        epoch=row["run"],
        plan=_convert_optional(row["plan"], Plan),
        correlation_id=row["correlation_id"],
        traceparent=row["traceparent"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        deadline_at=row["deadline_at"],
        instructions=tuple(each["text"] for each in row["instructions"] or ()),
    )


RECORD_COLUMNS = (
    "task_id, tenant, kind, sub, cred, authority, contract, status, progress, version, run, plan, correlation_id,"
    " traceparent, created_at, started_at, deadline_at, instructions"
)
"""What :func:`record_from_driver` reads."""


def put_off(row: Mapping[str, Any], now: float) -> float | None:
    """Return the deadline of a task that has waited: its time limit does not count that, a client's deadline does."""
    deadline_at: float | None = row["deadline_at"]
    if deadline_at is None or task_from_row(row).contract.deadline is not None:
        return deadline_at
    return deadline_at + now - row["waiting_since"]


def record_from_driver(row: Row) -> TaskRecord:
    """Read a row of ``tasks`` from a statement that went straight to the driver: JSON is text there."""
    decoded = {name: row[name] for name in RECORD_COLUMNS.split(", ")}
    for name in ("contract", "plan", "instructions"):
        if decoded[name] is not None:
            decoded[name] = msgspec.json.decode(decoded[name])
    return task_from_row(decoded)


def step_from_row(row: Row) -> StepRecord:
    """Read a row of ``steps``."""
    return StepRecord(
        step=row["step"],
        arm=row["arm"],
        title=row["title"],
        status=row["status"],
        attempt=row["attempt"],
        epoch=row["run"],
        spec=msgspec.convert(row["spec"], PlanStep),
        result=_convert_optional(row["result"], ExecuteResult),
        reasons=tuple(row["reasons"] or ()),
        text=row["text"],
    )


def new_step_record(step: PlanStep) -> StepRecord:
    """Return the record of a step that has not started."""
    return StepRecord(step.id, step.arm, step.title, "pending", 0, 0, step, None, (), "")


def approval_from_row(row: Row) -> ApprovalView:
    """Read a row of ``approvals``."""
    return ApprovalView(
        approval_id=row["approval_id"],
        kind=row["kind"],
        reason=row["reason"],
        status=row["status"],
        requested_at=format_rfc3339(row["requested_at"]),
        expires_at=format_rfc3339(row["expires_at"]),
        step=row["step"],
        decided_at=_format_optional_time(row["decided_at"]),
        decided_by=row["decided_by"],
        comment=row["comment"],
        goals=row["goals"] or {},
    )


def build_task_view(
    row: Row,
    steps: Sequence[Row],
    usage: Usage,
    model: str,
    approvals: tuple[ApprovalView, ...] = (),
    children: tuple[TaskSummary, ...] = (),
) -> TaskView:
    """Return the API's view of a task; ``model`` is the one that it used last."""
    contract = msgspec.convert(row["contract"], Task)
    result: dict[str, Any] = row["result"] or {}
    traceparent = cast("str", row["traceparent"])
    return msgspec.convert(
        {
            "task_id": row["task_id"],
            "status": row["status"],
            "goal": row["goal"],
            "progress": row["progress"],
            "version": row["version"],
            "created_at": format_rfc3339(row["created_at"]),
            "updated_at": format_rfc3339(row["updated_at"]),
            "started_at": _format_optional_time(row["started_at"]),
            "finished_at": _format_optional_time(row["finished_at"]),
            "deadline": _format_optional_time(row["deadline_at"]),
            "budget": msgspec.to_builtins(contract.budget),
            "files": msgspec.to_builtins(contract.context.files),
            "steps": [msgspec.to_builtins(_build_step_view(step)) for step in steps],
            "output": row["output"] or "",
            "artifacts": result.get("artifacts", []),
            "usage": msgspec.to_builtins(usage),
            "error": msgspec.to_builtins(_convert_optional(row["error"], TaskFailure)),
            "correlation_id": row["correlation_id"],
            "trace_id": traceparent.split("-")[1] if traceparent else "",
            "model": model,
            "found": result.get("found", True),
            "approvals": msgspec.to_builtins(approvals),
            "instructions": row["instructions"] or (),
            "forked_from": row["forked_from"],
            "parent_task_id": row["parent_task_id"],
            "children": msgspec.to_builtins(children),
        },
        TaskView,
    )


def build_task_summary(row: Row) -> TaskSummary:
    """Return the API's view of a task in a list."""
    return TaskSummary(
        row["task_id"],
        row["status"],
        row["goal"][:300],
        row["progress"],
        format_rfc3339(row["created_at"]),
        format_rfc3339(row["updated_at"]),
    )


def _build_step_view(row: Row) -> StepView:
    step = step_from_row(row)
    result = step.result or ExecuteResult(output="")
    return StepView(
        step=step.step,
        title=step.title,
        arm=step.arm,
        status=step.status,
        attempt=step.attempt,
        depends_on=step.spec.depends_on,
        output=result.output,
        artifacts=result.artifacts,
        evidence=result.evidence,
        usage=result.usage,
        reasons=step.reasons,
        started_at=_format_optional_time(row["started_at"]),
        finished_at=_format_optional_time(row["finished_at"]),
    )


def _convert_optional(value: object, kind: type[T]) -> T | None:
    return None if value is None else msgspec.convert(value, kind)


def _format_optional_time(seconds: float | None) -> str | None:
    return None if seconds is None else format_rfc3339(seconds)
