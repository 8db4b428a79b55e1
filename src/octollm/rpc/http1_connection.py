"""One connection of the HTTP/1.1 client (RFC 9112): a request goes out in one write, its response is parsed incrementally. Cancelling, a deadline or a fault closes it, which is how the callee learns of it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

import httptools

from octollm.errors import OctoError
from octollm.rpc.http_client import MAX_RESPONSE_BYTES, READ_SECONDS, WRITE_SECONDS, TransportError, response_too_large

MAX_HEAD_BYTES = 64 * 1024
HIGH_WATER = 256 * 1024
"""Bytes of an answer that wait for a slow reader before no more are taken from the socket."""


class Http1Connection(asyncio.Protocol):
    """A connection to ``host``. ``idle`` says whether it may be used for another request."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._open = False
        self._busy = False
        self._reusable = True
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._last_read_at = 0.0
        self._reset(head=False)

    def _reset(self, *, head: bool) -> None:
        self._no_body = head
        self.status = 0
        self.headers: dict[str, str] = {}
        self._head_bytes = 0
        self._chunks: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._paused = False
        self._has_headers = False
        self._done = False
        self._until_close = False
        self._fault: OctoError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Return whether the connection stands and nothing is under way on it."""
        return self._open and not self._busy and self._reusable

    # What the pool does with it.

    def write(self, request: bytes, *, head: bool) -> None:
        """Send a whole request; ``head`` says that its answer has no body (RFC 9110 section 9.3.2)."""
        assert self._transport is not None
        self._reset(head=head)
        self._busy = True
        self._last_read_at = self._loop.time()
        if self._read_timer is None:
            self._read_timer = self._loop.call_later(READ_SECONDS, self._check_read_timeout)
        self._transport.write(request)

    async def read_headers(self) -> None:
        """Wait for status and headers. Raises :class:`TransportError`."""
        while not self._has_headers:
            await self._wait_for_data()

    async def read_body(self) -> bytes:
        """Return the whole body, at most 32 MiB. Raises :class:`TransportError` and ``peer_protocol``."""
        size = 0
        parts: list[bytes] = []
        while not self._done or self._chunks:
            while self._chunks:
                parts.append(self._pop_chunk())
                size += len(parts[-1])
            if size > MAX_RESPONSE_BYTES:
                raise response_too_large(self._host)
            if not self._done:
                await self._wait_for_data()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read_chunk(self) -> bytes | None:
        """Return the next bytes of the body, ``None`` after the last. Raises :class:`TransportError`."""
        while not self._chunks:
            if self._done:
                return None
            await self._wait_for_data()
        return self._pop_chunk()

    def release(self) -> bool:
        """End the request; return whether the connection may be used again. If its answer is not whole it is closed."""
        if not (self._done and not self._chunks and self._reusable and self._open):
            self.close()
            return False
        self._busy = False
        return True

    def close(self) -> None:
        """Close the connection at once; what was not sent is dropped."""
        self._reusable = False
        self._stop_timers()
        if self._transport is not None:
            self._transport.abort()

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast("asyncio.Transport", transport)
        self._open = True

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is under way: an answer that is delimited by the end of the connection is whole by it."""
        self._open = False
        self._stop_timers()
        if not self._busy or self._is_over:
            return
        if self._until_close and exc is None:
            self._done = True
            self._wake()
        else:
            self.fail(_connection_lost(self._host))

    def eof_received(self) -> None:
        """Let the transport close."""

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if not self._busy:
            # Nothing was asked: an answer now would be taken for that of the next request.
            self.close()
            return
        self._last_read_at = self._loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail_protocol("switched to another protocol")
        except httptools.HttpParserError as error:
            self._fail_protocol(f"answered in no valid HTTP ({error})")

    def pause_writing(self) -> None:
        """Begin to wait for a peer that does not read."""
        self._write_timer = self._loop.call_later(WRITE_SECONDS, self._on_write_timeout)

    def resume_writing(self) -> None:
        """Stop waiting."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # What the parser says.

    @property
    def _is_over(self) -> bool:
        return self._done or self._fault is not None

    def on_message_begin(self) -> None:
        """Refuse a second answer to one request: it would be taken for that of the next."""
        if self._is_over:
            self._reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; names in lower case, values of one name joined (RFC 9110 section 5.3)."""
        if self._is_over:
            return
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._fail_protocol(f"sent more than {MAX_HEAD_BYTES} bytes of headers")
            return
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        known = self.headers.get(key)
        self.headers[key] = text if known is None else f"{known}, {text}"

    def on_headers_complete(self) -> None:
        """Hand the head over, but for an interim answer (RFC 9110 section 15.2), which another follows."""
        if self._is_over:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self.headers = {}
            return
        self.status = status
        self._has_headers = True
        self._reusable = self._parser.should_keep_alive()
        if self._no_body:
            # The parser would wait for the body that the headers speak of.
            self._reusable = False
            self._done = True
        elif "content-length" not in self.headers and "transfer-encoding" not in self.headers:
            self._until_close = status not in (204, 304)
        self._wake()

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body; a reader that is slow slows the peer."""
        if self._is_over:
            return
        self._chunks.append(body)
        self._waiting_bytes += len(body)
        if self._waiting_bytes > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        """End the answer."""
        if self._has_headers and not self._is_over:
            self._done = True
            self._wake()

    # Inside.

    async def _wait_for_data(self) -> None:
        if self._fault is not None:
            raise self._fault
        if not self._open:
            raise _connection_lost(self._host)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._fault is not None and not self._done:
            raise self._fault

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pop_chunk(self) -> bytes:
        taken = self._chunks.popleft()
        self._waiting_bytes -= len(taken)
        if self._paused and self._waiting_bytes <= HIGH_WATER // 2 and self._transport is not None:
            self._paused = False
            self._last_read_at = self._loop.time()
            self._transport.resume_reading()
        return taken

    def _fail_protocol(self, what: str) -> None:
        self.fail(OctoError(f"{self._host} {what}.", code="peer_protocol"))

    def fail(self, fault: OctoError) -> None:
        """End what is under way by ``fault``, and close the connection."""
        if self._fault is None:
            self._fault = fault
        self.close()
        self._wake()

    def _check_read_timeout(self) -> None:
        """Look whether anything was heard in time. One timer looks after many requests: most are answered at once."""
        self._read_timer = None
        if not self._busy:
            return
        late = self._loop.time() - self._last_read_at
        if late >= READ_SECONDS and not self._paused:
            self.fail(
                TransportError(
                    f"{self._host} sent nothing for {READ_SECONDS:g} s.", code="read_timeout", request_sent=True
                )
            )
        else:
            self._read_timer = self._loop.call_later(max(0.01, READ_SECONDS - late), self._check_read_timeout)

    def _on_write_timeout(self) -> None:
        self._write_timer = None
        self.fail(
            TransportError(
                f"{self._host} took no bytes for {WRITE_SECONDS:g} s.", code="write_timeout", request_sent=True
            )
        )

    def _stop_timers(self) -> None:
        for timer in (self._read_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._read_timer = self._write_timer = None


def _connection_lost(host: str) -> TransportError:
    return TransportError(
        f"The connection to {host} broke before its answer was whole.", code="connection_lost", request_sent=True
    )
