"""Deliveries of webhooks on PostgreSQL to a receiver in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection
from typing import cast

import uvloop
from webhook_kit import Replica, add_webhook, replica

from events.ours import Measured, Meter, open_log
from octollm.capability import SigningKey

PENDING = "SELECT 1 FROM webhook_deliveries WHERE state = 'pending' LIMIT 1"


class _Receiver(asyncio.Protocol):
    """Answers 204 to every request: what is measured is the sender."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:end].lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(self._received) < end + 4 + length:
                return
            self._received = self._received[end + 4 + length :]
            self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")


def _receive(pipe: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Receiver, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(serve())


@contextlib.asynccontextmanager
async def _receiver() -> AsyncGenerator[str]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_receive, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{await asyncio.to_thread(ours.recv)}"
    finally:
        process.kill()
        await asyncio.to_thread(process.join)


async def deliveries(database_url: str, redis_url: str, count: int) -> tuple[Measured, Measured]:
    """Measure the feed, which turns events of the log into deliveries, and their sending."""
    async with _receiver() as origin, open_log(database_url, redis_url) as log:
        made: Replica = replica(log.db, SigningKey.generate("root"), origin)
        await add_webhook(made, f"{origin}/hook")
        await log.write_all(count, 10)
        await log.publisher.flush(60)
        async with Meter(log.db, count) as feeding:
            while await made.feed.feed():
                pass
        assert log.db.direct_pool is not None
        async with asyncio.timeout(120), Meter(log.db, count) as sending, made.http, made.dispatcher:
            while await log.db.direct_pool.fetch(PENDING):
                await asyncio.sleep(0.01)
    return feeding.measured, sending.measured
