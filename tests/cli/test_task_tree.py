"""The live tree of a task as lines: what it says, and that it fits every terminal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octollm.cli.output import make_visible
from octollm.cli.progress import StepProgress, SubTaskBranch, TaskProgress
from octollm.cli.task_tree import draw_tree, format_duration
from octollm.contracts.task import Budget, Usage

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
STATUSES = st.sampled_from(["pending", "running", "completed", "failed", "cancelled"])
STEPS = st.lists(
    st.builds(
        StepProgress,
        step=TEXT,
        title=TEXT,
        arm=TEXT,
        depends_on=st.lists(TEXT, max_size=2).map(tuple),
        status=STATUSES,
        attempt=st.integers(0, 3),
        started_at=st.none() | st.floats(0, 1e9),
        message=TEXT,
        usage=st.builds(Usage, st.integers(0, 10**6), st.just(0), st.floats(0, 9)),
        needs_approval=st.booleans(),
    ),
    max_size=12,
)
TASKS = st.builds(
    TaskProgress,
    status=st.sampled_from(["", "accepted", "planning", "running", "waiting", "paused", "completed", "failed"]),
    progress=st.floats(0, 100),
    goal=TEXT,
    steps=STEPS.map(lambda steps: {step.step: step for step in steps}),
    texts=st.dictionaries(TEXT | st.just("plan"), TEXT, max_size=3),
    subtasks=st.lists(
        st.builds(SubTaskBranch, TEXT, TEXT, STATUSES, st.floats(0, 100), st.integers(1, 3)), max_size=3
    ).map(tuple),
    started_at=st.none() | st.floats(0, 1e9),
    deadline_at=st.none() | st.floats(0, 2e9),
    budget=st.builds(Budget, st.none() | st.integers(0, 9), st.none() | st.floats(0, 9)),
    usage=st.none() | st.builds(Usage, st.integers(0, 99), st.integers(0, 99), st.floats(0, 9)),
)


def draw(progress, width=80, height=24, now=100.0):
    return [line.plain for line in draw_tree(progress, width=width, height=height, now=now)]


@settings(max_examples=50)
@given(TASKS, st.integers(1, 120), st.integers(1, 40), st.floats(0, 2e9))
def test_it_fits_every_terminal_and_has_no_control_character(progress, width, height, now):
    lines = draw_tree(progress, width=width, height=height, now=now)
    assert 1 <= len(lines) <= height
    for line in lines:
        assert line.cell_len <= width
        assert make_visible(line.plain) == line.plain
        assert "\n" not in line.plain


@settings(max_examples=50)
@given(TASKS)
def test_what_stays_on_the_terminal_is_the_whole_plan(progress):
    lines = draw_tree(progress, width=400, height=None, now=0)
    assert len(lines) == 1 + len(progress.steps) + len(progress.subtasks) + (1 if progress.usage is None else 2)


def plan(*statuses, **more):
    steps = {f"s{n}": StepProgress(f"s{n}", f"Step {n}", "coder", status=s) for n, s in enumerate(statuses, 1)}
    return TaskProgress(status="running", goal="Do it", steps=steps, started_at=0.0, **more)


def test_it_shows_status_attempt_arm_text_time_cost_and_what_is_left():
    progress = plan("completed", "running", "pending", budget=Budget(max_tokens=4000, max_cost_usd=0.5))
    progress.progress = 40
    progress.steps["s1"].usage = Usage(1000, 234, 0.01)
    progress.steps["s1"].started_at, progress.steps["s1"].finished_at = 10.0, 13.2
    progress.steps["s2"].attempt, progress.steps["s2"].started_at = 2, 30.0
    progress.steps["s2"].message = "chunk 3 of 12"
    progress.steps["s3"].depends_on = ("s1", "s2")
    progress.texts = {"s2": "def f():\n\treturn 1"}
    progress.usage, progress.deadline_at = Usage(1000, 500, 0.02), 400.0
    progress.subtasks = (SubTaskBranch("task-00000000abcdefgh", "Look it up", "running", 20.0),)
    assert draw(progress) == [
        "⠋ Do it",
        "├─ ✓ s1  Step 1  coder  3 s  1,234 tokens  0.0100 USD",
        "├─ ⠋ s2  Step 2  coder  attempt 2  1:10",
        "│    │ chunk 3 of 12",
        "│    │ def f():",
        "│    │     return 1",
        "├─ ○ s3  Step 3  coder  after s1, s2",
        "└─ ⠋ sub-task abcdefgh  20 %  Look it up",
        "━━━━━━━━━━━━━━━━━━━━━━━━ 40 %  running  1:40",
        "1,500 tokens (2,500 left)  0.0200 USD (0.4800 left)  5:00 left",
    ]


def test_where_there_is_no_room_the_steps_under_way_stay():
    progress = plan("completed", "completed", "running", "pending", "pending", "running", "pending")
    progress.texts = {"s3": "text"}
    lines = draw(progress, height=6)
    assert [line[5:7] for line in lines[1:-2]] == ["s3", "s4", "s6"]
    assert lines[-2] == "└─ … 2 completed, 2 pending"
    assert draw(progress, height=1) == ["━━━━━━━━━━━━━━━━━━━━━━━━ 0 %  running  1:40"]


def test_texts_share_the_room_that_is_left():
    progress = plan("running", "running")
    progress.texts = {"s1": "\n".join("abcdefghij"), "s2": "x\n"}
    assert [line[-1] for line in draw(progress, height=9) if "    │ " in line] == ["i", "j", "x"]


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0 s"), (59.9, "59 s"), (185, "3:05"), (3723, "1:02:03")])
def test_times_are_for_people(seconds, text):
    assert format_duration(seconds) == text
