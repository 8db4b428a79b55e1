"""Slowing down who guesses a key: each wrong try makes the next on the same key wait longer. No I/O but the waiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator

from octollm.clock import Clock
from octollm.errors import OctoError

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
