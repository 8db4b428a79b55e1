"""Listening to Redis Pub/Sub over one supervised connection, which is replaced when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType

from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.contracts.observability import DependencyStatus
from octollm.errors import OctoError
from octollm.resilience import Backoff
from octollm.storage.redis_protocol import PubSub, PubSubMessage, RedisClient

RECONNECT_BACKOFF = Backoff(0.1, 5.0)
"""Pauses before a reconnect while Redis is away."""
RECEIVE_SECONDS = 30.0
"""Seconds of one wait for a message; an idle connection is waited on again."""
CONFIRM_SECONDS = 5.0
"""Seconds that Redis has to confirm a subscription."""


class PubSubListener:
    """Receives the messages of channels and patterns over a connection of its own, within ``async with``.

    ``on_message`` gets the confirmations as well. After a connection broke, the next one subscribes to the same names.
    What was published in between is lost, so ``on_connected`` is called each time that Redis has confirmed all of them.
    An exception of a callback is a defect: it ends the listener, and ``on_crash`` is called.
    """

    def __init__(
        self,
        name: str,
        redis: RedisClient,
        on_message: Callable[[PubSubMessage], None],
        *,
        channels: tuple[str, ...] = (),
        patterns: tuple[str, ...] = (),
        on_connected: Callable[[], None] | None = None,
        on_crash: Callable[[], None] | None = None,
        log: LoopLogger | None = None,
    ) -> None:
        """Create a listener to at least one name: Redis has no reads on a connection without a subscription."""
        self._redis = redis
        self._on_message = on_message
        self._on_connected = on_connected
        self._channels = set(channels)
        self._patterns = patterns
        self._confirmed: set[str] = set()
        self._pubsub: PubSub | None = None
        self._send_lock = asyncio.Lock()
        self._loop = BackgroundLoop(
            name,
            self._listen,
            backoff=RECONNECT_BACKOFF,
            log=log,
            on_crash=None if on_crash is None else lambda _error: on_crash(),
        )

    @property
    def degraded(self) -> str | None:
        """Return why no messages arrive now; ``None`` while they do."""
        return self._loop.failure or None

    async def check_health(self) -> DependencyStatus:
        """Return the state for ``/ready``. It is never required: what is missed is found otherwise, if later."""
        return await self._loop.check_health()

    async def __aenter__(self) -> PubSubListener:
        """Start to listen. Redis need not be up yet."""
        self._loop.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and close the connection. Raises the exception that ended the listener, if any."""
        await self.aclose()
        self.raise_if_crashed()

    async def aclose(self) -> None:
        """Stop, and close the connection."""
        await self._loop.aclose()

    def raise_if_crashed(self) -> None:
        """Raise the exception that ended the listener, if any."""
        self._loop.raise_if_crashed()

    def is_confirmed(self, name: str) -> bool:
        """Return whether Redis has confirmed a channel or pattern and the connection still stands."""
        return name in self._confirmed

    async def subscribe(self, channel: str) -> None:
        """Add a channel: now, or with the next connection when there is none."""
        # Added before the SUBSCRIBE, so that a listener that reconnects in the meantime includes this channel.
        self._channels.add(channel)
        await self._send(channel, subscribe=True)

    async def unsubscribe(self, channel: str) -> None:
        """Remove a channel."""
        self._channels.discard(channel)
        self._confirmed.discard(channel)
        await self._send(channel, subscribe=False)

    async def _send(self, channel: str, *, subscribe: bool) -> None:
        async with self._send_lock:
            # The channel may have been added or removed while this call waited for the lock, so the present state
            # decides whether there is still something to do.
            if self._pubsub is None or (channel in self._channels) is not subscribe:
                return
            try:
                if subscribe:
                    await self._pubsub.subscribe(channel)
                else:
                    await self._pubsub.unsubscribe(channel)
            except OctoError:
                # The connection is broken; the loop notices it as well, and subscribes again.
                self._pubsub = None

    async def _listen(self) -> None:
        # One connection per round: when it breaks, the loop's backoff starts the next round. A client that reconnected
        # by itself would hide that messages were lost.
        pubsub = self._redis.pubsub()
        try:
            # Under the lock: a channel that is added meanwhile waits, and is then sent on this connection.
            async with self._send_lock:
                pending = self._channels.union(self._patterns)
                if self._channels:
                    await pubsub.subscribe(*self._channels)
                if self._patterns:
                    await pubsub.psubscribe(*self._patterns)
                self._pubsub = pubsub
            while True:
                message = await pubsub.receive(CONFIRM_SECONDS if pending else RECEIVE_SECONDS)
                if message is not None:
                    self._handle(message, pending)
                elif pending:
                    raise OctoError("Redis did not confirm a subscription.", code="unavailable")
        finally:
            self._pubsub = None
            self._confirmed.clear()
            await close_pubsub(pubsub)

    def _handle(self, message: PubSubMessage, pending: set[str]) -> None:
        if message.subscribed and (message.name in self._channels or message.name in self._patterns):
            self._confirmed.add(message.name)
        # Messages may arrive between the confirmations of two names; they count as any other.
        self._on_message(message)
        if message.subscribed and message.name in pending:
            pending.remove(message.name)
            if not pending:
                self._loop.report_success()
                if self._on_connected is not None:
                    self._on_connected()


async def close_pubsub(pubsub: PubSub) -> None:
    """Close a Pub/Sub connection; a broken one counts as closed."""
    with contextlib.suppress(OctoError):
        await pubsub.close()
