"""A task's live updates over the WebSocket, with nothing lost or doubled when the connection breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException

from octollm.cli.door import Door
from octollm.contracts.stream import FrameType
from octollm.errors import OctoError
from octollm.rpc.problems import error_from_response

RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Waits between two tries to connect; the last repeats."""
GIVE_UP_SECONDS = 30.0
"""How long the door may be away before the watch ends."""
_MAX_FRAME = 8 * 1024 * 1024
_REFUSED = {4401: "token_missing", 4403: "scope_missing", 4404: "task_not_found"}


class Update(msgspec.Struct, frozen=True):
    """One frame. The last five members belong to ``token`` frames."""

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
        """Return what a token frame adds to the step's text."""
        return str(self.data.get("text", ""))


@dataclass(slots=True)
class Position:
    """What was seen: the last ``seq``, and per step how much of the text of which attempt and run."""

    seq: int = 0
    texts: dict[str, tuple[int, int, int]] = field(default_factory=dict[str, tuple[int, int, int]])

    def query(self) -> str:
        """Return the query string that goes on from here."""
        offsets = [("offset", f"{step}.{attempt}.{run}.{end}") for step, (attempt, run, end) in self.texts.items()]
        return urlencode([("after", str(self.seq)), *offsets])

    def take(self, update: Update) -> bool:
        """Note an update; return whether it is new."""
        if update.type == "token":
            end = update.offset + len(update.text)
            attempt, run, seen = self.texts.get(update.step, (-1, -1, 0))
            fresh = (update.attempt, update.run) > (attempt, run)
            if not fresh and ((update.attempt, update.run) < (attempt, run) or (end <= seen and not update.reset)):
                return False
            self.texts[update.step] = (update.attempt, update.run, end)
            return True
        if update.type == "ping":
            return False
        if update.type == "step" and "text_length" in update.data:
            self.texts.pop(str(update.data.get("step", "")), None)
        fresh = update.seq > self.seq
        self.seq = max(self.seq, update.seq)
        return fresh


async def task_updates(door: Door, task_id: str, *, after: int = 0) -> AsyncGenerator[Update]:
    """Yield a task's updates until its last, going on where a broken connection stopped.

    Raises ``task_not_found``, ``token_missing``, ``scope_missing``, and ``unavailable`` when the door stays away.
    """
    position = Position(after)
    tries = 0
    while True:
        try:
            async with _connected(door, task_id, position) as socket:
                async for message in socket:
                    tries = 0
                    update = msgspec.json.decode(message, type=Update)
                    if position.take(update):
                        yield update
            if socket.close_code == 1000:
                return
            _raise_refusal(socket.close_code, task_id)
        except InvalidStatus as error:
            answer = error.response
            raise error_from_response("The public door", answer.status_code, bytes(answer.body or b""), None) from error
        except ConnectionClosed as error:
            _raise_refusal(error.rcvd.code if error.rcvd else None, task_id)
        except (OSError, TimeoutError, InvalidHandshake, WebSocketException) as error:
            if sum(RETRY_SECONDS[:tries]) + RETRY_SECONDS[-1] * max(0, tries - len(RETRY_SECONDS)) > GIVE_UP_SECONDS:
                raise OctoError(
                    f"{door.url} has been away for {GIVE_UP_SECONDS:.0f} s. The task may go on: `octollm watch"
                    f" {task_id}` follows it once the door is back.",
                    code="unavailable",
                ) from error
        except msgspec.DecodeError as error:
            raise OctoError(f"{door.url} sent a frame that is not understood.", code="peer_protocol") from error
        await asyncio.sleep(RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])
        tries += 1


@contextlib.asynccontextmanager
async def _connected(door: Door, task_id: str, position: Position) -> AsyncGenerator[ClientConnection]:
    # http:// → ws://, https:// → wss://
    url = f"ws{door.url.removeprefix('http')}/ws/tasks/{quote(task_id, safe='')}?{position.query()}"
    async with connect(
        url,
        additional_headers=door.headers,
        max_size=_MAX_FRAME,
        compression=None,
        open_timeout=10,
        close_timeout=1,
        proxy=None,
    ) as socket:
        yield socket


def _raise_refusal(code: int | None, task_id: str) -> None:
    if code in _REFUSED:
        said = {
            "token_missing": "The door wants an API key: set OCTOLLM_API_KEY.",
            "scope_missing": "The API key does not allow this task to be watched.",
            "task_not_found": f"There is no task {task_id}.",
        }[_REFUSED[code]]
        raise OctoError(said, code=_REFUSED[code])
