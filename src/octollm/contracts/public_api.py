"""The public API: every operation that the gateway serves, declared once.

The gateway handles those of ``reflex`` itself and forwards the others to the service that does the work. The Python
client, OpenAPI and the table in ``docs/operations.md`` follow from it. What every service has (``/health``, ``/ready``,
``/metrics``, its description) is not in it.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

from octollm.contracts.api import (
    LAST_EVENT_ID_DESCRIPTION,
    Acknowledgement,
    AuditQuery,
    EventList,
    EventQuery,
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
from octollm.contracts.dashboard import DashboardQuery
from octollm.contracts.declarations import ANY_MEDIA_TYPE, EVENT_STREAM, DeclaredOperation, OperationTable
from octollm.contracts.enrolment import ArmList, EnrolmentTokenList, EnrolmentTokenRequest, NewEnrolmentToken
from octollm.contracts.event_operations import EVENT_OPERATIONS
from octollm.contracts.hooks import HOOK_OPERATIONS
from octollm.contracts.memory_operations import PUBLIC_MEMORY_OPERATIONS
from octollm.contracts.observability import AuditPage, ServiceStates
from octollm.contracts.operations import FILE_NAME_DESCRIPTION, StoredFile
from octollm.contracts.schedules import SCHEDULE_OPERATIONS
from octollm.contracts.screening import MAX_SCREENED, PreprocessRequest, ScreeningResult
from octollm.contracts.task import MAX_FILE_BYTES
from octollm.contracts.task_operations import TASK_OPERATIONS
from octollm.contracts.webhooks import WEBHOOK_OPERATIONS

# Texts
SCREEN_TEXT = DeclaredOperation(
    id="preprocess",
    method="POST",
    path="/preprocess",
    summary="Screen a text with the input guardrail: its findings, and whether it would refuse the text as a goal.",
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
    error_codes=("position_expired", "position_unknown"),
    stream_media_type=EVENT_STREAM,
    headers={"Last-Event-ID": LAST_EVENT_ID_DESCRIPTION},
)
DESCRIBE_EVENTS = DeclaredOperation(
    id="events.describe",
    method="GET",
    path="/asyncapi.json",
    summary="Describe every event for programs (AsyncAPI 3.0).",
    service="reflex",
    body=NoneType,
    response=dict[str, Any],
    cacheable=True,
    anonymous=True,
)

# The dashboard, services and arms
WATCH_DASHBOARD = DeclaredOperation(
    id="dashboard.watch",
    method="GET",
    path="/dashboard/events",
    summary="Follow everything that the caller may see: tasks, events and services, as server-sent events.",
    service="reflex",
    query=DashboardQuery,
    body=NoneType,
    response=NoneType,
    error_codes=("invalid_parameter", "not_found", "position_expired", "position_unknown", "scope_missing"),
    media_type=EVENT_STREAM,
    headers={"Last-Event-ID": LAST_EVENT_ID_DESCRIPTION},
)
LIST_SERVICES = DeclaredOperation(
    id="monitor:services",
    method="GET",
    path="/services",
    summary="Return the latest state of every service.",
    service="monitor",
    scope="monitor:read",
    body=NoneType,
    response=ServiceStates,
)
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
    summary="Read the audit log, and the head of its hash chain.",
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
    summary="Read the identity of the caller.",
    service="reflex",
    body=NoneType,
    response=CurrentUser,
)
LIST_ISSUERS = DeclaredOperation(
    id="session.issuers",
    method="GET",
    path="/session/issuers",
    summary="List the issuers at which a browser can log in.",
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
        *TASK_OPERATIONS,
        SCREEN_TEXT,
        STORE_FILE,
        READ_FILE,
        *SCHEDULE_OPERATIONS,
        *PUBLIC_MEMORY_OPERATIONS,
        READ_EVENTS,
        DESCRIBE_EVENTS,
        *EVENT_OPERATIONS,
        *HOOK_OPERATIONS,
        *WEBHOOK_OPERATIONS,
        WATCH_DASHBOARD,
        LIST_SERVICES,
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
