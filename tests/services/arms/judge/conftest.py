from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import duckdb
import pytest

from octollm.contracts.operations import RunRequest, RunResult
from octollm.services.arms.executor import runner_sql
from octollm.services.arms.executor.bubblewrap import Bubblewrap
from octollm.services.arms.executor.runner import Runner


@pytest.fixture
def run(tmp_path: Path) -> Callable[[RunRequest], Awaitable[RunResult]]:
    """Run the tests' own programs and queries; the executor does it in a sandbox."""
    folders = iter(range(1000))

    async def run_request(request: RunRequest) -> RunResult:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        for file in request.files:
            (folder / file.name).write_text(file.text or "", "utf-8")
        if request.language == "sql":
            connection = duckdb.connect()
            query = request.command[0]
            assumptions = {
                stem: runner_sql.load(connection, stem, folder / f"{stem}.csv", "csv")
                for stem in (Path(file.name).stem for file in request.files)
            }
            try:
                found = runner_sql.answer(connection, query, 1000, 100_000)
                found["assumptions"] = runner_sql.used_assumptions(connection, query, assumptions)
                return RunResult(0, json.dumps(found), "")
            except duckdb.Error as error:
                return RunResult(1, "", str(error))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *request.command,
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return RunResult(process.returncode or 0, out.decode(), err.decode())

    return run_request


@pytest.fixture(scope="session")
def sandbox_runner(bubblewrap: Bubblewrap) -> Runner:
    """Return the executor's runner with a real sandbox, which hostile code needs."""
    return Runner(bubblewrap)


@pytest.fixture
def run_sandboxed(sandbox_runner: Runner) -> Callable[[RunRequest], Awaitable[RunResult]]:
    async def run_request(request: RunRequest) -> RunResult:
        return await sandbox_runner.run(request, {file.name: (file.text or "").encode() for file in request.files})

    return run_request
