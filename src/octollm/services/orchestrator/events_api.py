"""Events over HTTP: a page of the log or an SSE stream, and events posted by built-in services."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.responses import StreamingResponse

from octollm.contracts import public_api
from octollm.contracts.api import Acknowledgement, EventList, EventQuery
from octollm.contracts.events import EVENT_CATALOGUE, Event
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.framing import KEEPALIVE_COMMENT, encode_sse
from octollm.rpc.call import IncomingCall, Operation, OperationDocs, implement
from octollm.storage import Database

POLL_SECONDS = 1.0
PING_SECONDS = 15.0
PAGE_SIZE = 200
POSTABLE_FAMILIES = frozenset({"system", "arm", "breaker", "cache"})
"""Event families that other built-in services may post; tasks, tokens and audit belong to the orchestrator."""


@dataclass(frozen=True, slots=True)
class EventsApi:
    """The operations on events."""

    db: Database
    log: EventLog
    draining: asyncio.Event

    async def read(self, call: IncomingCall, _body: object) -> object:
        """Return the tenant's events after a position: a page, or a stream for ``Accept: text/event-stream``."""
        query: EventQuery = call.query
        after = query.after
        # An EventSource that reconnects sends its last position here, and the old URL.
        last = call.request.headers.get("last-event-id")
        if last is not None and last.isdigit():
            after = int(last)
        if "text/event-stream" in call.request.headers.get("accept", ""):
            return StreamingResponse(
                self._stream(call.tenant, after),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        events = await self.log.read(after, query.limit, tenant=call.tenant)
        return EventList(tuple(events), events[-1].seq if events else after)

    async def _stream(self, tenant: str, after: int) -> AsyncIterator[bytes]:
        wakeup = asyncio.Event()
        # Before the first read, so that no commit falls between a read and the wait after it.
        remove_listener = self.log.on_commit(wakeup.set)
        idle = 0.0
        try:
            yield b": following\n\n"
            while not self.draining.is_set():
                page = await self.log.read(after, PAGE_SIZE, tenant=tenant)
                for event in page:
                    after = event.seq
                    yield encode_sse(event, event_id=event.seq, event=event.event_type)
                if page:
                    idle = 0.0
                    continue
                if idle >= PING_SECONDS:
                    idle = 0.0
                    yield KEEPALIVE_COMMENT
                # An event that was committed during the read may not have its sequence number yet: look again soon.
                pause = 0.1 if wakeup.is_set() else POLL_SECONDS
                wakeup.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await wakeup.wait()
                # An event gets its sequence number shortly after its commit, so do not read at once.
                if wakeup.is_set():
                    await asyncio.sleep(0.02)
                idle += pause
        finally:
            remove_listener()

    async def post(self, call: IncomingCall, body: Event) -> Acknowledgement:
        """Append an event of a built-in service; a repeated id is not written again."""
        if call.peer not in SERVICES or body.event_type.partition(".")[0] not in POSTABLE_FAMILIES:
            raise OctoError(f"{call.peer} may not post {body.event_type}.", code="scope_missing")
        if body.event_type not in EVENT_CATALOGUE:
            raise OctoError(f"The event {body.event_type} is not declared.", code="invalid_body")
        async with self.db.transaction() as tx:
            await self.log.append(
                tx,
                body.event_type,
                subject=f"service/{call.peer}",
                tenant="system",
                source=call.peer,
                data=body.data,
                correlation_id=call.correlation_id,
                traceparent=call.trace.traceparent,
                event_id=body.id,
                timestamp=body.timestamp,
            )
        return Acknowledgement()

    def operations(self) -> list[Operation]:
        """Return their declarations."""
        return [
            implement(public_api.READ_EVENTS, self.read),
            Operation(
                "events.post",
                "POST",
                "/events",
                self.post,
                auth="service",
                scope="*",
                body=Event,
                response=Acknowledgement,
                summary="Post an event.",
                docs=OperationDocs(error_codes=("scope_missing", "invalid_body")),
            ),
        ]
