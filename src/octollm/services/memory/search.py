"""Hybrid search over passages: full text by BM25, and vectors, fused by rank.

Full text alone answers while there are no vectors, and the answer says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import (
    ColumnElement,
    Double,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal,
    literal_column,
    select,
    text,
    union_all,
)
from sqlalchemy.dialects.postgresql import TSQUERY

from octollm.contracts.operations import Passage, SearchFilters, SearchRequest, SearchResult
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall
from octollm.services.memory.indexing import tenant_prefix
from octollm.services.memory.vectors import EmbeddedTexts, Embedder, Ids, VectorIndex
from octollm.storage import Database, DatabaseConnection
from octollm.storage.tables import document_sources, documents, passage_terms, passage_vocabulary, passages
from octollm.telemetry import Logger
from octollm.text.index_terms import (
    STEMMED_LANGUAGES,
    QueryTerm,
    fuse_rankings,
    inverse_document_frequency,
    match_bm25,
    query_terms,
    word_weight,
)

MAX_TERMS = 32
"""Terms of a query that are looked for, the rarest of them; the others add little and cost time."""
MAX_MATCHES = 5_000
"""Passages that the terms may match together; only the rarest term may match more."""
MAX_CANDIDATES = 100
"""Passages by words, and by vectors, whose ranks are fused; where more match, the index's own order decides."""
_SPARE = 10
_MAX_LANGUAGES = 100
_SHOWN = ("id", "digest", "line_start", "line_end", "text", "location")
MAX_ALLOWED = 1_000_000
"""Passages that a filter may leave for the vector search."""
_DECIMALS = 6


@dataclass(frozen=True, slots=True)
class _Selection:
    """The passages that a search may find: those of a tenant that fit its filters."""

    conditions: tuple[ColumnElement[bool], ...]
    is_filtered: bool


def _select_passages(tenant: str, filters: SearchFilters) -> _Selection:
    wanted: list[ColumnElement[bool]] = []
    if filters.digests:
        wanted.append(documents.c.digest.in_(filters.digests))
    if filters.tasks:
        came = select(document_sources.c.digest).where(
            document_sources.c.tenant == tenant, document_sources.c.task_id.in_(filters.tasks)
        )
        wanted.append(documents.c.digest.in_(came))
    if filters.sources:
        wanted.append(documents.c.name.in_(filters.sources))
    if filters.media_types:
        wanted.append(documents.c.media_type.in_(filters.media_types))
    if filters.languages:
        wanted.append(documents.c.language.in_(filters.languages))
    return _Selection((documents.c.tenant == tenant, passages.c.tenant == tenant, *wanted), bool(wanted))


_WITH_DOCUMENTS = passages.join(
    documents, and_(documents.c.tenant == passages.c.tenant, documents.c.digest == passages.c.digest)
)


@dataclass(frozen=True, slots=True)
class _Extent:
    """How much a tenant has: passages, those with a vector, and the languages of its documents."""

    passages: int
    embedded: int
    languages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _VectorRanking:
    """The passages by similarity, and why there are none (a code), or not all."""

    ids: tuple[int, ...] = ()
    model: str = ""
    reason: str = ""


