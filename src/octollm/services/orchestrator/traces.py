"""A task's trace, asked of the monitor in the name of whoever may read the task."""

from __future__ import annotations

from urllib.parse import quote

from octollm.capability import Principal, RootMinter, TaskRef
from octollm.clock import Clock
from octollm.contracts.traces import TraceView
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.caller import Caller, Outgoing, Target

ASK_SECONDS = 10.0


class Traces:
    """Asks the monitor with a token for this one task, whatever else its reader may do."""

    def __init__(self, caller: Caller, minter: RootMinter, clock: Clock) -> None:
        self._caller = caller
        self._minter = minter
        self._clock = clock

    async def of_task(self, reader: Principal, task_id: str, deadline: Deadline) -> TraceView:
        """Return the spans of a task that ``reader`` may read. Raises ``unavailable`` when the monitor is away."""
        call = Outgoing(
            Target("monitor", "traces.read", "GET", f"/traces?task={quote(task_id, safe='')}", "read_only"),
            self._minter.access(reader, "monitor", "monitor:read", task=TaskRef(task_id)),
            Deadline.after(self._clock, min(ASK_SECONDS, deadline.left())),
        )
        try:
            return await self._caller.answer(call, TraceView)
        except OctoError as error:
            raise OctoError(
                f"The monitor, which keeps the traces, cannot be asked ({error.detail}) Tasks go on without it; try"
                " again later.",
                code="unavailable",
                retry_after=5,
            ) from error
