"""Attacks on a running installation, from everybody who may try: strangers, users, tenants, pages, and its own arms.

Each attack stands beside its honest twin: what differs between them is the attack alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio
import websockets
from attack_kit import AttackKit, attack_kit
from capability_forge import NOW, jwk_of, sha, sign
from websockets.exceptions import ConnectionClosed, InvalidStatus

from octollm.capability import Principal, ServiceTokenSigner, SigningKey, TaskRef, parse_delegation_tree
from octollm.contracts.public_api import PUBLIC_OPERATIONS
from octollm.contracts.services import SERVICES
from octollm.testing import wait_until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.sandbox]
GOAL = "Write a Python function double(number) with tests"
LOCAL = Principal("local-user", "local", "local")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[AttackKit]:
    async with attack_kit(tmp_path_factory.mktemp("attacked")) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def task(live: AttackKit) -> str:
    """Return a task of the local tenant that completed, with a file."""
    files = [{"name": "notes.txt", "text": "nothing"}]
    made = await live.via_gateway("POST", "/tasks", body={"goal": GOAL, "context": {"files": files}})
    assert made.status == 201, made

    async def ended() -> bool:
        return (await live.via_gateway("GET", f"/tasks/{made.body['task_id']}")).body["status"] == "completed"

    await wait_until(ended, description="the goal completes", timeout=60, interval=0.1)
    return made.body["task_id"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stored_ids(live: AttackKit) -> dict[str, str]:
    """Return, by the name of its path parameter, what the local tenant keeps besides tasks."""

    async def create(path: str, **body: object) -> dict[str, Any]:
        made = await live.via_gateway("POST", path, body=body)
        assert made.status == 201, made
        return made.body

    schedule = await create("/schedules", goal=GOAL, cron="0 7 1 1 *")
    hook = await create("/hooks", name="parrot", scheme="github", template={"goal": "Repeat it."})
    webhook = await create("/webhooks", url="https://example.org/hook", patterns=["events:task:*"])
    return {
        "schedule_id": schedule["id"],
        "hook": hook["hook"]["id"],
        "webhook_id": webhook["webhook"]["id"],
        "letter_id": "1",
    }


def mint(live: AttackKit, aud: str, scope: str, principal: Principal = LOCAL, **more: object) -> str:
    return live.domain.minter.mint_access(principal, aud, scope, **more)  # type: ignore[arg-type]


# Authority that is good elsewhere

OPENED = {
    "orchestrator": ("GET", "/tasks"),
    "memory": ("POST", "/search"),
    "monitor": ("GET", "/services"),
    "models": ("POST", "/v1/chat/completions"),
    "planner": ("POST", "/plan"),
    "executor": ("POST", "/run"),
    "coder": ("POST", "/execute"),
    "judge": ("POST", "/validate"),
    "retriever": ("POST", "/search"),
}
SCOPES = {
    "orchestrator": "tasks:read",
    "memory": "memory:read",
    "monitor": "monitor:read",
    "models": "models:chat",
    "planner": "planner:plan",
    "executor": "executor:run",
    "coder": "coder:execute",
    "judge": "judge:validate",
    "retriever": "retriever:search",
}


@pytest.mark.parametrize("service", OPENED)
async def test_nothing_is_open_without_a_token(live: AttackKit, service: str) -> None:
    method, path = OPENED[service]
    told = await live.send(service, method, path, None, {})
    assert (told.status, told.code) == (401, "token_missing")
    honest = await live.send(service, method, path, mint(live, service, SCOPES[service]), {})
    assert honest.status not in (401, 403)


@pytest.mark.parametrize("thief", OPENED)
@pytest.mark.parametrize("service", OPENED)
async def test_what_a_callee_was_sent_it_cannot_send_on(live: AttackKit, service: str, thief: str) -> None:
    """Every service replays to every other what it was sent, as it came and each part of it."""
    if service == thief:
        return
    bearer = mint(
        live,
        thief,
        SCOPES[thief],
        delegation=parse_delegation_tree({SCOPES[service]: {}}),
        holder_jkt=live.domain.jkt(thief),
    )
    method, path = OPENED[service]
    told = await live.send(service, method, path, bearer, {})
    assert (told.status, told.reason) == (401, "audience_wrong")
    _access, grant = bearer.split("~")
    told = await live.send(service, method, path, grant, {})
    assert (told.status, told.reason) == (401, "type_wrong")


@pytest.mark.parametrize("service", OPENED)
async def test_a_token_for_one_operation_opens_no_other(live: AttackKit, service: str) -> None:
    method, path = OPENED[service]
    other = f"{SCOPES[service].partition(':')[0]}:something-else"
    told = await live.send(service, method, path, mint(live, service, other), {})
    assert (told.status, told.code) == (403, "scope_missing")


@pytest.mark.parametrize("name", ["coder", "judge"])
async def test_an_arm_gets_nothing_that_it_did_not_declare(live: AttackKit, name: str) -> None:
    """An arm's own key signs whatever it likes under the grant that it holds; what that does not hold is refused."""
    domain = live.domain
    bearer = mint(
        live, name, SCOPES[name], delegation=parse_delegation_tree({"executor:run": {}}), holder_jkt=domain.jkt(name)
    )
    grant = bearer.split("~")[1]
    key = domain.keys[name].private

    def forge_bearer(aud: str, scope: str) -> str:
        claims = {
            "iss": name, "sub": LOCAL.sub, "cred": LOCAL.cred, "tenant": LOCAL.tenant, "aud": aud,
            "exp": NOW + 60, "nbf": NOW, "iat": NOW, "jti": "stolen", "scope": scope, "prf": sha(grant),
        }  # fmt: skip
        return f"{sign({'alg': 'EdDSA', 'typ': 'cap+jwt', 'jwk': jwk_of(key)}, claims, key)}~{grant}"

    for aud, scope in (("memory", "memory:read"), ("models", "models:chat"), ("orchestrator", "tasks:read")):
        method, path = OPENED[aud]
        told = await live.send(aud, method, path, forge_bearer(aud, scope), {})
        assert (told.status, told.reason) == (401, "scope_exceeds_parent")
    honest = await live.send("executor", "POST", "/run", forge_bearer("executor", "executor:run"), {})
    assert (honest.status, honest.code) == (400, "invalid_body")


