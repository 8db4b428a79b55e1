"""The memory's operations and messages: facts with validity, documents, search, and erasure.

Its paths are public under ``/memory``; the service itself serves them without that prefix. An arm calls those that
``service_operations`` lists for delegation.
"""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from octollm.contracts.api import PageQuery
from octollm.contracts.declarations import DeclaredOperation
from octollm.contracts.operations import MAX_NAME, DocumentIn, DocumentList, DocumentOut, SearchRequest, SearchResult
from octollm.contracts.task import MAX_FILE_BYTES

MAX_FACT_BYTES = 64 * 1024
"""Bytes of a fact's body."""
MAX_TIME_TEXT = 40
_Time = Annotated[str, Meta(max_length=MAX_TIME_TEXT)]
_Name = Annotated[str, Meta(max_length=MAX_NAME)]
_Confidence = Annotated[float, Meta(ge=0.0, le=1.0)]
IF_MATCH = {"If-Match": "The ETag that the fact must have, or `*` for any."}
IF_NONE_MATCH = {"If-None-Match": "`*`: only if there is no such fact yet."}


class FactIn(Struct, frozen=True, omit_defaults=True):
    """``PUT /memory/facts/{name}``: any JSON value but null, and what is known about it.

    ``confidence`` is from 0 to 1. The fact is valid from ``valid_from`` (default: now) until ``valid_until`` (default:
    until a newer one begins), both RFC 3339. ``source`` is a note on where it is known from, ``document`` the digest of
    a document in memory. The task and the principal are recorded from the token.
    """

    value: Any
    source: _Name = ""
    confidence: _Confidence = 1.0
    valid_from: _Time | None = None
    valid_until: _Time | None = None
    document: str | None = None


class NamedFact(FactIn, frozen=True, omit_defaults=True, kw_only=True):
    """``memory POST /facts``: a fact with its ``name``, and the ``subject`` that it is about."""

    name: str
    subject: _Name = ""


class FactSubject(Struct, frozen=True):
    """``subject`` is what a fact is about, in any words; empty for the tenant itself."""

    subject: _Name = ""


class FactMoment(FactSubject, frozen=True):
    """Selects the version of a fact that is valid ``at`` a time (RFC 3339; default: now)."""

    at: _Time = ""


class FactQuery(PageQuery, frozen=True):
    """Facts that are valid ``at`` a time (RFC 3339; default: now), newest first.

    ``q`` has words that the name, the subject or the value must contain, each of them, in any case. ``prefix`` is the
    beginning of the name. ``task`` and ``document`` select facts with that source.
    """

    subject: _Name | UnsetType = UNSET
    prefix: _Name = ""
    q: Annotated[str, Meta(max_length=1000)] = ""
    min_confidence: _Confidence = 0.0
    task: Annotated[str, Meta(max_length=128)] = ""
    document: Annotated[str, Meta(max_length=64)] = ""
    at: _Time = ""


class Fact(Struct, frozen=True):
    """A version of a fact. ``etag`` is its ETag; times are RFC 3339 in UTC.

    ``version`` rises with each change. ``evidence`` counts the distinct sources of this value; ``confidence`` is the
    highest of theirs. ``source`` is the note of the first.
    """

    name: str
    value: Any
    source: str
    version: int
    created_at: str
    updated_at: str
    subject: str = ""
    confidence: float = 1.0
    evidence: int = 1
    valid_from: str = ""
    valid_until: str | None = None
    etag: str = ""


class FactSource(Struct, frozen=True, omit_defaults=True):
    """Where a value is known from: who stated it, in which task, from which document, with which note."""

    principal: str
    at: str
    confidence: float
    note: str = ""
    task: str = ""
    document: str = ""


class FactVersion(Struct, frozen=True):
    """A version of a fact, with up to 20 of its sources, the oldest first."""

    fact: Fact
    sources: tuple[FactSource, ...]


class FactHistory(Struct, frozen=True):
    """The versions of a fact, the newest first; at most 100 are kept."""

    versions: tuple[FactVersion, ...]


class FactList(Struct, frozen=True):
    """A page of facts, newest first. ``cursor`` asks for the next page; ``None`` on the last."""

    facts: tuple[Fact, ...]
    cursor: str | None = None


class Erasure(Struct, frozen=True):
    """What was erased: facts, sources of facts and documents that stay, documents, passages, and versions of facts.

    ``facts`` counts the facts that are gone with all their versions. ``versions`` counts every erased version, also
    those of facts that keep other versions. The full-text index and the vectors go with the passages. ``caches`` is
    ``cleared``, or ``expiring`` if Redis did not respond: cached copies then end within a minute.
    """

    facts: int
    sources: int
    documents: int
    passages: int
    caches: str = "cleared"
    versions: int = 0


