"""Two ASGI extensions of our HTTP server: a response in one write, and the transport of a WebSocket connection.

They save a coroutine for each ASGI message. Everything works without them too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from starlette.types import Scope

EXTENSION = "octollm.exchange"
TRANSPORT = "octollm.transport"


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


def get_websocket_transport(scope: Scope) -> asyncio.Transport | None:
    """Return the transport of an accepted WebSocket connection, for frames that are encoded already.

    ``None`` if the server does not give it. Nothing may be written after the close frame.
    """
    return cast("asyncio.Transport | None", scope.get("state", {}).get(TRANSPORT))
