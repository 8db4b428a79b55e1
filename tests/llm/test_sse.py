from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.llm.openai_protocol import iter_sse_data

STREAM = 'data: {"a": 1}\n\n: ping\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\ndata: \U0001f389\n\ndata: [DONE]'
EVENTS = [b'{"a": 1}', b"two\nlines", "\U0001f389".encode(), b"[DONE]"]


async def chunks(parts):
    for part in parts:
        yield part


async def read(parts, limit=1000):
    return [data async for data in iter_sse_data(chunks(parts), limit)]


@given(st.lists(st.integers(0, len(STREAM.encode()))))
async def test_events_are_the_same_however_the_bytes_are_cut(cuts):
    raw = STREAM.encode()
    edges = [0, *sorted(cuts), len(raw)]
    assert await read([raw[a:b] for a, b in pairwise(edges)]) == EVENTS


async def test_nothing_gives_nothing():
    assert await read([]) == []
    assert await read([b"\n\n: only a comment\n\n"]) == []


@pytest.mark.parametrize("parts", [[b"data: " + b"x" * 2000 + b"\n\n"], [b"x" * 2000], [b"data: 1234567\n"] * 200])
async def test_an_event_is_bounded(parts):
    with pytest.raises(ValueError, match="too long"):
        await read(parts)
