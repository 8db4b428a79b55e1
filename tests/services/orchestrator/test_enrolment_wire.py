"""Arms of one's own join a real orchestrator over sockets, work, and are held to what their secret admitted."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
from enrolled import as_service, base_of, create_token, enrol_as, enrolled, svc
from orchestrator_kit import OrchestratorHarness, problem

from octollm.arm import Arm, Context
from octollm.capability import SigningKey
from octollm.capability.enrolment import EnrolmentClaim, EnrolmentToken, arm_proof
from octollm.capability.jose import b64encode
from octollm.contracts.enrolment import EnrolmentNonce, EnrolmentRequest, EnrolmentResponse
from octollm.contracts.task import ExecuteResult, Task
from octollm.errors import OctoError
from octollm.rpc.call import IncomingCall, Operation
from octollm.rpc.discovery import StaticDiscovery
from octollm.rpc.enrolment import rotate_key
from octollm.rpc.service import build_service
from octollm.rpc.transport import listen
from octollm.testing import wait_until


def translator(name: str = "translator", *calls: str) -> Arm:
    arm = Arm(name, "Translates text between languages.", calls=calls)

    @arm.operation
    async def execute(task: Task, ctx: Context) -> str:
        """Translate a text."""
        await ctx.emit("hola")
        return f"hola: {task.goal}"

    del execute
    return arm


async def audited(orch: OrchestratorHarness) -> list[dict[str, Any]]:
    """Return the audit trail's rows, oldest first."""

    def rows() -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(orch.home / "data" / "orchestrator.db")) as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute("SELECT * FROM audit ORDER BY position")]

    return await asyncio.to_thread(rows)


async def events(orch: OrchestratorHarness, tenant_types: str = "arm.") -> list[dict[str, Any]]:
    answer = await orch.send("GET", "/events?limit=200")
    return [e for e in msgspec.json.decode(answer.body)["events"] if e["event_type"].startswith(tenant_types)]


async def test_an_arm_joins_is_found_by_the_registry_and_works(orch: OrchestratorHarness) -> None:
    async with enrolled(orch, translator()) as arm:
        await wait_until(lambda: _has_event(orch, "arm.registered"), description="the event is out")
        view = await orch.run({"goal": "good morning", "assigned_arm": "translator"})
        assert (view.status, view.output) == ("completed", "hola: good morning")
        listed = msgspec.json.decode((await orch.send("GET", "/arms")).body)["arms"]
        [view] = [each for each in listed if each["name"] == "translator"]
        assert (view["state"], view["urls"], view["operations"]) == ("healthy", [arm.url], ["execute"])
        ready = msgspec.json.decode((await orch.harness.http.send("GET", arm.url + "/ready", {}, None, seconds=5)).body)
        assert ready["dependencies"]["registration"]["ok"]
    # Drained in order: nothing of it is left to be called.
    await wait_until(lambda: _has_event(orch, "arm.unhealthy"), description="the arm has no process left")
    view = await orch.run(
        {"goal": "again", "assigned_arm": "translator", "budget": {"max_retries": 0, "max_time_seconds": 5}}
    )
    assert view.status == "failed"
    assert view.error is not None


async def _has_event(orch: OrchestratorHarness, event: str) -> bool:
    return any(e["event_type"] == event and e["data"]["arm"] == "translator" for e in await events(orch))


async def test_the_planner_is_told_of_it_while_it_answers(orch: OrchestratorHarness) -> None:
    async with enrolled(orch, translator()):
        await orch.run({"goal": "one"})
        [info] = [arm for arm in orch.script.planned[-1].arms if arm.name == "translator"]
        assert info.description.startswith("Translates text")
    await orch.run({"goal": "two"})
    assert "translator" not in {arm.name for arm in orch.script.planned[-1].arms}


async def test_what_an_arm_did_not_declare_it_may_not_call(orch: OrchestratorHarness) -> None:
    arm = Arm("translator", "Translates text.", calls=["models:chat"])

    @arm.operation
    async def execute(task: Task, ctx: Context) -> ExecuteResult:
        return await ctx.call("coder", "execute", task, ExecuteResult)

    del execute
    async with enrolled(orch, arm):
        view = await orch.run({"goal": "overreach", "assigned_arm": "translator"})
    assert view.status == "failed"
    assert view.error is not None
    assert view.error.code == "authority_missing"
    assert "coder:execute" in view.error.reasons[0]
    assert orch.script.executed == []


