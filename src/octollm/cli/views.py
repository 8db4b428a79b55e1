"""How a task's progress is shown: a live tree on a terminal, plain lines in a pipe, a log or a simple terminal."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.text import Text

from octollm.cli.progress import ProgressLine, SubTaskBranch, TaskProgress
from octollm.cli.task_tree import draw_tree
from octollm.client import Update
from octollm.clock import Clock, SystemClock
from octollm.contracts.api import TaskView

REFRESHES_PER_SECOND = 10
# rich has no name for these two controls (DECAWM); a control segment needs one, which only says that it is no text.
_NO_WRAP = Segment("\x1b[?7l", None, [(ControlType.BELL,)])
_WRAP = Segment("\x1b[?7h", None, [(ControlType.BELL,)])


class ProgressView(Protocol):
    """Shows updates while its context is open."""

    state: TaskProgress
    shows_tree: bool
    """Whether what :meth:`show_task` takes is shown."""

    def show(self, update: Update) -> None:
        """Show one update."""
        ...

    def show_task(self, task: TaskView, subtasks: Sequence[SubTaskBranch] = ()) -> None:
        """Show what the task has used of its budget, and its sub-tasks."""
        ...

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Leave the terminal to somebody else while the context is open."""
        ...

    def __enter__(self) -> ProgressView: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def can_redraw(console: Console, environment: Mapping[str, str]) -> bool:
    """Return whether output goes to a terminal that can move its cursor, and that a person looks at.

    Continuous integration often has a terminal that is only a log. ``NO_COLOR`` asks for text without control
    sequences.
    """
    return (
        console.is_terminal
        and not console.is_dumb_terminal
        and not environment.get("NO_COLOR")
        and environment.get("CI", "").lower() in ("", "0", "false")
    )


def create_view(console: Console, environment: Mapping[str, str] | None = None) -> ProgressView:
    """Return a live view for a terminal, else a plain one. ``environment`` is the process's own by default."""
    environment = os.environ if environment is None else environment
    return TreeView(console) if can_redraw(console, environment) else PlainView(console)


def style_line(line: ProgressLine) -> Text:
    """Return the line in its style."""
    return Text(line.text, style="" if line.tone == "plain" else f"octo.{line.tone}")


class PlainView:
    """Prints lines and model text as they arrive: for logs and pipes."""

    shows_tree = False

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

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: the lines of this view stay where they are."""
        return contextlib.nullcontext()

    def show_task(self, task: TaskView, subtasks: Sequence[SubTaskBranch] = ()) -> None:
        """Do nothing: a log has what happened, and the outcome at the end has what was used."""

    def show(self, update: Update) -> None:
        """Print one update."""
        lines = self.state.apply(update)
        if update.type == "token":
            self._token(update)
            return
        if update.data.get("event_type") == "step.started":
            self._steps_with_text.discard(str(update.data.get("step", "")))
        for line in lines:
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


class TreeView:
    """Draws the plan as a tree at the foot of the terminal; notices scroll above it, and its last state stays."""

    shows_tree = True

    def __init__(self, console: Console, clock: Clock | None = None) -> None:
        self.state = TaskProgress()
        self._console = console
        self._clock = clock or SystemClock()
        self._frozen = False
        self._last_lines: list[Text] = []
        # The terminal is drawn from a thread. Never held while the console prints, which takes a lock of its own.
        self._lock = threading.Lock()
        self._live = self._create_live()

    def __enter__(self) -> TreeView:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        for line in self._last_lines:
            self._console.print(line)

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Leave the tree as it is while the context is open, so that what is asked below can be judged by it."""
        self._stop()
        try:
            yield
        finally:
            self._frozen = False
            self._live = self._create_live()
            self._live.start(refresh=True)

    def show(self, update: Update) -> None:
        """Show one update."""
        with self._lock:
            lines = self.state.apply(update)
        notices = [style_line(line) for line in lines if line.is_notice]
        if self.state.finished_at is not None or self.state.status in ("completed", "failed", "cancelled"):
            # Below the tree, where the eye is.
            self._last_lines += notices
            return
        for notice in notices:
            self._console.print(notice)

    def show_task(self, task: TaskView, subtasks: Sequence[SubTaskBranch] = ()) -> None:
        """Show what the task has used of its budget, and its sub-tasks."""
        with self._lock:
            self.state.apply_view(task, subtasks)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = console.size
        with self._lock:
            # A line that fills the last column leaves the cursor where terminals disagree.
            lines = draw_tree(
                self.state, width=width - 1, height=None if self._frozen else height - 1, now=self._clock.now()
            )
        # A terminal may show a character wider than it is thought to be here. A wrapped line would be one more than
        # the cursor goes up by.
        yield _NO_WRAP
        yield Text("\n").join(lines)
        yield _WRAP

    def _create_live(self) -> Live:
        return Live(
            console=self._console, get_renderable=lambda: self, refresh_per_second=REFRESHES_PER_SECOND, transient=False
        )

    def _stop(self) -> None:
        self._frozen = True
        self._live.stop()
