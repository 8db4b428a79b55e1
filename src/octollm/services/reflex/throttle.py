"""Throttling by key and address: rate limits, a growing delay after failed logins, and bounds on live connections."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy, Refusal
from octollm.lru import LruCache


def get_address_bucket(address: str) -> str:
    """Return the bucket of an address: the address itself, or its /64 network, all of which one IPv6 client may use."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "address:unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return f"address:{mapped or ipaddress.ip_network((parsed, 64), strict=False)}"
    return f"address:{parsed}"


class RateLimiter:
    """Rate limiter: a sliding window of ``limit`` (``COUNT/second|minute|hour``) for each bucket, in this process."""

    def __init__(self, limit: str, clock: Clock) -> None:
        self._limit: RateLimitItem = parse(limit)
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._clock = clock

    async def hit(self, bucket: str) -> None:
        """Count a call. Raises ``rate_limited`` with the seconds until the next call may succeed."""
        if await self._limiter.hit(self._limit, bucket):
            return
        stats = await self._limiter.get_window_stats(self._limit, bucket)
        wait = max(1.0, stats.reset_time - self._clock.now())
        raise OctoError(f"More than {self._limit}.", code="rate_limited", retry_after=wait)


FIRST_SECONDS = 0.05
"""The delay after one failure; it doubles with each further one."""
LONGEST_SECONDS = 2.0
FORGET_SECONDS = 300.0
"""Failures are forgotten after this time without another."""
MAX_WAITING = 16
"""Attempts on one key that wait at a time; further ones are refused."""
MAX_KEYS = 4096
"""Keys with failures; the least recently failed is evicted first."""


_DELAYED_ATTEMPTS = ConcurrencyPolicy(MAX_WAITING, max_queued=0, max_wait=0.0)


def _refuse_attempt(_refusal: Refusal) -> OctoError:
    return OctoError("Too many attempts on that key.", code="rate_limited", retry_after=LONGEST_SECONDS)


class _FailedAttempts:
    __slots__ = ("failures", "last_failed_at", "limiter")

    def __init__(self) -> None:
        self.failures = 0
        self.limiter = ConcurrencyLimiter("The key", _DELAYED_ATTEMPTS, refusal=_refuse_attempt)
        self.last_failed_at = 0.0


class FailedLoginThrottle:
    """Delays attempts on a key after failures. Guesses of others can delay a valid key, never lock it out."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._attempts: LruCache[str, _FailedAttempts] = LruCache(MAX_KEYS)

    def delay(self, key_id: str) -> float:
        """Return the seconds that the next attempt on a key has to wait."""
        attempts = self._attempts.get(key_id)
        if (
            attempts is None
            or attempts.failures == 0
            or self._clock.monotonic() - attempts.last_failed_at > FORGET_SECONDS
        ):
            return 0.0
        return min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(attempts.failures - 1, 16))

    @contextlib.asynccontextmanager
    async def attempt(self, credential: str) -> AsyncGenerator[None]:
        """Delay the body, which checks a credential, and count a failure when it raises ``api_key_invalid``."""
        # A token of another issuer is signed: it cannot be guessed.
        if not credential.startswith("octo"):
            yield
            return
        # The part before the secret names the key, so guesses at one key share a counter.
        key_id = "_".join(credential.split("_", 2)[:2])[:64]
        await self.wait(key_id)
        try:
            yield
        except OctoError as error:
            if error.code == "api_key_invalid":
                self.record_failure(key_id)
            raise

    async def wait(self, key_id: str) -> None:
        """Wait for the delay of a key. Raises ``rate_limited`` when :data:`MAX_WAITING` attempts wait already."""
        seconds = self.delay(key_id)
        attempts = self._attempts.get(key_id)
        if not seconds or attempts is None:
            return
        async with attempts.limiter:
            await asyncio.sleep(seconds)

    def record_failure(self, key_id: str) -> None:
        """Count a failed attempt."""
        attempts = self._attempts.get(key_id) or _FailedAttempts()
        self._attempts.put(key_id, attempts)
        now = self._clock.monotonic()
        attempts.failures = 1 if now - attempts.last_failed_at > FORGET_SECONDS else attempts.failures + 1
        attempts.last_failed_at = now


CONNECTION_RETRY_SECONDS = 5.0
"""``Retry-After`` of a refused live connection."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many may be open at a time: in all, by one credential, and from one address (IPv6: one /64 network)."""

    total: int = 16_384
    per_caller: int = 2048
    per_address: int = 8192


@dataclass(slots=True)
class ConnectionCounter:
    """Counts open connections. There is no queue: a client tries again by itself."""

    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    _total: int = 0
    _counts: dict[str, int] = field(default_factory=dict[str, int])

    @contextlib.contextmanager
    def count(self, credential: str, address: str) -> Generator[None]:
        """Count one connection while the context is open. Raises ``overloaded`` and ``too_many_connections``."""
        bucket = get_address_bucket(address)
        if self._total >= self.limits.total:
            raise OctoError(
                f"The gateway has {self.limits.total} live connections open, which is its limit.",
                code="overloaded",
                retry_after=CONNECTION_RETRY_SECONDS,
            )
        for key, limit, whose in (
            (credential, self.limits.per_caller, "This credential"),
            (bucket, self.limits.per_address, "This address"),
        ):
            if self._counts.get(key, 0) >= limit:
                raise OctoError(
                    f"{whose} has {limit} live connections open, which is its limit.",
                    code="too_many_connections",
                    retry_after=CONNECTION_RETRY_SECONDS,
                )
        self._add(credential, bucket, 1)
        try:
            yield
        finally:
            self._add(credential, bucket, -1)

    def _add(self, credential: str, bucket: str, number: int) -> None:
        self._total += number
        for key in (credential, bucket):
            count = self._counts.get(key, 0) + number
            if count:
                self._counts[key] = count
            else:
                del self._counts[key]
