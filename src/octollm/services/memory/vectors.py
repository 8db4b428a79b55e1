"""Vectors of passages: exact search over those of a tenant, held in memory, and the embedding of texts by models.

Exact, because a matrix product over 100,000 vectors takes 5 ms here: sqlite-vec, which is exact too, takes 48 ms, and
many builds of Python cannot load an extension into SQLite.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from sqlalchemy import Executable, func, select

from octollm.concurrency import BackgroundLoop
from octollm.contracts.service_operations import EMBED_FOR_INDEX, EMBEDDINGS
from octollm.errors import OctoError
from octollm.llm.catalogue import EMBEDDED_EMBEDDING_MODEL
from octollm.lru import LruCache
from octollm.resilience import Backoff, Deadline
from octollm.rpc.call import IncomingCall
from octollm.rpc.client import CallTarget, OutgoingCall
from octollm.rpc.idempotency import NestedKeys
from octollm.rpc.service import ServiceBase
from octollm.storage import Database
from octollm.storage.tables import documents, passages
from octollm.telemetry import Logger

Matrix = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

MAX_INDEX_BYTES = 512 * 1024 * 1024
"""Memory for the vectors of all tenants; those that were not searched for the longest time are read again."""
MAX_TENANT_VECTORS = 300_000
"""Vectors of one tenant that are searched, the oldest: 460 MB with 384 dimensions."""
MIN_SIMILARITY = {EMBEDDED_EMBEDDING_MODEL: 0.77}
"""The cosine below which a passage is not similar, for models whose scale was measured. Any text has some likeness.

