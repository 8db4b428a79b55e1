"""Redis by its URL: a server, a cluster or a server behind sentinels, through redis-py, or an in-process one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from octollm.errors import OctoError, SettingError, map_exceptions
from octollm.storage.redis_memory import MemoryServers
from octollm.storage.redis_protocol import MAX_BLOCK_MS, PubSub, PubSubMessage, RedisClient, StreamEntry
from octollm.storage.redis_topology import (
    CLUSTER_SCHEMES,
    CONNECTION_ERRORS,
    SENTINEL_SCHEMES,
    ClusterNodes,
    connect_to_master,
    open_sentinels,
    parse_address,
)

CONNECT_SECONDS = 5.0
RESPONSE_SECONDS = 5.0
"""Limit for the response to a command; longer than ``MAX_BLOCK_MS``, for which XREAD may block."""
LISTEN_SECONDS = 2.0
"""One wait for a message; less than ``RESPONSE_SECONDS``."""
MAX_CONNECTIONS = 32
"""Connections for commands; a command waits up to ``CONNECT_SECONDS`` for one."""
MAX_LISTENERS = 256
"""Connections for subscriptions."""
IDLE_PROBE_SECONDS = 5.0
"""After this time without a message a subscription sends a ping, and after twice the time without a reply it fails.
TCP alone would not notice a server that disappeared or hangs: a subscriber only reads."""


@asynccontextmanager
async def _translate_redis_errors() -> AsyncGenerator[None]:
    """Limit a command to ``RESPONSE_SECONDS``, and translate redis-py's errors.

    Their messages contain host and port at most, never the password.
    """
    with map_exceptions(_to_octo_error, exceptions.RedisError, OSError):
        async with asyncio.timeout(RESPONSE_SECONDS):
            yield


def _to_octo_error(error: exceptions.RedisError | OSError) -> OctoError:
    # Before ConnectionError, of which redis-py makes AuthenticationError a subclass.
    if isinstance(error, exceptions.AuthenticationError | exceptions.NoPermissionError):
        return OctoError("Redis refused the user or its password.", code="unavailable")
    if isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError | OSError):
        return OctoError(f"Redis does not answer ({type(error).__name__}).", code="unavailable")
    if isinstance(error, exceptions.ReadOnlyError | exceptions.OutOfMemoryError | exceptions.TryAgainError):
        return OctoError(f"Redis refuses to write: {error}", code="unavailable")
    return OctoError(f"Redis refused a command ({type(error).__name__}).", code="internal")


CONNECTION_OPTIONS: Mapping[str, Any] = {
    "protocol": 2,
    "socket_connect_timeout": CONNECT_SECONDS,
    # redis-py applies its own timeout with asyncio.wait_for, which on Python 3.11 loses a cancellation that arrives as
    # the inner task ends. _translate_redis_errors limits the time instead.
    "socket_timeout": None,
}


# One command with one reply: in a pipeline redis-py spends 10 µs on each message.
_PUBLISH = "for i = 1, #ARGV, 2 do redis.call('PUBLISH', ARGV[i], ARGV[i + 1]) end"


async def _publish(client: Any, messages: Sequence[tuple[str, bytes]]) -> None:
    if len(messages) == 1:
        await client.execute_command("PUBLISH", *messages[0])
    elif messages:
        await client.execute_command("EVAL", _PUBLISH, 0, *(part for message in messages for part in message))


class ServerPubSub:
    """A subscription on its own connection, which never reconnects silently: that would hide lost messages."""

    def __init__(self, pubsub: Any, monotonic: Callable[[], float]) -> None:
        self._pubsub = pubsub
        self._monotonic = monotonic
        self._last_message_at = monotonic()
        self._has_pinged = False

    async def subscribe(self, *channels: str) -> None:
        """Listen to channels."""
        async with _translate_redis_errors():
            await self._pubsub.subscribe(*channels)

    async def psubscribe(self, *patterns: str) -> None:
        """Listen to glob patterns."""
        async with _translate_redis_errors():
            await self._pubsub.psubscribe(*patterns)

    async def unsubscribe(self, *channels: str) -> None:
        """Stop listening to channels."""
        async with _translate_redis_errors():
            await self._pubsub.unsubscribe(*channels)

    async def receive(self, timeout: float) -> PubSubMessage | None:
        """Return the next message, or ``None`` after ``timeout`` seconds without one."""
        end = self._monotonic() + timeout
        while True:
            remaining = max(end - self._monotonic(), 0.0)
            async with _translate_redis_errors():
                await self._probe()
                raw = await self._pubsub.get_message(timeout=min(remaining, LISTEN_SECONDS))
            if raw is not None:
                self._last_message_at, self._has_pinged = self._monotonic(), False
                message = _parse_message(raw)
                if message is not None:
                    return message
            if self._monotonic() >= end:
                return None

    async def _probe(self) -> None:
        connection = self._pubsub.connection
        if connection is None or not connection.is_connected:
            # redis-py would reconnect here, and so hide lost messages.
            raise exceptions.ConnectionError("the connection was lost")
        idle = self._monotonic() - self._last_message_at
        if idle > 2 * IDLE_PROBE_SECONDS and self._has_pinged:
            raise exceptions.TimeoutError("no answer to a ping")
        if idle > IDLE_PROBE_SECONDS and not self._has_pinged:
            await self._pubsub.ping()
            self._has_pinged = True

    async def close(self) -> None:
        """Return the connection to the pool."""
        async with _translate_redis_errors():
            await self._pubsub.aclose()


def _parse_message(raw: Mapping[str, Any]) -> PubSubMessage | None:
    kind = raw["type"]
    if kind in ("message", "pmessage"):
        return PubSubMessage(raw["channel"].decode(), raw["data"])
    if kind in ("subscribe", "psubscribe"):
        return PubSubMessage(raw["channel"].decode(), b"", subscribed=True)
    return None


class ServerRedis:
    """The ``RedisClient`` of a server. No connection is made before the first command."""

    def __init__(
        self,
        commands: Any,
        listeners: Any,
        *,
        others: Sequence[Any] = (),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``commands``, ``listeners`` (for subscriptions) and ``others`` are clients of redis-py, closed at the end."""
        self._others = others
        # redis-py's own annotations are partial, so its clients are taken as untyped.
        self._commands = commands
        self._listeners = listeners
        self._monotonic = monotonic

    @classmethod
    def connect(cls, url: str) -> ServerRedis:
        """Return the client of a single server."""
        blocking: Any = BlockingConnectionPool
        plain: Any = ConnectionPool
        try:
            # One immediate retry, because a pooled connection may have been closed while it was idle.
            commands = blocking.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=CONNECT_SECONDS,
                retry=Retry(NoBackoff(), 1),
                **CONNECTION_OPTIONS,
            )
            # No retry, because a subscription that reconnects silently would hide lost messages.
            listeners = plain.from_url(
                url, max_connections=MAX_LISTENERS, retry=Retry(NoBackoff(), 0), **CONNECTION_OPTIONS
            )
        except ValueError as error:
            raise SettingError("The Redis URL is malformed; write redis://user:password@host:6379/0.") from error
        return cls(Redis.from_pool(commands), Redis.from_pool(listeners))

    @classmethod
    def connect_through_sentinels(cls, url: str) -> ServerRedis:
        """Return the client of the master that sentinels name."""
        address = parse_address(url)
        sentinel = open_sentinels(address, **CONNECTION_OPTIONS)
        commands, listeners = (
            connect_to_master(sentinel, address, connections=MAX_LISTENERS, retries=retries, **CONNECTION_OPTIONS)
            for retries in (1, 0)
        )
        return cls(commands, listeners, others=sentinel.sentinels)

    async def close(self) -> None:
        """Close every connection."""
        async with _translate_redis_errors():
            for client in (self._commands, self._listeners, *self._others):
                await client.aclose()

    async def ping(self) -> None:
        """Raise ``unavailable`` unless Redis responds."""
        async with _translate_redis_errors():
            await self._commands.execute_command("PING")

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """Publish each in order, in one round trip."""
        async with _translate_redis_errors():
            await _publish(self._commands, messages)

    async def get(self, key: str) -> bytes | None:
        """Return the value, or ``None``."""
        async with _translate_redis_errors():
            return cast("bytes | None", await self._commands.get(key))

    async def get_many(self, *keys: str) -> Sequence[bytes | None]:
        """Return the values in the order of the keys, ``None`` for a missing one."""
        async with _translate_redis_errors():
            return cast("list[bytes | None]", await self._commands.mget(keys))

    async def set(self, key: str, value: bytes, *, ttl: int, only_if_absent: bool = False) -> bool:
        """Return whether the value was set."""
        async with _translate_redis_errors():
            return bool(await self._commands.set(key, value, ex=ttl, nx=only_if_absent))

    async def delete(self, *keys: str) -> int:
        """Return how many of the keys existed."""
        async with _translate_redis_errors():
            return int(await self._commands.delete(*keys)) if keys else 0

    async def ttl(self, key: str) -> int:
        """Return the remaining seconds, -1 for a key without expiry, -2 for a missing key."""
        async with _translate_redis_errors():
            return int(await self._commands.ttl(key))

    async def stream_add(
        self,
        key: str,
        fields: Mapping[str, str],
        *,
        maxlen: int,
        ttl: int,
        announce: tuple[str, bytes] | None = None,
    ) -> str:
        """Append an entry, renew the expiry and publish ``announce``, in one round trip."""
        async with _translate_redis_errors(), self._commands.pipeline(transaction=False) as pipeline:
            pipeline.xadd(key, dict(fields), maxlen=maxlen, approximate=True)
            pipeline.expire(key, ttl)
            # After XADD, so that a reader that the hint wakes finds the entry.
            if announce is not None:
                pipeline.publish(*announce)
            answers: list[Any] = await pipeline.execute()
        return str(answers[0], "ascii")

    async def stream_read(self, key: str, *, after: str, count: int, block_ms: int = 0) -> Sequence[StreamEntry]:
        """Return the entries after ``after``; wait up to ``block_ms`` for one."""
        block = min(block_ms, MAX_BLOCK_MS) or None
        async with _translate_redis_errors():
            response: Any = await self._commands.xread({key: after}, count=count, block=block)
        return tuple(
            StreamEntry(entry.decode(), {name.decode(): value.decode() for name, value in fields.items()})
            for _, entries in response or ()
            for entry, fields in entries
        )

    def pubsub(self) -> PubSub:
        """Return a subscription with its own connection."""
        return ServerPubSub(self._listeners.pubsub(), self._monotonic)


