"""The parent's side of the llama.cpp child process: start, request, cancel, stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from octollm.errors import OctoError

_LINE_BYTES = 4 * 1024 * 1024
_STDERR_LINES = 20
_LEAVE_SECONDS = 5.0
"""How long a child that has closed its output may take to exit."""
_ENVIRONMENT_NAMES = ("PATH", "HOME", "TMPDIR", "TEMP", "TMP", "LANG", "VIRTUAL_ENV", "SYSTEMROOT", "USERPROFILE")
_ENVIRONMENT_PREFIXES = ("LC_", "LD_", "DYLD_", "PYTHON", "GGML_", "OMP_")


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """Parameters of llama.cpp. It processes a prompt in batches of ``batch_tokens``; a cancel takes effect between two.

    Timeouts, after which the process is killed: ``load_seconds`` until it is ready, ``stall_seconds`` between two
    events of a generation, ``stop_seconds`` from a cancel to the generation's end.
    """

    threads: int
    batch_tokens: int
    context_tokens: int = 8192
    slots: int = 1
    prompt_cache_mib: int = 256
    load_seconds: float = 120.0
    stall_seconds: float = 120.0
    stop_seconds: float = 15.0


class LlamaEvent(msgspec.Struct, frozen=True):
    """One line of the child's output. ``llama_worker`` documents the members of each event."""

    event: Literal["ready", "failed", "progress", "text", "end", "stopped", "counted", "error"]
    id: int = 0
    text: str = ""
    finish: str = ""
    prompt: int = 0
    completion: int = 0
    tokens: int = 0
    status: int = 0
    kind: str = ""
    message: str = ""
    context: int = 0


_FINAL_EVENTS = frozenset({"end", "stopped", "counted", "error"})


class Generation:
    """The events of one request to the child. ``on_end`` is called once, after the child has finished the request."""

    def __init__(self, number: int, process: LlamaProcess, on_end: Callable[[], None]) -> None:
        self._number = number
        self._process = process
        self._on_end = on_end
        # Bounded by the context: a generation has at most one event per token and one per batch of the prompt.
        self._events: deque[LlamaEvent] = deque()
        self._arrived = asyncio.Event()
        self._ended = False
        self._cancelled: asyncio.TimerHandle | None = None

    async def next(self, seconds: float) -> LlamaEvent:
        """Return the next event. Raises ``model_failed`` when the child exits or sends none for ``seconds``."""
        while not self._events:
            if self._ended:
                raise self._process.failure()
            self._arrived.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._arrived.wait()
            except TimeoutError as exc:
                self._process.kill(f"it sent no event for {seconds:.0f} s")
                raise self._process.failure() from exc
        return self._events.popleft()

    def cancel(self) -> None:
        """Request a stop without waiting for it; does nothing when the generation has ended."""
        if not self._ended and self._cancelled is None:
            self._cancelled = self._process.send_cancel(self._number)

    def add_event(self, event: LlamaEvent) -> None:
        """Queue an event; the process's reader calls this."""
        if self._cancelled is None:
            self._events.append(event)
        self._arrived.set()
        if event.event in _FINAL_EVENTS:
            self.end()

    def end(self) -> None:
        """Mark the generation as ended; no more events follow."""
        if self._ended:
            return
        self._ended = True
        if self._cancelled is not None:
            self._cancelled.cancel()
        self._arrived.set()
        self._on_end()


