"""Files as a caller may give them, and what is sent of them."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from octollm.client.errors import InvalidRequest, ServerError
from octollm.contracts.media_types import media_type_of
from octollm.contracts.task import MAX_FILE_BYTES, MAX_FILES

FileInput = str | os.PathLike[str] | bytes | tuple[str, bytes] | tuple[str, str]
"""A path (its last part is the name), bytes, or a name with bytes or text (UTF-8). Bytes alone are called `file1`, …
after their place."""


@dataclass(frozen=True, slots=True)
class FileContent:
    """A file that may be sent."""

    name: str
    body: bytes

    @property
    def media_type(self) -> str:
        """Return the type that the name suggests."""
        return media_type_of(self.name)


async def load_files(files: Iterable[FileInput]) -> list[FileContent]:
    """Return what is in ``files``, read in a thread.

    Raises :class:`InvalidRequest` (``file_invalid``) naming the first that cannot be sent, before anything is.
    """
    given = list(files)
    if len(given) > MAX_FILES:
        raise _file_error(f"{len(given)} files are too many: a task may have {MAX_FILES}.")
    return [await asyncio.to_thread(_load, file, place) for place, file in enumerate(given, 1)]


async def load_file(file: FileInput) -> FileContent:
    """Return what is in one file; raises as :func:`load_files`."""
    return (await load_files([file]))[0]


def verify_digest(body: bytes, digest: str) -> bytes:
    """Return ``body`` when it has that SHA-256; raise :class:`ServerError` (``file_invalid``) when it does not."""
    if hashlib.sha256(body).hexdigest() != digest:
        raise ServerError(f"The file {digest[:12]}… did not arrive whole.", code="file_invalid")
    return body


def _load(file: FileInput, place: int) -> FileContent:
    if isinstance(file, bytes):
        name, body = f"file{place}", file
    elif isinstance(file, tuple):
        name, given = file
        body = given.encode() if isinstance(given, str) else given
    else:
        path = Path(file)
        name, body = path.name, _read(path)
    if len(body) > MAX_FILE_BYTES:
        raise _file_error(f"{name} has more than {MAX_FILE_BYTES // 2**20} MiB.")
    return FileContent(name, body)


def _read(path: Path) -> bytes:
    try:
        # One byte more than is allowed tells of a file that is too long, also of one that has no size (a pipe).
        with path.open("rb") as opened:
            return opened.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise _file_error(f"There is no file {path}.") from error
    except OSError as error:
        raise _file_error(f"{path} cannot be read: {error.strerror}.") from error


def _file_error(detail: str) -> InvalidRequest:
    return InvalidRequest(detail, code="file_invalid")
