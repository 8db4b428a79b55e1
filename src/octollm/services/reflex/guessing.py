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


class _Tries:
    __slots__ = ("at", "waiting", "wrong")

    def __init__(self) -> None:
        self.wrong = 0
        self.waiting = 0
        self.at = 0.0


class Guessing:
    """Wrong tries by key. A right one is never refused for the wrong ones of others, only slowed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tries: OrderedDict[str, _Tries] = OrderedDict()

    def delay(self, name: str) -> float:
        """Return how long the next try on the key ``name`` has to wait, in seconds."""
        tries = self._tries.get(name)
        if tries is None or tries.wrong == 0 or self._clock.monotonic() - tries.at > FORGET_SECONDS:
            return 0.0
        return min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(tries.wrong - 1, 16))

    @contextlib.asynccontextmanager
    async def trying(self, credential: str) -> AsyncGenerator[None]:
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
                self.wrong(name)
            raise

    async def wait(self, name: str) -> None:
        """Wait as long as the wrong tries so far ask for; raise ``rate_limited`` when many wait already."""
        seconds = self.delay(name)
        if not seconds:
            return
        tries = self._tries[name]
        if tries.waiting >= MAX_WAITING:
            raise OctoError("Too many tries on that key.", code="rate_limited", retry_after=LONGEST_SECONDS)
        tries.waiting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            tries.waiting -= 1

    def wrong(self, name: str) -> None:
        """Note a wrong try."""
        tries = self._tries.setdefault(name, _Tries())
        self._tries.move_to_end(name)
        now = self._clock.monotonic()
        tries.wrong = 1 if now - tries.at > FORGET_SECONDS else tries.wrong + 1
        tries.at = now
        if len(self._tries) > MAX_KEYS:
            self._tries.popitem(last=False)
