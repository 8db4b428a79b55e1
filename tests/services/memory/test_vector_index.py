"""The vectors of a large tenant are read in the background; searches go by words until they are there."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from databases import Backend
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert

from octollm.clock import SystemClock
from octollm.contracts.operations import SearchRequest, SearchResult
from octollm.services.memory.indexing import build_terms
from octollm.services.memory.search import PassageSearch
from octollm.services.memory.vectors import EmbeddedTexts, VectorIndex, _TenantVectors
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import documents, passages
from octollm.telemetry import get_logger
from octollm.testing import wait_until
from octollm.text.index_terms import TERMS_VERSION

LARGE, SMALL = "large", "small"
COUNT, MODEL, WIDTH = 60, "m", 4
LOG = get_logger("test")


def vector_of(number: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the vector of passage ``number``: the larger the number, the nearer to the first axis."""
    angle = np.pi / 2 * (1 - number / COUNT)
    return np.array([np.cos(angle), np.sin(angle), 0, 0], np.float32)


@pytest.fixture
async def db(backend: Backend) -> AsyncIterator[Database]:
    async with open_database(backend.url("octollm_memory"), clock=SystemClock()) as opened:
        await migrate(opened, "memory")
        for tenant, count in ((LARGE, COUNT), (SMALL, 3)):
            place = {"tenant": tenant, "digest": "d"}
            rows = [
                {**place, "position": n, "line_start": n + 1, "line_end": n + 1, "text": f"passage {n}",
                 "terms": build_terms(tenant, "en", f"passage {n}"), "terms_version": TERMS_VERSION,
                 "vector": vector_of(n).tobytes(), "vector_model": MODEL, "embedded_at": 1.0 + n}
                for n in range(count)
            ]  # fmt: skip
            async with opened.transaction() as tx:
                await tx.execute(
                    insert(documents).values(
                        **place, name="a.txt", passages=count, embedded=count, created_at=1.0, language="en"
                    )
                )
                await tx.execute(insert(passages), rows)
        yield opened


class FirstAxis:
    async def embed_query(self, _call: object, _query: str) -> EmbeddedTexts:
        return EmbeddedTexts(MODEL, (np.array([1, 0, 0, 0], np.float32),))


async def find(index: VectorIndex, db: Database, tenant: str, query: str = "passage 7") -> SearchResult:
    embedder: Any = FirstAxis()
    call: Any = SimpleNamespace(tenant=tenant)
    return await PassageSearch(db, index, embedder, LOG, lambda _model: None).search(call, SearchRequest(query, 5))


async def test_a_search_goes_by_words_until_the_vectors_are_read(db: Database) -> None:
    index = VectorIndex(db, LOG, max_awaited=10)
    early = await find(index, db, LARGE)
    assert (early.vectors, early.reason) == ("unused", "loading")
    assert early.passages[0].text == "passage 7"
    assert early.passages[0].matched == ("words",)
    async with index:

        async def is_hybrid() -> bool:
            return (await find(index, db, LARGE)).vectors == "used"

        await wait_until(is_hybrid, description="the vectors are read")
        found = await find(index, db, LARGE)
    assert {passage.text for passage in found.passages if "vectors" in passage.matched} >= {f"passage {COUNT - 1}"}


async def test_the_vectors_of_a_small_tenant_are_read_by_its_first_search(db: Database) -> None:
    found = await find(VectorIndex(db, LOG, max_awaited=10), db, SMALL)
    assert (found.vectors, found.reason) == ("used", "")


async def test_the_vectors_of_the_largest_tenants_are_read_at_the_start(db: Database) -> None:
    vector = np.array([1, 0, 0, 0], np.float32)
    async with VectorIndex(db, LOG, max_awaited=10) as index:
        # A search that expects none waits for nothing: it finds what was read at the start, and asks for nothing.
        await wait_until(lambda: index.has(LARGE, MODEL), description="the vectors are read")
        assert not index.has(SMALL, MODEL)
        found = await index.search(LARGE, MODEL, vector, 3, None, expected=COUNT)
    assert len(found.ids) == 3


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=9), max_size=9), st.sets(st.integers(0, 40)))
def test_each_passage_has_its_own_vector(batches: list[list[int]], gone: set[int]) -> None:
    vectors = _TenantVectors()
    for batch in batches:
        ids = list(dict.fromkeys(batch))
        vectors.add(ids, [np.full(WIDTH, each, np.float32).tobytes() for each in ids])
    vectors.remove(sorted(gone))
    kept = {each for batch in batches for each in batch} - gone
    assert sorted(vectors.ids.tolist()) == sorted(kept)
    assert all((row == each).all() for each, row in zip(vectors.ids, vectors.matrix, strict=True))
    vectors.add([99], [np.full(WIDTH, 99, np.float32).tobytes()])
    assert vectors.ids[-1] == 99
