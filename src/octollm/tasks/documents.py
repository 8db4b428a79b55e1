"""Reading a task's files before it is planned: their texts go to memory, and what was assumed is noted on the files."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

import msgspec

from octollm.contracts.media_types import accepts_file, kind_of_file
from octollm.contracts.operations import DocumentIn, TextLocation
from octollm.contracts.services import BUILT_IN_ARMS
from octollm.contracts.task import ArmInfo, Evidence, ExecuteResult, FileKind, FileRef, Task
from octollm.documents.detection import PLAIN_KINDS, detect_kind
from octollm.documents.model import FlatDocument, flatten
from octollm.documents.reading import name_notes, read_plain
from octollm.errors import OctoError

LoadFile = Callable[[str, str], Awaitable[bytes]]
"""Returns the bytes of a tenant's file by its digest."""
ReadBinary = Callable[[FileRef], Awaitable[FlatDocument]]
"""Reads a file of a binary format, in the sandbox of the executor."""
_FILE_ERRORS = frozenset({"file_unreadable", "file_encrypted", "file_limit_exceeded", "no_sandbox"})
"""Errors that say that a file is not read. Others, such as an outage, end the attempt as they do elsewhere."""


@dataclass(frozen=True, slots=True)
class TaskDocuments:
    """The files of a task with their notes, and the documents for memory."""

    files: tuple[FileRef, ...]
    documents: tuple[DocumentIn, ...]


async def read_task_files(
    contract: Task, tenant: str, arms: Collection[ArmInfo], load: LoadFile, read_binary: ReadBinary
) -> TaskDocuments:
    """Read the files of ``contract`` that are text for a reader, and the encoding of those that are tables.

    A file that an arm of the user's own takes is passed on even if it cannot be read here; that becomes a note.
    Raises ``file_unreadable``, ``file_encrypted``, ``file_limit_exceeded`` or ``no_sandbox`` for another one, with its
    name, and what ``load`` and ``read_binary`` raise.
    """
    own = [arm for arm in arms if arm.name not in BUILT_IN_ARMS]
    files: list[FileRef] = []
    documents: list[DocumentIn] = []
    for file in contract.context.files:
        kind = kind_of_file(file)
        if file.digest is None or kind == "binary":
            files.append(file)
            continue
        try:
            document = await _read_file(file, kind, await load(tenant, file.digest), read_binary)
        except OctoError as error:
            if error.code not in _FILE_ERRORS:
                raise
            taken = contract.assigned_arm is not None and contract.assigned_arm not in BUILT_IN_ARMS
            if not taken and not any(accepts_file(arm.accepts, file.name) for arm in own):
                raise OctoError(f"{file.name}: {error.detail}", code=error.code) from error
            files.append(msgspec.structs.replace(file, notes=(f"not read: {error.detail}",)))
            continue
        files.append(msgspec.structs.replace(file, notes=document.notes))
        if kind == "text":
            locations = tuple(TextLocation(line, label) for line, label in document.locations)
            documents.append(DocumentIn(file.name, document.text, file.digest, locations))
    return TaskDocuments(tuple(files), tuple(documents))


async def _read_file(file: FileRef, kind: FileKind, data: bytes, read_binary: ReadBinary) -> FlatDocument:
    found = await asyncio.to_thread(detect_kind, file.name, data)
    if found in PLAIN_KINDS:
        return flatten(await asyncio.to_thread(read_plain, file.name, data))
    # A workbook is read when it is queried, and says then what was assumed.
    if kind == "table":
        return FlatDocument(file.name, found, "", (), name_notes(file.name, found))
    return await read_binary(file)


def add_notes(result: ExecuteResult, contract: Task) -> ExecuteResult:
    """Return the result with what was assumed when the files of its step were read."""
    notes = tuple(f"{file.name}: {note}" for file in contract.context.files for note in file.notes)
    if not notes:
        return result
    evidence = result.evidence or Evidence(kind="text")
    return msgspec.structs.replace(result, evidence=msgspec.structs.replace(evidence, notes=(*evidence.notes, *notes)))