async def test_what_an_arm_declared_it_may_call(orch: OrchestratorHarness) -> None:
    arm = Arm("delegate", "Has the coder do it.", calls=["coder:execute"])

    @arm.operation
    async def execute(task: Task, ctx: Context) -> ExecuteResult:
        return await ctx.call("coder", "execute", task, ExecuteResult)

    del execute
    async with enrolled(orch, arm):
        # The small coder of this test declares nothing, but the table of built-in calls is what is granted.
        view = await orch.run({"goal": "pass on", "assigned_arm": "delegate"})
    assert (view.status, view.output) == ("completed", "done: pass on")


async def test_one_arm_of_ones_own_calls_another_by_the_directory(orch: OrchestratorHarness) -> None:
    arm = Arm("polyglot", "Asks the translator.", calls=["translator:execute"])

    @arm.operation
    async def execute(task: Task, ctx: Context) -> ExecuteResult:
        return await ctx.call("translator", "execute", task, ExecuteResult)

    del execute
    async with enrolled(orch, translator()), enrolled(orch, arm):
        view = await orch.run({"goal": "twice", "assigned_arm": "polyglot"})
    assert (view.status, view.output) == ("completed", "hola: twice")


# Attacks on joining


class EnrolmentForge:
    """A join as editable parts: an attacker changes one, and signs again with what it has."""

    def __init__(self, orch: OrchestratorHarness, secret: str, name: str = "translator") -> None:
        self.orch = orch
        self.secret = EnrolmentToken.parse(secret)
        self.name = name
        self.key = SigningKey.generate(name)

    async def nonce(self) -> str:
        answer = await self.orch.harness.send("orchestrator", "POST", "/arms/nonce")
        return msgspec.json.decode(answer.body, type=EnrolmentNonce).nonce

    async def request(self, calls: tuple[str, ...] = ("models:chat",), nonce: str | None = None) -> EnrolmentRequest:
        nonce = nonce or await self.nonce()
        claim = EnrolmentClaim(nonce, self.name, self.key.thumbprint, calls)
        proof = arm_proof(self.secret.key, claim)
        return EnrolmentRequest(self.secret.id, self.name, self.key.public.to_jwk(), calls, nonce, proof)

    async def send(self, request: object) -> Any:
        return await self.orch.harness.send("orchestrator", "POST", "/arms/join", body=request)


ALTERED = {
    "name": lambda request: msgspec.structs.replace(request, name="translator2"),
    "key": lambda request: msgspec.structs.replace(request, jwk=SigningKey.generate().public.to_jwk()),
    "no key": lambda request: msgspec.structs.replace(request, jwk={"kty": "OKP"}),
    "calls": lambda request: msgspec.structs.replace(request, calls=()),
    "proof": lambda request: msgspec.structs.replace(request, proof=b64encode(b"x" * 32)),
    "no proof": lambda request: msgspec.structs.replace(request, proof=""),
    "id": lambda request: msgspec.structs.replace(request, join="0" * 32),
    "no id": lambda request: msgspec.structs.replace(request, join="x"),
}


async def test_an_altered_request_is_refused_alike_and_audited(orch: OrchestratorHarness) -> None:
    forge = EnrolmentForge(orch, (await create_token(orch, "translator", "models:chat")).secret)
    said = set()
    for alter in ALTERED.values():
        answer = await forge.send(alter(await forge.request()))
        assert (answer.status, problem(answer)["code"]) == (403, "join_refused")
        said.add(problem(answer)["detail"])
    assert len(said) == 1, "a prober learns nothing of what was wrong"
    refused = [row for row in await audited(orch) if row["action"] == "arm.refused"]
    assert len(refused) == len(ALTERED)
    assert all("proof" in row["detail"] for row in refused)
    secret = b64encode(forge.secret.key)
    assert not any(secret in str(row) for row in await audited(orch))
    assert problem(await as_service(orch, "translator", forge.key, "GET", "/directory"))["code"] == "token_invalid"


