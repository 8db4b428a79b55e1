from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from databases import Backend, PostgresServer
from databases import run_revisions as migrate
from sqlalchemy import Connection, MetaData, inspect, select, text

from octollm.clock import SystemClock
from octollm.config import read_settings
from octollm.contracts.task import Artifact, ExecuteResult
from octollm.errors import OctoError
from octollm.storage import Database, open_database
from octollm.storage.migrations import DatabaseService, open_service_database, require_schema
from octollm.storage.tables import MEMORY, MONITOR, ORCHESTRATOR, steps, task_files, tasks
from octollm.testing import wait_until

CLOCK = SystemClock()
SERVICES: list[tuple[DatabaseService, MetaData]] = [
    ("orchestrator", ORCHESTRATOR),
    ("memory", MEMORY),
    ("monitor", MONITOR),
]
OTHERS = {
    "schema_version",
    "schema_serves",
    "ix_passages_words",
    "words",
    "ix_passages_term_vector",
    "term_vector",
    "passage_vocabulary",
}


def differences(connection: Connection, metadata: MetaData) -> list[Any]:
    def is_own(thing: Any, name: str | None, kind: str, reflected: bool, other: Any) -> bool:
        # The full-text index is made by hand on either database.
        return not ((name or "") in OTHERS or (name or "").startswith("passage_terms"))

    context = MigrationContext.configure(
        connection,
        opts={"version_table": "schema_version", "include_object": is_own},
    )
    return list(compare_metadata(context, metadata))


@pytest.mark.parametrize(("service", "metadata"), SERVICES)
async def test_the_migrations_make_the_declared_tables(
    db: Database, service: DatabaseService, metadata: MetaData
) -> None:
    await migrate(db, service)
    async with db.read() as connection:
        assert await connection.raw.run_sync(differences, metadata) == []


def columns(connection: Connection, metadata: MetaData) -> dict[str, list[Any]]:
    """Return name, type, NOT NULL and default of each column; alembic does not compare empty defaults."""
    seen = inspect(connection)
    return {
        name: [
            (column["name"], str(column["type"]), column["nullable"], column["default"])
            for column in seen.get_columns(name)
            # What fills it in differs between the databases, so the table does not declare it.
            if column["name"] not in {"transaction_id", "words", "term_vector"}
        ]
        for name in metadata.tables
    }


@pytest.mark.parametrize(("service", "metadata"), SERVICES)
async def test_the_columns_are_the_declared_ones(
    db: Database, backend: Backend, service: DatabaseService, metadata: MetaData
) -> None:
    await migrate(db, service)
    async with db.read() as connection:
        migrated = await connection.raw.run_sync(columns, metadata)
    async with open_database(backend.url("declared"), clock=CLOCK) as other, other.transaction() as tx:
        if tx.dialect == "postgresql":
            await tx.execute(text("CREATE SCHEMA declared"))
        await tx.raw.run_sync(metadata.create_all)
        declared = await tx.raw.run_sync(columns, metadata)
    assert migrated == declared


@pytest.mark.parametrize(("service", "metadata"), SERVICES)
async def test_a_second_run_changes_nothing(db: Database, service: DatabaseService, metadata: MetaData) -> None:
    def seen(connection: Connection) -> object:
        return columns(connection, metadata), sorted(inspect(connection).get_table_names())

    first = await migrate(db, service)
    assert first.before is None
    async with db.read() as connection:
        before = await connection.raw.run_sync(seen)
    second = await migrate(db, service)
    assert (second.before, second.after) == (first.after, first.after)
    async with db.read() as connection:
        assert await connection.raw.run_sync(seen) == before


async def test_two_services_migrate_at_the_same_time() -> None:
    async with open_database("memory://", clock=CLOCK) as one, open_database("memory://", clock=CLOCK) as two:
        await asyncio.gather(migrate(one, "orchestrator"), migrate(two, "memory"))


def program(url: str) -> list[str]:
    """Return a process that brings the orchestrator's schema to this version."""
    lines = (
        "import asyncio",
        "from octollm.clock import SystemClock",
        "from octollm.storage import open_database",
        "from octollm.storage.migrations import migrate",
        "async def main():",
        f"    async with open_database({url!r}, clock=SystemClock()) as db:",
        "        print((await migrate(db, 'orchestrator')).after)",
        "asyncio.run(main())",
    )
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.fixture
async def database_url(backend: Backend, tmp_path: Path) -> str:
    """Return the URL of a database that several processes can open; it has no schema."""
    return f"sqlite:///{tmp_path}/a.db" if backend.base is None else backend.url("fresh")


