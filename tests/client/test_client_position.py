"""What a watcher has seen decides what is new: nothing is lost, nothing comes twice."""

from __future__ import annotations

from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.client import Update
from octollm.client.streams import MAX_OFFSETS, StreamGapError, StreamPosition

TASK = "task-" + "a" * 32


def event(seq, kind="status", **data):
    return Update(TASK, kind, seq, float(seq), data=data)


def token(text, offset, *, attempt=1, run=1, step="s1", reset=False):
    return Update(
        TASK, "token", 0, 0.0, data={"text": text}, step=step, attempt=attempt, run=run, offset=offset, reset=reset
    )


def test_an_event_counts_once():
    position = StreamPosition()
    assert position.advance(event(1))
    assert position.advance(event(2))
    assert not position.advance(event(2))
    assert not position.advance(event(1))
    assert position.to_query() == "after=2"


def test_an_event_that_was_left_out_is_noticed():
    position = StreamPosition(2)
    with pytest.raises(StreamGapError):
        position.advance(event(4))
    assert position.to_query() == "after=2"


def test_text_counts_once_and_its_place_is_kept():
    position = StreamPosition(4)
    assert position.advance(token("ab", 0))
    assert position.advance(token("cd", 2))
    assert not position.advance(token("cd", 2))
    assert parse_qs(position.to_query()) == {"after": ["4"], "offset": ["s1.1.1.4"]}


def test_of_text_that_was_seen_in_part_the_rest_is_new():
    position = StreamPosition()
    position.advance(token("abc", 0))
    rest = position.advance(token("bcde", 1))
    assert rest is not None
    assert (rest.offset, rest.text) == (3, "de")


def test_text_that_was_left_out_is_noticed():
    position = StreamPosition()
    position.advance(token("abc", 0))
    for late in (token("x", 4), token("x", 1, run=2), token("x", 1, step="s2")):
        with pytest.raises(StreamGapError):
            position.advance(late)


def test_a_newer_run_begins_again_and_an_older_is_over():
    position = StreamPosition()
    position.advance(token("abcd", 0))
    assert position.advance(token("x", 0, run=2, reset=True))
    assert not position.advance(token("efgh", 4, run=1))
    assert position.texts == {"s1": (1, 2, 1)}


def test_a_step_that_is_over_has_no_offset():
    position = StreamPosition()
    position.advance(token("abcd", 0))
    position.advance(event(1, "step", step="s1", text_length=4))
    assert position.to_query() == "after=1"


def test_no_more_steps_are_named_than_the_gateway_takes():
    position = StreamPosition()
    for number in range(MAX_OFFSETS + 5):
        position.advance(token("x", 0, step=f"s{number}"))
    position.advance(token("y", 1, step="s0"))
    named = [one.partition(".")[0] for one in parse_qs(position.to_query())["offset"]]
    assert len(named) == MAX_OFFSETS
    assert named[-1] == "s0"


def test_a_ping_says_nothing():
    assert not StreamPosition().advance(event(7, "ping"))


@given(
    st.text(min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=12),
)
def test_however_a_text_is_cut_and_sent_again_it_comes_out_whole(text, cuts):
    position = StreamPosition()
    found = ""
    for back, length in [*cuts, (0, len(text))]:
        # A new connection goes on from the place that is known, or from before it.
        start = max(0, len(found) - back)
        piece = text[start : start + length]
        new = position.advance(token(piece, start)) if piece else None
        found += new.text if new is not None else ""
    assert found == text


@given(st.lists(st.integers(1, 12), max_size=60))
def test_what_is_taken_has_no_gaps(seqs):
    position = StreamPosition()
    taken = []
    for seq in seqs:
        try:
            if position.advance(event(seq)):
                taken.append(seq)
        except StreamGapError:
            assert seq > position.seq + 1
    assert taken == list(range(1, len(taken) + 1))
