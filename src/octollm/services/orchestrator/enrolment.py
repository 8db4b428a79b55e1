"""Enrolment of arms: enrolment tokens, admission by proof of possession, key rotation and removal.

An arm proves that it knows its enrolment token without sending it, and the orchestrator proves the same along with its
root keys. Failed attempts are audited and throttled by address.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sqlalchemy import delete, func, select, update

from octollm.capability import CapabilityError, Principal, PublicKey
from octollm.capability.enrolment import (
    NONCE_SECONDS,
    EnrolmentClaim,
    EnrolmentTerms,
    EnrolmentTokenIssuer,
    arm_proof,
    check_arm_name,
    is_enrolment_id,
    parse_declared_calls,
    proofs_match,
    root_proof,
    rotation_message,
    scopes_of,
)
from octollm.capability.jose import b64decode
from octollm.capability.tokens import MAX_GRANT_SECONDS
from octollm.clock import Clock, IdGenerator, format_rfc3339
from octollm.contracts.enrolment import (
    EnrolmentNonce,
    EnrolmentRequest,
    EnrolmentResponse,
    EnrolmentTokenList,
    EnrolmentTokenRequest,
    EnrolmentTokenView,
    KeyRotation,
    NewEnrolmentToken,
)
from octollm.contracts.services import SERVICES
from octollm.errors import FieldError, OctoError
from octollm.events import EventLog
from octollm.lru import LruCache
from octollm.services.orchestrator.audit import SYSTEM_TENANT, Actor, record_audit
from octollm.services.orchestrator.registry import MAX_ENROLLED_ARMS, ServiceRegistry
from octollm.services.orchestrator.revocation import RevocationStore
from octollm.storage import Database, Transaction, row_to_dict
from octollm.storage.tables import admissions, arm_keys, arms, join_nonces, joins
from octollm.tasks.store import TransactionHook

MAX_FAILURES = 10
"""Failed attempts of one address within the window, before further ones are refused unread."""
THROTTLE_WINDOW_SECONDS = 60.0
MAX_ADDRESSES = 4096
"""Addresses tracked by the throttle; the least recently failed one is evicted first."""
MAX_ENROLMENT_TOKEN_SECONDS = 30 * 86_400
"""The longest lifetime of an enrolment token."""
MAX_ARM_KEYS = 8
"""Keys of one arm that are valid at the same time."""

_INVALID_PROOF = (
    "The enrolment was refused: the enrolment token does not match this name, key and nonce. Check that the whole token"
    " was copied, that it was created for this name in this installation, and that the root key that created it was"
    " not replaced since."
)


class FailedEnrolmentThrottle:
    """Counts failed attempts by address, in this process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: LruCache[str, tuple[float, int]] = LruCache(MAX_ADDRESSES)

    def check(self, address: str) -> None:
        """Raise ``rate_limited`` for an address with too many failed attempts in the current window."""
        window_start, count = self._failures.get(address) or (0.0, 0)
        remaining = window_start + THROTTLE_WINDOW_SECONDS - self._clock.monotonic()
        if count >= MAX_FAILURES and remaining > 0:
            raise OctoError(
                "Too many refused attempts; wait before the next.", code="rate_limited", retry_after=remaining
            )

    def record_failure(self, address: str) -> None:
        """Count a failed attempt."""
        now = self._clock.monotonic()
        window_start, count = self._failures.get(address) or (now, 0)
        if now - window_start >= THROTTLE_WINDOW_SECONDS:
            window_start, count = now, 0
        self._failures.put(address, (window_start, count + 1))


