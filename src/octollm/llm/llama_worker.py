"""The child process that runs llama.cpp: one model, with JSON lines on stdin and stdout.

It is started by path and imports nothing of the package, so that it starts in a fraction of a second. It is a separate
process because loading a model holds Python's global lock for seconds, and because a failed assertion in llama.cpp
aborts its process. It exits when its stdin is closed, so it never outlives its parent.

In:  ``{"op": "chat", "id", "body"}``, ``{"op": "cancel", "id"}``, ``{"op": "count", "id", "body"}``
Out: ``{"event": "ready"}`` or ``{"event": "failed", "message"}``; then, each with ``id``: ``progress``, ``text``
(``text``), ``end`` (``finish``, ``prompt``, ``completion``), ``stopped``, ``counted`` (``tokens``), ``error``
(``status``, ``kind``, ``message``, ``prompt``, ``context``).
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import os
import secrets
import shutil
import socket
import sys
import threading
from typing import Any

_HTTP_SECONDS = 30.0


class Output:
    """Writes events to the parent, one line each; exits the process when the parent has closed the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._lock = threading.Lock()

    def send(self, event: str, **members: Any) -> None:
        """Write one event."""
        line = memoryview(json.dumps({"event": event, **members}).encode() + b"\n")
        with self._lock:
            try:
                while line:
                    line = line[self._file.write(line) or 0 :]
            except OSError:
                os._exit(1)


class Tokenizer:
    """Counts prompt tokens through llama.cpp's HTTP interface, the only one with the template and the tokenizer.

    The interface listens on a socket in a folder that only this user can enter, and requires a key that never leaves
    the process.
    """

    def __init__(self, address: str, key: str) -> None:
        self._address = address
        self._key = key

    def count(self, body: dict[str, Any]) -> int:
        """Return the tokens of a prompt. Raises ``ValueError``, ``OSError`` and ``http.client.HTTPException``."""
        connection = self._connect()
        try:
            connection.request(
                "POST",
                "/v1/chat/completions/input_tokens",
                json.dumps(body).encode(),
                {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            raw = answer.read()
        finally:
            connection.close()
        document = json.loads(raw)
        if answer.status != 200:
            raise ValueError(document.get("error", {}).get("message", f"HTTP {answer.status}"))
        return int(document["input_tokens"])

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=_HTTP_SECONDS)
        if self._address.startswith("unix://"):
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(_HTTP_SECONDS)
            connection.sock.connect(self._address.removeprefix("unix://"))
        else:
            host, _, port = self._address.removeprefix("http://").rpartition(":")
            connection = http.client.HTTPConnection(host, int(port), timeout=_HTTP_SECONDS)
        return connection


class Chat:
    """One generation, in its own thread."""

    def __init__(self, server: Any, output: Output, number: int, body: dict[str, Any]) -> None:
        self._server = server
        self._output = output
        self._number = number
        self._body = body
        self._stopped = threading.Event()
        self._finish = "stop"
        self._ended = False

    def stop(self) -> None:
        """Request a stop at the next token or the next batch of the prompt."""
        self._stopped.set()

    def run(self) -> None:
        """Generate, and send the parent each event; the last one says how the generation ended."""
        try:
            self._server.handle_chat_completions(self._body, self._take)
        except Exception as exc:
            self._error(status=400, message=str(exc))
        if self._ended:
            return
        if self._stopped.is_set():
            self._send("stopped")
        else:
            self._error(status=500, message="llama.cpp ended the answer without a reason")

    def _take(self, chunk: dict[str, Any]) -> bool:
        """Handle one chunk from llama.cpp; true stops the generation, which frees its slot before the next batch."""
        if self._ended or self._stopped.is_set():
            return True
        if "error" in chunk:
            error = chunk["error"]
            self._error(
                status=int(error.get("code", 500)),
                kind=str(error.get("type", "")),
                message=str(error.get("message", "")),
                prompt=error.get("n_prompt_tokens", 0),
                context=error.get("n_ctx", 0),
            )
            return True
        for choice in chunk.get("choices", ()):
            self._finish = choice.get("finish_reason") or self._finish
            if text := choice.get("delta", {}).get("content"):
                self._send("text", text=text)
        if usage := chunk.get("usage"):
            self._ended = True
            self._send("end", finish=self._finish, prompt=usage["prompt_tokens"], completion=usage["completion_tokens"])
        elif "prompt_progress" in chunk:
            self._send("progress")
        return False

    def _send(self, event: str, **members: Any) -> None:
        self._output.send(event, id=self._number, **members)

    def _error(self, **members: Any) -> None:
        self._ended = True
        self._send("error", **members)


def load(settings: dict[str, Any], key: str) -> Any:
    """Load the model; this holds the interpreter's lock until it has finished."""
    # Imported here so that a broken installation is reported to the parent, not to the terminal.
    llama: Any = importlib.import_module("xllamacpp")
    params: Any = llama.CommonParams()
    params.model.path = settings["path"]
    params.n_ctx = settings["context_tokens"] * settings["slots"]
    params.n_parallel = settings["slots"]
    params.n_batch = params.n_ubatch = settings["batch_tokens"]
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = settings["threads"]
        cpu.poll = 0  # waiting threads sleep: it costs no speed and spares the cores of the services
    params.cache_prompt = True
    params.cache_ram_mib = settings["prompt_cache_mib"]
    params.hostnames = [settings["host"]]
    params.port = 0
    params.api_keys = [key]
    params.n_threads_http = 1
    params.ui = False
    params.endpoint_slots = False
    params.warmup = False
    params.fit_params = False
    params.offline = True
    params.verbosity = 1  # errors only
    return llama.Server(params)


def serve(server: Any, tokenizer: Tokenizer, output: Output) -> None:
    """Execute the parent's requests until stdin is closed."""
    chats: dict[int, Chat] = {}

    def run(number: int, chat: Chat) -> None:
        try:
            chat.run()
        finally:
            chats.pop(number, None)

    for line in sys.stdin.buffer:
        request = json.loads(line)
        number = request["id"]
        if request["op"] == "chat":
            chat = chats[number] = Chat(server, output, number, request["body"])
            threading.Thread(target=run, args=(number, chat), daemon=True).start()
        elif request["op"] == "cancel":
            if (running := chats.get(number)) is not None:
                running.stop()
        else:
            try:
                output.send("counted", id=number, tokens=tokenizer.count(request["body"]))
            except (ValueError, OSError, http.client.HTTPException) as exc:
                output.send("error", id=number, status=500, message=f"tokens could not be counted: {exc}")


def main() -> None:
    """Load the model, serve requests, and exit at once when the parent closes stdin."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    descriptor = os.dup(1)
    os.dup2(2, 1)  # what native code prints must go to stderr, never between the events
    output = Output(descriptor)
    key = secrets.token_hex(16)
    try:
        server = load(settings, key)
    except Exception as exc:
        output.send("failed", message=f"{type(exc).__name__}: {exc}")
    else:
        output.send("ready")
        with contextlib.suppress(KeyboardInterrupt):
            serve(server, Tokenizer(server.listening_address, key), output)
    shutil.rmtree(settings["folder"], ignore_errors=True)
    # Native threads may be in the middle of a batch, and nothing needs their result.
    os._exit(0)


if __name__ == "__main__":
    main()
