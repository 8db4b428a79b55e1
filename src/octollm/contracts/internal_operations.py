"""The orchestrator's operations for the installation's own services and arms, each declared once.

Their callers identify themselves by a service token, or have no credential yet. The gateway does not serve them.
"""

from __future__ import annotations

from types import NoneType

from octollm.contracts.api import Acknowledgement
from octollm.contracts.auth import (
    CreateSessionRequest,
    DirectoryResponse,
    EndSessionRequest,
    IssuerList,
    RevocationList,
    SessionResponse,
    TokenExchangeRequest,
    TokenResponse,
)
from octollm.contracts.dashboard import Changes, ChangesQuery
from octollm.contracts.declarations import BodyT, DeclaredOperation, OperationTable, ResponseT
from octollm.contracts.enrolment import (
    ArmRegistration,
    EnrolmentNonce,
    EnrolmentRequest,
    EnrolmentResponse,
    InstanceRef,
    KeyRotation,
)
from octollm.contracts.events import Event
from octollm.contracts.hooks import HookDelivery, HookReceipt
from octollm.contracts.internal import (
    AuditEntry,
    ClaimBatch,
    ClaimResponseBatch,
    ClaimUpdateBatch,
    ReserveRequest,
    ReserveResponse,
    SettleRequest,
)
from octollm.contracts.screening import RejectedGoal
from octollm.contracts.services import OperationKind
from octollm.contracts.stream import NDJSON

MAX_CLAIMS_BODY = 8 * 1024 * 1024
"""Bytes of a batch; one stored answer has up to 1 MiB, plus a third for base64."""
MAX_MESSAGE_BODY = 4 * 1024 * 1024
MAX_ARM_BODY = 128 * 1024
MAX_ENROLMENT_BODY = 16 * 1024
"""Bytes of a body from a sender that is not authenticated yet."""


def _post(
    operation_id: str,
    path: str,
    summary: str,
    body: type[BodyT],
    response: type[ResponseT],
    *error_codes: str,
    callers: str = "*",
    kind: OperationKind = "idempotent",
    max_body: int = MAX_MESSAGE_BODY,
    starts_trace: bool = False,
) -> DeclaredOperation[BodyT, ResponseT]:
    """Declare a ``POST`` by a service. ``idempotent`` ones take effect once by what their body names."""
    return DeclaredOperation(
        id=operation_id,
        method="POST",
        path=path,
        summary=summary,
        callers=callers,
        kind=kind,
        # The key of a call is claimed in the name of a capability's subject, and a service token has none.
        claims_key=False,
        body=body,
        response=response,
        error_codes=error_codes,
        max_body=max_body,
        starts_trace=starts_trace,
    )


# Budgets and the audit log
RESERVE_BUDGET = _post(
    "budget.reserve",
    "/budget/reserve",
    "Reserve tokens of a task for a model call.",
    ReserveRequest,
    ReserveResponse,
    "authority_missing",
    "budget_exhausted",
    "fence_lost",
    "state_conflict",
    "task_not_found",
    callers="models",
    # A second reservation would hold tokens that nobody uses.
    kind="at_most_once",
)
SETTLE_BUDGET = _post(
    "budget.settle",
    "/budget/settle",
    "Settle a reservation.",
    SettleRequest,
    Acknowledgement,
    "not_found",
    callers="models",
    # It holds the whole response of a model.
    max_body=MAX_CLAIMS_BODY,
)
RECORD_AUDIT = _post(
    "audit.record",
    "/audit/records",
    "Record an action of a caller at the memory service in the audit log.",
    AuditEntry,
    Acknowledgement,
    callers="memory",
    kind="at_most_once",
)
RECORD_REFUSAL = DeclaredOperation(
    id="screenings.record",
    method="POST",
    path="/screenings",
    summary="Record a goal that the gateway refused.",
    scope="tasks:create",
    kind="at_most_once",
    body=RejectedGoal,
    response=Acknowledgement,
)
READ_CHANGES, READ_EVENT_CHANGES = (
    DeclaredOperation(
        id=f"dashboard.{name}",
        method="GET",
        path=f"/dashboard/{name}",
        summary=summary,
        scope=scope,
        query=ChangesQuery,
        body=NoneType,
        response=Changes,
        error_codes=("invalid_parameter", "position_expired", "position_unknown", "scope_missing"),
    )
    for name, scope, summary in (
        ("changes", "tasks:read", "Read what changed since a position: tasks, and events if the caller may read them."),
        ("events", "events:read", "Read what changed since a position, for a caller who may not read tasks."),
    )
)

# Idempotency keys
CLAIM_KEYS = _post(
    "idempotency.claim",
    "/idempotency/claim",
    "Claim idempotency keys.",
    ClaimBatch,
    ClaimResponseBatch,
    max_body=MAX_CLAIMS_BODY,
)
RENEW_CLAIMS = _post(
    "idempotency.renew",
    "/idempotency/renew",
    "Renew the leases of claims.",
    ClaimUpdateBatch,
    Acknowledgement,
    max_body=MAX_CLAIMS_BODY,
)
COMPLETE_CLAIMS = _post(
    "idempotency.complete",
    "/idempotency/complete",
    "Store the responses of claimed calls.",
    ClaimUpdateBatch,
    Acknowledgement,
    max_body=MAX_CLAIMS_BODY,
)
RELEASE_CLAIMS = _post(
    "idempotency.release",
    "/idempotency/release",
    "Release the claims of calls that had no effect.",
    ClaimUpdateBatch,
    Acknowledgement,
    max_body=MAX_CLAIMS_BODY,
)

