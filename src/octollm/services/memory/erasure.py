"""Erasure: by fact, document, task or tenant, down to passages, index and sources.

What has other sources stays and loses the erased one. Each batch is one transaction; what an interrupted erasure left
is erased when it is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, update

from octollm.contracts.memory_operations import Erasure
from octollm.errors import OctoError
from octollm.services.memory.facts import (
    FactKey,
    Precondition,
    fact_etag,
    find_valid,
    floor_to_milliseconds,
    lock_fact,
)
from octollm.storage import Database, Transaction
from octollm.storage.tables import document_sources, documents, fact_sources, fact_versions, passages

BATCH = 100
"""Facts or documents of one transaction."""


@dataclass(frozen=True, slots=True)
class _ErasedFacts:
    """Facts that are gone, versions that were erased, and versions that lost a source and stay."""

    facts: int = 0
    versions: int = 0
    sources: int = 0

    def __add__(self, more: _ErasedFacts) -> _ErasedFacts:
        return _ErasedFacts(self.facts + more.facts, self.versions + more.versions, self.sources + more.sources)


class Eraser:
    """Erases what belongs to a tenant; raises ``not_found`` where there is nothing of what was named."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def erase_fact(self, key: FactKey, precondition: Precondition) -> Erasure:
        """Erase a fact with all of its versions. Raises ``state_conflict`` unless the precondition is met."""
        async with self._db.transaction() as tx:
            rows = await lock_fact(tx, key)
            valid = find_valid(rows, floor_to_milliseconds(await tx.now()))
            precondition.check(fact_etag(valid) if valid else "")
            found = await tx.execute(delete(fact_versions).where(*key.where))
        return _require_any(Erasure(int(found.rowcount > 0), 0, 0, 0, versions=found.rowcount))

    async def erase_document(self, tenant: str, digest: str) -> Erasure:
        """Erase a document, and the facts that are known from it alone."""
        gone = await self._erase_sources(tenant, fact_sources.c.document == digest)
        # Last: as long as the document is there, a repeated erasure finds it.
        async with self._db.transaction() as tx:
            removed = await _delete_documents(tx, tenant, [digest])
        return _require_any(Erasure(gone.facts, gone.sources, *removed, versions=gone.versions))

    async def erase_task(self, tenant: str, task_id: str) -> Erasure:
        """Erase the documents and facts that are known from a task alone."""
        gone = await self._erase_sources(tenant, fact_sources.c.task_id == task_id)
        where = (document_sources.c.tenant == tenant, document_sources.c.task_id == task_id)
        removed_documents = removed_passages = 0
        while True:
            async with self._db.transaction() as tx:
                query = select(document_sources.c.digest).where(*where).distinct()
                digests = [row["digest"] for row in await tx.all(query.order_by("digest").limit(BATCH))]
                if not digests:
                    break
                # The rows that a store of the same document locks before it adds a source.
                mine = (documents.c.tenant == tenant, documents.c.digest.in_(digests))
                await tx.all(select(documents.c.digest).where(*mine).order_by("digest").with_for_update())
                await tx.execute(delete(document_sources).where(*where, document_sources.c.digest.in_(digests)))
                shared = {row["digest"] for row in await tx.all(_sources_of(tenant, digests))}
                alone = [digest for digest in digests if digest not in shared]
                removed = await _delete_documents(tx, tenant, alone)
            removed_documents, removed_passages = removed_documents + removed[0], removed_passages + removed[1]
            gone += _ErasedFacts(sources=len(shared))
            for digest in alone:
                gone += await self._erase_sources(tenant, fact_sources.c.document == digest)
        return _require_any(
            Erasure(gone.facts, gone.sources, removed_documents, removed_passages, versions=gone.versions)
        )

    async def erase_all(self, tenant: str) -> Erasure:
        """Erase all documents and facts of a tenant; there may be none."""
        facts = versions = removed_documents = removed_passages = 0
        columns = (fact_versions.c.id, fact_versions.c.subject, fact_versions.c.key)
        # In the order of the facts: a fact whose versions are in two batches is counted with the first alone.
        mine = select(*columns).where(fact_versions.c.tenant == tenant).order_by("subject", "key", "id")
        last: tuple[str, str] | None = None
        while True:
            async with self._db.transaction() as tx:
                rows = await tx.all(mine.limit(5 * BATCH))
                await tx.execute(delete(fact_versions).where(fact_versions.c.id.in_([row["id"] for row in rows])))
            if not rows:
                break
            versions += len(rows)
            for row in rows:
                fact = (row["subject"], row["key"])
                facts += fact != last
                last = fact
        while True:
            async with self._db.transaction() as tx:
                query = select(documents.c.digest).where(documents.c.tenant == tenant).order_by("digest")
                digests = [row["digest"] for row in await tx.all(query.limit(BATCH // 10))]
                removed = await _delete_documents(tx, tenant, digests)
            if not digests:
                break
            removed_documents, removed_passages = removed_documents + removed[0], removed_passages + removed[1]
        return Erasure(facts, 0, removed_documents, removed_passages, versions=versions)

    async def _erase_sources(self, tenant: str, is_source: ColumnElement[bool]) -> _ErasedFacts:
        """Erase sources of facts, and the versions that have no other source."""
        gone = _ErasedFacts()
        where = (fact_sources.c.tenant == tenant, is_source)
        addresses = (
            select(fact_versions.c.subject, fact_versions.c.key)
            .join(fact_sources, fact_sources.c.fact_id == fact_versions.c.id)
            .where(*where)
            .distinct()
            .order_by(fact_versions.c.subject, fact_versions.c.key)
            .limit(BATCH)
        )
        while True:
            async with self._db.transaction() as tx:
                keys = [FactKey(tenant, row["subject"], row["key"]) for row in await tx.all(addresses)]
                for key in keys:
                    gone += await self._erase_sources_of(tx, key, where)
            if not keys:
                return gone

    async def _erase_sources_of(
        self, tx: Transaction, key: FactKey, where: tuple[ColumnElement[bool], ...]
    ) -> _ErasedFacts:
        rows = await lock_fact(tx, key)
        version = max((row["version"] for row in rows), default=0)
        mine = select(fact_versions.c.id).where(*key.where)
        removed = await tx.execute(
            delete(fact_sources).where(*where, fact_sources.c.fact_id.in_(mine)).returning(fact_sources.c.fact_id)
        )
        ids = [row[0] for row in removed.all()]
        erased = 0
        for fact_id in sorted(set(ids)):
            left = await tx.all(
                select(fact_sources).where(fact_sources.c.fact_id == fact_id).order_by(fact_sources.c.at)
            )
            if not left:
                await tx.execute(delete(fact_versions).where(fact_versions.c.id == fact_id))
                erased += 1
                continue
            version += 1
            changed = {
                "version": version,
                "source": left[0]["note"],
                "evidence": len(left),
                "confidence": max(row["confidence"] for row in left),
            }
            await tx.execute(update(fact_versions).where(fact_versions.c.id == fact_id).values(**changed))
        return _ErasedFacts(int(0 < erased == len(rows)), erased, len(set(ids)) - erased)


async def _delete_documents(tx: Transaction, tenant: str, digests: list[str]) -> tuple[int, int]:
    """Delete documents with their passages, which leave the index too; return how many of both."""
    if not digests:
        return 0, 0
    inside = (passages.c.tenant == tenant, passages.c.digest.in_(digests))
    count = int(await tx.scalar(select(func.count()).select_from(passages).where(*inside)))
    where = (documents.c.tenant == tenant, documents.c.digest.in_(digests))
    return (await tx.execute(delete(documents).where(*where))).rowcount, count


def _sources_of(tenant: str, digests: list[str]) -> Any:
    where = (document_sources.c.tenant == tenant, document_sources.c.digest.in_(digests))
    return select(document_sources.c.digest).where(*where).distinct()


def _require_any(found: Erasure) -> Erasure:
    if not (found.versions or found.sources or found.documents):
        raise OctoError("The memory service has no data of that name.", code="not_found")
    return found
