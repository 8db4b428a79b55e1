from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.events import EVENT_CATALOGUE, Event, channel_of
from octollm.contracts.subscriptions import (
    PARTITIONS,
    AckId,
    EventSelector,
    SubscriptionSpec,
    partition_of,
)
from octollm.errors import OctoError


def event(event_type: str = "task.completed", subject: str = "task/task-1", **data: object) -> Event:
    return Event(event_type, "2025-11-10T10:30:00Z", "orchestrator", data, "e1", "t", subject, seq=1)


def test_the_partition_of_a_subject_is_the_same_for_ever() -> None:
    # Stored cursors belong to these numbers: a change of the hash would lose and repeat events.
    assert [partition_of("t", f"task/task-{n}") for n in range(5)] == [61, 43, 17, 7, 36]


@given(st.text(), st.text())
def test_each_subject_is_in_one_partition(tenant: str, subject: str) -> None:
    assert 0 <= partition_of(tenant, subject) < PARTITIONS


@pytest.mark.parametrize("name", [name for name, kind in EVENT_CATALOGUE.items() if kind.durable])
def test_a_channel_selects_its_type(name: str) -> None:
    assert EventSelector(SubscriptionSpec((channel_of(name),))).types == {name}


def test_patterns_select_families() -> None:
    types = EventSelector(SubscriptionSpec(("events:task:*", "events:arm:removed"))).types
    assert "task.completed" in types
    assert "arm.removed" in types
    assert "step.completed" not in types


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("events:tasks:*", "events:task:*"), ("events:task:complete", "events:task:completed"), ("nothing", "looks like")],
)
def test_a_pattern_that_matches_nothing_is_refused_with_what_is_near(pattern: str, near: str) -> None:
    with pytest.raises(OctoError) as refused:
        EventSelector(SubscriptionSpec(("events:arm:*", pattern)))
    assert refused.value.code == "invalid_body"
    assert refused.value.field_errors[0].pointer == "/patterns/1"
    assert near in refused.value.detail


def test_events_that_are_not_in_the_log_cannot_be_subscribed_to_durably() -> None:
    with pytest.raises(OctoError, match="not in the log"):
        EventSelector(SubscriptionSpec(("events:cache:*",)))


@pytest.mark.parametrize(
    ("subjects", "selected"),
    [((), True), (("task/*",), True), (("task/task-?",), True), (("arm/*",), False), (("task/[t]ask-1",), False)],
)
def test_subjects_are_glob_patterns(subjects: tuple[str, ...], selected: bool) -> None:
    selector = EventSelector(SubscriptionSpec(("events:task:*",), subjects=subjects))
    assert selector.matches(event()) is selected


@pytest.mark.parametrize(
    ("conditions", "selected"),
    [
        ({"status": "completed"}, True),
        ({"status": ("failed", "completed")}, True),
        ({"usage.tokens": 7}, True),
        ({"status": "failed"}, False),
        ({"missing": None}, False),
        ({"usage.tokens.more": 7}, False),
        ({"flag": 1}, False),
        ({"flag": True}, True),
    ],
)
def test_members_of_data_are_conditions(conditions: dict[str, object], selected: bool) -> None:
    spec = msgspec.convert({"patterns": ["events:task:*"], "data": conditions}, SubscriptionSpec)
    assert EventSelector(spec).matches(event(status="completed", usage={"tokens": 7}, flag=True)) is selected


@given(st.integers(0, 63), st.integers(0, 10**9), st.integers(0, 10**12), st.integers(0, 10**12))
def test_an_ack_id_is_read_back(partition: int, fence: int, after: int, seq: int) -> None:
    ack = AckId("log", partition, fence, after, seq)
    assert AckId.parse(str(ack), "") == ack


@pytest.mark.parametrize("text", ["", "l.64.1.1.1", "x.1.1.1.1", "l.1.1.1", "l.1.-1.1.1", "l.1.1.1.1\n", "9" * 500])
def test_any_other_ack_id_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(OctoError) as refused:
        AckId.parse(text, "/acked/3")
    assert refused.value.code == "invalid_body"
    assert refused.value.field_errors[0].pointer == "/acked/3"
