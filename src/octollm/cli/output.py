"""The terminal: consoles for output and messages, the theme, and how errors and warnings are printed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable

import msgspec
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text
from rich.theme import Theme

from octollm.errors import OctoError
from octollm.masking import mask

_PIPE_WIDTH = 200
"""Columns of a table where output is no terminal, which has no width of its own."""

MAX_CELL_CHARS = 200
"""Characters of a goal, a value or a URL in a list; `show` and ``--json`` have all of it."""
_C1 = range(0x7F, 0xA0)
_BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"},
    **dict.fromkeys((*_C1, *_BIDI), "\N{REPLACEMENT CHARACTER}"),
}
"""Control characters and what is shown in place of each: one character, so that positions in the text stay."""
_UNESCAPED_IN_JSON = re.compile("[" + "".join(map(chr, (*_C1, *_BIDI))) + "]")

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


def make_visible(text: str) -> str:
    """Return ``text`` with its control characters made visible, so that its width is known. Tabs and newlines stay."""
    return text.translate(_VISIBLE)


class SafeConsole(Console):
    """A console on which texts cannot control the terminal: their control characters are shown, not sent.

    Goals, comments, names and error texts come from others. rich removes only some control characters; an escape
    sequence could change the title, the clipboard or what earlier lines seem to say, and bidirectional controls the
    order of words. Styles and cursor movements of rich itself are no text.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render with the control characters of every text made visible."""
        if isinstance(renderable, Text):
            # Before the layout, which takes control characters for no width.
            renderable = renderable.copy()
            renderable.plain = make_visible(renderable.plain)
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=make_visible(segment.text))


def table_cell(text: str) -> Text:
    """Return ``text`` for a list with one line a row: without line breaks, and cut at ``MAX_CELL_CHARS``."""
    line = " ".join(text[: 4 * MAX_CELL_CHARS].split())
    return Text(line if len(line) <= MAX_CELL_CHARS else f"{line[: MAX_CELL_CHARS - 1]}…")


def encode_json_line(value: object) -> str:
    """Encode JSON on one line for a terminal: C1 and bidirectional controls are escaped as JSON escapes the others."""
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return _UNESCAPED_IN_JSON.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def _create_console(*, stderr: bool = False) -> Console:
    # rich alone would still send bold and dim with NO_COLOR.
    colors = None if os.environ.get("NO_COLOR") else "auto"
    return SafeConsole(theme=THEME, highlight=False, soft_wrap=True, stderr=stderr, color_system=colors)


def output() -> Console:
    """Return the console for the data of a command (standard output)."""
    console = _create_console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def messages() -> Console:
    """Return the console for everything but data (standard error): errors, warnings, progress."""
    return _create_console(stderr=True)


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


def restore_cursor() -> None:
    """Show the cursor of a terminal, which a live view hides: for a process that ends without leaving the view."""
    if os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR"):
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                if os.isatty(descriptor):
                    os.write(descriptor, b"\x1b[?25h")
