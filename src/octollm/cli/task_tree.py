"""A task's plan as a tree of lines that fits the terminal: steps, their text, sub-tasks, time, tokens and cost."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from octollm.cli.output import make_visible
from octollm.cli.progress import PLAN, StepProgress, SubTaskBranch, TaskProgress

MAX_TEXT_LINES = 8
"""Lines of a running step's text that are shown."""
BAR_WIDTH = 24
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_FRAMES_PER_SECOND = 10
_TAB = " " * 4
_MIN_TITLE = 12
_ID_WIDTH = 12

_MARKS = {
    "completed": ("✓", "octo.good"),
    "failed": ("✗", "octo.bad"),
    "cancelled": ("■", "octo.warn"),
    "skipped": ("↷", "octo.warn"),
}
_PENDING = ("○", "octo.quiet")
_WAITING = ("?", "octo.warn")
_RANKS = {"running": 0, "failed": 1, "pending": 2}
"""Which steps are shown when there is not room for all: the lowest first."""


def draw_tree(progress: TaskProgress, *, width: int, height: int | None, now: float) -> list[Text]:
    """Return the lines of the tree, none wider than ``width`` cells and at most ``height`` of them.

    Without a ``height`` it is the whole plan without the texts: what stays on the terminal. ``now`` is in seconds since
    the epoch. Steps that are under way come before those that are done or to come, and texts get the room that is left.
    """
    footer = _draw_footer(progress, width, now)
    if height is not None:
        footer = footer[: max(1, min(len(footer), height - 2))]
    room = None if height is None else max(0, height - len(footer) - 1)
    branches = _draw_branches(progress, width, room, now)
    if room == 0 or (room is not None and not branches and room < 1):
        return [_fit(line, width) for line in footer]
    return [_fit(line, width) for line in (_draw_root(progress, now), *branches, *footer)]


def _draw_root(progress: TaskProgress, now: float) -> Text:
    mark = _mark(progress.status or "running", now, is_waiting=progress.status in ("waiting", "paused"))
    return Text.assemble(mark, " ", (_one_line(progress.goal) or "Task", "octo.step"))


def _draw_branches(progress: TaskProgress, width: int, room: int | None, now: float) -> list[Text]:
    """Return the lines below the root: at most ``room``."""
    steps = _select(list(progress.steps.values()), room)
    hidden = len(progress.steps) - len(steps)
    left = None if room is None else room - len(steps) - (1 if hidden else 0)
    subtasks = progress.subtasks if left is None else progress.subtasks[: max(0, left)]
    left = None if left is None else left - len(subtasks)
    texts = {} if left is None else _share_room(progress, left)
    lines = [_draw_text_line("│ ", line) for line in texts.get(PLAN, ())]
    rows = len(steps) + len(subtasks) + (1 if hidden else 0)
    for number, step in enumerate(steps, 1):
        is_last = number == rows
        lines.append(_draw_step(step, "└─ " if is_last else "├─ ", width, now))
        lines += [_draw_text_line("     │ " if is_last else "│    │ ", line) for line in texts.get(step.step, ())]
    if hidden:
        lines.append(Text.assemble("└─ " if not subtasks else "├─ ", (_count_hidden(progress, steps), "octo.quiet")))
    for number, subtask in enumerate(subtasks, 1):
        lines.append(_draw_subtask(subtask, is_last=number == len(subtasks), now=now))
    return lines


def _select(steps: list[StepProgress], room: int | None) -> list[StepProgress]:
    """Return the steps that are shown in ``room`` lines, in the order of the plan."""
    if room is None or len(steps) <= room:
        return steps
    # One line says how many are not shown.
    ranked = sorted(range(len(steps)), key=lambda index: (_rank(steps[index]), index))
    return [steps[index] for index in sorted(ranked[: max(0, room - 1)])]


def _rank(step: StepProgress) -> int:
    return 0 if step.needs_approval else _RANKS.get(step.status, len(_RANKS))


def _count_hidden(progress: TaskProgress, shown: Sequence[StepProgress]) -> str:
    names = {step.step for step in shown}
    counts: dict[str, int] = {}
    for step in progress.steps.values():
        if step.step not in names:
            counts[step.status] = counts.get(step.status, 0) + 1
    return "… " + ", ".join(f"{count} {status}" for status, count in counts.items())


