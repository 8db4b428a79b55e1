"""The program that answers one SQL query over data files; it runs inside the sandbox.

It is sent to the sandbox as text, so it imports only the standard library and DuckDB. It reads ``request.json`` in its
folder: ``mode`` (``query`` or ``describe``), ``query``, ``tables`` (each ``table``, ``file``, ``kind``),
``memory_bytes``, ``max_rows`` and ``max_bytes``. It prints one JSON object. Errors in the query or the data go to
standard error, with exit code 1.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb

THREADS = 2
_READ_ONLY = {"SELECT", "EXPLAIN", "MULTI"}
"""DuckDB reports PIVOT as MULTI, because it runs it as several statements."""
_MAX_COLUMNS = 60
"""Columns of a table in a description."""
_FEW_VALUES = 12
_MAX_CELL = 80
"""Characters of a value in a description."""
_ENCODINGS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"))
_DELIMITERS = ",;\t|"


class RefusedError(Exception):
    """The query or a file cannot be used; the text says why."""


def quoted(name: str) -> str:
    """Return ``name`` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return ``text`` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def as_utf8(path: Path) -> None:
    """Rewrite a text file as UTF-8: by its byte order mark, else as Windows-1252 when it is not UTF-8 already."""
    data = path.read_bytes()
    encoding = next((name for mark, name in _ENCODINGS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        encoding = "cp1252"
        text = data.decode(encoding, "replace")
    if not text.strip():
        raise RefusedError("the file is empty")
    if encoding != "utf-8":
        path.write_text(text, "utf-8", newline="")


def load(connection: duckdb.DuckDBPyConnection, table: str, path: Path, kind: str) -> None:
    """Load one file into a table. Types are inferred from the whole file."""
    if kind == "parquet":
        source = f"read_parquet({literal(str(path))})"
    else:
        as_utf8(path)
        if kind == "json":
            source = f"read_json({literal(str(path))}, sample_size=-1, maximum_object_size=134217728)"
        else:
            source = f"read_csv({literal(str(path))}, {_csv_options(connection, path, kind)})"
    connection.execute(f"CREATE TABLE {quoted(table)} AS SELECT * FROM {source}")  # noqa: S608


def _csv_options(connection: duckdb.DuckDBPyConnection, path: Path, kind: str) -> str:
    """Return the options of ``read_csv``; a table of uneven lines is read leniently rather than as one column."""
    options = "sample_size=-1" + (", delim='\t'" if kind == "tsv" else "")
    try:
        found = connection.execute(f"FROM sniff_csv({literal(str(path))}, {options})").fetchone()
        columns: list[Any] = found[7] if found else []
        if len(columns) != 1 or not any(mark in columns[0]["name"] for mark in _DELIMITERS):
            return options
    except duckdb.Error:
        pass  # the sniffer gave up: decide here
    with path.open(encoding="utf-8", newline="") as file:
        first = file.readline(65536)
    mark = max(_DELIMITERS, key=first.count)
    return f"sample_size=-1, delim={literal(mark)}, header=true, null_padding=true, strict_mode=false"


def plain(value: Any) -> Any:
    """Return a cell as a JSON value; dates as ISO 8601, bytes as hexadecimal digits."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        whole = value.is_finite() and value == value.to_integral_value()
        return int(value) if whole else float(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return str(value)


def check(query: str) -> str:
    """Return the single, read-only statement of ``query``. Raises ``RefusedError`` for any other query."""
    statements = duckdb.extract_statements(query)
    if len(statements) != 1:
        raise RefusedError(f"exactly one SQL statement is wanted, not {len(statements)}")
    kind = statements[0].type.name
    if kind not in _READ_ONLY:
        raise RefusedError(f"only queries that read are allowed (SELECT, WITH, FROM …), not {kind}")
    return statements[0].query


def answer(connection: duckdb.DuckDBPyConnection, query: str, max_rows: int, max_bytes: int) -> dict[str, Any]:
    """Run the query and return columns, types, and as many rows as fit."""
    statement = check(query)
    cursor = connection.execute(statement)
    described = cursor.description or []
    columns = [str(column[0]) for column in described]
    types = [str(column[1]) for column in described]
    rows: list[list[Any]] = []
    size = count = 0
    room = True
    while batch := cursor.fetchmany(1000):
        for row in batch if room else ():
            cells = [plain(cell) for cell in row]
            size += len(json.dumps(cells)) + 2
            room = len(rows) < max_rows and size <= max_bytes
            if not room:
                break
            rows.append(cells)
        # Rows beyond the limits are counted too, so that the caller learns the total.
        count += len(batch)
    return {"columns": columns, "types": types, "rows": rows, "row_count": count, "truncated": count > len(rows)}


def describe(connection: duckdb.DuckDBPyConnection, table: str, file: str) -> dict[str, Any]:
    """Return a table's columns with their types and ranges, its row count and three of its rows."""
    name = quoted(table)
    shown = connection.execute(f"SELECT * FROM {name} LIMIT 3")  # noqa: S608
    described = [(str(column[0]), str(column[1])) for column in shown.description or []]
    sample = [[_short(plain(cell)) for cell in row[:_MAX_COLUMNS]] for row in shown.fetchall()]
    (count,) = connection.execute(f"SELECT count(*) FROM {name}").fetchone() or (0,)  # noqa: S608
    columns = [{"name": c, "type": t, **_range(connection, name, c, t)} for c, t in described[:_MAX_COLUMNS]]
    return {"table": table, "file": file, "row_count": count, "columns": columns, "sample": sample}


def _range(connection: duckdb.DuckDBPyConnection, table: str, column: str, kind: str) -> dict[str, Any]:
    if kind.startswith(("STRUCT", "MAP", "BLOB", "JSON")) or kind.endswith("]"):
        return {}
    name = quoted(column)
    if kind == "VARCHAR":
        few = connection.execute(
            f"SELECT DISTINCT {name} AS v FROM {table} WHERE v IS NOT NULL ORDER BY v LIMIT {_FEW_VALUES + 1}"  # noqa: S608
        ).fetchall()
        if len(few) > _FEW_VALUES:
            return {}
        return {"values": [_short(value) for (value,) in few]}
    low, high = connection.execute(f"SELECT min({name}), max({name}) FROM {table}").fetchone() or (None, None)  # noqa: S608
    return {} if low is None else {"min": plain(low), "max": plain(high)}


def _short(value: Any) -> Any:
    text = value if isinstance(value, str) else json.dumps(value)
    return value if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "…"


def as_text(tables: Sequence[dict[str, Any]]) -> str:
    """Return the description as lines for a prompt, with quoted identifiers."""
    lines: list[str] = []
    for table in tables:
        lines.append(f"table {quoted(table['table'])} ({table['row_count']} rows, from {table['file']})")
        for column in table["columns"]:
            line = f"  {quoted(column['name'])} {column['type']}"
            if "values" in column:
                line += ": " + ", ".join(literal(str(value)) for value in column["values"])
            elif "min" in column:
                line += f": from {column['min']} to {column['max']}"
            lines.append(line)
        lines += [f"  sample: {json.dumps(row, ensure_ascii=False)}" for row in table["sample"]]
    return "\n".join(lines)


def main() -> int:
    """Answer the request; return the exit code."""
    request = json.loads(Path("request.json").read_text("utf-8"))
    csv.field_size_limit(1 << 20)
    # At connect, not later: DuckDB would start a thread per processor first, and their stacks count as memory.
    connection = duckdb.connect(":memory:", config={"threads": THREADS})
    for setting in (
        f"memory_limit = '{int(request['memory_bytes'] * 0.6) // 1048576}MiB'",
        "temp_directory = ''",
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
    ):
        connection.execute(f"SET {setting}")
    faults: list[str] = []
    loaded: list[tuple[str, str]] = []
    for item in request["tables"]:
        try:
            load(connection, item["table"], Path(item["path"]), item["kind"])
            loaded.append((item["table"], item["file"]))
        except (RefusedError, duckdb.Error) as error:
            faults.append(f"{item['file']} could not be loaded: {error}")
    if len(request["tables"]) == 1 and loaded and loaded[0][0] != "data":
        connection.execute(f"CREATE VIEW data AS SELECT * FROM {quoted(loaded[0][0])}")  # noqa: S608
    # After the files are loaded and before the query, which must not read files.
    # The lock keeps the query from enabling access again.
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    try:
        if request["mode"] == "describe":
            tables = [describe(connection, table, file) for table, file in loaded]
            result: dict[str, Any] = {"tables": tables, "faults": faults, "text": as_text(tables)}
        else:
            result = answer(connection, request["query"], request["max_rows"], request["max_bytes"])
    except (RefusedError, duckdb.Error) as error:
        sys.stderr.write("\n".join([str(error), *faults]) + "\n")
        return 1
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
