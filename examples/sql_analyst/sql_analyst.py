"""An arm that answers questions over a SQLite database which comes with the task.

The model writes one SELECT, held to a JSON schema; a query that fails is mended once. Run it with
``octollm serve sql_analyst:arm`` from this folder, and ask ``octollm run "…" --file shop.sqlite3``.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec import Struct
from reading import Rows, answer, schema_of

from octollm import Arm, Artifact, Context, ExecuteResult, FileRef, OctoError, Task

SUFFIXES = (".sqlite", ".sqlite3", ".db")
SHOWN_ROWS = 20

arm = Arm(
    "sql-analyst",
    description="Answers questions over a SQLite database with SQL",
    calls=["models:chat", "files:read", "files:write"],
    accepts=["kind:sqlite", "application/vnd.sqlite3", "application/x-sqlite3"],
)


class Query(Struct):
    """What the model writes."""

    sql: str


@arm.operation
async def execute(task: Task, ctx: Context) -> ExecuteResult:
    """Answer the goal by one query over the task's database."""
    file = database_of(task)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "task.sqlite3"
        path.write_bytes(await ctx.artifacts.read(file))
        await ctx.progress(20, f"read {file.name}")
        query, rows = await find(task.goal, path, ctx)
    await ctx.progress(90, "queried")
    table = await ctx.artifacts.write("result.csv", as_csv(rows))
    return ExecuteResult(in_words(query, rows, table), artifacts=ctx.artifacts.list())


def database_of(task: Task) -> FileRef:
    """Return the one database of a task."""
    found = [file for file in task.context.files if file.name.lower().endswith(SUFFIXES)]
    if len(found) != 1:
        raise OctoError(
            f"The task has {len(found)} SQLite databases ({', '.join(SUFFIXES)}); give it one.", code="file_invalid"
        )
    return found[0]


async def find(question: str, path: Path, ctx: Context) -> tuple[str, Rows]:
    """Return the query that answers a question, and its rows. A first failure is told to the model."""
    prompt = f"Tables:\n{schema_of(path)}\n\nWrite one SQLite SELECT that answers: {question}"
    query = (await ctx.model.structured(prompt, Query, max_tokens=400)).sql
    try:
        return query, await answer(path, query, ctx.deadline.remaining())
    except OctoError as error:
        await ctx.progress(50, "mending the query")
        mended = await ctx.model.structured(f"{prompt}\n\nNot {query}, for: {error.detail}", Query, max_tokens=400)
        return mended.sql, await answer(path, mended.sql, ctx.deadline.remaining())


def in_words(query: str, rows: Rows, table: Artifact) -> str:
    """Return the result as a table in Markdown, with the query that it stands on."""
    lines = ["| " + " | ".join(rows.columns) + " |", "|" + " --- |" * len(rows.columns)]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in rows.rows[:SHOWN_ROWS]]
    more = len(rows.rows) - SHOWN_ROWS
    if more > 0:
        lines.append(f"\n{more} more in {table.name}")
    if rows.cut:
        lines.append("\nThere are more rows than were read.")
    return "\n".join([*lines, "", "```sql", query, "```"])


def as_csv(rows: Rows) -> str:
    """Return the result as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(rows.columns)
    writer.writerows(rows.rows)
    return text.getvalue()
