"""What a check of the installation found, and running checks side by side with a deadline each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from octollm.errors import OctoError
from octollm.telemetry import mask

Level = Literal["ok", "warning", "broken"]

CHECK_SECONDS = 20.0
"""How long one check may take: compiling the WebAssembly sandbox for the first time is the longest."""


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that was looked at. ``todo`` says what mends it; empty when nothing has to be done."""

    check: str
    level: Level
    found: str
    todo: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A check by its name. ``look`` may find several things, and raises ``OctoError`` for what is broken."""

    name: str
    look: Callable[[], Awaitable[Sequence[Finding]]]


async def look_at(checks: Sequence[Check], *, seconds: float = CHECK_SECONDS) -> list[Finding]:
    """Run ``checks`` side by side and return what they found, in their order. None outlasts ``seconds``."""
    found = await asyncio.gather(*(_look(check, seconds) for check in checks))
    return [finding for findings in found for finding in findings]


async def _look(check: Check, seconds: float) -> Sequence[Finding]:
    try:
        async with asyncio.timeout(seconds):
            return await check.look()
    except TimeoutError:
        return [Finding(check.name, "broken", f"no answer within {seconds:g} s", "Look at what it waits for.")]
    except OctoError as error:
        # Every error says in its own words what to do.
        return [Finding(check.name, "broken", str(mask(error.detail)))]
