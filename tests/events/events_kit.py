"""Words that the tests of events share."""

from __future__ import annotations

from typing import Protocol

from octollm.clock import SystemClock, Uuid7Ids
from octollm.contracts.events import Event
from octollm.events import Relay, RelayPolicy
from octollm.storage.redis import RedisClient

CLOCK = SystemClock()
IDS = Uuid7Ids(CLOCK)
QUICK = RelayPolicy(poll=0.05, backoff_first=0.02, backoff_most=0.1)


class MakeRelay(Protocol):
    def __call__(self, redis: RedisClient, *, policy: RelayPolicy = QUICK) -> Relay: ...


class Write(Protocol):
    async def __call__(self, event_type: str = "task.progress", task_id: str = "task-1", **data: object) -> Event: ...
