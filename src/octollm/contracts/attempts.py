"""Attempts: what each call of an arm for a step was given, what it made of it, and what the judge said."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from octollm.contracts.api import PageQuery, TaskFailure
from octollm.contracts.task import Artifact, Budget, Check, Count, Evidence

AttemptStatus = Literal["running", "accepted", "rejected", "failed", "interrupted", "cancelled", "reused"]
MAX_EXCERPT = 4000
"""Characters of a text in an attempt. A longer one is stored as a file, which its digest names."""


class TextExcerpt(msgspec.Struct, frozen=True, omit_defaults=True):
    """A text, or the beginning of a long one.

    ``digest`` is empty when ``text`` is all of it. Otherwise ``GET /tasks/{task_id}/artifacts/{digest}`` returns the
    whole, which has ``length`` characters.
    """

    text: str
    length: int
    digest: str = ""


class AttemptRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the arm was given besides the task's own contract.

    ``inputs`` are the outputs of the steps that it depends on, ``files`` the names of the step's files, ``reasons`` the
    judge's reasons against the attempt before, and ``instructions`` what a person added while the task ran. ``budget``
    and ``deadline`` are those that the task had by then.
    """

    goal: str
    inputs: dict[str, TextExcerpt] = {}
    files: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    budget: Budget = Budget()
    deadline: str | None = None


class AttemptVerdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the judge decided, and why."""

    accepted: bool
    score: float | None = None
    reasons: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()


class AttemptResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of an attempt. ``output`` is ``None`` when the arm returned no result, ``verdict`` without one.

    ``error`` is why it failed.
    """

    output: TextExcerpt | None = None
    artifacts: tuple[Artifact, ...] = ()
    evidence: Evidence | None = None
    verdict: AttemptVerdict | None = None
    error: TaskFailure | None = None


class AttemptView(msgspec.Struct, frozen=True):
    """One attempt at a step.

    ``interrupted``: the task is paused, or was, and another attempt took its place. ``reused``: a fork took its result
    from the task that it was forked from. ``run`` is the fencing token of the worker that made it last. ``tokens`` and
    ``cost_usd`` are what its model calls used, as the ledger settled them.
    """

    step: str
    attempt: int
    arm: str
    title: str
    status: AttemptStatus
    run: int
    started_at: str
    finished_at: str | None
    duration_ms: int | None
    request: AttemptRequest
    outcome: AttemptResult
    tokens: Count
    cost_usd: float
    trace_id: str


class AttemptList(msgspec.Struct, frozen=True):
    """A page of attempts, oldest first. ``cursor`` requests the next page; it is ``None`` on the last."""

    attempts: tuple[AttemptView, ...]
    cursor: str | None = None


class AttemptQuery(PageQuery, frozen=True):
    """A page of attempts, of one ``step`` if it is given."""

    step: Annotated[str, Meta(max_length=255)] = ""


class ForkRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of ``POST /tasks/{task_id}/fork``.

    ``from`` is the step from which the plan runs again. Without it, that is the first one that did not complete.
    """

    from_step: Annotated[str, Meta(max_length=255)] = msgspec.field(name="from", default="")
