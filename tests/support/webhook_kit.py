"""Receivers of webhooks written with the standard's own library, and a replica that sends, also as a process.

``python webhook_kit.py DATABASE_URL ROOT_JWK ORIGIN`` is a replica in a process of its own, to be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from standardwebhooks import Webhook
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octollm.capability import SigningKey
from octollm.capability.keyring import KeyRing
from octollm.clock import SystemClock, Uuid7Generator
from octollm.contracts.webhooks import WebhookRequest
from octollm.events import EventLog
from octollm.rpc.egress import EgressClient, EgressPolicy
from octollm.rpc.transport import listen, serve_app
from octollm.services.orchestrator.accounts import Accounts
from octollm.services.orchestrator.stored_secrets import SecretStore
from octollm.services.orchestrator.webhook_attempts import WebhookSender
from octollm.services.orchestrator.webhook_dispatch import WebhookDispatcher
from octollm.services.orchestrator.webhook_feed import WebhookFeed
from octollm.services.orchestrator.webhook_signatures import generate_secret
from octollm.storage import Database, open_database
from octollm.storage.tables import api_keys, webhooks
from octollm.telemetry import configure_logging, get_logger

CLOCK = SystemClock()
IDS = Uuid7Generator(CLOCK)
TENANT = "acme"


@dataclass
class Receiver:
    """A receiver that verifies every delivery by the library; ``respond`` decides what it answers."""

    secrets: list[str] = field(default_factory=list[str])
    respond: Callable[[dict[str, Any], int], Response] = lambda _event, _count: Response(status_code=204)
    delay: float = 0.0
    """Seconds before it answers: for a slow receiver."""
    url: str = ""
    received: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The events in the order of their arrival, repeats included."""
    headers: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    refused: list[str] = field(default_factory=list[str])
    attempts: dict[str, int] = field(default_factory=dict[str, int])

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        headers = dict(request.headers)
        good = 0
        for secret in self.secrets:
            with contextlib.suppress(Exception):
                Webhook(secret).verify(body, headers)
                good += 1
        if not good:
            self.refused.append(headers.get("webhook-id", ""))
            return Response(status_code=400)
        message = headers["webhook-id"]
        count = self.attempts[message] = self.attempts.get(message, 0) + 1
        event = {"headers": headers, **json.loads(body)}
        await asyncio.sleep(self.delay)
        response = self.respond(event, count)
        if response.status_code < 300:
            self.headers.append(headers)
            self.received.append(json.loads(body))
        return response

    def versions(self) -> dict[str, list[int]]:
        """Return the versions of each subject in the order of arrival."""
        found: dict[str, list[int]] = {}
        for event in self.received:
            found.setdefault(event["subject"], []).append(event["version"])
        return found


@contextlib.asynccontextmanager
async def receiver(**more: Any) -> AsyncGenerator[Receiver]:
    found = Receiver(**more)

    async def respond(request: Request) -> Response:
        return await found(request)

    bound = listen("127.0.0.1", 0, "receiver")
    found.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    app = Starlette(routes=[Route("/{path:path}", respond, methods=["POST"])])
    async with serve_app(app, bound, shutdown_grace=0.5):
        yield found


@dataclass
class Replica:
    """What sends the deliveries of one database."""

    db: Database
    log: EventLog
    accounts: Accounts
    secrets: SecretStore
    http: EgressClient
    dispatcher: WebhookDispatcher
    feed: WebhookFeed

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        async with self.http, self.dispatcher, self.feed:
            yield


def replica(db: Database, root: SigningKey, *origins: str) -> Replica:
    log = EventLog(db, CLOCK, IDS)
    accounts = Accounts(db, CLOCK, IDS, lambda _tenant: ())
    secrets = SecretStore(KeyRing.of(root), CLOCK)
    http = EgressClient(EgressPolicy.of(origins))
    dispatcher = WebhookDispatcher(
        db, log, accounts, secrets, WebhookSender(http, CLOCK), CLOCK, IDS, get_logger("webhooks")
    )
    feed = WebhookFeed(db, log, CLOCK, get_logger("webhooks"), dispatcher.wake)
    return Replica(db, log, accounts, secrets, http, dispatcher, feed)


async def add_webhook(made: Replica, url: str, **more: Any) -> tuple[str, str]:
    """Store a webhook of a key that may read events; return its id and its secret."""
    request = msgspec.convert({"url": url, "patterns": ["events:*"], **more}, WebhookRequest)
    webhook_id, secret, now = f"wh-{IDS.hex()}", generate_secret("standard"), CLOCK.now()
    async with made.db.transaction() as tx:
        key = {"id": "key-1", "hash": "h", "tenant": TENANT, "sub": "ada", "name": "k", "scopes": "events:read"}
        await tx.execute(tx.insert(api_keys).values(**key, created_at=now).on_conflict_do_nothing())
        await tx.execute(
            tx.insert(webhooks).values(
                id=webhook_id,
                tenant=TENANT,
                url=url,
                config=msgspec.to_builtins(request) | {"format": request.format},
                secrets=made.secrets.seal(webhook_id, secret),
                sub="ada",
                cred="key-1",
                state="active",
                start_seq=0,
                paused_until=0.0,
                lease_until=0.0,
                created_at=now,
                updated_at=now,
            )
        )
    return webhook_id, secret


async def append(made: Replica, subject: str, count: int, *, tenant: str = TENANT) -> list[str]:
    """Write events of a task; return their ids."""
    ids: list[str] = []
    async with made.db.transaction() as tx:
        for number in range(count):
            data: dict[str, object] = {"task_id": subject, "progress": float(number)}
            event = await made.log.append(
                tx, "task.progress", subject=f"task/{subject}", tenant=tenant, source="orchestrator", data=data
            )
            ids.append(event.id)
    return ids


async def main(url: str, root: str, origin: str) -> None:
    async with open_database(url, clock=CLOCK) as db:
        with configure_logging(None, level="error", clock=CLOCK):
            root_key = SigningKey.from_jwk(json.loads(root))
            async with replica(db, root_key, origin).running():
                print("ready", flush=True)
                await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
