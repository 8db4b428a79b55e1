"""AsyncClient: a method for each operation of the public API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from datetime import datetime
from types import TracebackType
from urllib.parse import quote, urlencode

import msgspec

from octollm.client._transport import TRANSFER_TIMEOUT_SECONDS, GatewayTransport
from octollm.client.files import FileContent, FileInput, load_file, load_files, verify_digest
from octollm.client.streams import RECONNECT_TIMEOUT_SECONDS, stream_events
from octollm.client.task import AsyncTaskHandle
from octollm.contracts.api import Acknowledgement, EventList, TaskList, TaskSummary, TaskView
from octollm.contracts.auth import (
    CurrentUser,
    KeyList,
    KeyRequest,
    KeyView,
    NewKey,
    RevocationRequest,
    TokenRequest,
    TokenResponse,
)
from octollm.contracts.enrolment import (
    ArmList,
    ArmView,
    EnrolmentTokenList,
    EnrolmentTokenRequest,
    EnrolmentTokenView,
    NewEnrolmentToken,
)
from octollm.contracts.events import Event
from octollm.contracts.observability import AuditPage, Health, Readiness
from octollm.contracts.operations import StoredFile
from octollm.contracts.screening import PreprocessRequest, ScreeningResult
from octollm.contracts.task import Budget, FileRef, Task, TaskContext, TaskStatus

_PAGE = 200
_READY = frozenset({503})


class AsyncClient:
    """An installation, seen through its public door. Close it by ``async with`` or :meth:`aclose`.

    Every method raises a :class:`APIError` of the type that tells what is wrong. What may pass was tried again
    within the timeout by then, if that could do nothing twice. Cancelling a call closes its connection.
    """

    def __init__(self, transport: GatewayTransport) -> None:
        self.transport = transport

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Tasks go on."""
        await self.transport.aclose()

    async def submit(
        self,
        goal: str,
        *,
        files: Iterable[FileInput] = (),
        criteria: Iterable[str] = (),
        constraints: Iterable[str] = (),
        context: str = "",
        budget: Budget | Mapping[str, float] | None = None,
        arm: str | None = None,
        deadline: datetime | str | None = None,
        priority: int = 0,
        parent: str | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncTaskHandle:
        """Submit a task and return it as soon as it is accepted.

        ``criteria`` are what the result has to satisfy, ``constraints`` what the work has to keep to, ``context``
        free notes. ``budget`` has ``max_tokens``, ``max_cost_usd`` (US dollars), ``max_time_seconds`` and
        ``max_retries``. ``arm`` names the one that is to do it. ``deadline`` needs an offset from UTC. ``parent`` is
        the task that this one belongs to. With the same ``key`` the same task is submitted once, also from another
        process; without one a repeat after a lost answer is safe all the same. Raises :class:`InvalidRequest`.
        """
        stored = [await self._store(content) for content in await load_files(files)]
        contract = Task(
            goal=goal,
            context=TaskContext(files=tuple(FileRef(file.name, file.digest) for file in stored), text=context),
            constraints=tuple(constraints),
            acceptance_criteria=tuple(criteria),
            budget=budget if isinstance(budget, Budget) else Budget(),
            priority=priority,
            parent_task_id=parent,
            assigned_arm=arm,
            deadline=deadline.isoformat() if isinstance(deadline, datetime) else deadline,
        )
        body: dict[str, object] = msgspec.to_builtins(contract)
        if isinstance(budget, Mapping):
            # As it is: a member that is misspelt is refused by the door, not dropped here.
            body["budget"] = dict(budget)
        task = await self.transport.post(
            "/tasks", body, TaskView, idempotency_key=idempotency_key or self.transport.ids.hex()
        )
        return self.task(task.task_id)

    def task(self, task_id: str) -> AsyncTaskHandle:
        """Return the task with that id. Nothing is asked: whether there is one shows when it is used."""
        return AsyncTaskHandle(self.transport, task_id)

    async def tasks(self, *, status: TaskStatus | None = None) -> AsyncGenerator[TaskSummary]:
        """Yield all tasks, newest first, page by page as they are taken."""
        cursor = None
        while True:
            page = await self.task_page(limit=_PAGE, cursor=cursor, status=status)
            for task in page.tasks:
                yield task
            cursor = page.cursor
            if cursor is None:
                return

    async def task_page(
        self, *, limit: int = 50, cursor: str | None = None, status: TaskStatus | None = None
    ) -> TaskList:
        """Return up to ``limit`` (1 to 200) tasks, newest first, behind those that ``cursor`` ends."""
        query = {"limit": limit, "cursor": cursor, "status": status}
        return await self.transport.get(f"/tasks?{_query(query)}", TaskList)

    async def upload(self, file: FileInput) -> StoredFile:
        """Store a file; the same bytes are stored once. ``submit`` does this for its files."""
        return await self._store(await load_file(file))

    async def download(self, file: StoredFile | str) -> bytes:
        """Return the bytes of a stored file, by what :meth:`upload` returned or its digest, checked against that."""
        digest = file if isinstance(file, str) else file.digest
        answer = await self.transport.send("GET", f"/files/{quote(digest, safe='')}", timeout=TRANSFER_TIMEOUT_SECONDS)
        return verify_digest(answer.body, digest)

    def events(self, *, after: int = 0, reconnect_timeout: float = RECONNECT_TIMEOUT_SECONDS) -> AsyncGenerator[Event]:
        """Yield the events of the log behind position ``after``, and go on as they happen, for ever.

        A broken connection is taken up again and no event comes twice; :class:`Unavailable` is raised when no door
        is back after ``patience`` seconds.
        """
        return stream_events(self.transport, after=after, reconnect_timeout=reconnect_timeout)

    async def event_page(self, *, after: int = 0, limit: int = 200) -> EventList:
        """Return up to ``limit`` (1 to 500) events behind position ``after`` that there are already."""
        return await self.transport.get(f"/events?{_query({'after': after, 'limit': limit})}", EventList)

    async def arms(self) -> tuple[ArmView, ...]:
        """Return the arms that may be called."""
        return (await self.transport.get("/arms", ArmList)).arms

    async def remove_arm(self, name: str) -> None:
        """Remove an arm of one's own: its key and what it was lent end, and its name is free."""
        await self.transport.send("DELETE", f"/arms/{quote(name, safe='')}", idempotency_key=self.transport.ids.hex())

    async def enrolment_tokens(self) -> tuple[EnrolmentTokenView, ...]:
        """Return the join secrets, without what is secret of them."""
        return (await self.transport.get("/joins", EnrolmentTokenList)).joins

    async def create_enrolment_token(
        self, name: str, *, calls: Iterable[str] = (), lifetime_seconds: int = 86_400
    ) -> NewEnrolmentToken:
        """Make a secret with which the arm ``name`` joins; it may declare at most ``calls``. It is shown this once.

        Not repeated when an answer is lost, as with :meth:`create_key`.
        """
        return await self.transport.post(
            "/joins", EnrolmentTokenRequest(name, tuple(calls), lifetime_seconds), NewEnrolmentToken
        )

    async def revoke_enrolment_token(self, token_id: str) -> None:
        """Revoke a join secret, by its id; an arm that joined with it stays."""
        await self.transport.send(
            "DELETE", f"/joins/{quote(token_id, safe='')}", idempotency_key=self.transport.ids.hex()
        )

    async def keys(self) -> tuple[KeyView, ...]:
        """Return the API keys, without their secrets."""
        return (await self.transport.get("/keys", KeyList)).keys

    async def create_key(self, name: str, *, scope: str = "user", tenant: str | None = None) -> NewKey:
        """Make an API key; its ``secret`` is in the answer, this once. ``scope`` has presets and scopes, with spaces.

        ``tenant`` is one's own; whoever runs the installation makes the first key of another.

        Not repeated when an answer is lost: a key whose secret nobody got would stay behind.
        """
        return await self.transport.post("/keys", KeyRequest(name, scope, tenant), NewKey)

    async def revoke_key(self, key_id: str) -> None:
        """Revoke an API key, by its id; its tokens and tasks end with it."""
        await self.transport.send("DELETE", f"/keys/{quote(key_id, safe='')}", idempotency_key=self.transport.ids.hex())

    async def preprocess(self, text: str) -> ScreeningResult:
        """Return what the door finds in a text, and whether it would refuse it as a goal. Nothing is kept."""
        return await self.transport.post("/preprocess", PreprocessRequest(text), ScreeningResult)

    async def mint_token(self, scope: str, *, aud: str, lifetime_seconds: int = 3600) -> TokenResponse:
        """Make a token for direct calls of the one service ``aud``, with a task and a budget of its own."""
        return await self.transport.post("/token", TokenRequest(scope, aud, lifetime_seconds), TokenResponse)

    async def revoke_token(self, jti: str) -> None:
        """Revoke a token by its ``jti``; every service refuses it, and what was minted under it, within a second."""
        await self._revoke(RevocationRequest("jti", jti))

    async def revoke_principal(self, sub: str) -> None:
        """Revoke what a principal was given until now, and cancel its tasks."""
        await self._revoke(RevocationRequest("sub", sub))

    async def audit(self, *, after: int = 0, limit: int = 200, system: bool = False) -> AuditPage:
        """Return audit rows behind the row ``after``, oldest first, and where the chain stands.

        ``system`` asks for what belongs to no tenant, such as credentials that were refused.
        """
        of = "&of=system" if system else ""
        return await self.transport.get(f"/audit?after={after}&limit={limit}{of}", AuditPage)

    async def who_am_i(self) -> CurrentUser:
        """Return the tenant and the scopes at the orchestrator of whoever this client is."""
        return await self.transport.get("/session", CurrentUser)

    async def health(self) -> Health:
        """Return the door's version. Raises :class:`Unavailable` when it does not answer."""
        return await self.transport.get("/health", Health)

    async def ready(self) -> Readiness:
        """Return whether the installation may be given work, and what it lacks; also when it is not ready."""
        answer = await self.transport.send("GET", "/ready", accepted_statuses=_READY)
        return self.transport.decode(answer, Readiness)

    async def revoke_service(self, name: str) -> None:
        """Revoke what a service was lent until now: its key may have been in other hands."""
        await self._revoke(RevocationRequest("aud", name))

    async def _revoke(self, request: RevocationRequest) -> None:
        await self.transport.post("/token/revoke", request, Acknowledgement, idempotency_key=self.transport.ids.hex())

    async def _store(self, content: FileContent) -> StoredFile:
        headers = {"Content-Type": content.media_type, "X-File-Name": quote(content.name, safe="")}
        answer = await self.transport.send(
            "POST", "/files", content.body, headers, TRANSFER_TIMEOUT_SECONDS, idempotency_key=self.transport.ids.hex()
        )
        return self.transport.decode(answer, StoredFile)


def _query(parameters: Mapping[str, object]) -> str:
    return urlencode({name: value for name, value in parameters.items() if value is not None})
