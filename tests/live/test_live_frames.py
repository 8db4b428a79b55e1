"""One event, one frame; seq contiguous, progress never falling. And the parameters of a resume."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.api import TaskView
from octollm.contracts.events import EVENT_CATALOGUE, Event
from octollm.errors import OctoError
from octollm.live import (
    FINAL_EVENTS,
    FrameBuilder,
    ResumePosition,
    TextChunk,
    TextOffset,
    get_frame_type,
    parse_resume_position,
)

NAMES = sorted(name for name in EVENT_CATALOGUE if name.startswith(("task.", "step.")))


def event(version: int, name: str, progress: object) -> Event:
    return Event(name, "then", "orchestrator", {"progress": progress}, "id", "t", "task/x", version=version)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.one_of(st.none(), st.floats(), st.integers(-5, 300), st.text(max_size=3), st.booleans()),
            st.sampled_from(["event", "token", "ping", "note", "present"]),
        )
    )
)
def test_seq_is_contiguous_and_progress_never_falls(script: list[tuple[str, object, str]]) -> None:
    maker = FrameBuilder("task-x")
    version, progress = 0, 0.0
    for name, value, kind in script:
        if kind == "event":
            version += 1
            frame = maker.build_event(event(version, name, value))
            assert frame.type == get_frame_type(name)
        elif kind == "token":
            frame = maker.build_token(TextChunk("a", 1, 1, 0, "text", False), "now")
        elif kind == "present":
            frame = maker.build_status(TaskView("task-x", "running", "g", progress - 1, version, "a", "b"), "now")
        else:
            frame = maker.build_ping("now") if kind == "ping" else maker.build_note({"code": "x"}, "now")
        assert frame.seq == version
        assert 0.0 <= progress <= frame.progress <= 100.0
        progress = frame.progress


def test_the_types_are_those_of_the_contract() -> None:
    assert {name: get_frame_type(name) for name in NAMES} == {
        "task.accepted": "status",
        "task.planning": "status",
        "task.planned": "status",
        "task.replanned": "status",
        "task.started": "status",
        "task.waiting": "status",
        "task.approved": "status",
        "task.paused": "status",
        "task.resumed": "status",
        "task.instructed": "status",
        "task.extended": "status",
        "task.cancelled": "status",
        "task.progress": "progress",
        "step.started": "step",
        "step.completed": "step",
        "step.failed": "step",
        "step.skipped": "step",
        "task.completed": "result",
        "task.failed": "error",
    }
    assert {"task.completed", "task.failed", "task.cancelled"} == FINAL_EVENTS


def test_an_event_that_is_new_to_this_version_is_still_a_frame() -> None:
    assert FrameBuilder("task-x").build_event(event(1, "task.dreamt", None)).type == "status"


def test_a_completed_task_is_at_a_hundred() -> None:
    assert FrameBuilder("task-x").build_event(event(1, "task.completed", None)).progress == 100.0


def test_data_says_which_event_it_was() -> None:
    frame = FrameBuilder("task-x").build_event(event(1, "task.planned", 5))
    assert frame.data == {"event_type": "task.planned", "status": "planning", "progress": 5}


def test_a_resume_is_read() -> None:
    assert parse_resume_position(None, []) == ResumePosition(None, {})
    assert parse_resume_position("12", ["a.1.2.34", "step-2-again.10.3.0"]) == ResumePosition(
        12, {"a": TextOffset(1, 2, 34), "step-2-again": TextOffset(10, 3, 0)}
    )
    assert parse_resume_position("0", ["a.b.1.2.3"]).offsets == {"a.b": TextOffset(1, 2, 3)}


@pytest.mark.parametrize(
    ("after", "offsets"),
    [
        ("", []),
        ("-1", []),
        ("1.5", []),
        ("٣", []),
        ("1" * 16, []),
        (None, ["a"]),
        (None, ["a.1.2"]),
        (None, ["a.1.2.x"]),
        (None, [".1.2.3"]),
        (None, ["a/b.1.2.3"]),
        (None, ["a.1.2.3", "a.1.2.4"]),
        (None, [f"s{n}.1.1.1" for n in range(65)]),
    ],
)
def test_a_malformed_resume_is_refused(after: str | None, offsets: list[str]) -> None:
    with pytest.raises(OctoError) as caught:
        parse_resume_position(after, offsets)
    assert caught.value.code == "invalid_parameter"
