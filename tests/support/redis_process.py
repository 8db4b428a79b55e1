"""A private Redis server that a test may kill."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from ports import free_port
from server_process import ServerProcess


class RedisProcess(ServerProcess):
    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__()
        folder.mkdir(exist_ok=True)
        self._options = options
        binary = shutil.which("redis-server")
        if binary is None:
            if os.environ.get("CI"):
                pytest.fail("redis-server is not installed")
            pytest.skip("redis-server is not installed")
        self._binary = binary
        self._folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._configuration: tuple[str, ...] = ()

    def configure(self, file: Path, *options: str) -> None:
        """Start with a configuration file, and options that follow it."""
        self._configuration, self._options = (str(file),), (*self._options, *options)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self._process = subprocess.Popen(
            [
                self._binary,
                *self._configuration,
                "--port",
                str(self.port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--dir",
                str(self._folder),
                *self._options,
            ],
            stdout=subprocess.DEVNULL,
        )
        client = redis_py.Redis.from_url(self.url)
        end = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis_py.RedisError:
                assert time.monotonic() < end, "the private Redis did not start"
                time.sleep(0.01)
        client.close()


def wait_for(condition: Callable[[], bool], description: str) -> None:
    end = time.monotonic() + 20
    while True:
        with contextlib.suppress(redis_py.RedisError):
            if condition():
                return
        assert time.monotonic() < end, f"not in time: {description}"
        time.sleep(0.02)


class RedisClusterProcesses:
    """Three nodes that share the slots."""

    SLOTS = 16384

    def __init__(self, folder: Path) -> None:
        options = (
            "--cluster-enabled",
            "yes",
            "--cluster-require-full-coverage",
            "no",
            "--cluster-node-timeout",
            "1000",
        )
        self.nodes = [RedisProcess(folder / f"node-{number}", *options) for number in range(3)]
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def start(self) -> None:
        """Start the nodes and wait until each of them sees a complete cluster."""
        clients = []
        for number, node in enumerate(self.nodes):
            node.start()
            client = redis_py.Redis.from_url(node.url, decode_responses=True)
            clients.append(client)
            low, high = number * self.SLOTS // 3, (number + 1) * self.SLOTS // 3 - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", low, high)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)

        def complete(client: Any) -> bool:
            info = str(client.execute_command("CLUSTER", "INFO"))
            wanted = ("cluster_state:ok", f"cluster_slots_assigned:{self.SLOTS}", "cluster_known_nodes:3")
            return all(each in info for each in wanted)

        for client in clients:
            wait_for(lambda client=client: complete(client), "the cluster is complete")
            client.close()

    def kill(self) -> None:
        """End every node."""
        for node in self.nodes:
            node.kill()


class RedisSentinelProcesses:
    """A master, a replica, and a sentinel that makes the replica the master when the first one dies."""

    def __init__(self, folder: Path) -> None:
        self.master = RedisProcess(folder / "master")
        self.replica = RedisProcess(folder / "replica", "--replicaof", "127.0.0.1", str(self.master.port))
        configuration = folder / "sentinel.conf"
        configuration.write_text(
            f"sentinel monitor main 127.0.0.1 {self.master.port} 1\n"
            "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 1000\n"
        )
        self.sentinel = RedisProcess(folder / "sentinel")
        self.sentinel.configure(configuration, "--sentinel")
        self.url = f"redis+sentinel://127.0.0.1:{self.sentinel.port}/main/0"

    def start(self) -> None:
        """Start all and wait until the sentinel knows the replica and the replica has caught up."""
        for process in (self.master, self.replica, self.sentinel):
            process.start()
        with redis_py.Redis.from_url(f"redis://127.0.0.1:{self.sentinel.port}", decode_responses=True) as client:

            def ready() -> bool:
                replicas: Any = client.execute_command("SENTINEL", "REPLICAS", "main")
                return bool(replicas) and replicas[0].get("master-link-status") == "ok"

            wait_for(ready, "the sentinel knows the replica")

    def kill(self) -> None:
        """End every process."""
        for process in (self.sentinel, self.master, self.replica):
            process.kill()
