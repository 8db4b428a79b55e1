"""The checker of a run of faults on tasks finds a fault of each kind in a doctored database or record of effects."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tasks_checker
from tasks_checker import Data, Report, Run

from octollm.clock import SystemClock
from octollm.storage import open_database
from octollm.storage.migrations import migrate

CHECKER = Path(tasks_checker.__file__)
GOOD = """
INSERT INTO tasks (task_id, tenant, sub, authority, goal, contract, status, version, run, created_at, updated_at,
                   finished_at, error)
VALUES ('done', 't', 's', '', 'g', '{}', 'completed', 3, 2, 1, 1, 2, NULL),
       ('below', 't', 's', '', 'g', '{}', 'completed', 2, 1, 1, 1, 2, NULL),
       ('broken', 't', 's', '', 'g', '{}', 'failed', 2, 1, 1, 1, 2, '{"code": "model_failed", "detail": "It broke."}');
INSERT INTO steps (task_id, step, arm, title, status, spec, text, created_at, updated_at)
VALUES ('done', 's1', 'stamp', 'a', 'completed', '{}', '', 1, 1),
       ('done', 's2', 'mark', 'b', 'completed', '{}', '', 1, 1),
       ('below', 's1', 'mark', 'c', 'completed', '{}', '', 1, 1),
       ('broken', 's1', 'stamp', 'd', 'failed', '{}', '', 1, 1);
INSERT INTO events (id, event_type, channel, tenant, subject, version, timestamp, source, data)
VALUES ('1', 'task.accepted', 'c', 't', 'task/done', 1, '', 'o', '{}'),
       ('2', 'step.completed', 'c', 't', 'task/done', 2, '', 'o', '{}'),
       ('3', 'task.completed', 'c', 't', 'task/done', 3, '', 'o', '{}'),
       ('4', 'task.accepted', 'c', 't', 'task/below', 1, '', 'o', '{}'),
       ('5', 'task.completed', 'c', 't', 'task/below', 2, '', 'o', '{}'),
       ('6', 'task.accepted', 'c', 't', 'task/broken', 1, '', 'o', '{}'),
       ('7', 'task.failed', 'c', 't', 'task/broken', 2, '', 'o', '{}');
INSERT INTO budgets (task_id, max_tokens, used_tokens, used_cost_usd, ancestors)
VALUES ('done', 100, 90, 0.3, NULL), ('below', 50, 40, 0.1, '["done"]'), ('broken', NULL, 0, 0, NULL);
INSERT INTO reservations (id, task_id, key, tokens, cost_usd, state, used_tokens, used_cost_usd, created_at)
VALUES ('1', 'done', 'k', 60, 0.5, 'settled', 50, 0.2, 1), ('2', 'below', 'k', 45, 0.1, 'settled', 40, 0.1, 1);
"""
EFFECTS = [
    {"task": "done", "step": "s1", "attempt": 1, "run": 1, "arm": "stamp", "key": "a"},
    {"task": "done", "step": "s2", "attempt": 1, "run": 1, "arm": "mark", "key": "b"},
    # Done again after a take-over, with the key by which the outside can tell.
    {"task": "done", "step": "s2", "attempt": 1, "run": 2, "arm": "mark", "key": "b"},
    {"task": "below", "step": "s1", "attempt": 1, "run": 1, "arm": "mark", "key": "c"},
    {"task": "broken", "step": "s1", "attempt": 1, "run": 1, "arm": "stamp", "key": "d"},
]


@pytest.fixture(scope="module")
def good_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database with the orchestrator's schema and a run without a fault."""
    file = tmp_path_factory.mktemp("checker") / "good.db"

    async def build() -> None:
        async with open_database(f"sqlite:///{file}", clock=SystemClock()) as db:
            await migrate(db, "orchestrator")

    asyncio.run(build())
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(GOOD)
    return file


@pytest.fixture
def run(good_database: Path, tmp_path: Path) -> Run:
    file = tmp_path / "run.db"
    shutil.copy(good_database, file)
    return Run("doctored", str(file), str(tmp_path / "effects.jsonl"), ["done", "broken"], ["stamp"], [])


def check(run: Run, effects: list[dict[str, Any]] = EFFECTS) -> Report:
    Path(run.effects).write_text("".join(json.dumps([effect]) + "\n" for effect in effects))
    data = Data(tasks_checker.read_tables(run.database), list(tasks_checker.read_effects(Path(run.effects))))
    return tasks_checker.check(run, data)


def test_a_run_without_a_fault_passes(run: Run) -> None:
    report = check(run)
    assert report.faults == []
    counts = report.counts
    assert (counts["tasks"], counts["completed"], counts["failed"], counts["takeovers"]) == (3, 2, 1, 1)
    assert (counts["effects"], counts["repeated with their key"]) == (5, 1)
    assert report.reasons == {"model_failed": 1}


