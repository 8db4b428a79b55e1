"""An ASGI extension of our HTTP servers: a request that arrived whole is answered in one write, without a coroutine for each ASGI message; everything works without it too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

from starlette.types import Scope

EXTENSION = "octollm.exchange"


class WholeRequestExtension(Protocol):
    """One request and its answer."""

    def whole_body(self) -> bytes | None:
        """Return the body if all of it is here; ``receive`` is not to be used then. ``None`` if it is still coming."""
        ...

    def respond(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send a whole answer, with the headers given; return false if it has to go through ``send``.

        Raises ``ValueError`` for a header that would end the head early.
        """
        ...

    def set_disconnect_callback(self, callback: Callable[[], None] | None) -> None:
        """Have ``callback`` called once the connection is lost; ``None`` when nobody wants to know any more."""
        ...


class SendOnlyExtension:
    """An exchange whose answers all go through ``send``, for applications with a middleware that has to see them."""

    def __init__(self, extension: WholeRequestExtension) -> None:
        self.whole_body = extension.whole_body
        self.set_disconnect_callback = extension.set_disconnect_callback

    def respond(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Leave the answer to ``send``."""
        del status, headers, body
        return False


def take_extension(scope: Scope) -> WholeRequestExtension | None:
    """Return what the server offers, and take it out of the scope: they refer to each other."""
    extensions = scope.get("extensions")
    return None if not extensions else cast("WholeRequestExtension | None", extensions.pop(EXTENSION, None))
