"""Every Redis key and channel: name, type, meaning, time to live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TEXT_TTL_SECONDS = 3600
"""Lifetime of a task's token stream after its last write; the text is also in SQL."""
TEXT_MAX_ENTRIES = 10_000
"""Entries of a task's token stream; older ones are dropped."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One key or channel: ``name`` with placeholders in braces, ``ttl`` as text."""

    name: str
    kind: Literal["channel", "stream"]
    meaning: str
    ttl: str


REDIS_KEYS: tuple[KeyInfo, ...] = (
    KeyInfo("events:{entity}:{action}", "channel", "One event as JSON: the ADR's envelope.", "none"),
    KeyInfo("octollm:watch:{task_id}", "channel", "A hint: the event of a task as JSON, or 'text'.", "none"),
    KeyInfo("octollm:cancel", "channel", "A hint: the task_id of a task that was cancelled.", "none"),
    KeyInfo(
        "octollm:text:{task_id}",
        "stream",
        "Token text of a task's steps; each entry carries step, attempt, run, offset.",
        f"{TEXT_TTL_SECONDS} s after the last write, {TEXT_MAX_ENTRIES} entries",
    ),
)
"""The register of all names, for the documentation and for operators who inspect Redis."""


class RedisKeys:
    """The names, each with a ``prefix``, which is empty except in tests.

    ``octollm:`` names are private to this project; the ``events:*`` channels are public.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.cancel = f"{prefix}octollm:cancel"

    def channel(self, channel: str) -> str:
        """Return an event channel or pattern, e.g. ``events:task:completed`` or ``events:task:*``."""
        return f"{self.prefix}{channel}"

    def watch(self, task_id: str) -> str:
        """Return the channel of hints on one task."""
        return f"{self.prefix}octollm:watch:{task_id}"

    def text(self, task_id: str) -> str:
        """Return the stream of one task's token text."""
        return f"{self.prefix}octollm:text:{task_id}"