async def test_two_processes_may_start_at_once(database_url: str) -> None:
    processes = [
        await asyncio.create_subprocess_exec(*program(database_url), stdout=asyncio.subprocess.PIPE) for _ in range(3)
    ]
    outputs = [await process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({output for output, _ in outputs}) == 1


async def test_a_newer_schema_that_does_not_serve_this_version_is_refused_and_left_alone(db: Database) -> None:
    await migrate(db, "orchestrator")
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE schema_version SET version_num = '9999'"))
        await tx.execute(text("UPDATE schema_serves SET oldest = '9998'"))
    for refused in (migrate(db, "orchestrator"), require_schema(db, "orchestrator")):
        with pytest.raises(OctoError, match="newer version") as caught:
            await refused
        assert caught.value.code == "schema_mismatch"
        assert "9999" in caught.value.detail
        assert "backup" in caught.value.detail
    async with db.read() as connection:
        assert await connection.scalar(text("SELECT version_num FROM schema_version")) == "9999"


async def test_a_newer_schema_that_serves_this_version_is_worked_with_and_left_alone(db: Database) -> None:
    done = await migrate(db, "orchestrator")
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE schema_version SET version_num = '9999'"))
        await tx.execute(text("UPDATE schema_serves SET oldest = :mine").bindparams(mine=done.after))
    again = await migrate(db, "orchestrator")
    assert (again.before, again.after) == ("9999", "9999")
    assert await require_schema(db, "orchestrator") == "9999"


async def test_a_migration_that_fails_changes_nothing(db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute(text("CREATE TABLE tasks (other INTEGER)"))
    with pytest.raises(OctoError, match="failed"):
        await migrate(db, "orchestrator")
    async with db.read() as connection:
        assert await connection.raw.run_sync(lambda raw: inspect(raw).get_table_names()) == ["tasks"]


@pytest.mark.postgres
async def test_a_service_says_that_a_server_has_no_schema_or_an_old_one(postgres_server: PostgresServer) -> None:
    async with postgres_server.empty_database() as url:
        settings = read_settings({"OCTOLLM_DATABASE_URL": url}, ())
        with pytest.raises(OctoError, match="octollm migrate") as caught:
            async with open_service_database(settings, "memory", clock=CLOCK):
                pass
        assert caught.value.code == "schema_mismatch"
        async with open_database(f"{url}?search_path=octollm_memory", clock=CLOCK) as db:
            await migrate(db, "memory")
            async with open_service_database(settings, "memory", clock=CLOCK) as found:
                await found.check()
            async with db.transaction() as tx:
                await tx.execute(text("UPDATE schema_version SET version_num = '0001'"))
        with pytest.raises(OctoError, match=r"at revision 0001.*octollm migrate"):
            async with open_service_database(settings, "memory", clock=CLOCK):
                pass


@pytest.mark.postgres
async def test_a_migration_that_is_killed_changes_nothing_and_can_be_repeated(postgres: Backend) -> None:
    url = postgres.url("fresh")
    async with open_database(url, clock=CLOCK) as db:
        async with db.transaction() as tx:
            await tx.execute(text("CREATE SCHEMA fresh"))

        # Another transaction that makes a table of the same name holds it up in the middle.
        async with db.transaction() as tx:
            await tx.execute(text("CREATE TABLE tasks (other INTEGER)"))
            process = await asyncio.create_subprocess_exec(*program(url))

            async def is_in_the_middle() -> bool:
                return "Lock" in await waiting(db)

            await wait_until(is_in_the_middle, description="the migration is in the middle", timeout=20)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            await tx.execute(text("DROP TABLE tasks"))

        async def is_released() -> bool:
            return await waiting(db) == []

        await wait_until(is_released, description="the server ends the dead process's transaction")
        async with db.read() as connection:
            assert await connection.raw.run_sync(lambda raw: inspect(raw).get_table_names()) == []
        assert (await migrate(db, "orchestrator")).before is None
        await require_schema(db, "orchestrator")


async def waiting(db: Database) -> list[str | None]:
    """Return for what each connection waits that holds or awaits the turn to migrate."""
    query = text(
        "SELECT wait_event_type FROM pg_stat_activity JOIN pg_locks USING (pid)"
        " WHERE locktype = 'advisory' AND datname = current_database()"
    )
    async with db.read() as connection:
        return [row["wait_event_type"] for row in await connection.all(query)]


async def test_the_files_of_steps_from_before_attempts_are_kept_with_their_tasks(db: Database) -> None:
    await migrate(db, "orchestrator")
    artifacts = [Artifact(name, digest, 1, "text/plain") for name, digest in (("a", "d1"), ("b", "d2"), ("c", "d2"))]
    results = {"s1": ExecuteResult("made", tuple(artifacts)), "s2": ExecuteResult("none"), "s3": None}
    async with db.transaction() as tx:
        row = {"tenant": "acme", "sub": "user", "goal": "x", "contract": {}, "status": "completed"}
        await tx.execute(tx.insert(tasks).values(task_id="task-1", created_at=1.0, updated_at=1.0, **row))
        for step, result in results.items():
            made = {"step": step, "arm": "coder", "title": step, "spec": {}, "result": result}
            await tx.execute(tx.insert(steps).values(task_id="task-1", created_at=2.0, updated_at=2.0, **made))
        kept = {"task_id": "task-1", "role": "attempt", "step": "s1", "name": "d1", "digest": "d1", "created_at": 5.0}
        await tx.execute(tx.insert(task_files).values(**kept))
        # As a version before this revision has left it.
        await tx.execute(text("UPDATE schema_version SET version_num = '0018'"))
    await migrate(db, "orchestrator")
    async with db.read() as conn:
        rows = await conn.all(select(task_files).order_by(task_files.c.digest))
    found = [(row["role"], row["step"], row["name"], row["digest"], row["created_at"]) for row in rows]
    assert found == [("attempt", "s1", "d1", "d1", 5.0), ("attempt", "s1", "d2", "d2", 2.0)]
