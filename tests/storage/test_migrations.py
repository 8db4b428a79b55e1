from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, MetaData, text

from octollm.clock import SystemClock
from octollm.errors import SettingError
from octollm.storage.engine import Database, open_database
from octollm.storage.migrations import Service, migrate
from octollm.storage.tables import MEMORY, MONITOR, ORCHESTRATOR

SERVICES: list[tuple[Service, MetaData]] = [("orchestrator", ORCHESTRATOR), ("memory", MEMORY), ("monitor", MONITOR)]


def differences(connection: Connection, metadata: MetaData) -> list[Any]:
    def ours(thing: Any, name: str | None, kind: str, reflected: bool, other: Any) -> bool:
        return not (kind == "table" and (name or "").startswith("passages_fts"))

    context = MigrationContext.configure(
        connection,
        opts={"version_table": "schema_version", "include_object": ours},
    )
    return list(compare_metadata(context, metadata))


@pytest.mark.parametrize(("service", "metadata"), SERVICES)
async def test_the_migrations_make_the_declared_tables(db: Database, service: Service, metadata: MetaData) -> None:
    await migrate(db, service)
    async with db.read() as connection:
        assert await connection.raw.run_sync(differences, metadata) == []


def columns(connection: Connection, metadata: MetaData) -> dict[str, list[Any]]:
    """Return name, type, NOT NULL, default and key of each column; alembic does not compare empty defaults."""
    return {
        name: [tuple(row) for row in connection.execute(text("SELECT * FROM pragma_table_info(:name)"), {"name": name})]
        for name in metadata.tables
    }


@pytest.mark.parametrize(("service", "metadata"), SERVICES)
async def test_the_columns_are_the_declared_ones(db: Database, service: Service, metadata: MetaData) -> None:
    await migrate(db, service)
    async with db.read() as connection:
        migrated = await connection.raw.run_sync(columns, metadata)
    async with open_database("memory://", clock=SystemClock()) as other, other.transaction() as tx:
        await tx.raw.run_sync(metadata.create_all)
        declared = await tx.raw.run_sync(columns, metadata)
    assert migrated == declared


@pytest.mark.parametrize(("service", "metadata"), SERVICES)
async def test_a_second_run_changes_nothing(db: Database, service: Service, metadata: MetaData) -> None:
    first = await migrate(db, service)
    async with db.read() as connection:
        version = await connection.scalar(text("PRAGMA schema_version"))
    assert await migrate(db, service) == first
    async with db.read() as connection:
        assert await connection.scalar(text("PRAGMA schema_version")) == version


async def test_two_services_migrate_at_the_same_time() -> None:
    clock = SystemClock()
    async with open_database("memory://", clock=clock) as one, open_database("memory://", clock=clock) as two:
        await asyncio.gather(migrate(one, "orchestrator"), migrate(two, "memory"))


async def test_two_processes_may_start_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    program = (
        "import asyncio\n"
        "from octollm.clock import SystemClock\n"
        "from octollm.storage.engine import open_database\n"
        "from octollm.storage.migrations import migrate\n"
        "async def main():\n"
        f"    async with open_database({url!r}, clock=SystemClock()) as db:\n"
        "        print(await migrate(db, 'orchestrator'))\n"
        "asyncio.run(main())\n"
    )
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
        for _ in range(3)
    ]
    outputs = [await process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({output for output, _ in outputs}) == 1


async def test_a_newer_schema_is_refused_and_left_alone(db: Database) -> None:
    await migrate(db, "orchestrator")
    async with db.transaction() as tx:
        await tx.execute(text("UPDATE schema_version SET version_num = '9999'"))
    with pytest.raises(SettingError, match="newer version") as caught:
        await migrate(db, "orchestrator")
    assert "9999" in caught.value.detail
    assert "backup" in caught.value.detail
    async with db.read() as connection:
        assert await connection.scalar(text("SELECT version_num FROM schema_version")) == "9999"


async def test_a_migration_that_fails_changes_nothing(db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute(text("CREATE TABLE tasks (other INTEGER)"))
    with pytest.raises(Exception, match="failed"):
        await migrate(db, "orchestrator")
    async with db.read() as connection:
        names = {row["name"] for row in await connection.all(text("SELECT name FROM sqlite_master"))}
    assert names == {"tasks"}
