"""When to try a failed call again, and how long to wait before."""

from __future__ import annotations

from dataclasses import dataclass


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
