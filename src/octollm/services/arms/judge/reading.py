"""Reading the files that a result is judged by."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from octollm.contracts.task import FileRef

ReadFile = Callable[[str], Awaitable[bytes]]
"""Read a stored file by its digest."""


async def read_text(file: FileRef, read_file: ReadFile) -> str:
    """Return a file's text: what stands in place, else what is stored. Bytes that are no UTF-8 are marked."""
    if file.text is not None:
        return file.text
    if file.digest is None:
        return ""
    return (await read_file(file.digest)).decode("utf-8-sig", errors="replace")
