"""The runner: turns a request into a sandbox job within limits, and bounds concurrency and queue.

A job is a Python program, or one SQL query over data files.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import msgspec

from octollm import FileRef, OctoError
from octollm.contracts.operations import RunLimits, RunRequest, RunResult
from octollm.documents.detection import detect_kind
from octollm.documents.model import Document, DocumentError, RawTable, encode_cells, flatten
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy, OnQueued
from octollm.lru import LruCache
from octollm.services.arms.executor.reader import document_sources, read_in_sandbox, to_utf8
from octollm.services.arms.executor.sandbox import MAX_LIMITS, MIB, Job, Limits, Sandbox, SandboxResult, check_names

DESCRIBE = "--describe"
"""In place of a query: print the schemas of the tables."""
MAX_ROWS = 1000
MAX_QUERY = 20_000
"""Characters of a query."""

_TABLE_FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
_ROWS_FILE_BYTES = 64 * MIB
"""The rows of one table, as text, which the runner of queries writes before it loads them."""
_OUTPUT_SHARE = 0.6
"""Share of ``output_bytes`` for rows. Rows are counted in characters; the rest is room for multi-byte ones."""


@dataclass(frozen=True, slots=True)
class DataTable:
    """A data file and the table that it is loaded into."""

    file: str
    table: str
    kind: str
    sheet: RawTable | None = None


_FOUND_KINDS = ("csv", "tsv", "json", "jsonl", "parquet")
_SPREADSHEET_KINDS = ("xlsx", "xls", "ods")
_ARCHIVE_SIGNATURES = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
"""The first bytes of the formats of spreadsheets, and of others."""
MAX_CACHED_DOCUMENTS = 8
MAX_CACHED_CELLS = 2_000_000


def is_spreadsheet(name: str, data: bytes) -> bool:
    """Return whether a file is a spreadsheet by its content, whatever its name. Raises :class:`DocumentError`."""
    return data.startswith(_ARCHIVE_SIGNATURES) and detect_kind(name, data) in _SPREADSHEET_KINDS


def _count_cells(document: Document) -> int:
    return sum(len(row) for table in document.tables for row in table.rows)


def is_tabular(name: str) -> bool:
    """Return whether the extension of a file name is that of a table."""
    return PurePosixPath(name).suffix.lower() in _TABLE_FORMATS


def is_text_table(name: str) -> bool:
    """Return whether the extension of a file name is that of a table in text."""
    return is_tabular(name) and not name.lower().endswith(".parquet")


Sheets = Mapping[str, Sequence[RawTable]]
"""The tables of spreadsheets, by the name of their file."""


def find_kinds(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the formats of the files whose name is not that of a table, but whose content is, such as text as .xls."""
    kinds: dict[str, str] = {}
    for name, data in files.items():
        if not is_tabular(name):
            with contextlib.suppress(DocumentError):
                kinds[name] = detect_kind(name, data)
    return {name: "json" if kind == "jsonl" else kind for name, kind in kinds.items() if kind in _FOUND_KINDS}


def derive_tables(
    names: Iterable[str], sheets: Sheets | None = None, kinds: Mapping[str, str] | None = None
) -> tuple[DataTable, ...]:
    """Return the tables for files of these names, in the same order; files that are not tabular are skipped.

    ``kinds`` are the formats of files whose name does not tell it.

    A table is named after its file's stem, in lower case, with ``_`` for other characters than letters and digits. Of
    several sheets in a file, each also has the name of its sheet. A second table of a name gets the suffix ``_2``.
    """
    tables: list[DataTable] = []
    used_names: set[str] = set()

    def add(file: str, words: str, kind: str, sheet: RawTable | None = None) -> None:
        stem = re.sub(r"\W+", "_", words.lower()).strip("_") or "data"
        if stem[0].isdigit():
            stem = "t_" + stem
        table, number = stem, 1
        while table in used_names:
            number += 1
            table = f"{stem}_{number}"
        used_names.add(table)
        tables.append(DataTable(file, table, kind, sheet))

    for name in names:
        path = PurePosixPath(name)
        found = [sheet for sheet in (sheets or {}).get(name, ()) if sheet.rows]
        for sheet in found:
            if len(found) == 1:
                add(name, path.stem, "cells", sheet)
            else:
                add(f"{name}, sheet {sheet.name}", f"{path.stem}_{sheet.name}", "cells", sheet)
        kind = _TABLE_FORMATS.get(path.suffix.lower()) or (kinds or {}).get(name)
        if kind is not None and not found:
            add(name, path.stem, kind)
    return tuple(tables)


