"""Approvals: when a task waits for a person, what it waits for, and what the person decided."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

ApprovalKind = Literal["plan", "step", "spending"]
ApprovalStatus = Literal["pending", "approved", "rejected", "expired", "cancelled"]
Decision = Literal["approve", "reject"]

MAX_COMMENT = 2000
"""Characters of a person's comment."""
MAX_APPROVAL_RULES = 32
"""Names in one policy."""
EVERY_STEP = "*"
SPENDING_APPROVAL = "spending"
"""Id of the approval of further spending; a task has one at most."""


class ApprovalPolicy(msgspec.Struct, frozen=True, omit_defaults=True):
    """When a task waits for a person. That of a task adds to the installation's, and cannot loosen it.

    ``plan``: before the first step of a plan. ``steps``: before each step of an arm named here, or of an arm that may
    make a call named here, for example ``executor:http``; ``*`` is every step. ``cost_above_usd``: before a step that
    starts when the task has used more than that. ``expires_seconds``: if nobody decides in this time, the task fails.
    """

    plan: bool = False
    steps: tuple[str, ...] = ()
    cost_above_usd: float | None = None
    expires_seconds: float | None = None


class ApprovalView(msgspec.Struct, frozen=True, omit_defaults=True):
    """One approval of a task: why it is needed, and what was decided, by whom.

    ``approval_id`` is unique within the task: the id of the step, ``plan`` (``plan-2`` after a replan) or ``spending``.
    ``goals`` are the goals that the person changed, by step.
    """

    approval_id: str
    kind: ApprovalKind
    reason: str
    status: ApprovalStatus
    requested_at: str
    expires_at: str
    step: str = ""
    decided_at: str | None = None
    decided_by: str = ""
    comment: str = ""
    goals: dict[str, str] = {}


class PendingApproval(msgspec.Struct, frozen=True):
    """An approval that is to be decided, with the task that waits for it."""

    task_id: str
    goal: str
    approval: ApprovalView


class ApprovalList(msgspec.Struct, frozen=True):
    """The pending approvals of a tenant, those that expire first at the top."""

    approvals: tuple[PendingApproval, ...]


class ApprovalDecision(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of ``POST /tasks/{task_id}/approval``.

    Without ``approval_id`` it decides every pending approval of the task. ``goals`` replaces the goals of steps that
    have not started; only an approval of them may change them. A rejection ends the task with ``comment`` as the
    reason.
    """

    decision: Decision
    approval_id: Annotated[str, Meta(max_length=255)] = ""
    comment: Annotated[str, Meta(max_length=MAX_COMMENT)] = ""
    goals: dict[str, str] = {}
