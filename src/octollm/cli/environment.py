"""The settings of a command, and what is wrong with them."""

from __future__ import annotations

import os

from octollm.cli.terminal import show_warning
from octollm.config import Settings, read_settings, unknown_settings
from octollm.contracts.services import SERVICES


def command_settings(*, warn: bool = True) -> Settings:
    """Read the settings from the environment; ``warn`` of names that nothing reads. Raises ``setting_invalid``."""
    services = tuple(SERVICES)
    for sentence in unknown_settings(os.environ, services) if warn else ():
        show_warning(sentence)
    return read_settings(os.environ, services)
