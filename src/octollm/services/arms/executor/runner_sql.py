"""The program that answers one SQL query over data files; it runs inside the sandbox.

It is sent to the sandbox as text, so it imports only the standard library, DuckDB, and the modules of
``octollm.documents`` that come with it. It reads ``request.json`` in its folder: ``mode`` (``query`` or ``describe``),
``query``, ``tables`` (each ``table``, ``file``, ``kind``), ``memory_bytes``, ``max_rows`` and ``max_bytes``. It prints
one JSON object. Errors in the query or the data go to standard error, with exit code 1.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import duckdb

from octollm.documents.layout import Layout, LayoutError, parse_cells, parse_lines
from octollm.documents.tables import TableAssumption, create_typed_table, quote_name, quote_text

THREADS = 2
_READ_ONLY = {"SELECT", "EXPLAIN", "MULTI"}
"""DuckDB reports PIVOT as MULTI, because it runs it as several statements."""
_MAX_COLUMNS = 60
"""Columns of a table in a description."""
_FEW_VALUES = 12
_SPACES = " \t\r\n\u00a0\u202f\ufeff"
LONG_FILE = 1024 * 1024
"""Bytes from which on DuckDB reads the lines of a regular file by itself."""
TAIL_BYTES = 16 * 1024
"""Bytes at the end of a long file that may hold footers and totals."""
MAX_LINE = 8 * 1024 * 1024
"""Bytes of one row."""
_MAX_CELL = 80
"""Characters of a value in a description."""
_ENCODINGS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"))
_MAX_CONTROLS = 8
"""Control characters in a text; more mean that it is none."""
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f]")


class RefusedError(Exception):
    """The query or a file cannot be used; the text says why."""


def as_utf8(path: Path) -> list[TableAssumption]:
    """Rewrite a text file as UTF-8: by its byte order mark, else as Windows-1252 when it is not UTF-8 already.

    Raises ``RefusedError`` for a file that is empty, or no text.
    """
    # The executor has converted what needs a guess already (``to_utf8``): this sandbox has no library that guesses.
    # Windows-1252 is left to this program, so that the assumption is noted with the table.
    data = path.read_bytes()
    encoding = next((name for mark, name in _ENCODINGS if data.startswith(mark)), "utf-8")
    notes: list[TableAssumption] = []
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        encoding = "cp1252"
        text = data.decode(encoding, "replace")
        notes.append(TableAssumption("The file is read as Windows-1252, because it is not UTF-8."))
    if not text.strip():
        raise RefusedError("the file is empty")
    controls = _CONTROLS.findall(text[:65536])
    if len(controls) > _MAX_CONTROLS:
        where = _CONTROLS.search(text)
        raise RefusedError(f"it is no text: there is a control character at offset {where.start() if where else 0}")
    if encoding != "utf-8":
        path.write_text(text, "utf-8", newline="")
    return notes


def load(connection: duckdb.DuckDBPyConnection, table: str, path: Path, kind: str) -> list[TableAssumption]:
    """Load one file into a table and return what was assumed. Types are inferred from the whole file.

    Raises ``RefusedError`` or ``duckdb.Error`` for a file that is no table.
    """
    if kind in ("parquet", "json"):
        notes = as_utf8(path) if kind == "json" else []
        options = ", sample_size=-1, maximum_object_size=134217728" if kind == "json" else ""
        return notes + load_records(connection, table, f"read_{kind}({quote_text(str(path))}{options})")
    if kind == "cells":
        sheet = json.loads(path.read_text("utf-8"))
        try:
            layout, rows = parse_cells(sheet["rows"], sheet["first_row"])
        except LayoutError as error:
            raise RefusedError(str(error)) from error
        notes = sheet.get("notes", ())
        stated = [TableAssumption(text, decided=not text.startswith("undecided: ")) for text in notes]
        return stated + load_rows(connection, table, layout, rows, path.with_suffix(".rows"))
    notes = as_utf8(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            layout, rows = parse_lines(file, "\t" if kind == "tsv" else None)
            source = _split_long_file(path, layout)
            if source is not None:
                try:
                    return notes + _load_long_file(connection, table, layout, source)
                except duckdb.Error:
                    # A line is not as long as the header: the parser of this program counts and repairs such lines.
                    connection.execute(f"DROP TABLE IF EXISTS {_raw_name(table)}")
            return notes + load_rows(connection, table, layout, rows, path.with_suffix(".rows"))
    except LayoutError as error:
        raise RefusedError(str(error)) from error
    except csv.Error as error:
        raise RefusedError(f"a line cannot be split into cells: {error}") from error


def load_records(connection: duckdb.DuckDBPyConnection, table: str, source: str) -> list[TableAssumption]:
    """Load the records of a file with types of its own. Its columns of text are typed as those of a text file are.

    An object around a single list of objects is left out: its list is the table.
    """
    notes: list[TableAssumption] = []
    records = quote_name(f"{table} records")
    connection.execute(f"CREATE TABLE {records} AS SELECT * FROM {source}")  # noqa: S608
    described = _describe_columns(connection, records)
    lists = [name for name, kind in described if re.fullmatch(r"STRUCT\(.*\)\[\]", kind)]
    ((count,),) = connection.execute(f"SELECT count(*) FROM (FROM {records} LIMIT 2)").fetchall()  # noqa: S608
    if count == 1 and len(lists) == 1:
        others = [name for name, _ in described if name != lists[0]]
        left_out = f"; {', '.join(others)[:80]} beside it is left out" if others else ""
        notes.append(TableAssumption(f"The list {lists[0]!r} of the file is read as the table{left_out}."))
        inner = quote_name(f"{table} list")
        connection.execute(
            f"CREATE TABLE {inner} AS SELECT entry.* FROM "  # noqa: S608
            f"(SELECT unnest({quote_name(lists[0])}) AS entry FROM {records})"
        )
        connection.execute(f"DROP TABLE {records}")
        records, described = inner, _describe_columns(connection, inner)
    texts = frozenset(number for number, (_, kind) in enumerate(described) if kind == "VARCHAR")
    names = [name for name, _ in described]
    layout = Layout(names, {}, 0, text_columns=texts, named=frozenset(names))
    cells = ", ".join(f"{quote_name(name)} AS c{number}" for number, name in enumerate(names))
    connection.execute(f"CREATE TABLE {_raw_name(table)} AS SELECT {cells} FROM {records}")  # noqa: S608
    connection.execute(f"DROP TABLE {records}")
    return notes + _create_typed(connection, table, layout)


def _describe_columns(connection: duckdb.DuckDBPyConnection, table: str) -> list[tuple[str, str]]:
    found = connection.execute(f"SELECT * FROM {table} LIMIT 0")  # noqa: S608
    return [(str(column[0]), str(column[1])) for column in found.description or []]


def load_rows(
    connection: duckdb.DuckDBPyConnection, table: str, layout: Layout, rows: Iterable[list[str]], path: Path
) -> list[TableAssumption]:
    """Load rows of text into a typed table, by way of a file at ``path``."""
    _write_rows(path, rows)
    _create_raw(connection, table, layout, path, ",")
    return _create_typed(connection, table, layout)


@dataclass(frozen=True, slots=True)
class LongFile:
    """A long file without quotation marks or blank lines in its data: a part for DuckDB, and the last lines as text."""

    body: Path
    tail: list[str]
    tail_start: int
    """The row of the file at which the tail begins, from 0."""


def _split_long_file(path: Path, layout: Layout) -> LongFile | None:
    """Return the parts of a file that DuckDB may read by itself; ``None`` for one that is short or irregular."""
    if path.stat().st_size < LONG_FILE or not layout.delimiter:
        return None
    data = path.read_bytes()
    start = 0
    for _ in range(layout.start):
        start = data.index(b"\n", start) + 1
    end = data.rindex(b"\n", 0, len(data) - TAIL_BYTES) + 1
    label = layout.delimiter.join(layout.label_row).encode()
    irregular = (b"\n\n", b"\n\r\n", b"\n---", b"\n===", b"\n***", *([b"\n" + label] if label else ()))
    returns = data.count(b"\r")
    if (
        end <= start
        or b'"' in data
        or (returns and returns != data.count(b"\r\n"))
        or any(data.find(mark, start, end) >= 0 for mark in irregular)
    ):
        return None
    body = path.with_suffix(".body")
    body.write_bytes(memoryview(data)[start:end])
    tail = data[end:].decode().splitlines(keepends=True)
    return LongFile(body, tail, layout.start + data.count(b"\n", start, end))


def _load_long_file(
    connection: duckdb.DuckDBPyConnection, table: str, layout: Layout, source: LongFile
) -> list[TableAssumption]:
    """Load a long file: DuckDB reads nearly all of it, and the last lines are searched for footers."""
    _create_raw(connection, table, layout, source.body, layout.delimiter)
    _write_rows(source.body, layout.data(csv.reader(source.tail, delimiter=layout.delimiter), source.tail_start))
    _create_raw(connection, table, layout, source.body, ",", action="INSERT INTO")
    return _create_typed(connection, table, layout)


def _write_rows(path: Path, rows: Iterable[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _raw_name(table: str) -> str:
    return quote_name(f"{table} raw")


def _create_raw(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    layout: Layout,
    path: Path,
    delimiter: str,
    *,
    action: Literal["CREATE TABLE", "INSERT INTO"] = "CREATE TABLE",
) -> None:
    """Load a file of rows as text, without the spaces around cells."""
    names = [f"c{number}" for number in range(len(layout.header))]
    columns = ", ".join(f"{quote_text(name)}: 'VARCHAR'" for name in names)
    cells = ", ".join(names)
    if _has_spaces_around(path, delimiter):
        cells = ", ".join(f"nullif(trim({name}, {quote_text(_SPACES)}), '') AS {name}" for name in names)
    connection.execute(
        f"{action} {_raw_name(table)}{' AS' if action == 'CREATE TABLE' else ''} SELECT {cells} "  # noqa: S608
        f"FROM read_csv({quote_text(str(path))}, auto_detect=false, header=false, delim={quote_text(delimiter)}, "
        f"quote='\"', escape='\"', max_line_size={MAX_LINE}, columns={{{columns}}})"
    )


def _has_spaces_around(path: Path, delimiter: str) -> bool:
    """Return whether cells may begin or end with a space; trimming each cell costs more than all else."""
    data = path.read_bytes()
    edges = [delimiter.encode(), b"\n", b"\r", b'"']
    spaces = [space.encode() for space in _SPACES.replace(delimiter, "") if space not in "\r\n"]
    around = any(data.find(pair) >= 0 for edge in edges for space in spaces for pair in (edge + space, space + edge))
    return around or data.find(b'""') >= 0 or data.startswith(tuple(spaces)) or data.endswith(tuple(spaces))


def _create_typed(connection: duckdb.DuckDBPyConnection, table: str, layout: Layout) -> list[TableAssumption]:
    raw = _raw_name(table)
    assumptions = create_typed_table(lambda query: connection.execute(query).fetchall(), raw, quote_name(table), layout)
    connection.execute(f"DROP TABLE {raw}")
    return assumptions


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


Assumptions = dict[str, list[TableAssumption]]
"""What was assumed for each table."""


def used_assumptions(
    connection: duckdb.DuckDBPyConnection, query: str, assumptions: Assumptions
) -> list[dict[str, Any]]:
    """Return the assumptions of the tables that a query reads, and of the columns that it names.

    A ``*`` names every column. A name that the query uses for something else counts as well, for it is better to say
    one assumption too many.
    """
    try:
        used: set[str] = {str(name).strip('"').lower() for name in connection.get_table_names(query)}
    except duckdb.Error:
        used = set[str]()
    text = re.sub(r"count\s*\(\s*\*\s*\)", "", query.lower())
    takes_all = "*" in text or "select" not in text or "columns" in text
    found: list[dict[str, Any]] = []
    for table, notes in assumptions.items():
        if used and table.lower() not in used and not ("data" in used and len(assumptions) == 1):
            continue
        found.extend(
            {"table": table, **asdict(note)}
            for note in notes
            if not note.column or takes_all or re.search(rf"(?<!\w){re.escape(note.column.lower())}(?!\w)", text)
        )
    return found


def describe(connection: duckdb.DuckDBPyConnection, table: str, file: str) -> dict[str, Any]:
    """Return a table's columns with their types and ranges, its row count and three of its rows."""
    name = quote_name(table)
    described = _describe_columns(connection, name)
    shown = connection.execute(f"SELECT * FROM {name} LIMIT 3")  # noqa: S608
    sample = [[_short(plain(cell)) for cell in row[:_MAX_COLUMNS]] for row in shown.fetchall()]
    (count,) = connection.execute(f"SELECT count(*) FROM {name}").fetchone() or (0,)  # noqa: S608
    columns = [{"name": c, "type": t, **_range(connection, name, c, t)} for c, t in described[:_MAX_COLUMNS]]
    return {"table": table, "file": file, "row_count": count, "columns": columns, "sample": sample}


