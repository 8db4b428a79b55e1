"""Packages whose public names are imported when they are first used (PEP 562).

Such a package exports names of modules that need different libraries. A process loads the libraries of the names that
it imports, and no other: a service without SQL takes its Redis client from ``octollm.storage`` without SQLAlchemy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_exports(
    package: str, exports: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of ``package``; ``exports`` has the names that it takes from each module.

    The package imports the same names if ``TYPE_CHECKING``, and defines the two functions only otherwise: a type
    checker that knows a module's ``__getattr__`` accepts every name.
    """
    modules = {name: module for module, names in exports.items() for name in names}

    def get_attribute(name: str) -> object:
        if name not in modules:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; it offers {', '.join(sorted(modules))}"
            )
        return getattr(import_module(modules[name]), name)

    def list_attributes() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get_attribute, list_attributes
