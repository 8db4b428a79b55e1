"""Many watchers of one task that reconnect at random to two gateways, while one of these is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from gateway_kit import TASK, GatewayHarness, start_gateway
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from octollm.client.streams import StreamGapError, StreamPosition, Update
from octollm.testing import wait_until

UNLIMITED: dict[str, Any] = {
    "rate_limit": "1000000/second",
    "max_watchers_per_key": 100_000,
    "max_watchers_per_address": 100_000,
}
PIECE = "word 🐙 "
EVERY = 20
"""Pieces of text between two events."""
PAUSE = 0.01
"""Seconds between two pieces of text."""


@dataclass
class Watcher:
    """What one watcher has received, over all its connections."""

    draw: random.Random
    cuts: int
    position: StreamPosition = field(default_factory=StreamPosition)
    reconnects: int = 0
    seqs: list[int] = field(default_factory=list)
    text: str = ""
    lost: int = 0
    doubled: int = 0
    is_done: bool = False

    async def watch(self, ports: list[int]) -> None:
        """Watch to the final frame."""
        while not self.is_done:
            port = self.draw.choice(ports)
            with contextlib.suppress(OSError, WebSocketException, TimeoutError):
                await self._watch_once(port, self.draw.randint(1, 12) if self.reconnects < self.cuts else 1 << 30)
            self.reconnects += not self.is_done

    async def _watch_once(self, port: int, frames: int) -> None:
        url = f"ws://127.0.0.1:{port}/ws/tasks/{TASK}?{self.position.to_query()}"
        async with connect(url, compression=None, proxy=None, close_timeout=0.2, max_size=None) as socket:
            try:
                for _ in range(frames):
                    self._take(msgspec.json.decode(await asyncio.wait_for(socket.recv(), 60), type=Update))
            except ConnectionClosed as closed:
                self.is_done = closed.rcvd is not None and closed.rcvd.code == 1000
            else:
                # Reset, not closed: what is under way is lost.
                socket.transport.abort()

    def _take(self, update: Update) -> None:
        try:
            new = self.position.advance(update)
        except StreamGapError:
            self.lost += 1
            raise ConnectionResetError from None
        self.doubled += update.type != "ping" and new is not update
        if new is None:
            return
        if new.type == "token":
            self.text = new.text if new.reset else self.text + new.text
        else:
            self.seqs.append(new.seq)


@dataclass(frozen=True)
class ReconnectResult:
    """What all watchers together have seen."""

    watchers: int
    reconnects: int
    frames: int
    lost: int
    doubled: int
    wrong_texts: int
    incomplete: int
    drained: int


async def run_reconnects(home: Path, *, watchers: int, cuts: int, seed: int = 1) -> ReconnectResult:
    """Let ``watchers`` reconnect ``cuts`` times each, while the task runs and the second gateway is replaced once."""
    async with start_gateway(home, **UNLIMITED) as first:
        await first.script.emit("task.accepted", goal="a goal", progress=0)
        await first.script.emit("step.started", step="a", title="A", arm="coder", attempt=1, run=1)
        ports = [first.port]
        everybody = [Watcher(random.Random(seed * 100_003 + number), cuts) for number in range(watchers)]
        async with contextlib.AsyncExitStack() as stack:
            second = await stack.enter_async_context(_second(home, first, ports))
            watching = [asyncio.create_task(each.watch(ports)) for each in everybody]
            writing = asyncio.create_task(_write(first, everybody))
            half = watchers * cuts // 2
            await wait_until(
                lambda: sum(each.reconnects for each in everybody) >= half or writing.done(),
                description="half of the reconnects are made",
                timeout=600,
            )
            drained = int(
                second.service.base.metrics.registry.get_sample_value("octollm_live_connections", {"kind": "websocket"})
                or 0
            )
            # It drains: whoever watches here is told to connect again.
            await stack.aclose()
            await stack.enter_async_context(_second(home, first, ports))
            text = await writing
            await asyncio.gather(*watching)
        expected = list(range(1, len(first.script.events) + 1))
    return ReconnectResult(
        watchers,
        sum(each.reconnects for each in everybody),
        sum(len(each.seqs) for each in everybody),
        sum(each.lost for each in everybody),
        sum(each.doubled for each in everybody),
        sum(each.text != text for each in everybody),
        sum(each.seqs != expected for each in everybody),
        drained,
    )


@contextlib.asynccontextmanager
async def _second(home: Path, first: GatewayHarness, ports: list[int]) -> AsyncGenerator[GatewayHarness]:
    async with start_gateway(home, beside=first, **UNLIMITED) as gateway:
        ports.append(gateway.port)
        try:
            yield gateway
        finally:
            ports.remove(gateway.port)


async def _write(gateway: GatewayHarness, watchers: list[Watcher]) -> str:
    """Run the step until each watcher has reconnected often enough; return its text."""
    script, text, number = gateway.script, "", 0
    while any(each.reconnects < each.cuts for each in watchers):
        piece = PIECE + json.dumps(number) + " "
        await script.stream.append(TASK, step="a", attempt=1, run=1, offset=len(text), text=piece, reset=not text)
        text, number = text + piece, number + 1
        if number % EVERY == 0:
            await script.emit("task.progress", progress=1)
        await asyncio.sleep(PAUSE)
    await script.emit("step.completed", step="a", attempt=1, text_length=len(text), score=1.0)
    await script.emit("task.completed", status="completed", duration_ms=1, progress=100)
    return text
