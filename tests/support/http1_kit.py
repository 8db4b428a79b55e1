"""What HTTP/1.1 requests are made of, in our parser and in h11, for tests and the fuzzer to compare."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import h11

from octollm.errors import OctoError
from octollm.rpc.http1_parser import END, Http1Parser, RequestHead

Request = tuple[str, bytes, tuple[tuple[bytes, bytes], ...], bytes, bool]
"""Method, target, headers, body, and whether all of it is there."""


@dataclass(frozen=True)
class ParsedBytes:
    """What a parser made of the bytes of a connection."""

    requests: tuple[Request, ...]
    error: str = ""


def read_ours(pieces: Sequence[bytes]) -> ParsedBytes:
    """Read bytes that come in ``pieces``; a request that says ``Connection: close`` is the last."""
    parser = Http1Parser()
    requests: list[tuple[RequestHead, bytearray, bool]] = []
    error = ""
    try:
        for piece in pieces:
            parser.receive_data(piece)
            while (event := parser.next_event()) is not None:
                if isinstance(event, RequestHead):
                    requests.append((event, bytearray(), False))
                elif event is END:
                    head, body, _ = requests[-1]
                    requests[-1] = (head, body, True)
                    if head.keep_alive:
                        parser.start_next()
                else:
                    assert event, "an empty piece of a body"
                    requests[-1][1].extend(event)
    except OctoError as fault:
        error = fault.code
    return ParsedBytes(
        tuple(
            (
                head.method,
                head.target,
                # h11 gives this value in lower case.
                tuple((name, value.lower() if name == b"transfer-encoding" else value) for name, value in head.headers),
                bytes(body),
                end,
            )
            for head, body, end in requests
        ),
        error,
    )


def read_h11(data: bytes) -> ParsedBytes:
    """Read the same with h11, answering each request so that the next is read."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=48 * 1024)
    connection.receive_data(data)
    requests: list[tuple[h11.Request, bytearray, bool]] = []
    error = ""
    try:
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Request):
                requests.append((event, bytearray(), False))
            elif isinstance(event, h11.Data):
                requests[-1][1].extend(event.data)
            elif isinstance(event, h11.EndOfMessage):
                head, body, _ = requests[-1]
                requests[-1] = (head, body, True)
                connection.send(h11.Response(status_code=404, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is not h11.DONE:
                    break
                connection.start_next_cycle()
            else:
                break
    except h11.RemoteProtocolError:
        error = "malformed_request"
    return ParsedBytes(
        tuple(
            (head.method.decode(), head.target, tuple((name, value) for name, value in head.headers), bytes(body), end)
            for head, body, end in requests
        ),
        error,
    )


_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"))
_TARGET = re.compile(rb"/.*|\*|https?://[\w.:\[\]-]+([/?].*)?")


def _in_bytes(pattern: bytes) -> Callable[[bytes, Request], bool]:
    found = re.compile(pattern).search
    return lambda data, _request: found(data) is not None


REFUSED_ON_PURPOSE: Mapping[str, Callable[[bytes, Request], bool]] = {
    "a line that ends with LF alone (RFC 9112 section 2.2 lets us)": _in_bytes(rb"(?:^|[^\r])\n"),
    "a control byte": _in_bytes(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)"),
    "a folded line (section 5.2)": _in_bytes(rb"\n[ \t]"),
    "a version of HTTP other than 1.0 and 1.1": _in_bytes(rb" HTTP/(?!1\.[01])"),
    "a method that llhttp does not know": lambda _data, request: request[0] not in _METHODS,
    "a target of no form of section 3.2": lambda _data, request: _TARGET.fullmatch(request[1]) is None,
    "a length that is said twice (section 6.3)": _in_bytes(rb"(?i)\ncontent-length:[^\r]*(,|(?s:.)*\ncontent-length:)"),
    "a length beside chunks (section 6.1)": _in_bytes(
        rb"(?is)\ncontent-length:.*\ntransfer-encoding:|\ntransfer-encoding:.*\ncontent-length:"
    ),
    "chunks in HTTP/1.0 (section 6.1)": _in_bytes(rb"(?is)HTTP/1\.0\r.*\ntransfer-encoding:"),
}
"""What h11 accepts and we do not: why, and how to tell by the bytes of the connection and what h11 read."""

LEADING_LINES = re.compile(rb"(?:^|\n)\r\n")
"""What we accept and h11 does not: empty lines before a request line (RFC 9112 section 2.2)."""


def check_alike(data: bytes) -> None:
    """Raise ``AssertionError`` if the two parsers differ in a request that one of them read whole."""
    ours = [request for request in read_ours([data]).requests if request[-1]]
    theirs = [request for request in read_h11(data).requests if request[-1]]
    common = min(len(ours), len(theirs))
    assert ours[:common] == theirs[:common]
    if len(ours) > common:
        assert LEADING_LINES.search(data), f"h11 refuses {ours[common]}"
    elif len(theirs) > common:
        assert any(applies(data, theirs[common]) for applies in REFUSED_ON_PURPOSE.values()), (
            f"only h11 accepts {theirs[common]}"
        )
