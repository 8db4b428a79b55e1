"""Clock and id generator as injectable protocols, with the system clock and UUIDv7, so that time-based code is tested without waiting."""

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
    """The clock of this machine."""

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
        self._at = 0
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
        """Return random bytes of the system, which are fetched many at a time: asking costs more than an id does."""
        with self._lock:
            end = self._at + size
            if end > len(self._pool) or self._pid != os.getpid():  # a fork must not hand out its parent's
                self._pool, self._at, self._pid, end = os.urandom(_POOL_BYTES), 0, os.getpid(), size
            taken = self._pool[self._at : end]
            self._at = end
            return taken


def format_rfc3339(seconds: float) -> str:
    """Format epoch seconds as RFC 3339 UTC with milliseconds, e.g. ``2025-11-10T10:30:00.000Z``."""
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
