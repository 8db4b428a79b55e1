"""A Pydantic AI agent with a tool, as an arm: ``pip install 'octollm[agents]'``, ``octollm serve lengths:arm``.

Its model calls go to the models service with the authority of the call that it works for, so that they are budgeted
and cancelled with the task. The tool is given the call's context as its dependencies.
"""

from __future__ import annotations

from pydantic_ai import Agent, ModelRetry, RunContext

from octollm import Arm, Context

METRES = {"mm": 0.001, "cm": 0.01, "m": 1.0, "km": 1000.0, "in": 0.0254, "ft": 0.3048, "yd": 0.9144, "mi": 1609.344}

agent = Agent(
    instructions="You convert lengths. Never calculate yourself: use the tool, then answer in one sentence.",
    deps_type=Context,
)


@agent.tool
async def convert(run: RunContext[Context], amount: float, unit: str, into: str) -> float:
    """Convert a length from one unit into another; units are mm, cm, m, km, in, ft, yd and mi."""
    if unit not in METRES or into not in METRES:
        raise ModelRetry(f"Units are {', '.join(METRES)}.")
    await run.deps.progress(50, f"{unit} into {into}")
    return round(amount * METRES[unit] / METRES[into], 6)


arm = Arm.from_agent(agent, name="lengths", description="Converts lengths between units", port=8113)
