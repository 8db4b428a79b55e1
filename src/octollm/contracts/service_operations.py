"""The operations that services and arms call of each other, each declared once with its direct calls.

Of a built-in service this is the only place that names routes, types and calls: the root builds delegation trees from
the calls, callers take the route from here, and an arm's declaration follows it. Any other arm declares its own calls,
and its operations are ``POST /<operation>``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import NoneType

import msgspec

from octollm.contracts.api import TaskIdQuery
from octollm.contracts.declarations import (
    EVENT_STREAM,
    OPTIONAL_MARK,
    AnyOperation,
    DeclaredOperation,
    OperationTable,
)
from octollm.contracts.memory_operations import (
    PUBLIC_MEMORY_OPERATIONS,
    QUERY_FACTS,
    SEARCH_MEMORY,
    STORE_DOCUMENT,
    STORE_FACT,
)
from octollm.contracts.observability import TraceView
from octollm.contracts.operations import (
    AcceptRequest,
    AcceptResult,
    ExternalRequest,
    ExternalResponse,
    RunRequest,
    RunResult,
    SearchRequest,
    SearchResult,
    ValidateRequest,
    ValidateResult,
)
from octollm.contracts.public_api import LIST_SERVICES, READ_FILE, STORE_FILE
from octollm.contracts.services import OperationKind
from octollm.contracts.task import ExecuteResult, Plan, PlanRequest, Task
from octollm.contracts.task_operations import CANCEL_TASK, READ_TASK, SUBMIT_TASK

MAX_CHAT_BYTES = MAX_SPANS_BYTES = 4 * 1024 * 1024


def _execute(arm: str, summary: str, *calls: str) -> DeclaredOperation[Task, ExecuteResult]:
    """Declare the operation that every arm has: a step of a task in, its result out."""
    return DeclaredOperation(
        id=f"{arm}:execute",
        method="POST",
        path="/execute",
        summary=summary,
        service=arm,
        scope=f"{arm}:execute",
        kind="idempotent",
        body=Task,
        response=ExecuteResult,
        calls=calls,
    )


PLAN = DeclaredOperation(
    id="planner:plan",
    method="POST",
    path="/plan",
    summary="Plan a goal: the steps, and which arm does each.",
    service="planner",
    scope="planner:plan",
    body=PlanRequest,
    response=Plan,
    calls=("models:chat",),
)
RUN = DeclaredOperation(
    id="executor:run",
    method="POST",
    path="/run",
    summary="Run a program or a query in the sandbox.",
    service="executor",
    scope="executor:run",
    kind="idempotent",
    # A sandbox has no network and is thrown away, so a second run changes nothing that anybody sees.
    claims_key=False,
    body=RunRequest,
    response=RunResult,
    calls=("?files:read",),
)
CALL_EXTERNAL_SERVER = DeclaredOperation(
    id="executor:http",
    method="POST",
    path="/http",
    summary="Send a request to an external server on the tenant's allow-list.",
    service="executor",
    scope="executor:http",
    kind="at_most_once",
    body=ExternalRequest,
    response=ExternalResponse,
    error_codes=("host_not_allowed", "url_refused"),
)
VALIDATE = DeclaredOperation(
    id="judge:validate",
    method="POST",
    path="/validate",
    summary="Validate code, and run its tests.",
    service="judge",
    scope="judge:validate",
    body=ValidateRequest,
    response=ValidateResult,
    calls=("?executor:run",),
)
ACCEPT = DeclaredOperation(
    id="judge:accept",
    method="POST",
    path="/accept",
    summary="Judge whether a step's result meets its goal and criteria.",
    service="judge",
    scope="judge:accept",
    body=AcceptRequest,
    response=AcceptResult,
    calls=("?executor:run", "?files:read", "?models:chat"),
)
SEARCH = DeclaredOperation(
    id="retriever:search",
    method="POST",
    path="/search",
    summary="Search documents: passages with source, lines and score.",
    service="retriever",
    scope="retriever:search",
    body=SearchRequest,
    response=SearchResult,
    calls=("memory:read",),
)
CHAT = DeclaredOperation(
    id="models:chat",
    method="POST",
    path="/v1/chat/completions",
    summary="Call a model (OpenAI's chat completions).",
    service="models",
    scope="models:chat",
    kind="idempotent",
    # The types are OpenAI's, which the contracts do not repeat.
    body=msgspec.Raw,
    response=msgspec.Raw,
    stream_media_type=EVENT_STREAM,
    error_codes=(
        "authority_missing",
        "budget_exhausted",
        "context_too_long",
        "fence_lost",
        "model_failed",
        "no_model",
        "not_found",
        "state_conflict",
        "task_not_found",
    ),
    max_body=MAX_CHAT_BYTES,
)
LIST_MODELS = DeclaredOperation(
    id="models:list",
    method="GET",
    path="/v1/models",
    summary="List the names that a request may give as its model.",
    service="models",
    scope="models:chat",
    body=NoneType,
    response=msgspec.Raw,
    cacheable=True,
)
EMBEDDINGS = DeclaredOperation(
    id="models:embeddings",
    method="POST",
    path="/v1/embeddings",
    summary="Compute embeddings (OpenAI's).",
    service="models",
    scope="models:embeddings",
    kind="idempotent",
    body=msgspec.Raw,
    response=msgspec.Raw,
    error_codes=tuple(sorted({*CHAT.error_codes, "not_configured"})),
    max_body=MAX_CHAT_BYTES,
)
EMBED_FOR_INDEX = DeclaredOperation(
    id="models:embed_for_index",
    method="POST",
    path="/index/embeddings",
    summary="Compute embeddings of stored passages, for the memory service.",
    service="models",
    callers="memory",
    body=msgspec.Raw,
    response=msgspec.Raw,
    error_codes=("context_too_long", "model_failed", "no_model", "not_configured", "not_found"),
    max_body=MAX_CHAT_BYTES,
)

READ_TRACE = DeclaredOperation(
    id="traces.read",
    method="GET",
    path="/traces",
    summary="Return the spans of a task.",
    service="monitor",
    scope="monitor:read",
    query=TaskIdQuery,
    body=NoneType,
    response=TraceView,
    error_codes=("task_not_found",),
)
RECEIVE_SPANS = DeclaredOperation(
    id="traces.receive",
    method="POST",
    path="/v1/traces",
    summary="Store spans (OTLP over HTTP, in JSON).",
    service="monitor",
    callers="*",
    # A repeated span is stored once.
    kind="idempotent",
    claims_key=False,
    # The types are those of OTLP.
    body=msgspec.Raw,
    response=msgspec.Raw,
    max_body=MAX_SPANS_BYTES,
)

SERVICE_OPERATIONS = OperationTable(
    [
        PLAN,
        _execute("planner", "Write programs for a goal and run them.", "models:chat", "executor:run"),
        _execute(
            "coder",
            "Write code, text or a query for a goal, and check it.",
            "models:chat",
            "judge:validate",
            "executor:run",
            "?files:read",
            "files:write",
        ),
        RUN,
        _execute("executor", "Run the program or the query among a task's files.", "?files:read", "?files:write"),
        CALL_EXTERNAL_SERVER,
        VALIDATE,
        ACCEPT,
        _execute("judge", "Validate the Python files of a task.", "?executor:run", "?files:read"),
        SEARCH,
        _execute(
            "retriever",
            "Answer a question from documents with citations, or summarise, compare, extract, list or translate.",
            "memory:read",
            "models:chat",
            "?executor:run",
            "?files:read",
            "?files:write",
        ),
        SEARCH_MEMORY,
        STORE_DOCUMENT,
        QUERY_FACTS,
        STORE_FACT,
        CHAT,
        EMBEDDINGS,
        replace(READ_FILE, id="files:read"),
        replace(STORE_FILE, id="files:write"),
        replace(SUBMIT_TASK, id="tasks:create"),
        replace(READ_TASK, id="tasks:read"),
        replace(CANCEL_TASK, id="tasks:cancel"),
    ],
    one_host=False,
)
"""The operations that delegation trees may hold, by scope without selectors."""

UNDELEGATED_OPERATIONS = OperationTable(
    [
        *(each for each in PUBLIC_MEMORY_OPERATIONS if each not in (SEARCH_MEMORY, STORE_DOCUMENT)),
        LIST_MODELS,
        EMBED_FOR_INDEX,
        LIST_SERVICES,
        READ_TRACE,
        RECEIVE_SPANS,
    ],
    one_host=False,
)
"""The further operations of memory, models and monitor, which no arm calls with delegated authority."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where an operation is served. ``path`` may have ``{names}``."""

    method: str
    path: str
    kind: OperationKind
    claims_key: bool = True


_ROUTES = {
    declared.id: Route(declared.method, declared.service_path or declared.path, declared.kind, declared.claims_key)
    for declared in SERVICE_OPERATIONS
}


def route_of(service: str, operation: str) -> Route:
    """Return the route of an operation; one that is not declared here is idempotent and ``POST /<operation>``."""
    return _ROUTES.get(f"{service}:{operation}") or Route("POST", f"/{operation}", "idempotent")


def operations_of(service: str) -> tuple[AnyOperation, ...]:
    """Return the declared operations of a built-in service."""
    tables = (*SERVICE_OPERATIONS, *UNDELEGATED_OPERATIONS)
    return tuple(declared for declared in tables if declared.service == service)


def calls_of(service: str) -> tuple[str, ...]:
    """Return the scopes that the operations of a built-in service call, without marks, each once."""
    calls = (call.removeprefix(OPTIONAL_MARK) for declared in operations_of(service) for call in declared.calls)
    return tuple(dict.fromkeys(calls))
