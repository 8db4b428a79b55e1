"""A task's progress, reduced from its updates: the state of its plan, and a line for each thing that happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, cast

from octollm.client import Update
from octollm.contracts.api import TaskView
from octollm.contracts.task import Budget, StepStatus, TaskStatus, Usage

MAX_TEXT_CHARS = 8 * 1024
"""Characters at the end of a step's text that are kept for showing."""
PLAN = "plan"
"""The step of the text that the planner writes."""

Tone = Literal["plain", "title", "step", "good", "bad", "warn", "quiet"]


@dataclass(frozen=True, slots=True)
class ProgressLine:
    """A line of output and its style. A ``notice`` says what the plan's tree does not show, or not for long."""

    text: str
    tone: Tone = "plain"
    is_notice: bool = False


@dataclass(slots=True)
class StepProgress:
    """A step of the plan. Times are in seconds since the epoch, ``None`` where unknown."""

    step: str
    title: str = ""
    arm: str = ""
    depends_on: tuple[str, ...] = ()
    status: StepStatus = "pending"
    attempt: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    message: str = ""
    """What the arm last said about its progress, such as ``chunk 3 of 12``."""
    usage: Usage = field(default_factory=Usage)
    score: float | None = None
    needs_approval: bool = False


@dataclass(frozen=True, slots=True)
class SubTaskBranch:
    """A sub-task, ``depth`` generations below the task that is shown."""

    task_id: str
    goal: str
    status: TaskStatus
    progress: float
    depth: int = 1


_FIRST_STATES: dict[str, TaskStatus] = {
    "task.accepted": "accepted",
    "task.planning": "planning",
    "task.started": "running",
}


