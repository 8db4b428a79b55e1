"""The memory over HTTP: documents, search, facts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator
from urllib.parse import quote

from starlette.responses import Response

from octollm.config import Settings
from octollm.contracts import service_operations
from octollm.contracts.api import PageQuery
from octollm.contracts.declarations import AnyOperation
from octollm.contracts.operations import (
    MAX_NAME,
    DocumentIn,
    DocumentList,
    DocumentOut,
    FactIn,
    SearchRequest,
    SearchResult,
)
from octollm.errors import FieldError, OctoError
from octollm.rpc.call import Handler, IncomingCall, Operation, OperationResponse, implement
from octollm.rpc.health import DependencyStatus
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.services.memory.documents import DocumentStore
from octollm.services.memory.facts import FactStore
from octollm.storage import Database
from octollm.storage.migrations import open_service_database

MAX_QUERY = 4000
"""Characters of a query."""
MAX_SEARCH = 50
MAX_FILTERS = 64
MAX_LOCATIONS = 100_000
MAX_LOCATION = 1000
"""Characters of the label of a location."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FACT_NAME = re.compile(rf"[a-z0-9._-]{{1,{MAX_NAME}}}")
_ETAG_VERSION = re.compile(r'"(\d{1,18})"')


@contextlib.asynccontextmanager
async def memory_service(base: ServiceBase, settings: Settings) -> AsyncGenerator[Service]:
    """Open the memory's database and yield the service; close it on leaving.

    Raises ``unavailable`` when the database cannot be used, ``schema_mismatch`` when its schema does not fit.
    """
    async with open_service_database(settings, "memory", clock=base.clock) as db:
        yield build_memory(base, db)


def build_memory(base: ServiceBase, db: Database) -> Service:
    """Return the service over an open database with its schema."""
    handlers = _MemoryHandlers(DocumentStore(db, base.clock), FactStore(db, base.clock))

    async def database() -> DependencyStatus:
        try:
            await db.check()
        except OctoError as error:
            return DependencyStatus(ok=False, detail=error.detail)
        return DependencyStatus(ok=True)

    return build_service(base, handlers.operations(), readiness_checks={"database": database})


class _MemoryHandlers:
    """The operations. Each acts within the tenant of the token that it was shown, and no other."""

    def __init__(self, documents: DocumentStore, facts: FactStore) -> None:
        self._documents = documents
        self._facts = facts

    def operations(self) -> list[Operation]:
        """Return the operations of the service.

        Everything here may be repeated: documents go by digest and facts by name, so no key is needed for it.
        """
        handlers: list[tuple[AnyOperation, Handler]] = [
            (service_operations.STORE_DOCUMENT, self.put_document),
            (service_operations.LIST_DOCUMENTS, self.list_documents),
            (service_operations.READ_DOCUMENT, self.get_document),
            (service_operations.DELETE_DOCUMENT, self.delete_document),
            (service_operations.SEARCH_MEMORY, self.search),
            (service_operations.GET_FACT, self.get_fact),
            (service_operations.DELETE_FACT, self.delete_fact),
        ]
        example = {"value": {"closes": "18:00"}, "source": "notes.txt"}
        return [
            implement(service_operations.PUT_FACT, self.put_fact, strict=False, example=example),
            *(implement(declared, handler, strict=False) for declared, handler in handlers),
        ]

    async def put_document(self, call: IncomingCall, document: DocumentIn) -> OperationResponse:
        """Remember a document: 201 when it is new, 200 when its digest was known."""
        _check_digest(document.digest, "/digest")
        if not document.name or len(document.name) > MAX_NAME or "\x00" in document.name:
            raise _invalid_body("/name", f"1 to {MAX_NAME} characters")
        if "\x00" in document.text:
            raise OctoError("The text has NUL characters: it is no text.", code="file_invalid")
        if len(document.locations) > MAX_LOCATIONS or any(
            len(each.label) > MAX_LOCATION or "\x00" in each.label for each in document.locations
        ):
            raise _invalid_body("/locations", f"at most {MAX_LOCATIONS}, each of {MAX_LOCATION} characters")
        out, created = await self._documents.put(call.tenant, document)
        return OperationResponse(out, 201 if created else 200, {"Location": f"/documents/{out.digest}"})

    async def list_documents(self, call: IncomingCall, _body: object) -> DocumentList:
        """Return a page of documents."""
        page: PageQuery = call.query
        return await self._documents.list(call.tenant, limit=page.limit, cursor=page.cursor)

    async def get_document(self, call: IncomingCall, _body: object) -> DocumentOut:
        """Describe a document."""
        _check_digest(call.path["digest"], "")
        return await self._documents.get(call.tenant, call.path["digest"])

    async def delete_document(self, call: IncomingCall, _body: object) -> Response:
        """Forget a document."""
        _check_digest(call.path["digest"], "")
        await self._documents.delete(call.tenant, call.path["digest"])
        return Response(status_code=204)

    async def search(self, call: IncomingCall, request: SearchRequest) -> SearchResult:
        """Find passages."""
        if len(request.query) > MAX_QUERY:
            raise _invalid_body("/query", f"at most {MAX_QUERY} characters")
        if not 1 <= request.limit <= MAX_SEARCH:
            raise _invalid_body("/limit", f"a whole number from 1 to {MAX_SEARCH}")
        if len(request.filters.digests) > MAX_FILTERS:
            raise _invalid_body("/filters/digests", f"at most {MAX_FILTERS} digests")
        return await self._documents.search(call.tenant, request)

    async def put_fact(self, call: IncomingCall, fact: FactIn) -> OperationResponse:
        """Set a fact: 201 when it is new. ``If-Match`` may name the version that it replaces."""
        name = _read_fact_name(call)
        stored, created = await self._facts.put(call.tenant, name, fact, expected_version=_read_if_match(call))
        headers = {"ETag": f'"{stored.version}"'}
        if created:
            headers["Location"] = f"/facts/{quote(name)}"
        return OperationResponse(stored, 201 if created else 200, headers)

    async def get_fact(self, call: IncomingCall, _body: object) -> OperationResponse:
        """Return a fact, with its version as ETag."""
        fact = await self._facts.get(call.tenant, _read_fact_name(call))
        return OperationResponse(fact, headers={"ETag": f'"{fact.version}"'})

    async def delete_fact(self, call: IncomingCall, _body: object) -> Response:
        """Forget a fact."""
        await self._facts.delete(call.tenant, _read_fact_name(call))
        return Response(status_code=204)


def _read_if_match(call: IncomingCall) -> int | None:
    text = call.request.headers.get("if-match")
    if text is None:
        return None
    match = _ETAG_VERSION.fullmatch(text.strip())
    if match is None:
        raise OctoError("If-Match must be the ETag that a fact came with.", code="invalid_header")
    return int(match[1])


def _read_fact_name(call: IncomingCall) -> str:
    name = call.path["name"]
    if not _FACT_NAME.fullmatch(name):
        raise OctoError(f"A fact's name has 1 to {MAX_NAME} of a-z, 0-9, `.`, `_`, `-`.", code="invalid_parameter")
    return name


def _check_digest(digest: str, pointer: str) -> None:
    if not _DIGEST.fullmatch(digest):
        if pointer:
            raise _invalid_body(pointer, "a SHA-256 in 64 lower-case hex digits")
        raise OctoError("A digest has 64 lower-case hex digits.", code="invalid_parameter")


def _invalid_body(pointer: str, wanted: str) -> OctoError:
    return OctoError(
        "The body does not fit its schema.",
        code="invalid_body",
        field_errors=(FieldError(pointer, f"Expected {wanted}."),),
    )