class ClusterRedis(ServerRedis):
    """The ``RedisClient`` of a cluster: keys by their slots, channels through any node."""

    def __init__(self, nodes: ClusterNodes, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__(nodes.commands, None, monotonic=monotonic)
        self._nodes = nodes

    @classmethod
    def connect(cls, url: str) -> ClusterRedis:
        """Return the client of a cluster."""
        return cls(ClusterNodes(parse_address(url), connections=MAX_LISTENERS, **CONNECTION_OPTIONS))

    async def close(self) -> None:
        """Close every connection."""
        async with _translate_redis_errors():
            await self._nodes.close()

    async def ping(self) -> None:
        """Raise ``unavailable`` unless a node responds that others answer, too."""
        async with _translate_redis_errors():
            await self._nodes.refresh()
            await self._publishing(lambda client: client.execute_command("PING"))

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """Publish each in order, in one round trip to one node."""

        async def send(client: Any) -> None:
            await _publish(client, messages)

        async with _translate_redis_errors():
            await self._nodes.refresh()
            await self._publishing(send)

    async def _publishing(self, send: Callable[[Any], Awaitable[Any]]) -> None:
        try:
            await send(self._nodes.publishing_client())
        except CONNECTION_ERRORS:
            # Once, through another node; a node that fails next is the next call's.
            self._nodes.report_failure()
            await send(self._nodes.publishing_client())

    async def delete(self, *keys: str) -> int:
        """Return how many of the keys existed; each may be on another node."""
        async with _translate_redis_errors():
            return sum([int(await self._commands.delete(key)) for key in keys])

    async def stream_add(
        self,
        key: str,
        fields: Mapping[str, str],
        *,
        maxlen: int,
        ttl: int,
        announce: tuple[str, bytes] | None = None,
    ) -> str:
        """Append an entry and renew the expiry, then publish ``announce`` through another connection."""
        entry = await super().stream_add(key, fields, maxlen=maxlen, ttl=ttl)
        if announce is not None:
            await self.publish([announce])
        return entry

    def pubsub(self) -> PubSub:
        """Return a subscription through a node of its own turn: after a failure the next one uses another node."""
        return ServerPubSub(self._nodes.client(self._nodes.next_node()).pubsub(), self._monotonic)


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

    ``redis://``, ``rediss://`` (TLS), ``unix://``: a server. ``redis+cluster://`` and ``redis+sentinel://``: see
    ``redis_topology.py``. ``memory://name``: an in-process one, shared by all users
    of the same name and the same ``servers``; without ``servers`` it is private. A server need not be up yet: the
    first command connects. Raises ``SettingError`` for another URL.
    """
    scheme, separator, name = url.partition("://")
    if separator and scheme == "memory":
        async with (servers or MemoryServers()).lease(name) as client:
            yield client
    elif separator and (connect := _CONNECTORS.get(scheme)) is not None:
        server = connect(url)
        try:
            yield server
        finally:
            await server.close()
    else:
        raise SettingError(
            f"The Redis URL has the scheme {scheme!r}; use redis://, rediss://, unix://, redis+cluster://,"
            " redis+sentinel:// or memory://."
        )


_CONNECTORS: Mapping[str, Callable[[str], ServerRedis]] = {
    **dict.fromkeys(("redis", "rediss", "unix"), ServerRedis.connect),
    **dict.fromkeys(CLUSTER_SCHEMES, ClusterRedis.connect),
    **dict.fromkeys(SENTINEL_SCHEMES, ServerRedis.connect_through_sentinels),
}