# Credentials
EXCHANGE_TOKEN = _post(
    "token.exchange",
    "/token",
    "Exchange a caller's credential for an access token (RFC 8693).",
    TokenExchangeRequest,
    TokenResponse,
    "api_key_invalid",
    "login_refused",
    "authority_missing",
    callers="reflex",
)
CREATE_SESSION = _post(
    "sessions.open",
    "/sessions",
    "Open a browser session.",
    CreateSessionRequest,
    SessionResponse,
    "api_key_invalid",
    "login_refused",
    callers="reflex",
)
LIST_LOGIN_ISSUERS = DeclaredOperation(
    id="sessions.issuers",
    method="GET",
    path="/sessions/issuers",
    summary="List the issuers that accept browser logins.",
    callers="reflex",
    body=NoneType,
    response=IssuerList,
)
CLOSE_SESSION = _post(
    "sessions.end",
    "/sessions/end",
    "End a browser session.",
    EndSessionRequest,
    Acknowledgement,
    callers="reflex",
)
READ_DIRECTORY = DeclaredOperation(
    id="directory",
    method="GET",
    path="/directory",
    summary="Read the services and their keys, signed by the root.",
    callers="*",
    body=NoneType,
    response=DirectoryResponse,
    cacheable=True,
)
READ_REVOCATIONS = DeclaredOperation(
    id="revocations",
    method="GET",
    path="/revocations",
    summary="Read the revocations in force; as NDJSON, also each new one.",
    callers="*",
    body=NoneType,
    response=RevocationList,
    stream_media_type=NDJSON,
)

# Arms
ISSUE_NONCE = DeclaredOperation(
    id="arms.nonce",
    method="POST",
    path="/arms/nonce",
    summary="Issue a nonce for an enrolment.",
    anonymous=True,
    body=NoneType,
    response=EnrolmentNonce,
    max_body=0,
)
ENROL_ARM = DeclaredOperation(
    id="arms.join",
    method="POST",
    path="/arms/join",
    summary="Enrol an arm by the proof of an enrolment token.",
    anonymous=True,
    # The first request that arrives spends the nonce.
    kind="at_most_once",
    claims_key=False,
    body=EnrolmentRequest,
    response=EnrolmentResponse,
    error_codes=("join_refused", "rate_limited", "state_conflict"),
    max_body=MAX_ENROLMENT_BODY,
)
ROTATE_ARM_KEY = _post(
    "arms.keys",
    "/arms/keys",
    "Add a key, authenticated by the present one.",
    KeyRotation,
    Acknowledgement,
    "authority_missing",
    "state_conflict",
    max_body=MAX_ARM_BODY,
)
REGISTER_INSTANCE = _post(
    "arms.register",
    "/arms/register",
    "Register an instance of an arm.",
    ArmRegistration,
    Acknowledgement,
    "authority_missing",
    "state_conflict",
    max_body=MAX_ARM_BODY,
)
RECORD_HEARTBEAT = _post(
    "arms.heartbeat",
    "/arms/heartbeat",
    "Record a heartbeat of an instance.",
    InstanceRef,
    Acknowledgement,
    "not_found",
    max_body=MAX_ARM_BODY,
)
DEREGISTER_INSTANCE = _post(
    "arms.leave",
    "/arms/leave",
    "Remove an instance that shuts down.",
    InstanceRef,
    Acknowledgement,
    max_body=MAX_ARM_BODY,
)

# Events and hooks
POST_EVENT = _post(
    "events.post",
    "/events",
    "Post an event.",
    Event,
    Acknowledgement,
    "scope_missing",
    "invalid_body",
    # Its sender repeats it: a service that stops must not wait for further attempts of the client.
    kind="at_most_once",
)
DELIVER_TO_HOOK = _post(
    "hooks.receive",
    "/hooks/{hook}/deliveries",
    "Start a task for a delivery whose signature is valid.",
    HookDelivery,
    HookReceipt,
    callers="reflex",
    starts_trace=True,
)

INTERNAL_OPERATIONS = OperationTable(
    [
        EXCHANGE_TOKEN,
        CREATE_SESSION,
        LIST_LOGIN_ISSUERS,
        CLOSE_SESSION,
        READ_DIRECTORY,
        READ_REVOCATIONS,
        RESERVE_BUDGET,
        SETTLE_BUDGET,
        CLAIM_KEYS,
        RENEW_CLAIMS,
        COMPLETE_CLAIMS,
        RELEASE_CLAIMS,
        RECORD_AUDIT,
        RECORD_REFUSAL,
        READ_CHANGES,
        READ_EVENT_CHANGES,
        ISSUE_NONCE,
        ENROL_ARM,
        ROTATE_ARM_KEY,
        REGISTER_INSTANCE,
        RECORD_HEARTBEAT,
        DEREGISTER_INSTANCE,
        POST_EVENT,
        DELIVER_TO_HOOK,
    ],
    one_host=True,
)
