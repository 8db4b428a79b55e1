"""Hooks of a real orchestrator: a delivery starts one task, with the authority of the hook, or nothing at all."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from orchestrator_kit import LOCAL_KEY, OrchestratorHarness, problem
from sqlalchemy import select
from standardwebhooks import Webhook

from octollm.capability import SigningKey
from octollm.capability.keyring import OVERLAP_SECONDS, DatedKey, KeyRing
from octollm.contracts.hooks import HookReceipt, HookView, NewHook
from octollm.rpc.http_client import HttpResponse
from octollm.services.orchestrator.stored_secrets import SecretStore, reseal_rows
from octollm.storage import open_database
from octollm.storage.tables import hooks, tasks
from octollm.testing import ManualClock, wait_until

TEMPLATE = {"goal": "Look into {title}", "values": {"title": "/title"}, "when": {"/action": ["opened"]}}
PAYLOAD = {"action": "opened", "title": "It crashes"}


async def create(orch: OrchestratorHarness, **more: Any) -> NewHook:
    body = {"name": "issues", "scheme": "standard", "template": TEMPLATE, **more}
    answer = await orch.send("POST", "/hooks", body)
    assert answer.status == 201, answer.body
    return msgspec.json.decode(answer.body, type=NewHook)


def signed(secret: str, body: bytes, message: str = "msg_1", at: float | None = None) -> dict[str, str]:
    moment = datetime.fromtimestamp(int(time.time() if at is None else at), UTC)
    return {
        "webhook-id": message,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": Webhook(secret).sign(message, moment, body.decode()),
    }


async def deliver(
    orch: OrchestratorHarness, hook: str, headers: dict[str, str], body: bytes, **more: Any
) -> HttpResponse:
    """Deliver as the gateway does."""
    signer = orch.harness.base("reflex").identity.signer()
    message = {"headers": headers, "body": base64.b64encode(body).decode(), **more}
    token = signer.sign_token("orchestrator")
    return await orch.harness.send("orchestrator", "POST", f"/hooks/{hook}/deliveries", token=token, body=message)


async def audited(orch: OrchestratorHarness, action: str, count: int) -> list[dict[str, Any]]:
    """Return the rows of an action once there are ``count`` of them: rows are shown when they are sealed."""
    rows: list[dict[str, Any]] = []

    async def enough() -> bool:
        page = msgspec.json.decode((await orch.send("GET", "/audit?limit=500")).body)
        rows[:] = [row for row in page["rows"] if row["action"] == action]
        return len(rows) >= count

    await wait_until(enough, description=f"{count} audit rows of {action}", timeout=10)
    return rows


def receipt(answer: HttpResponse) -> HookReceipt:
    assert answer.status == 200, answer.body
    return msgspec.json.decode(answer.body, type=HookReceipt)


def body_of(**more: Any) -> bytes:
    return json.dumps({**PAYLOAD, **more}).encode()


async def test_a_delivery_starts_one_task_however_often_it_comes(orch: OrchestratorHarness):
    orch.bearer = await orch.login()
    new = await create(orch)
    body = body_of()
    headers = signed(new.secret, body)
    answers = await asyncio.gather(*(deliver(orch, new.hook.id, headers, body) for _ in range(5)))
    receipts = [receipt(answer) for answer in answers]
    assert sorted(each.status for each in receipts) == ["accepted", *["duplicate"] * 4]
    [task_id] = {each.task_id for each in receipts}
    view = await orch.finished(task_id)
    assert view.status == "completed"
    assert "⟦It crashes⟧" in view.goal
    # The sender signs a retry anew, under the same id.
    again = await deliver(orch, new.hook.id, signed(new.secret, body, at=time.time() - 5), body)
    assert receipt(again) == HookReceipt("duplicate", task_id)
    other = receipt(await deliver(orch, new.hook.id, signed(new.secret, body, "msg_2"), body))
    assert other.status == "accepted" and other.task_id != task_id
    created = await audited(orch, "task.created", 2)
    assert [row["detail"]["hook"] for row in created if row["target"] == task_id] == [new.hook.id]
    seen = msgspec.json.decode((await orch.send("GET", f"/hooks/{new.hook.id}")).body, type=HookView)
    assert seen.last_received_at is not None


async def test_a_payload_that_the_template_is_not_for_is_ignored(orch: OrchestratorHarness):
    orch.bearer = await orch.login()
    new = await create(orch)
    body = body_of(action="closed")
    assert receipt(await deliver(orch, new.hook.id, signed(new.secret, body), body)) == HookReceipt("ignored")
    body = b'{"action": "opened"}'
    answer = await deliver(orch, new.hook.id, signed(new.secret, body), body)
    assert (answer.status, problem(answer)["code"], problem(answer)["errors"][0]["pointer"]) == (
        400,
        "invalid_body",
        "/title",
    )
    body = b"action=opened"
    answer = await deliver(orch, new.hook.id, signed(new.secret, body), body)
    assert (answer.status, problem(answer)["code"]) == (400, "invalid_json")


async def test_every_refusal_looks_the_same(orch: OrchestratorHarness):
    orch.bearer = await orch.login()
    new = await create(orch)
    body = body_of()
    other = await create(orch, name="other")
    refused = [
        await deliver(orch, "nothing-0000", signed(new.secret, body), body),
        await deliver(orch, new.hook.id, signed(other.secret, body), body),
        await deliver(orch, new.hook.id, signed(new.secret, body), body + b" "),
        await deliver(orch, new.hook.id, signed(new.secret, body, at=time.time() - 301), body),
        await deliver(orch, new.hook.id, {}, body),
        await deliver(orch, new.hook.id, {"x-hub-signature-256": "sha256=" + "0" * 64}, body),
    ]
    assert {answer.status for answer in refused} == {401}
    assert {(problem(answer)["code"], problem(answer)["detail"]) for answer in refused} == {
        ("signature_invalid", "The signature of the delivery is not valid for this hook.")
    }


async def test_only_the_gateway_delivers(orch: OrchestratorHarness):
    orch.bearer = await orch.login()
    new = await create(orch)
    message = {"headers": {}, "body": ""}
    answer = await orch.send("POST", f"/hooks/{new.hook.id}/deliveries", message)
    assert answer.status == 401
    token = orch.harness.base("coder").identity.signer().sign_token("orchestrator")
    answer = await orch.harness.send(
        "orchestrator", "POST", f"/hooks/{new.hook.id}/deliveries", token=token, body=message
    )
    assert (answer.status, problem(answer)["code"]) == (403, "scope_missing")


async def test_a_secret_is_rotated_with_an_overlap_and_shown_once(orch: OrchestratorHarness):
    orch.bearer = await orch.login()
    new = await create(orch)
    answer = await orch.send("POST", f"/hooks/{new.hook.id}/secret", {"overlap_seconds": 3600})
    rotated = msgspec.json.decode(answer.body, type=NewHook)
    assert rotated.secret != new.secret and rotated.hook.secrets == 2
    body = body_of()
    for number, secret in enumerate((new.secret, rotated.secret)):
        assert receipt(await deliver(orch, new.hook.id, signed(secret, body, f"m{number}"), body)).status == "accepted"
    answer = await orch.send("POST", f"/hooks/{new.hook.id}/secret", {"overlap_seconds": 0})
    last = msgspec.json.decode(answer.body, type=NewHook)
    assert last.hook.secrets == 1
    for number, secret in enumerate((new.secret, rotated.secret)):
        assert (await deliver(orch, new.hook.id, signed(secret, body, f"n{number}"), body)).status == 401
    assert receipt(await deliver(orch, new.hook.id, signed(last.secret, body, "n3"), body)).status == "accepted"
    for path in ("/hooks", f"/hooks/{new.hook.id}", "/audit?limit=500"):
        answer = await orch.send("GET", path)
        for secret in (new.secret, rotated.secret, last.secret):
            assert secret.encode() not in answer.body and secret[6:].encode() not in answer.body


async def test_github_and_stripe_deliver_as_they_do(orch: OrchestratorHarness):
    orch.bearer = await orch.login()
    new = await create(orch, name="gh", scheme="github", secret="a-secret-for-github")
    body = body_of()
    signature = "sha256=" + hmac.new(b"a-secret-for-github", body, hashlib.sha256).hexdigest()
    headers = {"x-hub-signature-256": signature, "x-github-delivery": "1", "x-github-event": "issues"}
    first = receipt(await deliver(orch, new.hook.id, headers, body))
    assert first.status == "accepted"
    # GitHub does not sign its id: a replay under another one is the same delivery.
    assert receipt(await deliver(orch, new.hook.id, {**headers, "x-github-delivery": "2"}, body)) == HookReceipt(
        "duplicate", first.task_id
    )
    answer = await orch.send("POST", "/hooks", {"name": "pay", "scheme": "stripe", "template": TEMPLATE})
    assert (answer.status, problem(answer)["errors"][0]["pointer"]) == (400, "/secret")
    new = await create(orch, name="pay", scheme="stripe", secret="whsec_made_by_stripe")
    body = body_of(id="evt_1")
    for expected in ("accepted", "duplicate"):
        at = str(int(time.time()))
        mac = hmac.new(b"whsec_made_by_stripe", f"{at}.".encode() + body, hashlib.sha256).hexdigest()
        answer = await deliver(orch, new.hook.id, {"stripe-signature": f"t={at},v1={mac},v0=00"}, body)
        assert receipt(answer).status == expected


async def test_a_hook_has_no_more_authority_than_its_creator_and_ends_with_it(orch: OrchestratorHarness):
    orch.bearer = await orch.login()
    made = msgspec.json.decode(
        (await orch.send("POST", "/keys", {"name": "ci", "scope": "user webhooks:write webhooks:read"})).body
    )
    orch.bearer = await orch.login(made["secret"])
    answer = await orch.send(
        "POST", "/hooks", {"name": "a", "scheme": "github", "template": TEMPLATE, "scope": "keys:*"}
    )
    assert (answer.status, problem(answer)["code"]) == (403, "scope_missing")
    answer = await orch.send(
        "POST", "/hooks", {"name": "a", "scheme": "github", "template": TEMPLATE, "scope": "memory:read"}
    )
    assert (answer.status, problem(answer)["code"]) == (403, "authority_missing")
    scopes = ["coder:*", "judge:*", "models:chat", "planner:*", "tasks:create"]
    new = await create(orch, name="a", scope=" ".join(scopes))
    body = body_of()
    task_id = receipt(await deliver(orch, new.hook.id, signed(new.secret, body), body)).task_id
    url = f"sqlite:///{orch.home}/data/orchestrator.db"
    async with open_database(url, clock=orch.harness.clock) as db, db.read() as conn:
        row = await conn.first(select(tasks).where(tasks.c.task_id == task_id))
    assert row is not None
    assert row["cred"] == made["key"]["id"]
    assert sorted(row["authority"].split()) == scopes
    orch.bearer = await orch.login()
    assert (await orch.send("DELETE", f"/keys/{made['key']['id']}")).status == 200
    answer = await deliver(orch, new.hook.id, signed(new.secret, body, "late"), body)
    assert (answer.status, problem(answer)["code"]) == (401, "signature_invalid")


async def test_tenants_never_see_each_other(orch: OrchestratorHarness):
    orch.bearer = await orch.login()
    new = await create(orch)
    made = await orch.send("POST", "/keys", {"name": "first", "scope": "admin", "tenant": "acme"})
    orch.bearer = await orch.login(msgspec.json.decode(made.body)["secret"])
    assert msgspec.json.decode((await orch.send("GET", "/hooks")).body) == {"hooks": []}
    for method, path, body in (
        ("GET", f"/hooks/{new.hook.id}", None),
        ("DELETE", f"/hooks/{new.hook.id}", None),
        ("POST", f"/hooks/{new.hook.id}/secret", {}),
    ):
        assert (await orch.send(method, path, body)).status == 404
    # The same name in another tenant is another hook.
    assert (await create(orch)).hook.id != new.hook.id
    orch.bearer = await orch.login(LOCAL_KEY)
    assert (await orch.send("DELETE", f"/hooks/{new.hook.id}")).status == 200
    assert (await orch.send("DELETE", f"/hooks/{new.hook.id}")).status == 404


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"name": "Upper"}, "/name"),
        ({"name": ""}, "/name"),
        ({"scheme": "md5"}, "/scheme"),
        ({"secret": "short"}, "/secret"),
        ({"secret": "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}, "/secret"),
        ({"tolerance_seconds": 1}, "/tolerance_seconds"),
        ({"template": {"goal": "{x}"}}, "/template/goal"),
        ({"template": {"goal": "{x}", "values": {"x": "no-pointer"}}}, "/template/values/x"),
        ({"template": {"goal": "", "values": {}}}, "/template/goal"),
        ({"unknown": 1}, "/unknown"),
    ],
)
async def test_a_hook_that_cannot_work_is_refused_with_the_place(
    orch: OrchestratorHarness, change: dict[str, Any], pointer: str
):
    orch.bearer = await orch.login()
    answer = await orch.send("POST", "/hooks", {"name": "a", "scheme": "standard", "template": TEMPLATE, **change})
    assert answer.status == 400, answer.body
    assert problem(answer)["errors"][0]["pointer"].startswith(pointer.rsplit("/x", 1)[0])


async def test_what_the_guardrail_refuses_starts_nothing_and_is_recorded(orch: OrchestratorHarness):
    orch.bearer = await orch.login()
    new = await create(orch)
    body = body_of()
    screening = {"risk": "high", "found": {"injection.template": 1}}
    more = {"refused": "The text has control tokens.", "screening": screening}
    answer = await deliver(orch, new.hook.id, signed(new.secret, body), body, **more)
    assert (answer.status, problem(answer)["code"]) == (403, "goal_refused")
    [row] = await audited(orch, "goal.refused", 1)
    assert (row["target"], row["detail"]) == (new.hook.id, {"reason": "The text has control tokens.", **screening})
    # A stranger without the secret learns nothing of the screening.
    assert (await deliver(orch, new.hook.id, {}, body, **more)).status == 401


async def test_secrets_outlive_the_root_key_that_encrypted_them(tmp_path):
    clock = ManualClock()
    async with open_database(f"sqlite:///{tmp_path}/o.db", clock=clock) as db:
        async with db.transaction() as tx:
            await tx.raw.run_sync(lambda raw: hooks.metadata.create_all(raw, tables=[hooks]))
        first = DatedKey(SigningKey.generate("root"), clock.now())
        old = SecretStore(KeyRing([first]), clock)
        row = {
            "id": "a",
            "tenant": "t",
            "name": "a",
            "scheme": "github",
            "config": {},
            "scopes": "",
            "sub": "s",
            "cred": "c",
        }
        async with db.transaction() as tx:
            await tx.execute(tx.insert(hooks).values(**row, secrets=old.seal("a", "the secret"), created_at=0.0))
        second = DatedKey(SigningKey.generate("root"), clock.now())
        clock.time += OVERLAP_SECONDS + 1
        both = SecretStore(KeyRing([first, second]), clock)
        await reseal_rows(db, hooks, both)

        async def column() -> Any:
            async with db.read() as conn:
                return await conn.scalar(select(hooks.c.secrets))

        now = await column()
        assert b"secret" not in json.dumps(now).encode().replace(b"secrets", b"")
        assert SecretStore(KeyRing([second]), clock).open("a", now) == ("the secret",)
        assert old.open("a", now) == ()
        # Moved to another row it is worth nothing.
        assert both.open("b", now) == ()
        await reseal_rows(db, hooks, both)
        assert await column() == now
