"""Checking an answer from data: the query is run again, and the answer must show what it gives."""

from __future__ import annotations

import re

from octollm.contracts.operations import AcceptRequest, RunRequest
from octollm.contracts.tables import ResultSet, format_cell, parse_result_set
from octollm.contracts.task import Evidence
from octollm.services.arms.judge.testing import Run

MAX_COMPARED_ROWS = 50
"""Rows of the query's output that the answer has to show."""
_TABLE_REFERENCE = re.compile(r"\b(?:from|join)\b", re.IGNORECASE)


async def check_data(request: AcceptRequest, evidence: Evidence, run: Run) -> tuple[list[str], int]:
    """Return the reasons against an answer from data, and how many checks were done."""
    query, output = evidence.query, request.result.output
    if not query:
        return ["The answer names no query."], 1
    reasons: list[str] = []
    if not _TABLE_REFERENCE.search(query):
        reasons.append("The query reads no table.")
    if _collapse_query_whitespace(query) not in _collapse_query_whitespace(output):
        reasons.append("The answer does not show its query.")
    ran = await run(RunRequest(language="sql", command=(query,), files=request.files))
    if ran.exit_code != 0:
        reasons.append(f"The query fails when it is run again: {(ran.stderr.strip() or ran.reason)[:300]}")
        return reasons, 3
    table = parse_result_set(ran.stdout)
    if not table.rows and not output.lower().startswith("no rows"):
        reasons.append("The query gives no rows, but the answer does not say so.")
    reasons.extend(_find_differences(table, evidence, output))
    return reasons, 4


def _find_differences(table: ResultSet, evidence: Evidence, output: str) -> list[str]:
    found: list[str] = []
    if evidence.rows is not None and evidence.rows != table.row_count:
        found.append(f"The answer counts {evidence.rows} rows, the query gives {table.row_count}.")
    shown = output.split("\n")
    for row in table.rows[:MAX_COMPARED_ROWS]:
        cells = [format_cell(cell) for cell in row]
        if len(table.rows) == 1:
            missing = [cell for cell in cells if not any(line.endswith(f": {cell}") for line in shown)]
        else:
            missing = [] if " | ".join(cells) in shown else cells
        if missing:
            found.append(f"The answer does not show what the query gives: {', '.join(missing)[:200]}.")
            break
    return found


def _collapse_query_whitespace(text: str) -> str:
    return " ".join(text.split())