# Services that speak for themselves


@pytest.mark.parametrize(
    ("method", "path", "admitted"),
    [
        ("POST", "/token", "reflex"),
        ("POST", "/budget/reserve", "models"),
        ("POST", "/budget/settle", "models"),
    ],
)
async def test_a_service_does_only_what_is_made_for_it(live: AttackKit, method: str, path: str, admitted: str) -> None:
    for name in SERVICES:
        told = await live.send("orchestrator", method, path, live.service(name).sign_token("orchestrator"), {})
        assert (told.status == 403) == (name != admitted), (name, told)


async def test_nobody_speaks_in_anothers_name(live: AttackKit) -> None:
    imposter = ServiceTokenSigner(live.domain.keys["coder"], "reflex", live.clock, live.ids)
    stranger = ServiceTokenSigner(SigningKey.generate("mallory"), "mallory", live.clock, live.ids)
    told = await live.send("orchestrator", "GET", "/directory", imposter.sign_token("orchestrator"))
    assert (told.status, told.reason.split("+")[0]) == (401, "key_mismatch")
    told = await live.send("orchestrator", "GET", "/directory", stranger.sign_token("orchestrator"))
    assert (told.status, told.reason.split("+")[0]) == (401, "service_unknown")
    told = await live.send("orchestrator", "GET", "/directory", live.service("coder").sign_token("memory"))
    assert (told.status, told.reason) == (401, "audience_wrong")
    capability = mint(live, "orchestrator", "tasks:read")
    assert (await live.send("orchestrator", "GET", "/directory", capability)).reason == "type_wrong"
    own = live.service("coder").sign_token("orchestrator")
    assert (await live.send("orchestrator", "GET", "/tasks", own)).reason == "type_wrong"
    assert (await live.send("orchestrator", "GET", "/directory", own)).status == 200


async def test_an_arm_registers_no_name_but_its_own(live: AttackKit) -> None:
    """The name is that of the key that signed; there is no other in what is sent."""
    registration = {
        "description": "x", "operations": ["validate"], "calls": ["memory:read"], "accepts": [],
        "url": "http://127.0.0.1:9", "instance": "i1",
    }  # fmt: skip
    imposter = ServiceTokenSigner(SigningKey.generate("judge"), "judge", live.clock, live.ids)
    told = await live.send("orchestrator", "POST", "/arms/register", imposter.sign_token("orchestrator"), registration)
    assert (told.status, told.reason.split("+")[0]) == (401, "key_mismatch")
    for name in ("reflex", "models"):
        told = await live.send(
            "orchestrator", "POST", "/arms/register", live.service(name).sign_token("orchestrator"), registration
        )
        assert told.status in (400, 403), (name, told)
    told = await live.send(
        "orchestrator", "POST", "/arms/keys", live.service("judge").sign_token("orchestrator"),
        {"jwk": SigningKey.generate("judge").public.to_jwk(), "proof": "A" * 86},
    )  # fmt: skip
    assert told.status in (400, 403)