class EnrolmentTokens:
    """Enrolment tokens of all tenants. They are derived from the root key; the database holds only their terms."""

    def __init__(self, db: Database, root: EnrolmentTokenIssuer, clock: Clock, ids: IdGenerator) -> None:
        self._db = db
        self._root = root
        self._clock = clock
        self._ids = ids

    async def create(self, request: EnrolmentTokenRequest, actor: Actor) -> NewEnrolmentToken:
        """Create a token that admits one arm name in the actor's tenant. It is returned only here.

        Raises ``invalid_body`` for an invalid name, call or lifetime.
        """
        check_arm_name(request.name)
        calls = scopes_of(parse_declared_calls(request.calls))
        if not 1 <= request.lifetime_seconds <= MAX_ENROLMENT_TOKEN_SECONDS:
            detail = f"An enrolment token is valid for 1 to {MAX_ENROLMENT_TOKEN_SECONDS} seconds (30 days)."
            raise OctoError(detail, code="invalid_body", field_errors=(FieldError("/lifetime_seconds", detail),))
        now = self._clock.now()
        terms = EnrolmentTerms(self._ids.hex(), request.name, calls, math.ceil(now) + request.lifetime_seconds)
        row: dict[str, Any] = {
            "id": terms.id,
            "tenant": actor.principal.tenant,
            "name": terms.name,
            "calls": list(calls),
            "sub": actor.principal.sub,
            "created_at": now,
            "expires_at": float(terms.expires),
            "revoked_at": None,
            "used_at": None,
        }
        async with self._db.transaction() as tx:
            await tx.execute(tx.insert(joins).values(row))
            await record_audit(tx, actor, "join.made", terms.id, now, {"name": terms.name, "calls": list(calls)})
        return NewEnrolmentToken(_token_view_from_row(row, now), self._root.derive_token(terms, now))

    async def list(self, tenant: str) -> EnrolmentTokenList:
        """Return up to 200 enrolment tokens of a tenant, the newest first, without their secrets."""
        query = select(joins).where(joins.c.tenant == tenant).order_by(joins.c.created_at.desc()).limit(200)
        async with self._db.read() as conn:
            rows = await conn.all(query)
        now = self._clock.now()
        return EnrolmentTokenList(tuple(_token_view_from_row(row_to_dict(row), now) for row in rows))

    async def revoke(self, token_id: str, actor: Actor, *, hook: TransactionHook | None = None) -> None:
        """Revoke a token of the actor's tenant; raise ``not_found`` for another's. Arms it admitted stay enrolled.

        What ``hook`` writes is part of the same transaction.
        """
        now = self._clock.now()
        async with self._db.transaction() as tx:
            result = await tx.execute(
                update(joins)
                .where(
                    joins.c.id == token_id,
                    joins.c.tenant == actor.principal.tenant,
                    joins.c.revoked_at.is_(None),
                )
                .values(revoked_at=now)
            )
            if result.rowcount != 1:
                raise OctoError("There is no such enrolment token, or it is revoked already.", code="not_found")
            await record_audit(tx, actor, "join.revoked", token_id, now)
            if hook is not None:
                await hook(tx)


def terms_from_row(row: Mapping[str, Any]) -> EnrolmentTerms:
    """Return the terms that a row's token is derived from."""
    return EnrolmentTerms(row["id"], row["name"], tuple(row["calls"]), int(row["expires_at"]))


def _token_view_from_row(row: Mapping[str, Any], now: float) -> EnrolmentTokenView:
    state = "revoked" if row["revoked_at"] is not None else "expired" if row["expires_at"] <= now else "good"
    used_at = row["used_at"]
    return EnrolmentTokenView(
        row["id"],
        row["name"],
        tuple(row["calls"]),
        row["tenant"],
        format_rfc3339(row["created_at"]),
        format_rfc3339(row["expires_at"]),
        state,
        None if used_at is None else format_rfc3339(used_at),
    )


@dataclass(frozen=True, slots=True)
class Requester:
    """The sender of an enrolment request, known only by its address."""

    address: str
    request_id: str = ""
    correlation_id: str = ""

    def actor(self, name: str, tenant: str = SYSTEM_TENANT) -> Actor:
        """Return the actor for the audit log: the claimed arm name, not yet authenticated."""
        return Actor(Principal("unknown", "unknown", tenant), self.request_id, self.correlation_id, name[:64])


