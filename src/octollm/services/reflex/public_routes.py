"""The route table of the public API: method, path, query, body and response of everything that is forwarded to the orchestrator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from octollm.contracts.api import (
    Acknowledgement,
    ArmList,
    AuditQuery,
    EventList,
    EventQuery,
    KeyList,
    KeyRequest,
    NewKey,
    PageQuery,
    StepTexts,
    TaskList,
    TaskQuery,
    TaskView,
    TokenRequest,
    TokenResponse,
)
from octollm.contracts.auth import RevocationRequest
from octollm.contracts.enrolment import EnrolmentTokenList, EnrolmentTokenRequest, NewEnrolmentToken
from octollm.contracts.observability import AuditPage, TraceView
from octollm.contracts.operations import StoredFile
from octollm.contracts.services import OperationKind
from octollm.contracts.task import SUBMIT_CODES, Task


@dataclass(frozen=True, slots=True)
class PublicRoute:
    """One public path. ``query`` has the parameters that are passed on; all others are dropped, tokens first.

    ``body`` and ``answer`` describe what travels; both are handed on as they came, and checked by the orchestrator.
    """

    name: str
    method: str
    path: str
    summary: str
    kind: OperationKind = "read_only"
    query: Any = None
    body: Any = None
    answer: Any = None
    status: int = 200
    cacheable: bool = False
    codes: tuple[str, ...] = ()
    """What the orchestrator may answer, besides what any call may be answered."""
    upstream_path: str = ""
    """The orchestrator's path, where it is another one."""
    traced: bool = False
    """What comes without a trace begins one: every task has its trace."""
    is_file: bool = False
    """The body is a file's bytes, or the answer is."""

    def forwards_parameter(self, parameter: str) -> bool:
        """Say whether the orchestrator is told of a parameter in the query."""
        return self.query is not None and parameter in self.query.__struct_fields__


_NOT_CONFIGURED = ("not_configured",)
_TASK_NOT_FOUND = ("task_not_found",)

PUBLIC_ROUTES: tuple[PublicRoute, ...] = (
    PublicRoute(
        "tasks.submit",
        "POST",
        "/tasks",
        "Submit a task.",
        "idempotent",
        body=Task,
        answer=TaskView,
        status=201,
        codes=SUBMIT_CODES,
        traced=True,
    ),
    PublicRoute("tasks.list", "GET", "/tasks", "List tasks.", query=TaskQuery, answer=TaskList, cacheable=True),
    PublicRoute(
        "tasks.read", "GET", "/tasks/{task_id}", "One task.", answer=TaskView, cacheable=True, codes=_TASK_NOT_FOUND
    ),
    PublicRoute(
        "tasks.cancel",
        "POST",
        "/tasks/{task_id}/cancel",
        "Cancel a task.",
        "idempotent",
        answer=TaskView,
        codes=(*_TASK_NOT_FOUND, "state_conflict"),
    ),
    PublicRoute(
        "tasks.approve",
        "POST",
        "/tasks/{task_id}/approval",
        "Let a waiting task go on (not configured).",
        "idempotent",
        codes=_NOT_CONFIGURED,
    ),
    PublicRoute(
        "tasks.history",
        "GET",
        "/tasks/{task_id}/history",
        "A task's events.",
        query=EventQuery,
        answer=EventList,
        codes=_TASK_NOT_FOUND,
    ),
    PublicRoute(
        "tasks.texts",
        "GET",
        "/tasks/{task_id}/texts",
        "What the steps have written.",
        answer=StepTexts,
        codes=_TASK_NOT_FOUND,
    ),
    PublicRoute(
        "tasks.trace", "GET", "/tasks/{task_id}/trace", "A task's spans.", answer=TraceView, codes=_TASK_NOT_FOUND
    ),
    PublicRoute(
        "tasks.artifact",
        "GET",
        "/tasks/{task_id}/artifacts/{digest}",
        "A file that a task made.",
        cacheable=True,
        codes=(*_TASK_NOT_FOUND, "file_not_found"),
        is_file=True,
    ),
    PublicRoute(
        "files.store",
        "POST",
        "/files",
        "Store a file.",
        "idempotent",
        body=bytes,
        answer=StoredFile,
        status=201,
        codes=("file_invalid",),
        is_file=True,
    ),
    PublicRoute(
        "files.read",
        "GET",
        "/files/{digest}",
        "A stored file.",
        cacheable=True,
        codes=("file_not_found",),
        is_file=True,
    ),
    PublicRoute("events.read", "GET", "/events", "The tenant's events.", query=EventQuery, answer=EventList),
    PublicRoute("arms.list", "GET", "/arms", "The arms that may be called.", answer=ArmList, cacheable=True),
    PublicRoute(
        "arms.remove",
        "DELETE",
        "/arms/{name}",
        "Remove an arm of one's own.",
        "idempotent",
        answer=Acknowledgement,
        codes=("arm_unknown",),
    ),
    PublicRoute("joins.list", "GET", "/joins", "Join secrets.", answer=EnrolmentTokenList),
    PublicRoute(
        "joins.create",
        "POST",
        "/joins",
        "Make a join secret.",
        "idempotent",
        body=EnrolmentTokenRequest,
        answer=NewEnrolmentToken,
        status=201,
        codes=("authority_missing", "invalid_parameter", "state_conflict"),
    ),
    PublicRoute(
        "joins.revoke",
        "DELETE",
        "/joins/{join_id}",
        "Revoke a join secret.",
        "idempotent",
        answer=Acknowledgement,
        codes=("not_found",),
    ),
    PublicRoute("keys.list", "GET", "/keys", "API keys.", answer=KeyList),
    PublicRoute(
        "keys.create",
        "POST",
        "/keys",
        "Make an API key.",
        "idempotent",
        body=KeyRequest,
        answer=NewKey,
        status=201,
        codes=("authority_missing", "invalid_parameter"),
    ),
    PublicRoute(
        "keys.revoke",
        "DELETE",
        "/keys/{key_id}",
        "Revoke an API key.",
        "idempotent",
        answer=Acknowledgement,
        codes=("not_found",),
    ),
    PublicRoute(
        "tokens.make",
        "POST",
        "/token",
        "Make a token for direct calls.",
        "idempotent",
        body=TokenRequest,
        answer=TokenResponse,
        codes=("authority_missing", "invalid_parameter"),
        upstream_path="/tokens",
    ),
    PublicRoute(
        "revocations.create",
        "POST",
        "/token/revoke",
        "Revoke a token, or what a principal or a service was lent.",
        "idempotent",
        body=RevocationRequest,
        answer=Acknowledgement,
        upstream_path="/revocations",
    ),
    PublicRoute(
        "audit.read",
        "GET",
        "/audit",
        "The audit log behind a row.",
        query=AuditQuery,
        answer=AuditPage,
        codes=("scope_missing",),
    ),
    PublicRoute(
        "webhooks.list", "GET", "/webhooks", "Webhooks (not configured).", query=PageQuery, codes=_NOT_CONFIGURED
    ),
    PublicRoute(
        "webhooks.create", "POST", "/webhooks", "Add a webhook (not configured).", "idempotent", codes=_NOT_CONFIGURED
    ),
    PublicRoute(
        "dead_letters.list",
        "GET",
        "/dead-letters",
        "Events that were given up (not configured).",
        query=PageQuery,
        codes=_NOT_CONFIGURED,
    ),
)