async def test_a_stolen_join_exchange_is_worth_nothing(live: AttackKit) -> None:
    """Whoever saw a join has name, nonce, key and proof: a second use, and every change, is refused."""
    from octollm.capability.enrolment import EnrolmentClaim, EnrolmentToken, arm_proof  # noqa: PLC0415

    made = await live.via_gateway("POST", "/joins", body={"name": "translator", "calls": [], "lifetime_seconds": 3600})
    secret, key = EnrolmentToken.parse(made.body["secret"]), SigningKey.generate("translator")
    nonce = (await live.send("orchestrator", "POST", "/arms/nonce", None)).body["nonce"]
    proof = arm_proof(secret.key, EnrolmentClaim(nonce, "translator", key.thumbprint, ()))
    asked = {
        "join": secret.id, "name": "translator", "jwk": key.public.to_jwk(), "calls": [], "nonce": nonce, "proof": proof
    }  # fmt: skip
    thief = SigningKey.generate("thief").public.to_jwk()
    for change in ({"jwk": thief}, {"name": "summarizer"}, {"calls": ["memory:read"]}, {"proof": "A" * 43}):
        told = await live.send("orchestrator", "POST", "/arms/join", None, {**asked, **change})
        assert (told.status, told.code) == (403, "join_refused"), change
    assert (await live.send("orchestrator", "POST", "/arms/join", None, asked)).status == 200
    told = await live.send("orchestrator", "POST", "/arms/join", None, asked)
    assert (told.status, told.code) == (403, "join_refused")
    assert (await live.via_gateway("DELETE", "/arms/translator")).status == 200


async def test_no_arm_reads_or_poisons_what_another_was_answered(live: AttackKit) -> None:
    """Keys of calls belong to the service that asks for them, and to the subject of the bearer that it was shown."""
    bearer = mint(live, "judge", "judge:validate")
    claim = {"bearer": bearer, "operation": "validate", "key": "k-1", "body_digest": "0" * 64, "repeatable": True}
    judge = live.service("judge").sign_token("orchestrator")
    told = await live.send("orchestrator", "POST", "/idempotency/claim", judge, {"claims": [claim]})
    assert told.body["answers"][0]["outcome"] == "claimed", told
    coder = live.service("coder").sign_token("orchestrator")
    told = await live.send("orchestrator", "POST", "/idempotency/claim", coder, {"claims": [claim]})
    assert told.body["answers"][0]["outcome"] == "refused"
    assert told.body["answers"][0]["problem"]["code"] == "token_invalid"


# After the end of authority


async def test_a_revoked_token_is_refused_everywhere_within_a_second(live: AttackKit) -> None:
    bearers = {name: mint(live, name, SCOPES[name]) for name in OPENED if name != "orchestrator"}
    for name, bearer in bearers.items():
        method, path = OPENED[name]
        assert (await live.send(name, method, path, bearer, {})).status not in (401, 403)
        jti = live.domain.verifier(name).verify(bearer).links[0].jti
        assert (await live.via_gateway("POST", "/token/revoke", body={"kind": "jti", "value": jti})).status == 200

    async def refused() -> bool:
        told = [await live.send(name, *OPENED[name], bearers[name], {}) for name in bearers]
        return all((each.status, each.reason) == (401, "revoked") for each in told)

    await wait_until(refused, description="every service refuses its token", timeout=1)


async def test_a_cancelled_tasks_tokens_are_over_and_no_retry_revives_them(live: AttackKit) -> None:
    made = await live.via_gateway("POST", "/tasks", body={"goal": GOAL})
    task_id = made.body["task_id"]
    bearer = mint(live, "executor", "executor:run", task=TaskRef(task_id, "s1", 1, 1))
    assert (await live.run(bearer)).status == 400
    await live.via_gateway("POST", f"/tasks/{task_id}/cancel")

    async def refused() -> bool:
        told = await live.run(mint(live, "executor", "executor:run", task=TaskRef(task_id, "s1", 2, 2)))
        return (told.status, told.reason) == (401, "revoked")

    await wait_until(refused, description="what is minted for it later is refused, too", timeout=1)
    assert (await live.run(bearer)).reason == "revoked"
    other = mint(live, "executor", "executor:run", task=TaskRef("task-" + "a" * 32, "s1", 1, 1))
    assert (await live.run(other)).status == 400