def build_sql_job(query: str, files: Mapping[str, bytes], limits: Limits, sheets: Sheets | None = None) -> Job:
    """Return the job that answers ``query`` (or :data:`DESCRIBE`) over the tabular files among ``files``.

    ``sheets`` are the tables of the spreadsheets among them.

    It prints one JSON object: ``columns``, ``types``, ``rows`` (at most 1000), ``row_count``, ``truncated``; for a
    description ``tables``, ``faults`` and ``text``, which is made for a prompt. Both have ``assumptions``, those of the
    tables and columns in use. A wrong query exits with status 1 and DuckDB's message on standard error. Raises
    ``OctoError`` (``invalid_body``) for an empty or too long query.
    """
    if not query.strip() or len(query) > MAX_QUERY:
        raise OctoError(f"a query has from 1 to {MAX_QUERY} characters", code="invalid_body")
    tables = derive_tables(files, sheets, find_kinds(files))
    # Numbered names, so that no file of the request can overwrite the runner or its input.
    paths = {
        table.table: f"data/{number}" + (".cells" if table.sheet else PurePosixPath(table.file).suffix.lower())
        for number, table in enumerate(tables)
    }
    request = {
        "mode": "describe" if query == DESCRIBE else "query",
        "query": query,
        "tables": [{"table": t.table, "file": t.file, "kind": t.kind, "path": paths[t.table]} for t in tables],
        "memory_bytes": limits.memory_bytes,
        "max_rows": MAX_ROWS,
        "max_bytes": int(limits.output_bytes * _OUTPUT_SHARE),
    }
    runner = Path(__file__).with_name("runner_sql.py").read_bytes()
    return Job(
        command=("runner_sql.py",),
        files={
            "runner_sql.py": runner,
            **document_sources(),
            "request.json": json.dumps(request).encode(),
            **{paths[t.table]: encode_cells(t.sheet) if t.sheet else files[t.file] for t in tables},
        },
        limits=replace(limits, file_bytes=max(limits.file_bytes, _ROWS_FILE_BYTES)),
        packages=("duckdb",),
    )


MAX_ARGUMENTS = 64
MAX_ARGUMENT_BYTES = 64 * 1024
"""Bytes of one argument; Linux allows 128 KiB (MAX_ARG_STRLEN)."""

_SQL_MEMORY = 1024 * MIB
MAX_QUEUE_SECONDS = 300.0
"""The call's own deadline usually ends the wait before."""


