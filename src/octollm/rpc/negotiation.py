"""Which HTTP a connection speaks: agreed on in TLS (RFC 7301), or told by how it begins (RFC 9113 section 3.3)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from octollm.rpc.http2_protocol import Http2Protocol
from octollm.rpc.protocol import HEADER_SECONDS, BoundedProtocol

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class EitherProtocol(asyncio.Protocol):
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
        self._begun = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hand it on at once where TLS has decided."""
        self._transport = cast("asyncio.Transport", transport)
        self._state.connections.add(cast("Any", self))
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            self._hand_on(http2=tls.selected_alpn_protocol() == "h2")
        else:
            self._timer = self._loop.call_later(HEADER_SECONDS, self.shutdown)

    def data_received(self, data: bytes) -> None:
        """Look whether these are the first bytes of HTTP/2."""
        self._begun += data
        if self._begun.startswith(PREFACE):
            self._hand_on(http2=True)
        elif not PREFACE.startswith(self._begun):
            self._hand_on(http2=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        del exc
        self._forget()

    def shutdown(self) -> None:
        """Close a connection that has asked for nothing."""
        if self._transport is not None:
            self._transport.close()

    def _hand_on(self, *, http2: bool) -> None:
        transport = self._transport
        assert transport is not None
        self._forget()
        if http2:
            found: asyncio.Protocol = Http2Protocol(self._config, self._state, self._app_state, self._loop)
        else:
            found = BoundedProtocol(self._config, self._state, dict(self._app_state), self._loop)
        transport.set_protocol(found)
        found.connection_made(transport)
        if self._begun:
            found.data_received(self._begun)

    def _forget(self) -> None:
        self._state.connections.discard(cast("Any", self))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
