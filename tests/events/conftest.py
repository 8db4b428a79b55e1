from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis as redis_py
from databases import Backend
from events_kit import CLOCK, IDS, QUICK, MakePublisher, Write
from redis_process import RedisProcess

from octollm.contracts.events import Event
from octollm.events import EventBus, EventLog, OutboxPolicy, OutboxPublisher, task_subject
from octollm.storage import Database, open_database
from octollm.storage.keys import RedisKeys
from octollm.storage.migrations import migrate
from octollm.storage.redis import RedisClient, open_redis

REDIS_URL = os.environ.get("OCTOLLM_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")


def need_redis() -> str:
    """Return the URL of a real Redis; without one skip, or fail under CI."""
    try:
        client = redis_py.Redis.from_url(REDIS_URL, socket_connect_timeout=1)
        client.ping()
        client.close()
    except redis_py.RedisError as error:
        if os.environ.get("CI"):
            pytest.fail(f"no Redis at {REDIS_URL}: {error}")
        pytest.skip(f"no Redis at {REDIS_URL}")
    return REDIS_URL


@pytest.fixture
def keys() -> RedisKeys:
    return RedisKeys(prefix=f"test-{uuid.uuid4().hex}:")


@pytest.fixture(params=["memory", pytest.param("server", marks=pytest.mark.redis)])
async def redis(request: pytest.FixtureRequest, keys: RedisKeys) -> AsyncIterator[RedisClient]:
    async with open_redis("memory://" if request.param == "memory" else need_redis()) as client:
        yield client
    if request.param == "server":
        server = redis_py.Redis.from_url(REDIS_URL)
        for key in server.scan_iter(match=f"{keys.prefix}*"):
            server.delete(key)
        server.close()


@pytest.fixture
def redis_process(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path)
    process.start()
    yield process
    process.kill()


@pytest.fixture
async def db(backend: Backend) -> AsyncIterator[Database]:
    async with open_database(backend.url("octollm_orchestrator"), clock=CLOCK) as database:
        await migrate(database, "orchestrator")
        yield database


@pytest.fixture
def log(db: Database) -> EventLog:
    return EventLog(db, CLOCK, IDS)


@pytest.fixture
def bus(redis: RedisClient, keys: RedisKeys) -> EventBus:
    return EventBus(redis, keys, CLOCK, IDS)


@pytest.fixture
def make_publisher(db: Database, log: EventLog, keys: RedisKeys) -> MakePublisher:
    def make(redis: RedisClient, *, policy: OutboxPolicy = QUICK) -> OutboxPublisher:
        return OutboxPublisher(db, log, redis, CLOCK, IDS, keys=keys, policy=policy)

    return make


REQUIRED: dict[str, dict[str, object]] = {
    "task.progress": {"progress": 1},
    "task.completed": {"status": "completed", "duration_ms": 1},
    "task.accepted": {"goal": "g"},
}


@pytest.fixture
def write(db: Database, log: EventLog) -> Write:
    async def append(event_type: str = "task.progress", task_id: str = "task-1", **data: object) -> Event:
        async with db.transaction() as tx:
            return await log.append(
                tx,
                event_type,
                subject=task_subject(task_id),
                tenant="t",
                source="orchestrator",
                data={"task_id": task_id} | REQUIRED.get(event_type, {}) | data,
            )

    return append
