"""Revocations in SQL: every replica knows them within a moment, tells its listeners, and forgets none by a restart."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import msgspec
import pytest
from databases import Backend
from sqlalchemy import select, update

from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.auth import RevocationUpdate
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.services.orchestrator import revocation as revocation_module
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import revocations
from octollm.testing import wait_until

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)


@dataclass
class Pair:
    db: Database
    one: RevocationStore
    two: RevocationStore

    async def revoke(self, value: str, kind: str = "task", tenant: str = "acme") -> None:
        async with self.db.transaction() as tx:
            await self.one.add(tx, kind, value, tenant)  # type: ignore[arg-type]


@pytest.fixture
async def pair(backend: Backend) -> AsyncGenerator[Pair]:
    async with open_database(backend.url("octollm_orchestrator"), clock=CLOCK) as db:
        await migrate(db, "orchestrator")
        log = EventLog(db, CLOCK, IDS)
        one, two = RevocationStore(db, log, CLOCK), RevocationStore(db, log, CLOCK)
        await one.load()
        await two.load()
        yield Pair(db, one, two)


class Listener:
    """A service that follows; ``received`` holds all revocations so far."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self.received: list[tuple[str, str, str]] = []
        self.lines: list[RevocationUpdate] = []
        self.ended = False
        self._stream = stream
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for line in self._stream:
            news = msgspec.json.decode(line, type=RevocationUpdate)
            self.lines.append(news)
            self.received += [(view.tenant, view.kind, view.value) for view in news.revocations]
        self.ended = True

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


@contextlib.asynccontextmanager
async def listening(revoking: RevocationStore, draining: asyncio.Event | None = None) -> AsyncGenerator[Listener]:
    listener = Listener(revoking.stream(draining or asyncio.Event()))
    try:
        yield listener
    finally:
        await listener.close()


async def test_a_listener_is_told_what_is_in_force_and_then_each(pair: Pair) -> None:
    for number in range(1200):
        pair.one.revocations.add("task", f"t{number}", CLOCK.now(), "acme")
    async with listening(pair.one) as listener:
        await wait_until(lambda: listener.lines and listener.lines[-1].whole, description="all are told")
        assert [len(line.revocations) for line in listener.lines] == [500, 500, 200, 0]
        await pair.revoke("fresh")
        await wait_until(
            lambda: ("acme", "task", "fresh") in listener.received, description="the new one is told", timeout=1
        )


async def test_another_replica_knows_within_a_moment(pair: Pair) -> None:
    async with pair.two.poll_loop, listening(pair.two) as listener:
        await pair.revoke("t1")
        await wait_until(lambda: ("acme", "task", "t1") in listener.received, description="it is told", timeout=1)
        assert len(pair.two.revocations) == 1


async def test_a_transaction_that_commits_late_is_not_overlooked(pair: Pair, backend: Backend) -> None:
    if backend.base is None:
        return  # SQLite has one writer at a time
    async with pair.two.poll_loop:
        async with pair.db.transaction() as late:
            await pair.one.add(late, "task", "late", "acme")
            other = asyncio.create_task(pair.revoke("soon"))
            await other
            await wait_until(lambda: len(pair.two.revocations) == 1, description="what was committed first is known")
        await wait_until(lambda: len(pair.two.revocations) == 2, description="the one with the lower position is, too")


async def test_what_is_rolled_back_is_not_revoked(pair: Pair) -> None:
    with pytest.raises(RuntimeError):
        async with pair.db.transaction() as tx:
            await pair.one.add(tx, "task", "t1", "acme")
            raise RuntimeError("something else failed")
    assert len(pair.one.revocations) == 0


async def test_a_restart_reads_all_that_still_matters(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation_module, "PAGE_SIZE", 3)
    for number in range(10):
        await pair.revoke(f"t{number}")
    async with pair.db.transaction() as tx:
        await tx.execute(update(revocations).where(revocations.c.value == "t0").values(until=1.0))
    fresh = RevocationStore(pair.db, EventLog(pair.db, CLOCK, IDS), CLOCK)
    await fresh.load()
    assert sorted(value for _kind, value, _at, _tenant in fresh.revocations.entries()) == [
        f"t{n}" for n in range(1, 10)
    ]
    assert len(fresh.list().revocations) == 9
    # What has run out goes with the next one.
    await pair.revoke("last")
    async with pair.db.read() as conn:
        assert await conn.scalar(select(revocations.c.position).where(revocations.c.value == "t0")) is None


async def test_a_slow_listener_is_cut_off_and_begins_again_with_all(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocation_module, "MAX_QUEUED", 3)
    stream = pair.one.stream(asyncio.Event())
    assert msgspec.json.decode(await anext(stream), type=RevocationUpdate).whole
    for number in range(5):
        await pair.revoke(f"t{number}")
    assert [line async for line in stream] == [], "the stream ends"
    async with listening(pair.one) as listener:
        await wait_until(lambda: len(listener.received) == 5, description="all are told")


async def test_revocations_without_a_pause_do_not_hold_heartbeats_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without one, each service would take its list for out of date after a minute, and refuse what is not read-only.
    monkeypatch.setattr(revocation_module, "HEARTBEAT_SECONDS", 0.05)
    async with pair.one.poll_loop, asyncio.timeout(10):
        stream = pair.one.stream(asyncio.Event())
        assert msgspec.json.decode(await anext(stream), type=RevocationUpdate).whole
        line = RevocationUpdate(whole=True)
        told = 0
        while line != RevocationUpdate():
            await pair.revoke(f"t{told}")
            line = msgspec.json.decode(await anext(stream), type=RevocationUpdate)
            told += len(line.revocations)
        assert told > 0
        await stream.aclose()


async def test_a_listener_is_let_go_when_the_service_shuts_down(pair: Pair) -> None:
    draining = asyncio.Event()
    async with listening(pair.one, draining) as listener:
        await wait_until(lambda: listener.lines, description="it listens")
        draining.set()
        await wait_until(lambda: listener.ended, description="the stream ends", timeout=1)


async def test_while_the_database_cannot_be_read_nobody_is_told_that_nothing_is_new(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocation_module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(revocation_module, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(revocation_module, "POLL_SECONDS", 0.05)
    async with pair.one.poll_loop, listening(pair.one) as listener:
        await wait_until(lambda: len(listener.lines) > 5, description="it is told that nothing is new")

        @contextlib.asynccontextmanager
        async def lost() -> AsyncGenerator[None]:
            raise OctoError("The database is away.", code="unavailable")
            yield

        monkeypatch.setattr(pair.db, "read", lost)
        await wait_until(lambda: pair.one.poll_loop.failure, description="the loss is noticed")
        assert not (await pair.one.poll_loop.check_health()).ok

        async def silent() -> bool:
            before = len(listener.lines)
            await asyncio.sleep(0.1)
            return len(listener.lines) == before

        await wait_until(silent, description="the listener is told nothing")
        monkeypatch.undo()
        await wait_until(lambda: not pair.one.poll_loop.failure, description="the database is back")
