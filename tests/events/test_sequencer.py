from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from events_kit import IDS, Write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from octollm.contracts.events import channel_of
from octollm.errors import OctoError
from octollm.events import EventLog, task_subject
from octollm.events.sequencer import Sequencer
from octollm.storage.engines import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import relay_state
from octollm.testing.clock import ManualClock


async def test_one_holds_until_its_lease_ends_and_a_fence_shuts_it_out() -> None:
    clock = ManualClock()
    async with open_database("memory://", clock=clock) as db:
        await migrate(db, "orchestrator")
        one = Sequencer(db, holder="one", lease_seconds=5)
        two = Sequencer(db, holder="two", lease_seconds=5)
        first = await one.acquire()
        assert first is not None
        assert await two.acquire() is None
        clock.time += 4
        await one.assign(first.fence, 10)
        clock.time += 4
        assert await two.acquire() is None, "numbering renewed the lease"
        clock.time += 2
        second = await two.acquire()
        assert second is not None
        assert second.fence > first.fence
        for call in (one.assign(first.fence, 10), one.mark_published(first.fence, 1)):
            with pytest.raises(OctoError) as caught:
                await call
            assert caught.value.code == "fence_lost"
        await one.release(first.fence, 0)
        assert await one.acquire() is None, "an old holder cannot release another's lease"
        await two.release(second.fence, 0)
        assert await one.acquire() is not None


async def test_only_one_of_many_gets_the_claim(db: Database) -> None:
    claims = await asyncio.gather(*(Sequencer(db, holder=str(n), lease_seconds=60).acquire() for n in range(8)))
    assert len([claim for claim in claims if claim is not None]) == 1


async def test_the_cursor_never_goes_back(db: Database, write: Write) -> None:
    sequencer = Sequencer(db, holder="x", lease_seconds=60)
    lease = await sequencer.acquire()
    assert lease is not None
    await sequencer.mark_published(lease.fence, 5)
    await sequencer.mark_published(lease.fence, 3)
    async with db.read() as connection:
        assert await connection.scalar(select(relay_state.c.published)) == 5
    await sequencer.release(lease.fence, 7)
    again = await sequencer.acquire()
    assert again is not None
    assert again.last_published == 7


TYPES = ("task.accepted", "task.progress", "task.completed", "step.started")
DATA = {
    "task_id": "x",
    "goal": "",
    "progress": 0,
    "status": "",
    "duration_ms": 0,
    "step": "",
    "arm": "",
    "attempt": 0,
}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    writers=st.lists(
        st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 2), st.booleans()), max_size=6),
        min_size=1,
        max_size=5,
    ),
    batch=st.integers(1, 7),
)
async def test_positions_and_versions_have_no_gap_whoever_writes(
    writers: list[list[tuple[str, int, bool]]], batch: int
) -> None:
    """Several writers, some of whose transactions fail, beside a sequencer that assigns numbers in small batches."""
    clock = ManualClock()
    async with open_database("memory://", clock=clock) as db:
        await migrate(db, "orchestrator")
        log = EventLog(db, clock, IDS)
        sequencer = Sequencer(db, holder="x", lease_seconds=60)
        lease = await sequencer.acquire()
        assert lease is not None

        async def write(transactions: list[tuple[str, int, bool]]) -> int:
            kept = 0
            for event_type, task, fails in transactions:
                try:
                    async with db.transaction() as tx:
                        await log.append(
                            tx,
                            event_type,
                            subject=task_subject(str(task)),
                            tenant="t",
                            source="o",
                            data=dict(DATA),
                        )
                        if fails:
                            raise ZeroDivisionError
                    kept += 1
                except ZeroDivisionError:
                    pass
                await asyncio.sleep(0)
            return kept

        async def number(times: int) -> None:
            for _ in range(times):
                await sequencer.assign(lease.fence, batch)
                await asyncio.sleep(0)

        *counts, _ = await asyncio.gather(*(write(part) for part in writers), number(10))
        while (await sequencer.assign(lease.fence, batch))[0]:
            pass
        events = await log.read(0, tenant=None)

    total = sum(count for count in counts if count)
    assert [event.seq for event in events] == list(range(1, total + 1))
    by_subject: dict[str, list[int]] = {}
    by_channel: dict[str, list[tuple[int, int]]] = {}
    for event in events:
        by_subject.setdefault(event.subject, []).append(event.version)
        by_channel.setdefault(channel_of(event.event_type), []).append((event.prev, event.seq))
    for versions in by_subject.values():
        assert versions == list(range(1, len(versions) + 1)), "a subject's events are in order in the log"
    for chain in by_channel.values():
        assert chain[0][0] == 0
        assert all(later[0] == earlier[1] for earlier, later in pairwise(chain))
