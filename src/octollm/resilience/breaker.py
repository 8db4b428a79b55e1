"""A circuit breaker for one instance: after failures in a row, calls stop for a while, then one probes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """``failures`` in a row open the breaker for ``open_seconds``."""

    failures: int = 5
    open_seconds: float = 5.0


class Breaker:
    """Closed, open, or half-open with one probe. Times are those of a monotonic clock, passed in."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._failures = 0
        self._open_until: float | None = None
        self._probe_until = 0.0

    def allows(self, now: float) -> bool:
        """Say whether a call may go out now; in half-open state one may, the probe."""
        if self._open_until is None:
            return True
        if now < self._open_until or now < self._probe_until:
            return False
        self._probe_until = now + self._policy.open_seconds
        return True

    def wait(self, now: float) -> float:
        """Return the seconds until a call may be tried."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - now, self._probe_until - now)

    def succeeded(self) -> None:
        """Count a call that was answered."""
        self._failures = 0
        self._open_until = None
        self._probe_until = 0.0

    def failed(self, now: float) -> None:
        """Count a call that the instance did not answer."""
        self._failures += 1
        self._probe_until = 0.0
        if self._failures >= self._policy.failures:
            self._open_until = now + self._policy.open_seconds
