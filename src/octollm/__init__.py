"""OctoLLM: a team of LLM agents as secure, observable services.

Importing this package does nothing. Its submodules are the layers; what is
named here is the public API, and each name is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octollm.arm import Arm, Context
    from octollm.client import connect, connect_sync
    from octollm.contracts.task import Artifact, Evidence, ExecuteResult, FileRef, Task
    from octollm.errors import OctoError

__all__ = [  # noqa: RUF022  (grouped by what they are for)
    # Writing an arm
    "Arm",
    "Context",
    "Task",
    # What an arm is given and answers
    "Artifact",
    "Evidence",
    "ExecuteResult",
    "FileRef",
    # A client of an installation
    "connect",
    "connect_sync",
    # What goes wrong
    "OctoError",
    # This package
    "__version__",
]

__version__ = "0.1.0"

_PLACES = {
    "Arm": ("octollm.arm", "Arm"),
    "Artifact": ("octollm.contracts.task", "Artifact"),
    "Context": ("octollm.arm", "Context"),
    "Evidence": ("octollm.contracts.task", "Evidence"),
    "ExecuteResult": ("octollm.contracts.task", "ExecuteResult"),
    "FileRef": ("octollm.contracts.task", "FileRef"),
    "OctoError": ("octollm.errors", "OctoError"),
    "Task": ("octollm.contracts.task", "Task"),
    "connect": ("octollm.client", "connect"),
    "connect_sync": ("octollm.client", "connect_sync"),
}
"""Where each public name lives: a module, and what the name is called there."""


def __getattr__(name: str) -> object:
    """Fetch a public name (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'octollm' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")
    module, inner = _PLACES[name]
    return getattr(import_module(module), inner)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
