from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octollm.contracts.events import Event
from octollm.events.log_tail import Position, TailWindow


def batch(first: int, last: int, mark: str = "") -> list[Event]:
    return [Event("task.progress", "", "o", {}, f"{mark}{seq}", "t", "s", seq=seq) for seq in range(first, last + 1)]


def positions(window: TailWindow, after: int, limit: int = 100) -> list[int] | None:
    found = window.after(after, limit)
    return None if found is None else [event.seq for event in found]


def test_a_reader_within_the_window_gets_what_follows() -> None:
    window = TailWindow()
    assert positions(window, 0) is None
    assert window.append(batch(5, 9), 100)
    assert positions(window, 4) == [5, 6, 7, 8, 9]
    assert positions(window, 7, limit=1) == [8]
    assert positions(window, 9) == []
    assert positions(window, 3) is None, "the log has what is before the window"
    assert positions(window, 10) is None


def test_a_repeated_batch_changes_nothing_and_an_overlap_adds_its_end() -> None:
    window = TailWindow()
    window.append(batch(1, 5), 100)
    assert not window.append(batch(2, 4), 100)
    assert window.append(batch(4, 7), 100)
    assert positions(window, 0) == [1, 2, 3, 4, 5, 6, 7]


def test_a_batch_after_a_gap_begins_a_new_window() -> None:
    window = TailWindow()
    window.append(batch(1, 5), 100)
    assert window.append(batch(8, 9), 100)
    assert positions(window, 5) is None
    assert positions(window, 7) == [8, 9]


def test_an_old_batch_and_one_with_a_hole_are_ignored() -> None:
    window = TailWindow()
    window.append(batch(10, 12), 100)
    assert not window.append(batch(1, 3), 100)
    assert not window.append([*batch(13, 13), *batch(15, 15)], 100)
    assert positions(window, 9) == [10, 11, 12]


def test_a_log_that_was_restored_and_went_on_differently_replaces_the_window() -> None:
    window = TailWindow()
    window.append(batch(10, 12), 100)
    assert window.append(batch(11, 13, mark="restored-"), 100)
    found = window.after(10, 10)
    assert found is not None
    assert [event.id for event in found] == ["restored-11", "restored-12", "restored-13"]


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12)), max_size=40), st.integers(0, 70))
def test_it_never_has_a_hole_or_a_repeat_and_stays_within_its_bounds(
    batches: list[tuple[int, int]], after: int
) -> None:
    window = TailWindow(max_events=20, max_bytes=4000)
    for first, count in batches:
        window.append(batch(first, first + count), 100 * (count + 1))
    found = positions(window, after)
    if found:
        assert found == list(range(after + 1, found[-1] + 1))
        assert found[-1] == window.last
    assert all(len(window.after(position, 10**6) or ()) <= 20 for position in range(75))


def test_what_the_window_has_is_known_by_place_and_id() -> None:
    window = TailWindow()
    assert not window.has([Position("5", 5)])
    window.append(batch(5, 7), 100)
    assert window.has([Position("5", 5), Position("7", 7)])
    assert not window.has([Position("7", 7), Position("8", 8)])
    assert not window.has([Position("4", 4)])
    assert not window.has([Position("restored-6", 6)])
    assert not window.has([])
