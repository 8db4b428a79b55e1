"""From where a watcher goes on: the query parameters ``after`` and ``offset``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from octollm.errors import OctoError

MAX_OFFSETS = 64
"""Running steps that one watcher may name."""
_SEQ = re.compile(r"[0-9]{1,15}")
_OFFSET = re.compile(r"([A-Za-z0-9._-]{1,64})\.([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class TextOffset:
    """The text of one step that a watcher has: up to ``count`` code points of this attempt and run."""

    attempt: int
    run: int
    count: int


@dataclass(frozen=True, slots=True)
class ResumePosition:
    """``after`` is the last ``seq`` that the watcher has; ``None`` asks for the present state, 0 for everything."""

    after: int | None = None
    offsets: Mapping[str, TextOffset] = field(default_factory=dict[str, TextOffset])


def parse_resume_position(after: str | None, offsets: Iterable[str]) -> ResumePosition:
    """Read the parameters; an offset is ``<step>.<attempt>.<run>.<n>``.

    Raises ``invalid_parameter`` for anything else, for a step named twice and for more than 64 of them.
    """
    if after is not None and not _SEQ.fullmatch(after):
        raise OctoError("`after` must be the seq of a frame: a whole number.", code="invalid_parameter")
    found: dict[str, TextOffset] = {}
    for text in offsets:
        match = _OFFSET.fullmatch(text)
        if match is None:
            raise OctoError("`offset` must be <step>.<attempt>.<run>.<n>.", code="invalid_parameter")
        if match[1] in found or len(found) >= MAX_OFFSETS:
            raise OctoError(
                f"`offset` may be given once per running step, {MAX_OFFSETS} times at most.", code="invalid_parameter"
            )
        found[match[1]] = TextOffset(int(match[2]), int(match[3]), int(match[4]))
    return ResumePosition(None if after is None else int(after), found)
