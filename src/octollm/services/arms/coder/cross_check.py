"""The strategy for small models, whose tests and code are both unreliable: differential testing of independent solutions on examples and generated inputs (self-consistency), which accepts by agreement."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import msgspec

from octollm.contracts.operations import RunLimits, RunRequest, RunResult
from octollm.contracts.task import FileRef
from octollm.services.arms.coder.examples import Example
from octollm.services.arms.coder.probe_program import MARKER

Run = Callable[[RunRequest], Awaitable[RunResult]]
"""The executor's ``run``."""

_PROGRAM = "octollm_probe_program.py"
_PROBE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class SolutionProbe:
    """What one solution made of the examples, in their order."""

    passed: tuple[bool, ...]
    outputs: tuple[str, ...]


async def probe_solutions(
    solutions: Sequence[str], examples: Sequence[Example], name: str, run: Run
) -> list[SolutionProbe | None]:
    """Return the outcome of each solution; ``None`` for one that ended the program or took too long.

    Each runs apart from the others, so that one without an end spoils only itself. Raises what ``run`` raises.
    """
    return [await _probe_one(solution, examples, name, run) for solution in solutions]


async def _probe_one(solution: str, examples: Sequence[Example], name: str, run: Run) -> SolutionProbe | None:
    asked = [[example.call, example.expected, example.kind] for example in examples]
    result = await run(
        RunRequest(
            language="python",
            command=(_PROGRAM, name, "candidate"),
            files=(
                FileRef("candidate.py", text=solution),
                FileRef("examples.json", text=msgspec.json.encode(asked).decode()),
                FileRef(_PROGRAM, text=files(__package__ or "").joinpath("probe_program.py").read_text("utf-8")),
            ),
            limits=RunLimits(wall_seconds=_PROBE_SECONDS),
        )
    )
    lines = [line for line in result.stdout.split("\n") if line.startswith(MARKER)]
    if not lines:
        return None
    try:
        found = msgspec.json.decode(lines[-1].removeprefix(MARKER).encode(), type=dict[str, list[tuple[bool, str]]])
    except msgspec.DecodeError:
        return None
    rows = found.get("candidate", [])
    if len(rows) != len(examples):
        return None
    return SolutionProbe(tuple(row[0] for row in rows), tuple(row[1] for row in rows))
