"""Requests in bytes: each cut gives the same result, and h11 reads the same."""

from __future__ import annotations

import itertools

import pytest
from http1_kit import REFUSED_ON_PURPOSE, ParsedBytes, check_alike, read_h11, read_ours
from hypothesis import example, given
from hypothesis import strategies as st

from octollm.rpc.http1_parser import END, MAX_HEADER_BYTES, MAX_URL_BYTES, Http1Parser, RequestHead

GET = b"GET /a?b=1 HTTP/1.1\r\nHost: a\r\nX-Blank:  b c \t\r\nX-Empty:\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nhost: a\r\nContent-Length: 5\r\n\r\nhello"
CHUNKS = (
    b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n"
    b"5;x=y\r\nhello\r\n00c \r\n and\r\n\r\n all\r\n0\r\nTrailer: 1\r\nX-Other:\r\n\r\n"
)
OLD = b"GET /z HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
LAST = b"PUT /e HTTP/1.1\r\nHost:a\r\nContent-Length:0\r\nConnection: x, Close\r\n\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\r\n"
SEVERAL = GET + POST + CHUNKS + GET + LAST + GET
GOOD = [GET, POST, CHUNKS, OLD, LAST, SEVERAL, CHUNKS + CHUNKS + OLD + GET, POST + UPGRADE]

WRONG = {
    "no method": b"\x16\x03\x01\x02\x00\x01",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a line without a version": b"GET /\r\n\r\n",
    "two blanks": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a blank in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "LF after the request line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "LF after a header": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "LF and nothing more": b"GET / HTTP/1.1\r\nHost: a\n\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "a blank before the colon": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "a folded line": b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
    "a control byte": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x0bb\r\n\r\n",
    "a method in lower case": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a length of no digits": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a length and chunks": CHUNKS.replace(b"Transfer", b"Content-Length: 5\r\nTransfer"),
    "another encoding": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"POST / HTTP/1.1\r\nHost: a\r\n" + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk without a size": CHUNKS.replace(b"5;x=y", b";x=y"),
    "a chunk with a sign": CHUNKS.replace(b"5;x=y", b"+5"),
    "a chunk that is too long": CHUNKS.replace(b"hello", b"hello!"),
    "a chunk whose line never ends": CHUNKS.replace(b"x=y", b"x" * 5000),
    "a wrong trailer": CHUNKS.replace(b"Trailer:", b"Trailer"),
}
BEYOND = {
    "header_too_large": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * (MAX_HEADER_BYTES - 14),
    "url_too_long": b"GET /" + b"x" * MAX_URL_BYTES,
}


@pytest.mark.parametrize("data", GOOD)
def test_every_cut_of_good_requests_gives_the_same(data: bytes) -> None:
    whole = read_ours([data])
    assert whole.error == ""
    assert all(request[-1] for request in whole.requests)
    assert read_ours([data[n : n + 1] for n in range(len(data))]) == whole
    for cut in range(len(data)):
        assert read_ours([data[:cut], data[cut:]]) == whole


@pytest.mark.parametrize("data", GOOD[:-1])  # the last asks for another protocol, which h11 leaves to its user
def test_h11_reads_good_requests_alike(data: bytes) -> None:
    assert read_ours([data]) == read_h11(data)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_refused_however_they_are_cut(name: str) -> None:
    data = WRONG[name]
    whole = read_ours([data])
    assert whole.error == "malformed_request"
    assert not any(request[-1] for request in whole.requests)
    for cut in range(len(data)):
        assert read_ours([data[:cut], data[cut:]]) == whole
    check_alike(data)


def boundaries(edge: int, size: int) -> list[int]:
    return [cut for cut in (1, 20, *range(edge - 6, edge + 6), size - 3, size - 1) if 0 < cut < size]


@pytest.mark.parametrize("size", range(-3, 4))
def test_the_bound_of_headers_does_not_depend_on_the_cut(size: int) -> None:
    line, host = b"GET / HTTP/1.1\r\n", b"Host: a\r\n"
    filling = MAX_HEADER_BYTES - len(host) - len(b"X: \r\n") + size
    data = line + host + b"X: " + b"x" * filling + b"\r\n\r\n"
    whole = read_ours([data])
    assert whole.error == ("header_too_large" if size > 0 else "")
    assert len(whole.requests) == (size <= 0)
    for cut in boundaries(len(line) + MAX_HEADER_BYTES, len(data)):
        assert read_ours([data[:cut], data[cut:]]) == whole


@pytest.mark.parametrize("size", range(-3, 4))
def test_the_bound_of_urls_does_not_depend_on_the_cut(size: int) -> None:
    for head in (b"", POST):
        data = head + b"GET /" + b"x" * (MAX_URL_BYTES - 1 + size) + b" HTTP/1.1\r\nHost: a\r\n\r\n"
        whole = read_ours([data])
        assert whole.error == ("url_too_long" if size > 0 else "")
        for cut in boundaries(MAX_URL_BYTES + 64, len(data)):
            assert read_ours([data[:cut], data[cut:]]) == whole


@pytest.mark.parametrize("code", BEYOND)
def test_what_is_too_long_is_refused_before_it_ends(code: str) -> None:
    assert read_ours([BEYOND[code]]).error == ""
    assert read_ours([BEYOND[code] + b"x" * 100]).error == code
    assert read_ours([POST, BEYOND[code], b"x" * 100]).error == code


