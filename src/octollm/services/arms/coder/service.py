"""The coder as a service.

It classifies a goal as data, code or text, and answers with a query, a tested solution or the model's own text.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Literal

from octollm import Arm, Check, Context, Evidence, ExecuteResult, FieldError, FileRef, Message, OctoError, Task
from octollm.arm import build_arm
from octollm.config import Settings
from octollm.contracts.media_types import kind_of_file
from octollm.contracts.operations import RunRequest, RunResult
from octollm.contracts.service_operations import calls_of
from octollm.contracts.task import MAX_GOAL
from octollm.rpc.service import Service, ServiceBase
from octollm.services.arms.adapters import (
    ModelAsk,
    bind_run,
    bind_validate,
    collect_notes,
    goal_with_constraints,
    read_file_text,
)
from octollm.services.arms.coder.code import write_code
from octollm.services.arms.coder.data import answer_data
from octollm.services.arms.coder.solution import CodeSolution
from octollm.services.arms.completion import PromptFunction
from octollm.text.intent import is_programming_goal

WorkKind = Literal["data", "code", "text"]


def classify_goal(goal: str, files: Sequence[FileRef]) -> WorkKind:
    """Return ``data`` for a goal with tables, ``code`` for one that asks for a program, else ``text``."""
    if any(kind_of_file(file) == "table" for file in files):
        return "data"
    return "code" if is_programming_goal(goal, has_files=bool(files)) else "text"


OnText = Callable[[str], Awaitable[None]]

MAX_TEXT_TOKENS = 400
MAX_TEXT_NOTES = 4000
_TEXT_PROMPT = "Do what is asked, briefly. Say so when you do not know."


async def write_text(
    goal: str,
    ask: PromptFunction,
    *,
    notes: str = "",
    reasons: Sequence[str] = (),
    max_tokens: int = MAX_TEXT_TOKENS,
    on_text: OnText | None = None,
) -> ExecuteResult:
    """Return the model's text, marked as unchecked. ``notes`` are results of earlier steps.

    Raises ``OctoError`` (``model_output_invalid``) for an empty answer, and what ``ask`` raises.
    """
    known = f"{notes[:MAX_TEXT_NOTES]}\n\n" if notes else ""
    refused = f"\n\nAn earlier answer was refused: {' '.join(reasons)[:600]}" if reasons else ""
    answer = await ask(
        [Message.system(_TEXT_PROMPT), Message.user(f"{known}{goal}{refused}")], max_tokens=max_tokens, on_text=on_text
    )
    if not answer.strip():
        raise OctoError("The model gave no text.", code="model_output_invalid")
    check = Check("checked", False, "the model's own words: nothing was run or looked up", checked_by="nobody")
    return ExecuteResult(output=answer.strip(), evidence=Evidence(kind="text", checks=(check,)))


PYTHON_MEDIA_TYPE = "text/x-python"


def coder_arm() -> Arm:
    """Return the coder."""
    arm = Arm.built_in(
        "coder",
        "Writes Python code with tests that pass, answers questions over tables with SQL, and writes texts.",
        calls=calls_of("coder"),
        accepts=("files:tabular", "files:text", "files:none"),
    )

    @arm.operation
    async def execute(task: Task, ctx: Context) -> ExecuteResult:
        """Write what the goal asks for."""
        goal = goal_with_constraints(task)
        if not goal or len(goal) > MAX_GOAL:
            fault = FieldError("/goal", f"Expected 1 to {MAX_GOAL} characters.")
            raise OctoError(f"A goal has from 1 to {MAX_GOAL} characters.", code="goal_invalid", field_errors=(fault,))
        kind = classify_goal(goal, task.context.files)
        if kind == "data":
            return await solve_data_goal(task, goal, ctx)
        if kind == "code":
            return await solve_code_goal(task, goal, ctx)
        ask = ModelAsk(ctx)
        file_texts = [f"File {name}:\n{text}" for name, text in await _read_texts(task, ctx)]
        notes = "\n\n".join(filter(None, (collect_notes(task), *file_texts)))
        return await write_text(goal, ask, notes=notes, reasons=task.context.reasons, on_text=ask.write)

    del execute
    return arm


async def solve_data_goal(task: Task, goal: str, ctx: Context) -> ExecuteResult:
    """Answer a question over the tables among the task's files. Raises what ``answer_data`` raises."""
    tables = tuple(file for file in task.context.files if kind_of_file(file) == "table")
    run = bind_run(ctx)

    async def run_sql(query: str) -> RunResult:
        return await run(RunRequest("sql", (query,), tables))

    ask = ModelAsk(ctx)
    return await answer_data(
        goal, ask, run_sql, notes=collect_notes(task), reasons=task.context.reasons, on_text=ask.write
    )


async def solve_code_goal(task: Task, goal: str, ctx: Context) -> ExecuteResult:
    """Write code and its tests, and store both as artifacts. Raises what ``write_code`` and storing raise."""
    ask = ModelAsk(ctx)
    texts = await _read_texts(task, ctx, as_source=True)
    if notes := collect_notes(task):
        texts.append(("notes.txt", notes))
    solution = await write_code(
        goal,
        ask,
        bind_validate(ctx),
        bind_run(ctx),
        texts=texts,
        reasons=task.context.reasons,
        on_text=ask.write,
    )
    artifacts = (
        await ctx.artifacts.write(solution.filename, solution.code.encode(), PYTHON_MEDIA_TYPE),
        await ctx.artifacts.write(solution.tests_filename, solution.tests.encode(), PYTHON_MEDIA_TYPE),
    )
    return ExecuteResult(
        output=_format_solution(solution), artifacts=artifacts, evidence=Evidence(kind="code", checks=solution.checks)
    )


def _format_solution(solution: CodeSolution) -> str:
    return (
        f"{solution.filename}:\n```python\n{solution.code.strip()}\n```\n\n"
        f"{solution.tests_filename}:\n```python\n{solution.tests.strip()}\n```"
    )


async def _read_texts(task: Task, ctx: Context, *, as_source: bool = False) -> list[tuple[str, str]]:
    """Return (name, text) of the text files of a task; a model cannot read the others."""
    texts = [file for file in task.context.files if kind_of_file(file) == "text"]
    return [(file.name, await read_file_text(ctx, file, as_source=as_source)) for file in texts]


@contextlib.asynccontextmanager
async def coder_service(base: ServiceBase, settings: Settings) -> AsyncGenerator[Service]:
    """Yield the coder service. It keeps no state: artifacts are stored by the orchestrator."""
    del settings
    yield build_arm(coder_arm(), base)
