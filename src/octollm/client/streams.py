"""Live streams that resume after a disconnect: a task's WebSocket updates and the event log over SSE."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

import msgspec
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException

from octollm.client._transport import GatewayTransport, protocol_error
from octollm.client.errors import (
    APIError,
    Conflict,
    DeadlineExceeded,
    Unavailable,
    error_from_code,
    error_from_response,
    map_encoding_errors,
)
from octollm.concurrency import Retries
from octollm.contracts.events import Event
from octollm.contracts.stream import FrameType
from octollm.errors import OctoError
from octollm.framing import iter_sse
from octollm.resilience import CallFailure, RetryPolicy
from octollm.rpc.http_client import HttpResponse

MAX_OFFSETS = 64
"""Running steps whose text position is sent on reconnect: the gateway accepts no more."""
RECONNECT_TIMEOUT_SECONDS = 60.0
"""How long a stream tries to reconnect before it gives up."""
_RECONNECT_POLICY = RetryPolicy(max_attempts=1_000_000, base_delay=0.2, max_delay=2.0)
"""Reconnecting is bounded by time, not by the number of attempts."""


class ReconnectBackoff:
    """Delays between attempts to reconnect, within ``timeout`` seconds of the disconnect."""

    def __init__(self, transport: GatewayTransport, timeout: float) -> None:
        self._transport = transport
        self._timeout = timeout
        self._until: float | None = None
        self._attempts = 0

    def reset(self) -> None:
        """End the outage: the gateway has sent something."""
        self._until = None
        self._attempts = 0

    def next_delay(self, error: OctoError, hint: str) -> float:
        """Return the seconds to wait before the next attempt.

        Raises ``error`` itself when a retry cannot help, and :class:`Unavailable` with ``hint`` after the timeout.
        """
        if not isinstance(error, APIError) or not error.retryable:
            raise error
        now = self._transport.clock.monotonic()
        if self._until is None:
            self._until = now + self._timeout
        self._attempts += 1
        delay = _RECONNECT_POLICY.next_delay(
            CallFailure(True, may_have_started=False, retry_after=error.retry_after),
            attempt=self._attempts,
            is_idempotent=True,
            remaining=self._until - now,
            random=random.random(),  # noqa: S311  jitter is no secret
        )
        if delay is None:
            raise Unavailable(
                f"{self._transport.url} has been away for {self._timeout:g} s. {hint}", code="unavailable"
            ) from error
        return delay


class Update(msgspec.Struct, frozen=True):
    """An update of a task: one of its events, or a piece of the text that a step writes (``type`` is ``token``).

    ``seq`` counts the task's events without gaps; ``progress`` is from 0 to 100 and never falls. ``data`` holds the
    event's members, among them ``event_type``. The last five members belong to ``token`` updates: ``offset`` is the
    position of ``text``, in code points, within the text of this ``step``, ``attempt`` and ``run``. With ``reset``, the
    earlier text of the step is void.
    """

    task_id: str
    type: FrameType
    seq: int
    progress: float
    timestamp: str = ""
    data: dict[str, object] = {}
    step: str = ""
    attempt: int = 0
    run: int = 0
    offset: int = 0
    reset: bool = False

    @property
    def text(self) -> str:
        """The text of a token update; empty for others."""
        return str(self.data.get("text", ""))


class StreamGapError(Exception):
    """A frame does not follow the one before: frames between them were lost."""


@dataclass(slots=True)
class StreamPosition:
    """The last ``seq`` received, and for each step the attempt, run and length of the text received."""

    seq: int = 0
    texts: dict[str, tuple[int, int, int]] = field(default_factory=dict[str, tuple[int, int, int]])

    def to_query(self) -> str:
        """Return the query string that resumes the stream at this position."""
        latest = list(self.texts.items())[-MAX_OFFSETS:]
        offsets = [("offset", f"{step}.{attempt}.{run}.{end}") for step, (attempt, run, end) in latest]
        return urlencode([("after", str(self.seq)), *offsets])

    def advance(self, update: Update) -> Update | None:
        """Apply an update; return the new part of it, or ``None``. Raises :class:`StreamGapError`."""
        if update.type == "ping":
            return None
        if update.type == "token":
            return self._advance_text(update)
        if update.seq <= self.seq:
            return None
        if update.seq > self.seq + 1:
            raise StreamGapError
        if update.type == "step" and "text_length" in update.data:
            self.texts.pop(str(update.data.get("step", "")), None)
        self.seq = update.seq
        return update

    def _advance_text(self, update: Update) -> Update | None:
        attempt, run, seen = self.texts.get(update.step, (-1, -1, 0))
        # A late piece of an attempt, or of a worker, that another one has replaced.
        if (update.attempt, update.run) < (attempt, run):
            return None
        if (update.attempt, update.run) > (attempt, run):
            seen = 0
        start, text = update.offset, update.text
        if not update.reset:
            if start > seen:
                raise StreamGapError
            if start + len(text) <= seen:
                return None
            if start < seen:
                start, text = seen, text[seen - start :]
                update = msgspec.structs.replace(update, offset=start, data={**update.data, "text": text})
        # Removed first, so that the latest steps are last: to_query() sends only those.
        self.texts.pop(update.step, None)
        self.texts[update.step] = (update.attempt, update.run, start + len(text))
        return update


_MAX_FRAME = 8 * 1024 * 1024
_OPEN_SECONDS = 10.0
KEEPALIVE_SECONDS = 10.0
"""Interval of the pings, and the time to answer one before the connection counts as broken."""
_DONE, _MALFORMED = 1000, 1008
_CLOSE_CODES = {
    4401: ("token_missing", "The gateway needs a valid API key: set OCTOLLM_API_KEY, or pass it to the client."),
    4403: ("scope_missing", "The API key does not allow this task to be watched."),
    4404: ("task_not_found", "There is no task {task_id}."),
}


async def stream_updates(
    transport: GatewayTransport,
    task_id: str,
    *,
    after: int = 0,
    reconnect_timeout: float = RECONNECT_TIMEOUT_SECONDS,
    keepalive: float = KEEPALIVE_SECONDS,
) -> AsyncGenerator[Update]:
    """Yield a task's updates after ``after`` to its last one; resume a broken connection at the last position.

    Raises :class:`NotFound`, :class:`AuthenticationError`, :class:`PermissionDenied`, and :class:`Unavailable` when no
    gateway answers for ``reconnect_timeout`` seconds. ``keepalive`` is the interval of pings and their timeout.
    """
    position = StreamPosition(after)
    backoff = ReconnectBackoff(transport, reconnect_timeout)
    hint = f"The task may go on: `octollm watch {task_id}` follows it once the gateway is back."
    async for attempt in Retries(lambda error, _number: backoff.next_delay(error, hint)):
        url = transport.url
        try:
            async with _connect(transport, url, task_id, position, keepalive) as socket:
                async for message in socket:
                    update = msgspec.json.decode(message, type=Update)
                    new = position.advance(update)
                    # A ping ends the outage as well: the gateway is back, although the task has nothing new.
                    if new is not None or update.type == "ping":
                        backoff.reset()
                    if new is not None:
                        yield new
            error = _error_from_close_code(socket.close_code, task_id, url)
        except ConnectionClosed as closed:
            # Only a code that the gateway sent says why; without one the connection broke.
            error = _error_from_close_code(closed.rcvd.code if closed.rcvd else None, task_id, url)
        except StreamGapError:
            error = Unavailable(f"{url} left out some of the updates.", code="connection_lost")
        except InvalidStatus as refused:
            response = refused.response
            after_text = response.headers.get("Retry-After", "")
            error = error_from_response(
                HttpResponse(response.status_code, {"retry-after": after_text}, bytes(response.body or b""))
            )
        except msgspec.DecodeError as wrong:
            raise protocol_error(url) from wrong
        except (OSError, TimeoutError, InvalidHandshake, WebSocketException) as broken:
            error = _connection_lost(url)
            error.__cause__ = broken
        if error is None:
            return
        transport.fail_over(url)
        with attempt:
            raise error


def _connect(
    transport: GatewayTransport, url: str, task_id: str, position: StreamPosition, keepalive: float
) -> connect:
    with map_encoding_errors():
        path = f"/ws/tasks/{quote(task_id, safe='')}?{position.to_query()}"
    # http:// → ws://, https:// → wss://
    return connect(
        f"ws{url.removeprefix('http')}{path}",
        ssl=transport.tls if url.startswith("https:") else None,
        additional_headers=transport.auth_headers,
        max_size=_MAX_FRAME,
        compression=None,
        open_timeout=_OPEN_SECONDS,
        ping_interval=keepalive,
        ping_timeout=keepalive,
        close_timeout=1,
        # The client uses no proxy, so that the API key reaches nobody else.
        proxy=None,
    )


def _error_from_close_code(code: int | None, task_id: str, url: str) -> APIError | None:
    """Return the error for a close code; ``None`` for the normal end after the last update."""
    if code == _DONE:
        return None
    if code in _CLOSE_CODES:
        name, detail = _CLOSE_CODES[code]
        return error_from_code(name, detail.format(task_id=task_id))
    if code == _MALFORMED:
        return Conflict(f"{url} refused the position in the request for updates.", code="state_conflict")
    return _connection_lost(url)


def _connection_lost(url: str) -> APIError:
    return Unavailable(f"The updates from {url} broke off.", code="connection_lost")


_STREAM_SECONDS = 3600.0
"""An event stream is renewed after this time."""
_MAX_EVENT = 4 * 1024 * 1024
"""Bytes of one line of an event stream."""


async def stream_events(
    transport: GatewayTransport, *, after: int = 0, reconnect_timeout: float = RECONNECT_TIMEOUT_SECONDS
) -> AsyncGenerator[Event]:
    """Yield events after position ``after`` without end; resume a broken connection at the last position.

    Raises the gateway's refusal as :class:`APIError`, and :class:`Unavailable` when no gateway answers for
    ``reconnect_timeout`` seconds.
    """
    backoff = ReconnectBackoff(transport, reconnect_timeout)

    def next_delay(error: OctoError, _number: int) -> float | None:
        return backoff.next_delay(error, f"Go on with after={after} once it is back.")

    async for attempt in Retries(next_delay):
        try:
            async with contextlib.aclosing(_read_connection(transport, after)) as events:
                async for event in events:
                    backoff.reset()
                    if event is not None and event.seq > after:
                        after = event.seq
                        yield event
            error: APIError = _stream_ended(transport)
        except DeadlineExceeded:
            # The stream reached its maximum age: reconnect.
            error = _stream_ended(transport)
        except APIError as broken:
            error = broken
        with attempt:
            raise error


async def _read_connection(transport: GatewayTransport, after: int) -> AsyncGenerator[Event | None]:
    """Yield the events of one connection, and ``None`` for each comment that keeps it alive."""
    async with transport.stream(f"/events?after={after}", "text/event-stream", _STREAM_SECONDS) as streamed:
        try:
            async for data in iter_sse(streamed.chunks, _MAX_EVENT):
                yield None if data is None else msgspec.json.decode(data, type=Event)
        except ValueError as error:  # msgspec's errors are of this type, too
            raise protocol_error(transport.url) from error


def _stream_ended(transport: GatewayTransport) -> APIError:
    return Unavailable(f"{transport.url} ended the stream of events.", code="connection_lost")
