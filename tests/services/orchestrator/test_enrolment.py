"""The registry in SQL: two orchestrators and a restart agree, and silent instances are dropped, each with one event."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import select, update

from octollm.capability import DeclaredCall, Principal, ScopeSet, SigningKey
from octollm.capability.enrolment import EnrolmentClaim, EnrolmentToken, EnrolmentTokenIssuer, arm_proof
from octollm.clock import Uuid7Generator
from octollm.contracts.enrolment import ArmRegistration, EnrolmentRequest, EnrolmentTokenRequest
from octollm.errors import OctoError
from octollm.events import EventLog
from octollm.services.orchestrator.accounts import Accounts, expand_scopes
from octollm.services.orchestrator.audit import Actor
from octollm.services.orchestrator.enrolment import (
    MAX_FAILURES,
    THROTTLE_WINDOW_SECONDS,
    EnrolmentAuthority,
    EnrolmentTokens,
    FailedEnrolmentThrottle,
    Requester,
)
from octollm.services.orchestrator.instances import HEARTBEAT_TIMEOUT_SECONDS, InstanceRegistry
from octollm.services.orchestrator.registry import ServiceRegistry
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.storage import Database, open_database
from octollm.storage.migrations import migrate
from octollm.storage.tables import arm_keys, events, joins
from octollm.testing import ManualClock

ROOT = SigningKey.generate("root")
ACTOR = Actor(Principal("admin", "key-1", "acme"))
ASKER = Requester("192.0.2.1")


class Replica:
    """What one orchestrator has of arms, over a database that others share."""

    def __init__(self, db: Database, clock: ManualClock) -> None:
        self.db, self.clock = db, clock
        ids = Uuid7Generator(clock)
        log = EventLog(db, clock, ids)
        root = EnrolmentTokenIssuer(ROOT)
        self.registry = ServiceRegistry(db, clock, {"coder": SigningKey.generate("coder").public})
        self.instances = InstanceRegistry(db, log, self.registry)
        self.tokens = EnrolmentTokens(db, root, clock, ids)
        self.revocations = RevocationStore(db, log, clock)
        roots = {ROOT.thumbprint: ROOT.public}
        self.enrolment = EnrolmentAuthority(db, log, root, roots, self.registry, self.revocations, clock, ids)
        self.accounts = Accounts(db, clock, ids, self.registry.admitted_arms)

    async def admit(self, name: str, key: SigningKey, *calls: str, actor: Actor = ACTOR) -> None:
        secret = EnrolmentToken.parse((await self.tokens.create(EnrolmentTokenRequest(name, calls), actor)).secret)
        await self.join(secret, name, key, calls)

    async def join(self, secret: EnrolmentToken, name: str, key: SigningKey, calls: tuple[str, ...] = ()) -> None:
        claim = EnrolmentClaim(self.enrolment.issue_nonce().nonce, name, key.thumbprint, calls)
        proof = arm_proof(secret.key, claim)
        await self.enrolment.enrol(
            EnrolmentRequest(secret.id, name, key.public.to_jwk(), calls, claim.nonce, proof), ASKER
        )  # fmt: skip

    async def events(self) -> list[tuple[str, str]]:
        async with self.db.read() as conn:
            rows = await conn.all(select(events).order_by(events.c.row_id).limit(100))
        return [(row["event_type"], row["tenant"]) for row in rows]


def registration(instance: str, url: str, *calls: str) -> ArmRegistration:
    return ArmRegistration("Translates text.", ("execute", "detect"), calls, (), url, instance, {"detect": "Names it."})


@contextlib.asynccontextmanager
async def replicas(home: Path, count: int = 2) -> AsyncGenerator[list[Replica]]:
    clock = ManualClock(1_800_000_000.0)
    async with contextlib.AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(open_database(f"sqlite:///{home}/o.db", clock=clock)) for _ in range(count)
        ]
        await migrate(opened[0], "orchestrator")
        found = [Replica(db, clock) for db in opened]
        for each in found:
            await each.registry.refresh()
        yield found


async def test_an_arm_that_another_replica_admitted_a_moment_ago_is_known_after_a_miss(tmp_path: Path) -> None:
    async with replicas(tmp_path) as (one, two):
        keys = {name: SigningKey.generate() for name in ("translator", "painter")}
        for name, key in keys.items():
            # Within the interval since the last refresh: the miss waits for the next one.
            await two.registry.refresh()
            await one.admit(name, key)
            assert two.registry.thumbprint(name) is None
            await asyncio.gather(*(two.registry.refresh_on_miss() for _ in range(3)))
            assert two.registry.thumbprint(name) == key.thumbprint


async def test_what_one_replica_learns_the_other_knows(tmp_path: Path) -> None:
    async with replicas(tmp_path) as (one, two):
        key = SigningKey.generate()
        await one.admit("translator", key, "models:chat")
        await one.instances.register("translator", registration("i1", "http://a:1", "models:chat"))
        await two.instances.register("translator", registration("i2", "http://b:1", "?models:chat"))
        await one.registry.refresh()
        for each in (one.registry, two.registry):
            assert each.thumbprint("translator") == key.thumbprint
            assert each.addresses("translator") == ("http://a:1", "http://b:1")
            calls = each.declarations()["translator:detect"]
            assert [(call.scope, call.optional) for call in calls] == [("models:chat", True)]
            assert "translator" in each.admitted_arms("acme")
            assert "translator" not in each.admitted_arms("other")
            [info] = [arm for arm in each.list_arms("acme") if arm.name == "translator"]
            assert info.description == "Translates text. Names it."
            assert not each.list_arms("other")
            assert not (await each.list_arm_views("other")).arms
        # A nonce of one is good at the other, once.
        secret = EnrolmentToken.parse((await two.tokens.create(EnrolmentTokenRequest("weather"), ACTOR)).secret)
        claim = EnrolmentClaim(one.enrolment.issue_nonce().nonce, "weather", key.thumbprint, ())
        fresh = SigningKey.generate()
        claim = EnrolmentClaim(claim.nonce, "weather", fresh.thumbprint, ())
        asked = EnrolmentRequest(
            secret.id, "weather", fresh.public.to_jwk(), (), claim.nonce, arm_proof(secret.key, claim)
        )  # fmt: skip
        await two.enrolment.enrol(asked, ASKER)
        with pytest.raises(OctoError, match="nonce was used"):
            await one.enrolment.enrol(asked, ASKER)


async def test_users_have_the_operations_of_their_tenants_arms(tmp_path: Path) -> None:
    async with replicas(tmp_path, 1) as [one]:
        await one.accounts.set_local_key("octo_local_x")
        await one.admit("translator", SigningKey.generate(), actor=Actor(Principal("a", "local", "local")))
        await one.admit("weather", SigningKey.generate(), actor=Actor(Principal("a", "b", "other")))
        scopes = await one.accounts.current_scopes("local")
        assert scopes.allows("translator:execute")
        assert scopes.allows("coder:execute")
        assert not scopes.allows("weather:execute")
        assert not expand_scopes("tasks:create", ("translator",)).allows("translator:execute")


async def test_a_database_that_was_read_or_changed_admits_nobody(tmp_path: Path) -> None:
    async with replicas(tmp_path, 1) as [one]:
        made = await one.tokens.create(EnrolmentTokenRequest("translator", ("models:chat",)), ACTOR)
        secret = EnrolmentToken.parse(made.secret)
        everything = (tmp_path / "o.db").read_bytes() + (tmp_path / "o.db-wal").read_bytes()
        # What follows the id; it may have underscores of its own.
        assert made.secret.partition(f"{made.join.id}_")[2].encode() not in everything
        assert secret.key not in everything
        async with one.db.transaction() as tx:
            await tx.execute(update(joins).values(calls=["executor:run", "models:chat"]))
        with pytest.raises(OctoError, match="does not match this name"):
            await one.join(secret, "translator", SigningKey.generate(), ("executor:run", "models:chat"))


async def test_silent_processes_are_dropped_and_each_change_is_told_once(tmp_path: Path) -> None:
    async with replicas(tmp_path) as (one, two):
        await one.admit("translator", SigningKey.generate())
        await one.instances.register("translator", registration("i1", "http://a:1"))
        await one.instances.register("translator", registration("i2", "http://b:1"))
        one.clock.time += HEARTBEAT_TIMEOUT_SECONDS - 1
        await two.instances.heartbeat("translator", "i2")
        one.clock.time += 2
        assert (await one.instances.sweep(), await two.instances.sweep()) == (1, 0)
        await one.registry.refresh()
        assert one.registry.addresses("translator") == ("http://b:1",)
        assert [name for name, _ in await one.events()] == ["arm.registered", "arm.registered"]
        one.clock.time += HEARTBEAT_TIMEOUT_SECONDS
        assert (await two.instances.sweep(), await one.instances.sweep()) == (1, 0)
        await one.registry.refresh()
        assert one.registry.addresses("translator") == ()
        assert not one.registry.list_arms("acme")
        with pytest.raises(OctoError) as caught:
            await one.instances.heartbeat("translator", "i1")
        assert caught.value.code == "not_found"
        await one.instances.register("translator", registration("i1", "http://a:1"))
        assert await one.events() == [
            ("arm.registered", "acme"),
            ("arm.registered", "acme"),
            ("arm.unhealthy", "acme"),
            ("arm.registered", "acme"),
            ("arm.healthy", "acme"),
        ]


async def test_a_process_that_starts_again_takes_its_address_over(tmp_path: Path) -> None:
    async with replicas(tmp_path, 1) as [one]:
        await one.admit("translator", SigningKey.generate())
        await one.instances.register("translator", registration("i1", "http://a:1"))
        await one.instances.register("translator", registration("i2", "http://a:1"))
        await one.instances.register("translator", registration("i2", "http://a:2"))
        assert one.registry.addresses("translator") == ("http://a:2",)
        await one.instances.deregister("translator", "i1")
        assert (await one.registry.list_arm_views("acme")).arms[0].state == "healthy"
        await one.instances.deregister("translator", "i2")
        assert (await one.registry.list_arm_views("acme")).arms[0].state == "unhealthy"
        assert [name for name, _ in await one.events()].count("arm.unhealthy") == 1


async def test_a_deregistration_that_is_cut_off_after_its_commit_wakes_the_refresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replicas(tmp_path, 1) as [one]:
        await one.admit("translator", SigningKey.generate())
        await one.instances.register("translator", registration("i1", "http://a:1"))
        committed, woken = asyncio.Event(), asyncio.Event()

        async def hang() -> None:
            committed.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(one.registry, "refresh", hang)
        monkeypatch.setattr(one.registry.refresh_loop, "wake", woken.set)
        cut = asyncio.create_task(one.instances.deregister("translator", "i1"))
        await committed.wait()
        cut.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await cut
        assert woken.is_set()


async def test_a_replaced_key_is_good_for_an_hour(tmp_path: Path) -> None:
    async with replicas(tmp_path, 1) as [one]:
        old, new = SigningKey.generate(), SigningKey.generate()
        await one.admit("translator", old)
        async with one.db.transaction() as tx:
            until = one.clock.now() + 3600
            await tx.execute(update(arm_keys).values(until=until))
            await tx.execute(tx.insert(arm_keys).values(name="translator", jkt=new.thumbprint, added_at=until - 3599))
        await one.registry.refresh()
        assert one.registry.directory()["translator"].jkts == (new.thumbprint, old.thumbprint)
        one.clock.time += 3601
        await one.registry.refresh()
        assert one.registry.directory()["translator"].jkts == (new.thumbprint,)


async def test_what_a_removed_arm_was_lent_is_revoked(tmp_path: Path) -> None:
    async with replicas(tmp_path) as (one, two):
        await one.admit("translator", SigningKey.generate())
        await one.instances.register("translator", registration("i1", "http://a:1"))
        with pytest.raises(OctoError) as caught:
            await one.enrolment.remove("translator", Actor(Principal("admin", "key-9", "other")))
        assert caught.value.code == "arm_unknown", "another tenant's arm is not there"
        await one.enrolment.remove("translator", ACTOR)
        assert "translator" not in one.registry.directory()
        await two.registry.refresh()
        await two.revocations.load()
        assert "translator" not in two.registry.directory()
        assert [(kind, value, tenant) for kind, value, _at, tenant in two.revocations.revocations.entries()] == [
            ("aud", "translator", "acme")
        ]
        assert (await one.events())[-1] == ("arm.removed", "acme")
        assert [each.state for each in (await one.tokens.list("acme")).joins] == ["revoked"]


async def test_another_tenant_cannot_take_a_name(tmp_path: Path) -> None:
    async with replicas(tmp_path, 1) as [one]:
        key = SigningKey.generate()
        await one.admit("translator", key)
        with pytest.raises(OctoError, match="enrolled with another key"):
            await one.admit("translator", key, actor=Actor(Principal("admin", "key-9", "other")))


async def test_declared_calls_that_are_no_longer_admitted_are_not_lent(tmp_path: Path) -> None:
    async with replicas(tmp_path, 1) as [one]:
        key = SigningKey.generate()
        await one.admit("translator", key, "models:chat", "retriever:search")
        arm = registration("i1", "http://a:1", "models:chat", "retriever:search")
        await one.instances.register("translator", arm)
        # It joins again with a narrower secret, before it registers anew.
        await one.admit("translator", key, "models:chat")
        assert [call.scope for call in one.registry.declarations()["translator:execute"]] == ["models:chat"]
        with pytest.raises(OctoError, match="retriever:search") as caught:
            await one.instances.register("translator", arm)
        assert caught.value.code == "authority_missing"


async def test_an_operation_has_the_calls_that_it_declares_itself(tmp_path: Path) -> None:
    async with replicas(tmp_path, 1) as [replica]:
        await replica.admit("translator", SigningKey.generate(), "models:chat", "judge:validate")
        arm = registration("i1", "http://a:1", "models:chat", "judge:validate")
        own = {"detect": ("?models:chat",), "execute": ("judge:validate",)}
        await replica.instances.register("translator", msgspec.structs.replace(arm, operation_calls=own))
        declarations = replica.registry.declarations()
        assert declarations["translator:detect"] == (DeclaredCall("models:chat", optional=True),)
        assert declarations["translator:execute"] == (DeclaredCall("judge:validate"),)
        # One that is not named has all of the arm's.
        own = {"detect": ()}
        await replica.instances.register("translator", msgspec.structs.replace(arm, operation_calls=own))
        declarations = replica.registry.declarations()
        assert declarations["translator:detect"] == ()
        assert {call.scope for call in declarations["translator:execute"]} == {"models:chat", "judge:validate"}


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"detect": ("executor:run",)}, "The operation detect declares executor:run"),
        ({"translate": ("models:chat",)}, "operations that the arm does not have"),
        ({"detect": ("models",)}, "one operation of one service"),
    ],
)
async def test_calls_of_an_operation_that_are_not_the_arms_are_refused(tmp_path: Path, own, said) -> None:
    async with replicas(tmp_path, 1) as [replica]:
        await replica.admit("translator", SigningKey.generate(), "models:chat")
        arm = registration("i1", "http://a:1", "models:chat")
        with pytest.raises(OctoError, match=said) as caught:
            await replica.instances.register("translator", msgspec.structs.replace(arm, operation_calls=own))
        assert caught.value.code == "invalid_body"


def test_refusals_are_counted_by_address_and_forgotten() -> None:
    clock = ManualClock(1_800_000_000.0)
    attempts = FailedEnrolmentThrottle(clock)
    for _ in range(MAX_FAILURES):
        attempts.check("a")
        attempts.record_failure("a")
    with pytest.raises(OctoError) as caught:
        attempts.check("a")
    assert caught.value.code == "rate_limited"
    assert caught.value.retry_after == THROTTLE_WINDOW_SECONDS
    attempts.check("b")
    clock.time += THROTTLE_WINDOW_SECONDS
    attempts.check("a")
    attempts.record_failure("a")
    attempts.check("a")


def test_a_scope_set_holds_all_arms_that_there_may_be() -> None:
    names = tuple(f"arm{number}" for number in range(100))
    assert ScopeSet.parse(str(expand_scopes("admin", names))).allows("arm99:execute")
