"""Context: the API of an arm's operation.

It has calls to other services with attenuated authority, the model, files, streamed output, the arm's state, and
information about the call.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, cast, overload
from urllib.parse import quote

import msgspec

from octollm.arm.model import ModelClient, ModelEndpoint
from octollm.arm.references import CallTo, OperationReference
from octollm.arm.subtasks import SubTask, build_contract
from octollm.capability import CallTokens, Delegator, Scope
from octollm.contracts.api import TaskView
from octollm.contracts.media_types import media_type_of
from octollm.contracts.operations import StoredFile, to_artifact
from octollm.contracts.service_operations import route_of
from octollm.contracts.services import service_of
from octollm.contracts.task import (
    INLINE_ARTIFACTS_HEADER,
    MAX_FILE_BYTES,
    Artifact,
    Budget,
    ExecuteResult,
    FileRef,
    ParentEnd,
    StepResult,
    Task,
)
from octollm.errors import OctoError
from octollm.resilience import Deadline, OutageRetry
from octollm.rpc.call import IncomingCall
from octollm.rpc.client import CallTarget, OutgoingCall, ServiceClient
from octollm.rpc.codec import encode
from octollm.rpc.idempotency import NestedKeys
from octollm.rpc.ndjson import OnEvent
from octollm.rpc.service import ServiceBase
from octollm.telemetry import Logger


class PrepareCall(Protocol):
    """Prepares a call: token, idempotency key and route."""

    def __call__(self, service: str, operation: str, body: bytes | None, **path: str) -> Awaitable[OutgoingCall]:
        """Return the call. ``path`` parameters become selectors."""
        ...


class Artifacts:
    """Reads the files of a task and writes new ones. The arm declares ``files:read`` and ``files:write``.

    ``inline_bytes`` is how many bytes of texts the caller takes in the response and stores itself.
    """

    def __init__(self, caller: ServiceClient, prepare_call: PrepareCall, inline_bytes: int = 0) -> None:
        self._caller = caller
        self._prepare_call = prepare_call
        self._written: dict[str, Artifact] = {}
        self._room = inline_bytes
        self._inline: dict[str, tuple[Artifact, str]] = {}
        """Artifacts that are not stored yet, with their texts, by digest."""

    async def read(self, file: FileRef | Artifact) -> bytes:
        """Return the bytes of a file: its inline text, or the content stored under its digest.

        Raises ``file_not_found``, ``file_invalid`` for a reference with neither, and ``authority_missing`` for a
        digest that is not the task's.
        """
        if isinstance(file, FileRef) and file.text is not None:
            return file.text.encode()
        if file.digest is None:
            raise OctoError(f"The file {file.name} has neither text nor a digest.", code="file_invalid")
        outgoing = await self._prepare_call("files", "read", None, digest=file.digest)
        return (await self._caller.send(outgoing)).body

    async def write(self, name: str, content: bytes | str, media_type: str | None = None) -> Artifact:
        """Store ``content`` under a name, as an artifact of the task; the same bytes are stored once.

        ``media_type`` is by default derived from the name's suffix. Raises ``body_too_large``, ``authority_missing``.
        """
        body = content.encode() if isinstance(content, str) else content
        if len(body) > MAX_FILE_BYTES:
            raise OctoError(f"The artifact {name} has more than {MAX_FILE_BYTES} bytes.", code="body_too_large")
        kind = media_type or media_type_of(name)
        # Also for one that travels in the response: an arm without the authority is refused here and now.
        outgoing = _with_file_headers(await self._prepare_call("files", "write", body), name, kind)
        text = _inline_text(name, body, self._room)
        if text is None:
            self._written[name] = await self._upload(outgoing)
        else:
            artifact = Artifact(name, hashlib.sha256(body).hexdigest(), len(body), kind)
            self._written[name] = artifact
            self._inline[artifact.digest] = artifact, text
            self._room -= len(body)
        return self._written[name]

    async def _upload(self, outgoing: OutgoingCall) -> Artifact:
        return to_artifact(await self._caller.call(outgoing, StoredFile))

    async def store(self) -> None:
        """Store what would travel in the response. A call that may refer to it by its digest is about to be made."""
        while self._inline:
            _, (artifact, text) = self._inline.popitem()
            body = text.encode()
            outgoing = await self._prepare_call("files", "write", body)
            await self._upload(_with_file_headers(outgoing, artifact.name, artifact.media_type))

    async def attach(self, result: ExecuteResult) -> ExecuteResult:
        """Return the result with the texts of its artifacts that are not stored; store those that are not in it."""
        listed = {artifact.digest for artifact in result.artifacts}
        texts = {digest: self._inline.pop(digest)[1] for digest in list(self._inline) if digest in listed}
        await self.store()
        if not texts:
            return result
        fields = {name: getattr(result, name) for name in ExecuteResult.__struct_fields__}
        return StepResult(**fields, texts=texts)

    def list(self) -> tuple[Artifact, ...]:
        """Return the artifacts that this call has written, in order; of two with the same name the later."""
        return tuple(self._written.values())


_PLAIN_NAME = re.compile(r"[\w-][\w. -]{0,199}", re.ASCII)
"""Names that every file store takes; the store itself decides about others."""


def _inline_text(name: str, body: bytes, room: int) -> str | None:
    """Return the text of an artifact that may travel in the response, else ``None``."""
    if len(body) > room or not _PLAIN_NAME.fullmatch(name):
        return None
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None


def _inline_bytes(call: IncomingCall) -> int:
    """Return how many bytes of artifacts the caller takes in the response of this call."""
    given = call.request.headers.get(INLINE_ARTIFACTS_HEADER, "")
    if call.operation != "execute" or not _INLINE_BYTES.fullmatch(given):
        return 0
    return int(given)


_INLINE_BYTES = re.compile(r"[0-9]{1,7}", re.ASCII)


def _with_file_headers(outgoing: OutgoingCall, name: str, media_type: str) -> OutgoingCall:
    """Return an upload with the file's name in a header, percent-encoded, since headers are ASCII (RFC 8187)."""
    return msgspec.structs.replace(outgoing, content_type=media_type, headers={"X-File-Name": quote(name)})