@pytest.mark.parametrize(
    ("column", "doctored"),
    [
        ("ends doubled or missing", "UPDATE tasks SET status = 'running' WHERE task_id = 'done'"),
        ("ends doubled or missing", "UPDATE tasks SET error = NULL WHERE task_id = 'broken'"),
        ("ends doubled or missing", "UPDATE tasks SET finished_at = NULL WHERE task_id = 'done'"),
        ("ends doubled or missing", "DELETE FROM tasks WHERE task_id = 'broken'"),
        ("ends doubled or missing", "UPDATE events SET event_type = 'task.failed' WHERE id = '2'"),
        ("ends doubled or missing", "UPDATE events SET event_type = 'task.cancelled' WHERE id = '3'"),
        ("ends doubled or missing", "UPDATE events SET event_type = 'step.failed' WHERE id = '3'"),
        ("versions missing", "DELETE FROM events WHERE id = '2'"),
        ("versions missing", "UPDATE tasks SET version = 4 WHERE task_id = 'done'"),
        ("steps lost", "INSERT INTO steps SELECT task_id, 's3', 3, 1, arm, title, status, attempt, run, spec, result,"
         " reasons, text, text_base, created_at, updated_at, started_at, finished_at FROM steps WHERE step = 's2'"),
        ("steps lost", "UPDATE steps SET status = 'running' WHERE step = 's2'"),
        ("steps lost", "DELETE FROM steps WHERE task_id = 'below'"),
        ("tokens off", "UPDATE budgets SET used_tokens = 50 WHERE task_id = 'done'"),
        ("tokens off", "UPDATE budgets SET used_cost_usd = 0.2 WHERE task_id = 'done'"),
        ("tokens off", "UPDATE budgets SET reserved_tokens = 5 WHERE task_id = 'broken'"),
        ("tokens off", "UPDATE budgets SET max_tokens = 89 WHERE task_id = 'done'"),
        ("left open", "UPDATE reservations SET state = 'open' WHERE id = '2'"),
    ],
)  # fmt: skip
def test_a_doctored_database_fails(run: Run, column: str, doctored: str) -> None:
    with closing(sqlite3.connect(run.database)) as connection:
        connection.execute(doctored)
        connection.commit()
    report = check(run)
    assert report.counts[column] > 0, report.faults
    assert report.faults


@pytest.mark.parametrize(
    ("column", "doctor"),
    [
        ("at most once, doubled", lambda effects: [*effects, effects[0]]),
        ("at most once, doubled", lambda effects: [*effects, {**effects[0], "attempt": 2}]),
        ("at most once, doubled", lambda effects: [*effects, {**effects[4], "run": 2}]),
        ("at most once, doubled", lambda effects: [*effects, {**effects[1], "key": "other"}]),
        ("steps lost", lambda effects: effects[1:]),
    ],
)
def test_a_doctored_record_of_effects_fails(
    run: Run, column: str, doctor: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> None:
    report = check(run, doctor(EFFECTS))
    assert report.counts[column] == 1, report.faults


def test_only_a_verdict_allows_an_effect_again(run: Run) -> None:
    again = [*EFFECTS, {**EFFECTS[0], "attempt": 2}]
    rejected = (
        "INSERT INTO attempts (task_id, step, attempt, arm, title, status, request, started_at)"
        " VALUES ('done', 's1', 1, 'stamp', '', '{}', '{{}}', 1)"
    )
    with closing(sqlite3.connect(run.database)) as connection:
        connection.execute(rejected.format("failed"))
        connection.commit()
        assert check(run, again).counts["at most once, doubled"] == 1
        connection.execute("UPDATE attempts SET status = 'rejected'")
        connection.commit()
    assert check(run, again).faults == []
    assert check(run, [*again, again[-1]]).counts["at most once, doubled"] == 1


def test_an_acknowledged_task_that_is_not_there_fails(run: Run) -> None:
    assert check(replace(run, submitted=["done", "lost"])).counts["ends doubled or missing"] == 1


def test_a_process_or_a_connection_that_is_left_fails(run: Run) -> None:
    assert check(replace(run, sessions=[os.getsid(0)])).counts["processes left"] > 0
    assert check(replace(run, model_active=2)).counts["processes left"] == 1


def test_as_a_program_it_exits_with_1_for_a_fault(run: Run, tmp_path: Path) -> None:
    check(run)
    for sessions, code in (([], 0), ([os.getsid(0)], 1)):
        file = tmp_path / "run.json"
        file.write_text(json.dumps(asdict(replace(run, sessions=sessions))))
        done = subprocess.run(
            [sys.executable, str(CHECKER), str(file)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stderr
        assert "| doctored | 3 | 2 | 1 |" in done.stdout
        assert ("FAULT doctored: the process" in done.stdout) == bool(code)


def test_the_checker_imports_nothing_of_the_product() -> None:
    tree = ast.parse(CHECKER.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) == {"asyncpg"}
