"""One SQL query over data files: which file becomes which table, and the job that asks DuckDB inside the sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from octollm.errors import OctoError
from octollm.services.arms.executor.sandbox import Job, Limits

DESCRIBE = "--describe"
"""In place of a query: print what the tables hold."""
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
_OUTPUT_SHARE = 0.6
"""The part of the output's bound that rows may take, counted in characters of which few take more than one byte."""


@dataclass(frozen=True, slots=True)
class DataTable:
    """A data file and the table that it becomes."""

    file: str
    table: str
    kind: str


def is_tabular(name: str) -> bool:
    """Say whether a file of that name can be a table."""
    return PurePosixPath(name).suffix.lower() in _TABLE_FORMATS


def derive_tables(names: Iterable[str]) -> tuple[DataTable, ...]:
    """Return the tables that files of these names become, in their order.

    A table is called like its file's stem, in lower case, with ``_`` for all that is no letter, digit or ``_``; a
    second one of a name gets ``_2``. Files that are not tabular are left out.
    """
    tables: list[DataTable] = []
    taken: set[str] = set()
    for name in names:
        path = PurePosixPath(name)
        kind = _TABLE_FORMATS.get(path.suffix.lower())
        if kind is None:
            continue
        stem = re.sub(r"\W+", "_", path.stem.lower()).strip("_") or "data"
        if stem[0].isdigit():
            stem = "t_" + stem
        table, number = stem, 1
        while table in taken:
            number += 1
            table = f"{stem}_{number}"
        taken.add(table)
        tables.append(DataTable(name, table, kind))
    return tuple(tables)


def build_sql_job(query: str, files: Mapping[str, bytes], limits: Limits) -> Job:
    """Return the job that answers ``query`` (or :data:`DESCRIBE`) over the tabular ones of ``files``.

    It prints one JSON object: ``columns``, ``types``, ``rows`` (at most 1000), ``row_count``, ``truncated``; or for
    a description ``tables``, ``faults`` and ``text``, lines fit for a prompt. A query that is wrong ends with exit
    code 1 and DuckDB's words on standard error. Raises ``OctoError`` (``invalid_body``) for a query that is empty or
    too long.
    """
    if not query.strip() or len(query) > MAX_QUERY:
        raise OctoError(f"a query has from 1 to {MAX_QUERY} characters", code="invalid_body")
    tables = derive_tables(files)
    placed = {
        table.file: f"data/{number}{PurePosixPath(table.file).suffix.lower()}" for number, table in enumerate(tables)
    }
    request = {
        "mode": "describe" if query == DESCRIBE else "query",
        "query": query,
        "tables": [{"table": t.table, "file": t.file, "kind": t.kind, "path": placed[t.file]} for t in tables],
        "memory_bytes": limits.memory_bytes,
        "max_rows": MAX_ROWS,
        "max_bytes": int(limits.output_bytes * _OUTPUT_SHARE),
    }
    runner = Path(__file__).with_name("runner_sql.py").read_bytes()
    return Job(
        command=("runner_sql.py",),
        files={
            "runner_sql.py": runner,
            "request.json": json.dumps(request).encode(),
            **{placed[t.file]: files[t.file] for t in tables},
        },
        limits=limits,
        needs_duckdb=True,
    )
