"""A task's trace, asked of the monitor in the name of whoever may read the task."""

from __future__ import annotations

from urllib.parse import quote

from octollm.capability import Principal, RootMinter, TaskRef
from octollm.clock import Clock
from octollm.contracts.traces import TraceView
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.caller import CallTarget, OutgoingCall, ServiceClient

TRACE_TIMEOUT = 10.0


class TraceClient:
    """Asks the monitor with a token for this one task, whatever else its reader may do."""

    def __init__(self, client: ServiceClient, minter: RootMinter, clock: Clock) -> None:
        self._client = client
        self._minter = minter
        self._clock = clock

    async def fetch_task_trace(self, reader: Principal, task_id: str, deadline: Deadline) -> TraceView:
        """Return the spans of a task that ``reader`` may read. Raises ``unavailable`` when the monitor is away."""
        call = OutgoingCall(
            CallTarget("monitor", "traces.read", "GET", f"/traces?task={quote(task_id, safe='')}", "read_only"),
            self._minter.mint_access(reader, "monitor", "monitor:read", task=TaskRef(task_id)),
            Deadline.after(self._clock, min(TRACE_TIMEOUT, deadline.remaining())),
        )
        try:
            return await self._client.call(call, TraceView)
        except OctoError as error:
            raise OctoError(
                f"The monitor, which keeps the traces, cannot be asked ({error.detail}) Tasks go on without it; try"
                " again later.",
                code="unavailable",
                retry_after=5,
            ) from error
