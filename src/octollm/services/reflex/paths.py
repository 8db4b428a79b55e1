"""The paths of the public API that the orchestrator answers, and what travels on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from octollm.contracts.api import (
    ArmList,
    Done,
    EventList,
    KeyList,
    KeyRequest,
    NewKey,
    SavedTexts,
    TaskList,
    TaskView,
    TokenAnswer,
    TokenRequest,
)
from octollm.contracts.audit import AuditPage
from octollm.contracts.joining import JoinList, NewJoin, NewJoinRequest
from octollm.contracts.listing import AuditQuery, Behind, Page, TaskPage
from octollm.contracts.operations import StoredFile
from octollm.contracts.revocations import RevocationRequest
from octollm.contracts.services import OperationKind
from octollm.contracts.task import SUBMIT_CODES, TaskContract
from octollm.contracts.traces import TraceView


@dataclass(frozen=True, slots=True)
class PublicPath:
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
    to: str = ""
    """The orchestrator's path, where it is another one."""
    traced: bool = False
    """What comes without a trace begins one: every task has its trace."""
    file: bool = False
    """The body is a file's bytes, or the answer is."""

    def passes_on(self, parameter: str) -> bool:
        """Say whether the orchestrator is told of a parameter in the query."""
        return self.query is not None and parameter in self.query.__struct_fields__


_ABSENT = ("not_configured",)
_TASK = ("task_not_found",)

PUBLIC: tuple[PublicPath, ...] = (
    PublicPath(
        "tasks.submit",
        "POST",
        "/tasks",
        "Submit a task.",
        "idempotent",
        body=TaskContract,
        answer=TaskView,
        status=201,
        codes=SUBMIT_CODES,
        traced=True,
    ),
    PublicPath("tasks.list", "GET", "/tasks", "List tasks.", query=TaskPage, answer=TaskList, cacheable=True),
    PublicPath("tasks.read", "GET", "/tasks/{task_id}", "One task.", answer=TaskView, cacheable=True, codes=_TASK),
    PublicPath(
        "tasks.cancel",
        "POST",
        "/tasks/{task_id}/cancel",
        "Cancel a task.",
        "idempotent",
        answer=TaskView,
        codes=(*_TASK, "state_conflict"),
    ),
    PublicPath(
        "tasks.approve",
        "POST",
        "/tasks/{task_id}/approval",
        "Let a waiting task go on (not configured).",
        "idempotent",
        codes=_ABSENT,
    ),
    PublicPath(
        "tasks.history",
        "GET",
        "/tasks/{task_id}/history",
        "A task's events.",
        query=Behind,
        answer=EventList,
        codes=_TASK,
    ),
    PublicPath(
        "tasks.texts", "GET", "/tasks/{task_id}/texts", "What the steps have written.", answer=SavedTexts, codes=_TASK
    ),
    PublicPath("tasks.trace", "GET", "/tasks/{task_id}/trace", "A task's spans.", answer=TraceView, codes=_TASK),
    PublicPath(
        "tasks.artifact",
        "GET",
        "/tasks/{task_id}/artifacts/{digest}",
        "A file that a task made.",
        cacheable=True,
        codes=(*_TASK, "file_not_found"),
        file=True,
    ),
    PublicPath(
        "files.store",
        "POST",
        "/files",
        "Store a file.",
        "idempotent",
        body=bytes,
        answer=StoredFile,
        status=201,
        codes=("file_invalid",),
        file=True,
    ),
    PublicPath(
        "files.read", "GET", "/files/{digest}", "A stored file.", cacheable=True, codes=("file_not_found",), file=True
    ),
    PublicPath("events.read", "GET", "/events", "The tenant's events.", query=Behind, answer=EventList),
    PublicPath("arms.list", "GET", "/arms", "The arms that may be called.", answer=ArmList, cacheable=True),
    PublicPath(
        "arms.remove",
        "DELETE",
        "/arms/{name}",
        "Remove an arm of one's own.",
        "idempotent",
        answer=Done,
        codes=("arm_unknown",),
    ),
    PublicPath("joins.list", "GET", "/joins", "Join secrets.", answer=JoinList),
    PublicPath(
        "joins.create",
        "POST",
        "/joins",
        "Make a join secret.",
        "idempotent",
        body=NewJoinRequest,
        answer=NewJoin,
        status=201,
        codes=("authority_missing", "invalid_parameter", "state_conflict"),
    ),
    PublicPath(
        "joins.revoke",
        "DELETE",
        "/joins/{join_id}",
        "Revoke a join secret.",
        "idempotent",
        answer=Done,
        codes=("not_found",),
    ),
    PublicPath("keys.list", "GET", "/keys", "API keys.", answer=KeyList),
    PublicPath(
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
    PublicPath(
        "keys.revoke",
        "DELETE",
        "/keys/{key_id}",
        "Revoke an API key.",
        "idempotent",
        answer=Done,
        codes=("not_found",),
    ),
    PublicPath(
        "tokens.make",
        "POST",
        "/token",
        "Make a token for direct calls.",
        "idempotent",
        body=TokenRequest,
        answer=TokenAnswer,
        codes=("authority_missing", "invalid_parameter"),
        to="/tokens",
    ),
    PublicPath(
        "revocations.create",
        "POST",
        "/token/revoke",
        "Revoke a token, or what a principal or a service was lent.",
        "idempotent",
        body=RevocationRequest,
        answer=Done,
        to="/revocations",
    ),
    PublicPath(
        "audit.read",
        "GET",
        "/audit",
        "The audit log behind a row.",
        query=AuditQuery,
        answer=AuditPage,
        codes=("scope_missing",),
    ),
    PublicPath("webhooks.list", "GET", "/webhooks", "Webhooks (not configured).", query=Page, codes=_ABSENT),
    PublicPath("webhooks.create", "POST", "/webhooks", "Add a webhook (not configured).", "idempotent", codes=_ABSENT),
    PublicPath(
        "dead_letters.list",
        "GET",
        "/dead-letters",
        "Events that were given up (not configured).",
        query=Page,
        codes=_ABSENT,
    ),
)
