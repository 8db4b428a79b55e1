"""Which HTTP a connection speaks: agreed on in TLS (RFC 7301), or told by how it begins (RFC 9113 section 3.3)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from octollm.rpc.http2_protocol import Http2ServerProtocol
from octollm.rpc.protocol import HEADER_SECONDS, Http1ServerProtocol

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class NegotiatingProtocol(asyncio.Protocol):
    """Takes the first bytes of a connection, and hands it to the protocol that they belong to."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: Mapping[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._config = config
        self._state = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hand it on at once where TLS has decided."""
        self._transport = cast("asyncio.Transport", transport)
        self._state.connections.add(cast("Any", self))
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            self._delegate(http2=tls.selected_alpn_protocol() == "h2")
        else:
            self._timer = self._loop.call_later(HEADER_SECONDS, self.shutdown)

    def data_received(self, data: bytes) -> None:
        """Look whether these are the first bytes of HTTP/2."""
        self._received += data
        if self._received.startswith(PREFACE):
            self._delegate(http2=True)
        elif not PREFACE.startswith(self._received):
            self._delegate(http2=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        del exc
        self._unregister()

    def shutdown(self) -> None:
        """Close a connection that has asked for nothing."""
        if self._transport is not None:
            self._transport.close()

    def _delegate(self, *, http2: bool) -> None:
        transport = self._transport
        assert transport is not None
        self._unregister()
        if http2:
            found: asyncio.Protocol = Http2ServerProtocol(self._config, self._state, self._app_state, self._loop)
        else:
            found = Http1ServerProtocol(self._config, self._state, dict(self._app_state), self._loop)
        transport.set_protocol(found)
        found.connection_made(transport)
        if self._received:
            found.data_received(self._received)

    def _unregister(self) -> None:
        self._state.connections.discard(cast("Any", self))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
