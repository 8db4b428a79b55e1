"""Settings: environment variables, declared, read and checked in this package only.

Each setting is one field of :class:`Settings`, declared with its variable, default, meaning and parser. A wrong value
is refused with the variable's name, the value (masked for secrets) and the valid values. ``docs/settings.md`` has a
heading for each.
"""

from octollm.config.parsing import EventSinkUrl
from octollm.config.settings import (
    PREFIX,
    REMOVED,
    RENAMED,
    SETTING_SPECS,
    ClientSettings,
    Settings,
    read_client_settings,
    read_secret_file,
    read_settings,
    unknown_settings,
)

__all__ = [
    "PREFIX",
    "REMOVED",
    "RENAMED",
    "SETTING_SPECS",
    "ClientSettings",
    "EventSinkUrl",
    "Settings",
    "read_client_settings",
    "read_secret_file",
    "read_settings",
    "unknown_settings",
]
