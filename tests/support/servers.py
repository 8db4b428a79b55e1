"""PostgreSQL and Redis of a test's own, with every schema made, for services in processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from postgres_process import PostgresProcess
from redis_process import RedisProcess

from octollm.clock import SystemClock
from octollm.config import read_settings
from octollm.storage.migrations import migrate_all
from octollm.testing.fake_model import ModelScript, scripted_model


@dataclass(frozen=True)
class Servers:
    """Two servers that a test may kill and start again, and the settings that name them and a scripted model."""

    postgres: PostgresProcess
    redis: RedisProcess
    environment: dict[str, str]


@contextlib.asynccontextmanager
async def own_servers(folder: Path, script: ModelScript) -> AsyncGenerator[Servers]:
    """Start both servers and the model, and end them at the end."""
    postgres = PostgresProcess()
    redis = RedisProcess(folder)
    try:
        postgres.start()
        redis.start()
        await migrate_all(read_settings({"OCTOLLM_DATABASE_URL": postgres.url}, ()), SystemClock())
        async with scripted_model(script) as model:
            environment = {
                "OCTOLLM_MODEL": "openai:scripted",
                "OCTOLLM_MODEL_URL": model.url,
                "OCTOLLM_REDIS_URL": redis.url,
                "OCTOLLM_DATABASE_URL": postgres.url,
            }
            yield Servers(postgres, redis, environment)
    finally:
        redis.kill()
        postgres.close()
