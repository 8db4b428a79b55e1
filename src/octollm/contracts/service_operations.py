"""The operations that services and arms call of each other, each declared once with its direct calls.

Of a built-in service this is the only place that names routes, types and calls: the root builds delegation trees from
the calls, callers take the route from here, and an arm's declaration follows it. Any other arm declares its own calls,
and its operations are ``POST /<operation>``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import NoneType

import msgspec

from octollm.contracts.api import PageQuery, TaskIdQuery
from octollm.contracts.declarations import (
    EVENT_STREAM,
    OPTIONAL_MARK,
    AnyOperation,
    DeclaredOperation,
    OperationTable,
)
from octollm.contracts.observability import ServiceStates, TraceView
from octollm.contracts.operations import (
    AcceptRequest,
    AcceptResult,
    DocumentIn,
    DocumentList,
    DocumentOut,
    Fact,
    FactIn,
    RunRequest,
    RunResult,
    SearchRequest,
    SearchResult,
    ValidateRequest,
    ValidateResult,
)
from octollm.contracts.public_api import READ_FILE, STORE_FILE
from octollm.contracts.services import OperationKind
from octollm.contracts.task import MAX_FILE_BYTES, ExecuteResult, Plan, PlanRequest, Task

MAX_CHAT_BYTES = MAX_SPANS_BYTES = 4 * 1024 * 1024
MAX_FACT_BYTES = 64 * 1024


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
    summary="Call an external server (not configured).",
    service="executor",
    scope="executor:http",
    kind="at_most_once",
    body=msgspec.Raw,
    response=msgspec.Raw,
    error_codes=("not_configured",),
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
    summary="Judge whether a step's result is what was asked for.",
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
SEARCH_MEMORY = DeclaredOperation(
    id="memory:read",
    method="POST",
    path="/search",
    summary="Search the tenant's documents.",
    service="memory",
    scope="memory:read",
    body=SearchRequest,
    response=SearchResult,
)
STORE_DOCUMENT = DeclaredOperation(
    id="memory:write",
    method="POST",
    path="/documents",
    summary="Store a document, in passages.",
    service="memory",
    scope="memory:write",
    kind="idempotent",
    body=DocumentIn,
    response=DocumentOut,
    status=201,
    other_statuses=(200,),
    error_codes=("file_invalid",),
    # JSON may take two characters for one of the text.
    max_body=2 * MAX_FILE_BYTES,
)
LIST_DOCUMENTS = DeclaredOperation(
    id="memory:list",
    method="GET",
    path="/documents",
    summary="List documents, newest first.",
    service="memory",
    scope="memory:read",
    query=PageQuery,
    body=NoneType,
    response=DocumentList,
    cacheable=True,
)
READ_DOCUMENT = DeclaredOperation(
    id="memory:read_document",
    method="GET",
    path="/documents/{digest}",
    summary="Describe a document.",
    service="memory",
    scope="memory:read:{digest}",
    body=NoneType,
    response=DocumentOut,
    error_codes=("invalid_parameter", "not_found"),
    cacheable=True,
)
DELETE_DOCUMENT = DeclaredOperation(
    id="memory:delete_document",
    method="DELETE",
    path="/documents/{digest}",
    summary="Delete a document.",
    service="memory",
    scope="memory:write:{digest}",
    kind="idempotent",
    body=NoneType,
    response=NoneType,
    status=204,
    error_codes=("invalid_parameter", "not_found"),
)
PUT_FACT = DeclaredOperation(
    id="memory:put_fact",
    method="PUT",
    path="/facts/{name}",
    summary="Set a fact.",
    service="memory",
    scope="memory:write",
    kind="idempotent",
    body=FactIn,
    response=Fact,
    other_statuses=(201,),
    error_codes=("invalid_parameter", "state_conflict"),
    headers={"If-Match": "The ETag of the version that is replaced."},
    max_body=MAX_FACT_BYTES,
)
GET_FACT = DeclaredOperation(
    id="memory:get_fact",
    method="GET",
    path="/facts/{name}",
    summary="Get a fact.",
    service="memory",
    scope="memory:read",
    body=NoneType,
    response=Fact,
    error_codes=("invalid_parameter", "not_found"),
    cacheable=True,
)
DELETE_FACT = DeclaredOperation(
    id="memory:delete_fact",
    method="DELETE",
    path="/facts/{name}",
    summary="Delete a fact.",
    service="memory",
    scope="memory:write",
    kind="idempotent",
    body=NoneType,
    response=NoneType,
    status=204,
    error_codes=("invalid_parameter", "not_found"),
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
    summary="Compute embeddings (not configured).",
    service="models",
    scope="models:embeddings",
    body=msgspec.Raw,
    response=msgspec.Raw,
    error_codes=("not_configured",),
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
    scope="*",
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
        _execute("retriever", "Answer a question from documents, with citations.", "memory:read", "models:chat"),
        SEARCH_MEMORY,
        STORE_DOCUMENT,
        CHAT,
        EMBEDDINGS,
        replace(READ_FILE, id="files:read"),
        replace(STORE_FILE, id="files:write"),
    ],
    one_host=False,
)
"""The operations that delegation trees may hold, by scope without selectors."""

UNDELEGATED_OPERATIONS = OperationTable(
    [
        LIST_DOCUMENTS,
        READ_DOCUMENT,
        DELETE_DOCUMENT,
        PUT_FACT,
        GET_FACT,
        DELETE_FACT,
        LIST_MODELS,
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
    declared.id: Route(declared.method, declared.path, declared.kind, declared.claims_key)
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
