"""The public API: every operation that the gateway serves, declared once.

The gateway handles those of ``reflex`` itself and forwards the others to the orchestrator. The Python client, OpenAPI
and the table in ``docs/operations.md`` follow from this table. What every service has (``/health``, ``/ready``,
``/metrics``, its description) is not in it.
"""

from __future__ import annotations

from types import NoneType

from octollm.contracts.api import (
    LAST_EVENT_ID_DESCRIPTION,
    Acknowledgement,
    AuditQuery,
    EventList,
    EventQuery,
    PageQuery,
    StepTexts,
    TaskList,
    TaskQuery,
    TaskView,
)
from octollm.contracts.auth import (
    CurrentUser,
    IssuerList,
    KeyList,
    KeyRequest,
    NewKey,
    RevocationRequest,
    SessionRequest,
    TokenRequest,
    TokenResponse,
)
from octollm.contracts.declarations import ANY_MEDIA_TYPE, EVENT_STREAM, DeclaredOperation, OperationTable
from octollm.contracts.enrolment import ArmList, EnrolmentTokenList, EnrolmentTokenRequest, NewEnrolmentToken
from octollm.contracts.observability import AuditPage, TraceView
from octollm.contracts.operations import FILE_NAME_DESCRIPTION, StoredFile
from octollm.contracts.screening import MAX_SCREENED, PreprocessRequest, ScreeningResult
from octollm.contracts.task import MAX_FILE_BYTES, Task

