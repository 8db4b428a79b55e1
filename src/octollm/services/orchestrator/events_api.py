"""Events over HTTP: a page of the log or an SSE stream, what changed since a position, and events that are posted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
from msgspec import UNSET
from starlette.responses import StreamingResponse

from octollm.clock import Clock
from octollm.concurrency import wait_for_event
from octollm.contracts import public_api
from octollm.contracts.api import Acknowledgement, EventList, EventQuery
from octollm.contracts.dashboard import Changes, ChangesQuery, DashboardPart
from octollm.contracts.events import EVENT_CATALOGUE, Event, validate_event
from octollm.contracts.internal_operations import POST_EVENT, READ_CHANGES, READ_EVENT_CHANGES
from octollm.contracts.services import SERVICES
from octollm.errors import OctoError
from octollm.events import EventBus, EventLog, LogTail
from octollm.framing import KEEPALIVE_COMMENT, encode_sse
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.services.orchestrator.audit import SYSTEM_TENANT
from octollm.storage import Database
from octollm.tasks.dashboard import ChangeReader, TaskFilter

POLL_SECONDS = 1.0
"""A stream reads the log this often, in case neither this process nor Redis announced an event."""
PING_SECONDS = 15.0
PAGE_SIZE = 200


@dataclass(frozen=True, slots=True)
class EventsApi:
    """The operations on events."""

    db: Database
    log: EventLog
    bus: EventBus
    tail: LogTail
    clock: Clock
    draining: asyncio.Event

    async def read(self, call: IncomingCall, _body: object) -> object:
        """Return the tenant's events after a position: a page, or a stream for ``Accept: text/event-stream``."""
        query: EventQuery = call.query
        after = query.after
        # An EventSource that reconnects sends its last position here, and the old URL.
        last = call.request.headers.get("last-event-id")
        if last is not None and last.isdigit():
            after = int(last)
        # Read before a stream begins: a position that cannot be resumed is an error, not an endless wait.
        events = await self.log.read_page(after, query.limit, tenant=call.tenant)
        if "text/event-stream" in call.request.headers.get("accept", ""):
            return StreamingResponse(
                self._stream(call.tenant, after),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        return EventList(tuple(events), events[-1].seq if events else after)

    async def _stream(self, tenant: str, after: int) -> AsyncIterator[bytes]:
        wakeup = asyncio.Event()
        # Before the first read, so that no event falls between a read and the wait after it.
        listeners = (self.log.on_numbered(lambda _batch, _size: wakeup.set()), self.tail.on_batch(wakeup.set))
        sent_at = self.clock.monotonic()
        try:
            yield b": following\n\n"
            while not self.draining.is_set():
                wakeup.clear()
                try:
                    page = await self.log.read_page(after, PAGE_SIZE, tenant=tenant)
                except OctoError:
                    # Such as a position that was deleted while a slow client read: a reconnect gets the error.
                    return
                for event in page:
                    after = event.seq
                    yield encode_sse(event, event_id=event.seq, event=event.event_type)
                if page:
                    sent_at = self.clock.monotonic()
                    continue
                if self.clock.monotonic() - sent_at >= PING_SECONDS:
                    sent_at = self.clock.monotonic()
                    yield KEEPALIVE_COMMENT
                await wait_for_event(wakeup, POLL_SECONDS, clear=False)
        finally:
            for remove in listeners:
                remove()

    async def post(self, call: IncomingCall, body: Event) -> Acknowledgement:
        """Store or publish an event of a built-in service, for the types that the catalogue lets it emit."""
        kind = EVENT_CATALOGUE.get(body.event_type)
        # An undeclared type first: otherwise a misspelt one would look like a missing right.
        if kind is None:
            raise OctoError(f"The event {body.event_type!r} is not declared in the catalogue.", code="invalid_body")
        if call.peer not in SERVICES or not kind.may_be_posted_by(call.peer):
            raise OctoError(f"{call.peer} may not post {body.event_type}.", code="scope_missing")
        await self.record(
            msgspec.structs.replace(
                body,
                source=call.peer,
                # What is stored belongs to the service itself; no service writes into the log of a tenant.
                subject=f"service/{call.peer}" if kind.durable else body.subject,
                tenant=SYSTEM_TENANT if kind.durable else body.tenant,
                correlation_id=call.correlation_id,
                traceparent=call.trace.traceparent,
            )
        )
        return Acknowledgement()

    async def record(self, event: Event) -> None:
        """Store a durable event, unless its id is stored already; publish any other to the current subscribers."""
        if not validate_event(event.event_type, event.data).durable:
            await self.bus.publish_event(event)
            return
        async with self.db.transaction() as tx:
            await self.log.append(
                tx,
                event.event_type,
                subject=event.subject,
                tenant=event.tenant,
                source=event.source,
                data=event.data,
                correlation_id=event.correlation_id,
                traceparent=event.traceparent,
                event_id=event.id,
                timestamp=event.timestamp,
            )

    def operations(self) -> list[Operation]:
        """Return their declarations."""
        return [
            implement(public_api.READ_EVENTS, self.read),
            implement(POST_EVENT, self.post),
        ]


SCOPES: tuple[tuple[DashboardPart, str], ...] = (("tasks", READ_CHANGES.scope), ("events", READ_EVENT_CHANGES.scope))
"""The parts, each with the scope that it needs."""


@dataclass(frozen=True, slots=True)
class DashboardApi:
    """The operations that read changes."""

    reader: ChangeReader

    async def read(self, call: IncomingCall, _body: object) -> Changes:
        """Return the present state, or what changed since a position."""
        query: ChangesQuery = call.query
        # The token of an arm is for one task, whatever its scopes are.
        if call.authority.task is not None:
            raise OctoError("The token of a task reads that task only.", code="scope_missing")
        wanted = query.parts
        scopes = call.authority.scopes
        parts = tuple[DashboardPart, ...](
            [part for part, scope in SCOPES if scopes.allows(scope) and (not wanted or part in wanted)]
        )
        lacking = [scope for part, scope in SCOPES if part in wanted and part not in parts]
        if lacking:
            raise OctoError(f"The caller lacks {', '.join(lacking)}.", code="scope_missing")
        tasks = TaskFilter(call.tenant, query.statuses, query.text)
        if query.after is UNSET:
            return await self.reader.read_snapshot(tasks, parts, query.limit)
        return await self.reader.read_changes(tasks, parts, query.after)

    def operations(self) -> list[Operation]:
        """Return its declarations."""
        return [implement(READ_CHANGES, self.read), implement(READ_EVENT_CHANGES, self.read)]