def _range(connection: duckdb.DuckDBPyConnection, table: str, column: str, kind: str) -> dict[str, Any]:
    if kind.startswith(("STRUCT", "MAP", "BLOB", "JSON")) or kind.endswith("]"):
        return {}
    name = quote_name(column)
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
        lines.append(f"table {quote_name(table['table'])} ({table['row_count']} rows, from {table['file']})")
        for column in table["columns"]:
            line = f"  {quote_name(column['name'])} {column['type']}"
            if "values" in column:
                line += ": " + ", ".join(quote_text(str(value)) for value in column["values"])
            elif "min" in column:
                line += f": from {column['min']} to {column['max']}"
            lines.append(line)
        lines += [f"  sample: {json.dumps(row, ensure_ascii=False)}" for row in table["sample"]]
    return "\n".join(lines)


def _plain_error(error: Exception) -> str:
    """Return what an error says about the file, without the statement and the file's place in the sandbox."""
    return re.sub(r" in file \"[^\"\n]*\",?", "", str(error).split("\n")[0]).strip()


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
    assumptions: Assumptions = {}
    for item in request["tables"]:
        try:
            assumptions[item["table"]] = load(connection, item["table"], Path(item["path"]), item["kind"])
            loaded.append((item["table"], item["file"]))
        except (RefusedError, duckdb.Error) as error:
            faults.append(f"{item['file']} could not be loaded: {_plain_error(error)}")
    if len(request["tables"]) == 1 and loaded and loaded[0][0] != "data":
        connection.execute(f"CREATE VIEW data AS SELECT * FROM {quote_name(loaded[0][0])}")  # noqa: S608
    # After the files are loaded and before the query, which must not read files.
    # The lock keeps the query from enabling access again.
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    try:
        if request["mode"] == "describe":
            tables = [describe(connection, table, file) for table, file in loaded]
            result: dict[str, Any] = {"tables": tables, "faults": faults, "text": as_text(tables)}
            result["assumptions"] = [
                {"table": table, **asdict(note)} for table, notes in assumptions.items() for note in notes
            ]
        else:
            result = answer(connection, request["query"], request["max_rows"], request["max_bytes"])
            result["assumptions"] = used_assumptions(connection, request["query"], assumptions)
    except (RefusedError, duckdb.Error) as error:
        sys.stderr.write("\n".join([*faults, *([str(error)] if loaded or not faults else [])]) + "\n")
        return 1
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
