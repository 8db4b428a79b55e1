"""Idempotency keys over two replicas: one effect and equal answers, whoever asks at once and whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx
import msgspec
import pytest
from call_kit import CLOCK, Realm, outgoing
from databases import Backend, run_sql
from postgres_process import PostgresProcess
from wires import CURRENT

from octollm.errors import OctoError, RemoteError
from octollm.resilience import RetryPolicy
from octollm.rpc.call import IncomingCall, Operation, OperationResponse
from octollm.rpc.idempotency import AlreadyCompleted, HeldClaim, IdempotencyKey, InFlight, StoredResponse
from octollm.rpc.idempotency_sql import SqlIdempotencyStore
from octollm.storage import open_database
from octollm.storage.migrations import migrate
from octollm.testing import wait_until


class Order(msgspec.Struct):
    item: str = ""


class Receipt(msgspec.Struct):
    number: int


@pytest.fixture
def database(backend: Backend, tmp_path: Path) -> str:
    """Return the URL of a database that several processes share."""
    return f"sqlite:///{tmp_path}/keys.db" if backend.base is None else backend.url("octollm_orchestrator")


@dataclass
class Shop:
    """What its replicas did."""

    realm: Realm
    urls: list[str] = field(default_factory=list[str])
    done: list[str] = field(default_factory=list[str])
    fail: OctoError | None = None

    async def sell(self, call: IncomingCall, order: Order) -> OperationResponse:
        self.done.append(f"{call.tenant}:{order.item}")
        await asyncio.sleep(0.05)
        if self.fail is not None:
            raise self.fail
        number = len(self.done)
        return OperationResponse(Receipt(number), 201, {"Location": f"/receipts/{number}", "ETag": f'"{number}"'})

    def operation(self, kind: Literal["idempotent", "at_most_once"] = "idempotent") -> Operation:
        return Operation(
            "execute", "POST", "/execute", self.sell, scope="coder:execute", body=Order, response=Receipt, kind=kind
        )

    async def post(
        self, at: int, key: str, item: str = "rope", *, token: str | None = None, client: httpx.AsyncClient
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token or self.realm.token()}", "Idempotency-Key": key}
        return await client.post(f"{self.urls[at]}/execute", json={"item": item}, headers=headers)


@contextlib.asynccontextmanager
async def shop(
    url: str, kind: Literal["idempotent", "at_most_once"] = "idempotent", replicas: int = 2
) -> AsyncGenerator[tuple[Shop, httpx.AsyncClient]]:
    made = Shop(Realm.make())
    async with contextlib.AsyncExitStack() as stack:
        for number in range(replicas):
            db = await stack.enter_async_context(open_database(url, clock=CLOCK))
            if number == 0:
                await migrate(db, "orchestrator")
            store = SqlIdempotencyStore(db, f"replica {number}")
            made.urls.append(
                await stack.enter_async_context(
                    made.realm.replica([made.operation(kind)], store=store, max_concurrent=100)
                )
            )
        client = await stack.enter_async_context(CURRENT.stock(timeout=30))
        yield made, client


@pytest.mark.usefixtures("every_wire")
async def test_one_key_a_hundred_times_at_once_has_one_effect_and_one_answer(database: str) -> None:
    async with shop(database) as (made, client):
        answers = await asyncio.gather(*(made.post(number % 2, "k1", client=client) for number in range(100)))
        assert made.done == ["default:rope"]
        assert {answer.status_code for answer in answers} == {201}
        assert {answer.content for answer in answers} == {b'{"number":1}'}
        assert {answer.headers["location"] for answer in answers} == {"/receipts/1"}
        assert {answer.headers["etag"] for answer in answers} == {'"1"'}
        assert {answer.headers["content-type"] for answer in answers} == {"application/json"}
        assert [answer.headers.get("idempotent-replayed") for answer in answers].count("true") == 99


@pytest.mark.usefixtures("every_wire")
async def test_a_key_with_another_body_is_refused_and_those_of_others_are_not_seen(database: str) -> None:
    async with shop(database) as (made, client):
        assert (await made.post(0, "k1", client=client)).json() == {"number": 1}
        other = await made.post(1, "k1", "tent", client=client)
        assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
        theirs = await made.post(1, "k1", token=made.realm.token(tenant="acme"), client=client)
        somebody = await made.post(0, "k1", token=made.realm.token(sub="user-2"), client=client)
        assert (theirs.json(), somebody.json()) == ({"number": 2}, {"number": 3})
        assert made.done == ["default:rope", "acme:rope", "default:rope"]
        # Whoever may not do it learns nothing of what was done.
        refused = await made.post(0, "k1", token="none", client=client)
        assert refused.status_code == 401


@pytest.mark.usefixtures("every_wire")
async def test_what_says_nothing_of_the_operation_is_not_replayed(database: str) -> None:
    async with shop(database) as (made, client):
        made.fail = OctoError("The kitchen is on fire.", code="internal")
        assert (await made.post(0, "k1", client=client)).status_code == 500
        made.fail = OctoError("No such item.", code="not_found")
        first = await made.post(1, "k1", client=client)
        made.fail = None
        again = await made.post(0, "k1", client=client)
        assert (first.status_code, again.status_code) == (404, 404)
        assert again.headers["content-type"] == "application/problem+json"
        assert again.json()["request_id"] == first.json()["request_id"]
        assert len(made.done) == 2


async def test_what_was_cut_off_and_may_be_done_only_once_is_not_done_again(database: str) -> None:
    async with shop(database, "at_most_once") as (made, client):
        made.fail = OctoError("Broken half-way.", code="internal")
        first = await made.post(0, "k1", client=client)
        made.fail = None
        for answer in (first, await made.post(1, "k1", client=client)):
            assert (answer.status_code, answer.json()["code"]) == (409, "outcome_unknown"), answer.text
            assert answer.json()["retryable"] is False
        made.fail = OctoError("Busy.", code="overloaded")
        assert (await made.post(0, "k2", client=client)).status_code == 503
        made.fail = None
        assert (await made.post(1, "k2", client=client)).status_code == 201
        assert len(made.done) == 3


@pytest.mark.parametrize("kind", ["idempotent", "at_most_once"])
async def test_a_replica_is_killed_while_it_holds_a_key(
    database: str, kind: Literal["idempotent", "at_most_once"]
) -> None:
    async with shop(database, kind, replicas=1) as (made, client):
        keys = json.dumps([key.to_jwk(private=True) for key in (made.realm.root, made.realm.service)])
        script = Path(__file__).parents[1] / "support" / "keyed_service.py"
        process = await asyncio.create_subprocess_exec(
            sys.executable, script, database, kind, keys, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            at = (await process.stdout.readline()).decode().strip()
            made.urls.append(at)
            cut = asyncio.create_task(made.post(1, "k1", client=client))
            assert await process.stdout.readline() == b"began\n"
            process.kill()
            with pytest.raises(httpx.HTTPError):
                await cut
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        again = await made.post(0, "k1", client=client)
        if kind == "idempotent":
            assert (again.status_code, made.done) == (201, ["default:rope"])
        else:
            assert (again.status_code, again.json()["code"], made.done) == (409, "outcome_unknown", [])


@pytest.mark.postgres
async def test_a_killed_database_keeps_every_response_from_before_an_at_most_once_claim() -> None:
    """Else a repeat could get another response, and derive from it another key for an effect that happened."""
    server = PostgresProcess()
    try:
        server.start()
        # The responses reach the disk by the flush of the claim, not by one in the background.
        await run_sql(server.url, "ALTER SYSTEM SET wal_writer_delay = '10s'")
        await run_sql(server.url, "SELECT pg_reload_conf()")
        keys = [IdempotencyKey("default", "user-1", "coder", "execute", f"k{number}") for number in range(20)]
        effect = IdempotencyKey("default", "user-1", "executor", "http", "k")
        async with open_database(server.url, clock=CLOCK) as db:
            await migrate(db, "orchestrator")
            store = SqlIdempotencyStore(db, "holder")
            for key in keys:
                claimed = await store.claim(key, "b", idempotent=True, bearer="")
                assert isinstance(claimed, HeldClaim)
                await store.complete(key, claimed.epoch, StoredResponse(200, b"seen"), idempotent=True)
            assert isinstance(await store.claim(effect, "b", idempotent=False, bearer=""), HeldClaim)
            server.kill()
        server.start()
        async with open_database(server.url, clock=CLOCK) as db:
            store = SqlIdempotencyStore(db, "next")
            found = [await store.claim(key, "b", idempotent=True, bearer="") for key in keys]
            assert found == [AlreadyCompleted(StoredResponse(200, b"seen"))] * len(keys)
            assert await store.claim(effect, "b", idempotent=False, bearer="") == InFlight()
    finally:
        server.close()


@pytest.mark.usefixtures("every_wire")
async def test_a_caller_that_leaves_gives_its_claim_back(database: str) -> None:
    async with shop(database) as (made, client):
        began = asyncio.Event()

        async def hang(_call: IncomingCall, _order: Order) -> Receipt:
            began.set()
            await asyncio.Event().wait()
            raise AssertionError

        operation = Operation(
            "execute", "POST", "/execute", hang, scope="coder:execute", body=Order, response=Receipt, kind="idempotent"
        )
        async with open_database(database, clock=CLOCK) as db:
            store = SqlIdempotencyStore(db, "third")
            async with (
                made.realm.replica([operation], store=store) as url,
                made.realm.caller(url, retry=RetryPolicy(max_attempts=1)) as caller,
            ):
                body = b'{"item":"rope"}'
                call = outgoing(operation, made.realm.token(), key="k1", body=body)
                calling = asyncio.create_task(caller.call(call, Receipt))
                await began.wait()
                calling.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await calling

                async def free() -> bool:
                    answer = await made.post(0, "k1", client=client)
                    return answer.status_code == 201

                await wait_until(free, description="another does it at once, long before the lease ends", timeout=4)


@pytest.mark.usefixtures("every_wire")
@pytest.mark.parametrize("key", ["k" * 201, "a\tb", ""])
async def test_a_key_that_is_none_is_refused(database: str, key: str) -> None:
    async with shop(database, replicas=1) as (made, client):
        answer = await made.post(0, key, client=client)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_header")
        assert made.done == []


async def test_a_caller_sends_a_key_and_repeats_what_was_cut_off(database: str) -> None:
    async with shop(database) as (made, _client):
        made.fail = OctoError("A moment.", code="unavailable")
        async with made.realm.caller(*made.urls, retry=RetryPolicy(max_attempts=1)) as caller:
            call = outgoing(made.operation(), made.realm.token(), key="k1", body=b'{"item":"rope"}')
            with pytest.raises(RemoteError) as caught:
                await caller.call(call, Receipt)
            assert caught.value.call_attempts is not None
            assert caught.value.call_attempts.attempts == 1
            made.fail = None
            assert (await caller.call(call, Receipt)).number == 2
            assert (await caller.call(call, Receipt)).number == 2
