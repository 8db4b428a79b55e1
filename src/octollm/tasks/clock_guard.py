"""Whether the clock of this process may be trusted: tasks end at wall-clock times that other replicas have written."""

from __future__ import annotations

from octollm.errors import OctoError
from octollm.storage import Database

MAX_SKEW_SECONDS = 5.0
"""How far the clocks of replicas may differ: more than NTP leaves."""
COMPARE_SECONDS = 10.0
"""The interval of comparisons while the clock agrees. A step of the clock is noticed before that."""
_NOW = "SELECT extract(epoch FROM clock_timestamp())::float8 AS now"


class ClockGuard:
    """Compares the clock with that of the PostgreSQL server, which all replicas share. On SQLite there is one clock."""

    def __init__(self, db: Database) -> None:
        self._db = db
        # Wall-clock minus monotonic time, and the monotonic time, of the last comparison that found the clock right.
        self._agreed: tuple[float, float] | None = None

    async def check(self) -> None:
        """Raise ``unavailable`` while the clock is wrong: a worker that claimed tasks would end them too early."""
        if self._db.dialect != "postgresql" or self._is_known_right():
            return
        self._agreed = None
        clock = self._db.clock
        before = clock.now()
        (row,) = await self._db.fetch(_NOW)
        server, after = float(row["now"]), clock.now()
        # The server read its clock at some moment in between, however long the answer took.
        if not before - MAX_SKEW_SECONDS <= server <= after + MAX_SKEW_SECONDS:
            detail = f"The clock of this process differs by {before - server:+.0f} s from the database server's."
            raise OctoError(f"{detail} It takes no tasks until that is mended.", code="unavailable")
        self._agreed = after - clock.monotonic(), clock.monotonic()

    def _is_known_right(self) -> bool:
        if self._agreed is None:
            return False
        clock, (offset, at) = self._db.clock, self._agreed
        stepped = abs(clock.now() - clock.monotonic() - offset) > MAX_SKEW_SECONDS / 2
        return not stepped and clock.monotonic() - at < COMPARE_SECONDS
