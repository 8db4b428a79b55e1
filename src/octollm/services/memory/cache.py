"""Cache of reads: L1 in this process, L2 in Redis, invalidated over Redis Pub/Sub (``cache.invalidated``).

A cached value belongs to scopes, such as one fact or all documents of a tenant. Each scope has a generation in Redis,
a random name that every write replaces. A value in L2 carries the generations that were current before it was read
from SQL, so one that was read before a write is never taken for the new one, however late it arrives. A write also
marks its scopes beforehand: if it dies between its commit and the invalidation, nothing is cached until the mark
expires.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from octollm.clock import Clock, IdGenerator
from octollm.concurrency import BackgroundLoop, LoopLogger
from octollm.contracts.observability import DependencyStatus
from octollm.errors import OctoError
from octollm.events import EventBus, Subscription
from octollm.lru import LruCache
from octollm.storage import RedisClient
from octollm.storage.keys import CACHE_TTL_SECONDS, CACHE_WRITE_SECONDS, GENERATION_TTL_SECONDS, RedisKeys
from octollm.telemetry import Metrics

L1_ENTRIES = 4096
L1_BYTES = 16 * 1024 * 1024
L1_TTL_SECONDS = 5.0
"""Longest life of a value in this process: what bounds its age when an invalidation is lost with its connection."""
MAX_VALUE_BYTES = 64 * 1024
"""A larger value is not cached."""
MAX_SCOPES = 10_000
"""Scopes whose last invalidation is remembered; past them, all of L1 is dropped."""
REDIS_SECONDS = 0.25
"""Longest wait for Redis. A read then takes SQL, and a write leaves its invalidation to the retries."""
REDIS_PAUSE_SECONDS = 1.0
"""Pause without Redis after it did not answer, and between two retries of an invalidation."""
MAX_RETRIED = 10_000
"""Invalidations that wait for Redis; past them the oldest are left to the lifetime of the values."""
EVENT = "cache.invalidated"
_WRITING = b"writing:"
"""The beginning of a generation while a write is under way; nothing is cached under it."""
_EXPIRY = struct.Struct(">d")
"""Before a value in L2: the epoch seconds until which it holds."""
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class CacheScope:
    """What is invalidated together: ``parts`` name it within a tenant."""

    tenant: str
    parts: tuple[str, ...]

    @property
    def group(self) -> str:
        """Return the digest of the tenant, in which Redis Cluster keeps all of its keys together."""
        return _digest(self.tenant)

    @property
    def digest(self) -> str:
        """Return the name of the scope in Redis and in events: nothing that a user typed is in it."""
        return _digest(self.tenant, *self.parts)


def _digest(*parts: str) -> str:
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


class _CacheEntry(msgspec.Struct, frozen=True):
    """A value in L1. ``born`` counts the invalidations before it was read; ``until`` is on the monotonic clock."""

    value: bytes
    scopes: tuple[str, ...]
    born: int
    until: float


class ReadCache:
    """Caches encoded responses. ``redis=None`` caches nothing. Use it within ``async with``."""

    def __init__(
        self,
        redis: RedisClient | None,
        *,
        keys: RedisKeys,
        service: str,
        clock: Clock,
        ids: IdGenerator,
        metrics: Metrics,
        log: LoopLogger | None = None,
    ) -> None:
        self._redis = redis
        self._bus = None if redis is None else EventBus(redis, keys, clock, ids)
        self._keys = keys
        self._service = service
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._l1: LruCache[str, _CacheEntry] = LruCache(
            L1_ENTRIES, max_weight=L1_BYTES, weigh=lambda each: len(each.value)
        )
        self._count = 0  # of invalidations so far
        self._invalidated: dict[str, int] = {}  # by scope, the count at its last invalidation
        self._dropped_at = 0  # the count when all of L1 was dropped
        self._events: Subscription | None = None
        self._redis_closed_until = -1.0
        self._unsent: dict[CacheScope, float] = {}  # invalidations to retry, each until when
        self._listener = BackgroundLoop(
            "cache invalidation", self._listen, interval=REDIS_PAUSE_SECONDS, restart=True, log=log
        )
        self._sender = BackgroundLoop("cache invalidation retries", self._send_unsent, interval=REDIS_PAUSE_SECONDS)

    async def __aenter__(self) -> ReadCache:
        """Follow the invalidations of other replicas. Redis need not be up."""
        if self._redis is not None:
            self._listener.start()
            self._sender.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        """Send what is left, once, and stop."""
        await self._listener.aclose()
        await self._sender.aclose()
        if self._unsent:
            await self._send_unsent()

    async def check_health(self) -> DependencyStatus:
        """Return whether the cache works; the service works without it."""
        if self._redis is None:
            return DependencyStatus(ok=True, detail="without Redis nothing is cached", required=False)
        return await self._listener.check_health()

    async def load(
        self,
        name: Sequence[str],
        scopes: Sequence[CacheScope],
        read: Callable[[], Awaitable[tuple[bytes, float]]],
    ) -> bytes:
        """Return the cached value ``name``, or what ``read`` returns: a value, and for how many seconds it holds.

        Scopes are of one tenant. Exceptions of ``read`` pass and are not cached.
        """
        if self._redis is None:
            return (await read())[0]
        digests = tuple(scope.digest for scope in scopes)
        key = _digest(*digests, *name)
        cached = self._l1.get(key)
        if cached is not None and self._is_current(cached):
            self._count_lookup("l1", hit=True)
            return cached.value
        self._count_lookup("l1", hit=False)
        # Before anything is read: an invalidation from here on keeps the value out of L1.
        born = self._count
        location = self._keys.cache_value(scopes[0].group, key)
        generations, stored = await self._read_redis(scopes, location)
        if generations and stored is not None and stored.startswith(generations):
            packed = stored[len(generations) :]
            value, life = packed[_EXPIRY.size :], _EXPIRY.unpack_from(packed)[0] - self._clock.now()
            if life > 0:
                self._count_lookup("l2", hit=True)
                self._put(key, value, digests, born, life)
                return value
        self._count_lookup("l2", hit=False)
        value, life = await read()
        if len(value) <= MAX_VALUE_BYTES and life > 0:
            self._put(key, value, digests, born, life)
            if generations:
                packed = generations + _EXPIRY.pack(self._clock.now() + life) + value
                await self._try_redis(lambda redis: redis.set(location, packed, ttl=CACHE_TTL_SECONDS))
        return value

    @contextlib.asynccontextmanager
    async def invalidating(self, *scopes: CacheScope) -> AsyncGenerator[None]:
        """Write to SQL inside: afterwards no replica has an older value of ``scopes``. They are of one tenant.

        A failed write invalidates too, for its commit may have taken effect.
        """
        if self._redis is None:
            yield
            return
        await self._set_generations(scopes, _WRITING + self._ids.hex().encode(), CACHE_WRITE_SECONDS)
        try:
            yield
        finally:
            for scope in scopes:
                self._drop(scope.digest)
            # A cancelled caller must not leave the others with the old value.
            await asyncio.shield(self._invalidate(scopes))

    @property
    def is_cleared(self) -> bool:
        """Return whether every invalidation so far reached Redis."""
        return not self._unsent

    async def _invalidate(self, scopes: Sequence[CacheScope]) -> None:
        sent = await self._set_generations(scopes, self._ids.hex().encode(), GENERATION_TTL_SECONDS)
        if not (sent and await self._publish(scopes)):
            # A value in L2 lives no longer than this, and those in L1 are dropped at the next connection.
            until = self._clock.monotonic() + CACHE_TTL_SECONDS
            self._unsent |= dict.fromkeys(scopes, until)
            while len(self._unsent) > MAX_RETRIED:
                del self._unsent[next(iter(self._unsent))]
        self._metrics.cache_invalidations.labels(self._service, "sent" if sent else "delayed").inc(len(scopes))

    async def _send_unsent(self) -> None:
        now = self._clock.monotonic()
        for scope, until in tuple(self._unsent.items()):
            if until > now and not (
                await self._set_generations((scope,), self._ids.hex().encode(), GENERATION_TTL_SECONDS)
                and await self._publish((scope,))
            ):
                return
            if self._unsent.get(scope) == until:
                del self._unsent[scope]

    async def _set_generations(self, scopes: Sequence[CacheScope], generation: bytes, ttl: int) -> bool:
        for scope in scopes:
            location = self._keys.cache_generation(scope.group, scope.digest)
            if await self._try_redis(lambda redis, at=location: redis.set(at, generation, ttl=ttl)) is None:
                return False
        return True

    async def _publish(self, scopes: Sequence[CacheScope]) -> bool:
        bus = self._bus
        if bus is None:
            return True
        for scope in scopes:
            about = {"subject": f"cache/{self._service}", "tenant": scope.tenant, "source": self._service}
            sent = await self._try_redis(
                lambda _redis, about=about, key=scope.digest: bus.publish(EVENT, data={"key": key}, **about)
            )
            if sent is None:
                return False
        return True

    async def _read_redis(self, scopes: Sequence[CacheScope], location: str) -> tuple[bytes, bytes | None]:
        """Return the joined generations of the scopes (empty: nothing may be stored now), and the value in L2."""
        places = [self._keys.cache_generation(scope.group, scope.digest) for scope in scopes]
        found = await self._try_redis(lambda redis: redis.get_many(*places, location))
        if found is None:
            return b"", None
        *generations, stored = found
        missing = [place for place, generation in zip(places, generations, strict=True) if generation is None]
        if missing:
            new = self._ids.hex().encode()
            for place in missing:
                await self._try_redis(
                    lambda redis, at=place: redis.set(at, new, ttl=GENERATION_TTL_SECONDS, only_if_absent=True)
                )
            # Read again: another replica, or a write, may have been first.
            found = await self._try_redis(lambda redis: redis.get_many(*places))
            generations, stored = list(found or ()), None
        known = [each for each in generations if each is not None and not each.startswith(_WRITING)]
        return (b" ".join(known) + b"\n", stored) if len(known) == len(scopes) else (b"", None)

    async def _try_redis(self, command: Callable[[RedisClient], Awaitable[Answer]]) -> Answer | None:
        """Return the answer of Redis; ``None`` when it does not answer soon, and for a while after that."""
        redis = self._redis
        if redis is None or self._clock.monotonic() < self._redis_closed_until:
            return None
        try:
            async with asyncio.timeout(REDIS_SECONDS):
                return await command(redis)
        except (OctoError, TimeoutError):
            self._redis_closed_until = self._clock.monotonic() + REDIS_PAUSE_SECONDS
            return None

    async def _listen(self) -> None:
        bus = self._bus
        assert bus is not None
        pattern = f"events:{EVENT.replace('.', ':')}"
        async with bus.subscribe(pattern, on_gap=lambda _gap: self._drop_all()) as events:
            self._drop_all()
            self._events = events
            self._listener.report_success()
            try:
                async for event in events:
                    self._drop(str(event.data.get("key", "")))
            finally:
                self._events = None

    def _put(self, key: str, value: bytes, scopes: tuple[str, ...], born: int, life: float) -> None:
        until = self._clock.monotonic() + min(life, L1_TTL_SECONDS)
        entry = _CacheEntry(value, scopes, born, until)
        if len(value) <= MAX_VALUE_BYTES and self._is_current(entry):
            self._l1.put(key, entry)

    def _is_current(self, cached: _CacheEntry) -> bool:
        # Deaf to the other replicas, this one cannot know what they changed.
        if self._events is None or self._events.degraded is not None:
            return False
        if cached.born < self._dropped_at or cached.until <= self._clock.monotonic():
            return False
        return all(self._invalidated.get(scope, 0) <= cached.born for scope in cached.scopes)

    def _drop(self, scope: str) -> None:
        self._count += 1
        self._invalidated[scope] = self._count
        if len(self._invalidated) > MAX_SCOPES:
            self._drop_all()

    def _drop_all(self) -> None:
        self._count += 1
        self._dropped_at = self._count
        self._l1.clear()
        self._invalidated.clear()

    def _count_lookup(self, level: str, *, hit: bool) -> None:
        self._metrics.cache_lookups.labels(self._service, level, "hit" if hit else "miss").inc()
