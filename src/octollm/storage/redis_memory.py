"""An in-process Redis: burner-redis for keys and streams, our own fan-out for channels.

burner-redis polls each subscription in its own thread, ten times a second; a hundred subscriptions would exhaust the
thread pool. A fan-out within one event loop needs no thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from fnmatch import fnmatchcase
from typing import Any

from burner_redis import BurnerRedis  # pyright: ignore[reportUnknownVariableType]

from octollm.errors import OctoError, map_exceptions
from octollm.storage.redis_protocol import MAX_BLOCK_MS, PubSub, PubSubMessage, StreamEntry

MAX_PENDING = 10_000
"""Pending messages of a subscription that does not read. When exceeded, it is closed, as a Redis server does
(``client-output-buffer-limit``)."""

COMMANDS = ("delete", "expire", "get", "mget", "set", "ttl", "xadd", "xread", "xtrim", "aclose")
"""The commands used of burner-redis. PING is meaningless in process; PUBLISH and SUBSCRIBE are the fan-out's."""


def _translate_memory_errors() -> AbstractContextManager[None]:
    return map_exceptions(_to_octo_error, Exception)


def _to_octo_error(error: Exception) -> OctoError | None:
    if isinstance(error, OctoError):
        return None
    return OctoError(f"The Redis in this process failed ({type(error).__name__}).", code="internal")


class MemoryPubSub:
    """A subscription to a :class:`MemoryServer`."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server
        self._channels: set[str] = set()
        self._patterns: set[str] = set()
        self._pending: deque[PubSubMessage] = deque()
        self._wakeup = asyncio.Event()
        self._lost = False
        self._closed = False

    def deliver(self, channel: str, payload: bytes) -> None:
        """Queue a published message once for each channel and pattern that matches it, as Redis does."""
        times = (channel in self._channels) + sum(fnmatchcase(channel, pattern) for pattern in self._patterns)
        for _ in range(times):
            self._put(PubSubMessage(channel, payload))

    def _put(self, message: PubSubMessage) -> None:
        if len(self._pending) >= MAX_PENDING:
            self._lost = True
            self._pending.clear()
        if not self._lost:
            self._pending.append(message)
        self._wakeup.set()

    async def subscribe(self, *channels: str) -> None:
        """Listen to channels."""
        self._add(self._channels, channels)

    async def psubscribe(self, *patterns: str) -> None:
        """Listen to glob patterns."""
        self._add(self._patterns, patterns)

    def _add(self, names: set[str], new: Sequence[str]) -> None:
        if self._closed:
            raise OctoError("The subscription is closed.", code="unavailable")
        self._server.listeners.add(self)
        for name in new:
            names.add(name)
            self._put(PubSubMessage(name, b"", subscribed=True))

    async def unsubscribe(self, *channels: str) -> None:
        """Stop listening to channels."""
        self._channels.difference_update(channels)

    async def receive(self, timeout: float) -> PubSubMessage | None:
        """Return the next message, or ``None`` after ``timeout`` seconds without one."""
        if not self._pending and not self._lost and not self._closed:
            self._wakeup.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._wakeup.wait()
            except TimeoutError:
                return None
        if self._pending:
            return self._pending.popleft()
        if self._lost:
            raise OctoError("The subscription was closed: it read too slowly.", code="unavailable")
        if self._closed:
            raise OctoError("The subscription is closed.", code="unavailable")
        return None

    async def close(self) -> None:
        """Stop listening."""
        self._server.listeners.discard(self)
        self._closed = True
        self._pending.clear()
        self._wakeup.set()


class MemoryServer:
    """One in-process Redis, bound to the event loop that it was created in."""

    def __init__(self) -> None:
        self.keys: Any = BurnerRedis()  # the extension module carries no types
        self.listeners: set[MemoryPubSub] = set()

    def publish(self, channel: str, payload: bytes) -> None:
        """Deliver a message to every matching subscription."""
        for listener in tuple(self.listeners):
            listener.deliver(channel, payload)

    async def close(self) -> None:
        """Close every subscription and drop the data."""
        for listener in tuple(self.listeners):
            await listener.close()
        await self.keys.aclose()


class MemoryRedis:
    """The ``RedisClient`` of a :class:`MemoryServer`."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server

    async def ping(self) -> None:
        """Do nothing: an in-process server always responds."""

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """Publish each message, in order."""
        for channel, payload in messages:
            self._server.publish(channel, payload)

    async def get(self, key: str) -> bytes | None:
        """Return the value, or ``None``."""
        return await self._call(self._server.keys.get(key))

    async def get_many(self, *keys: str) -> Sequence[bytes | None]:
        """Return the values in the order of the keys, ``None`` for a missing one."""
        return await self._call(self._server.keys.mget(*keys))

    async def set(self, key: str, value: bytes, *, ttl: int, only_if_absent: bool = False) -> bool:
        """Return whether the value was set."""
        return bool(await self._call(self._server.keys.set(key, value, ex=ttl, nx=only_if_absent)))

    async def delete(self, *keys: str) -> int:
        """Return how many of the keys existed."""
        return await self._call(self._server.keys.delete(*keys)) if keys else 0

    async def ttl(self, key: str) -> int:
        """Return the remaining seconds, -1 for a key without expiry, -2 for a missing key."""
        return await self._call(self._server.keys.ttl(key))

    async def stream_add(
        self,
        key: str,
        fields: Mapping[str, str],
        *,
        maxlen: int,
        ttl: int,
        announce: tuple[str, bytes] | None = None,
    ) -> str:
        """Append an entry, renew the expiry and publish ``announce``."""
        entry: bytes = await self._call(self._server.keys.xadd(key, dict(fields)))
        # burner-redis accepts XADD's MAXLEN but does not apply it.
        await self._call(self._server.keys.xtrim(key, maxlen=maxlen))
        await self._call(self._server.keys.expire(key, ttl))
        if announce is not None:
            self._server.publish(*announce)
        return entry.decode()

    async def stream_read(self, key: str, *, after: str, count: int, block_ms: int = 0) -> Sequence[StreamEntry]:
        """Return the entries after ``after``; wait up to ``block_ms`` for one."""
        block = min(block_ms, MAX_BLOCK_MS) or None
        response: Any = await self._call(self._server.keys.xread({key: after}, count=count, block=block))
        return tuple(
            StreamEntry(entry.decode(), {name.decode(): value.decode() for name, value in fields.items()})
            for _, entries in response or ()
            for entry, fields in entries
        )

    def pubsub(self) -> PubSub:
        """Return a new subscription."""
        return MemoryPubSub(self._server)

    async def _call(self, call: Awaitable[Any]) -> Any:
        with _translate_memory_errors():
            return await call


class MemoryServers:
    """The in-process servers of one installation, by name. Components that get the same object share them."""

    def __init__(self) -> None:
        self._servers: dict[str, MemoryServer] = {}
        self._leases: dict[str, int] = {}

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncGenerator[MemoryRedis]:
        """Use the server of that name, which is created at the first use and closed after the last."""
        if name not in self._servers:
            self._servers[name] = MemoryServer()
        self._leases[name] = self._leases.get(name, 0) + 1
        try:
            yield MemoryRedis(self._servers[name])
        finally:
            self._leases[name] -= 1
            if self._leases[name] == 0:
                del self._leases[name]
                await self._servers.pop(name).close()
