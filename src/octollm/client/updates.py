"""A task's live updates over the WebSocket, with nothing lost or doubled when the connection breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from urllib.parse import quote

import msgspec
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException

from octollm.client.door import Door, not_understood
from octollm.client.errors import Conflict, DoorError, Unavailable, error_of_answer, error_of_code
from octollm.client.patience import PATIENCE_SECONDS, Patience
from octollm.client.position import MissingError, Position, Update
from octollm.rpc.http import Answer

_MAX_FRAME = 8 * 1024 * 1024
_OPEN_SECONDS = 10.0
SILENT_SECONDS = 10.0
"""A door is asked as often whether it is still there, and has as long to answer; after both it counts as gone."""
_DONE, _MALFORMED = 1000, 1008
_REFUSED = {
    4401: ("token_missing", "The door wants a valid API key: set OCTOLLM_API_KEY, or give it to connect()."),
    4403: ("scope_missing", "The API key does not allow this task to be watched."),
    4404: ("task_not_found", "There is no task {task_id}."),
}


async def task_updates(
    door: Door,
    task_id: str,
    *,
    after: int = 0,
    patience: float = PATIENCE_SECONDS,
    silence: float = SILENT_SECONDS,
) -> AsyncGenerator[Update]:
    """Yield a task's updates behind ``after`` until its last, going on where a broken connection stopped.

    Raises :class:`NotFound`, :class:`AuthenticationError`, :class:`PermissionDenied`, and :class:`Unavailable` when
    no door is back after ``patience`` seconds. A door that is asked after ``silence`` seconds and says nothing for as
    long counts as gone.
    """
    position = Position(after)
    bearing = Patience(door, patience)
    while True:
        url = door.url
        try:
            async with _connected(door, url, task_id, position, silence) as socket:
                async for message in socket:
                    update = msgspec.json.decode(message, type=Update)
                    new = position.take(update)
                    if new is not None or update.type == "ping":
                        bearing.back()
                    if new is not None:
                        yield new
            error = _closed(socket.close_code, task_id, url)
        except ConnectionClosed as closed:
            error = _closed(closed.rcvd.code if closed.rcvd else None, task_id, url)
        except MissingError:
            error = Unavailable(f"{url} left out a part of the updates.", code="connection_lost")
        except InvalidStatus as refused:
            response = refused.response
            after_text = response.headers.get("Retry-After", "")
            error = error_of_answer(
                Answer(response.status_code, {"retry-after": after_text}, bytes(response.body or b""))
            )
        except msgspec.DecodeError as wrong:
            raise not_understood(url) from wrong
        except (OSError, TimeoutError, InvalidHandshake, WebSocketException) as broken:
            error = _lost(url)
            error.__cause__ = broken
        if error is None:
            return
        door.leave(url)
        await asyncio.sleep(
            bearing.wait(error, f"The task may go on: `octollm watch {task_id}` follows it once the door is back.")
        )


def _connected(door: Door, url: str, task_id: str, position: Position, silence: float) -> connect:
    # http:// → ws://, https:// → wss://
    return connect(
        f"ws{url.removeprefix('http')}/ws/tasks/{quote(task_id, safe='')}?{position.query()}",
        ssl=door.tls if url.startswith("https:") else None,
        additional_headers=door.headers,
        max_size=_MAX_FRAME,
        compression=None,
        open_timeout=_OPEN_SECONDS,
        ping_interval=silence,
        ping_timeout=silence,
        close_timeout=1,
        proxy=None,
    )


def _closed(code: int | None, task_id: str, url: str) -> DoorError | None:
    """Return what a close code means: ``None`` after the last update."""
    if code == _DONE:
        return None
    if code in _REFUSED:
        name, detail = _REFUSED[code]
        return error_of_code(name, detail.format(task_id=task_id))
    if code == _MALFORMED:
        return Conflict(f"{url} did not accept how the updates were asked for.", code="state_conflict")
    return _lost(url)


def _lost(url: str) -> DoorError:
    return Unavailable(f"The updates from {url} broke off.", code="connection_lost")