class PassageSearch:
    """Search over the passages of a tenant."""

    def __init__(
        self, db: Database, index: VectorIndex, embedder: Embedder, log: Logger, on_model: Callable[[str], None]
    ) -> None:
        """``on_model`` is called with the model that embedded a query."""
        self._db = db
        self._on_model = on_model
        self._index = index
        self._embedder = embedder
        self._log = log

    async def search(self, call: IncomingCall, request: SearchRequest) -> SearchResult:
        """Return the passages that match best, best first."""
        selection = _select_passages(call.tenant, request.filters)
        extent = await self._measure(call.tenant)
        by_words, by_vectors = await asyncio.gather(
            self._rank_by_words(call.tenant, request, selection, extent),
            self._rank_by_vectors(call, request, selection, extent),
        )
        scores = fuse_rankings(by_words, [(each, 1.0) for each in by_vectors.ids])
        best = sorted(scores, key=lambda each: (-scores[each], each))
        # Some more than are asked for: the index of vectors may name passages that are gone by now.
        wanted = best[: 2 * request.limit + _SPARE]
        found = await self._read(selection, wanted)
        self._index.forget(call.tenant, by_vectors.model, [each for each in wanted if each not in found])
        words, similar = {each for each, _ in by_words}, set(by_vectors.ids)
        ranked = [
            _build_passage(found[each], scores[each], is_worded=each in words, is_similar=each in similar)
            for each in best
            if each in found
        ]
        vectors = "unused" if not by_vectors.model else "partial" if by_vectors.reason else "used"
        return SearchResult(tuple(ranked[: request.limit]), vectors, by_vectors.reason)

    async def _read(self, selection: _Selection, ids: Sequence[int]) -> dict[int, Mapping[Any, Any]]:
        query = (
            select(documents.c.name, *(passages.c[name] for name in _SHOWN))
            .select_from(_WITH_DOCUMENTS)
            .where(passages.c.id.in_(ids), *selection.conditions)
            .limit(len(ids))
        )
        async with self._db.read() as conn:
            rows: Sequence[Mapping[Any, Any]] = await conn.all(query) if ids else []
        return {row["id"]: row for row in rows}

    async def _measure(self, tenant: str) -> _Extent:
        columns = documents.c
        query = (
            select(columns.language, func.sum(columns.passages).label("all"), func.sum(columns.embedded).label("done"))
            .where(columns.tenant == tenant)
            .group_by(columns.language)
            .limit(_MAX_LANGUAGES)
        )
        async with self._db.read() as conn:
            rows = await conn.all(query)
        languages = tuple(sorted(STEMMED_LANGUAGES.intersection(row["language"] for row in rows)))
        return _Extent(sum(int(row["all"]) for row in rows), sum(int(row["done"]) for row in rows), languages)

    async def _rank_by_vectors(
        self, call: IncomingCall, request: SearchRequest, selection: _Selection, extent: _Extent
    ) -> _VectorRanking:
        if not extent.embedded:
            return _VectorRanking(reason="pending" if extent.passages else "")
        pending = extent.embedded < extent.passages
        if not request.query.strip():
            return _VectorRanking()
        try:
            embedded: EmbeddedTexts = await self._embedder.embed_query(call, request.query)
        except OctoError as error:
            # Words are enough for an answer. What is missing is in it, and in the log.
            self._log.warning("search.without_vectors", error=error)
            return _VectorRanking(reason=error.code)
        self._on_model(embedded.model)
        allowed = await self._read_allowed(selection) if selection.is_filtered else None
        (vector,) = embedded.vectors
        found = await self._index.search(
            call.tenant, embedded.model, vector, MAX_CANDIDATES, allowed, expected=extent.embedded
        )
        if found.reason == "loading":
            return _VectorRanking(reason=found.reason)
        return _VectorRanking(found.ids, embedded.model, "pending" if pending else found.reason)

    async def _read_allowed(self, selection: _Selection) -> Ids:
        query = select(passages.c.id).select_from(_WITH_DOCUMENTS).where(*selection.conditions).limit(MAX_ALLOWED)
        async with self._db.read() as conn:
            rows = (await conn.execute(query)).scalars().all()
        return np.asarray(rows, np.int64)

    async def _rank_by_words(
        self, tenant: str, request: SearchRequest, selection: _Selection, extent: _Extent
    ) -> list[tuple[int, float]]:
        """Return the ids of passages by BM25, best first, each with the weight of its rank."""
        prefix = tenant_prefix(tenant)
        terms = query_terms(request.query, extent.languages)
        if not terms:
            return []
        async with self._db.read() as conn:
            counts = await _count_terms(conn, tenant, prefix, terms)
            chosen = choose_terms(terms, [counts[term] for term in terms])
            if not chosen:
                return []
            weight_of = {term: inverse_document_frequency(counts[term], extent.passages) for term in terms}
            weights = [weight_of[term] for term in chosen]
            build = _build_postgres_query if conn.dialect == "postgresql" else _build_sqlite_query
            rows = await conn.all(build(prefix, chosen, weights, selection))
        width = len(prefix)
        cut = [[term[width:] for term in row["terms"].split(" ")] for row in rows]
        matches = await asyncio.to_thread(match_bm25, chosen, weights, cut)
        order = sorted(range(len(rows)), key=lambda index: (-matches[index].score, rows[index]["id"]))
        whole = sum(weight_of.values())
        return [
            (rows[index]["id"], word_weight(matches[index].matched_weight / whole))
            for index in order
            if matches[index].score > 0
        ]


def choose_terms(terms: Sequence[QueryTerm], counts: Sequence[int]) -> list[QueryTerm]:
    """Return the terms to look for: the rarest that there are, as long as they match few enough passages together."""
    chosen: list[QueryTerm] = []
    matches = 0
    by_rarity = sorted(range(len(terms)), key=lambda index: counts[index])
    for term, count in ((terms[index], counts[index]) for index in by_rarity if counts[index]):
        matches += count
        if chosen and (matches > MAX_MATCHES or len(chosen) >= MAX_TERMS):
            break
        chosen.append(term)
    return chosen


