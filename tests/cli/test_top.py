"""`octollm top`: what it draws, that it fits, and that it controls no terminal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octollm.cli.output import make_visible
from octollm.cli.top import OPEN_STATUSES, ServiceFigures, Snapshot, draw_top
from octollm.contracts.api import TaskSummary

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
RATIO = st.none() | st.floats(0, 1)
SERVICES = st.lists(
    st.builds(
        ServiceFigures,
        TEXT,
        st.sampled_from(["up", "degraded", "down", "unknown"]),
        st.integers(0, 9),
        st.none() | st.integers(0, 99),
        st.none() | st.floats(0, 1e4),
        RATIO,
        st.none() | st.floats(0, 1e5),
        TEXT,
    ),
    max_size=12,
).map(tuple)
TASKS = st.lists(
    st.builds(TaskSummary, TEXT, st.sampled_from(OPEN_STATUSES), TEXT, st.floats(0, 100), TEXT, TEXT), max_size=20
).map(tuple)
SNAPSHOTS = st.builds(Snapshot, st.just(100.0), SERVICES, TASKS, st.lists(TEXT, max_size=2).map(tuple))


@settings(max_examples=50)
@given(SNAPSHOTS, st.integers(1, 120), st.integers(1, 40))
def test_it_fits_every_terminal(snapshot, width, height):
    lines = draw_top(snapshot, width=width, height=height, now=200.0)
    assert 1 <= len(lines) <= height
    for line in lines:
        assert line.cell_len <= width
        assert "\n" not in line.plain
        assert make_visible(line.plain) == line.plain


def task(number, status="running", progress=40.0):
    return TaskSummary(f"task-{number:032x}", status, f"Goal {number}", progress, "1970-01-01T00:00:40Z", "")


FIGURES = (
    ServiceFigures("reflex", "up", 2, 3, 12.43, 0.0, 8.25),
    ServiceFigures("judge", "degraded", 2, 0, 1.0, 0.025, 41.0, "http://judge-2 does not answer."),
    ServiceFigures("memory", "up", 1),
)


def test_it_says_what_runs_and_how_well():
    shown = draw_top(Snapshot(100.0, FIGURES, (task(2, "waiting"), task(1))), width=110, height=24, now=100.0)
    lines = [line.plain.rstrip() for line in shown]
    assert lines == [
        "OctoLLM  1 running, 1 waiting",
        "",
        "Service       State     Replicas  In flight   Req/s   Errors       p95",
        "judge         degraded         2          0     1.0     2.5%   41.0 ms  http://judge-2 does not answer.",
        "reflex        up               2          3    12.4     0.0%    8.2 ms",
        "memory        up               1          –       –        –         –",
        "",
        "Task                                   Status      %      Age  Goal",
        "task-00000000000000000000000000000001  running    40     1:00  Goal 1",
        "task-00000000000000000000000000000002  waiting    40     1:00  Goal 2",
    ]


@pytest.mark.parametrize("height", [10, 12])
def test_a_small_terminal_shows_what_is_wrong_and_what_runs(height):
    snapshot = Snapshot(100.0, FIGURES, tuple(task(number) for number in range(30)))
    text = "\n".join(line.plain for line in draw_top(snapshot, width=60, height=height, now=100.0))
    for words in ("30 running", "degraded", "Goal 0", "more"):
        assert words in text
