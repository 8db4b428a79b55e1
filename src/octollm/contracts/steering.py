"""Steering: what a person may do to a task that goes on. Pause it, add an instruction, skip a step, or give it more."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

MAX_INSTRUCTION = 4000
"""Characters of one instruction."""
MAX_INSTRUCTIONS = 20
"""Instructions of one task."""
MAX_STEP_NAME = 200
"""Characters of the name of a step."""
MAX_EXTENSION_SECONDS = 86_400.0
"""The latest deadline that a running task may be given, from now."""


class Instruction(msgspec.Struct, frozen=True):
    """What a person told a running task. ``given_at`` is RFC 3339."""

    text: str
    given_by: str
    given_at: str


class InstructionRequest(msgspec.Struct, frozen=True):
    """The body of ``POST /tasks/{task_id}/instructions``."""

    text: Annotated[str, Meta(min_length=1, max_length=MAX_INSTRUCTION)]


class SkipRequest(msgspec.Struct, frozen=True):
    """The body of ``POST /tasks/{task_id}/skip``: the step that the task is to go on without."""

    step: Annotated[str, Meta(min_length=1, max_length=MAX_STEP_NAME)]


class ExtendRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of ``POST /tasks/{task_id}/extend``: new limits, each not below the present one.

    The first three are those of the task's budget. ``deadline`` (RFC 3339) replaces every limit of its time.
    """

    max_tokens: int | None = None
    max_cost_usd: float | None = None
    max_time_seconds: float | None = None
    deadline: str | None = None