class Runner:
    """Runs requests in ``sandbox``: at most ``concurrency`` at once, at most ``max_waiting`` waiting.

    ``on_queued`` is the metrics hook of its concurrency limiter.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        concurrency: int = 2,
        max_waiting: int = 16,
        defaults: Limits | None = None,
        maxima: Limits = MAX_LIMITS,
        on_queued: OnQueued | None = None,
    ) -> None:
        self._sandbox = sandbox
        self._defaults = defaults or Limits()
        self._maxima = maxima
        self._documents = LruCache[tuple[str, bytes], Document](
            MAX_CACHED_DOCUMENTS, max_weight=MAX_CACHED_CELLS, weigh=_count_cells
        )
        self._limiter = ConcurrencyLimiter(
            "The sandbox", ConcurrencyPolicy(concurrency, max_waiting, MAX_QUEUE_SECONDS), on_queued=on_queued
        )

    @property
    def sandbox(self) -> str:
        """Return the name of the sandbox in use."""
        return self._sandbox.name

    @property
    def active(self) -> int:
        """Return the number of runs, including those that wait."""
        return self._limiter.running + self._limiter.queued

    async def run(self, request: RunRequest, files: Mapping[str, bytes]) -> RunResult:
        """Run ``request`` over ``files``, the bytes of its files by name.

        Raises ``OctoError``: ``invalid_body`` or ``file_invalid`` for what cannot be run, ``overloaded`` when too
        many wait, ``no_sandbox`` for SQL or a binary format where the sandbox has no packages, ``sandbox_failed``, and
        for ``read`` what is wrong with the file.
        """
        if request.language == "read":
            return await self._read(files)
        # Validated before waiting, so that an invalid request takes no slot.
        sheets: Sheets = await self._read_sheets(files) if request.language == "sql" else {}
        if request.language == "sql":
            files = {
                name: await asyncio.to_thread(to_utf8, data) if is_text_table(name) and name not in sheets else data
                for name, data in files.items()
            }
        job = self._job(request, files, sheets)
        async with self._limiter:
            outcome = await self._sandbox.run(job)
        return _to_run_result(outcome, self._sandbox.name, with_files=request.language == "python")

    async def _read_sheets(self, files: Mapping[str, bytes]) -> Sheets:
        """Return the tables of the spreadsheets among ``files``; a task reads the same ones for each of its queries."""
        check_names(files)
        sheets: dict[str, tuple[RawTable, ...]] = {}
        for name, data in files.items():
            if not is_spreadsheet(name, data):
                continue
            key = (PurePosixPath(name).suffix, hashlib.sha256(data).digest())
            document = self._documents.get(key)
            if document is None:
                async with self._limiter:
                    document = await read_in_sandbox(self._sandbox, name, data, tables=True)
                self._documents.put(key, document)
            sheets[name] = document.tables
        return sheets

    async def _read(self, files: Mapping[str, bytes]) -> RunResult:
        check_names(files)
        if len(files) != 1:
            raise OctoError("a run that reads takes one file", code="invalid_body")
        [(name, data)] = files.items()
        async with self._limiter:
            document = await read_in_sandbox(self._sandbox, name, data)
        text = msgspec.json.encode(flatten(document)).decode()
        return RunResult(exit_code=0, stdout=text, stderr="", sandbox=self._sandbox.name)

    def _job(self, request: RunRequest, files: Mapping[str, bytes], sheets: Sheets) -> Job:
        check_names(files)
        if request.language == "sql":
            if len(request.command) != 1:
                raise OctoError("the command of an SQL run is one query", code="invalid_body")
            limits = resolve_limits(request.limits, self._defaults, self._maxima, memory=_SQL_MEMORY)
            return build_sql_job(request.command[0], files, limits, sheets)
        if not request.command or len(request.command) > MAX_ARGUMENTS:
            raise OctoError(
                f"the command of a Python run has from 1 to {MAX_ARGUMENTS} arguments, e.g. ['main.py']",
                code="invalid_body",
            )
        for argument in request.command:
            if "\0" in argument or len(argument.encode("utf-8", "replace")) > MAX_ARGUMENT_BYTES:
                raise OctoError(f"an argument has no NUL and at most {MAX_ARGUMENT_BYTES} bytes", code="invalid_body")
        return Job(request.command, dict(files), resolve_limits(request.limits, self._defaults, self._maxima))


def resolve_limits(requested: RunLimits, defaults: Limits, maxima: Limits, *, memory: int | None = None) -> Limits:
    """Return the limits of a run: those requested, or the defaults, capped at the maxima.

    ``memory`` replaces the default of memory. CPU time is twice the wall time, to allow for threads.
    Raises ``OctoError`` (``invalid_body``) for a limit that is not positive.
    """
    wall = defaults.wall_seconds if requested.wall_seconds is None else requested.wall_seconds
    space = (memory or defaults.memory_bytes) if requested.memory_bytes is None else requested.memory_bytes
    output = defaults.output_bytes if requested.output_bytes is None else requested.output_bytes
    if not (math.isfinite(wall) and wall > 0 and space > 0 and output > 0):
        raise OctoError("limits are positive numbers", code="invalid_body")
    wall = min(wall, maxima.wall_seconds)
    limits = Limits(
        wall_seconds=wall,
        cpu_seconds=max(1, math.ceil(2 * wall)),
        memory_bytes=space,
        output_bytes=output,
        file_bytes=defaults.file_bytes,
        disk_bytes=defaults.disk_bytes,
        disk_entries=defaults.disk_entries,
        open_files=defaults.open_files,
        result_files=defaults.result_files,
        result_file_bytes=defaults.result_file_bytes,
    )
    return limits.clamp(maxima)


def _to_run_result(outcome: SandboxResult, sandbox: str, *, with_files: bool) -> RunResult:
    files = outcome.files if with_files else ()
    return RunResult(
        exit_code=outcome.exit_code,
        stdout=outcome.stdout,
        stderr=outcome.stderr,
        files=tuple(FileRef(name=file.name, text=file.text) for file in files),
        reason=outcome.reason,
        sandbox=sandbox,
        duration_ms=outcome.duration_ms,
    )