@dataclass(slots=True)
class TaskProgress:
    """The state of a task, reduced from its updates: ``progress`` is 0 to 100, ``steps`` are those of its plan."""

    status: TaskStatus | Literal[""] = ""
    progress: float = 0.0
    goal: str = ""
    steps: dict[str, StepProgress] = field(default_factory=dict[str, StepProgress])
    texts: dict[str, str] = field(default_factory=dict[str, str])
    """The end of the text that each running step has written."""
    subtasks: tuple[SubTaskBranch, ...] = ()
    started_at: float | None = None
    finished_at: float | None = None
    deadline_at: float | None = None
    budget: Budget = field(default_factory=Budget)
    usage: Usage | None = None

    def apply(self, update: Update) -> list[ProgressLine]:
        """Apply an update; return the lines that describe it, none for a token."""
        if update.type == "token":
            self._apply_token(update)
            return []
        self.progress = max(self.progress, update.progress)
        data, at = update.data, parse_time(update.timestamp)
        match str(data.get("event_type", "")):
            case "task.accepted" | "task.planning" | "task.started" as event:
                self.status = _FIRST_STATES[event]
                self.goal = _text(data, "goal") or self.goal
                self.started_at = self.started_at or at
                return []
            case "task.planning":
                self.status = "planning"
                return []
            case "task.planned" | "task.replanned" as event:
                self.status = "planning"
                return self._apply_plan(data, is_repeat=event == "task.replanned")
            case "task.waiting":
                # While other steps run, the task itself goes on.
                self.status = "running" if data.get("status") == "running" else "waiting"
                waiting = {_text(each, "approval_id") for each in _dicts(data.get("approvals"))}
                for step in self.steps.values():
                    step.needs_approval = step.step in waiting
                return [_notice(f"Needs approval: {_text(data, 'reason')}", "warn")]
            case "task.approved":
                self.status = "running"
                for step in self.steps.values():
                    step.needs_approval = False
                comment = f": {_text(data, 'comment')}" if data.get("comment") else ""
                return [_notice(f"✓ approved by {_text(data, 'decided_by')}{comment}", "good")]
            case "task.completed" | "task.failed" | "task.cancelled" as event:
                return self._apply_end(event, data, at)
            case "task.progress":
                return self._apply_message(data)
            case "step.started" | "step.completed" | "step.failed" as event:
                return self._apply_step(event, data, at)
            case event:
                return self._apply_steering(event, data)

    def apply_view(self, view: TaskView, subtasks: Sequence[SubTaskBranch] = ()) -> None:
        """Apply what only the task itself says: what was used of its budget, its limits, and its sub-tasks."""
        self.goal = self.goal or view.goal
        self.budget, self.usage, self.subtasks = view.budget, view.usage, tuple(subtasks)
        self.deadline_at = parse_time(view.deadline or "")
        self.started_at = self.started_at or parse_time(view.created_at)

    @property
    def running(self) -> list[StepProgress]:
        """Return the running steps."""
        return [step for step in self.steps.values() if step.status == "running"]

    @property
    def activity(self) -> str:
        """Return the state in a word."""
        return {"": "accepted", "accepted": "planning"}.get(self.status, self.status)

    def _apply_step(self, event: str, data: dict[str, object], at: float | None) -> list[ProgressLine]:
        if event == "step.started":
            return self._apply_started(data, at)
        if event == "step.failed":
            return self._apply_failed(data, at)
        step, score = self._get_step(data), data.get("score")
        step.status, step.finished_at = "completed", at
        step.usage = step.usage + parse_usage(data.get("usage"))
        step.score = float(score) if isinstance(score, int | float) else None
        self.texts.pop(step.step, None)
        return [ProgressLine(f"✓ {step.step} accepted{_format_score(data)}{_format_tokens(data)}", "good")]

    def _apply_end(self, event: str, data: dict[str, object], at: float | None) -> list[ProgressLine]:
        self.finished_at = at
        self.texts.clear()
        # No event says so of each step that the task's end stopped.
        for step in self.running:
            step.status, step.finished_at = "cancelled", at
        match event:
            case "task.completed":
                self.status = "completed"
                return [ProgressLine(f"Task completed in {_format_seconds(data.get('duration_ms'))}.", "good", True)]
            case "task.failed":
                self.status = "failed"
                reason = _text(data, "reason")
                return [
                    _notice(f"Task failed: {reason} [{_text(data, 'code')}]", "bad"),
                    *_reason_lines(data, shown=reason),
                ]
            case _:
                self.status = "cancelled"
                return [_notice("Task cancelled.", "warn")]

    def _apply_steering(self, event: str, data: dict[str, object]) -> list[ProgressLine]:
        """Apply what a person did to the task while it ran."""
        by = _text(data, "by")
        match event:
            case "task.paused":
                self.status = "paused"
                for step in self.running:
                    step.status = "pending"
                return [_notice(f"Paused by {by}.", "warn")]
            case "task.resumed":
                self.status = "accepted" if data.get("status") == "accepted" else "running"
                return [_notice(f"Resumed by {by}.")]
            case "task.instructed":
                return [_notice(f"Told by {by}: {_text(data, 'text')}")]
            case "step.skipped":
                self.status = "paused" if data.get("status") == "paused" else "running"
                skipped = self.steps.get(_text(data, "step"))
                if skipped is not None:
                    skipped.status, skipped.needs_approval = "skipped", False
                return [_notice(f"{_text(data, 'step')} was skipped by {by}.", "warn")]
            case "task.extended":
                return [_notice(f"Its limits were raised by {by}.")]
            case _:
                return []

    def _apply_plan(self, data: dict[str, object], *, is_repeat: bool) -> list[ProgressLine]:
        planned = _dicts(data.get("steps"))
        # A new plan keeps the steps that are completed, and what is known of them.
        before, self.steps = self.steps, {}
        for each in planned:
            step = before.get(_text(each, "step"), StepProgress(_text(each, "step")))
            step.title, step.arm, step.depends_on = _text(each, "title"), _text(each, "arm"), _names(each)
            self.steps[step.step] = step
        reused = data.get("reused")
        for name in cast("Sequence[object]", reused) if isinstance(reused, list | tuple) else ():
            if str(name) in self.steps:
                self.steps[str(name)].status = "completed"
        self.texts.pop(PLAN, None)
        return [
            ProgressLine("New plan" if is_repeat else "Plan", "title", is_repeat),
            *_reason_lines(data),
            *(ProgressLine(_plan_line(number, step)) for number, step in enumerate(self.steps.values(), 1)),
        ]

    def _apply_started(self, data: dict[str, object], at: float | None) -> list[ProgressLine]:
        step, attempt = self._get_step(data), data.get("attempt", 1)
        step.title, step.arm = _text(data, "title") or step.title, _text(data, "arm") or step.arm
        step.attempt = attempt if isinstance(attempt, int) else 1
        step.status, step.message, step.needs_approval = "running", "", False
        step.started_at = step.started_at or at
        step.finished_at = None
        self.texts.pop(step.step, None)
        suffix = f", attempt {attempt}" if attempt not in (0, 1) else ""
        return [ProgressLine(f"▶ {step.step}  {step.title or step.step} ({step.arm}{suffix})", "step")]

    def _apply_message(self, data: dict[str, object]) -> list[ProgressLine]:
        step, message = self.steps.get(_text(data, "step")), _text(data, "message")
        if step is None or not message or step.message == message:
            return []
        step.message = message
        return [ProgressLine(f"  {step.step}  {message}", "quiet")]

    def _apply_failed(self, data: dict[str, object], at: float | None) -> list[ProgressLine]:
        step, final = self._get_step(data), bool(data.get("final"))
        step.status, step.message = ("failed" if final else "pending"), ""
        step.finished_at = at if final else None
        self.texts.pop(step.step, None)
        code = f" [{data['code']}]" if data.get("code") else ""
        word = "failed" if final else "was not accepted and is tried again"
        return [_notice(f"✗ {step.step} {word}{code}", "bad" if final else "warn"), *_reason_lines(data)]

    def _apply_token(self, update: Update) -> None:
        before = "" if update.reset else self.texts.get(update.step, "")
        self.texts[update.step] = (before + update.text)[-MAX_TEXT_CHARS:]

    def _get_step(self, data: dict[str, object]) -> StepProgress:
        name = _text(data, "step")
        return self.steps.setdefault(name, StepProgress(name))


