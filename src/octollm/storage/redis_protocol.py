"""The Redis commands that this project uses, as one small interface; the adapters stand beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_BLOCK_MS = 2000
"""The longest that one read of a stream waits; callers loop."""


@dataclass(frozen=True, slots=True)
class PubSubMessage:
    """What a subscription hands over.

    ``subscribed`` is true for the confirmation that ``name`` (a channel or pattern) is in effect from here on;
    then ``data`` is empty. Else ``name`` is the channel published on.
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
    """A connection that listens. It has one reader; it is not used again once a call on it has failed."""

    async def subscribe(self, *channels: str) -> None:
        """Listen to channels. The confirmations come out of :meth:`receive`."""
        ...

    async def psubscribe(self, *patterns: str) -> None:
        """Listen to glob patterns. The confirmations come out of :meth:`receive`."""
        ...

    async def unsubscribe(self, *channels: str) -> None:
        """Stop listening to channels."""
        ...

    async def receive(self, timeout: float) -> PubSubMessage | None:
        """Return the next message, or ``None`` after ``timeout`` seconds without one.

        Raises ``unavailable`` when the connection is lost or messages had to be dropped: what was published
        since the last message may be missed.
        """
        ...

    async def close(self) -> None:
        """Stop listening and give the connection back."""
        ...


class RedisClient(Protocol):
    """Every Redis command that this project uses. Each raises ``unavailable`` when Redis does not answer.

    Values are bytes; times to live are whole seconds. Commands may be sent twice when a connection breaks, so
    readers of streams and channels expect to see something again.
    """

    async def ping(self) -> None:
        """PING: make sure that Redis answers."""
        ...

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """PUBLISH each (channel, payload) in order, in one round trip."""
        ...

    async def get(self, key: str) -> bytes | None:
        """GET: return the value, or ``None``."""
        ...

    async def set(self, key: str, value: bytes, *, ttl: int, only_if_absent: bool = False) -> bool:
        """SET EX [NX]: return whether the value was set."""
        ...

    async def delete(self, *keys: str) -> int:
        """DEL: return how many there were."""
        ...

    async def ttl(self, key: str) -> int:
        """TTL: return the seconds left, -1 without an end, -2 without a key."""
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
        """XREAD: return up to ``count`` entries behind the id ``after`` (``0``: from the first one kept).

        Waits for one up to ``block_ms`` (0: not at all; at most ``MAX_BLOCK_MS``).
        """
        ...

    def pubsub(self) -> PubSub:
        """Return a new connection that listens; close it."""
        ...
