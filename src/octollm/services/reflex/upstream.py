"""The orchestrator as the callers at the door use it: each in their own name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import quote

import msgspec

from octollm.clock import Clock
from octollm.context import current_scene
from octollm.contracts.api import EventList, SavedTexts, TaskView
from octollm.contracts.events import Event
from octollm.contracts.services import OperationKind
from octollm.errors import OctoError, RemoteError
from octollm.resilience import Deadline, Failure, RetryPolicy
from octollm.rpc.caller import Caller, Outgoing, Target
from octollm.rpc.http import Answer, Streamed
from octollm.services.reflex.exchange import Exchange

T = TypeVar("T")

LOOK_SECONDS = 10.0
"""The longest wait for one look at a task on behalf of a watcher."""
_STALE = frozenset({"token_expired", "token_revoked", "token_invalid"})


@dataclass(frozen=True)
class DoorRetry(RetryPolicy):
    """The policy of calls made at the door: short waits are waited here, long ones are left to the client."""

    longest: float = 1.0

    def wait(self, failure: Failure, *, tried: int, repeats_safely: bool, left: float, random: float) -> float | None:
        """Return the seconds to wait, or ``None`` to pass the refusal, with its ``Retry-After``, on at once."""
        if failure.retry_after is not None and failure.retry_after > self.longest:
            return None
        return super().wait(failure, tried=tried, repeats_safely=repeats_safely, left=left, random=random)


@dataclass(frozen=True, slots=True)
class Asked:
    """One call to be forwarded. ``path`` is encoded and has its query, if any."""

    name: str
    method: str
    path: str
    kind: OperationKind = "read_only"
    body: bytes | None = None
    key: str | None = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


class Upstream:
    """Calls the orchestrator in the name of a credential."""

    def __init__(self, caller: Caller, exchange: Exchange, clock: Clock) -> None:
        self._caller = caller
        self._exchange = exchange
        self._clock = clock

    async def send(self, credential: str, asked: Asked, deadline: Deadline) -> Answer:
        """Return the whole answer. Raises the orchestrator's problem as it was told."""
        return await self._in_name_of(credential, asked, deadline, self._caller.send)

    async def stream(
        self, credential: str, asked: Asked, deadline: Deadline, consume: Callable[[Streamed], Awaitable[None]]
    ) -> None:
        """Hand the answer over as it comes. Raises the orchestrator's problem as it was told."""
        await self._in_name_of(credential, asked, deadline, lambda call: self._caller.stream(call, consume))

    async def _in_name_of(
        self, credential: str, asked: Asked, deadline: Deadline, send: Callable[[Outgoing], Awaitable[T]]
    ) -> T:
        token = await self._exchange.token(credential)
        try:
            return await send(self._outgoing(asked, token, deadline))
        except RemoteError as error:
            if error.code not in _STALE:
                raise
        # The token was revoked, or its signer's key changed. Refused calls did not begin: one more try is safe.
        self._exchange.drop(credential)
        token = await self._exchange.token(credential)
        return await send(self._outgoing(asked, token, deadline))

    def _outgoing(self, asked: Asked, token: str, deadline: Deadline) -> Outgoing:
        headers = dict(asked.headers)
        request_id = current_scene().request_id
        if request_id:
            headers["X-Request-ID"] = request_id
        return Outgoing(
            Target("orchestrator", asked.name, asked.method, asked.path, asked.kind),
            token,
            deadline,
            asked.body,
            asked.key,
            asked.content_type,
            headers,
        )

    async def look(self, credential: str, name: str, path: str, kind: type[T]) -> T:
        """Read something typed from the orchestrator."""
        answer = await self.send(credential, Asked(name, "GET", path), Deadline.after(self._clock, LOOK_SECONDS))
        return _decode(answer, kind)

    async def cancel(self, credential: str, task_id: str) -> TaskView:
        """Cancel a task. Raises ``scope_missing``, ``task_not_found``, ``state_conflict``."""
        asked = Asked("tasks.cancel", "POST", f"/tasks/{quote(task_id, safe='')}/cancel", "idempotent", b"")
        return _decode(await self.send(credential, asked, Deadline.after(self._clock, LOOK_SECONDS)), TaskView)


class UpstreamTask:
    """One task as one caller may see it: the source of a live session."""

    def __init__(self, upstream: Upstream, credential: str, task_id: str) -> None:
        self._upstream = upstream
        self._credential = credential
        self._path = f"/tasks/{quote(task_id, safe='')}"

    async def view(self) -> TaskView:
        """Return the task as it is now."""
        return await self._upstream.look(self._credential, "tasks.read", self._path, TaskView)

    async def history(self, after: int, limit: int) -> Sequence[Event]:
        """Return the events behind version ``after``."""
        path = f"{self._path}/history?after={after}&limit={limit}"
        return (await self._upstream.look(self._credential, "tasks.history", path, EventList)).events

    async def texts(self) -> SavedTexts:
        """Return the text of each step as it was last saved."""
        return await self._upstream.look(self._credential, "tasks.texts", f"{self._path}/texts", SavedTexts)


def _decode(answer: Answer, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OctoError("The orchestrator answered in another form than agreed.", code="peer_protocol") from error