# Tasks
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
    error_codes=(
        "arm_unknown",
        "authority_missing",
        "budget_invalid",
        "deadline_invalid",
        "file_invalid",
        "file_not_found",
        "goal_invalid",
        "goal_refused",
    ),
    starts_trace=True,
)
LIST_TASKS = DeclaredOperation(
    id="tasks.list",
    method="GET",
    path="/tasks",
    summary="List tasks, newest first.",
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
    summary="Cancel a task. 409 when it has ended.",
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
    summary="Approve a waiting task (not configured).",
    scope="tasks:approve",
    kind="idempotent",
    body=NoneType,
    response=NoneType,
    error_codes=("not_configured",),
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
    error_codes=("task_not_found", "invalid_parameter"),
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
    error_codes=("task_not_found",),
)
TASK_TEXTS = DeclaredOperation(
    id="tasks.texts",
    method="GET",
    path="/tasks/{task_id}/texts",
    summary="Read what the steps of a task have written, as last saved.",
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
SCREEN_TEXT = DeclaredOperation(
    id="preprocess",
    method="POST",
    path="/preprocess",
    summary="Screen a text: what the input guardrail finds in it, and whether it would refuse it as a goal.",
    service="reflex",
    body=PreprocessRequest,
    response=ScreeningResult,
    max_body=4 * MAX_SCREENED,
)

# Files
STORE_FILE = DeclaredOperation(
    id="files.store",
    method="POST",
    path="/files",
    summary="Store a file. The body is its content.",
    scope="files:write",
    kind="idempotent",
    # Files are stored by their digest.
    claims_key=False,
    body=bytes,
    response=StoredFile,
    status=201,
    error_codes=("file_invalid",),
    headers={"X-File-Name": FILE_NAME_DESCRIPTION},
    max_body=MAX_FILE_BYTES,
)
READ_FILE = DeclaredOperation(
    id="files.read",
    method="GET",
    path="/files/{digest}",
    summary="Read a stored file.",
    scope="files:read:{digest}",
    body=NoneType,
    response=bytes,
    error_codes=("file_not_found",),
    media_type=ANY_MEDIA_TYPE,
    cacheable=True,
)

# Events
READ_EVENTS = DeclaredOperation(
    id="events.read",
    method="GET",
    path="/events",
    summary="Read the tenant's event log: a page, or a stream of server-sent events.",
    scope="events:read",
    query=EventQuery,
    body=NoneType,
    response=EventList,
    stream_media_type=EVENT_STREAM,
    headers={"Last-Event-ID": LAST_EVENT_ID_DESCRIPTION},
)
LIST_WEBHOOKS = DeclaredOperation(
    id="webhooks.list",
    method="GET",
    path="/webhooks",
    summary="List webhooks (not configured).",
    scope="webhooks:read",
    query=PageQuery,
    body=NoneType,
    response=NoneType,
    error_codes=("not_configured",),
)
CREATE_WEBHOOK = DeclaredOperation(
    id="webhooks.create",
    method="POST",
    path="/webhooks",
    summary="Create a webhook (not configured).",
    scope="webhooks:write",
    kind="idempotent",
    body=NoneType,
    response=NoneType,
    error_codes=("not_configured",),
)
LIST_DEAD_LETTERS = DeclaredOperation(
    id="dead_letters.list",
    method="GET",
    path="/dead-letters",
    summary="List the events that are no longer delivered (not configured).",
    scope="events:read",
    query=PageQuery,
    body=NoneType,
    response=NoneType,
    error_codes=("not_configured",),
)

# Arms
LIST_ARMS = DeclaredOperation(
    id="arms.list",
    method="GET",
    path="/arms",
    summary="List the arms that may be called.",
    scope="arms:read",
    body=NoneType,
    response=ArmList,
    cacheable=True,
)
REMOVE_ARM = DeclaredOperation(
    id="arms.remove",
    method="DELETE",
    path="/arms/{name}",
    summary="Remove an arm of the tenant, and free its name.",
    scope="arms:write",
    kind="idempotent",
    body=NoneType,
    response=Acknowledgement,
    error_codes=("arm_unknown",),
)
LIST_ENROLMENT_TOKENS = DeclaredOperation(
    id="joins.list",
    method="GET",
    path="/joins",
    summary="List enrolment tokens.",
    scope="keys:read",
    body=NoneType,
    response=EnrolmentTokenList,
)
CREATE_ENROLMENT_TOKEN = DeclaredOperation(
    id="joins.create",
    method="POST",
    path="/joins",
    summary="Create an enrolment token. Its secret is shown once.",
    scope="keys:write",
    kind="at_most_once",
    body=EnrolmentTokenRequest,
    response=NewEnrolmentToken,
    status=201,
    error_codes=("authority_missing", "invalid_parameter", "state_conflict"),
    secret_response=True,
)
REVOKE_ENROLMENT_TOKEN = DeclaredOperation(
    id="joins.revoke",
    method="DELETE",
    path="/joins/{join_id}",
    summary="Revoke an enrolment token.",
    scope="keys:write",
    kind="idempotent",
    body=NoneType,
    response=Acknowledgement,
    error_codes=("not_found",),
)

# Credentials
LIST_KEYS = DeclaredOperation(
    id="keys.list",
    method="GET",
    path="/keys",
    summary="List API keys.",
    scope="keys:read",
    body=NoneType,
    response=KeyList,
)
CREATE_KEY = DeclaredOperation(
    id="keys.create",
    method="POST",
    path="/keys",
    summary="Create an API key. Its secret is shown once. The first tenant also creates the first key of another.",
    scope="keys:write",
    kind="at_most_once",
    body=KeyRequest,
    response=NewKey,
    status=201,
    error_codes=("authority_missing", "invalid_parameter"),
    secret_response=True,
)
REVOKE_KEY = DeclaredOperation(
    id="keys.revoke",
    method="DELETE",
    path="/keys/{key_id}",
    summary="Revoke an API key, and cancel its tasks.",
    scope="keys:write",
    kind="idempotent",
    body=NoneType,
    response=Acknowledgement,
    error_codes=("not_found",),
)
CREATE_TOKEN = DeclaredOperation(
    id="tokens.make",
    method="POST",
    path="/token",
    service_path="/tokens",
    summary="Create a token for direct calls.",
    scope="tasks:create",
    kind="at_most_once",
    body=TokenRequest,
    response=TokenResponse,
    error_codes=("authority_missing", "invalid_parameter"),
    secret_response=True,
)
REVOKE_AUTHORITY = DeclaredOperation(
    id="revocations.create",
    method="POST",
    path="/token/revoke",
    service_path="/revocations",
    summary="Revoke a token, or what was delegated to a principal or a service.",
    scope="keys:write",
    kind="idempotent",
    body=RevocationRequest,
    response=Acknowledgement,
)
READ_AUDIT_LOG = DeclaredOperation(
    id="audit.read",
    method="GET",
    path="/audit",
    summary="Read the audit log, and where its hash chain stands.",
    scope="audit:read",
    query=AuditQuery,
    body=NoneType,
    response=AuditPage,
    error_codes=("scope_missing",),
)
OPEN_SESSION = DeclaredOperation(
    id="session.open",
    method="POST",
    path="/session",
    summary="Open a session for an API key or a login: a cookie that scripts cannot read.",
    service="reflex",
    body=SessionRequest,
    response=CurrentUser,
    error_codes=("api_key_invalid", "login_refused", "origin_refused", "rate_limited"),
    max_body=16_384,
    anonymous=True,
)
READ_SESSION = DeclaredOperation(
    id="session.read",
    method="GET",
    path="/session",
    summary="Read who the caller is.",
    service="reflex",
    body=NoneType,
    response=CurrentUser,
)
LIST_ISSUERS = DeclaredOperation(
    id="session.issuers",
    method="GET",
    path="/session/issuers",
    summary="List where a browser can log in.",
    service="reflex",
    body=NoneType,
    response=IssuerList,
    error_codes=("rate_limited",),
    anonymous=True,
)
END_SESSION = DeclaredOperation(
    id="session.end",
    method="DELETE",
    path="/session",
    summary="End the session.",
    service="reflex",
    kind="idempotent",
    body=NoneType,
    response=Acknowledgement,
    error_codes=("origin_refused",),
    anonymous=True,
)

PUBLIC_OPERATIONS = OperationTable(
    [
        SUBMIT_TASK,
        LIST_TASKS,
        READ_TASK,
        CANCEL_TASK,
        APPROVE_TASK,
        WATCH_TASK,
        TASK_HISTORY,
        TASK_TEXTS,
        TASK_TRACE,
        TASK_ARTIFACT,
        SCREEN_TEXT,
        STORE_FILE,
        READ_FILE,
        READ_EVENTS,
        LIST_WEBHOOKS,
        CREATE_WEBHOOK,
        LIST_DEAD_LETTERS,
        LIST_ARMS,
        REMOVE_ARM,
        LIST_ENROLMENT_TOKENS,
        CREATE_ENROLMENT_TOKEN,
        REVOKE_ENROLMENT_TOKEN,
        LIST_KEYS,
        CREATE_KEY,
        REVOKE_KEY,
        CREATE_TOKEN,
        REVOKE_AUTHORITY,
        READ_AUDIT_LOG,
        OPEN_SESSION,
        READ_SESSION,
        LIST_ISSUERS,
        END_SESSION,
    ],
    one_host=True,
)
