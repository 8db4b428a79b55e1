"""The two services that the benchmark puts into an installation: an arm that echoes, and a planner of a fixed plan.

Neither asks a model, so that what is measured is the system around the arms.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator

from octollm import Arm, Context, Task
from octollm.arm import build_arm
from octollm.clock import SystemClock, Uuid7Generator
from octollm.config import Settings, read_settings
from octollm.contracts.services import SERVICES
from octollm.contracts.task import Plan, PlanRequest, PlanStep
from octollm.installation.service_host import tune_garbage_collector
from octollm.rpc.service import Service, ServiceBase

ECHO = "echo"
STEPS = 3

arm = Arm(ECHO, description="Returns the goal of its step.")


@arm.operation
async def execute(task: Task, _ctx: Context) -> str:
    """Return the goal, and the results before it."""
    return " ".join((*task.context.inputs.values(), task.goal))


def planner_arm() -> Arm:
    """Return a planner that answers with the same plan: steps of the echo arm, one after the other."""
    planner = Arm.built_in("planner", "Answers with a fixed plan.", accepts=("files:none",))

    @planner.operation(kind="read_only")
    async def plan(_request: PlanRequest, _ctx: Context) -> Plan:
        return Plan(
            tuple(
                PlanStep(f"s{n}", f"Step {n}", ECHO, f"work {n}", (f"s{n - 1}",) if n > 1 else ())
                for n in range(1, STEPS + 1)
            )
        )

    del plan
    return planner


@contextlib.asynccontextmanager
async def fixed_planner(base: ServiceBase, _settings: Settings) -> AsyncGenerator[Service]:
    """Open the planner as an installation's own."""
    yield build_arm(planner_arm(), base)


async def serve_planner() -> None:
    """Serve the planner in this process until it is killed."""
    from octollm.installation import services  # noqa: PLC0415  brings in every service

    services._load_factory = lambda _name: fixed_planner  # pyright: ignore[reportPrivateUsage]
    clock = SystemClock()
    settings = read_settings(os.environ, tuple(SERVICES))
    async with services.serve_builtin_service(
        "planner", settings, clock=clock, ids=Uuid7Generator(clock), on_wait=lambda _names: None
    ):
        tune_garbage_collector()
        await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve_planner())
