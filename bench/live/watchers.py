"""Watchers in bulk: sockets that count their frames, and of which some read when the frame was sent."""

from __future__ import annotations

import asyncio
import re
import time
from typing import cast

_AT = re.compile(rb'"at":\s?([0-9.]+)')
PATH = "/ws/tasks/task-" + "0" * 31 + "1"


class Watcher(asyncio.Protocol):
    """One WebSocket (RFC 6455). It answers pings, counts text frames, and keeps their latencies if it ``measures``."""

    def __init__(self, port: int, *, measures: bool) -> None:
        self.frames = 0
        self.latencies: list[float] = []
        self.is_open = False
        self.is_lost = False
        self._port = port
        self._measures = measures
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)
        self._transport = transport
        head = (
            f"GET {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        transport.write(head.encode())

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        buffer = self._buffer + data if self._buffer else data
        if not self.is_open:
            head, separator, buffer = buffer.partition(b"\r\n\r\n")
            if not separator:
                self._buffer = head
                return
            self.is_open = head.startswith(b"HTTP/1.1 101")
        position = 0
        while len(buffer) - position >= 2:
            opcode, length, start = buffer[position] & 15, buffer[position + 1], position + 2
            if length == 126:
                length, start = int.from_bytes(buffer[start : start + 2], "big"), start + 2
            elif length == 127:
                length, start = int.from_bytes(buffer[start : start + 8], "big"), start + 8
            if len(buffer) < start + length:
                break
            self._take(opcode, buffer[start : start + length], now)
            position = start + length
        self._buffer = buffer[position:]

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _take(self, opcode: int, payload: bytes, now: float) -> None:
        if opcode == 9 and self._transport is not None:
            # A pong repeats the ping's payload; a mask of zeros leaves it as it is.
            self._transport.write(bytes((0x8A, 0x80 | len(payload), 0, 0, 0, 0)) + payload)
        elif opcode == 1:
            match = _AT.search(payload) if self._measures or b'"at"' in payload else None
            if match:
                self.frames += 1
                if self._measures:
                    self.latencies.append(now - float(match[1]))


async def connect(port: int, count: int, *, measured: int) -> list[Watcher]:
    """Open ``count`` sockets, some hundred at a time; about ``measured`` of them keep latencies."""
    loop = asyncio.get_running_loop()
    watchers: list[Watcher] = []
    step = max(1, count // measured)
    for start in range(0, count, 200):
        batch = [Watcher(port, measures=n % step == 0) for n in range(start, min(start + 200, count))]
        await asyncio.gather(*(loop.create_connection(lambda each=each: each, "127.0.0.1", port) for each in batch))
        watchers += batch
        await wait_for(lambda batch=batch: all(each.is_open for each in batch), 60)
    return watchers


async def wait_for(condition: object, seconds: float) -> bool:
    """Return whether ``condition`` became true in time."""
    assert callable(condition)
    until = time.perf_counter() + seconds
    while not condition():
        if time.perf_counter() > until:
            return False
        await asyncio.sleep(0.005)
    return True