class LlamaProcess:
    """A child process, created by :meth:`start`. It is never restarted: once :attr:`alive` is false it stays so."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path, settings: LlamaSettings) -> None:
        self._process = process
        self._folder = folder
        self._settings = settings
        self._orders: dict[int, Generation] = {}
        self._numbers = 0
        self._alive = True
        self._why = ""
        self._errors: deque[str] = deque(maxlen=_STDERR_LINES)
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, path: Path, settings: LlamaSettings) -> LlamaProcess:
        """Start a child and wait until it has loaded the model at ``path``.

        Cancelling kills it. Raises ``model_failed``.
        """
        folder = Path(tempfile.mkdtemp(prefix="octollm-llama-"))
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", str(Path(__file__).with_name("llama_worker.py"))),
                msgspec.json.encode(_worker_settings(path, folder, settings)).decode(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=folder,
                env=_environment(os.environ),
                limit=_LINE_BYTES,
                start_new_session=True,  # Ctrl-C must reach the parent only, which shuts the child down in order
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        child = cls(process, folder, settings)
        try:
            await child._until_ready()
        except BaseException:
            await asyncio.shield(child.aclose())
            raise
        return child

    @property
    def alive(self) -> bool:
        """Return whether the child accepts requests."""
        return self._alive

    @property
    def pid(self) -> int:
        """Return the child's process id."""
        return self._process.pid

    async def count(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Return the prompt tokens of ``messages`` by the model's template and tokenizer. Raises ``model_failed``."""
        event = await self._send_request("count", {"messages": messages}).next(self._settings.stall_seconds)
        if event.event != "counted":
            raise OctoError(f"The embedded model could not count tokens: {event.message}", code="model_failed")
        return event.tokens

    def chat(self, body: Mapping[str, object], on_end: Callable[[], None]) -> Generation:
        """Start a generation; ``body`` is a chat completions request of llama.cpp. Raises ``model_failed``."""
        return self._send_request("chat", body, on_end)

    def send_cancel(self, number: int) -> asyncio.TimerHandle:
        """Request that the child stops a generation, and kill it if it does not within ``stop_seconds``."""
        self._write({"op": "cancel", "id": number})
        return asyncio.get_running_loop().call_later(
            self._settings.stop_seconds, self.kill, "it did not stop a generation that was cancelled"
        )

    def kill(self, why: str) -> None:
        """Kill the child; running generations fail with ``why``."""
        self._end(why)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def failure(self) -> OctoError:
        """Return ``model_failed`` for a request that the child did not finish."""
        last = f" Its last error output: {self._errors[-1]}" if self._errors else ""
        return OctoError(f"The embedded model failed: {self._why or 'it was closed'}.{last}", code="model_failed")

    async def aclose(self) -> None:
        """End the child and wait until it has exited; running generations end with ``model_failed``."""
        self.kill("it was closed")
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # the readers end with the killed process's output
        await asyncio.to_thread(shutil.rmtree, self._folder, True)

    def _send_request(
        self, op: str, body: Mapping[str, object], on_end: Callable[[], None] = lambda: None
    ) -> Generation:
        if not self._alive:
            raise self.failure()
        self._numbers += 1
        number = self._numbers

        def finish() -> None:
            self._orders.pop(number, None)
            on_end()

        order = self._orders[number] = Generation(number, self, finish)
        self._write({"op": op, "id": number, "body": body})
        return order

    def _write(self, order: Mapping[str, object]) -> None:
        if self._process.stdin is not None and self._alive:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")

    async def _until_ready(self) -> None:
        stdout, stderr = self._process.stdout, self._process.stderr
        if stdout is None or stderr is None:
            raise self.failure()
        self._tasks.append(asyncio.create_task(self._read_errors(stderr)))
        try:
            async with asyncio.timeout(self._settings.load_seconds):
                event = await _read(stdout)
        except TimeoutError as exc:
            self._end(f"it was not loaded after {self._settings.load_seconds:.0f} s")
            raise self.failure() from exc
        if event is None or event.event != "ready":
            self._end(event.message if event is not None and event.message else await self._exit_reason())
            raise self.failure()
        self._tasks.append(asyncio.create_task(self._read_events(stdout)))

    async def _read_events(self, stdout: asyncio.StreamReader) -> None:
        why = "its events could not be read"
        try:
            while (event := await _read(stdout)) is not None:
                if (order := self._orders.get(event.id)) is not None:
                    order.add_event(event)
            why = await self._exit_reason()
        finally:
            self._end(why)

    async def _read_errors(self, stderr: asyncio.StreamReader) -> None:
        with contextlib.suppress(ValueError):  # a line over the reader's limit: not a message of llama.cpp
            async for line in stderr:
                if text := line.decode(errors="replace").strip():
                    self._errors.append(text[:500])

    async def _exit_reason(self) -> str:
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                code = await self._process.wait()
        except TimeoutError:  # it sent a line that is not an event, so the rest of its output cannot be trusted either
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            return "its output was not understood"
        return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with code {code}"

    def _end(self, why: str) -> None:
        if not self._alive:
            return
        self._alive = False
        self._why = why
        for order in list(self._orders.values()):
            order.end()


async def _read(stdout: asyncio.StreamReader) -> LlamaEvent | None:
    """Return the next event, or ``None`` at the end of the output or at a line that is not an event."""
    try:
        line = await stdout.readline()
        return msgspec.json.decode(line, type=LlamaEvent) if line.endswith(b"\n") else None
    except (ValueError, msgspec.DecodeError):
        return None


def _worker_settings(path: Path, folder: Path, settings: LlamaSettings) -> dict[str, object]:
    unix = sys.platform != "win32"
    return {
        "path": str(path.absolute()),
        "folder": str(folder),
        # Relative to the child's working directory: the path of a socket has at most 107 bytes.
        "host": "llama.sock" if unix else "127.0.0.1",
        "context_tokens": settings.context_tokens,
        "slots": settings.slots,
        "batch_tokens": settings.batch_tokens,
        "threads": settings.threads,
        "prompt_cache_mib": settings.prompt_cache_mib,
    }


def _environment(full: Mapping[str, str]) -> dict[str, str]:
    """Return the part of the environment that native code needs; the parent's keys and settings are withheld."""
    return {name: full[name] for name in full if name in _ENVIRONMENT_NAMES or name.startswith(_ENVIRONMENT_PREFIXES)}
