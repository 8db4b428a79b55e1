"""Documents of a tenant, stored as passages, and full-text search over them.

SQLite FTS5 or PostgreSQL tsquery finds the candidates; BM25 orders them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Double, and_, bindparam, delete, func, insert, literal_column, or_, select, text

from octollm.clock import Clock
from octollm.contracts.api import decode_cursor, encode_cursor
from octollm.contracts.operations import DocumentIn, DocumentList, DocumentOut, Passage, SearchRequest, SearchResult
from octollm.errors import OctoError
from octollm.storage import Database
from octollm.storage.tables import documents, passages, passages_fts
from octollm.text.lexical import bm25, content_words, tokenize
from octollm.text.passages import LineSpan, numbered_lines, split_located_passages

MAX_TERMS = 32
"""Terms of a query; those after them add little and cost time."""


def extract_search_terms(query: str) -> list[str]:
    """Return the words to look for: those that say nothing are left out unless there are no others."""
    return (content_words(query) or list(dict.fromkeys(tokenize(query))))[:MAX_TERMS]


def build_fts5_expression(terms: Sequence[str]) -> str:
    """Return an FTS5 expression that matches any of ``terms``, of which there is at least one.

    Each is a quoted string, so nothing that a person types is an operator or a syntax error. Inflections are the
    index's business: it stems.
    """
    return " OR ".join('"' + term.replace('"', '""') + '"' for term in terms)


MAX_CANDIDATES = 200
"""Passages that are weighed; where more match, the index's own order decides."""
_NORMALIZE_BY_LENGTH = 1
"""Divide a rank by 1 + the logarithm of the passage's length."""


def build_match_query(dialect: str, terms: Sequence[str], filters: Sequence[ColumnElement[bool]]) -> Any:
    """Return the query for the best candidates among the passages ``filters``, with a ``score``: higher is better."""
    return _build_postgres_query(terms, filters) if dialect == "postgresql" else _build_sqlite_query(terms, filters)


def _build_sqlite_query(terms: Sequence[str], filters: Sequence[ColumnElement[bool]]) -> Any:
    # https://www.sqlite.org/fts5.html#the_bm25_function: the lower the better.
    rank: ColumnElement[float] = literal_column("bm25(passages_fts)", Double[float]())
    joined = passages_fts.join(passages, passages.c.id == passages_fts.c.rowid)
    found = text("passages_fts MATCH :match").bindparams(match=build_fts5_expression(terms))
    return _select_best(joined, -rank, [found, *filters])


def _build_postgres_query(terms: Sequence[str], filters: Sequence[ColumnElement[bool]]) -> Any:
    # Each term goes through the index's own parser alone, so nothing that a person types is an operator.
    # https://www.postgresql.org/docs/current/textsearch-controls.html
    phrases: list[ColumnElement[Any]] = [
        func.phraseto_tsquery(text("'octollm'"), func.octollm_plain(bindparam(None, term, unique=True)))
        for term in terms
    ]
    query = reduce(lambda one, other: one.op("||")(other), phrases)
    words: ColumnElement[Any] = literal_column("passages.words")
    return _select_best(passages, func.ts_rank(words, query, _NORMALIZE_BY_LENGTH), [words.op("@@")(query), *filters])


def _select_best(source: Any, score: ColumnElement[float], conditions: Sequence[Any]) -> Any:
    return (
        select(documents.c.name, passages, score.label("score"))
        .select_from(
            source.join(
                documents, and_(documents.c.tenant == passages.c.tenant, documents.c.digest == passages.c.digest)
            )
        )
        .where(*conditions)
        .order_by(score.desc(), passages.c.id)
        .limit(MAX_CANDIDATES)
    )


MAX_PASSAGES = 60_000
"""Passages of one document."""
_INSERT_BATCH = 500
_DECIMALS = 4