class EnrolmentAuthority:
    """The orchestrator's half of the enrolment protocol."""

    def __init__(
        self,
        db: Database,
        log: EventLog,
        root: EnrolmentTokenIssuer,
        roots: Mapping[str, PublicKey],
        registry: ServiceRegistry,
        revocation_store: RevocationStore,
        clock: Clock,
        ids: IdGenerator,
    ) -> None:
        self._db = db
        self._log = log
        self._root = root
        self._roots = roots
        self._registry = registry
        self._revocation_store = revocation_store
        self._clock = clock
        self._ids = ids
        self._throttle = FailedEnrolmentThrottle(clock)

    def issue_nonce(self) -> EnrolmentNonce:
        """Return a nonce. It is authenticated rather than stored, so that requesting many uses no memory."""
        return EnrolmentNonce(self._root.create_nonce(self._ids.hex(), self._clock.now()), int(NONCE_SECONDS))

    async def enrol(self, request: EnrolmentRequest, requester: Requester) -> EnrolmentResponse:
        """Admit an arm by its proof, and prove the root keys to it.

        Raises ``join_refused``, with a reason only if the token was proved, and ``rate_limited`` for an address with
        too many failed attempts. Each refusal is audited.
        """
        # Before any query: the sender is not authenticated, and guessing must cost the installation little.
        self._throttle.check(requester.address)
        row, key, secret = await self._verify_proof(request, requester)
        claim = _build_claim(request, key)
        now = self._clock.now()
        fault = _find_fault(row, request.calls, now)
        if fault is None:
            async with self._registry.refreshing():
                fault = await self._admit_and_audit(row, key.thumbprint, request, requester)
        if fault is not None:
            await self._refuse(requester, request, *fault, tenant=row["tenant"])
        jwks = tuple(root.to_jwk() for root in self._roots.values())
        return EnrolmentResponse(jwks, root_proof(secret, claim, self._roots))

    async def rotate_key(self, name: str, request: KeyRotation, requester: Requester) -> None:
        """Add a key of the arm that requests it; its earlier keys stay valid for one more hour.

        Raises ``scope_missing`` for a service that did not enrol, ``invalid_body`` for a key without a valid proof.
        """
        key = _parse_public_key(request.jwk)
        if key is None or not key.verify(_decode_signature(request.proof), rotation_message(name, key.thumbprint)):
            raise OctoError("The new key must sign the arm's name and its own thumbprint.", code="invalid_body")
        if key.thumbprint in self._roots:
            raise OctoError("That key belongs to the installation itself.", code="invalid_body")
        async with self._registry.refreshing(), self._db.transaction() as tx:
            now = await tx.now()
            row = await tx.first(select(admissions).where(admissions.c.name == name).with_for_update())
            if row is None:
                raise OctoError(f"{name} did not enrol: its keys come from its settings.", code="scope_missing")
            await tx.execute(delete(arm_keys).where(arm_keys.c.name == name, arm_keys.c.until < now))
            # Grants live for up to an hour and are bound to the old key, so it must outlive them.
            await tx.execute(
                update(arm_keys)
                .where(arm_keys.c.name == name, arm_keys.c.until.is_(None), arm_keys.c.jkt != key.thumbprint)
                .values(until=now + MAX_GRANT_SECONDS)
            )
            count = await tx.scalar(select(func.count()).select_from(arm_keys).where(arm_keys.c.name == name))
            if count >= MAX_ARM_KEYS:
                raise OctoError(f"{name} changed its key {MAX_ARM_KEYS} times within an hour.", code="state_conflict")
            fresh = {"added_at": now, "until": None}
            await tx.execute(
                tx.insert(arm_keys)
                .values(name=name, jkt=key.thumbprint, **fresh)
                .on_conflict_do_update(index_elements=[arm_keys.c.name, arm_keys.c.jkt], set_=fresh)
            )
            await record_audit(
                tx, requester.actor(name, row["tenant"]), "key.rotated", name, now, {"jkt": key.thumbprint}
            )

    async def remove(self, name: str, actor: Actor, *, hook: TransactionHook | None = None) -> None:
        """Remove an arm and free its name: its keys, its grants and its enrolment tokens become invalid.

        Raises ``arm_unknown`` for a name that is not enrolled in the actor's tenant. What ``hook`` writes is part of
        the same transaction.
        """
        if name in SERVICES:
            raise OctoError(f"{name} belongs to the installation itself and cannot be removed.", code="arm_unknown")
        tenant = actor.principal.tenant
        async with self._registry.refreshing(), self._db.transaction() as tx:
            now = await tx.now()
            result = await tx.execute(
                delete(admissions).where(admissions.c.name == name, admissions.c.tenant == tenant)
            )
            if result.rowcount != 1:
                raise OctoError(f"No arm {name} is enrolled here.", code="arm_unknown")
            await tx.execute(delete(arms).where(arms.c.name == name))
            await tx.execute(
                update(joins).where(joins.c.name == name, joins.c.revoked_at.is_(None)).values(revoked_at=now)
            )
            await self._revocation_store.add(tx, "aud", name, tenant)
            if hook is not None:
                await hook(tx)
            await self._log.append(
                tx, "arm.removed", subject=f"arm/{name}", tenant=tenant, source="orchestrator", data={"arm": name}
            )
            await record_audit(tx, actor, "arm.removed", name, now)

    async def _verify_proof(
        self, request: EnrolmentRequest, requester: Requester
    ) -> tuple[dict[str, Any], PublicKey, bytes]:
        """Return the row of the proved token, the arm's key and the token's key; refuse without a reason."""
        row: dict[str, Any] | None = None
        if is_enrolment_id(request.join):
            async with self._db.read() as conn:
                result = await conn.first(select(joins).where(joins.c.id == request.join))
            row = None if result is None else row_to_dict(result)
        # An unknown token takes the same steps as a known one, so that timing does not reveal which ids exist.
        terms = terms_from_row(row) if row is not None else EnrolmentTerms(request.join, request.name, (), 0)
        key = _parse_public_key(request.jwk)
        now = self._clock.now()
        secret: bytes | None = None
        for candidate in self._root.derive_keys(terms, now):
            if key is not None and proofs_match(arm_proof(candidate, _build_claim(request, key)), request.proof):
                secret = candidate
        is_proved = secret is not None and self._root.is_valid_nonce(request.nonce, now)
        if row is None or key is None or secret is None or not is_proved or row["name"] != request.name:
            await self._refuse(requester, request, "proof", _INVALID_PROOF)
        return row, key, secret

    async def _admit_and_audit(
        self, row: Mapping[str, Any], jkt: str, request: EnrolmentRequest, requester: Requester
    ) -> tuple[str, str] | None:
        """Admit an arm and audit it; on refusal return the reason for the audit log and its text."""
        async with self._db.transaction() as tx:
            now = await tx.now()
            # A refusal is returned, not raised: an exception would roll back the nonce, which could then be used again.
            fault = await self._admit(tx, row, jkt, request.nonce, now)
            if fault is None:
                detail = {"join": row["id"], "jkt": jkt, "calls": row["calls"]}
                await record_audit(
                    tx, requester.actor(request.name, row["tenant"]), "arm.admitted", request.name, now, detail
                )
        return fault

    async def _admit(
        self, tx: Transaction, row: Mapping[str, Any], jkt: str, nonce: str, now: float
    ) -> tuple[str, str] | None:
        """Write the admission, or return the reason for a refusal and its text."""
        await tx.execute(delete(join_nonces).where(join_nonces.c.until < now))
        # The primary key decides between two uses of one nonce, at whichever replica.
        nonce_use = tx.insert(join_nonces).values(nonce=nonce, until=now + NONCE_SECONDS).on_conflict_do_nothing()
        if (await tx.execute(nonce_use)).rowcount != 1:
            return "nonce", "The nonce was used before; request another."
        name = row["name"]
        fresh = {"calls": list(row["calls"]), "join_id": row["id"]}
        admission = await tx.first(select(admissions).where(admissions.c.name == name).with_for_update())
        if admission is None:
            if await tx.scalar(select(func.count()).select_from(admissions)) >= MAX_ENROLLED_ARMS:
                return "full", f"{MAX_ENROLLED_ARMS} arms are enrolled, which is the maximum; remove one first."
            if await tx.scalar(select(func.count()).select_from(arm_keys).where(arm_keys.c.jkt == jkt)):
                return "key", "The key belongs to another arm; each arm needs its own."
            await tx.execute(tx.insert(admissions).values(name=name, tenant=row["tenant"], admitted_at=now, **fresh))
            await tx.execute(tx.insert(arm_keys).values(name=name, jkt=jkt, added_at=now))
        else:
            key_count = select(func.count()).select_from(arm_keys).where(
                arm_keys.c.name == name,
                arm_keys.c.jkt == jkt,
                arm_keys.c.until.is_(None) | (arm_keys.c.until > now),
            )  # fmt: skip
            if admission["tenant"] != row["tenant"] or not await tx.scalar(key_count):
                return "taken", (
                    f"The name {name} is enrolled with another key. An arm adds a new key with its present one; to give"
                    " the name to another arm, remove the first with `octollm arms remove`."
                )
            await tx.execute(update(admissions).where(admissions.c.name == name).values(**fresh))
        await tx.execute(update(joins).where(joins.c.id == row["id"]).values(used_at=now))
        return None

    async def _refuse(
        self, requester: Requester, request: EnrolmentRequest, reason: str, detail: str, tenant: str = SYSTEM_TENANT
    ) -> NoReturn:
        self._throttle.record_failure(requester.address)
        # A transaction of its own, so that the refusal is audited although nothing was admitted.
        async with self._db.transaction() as tx:
            audit_detail = {"reason": reason, "join": request.join[:64], "address": requester.address}
            await record_audit(
                tx,
                requester.actor(request.name, tenant),
                "arm.refused",
                request.name[:64],
                self._clock.now(),
                audit_detail,
            )
        raise OctoError(detail, code="join_refused")


def _find_fault(row: Mapping[str, Any], calls: Sequence[str], now: float) -> tuple[str, str] | None:
    """Return the reason why a proved token admits no arm with these calls, and its text; ``None`` if it does."""
    if row["revoked_at"] is not None:
        return "revoked", "The enrolment token was revoked; create another with `octollm keys enrol`."
    if row["expires_at"] <= now:
        return "expired", "The enrolment token has expired; create another with `octollm keys enrol`."
    excess = sorted(set(calls) - set(row["calls"]))
    if excess:
        admitted = ", ".join(row["calls"]) or "no calls"
        return "calls", f"The enrolment token does not admit {', '.join(excess)[:500]}; it admits {admitted}."
    return None


def _build_claim(request: EnrolmentRequest, key: PublicKey) -> EnrolmentClaim:
    return EnrolmentClaim(request.nonce, request.name, key.thumbprint, request.calls)


def _parse_public_key(jwk: Mapping[str, str]) -> PublicKey | None:
    try:
        return PublicKey.from_jwk(jwk)
    except CapabilityError:
        return None


def _decode_signature(text: str) -> bytes:
    try:
        return b64decode(text)
    except CapabilityError:
        return b""
