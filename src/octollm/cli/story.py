"""What a task's updates mean to a person: plan, steps, verdicts, the end. Pure: updates in, lines out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from octollm.client import Update
from octollm.contracts.task import TaskStatus

Tone = Literal["plain", "title", "step", "good", "bad", "warn", "quiet"]


@dataclass(frozen=True, slots=True)
class ProgressLine:
    """One line for the reader."""

    text: str
    tone: Tone = "plain"


@dataclass(slots=True)
class TaskProgress:
    """A task as told so far. ``status`` is the last that was heard, ``progress`` from 0 to 100."""

    status: TaskStatus | Literal[""] = ""
    progress: float = 0.0
    running: dict[str, str] = field(default_factory=dict[str, str])

    def apply(self, update: Update) -> list[ProgressLine]:
        """Take an update that is no token; return what to say about it."""
        self.progress = max(self.progress, update.progress)
        data = update.data
        match str(data.get("event_type", "")):
            case "task.accepted":
                self.status = "accepted"
                return []
            case "task.planned" | "task.replanned" as event:
                self.status = "planning"
                return self._apply_plan(data, again=event == "task.replanned")
            case "task.started":
                self.status = "running"
                return []
            case "task.waiting":
                self.status = "waiting"
                return [ProgressLine(f"Waiting: {data.get('reason', 'for a person')}", "warn")]
            case "task.completed":
                self.status = "completed"
                return [ProgressLine(f"Task completed in {_format_seconds(data.get('duration_ms'))}.", "good")]
            case "task.failed":
                self.status = "failed"
                return [
                    ProgressLine(f"Task failed: {_text(data, 'reason')} [{_text(data, 'code')}]", "bad"),
                    *_reason_lines(data),
                ]
            case "task.cancelled":
                self.status = "cancelled"
                return [ProgressLine("Task cancelled.", "warn")]
            case "step.started":
                return self._apply_started(data)
            case "step.completed":
                self.running.pop(_text(data, "step"), None)
                return [
                    ProgressLine(f"✓ {_text(data, 'step')} accepted{_format_score(data)}{_format_tokens(data)}", "good")
                ]
            case "step.failed":
                return self._apply_failed(data)
            case _:
                return []

    @property
    def activity(self) -> str:
        """Return in a few words what goes on."""
        if self.running:
            return ", ".join(self.running.values())
        return {"": "accepted", "accepted": "planning"}.get(self.status, self.status)

    def _apply_plan(self, data: dict[str, object], *, again: bool) -> list[ProgressLine]:
        steps = [_plan_line(number, step) for number, step in enumerate(_dicts(data.get("steps")), 1)]
        return [
            ProgressLine("New plan" if again else "Plan", "title"),
            *_reason_lines(data),
            *(ProgressLine(step) for step in steps),
        ]

    def _apply_started(self, data: dict[str, object]) -> list[ProgressLine]:
        step, attempt = _text(data, "step"), data.get("attempt", 1)
        again = f", attempt {attempt}" if attempt not in (0, 1) else ""
        name = f"{_text(data, 'title') or step} ({_text(data, 'arm')}{again})"
        self.running[step] = name
        return [ProgressLine(f"▶ {step}  {name}", "step")]

    def _apply_failed(self, data: dict[str, object]) -> list[ProgressLine]:
        step, final = _text(data, "step"), bool(data.get("final"))
        self.running.pop(step, None)
        code = f" [{data['code']}]" if data.get("code") else ""
        word = "failed" if final else "was not accepted and is tried again"
        return [ProgressLine(f"✗ {step} {word}{code}", "bad" if final else "warn"), *_reason_lines(data)]


def _plan_line(number: int, step: dict[str, object]) -> str:
    after = ", ".join(str(name) for name in cast("Sequence[object]", step.get("depends_on") or ()))
    return f"  {number}. {_text(step, 'title')}  ({_text(step, 'arm')}{f', after {after}' if after else ''})"


def _reason_lines(data: dict[str, object]) -> list[ProgressLine]:
    reasons = data.get("reasons")
    listed = cast("Sequence[object]", reasons) if isinstance(reasons, list) else ()
    return [ProgressLine(f"    · {reason}", "quiet") for reason in listed]


def _dicts(value: object) -> list[dict[str, object]]:
    listed = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("dict[str, object]", item) for item in listed if isinstance(item, dict)]


def _text(data: dict[str, object], name: str) -> str:
    return str(data.get(name, ""))


def _format_score(data: dict[str, object]) -> str:
    score = data.get("score")
    return f", score {score:.2f}" if isinstance(score, int | float) and score else ""


def _format_tokens(data: dict[str, object]) -> str:
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return ""
    used = cast("dict[str, object]", usage)
    counts = (used.get(name) for name in ("prompt_tokens", "completion_tokens"))
    count = sum(value for value in counts if isinstance(value, int))
    return f", {count:,} tokens" if count else ""


def _format_seconds(milliseconds: object) -> str:
    return f"{milliseconds / 1000:.1f} s" if isinstance(milliseconds, int | float) else "unknown time"
