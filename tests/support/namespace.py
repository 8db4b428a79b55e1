"""Several hosts on one machine: a network namespace with addresses of its own, and a DNS server for their names.

A test calls :func:`in_namespace` with a function of its own module, which runs in a process inside.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

DNS_ADDRESS = "10.77.0.53"


def in_namespace(function: str, *arguments: str, seconds: float = 200) -> None:
    """Run ``module:function`` as root of a new network; where that cannot be skip, or fail under CI."""
    reason = _lacking()
    if reason:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    done = subprocess.run(
        [
            "unshare",
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            sys.executable,
            __file__,
            function,
            *arguments,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def _lacking() -> str:
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        return "root, unshare and ip (iproute2) are needed to make a network of its own"
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "this machine lets nobody make a network of its own"


def add_address(address: str) -> None:
    """Give this network an address."""
    subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)


class Zone(asyncio.DatagramProtocol):
    """A DNS server of A records; ``names`` may be changed at any time."""

    def __init__(self, ttl: int = 1) -> None:
        self.names: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self._ttl = ttl
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA | dns.flags.AA
        question = query.question[0]
        name = question.name.to_text().rstrip(".")
        self.asked.append(name)
        if name not in self.names:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif question.rdtype == dns.rdatatype.A:
            answer.answer.append(dns.rrset.from_text(question.name, self._ttl, "IN", "A", *self.names[name]))
        assert self._transport is not None
        self._transport.sendto(answer.to_wire(), addr)

    @asynccontextmanager
    async def served(self) -> AsyncGenerator[None]:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(DNS_ADDRESS, 53))
        try:
            yield
        finally:
            transport.close()


def _prepare() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    add_address(DNS_ADDRESS)
    with tempfile.NamedTemporaryFile("w", suffix=".conf", delete=False) as file:
        file.write(f"nameserver {DNS_ADDRESS}\noptions timeout:1 attempts:2\n")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", file.name, str(Path("/etc/resolv.conf").resolve())], check=True)
    Path(file.name).unlink()


def _main() -> None:
    module, _, name = sys.argv[1].partition(":")
    _prepare()
    asyncio.run(getattr(importlib.import_module(module), name)(*sys.argv[2:]))


if __name__ == "__main__":
    _main()
