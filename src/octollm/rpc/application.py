"""The operations of a service as one ASGI application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from octollm.errors import OctoError
from octollm.rpc.arriving import id_or_new
from octollm.rpc.call import Operation
from octollm.rpc.exchange import EXTENSION, SendOnlyExtension, take_extension
from octollm.rpc.gate import ConcurrencyLimiter
from octollm.rpc.once import IdempotentHandler
from octollm.rpc.problems import problem_response
from octollm.rpc.server import OperationEndpoint, ServerContext


def build_app(
    context: ServerContext, operations: Sequence[Operation], extra_routes: Sequence[BaseRoute] = ()
) -> Starlette:
    """Return the ASGI application of a service: its operations, and ``extra`` routes (health, pages, sockets)."""
    gate = ConcurrencyLimiter(context.max_concurrent, context.max_queued)
    once = None if context.idempotency is None else IdempotentHandler(context.idempotency)
    routes: list[BaseRoute] = []
    by_path: dict[str, dict[str, OperationEndpoint]] = {}
    for operation in operations:
        by_path.setdefault(operation.path, {})[operation.method] = OperationEndpoint(context, operation, gate, once)
    for path, methods in by_path.items():
        routes.append(Route(path, _MethodDispatcher(methods), methods=list(methods)))

    async def refuse(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        code = "method_not_allowed" if status == 405 else "not_found_result"
        response = problem_response(
            OctoError(f"{request.method} {request.url.path} is not served here.", code=code),
            id_or_new(dict(request.scope["headers"]).get(b"x-request-id"), context.ids, "req-"),
        )
        # RFC 9110 section 15.5.6: a 405 says in `Allow` what is served.
        response.headers.update(getattr(error, "headers", None) or {})
        return response

    handlers: Any = {HTTPException: refuse}
    direct = {
        (operation.method, operation.path): by_path[operation.path][operation.method]
        for operation in operations
        if "{" not in operation.path
    }
    return _Application(direct, routes=[*extra_routes, *routes], exception_handlers=handlers)


class _Application(Starlette):
    """Finds an operation by its method and path at once; everything else goes through the routes in turn."""

    def __init__(self, direct: Mapping[tuple[str, str], OperationEndpoint], **options: Any) -> None:
        super().__init__(**options)
        # A path has one form: what is not served is not found, and nobody is sent elsewhere with a token.
        self.router.redirect_slashes = False
        self._direct = direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            endpoint = None if self.user_middleware else self._direct.get((scope["method"], scope["path"]))
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
            if self.user_middleware and (exchange := take_extension(scope)) is not None:
                scope["extensions"][EXTENSION] = SendOnlyExtension(exchange)
        await super().__call__(scope, receive, send)


class _MethodDispatcher:
    """Several methods on one path."""

    def __init__(self, methods: Mapping[str, OperationEndpoint]) -> None:
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" and "HEAD" not in self._methods else scope["method"]
        await self._methods[method](scope, receive, send)
