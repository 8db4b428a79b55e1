"""Every Redis key and channel: name, type, meaning, time to live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TEXT_TTL_SECONDS = 3600
"""Lifetime of a task's token stream after its last write; the text is also in SQL."""
TEXT_MAX_ENTRIES = 10_000
"""Entries of a task's token stream; older ones are dropped."""

CACHE_TTL_SECONDS = 60
"""Lifetime of a cached value: what bounds its age when an invalidation never arrives."""
GENERATION_TTL_SECONDS = 600
"""Lifetime of a cache generation; it is a random name, so that a new one matches no older value."""
CACHE_WRITE_SECONDS = 30
"""Lifetime of the mark of a write, longer than a transaction takes."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One key or channel: ``name`` with placeholders in braces, ``ttl`` as text."""

    name: str
    kind: Literal["channel", "stream", "string"]
    meaning: str
    ttl: str


REDIS_KEYS: tuple[KeyInfo, ...] = (
    KeyInfo("events:{entity}:{action}", "channel", "One event as JSON: the ADR's envelope.", "none"),
    KeyInfo("octollm:log", "channel", "A batch of the log: its events in order, as a JSON array.", "none"),
    KeyInfo("octollm:watch:{task_id}", "channel", "A hint: the event of a task as JSON, or 'text'.", "none"),
    KeyInfo("octollm:commits", "channel", "A hint to the outbox publisher: a replica committed events.", "none"),
    KeyInfo("octollm:acks", "channel", "A hint: a replica, and a subscription whose deliveries it recorded.", "none"),
    KeyInfo(
        "octollm:queue", "channel", "A hint to workers with room: a task waits that the sender cannot run.", "none"
    ),
    KeyInfo("octollm:cancel", "channel", "A hint: the task_id of a task that was cancelled.", "none"),
    KeyInfo(
        "octollm:text:{task_id}",
        "stream",
        "Token text of a task's steps; each entry carries step, attempt, run, offset.",
        f"{TEXT_TTL_SECONDS} s after the last write, {TEXT_MAX_ENTRIES} entries",
    ),
    KeyInfo(
        "octollm:cache:{{tenant}}:generation:{scope}",
        "string",
        "The generation of a cache scope; tenant and scope are digests.",
        f"{GENERATION_TTL_SECONDS} s; {CACHE_WRITE_SECONDS} s during a write",
    ),
    KeyInfo(
        "octollm:cache:{{tenant}}:value:{key}",
        "string",
        "A cached response of the memory, with the generations that it belongs to.",
        f"{CACHE_TTL_SECONDS} s",
    ),
)
"""The register of all names, for the documentation and for operators who inspect Redis."""


class RedisKeys:
    """The names, each with a ``prefix``, which is empty except in tests.

    ``octollm:`` names are private to this project; the ``events:*`` channels are public.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.commits = f"{prefix}octollm:commits"
        self.acks = f"{prefix}octollm:acks"
        self.cancel = f"{prefix}octollm:cancel"
        self.queue = f"{prefix}octollm:queue"
        self.log = f"{prefix}octollm:log"

    def channel(self, channel: str) -> str:
        """Return an event channel or pattern, e.g. ``events:task:completed`` or ``events:task:*``."""
        return f"{self.prefix}{channel}"

    def watch(self, task_id: str) -> str:
        """Return the channel of hints on one task."""
        return f"{self.prefix}octollm:watch:{task_id}"

    def text(self, task_id: str) -> str:
        """Return the stream of one task's token text."""
        return f"{self.prefix}octollm:text:{task_id}"

    def cache_generation(self, tenant: str, scope: str) -> str:
        """Return the key of a cache scope's generation. ``tenant`` and ``scope`` are digests.

        The braces are a hash tag: Redis Cluster keeps the keys of a tenant together, so that MGET reads them at once.
        """
        return f"{self.prefix}octollm:cache:{{{tenant}}}:generation:{scope}"

    def cache_value(self, tenant: str, key: str) -> str:
        """Return the key of a cached value, near the generations of its tenant."""
        return f"{self.prefix}octollm:cache:{{{tenant}}}:value:{key}"
