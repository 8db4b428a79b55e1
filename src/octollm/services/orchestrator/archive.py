"""The archive: a folder or an S3-compatible service that takes what retention deletes, and the archived audit log.

obstore is an optional dependency, so it is imported when an archive is opened.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from octollm.contracts.observability import AuditCut, AuditHead, AuditRow, AuditTrailer, decode_audit_line
from octollm.errors import OctoError, SettingError

StoreObject = Callable[[str, bytes], Awaitable[None]]
"""Stores an object in the archive. Storing it twice under one name is harmless."""
_AUDIT_OBJECT = re.compile(r"(\d{19})-(\d{19})\.jsonl")


@dataclass(frozen=True, slots=True)
class Archive:
    """Objects by name. Every operation raises ``unavailable`` when the archive cannot be used."""

    _store: Any
    _obstore: Any

    async def store(self, name: str, body: bytes) -> None:
        """Store an object."""
        await self._run(f"The archive did not store {name}", self._obstore.put, self._store, name, body)

    async def list_names(self, prefix: str) -> list[str]:
        """Return the names of the objects in a folder, sorted."""

        def read() -> list[str]:
            return sorted(str(each["path"]) for page in self._obstore.list(self._store, prefix) for each in page)

        return await self._run(f"The archive did not list {prefix}", read)

    async def read(self, name: str) -> bytes:
        """Return an object."""
        return await self._run(
            f"The archive did not return {name}", lambda: bytes(self._obstore.get(self._store, name).bytes())
        )

    async def _run(self, failure: str, operation: Callable[..., Any], *arguments: object) -> Any:
        try:
            # In a thread: the asynchronous functions of obstore 0.12 abort the interpreter when it exits.
            return await asyncio.to_thread(operation, *arguments)
        except (self._obstore.exceptions.BaseError, OSError) as error:
            # Only the type: the text may have the URL with what it signs.
            raise OctoError(f"{failure} ({type(error).__name__}).", code="unavailable") from error


def open_archive(url: str) -> Archive:
    """Open the archive at ``file:///folder`` or ``s3://bucket/prefix``.

    S3 and compatible services are configured by the ``AWS_…`` variables, such as ``AWS_ENDPOINT_URL``. Raises
    :class:`SettingError` for a URL that is not understood, and without the package that is needed.
    """
    try:
        import obstore  # noqa: PLC0415
        from obstore.store import from_url  # noqa: PLC0415
    except ImportError as error:
        raise SettingError("OCTOLLM_ARCHIVE_URL needs obstore; install it: pip install 'octollm[archive]'") from error
    options: dict[str, Any] = {"mkdir": True} if url.startswith("file:") else {}
    try:
        store: Any = from_url(url, **options)
    except (obstore.exceptions.BaseError, ValueError, OSError) as error:
        detail = f"OCTOLLM_ARCHIVE_URL, which is file:///folder or s3://bucket/prefix, cannot be opened: {error}"
        raise SettingError(detail) from error
    return Archive(store, obstore)


def audit_object(tenant: str, cut: AuditHead | None, rows: Iterable[AuditRow], head: AuditHead) -> tuple[str, bytes]:
    """Return the name and the body of archived audit rows: an export, from the cut before it to a signed head."""
    lines = [AuditCut(cut)] if cut is not None else []
    body = b"".join(msgspec.json.encode(line) + b"\n" for line in (*lines, *rows, AuditTrailer(head)))
    first = 1 if cut is None else cut.seq + 1
    return f"audit/{tenant}/{first:019d}-{head.seq:019d}.jsonl", body


async def read_archived_audit(archive: Archive, tenant: str, through: int) -> AsyncIterator[AuditRow]:
    """Yield a tenant's archived audit rows up to ``through``. Raises ``file_invalid`` for an object that is no export.

    Of objects with the same first row only the longest is read: retention died between storing and deleting.
    """
    longest: dict[int, str] = {}
    # Sorted, so that of one first row the last one is the longest.
    for name in await archive.list_names(f"audit/{tenant}"):
        if found := _AUDIT_OBJECT.fullmatch(name.rpartition("/")[2]):
            longest[int(found[1])] = name
    for first, name in sorted(longest.items()):
        if first > through:
            return
        for number, line in enumerate((await archive.read(name)).splitlines(), 1):
            row = decode_audit_line(line, f"{name}, line {number},")
            if isinstance(row, AuditRow) and row.seq <= through:
                yield row
