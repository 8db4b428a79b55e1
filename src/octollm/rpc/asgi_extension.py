"""Two ASGI extensions of our HTTP server: a request and its response whole, each in one call, and the connection.

The first saves a coroutine for each ASGI message. Everything works without them too.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from starlette.types import Scope

EXTENSION = "octollm.exchange"
TRANSPORT = "octollm.transport"
PROBE_SECONDS = 5
"""A silent client is probed after this time, and then every three seconds."""
SILENCE_SECONDS = 13
"""A client that acknowledges nothing for this long, or has no room for it, is disconnected."""


class WholeRequestExtension(Protocol):
    """One request and its response, as its connection sees it."""

    def whole_body(self) -> bytes | None:
        """Return the body, or ``None`` if more of it is to come. After a body ``receive`` must not be called."""
        ...

    def respond(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send a whole response; return false if it has to go through ``send``.

        Raises ``ValueError`` for a header that would end the head early.
        """
        ...

    def set_disconnect_callback(self, callback: Callable[[], None] | None) -> None:
        """Have ``callback`` called once the connection is lost; ``None`` takes it back."""
        ...


class SendOnlyExtension:
    """An extension whose responses all go through ``send``, for applications with middleware that has to see them."""

    def __init__(self, extension: WholeRequestExtension) -> None:
        self.whole_body = extension.whole_body
        self.set_disconnect_callback = extension.set_disconnect_callback

    def respond(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Return false: the response goes through ``send``."""
        del status, headers, body
        return False


def take_extension(scope: Scope) -> WholeRequestExtension | None:
    """Take the extension out of the scope, since they refer to each other; ``None`` if the server has none."""
    extensions = scope.get("extensions")
    return None if not extensions else cast("WholeRequestExtension | None", extensions.pop(EXTENSION, None))


def disconnect_silent_client(scope: Scope) -> None:
    """Have the kernel end the connection of a long response once its client has vanished or stopped to read.

    A client that vanished without a FIN would otherwise be noticed when all buffers are full: of a stream with little
    to say, after hours.
    """
    transport = cast("asyncio.Transport | None", scope.get("extensions", {}).get(TRANSPORT))
    peer = None if transport is None else transport.get_extra_info("socket")
    if peer is None or not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_SECONDS)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000)
