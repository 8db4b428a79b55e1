"""Checks a run of faults on tasks: `python tasks_checker.py RUN…`, with files of :class:`Run` as JSON.

The exit code is 1 for a fault. It compares the tables, read over a connection of its own, with the effects that were
recorded outside, and imports nothing of the product. It prints a row for each run, and one line for each fault.
"""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

Row = Mapping[str, Any]
TABLES = {
    "tasks": "SELECT task_id, status, error, version, run, finished_at FROM {}tasks WHERE kind = 'task'",
    "steps": "SELECT task_id, step, arm, status FROM {}steps",
    "attempts": "SELECT task_id, step, attempt, status FROM {}attempts",
    "events": "SELECT subject, version, event_type FROM {}events WHERE subject LIKE 'task/%' ORDER BY subject, version",
    "budgets": "SELECT * FROM {}budgets",
    "reservations": "SELECT task_id, state, tokens, cost_usd, used_tokens, used_cost_usd FROM {}reservations",
}
ENDS = ("completed", "failed", "cancelled")
COLUMNS = (
    "tasks",
    "completed",
    "failed",
    "cancelled",
    "takeovers",
    "effects",
    "repeated with their key",
    "at most once, doubled",
    "steps lost",
    "versions missing",
    "ends doubled or missing",
    "tokens off",
    "left open",
    "processes left",
)


@dataclass(frozen=True)
class Run:
    """Where a run is.

    ``submitted`` are the tasks whose submission was acknowledged, ``once`` the arms whose effects must not be doubled,
    and ``sessions`` those of the processes that were started. ``model_active`` counts open connections to the model.
    """

    name: str
    database: str
    effects: str
    submitted: list[str]
    once: list[str]
    sessions: list[int]
    model_active: int = 0


@dataclass
class Report:
    """The row of a run, and in ``faults`` what must not be."""

    counts: Counter[str] = field(default_factory=Counter[str])
    reasons: Counter[str] = field(default_factory=Counter[str])
    faults: list[str] = field(default_factory=list[str])

    def fault(self, column: str, text: str) -> None:
        """Count a fault, and say it unless there are many."""
        self.counts[column] += 1
        if len(self.faults) < 50:
            self.faults.append(text)


@dataclass(frozen=True)
class Data:
    """The rows of each of :data:`TABLES`, and the effects."""

    tables: Mapping[str, Sequence[Row]]
    effects: Sequence[Row]


def check_ends(report: Report, data: Data, submitted: Iterable[str]) -> None:
    """Check that every task has ended, for a reason if it failed, and that no acknowledged one is missing."""
    known = {row["task_id"] for row in data.tables["tasks"]}
    for task_id in submitted:
        if task_id not in known:
            report.fault("ends doubled or missing", f"{task_id} was acknowledged, and is not there")
    for row in data.tables["tasks"]:
        report.counts["tasks"] += 1
        report.counts["takeovers"] += max(0, row["run"] - 1)
        status = row["status"]
        if status not in ENDS:
            report.fault("ends doubled or missing", f"{row['task_id']} is {status}")
            continue
        report.counts[status] += 1
        if status == "failed":
            error = as_json(row["error"]) or {}
            report.reasons[str(error.get("code"))] += 1
            if not error.get("code") or not error.get("detail"):
                report.fault("ends doubled or missing", f"{row['task_id']} failed without a reason")
        if row["finished_at"] is None:
            report.fault("ends doubled or missing", f"{row['task_id']} is {status}, and does not say since when")


def check_events(report: Report, data: Data) -> None:
    """Check that the versions of each task have no gap, and that one event, the last, says how it ended."""
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in data.tables["events"]:
        by_task[row["subject"].removeprefix("task/")].append(row)
    for task in data.tables["tasks"]:
        task_id, events = task["task_id"], by_task[task["task_id"]]
        versions = [row["version"] for row in events]
        if versions != list(range(1, task["version"] + 1)):
            report.fault("versions missing", f"{task_id} is at version {task['version']} and has the events {versions}")
        ends = [row["event_type"] for row in events if row["event_type"] in [f"task.{end}" for end in ENDS]]
        wanted = [f"task.{task['status']}"] if task["status"] in ENDS else []
        if ends != wanted or (wanted and events[-1]["event_type"] not in ends):
            report.fault("ends doubled or missing", f"{task_id} is {task['status']} and has the ends {ends}")


