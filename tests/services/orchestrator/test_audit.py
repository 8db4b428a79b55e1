"""The audit log in SQL: sealed in order whoever writes at the same time, and checked as anybody would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import msgspec
import pytest
from databases import Backend
from sqlalchemy import delete, insert, select, update

from octollm.capability import Principal, SigningKey
from octollm.capability.audit_chain import AuditChainVerifier, verify_checkpoint
from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.observability import AuditCut, AuditRow, AuditTrailer, decode_audit_line
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.services.orchestrator import audit as audit_module
from octollm.services.orchestrator.audit import Actor, AuditSealer, archive_audit, read_audit_page, record_audit
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import audit, audit_heads
from octollm.testing import wait_until

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
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
    sealing = AuditSealer(db, EventLog(db, CLOCK, IDS), ROOT, CLOCK)
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
    sealers = [
        AuditSealer(db, EventLog(db, CLOCK, IDS), ROOT, CLOCK),
        AuditSealer(db, EventLog(db, CLOCK, IDS), ROOT, CLOCK),
    ]
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
    await AuditSealer(db, EventLog(db, CLOCK, IDS), ROOT, CLOCK).seal()

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
    await AuditSealer(db, EventLog(db, CLOCK, IDS), ROOT, CLOCK).seal()
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
    sealing = AuditSealer(db, EventLog(db, CLOCK, IDS), ROOT, CLOCK)
    async with sealing.run():
        await write(db, ALICE, 2)

        async def sealed() -> bool:
            return (await read_audit_page(db, "acme", 0, 10)).head.seq == 2

        await wait_until(sealed, description="the rows are sealed")
    assert (await sealing.check_health()).ok
    monkeypatch.setattr(audit_module, "SEAL_SECONDS", 60)
    async with AuditSealer(db, EventLog(db, CLOCK, IDS), ROOT, CLOCK).run():
        await write(db, ALICE, 1)
    assert await checked(db, "acme") == (3, [])


async def test_a_rolled_back_sealing_leaves_no_gap(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await write(db, ALICE, 3)
    sealing = AuditSealer(db, EventLog(db, CLOCK, IDS), ROOT, CLOCK)

    def broken(*_args: object) -> str:
        raise RuntimeError("the signer broke")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(audit_module, "sign_checkpoint", broken)
        await sealing.seal()
    async with db.read() as conn:
        assert await conn.all(select(audit_heads).where(audit_heads.c.tenant == "acme")) == []
    assert await sealing.seal() == 3
    assert await checked(db, "acme") == (3, [])


@dataclass
class Store:
    """Objects in memory; ``error`` is raised after one was stored, as by a process that dies before it deletes."""

    objects: dict[str, bytes] = field(default_factory=dict[str, bytes])
    error: Exception | None = None

    async def __call__(self, name: str, body: bytes) -> None:
        self.objects[name] = body
        if self.error is not None:
            raise self.error


async def log_in_batches(db: Database, *counts: int) -> AuditSealer:
    """Write Alice's rows and seal each batch by itself, so that each ends with a checkpoint."""
    sealing = AuditSealer(db, EventLog(db, CLOCK, IDS), ROOT, CLOCK)
    for count in counts:
        await write(db, ALICE, count)
        assert await sealing.seal() == count
    return sealing


async def stored_seqs(db: Database) -> list[int]:
    return [row.seq for row in (await read_audit_page(db, "acme", 0, 100)).rows]


