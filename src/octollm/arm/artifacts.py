"""The files of a call: those that came with the task, and those that the arm makes."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol
from urllib.parse import quote

import msgspec

from octollm.contracts.kinds import media_type_of
from octollm.contracts.operations import StoredFile, to_artifact
from octollm.contracts.task import MAX_FILE_BYTES, Artifact, FileRef
from octollm.errors import OctoError
from octollm.rpc.caller import OutgoingCall, ServiceClient


class PrepareCall(Protocol):
    """Makes a call ready: authority, key and route."""

    def __call__(self, service: str, operation: str, body: bytes | None, **path: str) -> Awaitable[OutgoingCall]:
        """Return the call. ``path`` parameters become selectors."""
        ...


class Artifacts:
    """Reads the files of a task and writes new ones. The arm declares ``files:read`` and ``files:write``."""

    def __init__(self, caller: ServiceClient, prepare_call: PrepareCall) -> None:
        self._caller = caller
        self._prepare_call = prepare_call
        self._written: dict[str, Artifact] = {}

    async def read(self, file: FileRef | Artifact) -> bytes:
        """Return the bytes of a file: its text, or what is stored under its digest.

        Raises ``file_not_found``, ``file_invalid`` for one with neither, and ``authority_missing`` for a digest that
        is not the task's.
        """
        if isinstance(file, FileRef) and file.text is not None:
            return file.text.encode()
        if file.digest is None:
            raise OctoError(f"The file {file.name} has neither text nor a digest.", code="file_invalid")
        outgoing = await self._prepare_call("files", "read", None, digest=file.digest)
        return (await self._caller.send(outgoing)).body

    async def write(self, name: str, content: bytes | str, media_type: str | None = None) -> Artifact:
        """Store ``content`` under a name, as an artifact of the task; the same bytes are stored once.

        Without ``media_type`` the name's suffix tells. Raises ``body_too_large`` and ``authority_missing``.
        """
        body = content.encode() if isinstance(content, str) else content
        if len(body) > MAX_FILE_BYTES:
            raise OctoError(f"The artifact {name} has more than {MAX_FILE_BYTES} bytes.", code="body_too_large")
        kind = media_type or media_type_of(name)
        outgoing = await self._prepare_call("files", "write", body)
        stored = await self._caller.call(_with_file_headers(outgoing, name, kind), StoredFile)
        self._written[name] = to_artifact(stored)
        return self._written[name]

    def list(self) -> tuple[Artifact, ...]:
        """Return what this call has written, in order; of two with one name the later."""
        return tuple(self._written.values())


def _with_file_headers(outgoing: OutgoingCall, name: str, media_type: str) -> OutgoingCall:
    """Return an upload that names its file: the name travels in a header, percent-encoded (RFC 8187 style)."""
    return msgspec.structs.replace(outgoing, content_type=media_type, headers={"X-File-Name": quote(name)})
