"""The text of a running step: streamed to Redis within milliseconds, saved to SQL every second.

Redis makes it live, SQL makes it durable: after a loss of Redis, or when a client connects late, the text is rebuilt
from SQL.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType

from octollm.concurrency import BackgroundLoop
from octollm.errors import OctoError
from octollm.storage.characters import NUL, REPLACEMENT
from octollm.storage.text_stream import MAX_TEXT, TextStream
from octollm.tasks.store import TaskStore
from octollm.telemetry import Logger

FLUSH_SECONDS = 0.04
"""Text is collected for this long before it is sent: 25 updates a second look continuous, and a model that writes
hundreds of tokens a second causes no more Redis commands than that."""
SAVE_SECONDS = 1.0
"""The time between two saves to SQL, and the most text in seconds that is lost when both worker and Redis die."""
MAX_STEP_TEXT = 1024 * 1024
"""Code points of one attempt's live text; the rest is dropped from the live view, not from the result."""


class LiveText:
    """The live text of one attempt. Use ``async with`` around the call that produces it."""

    def __init__(
        self, store: TaskStore, stream: TextStream, log: Logger, *, task_id: str, step: str, attempt: int, epoch: int
    ) -> None:
        self._store = store
        self._stream = stream
        self._log = log
        self._task_id = task_id
        self._step = step
        self._attempt = attempt
        self._epoch = epoch
        self._parts: list[str] = []
        # Offsets count every code point that this attempt and epoch wrote, including discarded ones. A reset therefore
        # moves the base forward rather than back to 0, and an offset that a client remembers is never ambiguous.
        self._length = 0
        self._base = 0
        self._sent_offset = 0
        self._pending: list[str] = []
        self._reset = True
        self._dirty = False
        self._wakeup = asyncio.Event()
        self._saved_at = 0.0
        self._is_flushing = False
        self._flush_loop = BackgroundLoop("live text", self._flush_round, log=log)

    async def __aenter__(self) -> LiveText:
        self._saved_at = asyncio.get_running_loop().time()
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        # The loop ends before the last flush, because two concurrent flushes could append out of order.
        await self._flush_loop.aclose()
        self._flush_loop.raise_if_crashed()
        await self._flush()
        await self._save()

    @property
    def length(self) -> int:
        """Return the offset after the last code point, discarded text included."""
        return self._length

    def add(self, text: str, *, reset: bool = False) -> None:
        """Append text; ``reset`` discards what was written before."""
        if reset:
            self._parts, self._pending = [], []
            self._base = self._sent_offset = self._length
            self._reset = True
        text = text.replace(NUL, REPLACEMENT)[: max(0, MAX_STEP_TEXT - (self._length - self._base))]
        if text or reset:
            self._parts.append(text)
            self._pending.append(text)
            self._length += len(text)
            self._dirty = True
            if not self._is_flushing:
                # Most arms write no text, and need no loop.
                self._is_flushing = True
                self._flush_loop.start()
            self._wakeup.set()

    async def _flush_round(self) -> None:
        await self._wakeup.wait()
        await asyncio.sleep(FLUSH_SECONDS)  # coalesces the text that arrives in the meantime
        # Cleared before the flush, so that text added while it waits for Redis starts another round.
        self._wakeup.clear()
        await self._flush()
        now = asyncio.get_running_loop().time()
        if now - self._saved_at >= SAVE_SECONDS:
            self._saved_at = now
            await self._save()

    async def _flush(self) -> None:
        while self._pending:
            text, self._pending = "".join(self._pending), []
            piece, remainder = text[:MAX_TEXT], text[MAX_TEXT:]
            if remainder:
                self._pending.insert(0, remainder)
            offset, reset = self._sent_offset, self._reset
            self._sent_offset, self._reset = offset + len(piece), False
            # Advanced before the await and not rolled back on failure: without Redis this text is missing from the
            # stream, readers notice the gap in the offsets, and read it from SQL.
            with contextlib.suppress(OctoError):
                await self._stream.append(
                    self._task_id,
                    step=self._step,
                    attempt=self._attempt,
                    run=self._epoch,
                    offset=offset,
                    text=piece,
                    reset=reset,
                )

    async def _save(self) -> None:
        if not self._dirty:
            return
        # Cleared before the write, so that text added during it sets the flag again.
        self._dirty = False
        try:
            await self._store.save_text(
                self._task_id,
                self._step,
                attempt=self._attempt,
                epoch=self._epoch,
                base=self._base,
                text="".join(self._parts),
            )
        except OctoError as error:
            self._dirty = True
            self._log.warning("task.text_not_saved", step=self._step, error=error)
