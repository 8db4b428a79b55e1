"""A memory filled for a benchmark: the facts of nine languages, and passages around them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from multilingual import LANGUAGES, Fact, facts
from sqlalchemy import insert

from octollm.clock import SystemClock
from octollm.llm.catalogue import EMBEDDED_EMBEDDING_MODEL
from octollm.llm.embeddings import EmbeddedEmbeddingModel
from octollm.services.memory.indexing import build_terms
from octollm.services.memory.search import PassageSearch
from octollm.services.memory.vectors import EmbeddedTexts, VectorIndex
from octollm.storage import Database
from octollm.storage.migrations import migrate
from octollm.storage.tables import documents, passages
from octollm.telemetry import get_logger
from octollm.text.index_terms import TERMS_VERSION

TENANT = "default"
CALL: Any = SimpleNamespace(tenant=TENANT)
FACTS: tuple[Fact, ...] = tuple(fact for language in LANGUAGES for fact in facts(language))
PASSAGES_OF_ONE = 100
_BATCH = 1000


@dataclass(frozen=True)
class Vectors:
    """Vectors of the facts' passages and questions."""

    passages: np.ndarray[Any, np.dtype[np.float32]]
    questions: np.ndarray[Any, np.dtype[np.float32]]


async def embed_facts() -> Vectors:
    """Embed passages and questions with the embedded model."""
    model = EmbeddedEmbeddingModel()
    try:
        found = await model.embed([fact.passage for fact in FACTS], "passage")
        asked = await model.embed([fact.question for fact in FACTS], "query")
    finally:
        await model.aclose()
    return Vectors(*(np.array([np.frombuffer(v, "<f4") for v in each.vectors]) for each in (found, asked)))


class KnownEmbedder:
    """Knows the vectors of the questions: what is measured is the search beside the embedding."""

    def __init__(self, vectors: Vectors | None) -> None:
        self._known = {} if vectors is None else {f.question: v for f, v in zip(FACTS, vectors.questions, strict=True)}

    async def embed_query(self, _call: object, query: str) -> EmbeddedTexts:
        return EmbeddedTexts(EMBEDDED_EMBEDDING_MODEL, (self._known[query],))


@contextlib.asynccontextmanager
async def open_search(db: Database, vectors: Vectors) -> AsyncGenerator[PassageSearch]:
    """Yield the memory's own search, with known vectors."""
    embedder: Any = KnownEmbedder(vectors)
    log = get_logger("bench")
    async with VectorIndex(db, log) as index:
        yield PassageSearch(db, index, embedder, log, lambda _model: None)


def other_passages(count: int) -> Iterator[tuple[str, str]]:
    """Yield language and text of passages about other things, made of the facts' sentences with other names."""
    rng = random.Random(20261129)
    by_language = {language: [f.passage for f in facts(language, 1)] for language in LANGUAGES}
    for number in range(count):
        language = LANGUAGES[number % len(LANGUAGES)]
        sentences = rng.sample(by_language[language], 4)
        words = [word for sentence in sentences for word in sentence.split(" ")]
        rng.shuffle(words)
        yield language, f"{number} " + " ".join(words)


async def fill(db: Database, vectors: Vectors, count: int) -> None:
    """Write the facts and as many other passages as make ``count``; each has a vector."""
    await migrate(db, "memory")
    rng = np.random.default_rng(20261129)
    texts: list[tuple[str, str]] = [(fact.language, fact.passage) for fact in FACTS]
    texts += other_passages(count - len(texts))
    now = SystemClock().now() - 3600  # not so young that it would be read again
    for start in range(0, len(texts), _BATCH):
        chunk = texts[start : start + _BATCH]
        rows = [
            _row(start + n, language, text, _vector(start + n, vectors, rng), now)
            for n, (language, text) in enumerate(chunk)
        ]
        names = sorted({str(row["digest"]) for row in rows})
        async with db.transaction() as tx:
            for name in names:
                values = {"passages": PASSAGES_OF_ONE, "embedded": PASSAGES_OF_ONE, "created_at": now, "language": "en"}
                statement = tx.insert(documents).values(tenant=TENANT, digest=name, name=name, **values)
                await tx.execute(statement.on_conflict_do_nothing())
            await tx.execute(insert(passages), rows)


def _vector(number: int, vectors: Vectors, rng: np.random.Generator) -> bytes:
    if number < len(FACTS):
        return vectors.passages[number].astype("<f4").tobytes()
    # Near a real one, as other texts are; not so near that it would be found in its place.
    near = vectors.passages[number % len(FACTS)] + rng.normal(0, 0.06, vectors.passages.shape[1]).astype(np.float32)
    return (near / np.linalg.norm(near)).astype("<f4").tobytes()


def _row(number: int, language: str, text: str, vector: bytes, now: float) -> dict[str, object]:
    return {
        "tenant": TENANT,
        "digest": f"document-{number // PASSAGES_OF_ONE}",
        "position": number % PASSAGES_OF_ONE,
        "line_start": 1,
        "line_end": 1,
        "text": text,
        "terms": build_terms(TENANT, language, text),
        "terms_version": TERMS_VERSION,
        "vector": vector,
        "vector_model": EMBEDDED_EMBEDDING_MODEL,
        "embedded_at": now,
    }


def recall(found: Sequence[Sequence[str]], language: str) -> float:
    """Return the share of questions in ``language`` whose passage is among the texts ``found`` for it."""
    hits = [fact.passage in texts for fact, texts in zip(FACTS, found, strict=True) if fact.language == language]
    return sum(hits) / len(hits)
