"""What is measured: for each, what serves and what calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from calls import octo, peers, servers

Client = AbstractAsyncContextManager[Callable[[], Awaitable[object]]]
REFERENCE = "grpc.aio"
FULL_GRPC = "grpc.aio, JWT and OpenTelemetry"
WRITTEN = "the ADR's example"
BARE = "bare"
MINTED = "an arm mints for each call"
"""The headline: what a call between two arms costs, with a token of its own."""
REUSED = "one token, everything on"
UVICORN, GRANIAN = "one token, plain uvicorn serves", "one token, granian serves"
PYQWEST, AIOHTTP = "one token, pyqwest calls", "one token, aiohttp calls"
OTHERS = (UVICORN, GRANIAN, PYQWEST, AIOHTTP)
"""Kept servers and clients in place of ours, which stay where they are faster by a quarter."""


@dataclass(frozen=True)
class Variant:
    """``serve`` is given a port; ``calling`` a port and the size of a body."""

    name: str
    serve: Callable[[int], Awaitable[None]]
    calling: Callable[[int, int], Client]
    slow: bool = False
    beside: Callable[[], Awaitable[None]] | None = None
    """Runs in a process of its own on the server's core."""
    targets: tuple[tuple[str, float], ...] = ()
    """By how much more calls a second than others: (the other, the ratio)."""


def variants(keys: octo.Keys, sqlite: str, postgres: str | None, keeper_port: int) -> list[Variant]:
    """Return them all; those whose server is not here are left out. ``keeper_port`` is for an orchestrator."""

    def ours(
        name: str,
        *,
        store: str | None = None,
        apart: bool = False,
        targets: tuple[tuple[str, float], ...] = (),
        server: octo.Serve | None = None,
        **how: object,
    ) -> Variant:
        return Variant(
            name,
            lambda port: octo.serve(port, keys, store, keeper_port=keeper_port if apart else None, server=server),
            lambda port, size: octo.calling(port, keys, size, keyed=store is not None, **how),  # type: ignore[arg-type]
            targets=targets,
            beside=(lambda: octo.keep(keeper_port, keys, store)) if apart and store is not None else None,
        )

    found = [
        ours(MINTED, targets=((FULL_GRPC, 2),), minted=True),
        ours(REUSED, targets=((REFERENCE, 2.5), (FULL_GRPC, 4), (WRITTEN, 20), *((x, 1.25) for x in OTHERS))),
        ours("every call traced", targets=((REFERENCE, 2.2),), sampled=1.0),
        ours("key in SQLite", store=sqlite),
    ]
    if postgres is not None:
        found.append(ours("key in PostgreSQL", store=postgres, targets=((REFERENCE, 0.7),)))
        found.append(ours("key through the orchestrator", store=postgres, apart=True))
    found += [
        ours(UVICORN, server=servers.plain_uvicorn),
        ours(GRANIAN, server=servers.granian),
        ours(PYQWEST, client=servers.pyqwest_client),
        ours(AIOHTTP, client=servers.AiohttpClient),
        Variant(BARE, octo.serve_bare, octo.calling_bare),
        Variant(
            REFERENCE,
            lambda port: peers.serve_grpc(port, everything=False),
            lambda port, size: peers.calling_grpc(port, size, everything=False),
        ),
        Variant(
            FULL_GRPC,
            lambda port: peers.serve_grpc(port, everything=True),
            lambda port, size: peers.calling_grpc(port, size, everything=True),
        ),
        Variant("FastAPI and httpx", peers.serve_fastapi, peers.calling_httpx),
        Variant(WRITTEN, peers.serve_fastapi, peers.calling_as_written, slow=True),
    ]
    return found
