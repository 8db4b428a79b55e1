"""What an operation of an arm works with: calls with narrowed authority, the model, files, and live output."""

from __future__ import annotations

import hashlib
import mimetypes
from typing import TypeVar
from urllib.parse import quote

import msgspec

from octollm.arm.model import Meter, ModelClient
from octollm.capability import Delegator, Scope
from octollm.contracts.operations import StoredFile, artifact_of
from octollm.contracts.services import route_of, service_of
from octollm.contracts.task import MAX_FILE_BYTES, Artifact, FileRef
from octollm.errors import OctoError
from octollm.resilience import Deadline
from octollm.rpc.call import Call
from octollm.rpc.caller import OnLine, Outgoing, Target
from octollm.rpc.idempotency import NestedKeys
from octollm.rpc.service import Base
from octollm.telemetry import Log

T = TypeVar("T")

CALL_SECONDS = 60
"""The life of a token made for one call; it is checked when the call begins."""


class Context:
    """One call of an arm's operation."""

    def __init__(self, base: Base, delegator: Delegator, call: Call) -> None:
        self._base = base
        self._delegator = delegator
        self._call = call
        self._keys = NestedKeys(call.key or call.request_id)
        self.meter = Meter()
        self.model = ModelClient(base.caller, lambda body: self.outgoing("models", "chat", body), self.meter)

    @property
    def deadline(self) -> Deadline:
        """Return the time that is left."""
        return self._call.deadline

    @property
    def task_id(self) -> str:
        """Return the task that the caller's token stands for; empty when it stands for none."""
        task = self._call.authority.task
        return (task.task or "") if task is not None else ""

    @property
    def log(self) -> Log:
        """Return the arm's log; lines carry the ids of this call."""
        return self._base.log

    async def emit(self, text: str, *, reset: bool = False) -> None:
        """Stream text to whoever watches the step; ``reset`` voids what was streamed before."""
        await self._call.emit.token(text, reset=reset)

    async def progress(self, percent: float, message: str = "") -> None:
        """Tell how far the work is, from 0 to 100."""
        await self._call.emit.progress(percent, message)

    def may(self, scope: str) -> bool:
        """Say whether the grant of this call lets the arm call ``scope``."""
        grant = self._call.authority.grant
        return grant is not None and grant.may.below(Scope(scope)) is not None

    async def call(
        self, service: str, operation: str, body: object, answer: type[T], *, on_line: OnLine | None = None
    ) -> T:
        """Call another service's operation with narrowed authority, this call's deadline and trace.

        Raises ``authority_missing`` when the grant does not allow it, and what the callee says.
        """
        encoded = msgspec.json.encode(body)
        outgoing = await self.outgoing(service, operation, encoded)
        return await self._base.caller.answer(outgoing, answer, on_line=on_line)

    async def outgoing(self, service: str, operation: str, body: bytes | None, **path: str) -> Outgoing:
        """Return a call ready to be made: authority, key and route. ``path`` parameters become selectors."""
        route = route_of(service, operation)
        audience = service_of(service)
        scope = ":".join((service, operation, *path.values()))
        key = None
        if route.kind != "safe":
            key = self._keys.next(audience, operation, body or b"")
        bearer = self._delegator.delegate(
            self._call.authority,
            aud=audience,
            scope=scope,
            holder_jkt=await self._base.directory.thumbprint(audience),
            lifetime=CALL_SECONDS,
            call=hashlib.sha256((self._call.key or self._call.request_id).encode()).hexdigest(),
        )
        filled = route.path.format(**{name: quote(value, safe="") for name, value in path.items()})
        return Outgoing(
            Target(audience, f"{service}.{operation}", route.method, filled, route.kind),
            bearer,
            self.deadline,
            body,
            key,
        )

    async def read_file(self, file: FileRef) -> bytes:
        """Return the bytes of a file: its text, or what is stored under its digest.

        Raises ``file_not_found`` and ``authority_missing``.
        """
        if file.text is not None:
            return file.text.encode()
        if file.digest is None:
            raise OctoError(f"The file {file.name} has neither text nor a digest.", code="file_invalid")
        outgoing = await self.outgoing("files", "read", None, digest=file.digest)
        return (await self._base.caller.send(outgoing)).body

    async def write_artifact(self, name: str, body: bytes, media_type: str | None = None) -> Artifact:
        """Store bytes as an artifact of the task; the same bytes are stored once."""
        if len(body) > MAX_FILE_BYTES:
            raise OctoError(f"The artifact {name} has more than {MAX_FILE_BYTES} bytes.", code="body_too_large")
        kind = media_type or mimetypes.guess_type(name)[0] or "application/octet-stream"
        outgoing = await self.outgoing("files", "write", body)
        stored = await self._base.caller.answer(with_file(outgoing, name, kind), StoredFile)
        return artifact_of(stored)


def with_file(outgoing: Outgoing, name: str, media_type: str) -> Outgoing:
    """Return an upload that names its file: the name travels in a header, percent-encoded (RFC 8187 style)."""
    return Outgoing(
        outgoing.target,
        outgoing.bearer,
        outgoing.deadline,
        outgoing.body,
        outgoing.key,
        media_type,
        {"X-File-Name": quote(name)},
    )
