"""Bounds of HTTP/1.1 in its own bytes: what is too large or too slow is refused by name."""

from __future__ import annotations

import asyncio
import contextlib
import json

import msgspec
import pytest
from kit import served

from octollm.rpc.call import IncomingCall, Operation


class Text(msgspec.Struct):
    text: str


async def short(_call: IncomingCall, _body: object) -> Text:
    return Text("a")


SHORT = Operation("short", "GET", "/short", short, auth="public", max_body=0)


async def raw(port: int, request: bytes) -> tuple[bytes, bytes]:
    """Send bytes; return head and body of the answer, whose connection the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(10):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return head, body


async def test_a_url_over_the_limit_is_refused() -> None:
    async with served([SHORT]) as svc:
        fits = b"GET /short?" + b"x" * 8000 + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        assert (await raw(svc.port, fits))[0].startswith(b"HTTP/1.1 200 ")
        head, body = await raw(svc.port, b"GET /short?" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 414 ")
        assert json.loads(body)["code"] == "url_too_long"


async def test_headers_and_bodies_that_come_too_slowly_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octollm.rpc.http1_server.HEADER_SECONDS", 0.2)
    monkeypatch.setattr("octollm.rpc.codec.BODY_SECONDS", 0.2)
    operation = Operation("take", "POST", "/take", short, auth="public", body=Text)
    async with served([operation]) as svc:
        head, body = await raw(svc.port, b"POST /take HTTP/1.1\r\nHost: a\r\nX-Slow")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert (json.loads(body)["code"], json.loads(body)["retryable"]) == ("request_timeout", True)
        request = b"POST /take HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 20\r\n\r\n{"
        head, body = await raw(svc.port, request)
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["code"] == "request_timeout"


async def test_headers_over_the_limit_are_refused() -> None:
    async with served([SHORT]) as svc:
        for headers in (
            b"X-Big: " + b"a" * 40_000 + b"\r\n",
            b"".join(b"X-%d: %s\r\n" % (n, b"b" * 900) for n in range(50)),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", svc.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            async with asyncio.timeout(5):
                status = await reader.readline()
            assert b" 431 " in status
            writer.close()