async def test_a_nonce_is_used_once(orch: OrchestratorHarness) -> None:
    forge = EnrolmentForge(orch, (await create_token(orch, "translator", "models:chat")).secret)
    request = await forge.request()
    first = await forge.send(request)
    assert first.status == 200, first.body
    assert len(msgspec.json.decode(first.body, type=EnrolmentResponse).roots) == 1
    again = await forge.send(request)
    assert problem(again)["code"] == "join_refused"
    assert "nonce" in problem(again)["detail"]
    # A nonce of its own, or an old installation's, is none of ours.
    forged = await forge.send(await forge.request(nonce=b64encode(b"0" * 40)))
    assert problem(forged)["code"] == "join_refused"
    assert (await forge.send(await forge.request())).status == 200, "joining again with the same key is harmless"


async def test_guessing_is_slowed(orch: OrchestratorHarness) -> None:
    forge = EnrolmentForge(orch, (await create_token(orch, "translator", "models:chat")).secret)
    good = await forge.request()
    for _ in range(10):
        assert (await forge.send(msgspec.structs.replace(good, proof="x"))).status == 403
    answer = await forge.send(good)
    assert (answer.status, problem(answer)["code"]) == (429, "rate_limited")
    assert int(answer.headers["retry-after"]) > 30


async def test_a_revoked_and_an_expired_secret(orch: OrchestratorHarness) -> None:
    made = await create_token(orch, "translator", "models:chat")
    short = await create_token(orch, "weather", seconds=1)
    assert (await orch.send("DELETE", f"/joins/{made.join.id}")).status == 200
    assert (await orch.send("DELETE", f"/joins/{made.join.id}")).status == 404
    forge = EnrolmentForge(orch, made.secret)
    answer = await forge.send(await forge.request())
    assert (problem(answer)["code"], "revoked" in problem(answer)["detail"]) == ("join_refused", True)

    async def expired() -> bool:
        listed = msgspec.json.decode((await orch.send("GET", "/joins")).body)["joins"]
        return {each["name"]: each["state"] for each in listed} == {"translator": "revoked", "weather": "expired"}

    await wait_until(expired, description="the short secret has expired")
    forge = EnrolmentForge(orch, short.secret, "weather")
    answer = await forge.send(await forge.request(calls=()))
    assert (problem(answer)["code"], "expired" in problem(answer)["detail"]) == ("join_refused", True)


async def test_more_calls_than_the_secret_admits_are_named(orch: OrchestratorHarness) -> None:
    made = await create_token(orch, "translator", "models:chat")
    key = SigningKey.generate("translator")
    with pytest.raises(OctoError, match=r"does not admit executor:run; it admits models:chat") as caught:
        await enrol_as(orch, "translator", made.secret, key=key, calls=["models:chat", "executor:run"])
    assert caught.value.code == "join_refused"
    roots = await enrol_as(orch, "translator", made.secret, key=key, calls=["models:chat"])
    # And not at its registration either.
    body = {
        "description": "x",
        "operations": ["execute"],
        "calls": ["?executor:run"],
        "accepts": [],
        "url": "http://h:1",
    }
    answer = await as_service(orch, "translator", key, "POST", "/arms/register", body)
    assert (answer.status, problem(answer)["code"]) == (403, "authority_missing")
    assert "executor:run" in problem(answer)["detail"]
    assert roots == orch.harness.roots


async def test_a_second_claim_to_a_name_is_refused_whatever_secret_it_brings(orch: OrchestratorHarness) -> None:
    first = await create_token(orch, "translator")
    second = await create_token(orch, "translator", "models:chat")
    await enrol_as(orch, "translator", first.secret, key=SigningKey.generate())
    for made in (first, second):
        with pytest.raises(OctoError, match="enrolled with another key") as caught:
            await enrol_as(orch, "translator", made.secret, key=SigningKey.generate())
        assert caught.value.code == "join_refused"
    refused = [row for row in await audited(orch) if row["action"] == "arm.refused"]
    assert [row["target"] for row in refused] == ["translator", "translator"]
    assert all("taken" in row["detail"] for row in refused)


