from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
import redis as redis_py
from databases import Backend
from redis_process import RedisClusterProcesses, RedisSentinelProcesses

from octollm.clock import SystemClock
from octollm.storage import Database, open_database
from octollm.storage.keys import RedisKeys
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


def drop_keys(prefix: str) -> None:
    client = redis_py.Redis.from_url(REDIS_URL)
    for key in client.scan_iter(match=f"{prefix}*"):
        client.delete(key)
    client.close()


@pytest.fixture
def redis_url() -> str:
    return need_redis()


@pytest.fixture
def keys() -> RedisKeys:
    return RedisKeys(prefix=f"test-{uuid.uuid4().hex}:")


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisClusterProcesses]:
    processes = RedisClusterProcesses(tmp_path_factory.mktemp("cluster"))
    try:
        processes.start()
        yield processes
    finally:
        processes.kill()


@pytest.fixture(scope="session")
def redis_sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisSentinelProcesses]:
    processes = RedisSentinelProcesses(tmp_path_factory.mktemp("sentinel"))
    try:
        processes.start()
        yield processes
    finally:
        processes.kill()


@pytest.fixture(
    params=["memory", *(pytest.param(kind, marks=pytest.mark.redis) for kind in ("server", "cluster", "sentinel"))]
)
async def redis(request: pytest.FixtureRequest, keys: RedisKeys) -> AsyncIterator[RedisClient]:
    match request.param:
        case "memory":
            url = "memory://"
        case "server":
            url = need_redis()
        case kind:
            url = request.getfixturevalue(f"redis_{kind}").url
    async with open_redis(url) as client:
        yield client
    if request.param == "server":
        drop_keys(keys.prefix)


@pytest.fixture
async def db(backend: Backend) -> AsyncIterator[Database]:
    async with open_database(backend.url("public"), clock=SystemClock()) as database:
        yield database
