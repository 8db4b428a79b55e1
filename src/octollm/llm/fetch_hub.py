"""A model from its publisher's hub: one HTTPS download that goes on where it was cut off (RFC 9110 section 14)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

from pyqwest import Client, HTTPTransport, ReadError, RemoteProtocolError, Response, TooManyRedirects, WriteError

from octollm.llm.catalogue import ModelEntry
from octollm.llm.fetch_options import (
    FetchOptions,
    Progress,
    SourceError,
    check_digest,
    file_size,
    remove_files,
    require_space,
)

HUB = "model hub"
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_FLUSH_BYTES = 1024 * 1024
_MAX_RESUMES = 5
"""How often a download that moves on may be cut off."""


async def fetch_from_hub(entry: ModelEntry, folder: Path, progress: Progress, options: FetchOptions) -> Path:
    """Download the model into ``folder`` and return the checked file. Raises :class:`SourceError` and ``OSError``."""
    target = folder / "hub.partial"
    url = f"{options.hub_url.rstrip('/')}/{entry.hub.path()}"
    have = file_size(target)
    if have > entry.size:
        remove_files(target)
        have = 0
    require_space(folder, entry.size - have, options)
    async with HTTPTransport(
        connect_timeout=options.connect_seconds,
        read_timeout=options.idle_seconds,
        tls_include_system_certs=True,
        enable_gzip=False,
        enable_brotli=False,
        enable_zstd=False,
        follow_redirects=True,
        enable_otel=False,
    ) as transport:
        for _ in range(_MAX_RESUMES):
            before = file_size(target)
            if before == entry.size:
                break
            try:
                await _download(Client(transport), url, entry, target, progress)
            except (ConnectionError, TimeoutError, ReadError, WriteError, RemoteProtocolError, TooManyRedirects) as exc:
                if file_size(target) <= before:
                    raise SourceError(f"{options.hub_url} did not answer ({_describe_error(exc)})") from exc
    if file_size(target) < entry.size:
        raise SourceError(f"{options.hub_url} broke off {_MAX_RESUMES} times; the part that came is kept")
    await check_digest(target, entry)
    return target


async def _download(client: Client, url: str, entry: ModelEntry, target: Path, progress: Progress) -> None:
    """Fetch what is missing of ``target``."""
    offset = file_size(target)
    headers = {"accept-encoding": "identity"}
    if offset:
        headers["range"] = f"bytes={offset}-"
    async with client.stream("GET", url, headers) as response:
        if response.status == 416:
            remove_files(target)
            raise SourceError("it refused to go on with a download that was cut off; the next try starts afresh")
        if response.status not in (200, 206):
            raise SourceError(f"it answered HTTP {response.status}")
        if response.status == 200 or not _is_continuation(response, offset):
            offset = 0
        await _append(response.content, target, offset, entry, progress)


def _is_continuation(response: Response, offset: int) -> bool:
    """Tell whether a 206 starts where the file ends; raise :class:`SourceError` when it starts elsewhere."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if match is None or int(match[1]) != offset:
        raise SourceError("it answered with another range of bytes than was asked for")
    return True


async def _append(
    content: AsyncIterator[bytes | memoryview | bytearray],
    target: Path,
    offset: int,
    entry: ModelEntry,
    progress: Progress,
) -> None:
    done = offset
    with target.open("r+b" if file_size(target) else "wb") as file:
        file.truncate(offset)
        file.seek(offset)
        pending = bytearray()
        try:
            async for chunk in content:
                pending += chunk
                if done + len(pending) > entry.size:
                    raise SourceError(f"it sends more than the {entry.size:,} bytes of {entry.name}")
                if len(pending) >= _FLUSH_BYTES:
                    await asyncio.to_thread(file.write, bytes(pending))
                    done += len(pending)
                    pending.clear()
                    progress(done, entry.size, HUB)
        finally:
            file.write(pending)  # what came is kept also when the rest does not come
        progress(done + len(pending), entry.size, HUB)


def _describe_error(exc: Exception) -> str:
    return "timed out" if isinstance(exc, TimeoutError) else type(exc).__name__
