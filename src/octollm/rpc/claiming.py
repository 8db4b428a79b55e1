"""Claiming a key in a batch with others, for a caller who may leave before the batch is done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from octollm.errors import OctoError
from octollm.rpc.batches import GroupCommit
from octollm.rpc.idempotency import Claimed, ClaimOutcome, IdempotencyKey

I = TypeVar("I")  # noqa: E741  an item


class CancellableClaims(Generic[I]):
    """Waits for claims; what was claimed for a caller who has gone is released."""

    def __init__(
        self, batches: GroupCommit[I, ClaimOutcome], release: Callable[[IdempotencyKey, int], Awaitable[None]]
    ) -> None:
        self._batches = batches
        self._release = release
        self._releasing: set[asyncio.Task[None]] = set()

    async def claim(self, item: I, key: IdempotencyKey) -> ClaimOutcome:
        """Return how the claim ``item`` of ``key`` ended."""
        outcome = self._batches.put(item)
        try:
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            outcome.add_done_callback(lambda ended: self._release_claimed(key, ended))
            raise

    def _release_claimed(self, key: IdempotencyKey, ended: asyncio.Future[ClaimOutcome]) -> None:
        if ended.cancelled() or ended.exception() is not None:
            return
        outcome = ended.result()
        if isinstance(outcome, Claimed):
            task = asyncio.create_task(self._release_quietly(key, outcome.epoch))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _release_quietly(self, key: IdempotencyKey, epoch: int) -> None:
        with contextlib.suppress(OctoError):  # the claim ends with its lease
            await self._release(key, epoch)
