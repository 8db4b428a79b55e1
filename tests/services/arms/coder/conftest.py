from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import duckdb
import pytest

from octollm import Message
from octollm.contracts.operations import RunRequest, RunResult, ValidateRequest, ValidateResult
from octollm.services.arms.executor import runner_sql
from octollm.services.arms.judge.validation import validate as judge_validate


class ScriptedPrompts:
    """An ask that gives the answers of a list in order, and keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[list[Message]] = []

    async def __call__(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        schema: dict[str, object] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], Awaitable[None]] | None = None,
        suffices: Callable[[str], bool] | None = None,
    ) -> str:
        self.asked.append(list(messages))
        assert self.answers, f"asked once more than there are answers: {messages[-1].content}"
        answer = self.answers.pop(0)
        if on_text:
            await on_text(answer)
        return answer


@pytest.fixture
def scripted_prompts() -> type[ScriptedPrompts]:
    return ScriptedPrompts


@pytest.fixture
def run(tmp_path: Path) -> Callable[[RunRequest], Awaitable[RunResult]]:
    """Run the tests' own programs in a folder of their own; the executor does it in a sandbox."""
    folders = iter(range(1000))

    async def run_python(request: RunRequest) -> RunResult:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        for file in request.files:
            (folder / file.name).write_text(file.text or "", "utf-8")
        out, err = folder / "stdout", folder / "stderr"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *request.command, cwd=folder, stdout=stdout, stderr=stderr
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), request.limits.wall_seconds)
            if process.returncode is None:
                process.kill()
                await process.wait()
        return RunResult(process.returncode or 0, out.read_text("utf-8"), err.read_text("utf-8"))

    return run_python


@pytest.fixture
def validate(
    run: Callable[[RunRequest], Awaitable[RunResult]],
) -> Callable[[ValidateRequest], Awaitable[ValidateResult]]:
    async def validated(request: ValidateRequest) -> ValidateResult:
        return await judge_validate(request, run)

    return validated


@pytest.fixture
def sql() -> Callable[..., Callable[[str], Awaitable[RunResult]]]:
    """Return a maker of ``run_sql`` over tables given as statements, as the executor answers it."""

    def over(*statements: str) -> Callable[[str], Awaitable[RunResult]]:
        connection = duckdb.connect()
        for statement in statements:
            connection.execute(statement)

        async def run_sql(query: str) -> RunResult:
            try:
                if query == "--describe":
                    names = [row[0] for row in connection.execute("SHOW TABLES").fetchall()]
                    tables = [runner_sql.describe(connection, name, f"{name}.csv") for name in names]
                    found: dict[str, object] = {"tables": tables, "faults": [], "text": ""}
                else:
                    found = runner_sql.answer(connection, query, 1000, 100_000)
            except (duckdb.Error, runner_sql.RefusedError) as error:
                return RunResult(1, "", str(error))
            return RunResult(0, json.dumps(found), "")

        return run_sql

    return over
