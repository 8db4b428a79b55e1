"""Events that end the process of their handler: given up after a while, and nothing beside them is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import msgspec
import pytest
import structlog
from databases import Backend
from events_kit import CLOCK, IDS, MakePublisher, Write
from events_process import Options, start_process
from hypothesis import given
from hypothesis import strategies as st
from redis_process import RedisProcess
from sqlalchemy import func, select, update

from octollm.contracts.subscriptions import DeadLetter, Poison, SubscriptionSpec
from octollm.events import (
    DeliveryPolicy,
    DurableSubscriptions,
    EventDraft,
    EventLog,
    LogTail,
    QueuedDelivery,
    SubscriptionStore,
    task_subject,
)
from octollm.events.suspects import ENDED_REASON, Isolation, claim_suspects, encode_suspects, settle_suspects
from octollm.storage import Database, RedisKeys, open_database, open_redis
from octollm.storage.migrations import migrate
from octollm.storage.tables import subscription_consumers, subscription_partitions
from octollm.testing import wait_until

NAME = "billing"
FAST = DeliveryPolicy(lease=2.0, renew=0.05, poll=0.05)
FAST_SPEC = SubscriptionSpec(("events:task:*",), max_attempts=3, retry_first=0.01, retry_limit=0.02)
REPLICAS = ("a", "b")
SUBJECTS = 12
PLAIN: Mapping[str, object] = {}

deaths = st.dictionaries(st.integers(1, 50), st.integers(0, 5), max_size=5)


@given(deaths, st.sets(st.integers(1, 50)), st.integers(1, 9), st.integers(1, 9))
def test_only_what_was_in_hand_at_a_death_is_counted(
    found: dict[int, int], in_hand: set[int], fence: int, last: int
) -> None:
    stored = encode_suspects(found, in_hand, fence)
    assert (claim_suspects(stored, last, ended=False) or {}) == found
    counted = claim_suspects(stored, last, ended=True)
    assert counted == {seq: count + (seq in in_hand and fence == last) for seq, count in found.items()}


def test_a_partition_needs_no_care_after_its_consumer_left() -> None:
    assert claim_suspects(None, 1, ended=False) is None
    assert claim_suspects(None, 1, ended=True) == {}


@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_a_suspect_is_in_hand_alone(steps: list[tuple[bool, bool]]) -> None:
    isolation, held = Isolation(), list[bool]()
    for begin, suspect in steps:
        if begin and isolation.enter(suspect=suspect):
            held.append(suspect)
        elif not begin and held:
            isolation.leave(suspect=held.pop(0))
        assert True not in held or len(held) == 1
    while held:
        isolation.leave(suspect=held.pop())
    assert isolation.enter(suspect=True)


@given(deaths, st.sets(st.integers(1, 50)), st.sets(st.integers(1, 50)), st.integers(0, 50))
def test_careful_mode_of_polls_ends_when_nothing_of_it_is_left(
    known: dict[int, int], in_hand: set[int], answered: set[int], position: int
) -> None:
    entries = {**dict.fromkeys(in_hand, 0), **known}
    stored = settle_suspects(encode_suspects(entries, in_hand, 7), answered, position)
    left = {} if stored is None else json.loads(stored)
    kept = {seq for seq in entries if seq not in answered and (seq > position or seq in in_hand or entries[seq])}
    assert {int(seq) for seq in left} == kept
    assert stored is None or left


class Polls:
    """A consumer over HTTP that ends whenever an event of ``deadly`` is in hand; its lease is over then."""

    def __init__(self, db: Database, durable: DurableSubscriptions, deadly: set[int], *, one_name: bool) -> None:
        self._db = db
        self._durable = durable
        self._deadly = deadly
        self._one_name = one_name
        self.died = 0
        self.handled: list[int] = []

    async def run(self) -> None:
        """Poll until there is nothing left, and start again after each death."""
        row = await self._durable.subscriptions.find("system", NAME)
        empty = 0
        # A poll that gives an event up may have nothing else.
        while empty < 2:
            name = "worker" if self._one_name else f"worker-{self.died}"
            found = await self._durable.pull.poll(row["id"], name, 100)
            empty = 0 if found else empty + 1
            # In groups, as a consumer may report: those before the one that ends it are not acknowledged either.
            if any(delivery.event.seq in self._deadly for delivery in found):
                self.died += 1
                assert self.died < 20
                async with self._db.transaction() as tx:
                    await tx.execute(update(subscription_consumers).values(lease_until=0.0))
                continue
            self.handled += [delivery.event.seq for delivery in found]
            await self._durable.pull.acknowledge(row, name, [delivery.ack_id for delivery in found], [])


@pytest.mark.parametrize("one_name", [True, False])
@pytest.mark.parametrize("on_poison", ["dead_letter", "hold"])
async def test_an_event_whose_polling_consumer_always_ends_is_given_up(
    db: Database, log: EventLog, make_publisher: MakePublisher, write: Write, on_poison: Poison, one_name: bool
) -> None:
    spec = SubscriptionSpec(("events:task:*",), max_attempts=2, on_poison=on_poison)
    async with open_redis("memory://") as redis, make_publisher(redis) as publisher:
        for number in range(12):
            await write(task_id=f"task-{number % 3}")
        assert await publisher.flush(20)
        durable = DurableSubscriptions.build(db, log, LogTail(redis, RedisKeys()), CLOCK, IDS, structlog.get_logger())
        await durable.subscriptions.put("system", NAME, spec, event_tenant=None, start="earliest")
        polls = Polls(db, durable, {4}, one_name=one_name)
        await polls.run()
        letters = await durable.subscriptions.list_dead_letters("system")
    # Once unnoticed, once beside others, once alone.
    assert polls.died == 3
    state, after = ("dead", {7, 10}) if on_poison == "dead_letter" else ("held", set[int]())
    assert [(each.event.seq, each.state, each.reason, each.attempts) for each in letters] == [
        (4, state, ENDED_REASON, 2)
    ]
    assert sorted(polls.handled) == sorted({1, 2, 3, 5, 6, 8, 9, 11, 12} | after)
    for subject in range(3):
        own = [seq for seq in polls.handled if seq % 3 == subject]
        assert own == sorted(own)
    # Careful mode is over.
    async with db.read() as connection:
        assert not await connection.scalar(select(func.count()).where(subscription_partitions.c.suspects.is_not(None)))


@pytest.fixture
async def durable(db: Database, log: EventLog, make_publisher: MakePublisher) -> AsyncIterator[DurableSubscriptions]:
    async with open_redis("memory://") as redis, make_publisher(redis), LogTail(redis, RedisKeys(), log) as tail:
        yield DurableSubscriptions.build(db, log, tail, CLOCK, IDS, structlog.get_logger())


async def wait_for_letter(durable: DurableSubscriptions) -> DeadLetter:
    found: list[DeadLetter] = []

    async def is_there() -> bool:
        found[:] = await durable.subscriptions.list_dead_letters("system")
        return bool(found)

    await wait_until(is_there, description="a dead letter", timeout=20)
    (letter,) = found
    return letter


@pytest.mark.parametrize("on_poison", ["dead_letter", "hold"])
async def test_a_poison_event_of_a_delayed_subject_is_given_up(
    durable: DurableSubscriptions, write: Write, on_poison: Poison
) -> None:
    spec = msgspec.structs.replace(FAST_SPEC, on_poison=on_poison)
    tried: list[int] = []

    async def handle(delivery: QueuedDelivery) -> None:
        event = delivery.event
        tried.append(event.seq)
        # The first one fails once: its subject is delayed, and its later events are no longer the cursor's.
        if (event.seq == 1 and tried.count(1) == 1) or (event.seq == 2 and not mended):
            raise ValueError(event.seq)

    mended = False
    for _ in range(3):
        await write(task_id="task-a")
    await write(task_id="task-b")
    async with durable.open(NAME, spec, start="earliest", policy=FAST) as events:
        runner = asyncio.create_task(events.run(handle))
        letter = await wait_for_letter(durable)
        assert (letter.event.seq, letter.attempts, letter.reason) == (2, 3, "ValueError")
        if on_poison == "hold":
            assert letter.state == "held"
            await wait_until(lambda: 4 in tried, description="the other subject goes on")
            assert 3 not in tried
            mended = True
            await durable.subscriptions.retry_dead_letter("system", letter.id)
        await wait_until(lambda: 3 in tried, description="the subject goes on", timeout=20)
        runner.cancel()
        await asyncio.wait({runner})
    expected = [1, 1, 2, 2, 2, 3] if on_poison == "dead_letter" else [1, 1, 2, 2, 2, 2, 3]
    assert [seq for seq in tried if seq != 4] == expected


async def test_with_hold_an_event_that_ends_its_consumers_stops_its_subject_only(
    durable: DurableSubscriptions, db: Database, write: Write
) -> None:
    spec = msgspec.structs.replace(FAST_SPEC, max_attempts=2, on_poison="hold")
    deadly, handled, died = asyncio.Event(), [], 0

    async def handle(delivery: QueuedDelivery) -> None:
        if delivery.event.seq == 2:
            deadly.set()
            await asyncio.Event().wait()
        handled.append(delivery.event.seq)

    for task in ("task-a", "task-b", "task-b", "task-a"):
        await write(task_id=task)
    while not await durable.subscriptions.list_dead_letters("system"):
        consumer = replace(durable, isolation=Isolation()).open(NAME, spec, start="earliest", policy=FAST)
        await consumer.__aenter__()
        runner = asyncio.create_task(consumer.run(handle))
        if died < 3:
            async with asyncio.timeout(20):
                await deadly.wait()
            deadly.clear()
            died += 1
        else:
            letter = await wait_for_letter(durable)
        # As a process that ends: it saves nothing, and does not leave.
        runner.cancel()
        for loop in consumer._loops:
            await loop.aclose()
        async with db.transaction() as tx:
            await tx.execute(update(subscription_consumers).values(lease_until=0.0))
    assert (letter.event.seq, letter.state, letter.reason, letter.attempts) == (2, "held", ENDED_REASON, 2)
    async with durable.open(NAME, spec, policy=FAST) as events:
        runner = asyncio.create_task(events.run(handle))
        await wait_until(lambda: {1, 4} <= set(handled), description="the other subject goes on", timeout=20)
        assert 3 not in handled
        await durable.subscriptions.drop_dead_letter("system", letter.id)
        await wait_until(lambda: 3 in handled, description="the subject goes on", timeout=20)
        runner.cancel()
        await asyncio.wait({runner})
    assert not deadly.is_set()


@pytest.fixture
async def shared_url(backend: Backend, tmp_path: Path) -> AsyncIterator[str]:
    """A database that several processes open."""
    url = backend.url("octollm_orchestrator")
    url = f"sqlite:///{tmp_path}/orchestrator.db" if url == "memory://" else url
    async with open_database(url, clock=CLOCK) as db:
        await migrate(db, "orchestrator")
    yield url


class Replicas:
    """Processes that have the subscription; one that died is started again, as a supervisor does."""

    def __init__(self, url: str, redis: str, folder: Path) -> None:
        self._options = Options(role="host", database=url, redis=redis, durable=(NAME,), lease=2.0)
        self._folder = folder
        self._running: dict[str, ForkServerProcess] = {}
        self.codes: list[int] = []

    def start(self, name: str) -> None:
        options = msgspec.structs.replace(self._options, file=str(self._folder / f"{name}.jsonl"))
        self._running[name] = start_process(options, self._folder / f"{name}.err")

    def restart_dead(self) -> None:
        for name, process in list(self._running.items()):
            if (code := process.exitcode) is not None:
                self.codes.append(code)
                self.start(name)

    def handled(self) -> list[int]:
        """Return the positions of the handled events, each as often as it was handled."""
        files = self._folder.glob("*.jsonl")
        return [json.loads(line)[2] for file in files for line in file.read_text().splitlines()]

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
            process.join()


async def write_marked(db: Database, *marks: Mapping[str, object]) -> list[int]:
    """Write events, each of a subject of its own, and return their positions once they have them."""
    log = EventLog(db, CLOCK, IDS)
    drafts = [
        EventDraft(
            "task.progress",
            subject=task_subject(f"task-{number % SUBJECTS}"),
            tenant="t",
            source="orchestrator",
            data={"task_id": f"task-{number % SUBJECTS}", "progress": 1, **mark},
        )
        for number, mark in enumerate(marks)
    ]
    async with db.transaction() as tx:
        ids = {event.id for event in await log.append_all(tx, drafts)}
    found: list[int] = []

    async def numbered() -> bool:
        found[:] = [event.seq for event in await log.read(0, tenant="t") if event.id in ids]
        return len(found) == len(ids)

    await wait_until(numbered, description="positions", timeout=30)
    return found


@pytest.mark.redis
@pytest.mark.timeout(180)
async def test_an_event_that_ends_its_process_becomes_a_dead_letter_and_no_other_does(
    shared_url: str, backend: Backend, redis_process: RedisProcess, tmp_path: Path
) -> None:
    replicas = Replicas(shared_url, redis_process.url, tmp_path)
    async with open_database(shared_url, clock=CLOCK) as db:
        store = SubscriptionStore(db, CLOCK, IDS)
        letters: list[DeadLetter] = []

        async def caught_up() -> bool:
            replicas.restart_dead()
            views = await store.list_views("system")
            letters[:] = await store.list_dead_letters("system")
            return bool(views) and views[0].lag.positions == 0 and views[0].lag.delayed == 0

        with contextlib.closing(replicas):
            for name in REPLICAS:
                replicas.start(name)
            before = await write_marked(db, *[PLAIN] * 40)
            await wait_until(caught_up, description="the events before are handled", timeout=60)
            assert (sorted(replicas.handled()), replicas.codes, letters) == (before, [], [])
            # Each twelfth event is of the same subject: some follow the one that ends the process.
            how, code = ("exit", 3) if backend.base is None else ("kill", -signal.SIGKILL)
            after = await write_marked(db, {"deadly": how}, *[{"slow": True}] * 4, *[PLAIN] * 55)
            await wait_until(caught_up, description="the event is given up", timeout=150)
    assert [(letter.event.seq, letter.reason, letter.attempts) for letter in letters] == [(after[0], ENDED_REASON, 2)]
    # Once unnoticed, once beside others, once alone.
    assert replicas.codes == [code] * 3
    handled = replicas.handled()
    assert set(handled) == {*before, *after[1:]}
    # Those before were acknowledged long ago.
    assert sorted(seq for seq in handled if seq in before) == before
