"""The judge service: validates code, and accepts or rejects results."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncGenerator

import msgspec

from octollm import Arm, Check, Context, Evidence, ExecuteResult, FileRef, OctoError, Task
from octollm.arm import build_arm
from octollm.config import Settings
from octollm.contracts.operations import AcceptRequest, AcceptResult, ValidateRequest, ValidateResult
from octollm.contracts.service_operations import calls_of
from octollm.lru import LruCache
from octollm.rpc.service import Service, ServiceBase
from octollm.services.arms.adapters import ModelAsk, bind_run, is_capable_model, read_file_text
from octollm.services.arms.judge.acceptance import accept as accept_result
from octollm.services.arms.judge.validation import Validate
from octollm.services.arms.judge.validation import validate as validate_code

MAX_CODE_FILES = 16
"""Python files of one ``execute``."""
MAX_CACHED_VERDICTS = 256


def judge_arm(settings: Settings) -> Arm:
    """Return the judge."""
    arm = Arm.built_in(
        "judge",
        "Checks code by running its tests, and results by their evidence.",
        calls=calls_of("judge"),
        accepts=("files:text",),
    )

    verdicts = VerdictCache()

    @arm.operation(kind="read_only")
    async def validate(request: ValidateRequest, ctx: Context) -> ValidateResult:
        """Say whether code is valid, and passes its tests where there are any."""
        return await verdicts.bind(ctx)(request)

    @arm.operation(kind="read_only")
    async def accept(request: AcceptRequest, ctx: Context) -> AcceptResult:
        """Say whether a step's result is what was asked."""

        async def read_text(file: FileRef) -> str:
            if file.digest in request.texts:
                return request.texts[file.digest]
            return await read_file_text(ctx, file)

        ask = ModelAsk(ctx) if is_capable_model(settings) and ctx.allows("models:chat") else None
        return await accept_result(request, bind_run(ctx), ask, read_text, verdicts.bind(ctx))

    @arm.operation
    async def execute(task: Task, ctx: Context) -> ExecuteResult:
        """Validate the Python files of a task, each with the tests that go with it."""
        return await validate_files(task, ctx)

    del validate, accept, execute
    return arm


class VerdictCache:
    """Valid verdicts on code and tests, by task and content.

    The coder has its solution validated before it answers, and the same bytes come again with the step's result. The
    judge itself ran their tests, so nobody's word is taken for it; another replica, or another task, runs them again.
    """

    def __init__(self) -> None:
        self._verdicts: LruCache[str, ValidateResult] = LruCache(MAX_CACHED_VERDICTS)

    def bind(self, ctx: Context) -> Validate:
        """Return the validation for this call, which runs nothing again that was found valid for its task."""
        run = bind_run(ctx)
        tenant, task_id = ctx.info.tenant, ctx.task_id

        async def validate_once(request: ValidateRequest) -> ValidateResult:
            if not task_id:
                return await validate_code(request, run)
            key = hashlib.sha256(msgspec.json.encode((tenant, task_id, request))).hexdigest()
            verdict = self._verdicts.get(key)
            if verdict is None:
                verdict = await validate_code(request, run)
                # A refusal may come from a limit or an outage, so it is not kept.
                if verdict.is_valid:
                    self._verdicts.put(key, verdict)
            return verdict

        return validate_once


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
