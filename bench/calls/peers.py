"""The others: gRPC's own Python stack, FastAPI with httpx, and the snippet of the architecture decision as written."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import fastapi
import grpc
import grpc.aio
import httpx
import jwt
import pydantic
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from opentelemetry.instrumentation.grpc import aio_client_interceptors, aio_server_interceptor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
METHOD = "/octo.Judge/Validate"


class Nowhere(SpanExporter):
    def export(self, spans: Any) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def provider() -> TracerProvider:
    found = TracerProvider()
    found.add_span_processor(BatchSpanProcessor(Nowhere()))
    return found


class Jwt(grpc.aio.ServerInterceptor):
    """Verifies a token with each call, as an interceptor does that has no cache of its own."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        metadata = dict(details.invocation_metadata)
        jwt.decode(metadata["authorization"][7:], KEY.public_key(), algorithms=["EdDSA"], audience="judge")
        return await continuation(details)


async def serve_grpc(port: int, *, everything: bool) -> None:
    async def validate(request: bytes, _context: object) -> bytes:
        return request

    interceptors: list[Any] = [aio_server_interceptor(provider()), Jwt()] if everything else []
    server = grpc.aio.server(interceptors=interceptors)
    handler = grpc.unary_unary_rpc_method_handler(validate)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("octo.Judge", {"Validate": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


@contextlib.asynccontextmanager
async def calling_grpc(port: int, size: int, *, everything: bool) -> AsyncGenerator[Callable[[], Awaitable[object]]]:
    body = json.dumps({"code": "x" * size}).encode()
    claims = {"aud": "judge", "sub": "user-1", "exp": time.time() + 3600, "scope": "judge:validate"}
    token = jwt.encode(claims, KEY, algorithm="EdDSA")
    metadata = (("authorization", f"Bearer {token}"),) if everything else None
    interceptors = aio_client_interceptors(provider()) if everything else None
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", interceptors=interceptors) as channel:
        method = channel.unary_unary(METHOD)

        async def call() -> object:
            return await method(body, timeout=30, metadata=metadata)

        yield call


class Task(pydantic.BaseModel):
    code: str


async def serve_fastapi(port: int) -> None:
    app = fastapi.FastAPI()

    @app.post("/validate")
    async def validate(task: Task) -> Task:
        return task

    await uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, access_log=False, lifespan="off")).serve()


@contextlib.asynccontextmanager
async def calling_httpx(port: int, size: int) -> AsyncGenerator[Callable[[], Awaitable[object]]]:
    task = Task(code="x" * size)
    url = f"http://127.0.0.1:{port}/validate"
    async with httpx.AsyncClient() as client:

        async def call() -> object:
            response = await client.post(url, json=task.model_dump(), headers={"X-Request-ID": "req-1"}, timeout=30.0)
            return response.json()["code"]

        yield call


@contextlib.asynccontextmanager
async def calling_as_written(port: int, size: int) -> AsyncGenerator[Callable[[], Awaitable[object]]]:
    task = Task(code="x" * size)
    url = f"http://127.0.0.1:{port}/validate"

    async def call() -> object:
        async with httpx.AsyncClient() as client:
            response = await client.post(
                url,
                json=task.model_dump(),
                headers={"Authorization": "Bearer capability-token", "X-Request-ID": "req-1"},
                timeout=30.0,
            )
            return response.json()["code"]

    yield call
