"""Showing a task while it runs: a progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from octollm.cli.story import ProgressLine, TaskProgress
from octollm.client import Update

_SHOWN_CHARS = 400
"""Characters of an unfinished line that are shown."""
_MAX_LINE_CHARS = 64 * 1024
"""An unfinished line longer than this is broken."""


class ProgressView(Protocol):
    """Shows updates; used with ``with``."""

    state: TaskProgress

    def show(self, update: Update) -> None:
        """Show one update."""
        ...

    def __enter__(self) -> ProgressView: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def create_view(console: Console) -> ProgressView:
    """Return the view that fits the console."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView(console)


def style_line(line: ProgressLine) -> Text:
    """Return a line with its colour, which a console without colours leaves out."""
    return Text(line.text, style="" if line.tone == "plain" else f"octo.{line.tone}")


class PlainView:
    """Lines as they come, and the model's text as it is written: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.state = TaskProgress()
        self._console = console
        self._writing = ""
        self._written: set[str] = set()
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
            self._written.discard(str(update.data.get("step", "")))
        for said in self.state.apply(update):
            self._end_line()
            self._console.print(Text(f"[{self.state.progress:3.0f}%] ").append(said.text))

    def _token(self, update: Update) -> None:
        again = update.reset and update.step in self._written
        if update.step != self._writing or again:
            self._end_line()
            word = "writes anew" if again else "writes"
            self._console.print(Text(f"[{update.progress:3.0f}%] {update.step} {word}:"))
        self._writing = update.step
        text = update.text
        if text:
            self._written.add(update.step)
            self._console.print(Text(text), end="")
            self._open_line = not text.endswith("\n")
            self._console.file.flush()

    def _end_line(self) -> None:
        if self._open_line:
            self._console.print()
        self._open_line = False
        self._writing = ""


class LiveView:
    """A progress bar at the foot of the terminal, with whole lines scrolling above it."""

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
            said = self.state.apply(update)
            if update.type == "step":
                self._flush(str(update.data.get("step", "")))
            elif said:
                self._flush("plan")
            for line in said:
                self._console.print(style_line(line))
        self._progress.update(self._bar, completed=self.state.progress, description=_truncate(self.state.activity))
        self._live.update(self._footer())

    def _token(self, update: Update) -> None:
        if update.reset and update.step in self._lines:
            self._flush(update.step)
            self._console.print(Text(f"  ↻ {update.step} writes anew", "octo.quiet"))
        *whole, rest = (self._lines.get(update.step, "") + update.text).split("\n")
        if len(rest) > _MAX_LINE_CHARS:
            whole, rest = [*whole, rest], ""
        for line in whole:
            self._console.print(self._token_line(update.step, line))
        self._lines[update.step] = rest

    def _flush(self, step: str) -> None:
        rest = self._lines.pop(step, "")
        if rest:
            self._console.print(self._token_line(step, rest))

    def _token_line(self, step: str, line: str) -> Text:
        prefix = f"{step} │ " if len(self._lines) > 1 else "  │ "
        return Text.assemble((prefix, "octo.quiet"), (line, "octo.quiet" if step == "plan" else ""))

    def _footer(self) -> Group:
        open_lines = [self._token_line(step, rest[-_SHOWN_CHARS:]) for step, rest in self._lines.items() if rest]
        return Group(*open_lines[-4:], self._progress)


def _truncate(text: str) -> str:
    return text if len(text) <= 48 else text[:47] + "…"
