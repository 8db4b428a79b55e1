"""Hearing at once that a task was cancelled at another replica. Without Redis the next renewal of its lease tells."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from octollm.errors import OctoError
from octollm.storage import RedisClient

CANCEL_RECEIVE_SECONDS = 5.0
CANCEL_RETRY_SECONDS = 1.0


async def listen_for_cancellations(redis: RedisClient, channel: str, stop: Callable[[str], Awaitable[None]]) -> None:
    """Call ``stop`` with the id of every task that is announced on ``channel``, until this is cancelled."""
    while True:
        pubsub = redis.pubsub()
        try:
            await pubsub.subscribe(channel)
            while True:
                message = await pubsub.receive(CANCEL_RECEIVE_SECONDS)
                if message is not None and not message.subscribed:
                    await stop(message.data.decode("ascii", errors="replace"))
        except OctoError:
            # Redis is away, which /ready tells; what was missed meanwhile the renewals find.
            await asyncio.sleep(CANCEL_RETRY_SECONDS)
        finally:
            with suppress(OctoError):
                await pubsub.close()
