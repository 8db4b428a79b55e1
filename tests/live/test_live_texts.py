"""Which text is still to be sent, case by case; the session's property test covers how they combine."""

from __future__ import annotations

from octollm.contracts.api import StepText
from octollm.live import EntryResult, StepTextTracker, TextChunk, TextOffset
from octollm.live.step_text import MAX_CHUNK
from octollm.storage import TextEntry


def entry(at: int, text: str, offset: int = 0, *, attempt: int = 1, run: int = 1, reset: bool = False) -> TextEntry:
    return TextEntry(f"{at}-0", "a", attempt, run, offset, text, reset)


def begun(offset: TextOffset | None = None) -> StepTextTracker:
    book = StepTextTracker({} if offset is None else {"a": offset})
    book.start_attempt("a", 1, 1)
    return book


def test_pieces_are_joined_and_the_first_of_an_attempt_resets() -> None:
    book = begun()
    book.add(entry(1, "ab", reset=True))
    book.add(entry(2, "cd", 2))
    assert book.drain() == [TextChunk("a", 1, 1, 0, "abcd", True)]
    book.add(entry(3, "e", 4))
    assert book.drain() == [TextChunk("a", 1, 1, 4, "e", False)]
    assert book.drain() == []


def test_long_text_is_sent_in_pieces() -> None:
    book = begun()
    book.add(entry(1, "x" * (MAX_CHUNK + 1), reset=True))
    assert [(piece.offset, len(piece.text), piece.reset) for piece in book.drain()] == [
        (0, MAX_CHUNK, True),
        (MAX_CHUNK, 1, False),
    ]


def test_text_of_an_attempt_that_has_not_started_is_early() -> None:
    book = begun()
    assert book.add(entry(1, "x", attempt=2, reset=True)) is EntryResult.EARLY
    book.start_attempt("a", 2, 1)
    assert book.add(entry(1, "x", attempt=2, reset=True)) is EntryResult.ACCEPTED


def test_text_of_older_runs_and_attempts_is_dropped() -> None:
    book = begun()
    book.start_attempt("a", 2, 3)
    book.add(entry(1, "old attempt", attempt=1, run=3))
    book.add(entry(2, "old run", attempt=2, run=2))
    assert book.drain() == []


def test_a_newer_run_voids_what_was_sent() -> None:
    book = begun()
    book.add(entry(1, "abc", reset=True))
    book.drain()
    book.add(entry(2, "xy", run=2, reset=True))
    assert book.drain() == [TextChunk("a", 1, 2, 0, "xy", True)]


def test_missing_text_is_a_gap_and_what_was_saved_fills_it() -> None:
    book = begun()
    assert book.add(entry(1, "later", 10)) is EntryResult.GAP
    book.restore(StepText("a", 1, 1, "0123456789la"))
    assert book.add(entry(1, "later", 10)) is EntryResult.ACCEPTED
    assert [piece.text for piece in book.drain()] == ["0123456789later"]


def test_a_watcher_goes_on_from_its_offset() -> None:
    book = begun(TextOffset(1, 1, 3))
    book.add(entry(1, "abcdef", reset=True))
    assert book.drain() == [TextChunk("a", 1, 1, 3, "def", False)]


def test_a_watcher_with_void_text_starts_anew() -> None:
    book = begun(TextOffset(1, 1, 3))
    book.add(entry(1, "abc", reset=True))
    book.add(entry(2, "new", 3, reset=True))
    assert book.drain() == [TextChunk("a", 1, 1, 3, "new", True)]


def test_a_reset_with_nothing_after_it_is_told() -> None:
    book = begun()
    book.add(entry(1, "abc", reset=True))
    book.drain()
    book.add(entry(2, "", 3, reset=True))
    assert book.drain() == [TextChunk("a", 1, 1, 3, "", True)]


def test_the_planners_text_ends_with_its_plan() -> None:
    def plan(at: int, attempt: int) -> TextEntry:
        return TextEntry(f"{at}-0", "plan", attempt, 1, 0, "text", True)

    book = StepTextTracker({})
    assert book.add(plan(1, 1)) is EntryResult.ACCEPTED
    assert [piece.step for piece in book.drain()] == ["plan"]
    book.record_plan()
    book.add(plan(2, 1))
    assert book.drain() == []
    book.add(plan(3, 2))
    assert [(piece.step, piece.attempt) for piece in book.drain()] == [("plan", 2)]


def test_offsets_count_code_points() -> None:
    book = begun(TextOffset(1, 1, 2))
    book.add(entry(1, "é🐙ß", reset=True))
    assert book.drain() == [TextChunk("a", 1, 1, 2, "ß", False)]


def test_a_step_that_is_over_waits_for_no_text() -> None:
    book = begun()
    assert book.get_offset("a", 1) == 0
    book.end_attempt("a", 1)
    assert book.get_offset("a", 1) > 10**9