class DocumentStore:
    """The documents of all tenants; every question names the tenant that it is asked for."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def put(self, tenant: str, document: DocumentIn) -> tuple[DocumentOut, bool]:
        """Remember a document under its digest; return it, and whether it is new.

        What was remembered under that digest before is replaced, unless it is the same. Raises ``body_too_large``
        for a text of too many passages.
        """
        # Before the transaction, which is to be short, and in a thread: a long text would hold up the event loop.
        split, lines = await asyncio.to_thread(_split_text, document)
        out = DocumentOut(document.name, document.digest, len(split), lines)
        # Found without the lock, the common repeat writes nothing.
        if await self._is_unchanged(tenant, out, split):
            return out, False
        async with self._db.transaction() as tx:
            # Its row is locked from here on, whether it was there or not; its passages follow it.
            created = await tx.first(_select_document(tenant, out.digest).with_for_update()) is None
            values = {
                "name": out.name,
                "lines": out.lines,
                "passages": out.passages,
                "created_at": self._clock.now(),
            }
            await tx.execute(
                tx.insert(documents)
                .values(tenant=tenant, digest=out.digest, **values)
                .on_conflict_do_update(index_elements=[documents.c.tenant, documents.c.digest], set_=values)
            )
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
                    }
                    for index, (passage, location) in enumerate(split[start : start + _INSERT_BATCH])
                ]
                await tx.execute(insert(passages), rows)
        return out, created

    async def _is_unchanged(self, tenant: str, out: DocumentOut, split: Sequence[tuple[LineSpan, str]]) -> bool:
        async with self._db.read() as conn:
            row = await conn.first(_select_document(tenant, out.digest))
            if row is None or _build_document(row) != out:
                return False
            query = (
                select(passages.c.line_start, passages.c.line_end, passages.c.text, passages.c.location)
                .where(passages.c.tenant == tenant, passages.c.digest == out.digest)
                .order_by(passages.c.position)
                .limit(MAX_PASSAGES)
            )
            kept = await conn.all(query)
        return [(p.line_start, p.line_end, p.text, location) for p, location in split] == [
            (row["line_start"], row["line_end"], row["text"], row["location"]) for row in kept
        ]

    async def get(self, tenant: str, digest: str) -> DocumentOut:
        """Return a document; raise ``not_found``."""
        async with self._db.read() as conn:
            row = await conn.first(_select_document(tenant, digest))
        if row is None:
            raise _document_not_found()
        return _build_document(row)

    async def delete(self, tenant: str, digest: str) -> None:
        """Forget a document; raise ``not_found``."""
        async with self._db.transaction() as tx:
            # Its passages go with it, and out of the index.
            where = (documents.c.tenant == tenant, documents.c.digest == digest)
            if (await tx.execute(delete(documents).where(*where))).rowcount == 0:
                raise _document_not_found()

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

    async def search(self, tenant: str, request: SearchRequest) -> SearchResult:
        """Return the passages that match best by BM25, best first; none for a query without words."""
        terms = extract_search_terms(request.query)
        if not terms:
            return SearchResult(())
        mine = [passages.c.tenant == tenant]
        if request.filters.digests:
            mine.append(passages.c.digest.in_(request.filters.digests))
        async with self._db.read() as conn:
            rows = await conn.all(build_match_query(conn.dialect, terms, mine))
            total = await conn.scalar(select(func.count()).select_from(passages).where(*mine))
        found = [_build_passage(row) for row in rows]
        if len(found) < MAX_CANDIDATES:
            # These are all that match, so that they can be weighed among their own.
            scores = await asyncio.to_thread(bm25, terms, [passage.text for passage in found], total=int(total))
            found = [
                msgspec.structs.replace(passage, score=round(score, _DECIMALS))
                for passage, score in zip(found, scores, strict=True)
            ]
            found.sort(key=lambda passage: -passage.score)
        return SearchResult(tuple(found[: request.limit]))


def _split_text(document: DocumentIn) -> tuple[list[tuple[LineSpan, str]], int]:
    body = document.text
    split = split_located_passages(body, [(each.line_start, each.label) for each in document.locations])
    if len(split) > MAX_PASSAGES:
        raise OctoError(f"The text has more than {MAX_PASSAGES} passages.", code="body_too_large")
    return split, len(numbered_lines(body.removesuffix("\n"))) if body else 0


def _select_document(tenant: str, digest: str) -> Any:
    return select(documents).where(documents.c.tenant == tenant, documents.c.digest == digest)


def _build_document(row: Mapping[Any, Any]) -> DocumentOut:
    return DocumentOut(row["name"], row["digest"], row["passages"], row["lines"])


def _build_passage(row: Mapping[Any, Any]) -> Passage:
    score = round(float(row["score"]), _DECIMALS)
    return Passage(row["name"], row["digest"], row["line_start"], row["line_end"], row["text"], score, row["location"])


def _document_not_found() -> OctoError:
    return OctoError("There is no document of that digest.", code="not_found")
