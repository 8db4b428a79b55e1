"""Small artifacts travel with the result of a step; the orchestrator stores them, and takes no arm's word for them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from enrolled import enrolled
from orchestrator_kit import OrchestratorHarness, Script, orchestrator_kit
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from octollm.arm import Arm, Context
from octollm.contracts.api import TaskView
from octollm.contracts.operations import AcceptRequest, AcceptResult
from octollm.contracts.task import Artifact, ExecuteResult, Plan, PlanStep, StepResult, Task
from octollm.tasks.calls import MAX_INLINE_BYTES

TEXT = "# Report\n"
DIGEST = hashlib.sha256(TEXT.encode()).hexdigest()


async def uploads(orch: OrchestratorHarness) -> float:
    lines = (await orch.harness.send("orchestrator", "GET", "/metrics")).body.decode().splitlines()
    mine = [line for line in lines if line.startswith("octollm_requests_total{") and '"files.store"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in mine)


async def bodies(orch: OrchestratorHarness, view: TaskView) -> dict[str, bytes]:
    """Return the artifacts of a task by name, as its owner downloads them."""
    found: dict[str, bytes] = {}
    for artifact in view.artifacts:
        answer = await orch.send("GET", f"/tasks/{view.task_id}/artifacts/{artifact.digest}")
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"].partition(";")[0] == artifact.media_type
        found[artifact.name] = answer.body
    return found


async def test_texts_need_no_upload_and_everything_else_is_uploaded(orch: OrchestratorHarness) -> None:
    large = "x" * (MAX_INLINE_BYTES + 1)
    contents: dict[str, str | bytes] = {
        "report.md": TEXT,
        "image.bin": b"\xff\xfe",
        "näme.txt": "odd",
        "large.txt": large,
    }

    async def execute(_task: Task, ctx: Context) -> ExecuteResult:
        for name, content in contents.items():
            await ctx.artifacts.write(name, content)
        return ExecuteResult("done", artifacts=ctx.artifacts.list())

    judged: list[AcceptRequest] = []

    def accept(request: AcceptRequest) -> AcceptResult:
        judged.append(request)
        return AcceptResult(accepted=True, score=1.0)

    orch.script.execute, orch.script.accept = execute, accept
    view = await orch.run({"goal": "do it"})
    assert view.status == "completed", view.error
    encoded = {name: body.encode() if isinstance(body, str) else body for name, body in contents.items()}
    assert await bodies(orch, view) == encoded
    assert await uploads(orch) == 3
    assert judged[0].texts[DIGEST] == TEXT
    history = msgspec.json.encode(await orch.history(view.task_id))
    assert b'"texts"' not in history


async def test_an_artifact_is_stored_before_another_service_can_look_for_it(orch: OrchestratorHarness) -> None:
    async def execute(_task: Task, ctx: Context) -> ExecuteResult:
        await ctx.artifacts.write("report.md", TEXT)
        await ctx.artifacts.store()
        assert await uploads(orch) == 1
        return ExecuteResult("done", artifacts=ctx.artifacts.list())

    orch.script.execute = execute
    view = await orch.run({"goal": "do it"})
    assert await bodies(orch, view) == {"report.md": TEXT.encode()}
    assert await uploads(orch) == 1


async def test_an_artifact_that_the_result_leaves_out_is_stored_all_the_same(orch: OrchestratorHarness) -> None:
    async def execute(_task: Task, ctx: Context) -> ExecuteResult:
        return ExecuteResult((await ctx.artifacts.write("report.md", TEXT)).digest)

    orch.script.execute = execute
    view = await orch.run({"goal": "do it"})
    answer = await orch.send("GET", f"/files/{view.output}")
    assert (answer.status, answer.body) == (200, TEXT.encode())


async def test_a_direct_caller_gets_a_result_whose_artifacts_are_stored(orch: OrchestratorHarness) -> None:
    async def execute(_task: Task, ctx: Context) -> ExecuteResult:
        await ctx.artifacts.write("report.md", TEXT)
        return ExecuteResult("done", artifacts=ctx.artifacts.list())

    orch.script.execute = execute
    body = {"aud": "coder", "scope": "coder:execute", "lifetime_seconds": 60}
    token = msgspec.json.decode((await orch.send("POST", "/tokens", body)).body)["access_token"]
    answer = await orch.harness.send("coder", "POST", "/execute", token=token, body={"goal": "do it"})
    result = msgspec.json.decode(answer.body)
    assert result["artifacts"][0]["digest"] == DIGEST
    assert "texts" not in result
    assert await uploads(orch) == 1


def forged(texts: dict[str, str]) -> Starlette:
    """Return a coder that answers with one artifact and these texts."""

    async def execute(_request: Request) -> Response:
        artifact = {"name": "report.md", "digest": DIGEST, "size": len(TEXT), "media_type": "text/markdown"}
        return JSONResponse({"output": "done", "artifacts": [artifact], "texts": texts})

    return Starlette(routes=[Route("/execute", execute, methods=["POST"])])


@pytest.mark.parametrize(
    ("texts", "code"), [({DIGEST: TEXT}, None), ({DIGEST: "another text"}, "peer_protocol")], ids=["honest", "forged"]
)
async def test_a_text_that_is_not_the_artifacts_is_refused(
    tmp_path: Path, texts: dict[str, str], code: str | None
) -> None:
    async with orchestrator_kit(tmp_path, Script(), coder=forged(texts)) as orch:
        view = await orch.run({"goal": "do it", "budget": {"max_retries": 0}})
        assert (view.error.code if view.error else None) == code
        stored = await orch.send("GET", f"/files/{DIGEST}")
        assert stored.status == (200 if code is None else 404)


@pytest.mark.parametrize(("calls", "code"), [(["files:write"], None), ([], "authority_missing")])
async def test_an_arm_that_may_not_write_files_leaves_none(
    orch: OrchestratorHarness, calls: list[str], code: str | None
) -> None:
    arm = Arm("weather", description="Forecasts", calls=calls)

    @arm.operation
    async def execute(_task: Task, _ctx: Context) -> ExecuteResult:
        artifact = Artifact("report.md", DIGEST, len(TEXT), "text/markdown")
        return StepResult("done", artifacts=(artifact,), texts={DIGEST: TEXT})

    del execute
    orch.script.plan = lambda request: Plan((PlanStep("s1", "Do it", "weather", request.goal),))
    async with enrolled(orch, arm):
        view: Any = await orch.run({"goal": "do it", "budget": {"max_retries": 0}})
    assert (view.error.code if view.error else None) == code
    assert (await orch.send("GET", f"/files/{DIGEST}")).status == (200 if code is None else 404)