async def test_a_revoked_keys_token_is_over_at_the_gateway_and_behind_it(live: AttackKit) -> None:
    key = await live.key("user")
    assert (await live.via_gateway("GET", "/tasks", key)).status == 200
    direct = await live.via_gateway("POST", "/token", key, {"scope": "judge:validate", "aud": "judge"})
    bearer = direct.body["access_token"]
    assert (await live.send("judge", "POST", "/validate", bearer, {})).status == 400
    key_id = key.split("_")[1]
    assert (await live.via_gateway("DELETE", f"/keys/{key_id}")).status == 200
    told = await live.via_gateway("GET", "/tasks", key)
    assert (told.status, told.code) == (401, "api_key_invalid")

    async def refused() -> bool:
        return (await live.send("judge", "POST", "/validate", bearer, {})).reason == "revoked"

    await wait_until(refused, description="what it was given is refused", timeout=1)


async def test_an_old_workers_calls_are_refused_after_a_take_over(live: AttackKit) -> None:
    """A worker that was cut off and comes back has authority for a run that somebody else goes on with."""
    made = await live.via_gateway("POST", "/tasks", body={"goal": GOAL})
    task_id = made.body["task_id"]

    async def ended() -> bool:
        return (await live.via_gateway("GET", f"/tasks/{task_id}")).body["status"] == "completed"

    await wait_until(ended, description="the goal completes", timeout=60, interval=0.1)
    # In a thread: the loop that a lock's owner needs to go on must not wait for the lock.
    await asyncio.to_thread(_leave_expired_run, live.system.home.data / "orchestrator.db", task_id)

    async def refused() -> bool:
        told = await live.run(mint(live, "executor", "executor:run", task=TaskRef(task_id, "s1", 1, 7)))
        return (told.status, told.reason) == (401, "revoked")

    await wait_until(refused, description="what run 7 was lent is refused", timeout=10)
    newer = await live.run(mint(live, "executor", "executor:run", task=TaskRef(task_id, "s1", 1, 8)))
    assert (newer.status, newer.reason) == (400, "")
    claim = {
        "bearer": mint(live, "judge", "judge:validate", task=TaskRef(task_id, "s1", 1, 7)),
        "operation": "validate", "key": "old", "body_digest": "0" * 64, "repeatable": True,
    }  # fmt: skip
    judge = live.service("judge").sign_token("orchestrator")
    told = await live.send("orchestrator", "POST", "/idempotency/claim", judge, {"claims": [claim]})
    assert told.body["answers"][0]["problem"]["code"] in ("token_revoked", "fence_lost")


def _leave_expired_run(path: Path, task_id: str) -> None:
    """Leave what a worker that died leaves: a task that runs, and a lease that ran out."""
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as database:
        database.execute(
            "UPDATE tasks SET status = 'running', run = 7, lease_until = ?, finished_at = NULL WHERE task_id = ?",
            (NOW - 10, task_id),
        )
        database.commit()


async def test_the_start_is_in_the_audit_log_without_secrets(live: AttackKit) -> None:
    async def sealed() -> bool:
        return bool((await live.via_gateway("GET", "/audit?of=system")).body["rows"])

    await wait_until(sealed, description="the first rows are sealed")
    rows = (await live.via_gateway("GET", "/audit?of=system")).body["rows"]
    [start] = [row for row in rows if row["action"] == "system.started"]
    assert start["detail"]["settings"]["OCTOLLM_MODEL"] == "openai:scripted"
    assert start["detail"]["roots"] == [live.domain.root.thumbprint]
    assert start["detail"]["keys"]["coder"] == [live.domain.jkt("coder")]


async def test_an_expired_token_is_refused_to_the_millisecond_that_is_forgiven(live: AttackKit) -> None:
    bearer = mint(live, "executor", "executor:run", lifetime=60.0)
    try:
        live.clock.time = NOW + 89.999
        assert (await live.run(bearer)).status == 400
        live.clock.time = NOW + 90
        assert (await live.run(bearer)).reason == "expired"
    finally:
        live.clock.time = NOW


# Tenants


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stranger(live: AttackKit) -> str:
    """Return an access token for the orchestrator of an administrator in another tenant."""
    from octollm.capability import preset_scopes  # noqa: PLC0415

    scopes = preset_scopes("admin").owned_by("orchestrator")
    return live.domain.minter.mint_access(Principal("eve", "key-eve", "globex"), "orchestrator", scopes, 3600)


