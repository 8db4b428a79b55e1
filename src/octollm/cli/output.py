"""The terminal: consoles for output and messages, the theme, and how errors and warnings are printed."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from octollm.errors import OctoError
from octollm.telemetry import mask

_PIPE_WIDTH = 200

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
    """Return the console for what a command was asked for. rich honours ``NO_COLOR`` and what is no terminal."""
    console = Console(theme=THEME, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        # A pipe has no width; tables need not be cut for it.
        console.width = _PIPE_WIDTH
    return console


def messages() -> Console:
    """Return the console for everything else: errors, warnings, progress of a command whose output is data."""
    return Console(theme=THEME, highlight=False, soft_wrap=True, stderr=True)


def show_error(error: OctoError, console: Console | None = None) -> None:
    """Print a failure: what happened and what to do, then its code."""
    said = console or messages()
    line = Text.assemble(("octollm: ", "octo.bad"), str(mask(error.detail)))
    line.append(f" [{error.code}]", "octo.quiet")
    said.print(line)
    for fault in error.field_errors:
        where = fault.pointer or "body"
        said.print(Text.assemble(("  at ", "octo.quiet"), where, ": ", fault.detail))
    if error.code == "internal":
        said.print(Text("  The service's log has the reason: OCTOLLM_HOME/logs/octollm.jsonl", "octo.quiet"))


def show_warning(sentence: str) -> None:
    """Print something that somebody should look at one day."""
    messages().print(Text.assemble(("octollm: ", "octo.warn"), sentence))
