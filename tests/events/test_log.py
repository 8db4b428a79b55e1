from __future__ import annotations

import asyncio

import pytest
from events_kit import CLOCK, IDS, Write
from sqlalchemy import select

from octollm.contracts.events import MAX_EVENT_BYTES
from octollm.errors import OctoError
from octollm.events import EventDraft, EventLog, task_subject
from octollm.events.rows import event_from_row
from octollm.events.sequencer import Sequencer
from octollm.storage.engines import Database
from octollm.storage.tables.tasks import events as event_rows


async def number_all(db: Database) -> None:
    sequencer = Sequencer(db, holder="test", lease_seconds=60)
    lease = await sequencer.acquire()
    assert lease is not None

    await sequencer.assign(lease.fence, 100)
    async with db.read() as snapshot:
        assert not await snapshot.all(select(event_rows.c.row_id).where(event_rows.c.seq.is_(None)))
    await sequencer.release(lease.fence, 0)


async def test_an_event_is_seen_under_its_subject_as_soon_as_it_is_committed(
    db: Database, log: EventLog, write: Write
) -> None:
    written = [await write("task.accepted"), await write(), await write(task_id="task-2")]
    assert [event.version for event in written] == [1, 2, 1]
    assert await log.read_subject(task_subject("task-1"), tenant="t") == written[:2]
    assert await log.read_subject(task_subject("task-1"), 1, tenant="t") == written[1:2]
    assert await log.read_subject(task_subject("task-1"), 0, 1, tenant="t") == written[:1]
    assert await log.read(0, tenant=None) == []


async def test_the_log_is_read_by_position(db: Database, log: EventLog, write: Write) -> None:
    await write("task.accepted")
    await write("task.progress")
    await write("task.accepted", "task-2")
    await number_all(db)
    events = await log.read(0, tenant="t")
    assert [(event.seq, event.prev, event.event_type) for event in events] == [
        (1, 0, "task.accepted"),
        (2, 0, "task.progress"),
        (3, 1, "task.accepted"),
    ]
    assert await log.read(1, 1, tenant="t") == events[1:2]
    assert await log.read(0, tenant="t", subject=task_subject("task-2")) == events[2:]
    assert await log.read(0, tenant="t", types=["task.progress"]) == events[1:2]
    assert await log.read(0, tenant=None) == events
    assert await log.read(0, tenant="other") == []
    assert await log.read_subject(task_subject("task-1"), tenant="other") == []


async def test_a_rolled_back_event_leaves_no_gap(db: Database, log: EventLog, write: Write) -> None:
    await write()
    with pytest.raises(ZeroDivisionError):
        async with db.transaction() as tx:
            await log.append(
                tx,
                "task.started",
                subject=task_subject("task-1"),
                tenant="t",
                source="orchestrator",
                data={"task_id": "task-1"},
            )
            raise ZeroDivisionError
    assert (await write()).version == 2


async def test_concurrent_writers_leave_no_gap(db: Database, log: EventLog, write: Write) -> None:
    await asyncio.gather(*(write(task_id=f"task-{n % 3}") for n in range(60)))
    for number in range(3):
        events = await log.read_subject(task_subject(f"task-{number}"), tenant="t")
        assert [event.version for event in events] == list(range(1, 21))


@pytest.mark.parametrize(
    ("event_type", "data", "words"),
    [
        ("task.invented", {"task_id": "x"}, "not declared"),
        ("task.progress", {"task_id": "x"}, "lacks progress"),
        ("cache.invalidated", {"key": "x"}, "not durable"),
        ("task.progress", {"task_id": "x", "progress": "much"}, "at /data/progress: Expected `float`, got `str`"),
        ("task.progress", {"task_id": "x", "progress": object()}, "not JSON"),
        ("task.progress", {"task_id": "x", "progress": "x" * MAX_EVENT_BYTES}, "bytes"),
    ],
)
async def test_what_the_catalogue_does_not_allow_is_refused(
    db: Database, log: EventLog, event_type: str, data: dict[str, object], words: str
) -> None:
    with pytest.raises(OctoError, match=words) as caught:
        async with db.transaction() as tx:
            await log.append(tx, event_type, subject="task/x", tenant="t", source="orchestrator", data=data)
    assert caught.value.code == "invalid_body"
    assert await log.read_subject("task/x", tenant="t") == []


