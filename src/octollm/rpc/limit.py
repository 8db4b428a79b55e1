"""The time limit of one piece of work: :func:`asyncio.timeout` for where it is entered with every call."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from octollm.errors import OctoError
from octollm.resilience import Deadline


class DeadlineScope:
    """Cancels the task that opened it once ``deadline`` has passed, which then sees ``deadline_exceeded``."""

    __slots__ = ("_deadline", "_expired", "_task", "_timer")

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._expired = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._deadline.raise_if_passed()
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._deadline.remaining(), self._expire)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._expired or self._task is None:
            return
        # Another may have cancelled the task as well: that one stands.
        others = self._task.uncancel()
        if others == 0 and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise OctoError("The time for this call is used up.", code="deadline_exceeded") from error

    def _expire(self) -> None:
        self._expired = True
        if self._task is not None:
            self._task.cancel()
