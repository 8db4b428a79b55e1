"""The text that a running step writes: streamed to Redis as it comes, saved to SQL every second."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType

from octollm.concurrency import BackgroundLoop
from octollm.errors import OctoError
from octollm.storage.text_stream import MAX_TEXT, TextStream
from octollm.tasks.store import TaskStore
from octollm.telemetry import Logger

FLUSH_SECONDS = 0.04
SAVE_SECONDS = 1.0
MAX_STEP_TEXT = 1024 * 1024
"""Code points of one attempt's text; what is written past it is not kept for watchers."""


class LiveText:
    """One attempt's text. ``async with`` it around the call that writes."""

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
        # Offsets count all that this attempt and run wrote, so that one never means two places: a reset moves
        # the base and takes nothing back.
        self._length = 0
        self._base = 0
        self._sent = 0
        self._pending: list[str] = []
        self._reset = True
        self._dirty = False
        self._wakeup = asyncio.Event()
        self._saved_at = 0.0
        self._flushing = BackgroundLoop("live text", self._flush_round, log=log)

    async def __aenter__(self) -> LiveText:
        self._saved_at = asyncio.get_running_loop().time()
        self._flushing.start()
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        # The loop ends before the last flush: two flushes at once could append their pieces out of order.
        await self._flushing.aclose()
        self._flushing.raise_if_crashed()
        await self._flush()
        await self._save()

    @property
    def length(self) -> int:
        """Return the offset behind the text, what was voided included."""
        return self._length

    def add(self, text: str, *, reset: bool = False) -> None:
        """Take text that was written; ``reset`` voids what was written before."""
        if reset:
            self._parts, self._pending = [], []
            self._base = self._sent = self._length
            self._reset = True
        text = text[: max(0, MAX_STEP_TEXT - (self._length - self._base))]
        if text or reset:
            self._parts.append(text)
            self._pending.append(text)
            self._length += len(text)
            self._dirty = True
            self._wakeup.set()

    async def _flush_round(self) -> None:
        await self._wakeup.wait()
        await asyncio.sleep(FLUSH_SECONDS)  # text that follows at once is sent with this one
        self._wakeup.clear()
        await self._flush()
        now = asyncio.get_running_loop().time()
        if now - self._saved_at >= SAVE_SECONDS:
            self._saved_at = now
            await self._save()

    async def _flush(self) -> None:
        while self._pending:
            text, self._pending = "".join(self._pending), []
            piece, rest = text[:MAX_TEXT], text[MAX_TEXT:]
            if rest:
                self._pending.insert(0, rest)
            offset, reset = self._sent, self._reset
            self._sent, self._reset = offset + len(piece), False
            # Without Redis nobody can be told now; the text is saved to SQL and read from there.
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
        # Cleared before the write: text that is added during it sets the flag again.
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
