"""Words that the tests of events share."""

from __future__ import annotations

from typing import Protocol

from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.events import Event
from octollm.events import OutboxPolicy, OutboxPublisher
from octollm.storage.redis import RedisClient

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
QUICK = OutboxPolicy(poll=0.05, backoff_initial=0.02, backoff_max=0.1)


class MakePublisher(Protocol):
    def __call__(self, redis: RedisClient, *, policy: OutboxPolicy = QUICK) -> OutboxPublisher: ...


class Write(Protocol):
    async def __call__(self, event_type: str = "task.progress", task_id: str = "task-1", **data: object) -> Event: ...
