"""Single statements past the engine, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from databases import Backend

from octollm.clock import SystemClock
from octollm.errors import OctoError
from octollm.storage import DirectPool, open_database
from octollm.storage.database import DIRECT_CONNECTIONS

pytestmark = pytest.mark.postgres


@pytest.fixture
async def direct(postgres: Backend) -> AsyncIterator[DirectPool]:
    async with open_database(postgres.url("octollm_orchestrator"), clock=SystemClock()) as db:
        assert db.direct_pool is not None
        yield db.direct_pool


async def pid(direct: DirectPool) -> object:
    return (await direct.fetch("SELECT pg_backend_pid()"))[0][0]


async def test_connections_are_used_again_and_bounded(direct: DirectPool) -> None:
    assert await pid(direct) == await pid(direct)
    many = "SELECT pg_backend_pid(), pg_sleep(0.05)"
    found = await asyncio.gather(*(direct.fetch(many) for _ in range(3 * DIRECT_CONNECTIONS)))
    assert len({rows[0][0] for rows in found}) <= DIRECT_CONNECTIONS


async def test_errors_are_ours_and_the_connection_stays(direct: DirectPool) -> None:
    before = await pid(direct)
    with pytest.raises(OctoError) as caught:
        await direct.fetch("SELECT $1::text", "\x00")
    assert caught.value.code == "invalid_body"
    assert await pid(direct) == before


async def test_who_leaves_in_the_middle_takes_the_connection_along(direct: DirectPool) -> None:
    before = await pid(direct)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await direct.fetch("SELECT pg_sleep(30)")
    assert await pid(direct) != before


async def test_a_connection_that_was_cut_is_replaced(direct: DirectPool) -> None:
    with pytest.raises(OctoError) as caught:
        await direct.fetch("SELECT pg_terminate_backend(pg_backend_pid())")
    assert caught.value.code == "unavailable"
    assert await pid(direct)


async def test_a_table_without_statistics_is_read_by_its_key(direct: DirectPool) -> None:
    plan = await direct.fetch(
        "EXPLAIN UPDATE idempotency AS mine SET status = 200 FROM unnest($1::text[]) AS of(key) WHERE"
        " mine.tenant = 't' AND mine.subject = 's' AND mine.service = 'v' AND mine.operation = 'o'"
        " AND mine.key = of.key",
        [str(number) for number in range(16)],
    )
    text = "\n".join(str(row[0]) for row in plan)
    assert "Index Scan" in text
    assert "Seq Scan" not in text
