"""AsyncClient: a method for each operation of the public API.

Administration is under ``client.admin``, the memory under ``client.memory``, and schedules under
``client.schedules``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from octollm.client._transport import (
    DEFAULT_TIMEOUT_SECONDS,
    TRANSFER_TIMEOUT_SECONDS,
    GatewayTransport,
    create_transport,
)
from octollm.client.admin import AsyncAdmin
from octollm.client.files import FileContent, FileInput, load_file, load_files, verify_digest
from octollm.client.memory import AsyncMemory
from octollm.client.schedules import AsyncSchedules
from octollm.client.streams import RECONNECT_TIMEOUT_SECONDS, stream_events
from octollm.client.subscriptions import AsyncSubscriptions
from octollm.client.task import AsyncTaskHandle
from octollm.client.typed_output import OutputT, describe_output
from octollm.contracts.api import EventList, TaskList, TaskSummary, UsageBy, UsageReport
from octollm.contracts.approvals import ApprovalPolicy, PendingApproval
from octollm.contracts.auth import CurrentUser
from octollm.contracts.enrolment import ArmView
from octollm.contracts.events import Event
from octollm.contracts.observability import Health, Readiness, ServiceState
from octollm.contracts.operations import StoredFile
from octollm.contracts.public_api import (
    LIST_ARMS,
    LIST_SERVICES,
    READ_EVENTS,
    READ_FILE,
    READ_SESSION,
    SCREEN_TEXT,
    STORE_FILE,
)
from octollm.contracts.screening import PreprocessRequest, ScreeningResult
from octollm.contracts.task import Budget, FileRef, ParentEnd, Task, TaskContext, TaskStatus
from octollm.contracts.task_operations import LIST_APPROVALS, LIST_TASKS, READ_USAGE, SUBMIT_TASK

if TYPE_CHECKING:
    from octollm.resilience import RetryPolicy

_PAGE = 200
_READY_STATUSES = frozenset({503})
"""``/ready`` answers 503 with a normal body when the installation is not ready."""


class AsyncClient:
    """A client of an installation, for asyncio. Close it by ``async with`` or :meth:`aclose`.

    ``url`` is the address of the gateway; several addresses of one installation are a list, or separated by commas.
    Without it the client uses ``OCTOLLM_URL``, else this machine. ``api_key`` defaults to ``OCTOLLM_API_KEY``.
    ``timeout`` bounds each call with its retries, in seconds; uploads and downloads have 120 s, and streams have no
    limit. ``retry`` defaults to four attempts. Nothing is sent before the first call.

    An ``https`` gateway must have a certificate signed by an authority of the system, or of ``OCTOLLM_TLS_CA``. The
    client uses no proxy and follows no redirect, so that the API key reaches nobody else.

    Raises ``setting_invalid`` for a malformed URL or key. Every method raises an :class:`APIError` whose type says what
    is wrong. Cancelling a call closes its connection.
    """

    admin: AsyncAdmin
    """Keys, enrolment tokens, arms, tokens, revocation and the audit log."""
    subscriptions: AsyncSubscriptions
    """Durable subscriptions to the event log."""
    memory: AsyncMemory
    """Facts, documents, search and erasure."""
    schedules: AsyncSchedules
    """Tasks that are submitted at the times of a cron expression."""

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        api_key: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        retry: RetryPolicy | None = None,
    ) -> None:
        self._set_transport(create_transport(url, api_key, timeout=timeout, retry=retry))

    @classmethod
    def _from_transport(cls, transport: GatewayTransport) -> AsyncClient:
        client = cls.__new__(cls)
        client._set_transport(transport)
        return client

    def _set_transport(self, transport: GatewayTransport) -> None:
        self._transport = transport
        self.admin = AsyncAdmin(transport)
        self.subscriptions = AsyncSubscriptions(transport)
        self.memory = AsyncMemory(transport)
        self.schedules = AsyncSchedules(transport)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Tasks continue."""
        await self._transport.aclose()

    @property
    def url(self) -> str:
        """The gateway's address in use."""
        return self._transport.url

    async def submit(
        self,
        goal: str,
        *,
        output: type[OutputT] = str,
        files: Iterable[FileInput | StoredFile] = (),
        criteria: Iterable[str] = (),
        constraints: Iterable[str] = (),
        context: str = "",
        budget: Budget | Mapping[str, float] | None = None,
        arm: str | None = None,
        deadline: datetime | str | None = None,
        approval: ApprovalPolicy | Mapping[str, object] | None = None,
        priority: int = 0,
        parent: str | None = None,
        on_parent_end: ParentEnd = "cancel",
        idempotency_key: str | None = None,
    ) -> AsyncTaskHandle[OutputT]:
        """Submit a task and return it once it is stored.

        ``output`` is the type of the result's ``value``: a ``msgspec.Struct``, a dataclass, a Pydantic model, or any
        other type that msgspec decodes. Its JSON Schema is sent as a constraint for the arm and as a criterion that the
        judge verifies. ``criteria`` must hold for the result, ``constraints`` for the work; ``context`` has free notes.
        ``files`` may hold results of :meth:`upload`, which are not sent again.
        ``budget`` has ``max_tokens``, ``max_cost_usd``, ``max_time_seconds`` and ``max_retries``. ``arm`` assigns the
        task to one arm, without a plan. ``deadline`` needs a UTC offset. ``approval`` says what a person has to
        approve: ``plan``, ``steps``, ``cost_above_usd`` and ``expires_seconds``. ``parent`` is the id of the task that
        this one is a sub-task of: it shares its budget, deadline, approvals, authority and trace, and is cancelled when
        it ends, unless ``on_parent_end`` is ``continue``.

        A second submission with the same ``idempotency_key`` returns the first task, also from another process. Without
        one, retries within this call are safe all the same. A cancelled call may have stored the task: submitting
        it again with the same key returns it. Raises :class:`InvalidRequest`.
        """
        requirements = describe_output(output)
        refs = [file if isinstance(file, StoredFile) else await self._store(file) for file in await load_files(files)]
        contract = Task(
            goal=goal,
            context=TaskContext(files=tuple(FileRef(file.name, file.digest) for file in refs), text=context),
            constraints=(*constraints, *requirements),
            acceptance_criteria=(*criteria, *requirements),
            budget=budget if isinstance(budget, Budget) else Budget(),
            priority=priority,
            parent_task_id=parent,
            assigned_arm=arm,
            deadline=deadline.isoformat() if isinstance(deadline, datetime) else deadline,
            approval=approval if isinstance(approval, ApprovalPolicy) else ApprovalPolicy(),
            on_parent_end=on_parent_end,
        )
        body: dict[str, object] = msgspec.to_builtins(contract)
        if isinstance(budget, Mapping):
            # Sent as it is: the server points at a misspelt member, which a conversion here would drop.
            body["budget"] = dict(budget)
        if isinstance(approval, Mapping):
            body["approval"] = dict(approval)
        task = await self._transport.call(SUBMIT_TASK, body, idempotency_key=idempotency_key)
        return AsyncTaskHandle(self._transport, task.task_id, output)

    def task(
        self,
        task_id: str,
        *,
        output: type[OutputT] = str,
    ) -> AsyncTaskHandle[OutputT]:
        """Return a handle of an existing task; ``output`` as for :meth:`submit`. Nothing is sent."""
        return AsyncTaskHandle(self._transport, task_id, output)

    async def tasks(self, *, status: TaskStatus | None = None, text: str = "") -> AsyncGenerator[TaskSummary]:
        """Yield all tasks, newest first, fetched page by page; with ``text``, those whose goal contains it."""
        cursor = None
        while True:
            page = await self.task_page(limit=_PAGE, cursor=cursor, status=status, text=text)
            for task in page.tasks:
                yield task
            cursor = page.cursor
            if cursor is None:
                return

    async def task_page(
        self, *, limit: int = 50, cursor: str | None = None, status: TaskStatus | None = None, text: str = ""
    ) -> TaskList:
        """Return up to ``limit`` (1 to 200) tasks, newest first; ``cursor`` is that of the page before."""
        query = {"limit": limit, "cursor": cursor, "status": status, "text": text or None}
        return await self._transport.call(LIST_TASKS, query=query)

    async def usage(self, by: UsageBy = "day", *, days: int = 30) -> UsageReport:
        """Return what the tenant's model calls used in the last ``days`` days (UTC), by day, arm or model."""
        return await self._transport.call(READ_USAGE, query={"by": by, "days": days})

    async def approvals(self) -> tuple[PendingApproval, ...]:
        """Return what waits for approval, those that expire first at the top."""
        return (await self._transport.call(LIST_APPROVALS)).approvals

    async def upload(self, file: FileInput) -> StoredFile:
        """Store a file; equal content is stored once. :meth:`submit` uploads its files by itself."""
        return await self._store(await load_file(file))

    async def download(self, file: StoredFile | str) -> bytes:
        """Return the content of a stored file, by the result of :meth:`upload` or its digest, and verify the digest."""
        digest = file if isinstance(file, str) else file.digest
        content = await self._transport.call(READ_FILE, timeout=TRANSFER_TIMEOUT_SECONDS, digest=digest)
        return verify_digest(content, digest)

    def events(self, *, after: int = 0, reconnect_timeout: float = RECONNECT_TIMEOUT_SECONDS) -> AsyncGenerator[Event]:
        """Yield the events of the log after position ``after``, and then new ones as they happen, without end.

        A broken connection is resumed, and every event comes once. Raises :class:`Unavailable` when no gateway answers
        for ``reconnect_timeout`` seconds.
        """
        return stream_events(self._transport, after=after, reconnect_timeout=reconnect_timeout)

    async def event_page(self, *, after: int = 0, limit: int = 200) -> EventList:
        """Return up to ``limit`` (1 to 500) existing events after position ``after``."""
        return await self._transport.call(READ_EVENTS, query={"after": after, "limit": limit})

    async def arms(self) -> tuple[ArmView, ...]:
        """Return the registered arms."""
        return (await self._transport.call(LIST_ARMS)).arms

    async def services(self) -> tuple[ServiceState, ...]:
        """Return the state of every service. Needs the scope ``monitor:read``."""
        return (await self._transport.call(LIST_SERVICES)).services

    async def preprocess(self, text: str) -> ScreeningResult:
        """Screen a text: return the findings, and whether it would be refused as a goal. Nothing is stored."""
        return await self._transport.call(SCREEN_TEXT, PreprocessRequest(text))

    async def who_am_i(self) -> CurrentUser:
        """Return the tenant and scopes of this client's credential."""
        return await self._transport.call(READ_SESSION)

    async def health(self) -> Health:
        """Return the gateway's version. Raises :class:`Unavailable` when it does not answer."""
        return self._transport.decode(await self._transport.send("GET", "/health"), Health)

    async def ready(self) -> Readiness:
        """Return whether the installation accepts work, with the state of its dependencies."""
        response = await self._transport.send("GET", "/ready", accepted_statuses=_READY_STATUSES)
        return self._transport.decode(response, Readiness)

    async def _store(self, content: FileContent) -> StoredFile:
        headers = {"Content-Type": content.media_type, "X-File-Name": quote(content.name, safe="")}
        return await self._transport.call(STORE_FILE, content.body, headers=headers, timeout=TRANSFER_TIMEOUT_SECONDS)


def connect(
    url: str | Sequence[str] | None = None,
    api_key: str | None = None,
    *,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    retry: RetryPolicy | None = None,
) -> AsyncClient:
    """Return an :class:`AsyncClient` with these arguments."""
    return AsyncClient(url, api_key, timeout=timeout, retry=retry)
