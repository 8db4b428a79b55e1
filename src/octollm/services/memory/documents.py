"""Documents of a tenant, stored as passages with the terms by which they are found."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import msgspec
from sqlalchemy import Executable, and_, delete, insert, or_, select

from octollm.clock import Clock
from octollm.contracts.api import decode_cursor, encode_cursor
from octollm.contracts.media_types import media_type_of
from octollm.contracts.operations import DocumentIn, DocumentList, DocumentOut
from octollm.errors import OctoError
from octollm.services.memory.facts import Provenance
from octollm.services.memory.indexing import build_terms
from octollm.storage import Database, Transaction
from octollm.storage.tables import document_sources, documents, passages
from octollm.text.index_terms import TERMS_VERSION
from octollm.text.passages import LineSpan, numbered_lines, split_located_passages
from octollm.text.question_terms import recognize_language

MAX_PASSAGES = 60_000
"""Passages of one document."""
_INSERT_BATCH = 500


class DocumentStore:
    """The documents of all tenants; every question names the tenant that it is asked for."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def put(
        self,
        tenant: str,
        document: DocumentIn,
        by: Provenance,
        *,
        writing: AbstractAsyncContextManager[None] | None = None,
    ) -> tuple[DocumentOut, bool]:
        """Remember a document under its digest, with its source; return it, and whether it is new.

        What was remembered under that digest before is replaced, unless it is the same. ``writing`` is entered around
        a change of what is searched. Raises ``body_too_large`` for a text of too many passages.
        """
        # Before the transaction, which is to be short, and in a thread: a long text would hold up the event loop.
        split, lines = await asyncio.to_thread(_split_text, document)
        language, terms = await asyncio.to_thread(_index_text, tenant, document.text, split)
        media_type = media_type_of(document.name)
        out = DocumentOut(document.name, document.digest, len(split), lines, language, media_type)
        # Found without the lock, the common repeat writes nothing.
        known = await self._find_unchanged(tenant, out, split)
        if known is not None and await self._add_source(tenant, out.digest, by):
            return known, False
        async with writing or nullcontext(), self._db.transaction() as tx:
            # Its row is locked from here on, whether it was there or not; its passages follow it.
            created = await tx.first(_select_document(tenant, out.digest).with_for_update()) is None
            values = {
                "name": out.name,
                "lines": out.lines,
                "passages": out.passages,
                "created_at": self._clock.now(),
                "language": language,
                "media_type": media_type,
                "embedded": 0,
            }
            await tx.execute(
                tx.insert(documents)
                .values(tenant=tenant, digest=out.digest, **values)
                .on_conflict_do_update(index_elements=[documents.c.tenant, documents.c.digest], set_=values)
            )
            await tx.execute(self._insert_source(tx, tenant, out.digest, by))
            await tx.execute(delete(passages).where(passages.c.tenant == tenant, passages.c.digest == out.digest))
            for start in range(0, len(split), _INSERT_BATCH):
                rows = [
                    {
                        "tenant": tenant,
                        "digest": out.digest,
                        "position": start + index,
                        "line_start": passage.line_start,
                        "line_end": passage.line_end,
                        "text": passage.text,
                        "location": location,
                        "terms": terms[start + index],
                        "terms_version": TERMS_VERSION,
                    }
                    for index, (passage, location) in enumerate(split[start : start + _INSERT_BATCH])
                ]
                await tx.execute(insert(passages), rows)
        return out, created

    async def _find_unchanged(
        self, tenant: str, out: DocumentOut, split: Sequence[tuple[LineSpan, str]]
    ) -> DocumentOut | None:
        """Return the stored document if it is the one described by ``out`` and ``split``."""
        async with self._db.read() as conn:
            row = await conn.first(_select_document(tenant, out.digest))
            known = None if row is None else _build_document(row)
            if known is None or msgspec.structs.replace(known, vectors=out.vectors) != out:
                return None
            query = (
                select(passages.c.line_start, passages.c.line_end, passages.c.text, passages.c.location)
                .where(passages.c.tenant == tenant, passages.c.digest == out.digest)
                .order_by(passages.c.position)
                .limit(MAX_PASSAGES)
            )
            kept = await conn.all(query)
        same = [(p.line_start, p.line_end, p.text, location) for p, location in split] == [
            (row["line_start"], row["line_end"], row["text"], row["location"]) for row in kept
        ]
        return known if same else None

    async def _add_source(self, tenant: str, digest: str, by: Provenance) -> bool:
        """Note the source of a document that is there; return whether it still is."""
        columns = document_sources.c
        mine = (columns.tenant == tenant, columns.digest == digest)
        known = select(columns.at).where(*mine, columns.task_id == by.task_id, columns.sub == by.principal)
        async with self._db.read() as conn:
            if await conn.scalar(known) is not None:
                return True
        async with self._db.transaction() as tx:
            # Locked against an erasure, which deletes a document that has no other source.
            if await tx.first(_select_document(tenant, digest).with_for_update()) is None:
                return False
            await tx.execute(self._insert_source(tx, tenant, digest, by))
        return True

    def _insert_source(self, tx: Transaction, tenant: str, digest: str, by: Provenance) -> Executable:
        values = {"task_id": by.task_id, "sub": by.principal, "at": self._clock.now()}
        return tx.insert(document_sources).values(tenant=tenant, digest=digest, **values).on_conflict_do_nothing()

    async def get(self, tenant: str, digest: str) -> DocumentOut:
        """Return a document; raise ``not_found``."""
        async with self._db.read() as conn:
            row = await conn.first(_select_document(tenant, digest))
        if row is None:
            raise _document_not_found()
        return _build_document(row)

    async def list(self, tenant: str, *, limit: int, cursor: str) -> DocumentList:
        """Return a page of documents, newest first; raise ``invalid_parameter`` for a cursor that is not ours."""
        wanted = [documents.c.tenant == tenant]
        if cursor:
            at, last = decode_cursor(cursor)
            # The digest orders documents of one moment; by time alone a page would skip or repeat some of them.
            wanted.append(
                or_(documents.c.created_at < at, and_(documents.c.created_at == at, documents.c.digest < last))
            )
        query = (
            select(documents)
            .where(*wanted)
            .order_by(documents.c.created_at.desc(), documents.c.digest.desc())
            .limit(limit + 1)
        )
        async with self._db.read() as conn:
            rows = await conn.all(query)
        page = rows[:limit]
        following = encode_cursor(page[-1]["created_at"], page[-1]["digest"]) if len(rows) > limit else None
        return DocumentList(tuple(_build_document(row) for row in page), following)


def _split_text(document: DocumentIn) -> tuple[list[tuple[LineSpan, str]], int]:
    body = document.text
    split = split_located_passages(body, [(each.line_start, each.label) for each in document.locations])
    if len(split) > MAX_PASSAGES:
        raise OctoError(f"The text has more than {MAX_PASSAGES} passages.", code="body_too_large")
    return split, len(numbered_lines(body.removesuffix("\n"))) if body else 0


def _select_document(tenant: str, digest: str) -> Any:
    return select(documents).where(documents.c.tenant == tenant, documents.c.digest == digest)


def _index_text(tenant: str, text: str, split: Sequence[tuple[LineSpan, str]]) -> tuple[str, list[str]]:
    language = recognize_language(text)
    return language, [build_terms(tenant, language, passage.text) for passage, _ in split]


def _build_document(row: Mapping[Any, Any]) -> DocumentOut:
    return DocumentOut(
        row["name"],
        row["digest"],
        row["passages"],
        row["lines"],
        row["language"],
        row["media_type"],
        "ready" if row["embedded"] >= row["passages"] else "pending",
    )


def _document_not_found() -> OctoError:
    return OctoError("There is no document of that digest.", code="not_found")
