"""Typed references to operations: service, operation, body type and answer type of a call.

``await ctx.call(retriever.search, query="…")`` is checked by a type checker; ``ctx.call("retriever", "search", …)`` is
the same call by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from octollm.contracts.memory_operations import Fact, FactList, FactQuery, NamedFact
from octollm.contracts.operations import (
    AcceptRequest,
    AcceptResult,
    DocumentIn,
    DocumentOut,
    ExternalRequest,
    ExternalResponse,
    RunRequest,
    RunResult,
    SearchRequest,
    SearchResult,
    ValidateRequest,
    ValidateResult,
)
from octollm.contracts.task import ExecuteResult, Plan, PlanRequest, Task
from octollm.errors import ArmError

P = ParamSpec("P")
AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, slots=True)
class OperationReference(Generic[P, AnswerT]):
    """An operation of a service: ``body`` constructs the request, ``answer`` is the type of the response.

    For your own arm: ``lookup = OperationReference("glossary", "lookup", Word, Meaning)``.
    """

    service: str
    operation: str
    body: Callable[P, Any]
    answer: type[AnswerT]

    @property
    def scope(self) -> str:
        """Return the scope of the operation, in the format of ``calls``."""
        return f"{self.service}:{self.operation}"

    def __str__(self) -> str:
        return self.scope

    def make_body(self, *args: P.args, **kwargs: P.kwargs) -> object:
        """Return a body with these fields; raise ``arm_invalid`` for fields that it does not have."""
        try:
            return self.body(*args, **kwargs)
        except TypeError as error:
            name = getattr(self.body, "__name__", "its body")
            raise ArmError(f"{self.scope} takes the fields of {name}: {error}.") from error


CallTo = str | OperationReference[..., Any]
"""A declared call: a scope such as ``"retriever:search"``, or a reference."""


class planner:  # noqa: N801  used as a namespace, as in planner.plan
    """The planner's operations."""

    plan = OperationReference("planner", "plan", PlanRequest, Plan)
    execute = OperationReference("planner", "execute", Task, ExecuteResult)


class executor:  # noqa: N801
    """The executor's operations."""

    run = OperationReference("executor", "run", RunRequest, RunResult)
    http = OperationReference("executor", "http", ExternalRequest, ExternalResponse)
    execute = OperationReference("executor", "execute", Task, ExecuteResult)


class coder:  # noqa: N801
    """The coder's operations."""

    execute = OperationReference("coder", "execute", Task, ExecuteResult)


class judge:  # noqa: N801
    """The judge's operations."""

    validate = OperationReference("judge", "validate", ValidateRequest, ValidateResult)
    accept = OperationReference("judge", "accept", AcceptRequest, AcceptResult)
    execute = OperationReference("judge", "execute", Task, ExecuteResult)


class retriever:  # noqa: N801
    """The retriever's operations."""

    search = OperationReference("retriever", "search", SearchRequest, SearchResult)
    execute = OperationReference("retriever", "execute", Task, ExecuteResult)


class memory:  # noqa: N801
    """The memory's operations: documents (``read`` searches them, ``write`` stores one) and facts."""

    read = OperationReference("memory", "read", SearchRequest, SearchResult)
    write = OperationReference("memory", "write", DocumentIn, DocumentOut)
    query_facts = OperationReference("memory", "query_facts", FactQuery, FactList)
    store_fact = OperationReference("memory", "store_fact", NamedFact, Fact)
