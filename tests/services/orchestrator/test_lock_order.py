"""Changes that meet in PostgreSQL: one waits for the other, none deadlocks, and none overlooks what the other wrote."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from databases import Backend
from sqlalchemy import select, text, update

from octollm.capability import Principal
from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.enrolment import ArmRegistration
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.services.orchestrator.instances import HEARTBEAT_TIMEOUT_SECONDS, InstanceRegistry
from octollm.services.orchestrator.registry import ServiceRegistry
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.services.orchestrator.sessions import SessionStore
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import arm_instances, arms, revocations, sessions
from octollm.testing import wait_until

pytestmark = pytest.mark.postgres
CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
PRINCIPAL = Principal("user-1", "key-1", "acme")


@pytest.fixture
async def db(postgres: Backend) -> AsyncGenerator[Database]:
    async with open_database(postgres.url("octollm_orchestrator"), clock=CLOCK) as opened:
        await migrate(opened, "orchestrator")
        yield opened


async def waits_for_lock(db: Database) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with db.read() as conn:
        return bool(await conn.scalar(text(query)))


@pytest.fixture
async def instances(db: Database) -> InstanceRegistry:
    registry = InstanceRegistry(db, EventLog(db, CLOCK, IDS), ServiceRegistry(db, CLOCK, {}))
    await registry.register("coder", ArmRegistration("Codes", ("execute",), (), (), "http://a:1", "i1"))
    return registry


@pytest.mark.parametrize("change", ["deregister", "sweep"])
async def test_a_registration_never_deadlocks_with_the_removal_of_an_instance(
    db: Database, instances: InstanceRegistry, change: str
) -> None:
    if change == "sweep":
        async with db.transaction() as tx:
            await tx.execute(update(arm_instances).values(seen_at=CLOCK.now() - 2 * HEARTBEAT_TIMEOUT_SECONDS))
    async with db.transaction() as tx:
        # A registration locks the arm first, and then changes the rows of its instances.
        await tx.first(select(arms.c.state).where(arms.c.name == "coder").with_for_update())
        removal = instances.sweep() if change == "sweep" else instances.deregister("coder", "i1")
        removing = asyncio.create_task(removal)
        await wait_until(lambda: waits_for_lock(db), description="the removal waits for the arm")
        await tx.execute(update(arm_instances).where(arm_instances.c.instance == "i1").values(url="http://a:2"))
    await removing
    async with db.read() as conn:
        assert await conn.first(select(arm_instances)) is None
        assert await conn.scalar(select(arms.c.state).where(arms.c.name == "coder")) == "unhealthy"


async def test_the_end_of_a_session_revokes_a_token_that_is_recorded_meanwhile(db: Database) -> None:
    store = SessionStore(db, RevocationStore(db, EventLog(db, CLOCK, IDS), CLOCK), CLOCK, IDS)
    secret = await store.open(PRINCIPAL)
    session_id, _ = await store.find_credential(secret)
    async with db.transaction() as tx:
        # An exchange that has locked the session and not yet committed its token.
        await tx.first(select(sessions).where(sessions.c.id == session_id).with_for_update())
        await tx.execute(update(sessions).values(tokens=["token-1"]))
        ending = asyncio.create_task(store.end(secret))
        await wait_until(lambda: waits_for_lock(db), description="the end waits for the exchange")
    await ending
    async with db.read() as conn:
        assert [row["value"] for row in await conn.all(select(revocations))] == ["token-1"]
    with pytest.raises(OctoError) as caught:
        await store.add_token(session_id, "token-2")
    assert caught.value.code == "api_key_invalid"
