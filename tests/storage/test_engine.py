from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, select, text

from octollm.clock import SystemClock
from octollm.errors import OctoError, SettingError
from octollm.storage import Database, Transaction, open_database
from octollm.storage.engines import POSTGRES_WRITERS

ROWS = Table("rows", MetaData(), Column("a", Integer, unique=True), Column("b", Integer))


@pytest.fixture
async def rows(db: Database) -> Database:
    async with db.transaction() as tx:
        await tx.execute(text("CREATE TABLE rows (a INTEGER UNIQUE, b INTEGER)"))
    return db


async def count(db: Database) -> int:
    async with db.read() as connection:
        return int(await connection.scalar(text("SELECT count(*) FROM rows")))


async def test_commits_at_the_end_and_rolls_back_on_an_exception(rows: Database) -> None:
    async with rows.transaction() as tx:
        await tx.execute(ROWS.insert(), [{"a": 1}, {"a": 2}])
    with pytest.raises(ZeroDivisionError):
        async with rows.transaction() as tx:
            await tx.execute(ROWS.insert().values(a=3))
            raise ZeroDivisionError
    assert await count(rows) == 2


async def test_a_reader_sees_one_snapshot_beside_a_writer(rows: Database) -> None:
    async with rows.read() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM rows")) == 0
        async with rows.transaction() as tx:
            await tx.execute(ROWS.insert().values(a=1))
        assert await connection.scalar(text("SELECT count(*) FROM rows")) == 0
    assert await count(rows) == 1


async def test_a_reader_may_not_write(rows: Database) -> None:
    with pytest.raises(OctoError) as caught:
        async with rows.read() as connection:
            await connection.execute(ROWS.insert().values(a=1))
    assert caught.value.code == "unavailable"


async def test_writers_take_turns_without_losing_an_update(rows: Database) -> None:
    async with rows.transaction() as tx:
        await tx.execute(ROWS.insert().values(a=1, b=0))

    async def add() -> None:
        async with rows.transaction() as tx:
            value = await tx.scalar(select(ROWS.c.b).with_for_update())
            await asyncio.sleep(0)
            await tx.execute(ROWS.update().values(b=value + 1))

    await asyncio.gather(*(add() for _ in range(50)))
    async with rows.read() as connection:
        assert await connection.scalar(text("SELECT b FROM rows")) == 50


