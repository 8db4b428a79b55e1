"""Programs and direct reads, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from databases import Backend

from octollm.clock import SystemClock
from octollm.errors import OctoError
from octollm.storage import Database, open_database
from octollm.storage.programs import Program, SqlStatement, insert_statement, update_statement

INSERT = insert_statement("things", ("name", "size"))


@pytest.fixture
async def db(backend: Backend) -> AsyncIterator[Database]:
    async with open_database(backend.url("public"), clock=SystemClock()) as opened:
        async with opened.transaction() as tx:
            await tx.raw.exec_driver_sql("CREATE TABLE things (name VARCHAR(64) PRIMARY KEY, size BIGINT)")
        yield opened


def add(*rows: tuple[str, int]) -> Program[int]:
    yield SqlStatement(INSERT, rows, many=True)
    (row,) = yield SqlStatement("SELECT count(*) AS number FROM things")
    return int(row["number"])


async def sizes(db: Database) -> dict[str, int]:
    return {row["name"]: row["size"] for row in await db.fetch("SELECT name, size FROM things ORDER BY name")}


async def test_a_program_is_one_transaction(db: Database) -> None:
    assert await db.run(add(("a", 1), ("b", 2))) == 2

    def fails() -> Program[None]:
        yield SqlStatement(update_statement("things", ("size",), ("name",)), (7, "a"))
        raise OctoError("no", code="state_conflict")

    with pytest.raises(OctoError, match="no"):
        await db.run(fails())
    assert await sizes(db) == {"a": 1, "b": 2}
    await db.run(add(("c", 3)))
    assert await sizes(db) == {"a": 1, "b": 2, "c": 3}


async def test_a_constraint_is_translated_and_rolls_back(db: Database) -> None:
    await db.run(add(("a", 1)))
    with pytest.raises(OctoError) as caught:
        await db.run(add(("b", 1), ("a", 2)))
    assert caught.value.code == "state_conflict"
    assert await sizes(db) == {"a": 1}


async def test_programs_and_transactions_take_turns(db: Database) -> None:
    async def transact(name: str) -> None:
        async with db.transaction() as tx:
            await tx.raw.exec_driver_sql(f"INSERT INTO things (name, size) VALUES ('{name}', 0)")

    await asyncio.gather(
        *(db.run(add((f"program-{n}", n))) for n in range(20)), *(transact(f"engine-{n}") for n in range(20))
    )
    assert len(await sizes(db)) == 40


async def test_a_cancelled_program_leaves_a_database_that_works(db: Database) -> None:
    running = asyncio.create_task(db.run(add(("a", 1))))
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert await db.run(add(("b", 2))) in (1, 2)