@pytest.mark.parametrize(
    "public",
    [each for each in PUBLIC_OPERATIONS if "{" in each.path and each.service == "orchestrator"],
    ids=lambda each: f"{each.method} {each.path}",
)
async def test_another_tenants_things_are_not_there(
    live: AttackKit, task: str, stored_ids: dict[str, str], stranger: str, public
) -> None:
    view = (await live.via_gateway("GET", f"/tasks/{task}")).body
    file = view["files"][0]["digest"]
    key = (await live.via_gateway("GET", "/keys")).body["keys"][0]["id"]
    join = (await live.via_gateway("POST", "/joins", body={"name": "parrot", "calls": [], "lifetime_seconds": 60})).body
    values = {
        "task_id": task,
        "digest": file,
        "key_id": key,
        "join_id": join["join"]["id"],
        "name": "parrot",
        **stored_ids,
    }
    path = public.format_service_path(**{name: values[name] for name in public.path_parameters})
    told = await live.send("orchestrator", public.method, path, stranger, {} if public.method == "POST" else None)
    assert told.status in (400, 404), told
    assert task not in str(told.body or ""), "and nothing of them is told"


@pytest.mark.parametrize("path", ["/tasks", "/events", "/keys", "/joins", "/audit"])
async def test_another_tenants_lists_are_empty(live: AttackKit, task: str, stranger: str, path: str) -> None:
    assert task in str(
        (await live.send("orchestrator", "GET", "/tasks", mint(live, "orchestrator", "tasks:read"))).body
    )
    told = await live.send("orchestrator", "GET", path, stranger)
    assert told.status == 200
    assert task not in str(told.body)
    assert "local" not in str(told.body)


async def test_another_tenant_searches_its_own_memory_alone(live: AttackKit) -> None:
    writer = mint(live, "memory", "memory:write memory:read")
    stored = await live.send(
        "memory", "POST", "/documents", writer, {"name": "a.txt", "text": "the secret is swordfish", "digest": "0" * 64}
    )
    assert stored.status in (200, 201), stored
    ask = {"query": "secret swordfish"}
    mine = await live.send("memory", "POST", "/search", writer, ask)
    assert "swordfish" in str(mine.body)
    theirs = await live.send(
        "memory", "POST", "/search", mint(live, "memory", "memory:read", Principal("eve", "k", "globex")), ask
    )
    assert theirs.status == 200
    assert "swordfish" not in str(theirs.body)


async def test_the_systems_audit_log_is_the_installations_owners(live: AttackKit, stranger: str) -> None:
    told = await live.send("orchestrator", "GET", "/audit?of=system", stranger)
    assert (told.status, told.code) == (403, "scope_missing")
    assert (await live.via_gateway("GET", "/audit?of=system")).status == 200


# The public gateway


async def test_a_narrow_key_does_not_make_a_wide_one(live: AttackKit) -> None:
    narrow = await live.key("keys:write tasks:read")
    told = await live.via_gateway("POST", "/keys", narrow, {"name": "wide", "scope": "admin"})
    assert (told.status, told.code) == (403, "scope_missing")
    assert (await live.via_gateway("POST", "/keys", narrow, {"name": "same", "scope": "tasks:read"})).status == 201
    told = await live.via_gateway(
        "POST", "/token", await live.key("tasks:create"), {"scope": "judge:validate", "aud": "judge"}
    )
    assert (told.status, told.code) == (403, "scope_missing")


@pytest.mark.parametrize(
    "scope", ["tasks", "tasks:*:x", "TASKS:*", "tasks:ｒead", "tasks:read tasks", "*:*", "tasks:%2a", ""]
)
async def test_a_malformed_scope_is_refused_and_never_mended(live: AttackKit, scope: str) -> None:
    told = await live.via_gateway("POST", "/keys", body={"name": "x", "scope": scope})
    assert (told.status, told.code) == (400, "invalid_parameter")


