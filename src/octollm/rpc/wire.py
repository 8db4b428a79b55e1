"""How services talk: the version of HTTP, and whether in TLS."""

from __future__ import annotations

import ssl
from typing import Literal

import msgspec

from octollm.rpc.http import Http
from octollm.rpc.http1 import Http1
from octollm.rpc.http2 import Http2
from octollm.rpc.tls import Tls

HttpVersion = Literal["1.1", "2"]


class Wire(msgspec.Struct, frozen=True):
    """How services of an installation talk; the same for all of them."""

    http: HttpVersion = "1.1"
    tls: Tls | None = None

    @property
    def scheme(self) -> str:
        """Return what their addresses begin with."""
        return "http" if self.tls is None else "https"

    def client(self) -> Http:
        """Return a client for calls among them."""
        if self.http == "2":
            return Http2(self.tls)
        return Http1(None if self.tls is None else self.tls.client())

    def server(self) -> ssl.SSLContext | None:
        """Return what a server of theirs shows, ``None`` in plain text."""
        if self.tls is None:
            return None
        return self.tls.server(["h2", "http/1.1"] if self.http == "2" else ["http/1.1"])


PLAIN = Wire()
