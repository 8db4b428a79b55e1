"""The judge service: validates code, and accepts or rejects results."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from octollm import Arm, Check, Context, Evidence, ExecuteResult, FileRef, OctoError, Task
from octollm.arm import build_arm
from octollm.config import Settings
from octollm.contracts.operations import AcceptRequest, AcceptResult, ValidateRequest, ValidateResult
from octollm.contracts.service_operations import calls_of
from octollm.rpc.service import Service, ServiceBase
from octollm.services.arms.adapters import ModelAsk, bind_run, is_capable_model, read_file_text
from octollm.services.arms.judge.acceptance import accept as accept_result
from octollm.services.arms.judge.validation import validate as validate_code

MAX_CODE_FILES = 16
"""Python files of one ``execute``."""


def judge_arm(settings: Settings) -> Arm:
    """Return the judge."""
    arm = Arm.built_in(
        "judge",
        "Checks code by running its tests, and results by their evidence.",
        calls=calls_of("judge"),
        accepts=("files:text",),
    )

    @arm.operation(kind="read_only")
    async def validate(request: ValidateRequest, ctx: Context) -> ValidateResult:
        """Say whether code is valid, and passes its tests where there are any."""
        return await validate_code(request, bind_run(ctx))

    @arm.operation(kind="read_only")
    async def accept(request: AcceptRequest, ctx: Context) -> AcceptResult:
        """Say whether a step's result is what was asked."""

        async def read_file(digest: str) -> bytes:
            if digest in request.texts:
                return request.texts[digest].encode()
            return await ctx.artifacts.read(FileRef(digest[:12], digest=digest))

        ask = ModelAsk(ctx) if is_capable_model(settings) and ctx.allows("models:chat") else None
        return await accept_result(request, bind_run(ctx), ask, read_file)

    @arm.operation
    async def execute(task: Task, ctx: Context) -> ExecuteResult:
        """Validate the Python files of a task, each with the tests that go with it."""
        return await validate_files(task, ctx)

    del validate, accept, execute
    return arm


async def validate_files(task: Task, ctx: Context) -> ExecuteResult:
    """Validate every module among a task's files; the output has a verdict for each.

    A file whose name begins with ``test`` has the tests of the module that its name contains. Raises ``file_invalid``
    without a module to check, and what reading and running raise.
    """
    names = [file for file in task.context.files if file.name.endswith(".py")]
    if len(names) > MAX_CODE_FILES:
        raise OctoError(f"The judge checks at most {MAX_CODE_FILES} files at a time.", code="file_invalid")
    texts = {file.name: await read_file_text(ctx, file) for file in names}
    tests = {name: text for name, text in texts.items() if name.startswith("test")}
    modules = {name: text for name, text in texts.items() if name not in tests}
    if not modules:
        raise OctoError("The judge needs a Python file to check among the task's files.", code="file_invalid")
    verdicts: list[str] = []
    checks: list[Check] = []
    for number, (name, code) in enumerate(modules.items()):
        await ctx.progress(100 * number / len(modules), name)
        own = next((test for test in tests if name.removesuffix(".py") in test), "")
        request = ValidateRequest(code, "python", name, tests.get(own, ""), own or "test_solution.py")
        verdict = await validate_code(request, bind_run(ctx))
        checks.extend(verdict.checks)
        verdict_text = "valid" if verdict.is_valid else "not valid"
        verdicts.append("\n".join((f"{name}: {verdict_text}", *(f"- {reason}" for reason in verdict.reasons))))
    return ExecuteResult(output="\n".join(verdicts), evidence=Evidence(kind="text", checks=tuple(checks)))


@contextlib.asynccontextmanager
async def judge_service(base: ServiceBase, settings: Settings) -> AsyncGenerator[Service]:
    """Yield the judge service. It keeps no state."""
    yield build_arm(judge_arm(settings), base)
