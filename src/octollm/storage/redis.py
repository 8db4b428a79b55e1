"""Redis by its URL: a server through redis-py, or the one inside this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from octollm.errors import OctoError, SettingError
from octollm.storage.redis_memory import MemoryServers
from octollm.storage.redis_protocol import MAX_BLOCK_MS, PubSub, PubSubMessage, RedisClient, StreamEntry

CONNECT_SECONDS = 5.0
RESPONSE_SECONDS = 5.0
"""The longest wait for an answer; more than ``MAX_BLOCK_MS``."""
LISTEN_SECONDS = 2.0
"""One wait for a message; less than ``RESPONSE_SECONDS``."""
MAX_CONNECTIONS = 32
"""Connections for commands; a command waits up to ``CONNECT_SECONDS`` for one."""
MAX_LISTENERS = 256
"""Connections for subscriptions."""
IDLE_PROBE_SECONDS = 10.0
"""A subscription that hears nothing for so long asks whether the server is there, and gives it as long again."""


@asynccontextmanager
async def _translate_redis_errors() -> AsyncGenerator[None]:
    """End a command after ``RESPONSE_SECONDS``, and raise redis-py's errors as ours.

    Its texts name host and port at most, never the password.
    """
    try:
        async with asyncio.timeout(RESPONSE_SECONDS):
            yield
    # Before ConnectionError, of which redis-py makes AuthenticationError a subclass.
    except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
        raise OctoError("Redis refused the user or its password.", code="unavailable") from error
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError, TimeoutError) as error:
        raise OctoError(f"Redis does not answer ({type(error).__name__}).", code="unavailable") from error
    except (exceptions.ReadOnlyError, exceptions.OutOfMemoryError, exceptions.TryAgainError) as error:
        raise OctoError(f"Redis refuses to write: {error}", code="unavailable") from error
    except (exceptions.ResponseError, exceptions.RedisError) as error:
        raise OctoError(f"Redis refused a command ({type(error).__name__}).", code="internal") from error


class ServerPubSub:
    """A subscription on a connection of its own, which is never reconnected in silence."""

    def __init__(self, pubsub: Any, monotonic: Callable[[], float]) -> None:
        self._pubsub = pubsub
        self._monotonic = monotonic
        self._heard = monotonic()
        self._asked = False

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
            left = max(end - self._monotonic(), 0.0)
            async with _translate_redis_errors():
                await self._probe()
                raw = await self._pubsub.get_message(timeout=min(left, LISTEN_SECONDS))
            if raw is not None:
                self._heard, self._asked = self._monotonic(), False
                message = _parse_message(raw)
                if message is not None:
                    return message
            if self._monotonic() >= end:
                return None

    async def _probe(self) -> None:
        connection = self._pubsub.connection
        if connection is None or not connection.is_connected:
            # redis-py would connect again here, and hide what was missed.
            raise exceptions.ConnectionError("the connection is gone")
        silent = self._monotonic() - self._heard
        if silent > 2 * IDLE_PROBE_SECONDS and self._asked:
            raise exceptions.TimeoutError("no answer to a ping")
        if silent > IDLE_PROBE_SECONDS and not self._asked:
            await self._pubsub.ping()
            self._asked = True

    async def close(self) -> None:
        """Give the connection back."""
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

    def __init__(self, url: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        common: dict[str, Any] = {
            "protocol": 2,
            "socket_connect_timeout": CONNECT_SECONDS,
            # redis-py would keep to its own limit with asyncio.wait_for, which on Python 3.11 loses a cancellation
            # that comes as the inner task ends. The limit is that of _translate_redis_errors instead.
            "socket_timeout": None,
        }
        # redis-py's own annotations are partial, so its clients are taken as untyped.
        blocking: Any = BlockingConnectionPool
        plain: Any = ConnectionPool
        try:
            # One more try at once: a pooled connection may have died while it lay unused.
            commands = blocking.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=CONNECT_SECONDS,
                retry=Retry(NoBackoff(), 1),
                **common,
            )
            # No retry: a listener that reconnected in silence would hide what it missed.
            listeners = plain.from_url(url, max_connections=MAX_LISTENERS, retry=Retry(NoBackoff(), 0), **common)
        except ValueError as error:
            raise SettingError("The Redis URL is malformed; write redis://user:password@host:6379/0.") from error
        self._commands: Any = Redis.from_pool(commands)
        self._listeners: Any = Redis.from_pool(listeners)
        self._monotonic = monotonic

    async def close(self) -> None:
        """Close every connection."""
        async with _translate_redis_errors():
            await self._commands.aclose()
            await self._listeners.aclose()

    async def ping(self) -> None:
        """Make sure that Redis answers."""
        async with _translate_redis_errors():
            await self._commands.execute_command("PING")

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """Publish each in order, in one round trip."""
        async with _translate_redis_errors(), self._commands.pipeline(transaction=False) as pipeline:
            for channel, payload in messages:
                pipeline.publish(channel, payload)
            await pipeline.execute()

    async def get(self, key: str) -> bytes | None:
        """Return the value, or ``None``."""
        async with _translate_redis_errors():
            return cast("bytes | None", await self._commands.get(key))

    async def set(self, key: str, value: bytes, *, ttl: int, only_if_absent: bool = False) -> bool:
        """Return whether the value was set."""
        async with _translate_redis_errors():
            return bool(await self._commands.set(key, value, ex=ttl, nx=only_if_absent))

    async def delete(self, *keys: str) -> int:
        """Return how many there were."""
        async with _translate_redis_errors():
            return int(await self._commands.delete(*keys)) if keys else 0

    async def ttl(self, key: str) -> int:
        """Return the seconds left, -1 without an end, -2 without a key."""
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
        """Append, renew the life, announce, in one round trip."""
        async with _translate_redis_errors(), self._commands.pipeline(transaction=False) as pipeline:
            pipeline.xadd(key, dict(fields), maxlen=maxlen, approximate=True)
            pipeline.expire(key, ttl)
            # After the entry, so that whoever the hint wakes finds it.
            if announce is not None:
                pipeline.publish(*announce)
            answers: list[Any] = await pipeline.execute()
        return str(answers[0], "ascii")

    async def stream_read(self, key: str, *, after: str, count: int, block_ms: int = 0) -> Sequence[StreamEntry]:
        """Return entries behind ``after``, waiting for one if asked to."""
        block = min(block_ms, MAX_BLOCK_MS) or None
        async with _translate_redis_errors():
            found: Any = await self._commands.xread({key: after}, count=count, block=block)
        return tuple(
            StreamEntry(entry.decode(), {name.decode(): value.decode() for name, value in fields.items()})
            for _, entries in found or ()
            for entry, fields in entries
        )

    def pubsub(self) -> PubSub:
        """Return a new connection that listens."""
        return ServerPubSub(self._listeners.pubsub(), self._monotonic)


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