async def test_a_key_is_one_arms(orch: OrchestratorHarness) -> None:
    key = SigningKey.generate()
    await enrol_as(orch, "translator", (await create_token(orch, "translator")).secret, key=key)
    with pytest.raises(OctoError, match="belongs to another arm"):
        await enrol_as(orch, "weather", (await create_token(orch, "weather")).secret, key=key)


async def test_a_secret_for_a_name_or_calls_that_cannot_be_is_not_made(orch: OrchestratorHarness) -> None:
    wrong: list[dict[str, Any]] = [{"name": name} for name in ("coder", "orchestrator", "tasks", "a:b", "", "*")]
    wrong += [{"calls": ["keys:write"]}, {"calls": ["models:*"]}, {"lifetime_seconds": 0}]
    for body in wrong:
        answer = await orch.send("POST", "/joins", {"name": "translator", **body})
        assert (answer.status, problem(answer)["code"]) == (400, "invalid_body"), body


async def test_only_an_administrator_makes_secrets_and_removes_arms(orch: OrchestratorHarness) -> None:
    made = msgspec.json.decode((await orch.send("POST", "/keys", {"name": "u", "scope": "user"})).body)
    orch.bearer = await orch.login(made["secret"])
    for method, path, body in (
        ("POST", "/joins", {"name": "translator"}),
        ("GET", "/joins", None),
        ("DELETE", "/joins/" + "0" * 32, None),
        ("DELETE", "/arms/translator", None),
    ):
        answer = await orch.send(method, path, body)
        assert (answer.status, problem(answer)["code"]) == (403, "scope_missing")


# The other side is an impostor


@contextlib.asynccontextmanager
async def between(orch: OrchestratorHarness, change: Any) -> AsyncGenerator[str]:
    """Serve somebody who passes everything on to the orchestrator, and changes the answer of a join."""

    async def nonce(_call: IncomingCall, _body: object) -> Any:
        return msgspec.json.decode((await orch.harness.send("orchestrator", "POST", "/arms/nonce")).body)

    async def answer(_call: IncomingCall, body: EnrolmentRequest) -> Any:
        sent = await orch.harness.send("orchestrator", "POST", "/arms/join", body=body)
        assert sent.status == 200, sent.body
        return change(msgspec.json.decode(sent.body, type=EnrolmentResponse))

    operations = [
        Operation("nonce", "POST", "/arms/nonce", nonce, auth="public"),
        Operation("join", "POST", "/arms/join", answer, auth="public", body=EnrolmentRequest),
    ]
    bound = listen("127.0.0.1", 0, "impostor")
    async with build_service(base_of(orch, "impostor", SigningKey.generate(), {}), operations).serve(bound):
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


MALLORY = SigningKey.generate("mallory").public
IMPOSTORS = {
    "its own root": lambda answer: msgspec.structs.replace(answer, roots=(MALLORY.to_jwk(),)),
    "one root more": lambda answer: msgspec.structs.replace(answer, roots=(*answer.roots, MALLORY.to_jwk())),
    "no root": lambda answer: msgspec.structs.replace(answer, roots=()),
    "no key": lambda answer: msgspec.structs.replace(answer, roots=({"kty": "oct"},)),
    "another proof": lambda answer: msgspec.structs.replace(answer, proof=b64encode(b"x" * 32)),
}


async def test_roots_are_pinned_only_when_they_are_proved(orch: OrchestratorHarness) -> None:
    made = await create_token(orch, "translator")
    key = SigningKey.generate()
    for what, change in IMPOSTORS.items():
        async with between(orch, change) as url:
            found = StaticDiscovery({"orchestrator": (url,)})
            with pytest.raises(OctoError) as caught:
                await enrol_as(orch, "translator", made.secret, key=key, discovery=found)
        assert caught.value.code == "join_unproven", what


async def test_a_proof_sent_on_unchanged_pins_the_true_roots(orch: OrchestratorHarness) -> None:
    made = await create_token(orch, "translator")
    async with between(orch, lambda answer: answer) as url:
        found = StaticDiscovery({"orchestrator": (url,)})
        roots = await enrol_as(orch, "translator", made.secret, key=SigningKey.generate(), discovery=found)
    assert roots == orch.harness.roots


