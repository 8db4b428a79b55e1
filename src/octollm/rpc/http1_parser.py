"""An incremental parser of HTTP/1.1 requests (RFC 9112) without I/O: bytes in, events out.

The grammar of a head is that of llhttp (httptools); bounds, framing of bodies and the rules that llhttp leaves to its
user are here. Events depend on the bytes alone, never on how the network has cut them: a head is parsed once it is
whole, and every bound is compared with a length that each cut agrees on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import Final

import httptools
import msgspec

from octollm.errors import OctoError

MAX_HEADER_BYTES = 32 * 1024
"""Bytes of all header fields of a request, and of its trailers."""
MAX_URL_BYTES = 8 * 1024
"""Bytes of a request target. RFC 9110 section 4.1 asks for 8000 at least."""
# Room for the method and the version, which the length of the target does not count.
_MAX_LINE_BYTES = MAX_URL_BYTES + 64
_MAX_CHUNK_LINE_BYTES = 4 * 1024
_FIELDS_LIMIT = MAX_HEADER_BYTES + 2
"""Bytes of header fields with the empty line after them."""

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_LINE_START = re.compile(_TOKEN)
_REQUEST_LINE = re.compile(_TOKEN + rb"+ ([\x21-\x7e]+) HTTP/(1\.[01])\r\n")
_BARE_LF = re.compile(rb"[^\r]\n")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,20})(?:;[\t\x20-\x7e\x80-\xff]*)?[ \t]*")
_TRAILERS = re.compile(rb"(?:" + _TOKEN + rb"+:[\t\x20-\x7e\x80-\xff]*\r\n)+")
_FRAMING_HEADERS = frozenset((b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade"))

Headers = list[tuple[bytes, bytes]]


class RequestHead(msgspec.Struct, frozen=True):
    """The request line and header fields of one request."""

    method: str
    target: bytes
    version: str
    """``1.0`` or ``1.1``."""
    headers: Headers
    """Names in lower case, values without blanks around them (RFC 9110 section 5.5)."""
    length: int | None
    """Bytes of the body; ``None`` if it comes in chunks."""
    keep_alive: bool
    expects_continue: bool
    """The client waits for ``100 Continue`` before it sends the body."""
    upgrades_to_websocket: bool


class EndOfRequest(Enum):
    """The event after the last byte of a request."""

    END = "end"


END: Final = EndOfRequest.END
Event = RequestHead | bytes | EndOfRequest


class Http1Parser:
    """Parses the requests of one connection, one at a time.

    After :data:`END` it pauses until :meth:`start_next`, so that a client that sends ahead (pipelining) is served in
    order. An error is final.
    """

    __slots__ = ("_buffer", "_line_end", "_read", "_remaining", "_scanned")

    def __init__(self) -> None:
        self._buffer = b""
        self._read: Callable[[Http1Parser], Event | None] = Http1Parser._read_head
        self._line_end = 0
        """Where the request line ends; 0 while that is not known."""
        self._scanned = 0
        self._remaining = 0
        """Bytes that are left of the body, or of the chunk."""

    @property
    def buffered(self) -> int:
        """Return how many bytes wait to be parsed."""
        return len(self._buffer)

    @property
    def remaining(self) -> int:
        """Return how many bytes of the body, or of the chunk, are known to be still to come."""
        return max(0, self._remaining - len(self._buffer))

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the network."""
        self._buffer = self._buffer + data if self._buffer else data

    def next_event(self) -> Event | None:
        """Return the next event: a head, a piece of its body, or :data:`END`; ``None`` if more bytes are needed.

        Raises ``malformed_request``, ``url_too_long`` or ``header_too_large``.
        """
        return self._read(self)

    def start_next(self) -> None:
        """Go on to the next request, after :data:`END`."""
        self._read = Http1Parser._read_head
        self._line_end = self._scanned = 0  # trailers were scanned as well

    def take_rest(self) -> bytes:
        """Return what is not parsed, for the protocol that takes the connection over."""
        rest, self._buffer = self._buffer, b""
        return rest

    def _read_head(self) -> Event | None:
        if not self._line_end and not self._find_request_line():
            return None
        buffer, line_end = self._buffer, self._line_end
        # Three bytes back: the empty line may have been cut.
        end = buffer.find(b"\r\n\r\n", max(line_end - 2, self._scanned - 3))
        # A head that is over the limit and not whole yet can only grow: both cases refuse the same heads.
        too_large = (len(buffer) if end < 0 else end + 4) - line_end > _FIELDS_LIMIT
        if (end < 0 or too_large) and _BARE_LF.search(
            buffer, max(line_end, self._scanned) - 1, line_end + _FIELDS_LIMIT
        ):
            raise _malformed("A line ends without CR.")
        if too_large:
            raise OctoError(f"The headers may have at most {MAX_HEADER_BYTES} bytes.", code="header_too_large")
        if end < 0:
            self._scanned = len(buffer)
            return None
        self._buffer, self._scanned = buffer[end + 4 :], 0
        head = _parse_head(buffer[: end + 4])
        if head.length is None:
            self._read = Http1Parser._read_chunk_line
        elif head.length:
            self._remaining = head.length
            self._read = Http1Parser._read_body
        else:
            self._read = Http1Parser._read_end
        return head

    def _find_request_line(self) -> bool:
        """Check the request line as soon as it is here: what does not speak HTTP gets its error at once."""
        buffer = self._buffer
        while buffer.startswith(b"\r\n"):  # RFC 9112 section 2.2: empty lines before it are ignored
            buffer = buffer[2:]
        self._buffer = buffer
        if not buffer or buffer == b"\r":
            return False
        if _LINE_START.match(buffer) is None:
            raise _malformed("The request does not begin with a method.")
        end = buffer.find(b"\n") + 1
        if (end or len(buffer)) > _MAX_LINE_BYTES:
            raise _url_too_long()
        if not end:
            return False
        match = _REQUEST_LINE.fullmatch(buffer, 0, end)
        if match is None:
            raise _malformed("The first line is no request line of HTTP/1.0 or HTTP/1.1.")
        if match.end(1) - match.start(1) > MAX_URL_BYTES:
            raise _url_too_long()
        self._line_end = end
        return True

    def _read_body(self) -> Event | None:
        data = self._take(self._remaining)
        if not self._remaining:
            self._read = Http1Parser._read_end
        return data or None

    def _read_end(self) -> Event | None:
        self._read = Http1Parser._pause
        return END

    def _pause(self) -> Event | None:
        return None

    def _read_chunk_line(self) -> Event | None:
        end = self._buffer.find(b"\r\n")
        if (len(self._buffer) - 1 if end < 0 else end) > _MAX_CHUNK_LINE_BYTES:
            raise _malformed("The line before a chunk is too long.")
        if end < 0:
            return None
        match = _CHUNK_LINE.fullmatch(self._buffer, 0, end)
        if match is None:
            raise _malformed("The line before a chunk is wrong.")
        self._buffer = self._buffer[end + 2 :]
        self._remaining = int(match[1], 16)
        self._read = Http1Parser._read_chunk if self._remaining else Http1Parser._read_trailers
        return self._read(self)

    def _read_chunk(self) -> Event | None:
        data = self._take(self._remaining)
        if not self._remaining:
            self._read = Http1Parser._read_chunk_end
        return data or None

    def _read_chunk_end(self) -> Event | None:
        if not b"\r\n".startswith(self._buffer[:2]):
            raise _malformed("A chunk is longer than its line says.")
        if len(self._buffer) < 2:
            return None
        self._buffer = self._buffer[2:]
        self._read = Http1Parser._read_chunk_line
        return self._read_chunk_line()

    def _read_trailers(self) -> Event | None:
        """Check the trailers and drop them: nothing here may depend on them (RFC 9110 section 6.5.1)."""
        buffer = self._buffer
        end = -2 if buffer.startswith(b"\r\n") else buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        if (len(buffer) if end == -1 else end + 4) > _FIELDS_LIMIT:
            raise OctoError(f"The trailers may have at most {MAX_HEADER_BYTES} bytes.", code="header_too_large")
        if end == -1:
            self._scanned = len(buffer)
            return None
        if end >= 0 and _TRAILERS.fullmatch(buffer, 0, end + 2) is None:
            raise _malformed("A trailer is wrong.")
        self._buffer = buffer[end + 4 :]
        return self._read_end()

    def _take(self, most: int) -> bytes:
        buffer = self._buffer
        if len(buffer) <= most:
            self._buffer = b""
            self._remaining -= len(buffer)
            return buffer
        self._buffer = buffer[most:]
        self._remaining -= most
        return buffer[:most]


