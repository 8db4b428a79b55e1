"""What a person sees: in a log, and on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from octollm.cli.output import THEME
from octollm.cli.progress import TaskProgress
from octollm.cli.views import PlainView, TreeView, create_view
from octollm.client import Update

TASK = "task-" + "b" * 32


def event(progress, event_type, kind="status", **data):
    return Update(TASK, kind, 1, progress, data={"event_type": event_type, **data})


def token(text, step="s1", **more):
    return Update(TASK, "token", 1, 30.0, data={"text": text}, step=step, **more)


STEPS = [{"step": "s1", "title": "Write it", "arm": "coder", "depends_on": []}]
WHOLE = [
    event(0, "task.accepted", goal="g"),
    token('{"steps"', step="plan"),
    event(10, "task.planned", steps=STEPS),
    event(12, "task.started"),
    event(15, "step.started", "step", step="s1", title="Write it", arm="coder", attempt=1, run=1),
    token("def f():\n    ret"),
    token("urn [1]\n"),
    event(40, "step.failed", "step", step="s1", attempt=1, reasons=["a test failed"], code="not_accepted", final=False),
    event(45, "step.started", "step", step="s1", title="Write it", arm="coder", attempt=2, run=1),
    token("def g(): [bold]pass", reset=True),
    event(
        90,
        "step.completed",
        "step",
        step="s1",
        attempt=2,
        score=0.9,
        usage={"prompt_tokens": 1000, "completion_tokens": 234, "cost_usd": 0.0},
        text_length=4,
    ),
    event(100, "task.completed", "result", status="completed", duration_ms=12345),
]


def render(make, updates, **options):
    console = Console(file=io.StringIO(), theme=THEME, width=100, highlight=False, soft_wrap=True, **options)
    with make(console) as view:
        for update in updates:
            view.show(update)
    return console.file.getvalue(), view.state


def test_a_log_has_every_stage_in_order_and_the_text_whole():
    text, story = render(PlainView, WHOLE)
    for words in (
        "[ 10%] Plan",
        "1. Write it  (coder)",
        "▶ s1  Write it (coder)",
        "s1 writes:\ndef f():\n    return [1]\n",
        "✗ s1 was not accepted and is tried again [not_accepted]",
        "· a test failed",
        "Write it (coder, attempt 2)",
        "def g(): [bold]pass\n",
        "✓ s1 accepted, score 0.90, 1,234 tokens",
        "[100%] Task completed in 12.3 s.",
    ):
        assert words in text
        text = text[text.index(words) :]
    assert story.status == "completed"


def test_a_log_has_no_control_characters():
    text, _ = render(PlainView, WHOLE)
    assert "\x1b" not in text


def test_a_terminal_shows_notices_and_in_the_end_the_whole_plan():
    text, _ = render(TreeView, WHOLE, force_terminal=True)
    for words in ("was not accepted and is tried again", "a test failed", "s1", "attempt 2", "100 %", "12.3 s"):
        assert words in text
        text = text[text.index(words) :]


@pytest.mark.parametrize(
    ("terminal", "variables", "kind"),
    [
        (True, {"TERM": "xterm"}, TreeView),
        (False, {"TERM": "xterm"}, PlainView),
        (True, {"TERM": "dumb"}, PlainView),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, PlainView),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, TreeView),
        (True, {"TERM": "xterm", "CI": "true"}, PlainView),
        (True, {"TERM": "xterm", "CI": "false"}, TreeView),
    ],
)
def test_the_view_fits_the_console(terminal, variables, kind):
    console = Console(file=io.StringIO(), force_terminal=terminal, _environ=variables)
    assert isinstance(create_view(console, variables), kind)


def test_progress_never_falls():
    story = TaskProgress()
    story.apply(event(50, "task.started"))
    story.apply(event(20, "task.progress", "progress"))
    assert story.progress == 50


@pytest.mark.parametrize(
    ("event_type", "kind", "data", "words"),
    [
        (
            "task.failed",
            "error",
            {"status": "failed", "code": "c", "reason": "why", "reasons": ["x"]},
            ["why [c]", "x"],
        ),
        ("task.cancelled", "status", {"status": "cancelled"}, ["Task cancelled."]),
        ("task.waiting", "status", {"reason": "It deletes a file."}, ["Needs approval: It deletes a file."]),
        ("task.replanned", "status", {"steps": STEPS, "reasons": ["r"]}, ["New plan", "r", "1. Write it"]),
        ("step.failed", "step", {"step": "s1", "reasons": [], "final": True}, ["✗ s1 failed"]),
    ],
)
def test_other_ends(event_type, kind, data, words):
    text, _ = render(PlainView, [event(10, event_type, kind, **data)])
    for word in words:
        assert word in text


@pytest.mark.parametrize("data", [{}, {"steps": "x"}, {"steps": [1]}, {"reasons": 3}, {"usage": 4, "score": "x"}])
@pytest.mark.parametrize("event_type", ["task.planned", "step.started", "step.completed", "step.failed", "task.failed"])
def test_an_event_of_another_version_is_no_crash(event_type, data):
    render(PlainView, [event(1, event_type, **data)])