Questions of the test set and their passages have at least 0.83, and 0.79 without the names in them. About half of
questions about nothing stored stay below; no bound parts the two, so vectors alone are no evidence of an answer.
"""
_READ_BATCH = 2000
_OVERLAP_SECONDS = 30.0
"""How long a written vector may take to be committed: vectors as young as that are read again."""


MAX_AWAITED_VECTORS = 5000
"""A search waits until as many are read; of a tenant with more it goes by words until they are, a second or two."""
PRELOADED_TENANTS = 8
"""Tenants whose vectors are read at the start, those with the most first."""
RELOAD_SECONDS = 30.0
"""Longest pause until a failed read of vectors is tried again."""


class _TenantVectors:
    """The vectors of a tenant by one model: row i of ``matrix`` is the passage ``ids[i]``."""

    def __init__(self, capacity: int = 0) -> None:
        self.complete_until = 0.0
        """All vectors that were written by then are here, in epoch seconds."""
        self.lock = asyncio.Lock()
        self._capacity = capacity
        self._count = 0
        self._ids: Ids = np.empty(0, np.int64)
        self._rows: Matrix = np.empty((0, 0), np.float32)

    @property
    def ids(self) -> Ids:
        return self._ids[: self._count]

    @property
    def matrix(self) -> Matrix:
        return self._rows[: self._count]

    @property
    def size(self) -> int:
        """Return the bytes that are held."""
        return self._rows.nbytes + self._ids.nbytes

    def add(self, ids: Sequence[int], vectors: Sequence[bytes]) -> None:
        """Add the vectors of passages that are not here yet."""
        known = np.isin(np.asarray(ids, np.int64), self.ids)
        new = [(each, vector) for each, vector, is_known in zip(ids, vectors, known, strict=True) if not is_known]
        if not new:
            return
        rows = np.frombuffer(b"".join(vector for _, vector in new), "<f4").reshape(len(new), -1)
        end = self._count + len(new)
        if end > len(self._ids):
            # Doubled, so that many batches do not copy all that is here each time.
            self._resize(max(end, min(2 * self._count, MAX_TENANT_VECTORS), self._capacity), rows.shape[1])
        self._ids[self._count : end] = [each for each, _ in new]
        self._rows[self._count : end] = rows
        self._count = end

    def _resize(self, capacity: int, width: int) -> None:
        ids, rows = np.empty(capacity, np.int64), np.empty((capacity, width), np.float32)
        ids[: self._count] = self.ids
        if self._count:
            rows[: self._count] = self.matrix
        self._ids, self._rows = ids, rows

    def remove(self, ids: Sequence[int]) -> None:
        stays = ~np.isin(self.ids, np.asarray(ids, np.int64))
        self._ids, self._rows = self.ids[stays], self.matrix[stays]
        self._count = len(self._ids)


def _rank(ids: Ids, matrix: Matrix, vector: Matrix, limit: int, allowed: Ids | None, floor: float) -> Ids:
    """Return the ids of the most similar passages, best first; none that is less similar than ``floor``."""
    if not len(ids) or matrix.shape[1] != len(vector):
        return np.empty(0, np.int64)
    similarities = matrix @ vector
    if allowed is not None:
        similarities = np.where(np.isin(ids, allowed), similarities, -np.inf)
    count = min(limit, len(similarities))
    best = np.argpartition(-similarities, count - 1)[:count]
    best = best[np.argsort(-similarities[best], kind="stable")]
    return ids[best[similarities[best] >= floor]]


@dataclass(frozen=True, slots=True)
class SimilarPassages:
    """The ids of passages, best first. ``reason`` says why there are none: ``pending`` or ``loading``."""

    ids: tuple[int, ...] = ()
    reason: str = ""


class VectorIndex:
    """Exact search over the vectors in the database, which stays the truth: a deleted passage may be named here.

    Callers look the ids up, and report those that are gone. While its context is open, the vectors of the largest
    tenants are read in the background, and those of a large tenant that is searched.
    """

    def __init__(self, db: Database, log: Logger, *, max_awaited: int = MAX_AWAITED_VECTORS) -> None:
        self._db = db
        self._max_awaited = max_awaited
        self._tenants: LruCache[tuple[str, str], _TenantVectors] = LruCache(
            1024, max_weight=MAX_INDEX_BYTES, weigh=lambda vectors: vectors.size
        )
        self._wanted: dict[tuple[str, str], int] = {}
        """What is to be read in the background, with how many vectors there are about."""
        self._is_started = False
        backoff = Backoff(1.0, RELOAD_SECONDS)
        self._loading = BackgroundLoop(
            "vectors",
            self._load_wanted,
            interval=3600.0,
            backoff=backoff,
            restart=True,
            log=log,
        )

    async def __aenter__(self) -> VectorIndex:
        """Begin to read vectors in the background."""
        self._loading.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop reading."""
        await self._loading.aclose()

    async def search(
        self, tenant: str, model: str, vector: Matrix, limit: int, allowed: Ids | None, *, expected: int = 0
    ) -> SimilarPassages:
        """Return the ``limit`` passages nearest to ``vector``; ``pending`` without vectors of ``model``.

        ``loading`` when they are not in memory yet, and are too many to wait for: ``expected`` is how many there are
        about. Only ``allowed`` passages, unless ``None``, and only those that are similar enough, where the model's
        scale is known.
        """
        vectors = self._tenants.get((tenant, model))
        if vectors is None and expected > self._max_awaited:
            # Read behind this search, which answers by words.
            self._wanted[tenant, model] = expected
            self._loading.wake()
            return SimilarPassages(reason="loading")
        vectors = vectors or _TenantVectors()
        async with vectors.lock:
            await self._refresh(tenant, model, vectors)
            # Again, with its new weight.
            self._tenants.put((tenant, model), vectors)
            if not len(vectors.ids):
                return SimilarPassages(reason="pending")
            floor = MIN_SIMILARITY.get(model, -1.0)
            # Both are taken here: passages may be forgotten while the thread works.
            ranked = await asyncio.to_thread(_rank, vectors.ids, vectors.matrix, vector, limit, allowed, floor)
        return SimilarPassages(tuple(int(each) for each in ranked))

    def has(self, tenant: str, model: str) -> bool:
        """Return whether the vectors of a tenant are in memory."""
        return self._tenants.get((tenant, model)) is not None

    def forget(self, tenant: str, model: str, ids: Sequence[int]) -> None:
        """Leave out passages that were deleted."""
        vectors = self._tenants.get((tenant, model))
        if vectors is not None and ids:
            vectors.remove(ids)

    async def _load_wanted(self) -> None:
        """Read what searches wait for; at the start what they are likely to."""
        if not self._is_started:
            largest = await self._find_largest()
            self._wanted = {**largest, **self._wanted}
            self._is_started = True
        while self._wanted:
            # The last is that of a search, which comes before those of the start.
            key, expected = next(reversed(self._wanted.items()))
            if not self.has(*key):
                vectors = _TenantVectors(min(expected, MAX_TENANT_VECTORS))
                await self._refresh(*key, vectors, is_shared=False)
                if len(vectors.ids):
                    self._tenants.put(key, vectors)
            del self._wanted[key]

    async def _find_largest(self) -> dict[tuple[str, str], int]:
        """Return the tenants with the most vectors, the largest last, as far as half of the memory for them goes."""
        columns = documents.c
        total = func.sum(columns.embedded)
        query = (
            select(columns.tenant, total.label("count"))
            .group_by(columns.tenant)
            .having(total > self._max_awaited)
            .order_by(total.desc())
            .limit(PRELOADED_TENANTS)
        )
        largest: dict[tuple[str, str], int] = {}
        left = MAX_INDEX_BYTES // 2
        for row in await self._read(query):
            one = (
                select(passages.c.vector_model, passages.c.vector)
                .where(passages.c.tenant == row["tenant"], passages.c.vector_model != "")
                .limit(1)
            )
            for sample in await self._read(one):
                left -= int(row["count"]) * len(sample["vector"])
                if left >= 0 or not largest:
                    largest[row["tenant"], sample["vector_model"]] = int(row["count"])
        return dict(reversed(largest.items()))

    async def _refresh(self, tenant: str, model: str, vectors: _TenantVectors, *, is_shared: bool = True) -> None:
        columns = passages.c
        since, last = vectors.complete_until, 0
        complete_until = self._db.clock.now() - _OVERLAP_SECONDS
        while len(vectors.ids) < MAX_TENANT_VECTORS:
            query = (
                select(columns.id, columns.vector, columns.embedded_at)
                .where(
                    columns.tenant == tenant,
                    columns.vector_model == model,
                    # The first of the two is a range of the index.
                    columns.embedded_at >= since,
                    (columns.embedded_at > since) | (columns.id > last),
                )
                .order_by(columns.embedded_at, columns.id)
                .limit(_READ_BATCH)
            )
            rows = await self._read(query)
            if rows:
                if is_shared:
                    _add_rows(vectors, rows)
                else:
                    # Of a whole tenant the other requests would notice it. Nothing else has these vectors yet.
                    await asyncio.to_thread(_add_rows, vectors, rows)
                since, last = rows[-1]["embedded_at"], rows[-1]["id"]
            if len(rows) < _READ_BATCH:
                vectors.complete_until = complete_until
                return

    async def _read(self, query: Executable) -> Sequence[Mapping[Any, Any]]:
        """Read rows. Cancelled, it ends the read first: SQLite's driver loses a connection that is being opened."""

        async def read() -> Sequence[Mapping[Any, Any]]:
            async with self._db.read() as conn:
                return await conn.all(query)

        reading = asyncio.create_task(read(), name="read vectors")
        reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            # One batch, which takes some milliseconds; its own failure changes nothing any more.
            await asyncio.wait({reading})
            raise


