"""Letting an arm of one's own into the installation of one's own home, without a secret handed around."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.text import Text

from octollm.arm import Arm
from octollm.cli.door import open_client
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import Settings
from octollm.installation.home import find_running
from octollm.installation.own_arm import open_arm_keys


async def with_enrolment_token(arm: Arm, settings: Settings, console: Console) -> Settings:
    """Return the settings with a join secret, where this home's own installation can be asked for one.

    Whoever owns the home may let in what they like; elsewhere an administrator hands a secret out.
    """
    if settings.enrolment_token is not None or settings.urls or await find_running(settings.home) is None:
        return settings
    if (await open_arm_keys(settings, arm.name, Uuid7Generator(SystemClock()))).is_enrolled:
        return settings
    async with open_client(settings) as octo:
        made = await octo.create_enrolment_token(arm.name, calls=arm.declared_calls, lifetime_seconds=600)
    console.print(Text.assemble(("Joins ", "octo.title"), f"{arm.name}, with the calls that it declares"))
    return replace(settings, join_secret=made.secret)
