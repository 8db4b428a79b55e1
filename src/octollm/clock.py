"""Time and identifiers, injected so that nothing that depends on them needs waiting to be tested."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """A source of time."""

    def now(self) -> float:
        """Return seconds since the Unix epoch (wall clock)."""
        ...

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back; only differences have a meaning."""
        ...


class SystemClock:
    """The clock of this machine."""

    def now(self) -> float:
        """Return seconds since the Unix epoch (wall clock)."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back."""
        return time.monotonic()


class Ids(Protocol):
    """A source of identifiers that are unique and sort by creation time."""

    def hex(self) -> str:
        """Return 32 lower-case hexadecimal digits."""
        ...


class Uuid7Ids:
    """UUIDv7 identifiers (RFC 9562 section 5.7): 48 bits of milliseconds, then random bits."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def hex(self) -> str:
        """Return a UUIDv7 as 32 lower-case hexadecimal digits."""
        milliseconds = int(self._clock.now() * 1000) & ((1 << 48) - 1)
        random_a = int.from_bytes(os.urandom(2)) & 0x0FFF
        random_b = int.from_bytes(os.urandom(8)) & ((1 << 62) - 1)
        value = (milliseconds << 80) | (0x7 << 76) | (random_a << 64) | (0b10 << 62) | random_b
        return f"{value:032x}"


def iso(seconds: float) -> str:
    """Format epoch seconds as RFC 3339 UTC with milliseconds, e.g. ``2025-11-10T10:30:00.000Z``."""
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
