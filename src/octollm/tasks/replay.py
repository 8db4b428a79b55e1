"""What a replay decided differently from the recording of its task, as pure functions.

The first difference of a step explains those after it, so that only the first is reported, and nothing of the steps
that depend on it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from octollm.contracts.attempts import AttemptStatus, AttemptView
from octollm.contracts.recording import TaskRecording
from octollm.contracts.task import PlanStep

DivergenceKind = Literal["plan", "model_request", "request", "output", "verdict", "outcome", "result"]
PLAN = "plan"
"""The place of the plan; every other place is that of a step."""
MAX_SHOWN = 300
"""Characters of what was recorded or decided, in a difference."""
_NOT_MADE = "not made"
_ENDED_EARLY = (_NOT_MADE, "cancelled")
"""What is replayed of an attempt that the end of the task cut off, or kept from being made."""
_INTERVENED: Collection[AttemptStatus] = ("interrupted", "cancelled")


class Divergence(msgspec.Struct, frozen=True):
    """Where the code of today decides differently.

    ``step`` is ``plan`` for the plan and empty for the result of the task. ``attempt`` is 0 where it does not matter.
    ``member`` is what differs, for example ``goal``.
    """

    kind: DivergenceKind
    step: str
    attempt: int
    member: str
    recorded: str
    replayed: str

    @property
    def place(self) -> str:
        """Return where it is, in words."""
        if not self.step:
            return "the result of the task"
        if self.step == PLAN:
            return "the plan"
        return f"step {self.step}, attempt {self.attempt}" if self.attempt else f"step {self.step}"


def find_divergences(
    recorded: TaskRecording,
    replayed: TaskRecording,
    model_requests: Sequence[Divergence],
    not_replayed: Collection[str] = (),
) -> tuple[Divergence, ...]:
    """Return the differences in the order of the plan.

    ``model_requests`` are those that the recording does not have an answer to, or that the replay did not make;
    ``not_replayed`` are the steps whose results come from the recording.
    """
    by_step: dict[str, Divergence] = {}
    for each in model_requests:
        by_step.setdefault(each.step, each)
    if PLAN in by_step:
        return (by_step[PLAN],)
    plan = _compare_plans(recorded, replayed)
    if plan is not None:
        return (plan,)
    found: list[Divergence] = []
    missing: list[Divergence] = []
    diverged: set[str] = set()
    steps = () if recorded.plan is None else recorded.plan.steps
    for step in steps:
        if diverged.intersection(step.depends_on):
            diverged.add(step.id)
            continue
        difference = None if step.id in not_replayed else _compare_step(step, recorded, replayed, by_step.get(step.id))
        if difference is not None:
            (missing if difference.replayed in _ENDED_EARLY else found).append(difference)
            diverged.add(step.id)
    # A step that fails ends the task, and so those beside it.
    found = found or missing
    # Also of steps that a new plan replaced.
    known = {step.id for step in steps}
    found += [each for name, each in by_step.items() if name not in known]
    if not found and recorded.status != "cancelled":
        found += _compare_results(recorded, replayed)
    return tuple(found)


def _compare_plans(recorded: TaskRecording, replayed: TaskRecording) -> Divergence | None:
    if recorded.plan is None or replayed.plan is None:
        if recorded.plan is replayed.plan or recorded.status == "cancelled":
            return None
        before, now = ("no plan" if each.plan is None else "a plan" for each in (recorded, replayed))
        why = "" if replayed.error is None else f": {replayed.error.detail}"
        return Divergence("plan", PLAN, 0, "steps", before, _show(now + why))
    before, now = recorded.plan.steps, replayed.plan.steps
    for old, new in zip(before, now, strict=False):
        for member in PlanStep.__struct_fields__:
            # A person may have changed a goal, which the approvals have.
            if getattr(old, member) != getattr(new, member):
                shown = f"{old.id}: {member}"
                return Divergence("plan", PLAN, 0, shown, _show(getattr(old, member)), _show(getattr(new, member)))
    if len(before) != len(now):
        return Divergence("plan", PLAN, 0, "steps", _names(before), _names(now))
    return None


def _names(steps: Iterable[PlanStep]) -> str:
    return _show(", ".join(step.id for step in steps))


def _compare_step(
    step: PlanStep, recorded: TaskRecording, replayed: TaskRecording, model_request: Divergence | None
) -> Divergence | None:
    olds = [each for each in recorded.attempts if each.step == step.id]
    news = {each.attempt: each for each in replayed.attempts if each.step == step.id}
    for old in olds:
        if old.status in _INTERVENED:
            # A person cut it off; what comes after it depends on when.
            return model_request
        new = news.pop(old.attempt, None)
        if new is None:
            return model_request or Divergence("outcome", step.id, old.attempt, "status", old.status, _NOT_MADE)
        difference = _compare_requests(old, new)
        if difference is None and new.status == "cancelled" and model_request is None:
            difference = Divergence("outcome", step.id, old.attempt, "status", old.status, new.status)
        if difference is not None:
            return difference
        if model_request is not None and model_request.attempt in (0, old.attempt):
            return model_request
        difference = _compare_outcomes(old, new)
        if difference is not None:
            return difference
    if model_request is not None:
        return model_request
    for new in news.values():
        return Divergence("outcome", step.id, new.attempt, "status", _NOT_MADE, new.status)
    return None


def _compare_requests(old: AttemptView, new: AttemptView) -> Divergence | None:
    before, now = old.request, new.request
    members = ("goal", "inputs", "files", "reasons", "instructions")
    if old.arm != new.arm:
        return Divergence("request", old.step, old.attempt, "arm", old.arm, new.arm)
    for member in members:
        if getattr(before, member) != getattr(now, member):
            shown = _show(getattr(before, member)), _show(getattr(now, member))
            return Divergence("request", old.step, old.attempt, member, *shown)
    return None


def _compare_outcomes(old: AttemptView, new: AttemptView) -> Divergence | None:
    before, now = old.outcome, new.outcome

    def differ(kind: DivergenceKind, member: str, first: object, second: object) -> Divergence | None:
        if first == second:
            return None
        return Divergence(kind, old.step, old.attempt, member, _show(first), _show(second))

    def name_files(view: AttemptView) -> Mapping[str, str]:
        return {each.name: each.digest for each in view.outcome.artifacts}

    def code(view: AttemptView) -> str:
        return "" if view.outcome.error is None else view.outcome.error.code

    found = (
        differ("outcome", "error", code(old), code(new))
        or differ("output", "output", before.output, now.output)
        or differ("output", "files", name_files(old), name_files(new))
    )
    if found is not None or before.verdict is None or now.verdict is None:
        return found or differ("verdict", "verdict", before.verdict, now.verdict)
    for member in ("accepted", "reasons", "score"):
        found = differ("verdict", member, getattr(before.verdict, member), getattr(now.verdict, member))
        if found is not None:
            return found
    checks = [{each.name: each.passed for each in verdict.checks} for verdict in (before.verdict, now.verdict)]
    return differ("verdict", "checks", *checks) or differ("outcome", "status", _settled(old), _settled(new))


def _settled(view: AttemptView) -> str:
    # A fork took the result of the task before it.
    return "accepted" if view.status == "reused" else view.status


def _compare_results(recorded: TaskRecording, replayed: TaskRecording) -> Iterable[Divergence]:
    def values(each: TaskRecording) -> Mapping[str, object]:
        return {
            "status": each.status,
            "error": "" if each.error is None else each.error.code,
            "output": each.output,
            "files": {file.name: file.digest for file in each.artifacts},
        }

    before, now = values(recorded), values(replayed)
    for member, value in before.items():
        if value != now[member]:
            yield Divergence("result", "", 0, member, _show(value), _show(now[member]))
            return


def _show(value: object) -> str:
    """Return a value for a reader, on one line; the beginning of a long one, and where two may differ is not said."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.to_builtins(value)
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}…"