def test_trailers_are_bounded_and_reach_nobody() -> None:
    start = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    whole = read_ours([start + b"Authorization: Bearer x\r\n\r\n"])
    assert whole.requests == (("POST", b"/", ((b"host", b"a"), (b"transfer-encoding", b"chunked")), b"", True),)
    for many in (40, 4000):
        assert read_ours([start + b"X: y\r\n" * many + b"\r\n"]).error == ""
    assert read_ours([start + b"X: y\r\n" * 6000]).error == "header_too_large"
    assert read_ours([start, *[b"X: y\r\n"] * 6000]).error == "header_too_large"


def test_the_next_request_waits_for_its_turn() -> None:
    parser = Http1Parser()
    parser.receive_data(GET + POST)
    assert isinstance(parser.next_event(), RequestHead)
    assert parser.next_event() is END
    assert parser.next_event() is None
    assert parser.buffered == len(POST)
    parser.start_next()
    head = parser.next_event()
    assert isinstance(head, RequestHead)
    assert (head.method, head.length) == ("POST", 5)


def test_what_a_head_says_of_its_connection() -> None:
    def head(*fields: bytes, version: bytes = b"1.1", method: bytes = b"GET") -> RequestHead:
        parser = Http1Parser()
        lines = [method + b" / HTTP/" + version, b"Host: a", *fields, b"", b""]
        parser.receive_data(b"\r\n".join(lines))
        event = parser.next_event()
        assert isinstance(event, RequestHead)
        return event

    assert head().keep_alive
    assert not head(b"Connection: keep-alive", version=b"1.0").keep_alive
    assert not head(b"Connection: a", b"Connection:\tb , CLOSE\t").keep_alive
    assert head(b"Expect: 100-Continue").expects_continue
    assert not head(b"Expect: 100-continue", version=b"1.0").expects_continue
    asks = (b"Upgrade: WebSocket", b"Connection: keep-alive, upgrade")
    assert head(*asks).upgrades_to_websocket
    for other in (
        head(*asks, method=b"POST"),
        head(*asks, version=b"1.0"),
        head(asks[0]),
        head(b"Upgrade: h2c", asks[1]),
    ):
        assert not other.upgrades_to_websocket


def test_a_request_that_asks_for_an_unknown_protocol_keeps_its_body() -> None:
    data = POST.replace(b"host: a", b"Host: a\r\nConnection: Upgrade\r\nUpgrade: h2c")
    assert read_ours([data]).requests[0][3:] == (b"hello", True)


PARTS = st.sampled_from(
    [
        *GOOD, *WRONG.values(), b"\r\n", b"\r\n\r\n", b"\n", b"\r", b" ", b"\t", b":", b": ", b",", b";", b"0\r\n",
        b"Host: b\r\n", b"Content-Length: 3\r\n", b"Content-Length: 3, 3\r\n", b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"CONNECT a:1 HTTP/1.1\r\n",
        b"OPTIONS * HTTP/1.1\r\n", b"GET http://a/b HTTP/1.1\r\n",
        b"HTTP/1.0", b"HTTP/1.2", b"\xff", b"\x00", b"\x0b", b"#", b"%zz", b"[", b"@",
    ]
)  # fmt: skip


@st.composite
def connections(draw: st.DrawFn) -> bytes:
    """Good requests with something put in the place of a few of their bytes."""
    data = b"".join(draw(st.lists(st.sampled_from(GOOD), min_size=1, max_size=2)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        gone = draw(st.sampled_from([0, 0, 1, 2, 7]))
        data = data[:at] + draw(PARTS | st.binary(min_size=1, max_size=2)) + data[at + gone :]
    return data


@given(connections())
@example(b"GET / HTTP/1.1\r\nHost: a\r\nX: b \r\n\r\n")
@example(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")
def test_h11_reads_any_request_alike_but_for_the_named_exceptions(data: bytes) -> None:
    check_alike(data)


@given(connections(), st.lists(st.integers(0, 400), max_size=6))
def test_any_cut_of_any_bytes_gives_the_same(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    assert read_ours([piece for piece in pieces if piece]) == read_ours([data])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (GET.replace(b"\r\n", b"\n"), 0),
        (GET.replace(b"b c", b"b\x01c"), 1),
        (GET.replace(b"b c", b"b\r\n c"), 2),
        (OLD.replace(b"1.0", b"1.3").replace(b"Connection", b"Host"), 3),
        (GET.replace(b"GET", b"OCTO"), 4),
        (GET.replace(b"/a", b"a"), 5),
        (POST.replace(b"5", b"5\r\nContent-Length: 5"), 6),
        (POST.replace(b"5", b"5, 5"), 6),
        (CHUNKS.replace(b"Transfer", b"Content-Length: 5\r\nTransfer"), 7),
        (CHUNKS.replace(b"HTTP/1.1", b"HTTP/1.0"), 8),
    ],
)
def test_each_named_exception_is_one(data: bytes, reason: int) -> None:
    assert read_ours([data]).error == "malformed_request"
    (request,) = read_h11(data).requests
    assert request[-1]
    assert list(REFUSED_ON_PURPOSE.values())[reason](data, request)


def test_empty_lines_before_a_request_are_ignored() -> None:
    assert read_ours([b"\r\n\r\n" + GET]) == read_ours([GET])
    assert read_h11(b"\r\n" + GET) == ParsedBytes((), "malformed_request")
