"""The passages that have any word of a query, by the full-text index of the database in use.

Both indexes fold case, accents and English inflections, part words at punctuation, and have no stop words. A term
that holds punctuation (``02:00``) is a phrase of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from sqlalchemy import ColumnElement, Double, and_, bindparam, func, literal_column, select, text

from octollm.services.memory.query import build_fts5_expression
from octollm.storage.tables import documents, passages, passages_fts

MAX_CANDIDATES = 200
"""Passages that are weighed; where more match, the index's own order decides."""
_NORMALIZE_BY_LENGTH = 1
"""Divide a rank by 1 + the logarithm of the passage's length."""


def build_match_query(dialect: str, terms: Sequence[str], filters: Sequence[ColumnElement[bool]]) -> Any:
    """Return the query for the best candidates among the passages ``mine``, with a ``score``: higher is better."""
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
