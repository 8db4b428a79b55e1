"""Redis by its URL: the scheme picks a server or the one inside this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from octollm.errors import SettingError
from octollm.storage.redis_memory import MemoryServers
from octollm.storage.redis_protocol import MAX_BLOCK_MS, PubSub, PubSubMessage, RedisClient, StreamEntry
from octollm.storage.redis_server import ServerRedis

__all__ = [
    "MAX_BLOCK_MS",
    "MemoryServers",
    "PubSub",
    "PubSubMessage",
    "RedisClient",
    "StreamEntry",
    "open_redis",
]


@asynccontextmanager
async def open_redis(url: str, *, servers: MemoryServers | None = None) -> AsyncGenerator[RedisClient]:
    """Open Redis by its URL and close it at the end.

    ``redis://``, ``rediss://`` (TLS), ``unix://``: a server. ``memory://name``: one inside this process; the same
    name in the same ``servers`` is the same one, and without ``servers`` it is private. A server need not be up
    yet: the first command says so. Raises ``SettingError`` for another URL.
    """
    scheme, separator, name = url.partition("://")
    if separator and scheme == "memory":
        async with (servers or MemoryServers()).lease(name) as client:
            yield client
    elif separator and scheme in ("redis", "rediss", "unix"):
        server = ServerRedis(url)
        try:
            yield server
        finally:
            await server.close()
    else:
        raise SettingError(f"The Redis URL has the scheme {scheme!r}; use redis://, rediss://, unix:// or memory://.")
