"""Passages that a replica of an earlier version wrote get their terms and their language."""

from collections.abc import Sequence
from typing import Any

import pytest
from databases import Backend
from sqlalchemy import insert, select

from octollm.clock import SystemClock
from octollm.errors import OctoError
from octollm.services.memory.indexing import PassageIndexer, build_terms
from octollm.storage import open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import documents, passages
from octollm.text.index_terms import TERMS_VERSION

TEXTS = ("Der Vertrag kann mit drei Monaten Frist gekündigt werden.", "契約は三か月前に解約できます。")


class NoEmbeddings:
    async def embed_passages(self, texts: Sequence[str]) -> Any:
        raise OctoError("Embeddings are turned off.", code="not_configured")


async def test_passages_without_terms_are_indexed(backend: Backend) -> None:
    clock = SystemClock()
    async with open_database(backend.url("octollm_memory"), clock=clock) as db:
        await migrate(db, "memory")
        async with db.transaction() as tx:
            for n, text in enumerate(TEXTS):
                place = {"tenant": "default", "digest": f"d{n}"}
                await tx.execute(insert(documents).values(**place, name="old.txt", passages=1, created_at=1.0))
                await tx.execute(insert(passages).values(**place, position=0, line_start=1, line_end=1, text=text))
        indexer = PassageIndexer(db, NoEmbeddings(), clock)  # pyright: ignore[reportArgumentType]
        with pytest.raises(OctoError, match="turned off"):
            await indexer.work()
        async with db.read() as conn:
            rows = await conn.all(select(passages).order_by(passages.c.digest))
            languages = [row["language"] for row in await conn.all(select(documents).order_by(documents.c.digest))]
    assert languages == ["de", "ja"]
    assert [row["terms"] for row in rows] == [
        build_terms("default", language, text) for language, text in zip(languages, TEXTS, strict=True)
    ]
    # Whoever works next finds them free: the claim was given back.
    assert [(row["terms_version"], row["embedded_at"]) for row in rows] == [(TERMS_VERSION, 0.0)] * 2
