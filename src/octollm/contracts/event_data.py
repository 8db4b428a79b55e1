"""The ``data`` of each type of event: members without a default are required, further members are kept."""

from __future__ import annotations

from typing import Literal

import msgspec

from octollm.contracts.approvals import ApprovalView
from octollm.contracts.task import Artifact, TaskStatus, Usage


class EventData(msgspec.Struct, frozen=True, kw_only=True):
    """The ``data`` of an event. Members without a default are required."""


class TaskReference(EventData, frozen=True, kw_only=True):
    """``task_id`` names the task."""

    task_id: str


class TaskData(TaskReference, frozen=True, kw_only=True):
    """What every event of a task has. ``progress`` is from 0 to 100 and never falls."""

    progress: float = 0.0


class TaskAcceptedData(TaskData, frozen=True, kw_only=True):
    """``goal`` is cut after 2,000 characters. ``forked_from`` is the task of which this one is a retry or a fork.

    ``parent_task_id`` is the task that it is a sub-task of.
    """

    goal: str
    forked_from: str = ""
    parent_task_id: str = ""


class PlannedStep(msgspec.Struct, frozen=True):
    """One step of a plan, as events show it."""

    step: str
    title: str
    arm: str
    depends_on: tuple[str, ...] = ()


class TaskPlannedData(TaskData, frozen=True, kw_only=True):
    """The steps of the plan. ``reused`` are those whose results a fork took over."""

    steps: tuple[PlannedStep, ...]
    reused: tuple[str, ...] = ()


class TaskReplannedData(TaskPlannedData, frozen=True, kw_only=True):
    """``reasons`` say why the former plan failed."""

    reasons: tuple[str, ...]


class TaskWaitingData(TaskData, frozen=True, kw_only=True):
    """``reason`` says why a person is asked; ``approvals`` are all that are to be decided.

    ``status`` is ``running`` while other steps of the task go on.
    """

    reason: str
    approvals: tuple[ApprovalView, ...]
    status: TaskStatus = "waiting"


class TaskApprovedData(TaskData, frozen=True, kw_only=True):
    """``approvals`` are the ids of those that were approved; ``goals`` the goals that were changed, by step."""

    approvals: tuple[str, ...]
    decided_by: str = ""
    comment: str = ""
    goals: dict[str, str] = {}
    status: TaskStatus = "running"


class TaskPausedData(TaskData, frozen=True, kw_only=True):
    """``by`` is who paused it."""

    by: str
    status: Literal["paused"] = "paused"


class TaskResumedData(TaskData, frozen=True, kw_only=True):
    """``by`` is who resumed it."""

    by: str
    status: TaskStatus = "running"


class TaskInstructedData(TaskData, frozen=True, kw_only=True):
    """``by`` is who added the instruction, ``number`` counts the task's from 1."""

    by: str
    text: str
    number: int


class TaskExtendedData(TaskData, frozen=True, kw_only=True):
    """``by`` is who raised the limits; the others are those that the task has now."""

    by: str
    max_tokens: int | None = None
    max_cost_usd: float | None = None
    max_time_seconds: float | None = None
    deadline: str | None = None


class TaskProgressData(TaskReference, frozen=True, kw_only=True):
    """``step`` names the step that reported, if one did."""

    progress: float
    step: str = ""


class TaskCompletedData(TaskData, frozen=True, kw_only=True):
    """``output`` is cut if long. ``reason`` stands in its place at the end of a token for direct calls."""

    status: Literal["completed"]
    duration_ms: int
    output: str = ""
    artifacts: tuple[Artifact, ...] = ()
    usage: Usage = Usage()
    reason: str = ""


class TaskFailedData(TaskData, frozen=True, kw_only=True):
    """``code`` is an error code; ``reasons`` are the judge's."""

    status: Literal["failed"]
    code: str
    reason: str
    reasons: tuple[str, ...] = ()
    duration_ms: int = 0


class TaskCancelledData(TaskData, frozen=True, kw_only=True):
    """``reason`` is empty when the caller gave none."""

    status: Literal["cancelled"]
    reason: str = ""


