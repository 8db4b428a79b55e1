from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octollm.framing import (
    KEEPALIVE_COMMENT,
    LineDecoder,
    LineTooLongError,
    encode_ndjson,
    encode_sse,
    iter_ndjson,
    iter_sse,
)

STREAM = 'data: {"a": 1}\n\n: ping\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\ndata: \U0001f389\n\ndata: [DONE]'
EVENTS = [b'{"a": 1}', None, b"two\nlines", "\U0001f389".encode(), b"[DONE]"]
DOCUMENTS = st.dictionaries(st.text(), st.one_of(st.text(), st.integers(-(2**53), 2**53), st.none()), max_size=4)
CUTS = st.lists(st.integers(0, 200), max_size=12)


def cut(raw: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(min(at, len(raw)) for at in cuts), len(raw)]
    return [raw[a:b] for a, b in pairwise(edges)]


async def chunks(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def read(parts: Iterable[bytes], limit: int = 1000) -> list[bytes | None]:
    return [data async for data in iter_sse(chunks(parts), limit)]


@given(CUTS)
async def test_events_are_the_same_however_the_bytes_are_cut(cuts: list[int]) -> None:
    assert await read(cut(STREAM.encode(), cuts)) == EVENTS


async def test_an_empty_stream_has_no_events() -> None:
    assert await read([]) == []
    assert await read([b"\n\nevent: without data\n\n"]) == []
    assert await read([KEEPALIVE_COMMENT]) == [None]


@pytest.mark.parametrize("parts", [[b"data: " + b"x" * 2000 + b"\n\n"], [b"x" * 2000], [b"data: 1234567\n"] * 200])
async def test_an_event_is_bounded(parts: list[bytes]) -> None:
    with pytest.raises(LineTooLongError, match="too long"):
        await read(parts)


@given(st.lists(DOCUMENTS, max_size=5), CUTS)
async def test_encoded_events_are_decoded_however_the_bytes_are_cut(documents: list[object], cuts: list[int]) -> None:
    raw = b"".join(encode_sse(each, event_id=7, event="step") for each in documents)
    assert [msgspec.json.decode(data or b"") for data in await read(cut(raw, cuts), 100_000)] == documents


def test_an_event_has_its_fields_in_lines() -> None:
    assert (
        encode_sse({"a": "x\ny"}, event_id=3, event="task.done") == b'id: 3\nevent: task.done\ndata: {"a":"x\\ny"}\n\n'
    )
    assert encode_sse([1]) == b"data: [1]\n\n"


@given(st.lists(DOCUMENTS, max_size=5), CUTS)
async def test_ndjson_is_decoded_however_the_bytes_are_cut(documents: list[object], cuts: list[int]) -> None:
    raw = b"".join(map(encode_ndjson, documents))
    assert [each async for each in iter_ndjson(chunks(cut(raw, cuts)), dict[str, object], 100_000)] == documents


async def test_a_line_that_was_cut_off_is_not_decoded() -> None:
    lines = [each async for each in iter_ndjson(chunks([b'{"a":1}\n{"a"']), dict[str, int], 100)]
    assert lines == [{"a": 1}]


@pytest.mark.parametrize(
    "raw", [b"not json\n", b"[]\n", b"\xff\n", b"\n", b'{"a":"' + b"x" * 200 + b'"}\n', b"x" * 200]
)
async def test_a_malformed_or_long_line_is_an_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        _ = [each async for each in iter_ndjson(chunks([raw]), dict[str, str], 100)]


@given(st.binary(max_size=60), CUTS)
def test_lines_are_those_of_a_split(raw: bytes, cuts: list[int]) -> None:
    decoder = LineDecoder(100)
    lines = [line for part in cut(raw, cuts) for line in decoder.feed(part)]
    assert [*lines, decoder.rest] == raw.split(b"\n")