async def test_a_cancelled_writer_leaves_nothing_behind(rows: Database) -> None:
    async def write(number: int) -> None:
        async with rows.transaction() as tx:
            await tx.execute(ROWS.insert().values(a=2 * number))
            await tx.all(text("SELECT * FROM rows LIMIT 5"))
            await tx.execute(ROWS.insert().values(a=2 * number + 1))

    async def read() -> None:
        async with rows.read() as connection:
            await connection.all(text("SELECT * FROM rows LIMIT 5"))

    for number in range(100):
        tasks = [asyncio.create_task(write(number)), asyncio.create_task(read())]
        await asyncio.sleep(number * 4e-5)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        # A lock left behind would hold this up, then fail it.
        async with rows.transaction() as tx:
            await tx.execute(ROWS.insert().values(a=-number - 1))
    async with rows.read() as connection:
        kept = [row["a"] for row in await connection.all(text("SELECT a FROM rows WHERE a >= 0"))]
    assert {a // 2 * 2 for a in kept} | {a // 2 * 2 + 1 for a in kept} == set(kept)


async def test_a_transaction_inside_a_transaction_is_a_fault_of_the_program(rows: Database) -> None:
    with pytest.raises(RuntimeError, match="inside"):
        async with rows.transaction(), rows.transaction():
            pass
    assert await count(rows) == 0


async def test_waiting_for_a_turn_has_an_end(rows: Database) -> None:
    async def write() -> None:
        async with rows.transaction(timeout=0.01):
            pass

    go_on = asyncio.Event()
    all_taken = asyncio.Barrier((1 if rows.dialect == "sqlite" else POSTGRES_WRITERS) + 1)

    async def hold() -> None:
        async with rows.transaction():
            await all_taken.wait()
            await go_on.wait()

    holders = [asyncio.create_task(hold()) for _ in range(all_taken.parties - 1)]
    await all_taken.wait()
    task = asyncio.create_task(write())
    await asyncio.wait([task])
    go_on.set()
    await asyncio.gather(*holders)
    assert isinstance(error := task.exception(), OctoError)
    assert error.code == "overloaded"


async def test_callbacks_run_after_the_commit_once_and_not_after_a_rollback(rows: Database) -> None:
    calls: list[str] = []

    def note() -> None:
        calls.append("called")

    async with rows.transaction() as tx:
        tx.after_commit(note)
        tx.after_commit(note)
        assert calls == []
    assert calls == ["called"]
    with pytest.raises(ZeroDivisionError):
        async with rows.transaction() as tx:
            tx.after_commit(note)
            raise ZeroDivisionError
    assert calls == ["called"]


async def test_work_before_the_commit_is_part_of_it_and_its_end_is_told(rows: Database) -> None:
    calls: list[object] = []

    async def insert(tx: Transaction) -> None:
        await tx.execute(ROWS.insert().values(a=len(calls)))
        calls.append("before")

    async def fail(_tx: Transaction) -> None:
        raise ZeroDivisionError

    async with rows.transaction() as tx:
        tx.after_commit(lambda: calls.append("after"))
        tx.at_end(calls.append)
        tx.before_commit(insert)
        tx.before_commit(insert)
        assert calls == []
    assert calls == ["before", True, "after"]
    with pytest.raises(ZeroDivisionError):
        async with rows.transaction() as tx:
            tx.after_commit(lambda: calls.append("after"))
            tx.at_end(calls.append)
            tx.before_commit(insert)
            tx.before_commit(fail)
    assert calls == ["before", True, "after", "before", False]
    async with rows.read() as connection:
        assert [row["a"] for row in await connection.all(select(ROWS))] == [0]
    async with rows.transaction() as tx:
        await tx.execute(ROWS.insert().values(a=7))


async def test_a_constraint_is_a_state_conflict(rows: Database) -> None:
    with pytest.raises(OctoError) as caught:
        async with rows.transaction() as tx:
            await tx.execute(ROWS.insert().values(a=1))
            await tx.execute(ROWS.insert().values(a=1))
    assert caught.value.code == "state_conflict"


async def test_a_wrong_statement_is_internal_and_its_values_stay_out_of_the_message(rows: Database) -> None:
    with pytest.raises(OctoError) as caught:
        async with rows.transaction() as tx:
            await tx.execute(text("INSERT INTO nowhere VALUES ('secret')"))
    assert caught.value.code == "internal"
    assert "secret" not in str(caught.value)


async def test_upserts_have_one_spelling(rows: Database) -> None:
    async with rows.transaction() as tx:
        for value in (1, 2):
            statement = tx.insert(ROWS).values(a=1, b=value)
            await tx.execute(statement.on_conflict_do_update(index_elements=["a"], set_={"b": statement.excluded.b}))
    async with rows.read() as connection:
        assert dict(await connection.first(text("SELECT a, b FROM rows")) or {}) == {"a": 1, "b": 2}


async def test_a_full_disk_is_said_and_writing_goes_on_when_there_is_room(tmp_path: Path) -> None:
    async with open_database(f"sqlite:///{tmp_path}/a.db", clock=SystemClock()) as db:
        async with db.transaction() as tx:
            await tx.execute(text("CREATE TABLE blobs (body BLOB)"))
            await tx.execute(text("PRAGMA max_page_count=10"))
        with pytest.raises(OctoError, match="disk of the database is full") as caught:
            async with db.transaction() as tx:
                await tx.execute(text("INSERT INTO blobs VALUES (zeroblob(1000000))"))
        assert caught.value.code == "unavailable"
        async with db.transaction() as tx:
            await tx.execute(text("PRAGMA max_page_count=1000000"))
        async with db.transaction() as tx:
            await tx.execute(text("INSERT INTO blobs VALUES (zeroblob(1000000))"))
        async with db.read() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM blobs")) == 1


@pytest.mark.parametrize("body", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
async def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(body)
    with pytest.raises(OctoError, match="damaged") as caught:
        async with open_database(f"sqlite:///{path}", clock=SystemClock()):
            pass
    assert caught.value.code == "unavailable"
    assert str(path) in caught.value.detail


async def test_a_page_damaged_later_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    url = f"sqlite:///{path}"
    async with open_database(url, clock=SystemClock()) as db, db.transaction() as tx:
        await tx.execute(text("CREATE TABLE rows (a INTEGER, b TEXT)"))
        await tx.execute(text("INSERT INTO rows VALUES (1, hex(zeroblob(20000)))"))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    async with open_database(url, clock=SystemClock()) as db:
        with pytest.raises(OctoError, match="damaged") as caught:
            async with db.read() as connection:
                await connection.all(text("SELECT * FROM rows"))
    assert caught.value.code == "unavailable"


async def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OctoError, match="Check its path") as caught:
        async with open_database(f"sqlite:///{tmp_path}/file/a.db", clock=SystemClock()):
            pass
    assert caught.value.code == "unavailable"


async def test_the_file_is_private_and_outlives_the_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/deep/er/a.db"
    async with open_database(url, clock=SystemClock()) as db, db.transaction() as tx:
        await tx.execute(text("CREATE TABLE rows (a INTEGER)"))
        await tx.execute(text("INSERT INTO rows VALUES (1)"))
    path = tmp_path / "deep/er/a.db"
    assert path.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["a.db"]
    async with open_database(url, clock=SystemClock()) as db:
        assert await count(db) == 1


async def test_another_process_that_holds_the_lock_is_waited_for_then_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octollm.storage.engines.BUSY_SECONDS", 0.05)
    path = tmp_path / "a.db"
    async with open_database(f"sqlite:///{path}", clock=SystemClock()) as db:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OctoError, match="busy") as caught:
            async with db.transaction():
                pass
        assert caught.value.code == "unavailable"
        other.execute("ROLLBACK")
        other.close()
        async with db.transaction():
            pass


async def test_settings_of_a_connection(tmp_path: Path) -> None:
    async with open_database(f"sqlite:///{tmp_path}/a.db", clock=SystemClock()) as db, db.transaction() as tx:
        assert await tx.scalar(text("PRAGMA journal_mode")) == "wal"
        assert await tx.scalar(text("PRAGMA synchronous")) == 2  # FULL: survives a power failure
        assert await tx.scalar(text("PRAGMA foreign_keys")) == 1
        assert await tx.scalar(text("PRAGMA busy_timeout")) == 5000


@pytest.mark.parametrize("url", ["mysql://x", "sqlite://", "postgresql://h:port/x", "sqlite:///", "a.db", ""])
async def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(SettingError):
        async with open_database(url, clock=SystemClock()):
            pass


async def test_check_answers(db: Database) -> None:
    await db.check()
