"""Content-addressed files per tenant: inputs of tasks and artifacts of arms."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from sqlalchemy import select
from starlette.responses import Response

from octollm.clock import Clock
from octollm.contracts import public_api
from octollm.contracts.operations import StoredFile
from octollm.contracts.task import Artifact
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation, implement
from octollm.storage import Database
from octollm.storage.tables import files, task_files, tasks
from octollm.tasks.family import UPLOAD_ROLE

MAX_NAME_LENGTH = 200
MAX_MEDIA_TYPE_LENGTH = 100
MAX_TEXTS_BYTES = 128 * 1024
"""Bytes of artifacts that go to the judge with its request, in all."""


class FileStore:
    """Stores and reads files of all tenants, by SHA-256 digest."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def put(
        self, tenant: str, name: str, media_type: str, body: bytes, *, task_id: str | None = None
    ) -> StoredFile:
        """Store bytes, once per tenant and digest. Raises ``file_invalid`` for an invalid name.

        ``task_id`` is the task for which an arm stores them: it may hand them to a sub-task.
        """
        validate_file_name(name)
        digest = hashlib.sha256(body).hexdigest()
        async with self._db.transaction() as tx:
            await tx.execute(
                tx.insert(files)
                .values(
                    tenant=tenant,
                    digest=digest,
                    name=name,
                    size=len(body),
                    media_type=media_type,
                    body=body,
                    created_at=self._clock.now(),
                )
                # The digest names the bytes, so there is nothing to replace; the first name and media type stay. Only
                # its age begins anew, or retention could delete a file that was just uploaded again.
                .on_conflict_do_update(
                    index_elements=[files.c.tenant, files.c.digest], set_={"created_at": self._clock.now()}
                )
            )
            if task_id is not None and await tx.first(select(tasks.c.task_id).where(tasks.c.task_id == task_id)):
                row = {"task_id": task_id, "role": UPLOAD_ROLE, "name": digest, "digest": digest}
                await tx.execute(
                    tx.insert(task_files).values(**row, created_at=self._clock.now()).on_conflict_do_nothing()
                )
        return StoredFile(name, digest, len(body), media_type)

    async def put_texts(self, tenant: str, artifacts: Sequence[Artifact], texts: Mapping[str, str]) -> None:
        """Store the artifacts whose texts are given by digest. Raises ``file_invalid`` for an invalid name."""
        for artifact in artifacts:
            text = texts.get(artifact.digest)
            if text is not None:
                await self.put(tenant, artifact.name, artifact.media_type[:MAX_MEDIA_TYPE_LENGTH], text.encode())

    async def get(self, tenant: str, digest: str) -> tuple[StoredFile, bytes]:
        """Return a file and its bytes; raise ``file_not_found``, also for another tenant's file."""
        async with self._db.read() as conn:
            row = await conn.first(select(files).where(files.c.tenant == tenant, files.c.digest == digest))
        if row is None:
            raise OctoError("There is no file with that digest.", code="file_not_found")
        return StoredFile(row["name"], row["digest"], row["size"], row["media_type"]), row["body"]

    async def small_texts(self, tenant: str, artifacts: Sequence[Artifact]) -> dict[str, str]:
        """Return the texts of artifacts by digest, up to :data:`MAX_TEXTS_BYTES` in all, the first ones first.

        Left out are those that do not fit, are not stored or are not UTF-8.
        """
        room, digests = MAX_TEXTS_BYTES, list[str]()
        for artifact in artifacts:
            if artifact.size <= room and artifact.digest not in digests:
                digests.append(artifact.digest)
                room -= artifact.size
        if not digests:
            return {}
        async with self._db.read() as conn:
            query = select(files.c.digest, files.c.body).where(
                # An arm says the size of its artifacts; the stored one counts.
                files.c.tenant == tenant,
                files.c.digest.in_(digests),
                files.c.size <= MAX_TEXTS_BYTES,
            )
            rows = await conn.all(query)
        bodies = {str(row["digest"]): bytes(row["body"]) for row in rows}
        texts: dict[str, str] = {}
        room = MAX_TEXTS_BYTES
        for digest in digests:
            body = bodies.get(digest)
            if body is not None and len(body) <= room:
                with contextlib.suppress(UnicodeDecodeError):
                    texts[digest] = body.decode()
                    room -= len(body)
        return texts

    async def find_missing(self, tenant: str, digests: list[str]) -> set[str]:
        """Return the digests that are not stored."""
        async with self._db.read() as conn:
            query = select(files.c.digest).where(files.c.tenant == tenant, files.c.digest.in_(digests))
            existing = {row["digest"] for row in await conn.all(query)}
        return set(digests) - existing


def validate_file_name(name: str) -> None:
    """Raise ``file_invalid`` unless ``name`` is 1 to 200 printable characters without a folder."""
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable() or name in (".", "..") or set(name) & {"/", "\\"}:
        raise OctoError("A file's name must be 1 to 200 printable characters without slashes.", code="file_invalid")


def build_file_response(file: StoredFile, body: bytes) -> Response:
    """Return the response for a file, with its digest as ETag."""
    # Stored bytes are untrusted: browsers must save them, never render them in this origin.
    headers = {
        "ETag": f'"{file.digest}"',
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": "attachment",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(body, media_type=file.media_type, headers=headers)


def file_operations(store: FileStore) -> list[Operation]:
    """Return ``POST /files`` and ``GET /files/{digest}``."""

    async def put(call: IncomingCall, body: bytes) -> StoredFile:
        name = unquote(call.request.headers.get("x-file-name", ""))
        media_type = call.request.headers.get("content-type", "application/octet-stream")[:MAX_MEDIA_TYPE_LENGTH]
        work = call.authority.task
        return await store.put(call.tenant, name, media_type, body, task_id=None if work is None else work.task)

    async def get(call: IncomingCall, _body: object) -> Response:
        file, body = await store.get(call.tenant, call.path["digest"])
        return build_file_response(file, body)

    return [
        implement(public_api.STORE_FILE, put),
        implement(public_api.READ_FILE, get),
    ]