async def test_only_who_runs_the_installation_makes_keys_for_other_tenants(live: AttackKit) -> None:
    made = await live.via_gateway("POST", "/keys", body={"name": "first", "scope": "admin", "tenant": "acme"})
    assert (made.status, made.body["key"]["tenant"]) == (201, "acme")
    acme = made.body["secret"]
    assert (await live.via_gateway("GET", "/tasks", acme)).body["tasks"] == []
    for tenant in ("local", "globex", "system"):
        told = await live.via_gateway("POST", "/keys", acme, {"name": "x", "scope": "user", "tenant": tenant})
        assert (told.status, told.code) == (403, "scope_missing")
    told = await live.via_gateway("POST", "/keys", body={"name": "x", "scope": "user", "tenant": "system"})
    assert (told.status, told.code) == (403, "scope_missing")
    for tenant in ("", "UPPER", "a b", "../local", "x" * 64):
        assert (await live.via_gateway("POST", "/keys", body={"name": "x", "tenant": tenant})).status == 400
    narrow = await live.key("keys:write")
    told = await live.via_gateway("POST", "/keys", narrow, {"name": "x", "scope": "user", "tenant": "acme"})
    assert (told.status, told.code) == (403, "scope_missing")
    assert (await live.via_gateway("POST", "/keys", acme, {"name": "second", "scope": "user"})).status == 201


async def test_a_session_is_its_keys_and_ends_everywhere_within_a_second(live: AttackKit) -> None:
    key = await live.key("user")
    origin = {"Origin": live.system.gateway_url}
    async with httpx.AsyncClient(base_url=live.system.gateway_url, trust_env=False) as page:
        opened = await page.post("/session", json={"api_key": key}, headers=origin)
        assert (opened.status_code, opened.json()["tenant"]) == (200, "local")
        session = page.cookies["octollm_session"]
        assert (await page.get("/session")).json()["session"] is True
        minted = await page.post("/token", json={"scope": "judge:validate", "aud": "judge"}, headers=origin)
        assert minted.status_code == 200
        told = await page.post("/keys", json={"name": "x", "scope": "user"}, headers=origin)
        assert (told.status_code, told.json()["code"]) == (403, "scope_missing"), "it is no more than its key"
        assert (await page.delete("/session", headers=origin)).status_code == 200

        async def is_over() -> bool:
            told = await live.via_gateway("GET", "/tasks", session)
            return (told.status, told.code) == (401, "api_key_invalid")

        await wait_until(is_over, description="the session opens nothing", timeout=1)
        again = await page.post("/session", json={"api_key": key}, headers=origin)
        assert again.status_code == 200
        assert (await live.via_gateway("DELETE", f"/keys/{key.split('_')[1]}")).status == 200

        async def revoked() -> bool:
            return (await page.get("/tasks")).status_code == 401

        await wait_until(revoked, description="a session ends with its key", timeout=1)
    for wrong in (session, session[:-1], "octosess_x_y", "octosess__"):
        assert (await live.via_gateway("GET", "/tasks", wrong)).status == 401
    assert (await live.via_gateway("POST", "/session", body={"api_key": "octo_no_such"})).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1:1"},
        {"Host": "localhost.evil.example"},
    ],
    ids=lambda headers: " ".join(f"{name}: {value}" for name, value in headers.items()),
)
async def test_a_page_or_proxy_is_not_the_local_user(live: AttackKit, headers: dict[str, str]) -> None:
    told = await live.client.post(f"{live.system.gateway_url}/tasks", json={"goal": ""}, headers=headers)
    assert told.status_code in (400, 401, 403)
    assert told.json()["code"] in ("origin_refused", "token_missing", "host_refused")
    honest = await live.client.post(f"{live.system.gateway_url}/tasks", json={"goal": ""})
    assert honest.json()["code"] == "goal_invalid"


async def test_a_token_in_the_address_is_no_token_and_is_not_logged(live: AttackKit) -> None:
    key = await live.key("user")
    bearer = mint(live, "judge", "judge:validate")
    for name in ("access_token", "token", "api_key", "authorization"):
        told = await live.send("judge", "POST", f"/validate?{name}={bearer}", None, {})
        assert (told.status, told.code) == (401, "token_missing")
        told = await live.via_gateway("GET", f"/tasks?{name}={key}", X_Forwarded_For="x")
        assert (told.status, told.code) == (401, "token_missing")
    log = live.system.home.log_file.read_text()
    assert bearer not in log
    assert key not in log


async def test_no_log_event_trace_or_error_holds_a_secret(live: AttackKit, task: str) -> None:
    key = await live.key("user")
    wrong = key[:-3] + "xyz"
    told = await live.via_gateway("GET", "/tasks", wrong)
    assert told.status == 401
    text = live.system.home.log_file.read_text() + str(told.body)
    text += str((await live.via_gateway("GET", "/events?limit=500")).body)
    text += str((await live.via_gateway("GET", f"/tasks/{task}/trace")).body)
    assert "eyJhbGciOiJFZERTQSI" not in text, "a token"
    text += str((await live.via_gateway("GET", "/audit?limit=500")).body)
    text += str((await live.via_gateway("GET", "/audit?of=system&limit=500")).body)
    for secret in (key, wrong, key.split("_", 2)[2], live.system.local_key):
        assert secret not in text, text[max(0, text.find(secret) - 200) :][:400]