async def test_old_rows_are_cut_off_at_a_signed_row_and_the_chain_goes_on_from_there(db: Database) -> None:
    sealing = await log_in_batches(db, 3, 3)
    await write(db, BOB, 2)
    assert await sealing.seal() == 2
    store = Store()
    async with db.transaction() as tx:
        # Row 5 is recent, and row 4 has no checkpoint: the cut is after row 3.
        await tx.execute(update(audit).where(audit.c.tenant == "acme", audit.c.seq < 5).values(at=1000.0))
    rows = (await read_audit_page(db, "acme", 0, 100)).rows
    assert await archive_audit(db, 2000.0, store) == 3
    assert await archive_audit(db, 2000.0, store) == 0
    assert await stored_seqs(db) == [4, 5, 6]
    page = await read_audit_page(db, "acme", 0, 100)
    assert page.cut is not None
    assert (page.cut.seq, page.cut.hash) == (3, rows[2].hash)
    assert verify_checkpoint(page.cut.checkpoint, ROOTS).seq == 3
    assert await checked(db, "globex") == (2, [])
    [(name, body)] = store.objects.items()
    assert name == f"audit/acme/{1:019d}-{3:019d}.jsonl"
    lines = [decode_audit_line(line, name) for line in body.splitlines()]
    assert lines == [*rows[:3], AuditTrailer(page.cut)]
    # The log goes on, and is cut again.
    await write(db, ALICE, 1)
    await sealing.seal()
    assert await archive_audit(db, CLOCK.now() + 1, store) == 4 + 2
    assert await stored_seqs(db) == []
    second = store.objects[f"audit/acme/{4:019d}-{7:019d}.jsonl"].splitlines()
    assert decode_audit_line(second[0], "") == AuditCut(page.cut)
    assert (await read_audit_page(db, "acme", 0, 100)).cut == (await read_audit_page(db, "acme", 0, 100)).head


async def verify_across_the_cut(db: Database, archived: list[AuditRow] | None) -> list[str]:
    chain = AuditChainVerifier("acme", ROOTS)
    page = await read_audit_page(db, "acme", 0, 100)
    for row in archived or ():
        chain.check_row(row)
    if page.cut is not None:
        chain.check_cut(page.cut, archived=archived is not None)
    for row in page.rows:
        chain.check_row(row)
    chain.check_head(page.head)
    return [f"{fault.seq}: {fault.what}" for fault in chain.faults]


async def test_the_chain_is_verified_across_the_cut(db: Database) -> None:
    await log_in_batches(db, 2, 2)
    rows = list((await read_audit_page(db, "acme", 0, 100)).rows)
    async with db.transaction() as tx:
        await tx.execute(update(audit).where(audit.c.seq > 2).values(at=9e9))
    # The times of rows 3 and 4 are changed for the cut only.
    assert await archive_audit(db, CLOCK.now() + 1, Store()) == 2
    async with db.transaction() as tx:
        for row in rows[2:]:
            await tx.execute(update(audit).where(audit.c.seq == row.seq).values(at=row.at))
    assert await verify_across_the_cut(db, rows[:2]) == []
    assert await verify_across_the_cut(db, None) == []
    assert await verify_across_the_cut(db, []) == ["1: rows 1 to 2 are not in the archive"]
    assert await verify_across_the_cut(db, rows[:1]) == ["2: rows 2 to 2 are not in the archive"]
    forged = msgspec.structs.replace(rows[0], sub="mallory")
    assert (await verify_across_the_cut(db, [forged, rows[1]]))[0].startswith("1: it was changed")
    # Somebody without the root key cuts off more than was archived, or replaces the cut.
    async with db.transaction() as tx:
        await tx.execute(delete(audit).where(audit.c.seq == 3))
        await tx.execute(update(audit_heads).where(audit_heads.c.tenant == "acme").values(cut_seq=3))
    faults = await verify_across_the_cut(db, rows[:2])
    assert "3: rows 3 to 3 are not in the archive" in faults
    assert any("its checkpoint is of row 2" in fault for fault in faults)


async def test_a_crash_between_storing_and_deleting_loses_no_row(db: Database) -> None:
    await log_in_batches(db, 2)
    store = Store(error=OctoError("died", code="unavailable"))
    with pytest.raises(OctoError, match="died"):
        await archive_audit(db, CLOCK.now() + 1, store)
    assert await checked(db, "acme") == (2, [])
    store.error = None
    await log_in_batches(db, 1)
    assert await archive_audit(db, CLOCK.now() + 1, store) == 3
    assert len(store.objects) == 2, "the same first row, and one more at the end"


async def test_rows_that_are_not_sealed_stay(db: Database) -> None:
    await write(db, ALICE, 2)
    assert await archive_audit(db, CLOCK.now() + 1, Store()) == 0
    await AuditSealer(db, EventLog(db, CLOCK, IDS), ROOT, CLOCK).seal()
    assert await checked(db, "acme") == (2, [])