async def test_members_that_are_not_declared_are_kept(log: EventLog, write: Write) -> None:
    written = await write("task.progress", progress=1, from_the_future={"a": [1]})
    [stored] = await log.read_subject(task_subject("task-1"), tenant="t")
    assert stored == written
    assert stored.data["from_the_future"] == {"a": [1]}


async def test_an_event_of_another_service_is_written_once(db: Database, log: EventLog) -> None:
    async def post(tenant: str = "t") -> int:
        async with db.transaction() as tx:
            event = await log.append(
                tx,
                "system.started",
                subject="service/memory",
                tenant=tenant,
                source="memory",
                data={"service": "memory"},
                event_id="abc",
                timestamp="2025-11-10T10:30:00Z",
            )
            assert (event.id, event.timestamp) == ("abc", "2025-11-10T10:30:00Z")
            return event.version

    assert [await post(), await post()] == [1, 1]
    assert len(await log.read_subject("service/memory", tenant="t")) == 1
    with pytest.raises(OctoError) as caught:
        await post("other")
    assert caught.value.code == "state_conflict"


async def test_listeners_hear_of_a_commit_and_not_of_a_rollback(db: Database, write: Write) -> None:
    log = EventLog(db, CLOCK, IDS)
    heard: list[int] = []
    end = log.on_commit(lambda: heard.append(1))

    async def append(*, fail: bool) -> None:
        async with db.transaction() as tx:
            for _ in range(2):
                await log.append(tx, "task.started", subject="task/x", tenant="t", source="o", data={"task_id": "x"})
            if fail:
                raise ZeroDivisionError

    await append(fail=False)
    assert heard == [1]
    with pytest.raises(ZeroDivisionError):
        await append(fail=True)
    assert heard == [1]
    end()
    await append(fail=False)
    assert heard == [1]


async def test_a_read_may_be_part_of_a_transaction(db: Database, log: EventLog) -> None:
    async with db.transaction() as tx:
        await log.append(tx, "task.started", subject="task/x", tenant="t", source="o", data={"task_id": "x"})
        assert len(await log.read_subject("task/x", tenant="t", connection=tx)) == 1
        assert await log.read_subject("task/x", tenant="t") == []


async def test_several_events_are_written_at_once_in_their_order(db: Database, log: EventLog, write: Write) -> None:
    await write(task_id="b")
    data: dict[str, object] = {
        "task_id": "x",
        "progress": 1,
        "text": 'quote " and \\ and ü',
        "more": {"list": [1, None]},
    }
    drafts = [
        EventDraft("task.progress", task_subject(name), "t", "orchestrator", data | {"place": place}, f"c{place}")
        for place, name in enumerate(["b", "a", "b", "a", "c"])
    ]
    async with db.transaction() as tx:
        written = await log.append_all(tx, drafts)
        assert await log.append_all(tx, []) == []
    assert [event.version for event in written] == [2, 1, 3, 2, 1]
    assert [(event.data, event.correlation_id) for event in written] == [(d.data, d.correlation_id) for d in drafts]
    async with db.read() as connection:
        rows = await connection.all(select(event_rows).order_by(event_rows.c.row_id))
    assert [event_from_row(row) for row in rows[1:]] == written
    assert (await write(task_id="a")).version == 3


async def test_one_event_that_is_refused_refuses_all(db: Database, log: EventLog) -> None:
    good = EventDraft("task.progress", task_subject("a"), "t", "o", {"task_id": "a", "progress": 1})
    bad = EventDraft("task.progress", task_subject("a"), "t", "o", {"task_id": "a"})
    with pytest.raises(OctoError) as caught:
        async with db.transaction() as tx:
            await log.append_all(tx, [good, bad])
    assert caught.value.code == "invalid_body"
    assert await log.read_subject(task_subject("a"), tenant="t") == []
