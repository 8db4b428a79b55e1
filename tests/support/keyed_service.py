"""A replica of ``coder`` in a process of its own: begins a call, says so, and never ends it.

``python keyed_service.py DATABASE_URL KIND KEYS``, where KEYS is a JSON array of the root's and the service's key.
"""

from __future__ import annotations

import asyncio
import json
import sys

import msgspec
from call_kit import CLOCK, Realm

from octollm.capability import SigningKey
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.storage import open_database
from octollm.telemetry import configure_logging


class NoContent(msgspec.Struct):
    pass


async def forever(_call: IncomingCall, _body: NoContent) -> NoContent:
    print("began", flush=True)
    await asyncio.Event().wait()
    raise AssertionError


async def main(url: str, kind: str, keys: str) -> None:
    root, service = (SigningKey.from_jwk(key) for key in json.loads(keys))
    work = Operation(
        "execute",
        "POST",
        "/execute",
        forever,
        scope="coder:execute",
        body=NoContent,
        response=NoContent,
        kind=kind,  # type: ignore[arg-type]
    )
    # Standard output is what the test reads.
    with configure_logging(None, level="error", clock=CLOCK):
        await serve(url, root, service, work)


async def serve(url: str, root: SigningKey, service: SigningKey, work: Operation) -> None:
    async with open_database(url, clock=CLOCK) as db:
        store = SqlIdempotencyStore(db, "the one that is killed")
        async with Realm(root, service).replica([work], store=store) as at:
            print(at, flush=True)
            await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