if TYPE_CHECKING:
    # PEP 696: Python 3.11 has no defaults for type variables, and they are not needed at run time.
    from typing_extensions import TypeVar

    StateT_co = TypeVar("StateT_co", covariant=True, default=Any)
else:
    from typing import TypeVar

    StateT_co = TypeVar("StateT_co", covariant=True)
T = TypeVar("T")
P = ParamSpec("P")

MIN_ENDPOINT_SECONDS = 1.0
OUTAGE_RETRY = OutageRetry(15.0)
"""Seconds that an arm's call rides out an outage of its callee. Failing earlier would lose the work done so far."""


@dataclass(frozen=True, slots=True)
class CallInfo:
    """Information about a call, for logs and decisions. It grants nothing: authority is in the token alone.

    ``task_id``, ``step``, ``attempt`` (from 1) and ``run`` identify the step that the call belongs to; ``step``,
    ``attempt`` and ``run`` are ``None`` outside of a step. ``run`` rises when another worker takes the task over.
    ``principal`` is the user that the work is for. ``budget_left`` is an upper bound: the task's budget minus the usage
    of this call, without that of other steps. Its ``max_time_seconds`` is the time to the deadline.
    """

    task_id: str
    step: str | None
    attempt: int | None
    run: int | None
    tenant: str
    principal: str
    budget_left: Budget


