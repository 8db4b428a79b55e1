"""Waiting, at the start of a service, for what it needs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.rpc.outcomes import AWAY

PAUSE_SECONDS = 0.5
TELL_SECONDS = 5.0
"""What is waited for is told again after so long."""

Need = Callable[[], Awaitable[None]]
"""Returns when something is there; raises an ``OctoError`` that says what is wrong with it."""


async def wait_for(needs: Mapping[str, Need], *, clock: Clock, seconds: float, tell: Callable[[str], None]) -> None:
    """Wait until every one of ``needs`` is there, at most ``seconds``; ``tell`` is given what is waited for.

    Raises ``unavailable`` naming what did not come, and at once what waiting cannot mend.
    """
    end = clock.monotonic() + seconds
    told, told_at = "", -TELL_SECONDS
    waiting = dict(needs)
    while True:
        reasons: dict[str, str] = {}
        for name, need in tuple(waiting.items()):
            try:
                async with asyncio.timeout(max(1.0, end - clock.monotonic())):
                    await need()
                del waiting[name]
            except TimeoutError:
                reasons[name] = "It does not answer."
            except OctoError as error:
                if error.code not in AWAY:
                    raise
                reasons[name] = error.detail
        if not waiting:
            return
        sentence = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        now = clock.monotonic()
        if now >= end:
            raise OctoError(
                f"Gave up after {seconds:g} s of waiting for {sentence} Start what is missing, or set"
                " OCTOLLM_START_SECONDS to wait longer.",
                code="unavailable",
            )
        if sentence != told or now - told_at >= TELL_SECONDS:
            told, told_at = sentence, now
            tell(sentence)
        await asyncio.sleep(PAUSE_SECONDS)
