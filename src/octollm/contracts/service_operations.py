"""The operations that services and arms call of each other, each declared once with its direct calls.

Of a built-in service this is the only place that names routes, types and calls: the root builds delegation trees from
the calls, callers take the route from here, and an arm's declaration follows it. Any other arm declares its own calls,
and its operations are ``POST /<operation>``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from octollm.contracts.declarations import OPTIONAL_MARK, AnyOperation, DeclaredOperation, OperationTable
from octollm.contracts.operations import (
    AcceptRequest,
    AcceptResult,
    DocumentIn,
    DocumentOut,
    RunRequest,
    RunResult,
    SearchRequest,
    SearchResult,
    ValidateRequest,
    ValidateResult,
)
from octollm.contracts.public_api import READ_FILE, STORE_FILE
from octollm.contracts.services import OperationKind
from octollm.contracts.task import ExecuteResult, Plan, PlanRequest, Task


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
)
CHAT = DeclaredOperation(
    id="models:chat",
    method="POST",
    path="/v1/chat/completions",
    summary="Call a model (OpenAI's chat completions).",
    service="models",
    scope="models:chat",
    kind="idempotent",
    body=msgspec.Raw,
    response=msgspec.Raw,
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
"""By scope without selectors."""


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
    return tuple(declared for declared in SERVICE_OPERATIONS if declared.service == service)


def calls_of(service: str) -> tuple[str, ...]:
    """Return the scopes that the operations of a built-in service call, without marks, each once."""
    calls = (call.removeprefix(OPTIONAL_MARK) for declared in operations_of(service) for call in declared.calls)
    return tuple(dict.fromkeys(calls))
