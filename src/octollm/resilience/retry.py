"""When to try a failed call again, and how long to wait before."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """How a try failed.

    ``began`` is false when the request surely never reached the handler (no connection, or shed with 503).
    ``retry_after`` is what the peer asked for, in seconds. ``away`` says that a service was not there, which may
    change soon.
    """

    retryable: bool
    began: bool
    retry_after: float | None = None
    away: bool = False


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter; ``base`` and ``cap`` in seconds."""

    attempts: int = 3
    base: float = 0.1
    cap: float = 5.0

    def wait(self, failure: Failure, *, tried: int, repeats_safely: bool, left: float, random: float) -> float | None:
        """Return the seconds to wait before the next try, or ``None`` to stop.

        ``tried`` counts the tries so far; ``repeats_safely`` says that the operation is safe or carries a key;
        ``left`` is the deadline in seconds; ``random`` is uniform in [0, 1).
        """
        if tried >= self.attempts or not failure.retryable:
            return None
        if failure.began and not repeats_safely:
            return None
        delay = random * min(self.cap, self.base * 2.0 ** (tried - 1))
        if failure.retry_after is not None:
            delay = max(delay, failure.retry_after)
        return delay if delay < left else None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on trying while a service is away, ``pause`` seconds apart: it restarts, or another takes over.

    It comes after :class:`RetryPolicy` and outside its budget: one try a second of one call multiplies no outage.
    """

    seconds: float = 0.0
    pause: float = 1.0

    def wait(self, failure: Failure, *, waited: float, repeats_safely: bool, left: float) -> float | None:
        """Return the seconds to wait before the next try, or ``None`` to stop.

        ``waited`` is how long the call has been failing; the other parameters are those of :meth:`RetryPolicy.wait`.
        """
        if not failure.away or (failure.began and not repeats_safely):
            return None
        return self.pause if waited + self.pause <= self.seconds and self.pause < left else None


class RetryBudget:
    """Retries are at most a share of the calls, so that an outage is not multiplied.

    Each call earns ``share`` of a retry; unspent ones are kept up to ``most``.
    """

    def __init__(self, share: float = 0.2, most: float = 10.0) -> None:
        self._share = share
        self._most = most
        self._saved = most

    def earn(self) -> None:
        """Count one first try."""
        self._saved = min(self._most, self._saved + self._share)

    def spend(self) -> bool:
        """Take one retry; false when none is left."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