def check_effects(report: Report, data: Data, once: Iterable[str]) -> None:
    """Check that nothing was done twice that must not be, and that a completed task has the effect of each step."""
    allowed = set(once)
    rejected = {(r["task_id"], r["step"]) for r in data.tables["attempts"] if r["status"] == "rejected"}
    by_step: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for effect in data.effects:
        by_step[effect["task"], effect["step"]].append(effect)
    report.counts["effects"] = len(data.effects)
    for (task_id, step), effects in by_step.items():
        if effects[0]["arm"] in allowed:
            # Only a verdict is a reason to do such a step again: it is an attempt of its own.
            attempts = {effect["attempt"] for effect in effects}
            if len(effects) > len(attempts) or (len(effects) > 1 and (task_id, step) not in rejected):
                report.fault("at most once, doubled", f"{task_id} {step} was done {len(effects)} times")
            continue
        keys: dict[int, set[str]] = defaultdict(set)
        for effect in effects:
            keys[effect["attempt"]].add(effect["key"])
        report.counts["repeated with their key"] += len(effects) - len(keys)
        for attempt, different in keys.items():
            if len(different) > 1:
                report.fault("at most once, doubled", f"{task_id} {step} attempt {attempt} has {len(different)} keys")
    statuses = {row["task_id"]: row["status"] for row in data.tables["tasks"]}
    planned = Counter(row["task_id"] for row in data.tables["steps"])
    for row in data.tables["steps"]:
        if statuses.get(row["task_id"]) == "completed":
            if (row["task_id"], row["step"]) not in by_step:
                report.fault("steps lost", f"{row['task_id']} completed without the effect of {row['step']}")
            if row["status"] != "completed":
                report.fault("steps lost", f"{row['task_id']} completed, and {row['step']} is {row['status']}")
    for task_id, status in statuses.items():
        if status == "completed" and not planned[task_id]:
            report.fault("steps lost", f"{task_id} completed without a step")


def check_ledger(report: Report, data: Data) -> None:
    """Check that each budget is what its calls and those below it came to, and is not exceeded; nothing stays open."""
    above = {row["task_id"]: [*(as_json(row["ancestors"]) or ()), row["task_id"]] for row in data.tables["budgets"]}
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    costs: dict[str, float] = defaultdict(float)
    for row in data.tables["reservations"]:
        for task_id in above[row["task_id"]]:
            if row["state"] == "open":
                sums[task_id]["reserved_tokens"] += row["tokens"]
            else:
                sums[task_id]["used_tokens"] += row["used_tokens"]
                costs[task_id] += row["used_cost_usd"]
        if row["state"] == "open":
            report.fault("left open", f"{row['task_id']} has a reservation of {row['tokens']} tokens that is open")
    for row in data.tables["budgets"]:
        task_id = row["task_id"]
        for name in ("reserved_tokens", "used_tokens"):
            if row[name] != sums[task_id][name]:
                report.fault("tokens off", f"{task_id} has {name} {row[name]}, and its calls {sums[task_id][name]}")
        if not math.isclose(row["used_cost_usd"], costs[task_id], abs_tol=1e-6):
            report.fault("tokens off", f"{task_id} has spent {row['used_cost_usd']}, and its calls {costs[task_id]}")
        if row["max_tokens"] is not None and row["used_tokens"] > row["max_tokens"]:
            report.fault("tokens off", f"{task_id} used {row['used_tokens']} of {row['max_tokens']} tokens")


def check_processes(report: Report, run: Run, session_of: Callable[[Path], int | None]) -> None:
    """Check that no process of the sessions is left, and that the model's clients are gone."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and session_of(folder) in run.sessions:
            report.fault("processes left", f"the process {folder.name} is left")
    if run.model_active:
        report.fault("processes left", f"the model has {run.model_active} connections")


def session_of(folder: Path) -> int | None:
    """Return the session of a process that is no zombie."""
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[3])


def check(run: Run, data: Data) -> Report:
    """Return the report of a run."""
    report = Report()
    check_ends(report, data, run.submitted)
    check_events(report, data)
    check_effects(report, data, run.once)
    check_ledger(report, data)
    check_processes(report, run, session_of)
    return report


def as_json(value: Any) -> Any:
    """Return a JSON column's value, which drivers give as text."""
    return json.loads(value) if isinstance(value, str) else value


def read_effects(file: Path) -> Iterator[Row]:
    """Yield the recorded effects."""
    with file.open() as lines:
        for line in lines:
            yield json.loads(line)[0]


def read_tables(url: str) -> dict[str, Sequence[Row]]:
    """Return the rows of each table."""
    if url.startswith("postgresql"):
        return asyncio.run(_read_postgres(url))
    with sqlite3.connect(f"file:{url}?mode=ro", uri=True) as connection:
        connection.row_factory = sqlite3.Row
        return {name: [dict(row) for row in connection.execute(sql.format(""))] for name, sql in TABLES.items()}


async def _read_postgres(url: str) -> dict[str, Sequence[Row]]:
    connection = await asyncpg.connect(url)
    try:
        return {
            name: [dict(row) for row in await connection.fetch(sql.format("octollm_orchestrator."))]
            for name, sql in TABLES.items()
        }
    finally:
        await connection.close()


def print_table(reports: Mapping[str, Report]) -> None:
    """Print a Markdown table of all runs, and why tasks failed."""
    print(f"| run | {' | '.join(COLUMNS)} |")
    print(f"|---|{'---:|' * len(COLUMNS)}")
    for name, report in reports.items():
        print(f"| {name} | {' | '.join(str(report.counts[column]) for column in COLUMNS)} |")
    for name, report in reports.items():
        if report.reasons:
            why = ", ".join(f"{code} {count}" for code, count in report.reasons.most_common())
            print(f"{name}: failed for {why}")


def main(files: list[str]) -> int:
    """Check the runs that these files describe."""
    reports: dict[str, Report] = {}
    for file in files:
        run = Run(**json.loads(Path(file).read_text()))
        data = Data(read_tables(run.database), list(read_effects(Path(run.effects))))
        reports[run.name] = check(run, data)
    print_table(reports)
    faults = [f"{name}: {fault}" for name, report in reports.items() for fault in report.faults]
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
