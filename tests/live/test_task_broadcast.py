"""The feed and the broadcast of a task: read once, sent to all, nothing lost or doubled for anybody."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_kit import TASK, LiveKit, Watcher, Writer
from test_live_session import QUICK, run_task

from octollm.clock import SystemClock
from octollm.contracts.api import StepTexts, TaskView
from octollm.contracts.events import Event
from octollm.contracts.stream import Frame, TokenFrame
from octollm.errors import OctoError
from octollm.events import Hint, TaskWatchHub
from octollm.live import FeedReader, LiveSession, TaskBroadcast, TaskFeed, TaskFeeds, parse_resume_position
from octollm.live import broadcast as broadcast_module
from octollm.live import feed as feed_module
from octollm.storage import RedisClient, RedisKeys, TextStream, open_redis
from octollm.testing import wait_until

KEYS = RedisKeys()
CLOCK = SystemClock()


class Source:
    """The task as one caller reads it: counted, and refused or failing on demand."""

    def __init__(self, kit: LiveKit) -> None:
        self.kit = kit
        self.calls: Counter[str] = Counter()
        self.error: OctoError | None = None

    async def view(self) -> TaskView:
        await self._count("view")
        return await self.kit.view()

    async def history(self, after: int, limit: int) -> Sequence[Event]:
        await self._count("history")
        return await self.kit.history(after, limit)

    async def texts(self) -> StepTexts:
        await self._count("texts")
        return await self.kit.texts()

    async def _count(self, call: str) -> None:
        self.calls[call] += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error


class Client:
    """A client that reads by itself until it may join the broadcast, as a WebSocket does."""

    def __init__(self, reader: FeedReader, broadcast: TaskBroadcast, watcher: Watcher) -> None:
        self.reader = reader
        self.pending_bytes = 0
        self.watcher = watcher
        self.joined = 0
        self.is_member = False
        self.ended = asyncio.Event()
        self.error: BaseException | None = None
        self._broadcast = broadcast
        self._sender: asyncio.Task[None] | None = None

    def write(self, payload: bytes) -> None:
        kind = TokenFrame if msgspec.json.decode(payload)["type"] == "token" else Frame
        self.watcher.take(msgspec.json.decode(payload, type=kind))

    def leave(self, session: LiveSession | None, error: BaseException | None) -> None:
        self.is_member, self.pending_bytes, self.error = False, 0, error
        if session is None:
            self.ended.set()
        else:
            self.start(session)

    def start(self, session: LiveSession) -> None:
        self._sender = asyncio.create_task(self._send(session))

    async def stop(self) -> None:
        if self.is_member:
            self._broadcast.remove(self)
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait({self._sender})
            if not self._sender.cancelled():
                self._sender.result()

    async def _send(self, session: LiveSession) -> None:
        hint = Hint(events=True, text=True)
        try:
            while not session.has_ended:
                async for frame in session.poll(hint, self.reader):
                    self.watcher.take(frame)
                if self._broadcast.join(session, self):
                    self.joined += 1
                    self.is_member = True
                    return
                if not session.has_ended:
                    hint = await session.wait(self.reader)
        except OctoError as error:
            self.error = error
        self.ended.set()


@contextlib.asynccontextmanager
async def running_client(
    feeds: TaskFeeds, broadcasts: dict[TaskFeed, TaskBroadcast], source: Source, watcher: Watcher, after: int | None
) -> AsyncIterator[Client]:
    position = parse_resume_position(None if after is None else str(after), watcher.offsets)
    session = LiveSession(TASK, source, feeds.text_source, CLOCK, position=position, timing=QUICK)
    await session.open()
    async with feeds.join(TASK, source) as reader:
        broadcast = broadcasts.setdefault(reader.feed, TaskBroadcast(reader.feed, msgspec.json.encode))
        client = Client(reader, broadcast, watcher)
        client.start(session.fork(reader, reader))
        try:
            yield client
        finally:
            await client.stop()


async def publish(kit: LiveKit, redis: RedisClient, chance: random.Random) -> None:
    """Publish the events as the outbox does; some are lost on the way, and some come twice."""
    published = 0
    while True:
        if published < len(kit.events):
            event = kit.events[published]
            published += 1
            payload = msgspec.json.encode(event) if chance.random() < 0.8 else b"{}"
            for _ in range(chance.choice([1, 1, 1, 2])):
                await redis.publish([(KEYS.watch(TASK), payload)])
        await asyncio.sleep(0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), cuts=st.integers(0, 4))
def test_every_client_gets_every_frame_once(seed: int, cuts: int) -> None:
    chance = random.Random(seed)

    async def play() -> None:
        async with open_redis("memory://live") as redis, TaskWatchHub(redis, KEYS) as hub:
            kit = LiveKit(TextStream(redis, KEYS))
            feeds = TaskFeeds(hub, kit.stream, CLOCK)
            broadcasts: dict[TaskFeed, TaskBroadcast] = {}
            running = asyncio.create_task(run_task(kit, chance))
            publishing = asyncio.create_task(publish(kit, redis, chance))
            while not kit.events:
                await asyncio.sleep(0)

            async def client(mode: str) -> Watcher:
                watcher = Watcher()
                after: int | None = 0 if mode == "whole" else None
                for cut in range(cuts + 1):
                    async with running_client(feeds, broadcasts, Source(kit), watcher, after) as one:
                        if cut == cuts:
                            await one.ended.wait()
                        else:
                            for _ in range(chance.randrange(80)):
                                await asyncio.sleep(0)
                                if chance.random() < 0.05:
                                    one.pending_bytes = broadcast_module.MAX_LAG_BYTES + 1
                    after = watcher.seq
                    assert one.error is None
                return watcher

            async with asyncio.timeout(60):
                watchers = await asyncio.gather(*(client(chance.choice(["whole", "present"])) for _ in range(5)))
                standing = await running
            publishing.cancel()
            for watcher in watchers:
                assert watcher.seq == len(kit.events)
                for step, seen in watcher.completed.items():
                    assert seen.text == standing[step]
            assert len(feeds) == 0
            assert feeds.total_bytes == 0

    asyncio.run(play())


@pytest.fixture
async def redis() -> AsyncIterator[RedisClient]:
    async with open_redis("memory://live") as redis:
        yield redis


@pytest.fixture
async def kit(redis: RedisClient) -> LiveKit:
    kit = LiveKit(TextStream(redis, KEYS))
    kit.emit("task.accepted", goal="a goal", progress=0)
    kit.emit("step.started", step="a", title="a", arm="coder", attempt=1, run=1)
    return kit


@pytest.fixture
async def feeds(redis: RedisClient, kit: LiveKit) -> AsyncIterator[TaskFeeds]:
    async with TaskWatchHub(redis, KEYS, poll_seconds=1e6, quiet_poll_seconds=1e6) as hub:
        yield TaskFeeds(hub, kit.stream, CLOCK)


async def announce(kit: LiveKit, redis: RedisClient) -> None:
    await redis.publish([(KEYS.watch(TASK), msgspec.json.encode(kit.events[-1]))])


async def test_fifty_clients_cost_no_call_for_an_event(feeds: TaskFeeds, kit: LiveKit, redis: RedisClient) -> None:
    source = Source(kit)
    broadcasts: dict[TaskFeed, TaskBroadcast] = {}
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(running_client(feeds, broadcasts, source, Watcher(), 0)) for _ in range(50)
        ]
        await wait_until(lambda: all(client.is_member for client in clients), description="all joined")
        [broadcast] = broadcasts.values()
        assert len(broadcast) == 50
        await wait_until(lambda: feeds.hub.is_listening(TASK), description="Redis has confirmed the channel")
        await wait_until(lambda: source.calls["history"] < 5, description="few reads")
        before = source.calls.copy()
        writer = Writer(kit, "a", 1, 1)
        for number in range(20):
            kit.emit("task.progress", progress=number)
            await announce(kit, redis)
            await writer.write(f"word {number} ")
        await wait_until(
            lambda: all(client.watcher.seq == len(kit.events) for client in clients), description="all have all"
        )
        await wait_until(
            lambda: all(client.watcher.texts["a"].text == writer.text for client in clients), description="all the text"
        )
        assert source.calls == before
        assert all(client.joined == 1 for client in clients)


async def test_an_event_after_a_gap_is_fetched_by_one(feeds: TaskFeeds, kit: LiveKit, redis: RedisClient) -> None:
    source = Source(kit)
    broadcasts: dict[TaskFeed, TaskBroadcast] = {}
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(running_client(feeds, broadcasts, source, Watcher(), 0)) for _ in range(20)
        ]
        await wait_until(lambda: all(client.is_member for client in clients), description="all joined")
        before = source.calls["history"]
        kit.emit("task.progress", progress=1)  # Nobody hears of this one.
        kit.emit("task.progress", progress=2)
        await announce(kit, redis)
        await wait_until(
            lambda: all(client.watcher.seq == len(kit.events) for client in clients), description="all have all"
        )
        assert source.calls["history"] <= before + 2


async def test_who_may_not_read_any_more_leaves_and_the_others_stay(
    feeds: TaskFeeds, kit: LiveKit, redis: RedisClient
) -> None:
    refused, allowed = Source(kit), Source(kit)
    broadcasts: dict[TaskFeed, TaskBroadcast] = {}
    async with contextlib.AsyncExitStack() as stack:
        # Who joined first is asked first.
        first = await stack.enter_async_context(running_client(feeds, broadcasts, refused, Watcher(), 0))
        await wait_until(lambda: first.is_member, description="the first joined")
        second = await stack.enter_async_context(running_client(feeds, broadcasts, allowed, Watcher(), 0))
        await wait_until(lambda: second.is_member, description="the second joined")
        refused.error = OctoError("The key was revoked.", code="api_key_invalid")
        kit.emit("task.progress", progress=1)
        kit.emit("task.progress", progress=2)
        await announce(kit, redis)
        await wait_until(lambda: second.watcher.seq == len(kit.events), description="the other has all")
        assert isinstance(first.error, OctoError)
        assert (first.error.code, first.watcher.seq) == ("api_key_invalid", 2)


async def test_a_failure_of_the_server_is_shared_and_passes(feeds: TaskFeeds, kit: LiveKit, redis: RedisClient) -> None:
    source = Source(kit)
    async with contextlib.AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(feeds.join(TASK, source)) for _ in range(50)]
        source.error = OctoError("The database is away.", code="unavailable")
        results = await asyncio.gather(*(reader.history(0, 10) for reader in readers), return_exceptions=True)
        assert all(isinstance(result, OctoError) and result.code == "unavailable" for result in results)
        assert source.calls["history"] == 1
        source.error = None
        assert [event.version for event in await readers[0].history(0, 10)] == [1, 2]


async def test_what_a_feed_no_longer_has_is_read_from_the_source(
    feeds: TaskFeeds, kit: LiveKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "MAX_EVENTS", 5)
    monkeypatch.setattr(feed_module, "MAX_ENTRIES", 5)
    writer = Writer(kit, "a", 1, 1)
    for number in range(20):
        kit.emit("task.progress", progress=number)
        await writer.write("x")
    source = Source(kit)
    async with feeds.join(TASK, source) as reader:
        await wait_until(lambda: feeds.hub.is_listening(TASK), description="its hint has come")
        newest = await reader.history(len(kit.events) - 3, 10)
        assert [event.version for event in newest] == [20, 21, 22]
        before = source.calls["history"]
        assert len(await reader.history(0, 200)) == 22
        assert source.calls["history"] == before + 1
        assert len(await reader.read(TASK, "0")) == 20


async def test_a_position_beyond_the_end_is_the_sources_to_refuse(feeds: TaskFeeds, kit: LiveKit) -> None:
    source = Source(kit)
    async with feeds.join(TASK, source) as reader:
        await wait_until(lambda: feeds.hub.is_listening(TASK), description="its hint has come")
        await reader.history(0, 10)
        before = source.calls["history"]
        await reader.history(999, 10)
        assert source.calls["history"] == before + 1


async def test_a_client_that_takes_nothing_is_dropped_within_a_burst(
    feeds: TaskFeeds, kit: LiveKit, redis: RedisClient
) -> None:
    broadcasts: dict[TaskFeed, TaskBroadcast] = {}
    async with (
        running_client(feeds, broadcasts, Source(kit), Watcher(), 0) as slow,
        running_client(feeds, broadcasts, Source(kit), Watcher(), 0) as quick,
    ):
        await wait_until(lambda: slow.is_member and quick.is_member, description="both joined")
        slow.pending_bytes = broadcast_module.MAX_BURST_BYTES + 1
        kit.emit("task.progress", progress=1)
        await announce(kit, redis)
        await wait_until(lambda: quick.watcher.seq == 3, description="the quick one has it")
        assert isinstance(slow.error, OctoError)
        assert slow.error.code == "overloaded"


async def test_a_feed_ends_with_its_last_watcher(feeds: TaskFeeds, kit: LiveKit) -> None:
    async with feeds.join(TASK, Source(kit)) as reader:
        # As a broadcast has one, whose last round of frames is not over.
        reader.feed.readers[FeedReader(reader.feed, reader.source)] = None
    assert len(feeds) == 0
