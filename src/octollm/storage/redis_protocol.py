"""The Redis commands that this project uses, as one small interface with two implementations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_BLOCK_MS = 2000
"""Upper bound for the blocking time of one stream read; callers loop."""


@dataclass(frozen=True, slots=True)
class PubSubMessage:
    """A message of a subscription.

    With ``subscribed`` it confirms that ``name`` (a channel or pattern) is in effect, and ``data`` is empty. Otherwise
    ``name`` is the channel that was published to.
    """

    name: str
    data: bytes
    subscribed: bool = False


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """One entry of a stream; ``id`` orders it."""

    id: str
    fields: Mapping[str, str]


class PubSub(Protocol):
    """A subscription connection with a single reader. After a failed call it must not be used again."""

    async def subscribe(self, *channels: str) -> None:
        """Subscribe to channels; :meth:`receive` returns the confirmations."""
        ...

    async def psubscribe(self, *patterns: str) -> None:
        """Subscribe to glob patterns; :meth:`receive` returns the confirmations."""
        ...

    async def unsubscribe(self, *channels: str) -> None:
        """Stop listening to channels."""
        ...

    async def receive(self, timeout: float) -> PubSubMessage | None:
        """Return the next message, or ``None`` after ``timeout`` seconds without one.

        Raises ``unavailable`` when the connection is lost or messages were dropped; then messages since the last one
        may be missing.
        """
        ...

    async def close(self) -> None:
        """Unsubscribe and return the connection."""
        ...


class RedisClient(Protocol):
    """Every Redis command that this project uses. Each raises ``unavailable`` when Redis does not respond.

    Values are bytes; times to live are whole seconds. A command may be executed twice when a connection breaks, so
    readers of streams and channels must tolerate duplicates.
    """

    async def ping(self) -> None:
        """PING: raise ``unavailable`` unless Redis responds."""
        ...

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """PUBLISH each (channel, payload) in order, in one round trip."""
        ...

    async def get(self, key: str) -> bytes | None:
        """GET: return the value, or ``None``."""
        ...

    async def get_many(self, *keys: str) -> Sequence[bytes | None]:
        """MGET: return the values in the order of the keys, ``None`` for a missing one."""
        ...

    async def set(self, key: str, value: bytes, *, ttl: int, only_if_absent: bool = False) -> bool:
        """SET EX [NX]: return whether the value was set."""
        ...

    async def delete(self, *keys: str) -> int:
        """DEL: return how many of the keys existed."""
        ...

    async def ttl(self, key: str) -> int:
        """TTL: return the remaining seconds, -1 for a key without expiry, -2 for a missing key."""
        ...

    async def stream_add(
        self,
        key: str,
        fields: Mapping[str, str],
        *,
        maxlen: int,
        ttl: int,
        announce: tuple[str, bytes] | None = None,
    ) -> str:
        """XADD MAXLEN ~, EXPIRE and, for ``announce``, PUBLISH, in one round trip; return the entry's id."""
        ...

    async def stream_read(self, key: str, *, after: str, count: int, block_ms: int = 0) -> Sequence[StreamEntry]:
        """XREAD: return up to ``count`` entries after the id ``after`` (``0``: from the oldest).

        Waits up to ``block_ms`` for one (0: returns at once; at most ``MAX_BLOCK_MS``).
        """
        ...

    def pubsub(self) -> PubSub:
        """Return a new subscription connection, which the caller closes."""
        ...
