"""Reads the log into the queues of a subscription's partitions: from the end of the log in memory, or from SQL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from octollm.concurrency import wait_for_event
from octollm.contracts.subscriptions import EventSelector
from octollm.errors import OctoError
from octollm.events.handlers import DeliveryPolicy
from octollm.events.log import EventLog
from octollm.events.log_tail import LogTail
from octollm.events.partition_queues import PartitionQueues

SCAN_PAGE = 500
"""Events of one read; what the other consumers hold is skipped."""


class LogReader:
    """Reads on from the position of the queues, events that ``selector`` wants, of ``event_tenant`` or of all tenants.

    ``on_ready`` is called when an event may be handled, and ``on_gap`` when the log does not go on after the position.
    """

    def __init__(
        self,
        log: EventLog,
        tail: LogTail,
        queues: PartitionQueues,
        policy: DeliveryPolicy,
        *,
        selector: EventSelector,
        event_tenant: str | None,
        on_ready: Callable[[], None],
        on_gap: Callable[[OctoError], None],
    ) -> None:
        self._log = log
        self._tail = tail
        self._queues = queues
        self._policy = policy
        self.selector = selector
        self.event_tenant = event_tenant
        self._on_ready = on_ready
        self._on_gap = on_gap
        self.wakeup = asyncio.Event()
        """Set it when there is something to read, or room for it."""

    async def read_round(self) -> None:
        """Read the next events into the queues, or wait for new ones."""
        self.wakeup.clear()
        queues = self._queues
        if not queues.partitions or queues.size >= self._policy.buffer:
            await wait_for_event(self.wakeup, self._policy.poll, clear=False)
            return
        position = queues.position
        recent = self._tail.window.after(position, SCAN_PAGE)
        if recent is not None and not recent:
            # What Redis brought is handled. Redis may be silent, though, while events are numbered: the log is asked.
            await wait_for_event(self.wakeup, self._policy.poll, clear=False)
            if self.wakeup.is_set() or queues.position != position:
                return
        if recent:
            page, end = recent, recent[-1].seq
        else:
            try:
                page, end = await self._log.scan(
                    position, SCAN_PAGE, tenant=self.event_tenant, types=self.selector.types
                )
            except OctoError as error:
                if error.code not in ("position_expired", "position_unknown"):
                    raise
                self._on_gap(error)
                return
        # A partition was claimed, or the subscription replayed, during the read.
        if queues.position != position:
            return
        if queues.dispatch(page, end, self.selector, self.event_tenant):
            self._on_ready()
        if end == position and recent is None:
            await wait_for_event(self.wakeup, self._policy.poll, clear=False)
