"""The planner service: turns a goal into a plan, or into a few programs that the executor runs in order."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import msgspec

from octollm import Arm, Check, Context, Evidence, ExecuteResult, FileRef, Message, OctoError, Task
from octollm.arm import build_arm
from octollm.config import Settings
from octollm.contracts.operations import RunLimits, RunRequest, RunResult
from octollm.contracts.service_operations import calls_of
from octollm.contracts.task import Plan, PlanRequest
from octollm.errors import map_exceptions
from octollm.rpc.service import Service, ServiceBase
from octollm.services.arms.adapters import ModelAsk, bind_run, goal_with_constraints, is_capable_model
from octollm.services.arms.completion import PromptFunction
from octollm.services.arms.planner.plan import make_plan

Run = Callable[[RunRequest], Awaitable[RunResult]]
"""The executor's ``run``."""
OnText = Callable[[str], Awaitable[None]]

MAX_PROGRAMS = 4
MAX_PROGRAM_CHARS = 1200
MAX_PROGRAMS_TOKENS = 900
PROGRAM_SECONDS = 20.0
MAX_SHOWN_CHARS = 4000
"""Characters of one program's output in the transcript."""
MAX_FILES = 32
_PROGRAMS_PROMPT = (
    "You reach a goal with short Python programs that run one after the other in one folder, with the standard "
    "library, no network and no input. Use as few as possible. Each prints its result. Reply with JSON."
)


class PlannedProgram(msgspec.Struct, frozen=True):
    """One program and what it is for."""

    title: str
    program: str


class _ProgramsAnswer(msgspec.Struct, frozen=True):
    programs: tuple[PlannedProgram, ...]


async def plan_and_execute(
    goal: str,
    ask: PromptFunction,
    run: Run,
    *,
    files: Sequence[FileRef] = (),
    reasons: Sequence[str] = (),
    on_text: OnText | None = None,
) -> ExecuteResult:
    """Write programs for ``goal`` and run them in order; the output is the transcript of what they printed.

    Files that a program writes are available to the next. ``reasons`` say why an earlier result was rejected. Raises
    ``OctoError``: ``model_output_invalid`` when there is no program, ``not_accepted`` when a program fails or none
    prints anything, and what ``ask`` and ``run`` raise.
    """
    answer = await ask(
        _program_messages(goal, files, reasons),
        max_tokens=MAX_PROGRAMS_TOKENS,
        schema=_programs_schema(),
        on_text=on_text,
    )
    with map_exceptions(
        OctoError("The model's programs could not be read.", code="model_output_invalid"), msgspec.DecodeError
    ):
        programs = msgspec.json.decode(answer.encode(), type=_ProgramsAnswer).programs[:MAX_PROGRAMS]
    if not any(program.program.strip() for program in programs):
        raise OctoError("The model wrote no program.", code="model_output_invalid")
    folder = {file.name: file for file in files}
    transcript: list[str] = []
    for number, program in enumerate(programs, start=1):
        name = f"program_{number}.py"
        job_files = (*folder.values(), FileRef(name, text=program.program))
        limits = RunLimits(wall_seconds=PROGRAM_SECONDS)
        result = await run(RunRequest(language="python", command=(name,), files=job_files, limits=limits))
        if result.exit_code != 0 or result.reason:
            raise OctoError(f"{program.title} failed: {_failure_reason(result)}", code="not_accepted")
        # A title line alone, without a line break after it, is a program that printed nothing.
        transcript.append(f"{number}. {program.title}\n{result.stdout.strip()[:MAX_SHOWN_CHARS]}".rstrip())
        for file in result.files[: MAX_FILES - len(folder)]:
            folder[file.name] = file
    if not any("\n" in part for part in transcript):
        raise OctoError("The programs ran but printed nothing.", code="not_accepted")
    return ExecuteResult(
        output="\n\n".join(transcript),
        evidence=Evidence(kind="text", checks=(Check("run", True, f"{len(programs)} programs succeeded"),)),
    )


def _failure_reason(result: RunResult) -> str:
    if result.reason:
        return f"it was stopped by a limit ({result.reason})"
    lines = result.stderr.strip().split("\n")
    return lines[-1][:300] or f"it ended with {result.exit_code}"


def _program_messages(goal: str, files: Sequence[FileRef], reasons: Sequence[str]) -> list[Message]:
    listed = f"\nFiles in the folder: {', '.join(file.name for file in files)}" if files else ""
    refused = f"\nAn earlier result was refused: {' '.join(reasons)[:600]}" if reasons else ""
    return [Message.system(_PROGRAMS_PROMPT), Message.user(f"Goal: {goal}{listed}{refused}")]


def _programs_schema() -> dict[str, object]:
    program = {
        "type": "object",
        "properties": {
            "title": {"type": "string", "minLength": 3, "maxLength": 60},
            "program": {"type": "string", "minLength": 5, "maxLength": MAX_PROGRAM_CHARS},
        },
        "required": ["title", "program"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"programs": {"type": "array", "minItems": 1, "maxItems": MAX_PROGRAMS, "items": program}},
        "required": ["programs"],
        "additionalProperties": False,
    }


def planner_arm(settings: Settings) -> Arm:
    """Return the planner."""
    arm = Arm.built_in(
        "planner",
        "Turns a goal into a plan of steps, each for one arm.",
        calls=calls_of("planner"),
        accepts=("files:none", "files:text", "files:tabular"),
    )

    @arm.operation(kind="read_only")
    async def plan(request: PlanRequest, ctx: Context) -> Plan:
        """Plan a goal."""
        ask = ModelAsk(ctx)
        result = await make_plan(request, ask, is_capable=is_capable_model(settings), on_text=ask.write)
        return msgspec.structs.replace(result, usage=ctx.model.usage)

    @arm.operation
    async def execute(task: Task, ctx: Context) -> ExecuteResult:
        """Reach a goal with a few programs that the executor runs."""
        ask = ModelAsk(ctx)
        return await plan_and_execute(
            goal_with_constraints(task),
            ask,
            bind_run(ctx),
            files=task.context.files,
            reasons=task.context.reasons,
            on_text=ask.write,
        )

    del plan, execute
    return arm


@contextlib.asynccontextmanager
async def planner_service(base: ServiceBase, settings: Settings) -> AsyncGenerator[Service]:
    """Yield the planner service. It keeps no state."""
    yield build_arm(planner_arm(settings), base)
