"""Query parameters and responses of the public API: tasks, steps, texts and events."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from octollm.contracts.approvals import ApprovalView
from octollm.contracts.events import Event
from octollm.contracts.steering import Instruction
from octollm.contracts.task import Artifact, Budget, Count, Evidence, FileRef, StepStatus, TaskStatus, Usage
from octollm.errors import FieldError, OctoError, map_exceptions

LAST_EVENT_ID_DESCRIPTION = "The position of the last event received; the stream continues after it."


class PageQuery(Struct, frozen=True):
    """A page of a list: at most ``limit`` rows, starting at the ``cursor`` of the previous page."""

    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: str = ""


MAX_CURSOR = 400


def encode_cursor(created_at: float, last: str) -> str:
    """Return the opaque cursor after the row ``last``, created at ``created_at`` (epoch seconds)."""
    return base64.urlsafe_b64encode(msgspec.json.encode([created_at, last])).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[float, str]:
    """Return what :func:`encode_cursor` was given; raise ``invalid_parameter`` for any other text."""
    invalid = OctoError("The cursor is invalid. Use the one that a list returned.", code="invalid_parameter")
    if len(cursor) > MAX_CURSOR:
        raise invalid
    with map_exceptions(invalid, msgspec.DecodeError, binascii.Error, ValueError):
        padded = cursor + "=" * (-len(cursor) % 4)
        return msgspec.json.decode(base64.urlsafe_b64decode(padded), type=tuple[float, str])


class TaskQuery(PageQuery, frozen=True):
    """A page of tasks, optionally of one status, and of those whose goal contains ``text`` in any case."""

    status: TaskStatus | UnsetType = UNSET
    text: Annotated[str, Meta(max_length=200)] = ""


UsageBy = Literal["day", "arm", "model"]


class UsageQuery(Struct, frozen=True):
    """What to add up, over the last ``days`` days (UTC), today included."""

    by: UsageBy = "day"
    days: Annotated[int, Meta(ge=1, le=90)] = 30


class UsageRow(Struct, frozen=True):
    """The settled model calls of one ``name``: a day (``2025-11-10``), an arm or a model.

    The arm is empty for calls outside a step, such as planning.
    """

    name: str
    calls: int
    tokens: int
    cost_usd: float


class UsageReport(Struct, frozen=True):
    """What the tenant's model calls used since the time ``since`` (RFC 3339). What nothing used has no row."""

    by: UsageBy
    since: str
    rows: tuple[UsageRow, ...]


class EventQuery(Struct, frozen=True):
    """At most ``limit`` events after the position ``after``."""

    after: Count = 0
    limit: Annotated[int, Meta(ge=1, le=500)] = 200


class AuditQuery(Struct, frozen=True):
    """At most ``limit`` rows after the row ``after``, of the caller's tenant or of the system.

    Only the installation's first tenant reads the system's rows, which belong to no tenant.
    """

    after: Count = 0
    limit: Annotated[int, Meta(ge=1, le=500)] = 200
    of: Literal["tenant", "system"] = "tenant"


class TaskIdQuery(Struct, frozen=True):
    """Selects what belongs to one ``task``."""

    task: Annotated[str, Meta(min_length=1, max_length=128)]


class Acknowledgement(msgspec.Struct, frozen=True):
    """Confirms an operation that has no other response."""

    status: str = "ok"


class TaskFailure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a task or step ended without a result: a stable ``code``, and the reasons in words."""

    code: str
    detail: str
    reasons: tuple[str, ...] = ()
    errors: tuple[FieldError, ...] = ()


class StepView(msgspec.Struct, frozen=True, omit_defaults=False):
    """A step as its owner sees it."""

    step: str
    title: str
    arm: str
    status: StepStatus
    attempt: int
    depends_on: tuple[str, ...] = ()
    output: str = ""
    artifacts: tuple[Artifact, ...] = ()
    evidence: Evidence | None = None
    usage: Usage = Usage()
    reasons: tuple[str, ...] = ()
    started_at: str | None = None
    finished_at: str | None = None


class TaskSummary(msgspec.Struct, frozen=True):
    """A task in a list."""

    task_id: str
    status: TaskStatus
    goal: str
    progress: float
    created_at: str
    updated_at: str


class TaskView(msgspec.Struct, frozen=True, omit_defaults=False):
    """A task as its owner sees it. ``version`` counts its events; ``progress`` is from 0 to 100."""

    task_id: str
    status: TaskStatus
    goal: str
    progress: float
    version: int
    created_at: str
    updated_at: str
    started_at: str | None = None
    finished_at: str | None = None
    deadline: str | None = None
    budget: Budget = Budget()
    files: tuple[FileRef, ...] = ()
    steps: tuple[StepView, ...] = ()
    output: str = ""
    artifacts: tuple[Artifact, ...] = ()
    usage: Usage = Usage()
    error: TaskFailure | None = None
    correlation_id: str = ""
    trace_id: str = ""
    model: str = ""
    found: bool = True
    """Of a completed task: whether its files have what the goal asks for. ``output`` says so, too."""
    approvals: tuple[ApprovalView, ...] = ()
    """Those that a person decided or is to decide, in the order in which they were requested."""
    instructions: tuple[Instruction, ...] = ()
    """What people told it while it ran, oldest first."""
    forked_from: str | None = None
    """The task of which this one is a retry or a fork."""
    parent_task_id: str | None = None
    """The task that it is a sub-task of."""
    children: tuple[TaskSummary, ...] = ()
    """Its sub-tasks, oldest first."""


class TaskList(msgspec.Struct, frozen=True):
    """A page of tasks, newest first. ``cursor`` requests the next page; it is ``None`` on the last."""

    tasks: tuple[TaskSummary, ...]
    cursor: str | None = None


class EventList(msgspec.Struct, frozen=True):
    """A page of events in order. ``after`` requests the next page."""

    events: tuple[Event, ...]
    after: int


class StepText(msgspec.Struct, frozen=True):
    """The text that a step has written so far, as saved in SQL.

    ``base`` is the offset of its first code point in the text of this attempt and run; the text before it is void.
    """

    step: str
    attempt: int
    run: int
    text: str
    base: int = 0


class StepTexts(msgspec.Struct, frozen=True):
    """The texts of a task's steps."""

    texts: tuple[StepText, ...]
