"""How services talk: the version of HTTP, and whether in TLS."""

from __future__ import annotations

import ssl
from typing import Literal

import msgspec

from octollm.rpc.http import HttpClient
from octollm.rpc.http1 import Http1Client
from octollm.rpc.http2 import Http2Client
from octollm.rpc.tls import TlsConfig

HttpVersion = Literal["1.1", "2"]


class TransportConfig(msgspec.Struct, frozen=True):
    """How services of an installation talk; the same for all of them."""

    http_version: HttpVersion = "1.1"
    tls: TlsConfig | None = None

    @property
    def scheme(self) -> str:
        """Return what their addresses begin with."""
        return "http" if self.tls is None else "https"

    def create_client(self) -> HttpClient:
        """Return a client for calls among them."""
        if self.http_version == "2":
            return Http2Client(self.tls)
        return Http1Client(None if self.tls is None else self.tls.client_context())

    def server_tls(self) -> ssl.SSLContext | None:
        """Return what a server of theirs shows, ``None`` in plain text."""
        if self.tls is None:
            return None
        return self.tls.server_context(["h2", "http/1.1"] if self.http_version == "2" else ["http/1.1"])


PLAINTEXT = TransportConfig()
