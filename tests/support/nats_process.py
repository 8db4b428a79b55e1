"""A private NATS server that a test may kill, and a client that reads its streams with nats-py and none of our code."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest
from nats.js.api import AckPolicy, ConsumerConfig
from ports import free_port
from server_process import ServerProcess


class NatsProcess(ServerProcess):
    """``settings`` is added to the configuration; without ``jetstream`` the server stores nothing."""

    def __init__(self, folder: Path, settings: str = "", *, jetstream: bool = True) -> None:
        super().__init__()
        folder.mkdir(exist_ok=True)
        binary = shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin:/usr/local/sbin")
        if binary is None:
            if os.environ.get("CI"):
                pytest.fail("nats-server is not installed")
            pytest.skip("nats-server is not installed")
        self._binary = binary
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._folder = folder
        self._configuration = folder / "nats.conf"
        self._configuration.write_text(f'listen: "127.0.0.1:{self.port}"\n{settings}\n')
        if jetstream:
            self.enable_jetstream()
        self._log = folder / "nats.log"

    def enable_jetstream(self) -> None:
        """Store streams from the next start on."""
        with self._configuration.open("a") as file:
            file.write(f'jetstream {{ store_dir: "{self._folder}/js" }}\n')

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, "-c", str(self._configuration)], stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > end:
                    self.kill()
                    raise AssertionError(self._log.read_text()) from None
                time.sleep(0.02)


@dataclass(frozen=True)
class StoredMessage:
    """A message of a stream."""

    subject: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        """Return the envelope."""
        return json.loads(self.body)


async def read_stream(url: str, stream: str = "octollm", subject: str = "octollm.events.>") -> list[StoredMessage]:
    """Return every message of a stream, in its order."""
    client = await nats.connect(url, connect_timeout=5)
    try:
        jetstream = client.jetstream()
        subscription = await jetstream.pull_subscribe(
            subject, stream=stream, config=ConsumerConfig(ack_policy=AckPolicy.NONE)
        )
        found: list[StoredMessage] = []
        while (await subscription.consumer_info()).num_pending:
            for message in await subscription.fetch(500, timeout=5):
                found.append(StoredMessage(message.subject, dict(message.headers or {}), message.data))
        return found
    finally:
        await client.close()
