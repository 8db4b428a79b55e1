"""What is outside of a run of faults on tasks: `python tasks_outside.py OPTIONS`, with :class:`Options` as JSON.

It records effects in a file, is the provider of the model, and relays connections to arms. POST /control has it lose
answers, hang, or answer as a bad provider does. No fault ends it, and it imports nothing of the product.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLAN = re.compile(r"chaos-plan (\{.*?\})")
ENDLESS_WORD_SECONDS = 0.02
MAX_HEADER_BYTES = 65_536


@dataclass(frozen=True)
class Options:
    """``relays`` maps the port of each relay to the port that it leads to."""

    folder: str
    port: int
    relays: dict[str, int]
    seed: int


@dataclass
class State:
    """What goes wrong at present, and what has been seen.

    ``model`` is ``ok``, ``limited``, ``failing``, ``garbage``, ``endless``, or ``mixed`` for one of these each time.
    ``cut`` is the probability that a piece of an answer is lost, and the connection with it. With ``hang`` a recorded
    effect is not acknowledged.
    """

    chance: random.Random
    model: str = "ok"
    cut: float = 0.0
    going_on: asyncio.Event = field(default_factory=asyncio.Event)
    active: int = 0

    def control(self, change: dict[str, Any]) -> None:
        """Change what goes wrong."""
        self.model = change.get("model", self.model)
        self.cut = change.get("cut", self.cut)
        if "hang" in change:
            (self.going_on.clear if change["hang"] else self.going_on.set)()


class Records:
    """Appends lines to a file, which outlive any process."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a", buffering=1)

    def write(self, *values: object) -> None:
        """Append a line; the kernel has it before this returns."""
        self._file.write(json.dumps(values) + "\n")


class Client:
    """One request and its response, after which the connection is closed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def request(self) -> tuple[str, dict[str, Any]]:
        """Return the path and the body."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.split("\r\n")
        lengths = [field for field in fields if field.lower().startswith("content-length:")]
        body = await self._reader.readexactly(int(lengths[0].partition(":")[2])) if lengths else b""
        kinds = [field for field in fields if field.lower().startswith("content-type:")]
        is_json = bool(kinds) and "json" in kinds[0]
        return line.split(" ")[1], json.loads(body or b"{}") if is_json else {}

    async def send_head(self, status: int, kind: str, more: str = "") -> None:
        """Send the head of a response that ends with the connection."""
        head = f"HTTP/1.1 {status} -\r\nContent-Type: {kind}\r\nConnection: close\r\n{more}\r\n"
        await self.send(head.encode())

    async def send(self, data: bytes) -> None:
        """Send a part of the response; raise ``ConnectionError`` once the client has left."""
        if self._reader.at_eof():
            raise ConnectionResetError
        self._writer.write(data)
        await self._writer.drain()

    async def send_json(self, status: int, body: object, more: str = "") -> None:
        """Send a whole response."""
        data = json.dumps(body).encode()
        await self.send_head(status, "application/json", f"Content-Length: {len(data)}\r\n{more}")
        await self.send(data)

    async def left(self) -> None:
        """Return once the client has closed the connection."""
        with contextlib.suppress(ConnectionError):
            await self._reader.read()


def plan_for(prompt: str) -> dict[str, Any]:
    """Return the plan that a goal asks for: ``chaos-plan {"arms": […], "needs": [[…], …], "marks": […]}``."""
    found = PLAN.search(prompt)
    wanted = json.loads(found[1]) if found else {"arms": ["mark"], "needs": [[]], "marks": [""]}
    return {
        "steps": [
            {
                "id": f"n{number}",
                "title": f"Effect {number}",
                "arm": arm,
                "goal": f"Have effect {number}. {mark}",
                "depends_on": [f"n{need}" for need in needs],
                "files": [],
                "acceptance_criteria": [],
            }
            for number, (arm, needs, mark) in enumerate(
                zip(wanted["arms"], wanted["needs"], wanted["marks"], strict=True), start=1
            )
        ]
    }


def reply_to(body: dict[str, Any]) -> str:
    """Return what a good model says."""
    texts = {message["role"]: str(message["content"]) for message in body["messages"]}
    if "steps" in json.dumps(body.get("response_format") or {}):
        return json.dumps(plan_for(texts["user"]))
    if texts.get("system", "").startswith("You judge"):
        return json.dumps({"reason": "", "accepted": True})
    return "An effect is what a step leaves behind."


