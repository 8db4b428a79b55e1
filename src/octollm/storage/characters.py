"""U+0000, the one character that PostgreSQL cannot store in a text. SQLite can, so both are kept from it alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, cast

import msgspec

NUL = "\x00"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
T = TypeVar("T")


def find_nul(value: object) -> str | None:
    """Return the JSON Pointer of the first text with U+0000 in a message; ``None`` without one."""
    if b"\\u0000" not in msgspec.json.encode(value):
        return None
    return next(_find(msgspec.to_builtins(value), ""), None)


def replace_nul(value: T) -> T:
    """Return a message with U+0000 replaced in all of its texts, as a terminal would show it."""
    if b"\\u0000" not in msgspec.json.encode(value):
        return value
    return msgspec.convert(_replace(msgspec.to_builtins(value)), type(value))


def _find(value: object, pointer: str) -> Iterator[str]:
    if isinstance(value, str):
        if NUL in value:
            yield pointer
    elif isinstance(value, dict):
        for name, member in cast("dict[str, object]", value).items():
            escaped = name.replace("~", "~0").replace("/", "~1")
            yield from _find(name, pointer)
            yield from _find(member, f"{pointer}/{escaped}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(cast("list[object]", value)):
            yield from _find(item, f"{pointer}/{index}")


def _replace(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(NUL, REPLACEMENT)
    if isinstance(value, dict):
        members = cast("dict[str, object]", value)
        return {_replace(name): _replace(member) for name, member in members.items()}
    if isinstance(value, list | tuple):
        return [_replace(item) for item in cast("list[object]", value)]
    return value
