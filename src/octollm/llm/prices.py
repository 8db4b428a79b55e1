"""What a call costs."""

from __future__ import annotations

from octollm.llm.catalogue import MODEL_CATALOGUE
from octollm.llm.types import ChatUsage

_FREE_MODELS = frozenset(entry.name for entry in MODEL_CATALOGUE)


def cost_usd(model: str, usage: ChatUsage) -> float | None:
    """Return the price of ``usage`` in US dollars, or ``None`` when the price of ``check_model`` is not known.

    The embedded models cost nothing, whatever the usage.
    """
    del usage
    return 0.0 if model in _FREE_MODELS else None