def parse_time(text: str) -> float | None:
    """Return an RFC 3339 time in seconds since the epoch; ``None`` if it is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def parse_usage(value: object) -> Usage:
    """Return the usage that an event has; an event of another version may have none."""
    members = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    prompt, completion, cost = (members.get(name) for name in ("prompt_tokens", "completion_tokens", "cost_usd"))
    return Usage(
        prompt if isinstance(prompt, int) else 0,
        completion if isinstance(completion, int) else 0,
        float(cost) if isinstance(cost, int | float) else 0.0,
    )


def _notice(text: str, tone: Tone = "plain") -> ProgressLine:
    return ProgressLine(text, tone, is_notice=True)


def _names(step: dict[str, object]) -> tuple[str, ...]:
    names = step.get("depends_on")
    return tuple(str(name) for name in cast("Sequence[object]", names)) if isinstance(names, list | tuple) else ()


def _plan_line(number: int, step: StepProgress) -> str:
    after = ", ".join(step.depends_on)
    return f"  {number}. {step.title}  ({step.arm}{f', after {after}' if after else ''})"


def _reason_lines(data: dict[str, object], *, shown: str = "") -> list[ProgressLine]:
    """Return a line for each reason that the text ``shown`` does not have."""
    reasons = data.get("reasons")
    items = cast("Sequence[object]", reasons) if isinstance(reasons, list) else ()
    return [_notice(f"    · {reason}", "quiet") for reason in items if str(reason) not in shown]


def _dicts(value: object) -> list[dict[str, object]]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("dict[str, object]", item) for item in items if isinstance(item, dict)]


def _text(data: dict[str, object], name: str) -> str:
    return str(data.get(name, ""))


def _format_score(data: dict[str, object]) -> str:
    score = data.get("score")
    return f", score {score:.2f}" if isinstance(score, int | float) and score else ""


def _format_tokens(data: dict[str, object]) -> str:
    count = parse_usage(data.get("usage")).total_tokens
    return f", {count:,} tokens" if count else ""


def _format_seconds(milliseconds: object) -> str:
    return f"{milliseconds / 1000:.1f} s" if isinstance(milliseconds, int | float) else "unknown time"
