from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from databases import Backend
from sqlalchemy import LargeBinary, delete, func, select, text, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from octollm.clock import SystemClock
from octollm.contracts.task import Task
from octollm.errors import OctoError
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import (
    MEMORY,
    ORCHESTRATOR,
    budgets,
    documents,
    events,
    fact_versions,
    files,
    passage_terms,
    passages,
    steps,
    tasks,
)

NOW = 1762770600.0


@pytest.fixture
async def orchestrator(backend: Backend) -> AsyncIterator[Database]:
    async with open_database(backend.url("octollm_orchestrator"), clock=SystemClock()) as db:
        await migrate(db, "orchestrator")
        yield db


@pytest.fixture
async def memory(backend: Backend) -> AsyncIterator[Database]:
    async with open_database(backend.url("octollm_memory"), clock=SystemClock()) as db:
        await migrate(db, "memory")
        yield db


def task(**values: object) -> dict[str, object]:
    return {
        "task_id": "task-1",
        "tenant": "t",
        "sub": "alice",
        "goal": "g",
        "contract": Task(goal="g"),
        "status": "accepted",
        "created_at": NOW,
        "updated_at": NOW,
    } | values


def test_the_services_share_no_table() -> None:
    assert not set(ORCHESTRATOR.tables) & set(MEMORY.tables)


def test_one_schema_serves_postgresql_too() -> None:
    dialect = postgresql.dialect()  # pyright: ignore
    for metadata in (ORCHESTRATOR, MEMORY):
        for table in metadata.sorted_tables:
            assert str(CreateTable(table).compile(dialect=dialect))
            for index in table.indexes:
                assert index.name is not None
                assert str(CreateIndex(index).compile(dialect=dialect))
    assert "JSONB" in str(CreateTable(tasks).compile(dialect=dialect))
    assert "BIGSERIAL" in str(CreateTable(events).compile(dialect=dialect))
    assert "WHERE seq IS NULL" in "".join(str(CreateIndex(i).compile(dialect=dialect)) for i in events.indexes)


def test_every_table_of_a_tenant_names_it() -> None:
    for table in (tasks, files, events, documents, passages, fact_versions):
        assert not table.c.tenant.nullable


async def test_json_takes_structs_and_gives_plain_values(orchestrator: Database) -> None:
    async with orchestrator.transaction() as tx:
        await tx.execute(tasks.insert().values(task(plan=None)))
    async with orchestrator.read() as connection:
        row = await connection.first(select(tasks))
    assert row is not None
    assert row["contract"] == {"goal": "g"}
    assert row["plan"] is None
    assert (row["kind"], row["progress"], row["run"], row["version"]) == ("task", 0, 0, 0)


async def test_what_belongs_to_a_task_goes_with_it(orchestrator: Database) -> None:
    async with orchestrator.transaction() as tx:
        await tx.execute(tasks.insert().values(task()))
        await tx.execute(
            steps.insert().values(task_id="task-1", step="s1", arm="coder", spec={}, created_at=NOW, updated_at=NOW)
        )
        await tx.execute(budgets.insert().values(task_id="task-1"))
        await tx.execute(delete(tasks))
        assert await tx.scalar(select(func.count()).select_from(steps)) == 0
        assert await tx.scalar(select(func.count()).select_from(budgets)) == 0


async def test_a_step_needs_its_task(orchestrator: Database) -> None:
    with pytest.raises(OctoError) as caught:
        async with orchestrator.transaction() as tx:
            await tx.execute(
                steps.insert().values(task_id="none", step="s1", arm="x", spec={}, created_at=NOW, updated_at=NOW)
            )
    assert caught.value.code == "state_conflict"


async def test_files_keep_their_bytes_per_tenant(orchestrator: Database) -> None:
    assert isinstance(files.c.body.type, LargeBinary)
    body = bytes(range(256))
    async with orchestrator.transaction() as tx:
        for tenant in ("a", "b"):
            await tx.execute(
                files.insert().values(tenant=tenant, digest="d", name="n", size=256, body=body, created_at=NOW)
            )
    async with orchestrator.read() as connection:
        assert await connection.scalar(select(files.c.body).where(files.c.tenant == "b")) == body


async def add_passage(memory: Database, tenant: str, terms: str) -> None:
    async with memory.transaction() as tx:
        await tx.execute(
            tx.insert(documents).values(tenant=tenant, digest="d", name="n", created_at=NOW).on_conflict_do_nothing()
        )
        place = await tx.scalar(select(func.count()).select_from(passages).where(passages.c.tenant == tenant))
        await tx.execute(
            passages.insert().values(tenant=tenant, digest="d", position=place, line_start=1, line_end=1, terms=terms)
        )


async def search(memory: Database, tenant: str, term: str) -> list[str]:
    query = select(passages.c.terms).where(passages.c.tenant == tenant)
    if memory.dialect == "sqlite":
        query = query.join(passage_terms, passage_terms.c.rowid == passages.c.id)
        query = query.where(text("passage_terms MATCH :term")).params(term=f'"{term}"')
    else:
        query = query.where(text("passages.term_vector @@ CAST(:term AS tsquery)")).params(term=f"'{term}'")
    async with memory.read() as connection:
        return [row["terms"] for row in await connection.all(query)]


async def test_the_full_text_index_follows_the_passages(memory: Database) -> None:
    await add_passage(memory, "a", "octopus _opens 契約")
    await add_passage(memory, "a", "squid ช่า")
    await add_passage(memory, "b", "octopus")
    assert await search(memory, "a", "octopus") == ["octopus _opens 契約"]
    # Terms are taken as they are: no accent, mark or underscore parts them.
    assert await search(memory, "a", "_opens") == ["octopus _opens 契約"]
    assert await search(memory, "a", "opens") == []
    assert await search(memory, "a", "契約") == ["octopus _opens 契約"]
    assert await search(memory, "a", "契") == []
    assert await search(memory, "a", "ช่า") == ["squid ช่า"]
    async with memory.transaction() as tx:
        await tx.execute(update(passages).where(passages.c.tenant == "b").values(terms="whale"))
        await tx.execute(delete(documents).where(documents.c.tenant == "a"))
    assert await search(memory, "a", "octopus") == []
    assert await search(memory, "b", "octopus") == []
    assert await search(memory, "b", "whale") == ["whale"]
