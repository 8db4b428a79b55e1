"""How long a watcher bears that the door is away, and how it spaces its tries to come back."""

from __future__ import annotations

import random

from octollm.client.door import Door
from octollm.client.errors import DoorError, Unavailable
from octollm.resilience import Failure, RetryPolicy

PATIENCE_SECONDS = 60.0
"""How long the door may be away before a watcher gives up."""
_SPACING = RetryPolicy(attempts=1_000_000, base=0.2, cap=2.0)
"""The time bounds the tries, not their number."""


class Patience:
    """Counts from the moment when the door was lost to the one when it is back."""

    def __init__(self, door: Door, seconds: float) -> None:
        self._door = door
        self._seconds = seconds
        self._until: float | None = None
        self._tried = 0

    def back(self) -> None:
        """Note that the door has told something."""
        self._until = None
        self._tried = 0

    def wait(self, error: DoorError, what: str) -> float:
        """Return the seconds until the next try.

        Raises ``error`` itself when trying again cannot help, and :class:`Unavailable` when the time is used up;
        ``what`` says how to go on then.
        """
        if not error.retryable:
            raise error
        now = self._door.clock.monotonic()
        if self._until is None:
            self._until = now + self._seconds
        self._tried += 1
        delay = _SPACING.wait(
            Failure(True, began=False, retry_after=error.retry_after),
            tried=self._tried,
            repeats_safely=True,
            left=self._until - now,
            random=random.random(),  # noqa: S311  jitter is no secret
        )
        if delay is None:
            raise Unavailable(
                f"{self._door.url} has been away for {self._seconds:g} s. {what}", code="unavailable"
            ) from error
        return delay
