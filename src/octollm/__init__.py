"""OctoLLM: a team of LLM agents as secure, observable services.

Importing this package does nothing. Its submodules are the layers; what is
named here is the public API, each name imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octollm.client import connect, connect_sync

__all__ = [
    "__version__",
    # A client of an installation
    "connect",
    "connect_sync",
]

__version__ = "0.1.0"

_HOMES = {
    "connect": "octollm.client",
    "connect_sync": "octollm.client",
}
"""Where each name of the public API lives."""


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
