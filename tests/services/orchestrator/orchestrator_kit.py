"""A real orchestrator over real HTTP, with small arms whose answers a test sets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette

from octollm.arm import Arm, Context, build_arm
from octollm.config import read_settings
from octollm.contracts.api import TaskView
from octollm.contracts.auth import TokenResponse
from octollm.contracts.operations import AcceptRequest, AcceptResult
from octollm.contracts.services import SERVICES
from octollm.contracts.task import ExecuteResult, Plan, PlanRequest, PlanStep, Task
from octollm.rpc.http1_client import Http1Client
from octollm.rpc.http_client import HttpResponse
from octollm.rpc.service import Service, ServiceBase
from octollm.services.memory.service import memory_service
from octollm.services.orchestrator.service import orchestrator_service
from octollm.storage import MemoryServers, open_redis
from octollm.testing.harness import Harness

LOCAL_KEY = "octo_local_test-secret"
FINAL = ("completed", "failed", "cancelled")

Execute = Callable[[Task, Context], Awaitable[ExecuteResult]]


@dataclass
class Script:
    """What the arms of a test do."""

    plan: Callable[[PlanRequest], Plan] | None = None
    execute: Execute | None = None
    accept: Callable[[AcceptRequest], AcceptResult] = lambda _request: AcceptResult(accepted=True, score=1.0)
    planned: list[PlanRequest] = field(default_factory=list)
    executed: list[Task] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


def one_step(request: PlanRequest) -> Plan:
    names = tuple(file.name for file in request.context.files)
    return Plan((PlanStep("s1", "Do it", "coder", request.goal, files=names),))


async def done(contract: Task, ctx: Context) -> ExecuteResult:
    await ctx.emit(f"working on {contract.goal}")
    return ExecuteResult(output=f"done: {contract.goal}")


def arms(script: Script) -> list[Arm]:
    planner = Arm.built_in("planner", "plans", accepts=["files:none"])
    coder = Arm.built_in("coder", "codes", calls=["models:chat", "judge:validate", "files:write"])
    judge = Arm.built_in("judge", "judges")

    @planner.operation(kind="read_only")
    async def plan(body: PlanRequest, ctx: Context) -> Plan:
        del ctx
        script.planned.append(body)
        return (script.plan or one_step)(body)

    @coder.operation
    async def execute(body: Task, ctx: Context) -> ExecuteResult:
        script.executed.append(body)
        try:
            return await (script.execute or done)(body, ctx)
        except asyncio.CancelledError:
            script.cancelled.append(body.goal)
            raise

    @judge.operation(kind="read_only")
    async def accept(body: AcceptRequest, ctx: Context) -> AcceptResult:
        del ctx
        return script.accept(body)

    del plan, execute, accept
    return [planner, coder, judge]


class OrchestratorHarness:
    """The orchestrator and its small arms, and a client with the local user's authority."""

    def __init__(self, harness: Harness, script: Script, home: Path) -> None:
        self.harness = harness
        self.home = home
        self.script = script
        self.bearer = ""

    async def login(self, credential: str = LOCAL_KEY) -> str:
        signer = self.harness.base("reflex").identity.signer()
        answer = await self.harness.send(
            "orchestrator",
            "POST",
            "/token",
            token=signer.sign_token("orchestrator"),
            body={"subject_token": credential},
        )
        assert answer.status == 200, answer.body
        return msgspec.json.decode(answer.body, type=TokenResponse).access_token

    async def send(self, method: str, path: str, body: object = None, **headers: str) -> HttpResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.harness.send("orchestrator", method, path, token=self.bearer, body=body, headers=named)

    async def submit(self, body: dict[str, Any], **headers: str) -> TaskView:
        answer = await self.send("POST", "/tasks", body, **headers)
        assert answer.status == 201, answer.body
        return msgspec.json.decode(answer.body, type=TaskView)

    async def task(self, task_id: str) -> TaskView:
        answer = await self.send("GET", f"/tasks/{task_id}")
        assert answer.status == 200, answer.body
        return msgspec.json.decode(answer.body, type=TaskView)

    async def finished(self, task_id: str, seconds: float = 20) -> TaskView:
        async with asyncio.timeout(seconds):
            while (view := await self.task(task_id)).status not in FINAL:
                await asyncio.sleep(0.02)
        return view

    async def run(self, body: dict[str, Any]) -> TaskView:
        return await self.finished((await self.submit(body)).task_id)

    async def history(self, task_id: str) -> list[dict[str, Any]]:
        answer = await self.send("GET", f"/tasks/{task_id}/history?limit=500")
        return msgspec.json.decode(answer.body)["events"]


def problem(answer: HttpResponse) -> dict[str, Any]:
    assert answer.headers["content-type"].startswith("application/problem+json"), answer
    return msgspec.json.decode(answer.body)


@contextlib.asynccontextmanager
async def opened_arm(arm: Arm, base: ServiceBase, app: Starlette | None = None) -> AsyncGenerator[Service]:
    """Open an arm; with ``app`` something else answers in its place, under its name and key."""
    service = build_arm(arm, base)
    yield service if app is None else replace(service, app=app)


@contextlib.asynccontextmanager
async def orchestrator_kit(
    home: Path, script: Script, *, coder: Starlette | None = None, **environment: str
) -> AsyncGenerator[OrchestratorHarness]:
    settings = read_settings({"OCTOLLM_HOME": str(home), **environment}, tuple(SERVICES))
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(Http1Client())
        redis = await stack.enter_async_context(open_redis(settings.redis_url, servers=MemoryServers()))
        harness = Harness(http)
        service = orchestrator_service(
            harness.base("orchestrator"),
            settings,
            redis=redis,
            root_key=harness.root,
            service_keys={name: key.public for name, key in harness.keys.items()},
            local_key=LOCAL_KEY,
        )
        await stack.enter_async_context(harness.serve(service))
        await stack.enter_async_context(harness.serve(memory_service(harness.base("memory"), settings)))
        for arm in arms(script):
            app = coder if arm.name == "coder" else None
            await stack.enter_async_context(harness.serve(opened_arm(arm, harness.base(arm.name), app)))
        found = OrchestratorHarness(harness, script, home)
        found.bearer = await found.login()
        yield found
