"""Waiting, at the start of a service, for what it needs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.rpc.outcomes import OUTAGE_CODES

POLL_SECONDS = 0.5
REPORT_SECONDS = 5.0
"""What is waited for is told again after so long."""

DependencyCheck = Callable[[], Awaitable[None]]
"""Returns when something is there; raises an ``OctoError`` that says what is wrong with it."""


async def wait_for_dependencies(
    checks: Mapping[str, DependencyCheck], *, clock: Clock, timeout: float, on_wait: Callable[[str], None]
) -> None:
    """Wait until every one of ``needs`` is there, at most ``seconds``; ``tell`` is given what is waited for.

    Raises ``unavailable`` naming what did not come, and at once what waiting cannot mend.
    """
    end = clock.monotonic() + timeout
    told, told_at = "", -REPORT_SECONDS
    waiting = dict(checks)
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
                if error.code not in OUTAGE_CODES:
                    raise
                reasons[name] = error.detail
        if not waiting:
            return
        sentence = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        now = clock.monotonic()
        if now >= end:
            raise OctoError(
                f"Gave up after {timeout:g} s of waiting for {sentence} Start what is missing, or set"
                " OCTOLLM_START_SECONDS to wait longer.",
                code="unavailable",
            )
        if sentence != told or now - told_at >= REPORT_SECONDS:
            told, told_at = sentence, now
            on_wait(sentence)
        await asyncio.sleep(POLL_SECONDS)
