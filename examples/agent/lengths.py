"""A Pydantic AI agent with a tool, as an arm: ``pip install 'octollm[agents]'``, ``octollm serve lengths:arm``.

Its model calls go to the models service with the authority of the call that it works for, so that they are budgeted
and cancelled with the task. The tool is given the call's context as its dependencies.
"""

from __future__ import annotations

from typing import Literal

from pydantic_ai import Agent, RunContext

from octollm import Arm, Context

Unit = Literal["millimetres", "centimetres", "metres", "kilometres", "inches", "feet", "yards", "miles"]
METRES: dict[Unit, float] = {
    "millimetres": 0.001,
    "centimetres": 0.01,
    "metres": 1.0,
    "kilometres": 1000.0,
    "inches": 0.0254,
    "feet": 0.3048,
    "yards": 0.9144,
    "miles": 1609.344,
}

agent = Agent(
    instructions="You convert lengths. Never calculate yourself: use the tool, then answer in one sentence.",
    deps_type=Context,
)


@agent.tool
async def convert(run: RunContext[Context], amount: float, unit: Unit, into: Unit) -> float:
    """Convert a length from one unit into another."""
    await run.deps.progress(50, f"{unit} into {into}")
    return round(amount * METRES[unit] / METRES[into], 6)


arm = Arm.from_agent(agent, name="lengths", description="Converts lengths between units")
