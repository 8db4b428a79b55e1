"""Masking of secrets, by the name of a member and by the form of a text, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping

MASK = "***"

_SECRET_NAMES = re.compile(
    r"authorization|cookie|api[_-]?key|secret|password|passwd|bearer|credential|private|^key$|^token$|access_token",
    re.IGNORECASE,
)
_SECRET_VALUES = re.compile(
    r"eyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"  # a JWT (also in a chain)
    r"|\bocto_[A-Za-z0-9_-]{8,}"  # our API keys
    r"|\bsk-[A-Za-z0-9_-]{8,}"  # providers' keys
    r"|(?<=://)[^/@\s:]*:[^/@\s]+(?=@)"  # user:password in a URL
    r"|(?i:(?<=bearer )\S+)"
)
_DEPTH = 6


def mask_text(text: str) -> str:
    """Return ``text`` with every recognisable secret replaced by ``***``."""
    return _SECRET_VALUES.sub(MASK, text)


def mask(value: object, depth: int = 0) -> object:
    """Return a copy of ``value`` with secrets replaced by ``***``; below six levels, everything is cut to ``…``."""
    if isinstance(value, str):
        return mask_text(value)
    if depth >= _DEPTH:
        return "…"
    if isinstance(value, Mapping):
        members: Mapping[object, object] = value  # pyright: ignore[reportUnknownVariableType]
        return {
            str(name): MASK if _SECRET_NAMES.search(str(name)) and item else mask(item, depth + 1)
            for name, item in members.items()
        }
    if isinstance(value, list | tuple):
        items: list[object] = list(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        return [mask(item, depth + 1) for item in items]
    return value
