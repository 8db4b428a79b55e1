"""Throttling: a sliding-window rate limiter per key or address, and exponential delay after failed logins on one key (brute-force lockout)."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections import OrderedDict
from collections.abc import AsyncGenerator

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from octollm.clock import Clock
from octollm.errors import OctoError


def get_address_bucket(address: str) -> str:
    """Return what an address is counted as: itself, or its /64 network, which one IPv6 client can roam."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "address:unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return f"address:{mapped or ipaddress.ip_network((parsed, 64), strict=False)}"
    return f"address:{parsed}"


class RateLimiter:
    """Sliding windows of ``limit`` (``COUNT/second|minute|hour``), one per bucket, in this process."""

    def __init__(self, limit: str, clock: Clock) -> None:
        self._limit: RateLimitItem = parse(limit)
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._clock = clock

    async def hit(self, bucket: str) -> None:
        """Count a call; raise ``rate_limited`` with the seconds until the next one has a chance."""
        if await self._limiter.hit(self._limit, bucket):
            return
        stats = await self._limiter.get_window_stats(self._limit, bucket)
        wait = max(1.0, stats.reset_time - self._clock.now())
        raise OctoError(f"More than {self._limit}.", code="rate_limited", retry_after=wait)


FIRST_SECONDS = 0.05
LONGEST_SECONDS = 2.0
FORGET_SECONDS = 300.0
MAX_WAITING = 16
"""Tries on one key that wait at a time; further ones are told to come back."""
MAX_KEYS = 4096
"""Keys that are remembered; the one not tried for longest goes first."""


class _FailedAttempts:
    __slots__ = ("failures", "last_failed_at", "waiting")

    def __init__(self) -> None:
        self.failures = 0
        self.waiting = 0
        self.last_failed_at = 0.0


class FailedLoginThrottle:
    """Wrong tries by key. A right one is never refused for the wrong ones of others, only slowed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._attempts: OrderedDict[str, _FailedAttempts] = OrderedDict()

    def delay(self, key_id: str) -> float:
        """Return how long the next try on the key ``name`` has to wait, in seconds."""
        tries = self._attempts.get(key_id)
        if tries is None or tries.failures == 0 or self._clock.monotonic() - tries.last_failed_at > FORGET_SECONDS:
            return 0.0
        return min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(tries.failures - 1, 16))

    @contextlib.asynccontextmanager
    async def attempt(self, credential: str) -> AsyncGenerator[None]:
        """Try a credential in the body: it waits its turn, and counts when the body raises ``api_key_invalid``.

        A login by another issuer is signed: there is nothing to guess.
        """
        if not credential.startswith("octo"):
            yield
            return
        name = "_".join(credential.split("_", 2)[:2])[:64]
        await self.wait(name)
        try:
            yield
        except OctoError as error:
            if error.code == "api_key_invalid":
                self.record_failure(name)
            raise

    async def wait(self, key_id: str) -> None:
        """Wait as long as the wrong tries so far ask for; raise ``rate_limited`` when many wait already."""
        seconds = self.delay(key_id)
        if not seconds:
            return
        tries = self._attempts[key_id]
        if tries.waiting >= MAX_WAITING:
            raise OctoError("Too many tries on that key.", code="rate_limited", retry_after=LONGEST_SECONDS)
        tries.waiting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            tries.waiting -= 1

    def record_failure(self, key_id: str) -> None:
        """Note a wrong try."""
        tries = self._attempts.setdefault(key_id, _FailedAttempts())
        self._attempts.move_to_end(key_id)
        now = self._clock.monotonic()
        tries.failures = 1 if now - tries.last_failed_at > FORGET_SECONDS else tries.failures + 1
        tries.last_failed_at = now
        if len(self._attempts) > MAX_KEYS:
            self._attempts.popitem(last=False)