class StepStartedData(TaskData, frozen=True, kw_only=True):
    """``run`` is the fencing token of the worker."""

    step: str
    arm: str
    attempt: int
    title: str = ""
    run: int = 0


class StepCompletedData(TaskData, frozen=True, kw_only=True):
    """``text_length`` counts the code points of the step's live text; ``score`` and ``reasons`` are the judge's."""

    step: str
    attempt: int
    text_length: int
    output: str = ""
    artifacts: tuple[Artifact, ...] = ()
    usage: Usage = Usage()
    score: float | None = None
    reasons: tuple[str, ...] = ()


class StepFailedData(TaskData, frozen=True, kw_only=True):
    """``final``: no further attempt follows."""

    step: str
    attempt: int
    reasons: tuple[str, ...]
    final: bool
    code: str = ""


class StepSkippedData(TaskData, frozen=True, kw_only=True):
    """``by`` is who skipped it; ``status`` is that of the task."""

    step: str
    by: str
    status: TaskStatus = "running"


class ArmData(EventData, frozen=True, kw_only=True):
    """``arm`` is the arm's name."""

    arm: str


class ArmRegisteredData(ArmData, frozen=True, kw_only=True):
    """The instance that was registered."""

    operations: tuple[str, ...] = ()
    url: str = ""
    instance: str = ""


class ServiceData(EventData, frozen=True, kw_only=True):
    """``service`` is the service's name; ``instance`` tells its processes apart."""

    service: str
    instance: str = ""


class ServiceStartedData(ServiceData, frozen=True, kw_only=True):
    """``release`` is the version of the program."""

    release: str = ""


class ServiceDegradedData(ServiceData, frozen=True, kw_only=True):
    """``dependency`` is its name in ``/ready``."""

    reason: str
    dependency: str = ""


class AuditRecordedData(EventData, frozen=True, kw_only=True):
    """``seq`` is the row's place in the tenant's audit log, which has who and what: reading it needs another scope."""

    action: str
    seq: int = 0


class CacheInvalidatedData(EventData, frozen=True, kw_only=True):
    """``key`` names what is stale."""

    key: str


class TokenRevokedData(EventData, frozen=True, kw_only=True):
    """What was issued for ``value`` until ``at`` (epoch seconds) is refused."""

    kind: Literal["jti", "task", "run", "sub", "cred", "aud"]
    value: str
    at: float


class BreakerData(EventData, frozen=True, kw_only=True):
    """The circuit breaker that the emitting service has for ``instance`` (a URL) of ``service``."""

    service: str
    instance: str


class BreakerOpenedData(BreakerData, frozen=True, kw_only=True):
    """It opened for ``seconds``; ``reason`` is ``failing`` or ``slow``."""

    reason: str = ""
    seconds: float = 0.0


class LogTruncatedData(EventData, frozen=True, kw_only=True):
    """``count`` events up to the position ``through`` were deleted before every durable reader handled them."""

    through: int
    count: int


class LogGapData(EventData, frozen=True, kw_only=True):
    """``reader`` had read up to the position ``after``; it goes on after ``through``.

    ``reader`` is ``subscription/NAME`` or ``webhook/ID``. ``reason`` is ``position_expired``, when events in between
    were deleted, or ``position_unknown``, when ``after`` is beyond the end of the log.
    """

    reader: str
    after: int
    through: int
    reason: str


class ScheduleStartedData(EventData, frozen=True, kw_only=True):
    """``task_id`` was submitted for the time ``planned_at``."""

    schedule_id: str
    planned_at: str
    task_id: str


class ScheduleMissedData(EventData, frozen=True, kw_only=True):
    """``reason`` says why no task was submitted for the time ``planned_at``."""

    schedule_id: str
    planned_at: str
    reason: str


class ScheduleEndedData(EventData, frozen=True, kw_only=True):
    """``reason`` says why the schedule submits no further task."""

    schedule_id: str
    reason: str


class WebhookDeadData(EventData, frozen=True, kw_only=True):
    """``event_id`` is the event that was to be delivered."""

    webhook_id: str
    event_id: str


class WebhookDisabledData(EventData, frozen=True, kw_only=True):
    """``reason`` is for a person."""

    webhook_id: str
    reason: str
