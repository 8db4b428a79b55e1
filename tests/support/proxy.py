"""HAProxy in front of one server, with the configuration of ``deploy/haproxy.cfg``."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from ports import free_port

from octollm.rpc.tls import TlsConfig

CONFIGURATION = Path(__file__).parents[2] / "deploy/haproxy.cfg"
# In plain text HAProxy recognises HTTP/2 by the connection preface (RFC 9113 section 3.3).
TLS_OPTIONS = re.compile(r"(bind .+?|server gateway .+?) ssl .+")


class HaProxy:
    """One HAProxy process; without TLS it speaks plain text to both sides."""

    def __init__(self, port: int, tls: TlsConfig | None = None, *, timeouts: Mapping[str, str] | None = None) -> None:
        """``port`` is the server's on this machine. With mutual TLS the proxy asks its clients for a certificate.

        ``timeouts`` has other values than the configuration.
        """
        binary = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
        if binary is None:
            if os.environ.get("CI"):
                pytest.fail("haproxy is not installed")
            pytest.skip("haproxy is not installed")
        self._binary = binary
        self.port = free_port()
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"
        self._folder = tempfile.TemporaryDirectory(prefix="octollm-proxy-")
        self._environment = {"PROXY_BIND": f"127.0.0.1:{self.port}", "GATEWAY": f"127.0.0.1:{port}"}
        self._file = self._configure(tls, timeouts or {})
        self._process: subprocess.Popen[bytes] | None = None

    def _configure(self, tls: TlsConfig | None, timeouts: Mapping[str, str]) -> Path:
        folder, text = Path(self._folder.name), CONFIGURATION.read_text()
        if tls is None:
            text = TLS_OPTIONS.sub(r"\1", text)
        else:
            both = folder / "proxy.pem"
            both.write_bytes(tls.certificate.read_bytes() + tls.key.read_bytes())
            self._environment |= {"PROXY_CERT": str(both), "GATEWAY_NAME": "localhost", "GATEWAY_CA": str(tls.ca)}
            if tls.mutual:
                text = text.replace("alpn h2,http/1.1", f"alpn h2,http/1.1 verify required ca-file {tls.ca}")
                text = text.replace('ca-file "${GATEWAY_CA}"', f'ca-file "${{GATEWAY_CA}}" crt {both}')
        for name, value in timeouts.items():
            text = re.sub(rf"(timeout {name}) .+", rf"\1 {value}", text)
        file = folder / "haproxy.cfg"
        file.write_text(text)
        return file

    def start(self) -> None:
        """Start the proxy and wait until it accepts connections."""
        self._process = subprocess.Popen(
            [self._binary, "-db", "-f", str(self._file)], env=self._environment, stdout=subprocess.DEVNULL
        )
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, "HAProxy refuses its configuration"
                assert time.monotonic() < end, "HAProxy did not start"
                time.sleep(0.01)

    def drain(self) -> None:
        """Have the proxy take no further connection, and end once its calls have."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR1)

    def wait(self) -> int:
        """Return the exit code of a proxy that drains."""
        assert self._process is not None
        return self._process.wait(20)

    def stop(self) -> None:
        """End the proxy at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()
