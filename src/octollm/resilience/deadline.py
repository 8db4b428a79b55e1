"""The time that is left for a piece of work, carried over every hop as a duration."""

from __future__ import annotations

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