class _Fields:
    """What httptools calls for each part of a head."""

    __slots__ = ("headers", "target")

    def __init__(self) -> None:
        self.target = b""
        self.headers: Headers = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))


def _parse_head(data: bytes) -> RequestHead:
    fields = _Fields()
    # One for each head: this parser would wait for the body, which never reaches it.
    parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # It has read the head, which asks for another protocol; whether it gets that is decided elsewhere.
    except httptools.HttpParserError as error:
        raise _malformed(f"{error}.") from error
    version = parser.get_http_version()
    method = parser.get_method().decode("ascii")
    hosts, length, connection = 0, 0, b""
    chunked: bool | None = None
    expects_continue, upgrade = False, b""
    for name, value in fields.headers:
        if name not in _FRAMING_HEADERS:
            continue
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            length = int(value)  # llhttp has seen that there is one, of digits, beside no Transfer-Encoding
        elif name == b"transfer-encoding":
            # Two places that read another framing are request smuggling: only what is beyond doubt is accepted.
            if chunked or value.lower() != b"chunked" or version != "1.1":
                raise _malformed("Transfer-Encoding may only be chunked, in HTTP/1.1.")
            chunked = True
        elif name == b"connection":
            connection += b"," + value.lower()
        elif name == b"expect":
            expects_continue = version == "1.1" and value.lower() == b"100-continue"
        else:
            upgrade = value.lower()
    if hosts != 1 and (hosts or version == "1.1"):
        raise _malformed("A request needs one Host header.")  # RFC 9112 section 3.2
    options = {option.strip(b" \t") for option in connection.split(b",")} if connection else ()
    return RequestHead(
        method,
        fields.target,
        version,
        fields.headers,
        None if chunked else length,
        version == "1.1" and b"close" not in options,
        expects_continue,
        method == "GET" and version == "1.1" and upgrade == b"websocket" and b"upgrade" in options,
    )


def _malformed(detail: str) -> OctoError:
    return OctoError(detail, code="malformed_request")


def _url_too_long() -> OctoError:
    return OctoError(f"The URL may have at most {MAX_URL_BYTES} bytes.", code="url_too_long")
