"""The token text of a task's running steps, in one Redis Stream per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octollm.errors import OctoError
from octollm.storage.keys import TEXT_MAX_ENTRIES, TEXT_TTL_SECONDS, RedisKeys
from octollm.storage.redis_protocol import RedisClient, StreamEntry

MAX_TEXT = 64 * 1024
"""Code points of one entry."""
READ_COUNT = 500
"""Entries of one read."""
TEXT_HINT = b"text"
"""Payload on the task's watch channel when its text grew."""


@dataclass(frozen=True, slots=True)
class TextEntry:
    """A piece of a step's text. ``offset`` is that of its first code point in the text of this attempt and run.

    ``reset`` voids the earlier text of the step. Readers drop entries of an older ``run`` than the newest they have
    seen, and code points below the offset that they have reached; so duplicates and late writes do no harm.
    """

    id: str
    step: str
    attempt: int
    run: int
    offset: int
    text: str
    reset: bool


class TextStream:
    """Writes and reads the token streams, one for each task."""

    def __init__(
        self,
        redis: RedisClient,
        keys: RedisKeys,
        *,
        max_entries: int = TEXT_MAX_ENTRIES,
        ttl: int = TEXT_TTL_SECONDS,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._max_entries = max_entries
        self._ttl = ttl

    async def append(
        self,
        task_id: str,
        *,
        step: str,
        attempt: int,
        run: int,
        offset: int,
        text: str,
        reset: bool = False,
    ) -> str:
        """Append a piece, renew the stream's expiry and publish a hint on the task's watch channel; return its id.

        Raises ``invalid_body`` for more than ``MAX_TEXT`` code points, ``unavailable`` without Redis.
        """
        if len(text) > MAX_TEXT:
            raise OctoError(f"A piece of text has more than {MAX_TEXT} characters.", code="invalid_body")
        fields = {
            "step": step,
            "attempt": str(attempt),
            "run": str(run),
            "offset": str(offset),
            "text": text,
            "reset": "1" if reset else "0",
        }
        return await self._redis.stream_add(
            self._keys.text(task_id),
            fields,
            maxlen=self._max_entries,
            ttl=self._ttl,
            announce=(self._keys.watch(task_id), TEXT_HINT),
        )

    async def read(self, task_id: str, last_id: str = "0", *, block_ms: int = 0) -> Sequence[TextEntry]:
        """Return up to 500 entries after ``last_id`` (``"0"``: from the oldest), oldest first.

        With ``block_ms`` it waits for one, up to two seconds. That occupies a connection, so a process that watches
        many tasks should wait for hints instead. Raises ``peer_protocol`` for a malformed entry.
        """
        entries = await self._redis.stream_read(
            self._keys.text(task_id), after=last_id, count=READ_COUNT, block_ms=block_ms
        )
        return tuple(_parse_entry(entry) for entry in entries)

    async def delete(self, task_id: str) -> None:
        """Drop a task's stream."""
        await self._redis.delete(self._keys.text(task_id))


def _parse_entry(entry: StreamEntry) -> TextEntry:
    fields = entry.fields
    try:
        return TextEntry(
            id=entry.id,
            step=fields["step"],
            attempt=int(fields["attempt"]),
            run=int(fields["run"]),
            offset=int(fields["offset"]),
            text=fields["text"],
            reset=fields["reset"] == "1",
        )
    except (KeyError, ValueError) as error:
        raise OctoError("A token stream has a malformed entry.", code="peer_protocol") from error
