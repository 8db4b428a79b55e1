"""One connection of the HTTP/1.1 client (RFC 9112).

A request goes out in one write; its response is parsed as it arrives. Cancellation, a deadline and a fault close the
connection, which is how the callee learns that nobody waits for the response.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

import httptools

from octollm.errors import OctoError
from octollm.rpc.http_client import MAX_RESPONSE_BYTES, READ_SECONDS, WRITE_SECONDS, TransportError, response_too_large

MAX_HEAD_BYTES = 64 * 1024
HIGH_WATER = 256 * 1024
"""Buffered bytes of a response at which the connection stops reading from the socket, for a slow reader."""


class Http1Connection(asyncio.Protocol):
    """A connection to ``host``, which carries one request at a time."""

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
        """Whether the connection is open, without a request, and may carry another."""
        return self._open and not self._busy and self._reusable

    # Called by the pool.

    def write(self, request: bytes, *, head: bool) -> None:
        """Send a whole request; ``head`` means that its response has no body (RFC 9110 section 9.3.2)."""
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
        """End the request and return whether the connection is reusable; an incomplete response closes it."""
        if not (self._done and not self._chunks and self._reusable and self._open):
            self.close()
            return False
        self._busy = False
        return True

    def close(self) -> None:
        """Close the connection at once and drop unsent bytes."""
        self._reusable = False
        self._stop_timers()
        if self._transport is not None:
            self._transport.abort()

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self._transport = cast("asyncio.Transport", transport)
        self._open = True

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request: the close completes a response without a length and fails any other."""
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
        """Feed received bytes to the parser."""
        if not self._busy:
            # Without a request there is no response: these bytes would be taken for that of the next request.
            self.close()
            return
        self._last_read_at = self._loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail_protocol("switched to another protocol")
        except httptools.HttpParserError as error:
            self._fail_protocol(f"sent invalid HTTP ({error})")

    def pause_writing(self) -> None:
        """Start the write timeout, for a peer that does not read."""
        self._write_timer = self._loop.call_later(WRITE_SECONDS, self._on_write_timeout)

    def resume_writing(self) -> None:
        """Stop the write timeout."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # Called by the parser.

    @property
    def _is_over(self) -> bool:
        return self._done or self._fault is not None

    def on_message_begin(self) -> None:
        """Refuse a second response to one request, which would be taken for that of the next."""
        if self._is_over:
            self._reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header; names in lower case, values of one name joined (RFC 9110 section 5.3)."""
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
        """Wake the reader of the head, unless it is an interim response (RFC 9110 section 15.2)."""
        if self._is_over:
            return
        status = self._parser.get_status_code()
        # The count of header bytes goes on, so interim responses cannot exceed its limit together.
        if 100 <= status < 200:
            self.headers = {}
            return
        self.status = status
        self._has_headers = True
        self._reusable = self._parser.should_keep_alive()
        if self._no_body:
            # The parser would wait for the body that Content-Length announces.
            self._reusable = False
            self._done = True
        elif "content-length" not in self.headers and "transfer-encoding" not in self.headers:
            # RFC 9112 section 6.3: without a length only the close ends the body, except where there is no body.
            self._until_close = status not in (204, 304)
        self._wake()

    def on_body(self, body: bytes) -> None:
        """Buffer a part of the body; past the high-water mark a slow reader slows the peer."""
        if self._is_over:
            return
        self._chunks.append(body)
        self._waiting_bytes += len(body)
        if self._waiting_bytes > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        """Mark the response as complete."""
        # The end of an interim response comes here too, before the headers of the final one.
        if self._has_headers and not self._is_over:
            self._done = True
            self._wake()

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
        # A fault after the last byte takes nothing away from a whole response.
        if self._fault is not None and not self._done:
            raise self._fault

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pop_chunk(self) -> bytes:
        chunk = self._chunks.popleft()
        self._waiting_bytes -= len(chunk)
        # Half of the mark, so that reading does not stop and start again for every chunk.
        if self._paused and self._waiting_bytes <= HIGH_WATER // 2 and self._transport is not None:
            self._paused = False
            # The silence was ours: the read timeout begins anew.
            self._last_read_at = self._loop.time()
            self._transport.resume_reading()
        return chunk

    def _fail_protocol(self, what: str) -> None:
        self.fail(OctoError(f"{self._host} {what}.", code="peer_protocol"))

    def fail(self, fault: OctoError) -> None:
        """End the request with ``fault`` and close the connection."""
        if self._fault is None:
            self._fault = fault
        self.close()
        self._wake()

    def _check_read_timeout(self) -> None:
        """Fail a request whose callee is silent. One timer serves many requests, since most are answered at once."""
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
        f"The connection to {host} broke before its response was complete.", code="connection_lost", request_sent=True
    )
