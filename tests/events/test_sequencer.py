from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from events_kit import IDS, Write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from octollm.contracts.events import EVENT_CATALOGUE, Event, channel_of
from octollm.errors import OctoError
from octollm.events import EventDraft, EventLog, task_subject
from octollm.events.sequencer import Sequencer
from octollm.storage.engines import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import relay_state
from octollm.testing import ManualClock


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


async def test_a_lease_of_the_dead_does_not_last_until_a_clock_that_was_set_back_is_there_again() -> None:
    clock = ManualClock()
    async with open_database("memory://", clock=clock) as db:
        await migrate(db, "orchestrator")
        dead, heir = (Sequencer(db, holder=holder, lease_seconds=5) for holder in ("dead", "heir"))
        lease = await dead.acquire()
        assert lease is not None
        clock.time -= 3600
        taken = await heir.acquire()
        assert taken is not None
        assert taken.fence > lease.fence


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
                            data=dict(EVENT_CATALOGUE[event_type].example),
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


async def test_an_open_transaction_delays_its_own_events_only(db: Database, log: EventLog, write: Write) -> None:
    if db.dialect == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    sequencer = Sequencer(db, holder="x", lease_seconds=60)
    lease = await sequencer.acquire()
    assert lease is not None
    written, finish = asyncio.Event(), asyncio.Event()

    async def write_slowly() -> None:
        async with db.transaction() as tx:
            await log.append_all(tx, [draft("slow")])
            written.set()
            await finish.wait()

    slow = asyncio.create_task(write_slowly())
    await written.wait()
    try:
        quick = [await write(task_id="quick") for _ in range(2)]
        for expected in quick:
            batch, _last = await sequencer.assign(lease.fence, 1)
            assert [event.id for event in batch] == [expected.id]
        assert await log.read(0, tenant=None) == await log.read(0, tenant="t")
        seen = await log.read(0, tenant=None)
    finally:
        finish.set()
        await slow
    batch, last = await sequencer.assign(lease.fence, 10)
    assert [(event.subject, event.seq) for event in batch] == [("task/slow", 3)]
    assert last == 3
    assert [event.id for event in await log.read(0, tenant=None)] == [event.id for event in [*seen, *batch]]


async def test_no_number_is_given_twice_or_left_out_by_two_statements_under_one_fence(
    db: Database, log: EventLog
) -> None:
    """A statement whose connection was lost may still run when its holder tries again."""
    sequencers = [Sequencer(db, holder="x", lease_seconds=60) for _ in range(3)]
    lease = await sequencers[0].acquire()
    assert lease is not None
    given: list[Event] = []

    async def write(writer: int) -> None:
        for _ in range(6):
            async with db.transaction() as tx:
                types = ("task.progress", "task.accepted", "task.progress")
                await log.append_all(tx, [draft(f"{writer}", event_type=name) for name in types])

    async def number(sequencer: Sequencer) -> None:
        for _ in range(12):
            batch, last = await sequencer.assign(lease.fence, 5)
            given.extend(batch)
            assert not batch or last == batch[-1].seq

    await asyncio.gather(*(write(writer) for writer in range(4)), *(number(one) for one in sequencers))
    while batch := (await sequencers[0].assign(lease.fence, 50))[0]:
        given.extend(batch)
    events = await log.read(0, tenant=None)
    assert [event.seq for event in events] == list(range(1, 4 * 6 * 3 + 1))
    assert sorted(given, key=lambda event: event.seq) == events, "each is returned once, as it is stored"
    for channel in {channel_of(event.event_type) for event in events}:
        chain = [(event.prev, event.seq) for event in events if channel_of(event.event_type) == channel]
        assert [previous for previous, _ in chain] == [0, *(seq for _, seq in chain[:-1])]
    for writer in range(4):
        assert [e.version for e in events if e.subject == task_subject(str(writer))] == list(range(1, 19))


def draft(task_id: str, *, event_type: str = "task.progress") -> EventDraft:
    return EventDraft(event_type, task_subject(task_id), "t", "o", dict(EVENT_CATALOGUE[event_type].example))
