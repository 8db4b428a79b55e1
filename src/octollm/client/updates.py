"""A task's live updates over the WebSocket, with nothing lost or doubled when the connection breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from urllib.parse import quote

import msgspec
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException

from octollm.client.door import GatewayTransport, protocol_error
from octollm.client.errors import APIError, Conflict, Unavailable, error_from_code, error_from_response
from octollm.client.patience import RECONNECT_TIMEOUT_SECONDS, ReconnectBackoff
from octollm.client.position import StreamGapError, StreamPosition, Update
from octollm.rpc.http import HttpResponse

_MAX_FRAME = 8 * 1024 * 1024
_OPEN_SECONDS = 10.0
KEEPALIVE_SECONDS = 10.0
"""A door is asked as often whether it is still there, and has as long to answer; after both it counts as gone."""
_DONE, _MALFORMED = 1000, 1008
_CLOSE_CODES = {
    4401: ("token_missing", "The door wants a valid API key: set OCTOLLM_API_KEY, or give it to connect()."),
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
    """Yield a task's updates behind ``after`` until its last, going on where a broken connection stopped.

    Raises :class:`NotFound`, :class:`AuthenticationError`, :class:`PermissionDenied`, and :class:`Unavailable` when
    no door is back after ``patience`` seconds. A door that is asked after ``silence`` seconds and says nothing for as
    long counts as gone.
    """
    position = StreamPosition(after)
    bearing = ReconnectBackoff(transport, reconnect_timeout)
    while True:
        url = transport.url
        try:
            async with _connect(transport, url, task_id, position, keepalive) as socket:
                async for message in socket:
                    update = msgspec.json.decode(message, type=Update)
                    new = position.advance(update)
                    if new is not None or update.type == "ping":
                        bearing.reset()
                    if new is not None:
                        yield new
            error = _error_from_close_code(socket.close_code, task_id, url)
        except ConnectionClosed as closed:
            error = _error_from_close_code(closed.rcvd.code if closed.rcvd else None, task_id, url)
        except StreamGapError:
            error = Unavailable(f"{url} left out a part of the updates.", code="connection_lost")
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
        await asyncio.sleep(
            bearing.next_delay(
                error, f"The task may go on: `octollm watch {task_id}` follows it once the door is back."
            )
        )


def _connect(
    transport: GatewayTransport, url: str, task_id: str, position: StreamPosition, keepalive: float
) -> connect:
    # http:// → ws://, https:// → wss://
    return connect(
        f"ws{url.removeprefix('http')}/ws/tasks/{quote(task_id, safe='')}?{position.to_query()}",
        ssl=transport.tls if url.startswith("https:") else None,
        additional_headers=transport.auth_headers,
        max_size=_MAX_FRAME,
        compression=None,
        open_timeout=_OPEN_SECONDS,
        ping_interval=keepalive,
        ping_timeout=keepalive,
        close_timeout=1,
        proxy=None,
    )


def _error_from_close_code(code: int | None, task_id: str, url: str) -> APIError | None:
    """Return what a close code means: ``None`` after the last update."""
    if code == _DONE:
        return None
    if code in _CLOSE_CODES:
        name, detail = _CLOSE_CODES[code]
        return error_from_code(name, detail.format(task_id=task_id))
    if code == _MALFORMED:
        return Conflict(f"{url} did not accept how the updates were asked for.", code="state_conflict")
    return _connection_lost(url)


def _connection_lost(url: str) -> APIError:
    return Unavailable(f"The updates from {url} broke off.", code="connection_lost")
