"""Deadline, retry policy and retry budget as pure decisions.

``RetryPolicy`` is exponential backoff with full jitter, ``RetryBudget`` bounds retries to a share of the calls, and
``OutageRetry`` rides out an outage. :func:`octollm.concurrency.retry` is the retry loop that follows a decision.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """How an attempt failed.

    ``may_have_started`` is false when the request certainly never reached the handler (no connection, or shed with
    503). ``retry_after`` is the pause that the peer asked for, in seconds. ``is_outage`` marks a service that is
    away, which may be over soon.
    """

    retryable: bool
    may_have_started: bool
    retry_after: float | None = None
    is_outage: bool = False


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The retry policy of a call: exponential backoff with full jitter, within the deadline; delays in seconds.

    The delay before attempt n + 1 is uniform between 0 and ``base_delay`` · 2^(n - 1), at most ``max_delay``, and no
    shorter than the peer's ``Retry-After``. The caller also asks its :class:`RetryBudget`.
    """

    max_attempts: int = 3
    base_delay: float = 0.1
    max_delay: float = 5.0

    def next_delay(
        self, failure: CallFailure, *, attempt: int, is_idempotent: bool, remaining: float, random: float
    ) -> float | None:
        """Return the seconds to wait before the next attempt, or ``None`` to stop.

        ``attempt`` counts the attempts so far; ``is_idempotent`` is true for a read-only operation or one with an
        idempotency key; ``remaining`` is the time left in seconds; ``random`` is uniform in [0, 1).
        """
        if attempt >= self.max_attempts or not failure.retryable:
            return None
        # It may have taken effect, and a repeat would take effect a second time.
        if failure.may_have_started and not is_idempotent:
            return None
        delay = random * min(self.max_delay, self.base_delay * 2.0 ** (attempt - 1))
        if failure.retry_after is not None:
            delay = max(delay, failure.retry_after)
        # A pause past the deadline would only delay the failure.
        return delay if delay < remaining else None


@dataclass(frozen=True, slots=True)
class OutageRetry:
    """How long to retry while a service is away: it restarts, or another replica takes over.

    It follows the :class:`RetryPolicy` and is outside the budget: one attempt a second multiplies no outage.
    """

    max_seconds: float = 0.0
    interval: float = 1.0

    def next_delay(
        self, failure: CallFailure, *, elapsed: float, is_idempotent: bool, remaining: float
    ) -> float | None:
        """Return the seconds to wait before the next attempt, or ``None`` to stop.

        ``elapsed`` is how long the call has been failing; the rest is as for :meth:`RetryPolicy.next_delay`.
        """
        if not failure.is_outage or (failure.may_have_started and not is_idempotent):
            return None
        return self.interval if elapsed + self.interval <= self.max_seconds and self.interval < remaining else None


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses of a loop after failures in a row: ``first`` seconds, doubled each time up to ``limit``."""

    first: float
    limit: float

    def pause(self, failures: int) -> float:
        """Return the seconds to wait after that many failures in a row, at least one."""
        # The exponent is bounded, since a float overflows after a thousand failures.
        return min(self.limit, self.first * 2.0 ** min(failures - 1, 64))


def retry_until(
    deadline: Deadline, interval: float, is_transient: Callable[[OctoError], bool]
) -> Callable[[OctoError, int], float | None]:
    """Return a decision that retries transient failures every ``interval`` seconds until ``deadline``."""

    def next_delay(error: OctoError, attempt: int) -> float | None:
        del attempt
        return interval if is_transient(error) and deadline.remaining() > interval else None

    return next_delay


class RetryBudget:
    """The retry budget: bounds retries to a share of the calls, so that retries do not multiply an outage.

    Each call earns ``ratio`` of a retry; up to ``capacity`` unspent ones are saved.
    """

    def __init__(self, ratio: float = 0.2, capacity: float = 10.0) -> None:
        self._ratio = ratio
        self._capacity = capacity
        self._balance = capacity

    def earn(self) -> None:
        """Count the first attempt of a call."""
        self._balance = min(self._capacity, self._balance + self._ratio)

    def spend(self) -> bool:
        """Take one retry; return false when none is left."""
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True