class Context(Generic[StateT_co]):
    """One call of an arm's operation.

    ``state`` is the value that the arm's ``lifespan`` yielded, ``model`` is the client of the language model,
    ``artifacts`` reads and writes files, ``task`` is the body if it is a ``Task``, otherwise ``None``.
    ``Context[Pool]`` gives ``state`` its type.
    """

    def __init__(
        self,
        base: ServiceBase,
        delegator: Delegator,
        call: IncomingCall,
        declared: tuple[Scope, ...],
        body: object = None,
        state: StateT_co = None,
    ) -> None:
        self.state = state
        self._base = base
        self._delegator = delegator
        self._call = call
        self._declared = declared
        # Without a key the request id takes its place, because it is the same over the retries of a call.
        parent_key = call.key or call.request_id
        self._keys = NestedKeys(parent_key)
        self._call_digest = hashlib.sha256(parent_key.encode()).hexdigest()
        self._tokens: CallTokens | None = None
        self.task = body if isinstance(body, Task) else None
        self.artifacts = Artifacts(base.client, self._prepare, _inline_bytes(call))
        self.model = ModelClient(base.client, lambda body: self.prepare_call("models", "chat", body), self._endpoint)

    @property
    def info(self) -> CallInfo:
        """Return the step, attempt and run, the tenant, the principal, and the remaining budget."""
        authority = self._call.authority
        work = authority.task
        budget = Budget() if self.task is None else self.task.budget
        usage = self.model.usage
        tokens, cost = budget.max_tokens, budget.max_cost_usd
        return CallInfo(
            task_id=self.task_id,
            step=None if work is None else work.step,
            attempt=None if work is None else work.attempt,
            run=None if work is None else work.run,
            tenant=authority.tenant,
            principal=authority.subject,
            budget_left=msgspec.structs.replace(
                budget,
                max_tokens=None if tokens is None else max(0, tokens - usage.total_tokens),
                max_cost_usd=None if cost is None else max(0.0, cost - usage.cost_usd),
                max_time_seconds=max(0.0, self.deadline.remaining()),
            ),
        )

    @property
    def deadline(self) -> Deadline:
        """Return the deadline of this call; ``deadline.remaining()`` is in seconds."""
        return self._call.deadline

    @property
    def task_id(self) -> str:
        """Return the task that the caller's token is bound to; empty without one."""
        task = self._call.authority.task
        return (task.task or "") if task is not None else ""

    @property
    def log(self) -> Logger:
        """Return the arm's log; its lines include the ids of this call."""
        return self._base.log

    def effect_key(self, name: str, request: object) -> str:
        """Return the ``Idempotency-Key`` for a request to an external service: a repeat of this call gets the same key.

        ``name`` and ``request`` (a value that can be encoded as JSON) tell the effects of one call apart.
        """
        return self._keys.next(self._base.name, name, encode(request))

    async def emit(self, text: str, *, reset: bool = False) -> None:
        """Stream text to the clients that watch the step; ``reset`` discards the text streamed before."""
        await self._call.emit.token(text, reset=reset)

    async def progress(self, percent: float, message: str = "") -> None:
        """Report the progress of the work, from 0 to 100."""
        await self._call.emit.progress(percent, message)

    def allows(self, call: CallTo) -> bool:
        """Return whether this call may make an optional one: the operation declares it, and the grant covers it."""
        scope = Scope(str(call))
        grant = self._call.authority.grant
        if grant is None or not any(declared.contains(scope) for declared in self._declared):
            return False
        return grant.may.subtree(scope) is not None

    async def submit(
        self,
        goal: str,
        *,
        files: Iterable[FileRef] = (),
        criteria: Iterable[str] = (),
        constraints: Iterable[str] = (),
        notes: str = "",
        budget: Budget | None = None,
        arm: str | None = None,
        on_parent_end: ParentEnd = "cancel",
    ) -> SubTask:
        """Submit a sub-task of the task that this call works on, and return it once it is stored.

        It shares the task's budget, deadline, approvals and trace. It may use what the task may, as far as this arm
        declares it: the arms that it needs, for example ``coder:execute``, and ``tasks:create`` itself. Without
        ``budget`` its tokens are an even share of what is left. It is cancelled when the task ends, unless
        ``on_parent_end`` is ``continue``. A repeat of this call returns the same sub-task.

        Raises ``authority_missing``, ``budget_invalid`` for more tokens than are left, ``state_conflict`` past eight
        generations or a hundred sub-tasks, and what a submission raises.
        """
        body = build_contract(goal, files, criteria, constraints, notes, budget, arm, on_parent_end)
        await self.artifacts.store()
        view = await self._base.client.call(await self._prepare_task_call("create", body), TaskView)
        return SubTask(view.task_id, self._base.client, self._prepare_task_call)

    async def _prepare_task_call(self, operation: str, body: bytes | None, **path: str) -> OutgoingCall:
        return await self._prepare("tasks", operation, body, **path)

    @overload
    async def call(self, operation: OperationReference[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    @overload
    async def call(self, service: str, /, operation: str, body: object, *, on_event: OnEvent | None = None) -> Any: ...

    @overload
    async def call(
        self, service: str, /, operation: str, body: object, answer: type[T], *, on_event: OnEvent | None = None
    ) -> T: ...

    async def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call another service's operation with attenuated authority, this call's deadline and its trace.

        By reference, ``call(retriever.search, query="…")``: the arguments are the fields of the body. By name,
        ``call("retriever", "search", body, Answer)``: ``body`` is any value that can be encoded as JSON; without
        ``Answer`` the result is decoded JSON. Raises ``authority_missing`` when the operation does not declare the
        call or the caller's authority does not cover it, and the callee's errors.
        """
        if isinstance(target, OperationReference):
            reference = cast("OperationReference[..., Any]", target)
            return await self.send(reference, reference.make_body(*args, **kwargs))
        return await self._call_by_name(target, *args, **kwargs)

    async def send(self, operation: OperationReference[..., T], body: object, *, on_event: OnEvent | None = None) -> T:
        """Call an operation with a complete body; ``on_event`` is called with each event that the callee streams."""
        outgoing = await self.prepare_call(operation.service, operation.operation, encode(body))
        return await self._base.client.call(outgoing, operation.answer, on_event=on_event)

    async def _call_by_name(
        self, service: str, operation: str, body: object, answer: Any = Any, *, on_event: OnEvent | None = None
    ) -> Any:
        outgoing = await self.prepare_call(service, operation, encode(body))
        return await self._base.client.call(outgoing, answer, on_event=on_event)

    async def prepare_call(self, service: str, operation: str, body: bytes | None, **path: str) -> OutgoingCall:
        """Return a prepared call with token, idempotency key and route. ``path`` parameters become selectors.

        Raises ``authority_missing``.
        """
        # A model is given texts; any other service may be given the digest of an artifact, and look for it.
        if service != "models":
            await self.artifacts.store()
        return await self._prepare(service, operation, body, **path)

    async def _prepare(self, service: str, operation: str, body: bytes | None, **path: str) -> OutgoingCall:
        route = route_of(service, operation)
        audience = service_of(service)
        # The operations on tasks know no selectors: a token for one task would not open them.
        selectors = () if service == "tasks" else path.values()
        bearer = await self._bearer(":".join((service, operation, *selectors)))
        key = None
        if route.method != "GET":
            # Also for a callee that stores no responses: the keys of its own calls are derived from this one, so when
            # the call is repeated, its model calls are answered from the journal.
            key = self._keys.next(audience, operation, body or b"")
        filled = route.path.format(**{name: quote(value, safe="") for name, value in path.items()})
        return OutgoingCall(
            CallTarget(audience, f"{service}.{operation}", route.method, filled, route.kind),
            bearer,
            self.deadline,
            body,
            key,
            outage_retry=OUTAGE_RETRY,
        )

    async def _endpoint(self) -> ModelEndpoint:
        """Return the endpoint for an OpenAI client, with a key that is valid until this call's deadline."""
        bearer = await self._bearer("models:chat", max(MIN_ENDPOINT_SECONDS, self.deadline.remaining()))
        headers = {
            "X-Correlation-ID": self._call.correlation_id,
            "traceparent": self._call.trace.traceparent,
            "X-Timeout-Ms": self.deadline.to_header(),
        }
        if self._call.trace.state:
            headers["tracestate"] = self._call.trace.state
        return ModelEndpoint(self._base.discovery.instances("models")[0] + "/v1", bearer, headers)

    async def _bearer(self, scope: str, lifetime: float | None = None) -> str:
        """Return a token for ``scope``: a cached one for calls of this arm, or a new one valid for ``lifetime``."""
        requested = Scope(scope)
        # Checked before the grant, because this error can name the missing declaration.
        if not any(declared.contains(requested) for declared in self._declared):
            raise OctoError(
                f"{self._call.service}:{self._call.operation} does not declare the call {requested.operation}: write "
                f'calls=["{requested.operation}"] in its Arm, or in its @arm.operation.',
                code="authority_missing",
            )
        audience = service_of(requested.family)
        holder = await self._base.directory.thumbprint(audience)
        authority = self._call.authority
        # A key for the author's own client is handed to other code, so it is never shared with other calls.
        if lifetime is not None:
            return self._delegator.delegate(
                authority, audience, scope, holder, lifetime=lifetime, call=self._call_digest
            )
        if self._tokens is None:
            self._tokens = CallTokens(self._delegator, authority, self._call_digest)
        return self._tokens.bearer(audience, scope, holder)
