"""Ports for what a test starts, from below those that the system gives to outgoing connections.

A port that was found free by binding port 0 lies among the system's own, which may give it to any connection before
the test's server binds it, or while that server is stopped.
"""

from __future__ import annotations

import os
import random
import socket

from octollm.contracts.services import SERVICES

WORKERS = 4
"""The processes of pytest-xdist that have ports of their own; with more, two may try the same port."""


def _worker() -> int:
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def free_port(address: str = "127.0.0.1") -> int:
    """Return a free port. Tests that run at the same time are given different ones, and none of a `free_shift`."""
    start = 20_000 + 3_000 * _worker()
    for port in random.sample(range(start, start + 3_000), 200):
        if _is_free(address, port):
            return port
    raise AssertionError("no free port")


def free_shift() -> int:
    """Return a port shift whose ports are all free. Tests that run at the same time are given different ones."""
    start = 1_000 + 2_500 * _worker()
    for shift in random.sample(range(start, start + 2_500), 200):
        if all(_is_free("127.0.0.1", info.port + shift) for info in SERVICES.values()):
            return shift
    raise AssertionError("no free ports")
