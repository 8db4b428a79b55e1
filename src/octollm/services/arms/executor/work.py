"""What a task that comes straight to the executor wants run."""

from __future__ import annotations

from collections.abc import Sequence

from octollm.contracts.operations import RunRequest, RunResult
from octollm.contracts.tables import ResultSet, format_cell, parse_result_set
from octollm.contracts.task import Check, Evidence, FileRef
from octollm.errors import OctoError

MAIN_PROGRAM = "main.py"
MAX_SHOWN_ROWS = 50
MAX_REASON = 400


def build_run_request(files: Sequence[FileRef], query: str | None) -> RunRequest:
    """Return the run of a task's files: ``main.py``, else the only program, or ``query``, the text of its SQL file.

    Raises ``file_invalid`` when it is not plain what to run.
    """
    if query is not None:
        tables = tuple(file for file in files if not file.name.endswith(".sql"))
        return RunRequest("sql", (query.strip(),), tables)
    programs = [file.name for file in files if file.name.endswith(".py")]
    name = MAIN_PROGRAM if MAIN_PROGRAM in programs else programs[0] if len(programs) == 1 else None
    if name is None:
        raise OctoError(
            f"The executor runs {MAIN_PROGRAM}, or the only .py or .sql file of a task; it was given "
            f"{', '.join(file.name for file in files)[:200] or 'no file'}.",
            code="file_invalid",
        )
    return RunRequest("python", (name,), tuple(files))


def find_sql_file(files: Sequence[FileRef]) -> FileRef | None:
    """Return the SQL file to run: the only one, where there is no program."""
    queries = [file for file in files if file.name.endswith(".sql")]
    return queries[0] if len(queries) == 1 and not any(file.name.endswith(".py") for file in files) else None


def summarise_run(request: RunRequest, result: RunResult) -> tuple[str, Evidence]:
    """Return what a run that ended well put out, and what that stands on. Raises ``not_accepted`` for another."""
    if result.reason or result.exit_code != 0:
        raise OctoError(f"The run failed: {_failure_reason(result)}", code="not_accepted")
    check = Check("run", True, f"ended well in {result.duration_ms} ms in {result.sandbox}")
    if request.language == "sql":
        table = parse_result_set(result.stdout)
        query = request.command[0]
        return _format_table(table, query), Evidence(
            kind="data", query=query, columns=table.columns, rows=table.row_count, checks=(check,)
        )
    return result.stdout.strip() or "The program ended well and printed nothing.", Evidence(
        kind="text", checks=(check,)
    )


def _failure_reason(result: RunResult) -> str:
    if result.reason:
        return f"it was stopped by a limit ({result.reason})."
    return result.stderr.strip()[-MAX_REASON:] or f"it ended with {result.exit_code}."


def _format_table(table: ResultSet, query: str) -> str:
    if len(table.rows) == 1:
        pairs = zip(table.columns, table.rows[0], strict=True)
        body = "\n".join(f"{name}: {format_cell(cell)}" for name, cell in pairs)
    else:
        rows = [" | ".join(format_cell(cell) for cell in row) for row in table.rows[:MAX_SHOWN_ROWS]]
        body = "\n".join((" | ".join(table.columns), " | ".join("---" for _ in table.columns), *rows))
    return f"{body}\n\nQuery:\n```sql\n{query}\n```"
