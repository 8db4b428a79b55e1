"""The SQL analyst: real databases, real queries, and what a query must not do."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest
import reading
from sql_analyst import arm

from octollm import OctoError
from octollm.testing import run_arm


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Return a database with one table."""
    path = tmp_path / "shop.sqlite3"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE orders (city TEXT, amount REAL)")
    database.executemany("INSERT INTO orders VALUES (?, ?)", [("Bonn", 10.5), ("Kiel", 4.0), ("Bonn", 2.0)])
    database.commit()
    database.close()
    return path


def ask(shop: Path, *queries: str):
    return run_arm(
        arm,
        "execute",
        {"goal": "What did each city order?"},
        model=[{"sql": query} for query in queries],
        files={"shop.sqlite3": shop.read_bytes()},
    )


def test_a_question_is_answered_with_a_table(shop: Path):
    query = "SELECT city, sum(amount) AS total FROM orders GROUP BY city ORDER BY total DESC"
    result, client = ask(shop, query)
    assert "| Bonn | 12.5 |\n| Kiel | 4.0 |" in result.output
    assert query in result.output
    [artifact] = result.artifacts
    assert client.files[artifact.digest].decode().splitlines() == ["city,total", "Bonn,12.5", "Kiel,4.0"]
    assert "CREATE TABLE orders" in client.model.prompts[0]
    assert client.progress[0] == (20.0, "read shop.sqlite3")


def test_a_query_that_fails_is_mended_once(shop: Path):
    result, client = ask(shop, "SELECT town FROM orders", "SELECT DISTINCT city FROM orders")
    assert "| Kiel |" in result.output
    assert "no such column: town" in client.model.prompts[1]
    with pytest.raises(OctoError, match="no such column") as caught:
        ask(shop, "SELECT town FROM orders", "SELECT village FROM orders", "SELECT city FROM orders")
    assert caught.value.code == "model_output_invalid"


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM orders",
        "DROP TABLE orders",
        "ATTACH DATABASE '/etc/passwd' AS other",
        "PRAGMA writable_schema = ON",
        "CREATE TEMP TABLE t AS SELECT 1",
        "SELECT load_extension('evil')",
        "SELECT 1; DELETE FROM orders",
        "SELECT zeroblob(2000000000)",
        "VACUUM INTO '/tmp/stolen'",
        "",
    ],
)
def test_a_query_only_reads(shop: Path, query: str):
    before = shop.read_bytes()
    with pytest.raises(OctoError) as caught:
        asyncio.run(reading.answer(shop, query, 5.0))
    assert caught.value.code == "model_output_invalid"
    assert shop.read_bytes() == before


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


def test_a_query_ends_with_its_time(shop: Path):
    begun = time.monotonic()
    with pytest.raises(OctoError, match="interrupted"):
        asyncio.run(reading.answer(shop, ENDLESS, 0.2))
    assert time.monotonic() - begun < 3


def test_a_query_ends_when_its_task_is_cancelled(shop: Path):
    async def cancel() -> None:
        asking = asyncio.create_task(reading.answer(shop, ENDLESS, 60.0))
        await asyncio.wait({asking}, timeout=0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    begun = time.monotonic()
    asyncio.run(cancel())
    assert time.monotonic() - begun < 3


def test_more_rows_than_the_bound_are_cut(shop: Path):
    query = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000) SELECT i FROM n"
    rows = asyncio.run(reading.answer(shop, query, 5.0))
    assert (len(rows.rows), rows.cut) == (reading.MAX_ROWS, True)


@pytest.mark.parametrize("files", [{}, {"a.db": b"x", "b.db": b"x"}, {"a.db": b"this is no database" * 100}])
def test_a_task_without_one_database_is_refused(files: dict[str, bytes]):
    with pytest.raises(OctoError) as caught:
        run_arm(arm, "execute", {"goal": "How many?"}, files=files)
    assert caught.value.code == "file_invalid"
