"""Clock and id generator, injected so that time-based code is tested without waiting.

The protocols stand beside their real implementations: the system's clocks, and UUIDv7 (RFC 9562).
"""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime
from typing import Protocol

_POOL_BYTES = 2560


class Clock(Protocol):
    """A source of time."""

    def now(self) -> float:
        """Return seconds since the Unix epoch (wall clock)."""
        ...

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back; only differences have a meaning."""
        ...


class SystemClock:
    """The system's wall clock and monotonic clock."""

    def now(self) -> float:
        """Return seconds since the Unix epoch (wall clock)."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back."""
        return time.monotonic()


class IdGenerator(Protocol):
    """A source of identifiers that are unique and sort by creation time."""

    def hex(self) -> str:
        """Return 32 lower-case hexadecimal digits."""
        ...


class Uuid7Generator:
    """UUIDv7 identifiers (RFC 9562 section 5.7): 48 bits of milliseconds, then random bits."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pool = b""
        self._position = 0
        self._pid = 0

    def hex(self) -> str:
        """Return a UUIDv7 as 32 lower-case hexadecimal digits."""
        milliseconds = int(self._clock.now() * 1000) & ((1 << 48) - 1)
        random = int.from_bytes(self._random(10))
        random_a = (random >> 64) & 0x0FFF
        random_b = random & ((1 << 62) - 1)
        value = (milliseconds << 80) | (0x7 << 76) | (random_a << 64) | (0b10 << 62) | random_b
        return f"{value:032x}"

    def _random(self, size: int) -> bytes:
        """Return random bytes from a pool: the system call costs more than the rest of an id."""
        with self._lock:
            end = self._position + size
            # A forked child has its parent's pool: it must not hand out the same bytes.
            if end > len(self._pool) or self._pid != os.getpid():
                self._pool, self._position, self._pid, end = os.urandom(_POOL_BYTES), 0, os.getpid(), size
            chunk = self._pool[self._position : end]
            self._position = end
            return chunk


def format_rfc3339(seconds: float) -> str:
    """Format epoch seconds as RFC 3339 UTC with milliseconds, e.g. ``2025-11-10T10:30:00.000Z``."""
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
