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

CHECK_TIMEOUT_SECONDS = 20.0
"""How long one check may take: compiling the WebAssembly sandbox for the first time is the longest."""


class CheckResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that was looked at. ``todo`` says what mends it; empty when nothing has to be done."""

    check: str
    level: Level
    found: str
    todo: str = ""


@dataclass(frozen=True, slots=True)
class DiagnosticCheck:
    """A check by its name. ``look`` may find several things, and raises ``OctoError`` for what is broken."""

    name: str
    run: Callable[[], Awaitable[Sequence[CheckResult]]]


async def run_checks(checks: Sequence[DiagnosticCheck], *, timeout: float = CHECK_TIMEOUT_SECONDS) -> list[CheckResult]:
    """Run ``checks`` side by side and return what they found, in their order. None outlasts ``seconds``."""
    found = await asyncio.gather(*(_run_check(check, timeout) for check in checks))
    return [finding for findings in found for finding in findings]


async def _run_check(check: DiagnosticCheck, timeout: float) -> Sequence[CheckResult]:
    try:
        async with asyncio.timeout(timeout):
            return await check.run()
    except TimeoutError:
        return [CheckResult(check.name, "broken", f"no answer within {timeout:g} s", "Look at what it waits for.")]
    except OctoError as error:
        # Every error says in its own words what to do.
        return [CheckResult(check.name, "broken", str(mask(error.detail)))]
