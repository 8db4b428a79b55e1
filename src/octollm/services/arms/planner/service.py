"""The planner over HTTP: a goal becomes a plan, or a few programs that are run at once."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import msgspec

from octollm.arm import Arm, Context, build_arm
from octollm.config import Settings
from octollm.contracts.services import SERVICES
from octollm.contracts.task import ExecuteResult, Plan, PlanRequest, TaskContract
from octollm.rpc.service import Service, ServiceBase
from octollm.services.arms.calling import ModelAsk, bind_run, goal_with_constraints, is_capable_model
from octollm.services.arms.planner.execute import plan_and_execute
from octollm.services.arms.planner.plan import make_plan


def planner_arm(settings: Settings) -> Arm:
    """Return the planner."""
    arm = Arm.built_in(
        "planner",
        "Turns a goal into a plan of steps, each for one arm.",
        SERVICES["planner"].port,
        calls=("models:chat", "executor:run"),
        accepts=("files:none", "files:text", "files:tabular"),
    )

    @arm.operation("plan", kind="read_only")
    async def plan(request: PlanRequest, ctx: Context) -> Plan:
        """Plan a goal."""
        ask = ModelAsk(ctx)
        made = await make_plan(request, ask, is_capable=is_capable_model(settings), on_text=ask.write)
        return msgspec.structs.replace(made, usage=ctx.model.usage)

    @arm.operation("execute")
    async def execute(task: TaskContract, ctx: Context) -> ExecuteResult:
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
    """Yield the planner as a service. It holds nothing."""
    yield build_arm(planner_arm(settings), base)
