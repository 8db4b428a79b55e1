"""When an instance of a service is taken out of use, for how long, and how it comes back.

A circuit breaker for each instance (failures in a row) and outlier ejection (far slower than its peers) in one: both
end in the same state. Times are those of a monotonic clock, in seconds, passed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

CallOutcome = Literal["answered", "erred", "failed", "late", "unknown"]
"""How a call ended for the instance.

It answered; it answered that it could not (500); it did not answer; it did not within the caller's deadline; or that
was not its doing (a caller that left).
"""


@dataclass(frozen=True, slots=True)
class EjectionPolicy:
    """``failures`` in a row eject, or ``slow`` calls in a row that took ``factor`` times what they take elsewhere.

    What takes less than ``floor`` seconds is never slow. An ejection lasts ``seconds``, each further one twice as
    long, up to ``most``. Then one call probes.
    """

    consecutive_failures: int = 5
    consecutive_slow: int = 3
    slow_factor: float = 10.0
    min_slow_seconds: float = 0.05
    base_ejection_seconds: float = 5.0
    max_ejection_seconds: float = 60.0


class CircuitBreaker:
    """What is known of one instance: whether it may be called, and why not."""

    def __init__(self) -> None:
        self.failures = 0
        self.slow = 0
        self.opened_at = -math.inf
        """When it was ejected last."""
        self._times = 0
        self._until: float | None = None
        self._probe_until = 0.0

    @property
    def is_open(self) -> bool:
        """Say whether the instance is out of use, or in it again for a probe only."""
        return self._until is not None

    def allows_call(self, now: float) -> bool:
        """Say whether a call may go to the instance now: half-open, it is the one that probes."""
        return self._until is None or (now >= self._until and now >= self._probe_until)

    def begin_probe(self, now: float, policy: EjectionPolicy) -> None:
        """Note that a call goes out; the next has to wait for its end where it is a probe."""
        if self._until is not None:
            self._probe_until = now + policy.base_ejection_seconds

    def seconds_until_allowed(self, now: float) -> float:
        """Return the seconds until the instance may be called."""
        return 0.0 if self._until is None else max(0.0, self._until - now, self._probe_until - now)

    def record(self, outcome: CallOutcome, *, slow: bool) -> None:
        """Count how a call ended; a probe that went well brings the instance back."""
        self._probe_until = 0.0
        if outcome == "unknown":
            return
        self.slow = self.slow + 1 if slow else 0
        if outcome in ("failed", "erred"):
            self.failures += 1
        elif outcome == "answered":
            self.failures = 0
            if not slow:
                self._until = None

    def should_open(self, policy: EjectionPolicy) -> bool:
        """Say whether the instance is to be ejected, or for longer when its probe went no better."""
        bad = self.failures >= policy.consecutive_failures or self.slow >= policy.consecutive_slow
        return bad or (self.is_open and (self.failures > 0 or self.slow > 0))

    def open(self, now: float, policy: EjectionPolicy) -> float:
        """Take the instance out of use; return for how many seconds."""
        seconds = min(policy.max_ejection_seconds, policy.base_ejection_seconds * 2.0**self._times)
        self._times = min(self._times + 1, 16)
        self._until = now + seconds
        self.opened_at = now
        self.failures = self.slow = 0
        return seconds

    def forgive(self) -> None:
        """Forget one earlier ejection: the instance has been well for long."""
        self._times = max(0, self._times - 1)
