"""The ways in which services talk: what a test of calls does, it does over each of them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import httpx
import trustme

from octollm.rpc.http_client import HttpClient
from octollm.rpc.tls import TlsConfig, client_context
from octollm.rpc.transport import PLAINTEXT, TransportConfig

NAMES = ("http1", "http2", "tls", "tls-http2")


@functools.cache
def certificates() -> TlsConfig:
    """Return files of an authority of the tests' own, and of who is certified by it on this machine."""
    folder = Path(tempfile.mkdtemp(prefix="octollm-tls-"))
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    own.private_key_pem.write_to_path(folder / "key.pem")
    for part in own.cert_chain_pems:
        part.write_to_path(folder / "cert.pem", append=True)
    return TlsConfig(folder / "cert.pem", folder / "key.pem", folder / "ca.pem", mutual=True)


def wire_named(name: str) -> TransportConfig:
    """Return a wire; in TLS both sides show a certificate."""
    tls = certificates() if name.startswith("tls") else None
    return TransportConfig("2" if name.endswith("http2") else "1.1", tls)


class Current:
    """What the test that runs now talks over."""

    wire: TransportConfig = PLAINTEXT

    def client(self) -> HttpClient:
        return self.wire.create_client()

    def url(self, port: int) -> str:
        return f"{self.wire.scheme}://127.0.0.1:{port}"

    def stock(self, **options: Any) -> httpx.AsyncClient:
        """Return a client that knows nothing of ours."""
        if self.wire.http_version == "2":
            options |= {"http1": False, "http2": True}
        if (tls := self.wire.tls) is not None:
            context = client_context(tls.ca, tls.certificate, tls.key)
            options["verify"] = context
        return httpx.AsyncClient(**options)


CURRENT = Current()
