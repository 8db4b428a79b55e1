"""What the operations share: reading query parameters, and the answer that says only that it was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from octollm.errors import OctoError


class Done(msgspec.Struct, frozen=True):
    """It was done."""

    status: str = "ok"


def integer(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """Return a whole number; raise ``invalid_parameter`` for one out of range or none at all."""
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and low <= int(text) <= high):
        raise OctoError(f"{name} must be a whole number from {low} to {high}.", code="invalid_parameter")
    return int(text)


def word(query: Mapping[str, str], name: str, words: Sequence[str]) -> str | None:
    """Return one of ``words`` or ``None`` when absent; raise ``invalid_parameter`` for another."""
    text = query.get(name)
    if text is not None and text not in words:
        raise OctoError(f"{name} must be one of {', '.join(words)}.", code="invalid_parameter")
    return text
