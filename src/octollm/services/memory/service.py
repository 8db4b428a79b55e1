"""The memory over HTTP: documents, search, facts and erasure."""

from __future__ import annotations

import contextlib
import math
import re
import unicodedata
from collections.abc import AsyncGenerator, Awaitable, Callable
from urllib.parse import quote

import msgspec
from msgspec import UNSET

from octollm.concurrency import BackgroundLoop
from octollm.config import Settings
from octollm.contracts import memory_operations as declared
from octollm.contracts.api import PageQuery
from octollm.contracts.declarations import AnyOperation
from octollm.contracts.internal import AuditEntry
from octollm.contracts.internal_operations import RECORD_AUDIT
from octollm.contracts.memory_operations import (
    Erasure,
    Fact,
    FactHistory,
    FactIn,
    FactList,
    FactMoment,
    FactQuery,
    FactSubject,
    NamedFact,
)
from octollm.contracts.operations import (
    MAX_NAME,
    MAX_QUERY_CHARS,
    DocumentIn,
    DocumentList,
    DocumentOut,
    SearchFilters,
    SearchRequest,
    SearchResult,
)
from octollm.errors import FieldError, OctoError
from octollm.resilience import Backoff
from octollm.rpc.call import Handler, IncomingCall, Operation, OperationResponse, implement
from octollm.rpc.client import CallTarget, OutgoingCall
from octollm.rpc.codec import encode
from octollm.rpc.health import DependencyStatus
from octollm.rpc.service import Service, ServiceBase, build_service
from octollm.services.memory.cache import CacheScope, ReadCache
from octollm.services.memory.documents import DocumentStore
from octollm.services.memory.erasure import Eraser
from octollm.services.memory.facts import FactKey, FactStore, Precondition, Provenance, parse_moment
from octollm.services.memory.indexing import IDLE_SECONDS, MAX_BACKOFF_SECONDS, PassageIndexer
from octollm.services.memory.search import PassageSearch
from octollm.services.memory.vectors import Embedder, VectorIndex
from octollm.storage import Database, RedisClient, RedisKeys
from octollm.storage.migrations import open_service_database

