"""The terminal: consoles for output and messages, the theme, and how errors and warnings are printed."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from octollm.errors import OctoError
from octollm.telemetry import mask

_PIPE_WIDTH = 200
"""Columns of a table where output is no terminal, which has no width of its own."""

THEME = Theme(
    {
        "octo.title": "bold cyan",
        "octo.good": "green",
        "octo.bad": "bold red",
        "octo.warn": "yellow",
        "octo.quiet": "dim",
        "octo.step": "bold",
    }
)


def output() -> Console:
    """Return the console for the data of a command (standard output). rich honours ``NO_COLOR``."""
    console = Console(theme=THEME, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def messages() -> Console:
    """Return the console for everything but data (standard error): errors, warnings, progress."""
    return Console(theme=THEME, highlight=False, soft_wrap=True, stderr=True)


def show_error(error: OctoError, console: Console | None = None) -> None:
    """Print an error with its code, and the field of each fault in the input."""
    console = console or messages()
    line = Text.assemble(("octollm: ", "octo.bad"), str(mask(error.detail)))
    line.append(f" [{error.code}]", "octo.quiet")
    console.print(line)
    for fault in error.field_errors:
        where = fault.pointer or "body"
        # A single fault is often the whole error: its place is news, its text is not.
        detail = "" if fault.detail == error.detail else f": {fault.detail}"
        console.print(Text.assemble(("  at ", "octo.quiet"), where, detail))
    if error.code == "internal":
        console.print(Text("  The service's log has the reason: OCTOLLM_HOME/logs/octollm.jsonl", "octo.quiet"))


def show_warning(sentence: str) -> None:
    """Print a warning."""
    messages().print(Text.assemble(("octollm: ", "octo.warn"), sentence))
