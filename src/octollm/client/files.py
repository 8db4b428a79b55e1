"""Files of a request: reading them from paths and bytes, and verifying the digests of downloads."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from octollm.client.errors import InvalidRequest, ServerError, map_encoding_errors
from octollm.contracts.media_types import media_type_of
from octollm.contracts.operations import StoredFile
from octollm.contracts.task import MAX_FILE_BYTES, MAX_FILES

FileInput = str | os.PathLike[str] | bytes | tuple[str, bytes] | tuple[str, str]
"""A path (its last part is the name, see :func:`name_paths`), bytes, or a name with bytes or text (UTF-8).

Bytes without a name are called `file1`, `file2`, … by their position.
"""


@dataclass(frozen=True, slots=True)
class FileContent:
    """A file that is ready to be sent."""

    name: str
    body: bytes

    @property
    def media_type(self) -> str:
        """The media type for the suffix of the name."""
        return media_type_of(self.name)


async def load_files(files: Iterable[FileInput | StoredFile]) -> list[FileContent | StoredFile]:
    """Read ``files`` in a thread; stored ones are returned as they are.

    Raises :class:`InvalidRequest` (``file_invalid``) naming the first that cannot be sent.
    """
    inputs = list(files)
    if len(inputs) > MAX_FILES:
        raise _file_error(f"{len(inputs)} files are too many: a task may have {MAX_FILES}.")
    loaded = [
        file if isinstance(file, StoredFile) else await load_file(file, position)
        for position, file in enumerate(inputs, 1)
    ]
    at = [index for index, file in enumerate(inputs) if isinstance(file, str | os.PathLike)]
    for index, name in zip(at, name_paths([Path(cast("str", inputs[index])) for index in at]), strict=True):
        loaded[index] = replace(cast("FileContent", loaded[index]), name=name)
    return loaded


def name_paths(paths: Sequence[Path]) -> list[str]:
    """Return the name of each file in a task: its own, and that of its folder before it where two are called the same.

    ``v1/offer.txt`` and ``v2/offer.txt`` are ``v1-offer.txt`` and ``v2-offer.txt``.
    """
    counts = Counter(path.name for path in paths)
    return [f"{path.absolute().parent.name}-{path.name}" if counts[path.name] > 1 else path.name for path in paths]


async def load_file(file: FileInput, position: int = 1) -> FileContent:
    """Read one file in a thread; raises as :func:`load_files`."""
    with map_encoding_errors():
        content = await asyncio.to_thread(_load, file, position)
        content.name.encode()
    return content


def verify_digest(body: bytes, digest: str) -> bytes:
    """Return ``body`` if its SHA-256 is ``digest``, else raise :class:`ServerError` (``file_invalid``)."""
    if hashlib.sha256(body).hexdigest() != digest:
        raise ServerError(f"The file {digest[:12]}… did not arrive whole.", code="file_invalid")
    return body


def _load(file: FileInput, position: int) -> FileContent:
    if isinstance(file, bytes):
        name, body = f"file{position}", file
    elif isinstance(file, tuple):
        name, content = file
        body = content.encode() if isinstance(content, str) else content
    else:
        path = Path(file)
        name, body = path.name, _read(path)
    if len(body) > MAX_FILE_BYTES:
        raise _file_error(f"{name} has more than {MAX_FILE_BYTES // 2**20} MiB.")
    return FileContent(name, body)


def _read(path: Path) -> bytes:
    try:
        # Reading one byte past the limit detects a file that is too long, also a pipe, which has no size.
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise _file_error(f"There is no file {path}.") from error
    except OSError as error:
        raise _file_error(f"{path} cannot be read: {error.strerror}.") from error


def _file_error(detail: str) -> InvalidRequest:
    return InvalidRequest(detail, code="file_invalid")