class Provider:
    """The model's provider, good or bad."""

    MOODS = ("ok", "limited", "failing", "garbage", "endless", "ok", "ok")

    def __init__(self, state: State, records: Records) -> None:
        self._state = state
        self._records = records
        self._calls = 0
        self._last: dict[int, float] = {}
        self._prompts: dict[int, str] = {}

    @property
    def writing(self) -> list[str]:
        """The first words of the prompts whose answers are being written."""
        return list(self._prompts.values())

    async def complete(self, client: Client, body: dict[str, Any]) -> None:
        """Answer a chat completion, and record when it began, when its last word was sent, and how it ended."""
        state = self._state
        mood = state.chance.choice(self.MOODS) if state.model == "mixed" else state.model
        self._calls += 1
        number, prompt = self._calls, str(body["messages"][-1]["content"])
        if "endless" in prompt and "steps" not in json.dumps(body.get("response_format") or {}):
            mood = "endless"
        self._records.write("begun", number, mood, prompt[:200], time.monotonic())
        self._last[number] = time.monotonic()
        self._prompts[number] = prompt.partition(" ")[0]
        state.active += 1
        ended = "left"
        try:
            await self._answer(client, body, mood, number)
            ended = "done"
        except ConnectionError:
            pass
        finally:
            state.active -= 1
            del self._prompts[number]
            self._records.write("ended", number, ended, self._last.pop(number), time.monotonic())

    async def _answer(self, client: Client, body: dict[str, Any], mood: str, number: int) -> None:
        chance = self._state.chance
        if mood == "limited":
            await client.send_json(429, {"error": {"message": "slow down"}}, "Retry-After: 1\r\n")
        elif mood == "failing":
            await client.send_json(chance.choice((500, 502, 503)), {"error": {"message": "broken"}})
        elif mood == "garbage" and chance.random() < 0.5:
            await client.send_json(200, chance.choice(([], {"choices": 7}, {"choices": []}, "text", None)))
        elif not body.get("stream"):
            text = "}{ nonsense" if mood == "garbage" else reply_to(body)
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            await client.send_json(200, {**_chunk(), "choices": [choice], "usage": _usage(body, text)})
        else:
            await client.send_head(200, "text/event-stream")
            text = "}{ nonsense" if mood == "garbage" else reply_to(body)
            async for word in _words(text, endless=mood == "endless"):
                delta = {"index": 0, "delta": {"content": word}}
                await client.send(_event({**_chunk(), "choices": [delta]}))
                self._last[number] = time.monotonic()
            if mood == "garbage" and chance.random() < 0.5:
                return await client.send(b"data: {\n\nev")
            await client.send(_event({**_chunk(), "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
            await client.send(_event({**_chunk(), "choices": [], "usage": _usage(body, text)}) + b"data: [DONE]\n\n")
        return None


async def _words(text: str, *, endless: bool) -> AsyncIterator[str]:
    for word in re.findall(r"\S+\s*", text):
        yield word
    while endless:
        await asyncio.sleep(ENDLESS_WORD_SECONDS)
        yield "more "


def _chunk() -> dict[str, Any]:
    return {"id": "chaos", "object": "chat.completion.chunk", "created": 0, "model": "chaos"}


def _event(data: object) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _usage(body: dict[str, Any], text: str) -> dict[str, int]:
    prompt = sum(len(str(message["content"]).split()) for message in body["messages"])
    completion = len(text.split())
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Outside:
    """The servers."""

    def __init__(self, options: Options) -> None:
        folder = Path(options.folder)
        self._state = State(random.Random(options.seed))
        self._state.going_on.set()
        self._effects = Records(folder / "effects.jsonl")
        self._provider = Provider(self._state, Records(folder / "model.jsonl"))
        self._options = options

    async def serve(self) -> None:
        """Serve until the process is ended."""
        host = "127.0.0.1"
        servers = [await asyncio.start_server(self._serve_client, host, self._options.port, limit=MAX_HEADER_BYTES)]
        for port, target in self._options.relays.items():
            servers.append(await asyncio.start_server(self._relay_to(target), host, int(port)))
        await asyncio.gather(*(server.serve_forever() for server in servers))

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Client(reader, writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            path, body = await client.request()
            answer = asyncio.create_task(self._answer(client, path, body))
            gone = asyncio.create_task(client.left())
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and path != "/v1/chat/completions":
                answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
        writer.close()

    async def _answer(self, client: Client, path: str, body: dict[str, Any]) -> None:
        state = self._state
        if path == "/v1/chat/completions":
            await self._provider.complete(client, body)
        elif path == "/effects":
            # What is done is done, whether or not its answer arrives.
            self._effects.write({**body, "at": time.monotonic()})
            await state.going_on.wait()
            await client.send_json(200, {})
        elif path == "/control":
            state.control(body)
            await client.send_json(200, {})
        else:
            await client.send_json(200, {"active": state.active, "writing": self._provider.writing})

    def _relay_to(self, port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                there, away = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                writer.transport.abort()
                return
            ways = {
                asyncio.create_task(_pump(reader, away)),
                asyncio.create_task(_pump(there, writer, self._is_lost)),
            }
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            writer.transport.abort()
            away.transport.abort()

        return relay

    def _is_lost(self) -> bool:
        return self._state.chance.random() < self._state.cut


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: Callable[[], bool] | None = None
) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            if lost is not None and lost():
                return
            writer.write(data)
            await writer.drain()


if __name__ == "__main__":
    asyncio.run(Outside(Options(**json.loads(sys.argv[1]))).serve())