async def test_an_orchestrator_that_is_not_there_is_waited_for_so_long(orch: OrchestratorHarness) -> None:
    made = await create_token(orch, "translator")
    nobody = StaticDiscovery({"orchestrator": ("http://127.0.0.1:9",)})
    with pytest.raises(OctoError) as caught:
        await enrol_as(
            orch, "translator", made.secret, key=SigningKey.generate(), discovery=nobody, max_wait=0.6
        )  # fmt: skip
    assert caught.value.code in ("connect_failed", "unavailable")


# What a joined arm cannot do


async def test_an_arm_cannot_speak_as_another_service(orch: OrchestratorHarness) -> None:
    key = SigningKey.generate("translator")
    await enrol_as(orch, "translator", (await create_token(orch, "translator")).secret, key=key)
    assert (await as_service(orch, "translator", key, "GET", "/directory")).status == 200
    registration = {"description": "x", "operations": ["execute"], "calls": [], "accepts": [], "url": "http://h:1"}
    for name in ("coder", "reflex", "models", "weather"):
        answer = await as_service(orch, name, key, "POST", "/arms/register", registration)
        assert (answer.status, problem(answer)["code"]) == (401, "token_invalid"), name
    for path, body in (
        ("/token", {"subject_token": "octo_local_test-secret"}),
        ("/budget/reserve", {"bearer": "x", "key": "k", "prompt_tokens": 1, "max_completion_tokens": 1, "model": "m"}),
        ("/budget/settle", {"reservation": "r", "usage": {}}),
    ):
        answer = await as_service(orch, "translator", key, "POST", path, body)
        assert (answer.status, problem(answer)["code"]) == (403, "scope_missing"), path
    # Its token opens nothing that a capability opens.
    for method, path in (("GET", "/tasks"), ("GET", "/keys"), ("GET", "/joins"), ("DELETE", "/arms/coder")):
        answer = await orch.harness.send("orchestrator", method, path, token=svc(orch, "translator", key))
        assert answer.status == 401, path


async def test_an_arm_cannot_read_what_another_was_answered(orch: OrchestratorHarness) -> None:
    key = SigningKey.generate("translator")
    await enrol_as(orch, "translator", (await create_token(orch, "translator")).secret, key=key)
    # A call of the coder, whose answer the orchestrator keeps for it.
    bearer = orch.harness.token("coder:execute")
    sent = await orch.harness.send(
        "coder", "POST", "/execute", token=bearer, body={"goal": "secret"}, headers={"Idempotency-Key": "k-1"}
    )
    assert sent.status == 200
    claim = {"bearer": bearer, "operation": "execute", "key": "k-1", "body_digest": "x", "repeatable": True}
    answer = await as_service(orch, "translator", key, "POST", "/idempotency/claim", {"claims": [claim]})
    refused = msgspec.json.decode(answer.body)["answers"][0]
    assert (refused["outcome"], refused["problem"]["code"]) == ("refused", "token_invalid")
    assert b"secret" not in answer.body
    # With a bearer of its own it finds only its own keys.
    orch.harness.keys["translator"] = key
    own = orch.harness.token("translator:execute")
    claims = {"claims": [claim, claim | {"bearer": own}]}
    answer = await as_service(orch, "translator", key, "POST", "/idempotency/claim", claims)
    outcomes = [each["outcome"] for each in msgspec.json.decode(answer.body)["answers"]]
    assert outcomes == ["refused", "claimed"]


WRONG = {
    "a path": {"url": "http://h:1/x"}, "a user": {"url": "http://a@h:1"}, "no scheme": {"url": "h:1"},
    "a file": {"url": "file:///etc/passwd"}, "the clouds' own": {"url": "http://169.254.169.254"},
    "the same, mapped": {"url": "http://[::ffff:169.254.169.254]:80"}, "a space": {"url": "http://h :1"},
    "anywhere": {"url": "http://0.0.0.0:80"}, "no port": {"url": "http://h:99999999"},
    "an operation of another": {"operations": ["coder:execute"]}, "a wildcard": {"operations": ["*"]},
    "none": {"operations": []}, "too many": {"operations": [f"o{n}" for n in range(33)]},
    "too long": {"description": "x" * 1001}, "about others": {"about": {"plan": "x"}},
    "calls of the root": {"calls": ["keys:write"]}, "calls of people": {"calls": ["tasks:approve"]},
}  # fmt: skip