SEARCH_MEMORY = DeclaredOperation(
    id="memory:read",
    method="POST",
    path="/memory/search",
    service_path="/search",
    summary="Search the tenant's documents.",
    service="memory",
    scope="memory:read",
    body=SearchRequest,
    response=SearchResult,
    calls=("?models:embeddings",),
)
STORE_DOCUMENT = DeclaredOperation(
    id="memory:write",
    method="POST",
    path="/memory/documents",
    service_path="/documents",
    summary="Store a document, in passages.",
    service="memory",
    scope="memory:write",
    kind="idempotent",
    # Documents are stored by their digest.
    claims_key=False,
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
    path="/memory/documents",
    service_path="/documents",
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
    path="/memory/documents/{digest}",
    service_path="/documents/{digest}",
    summary="Describe a document.",
    service="memory",
    scope="memory:read:{digest}",
    body=NoneType,
    response=DocumentOut,
    error_codes=("invalid_parameter", "not_found"),
    cacheable=True,
)
ERASE_DOCUMENT = DeclaredOperation(
    id="memory:erase_document",
    method="DELETE",
    path="/memory/documents/{digest}",
    service_path="/documents/{digest}",
    summary="Erase a document, and the facts known from it alone.",
    service="memory",
    scope="memory:write:{digest}",
    kind="idempotent",
    body=NoneType,
    response=Erasure,
    error_codes=("invalid_parameter", "not_found"),
)
ERASE_TASK = DeclaredOperation(
    id="memory:erase_task",
    method="DELETE",
    path="/memory/tasks/{task_id}",
    service_path="/tasks/{task_id}",
    summary="Erase the documents and facts known from a task alone.",
    service="memory",
    scope="memory:write",
    kind="idempotent",
    body=NoneType,
    response=Erasure,
    error_codes=("invalid_parameter", "not_found"),
)
ERASE_MEMORY = DeclaredOperation(
    id="memory:erase",
    method="DELETE",
    path="/memory",
    service_path="/all",
    summary="Erase all documents and facts of the tenant.",
    service="memory",
    scope="memory:erase",
    kind="idempotent",
    body=NoneType,
    response=Erasure,
)
LIST_FACTS = DeclaredOperation(
    id="memory:list_facts",
    method="GET",
    path="/memory/facts",
    service_path="/facts",
    summary="List and search facts, newest first.",
    service="memory",
    scope="memory:read",
    query=FactQuery,
    body=NoneType,
    response=FactList,
    error_codes=("invalid_parameter",),
    cacheable=True,
)
GET_FACT = DeclaredOperation(
    id="memory:get_fact",
    method="GET",
    path="/memory/facts/{name}",
    service_path="/facts/{name}",
    summary="Get a fact as it is valid now, or at a time.",
    service="memory",
    scope="memory:read",
    query=FactMoment,
    body=NoneType,
    response=Fact,
    error_codes=("invalid_parameter", "not_found"),
    cacheable=True,
)
READ_FACT_HISTORY = DeclaredOperation(
    id="memory:fact_history",
    method="GET",
    path="/memory/facts/{name}/history",
    service_path="/facts/{name}/history",
    summary="Read the versions of a fact, with their sources.",
    service="memory",
    scope="memory:read",
    query=FactSubject,
    body=NoneType,
    response=FactHistory,
    error_codes=("invalid_parameter", "not_found"),
)
PUT_FACT = DeclaredOperation(
    id="memory:put_fact",
    method="PUT",
    path="/memory/facts/{name}",
    service_path="/facts/{name}",
    summary="Set a fact. A newer value supersedes; the same value from another source raises the evidence.",
    service="memory",
    scope="memory:write",
    kind="idempotent",
    # The same value from the same source changes nothing.
    claims_key=False,
    query=FactSubject,
    body=FactIn,
    response=Fact,
    other_statuses=(201,),
    error_codes=("invalid_parameter", "state_conflict"),
    headers={**IF_MATCH, **IF_NONE_MATCH},
    max_body=MAX_FACT_BYTES,
)
ERASE_FACT = DeclaredOperation(
    id="memory:erase_fact",
    method="DELETE",
    path="/memory/facts/{name}",
    service_path="/facts/{name}",
    summary="Erase a fact with its history.",
    service="memory",
    scope="memory:write",
    kind="idempotent",
    query=FactSubject,
    body=NoneType,
    response=Erasure,
    error_codes=("invalid_parameter", "not_found", "state_conflict"),
    headers=IF_MATCH,
)
QUERY_FACTS = DeclaredOperation(
    id="memory:query_facts",
    method="POST",
    path="/facts/query",
    summary="List and search facts, newest first.",
    service="memory",
    scope="memory:query_facts",
    body=FactQuery,
    response=FactList,
    error_codes=("invalid_parameter",),
)
STORE_FACT = DeclaredOperation(
    id="memory:store_fact",
    method="POST",
    path="/facts",
    summary="Set a fact. A newer value supersedes; the same value from another source raises the evidence.",
    service="memory",
    scope="memory:store_fact",
    kind="idempotent",
    claims_key=False,
    body=NamedFact,
    response=Fact,
    other_statuses=(201,),
    error_codes=("invalid_parameter",),
    max_body=MAX_FACT_BYTES,
)

PUBLIC_MEMORY_OPERATIONS = (
    SEARCH_MEMORY,
    STORE_DOCUMENT,
    LIST_DOCUMENTS,
    READ_DOCUMENT,
    ERASE_DOCUMENT,
    LIST_FACTS,
    GET_FACT,
    READ_FACT_HISTORY,
    PUT_FACT,
    ERASE_FACT,
    ERASE_TASK,
    ERASE_MEMORY,
)
"""Those that the gateway serves."""
