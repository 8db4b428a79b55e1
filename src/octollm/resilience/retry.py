"""Deadlines and retries as pure decisions: the time left for a call, exponential backoff with full jitter, the retry budget, and riding out an outage."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from octollm.clock import Clock
from octollm.errors import OctoError

MAX_DEADLINE_SECONDS = 3600.0
"""The longest life of a step, and so of a call."""


class Deadline(msgspec.Struct, frozen=True):
    """A moment on this process's monotonic clock."""

    clock: Clock
    expires_at: float

    @classmethod
    def after(cls, clock: Clock, seconds: float) -> Deadline:
        """Return the deadline ``seconds`` from now, at most an hour."""
        return cls(clock, clock.monotonic() + min(max(seconds, 0.0), MAX_DEADLINE_SECONDS))

    def remaining(self) -> float:
        """Return the seconds left; 0 when it has passed."""
        return max(0.0, self.expires_at - self.clock.monotonic())

    def raise_if_passed(self) -> None:
        """Raise ``deadline_exceeded`` when it has passed."""
        if self.remaining() <= 0:
            raise OctoError("The time for this work is used up.", code="deadline_exceeded")

    def to_header(self) -> str:
        """Return the ``X-Timeout-Ms`` header: milliseconds left, relative so that clocks need not agree."""
        return str(max(1, int(self.remaining() * 1000)))


def parse_timeout_ms(text: str | None) -> float | None:
    """Read ``X-Timeout-Ms`` as seconds; ``None`` when absent. Raises ``invalid_header`` when malformed."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= 9):
        raise OctoError("X-Timeout-Ms must be a whole number of milliseconds.", code="invalid_header")
    return int(text) / 1000


@dataclass(frozen=True, slots=True)
class CallFailure:
    """How a try failed.

    ``began`` is false when the request surely never reached the handler (no connection, or shed with 503).
    ``retry_after`` is what the peer asked for, in seconds. ``away`` says that a service was not there, which may
    change soon.
    """

    retryable: bool
    may_have_started: bool
    retry_after: float | None = None
    is_outage: bool = False


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter; ``base`` and ``cap`` in seconds."""

    max_attempts: int = 3
    base_delay: float = 0.1
    max_delay: float = 5.0

    def next_delay(
        self, failure: CallFailure, *, attempt: int, is_idempotent: bool, remaining: float, random: float
    ) -> float | None:
        """Return the seconds to wait before the next try, or ``None`` to stop.

        ``tried`` counts the tries so far; ``repeats_safely`` says that the operation is safe or carries a key;
        ``left`` is the deadline in seconds; ``random`` is uniform in [0, 1).
        """
        if attempt >= self.max_attempts or not failure.retryable:
            return None
        if failure.may_have_started and not is_idempotent:
            return None
        delay = random * min(self.max_delay, self.base_delay * 2.0 ** (attempt - 1))
        if failure.retry_after is not None:
            delay = max(delay, failure.retry_after)
        return delay if delay < remaining else None


@dataclass(frozen=True, slots=True)
class OutageRetry:
    """How long to go on trying while a service is away, ``pause`` seconds apart: it restarts, or another takes over.

    It comes after :class:`RetryPolicy` and outside its budget: one try a second of one call multiplies no outage.
    """

    max_seconds: float = 0.0
    interval: float = 1.0

    def next_delay(
        self, failure: CallFailure, *, elapsed: float, is_idempotent: bool, remaining: float
    ) -> float | None:
        """Return the seconds to wait before the next try, or ``None`` to stop.

        ``waited`` is how long the call has been failing; the other parameters are those of :meth:`RetryPolicy.wait`.
        """
        if not failure.is_outage or (failure.may_have_started and not is_idempotent):
            return None
        return self.interval if elapsed + self.interval <= self.max_seconds and self.interval < remaining else None


class RetryBudget:
    """Retries are at most a share of the calls, so that an outage is not multiplied.

    Each call earns ``share`` of a retry; unspent ones are kept up to ``most``.
    """

    def __init__(self, ratio: float = 0.2, capacity: float = 10.0) -> None:
        self._ratio = ratio
        self._capacity = capacity
        self._balance = capacity

    def earn(self) -> None:
        """Count one first try."""
        self._balance = min(self._capacity, self._balance + self._ratio)

    def spend(self) -> bool:
        """Take one retry; false when none is left."""
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True