async def test_wrong_registrations_are_refused(orch: OrchestratorHarness) -> None:
    key = SigningKey.generate("translator")
    await enrol_as(orch, "translator", (await create_token(orch, "translator")).secret, key=key)
    good = {"description": "x", "operations": ["execute"], "calls": [], "accepts": [], "url": "http://h:1"}
    for what, change in WRONG.items():
        answer = await as_service(orch, "translator", key, "POST", "/arms/register", good | change)
        assert (answer.status, problem(answer)["code"]) == (400, "invalid_body"), what
    assert (await as_service(orch, "translator", key, "POST", "/arms/register", good)).status == 200
    assert (await as_service(orch, "memory", orch.harness.keys["memory"], "POST", "/arms/register", good)).status == 403


async def test_an_arm_has_so_many_processes_at_most(orch: OrchestratorHarness) -> None:
    key = SigningKey.generate("translator")
    await enrol_as(orch, "translator", (await create_token(orch, "translator")).secret, key=key)
    good = {"description": "x", "operations": ["execute"], "calls": [], "accepts": []}
    statuses = [
        (
            await as_service(
                orch,
                "translator",
                key,
                "POST",
                "/arms/register",
                good | {"url": f"http://h:{n + 1}", "instance": str(n)},
            )
        ).status
        for n in range(33)
    ]
    assert statuses == [200] * 32 + [409]


# Keys and removal


async def test_a_new_key_comes_signed_by_an_old_one(orch: OrchestratorHarness) -> None:
    old, new, other = (SigningKey.generate("translator") for _ in range(3))
    roots = await enrol_as(orch, "translator", (await create_token(orch, "translator")).secret, key=old)
    base = base_of(orch, "translator", old, roots)
    await rotate_key(base.client, base.identity, new)
    for key in (old, new):
        assert (await as_service(orch, "translator", key, "GET", "/directory")).status == 200
    assert (await as_service(orch, "translator", other, "GET", "/directory")).status == 401
    assert await orch.harness.base("coder").directory.thumbprint("translator") == new.thumbprint
    # The new key's signature is its own, over this arm's name.
    message = b"x"
    stolen = {"jwk": other.public.to_jwk(), "proof": b64encode(other.sign(message))}
    answer = await as_service(orch, "translator", new, "POST", "/arms/keys", stolen)
    assert problem(answer)["code"] == "invalid_body"
    coder = orch.harness.base("coder")
    with pytest.raises(OctoError) as caught:
        await rotate_key(coder.client, coder.identity, other)
    assert caught.value.code == "scope_missing"
    assert "key.rotated" in {row["action"] for row in await audited(orch)}


async def test_a_removed_arm_is_nobody_and_its_name_is_free(orch: OrchestratorHarness) -> None:
    made = await create_token(orch, "translator")
    async with enrolled(orch, translator()) as arm:
        assert (await orch.send("DELETE", "/arms/translator")).status == 200
        answer = await as_service(orch, "translator", arm.key, "GET", "/directory")
        assert (answer.status, problem(answer)["code"]) == (401, "token_invalid")
        assert (await orch.send("DELETE", "/arms/translator")).status == 400
        # Its secrets went with it, also those that nobody used.
        with pytest.raises(OctoError, match="revoked"):
            await enrol_as(orch, "translator", made.secret, key=arm.key)
        submitted = await orch.send("POST", "/tasks", {"goal": "x", "assigned_arm": "translator"})
        assert problem(submitted)["code"] == "arm_unknown"
    fresh = SigningKey.generate("translator")
    await enrol_as(orch, "translator", (await create_token(orch, "translator")).secret, key=fresh)
    assert (await orch.send("DELETE", "/arms/coder")).status == 400
    assert {"arm.admitted", "arm.removed"} <= {row["action"] for row in await audited(orch)}
