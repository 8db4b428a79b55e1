"""The public operations on tasks: submit, read, follow, decide, steer, cancel, and run again."""

from __future__ import annotations

from types import NoneType

from octollm.contracts.api import (
    LAST_EVENT_ID_DESCRIPTION,
    EventList,
    EventQuery,
    StepTexts,
    TaskList,
    TaskQuery,
    TaskView,
    UsageQuery,
    UsageReport,
)
from octollm.contracts.approvals import ApprovalDecision, ApprovalList
from octollm.contracts.attempts import AttemptList, AttemptQuery, ForkRequest
from octollm.contracts.declarations import ANY_MEDIA_TYPE, EVENT_STREAM, DeclaredOperation
from octollm.contracts.observability import TraceView
from octollm.contracts.recording import TaskRecording
from octollm.contracts.schedules import SUBMISSION_ERRORS
from octollm.contracts.steering import ExtendRequest, InstructionRequest, SkipRequest
from octollm.contracts.task import Task

SUBMIT_TASK = DeclaredOperation(
    id="tasks.submit",
    method="POST",
    path="/tasks",
    summary="Submit a task. `Location` names it.",
    scope="tasks:create",
    kind="idempotent",
    body=Task,
    response=TaskView,
    status=201,
    error_codes=SUBMISSION_ERRORS,
    starts_trace=True,
)
LIST_TASKS = DeclaredOperation(
    id="tasks.list",
    method="GET",
    path="/tasks",
    summary="List tasks, newest first; `text` is searched in their goals.",
    scope="tasks:read",
    query=TaskQuery,
    body=NoneType,
    response=TaskList,
    cacheable=True,
)
READ_TASK = DeclaredOperation(
    id="tasks.read",
    method="GET",
    path="/tasks/{task_id}",
    summary="Read a task with its steps.",
    scope="tasks:read",
    body=NoneType,
    response=TaskView,
    error_codes=("task_not_found",),
    cacheable=True,
)
CANCEL_TASK = DeclaredOperation(
    id="tasks.cancel",
    method="POST",
    path="/tasks/{task_id}/cancel",
    summary="Cancel a task. 409 if it has ended.",
    scope="tasks:cancel",
    kind="idempotent",
    body=NoneType,
    response=TaskView,
    error_codes=("task_not_found", "state_conflict"),
)
APPROVE_TASK = DeclaredOperation(
    id="tasks.approve",
    method="POST",
    path="/tasks/{task_id}/approval",
    summary="Decide the pending approvals of a task. A rejection ends the task.",
    scope="tasks:approve",
    kind="idempotent",
    body=ApprovalDecision,
    response=TaskView,
    error_codes=("approval_invalid", "state_conflict", "task_not_found"),
)
LIST_APPROVALS = DeclaredOperation(
    id="approvals.list",
    method="GET",
    path="/approvals",
    summary="List pending approvals, ordered by expiry.",
    scope="tasks:read",
    body=NoneType,
    response=ApprovalList,
)
READ_USAGE = DeclaredOperation(
    id="usage.read",
    method="GET",
    path="/usage",
    summary="Add up what model calls used, by day, arm or model: calls, tokens and cost.",
    scope="tasks:read",
    query=UsageQuery,
    body=NoneType,
    response=UsageReport,
)
WATCH_TASK = DeclaredOperation(
    id="tasks.events",
    method="GET",
    path="/tasks/{task_id}/events",
    summary="Follow a task live: its frames as server-sent events.",
    service="reflex",
    scope="tasks:read",
    body=NoneType,
    response=NoneType,
    other_statuses=(204,),
    error_codes=("task_not_found", "invalid_parameter", "position_expired", "position_unknown"),
    media_type=EVENT_STREAM,
    headers={"Last-Event-ID": LAST_EVENT_ID_DESCRIPTION},
)
TASK_HISTORY = DeclaredOperation(
    id="tasks.history",
    method="GET",
    path="/tasks/{task_id}/history",
    summary="Read a task's events by version.",
    scope="tasks:read",
    query=EventQuery,
    body=NoneType,
    response=EventList,
    error_codes=("position_expired", "position_unknown", "task_not_found"),
)
LIST_ATTEMPTS = DeclaredOperation(
    id="tasks.attempts",
    method="GET",
    path="/tasks/{task_id}/attempts",
    summary="List the attempts at a task's steps, oldest first: input, output, verdict, cost and time of each.",
    scope="tasks:read",
    query=AttemptQuery,
    body=NoneType,
    response=AttemptList,
    error_codes=("task_not_found",),
)
RECORD_TASK = DeclaredOperation(
    id="tasks.recording",
    method="GET",
    path="/tasks/{task_id}/recording",
    summary="Read what a task that has ended was given, did, and was answered by models, to replay it.",
    scope="tasks:read",
    body=NoneType,
    response=TaskRecording,
    error_codes=("state_conflict", "task_not_found"),
)
RETRY_TASK = DeclaredOperation(
    id="tasks.retry",
    method="POST",
    path="/tasks/{task_id}/retry",
    summary="Submit the goal of a task that has ended again, as a new task with a plan of its own.",
    scope="tasks:create",
    kind="idempotent",
    body=NoneType,
    response=TaskView,
    status=201,
    error_codes=(*SUBMISSION_ERRORS, "state_conflict", "task_not_found"),
)
FORK_TASK = DeclaredOperation(
    id="tasks.fork",
    method="POST",
    path="/tasks/{task_id}/fork",
    summary="Run the plan of a task that has ended again from one step, as a new task with the results before it.",
    scope="tasks:create",
    kind="idempotent",
    body=ForkRequest,
    response=TaskView,
    status=201,
    error_codes=(*SUBMISSION_ERRORS, "state_conflict", "step_unknown", "task_not_found"),
)
TASK_TEXTS = DeclaredOperation(
    id="tasks.texts",
    method="GET",
    path="/tasks/{task_id}/texts",
    summary="Read the text that the steps of a task have written, as last saved.",
    scope="tasks:read",
    body=NoneType,
    response=StepTexts,
    error_codes=("task_not_found",),
)
TASK_TRACE = DeclaredOperation(
    id="tasks.trace",
    method="GET",
    path="/tasks/{task_id}/trace",
    summary="Read the spans of every service that worked on a task. 503 while the monitor is down.",
    scope="tasks:read",
    body=NoneType,
    response=TraceView,
    error_codes=("task_not_found",),
)
TASK_ARTIFACT = DeclaredOperation(
    id="tasks.artifact",
    method="GET",
    path="/tasks/{task_id}/artifacts/{digest}",
    summary="Read a file that a task made.",
    scope="tasks:read",
    body=NoneType,
    response=bytes,
    error_codes=("task_not_found", "file_not_found"),
    media_type=ANY_MEDIA_TYPE,
    cacheable=True,
)
PAUSE_TASK = DeclaredOperation(
    id="tasks.pause",
    method="POST",
    path="/tasks/{task_id}/pause",
    summary="Pause a task: its calls stop, and it holds no worker.",
    scope="tasks:steer",
    kind="idempotent",
    body=NoneType,
    response=TaskView,
    error_codes=("state_conflict", "task_not_found"),
)
RESUME_TASK = DeclaredOperation(
    id="tasks.resume",
    method="POST",
    path="/tasks/{task_id}/resume",
    summary="Let a paused task go on where it was.",
    scope="tasks:steer",
    kind="idempotent",
    body=NoneType,
    response=TaskView,
    error_codes=("state_conflict", "task_not_found"),
)
INSTRUCT_TASK = DeclaredOperation(
    id="tasks.instruct",
    method="POST",
    path="/tasks/{task_id}/instructions",
    summary="Add an instruction to a task. Its next attempt or step keeps to it.",
    scope="tasks:steer",
    kind="idempotent",
    body=InstructionRequest,
    response=TaskView,
    error_codes=("goal_refused", "state_conflict", "task_not_found"),
)
EXTEND_TASK = DeclaredOperation(
    id="tasks.extend",
    method="POST",
    path="/tasks/{task_id}/extend",
    summary="Raise the budget or the deadline of a task. Neither can be lowered.",
    scope="tasks:steer",
    kind="idempotent",
    body=ExtendRequest,
    response=TaskView,
    error_codes=("budget_invalid", "deadline_invalid", "state_conflict", "task_not_found"),
)

SKIP_STEP = DeclaredOperation(
    id="tasks.skip",
    method="POST",
    path="/tasks/{task_id}/skip",
    summary="Skip a step of a task: it goes on without the step's result.",
    scope="tasks:steer",
    kind="idempotent",
    body=SkipRequest,
    response=TaskView,
    error_codes=("state_conflict", "step_unknown", "task_not_found"),
)

TASK_OPERATIONS = (
    SUBMIT_TASK,
    LIST_TASKS,
    READ_TASK,
    CANCEL_TASK,
    APPROVE_TASK,
    LIST_APPROVALS,
    READ_USAGE,
    WATCH_TASK,
    TASK_HISTORY,
    LIST_ATTEMPTS,
    RECORD_TASK,
    TASK_TEXTS,
    TASK_TRACE,
    TASK_ARTIFACT,
    RETRY_TASK,
    FORK_TASK,
    PAUSE_TASK,
    RESUME_TASK,
    INSTRUCT_TASK,
    EXTEND_TASK,
    SKIP_STEP,
)
