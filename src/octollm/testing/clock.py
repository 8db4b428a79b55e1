"""A clock that a test moves by hand, so that time-based code is tested without waiting."""

from __future__ import annotations


class ManualClock:
    """A :class:`octollm.clock.Clock` that stands until ``time`` is set; wall clock and monotonic clock are the same."""

    def __init__(self, time: float = 1000.0) -> None:
        self.time = time
        """Seconds, on both clocks."""

    def now(self) -> float:
        """Return :attr:`time` as seconds since the Unix epoch."""
        return self.time

    def monotonic(self) -> float:
        """Return :attr:`time` on the monotonic clock."""
        return self.time
