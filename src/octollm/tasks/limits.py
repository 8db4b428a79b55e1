"""The limits of a task as pure functions: which are allowed, what they are without a wish, and how they may grow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

import msgspec

from octollm.contracts.steering import MAX_EXTENSION_SECONDS, ExtendRequest
from octollm.contracts.task import Budget
from octollm.errors import FieldError, OctoError

MAX_TOKENS = 100_000_000
MAX_COST_USD = 1e6
MAX_TASK_SECONDS = 3600.0
MAX_RETRIES = 10


def complete_budget(budget: Budget, *, max_tokens: int, max_time_seconds: float) -> Budget:
    """Return a budget with the defaults for what it leaves open; raise ``budget_invalid``."""
    check_budget(budget, "/budget")
    return msgspec.structs.replace(
        budget,
        max_tokens=max_tokens if budget.max_tokens is None else budget.max_tokens,
        max_time_seconds=max_time_seconds if budget.max_time_seconds is None else budget.max_time_seconds,
    )


def check_budget(budget: Budget, pointer: str) -> None:
    """Raise ``budget_invalid`` for a limit that is out of bounds; ``pointer`` is the place of the budget."""
    if budget.max_tokens is not None and not 1 <= budget.max_tokens <= MAX_TOKENS:
        raise _invalid(f"{pointer}/max_tokens", f"From 1 to {MAX_TOKENS} tokens.")
    if budget.max_cost_usd is not None and not 0 < budget.max_cost_usd <= MAX_COST_USD:
        raise _invalid(f"{pointer}/max_cost_usd", f"More than 0 and at most {MAX_COST_USD:.0f} US dollars.")
    if budget.max_time_seconds is not None and not 0 < budget.max_time_seconds <= MAX_TASK_SECONDS:
        raise _invalid(f"{pointer}/max_time_seconds", f"More than 0 and at most {MAX_TASK_SECONDS:g} seconds.")
    if budget.max_retries is not None and not 0 <= budget.max_retries <= MAX_RETRIES:
        raise _invalid(f"{pointer}/max_retries", f"From 0 to {MAX_RETRIES} retries.")


def parse_deadline(text: str, now: float) -> float:
    """Return a deadline in epoch seconds; raise ``deadline_invalid`` for one in the past, or that is not a time."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise _invalid("/deadline", "A time as in RFC 3339, e.g. 2030-01-02T03:04:05Z.", "deadline_invalid") from error
    if at.tzinfo is None:
        raise _invalid("/deadline", "The time needs an offset, e.g. Z.", "deadline_invalid")
    try:
        seconds = at.timestamp()
    except (OverflowError, ValueError) as error:
        raise _invalid("/deadline", "The time is out of range.", "deadline_invalid") from error
    if seconds <= now:
        raise _invalid("/deadline", "The deadline is in the past.", "deadline_invalid")
    return seconds


@dataclass(frozen=True, slots=True)
class TaskLimits:
    """What a task may use. ``deadline_at`` is when it ends (epoch seconds), ``deadline`` what its client has set."""

    budget: Budget
    deadline_at: float | None
    deadline: str | None


def extend_limits(present: TaskLimits, request: ExtendRequest, now: float) -> TaskLimits:
    """Return the limits after an extension, which may lower none: what is spent always fits.

    Raises ``budget_invalid`` and ``deadline_invalid`` with the place of the fault.
    """
    check_budget(Budget(request.max_tokens, request.max_cost_usd, request.max_time_seconds), "")
    budget, deadline_at, deadline = present.budget, present.deadline_at, present.deadline
    for name in ("max_tokens", "max_cost_usd", "max_time_seconds"):
        wanted, had = getattr(request, name), getattr(budget, name)
        if wanted is None:
            continue
        # Without a limit so far, any limit would be a lower one.
        if wanted < (math.inf if had is None else had):
            has = "no such limit" if had is None else f"{had:g}"
            raise _invalid(f"/{name}", f"A limit may only be raised; the task has {has}.")
        budget = msgspec.structs.replace(budget, **{name: wanted})
    if deadline_at is not None and budget.max_time_seconds != present.budget.max_time_seconds:
        deadline_at += (budget.max_time_seconds or 0.0) - (present.budget.max_time_seconds or 0.0)
        if deadline is not None:
            deadline_at = min(deadline_at, datetime.fromisoformat(deadline).timestamp())
    if request.deadline is not None and request.deadline != deadline:
        wanted_at = parse_deadline(request.deadline, now)
        if deadline_at is not None and wanted_at < deadline_at:
            raise _invalid("/deadline", "A deadline may only be put off; the task ends later.", "deadline_invalid")
        if wanted_at > now + MAX_EXTENSION_SECONDS:
            hours = MAX_EXTENSION_SECONDS / 3600
            raise _invalid("/deadline", f"At most {hours:g} hours from now.", "deadline_invalid")
        deadline_at, deadline = wanted_at, request.deadline
    return TaskLimits(budget, deadline_at, deadline)


def _invalid(pointer: str, detail: str, code: str = "budget_invalid") -> OctoError:
    return OctoError(detail, code=code, field_errors=(FieldError(pointer, detail),))
