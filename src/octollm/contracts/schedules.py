"""Schedules: tasks that are submitted again and again, at the times of a cron expression."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Literal

from msgspec import Meta, Struct

from octollm.contracts.api import Acknowledgement, TaskView
from octollm.contracts.declarations import DeclaredOperation
from octollm.contracts.task import Task

SUBMISSION_ERRORS = (
    "arm_unknown",
    "authority_missing",
    "budget_invalid",
    "deadline_invalid",
    "file_invalid",
    "file_not_found",
    "goal_invalid",
    "goal_refused",
)
"""Error codes of a task that is refused when it is submitted."""
CatchUp = Literal["none", "last", "all"]
"""What is made up for after a time in which nothing ran: nothing, the last time, or the last hundred times."""
Overlap = Literal["skip", "allow"]
"""What happens while the task of the time before is still open."""


class ScheduleRequest(Task, frozen=True, kw_only=True):
    """``POST /schedules``: a task without a deadline, and when it is submitted.

    ``cron`` has five fields, as in Debian's cron; ``time_zone`` is a name of the IANA database. The task gets the
    authority that its creator has now, and at each time no more than the creator has then.
    """

    cron: Annotated[str, Meta(max_length=200)]
    time_zone: Annotated[str, Meta(max_length=64)] = "UTC"
    catch_up: CatchUp = "last"
    overlap: Overlap = "skip"


class ScheduleRun(Struct, frozen=True, omit_defaults=True):
    """What became of one planned time."""

    planned_at: str
    outcome: Literal["started", "skipped", "failed"]
    task_id: str = ""
    reason: str = ""


class ScheduleView(Struct, frozen=True):
    """A schedule. ``next_run`` is ``None`` while it is paused or has ended; ``reason`` says why it ended."""

    id: str
    cron: str
    time_zone: str
    catch_up: CatchUp
    overlap: Overlap
    state: Literal["active", "paused", "ended"]
    goal: str
    task: Task
    scope: str
    created_by: str
    created_at: str
    next_run: str | None = None
    reason: str = ""
    runs: tuple[ScheduleRun, ...] = ()
    """The last twenty, the newest first; empty in a list."""


class ScheduleList(Struct, frozen=True):
    """The tenant's schedules, oldest first."""

    schedules: tuple[ScheduleView, ...]


CREATE_SCHEDULE = DeclaredOperation(
    id="schedules.create",
    method="POST",
    path="/schedules",
    summary="Create a schedule, which submits a task at the times of a cron expression.",
    scope="tasks:create",
    kind="idempotent",
    body=ScheduleRequest,
    response=ScheduleView,
    status=201,
    error_codes=(*SUBMISSION_ERRORS, "state_conflict"),
)
LIST_SCHEDULES = DeclaredOperation(
    id="schedules.list",
    method="GET",
    path="/schedules",
    summary="List schedules.",
    scope="tasks:read",
    body=NoneType,
    response=ScheduleList,
)
READ_SCHEDULE = DeclaredOperation(
    id="schedules.read",
    method="GET",
    path="/schedules/{schedule_id}",
    summary="Read a schedule with its last runs.",
    scope="tasks:read",
    body=NoneType,
    response=ScheduleView,
    error_codes=("not_found",),
)
PAUSE_SCHEDULE = DeclaredOperation(
    id="schedules.pause",
    method="POST",
    path="/schedules/{schedule_id}/pause",
    summary="Pause a schedule. Tasks that it started continue.",
    scope="tasks:create",
    kind="idempotent",
    claims_key=False,
    body=NoneType,
    response=ScheduleView,
    error_codes=("not_found", "state_conflict"),
)
RESUME_SCHEDULE = DeclaredOperation(
    id="schedules.resume",
    method="POST",
    path="/schedules/{schedule_id}/resume",
    summary="Resume a schedule at its next planned time. Runs that were skipped by the pause are not made up for.",
    scope="tasks:create",
    kind="idempotent",
    claims_key=False,
    body=NoneType,
    response=ScheduleView,
    error_codes=("not_found", "state_conflict"),
)
RUN_SCHEDULE = DeclaredOperation(
    id="schedules.run",
    method="POST",
    path="/schedules/{schedule_id}/run",
    summary="Submit the task of a schedule now, independently of its state and `overlap`.",
    scope="tasks:create",
    kind="idempotent",
    body=NoneType,
    response=TaskView,
    status=201,
    error_codes=(*SUBMISSION_ERRORS, "not_found"),
)
DELETE_SCHEDULE = DeclaredOperation(
    id="schedules.delete",
    method="DELETE",
    path="/schedules/{schedule_id}",
    summary="Delete a schedule. Tasks that it started continue.",
    scope="tasks:create",
    kind="idempotent",
    body=NoneType,
    response=Acknowledgement,
    error_codes=("not_found",),
)

SCHEDULE_OPERATIONS = (
    CREATE_SCHEDULE,
    LIST_SCHEDULES,
    READ_SCHEDULE,
    PAUSE_SCHEDULE,
    RESUME_SCHEDULE,
    RUN_SCHEDULE,
    DELETE_SCHEDULE,
)
