"""How often an address may be refused before it has to wait."""

from __future__ import annotations

from collections import OrderedDict

from octollm.clock import Clock
from octollm.errors import OctoError

MAX_FAILURES = 10
THROTTLE_WINDOW_SECONDS = 60.0
MAX_ADDRESSES = 4096
"""Addresses that are counted; the one not heard of for longest goes first."""


class FailedEnrolmentThrottle:
    """Counts refusals by address, in this process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def check(self, address: str) -> None:
        """Raise ``rate_limited`` for an address that was refused too often within the last minute."""
        began, count = self._failures.get(address, (0.0, 0))
        left = began + THROTTLE_WINDOW_SECONDS - self._clock.monotonic()
        if count >= MAX_FAILURES and left > 0:
            raise OctoError("Too many refused attempts; wait before the next.", code="rate_limited", retry_after=left)

    def record_failure(self, address: str) -> None:
        """Count a refusal."""
        now = self._clock.monotonic()
        began, count = self._failures.pop(address, (now, 0))
        if now - began >= THROTTLE_WINDOW_SECONDS:
            began, count = now, 0
        self._failures[address] = (began, count + 1)
        while len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)