def _share_room(progress: TaskProgress, room: int) -> dict[str, list[str]]:
    """Return the last lines of each text: as many as fit into ``room`` lines, shared equally."""
    names = [step.step for step in progress.running if progress.texts.get(step.step) or step.message]
    if progress.texts.get(PLAN) and PLAN not in names:
        names.append(PLAN)
    shared: dict[str, list[str]] = {}
    for index, name in enumerate(names):
        # The text of the last ones is the longest wait: rounding gives them the rest.
        share = min(MAX_TEXT_LINES, room // (len(names) - index))
        step = progress.steps.get(name)
        lines = [step.message] if step is not None and step.message else []
        lines = [*lines, *progress.texts.get(name, "").rstrip("\n").split("\n")[-MAX_TEXT_LINES:]]
        lines = [line for line in lines if line.strip()][-share:] if share else []
        if lines:
            shared[name] = lines
            room -= len(lines)
    return shared


def _draw_step(step: StepProgress, branch: str, width: int, now: float) -> Text:
    line = Text.assemble((branch, "octo.quiet"), _mark(step.status, now, is_waiting=step.needs_approval), " ")
    name = Text(_one_line(step.step), "octo.step")
    name.truncate(_ID_WIDTH, overflow="ellipsis")
    line.append_text(name).append("  ")
    details = "  ".join(_step_details(step, now))
    title = Text(_one_line(step.title))
    room = width - line.cell_len - len(details) - 2
    if room >= min(title.cell_len, _MIN_TITLE):
        title.truncate(room, overflow="ellipsis")
    return line.append_text(title).append(f"  {details}", "octo.quiet")


def _step_details(step: StepProgress, now: float) -> list[str]:
    details = [_one_line(step.arm)]
    if step.attempt > 1:
        details.append(f"attempt {step.attempt}")
    if step.needs_approval:
        details.append("needs approval")
    elif step.status == "pending" and step.depends_on:
        details.append(f"after {_one_line(', '.join(step.depends_on))}")
    if step.started_at is not None and step.status != "pending":
        details.append(format_duration((step.finished_at or now) - step.started_at))
    if step.usage.total_tokens:
        details.append(f"{step.usage.total_tokens:,} tokens")
    if step.usage.cost_usd:
        details.append(f"{step.usage.cost_usd:.4f} USD")
    if step.score:
        details.append(f"score {step.score:.2f}")
    return [detail for detail in details if detail]


def _draw_subtask(subtask: SubTaskBranch, *, is_last: bool, now: float) -> Text:
    indent = "   " * (subtask.depth - 1)
    progress = "" if subtask.status in _MARKS else f"  {subtask.progress:.0f} %"
    return Text.assemble(
        ("└─ " if is_last else "├─ ", "octo.quiet"),
        indent,
        _mark(subtask.status, now, is_waiting=subtask.status in ("waiting", "paused")),
        (f" sub-task {_one_line(subtask.task_id)[-8:]}", "octo.step"),
        (progress, "octo.quiet"),
        f"  {_one_line(subtask.goal)}",
    )


def _draw_text_line(prefix: str, line: str) -> Text:
    return Text.assemble((prefix, "octo.quiet"), make_visible(line).replace("\t", _TAB))


def _draw_footer(progress: TaskProgress, width: int, now: float) -> list[Text]:
    percent = 100.0 if progress.status == "completed" else progress.progress
    filled = round(percent / 100 * BAR_WIDTH)
    line = Text.assemble(("━" * filled, "octo.good"), ("━" * (BAR_WIDTH - filled), "octo.quiet"), " ")
    if width < 2 * BAR_WIDTH:
        line = Text()
    line.append(f"{percent:.0f} %  {progress.activity}")
    if progress.started_at is not None:
        line.append(f"  {format_duration((progress.finished_at or now) - progress.started_at)}")
    figures = _figures(progress, now)
    return [line, Text("  ".join(figures), "octo.quiet")] if figures else [line]


def _figures(progress: TaskProgress, now: float) -> list[str]:
    """Return what was used, and what is left of it."""
    usage, budget = progress.usage, progress.budget
    if usage is None:
        return []
    is_open = progress.finished_at is None
    tokens, cost = f"{usage.total_tokens:,} tokens", f"{usage.cost_usd:.4f} USD"
    if is_open and budget.max_tokens is not None:
        tokens += f" ({max(0, budget.max_tokens - usage.total_tokens):,} left)"
    if is_open and budget.max_cost_usd is not None:
        cost += f" ({max(0.0, budget.max_cost_usd - usage.cost_usd):.4f} left)"
    figures = [tokens, cost]
    if is_open and progress.deadline_at is not None:
        figures.append(f"{format_duration(progress.deadline_at - now)} left")
    return figures


def _mark(status: str, now: float, *, is_waiting: bool = False) -> tuple[str, str]:
    if is_waiting:
        return _WAITING
    if status in _MARKS:
        return _MARKS[status]
    if status == "pending":
        return _PENDING
    return _SPINNER[int(now * _FRAMES_PER_SECOND) % len(_SPINNER)], "octo.title"


def format_duration(seconds: float) -> str:
    """Return a time for a person: ``7 s``, ``3:05`` minutes, ``1:02:03`` hours."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _one_line(text: str) -> str:
    return make_visible(" ".join(text.split()))


def _fit(line: Text, width: int) -> Text:
    line.no_wrap = True
    line.truncate(max(1, width), overflow="ellipsis")
    return line