@pytest.mark.parametrize(
    "path",
    [
        "//tasks",
        "/tasks/../keys",
        "/tasks/%2e%2e/keys",
        "/tasks%2f..%2fkeys",
        "/./tasks",
        "/tasks\\keys",
        "/tasks/%00",
        "/keys%20",
    ],
)
async def test_a_path_has_one_meaning(live: AttackKit, path: str) -> None:
    host, port = urlsplit(live.system.gateway_url).hostname, urlsplit(live.system.gateway_url).port
    assert host and port
    answer = await raw(host, port, f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ", 2)[1] in (b"400", b"404"), answer[:200]


@pytest.mark.parametrize("path", ["//run", "/run/", "/RUN", "/./run", "/x/../run", "/%72un/..", "/run;x"])
async def test_an_arms_path_is_exact(live: AttackKit, path: str) -> None:
    host, port = urlsplit(live.system.urls["executor"]).hostname, urlsplit(live.system.urls["executor"]).port
    assert host and port
    bearer = mint(live, "executor", "executor:run")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {bearer}\r\nContent-Length: 2\r\n"
    answer = await raw(host, port, head + "Connection: close\r\n\r\n{}")
    assert answer.split(b" ", 2)[1] in (b"400", b"404"), answer[:200]


@pytest.mark.parametrize("name", ["X-HTTP-Method-Override", "X-Method-Override", "X-HTTP-Method"])
async def test_no_header_changes_the_method(live: AttackKit, name: str) -> None:
    key = (await live.key("user")).split("_")[1]
    told = await live.client.get(f"{live.system.gateway_url}/keys", headers={name: "DELETE"})
    assert told.status_code == 200
    assert [each for each in told.json()["keys"] if each["id"] == key and not each["revoked_at"]]
    told = await live.client.post(f"{live.system.gateway_url}/keys?_method=DELETE", headers={name: "DELETE"}, json={})
    assert told.status_code == 400


SMUGGLED = [
    "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /keys HTTP/1.1\r\nHost: x\r\n\r\n",
    "Content-Length: 4\r\nContent-Length: 5\r\n\r\n{}{}",
    "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "Content-Length: +2\r\n\r\n{}",
    "Content-Length: 2\r\n X: y\r\n\r\n{}",
    "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
]


@pytest.mark.parametrize("service", ["reflex", "executor"])
@pytest.mark.parametrize("rest", SMUGGLED)
async def test_a_request_has_one_end(live: AttackKit, service: str, rest: str) -> None:
    where = urlsplit(live.system.urls[service])
    assert where.hostname and where.port
    head = f"POST /tasks HTTP/1.1\r\nHost: {where.hostname}:{where.port}\r\n"
    answer = await raw(where.hostname, where.port, head + rest)
    answers = answer.count(b"HTTP/1.1 ")
    assert answers <= 1, "what was hidden in it is not served"
    assert not answers or answer.split(b" ", 2)[1] in (b"400", b"401", b"404", b"413", b"501"), answer[:200]


async def raw(host: str, port: int, text: str) -> bytes:
    """Send bytes as they are, and return what comes back until the other side closes or says no more."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(text.encode())
        await writer.drain()
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(1.5):
                while piece := await reader.read(65536):
                    answer += piece
        return answer
    finally:
        writer.close()


# Live channels


async def close_code(url: str, **headers: str) -> int:
    """Return the code with which a socket is closed, or the status with which it is not opened."""
    try:
        async with websockets.connect(url, additional_headers=headers, proxy=None) as socket:
            while True:
                await asyncio.wait_for(socket.recv(), 10)
    except InvalidStatus as refused:
        return refused.response.status_code
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd is not None else 1006


async def test_a_socket_is_as_closed_as_the_rest(live: AttackKit, task: str) -> None:
    url = live.system.gateway_url.replace("http", "ws") + f"/ws/tasks/{task}"
    narrow, wide = await live.key("files:read"), await live.key("user")
    assert await close_code(url, Authorization=f"Bearer {wide}") == 1000
    assert await close_code(url, Authorization=f"Bearer {narrow}") == 4403
    assert await close_code(url, Authorization="Bearer octo_no_such") == 4401
    assert await close_code(url, X_Forwarded_For="x", **{"X-Forwarded-For": "x"}) == 4401
    assert await close_code(url, Origin="https://evil.example") == 403
    assert await close_code(url + f"?token={wide}", **{"X-Forwarded-For": "x"}) == 4401
    other = live.system.gateway_url.replace("http", "ws") + "/ws/tasks/task-" + "f" * 32
    assert await close_code(other, Authorization=f"Bearer {wide}") == 4404


async def test_server_sent_events_are_as_closed_as_the_rest(live: AttackKit, task: str) -> None:
    narrow, wide = await live.key("files:read"), await live.key("user")
    path = f"/tasks/{task}/events"
    for key, status in ((narrow, 403), ("octo_no_such", 401)):
        assert (await live.via_gateway("GET", path, key)).status == status
        assert (await live.via_gateway("GET", "/events", key, Accept="text/event-stream")).status == status
    told = await live.client.get(live.system.gateway_url + path, headers={"Authorization": f"Bearer {wide}"})
    assert told.status_code == 200


async def test_who_watches_is_cut_off_when_the_key_is_revoked(live: AttackKit) -> None:
    """A stream that was opened with a key ends with it, also of a task in which nothing happens, and no other does."""
    submitted = await live.via_gateway("POST", "/tasks", body={"goal": GOAL, "approval": {"plan": True}})
    task_id = submitted.body["task_id"]

    async def waits() -> bool:
        return (await live.via_gateway("GET", f"/tasks/{task_id}")).body["status"] == "waiting"

    await wait_until(waits, description="the task waits for an approval", timeout=30)
    revoked, kept = await live.key("user"), await live.key("user")
    url = live.system.gateway_url + f"/tasks/{task_id}/events"
    socket_url = live.system.gateway_url.replace("http", "ws") + f"/ws/tasks/{task_id}"
    async with (
        websockets.connect(socket_url, additional_headers={"Authorization": f"Bearer {revoked}"}, proxy=None) as first,
        websockets.connect(socket_url, additional_headers={"Authorization": f"Bearer {kept}"}, proxy=None) as second,
        live.client.stream("GET", url, headers={"Authorization": f"Bearer {revoked}"}) as third,
    ):
        lines = third.aiter_lines()
        await asyncio.wait_for(first.recv(), 10)
        await asyncio.wait_for(second.recv(), 10)
        assert await asyncio.wait_for(anext(lines), 10)
        assert (await live.via_gateway("DELETE", f"/keys/{revoked.split('_')[1]}")).status == 200
        with pytest.raises(ConnectionClosed) as closed:
            await asyncio.wait_for(first.recv(), 10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4401
        async with asyncio.timeout(10):
            [line async for line in lines]
        await live.via_gateway("POST", f"/tasks/{task_id}/cancel")
        frame = json.loads(await asyncio.wait_for(second.recv(), 10))
        assert frame["data"]["event_type"] == "task.cancelled"


# What a secret is compared with


async def test_secrets_are_compared_in_constant_time(live: AttackKit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing cannot be measured reliably here; that the comparison is the one made for it can be seen."""
    import hmac  # noqa: PLC0415

    compared: list[tuple[object, object]] = []
    honest = hmac.compare_digest

    def recording_compare(one: object, other: object) -> bool:
        compared.append((one, other))
        return honest(one, other)  # type: ignore[arg-type]

    monkeypatch.setattr(hmac, "compare_digest", recording_compare)
    assert (await live.via_gateway("GET", "/tasks", "octo_local_wrong")).status == 401
    assert len(compared) == 1
    assert (await live.via_gateway("GET", "/tasks", "octo_nobody_wrong")).status == 401
    assert len(compared) == 2, "a key that is not there is looked into all the same"


async def test_guessing_is_slowed_by_address(tmp_path) -> None:
    async with attack_kit(tmp_path, OCTOLLM_RATE_LIMIT="5/minute") as slow:
        guesses = (slow.via_gateway("GET", "/tasks", f"octo_guess{number}_x") for number in range(20))
        told = await asyncio.gather(*guesses)
        refused = [each for each in told if each.status == 429]
        assert {each.status for each in told} == {401, 429}
        # Another minute may begin meanwhile.
        assert len(told) - len(refused) in range(5, 11)
        assert all(int(each.headers["retry-after"]) >= 1 for each in refused)
