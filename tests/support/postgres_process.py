"""A private PostgreSQL server that a test may stop and start."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from ports import free_port


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    there = shutil.which("initdb")
    return Path(there).parent if there else None


class PostgresProcess:
    """A server on a port of its own; started again it goes on with its data and its port."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        binaries = _binaries()
        if binaries is None:
            if os.environ.get("CI"):
                pytest.fail("PostgreSQL's server is not installed")
            pytest.skip("PostgreSQL's server is not installed")
        self._binaries = binaries
        # Not below the test's folder: its parents are closed to the user that the server runs as.
        self._folder = Path(tempfile.mkdtemp(prefix="octollm-postgres-"))
        # The server refuses to run as root.
        self._as: list[str] = []
        if os.geteuid() == 0:
            shutil.chown(self._folder, "postgres")
            self._as = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        self._port = port or free_port(address)
        self._address = address
        self.url = f"postgresql://postgres@{address}:{self._port}/postgres"
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", "--pgdata", str(self._data))
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all trust\n")

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        place = f"-p {self._port} -c listen_addresses={self._address} -c unix_socket_directories={self._folder}"
        options = f"{place} -c fsync=off"
        log = str(self._folder / "log")
        self._run(
            "pg_ctl", "--silent", "--wait", "--pgdata", str(self._data), "--log", log, "--options", options, "start"
        )

    @property
    def pid(self) -> int:
        """The process that started all others of the server."""
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def kill(self) -> None:
        """End the server as by kill -9: what it had not written it recovers from its log."""
        self._run("pg_ctl", "--silent", "--mode=immediate", "--pgdata", str(self._data), "stop", check=False)

    def close(self) -> None:
        """End the server and take its folder away."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        done = subprocess.run(
            [*self._as, str(self._binaries / program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, (program, (self._folder / "log").read_text()[-2000:])
