"""A task's progress: updates reduced to lines, shown live on a terminal or as plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from octollm.client import Update
from octollm.contracts.task import TaskStatus

_SHOWN_CHARS = 400
"""Characters of an unfinished line that the live view shows."""
_MAX_LINE_CHARS = 64 * 1024
"""Longer lines of model text are split."""

Tone = Literal["plain", "title", "step", "good", "bad", "warn", "quiet"]


@dataclass(frozen=True, slots=True)
class ProgressLine:
    """A line of output and its style."""

    text: str
    tone: Tone = "plain"


@dataclass(slots=True)
class TaskProgress:
    """The state of a task, reduced from its updates: ``progress`` is 0 to 100, ``running`` maps steps to titles."""

    status: TaskStatus | Literal[""] = ""
    progress: float = 0.0
    running: dict[str, str] = field(default_factory=dict[str, str])

    def apply(self, update: Update) -> list[ProgressLine]:
        """Apply an update that is no token; return the lines that describe it."""
        self.progress = max(self.progress, update.progress)
        data = update.data
        match str(data.get("event_type", "")):
            case "task.accepted":
                self.status = "accepted"
                return []
            case "task.planned" | "task.replanned" as event:
                self.status = "planning"
                return self._apply_plan(data, is_repeat=event == "task.replanned")
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
        """Return the running steps, else the status, in a few words."""
        if self.running:
            return ", ".join(self.running.values())
        return {"": "accepted", "accepted": "planning"}.get(self.status, self.status)

    def _apply_plan(self, data: dict[str, object], *, is_repeat: bool) -> list[ProgressLine]:
        steps = [_plan_line(number, step) for number, step in enumerate(_dicts(data.get("steps")), 1)]
        return [
            ProgressLine("New plan" if is_repeat else "Plan", "title"),
            *_reason_lines(data),
            *(ProgressLine(step) for step in steps),
        ]

    def _apply_started(self, data: dict[str, object]) -> list[ProgressLine]:
        step, attempt = _text(data, "step"), data.get("attempt", 1)
        suffix = f", attempt {attempt}" if attempt not in (0, 1) else ""
        name = f"{_text(data, 'title') or step} ({_text(data, 'arm')}{suffix})"
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
    items = cast("Sequence[object]", reasons) if isinstance(reasons, list) else ()
    return [ProgressLine(f"    · {reason}", "quiet") for reason in items]


def _dicts(value: object) -> list[dict[str, object]]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("dict[str, object]", item) for item in items if isinstance(item, dict)]


def _text(data: dict[str, object], name: str) -> str:
    return str(data.get(name, ""))


def _format_score(data: dict[str, object]) -> str:
    score = data.get("score")
    return f", score {score:.2f}" if isinstance(score, int | float) and score else ""


def _format_tokens(data: dict[str, object]) -> str:
    usage = data.get("usage")
    if not isinstance(usage, dict):
        return ""
    members = cast("dict[str, object]", usage)
    counts = (members.get(name) for name in ("prompt_tokens", "completion_tokens"))
    count = sum(value for value in counts if isinstance(value, int))
    return f", {count:,} tokens" if count else ""


def _format_seconds(milliseconds: object) -> str:
    return f"{milliseconds / 1000:.1f} s" if isinstance(milliseconds, int | float) else "unknown time"


class ProgressView(Protocol):
    """Shows updates while its context is open."""

    state: TaskProgress

    def show(self, update: Update) -> None:
        """Show one update."""
        ...

    def __enter__(self) -> ProgressView: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def create_view(console: Console) -> ProgressView:
    """Return a live view for a terminal, else a plain one."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView(console)


def style_line(line: ProgressLine) -> Text:
    """Return the line in its style."""
    return Text(line.text, style="" if line.tone == "plain" else f"octo.{line.tone}")


class PlainView:
    """Prints lines and model text as they arrive: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.state = TaskProgress()
        self._console = console
        self._writing = ""
        self._steps_with_text: set[str] = set()
        self._open_line = False

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_line()

    def show(self, update: Update) -> None:
        """Print one update."""
        if update.type == "token":
            self._token(update)
            return
        if update.data.get("event_type") == "step.started":
            self._steps_with_text.discard(str(update.data.get("step", "")))
        for line in self.state.apply(update):
            self._end_line()
            self._console.print(Text(f"[{self.state.progress:3.0f}%] ").append(line.text))

    def _token(self, update: Update) -> None:
        is_repeat = update.reset and update.step in self._steps_with_text
        if update.step != self._writing or is_repeat:
            self._end_line()
            word = "starts over" if is_repeat else "writes"
            self._console.print(Text(f"[{update.progress:3.0f}%] {update.step} {word}:"))
        self._writing = update.step
        text = update.text
        if text:
            self._steps_with_text.add(update.step)
            self._console.print(Text(text), end="")
            self._open_line = not text.endswith("\n")
            self._console.file.flush()

    def _end_line(self) -> None:
        if self._open_line:
            self._console.print()
        self._open_line = False
        self._writing = ""


class LiveView:
    """A progress bar at the foot of the terminal; finished lines scroll above it."""

    def __init__(self, console: Console) -> None:
        self.state = TaskProgress()
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._bar = self._progress.add_task("accepted", total=100)
        self._lines: dict[str, str] = {}
        self._live = Live(self._footer(), console=console, refresh_per_second=10, transient=True)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for step in list(self._lines):
            self._flush(step)
        self._live.__exit__(kind, error, trace)

    def show(self, update: Update) -> None:
        """Show one update."""
        if update.type == "token":
            self._token(update)
        else:
            lines = self.state.apply(update)
            if update.type == "step":
                self._flush(str(update.data.get("step", "")))
            elif lines:
                self._flush("plan")
            for line in lines:
                self._console.print(style_line(line))
        self._progress.update(self._bar, completed=self.state.progress, description=_truncate(self.state.activity))
        self._live.update(self._footer())

    def _token(self, update: Update) -> None:
        if update.reset and update.step in self._lines:
            self._flush(update.step)
            self._console.print(Text(f"  ↻ {update.step} starts over", "octo.quiet"))
        *complete_lines, partial = (self._lines.get(update.step, "") + update.text).split("\n")
        if len(partial) > _MAX_LINE_CHARS:
            complete_lines, partial = [*complete_lines, partial], ""
        for line in complete_lines:
            self._console.print(self._token_line(update.step, line))
        self._lines[update.step] = partial

    def _flush(self, step: str) -> None:
        partial = self._lines.pop(step, "")
        if partial:
            self._console.print(self._token_line(step, partial))

    def _token_line(self, step: str, line: str) -> Text:
        prefix = f"{step} │ " if len(self._lines) > 1 else "  │ "
        return Text.assemble((prefix, "octo.quiet"), (line, "octo.quiet" if step == "plan" else ""))

    def _footer(self) -> Group:
        open_lines = [
            self._token_line(step, partial[-_SHOWN_CHARS:]) for step, partial in self._lines.items() if partial
        ]
        return Group(*open_lines[-4:], self._progress)


def _truncate(text: str) -> str:
    return text if len(text) <= 48 else text[:47] + "…"