MAX_SEARCH = 50
MAX_FILTERS = 64
MAX_LOCATIONS = 100_000
MAX_LOCATION = 1000
"""Characters of the label of a location."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FACT_NAME = re.compile(rf"[a-z0-9._-]{{1,{MAX_NAME}}}")
_TASK_ID = re.compile(r"[!-~]{1,128}")
_ETAG = re.compile(r'\*|"\d{1,18}-\d{1,18}"')


@contextlib.asynccontextmanager
async def memory_service(
    base: ServiceBase, settings: Settings, *, redis: RedisClient | None = None, redis_keys: RedisKeys | None = None
) -> AsyncGenerator[Service]:
    """Open the memory's database and yield the service; close it on leaving. Without ``redis`` nothing is cached.

    Raises ``unavailable`` when the database cannot be used, ``schema_mismatch`` when its schema does not fit.
    """
    cache = ReadCache(
        redis,
        keys=redis_keys or RedisKeys(),
        service=base.name,
        clock=base.clock,
        ids=base.ids,
        metrics=base.metrics,
        log=base.log,
    )
    async with open_service_database(settings, "memory", clock=base.clock) as db, cache:
        embedder = Embedder(base)
        indexer = PassageIndexer(db, embedder, base.clock)
        # Models may be away, or without embeddings, for as long as it likes: documents are found by their words.
        loop = BackgroundLoop(
            "passage index",
            indexer.work,
            interval=IDLE_SECONDS,
            backoff=Backoff(IDLE_SECONDS, MAX_BACKOFF_SECONDS),
            restart=True,
            log=base.log,
            log_after=60.0,
        )

        def on_model(model: str) -> None:
            if indexer.notice_model(model):
                loop.wake()

        async with loop, VectorIndex(db, base.log) as index:
            search = PassageSearch(db, index, embedder, base.log, on_model)
            yield build_memory(base, db, cache, search, loop)


def build_memory(
    base: ServiceBase, db: Database, cache: ReadCache, search: PassageSearch, indexing: BackgroundLoop
) -> Service:
    """Return the service over an open database with its schema."""
    stores = DocumentStore(db, base.clock), FactStore(db), Eraser(db)
    handlers = _MemoryHandlers(base, *stores, cache, search, indexing)

    async def database() -> DependencyStatus:
        try:
            await db.check()
        except OctoError as error:
            return DependencyStatus(ok=False, detail=error.detail)
        return DependencyStatus(ok=True)

    async def vectors() -> DependencyStatus:
        # Search answers without them, so the service is ready.
        return DependencyStatus(ok=not indexing.failure, detail=indexing.failure, required=False)

    return build_service(
        base,
        handlers.operations(),
        # Only erasures claim a key: a repeated one finds nothing to count any more.
        idempotency=base.remote_idempotency_store(),
        readiness_checks={"database": database, "cache": cache.check_health, "vectors": vectors},
    )


class _MemoryHandlers:
    """The operations. Each acts within the tenant of the token that it was shown, and no other."""

    def __init__(
        self,
        base: ServiceBase,
        documents: DocumentStore,
        facts: FactStore,
        eraser: Eraser,
        cache: ReadCache,
        search: PassageSearch,
        indexing: BackgroundLoop,
    ) -> None:
        self._base = base
        self._documents = documents
        self._facts = facts
        self._eraser = eraser
        self._cache = cache
        self._search = search
        self._indexing = indexing

    def operations(self) -> list[Operation]:
        """Return the operations of the service."""
        handlers: list[tuple[AnyOperation, Handler]] = [
            (declared.STORE_DOCUMENT, self.put_document),
            (declared.LIST_DOCUMENTS, self.list_documents),
            (declared.READ_DOCUMENT, self.get_document),
            (declared.ERASE_DOCUMENT, self.erase_document),
            (declared.SEARCH_MEMORY, self.search),
            (declared.LIST_FACTS, self.list_facts),
            (declared.GET_FACT, self.get_fact),
            (declared.READ_FACT_HISTORY, self.fact_history),
            (declared.ERASE_FACT, self.erase_fact),
            (declared.ERASE_TASK, self.erase_task),
            (declared.ERASE_MEMORY, self.erase_all),
            (declared.QUERY_FACTS, self.query_facts),
        ]
        example = {"value": {"closes": "18:00"}, "source": "notes.txt"}
        named = {"name": "opening-hours", **example}
        return [
            implement(declared.PUT_FACT, self.put_fact, strict=False, example=example),
            implement(declared.STORE_FACT, self.store_fact, strict=False, example=named),
            *(implement(operation, handler, strict=False) for operation, handler in handlers),
        ]

    async def put_document(self, call: IncomingCall, document: DocumentIn) -> OperationResponse:
        """Remember a document: 201 when it is new, 200 when its digest was known."""
        _check_digest(document.digest, "/digest")
        if not document.name or len(document.name) > MAX_NAME or "\x00" in document.name:
            raise _invalid_body("/name", f"1 to {MAX_NAME} characters")
        if "\x00" in document.text:
            raise OctoError("The text has NUL characters, so it is not a text.", code="file_invalid")
        if len(document.locations) > MAX_LOCATIONS or any(
            len(each.label) > MAX_LOCATION or "\x00" in each.label for each in document.locations
        ):
            raise _invalid_body("/locations", f"at most {MAX_LOCATIONS}, each of {MAX_LOCATION} characters")
        writing = self._cache.invalidating(_documents_of(call.tenant))
        out, created = await self._documents.put(call.tenant, document, _provenance(call), writing=writing)
        if out.vectors == "pending":
            self._indexing.wake()
        return OperationResponse(out, 201 if created else 200, {"Location": f"/documents/{out.digest}"})

    async def list_documents(self, call: IncomingCall, _body: object) -> DocumentList:
        """Return a page of documents."""
        page: PageQuery = call.query
        return await self._documents.list(call.tenant, limit=page.limit, cursor=page.cursor)

    async def get_document(self, call: IncomingCall, _body: object) -> DocumentOut:
        """Describe a document."""
        _check_digest(call.path["digest"], "")
        return await self._documents.get(call.tenant, call.path["digest"])

    async def search(self, call: IncomingCall, request: SearchRequest) -> SearchResult:
        """Find passages."""
        if len(request.query) > MAX_QUERY_CHARS:
            raise _invalid_body("/query", f"at most {MAX_QUERY_CHARS} characters")
        if not 1 <= request.limit <= MAX_SEARCH:
            raise _invalid_body("/limit", f"a whole number from 1 to {MAX_SEARCH}")
        for name in SearchFilters.__struct_fields__:
            values: tuple[str, ...] = getattr(request.filters, name)
            if len(values) > MAX_FILTERS or any(len(each) > MAX_NAME or "\x00" in each for each in values):
                raise _invalid_body(f"/filters/{name}", f"at most {MAX_FILTERS}, each of at most {MAX_NAME} characters")

        async def read() -> tuple[bytes, float]:
            found = await self._search.search(call, request)
            # Without all vectors the same search may find more a moment later.
            return encode(found), math.inf if found.vectors == "used" else 0.0

        name = ("search", encode(request).decode())
        return msgspec.json.decode(await self._cache.load(name, (_documents_of(call.tenant),), read), type=SearchResult)

    async def list_facts(self, call: IncomingCall, _body: object) -> FactList:
        """Return a page of facts."""
        return await self.query_facts(call, call.query)

    async def query_facts(self, call: IncomingCall, query: FactQuery) -> FactList:
        """Return a page of facts."""
        subject = "" if query.subject is UNSET else query.subject
        named = {"subject": subject, "prefix": query.prefix, "task": query.task, "document": query.document}
        for name, text in named.items():
            _check_text(name, text)
        if subject:
            query = msgspec.structs.replace(query, subject=unicodedata.normalize("NFC", subject))
        return await self._facts.list(call.tenant, query)

    async def get_fact(self, call: IncomingCall, _body: object) -> OperationResponse:
        """Return a fact with its ETag."""
        query: FactMoment = call.query
        key = _fact_key(call, call.path["name"], query.subject)
        if query.at:
            fact, _until = await self._facts.get(key, parse_moment(query.at, ""))
        else:

            async def read() -> tuple[bytes, float]:
                found, until = await self._facts.get(key)
                return encode(found), until - self._base.clock.now()

            scopes = (_facts_of(call.tenant), _fact_scope(key))
            fact = msgspec.json.decode(await self._cache.load(("fact",), scopes, read), type=Fact)
        return OperationResponse(fact, headers={"ETag": fact.etag})

    async def fact_history(self, call: IncomingCall, _body: object) -> FactHistory:
        """Return the versions of a fact."""
        query: FactSubject = call.query
        return await self._facts.history(_fact_key(call, call.path["name"], query.subject))

    async def put_fact(self, call: IncomingCall, fact: FactIn) -> OperationResponse:
        """Set a fact: 201 when it is new."""
        query: FactSubject = call.query
        return await self._put_fact(call, _fact_key(call, call.path["name"], query.subject), fact)

    async def store_fact(self, call: IncomingCall, fact: NamedFact) -> OperationResponse:
        """Set a fact that is named in the body."""
        return await self._put_fact(call, _fact_key(call, fact.name, fact.subject), fact)

    async def _put_fact(self, call: IncomingCall, key: FactKey, fact: FactIn) -> OperationResponse:
        if fact.document is not None:
            _check_digest(fact.document, "/document")
        async with self._cache.invalidating(_fact_scope(key)):
            stored, created = await self._facts.put(key, fact, _provenance(call), _read_precondition(call))
        headers = {"ETag": stored.etag}
        if created:
            subject = f"?subject={quote(key.subject, safe='')}" if key.subject else ""
            headers["Location"] = f"/facts/{quote(key.name)}{subject}"
        return OperationResponse(stored, 201 if created else 200, headers)

    async def erase_fact(self, call: IncomingCall, _body: object) -> Erasure:
        """Erase a fact with its history."""
        query: FactSubject = call.query
        key = _fact_key(call, call.path["name"], query.subject)
        precondition = _read_precondition(call)
        return await self._erase(
            call, f"fact {key.name}", lambda: self._eraser.erase_fact(key, precondition), _fact_scope(key)
        )

    async def erase_document(self, call: IncomingCall, _body: object) -> Erasure:
        """Erase a document, and the facts known from it alone."""
        digest = call.path["digest"]
        _check_digest(digest, "")
        return await self._erase(
            call, f"document {digest}", lambda: self._eraser.erase_document(call.tenant, digest), *_all_of(call.tenant)
        )

    async def erase_task(self, call: IncomingCall, _body: object) -> Erasure:
        """Erase what is known from a task alone."""
        task_id = call.path["task_id"]
        if not _TASK_ID.fullmatch(task_id):
            raise OctoError("A task's id has 1 to 128 printable characters.", code="invalid_parameter")
        return await self._erase(
            call, f"task {task_id}", lambda: self._eraser.erase_task(call.tenant, task_id), *_all_of(call.tenant)
        )

    async def erase_all(self, call: IncomingCall, _body: object) -> Erasure:
        """Erase all documents and facts of the tenant."""
        return await self._erase(call, "all", lambda: self._eraser.erase_all(call.tenant), *_all_of(call.tenant))

    async def _erase(
        self, call: IncomingCall, target: str, erase: Callable[[], Awaitable[Erasure]], *scopes: CacheScope
    ) -> Erasure:
        # Before anything is erased: an erasure that nobody could record must not happen.
        await self._record(call, "memory.erasing", target, {})
        async with self._cache.invalidating(*scopes):
            done = await erase()
        if not self._cache.is_cleared:
            done = msgspec.structs.replace(done, caches="expiring")
        try:
            await self._record(call, "memory.erased", target, msgspec.to_builtins(done))
        except OctoError as error:
            # The beginning is on record, and the caller must learn that it is erased.
            self._base.log.warning("erasure.not_recorded", target=target, error=error)
        return done

    async def _record(self, call: IncomingCall, action: str, target: str, detail: dict[str, str | int]) -> None:
        base = self._base
        entry = AuditEntry(call.bearer, action, target, detail, call.request_id, call.correlation_id)
        await base.client.send(
            OutgoingCall(
                CallTarget.of(RECORD_AUDIT),
                base.identity.signer().sign_token("orchestrator"),
                call.deadline,
                encode(entry),
            )
        )


def _documents_of(tenant: str) -> CacheScope:
    return CacheScope(tenant, ("documents",))


def _facts_of(tenant: str) -> CacheScope:
    return CacheScope(tenant, ("facts",))


def _all_of(tenant: str) -> tuple[CacheScope, CacheScope]:
    return _facts_of(tenant), _documents_of(tenant)


def _fact_scope(key: FactKey) -> CacheScope:
    return CacheScope(key.tenant, ("fact", key.subject, key.name))


def _provenance(call: IncomingCall) -> Provenance:
    task = call.authority.task
    return Provenance(call.authority.subject, (task.task or "") if task is not None else "")


def _read_precondition(call: IncomingCall) -> Precondition:
    match = call.request.headers.get("if-match")
    none_match = call.request.headers.get("if-none-match")
    if match is not None and not _ETAG.fullmatch(match.strip()):
        raise OctoError("If-Match must be the ETag of a fact, or `*`.", code="invalid_header")
    if none_match is not None and none_match.strip() != "*":
        raise OctoError("If-None-Match of a change can only be `*`.", code="invalid_header")
    return Precondition((match or "").strip(), none_match is not None)


def _fact_key(call: IncomingCall, name: str, subject: str) -> FactKey:
    if not _FACT_NAME.fullmatch(name):
        raise OctoError(f"A fact's name has 1 to {MAX_NAME} of a-z, 0-9, `.`, `_`, `-`.", code="invalid_parameter")
    _check_text("subject", subject)
    # Two encodings of one text are one subject.
    normal = unicodedata.normalize("NFC", subject)
    if len(normal) > MAX_NAME:
        raise OctoError(f"subject has at most {MAX_NAME} characters.", code="invalid_parameter")
    return FactKey(call.tenant, normal, name)


def _check_text(name: str, text: str) -> None:
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise OctoError(f"{name} has control characters.", code="invalid_parameter")


def _check_digest(digest: str, pointer: str) -> None:
    if not _DIGEST.fullmatch(digest):
        if pointer:
            raise _invalid_body(pointer, "a SHA-256 in 64 lower-case hex digits")
        raise OctoError("A digest has 64 lower-case hex digits.", code="invalid_parameter")


def _invalid_body(pointer: str, wanted: str) -> OctoError:
    return OctoError(
        "The body does not match its schema.",
        code="invalid_body",
        field_errors=(FieldError(pointer, f"Expected {wanted}."),),
    )
