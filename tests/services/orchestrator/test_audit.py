"""The audit log in SQL: sealed in order whoever writes at the same time, and checked as anybody would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from databases import Backend
from sqlalchemy import delete, insert, select, update

from octollm.capability import Principal, SigningKey
from octollm.capability.audit_chain import AuditChainVerifier
from octollm.clock import SystemClock
from octollm.services.orchestrator import audit as audit_module
from octollm.services.orchestrator.audit import Actor, AuditSealer, read_audit_page, record_audit
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import audit, audit_heads
from octollm.testing.polling import wait_until

CLOCK = SystemClock()
ROOT = SigningKey.generate("root")
ROOTS = {ROOT.thumbprint: ROOT.public}
ALICE = Actor(Principal("alice", "key-1", "acme"), "req-1", "corr-1")
BOB = Actor(Principal("bob", "key-2", "globex"))


@pytest.fixture
async def db(backend: Backend) -> AsyncGenerator[Database]:
    async with open_database(backend.url("octollm_orchestrator"), clock=CLOCK) as found:
        await migrate(found, "orchestrator")
        yield found


async def write(db: Database, actor: Actor, count: int, name: str = "task") -> None:
    for number in range(count):
        async with db.transaction() as tx:
            await record_audit(
                tx, actor, "task.created", f"{name}-{number}", CLOCK.now(), {"n": number, "x": 1.5, "ü": [None]}
            )


async def checked(db: Database, tenant: str) -> tuple[int, list[str]]:
    check = AuditChainVerifier(tenant, ROOTS)
    after = 0
    while True:
        page = await read_audit_page(db, tenant, after, 3)
        for row in page.rows:
            check.check_row(row)
        if not page.rows:
            check.check_head(page.head)
            return check.rows, [f"{fault.seq}: {fault.what}" for fault in check.faults]
        after = page.rows[-1].seq


async def test_each_tenant_has_a_chain_of_its_own(db: Database) -> None:
    sealing = AuditSealer(db, ROOT, CLOCK)
    assert await sealing.seal() == 0
    await write(db, ALICE, 4)
    await write(db, BOB, 2)
    assert (await read_audit_page(db, "acme", 0, 10)).rows == (), "what is not sealed is not told"
    assert await sealing.seal() == 6
    await write(db, ALICE, 1)
    assert await sealing.seal() == 1
    assert await checked(db, "acme") == (5, [])
    assert await checked(db, "globex") == (2, [])
    assert await checked(db, "nobody") == (0, [])
    page = await read_audit_page(db, "acme", 3, 10)
    assert [row.seq for row in page.rows] == [4, 5]
    assert [row.checkpoint is not None for row in page.rows] == [True, True]
    assert page.rows[0].detail == {"n": 3, "x": 1.5, "ü": [None]}
    assert (page.rows[0].sub, page.rows[0].request_id, page.rows[0].tenant) == ("alice", "req-1", "acme")


async def test_writers_and_sealers_at_the_same_time_make_one_chain(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "SEAL_BATCH", 5)
    sealers = [AuditSealer(db, ROOT, CLOCK), AuditSealer(db, ROOT, CLOCK)]
    done = asyncio.Event()

    async def seal(one: AuditSealer) -> None:
        while not done.is_set():
            await one.seal()
            await asyncio.sleep(0)

    sealing = [asyncio.create_task(seal(one)) for one in sealers]
    await asyncio.gather(*(write(db, actor, 10, str(n)) for n in range(3) for actor in (ALICE, BOB)))
    done.set()
    await asyncio.gather(*sealing)
    while await sealers[0].seal():
        pass
    assert await checked(db, "acme") == (30, [])
    assert await checked(db, "globex") == (30, [])


async def test_what_is_done_to_rows_is_named(db: Database) -> None:
    await write(db, ALICE, 6)
    await AuditSealer(db, ROOT, CLOCK).seal()

    async with db.transaction() as tx:
        await tx.execute(update(audit).where(audit.c.seq == 2).values(sub="mallory"))
    assert (await checked(db, "acme"))[1] == [
        "2: it was changed: task.created by mallory does not have the hash that was sealed"
    ]
    async with db.transaction() as tx:
        await tx.execute(update(audit).where(audit.c.seq == 2).values(sub="alice"))
        await tx.execute(delete(audit).where(audit.c.seq == 4))
    assert (await checked(db, "acme"))[1] == ["4: row 4 is gone"]
    async with db.transaction() as tx:
        await tx.execute(delete(audit).where(audit.c.seq >= 4))
    assert (await checked(db, "acme"))[1] == ["0: rows 4 to 6 are gone from the end"]


async def test_a_row_cannot_be_put_in_between(db: Database) -> None:
    await write(db, ALICE, 3)
    await AuditSealer(db, ROOT, CLOCK).seal()
    async with db.transaction() as tx:
        await tx.execute(update(audit).where(audit.c.seq == 3).values(seq=4))
        forged = {"tenant": "acme", "at": 1.0, "action": "task.created", "seq": 3, "hash": "0" * 64}
        await tx.execute(insert(audit).values(forged))
    found = (await checked(db, "acme"))[1]
    assert any(each.startswith("3: it was changed") for each in found)


async def test_sealing_goes_on_by_itself_and_once_more_at_the_end(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "SEAL_SECONDS", 0.01)
    sealing = AuditSealer(db, ROOT, CLOCK)
    async with sealing.run():
        await write(db, ALICE, 2)

        async def sealed() -> bool:
            return (await read_audit_page(db, "acme", 0, 10)).head.seq == 2

        await wait_until(sealed, description="the rows are sealed")
    assert (await sealing.check_health()).ok
    monkeypatch.setattr(audit_module, "SEAL_SECONDS", 60)
    async with AuditSealer(db, ROOT, CLOCK).run():
        await write(db, ALICE, 1)
    assert await checked(db, "acme") == (3, [])


async def test_a_rolled_back_sealing_leaves_no_gap(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await write(db, ALICE, 3)
    sealing = AuditSealer(db, ROOT, CLOCK)

    def broken(*_args: object) -> str:
        raise RuntimeError("the signer broke")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(audit_module, "sign_checkpoint", broken)
        await sealing.seal()
    async with db.read() as conn:
        assert await conn.all(select(audit_heads).where(audit_heads.c.tenant == "acme")) == []
    assert await sealing.seal() == 3
    assert await checked(db, "acme") == (3, [])