def _add_rows(vectors: _TenantVectors, rows: Sequence[Mapping[Any, Any]]) -> None:
    vectors.add([row["id"] for row in rows], [row["vector"] for row in rows])


QUERY_SECONDS = 5.0
"""How long a search waits for the vector of its query; then it goes by words alone."""
INDEX_SECONDS = 120.0
MAX_CACHED_QUERIES = 1024


class _EmbeddingRequest(msgspec.Struct, frozen=True):
    input: tuple[str, ...]
    input_type: Literal["query", "passage"]
    model: str = "default"
    encoding_format: str = "base64"


class _Embedding(msgspec.Struct, frozen=True):
    embedding: bytes


class _EmbeddingList(msgspec.Struct, frozen=True):
    data: Annotated[tuple[_Embedding, ...], Meta(min_length=1)]
    model: str


@dataclass(frozen=True, slots=True)
class EmbeddedTexts:
    """Vectors of unit length, and the model that made them."""

    model: str
    vectors: tuple[Matrix, ...]


class Embedder:
    """Has texts embedded by the models service: a query with its caller's authority and budget, passages with its own.

    A document outlives its task, so its passages are embedded at the expense of the installation.
    """

    def __init__(self, base: ServiceBase) -> None:
        self._base = base
        subscriber = base.revocations
        self._delegator = base.identity.delegator(None if subscriber is None else subscriber.revocations)
        self._queries: LruCache[tuple[str, str], EmbeddedTexts] = LruCache(MAX_CACHED_QUERIES)

    async def embed_query(self, call: IncomingCall, query: str) -> EmbeddedTexts:
        """Return the vector of a query. Raises ``authority_missing`` and what models raises."""
        known = self._queries.get((call.tenant, query))
        if known is not None:
            return known
        holder = await self._base.directory.thumbprint("models")
        bearer = self._delegator.delegate(call.authority, "models", "models:embeddings", holder)
        body = msgspec.json.encode(_EmbeddingRequest((query,), "query"))
        outgoing = OutgoingCall(
            CallTarget.of(EMBEDDINGS),
            bearer,
            Deadline.after(self._base.clock, min(QUERY_SECONDS, call.deadline.remaining())),
            body,
            NestedKeys(call.key or call.request_id).next("models", "embeddings", body),
        )
        found = _unpack(await self._base.client.call(outgoing, _EmbeddingList), 1)
        self._queries.put((call.tenant, query), found)
        return found

    async def embed_passages(self, texts: Sequence[str]) -> EmbeddedTexts:
        """Return the vectors of passages. Raises what models raises."""
        outgoing = OutgoingCall(
            CallTarget.of(EMBED_FOR_INDEX),
            self._base.identity.signer().sign_token("models"),
            Deadline.after(self._base.clock, INDEX_SECONDS),
            msgspec.json.encode(_EmbeddingRequest(tuple(texts), "passage")),
        )
        return _unpack(await self._base.client.call(outgoing, _EmbeddingList), len(texts))


def _unpack(answer: _EmbeddingList, count: int) -> EmbeddedTexts:
    vectors = tuple(_normalize(each.embedding) for each in answer.data)
    if len(vectors) != count or len({len(vector) for vector in vectors}) != 1:
        raise OctoError("models did not send one vector for each text, all of one length.", code="peer_protocol")
    return EmbeddedTexts(answer.model, vectors)


def _normalize(data: bytes) -> Matrix:
    if not data or len(data) % 4:
        raise OctoError("models sent a malformed vector.", code="peer_protocol")
    vector = np.frombuffer(data, "<f4").astype(np.float32)
    length: Any = np.linalg.norm(vector)
    if not np.isfinite(length):
        raise OctoError("models sent a vector with invalid numbers.", code="peer_protocol")
    return vector / length if length > 0 else vector
