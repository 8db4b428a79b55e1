"""How often one key, or one address without a valid key, may call."""

from __future__ import annotations

import ipaddress

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