async def _count_terms(
    conn: DatabaseConnection, tenant: str, prefix: str, terms: Sequence[QueryTerm]
) -> dict[QueryTerm, int]:
    """Return how many passages have each term, at most about :data:`MAX_MATCHES` on PostgreSQL."""
    if conn.dialect == "postgresql":
        counts = [
            select(
                literal(index).label("index"),
                select(func.count())
                .select_from(
                    select(literal(1))
                    .select_from(passages)
                    .where(passages.c.tenant == tenant, _matches(build_tsquery(prefix, [term])))
                    .limit(MAX_MATCHES)
                    .subquery()
                )
                .scalar_subquery()
                .label("doc"),
            )
            for index, term in enumerate(terms)
        ]
        found = {row["index"]: int(row["doc"]) for row in await conn.all(union_all(*counts))}
        return {term: found.get(index, 0) for index, term in enumerate(terms)}
    words = {prefix + form for term in terms for form in (*term.forms, *term.parts) if not term.is_prefix}
    columns = passage_vocabulary.c
    rows = await conn.all(select(columns.term, columns.doc).where(columns.term.in_(words)))
    known = {row["term"]: int(row["doc"]) for row in rows}
    result: dict[QueryTerm, int] = {}
    for term in terms:
        if term.is_prefix:
            first = prefix + term.forms[0]
            within = select(func.sum(columns.doc)).where(columns.term >= first, columns.term < first + "\U0010ffff")
            result[term] = int(await conn.scalar(within) or 0)
        else:
            whole = max(known.get(prefix + form, 0) for form in term.forms)
            result[term] = whole + min((known.get(prefix + part, 0) for part in term.parts), default=0)
    return result


def build_fts5_expression(prefix: str, terms: Sequence[QueryTerm]) -> str:
    """Return an FTS5 expression that matches any of ``terms``, of which there is at least one.

    Each is a quoted string, so nothing that a person types is an operator or a syntax error.
    """
    alternatives: list[str] = []
    for term in terms:
        alternatives += (f'"{prefix}{form}"' + ("*" if term.is_prefix else "") for form in term.forms)
        if term.parts:
            alternatives.append("(" + " AND ".join(f'"{prefix}{part}"' for part in term.parts) + ")")
    return " OR ".join(alternatives)


def build_tsquery(prefix: str, terms: Sequence[QueryTerm]) -> str:
    """Return a tsquery of PostgreSQL in its text form that matches any of ``terms``, quoted like the above."""
    alternatives: list[str] = []
    for term in terms:
        alternatives += (f"'{prefix}{form}'" + (":*" if term.is_prefix else "") for form in term.forms)
        if term.parts:
            alternatives.append("(" + " & ".join(f"'{prefix}{part}'" for part in term.parts) + ")")
    return " | ".join(alternatives)


def _build_sqlite_query(
    prefix: str, terms: Sequence[QueryTerm], weights: Sequence[float], selection: _Selection
) -> Any:
    del weights  # https://www.sqlite.org/fts5.html#sorting_by_auxiliary_function_results: the index has its own.
    found = text("passage_terms MATCH :match").bindparams(match=build_fts5_expression(prefix, terms))
    conditions: list[Any] = [found]
    if selection.is_filtered:
        allowed = select(passages.c.id).select_from(_WITH_DOCUMENTS).where(*selection.conditions)
        conditions.append(passage_terms.c.rowid.in_(allowed))
    best = (
        select(passage_terms.c.rowid.label("id")).where(*conditions).order_by(text("rank")).limit(MAX_CANDIDATES)
    ).subquery()
    return (
        select(passages.c.id, passages.c.terms)
        .select_from(_WITH_DOCUMENTS.join(best, best.c.id == passages.c.id))
        .where(*selection.conditions)
        .limit(MAX_CANDIDATES)
    )


def _matches(tsquery: str) -> ColumnElement[bool]:
    vector: ColumnElement[Any] = literal_column("passages.term_vector")
    return vector.op("@@")(cast(bindparam(None, tsquery, Text(), unique=True), TSQUERY()))


_DOUBLE: Double[float] = Double()


def _build_postgres_query(
    prefix: str, terms: Sequence[QueryTerm], weights: Sequence[float], selection: _Selection
) -> Any:
    # ts_rank knows no inverse document frequency: the sum of the weights of the terms that match does.
    score: ColumnElement[float] = literal(0.0, _DOUBLE)
    for term, weight in zip(terms, weights, strict=True):
        matches = _matches(build_tsquery(prefix, [term]))
        score = score + case((matches, literal(weight, _DOUBLE)), else_=literal(0.0, _DOUBLE))
    return (
        select(passages.c.id, passages.c.terms)
        .select_from(_WITH_DOCUMENTS)
        .where(_matches(build_tsquery(prefix, terms)), *selection.conditions)
        .order_by(score.desc(), passages.c.id)
        .limit(MAX_CANDIDATES)
    )


def _build_passage(row: Mapping[Any, Any], score: float, *, is_worded: bool, is_similar: bool) -> Passage:
    return Passage(
        row["name"],
        row["digest"],
        row["line_start"],
        row["line_end"],
        row["text"],
        round(score, _DECIMALS),
        row["location"],
        (*(("words",) if is_worded else ()), *(("vectors",) if is_similar else ())),
    )
