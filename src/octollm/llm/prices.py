"""What a call costs."""

from __future__ import annotations

from octollm.llm.catalogue import CATALOGUE
from octollm.llm.types import ChatUsage

_FREE = frozenset(entry.name for entry in CATALOGUE)


def cost_usd(model: str, usage: ChatUsage) -> float | None:
    """Return the price of ``usage`` in US dollars, or ``None`` when the price of ``model`` is not known.

    The embedded models cost nothing, whatever the usage.
    """
    del usage
    return 0.0 if model in _FREE else None
