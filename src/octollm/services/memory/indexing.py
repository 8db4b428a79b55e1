"""The index of passages: their terms, their language, and the loop that fills in what is missing."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import case, select, update

from octollm.clock import Clock
from octollm.services.memory.vectors import Embedder
from octollm.storage import Database, Transaction
from octollm.storage.tables import documents, passages
from octollm.text.index_terms import TERMS_VERSION, index_terms
from octollm.text.question_terms import recognize_language

_PREFIX_CHARS = 4


def tenant_prefix(tenant: str) -> str:
    """Return what every term of a tenant's passages begins with.

    It keeps the tenants apart in one index: how often a term occurs at one says nothing about another. Two tenants may
    share a prefix by chance, so a search names the tenant besides.
    """
    digest = hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).digest()
    return base64.b32encode(digest).decode().lower()[:_PREFIX_CHARS]


def build_terms(tenant: str, language: str, text: str) -> str:
    """Return the terms of a passage, parted by blanks."""
    prefix = tenant_prefix(tenant)
    return " ".join(prefix + term for term in index_terms(text, language))


BATCH = 8
"""Passages that are embedded in one call: a second or two of the embedded model, which others wait for as well."""
REINDEX_BATCH = 200
CLAIM_SECONDS = 150.0
"""How long a replica may be at work on a batch; then another takes it over. It is longer than a call may take."""
IDLE_SECONDS = 5.0
MAX_BACKOFF_SECONDS = 60.0
"""Longest pause while models do not answer, or have no embeddings."""


class PassageIndexer:
    """Fills in what passages lack: terms of the present version, then vectors of the present model.

    A round does one batch. Several replicas may run it: each claims the passages that it embeds.
    """

    def __init__(self, db: Database, embedder: Embedder, clock: Clock) -> None:
        self._db = db
        self._embedder = embedder
        self._clock = clock
        self._present_model = ""
        self._indexed_model = ""

    def notice_model(self, model: str) -> bool:
        """Take note of the model that embeds now; return whether it is another, so that there is work to do."""
        self._present_model = model
        return model != self._indexed_model

    async def work(self) -> None:
        """Index until nothing is missing. Raises what the database and models raise."""
        if self._present_model != self._indexed_model:
            await self._drop_other_models(self._present_model)
        while await self._index_batch():
            pass
        while await self._embed_batch():
            pass

    async def _index_batch(self) -> bool:
        columns = passages.c
        outdated = (
            select(columns.id, columns.tenant, columns.digest, columns.text, documents.c.language)
            .select_from(
                passages.join(
                    documents, (documents.c.tenant == columns.tenant) & (documents.c.digest == columns.digest)
                )
            )
            .where(columns.terms_version < TERMS_VERSION)
            .order_by(columns.id)
            .limit(REINDEX_BATCH)
        )
        async with self._db.read() as conn:
            rows = await conn.all(outdated)
        if not rows:
            return False
        languages, terms = await asyncio.to_thread(_index_rows, rows)
        async with self._db.transaction() as tx:
            for (tenant, digest), language in sorted(languages.items()):
                mine = (documents.c.tenant == tenant, documents.c.digest == digest)
                await tx.execute(update(documents).where(*mine).values(language=language))
            for row, text in zip(rows, terms, strict=True):
                values = {"terms": text, "terms_version": TERMS_VERSION}
                await tx.execute(update(passages).where(columns.id == row["id"]).values(**values))
        return True

    async def _embed_batch(self) -> bool:
        claimed = await self._claim()
        if not claimed:
            return False
        try:
            embedded = await self._embedder.embed_passages([row["text"] for row in claimed])
        except BaseException:
            # Given back, so that whoever works next need not wait for the claim to expire.
            await asyncio.shield(self._release([row["id"] for row in claimed]))
            raise
        if self.notice_model(embedded.model):
            await self._drop_other_models(embedded.model)
        now = self._clock.now()
        async with self._db.transaction() as tx:
            await _lock_documents(tx, claimed)
            written: Counter[tuple[str, str]] = Counter()
            for row, vector in zip(claimed, embedded.vectors, strict=True):
                values = {"vector": vector.astype("<f4").tobytes(), "vector_model": embedded.model, "embedded_at": now}
                # Deleted or replaced meanwhile, it is not there any more.
                where = (passages.c.id == row["id"], passages.c.vector_model == "")
                written[row["tenant"], row["digest"]] += (
                    await tx.execute(update(passages).where(*where).values(**values))
                ).rowcount
            for (tenant, digest), count in sorted(written.items()):
                mine = (documents.c.tenant == tenant, documents.c.digest == digest)
                await tx.execute(update(documents).where(*mine).values(embedded=documents.c.embedded + count))
        return True

    async def _claim(self) -> Sequence[Mapping[Any, Any]]:
        columns = passages.c
        async with self._db.transaction() as tx:
            now = self._clock.now()
            # The first passages of all documents first: a long one does not keep the others waiting.
            free = (
                select(columns.id, columns.tenant, columns.digest, columns.text)
                .where(columns.vector_model == "", columns.embedded_at < now)
                .order_by(columns.position, columns.id)
                .limit(BATCH)
                .with_for_update(skip_locked=True)
            )
            rows = await tx.all(free)
            ids = [row["id"] for row in rows]
            if ids:
                claim = {"embedded_at": now + CLAIM_SECONDS}
                await tx.execute(update(passages).where(columns.id.in_(ids)).values(**claim))
        return rows

    async def _release(self, ids: Sequence[int]) -> None:
        where = (passages.c.id.in_(ids), passages.c.vector_model == "")
        async with self._db.transaction() as tx:
            await tx.execute(update(passages).where(*where).values(embedded_at=0.0))

    async def _drop_other_models(self, model: str) -> None:
        """Make the vectors of a former model missing: they do not compare with those of the present one."""
        columns = passages.c
        while True:
            async with self._db.transaction() as tx:
                others = (
                    select(columns.id, columns.tenant, columns.digest)
                    .where(columns.vector_model.not_in(("", model)))
                    .order_by(columns.id)
                    .limit(REINDEX_BATCH)
                )
                rows = await tx.all(others)
                if not rows:
                    self._indexed_model = model
                    return
                await _lock_documents(tx, rows)
                ids = [row["id"] for row in rows]
                cleared = {"vector": None, "vector_model": "", "embedded_at": 0.0}
                await tx.execute(update(passages).where(columns.id.in_(ids)).values(**cleared))
                fewer = documents.c.embedded - 1
                for row in rows:
                    mine = (documents.c.tenant == row["tenant"], documents.c.digest == row["digest"])
                    # Never below nothing, should another replica have counted them already.
                    await tx.execute(update(documents).where(*mine).values(embedded=case((fewer < 0, 0), else_=fewer)))


async def _lock_documents(tx: Transaction, rows: Sequence[Mapping[Any, Any]]) -> None:
    # The order of the database's locks: documents before passages, by ascending key.
    for tenant, digest in sorted({(row["tenant"], row["digest"]) for row in rows}):
        mine = (documents.c.tenant == tenant, documents.c.digest == digest)
        await tx.first(select(documents.c.digest).where(*mine).with_for_update())


def _index_rows(rows: Sequence[Mapping[Any, Any]]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Return the languages of documents whose language is not known, and the terms of each passage."""
    languages: dict[tuple[str, str], str] = {}
    terms: list[str] = []
    for row in rows:
        document = (row["tenant"], row["digest"])
        language = row["language"] or languages.get(document)
        if not language:
            language = languages[document] = recognize_language(row["text"])
        terms.append(build_terms(row["tenant"], language, row["text"]))
    return languages, terms
