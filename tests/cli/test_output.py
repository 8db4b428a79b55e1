"""Texts of others on the terminal: nothing in them controls it."""

from __future__ import annotations

import io
import unicodedata

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from octollm.cli import output
from octollm.cli.output import MAX_CELL_CHARS, THEME, SafeConsole, encode_json_line, show_error, table_cell
from octollm.cli.views import PlainView, TreeView
from octollm.client import Update
from octollm.errors import FieldError, OctoError

HOSTILE = "a\x1b[31mb\x1b]0;title\x07c\x9b31md\x9d0;x\x9ce\x7ff\u202egnp.\u2066h\rI\x00j\x0e"
ALL = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def controls(text: str) -> set[str]:
    return {
        char
        for char in text
        if (unicodedata.category(char) == "Cc" and char not in "\n\t")
        or unicodedata.bidirectional(char) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    }


def printed(*things, **options):
    console = SafeConsole(file=io.StringIO(), theme=THEME, width=100, highlight=False, soft_wrap=True, **options)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


def table_of(text):
    table = Table(text, box=None)
    table.add_row(text)
    table.add_row(Text(text))
    return table


@given(st.one_of(st.just(HOSTILE), st.just(ALL), st.text(st.sampled_from(ALL + "ab[]\n"), max_size=40)))
def test_no_text_controls_the_terminal(text):
    text = text.replace("[", "(")  # markup of rich, which no command enables for outside text
    shown = printed(text, Text(text), Text.assemble(("> ", "dim"), text), table_of(text), Panel(text), Group(text))
    assert not controls(shown)


def test_what_a_control_character_was_is_shown():
    assert printed(Text("a\x1b[2Jb\x9b1mc")) == "a␛[2Jb\N{REPLACEMENT CHARACTER}1mc\n"
    assert printed(Text("שלום 👩‍💻 e\u0301\u200f")) == "שלום 👩‍💻 e\u0301\u200f\n"


def test_styles_are_still_sent():
    assert printed(Text("x\x1b[5m", "bold"), force_terminal=True) == "\x1b[1mx␛[5m\x1b[0m\n"


def test_both_consoles_of_a_command_are_safe():
    assert isinstance(output.output(), SafeConsole)
    assert isinstance(output.messages(), SafeConsole)


def test_an_error_of_a_server_controls_nothing():
    console = SafeConsole(file=io.StringIO(), theme=THEME, width=100, soft_wrap=True)
    show_error(OctoError(HOSTILE, code="internal", field_errors=[FieldError(f"/{HOSTILE}", HOSTILE + "!")]), console)
    assert not controls(console.file.getvalue())


def test_the_progress_of_a_task_controls_nothing():
    task = "task-" + "b" * 32
    steps = [{"step": "s1", "title": HOSTILE, "arm": "coder", "depends_on": []}]
    updates = [
        Update(task, "status", 1, 10, data={"event_type": "task.planned", "steps": steps}),
        Update(task, "status", 2, 10, data={"event_type": "task.waiting", "reason": HOSTILE}),
        Update(task, "status", 3, 10, data={"event_type": "task.approved", "decided_by": "me", "comment": HOSTILE}),
        Update(task, "token", 4, 20, data={"text": HOSTILE}, step="s1"),
    ]
    for view_class, options in ((PlainView, {}), (TreeView, {"force_terminal": True})):
        console = SafeConsole(file=io.StringIO(), theme=THEME, width=100, highlight=False, soft_wrap=True, **options)
        with view_class(console) as view:
            for update in updates:
                view.show(update)
        shown = console.file.getvalue()
        assert not {"\x07", "\x9b", "\x9d", "\u202e", "\x00"} & set(shown)
        assert "\x1b]" not in shown


@given(st.one_of(st.just(HOSTILE), st.just(ALL), st.text(max_size=40)))
def test_json_controls_nothing_and_says_the_same(text):
    line = encode_json_line({"goal": text})
    assert not controls(line)
    assert msgspec.json.decode(line) == {"goal": text}


def test_a_cell_of_a_list_is_one_short_line():
    assert table_cell("a\n\nb\tc").plain == "a b c"
    assert table_cell("x" * MAX_CELL_CHARS).plain == "x" * MAX_CELL_CHARS
    assert table_cell("x" * 100_000).plain == "x" * (MAX_CELL_CHARS - 1) + "…"
