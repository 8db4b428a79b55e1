"""A whole installation on a thread of its own, for clients of both kinds; and ways to break what lies between."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts import NOTES, default_reply

from octollm.client import Client, TaskHandle
from octollm.client.sync_client import SyncFacade
from octollm.testing import wait_until
from octollm.testing.fake_model import ScriptedModel, ScriptedReply, ScriptedRequest, scripted_model
from octollm.testing.system import installation

GOAL = "How often does it retry?"
FILES = (("notes.md", NOTES),)
SENTENCE = "The service retries a failed call three times."


@dataclass
class ClientKit:
    """Where an installation is, and what its model says."""

    url: str = ""
    key: str = ""
    model: ScriptedModel | None = None
    answer: Callable[[ScriptedRequest], str | ScriptedReply] = field(default=default_reply)

    def answer_with(self, sentence: ScriptedReply | str) -> None:
        """Have the model answer questions by ``sentence``, and everything else as ever."""
        self.answer = lambda asked: sentence if asked.system.startswith("Answer the question") else default_reply(asked)


@contextlib.contextmanager
def running_kit(home: Path) -> Generator[ClientKit]:
    """Run the installation until the context is left."""
    kit = ClientKit()
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    failures: list[BaseException] = []

    async def serve() -> None:
        async with scripted_model(lambda asked: kit.answer(asked)) as model:  # noqa: PLW0108  it changes
            settings = {
                "OCTOLLM_MODEL": "openai:scripted",
                "OCTOLLM_MODEL_URL": model.url,
                # Also reached through a proxy, at another port.
                "OCTOLLM_ALLOWED_HOSTS": "127.0.0.1",
            }
            async with installation(home, environment=settings) as system:
                kit.url, kit.key, kit.model = system.gateway_url, system.local_key, model
                ready.set()
                await stop.wait()

    def work() -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(serve())
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work, name="installation")
    thread.start()
    try:
        assert ready.wait(60)
        if failures:
            raise failures[0]
        yield kit
    finally:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)
        thread.join(30)
    assert not failures, failures
    assert not thread.is_alive()


class AsyncAdapter:
    """A client for plain code behind the face of the one for asyncio, so that one suite tests both."""

    def __init__(self, inner: SyncFacade[Any]) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if isinstance(method, SyncFacade):
            return AsyncAdapter(method)
        if not callable(method):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "task":
                return AsyncAdapter(method(*args, **kwargs))
            if name in ("tasks", "events", "updates", "history", "facts", "documents"):
                return self._iterate_in_thread(method(*args, **kwargs))
            return self._call_in_thread(method, *args, **kwargs)

        return call

    async def _call_in_thread(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = await asyncio.to_thread(method, *args, **kwargs)
        return AsyncAdapter(found) if isinstance(found, TaskHandle) else found

    async def _iterate_in_thread(self, items: Any) -> AsyncGenerator[Any]:
        end = object()
        try:
            while (item := await asyncio.to_thread(next, items, end)) is not end:
                yield item
        finally:
            await asyncio.to_thread(items.close)

    async def __aenter__(self) -> AsyncAdapter:
        return self

    async def __aexit__(self, *_error: object) -> None:
        assert isinstance(self._inner, Client)
        await asyncio.to_thread(self._inner.close)


@dataclass
class CuttingProxy:
    """Passes bytes on to ``target`` and cuts connections after a number of bytes that is drawn anew for each.

    ``cuts`` counts them. With ``most`` cuts done, nothing is cut any more.
    """

    target: int
    least: int
    longest: int
    most: int
    url: str = ""
    cuts: int = 0
    seed: int = 7
    open: set[asyncio.Task[Any] | None] = field(default_factory=set)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: float) -> None:
        try:
            while data := await reader.read(64):
                writer.write(data)
                await writer.drain()
                left -= len(data)
                if left <= 0:
                    self.cuts += 1
                    return
        except ConnectionError:
            return

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(asyncio.current_task())
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target)
        allowed = self.draw.randint(self.least, self.longest) if self.cuts < self.most else float("inf")
        ways = {
            asyncio.create_task(self._pass(reader, there_writer, float("inf"))),
            asyncio.create_task(self._pass(there_reader, writer, allowed)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Reset, not closed: what is under way is lost.
            writer.transport.abort()
            there_writer.transport.abort()
            for way in ways:
                way.cancel()
            self.open.discard(asyncio.current_task())

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)


@contextlib.asynccontextmanager
async def cutting(target: str, *, least: int, longest: int, most: int) -> AsyncGenerator[CuttingProxy]:
    """Put a proxy before the gateway at ``target``."""
    proxy = CuttingProxy(int(target.rpartition(":")[2]), least, longest, most)
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
        proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield proxy
        await wait_until(lambda: not proxy.open, description="the proxy's connections are closed")
