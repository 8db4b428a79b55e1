"""The ways in which a service is called: a test of calls runs over each of them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyqwest
import trustme
from proxy import HaProxy

from octollm.rpc.external import PyqwestClient
from octollm.rpc.http_client import HttpClient
from octollm.rpc.tls import TlsConfig, client_context
from octollm.rpc.transport import PLAINTEXT, TransportConfig

DIRECT = ("http1", "tls")
PROXIED = ("http2", "tls-http2")
"""HTTP/2 to a proxy in front of each service, and HTTP/1.1 from there."""


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


class SelectedWire:
    """How the test that runs now calls its services."""

    def __init__(self) -> None:
        self.wire: TransportConfig = PLAINTEXT
        self.http2 = False
        self._proxies: dict[int, HaProxy] = {}

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Call services in one way; in TLS both sides show a certificate."""
        self.wire = TransportConfig(certificates() if name.startswith("tls") else None)
        self.http2 = name in PROXIED
        try:
            yield
        finally:
            self.wire, self.http2 = PLAINTEXT, False
            while self._proxies:
                self._proxies.popitem()[1].stop()

    def client(self) -> HttpClient:
        return PyqwestClient(http2_transport(self.wire.tls)) if self.http2 else self.wire.create_client()

    def url(self, port: int) -> str:
        """Return the address of the service on a port, or of the proxy in front of it."""
        return self.proxy(port).url if self.http2 else f"{self.wire.scheme}://127.0.0.1:{port}"

    def proxy(self, port: int) -> HaProxy:
        """Return the proxy in front of a port."""
        if port not in self._proxies:
            proxy = self._proxies[port] = HaProxy(port, self.wire.tls)
            proxy.start()
        return self._proxies[port]

    def stock(self, **options: Any) -> httpx.AsyncClient:
        """Return a client that knows nothing of ours."""
        if self.http2:
            options |= {"http1": False, "http2": True}
        if (tls := self.wire.tls) is not None:
            context = client_context(tls.ca, tls.certificate, tls.key)
            options["verify"] = context
        return httpx.AsyncClient(**options)


def http2_transport(tls: TlsConfig | None) -> pyqwest.HTTPTransport:
    """Return a transport that speaks HTTP/2 only; with TLS it shows a certificate."""
    files: dict[str, Any] = {}
    if tls is not None and tls.ca is not None:
        files = {"tls_cert": tls.certificate.read_bytes(), "tls_key": tls.key.read_bytes()}
        files["tls_ca_cert"] = tls.ca.read_bytes()
    return pyqwest.HTTPTransport(
        http_version=pyqwest.HTTPVersion.HTTP2,
        follow_redirects=False,
        enable_otel=False,
        proxy=pyqwest.Proxy("http://127.0.0.1:9", no_proxy="*,0.0.0.0/0,::/0"),
        **files,
    )


CURRENT = SelectedWire()
